"""Measurements. Every module here is a command that writes its figures to `results` through `lab.report`."""
