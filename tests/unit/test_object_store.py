"""Results in object storage: keys, links and options of each kind of store, without a network."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import obstore
import obstore.store
import pytest

from seesr import object_store
from seesr.images.formats import MEDIA_TYPES
from seesr.object_store import ANSWER, CONNECT, LINK, RETRY, Store


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each store that is opened."""
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(obstore.store, "from_url", lambda url, **values: options.append(values) or "a store")
    return options


def test_a_result_in_a_folder_has_a_key_and_an_address(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for url in (f"file://{tmp_path}/store", f"file://{tmp_path}/store/"):
        put = Store(url, None).put(b"image", "webp")
        assert put["public_url"] == f"file://{tmp_path}/store/{put['file_key']}"
        assert (tmp_path / "store" / put["file_key"]).read_bytes() == b"image"
        assert len(put["file_key"]) == 32 + len(".webp"), "it cannot be guessed"
    assert len(list((tmp_path / "store").iterdir())) == 2
    public = Store(url, "https://images.example").put(b"image", "png")
    assert public["public_url"] == f"https://images.example/{public['file_key']}"


@pytest.mark.parametrize(("url", "http"), [("s3://bucket/x", True), ("gs://bucket/x", None)])
def test_a_store_on_the_network_has_time_limits(url: str, http: bool | None, opened: list[dict[str, Any]]) -> None:
    Store(url, None)
    (options,) = opened
    assert options["client_options"].get("allow_http") is http
    assert (options["client_options"]["connect_timeout"], options["client_options"]["timeout"]) == (CONNECT, ANSWER)
    assert options["retry_config"]["retry_timeout"] == RETRY and options["retry_config"]["max_retries"] >= 1
    assert datetime.timedelta(0) < CONNECT < RETRY < ANSWER
    Store("file:///tmp", None)
    assert opened[-1] == {}


def test_a_link_is_signed_for_one_hour(opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    from seesr.config import Configuration
    from seesr.serving.service import LINK_SECONDS

    signed: list[Any] = []
    monkeypatch.setattr(obstore, "sign", lambda *values: signed.append(values) or "https://signed")
    assert Store("s3://bucket", None).link("a.png") == "https://signed"
    assert signed == [("a store", "GET", "a.png", LINK)] and LINK.total_seconds() == LINK_SECONDS
    about = Configuration.model_fields["store_public"].description or ""
    assert "links are signed and expire after one hour" in about and datetime.timedelta(minutes=60) == LINK


def test_a_result_on_the_network_has_its_type_and_is_never_overwritten(
    opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []
    monkeypatch.setattr(obstore, "put", lambda *values, **more: put.append((*values, more)))
    result = Store("s3://bucket", "https://images.example").put(b"image", "png")
    more = {"mode": "create", "attributes": {"Content-Type": MEDIA_TYPES["png"]}}
    assert put == [("a store", result["file_key"], b"image", more)]


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: Any, **more: Any) -> Any:
        raise obstore.exceptions.GenericError("two\n  lines " + "x" * 999)

    with pytest.raises(ValueError, match="SEESR_STORE is 'ftp://x': "):
        Store("ftp://x", None)
    monkeypatch.setattr(obstore, "put", fail)
    monkeypatch.setattr(obstore.store, "from_url", lambda url, **values: None)
    with pytest.raises(RuntimeError, match="the result cannot be stored: two lines x+$") as error:
        Store("s3://bucket", None).put(b"x", "png")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(("store", "public"), [(None, None), ("s3://bucket", None), ("s3://bucket", "https://x")])
def test_the_store_of_the_configuration(
    store: str | None, public: str | None, opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SEESR_STORE", store), ("SEESR_STORE_PUBLIC", public)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if store is None:
        with pytest.raises(ValueError, match="SEESR_STORE is not set"):
            object_store.Store.configured()
        return
    configured = object_store.Store.configured()
    assert (configured.url, configured.public, configured.store) == (store, public, "a store")
