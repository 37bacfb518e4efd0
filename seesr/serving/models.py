"""The models of a server: names of Replicate's API, each with its bundle of weights and its version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from seesr.networks import weights
from seesr.serving.identity import version_of

NAME = "seesr"  # of the default model, with any owner
TITLE = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")


class Model(NamedTuple):
    """One bundle.

    Attributes:
        title: owner/name; None: the default model, whose name is NAME with any owner.
        version: of the bundle and this program.
        created: when the bundle was made, seconds since 1970.
    """

    title: str | None
    bundle: Path
    version: str
    created: float

    @classmethod
    def read(cls, bundle: Path, title: str | None = None) -> Model:
        """The model of a bundle.

        Raises:
            WeightsError: there is no bundle.
        """
        return cls(title, bundle, version_of(bundle), (bundle / weights.MANIFEST).stat().st_mtime)

    @property
    def example(self) -> str:
        """The title, or one that the default model has."""
        return self.title or f"you/{NAME}"

    def title_for(self, owner: str) -> str:
        """The title, or that of the default model as `owner` may call it."""
        return self.title or f"{owner}/{NAME}"


class Models:
    """All models of a server.

    Args:
        bundle: of the default model, which every route uses that names none.
        bundles: SEESR_BUNDLES.

    Raises:
        ValueError: SEESR_BUNDLES cannot be read; one line.
        WeightsError: a bundle is missing.
    """

    def __init__(self, bundle: Path, bundles: str = "") -> None:
        self.default = Model.read(bundle)
        self.titled: dict[str, Model] = {}
        for entry in filter(None, (part.strip() for part in bundles.split(","))):
            title, _, folder = entry.partition("=")
            if not TITLE.fullmatch(title) or not folder or title in self.titled:
                raise ValueError(f"SEESR_BUNDLES has {entry!r}: write owner/name=folder, each name once")
            self.titled[title] = Model.read(Path(folder), title)
        self.by_version = {model.version: model for model in (self.default, *self.titled.values())}

    def named(self, owner: str, name: str) -> Model | None:
        """The model of this name, if there is one."""
        return self.titled.get(f"{owner}/{name}") or (self.default if name == NAME else None)

    @property
    def examples(self) -> str:
        """The titles for a message."""
        return ", ".join(model.example for model in (self.default, *self.titled.values()))
