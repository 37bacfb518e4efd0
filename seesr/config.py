"""Configuration from environment variables: type, range, default and effect of each."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "SEESR_"
WEIGHTS_SCRIPT = {"SEESR_CACHE", "SEESR_GITHUB"}  # of ./scripts/weights, which reads them itself
SECRET = {"api_keys", "metrics_token", "redis"}  # no message shows their values
REDIS_URL = "redis://[:password@]host:port/db, with special characters of the password percent-encoded"


def option(default: Any, description: str, **limits: Any) -> Any:
    """A variable: its default, its effect, and its limits as arguments of `pydantic.Field`."""
    return Field(default=default, description=description, **limits)


def check_redis(url: str | None) -> str | None:
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


class Configuration(BaseSettings):
    """Values of the environment variables: SEESR_ and the field's name in capitals, or the field's alias."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True)

    weights: Path | None = option(
        None, "Folder of the bundle to load. Unset: weights/full if it exists, otherwise weights/pocket."
    )
    bundles: str = option(
        "",
        "Server: more models by name in Replicate's API, as owner/name=folder,owner/name=folder. They load "
        "at their first image; the one used longest ago is unloaded when memory is short.",
    )
    device: str | None = option(
        None, "Torch device, such as cpu or cuda:1. Unset: the GPU if there is one, otherwise the CPU."
    )
    attention: str = option(
        "auto",
        "Attention kernel: auto (the default for the device), sdpa, flash, efficient, cudnn, xformers or rows (CPU).",
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Number format of the networks. auto: float16 on a GPU, float32 on a CPU. bfloat16 is faster on CPUs with "
        "AVX-512 BF16 or AMX, halves the memory for the weights and changes pixels by less than one level on average.",
    )
    cuda_graphs: bool = option(
        True, "Replays the networks as CUDA graphs after a self-check at the start, which is faster. 0 turns it off."
    )
    tile_workers: int = option(
        1,
        "Processes that share the tiles of each image, with the same bytes. On a CPU each has OMP_NUM_THREADS threads; "
        "with GPUs each has its own GPU. 1 turns it off.",
        ge=1,
    )
    cache_mb: int = option(
        512,
        "Megabytes of host memory for results of stages. A second run of an image computes only what its settings "
        "change. At most a quarter of the free memory is used. 0 turns it off.",
        ge=0,
    )
    c2pa_certificate: Path | None = option(
        None, "PEM file with the certificate chain that signs outputs (C2PA). Unset: outputs are not signed."
    )
    c2pa_key: Path | None = option(None, "PEM file with the private key of SEESR_C2PA_CERTIFICATE.")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = option(
        "es256", "Algorithm of that key."
    )
    c2pa_timestamp_url: str | None = option(
        None, "Address of a timestamp authority that is asked at every signature. Unset: none is asked."
    )
    deadline: float | None = option(
        None,
        "Seconds that one image may take, checked at every tile. A caller's own deadline replaces it. Unset: no limit.",
        gt=0,
    )
    price_per_hour: float | None = option(
        None, "Price of an hour of this machine, in any currency, for the price of a quote. Unset: no price.", ge=0
    )
    data: Path = option(
        Path("seesr-data"),
        "Server: folder for the queue, uploads and results. Gateway and worker: folder for temporary files.",
    )
    api_keys: SecretStr = option(
        SecretStr(""),
        "Server: API keys as name:token,name:token. Unset: no token is needed, for a server on a loopback address "
        "without a proxy.",
    )
    keys_file: Path | None = option(
        None,
        "Server: JSON file of API keys with their limits, written by seesr keys and reloaded when it changes.",
    )
    metrics_token: SecretStr = option(
        SecretStr(""), "Server: a token that can read /metrics and nothing else. Unset: /metrics needs an API key."
    )
    local_webhooks: bool = option(
        False,
        "Server: also sends webhooks to http addresses of this machine, to test them. Only for a server on a loopback "
        "address.",
    )
    platform: Literal["vertex", "sagemaker", "huggingface"] | None = option(
        None, "Server: platform that checks the callers. The routes that it calls then need no key."
    )
    public_url: str | None = option(
        None, "Server: address that clients use, such as https://example.com. Unset: the host of the request."
    )
    max_queue: int = option(
        100, "Server: images that can wait in the queue. Further requests are answered with 429.", ge=1
    )
    queue_share: float = option(
        0.5, "Server and fleet: largest share of the queue for one key while others wait.", gt=0, le=1
    )
    keep: float = option(24, "Server and fleet: hours after which results, uploads and job records are removed.", gt=0)
    rate: int = option(
        600, "Server: POST requests that one key can send in a minute. Further requests are answered with 429.", ge=1
    )
    shutdown: float = option(
        600,
        "Server: seconds that SIGTERM waits for the running image. After that, the next server runs the image again.",
        gt=0,
    )
    allow_urls: str = option(
        "",
        "Server: hosts from which image URLs are fetched, separated by commas. .example.com allows "
        "subdomains; * allows every public host. Unset: image URLs are refused.",
    )
    store: str | None = option(
        None, "Object store for results: s3://bucket/prefix, gs://bucket/prefix or file:///folder."
    )
    store_public: str | None = option(
        None, "Public address of the object store. Unset: links are signed and expire after one hour."
    )
    redis: Annotated[str | None, AfterValidator(check_redis)] = option(
        None,
        "Fleet: Redis of the queue, redis://[:password@]host:port/db, or rediss:// with TLS. The server then sends its "
        "jobs to the workers.",
        repr=False,  # it has a password
    )
    lease: int = option(
        60, "Fleet: seconds without a heartbeat of a worker after which another worker runs its job.", ge=2
    )
    store_retry: float = option(
        60, "Fleet: seconds for which a worker retries while the object store is unavailable; then the job fails.", ge=0
    )
    share_tiles: bool = option(
        False,
        "Worker: shares the tiles of its image with idle workers of the same kind, and computes tiles of others while "
        "it is idle, with the same bytes.",
    )
    worker_name: str | None = option(
        None, "Worker: its name, such as gpu0@host. Unset: built from the GPU, the process and the host."
    )
    log_format: Literal["console", "json"] = option(
        "console", "Log format. json writes one JSON object per line.", validation_alias="LOG_FORMAT"
    )

    @classmethod
    def read(cls) -> Configuration:
        """The configuration of this process.

        Raises:
            ValueError: a variable has a value that it cannot have, or no meaning; one line that names it.
        """
        known = {variable(name) for name in cls.model_fields}
        for name in sorted(os.environ):
            if name.startswith(PREFIX) and name not in known | WEIGHTS_SCRIPT:
                raise ValueError(f"{name} is not a known variable; the variables are {', '.join(sorted(known))}")
        try:
            return cls()
        except ValidationError as error:
            fault, *_ = error.errors()
            place, *_ = map(str, fault["loc"])
            name = place if place in known else variable(place)
            if place in SECRET:
                raise ValueError(f"{name} cannot be used: {fault['msg'].removeprefix('Value error, ')}") from None
            raise ValueError(f"{name} is {fault['input']!r}: {fault['msg']}") from None


def variable(field: str) -> str:
    """The environment variable of a field."""
    alias = Configuration.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()
