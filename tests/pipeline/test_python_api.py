"""The Python API: what upscale, Engine and Upscaler accept and return."""

from __future__ import annotations

import asyncio
import io
import os
import pydoc
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

import seesr
from seesr import Engine, Output, Settings, Upscaler, upscale
from seesr.engine import api
from seesr.images.record import read_record
from seesr.networks import weights
from seesr.runtime.progress import Position

QUICK = Settings(num_inference_steps=1, seed=1, scale_factor=2, latent_tiled_size=16)
KINDS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "path": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "buffer": lambda path: io.BytesIO(path.read_bytes()),
    "pil": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> Path:
    path = tmp_path_factory.mktemp("api") / "small.png"
    photo.crop((0, 0, 20, 16)).save(path)
    return path


@pytest.fixture(autouse=True)
def kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`upscale` uses the engine of the other tests."""
    monkeypatch.setattr(api, "cached_engine", lambda bundle, device: engine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_every_kind_of_source_gives_the_same_image(engine: Engine, pocket: Upscaler, small: Path, kind: str) -> None:
    expected = engine.run(small, QUICK)
    calls: list[Callable[[Any], Output]] = [
        lambda source: upscale(source, QUICK),
        lambda source: engine.run(source, QUICK),
        lambda source: pocket(source, QUICK),
    ]
    for call in calls[:1] if kind in ("bytearray", "memoryview", "buffer") else calls:
        output = call(KINDS[kind](small))
        assert isinstance(output, Output) and np.array_equal(output.array, expected.array)
        assert output.data[:4] == expected.data[:4] and output.seed == 1


@pytest.mark.parametrize("shape", [(16, 20), (16, 20, 1), (16, 20, 3), (16, 20, 4)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_keep_their_layout_and_depth(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> None:
    array = rng.random(shape)
    maximum = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    values = (array * maximum).astype(dtype)
    result = upscale(values, QUICK).array
    assert result.shape == (32, 40, *shape[2:])
    assert result.dtype == (np.float32 if np.dtype(dtype).kind == "f" else dtype)
    assert result.min() >= 0 and result.max() <= (1 if result.dtype == np.float32 else np.iinfo(result.dtype).max)  # pyright: ignore[reportCallIssue]


def test_an_opaque_alpha_stays_in_the_array() -> None:
    result = upscale(np.full((16, 16, 4), 255, np.uint8), QUICK).array
    assert result.shape == (32, 32, 4) and (result[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, TypeError, "source is of type NoneType: use a path, the bytes of an image file"),
        ({"image": "x.png"}, TypeError, "of type dict"),
        (3, TypeError, "of type int"),
        (io.StringIO("text"), TypeError, "binary mode"),
        ("https://example.com/x.png", ValueError, "is a URL: download it first"),
        (np.zeros((3, 16, 16), np.uint8), ValueError, r"shape \(3, 16, 16\).*transpose\(1, 2, 0\)"),
        (np.zeros((16,), np.uint8), ValueError, r"it must be \(H, W\)"),
        (np.zeros((0, 4), np.uint8), ValueError, "shape"),
        (np.zeros((16, 16), np.int64), ValueError, "type int64; it must be uint8, uint16"),
        (np.full((16, 16), 200.0), ValueError, "values from 200 to 200; floats must be from 0 to 1"),
        (np.full((16, 16), np.nan), ValueError, "floats must be from 0 to 1"),
        (b"", ValueError, "empty"),
        ("missing.png", FileNotFoundError, "missing.png"),
    ],
)
def test_other_sources_are_refused_in_a_sentence(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        upscale(source, QUICK)


def test_iterables_give_a_generator(small: Path) -> None:
    outputs = upscale((path for path in [small, str(small)]), QUICK, seed=2)
    assert not isinstance(outputs, Output)
    assert [output.seed for output in outputs] == [2, 2]
    assert list(upscale([], QUICK)) == []


def test_changes_are_fields_of_settings_and_numpy_numbers_count(small: Path) -> None:
    output = upscale(small, QUICK, scale_factor=np.float32(1.5), seed=np.int64(7), keep_exif=np.bool_(False))
    assert output.image_data.size == (30, 24) and output.seed == 7 and type(output.settings.seed) is int
    with pytest.raises(TypeError, match="there is no setting 'scale'; the settings are scale_factor, "):
        upscale(small, scale=2)
    with pytest.raises(ValueError, match="scale_factor is 9"):
        upscale(small, scale_factor=9)


def test_an_output_shows_itself(small: Path) -> None:
    output = upscale(small, QUICK)
    assert repr(output).startswith("<Output 40x32, 8 bit, seed 1, ") and "\n" not in repr(output)
    assert output.image.size == (40, 32) and output.array.shape == (32, 40, 3)
    assert Image.open(io.BytesIO(output._repr_png_())).size == (40, 32)
    assert output.metrics["output_size"] == "40x32" and output.metrics["steps"] == 1


def test_save_takes_the_format_of_the_suffix_and_refuses_to_lose_alpha_or_depth(small: Path, tmp_path: Path) -> None:
    output = upscale(small, QUICK)
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")):
        output.save(str(tmp_path / name))
        with Image.open(tmp_path / name) as saved:
            assert saved.format == kind
        assert read_record(tmp_path / name)["settings"]["output_format"] == kind.lower().replace("jpeg", "jpg")
    with pytest.raises(ValueError, match=r"a\.bmp must end in \.png, \.webp, \.jpg"):
        output.save(tmp_path / "a.bmp")
    deep = upscale(np.zeros((16, 16, 3), np.uint16), QUICK)
    clear = upscale(np.zeros((16, 16, 4), np.uint8), QUICK, fidelity=1)
    for lossy, name, message in (
        (deep, "b.jpg", "16 bits per colour"), (deep, "b.webp", "16 bits"), (clear, "b.jpg", "transparency"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"loses the result's {message}.*allow_loss=True"):
            lossy.save(tmp_path / name)
        lossy.save(tmp_path / name, allow_loss=True)
    clear.save(tmp_path / "b.webp")


def test_the_record_has_the_sha256_of_a_file(small: Path) -> None:
    import hashlib

    record = upscale(small, QUICK).image_data.record
    assert record is not None and record["source_sha256"] == hashlib.sha256(small.read_bytes()).hexdigest()
    record = upscale(np.zeros((16, 16), np.uint8), QUICK).image_data.record
    assert record is not None and "source_sha256" not in record


def test_masks_are_sources_too(engine: Engine, small: Path) -> None:
    mask = np.zeros((16, 20), np.uint8)
    mask[:, 10:] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    expected = engine.run(small, QUICK, mask=buffer.getvalue()).array
    assert np.array_equal(engine.run(small, QUICK, mask=mask).array, expected)
    assert np.array_equal(engine.run(small, QUICK, mask=Image.fromarray(mask)).array, expected)


def test_progress(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Position] = []
    upscale(small, QUICK, progress=seen.append)
    assert {"read", "denoise", "file"} <= {position.stage for position in seen}
    upscale(small, QUICK)
    assert capsys.readouterr().err == ""
    upscale(small, QUICK, progress=True)
    assert "tile" in capsys.readouterr().err
    assert upscale(source=small, settings=QUICK).seed == upscale(small, seed=1, scale_factor=2).seed == 1


@pytest.mark.parametrize(
    ("progress", "notebook", "shown"), [(None, True, True), (False, True, False), (None, False, False)]
)
def test_a_notebook_gets_a_bar(
    progress: bool | None, notebook: bool, shown: bool, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[str] = []
    monkeypatch.setattr(api.NotebookBar, "__enter__", lambda bar: bars.append("begun") or (lambda position: None))
    monkeypatch.setattr(api.NotebookBar, "__exit__", lambda bar, *error: bars.append("ended"))
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", api)
    upscale(small, QUICK, progress=progress)
    assert bars == (["begun", "ended"] if shown else [])


def test_the_bar_of_a_notebook_counts_each_stage_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar:
        n, desc, closed = 0, "", False
        totals: ClassVar[list[int]] = []

        def reset(self, total: int) -> None:
            self.n = 0
            self.totals.append(total)

        def update(self, more: int) -> None:
            self.n += more

        def close(self) -> None:
            self.closed = True

    shown, bar = [], Bar()
    monkeypatch.setattr("tqdm.auto.tqdm", lambda **options: bar)
    with api.NotebookBar() as watcher:
        for position in (("encode", 0, 4), ("encode", 2, 4), ("encode", 2, 4), ("denoise", 3, 9), ("denoise", 1, 5)):
            watcher(Position(*position))
            shown.append((bar.desc, bar.n))
        assert not bar.closed
    assert bar.closed and bar.totals == [4, 9, 5]
    assert shown == [("encode", 0), ("encode", 2), ("encode", 2), ("denoise", 3), ("denoise", 1)]


def test_a_loaded_engine_is_a_context_manager(tiny_bundle: Path) -> None:
    with Engine.load(str(tiny_bundle), "cpu") as engine:
        assert engine.loaded.name == "tiny"
    with pytest.raises(RuntimeError, match="unloaded"):
        engine.run(b"")


def test_arun_leaves_the_loop_free_and_can_be_cancelled(engine: Engine, small: Path) -> None:
    settings = QUICK.replace(seed=200)  # no earlier run has cached its stages

    async def both() -> tuple[Output, int]:
        task = asyncio.create_task(engine.arun(str(small), settings))
        ticks = 0
        while not task.done():
            ticks += 1
            await asyncio.sleep(0.005)
        return task.result(), ticks

    output, ticks = asyncio.run(both())
    assert np.array_equal(output.array, engine.run(small, settings).array) and ticks > 2

    async def cancelled() -> None:
        long = QUICK.replace(num_inference_steps=8, use_kds=True, num_particles=16)
        task = asyncio.create_task(engine.arun(small, long))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    asyncio.run(cancelled())
    assert time.monotonic() - started < 20
    assert np.array_equal(engine.run(small, settings).array, output.array)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_gets_an_error_instead_of_hanging(engine: Engine, pocket: Upscaler, small: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: engine.run(small, QUICK), lambda: pocket(small, QUICK), lambda: upscale(small, QUICK),
        engine.reload, engine.unload,
    ]  # fmt: skip
    read, write = os.pipe()
    with engine.turn:  # as another thread may hold it
        child = os.fork()
    if child == 0:
        messages = []
        for call in calls:
            try:
                messages.append(str(call()))
            except RuntimeError as error:
                messages.append(str(error))
        os.write(write, "\n".join(messages).encode())
        os._exit(0)
    os.close(write)
    signal.alarm(60)
    with os.fdopen(read) as pipe:
        messages = pipe.read().splitlines()
    signal.alarm(0)
    os.waitpid(child, 0)
    assert len(messages) == len(calls)
    assert all(
        line.startswith(f"the networks were loaded in process {os.getpid()}, before os.fork()") for line in messages
    )


def test_one_engine_is_kept_for_a_bundle_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    loads: list[tuple[object, ...]] = []
    monkeypatch.setattr(Engine, "load", lambda *args, **more: loads.append(args))
    api.cached_engine.cache_clear()
    for bundle in (None, None, "a", "a", None):
        api.cached_engine(bundle, "cpu")
    api.cached_engine.cache_clear()
    assert loads == [(None, "cpu"), ("a", "cpu"), (None, "cpu")]


def test_help_explains_every_public_name_and_types_are_shipped() -> None:
    for name in seesr.__all__:
        if name != "__version__":
            message = pydoc.getdoc(getattr(seesr, name))
            assert len(message.splitlines()) > 1 or len(message) > 60, name
    assert (Path(seesr.__file__).parent / "py.typed").exists()
    for method in (Engine.run, Engine.arun, Engine.load, Output.save, Upscaler.load, upscale):
        assert "Raises:" in (method.__doc__ or "") or "same as `run`" in (method.__doc__ or ""), method


def test_importing_seesr_loads_no_large_library() -> None:
    large = {"torch", "diffusers", "transformers", "timm", "scipy", "cv2", "pydantic"}
    script = f"import seesr, sys; seesr.Settings(); seesr.WeightsError; print({large!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_loaded_engine_needs_few_modules(tmp_path: Path) -> None:
    script = f"""
import sys
from seesr import upscale, Engine
Engine.load({str(weights.POCKET)!r}, "cpu")
large = {{"diffusers", "transformers", "timm", "scipy", "torchvision"}}
print(sorted({{name.split(".")[0] for name in sys.modules}} & large))
print("torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False False"]
