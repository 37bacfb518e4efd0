"""What a caller can set: Settings with its validation, presets, view specifications, parsing, and Cog's schema."""

from seesr.settings.settings import Settings

__all__ = ["Settings"]
