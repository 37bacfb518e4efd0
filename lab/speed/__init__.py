"""How long everything takes, and where the time goes."""
