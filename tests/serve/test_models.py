"""Several bundles in one server: by name in Replicate's API, loaded at their first image, unloaded by last use."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import replicate
from echo_server import PNG, QUICK
from serving import sharp
from starlette.testclient import TestClient

from lab.serve.echo import Echo
from lab.serve.servers import EchoServer
from seesr import Engine, Settings
from seesr.config import Configuration
from seesr.engine import preflight
from seesr.networks import weights
from seesr.networks.weights import CannotServe, WeightsError
from seesr.serving import app
from seesr.serving.engines import Engines
from seesr.serving.identity import version_of
from seesr.serving.models import Models

IMAGE = sharp()
URI = "data:image/png;base64," + base64.b64encode(IMAGE).decode()


class Named(Echo):
    """An engine whose output begins with its name; it lists what is loaded.

    Args:
        name: of its bundle.
        loaded: names of the loaded bundles.
        limit: how many fit; loading more raises CannotServe.
    """

    def __init__(self, name: str, loaded: list[str], limit: int = 9, failing: tuple[str, ...] = ()) -> None:
        super().__init__()
        if len(loaded) >= limit:
            raise CannotServe("the memory is full")
        if name in failing:
            raise WeightsError(f"{name} is damaged")
        self.name, self.loaded = name, loaded
        loaded.append(name)

    def run(self, *values: Any, **more: Any) -> Any:
        output = super().run(*values, **more)
        return output._replace(data=self.name.encode() + output.data)

    def unload(self) -> None:
        self.loaded.remove(self.name)


def bundle(folder: Path, name: str) -> Path:
    """The manifest of a bundle of another name."""
    path = folder / name
    path.mkdir(exist_ok=True)
    manifest = json.loads((weights.POCKET / weights.MANIFEST).read_text())
    (path / weights.MANIFEST).write_text(json.dumps({**manifest, "name": name}))
    return path


@contextlib.contextmanager
def serving(
    folder: Path, loaded: list[str], fits: Callable[[Path], bool] = lambda path: True, **more: Any
) -> Iterator[TestClient]:
    """A server of three models, with the order in which they were loaded."""
    folder.mkdir(exist_ok=True)
    paths = {name: bundle(folder, name) for name in ("small", "large")}
    bundles = ",".join(f"acme/{name}={path}" for name, path in paths.items())
    configuration = Configuration(data=folder / "data", bundles=bundles)

    def load(path: Path) -> Any:
        return Named(path.name, loaded, **more)

    built = app.build(
        configuration, "http://127.0.0.1:5000", weights.POCKET,
        lambda send: app.local(configuration, lambda: load(weights.POCKET), weights.POCKET, send, load, fits),
    )  # fmt: skip
    with TestClient(built, base_url="http://127.0.0.1:5000", raise_server_exceptions=False) as client:
        end = time.monotonic() + 10
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield client


def predict(client: TestClient, version: str | None = None, path: str = "/v1/predictions", wait: str = "wait") -> Any:
    body = {"input": {"image": URI, "seed": 1}, **({"version": version} if version else {})}
    return client.post(path, json=body, headers={"Prefer": wait})


def maker(answer: Any) -> str:
    """The name of the bundle that made an output."""
    data = base64.b64decode(answer.json()["output"].partition(",")[2])
    assert data.endswith(IMAGE)
    return data.removesuffix(IMAGE).decode()


def test_a_model_is_chosen_by_name_or_version(tmp_path: Path) -> None:
    loaded: list[str] = []
    with serving(tmp_path, loaded) as client:
        assert loaded == ["pocket"], "the others load at their first image"
        ids = {name: version_of(tmp_path / name) for name in ("small", "large")}
        assert len({*ids.values(), version_of(weights.POCKET)}) == 3
        for version, name in (
            ("you/seesr", "pocket"), ("acme/small", "small"), (ids["large"], "large"),
            (f"acme/small:{ids['small']}", "small"), (version_of(weights.POCKET), "pocket"),
        ):  # fmt: skip
            answer = predict(client, version)
            assert (answer.status_code, maker(answer)) == (201, name)
            assert answer.json()["version"] == version_of(weights.POCKET if name == "pocket" else tmp_path / name)
            assert answer.json()["model"] == ("local/seesr" if name == "pocket" else f"acme/{name}")
        for path, name in (
            ("/v1/models/acme/large/predictions", "large"),
            ("/v1/deployments/x/seesr/predictions", "pocket"),
        ):
            assert maker(predict(client, path=path)) == name
        assert loaded == ["pocket", "small", "large"]
        assert client.post("/upscale", params=QUICK, content=IMAGE, headers=PNG).content == b"pocket" + IMAGE
        model = client.get("/v1/models/acme/small").json()
        assert (model["owner"], model["name"], model["latest_version"]["id"]) == ("acme", "small", ids["small"])
        (version,) = client.get("/v1/models/acme/small/versions").json()["results"]
        assert version["id"] == ids["small"]
        status = client.get("/status").json()
        assert [(model["name"], model["loaded"]) for model in status["models"]] == [
            ("you/seesr", True), ("acme/small", True), ("acme/large", True)
        ]  # fmt: skip
        assert "loaded" not in status


def test_an_unknown_model_is_an_error_in_replicates_form(tmp_path: Path) -> None:
    with serving(tmp_path, []) as client:
        for path in ("/v1/models/acme/huge", "/v1/models/acme/huge/versions"):
            answer = client.get(path)
            assert answer.status_code == 404 and {"title", "detail", "status"} <= answer.json().keys()
        answer = predict(client, path="/v1/models/acme/huge/predictions")
        assert answer.status_code == 404 and "acme/small" in answer.json()["detail"]
        other = version_of(tmp_path / "large")
        for version, path in (
            ("acme/huge", "/v1/predictions"), ("0" * 64, "/v1/predictions"),
            (other, "/v1/models/acme/small/predictions"),
        ):  # fmt: skip
            answer = predict(client, version, path)
            assert (answer.status_code, answer.json()["code"]) == (422, "version_not_found"), version
        assert client.get(f"/v1/models/acme/small/versions/{other}").status_code == 422


@pytest.mark.parametrize("how", ["no room", "a failing load"])
def test_the_model_used_longest_ago_makes_room(how: str, tmp_path: Path) -> None:
    loaded: list[str] = []
    more: Any = {"fits": lambda path: len(loaded) < 2} if how == "no room" else {"limit": 2}
    with serving(tmp_path, loaded, **more) as client:
        assert maker(predict(client, "acme/small")) == "small" and loaded == ["pocket", "small"]
        assert maker(predict(client, "you/seesr")) == "pocket"
        assert maker(predict(client, "acme/large")) == "large" and loaded == ["pocket", "large"]
        assert maker(predict(client, "acme/small")) == "small" and loaded == ["large", "small"]
        answer = client.post("/quote", content=IMAGE, headers=PNG)
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert client.get("/ready").status_code == 200
        assert maker(predict(client, "you/seesr")) == "pocket" and loaded == ["small", "pocket"]
        assert client.post("/quote", content=IMAGE, headers=PNG).status_code == 200


def test_a_bundle_that_cannot_be_loaded_fails_its_jobs_alone(tmp_path: Path) -> None:
    loaded: list[str] = []
    with serving(tmp_path, loaded, failing=("large",)) as client:
        answer = predict(client, "acme/large").json()
        assert (answer["status"], answer["error"]) == ("failed", "large is damaged")
        assert loaded == ["pocket"], "more memory would not help: nothing was unloaded"
        assert maker(predict(client, "you/seesr")) == "pocket" and client.get("/ready").status_code == 200


def test_an_image_that_needs_all_memory_runs_again_without_the_other_bundles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def run(self: Named, *values: Any, **more: Any) -> Any:
        if len(loaded) > 1:
            raise RuntimeError("out of memory: a single tile does not fit")
        return real(self, *values, **more)

    real = Named.run
    with serving(tmp_path, loaded) as client:
        assert maker(predict(client, "acme/small")) == "small"
        monkeypatch.setattr(Named, "run", run)
        assert maker(predict(client, "acme/small")) == "small" and loaded == ["small"]


def test_jobs_of_every_model_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def run(self: Named, *values: Any, **more: Any) -> Any:
        begun.set()
        self.seconds = 6.0
        return real(self, *values, **more)

    real = Named.run
    monkeypatch.setattr(Named, "run", run)
    with serving(tmp_path, []) as client:
        predict(client, "you/seesr", wait="")
        begun.wait(10)
        waiting = predict(client, "acme/small", wait="").json()
        app_state: Any = client.app
        app_state.state.stop_by = time.monotonic()
    monkeypatch.setattr(Named, "run", real)
    with serving(tmp_path, []) as client:
        end = time.monotonic() + 10
        while (answer := client.get(f"/v1/predictions/{waiting['id']}")).json()["status"] != "succeeded":
            assert time.monotonic() < end, answer.json()
            time.sleep(0.02)
        assert maker(answer) == "small" and answer.json()["model"] == "acme/small"


def test_an_idempotency_key_belongs_to_one_model(tmp_path: Path) -> None:
    with serving(tmp_path, []) as client:

        def send(version: str) -> Any:
            body = {"version": version, "input": {"image": URI, "seed": 1}}
            return client.post("/v1/predictions", json=body, headers={"Idempotency-Key": "once", "Prefer": "wait"})

        first = send("acme/small")
        assert send("acme/small").json()["id"] == first.json()["id"]
        assert send("acme/large").json()["code"] == send("you/seesr").json()["code"] == "idempotency_reused"


@pytest.mark.parametrize("value", ["small=x", "acme/small", "acme/small=", "acme/s m=x", "acme/a=POCKET,acme/a=POCKET"])
def test_a_wrong_list_of_bundles_is_one_line(value: str) -> None:
    with pytest.raises(ValueError, match="SEESR_BUNDLES has '.*': write owner/name=folder, each name once"):
        Models(weights.POCKET, value.replace("POCKET", str(weights.POCKET)))
    with pytest.raises(WeightsError, match="no weights at nowhere"):
        Models(weights.POCKET, "acme/small=nowhere")


def test_engines_are_loaded_once_and_only_for_known_versions() -> None:
    loaded: list[str] = []
    engines = Engines({name: lambda name=name: Named(name, loaded) for name in "ab"}, lambda version: True)  # type: ignore[misc, return-value]
    assert engines.get("a") is engines.get("a") and loaded == ["a"]
    assert not engines.unload_others("a")
    engines.get("b")
    assert engines.unload_others("b") and loaded == ["b"]
    with pytest.raises(KeyError):
        engines.get("c")


def test_has_room_compares_bundle_size_with_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    size = preflight.files_size(weights.POCKET)
    for free, room in ((2 * size + preflight.WORK, True), (2 * size + preflight.WORK - 1, False)):
        monkeypatch.setattr(preflight.memory, "free", lambda device, free=free: free)
        assert preflight.has_room(weights.POCKET, "cpu") is room


def test_replicates_client_runs_each_model(tmp_path: Path) -> None:
    bundles = f"acme/small={bundle(tmp_path, 'small')}"
    with EchoServer(tmp_path / "server", SEESR_BUNDLES=bundles) as server:
        client = replicate.Client(api_token="none", base_url=server.url)
        assert client.run("acme/small", input={"image": io.BytesIO(IMAGE), "seed": 1}).read() == IMAGE  # pyright: ignore[reportAttributeAccessIssue]
        model = client.models.get("acme/small")
        assert model.latest_version and model.latest_version.id == version_of(tmp_path / "small")
        prediction = client.models.predictions.create("acme/small", input={"image": URI, "seed": 1})
        assert prediction.version == model.latest_version.id
        with pytest.raises(replicate.exceptions.ReplicateError, match="there is no model acme/huge"):  # pyright: ignore[reportAttributeAccessIssue]
            client.models.get("acme/huge")
        client._client.close()


@pytest.mark.long
def test_two_real_bundles_make_the_bytes_of_their_engines(tmp_path: Path, tiny_bundle: Path) -> None:
    settings = {"scale_factor": 2, "num_inference_steps": 1, "latent_tiled_size": 16, "seed": 1}
    configuration = Configuration(data=tmp_path, bundles=f"acme/tiny={tiny_bundle}")

    def load(path: Path) -> Engine:
        return Engine.load(path, "cpu", tmp_path / "rates")

    expected = {}
    for name, path in (("you/seesr", weights.POCKET), ("acme/tiny", tiny_bundle)):
        with load(path) as engine:
            expected[name] = engine.run(IMAGE, Settings(**settings)).data
    assert len(set(expected.values())) == 2
    built = app.build(
        configuration, "http://127.0.0.1:5000", weights.POCKET,
        lambda send: app.local(
            configuration, lambda: load(weights.POCKET), weights.POCKET, send, load, lambda path: False
        ),
    )  # fmt: skip
    with TestClient(built, base_url="http://127.0.0.1:5000") as client:
        for name in ("you/seesr", "acme/tiny", "you/seesr"):
            body = {"version": name, "input": {"image": URI, **settings}}
            answer = client.post("/v1/predictions", json=body, headers={"Prefer": "wait"}).json()
            assert base64.b64decode(answer["output"].partition(",")[2]) == expected[name], answer["error"]
