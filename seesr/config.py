"""Everything that the environment can set, in one place: type, range, default, effect."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "SEESR_"
SECRET = {"api_keys", "redis"}  # no message shows their values
REDIS_URL = "redis://[:password@]host:port/db, with special characters of the password percent-encoded"


class Configuration(BaseSettings):
    """One field per environment variable: SEESR_ and the field's name in capitals, unless an alias stands there."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True)

    weights: Path | None = Field(
        default=None,
        description="folder of the bundle to load; unset: weights/full if it is there, else weights/pocket",
    )
    device: str | None = Field(
        default=None, description="torch device, such as cpu or cuda:1; unset: the GPU if there is one"
    )
    attention: str = Field(
        default="auto",
        description="attention kernel by its name; auto: the one for CPUs, or what torch chooses for this GPU",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="replay the networks as CUDA graphs, after a self-check at the start; 0 runs them eagerly",
    )
    deadline: float | None = Field(
        default=None, gt=0, description="seconds that one picture may take, checked at every tile; unset: any time"
    )
    data: Path = Field(default=Path("seesr-data"), description="seesr serve: folder for the queue, uploads and results")
    api_keys: SecretStr = Field(
        default=SecretStr(""), description="seesr serve: name:token,name:token; without any only this machine may call"
    )
    platform: Literal["vertex", "sagemaker", "huggingface"] | None = Field(
        default=None,
        description="seesr serve: the platform that runs it and checks its callers; opens the routes that it calls "
        "without a key",
    )
    public_url: str | None = Field(
        default=None, description="seesr serve: the address that clients use, https://host; unset: the one they asked"
    )
    max_queue: int = Field(default=100, ge=1, description="seesr serve: pictures that may wait; more are answered 429")
    queue_share: float = Field(
        default=0.5, gt=0, le=1, description="seesr serve: part of the queue that one key may have while others wait"
    )
    keep: float = Field(default=24, gt=0, description="seesr serve: hours after which results and uploads are removed")
    rate: int = Field(default=600, ge=1, description="seesr serve: requests that one key may start in a minute")
    shutdown: float = Field(
        default=600,
        gt=0,
        description="seesr serve: seconds that SIGTERM waits for the running image; then the next start runs it again",
    )
    allow_urls: str = Field(
        default="",
        description="seesr serve: hosts whose URLs are fetched as image, .name with subdomains, * any public",
    )
    store: str | None = Field(
        default=None, description="object storage for results: s3://bucket/prefix, gs://bucket/prefix, file:///folder"
    )
    store_public: str | None = Field(
        default=None, description="address at which everybody can read the store; unset: links are signed for an hour"
    )
    redis: str | None = Field(
        default=None,
        repr=False,  # it has a password
        description="the fleet's queue, redis://[:password@]host:port/db; seesr serve then sends jobs to its workers",
    )
    lease: int = Field(
        default=60, ge=2, description="fleet: seconds after which a job whose worker fell silent goes to another one"
    )
    worker_name: str | None = Field(
        default=None, description="seesr worker: its name, x@host; unset: the GPU, the process and the machine"
    )
    log_format: Literal["console", "json"] = Field(
        default="console", validation_alias="LOG_FORMAT", description="json: one JSON object per log line"
    )

    @field_validator("redis")
    @classmethod
    def check_redis(cls, url: str | None) -> str | None:
        """Refuses a URL that would be cut at a character of its password, which a later message would then show."""
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0 and not parts.fragment
            good = good and re.fullmatch(r"/?[0-9]*", parts.path)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"it must be {REDIS_URL}")
        return url

    @classmethod
    def read(cls) -> Configuration:
        """The configuration of this process.

        Raises:
            ValueError: a variable has a value that it cannot have, or no meaning; one line that names it.
        """
        known = {variable(name) for name in cls.model_fields}
        for name in sorted(os.environ):
            if name.startswith(PREFIX) and name not in known:
                raise ValueError(f"{name} is no variable of this program; there are {', '.join(sorted(known))}")
        try:
            return cls()
        except ValidationError as error:
            fault = error.errors()[0]
            place = str(fault["loc"][0])
            name = place if place in known else variable(place)
            if place in SECRET:
                raise ValueError(f"{name} cannot be used: {fault['msg'].removeprefix('Value error, ')}") from None
            raise ValueError(f"{name} is {fault['input']!r}: {fault['msg']}") from None


def variable(field: str) -> str:
    """The environment variable of a field."""
    alias = Configuration.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()
