"""./scripts/weights --plan against every state that the public repositories can be in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import published
import pytest
import torch
from hub import COMMIT, Hub
from safetensors.torch import load

from seesr.checkpoints import plan, sources
from seesr.checkpoints.plan import File, Listing, Row
from seesr.checkpoints.web import Unavailable

Run = Callable[..., None]
PARTS = {part.name: part for part in sources.PARTS}


def row(**changes: Any) -> Row:
    """A file of SeeSR's UNet."""
    name, where = "diffusion_pytorch_model.safetensors", ("seesr", "huggingface", "CSWRY/SeeSR", COMMIT)
    result = Row(*where, f"unet/{name}", 10, 10, None, "MIT", f"seesr/unet/{name}", "http://hub/file", None, False)
    return result._replace(**changes)


def planned(run: Run, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[dict]]:
    run("--plan", "--json", *arguments)
    rows: dict[str, list[dict]] = {}
    for row in json.loads(capsys.readouterr().out):
        rows.setdefault(row["part"], []).append(row)
    return rows


def test_the_fake_hub_has_the_files_of_the_published_list(repositories: Path) -> None:
    files = {path.relative_to(repositories).as_posix() for path in repositories.rglob("*") if path.is_file()}
    assert files == set(published.SEEN)


def test_the_lock_has_every_sum_that_is_publicly_known() -> None:
    known = sources.published()
    assert len(known) == 8 and all(len(str(entry["sha256"])) == 64 for entry in known.values())
    assert known["ram/ram_swin_large_14m.pth"]["sha256"].startswith("15c729c793af28b9")  # type: ignore[union-attr]
    assert known["sd-turbo/sd_turbo.safetensors"]["bytes"] == 5_214_561_328


def test_the_plan_names_every_file_and_fetches_none(
    hub: Hub, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = planned(run, capsys)
    assert list(rows) == [part.name for part in sources.PARTS]
    assert {name: len(part_rows) for name, part_rows in rows.items()} == {
        "sd-turbo": 7, "tokenizer": 2, "seesr": 4, "dape": 1, "ram": 1, "tags": 2,
    }  # fmt: skip
    for row in (row for part_rows in rows.values() for row in part_rows):
        assert set(row) == set(plan.SHOWN)
        assert row["source"] == ("github" if row["part"] == "tags" else "huggingface")
        assert row["revision"] == ("main" if row["part"] == "tags" else COMMIT)
        assert row["bytes"] > 0 and row["licence"]
        assert row["bytes_to_fetch"] == row["bytes"] or "unet/diffusion" in row["path"]
    assert rows["seesr"][0]["repository"] == "CSWRY/SeeSR"
    unet = next(row for row in rows["seesr"] if row["path"].endswith("unet/diffusion_pytorch_model.safetensors"))
    assert 0 < unet["bytes_to_fetch"] < unet["bytes"]
    assert all(r for path, r in hub.fetched(".safetensors"))  # headers alone
    assert not (tmp_path / "cache").exists() and not (tmp_path / "full").exists()


WORLDS = [
    ("missing", {"models/CSWRY/SeeSR"}, {"seesr": "alexnasa/SEESR", "dape": "alexnasa/SEESR"}),
    ("closed", {"CSWRY/SeeSR": 401}, {"seesr": "alexnasa/SEESR", "dape": "alexnasa/SEESR"}),
    ("gated", {"CSWRY/SeeSR": 403}, {"seesr": "alexnasa/SEESR", "dape": "alexnasa/SEESR"}),
    ("missing", {"models/xinyu1205/recognize_anything_model"}, {"ram": "xinyu1205/recognize-anything"}),
    ("missing", {"github/cswry/SeeSR"}, {"tags": "xinyu1205/recognize-anything"}),
    (
        "missing",
        {"github/cswry/SeeSR", "github/xinyu1205/recognize-anything"},
        {"tags": "CannotFindObject/RAM_ONNX"},
    ),
    ("busy", {"api/models/CSWRY/SeeSR": 1, "ram_tag_list.txt": 1}, {"seesr": "CSWRY/SeeSR", "tags": "cswry/SeeSR"}),
]


@pytest.mark.parametrize(("trouble", "value", "expected"), WORLDS)
def test_the_next_source_is_taken(
    hub: Hub, run: Run, capsys: pytest.CaptureFixture[str], trouble: str, value: object, expected: dict[str, str]
) -> None:
    setattr(hub, trouble, value)
    rows = planned(run, capsys)
    assert len(rows) == len(sources.PARTS)
    assert {name: rows[name][0]["repository"] for name in expected} == expected


def test_a_repository_that_moved_is_followed(
    hub: Hub, run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (hub.folder / "models/CSWRY").rename(hub.folder / "models/NEW")
    hub.moved["CSWRY/SeeSR"] = "NEW/SeeSR"
    assert planned(run, capsys)["dape"][0]["repository"] == "NEW/SeeSR"
    assert "CSWRY/SeeSR has moved to NEW/SeeSR" in caplog.text


def test_a_gated_part_without_another_source_says_what_to_do(hub: Hub, run: Run) -> None:
    hub.gated["stabilityai/sd-turbo"] = 403
    with pytest.raises(SystemExit) as error:
        run("--plan")
    message = str(error.value)
    assert "\n" not in message and "sd-turbo was found in no source" in message
    assert "gated (HTTP 403)" in message and "HF_TOKEN" in message and "--source sd-turbo=" in message


def test_the_token_is_sent_only_to_the_hub(hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run("--plan")
    tokens = {("/raw/" in path, token) for _, path, _, token in hub.requests}
    assert tokens == {(False, "Bearer hf_secret"), (True, None)}


def test_another_file_under_a_published_name_is_not_taken(
    hub: Hub, run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = hub.folder / "models/CSWRY/SeeSR/DAPE.pth"
    path.unlink()
    path.write_bytes(b"another")
    assert planned(run, capsys)["dape"][0]["repository"] == "alexnasa/SEESR"
    assert "DAPE.pth is not the published file" in caplog.text


def test_without_ranges_the_whole_unet_is_planned(hub: Hub, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    hub.ranges = False
    unet = next(row for row in planned(run, capsys)["seesr"] if "unet/diffusion" in row["path"])
    assert unet["bytes_to_fetch"] == unet["bytes"]


def test_a_part_from_another_place(hub: Hub, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    raw = f"{hub.raw}/xinyu1205/recognize-anything/main/ram/data/"
    folder = hub.folder / published.TURBO
    arguments = [
        f"tags={raw}",
        f"sd-turbo={folder}",
        "seesr=alexnasa/SEESR@main",
        f"dape={hub.url}/alexnasa/SEESR/resolve/main/DAPE.pth",
        "ram=spaces/xinyu1205/recognize-anything",
    ]
    rows = planned(run, capsys, *(word for value in arguments for word in ("--source", value)))
    results = {name: (part_rows[0]["source"], part_rows[0]["repository"]) for name, part_rows in rows.items()}
    assert results["tags"] == ("url", raw)
    assert results["sd-turbo"] == ("folder", str(folder)) and rows["sd-turbo"][0]["bytes_to_fetch"] == 0
    assert results["seesr"] == ("huggingface", "alexnasa/SEESR")
    assert results["dape"][0] == "url"
    assert results["ram"] == ("huggingface", "xinyu1205/recognize-anything")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("unet=x", "the parts are sd-turbo, tokenizer, seesr, dape, ram, tags"),
        ("ram", "write PART=FOLDER"),
        ("ram=/nowhere", "not a local file or folder, a URL or OWNER/REPOSITORY"),
        ("ram=alexnasa/SEESR", "it has no ram_swin_large_14m.pth"),
        ("ram=someone/else", "does not exist"),
    ],
)
def test_a_wrong_source_is_one_line(hub: Hub, run: Run, value: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        run("--plan", "--source", value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_revision_that_is_named_is_asked_for(hub: Hub, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    hub.missing = {"github/cswry/SeeSR", "github/xinyu1205/recognize-anything"}
    planned(run, capsys, "--source", "seesr=alexnasa/SEESR@v1", "--source", "ram=spaces/xinyu1205/recognize-anything")
    listed = [path for _, path, _, _ in hub.requests if path.startswith("/api/")]
    pinned = next(repository.revision for repository in PARTS["tags"].repositories if repository.revision != "main")
    assert {path.partition("/revision/")[2] for path in listed} == {"", "v1", pinned}


def test_a_folder_that_cannot_be_listed_is_asked_for_each_name_until_it_has_one(
    hub: Hub, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"tokenizer": "openai/clip-vit-large-patch14", "sd-turbo": "stabilityai/sd-turbo"}
    names = [f"--source={part}={hub.url}/{place}/resolve/main/" for part, place in places.items()]
    rows = planned(run, capsys, *names)
    assert [len(rows[part]) for part in places] == [2, 7] and {row["source"] for row in rows["tokenizer"]} == {"url"}
    asked = [path for method, path, _, _ in hub.requests if method == "HEAD"]
    assert any(path.endswith("/tokenizer/vocab.json") for path in asked)
    assert not any("sd-turbo" in path and path.endswith(".bin") for path in asked)


def test_the_pages_of_repositories() -> None:
    hosts = ("github", "models", "spaces")
    assert [sources.Repository(host, "a/b").page for host in hosts] == [
        "https://github.com/a/b", "https://huggingface.co/a/b", "https://huggingface.co/spaces/a/b",
    ]  # fmt: skip


@pytest.mark.parametrize(("have", "left"), [(None, 10), (4, 6), (10, 0), (12, 0)])
def test_what_is_still_to_be_fetched(tmp_path: Path, have: int | None, left: int) -> None:
    target, partial = row().place(tmp_path)
    target.parent.mkdir(parents=True)
    if have is not None:
        (target if have >= 10 else partial).write_bytes(bytes(have))
    assert row().pending(tmp_path).bytes_to_fetch == left
    assert row(source="folder").pending(tmp_path).bytes_to_fetch == 0


def test_the_size_that_a_server_does_not_say_is_the_published_one_or_an_error() -> None:
    client: Any = SimpleNamespace(head=lambda url: None)

    def sizes(part: str, size: int | None) -> list[int]:
        names = [need.names[0] for need in PARTS[part].layouts[0]]
        listing = Listing("url", "http://x/", "", {name: File(size, None, None, f"http://x/{name}") for name in names})
        return [row.bytes for row in plan.rows(client, PARTS[part], listing)]

    assert sizes("tags", None) == [sources.published()[f"tags/{need.names[0]}"]["bytes"] for need in tags()]
    assert sizes("dape", 5) == [5]
    with pytest.raises(Unavailable, match=r"http://x/DAPE\.pth: the server does not say how many bytes it has"):
        sizes("dape", None)
    with pytest.raises(Unavailable, match=r"ram_tag_list\.txt is not the published file"):
        sizes("tags", 5)


def tags() -> tuple[sources.Need, ...]:
    return PARTS["tags"].layouts[0]


def header(**offsets: tuple[int, int]) -> dict[str, Any]:
    """Of a safetensors file of bytes."""
    return {
        name: {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}
        for name, (first, last) in offsets.items()
    }


@pytest.mark.parametrize("more", range(8))
def test_the_selected_tensors_are_a_safetensors_file(more: int) -> None:
    used = {f"image_attentions{'x' * more}": (0, 4), "image_attentions_empty": (6, 6), "image_attentions2": (6, 9)}
    places = header(**used, other=(4, 6), image_attentions3=(9, 10))
    file = bytes(range(100, 210))  # its tensors start at 100
    prefix, spans = plan.selection(places, 100, 110)
    assert spans == [(100, 104), (106, 110)]
    tensors = load(prefix + b"".join(file[first:last] for first, last in spans))
    assert tensors.keys() == {name for name in places if name != "other"}
    for name, tensor in tensors.items():
        first, last = places[name]["data_offsets"]
        assert torch.equal(tensor, torch.tensor(list(file[100 + first : 100 + last]), dtype=torch.uint8))
    assert len(prefix) % 8 == 0 and len(prefix) - len(prefix.rstrip(b" ")) < 8


@pytest.mark.parametrize("offsets", [(-1, 2), (3, 2), (5, 11)])
def test_a_tensor_outside_of_the_file_is_refused(offsets: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="image_attentions lies outside of the file"):
        plan.selection(header(image_attentions=offsets), 100, 110)


@pytest.mark.parametrize(
    ("length", "size", "good"),
    [(100_000_000, 10**9, True), (100_000_001, 10**9, False), (92, 100, True), (93, 100, False)],
)
def test_a_header_is_in_the_file_and_within_the_limit_of_the_format(length: int, size: int, good: bool) -> None:
    asked = []

    def read(url: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return length.to_bytes(8, "little") if end == 8 else json.dumps(header(image_attentions=(0, 0))).encode()

    client: Any = SimpleNamespace(read=read)
    if good:
        assert plan.selected(client, row(bytes=size)).target == "seesr/unet/image_attentions.safetensors"
        assert asked == [(0, 8), (8, 8 + length)]
    else:
        with pytest.raises(Unavailable, match="is not a safetensors file$"):
            plan.selected(client, row(bytes=size))
        assert asked == [(0, 8)]


def test_the_plan_needs_no_torch() -> None:
    code = "import sys, seesr.checkpoints.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(plan.__file__).parents[2]).returncode == 0
