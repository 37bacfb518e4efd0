"""Untrusted bytes <-> pixels: `read`, `picture`, `write`, with the table of output formats and the PNG writer."""
