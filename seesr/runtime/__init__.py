"""Shared runtime services: memory budget, precision with its float32 retry, progress reporting, tile geometry."""
