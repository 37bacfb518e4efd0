"""Results in object storage through obstore: a folder, S3 and compatible stores, Google Cloud Storage."""

from __future__ import annotations

import datetime
import secrets
from typing import Any

from seesr.config import Configuration
from seesr.images.formats import MEDIA_TYPES

LINK = datetime.timedelta(hours=1)  # that a signed link is good for
CONNECT = datetime.timedelta(seconds=2)  # to connect to a store
ANSWER = datetime.timedelta(seconds=30)  # for one request and its answer, with the file
RETRIES, RETRY = 2, datetime.timedelta(seconds=10)  # after an error; none begins later than this after the first try


class Store:
    """One place for results.

    Args:
        url: file:///folder, s3://bucket/prefix, gs://bucket/prefix; keys and endpoint come from the environment of the
            platform (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT, AWS_REGION, ...).
        public: public address without a slash at the end; None: links are signed.
    """

    def __init__(self, url: str, public: str | None) -> None:
        import obstore.store

        options: dict[str, Any] = {}
        if not url.startswith("file:"):
            options["client_options"] = dict[str, Any](connect_timeout=CONNECT, timeout=ANSWER)
            options["retry_config"] = {"max_retries": RETRIES, "retry_timeout": RETRY}
        if url.startswith("s3://"):
            options["client_options"]["allow_http"] = True
        try:
            self.store: Any = obstore.store.from_url(url, **options)  # one class per kind of store
        except Exception as error:  # obstore raises one class per kind of error
            raise ValueError(f"SEESR_STORE is {url!r}: {' '.join(str(error).split())}") from error
        self.url, self.public = url, public

    @classmethod
    def configured(cls) -> Store:
        """The store that SEESR_STORE names.

        Raises:
            ValueError: none is named, or it cannot be used; one line.
        """
        configuration = Configuration.read()
        if not configuration.store:
            raise ValueError("SEESR_STORE is not set: set it to s3://bucket, gs://bucket or file:///folder")
        return cls(configuration.store, configuration.store_public)

    def put(self, data: bytes, suffix: str) -> dict[str, str]:
        """Writes a result under a new key.

        Returns:
            {"file_key", "public_url"}.

        Raises:
            RuntimeError: the store is down or refuses; one line.
        """
        import obstore

        key = f"{secrets.token_hex(16)}.{suffix}"
        try:
            attributes = {"Content-Type": MEDIA_TYPES[suffix]}
            local = self.url.startswith("file:")
            obstore.put(self.store, key, data, mode="create", attributes=None if local else attributes)
            return {"file_key": key, "public_url": self.link(key)}
        except Exception as error:
            raise RuntimeError(f"the result cannot be stored: {' '.join(str(error).split())[:200]}") from error

    def link(self, key: str) -> str:
        """Where the result can be read."""
        import obstore

        if self.public:
            return f"{self.public}/{key}"
        if self.url.startswith("file:"):
            return f"{self.url.rstrip('/')}/{key}"
        return obstore.sign(self.store, "GET", key, LINK)
