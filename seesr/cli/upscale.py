"""`seesr upscale`: plans the run, loads the networks if there is work, and upscales the images in order."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from seesr.cli import plan
from seesr.cli.plan import STREAM, Task
from seesr.images.formats import ZIP
from seesr.images.limits import LARGEST_FILE, megapixels
from seesr.networks import weights
from seesr.networks.weights import Bundle, CannotServe, Defaults
from seesr.runtime.progress import LineStream, Position
from seesr.settings import Settings

if TYPE_CHECKING:
    from seesr.engine.engine import Engine
    from seesr.engine.rates import Quote

SECONDS = {  # of a megapixel of the result: (all but the steps, one step); medians of results/bench
    "cuda": (0.31, 0.2),  # with the full weights
    "pocket": (2.4, 8.0),  # of one core of a CPU
    "full": (150.0, 78.0),
}


def upscale(args: argparse.Namespace, settings: Settings) -> int:
    """Upscales all images that the arguments name; an error in one does not stop the others. Returns the exit code."""
    collected = plan.collect(args.paths, args.recursive)
    output = plan.choose_output(args.out, collected.tasks, any(os.path.isdir(path) for path in args.paths))  # noqa: PTH112
    messages = sys.stderr if args.json or output.stream else sys.stdout
    path = bundle_path(args.bundle)
    bundle = weights.read_manifest(path) if (path / weights.MANIFEST).exists() else None
    for flag, file in (("--mask", args.mask), ("--like", args.like)):
        if file is not None and (error := plan.in_one_line(lambda file=file: file.open("rb").close())):
            raise ValueError(f"{flag} {file}: {error}")
    if args.like:
        settings = plan.settings_like(args.like, bundle.digest if bundle else "")
    if output.file is not None:
        settings = settings_for(settings, output.file)
    for reason, count in collected.passed_over.items():
        print(f"{count} skipped, {reason}", file=messages)
    if not collected.tasks and plan.RESULTS not in collected.passed_over:
        raise ValueError(f"there is no image in {', '.join(args.paths)}")
    plan.name_targets(collected.tasks, output, settings)
    run = Run(collected.tasks, settings, messages, args.json)
    sources = {os.path.realpath(task.source) for task in collected.tasks if task.source != STREAM}
    for task in collected.tasks:
        task.error = plan.in_one_line(lambda task=task: check(task, sources, settings, bundle, args))
        if task.error:
            run.failed(task)
    todo = [task for task in collected.tasks if not task.error and not task.done]
    if args.dry_run:
        return run.forecast(bundle, args.device)
    if todo:
        plan.check_folders([task for task in todo if task.target != STREAM])
        already = sum(task.done for task in collected.tasks)
        name = bundle.name if bundle else path
        print(f"{len(todo)} to do, {already} already there, bundle {name}", file=messages)
        from seesr.engine.engine import Engine

        run.all(todo, Engine.load(path, args.device, workers=args.tile_workers), args.mask)
    elif already := sum(task.done for task in collected.tasks):
        print(f"0 to do, {already} already there", file=messages)
    return run.end()


def bundle_path(named: Path | None) -> Path:
    """The folder of the weights."""
    if named is not None:
        return named
    if any(name.startswith("SEESR_") for name in os.environ):  # importing the configuration takes a tenth of a second
        from seesr.config import Configuration

        return Configuration.read().weights or weights.locate()
    return weights.locate()


def settings_for(settings: Settings, file: Path) -> Settings:
    """The settings with the format of the file's suffix.

    Raises:
        ValueError: a zip and one image do not go together.
    """
    suffix = file.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    if (suffix == ZIP) != (settings.suffix == ZIP):
        needs = "needs --output-view all" if suffix == ZIP else "is one image, and --output-view all gives a .zip"
        raise ValueError(f"--out {file} {needs}")
    return settings if suffix == ZIP else settings.replace(output_format=suffix)


def check(task: Task, sources: set[str], settings: Settings, bundle: Bundle | None, args: argparse.Namespace) -> None:
    """Reads a source's header and looks at its target.

    Raises:
        Failure, ValueError, OSError: it cannot be done.
    """
    if task.source == STREAM:
        task.data = sys.stdin.buffer.read(LARGEST_FILE + 1)
    else:
        Path(task.source).stat()  # before the image libraries are imported, which takes two tenths of a second
    from seesr.images.read import open_header, read_file

    data = read_file(Path(task.source)) if task.data is None else task.data
    task.source_size = open_header(data).size
    task.size = settings.output_size(*task.source_size)
    if settings.rectangle is not None:
        task.size = settings.rectangle.width, settings.rectangle.height
    if task.target == STREAM:
        return
    plan.check_target(task, sources, args.overwrite)
    if bundle is not None and args.mask is None and os.path.exists(task.target):  # noqa: PTH110
        task.done = plan.is_done(Path(task.target), settings, bundle, hashlib.sha256(data).hexdigest())


class Run:
    """Runs the tasks and reports each result.

    Args:
        tasks: all of them.
        messages: where lines for people go.
        as_json: one JSON object per image on standard output instead of lines.
    """

    def __init__(self, tasks: list[Task], settings: Settings, messages: TextIO, as_json: bool) -> None:
        self.tasks, self.settings, self.messages, self.as_json = tasks, settings, messages, as_json

    def all(self, tasks: list[Task], engine: Engine, mask: Path | None) -> None:
        """Does the tasks in their order.

        Raises:
            CannotServe: the device has failed.
        """
        for task in self.tasks:
            if task.done and self.as_json:
                self.json(task, already_there=True)
        with RunBar(tasks) as bar:
            for task in tasks:
                bar.next(task)
                task.error = plan.in_one_line(lambda task=task: self.upscale(task, engine, mask, bar))
                if task.error:
                    with bar.hidden():
                        self.failed(task)
                    if not engine.healthy():
                        raise CannotServe(
                            "the device has failed: restart it, then run the command again for the other images"
                        )

    def upscale(self, task: Task, engine: Engine, mask: Path | None, bar: RunBar) -> None:
        started = time.perf_counter()
        source = Path(task.source) if task.data is None else task.data
        output = engine.run(source, self.settings, watchers=(bar,), mask=mask)
        if task.target == STREAM:
            sys.stdout.buffer.write(output.data)
            sys.stdout.buffer.flush()
        else:
            target = Path(task.target)
            target.parent.mkdir(parents=True, exist_ok=True)
            from seesr.images import write

            write.save(output.data, target)
        seconds = round(time.perf_counter() - started, 3)
        with bar.hidden():
            if self.as_json:
                self.json(task, seconds=seconds, seed=output.seed, metrics=output.metrics)
            else:
                line = f"{task.source} -> {task.target}, seed {output.seed}, {seconds:.1f} s"
                print(line, file=self.messages)

    def failed(self, task: Task) -> None:
        """Prints the error of a task."""
        if self.as_json:
            self.json(task, error=task.error)
        print(f"{task.source}: {task.error}", file=sys.stderr)

    def json(self, task: Task, **values: Any) -> None:
        stream = sys.stderr if task.target == STREAM else sys.stdout
        print(json.dumps({"source": task.source, "target": task.target, **values}), file=stream)

    def forecast(self, bundle: Bundle | None, device: str | None) -> int:
        """Prints the planned tasks with what they should take. Returns the exit code.

        Torch is not loaded. Without rates of this machine the times are rough.
        """
        whole, quote = 0.0, quotes_of(bundle, device)
        for task in self.tasks:
            if task.error:
                continue
            width, height = task.size
            result = None if quote is None or task.done else quote(self.settings, task.source_size)
            if task.done:
                seconds, then = 0.0, "already there"
            elif result is None or result.seconds is None:
                seconds = estimate(task, self.settings, bundle, device)
                then = f"about {seconds:.1f} s (rough: no image was measured on this machine yet)"
            else:
                seconds = result.seconds
                then = (
                    f"about {seconds:.1f} s, {result.tiles} tiles, {result.peak_memory_mb.get('host', 0)} MB of memory"
                )
                then += f", {result.bytes / 1e6:.1f} MB file" if result.bytes is not None else ""
                then += f", price {result.price:.4g}" if result.price is not None else ""
            whole += seconds
            if self.as_json:
                values = {"size": [width, height], "already_there": task.done, "estimated_seconds": round(seconds, 1)}
                self.json(task, **values, quote=None if result is None else dataclasses.asdict(result))
            else:
                print(f"{task.source} -> {task.target}, {width}x{height}, {then}", file=self.messages)
        if not self.as_json:
            print(f"about {whole:.1f} s in all; nothing was written", file=self.messages)
        return self.end()

    def end(self) -> int:
        """Prints a summary of the failures. Returns the exit code."""
        failures = [task for task in self.tasks if task.error]
        if len(self.tasks) > 1 and failures:
            print(f"{len(failures)} of {len(self.tasks)} images failed:", file=sys.stderr)
            for task in failures:
                print(f"  {task.source}: {task.error}", file=sys.stderr)
        return 1 if failures else 0


def quotes_of(bundle: Bundle | None, device: str | None) -> Callable[..., Quote | None] | None:
    """Gives quotes for (settings, size of an input); None: no image was measured, and no configuration is loaded."""
    from seesr.engine.rates import kept_files

    if bundle is None or not kept_files(bundle.digest):
        return None
    from seesr.engine.quote import quote_unloaded

    return functools.partial(quote_unloaded, bundle.digest, device)


def estimate(task: Task, settings: Settings, bundle: Bundle | None, device: str | None) -> float:
    """Seconds that an image may take, by the benchmarks of this project: accurate within a factor of about three."""
    kind = bundle.kind if bundle is not None and bundle.kind in SECONDS else "full"
    steps = settings.num_inference_steps or (bundle.defaults if bundle is not None else Defaults()).num_inference_steps
    on_gpu = device.startswith("cuda") if device else Path("/dev/nvidia0").exists()
    fixed, step = SECONDS["cuda" if on_gpu else kind]
    passes = steps * (settings.num_particles if settings.steered else 1)
    passes *= 2 if settings.cfg_scale > 1 else 1
    cores = 1 if on_gpu else len(os.sched_getaffinity(0))
    return megapixels(*task.size) * (fixed + step * passes) / cores


class RunBar:
    """One bar for a whole run on standard error: percent, image i of n, time left. In a log, a line at intervals."""

    def __init__(self, tasks: list[Task]) -> None:
        self.count, self.number, self.done, self.share, self.area = len(tasks), 0, 0.0, 0.0, 0.0
        self.total = sum(megapixels(*task.size) for task in tasks)

    def __enter__(self) -> RunBar:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total,
            bar_format="{percentage:3.0f}%|{bar:20}| {desc}{remaining} left",
            mininterval=0.2 if terminal else 10,
            miniters=0,
            delay=1,
            file=sys.stderr if terminal else LineStream(sys.stderr),
            leave=False,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def next(self, task: Task) -> None:
        """The next image begins."""
        self.done += self.area
        self.area, self.share, self.number = megapixels(*task.size), 0.0, self.number + 1
        self.bar.set_description_str(f"image {self.number} of {self.count}, ", refresh=False)
        self.show()

    def __call__(self, position: Position) -> None:
        self.share = max(self.share, position.progress)
        self.show()

    def show(self) -> None:
        self.bar.update(max(0.0, min(self.total, self.done + self.share * self.area) - self.bar.n))

    @contextlib.contextmanager
    def hidden(self) -> Any:
        """Hides the bar of a terminal while a line is printed."""
        if sys.stderr.isatty():
            self.bar.clear()
        yield
        if sys.stderr.isatty():
            self.bar.refresh()
