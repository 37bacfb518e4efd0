"""The command line: `seesr upscale`, `seesr serve`, `seesr doctor` and the others."""

from seesr.cli.commands import main

__all__ = ["main"]
