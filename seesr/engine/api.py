"""`seesr.upscale`: upscales with an engine that is loaded on the first call and cached."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast, overload

from seesr.engine.engine import Engine
from seesr.images.source import Source, is_many
from seesr.pipeline.result import Output
from seesr.runtime.progress import Position, Watcher
from seesr.settings import Settings

loading = threading.Lock()


@overload
def upscale(
    source: Source,
    settings: Settings | None = None,
    *,
    bundle: str | Path | None = None,
    device: str | None = None,
    progress: Watcher | bool | None = None,
    **changes: Any,
) -> Output: ...


@overload
def upscale(
    source: Iterable[Source],
    settings: Settings | None = None,
    *,
    bundle: str | Path | None = None,
    device: str | None = None,
    progress: Watcher | bool | None = None,
    **changes: Any,
) -> Iterator[Output]: ...


def upscale(
    source: Source | Iterable[Source],
    settings: Settings | None = None,
    *,
    bundle: str | Path | None = None,
    device: str | None = None,
    progress: Watcher | bool | None = None,
    **changes: Any,
) -> Output | Iterator[Output]:
    """Upscales an image. The first call loads the networks, later ones with the same bundle and device reuse them.

    output = upscale("photo.jpg", scale_factor=2)
    output.save("photo-x2.png")

    Args:
        source: path, bytes of an image file, binary file object, PIL image, or NumPy array: (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8, uint16, or floats from 0 to 1. An iterable of these gives an iterator of
            outputs, which works on each image when it is asked for.
        settings: None: the defaults.
        bundle: folder of the weights; None: SEESR_WEIGHTS, the full bundle or the pocket one, whichever is there.
        device: torch device, such as "cpu" or "cuda:1"; None: SEESR_DEVICE, or the GPU if there is one.
        progress: True: a progress bar (tqdm); False: none; None: a bar in notebooks; or a function that is called with
            a Position at every tile.
        changes: fields of Settings that replace those of `settings`, such as scale_factor=2 or seed=1.

    Raises:
        TypeError: the source is of a type that is not accepted, or a change is not a field of Settings.
        ValueError: the image or a setting cannot be used; one line.
        OSError: a file cannot be read.
        WeightsError: the bundle is missing, damaged or does not fit.
        CannotServe: this machine cannot run this bundle.
        RuntimeError: there is no usable result, or the process was forked after the first call.
    """
    settings = (settings or Settings()).replace(**changes)
    if is_many(source):
        many = cast(Iterable[Source], source)
        return (upscale_one(image, settings, bundle, device, progress) for image in many)
    return upscale_one(cast(Source, source), settings, bundle, device, progress)


def upscale_one(
    source: Source,
    settings: Settings,
    bundle: str | Path | None,
    device: str | None,
    progress: Watcher | bool | None,
) -> Output:
    """Upscales one image on the cached engine, with a progress bar if requested."""
    with loading:
        engine = cached_engine(None if bundle is None else str(bundle), device)
    if callable(progress):
        return engine.run(source, settings, watchers=(progress,))
    if progress is False or (progress is None and "ipykernel" not in sys.modules):
        return engine.run(source, settings)
    with NotebookBar() as bar:
        return engine.run(source, settings, watchers=(bar,))


@functools.lru_cache(maxsize=1)
def cached_engine(bundle: str | None, device: str | None) -> Engine:
    """The engine that `upscale` uses; loading another one frees the one before."""
    return Engine.load(bundle, device)


class NotebookBar:
    """A watcher with one tqdm bar for each stage: a widget in notebooks, a line in terminals."""

    def __enter__(self) -> NotebookBar:
        from tqdm.auto import tqdm

        self.bar = tqdm(unit="tile", leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, position: Position) -> None:
        if position.done < self.bar.n or self.bar.desc != position.stage:
            self.bar.reset(position.total)
            self.bar.desc = position.stage
        self.bar.update(position.done - self.bar.n)
