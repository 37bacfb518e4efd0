"""Shared runtime services: memory budget, precision, float32 retry after overflow, progress, tile geometry."""
