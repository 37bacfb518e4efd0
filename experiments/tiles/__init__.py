"""How near tiles come to one pass, and what they cost."""
