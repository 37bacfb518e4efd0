"""What a fleet does when it is loaded, and when parts of it die."""
