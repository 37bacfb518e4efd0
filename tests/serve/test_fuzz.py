"""Requests that schemathesis generates from the OpenAPI document: no 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from serving import sharp

from lab.serve.servers import EchoServer

EXAMPLES = 40  # of each operation
SECONDS = 5.0  # for one answer; an endless stream has its status before


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoServer]:
    with EchoServer(tmp_path_factory.mktemp("fuzz"), ECHO_SECONDS="0", SEESR_MAX_QUEUE="100000") as running:
        yield running
        assert "Traceback" not in (running.folder / "log").read_text()


def known_ids(server: EchoServer) -> list[str]:
    """Ids of a job, a batch and a file, so that not every path is a 404."""
    image, png = sharp(), {"Content-Type": "image/png"}
    job = server.ask("POST", "/upscale?wait=0", content=image, headers=png).json()["id"]
    batch = server.ask("POST", "/batches", files={"image": ("a.png", image, "image/png")}).json()["id"]
    file = server.ask("POST", "/v1/files", files={"content": ("a.png", image, "image/png")}).json()["id"]
    return [job, batch, file]


@pytest.mark.slow
def test_no_request_of_any_listed_route_is_answered_with_a_5xx(server: EchoServer, tmp_path: Path) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    document = server.ask("GET", "/openapi.json").json()
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(operations) == sum(len(methods.keys() - {"parameters"}) for methods in document["paths"].values())
    ids, answers = known_ids(server), 0

    def ask(case: Any) -> None:
        nonlocal answers
        arguments = {**case.as_transport_kwargs(base_url=server.url), "timeout": SECONDS, "stream": True}
        try:
            answer = requests.request(**arguments)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader, UnicodeError):
            return  # no client can send it
        with answer:
            answers += 1
            assert answer.status_code < 500, (case.method, case.path, answer.status_code, answer.text[:300])

    for operation in operations:
        options: dict[str, Any] = {"max_examples": EXAMPLES, "deadline": None, "database": None, "derandomize": True}

        @settings(**options, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(), id=st.sampled_from([None, *ids]))
        def fuzz(case: Any, id: str | None) -> None:
            if id is not None and "id" in (case.path_parameters or {}):
                case.path_parameters["id"] = id
            ask(case)

        fuzz()
    assert answers > EXAMPLES * len(operations) / 2
    assert server.ask("GET", "/ready").status_code == 200
