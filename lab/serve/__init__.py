"""Fault experiments with one `seesr serve`."""
