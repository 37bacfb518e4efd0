"""./scripts/weights: downloads that are cut off, damaged, refused, resumed; what it leaves and what it removes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import published
import pytest
from hub import Hub
from PIL import Image
from safetensors import safe_open

from lab.parity import cases
from seesr import Settings, Upscaler
from seesr.checkpoints import fetch, plan, web
from seesr.networks import weights
from seesr.networks.weights import WeightsError

Run = Callable[..., None]


def refused(run: Run, *arguments: str) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_one_command_fetches_converts_and_clears(
    hub: Hub, run: Run, tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    output = capsys.readouterr().out
    assert "stabilityai/sd-turbo@0123456789ab" in output and "licence: Stability AI Community License" in output
    assert (
        "GB needed" in output
        and "GB free" in output
        and "no published checksum, the first download is trusted" in output
    )
    assert "of tensors that are not used are left out" in output and "is complete" in output
    assert not (tmp_path / "cache/downloads").exists()

    upscaler = Upscaler.load(tmp_path / "full", "cpu")
    assert upscaler.networks.bundle.kind == "full"
    result = upscaler(photo, Settings(num_inference_steps=1, seed=1, scale_factor=2))
    assert result.image.size == (128, 96)
    ram = cases.read_case(published.GOLDEN / "ram_small", None)  # half precision, so a wider tolerance than parity's
    tokens = upscaler.networks.tagger.tokens(ram.inputs["image"])
    assert (tokens - ram.outputs["image_embeds"]).abs().max() < 0.03
    merge = cases.read_case(published.GOLDEN / "unet_turbo_merge", None)
    context = (merge.inputs["encoder_hidden_states"], merge.inputs["image_encoder_hidden_states"])
    outcome = upscaler.networks.unet(merge.inputs["sample"], 999, context)
    assert (outcome - merge.outputs["noise_pred"]).abs().max() < 0.03

    hub.requests.clear()
    run()
    assert hub.requests == [] and "files verified" in capsys.readouterr().out


def test_another_user_reads_what_root_converted(converted: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (converted / "full").rglob("*") if path.is_file()}
    assert modes == {0o644}
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        bundle = Path(shutil.copytree(converted / "full", Path(name) / "full"))
        Path(name).chmod(0o755)
        os.seteuid(1001)
        try:
            assert weights.verify(bundle).kind == "full"
            os.seteuid(0)
            file = bundle / "vae/config.json"
            for path, mode in ((file, 0o600), (bundle / "vae", 0o700), (bundle / weights.MANIFEST, 0o600)):
                before = path.stat().st_mode
                path.chmod(mode)
                os.seteuid(1001)
                weights.sum_of.cache_clear()
                with pytest.raises(WeightsError, match=r"cannot be read by user 1001: run: sudo chmod -R a\+rX /tmp"):
                    weights.verify(bundle)
                os.seteuid(0)
                path.chmod(before)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["DAPE.pth", "vae/diffusion_pytorch_model.fp16.safetensors", "vocab.json"])
def test_a_download_that_breaks_off_is_resumed(hub: Hub, run: Run, unconverted: None, name: str) -> None:
    hub.fail[name] = 2
    run()
    starts = [int(r.removeprefix("bytes=").partition("-")[0]) for _, r in hub.fetched(name) if r]
    assert len(starts) == 2 and 0 < starts[0] < starts[1]


def test_an_interrupted_run_goes_on_at_any_byte(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole files and of selected tensors: every start gives the same bytes."""
    with web.Web() as client:
        for name, target in (("seesr", "unet"), ("dape", "DAPE")):
            part = next(part for part in plan.sources.PARTS if part.name == name)
            _, rows = plan.find(client, part, plan.candidates(client, part, {}, None), {})
            row = next(row for row in rows if target in row.path and not row.path.endswith(".json"))
            record = fetch.FirstUse(tmp_path / f"{name}.json")
            fetch.fetch_file(client, row, tmp_path / "one", record)
            path, _ = row.place(tmp_path / "one")
            whole = path.read_bytes()
            assert len(whole) == row.length
            for have in (0, 1, 7, 8, len(row.prefix), len(row.prefix) + 1, len(whole) // 2, len(whole) - 1, len(whole)):
                target_path, partial = row.place(tmp_path / "two")
                target_path.unlink(missing_ok=True)
                partial.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(whole[:have])
                fetch.fetch_file(client, row, tmp_path / "two", record)
                assert target_path.read_bytes() == whole and not partial.exists()


def test_only_the_image_attentions_are_fetched(hub: Hub, converted: Path) -> None:
    path = converted / "downloads/seesr/unet/image_attentions.safetensors"
    original = hub.folder / published.SEESR / "seesr/unet/diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file, safe_open(original, "pt") as all_of_it:
        keys = set(file.keys())
        assert keys == {key for key in all_of_it.keys() if "image_attentions" in key}  # noqa: SIM118
        assert all((file.get_tensor(key) == all_of_it.get_tensor(key)).all() for key in keys)


def test_without_ranges_everything_is_fetched_whole(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.ranges = False
    hub.fail["DAPE.pth"] = 1
    run("--keep")
    assert (tmp_path / "cache/downloads/seesr/unet/diffusion_pytorch_model.safetensors").exists()
    assert weights.verify(tmp_path / "full").kind == "full"


def test_a_server_that_stops_sending_ranges_between_plan_and_download(
    hub: Hub, run: Run, unconverted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = fetch.fetch

    def then(*arguments: object) -> object:
        hub.ranges = False
        return announce(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch, "fetch", then)
    run("--keep")
    assert (tmp_path / "cache/downloads/seesr/unet/diffusion_pytorch_model.safetensors").exists()


def test_a_damaged_download_comes_from_the_next_source(
    hub: Hub, run: Run, unconverted: None, caplog: pytest.LogCaptureFixture
) -> None:
    hub.lie.add("CSWRY/SeeSR/resolve/0123456789abcdef0123456789abcdef01234567/DAPE.pth")
    run()
    assert "is damaged: sha256 is" in caplog.text
    assert hub.fetched("alexnasa/SEESR/resolve/0123456789abcdef0123456789abcdef01234567/DAPE.pth")


@pytest.mark.parametrize("name", ["vocab.json", "DAPE.pth", "ram_tag_list.txt", "unet/config.json"])
def test_a_flipped_byte_everywhere_leaves_no_bundle(
    hub: Hub, run: Run, unconverted: None, tmp_path: Path, name: str
) -> None:
    hub.lie.add(name)
    message = refused(run)
    assert "is damaged" in message and "--source" in message
    assert not (tmp_path / "full").exists()
    hub.lie.clear()
    run()
    assert (tmp_path / "full").exists()


def test_an_unreachable_server_is_a_one_line_error(
    hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail["vae/diffusion_pytorch_model.fp16.safetensors"] = -1
    message = refused(run)
    assert "could not be fetched in 5 tries" in message and "resume" in message
    assert not (tmp_path / "full").exists()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "could not be reached in 5 tries" in refused(run)


def test_retry_after_of_a_busy_server_is_respected(
    hub: Hub, run: Run, unconverted: None, caplog: pytest.LogCaptureFixture
) -> None:
    hub.busy["DAPE.pth"] = 3
    run()
    assert hub.slept == [1.0, 1.0, 1.0] and "HTTP 429; trying again in 1 s" in caplog.text


def test_another_first_download_is_refused(
    hub: Hub, run: Run, unconverted: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No sum of the controlnet is published: the first download counts, later ones must equal it."""
    with caplog.at_level(logging.INFO):
        run()
    assert "the first download is trusted" in caplog.text
    known = json.loads((tmp_path / "cache/first-use.json").read_text())
    assert known["seesr/controlnet/diffusion_pytorch_model.safetensors"]["repository"] == "CSWRY/SeeSR"
    assert "seesr/unet/image_attentions.safetensors" in known  # its bytes are a part of a file
    text = (tmp_path / "cache/first-use.json").read_text()
    assert text == json.dumps(known, indent=1) + "\n"  # a person may have to remove an entry
    for name in (published.SEESR, published.OTHER_SEESR):
        path = hub.folder / name / "seesr/controlnet/config.json"
        data = path.read_text()
        path.unlink()
        path.write_text(data + " ")
    (tmp_path / "full").rmdir()
    message = refused(run)
    assert "has changed since the first download" in message and "first-use.json" in message


def test_a_file_that_was_damaged_on_the_disk_is_fetched_again(
    hub: Hub, run: Run, unconverted: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("--keep")
    path = tmp_path / "cache/downloads/dape/DAPE.pth"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "full").rmdir()
    hub.requests.clear()
    run()
    assert "is damaged" in caplog.text and len(hub.fetched("DAPE.pth")) == 1
    assert not hub.fetched("ram_swin_large_14m.pth")


def test_a_full_disk_is_refused_before_and_named_during(
    hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "set SEESR_CACHE" in refused(run)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "transfer", full)
    assert "no space is left" in refused(run)


def test_files_on_this_machine(hub: Hub, run: Run, converted: Path, tmp_path: Path) -> None:
    """--from takes upstream's layout (preset/models), links instead of copying, and never removes it."""
    models = tmp_path / "models"
    shutil.copytree(converted / "downloads/seesr", models / "seesr")
    shutil.copytree(converted / "downloads/sd-turbo", models / "sd-turbo")
    shutil.copytree(converted / "downloads/tokenizer", models / "sd-turbo/tokenizer")
    for name in ("dape/DAPE.pth", "ram/ram_swin_large_14m.pth"):
        shutil.copy(converted / "downloads" / name, models)
    for path in (converted / "downloads/tags").iterdir():
        shutil.copy(path, models)
    hub.requests.clear()
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    run("--from", str(models))
    assert hub.requests == [] and weights.verify(tmp_path / "full")
    assert before == {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    assert not (tmp_path / "cache/downloads").exists()
    shutil.rmtree(tmp_path / "full")
    (models / "DAPE.pth").write_bytes(b"x")
    assert "dape was found in no source" in refused(run, "--from", str(models))
    assert "is not a folder" in refused(run, "--from", str(tmp_path / "nowhere"))


def test_the_folder_of_downloads_itself_may_be_named(hub: Hub, run: Run, unconverted: None, tmp_path: Path) -> None:
    run("--keep")
    (tmp_path / "full").rmdir()
    hub.requests.clear()
    run("--from", str(tmp_path / "cache/downloads"))
    assert hub.requests == [] and (tmp_path / "cache/downloads/dape/DAPE.pth").is_file()


def test_a_download_of_another_source_is_removed(hub: Hub, run: Run, unconverted: None, tmp_path: Path) -> None:
    folder = tmp_path / "cache/downloads/seesr"
    for name in ("unet/diffusion_pytorch_model.bin", "older/weights/model.bin"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"x")
    run("--keep")
    assert sorted(path.name for path in folder.iterdir()) == ["controlnet", "unet"]
    assert sorted(path.name for path in (folder / "unet").iterdir()) == ["config.json", "image_attentions.safetensors"]


def test_a_partial_download_that_is_complete_is_not_fetched_and_one_that_is_too_long_is_fetched_anew(
    hub: Hub, tmp_path: Path
) -> None:
    with web.Web() as client:
        part = next(part for part in plan.sources.PARTS if part.name == "dape")
        _, (row,) = plan.find(client, part, plan.candidates(client, part, {}, None), {})
        data = (hub.folder / published.SEESR / "DAPE.pth").read_bytes()
        for have, requests in ((data, 0), (data + b"more", 1)):
            target, partial = row.place(tmp_path)
            target.unlink(missing_ok=True)
            partial.parent.mkdir(exist_ok=True)
            partial.write_bytes(have)
            hub.requests.clear()
            fetch.fetch_file(client, row, tmp_path, fetch.FirstUse(tmp_path / "first-use.json"))
            assert target.read_bytes() == data and len(hub.fetched("DAPE.pth")) == requests
