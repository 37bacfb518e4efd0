"""HTTP for one machine or many: Replicate's API, a plain API, platform dialects, health, the page. No torch here."""
