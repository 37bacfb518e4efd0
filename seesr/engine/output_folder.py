"""A temporary folder for output files of this process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from seesr.images import write

PREFIX = "seesr-outputs-"


class OutputFolder:
    """A fresh folder for the outputs of this process. It holds the latest one and is removed when the process ends.

    Folders of processes that were killed are removed when the next one starts.
    """

    def __init__(self) -> None:
        top = Path(tempfile.gettempdir())
        for old in top.glob(f"{PREFIX}*"):
            if not Path("/proc", old.name.removeprefix(PREFIX)).exists():
                shutil.rmtree(old, ignore_errors=True)
        self.path = top / f"{PREFIX}{os.getpid()}"
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700)
        atexit.register(shutil.rmtree, self.path, ignore_errors=True)

    def clear(self) -> None:
        """Removes the output of the previous prediction."""
        for old in self.path.iterdir():
            old.unlink()

    def save(self, data: bytes, seed: int, suffix: str) -> Path:
        """Writes one file under a name that no other has.

        Raises:
            RuntimeError: the disk is full or read-only.
        """
        path = self.path / f"{seed}-{os.urandom(4).hex()}.{suffix}"
        write.save(data, path)
        return path


def flat(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flattens the metrics: a nested one is named group.name."""
    for name, value in metrics.items():
        group = cast(Mapping[str, Any], value) if isinstance(value, dict) else {"": value}
        for key, number in group.items():
            yield f"{name}.{key}" if key else name, number
