"""What the output file can show, as specifications without drawing: `seesr.pipeline.views` draws them.

`all` is not in the table: it is one zip of every view that the result has, without calibrated ones.
"""

from __future__ import annotations

from typing import NamedTuple

ALL = "all"
GAIN = 2  # contrast of the view `difference`


class View(NamedTuple):
    """One way to show a result.

    Attributes:
        columns: number of images side by side; the size limits count them.
        deep: whether it needs a format of 16 bits.
        steered: whether it needs particles that can disagree.
        calibrated: whether it needs a calibration of the bundle; such a view is not part of `all`.
        metrics: numbers needed to read it, added to the metrics.
    """

    columns: int = 1
    deep: bool = False
    steered: bool = False
    calibrated: bool = False
    metrics: dict[str, int] = {}  # noqa: RUF012 (a NamedTuple is never changed)


VIEWS = {
    "image": View(),
    "comparison": View(columns=2),
    "difference": View(metrics={"difference_gain": GAIN}),
    "tiles": View(),
    "uncertainty": View(deep=True, steered=True),
    "confidence": View(steered=True, calibrated=True),
}
