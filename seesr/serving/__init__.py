"""The HTTP server: Replicate's API, the plain API, platform adapters, health checks and the web page. No torch."""
