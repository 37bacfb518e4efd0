"""The rectangle of the output that the `region` setting names."""

from __future__ import annotations

import re
from typing import NamedTuple

from seesr.settings.validation import FieldError

NUMBERS = re.compile(r" *(\d{1,9}) *, *(\d{1,9}) *, *(\d{1,9}) *, *(\d{1,9}) *", re.ASCII)


class Region(NamedTuple):
    """A rectangle in output pixels."""

    left: int
    top: int
    width: int
    height: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height

    def check_inside(self, width: int, height: int) -> None:
        """Checks that the rectangle lies in an output of this size.

        Raises:
            ValueError: it reaches outside; the message has the output's size.
        """
        if self.right > width or self.bottom > height:
            raise FieldError(
                f"region {self} ends at pixel {self.right},{self.bottom}, outside the output of {width}x{height} "
                "pixels; choose a region inside the output",
                "region",
            )


def parse_region(text: str) -> Region:
    """Parses "left,top,width,height".

    Raises:
        ValueError: the text is not four whole numbers, or the rectangle has no pixels; one line.
    """
    numbers = NUMBERS.fullmatch(text)
    if numbers is None:
        raise FieldError(
            f"region is {text!r}; it must be left,top,width,height in whole output pixels, such as 0,0,512,512",
            "region",
        )
    region = Region(*map(int, numbers.groups()))
    if not (region.width and region.height):
        raise FieldError(f"region {region} has no pixels; its width and height must be at least 1", "region")
    return region
