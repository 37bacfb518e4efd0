"""How the pocket bundle is made."""
