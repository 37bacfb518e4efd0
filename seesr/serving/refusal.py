"""Errors of the HTTP API: the table of their codes, and `Refused`, the exception that becomes one of them."""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple


class ErrorCode(NamedTuple):
    """One code of the HTTP API.

    Attributes:
        status: HTTP status.
        meaning: when it is sent, one sentence.
        remedy: what the caller or the operator can do, one sentence.
        setting: environment variable of the server that changes the limit; None: there is none.
    """

    status: int
    meaning: str
    remedy: str
    setting: str | None = None


ERRORS = {
    "invalid_body": ErrorCode(400, "The body is not valid JSON or not a valid form.", "Fix the body."),
    "invalid_cursor": ErrorCode(400, "The cursor of a list is invalid.", "Start without a cursor."),
    "unauthorized": ErrorCode(
        401, "The token is missing or wrong.", "Send `Authorization: Bearer TOKEN`.", "SEESR_API_KEYS"
    ),
    "forbidden_origin": ErrorCode(
        403, "A page of another site sent the request from a browser.", "Set the public address of the server.",
        "SEESR_PUBLIC_URL",
    ),
    "priority_not_allowed": ErrorCode(
        403, "The key may not use this priority.", "Send another priority.", "SEESR_KEYS_FILE"
    ),
    "not_found": ErrorCode(404, "The route, job, batch, file or model does not exist.", "Check the id and the key."),
    "expired": ErrorCode(
        404, "The file or the link has expired or was removed.", "Send the image again, or read the job again.",
        "SEESR_KEEP",
    ),
    "method_not_allowed": ErrorCode(405, "The route has no such method.", "Read the `Allow` header."),
    "body_too_slow": ErrorCode(408, "The body arrives too slowly.", "Send the request again."),
    "not_finished": ErrorCode(409, "The job or batch has not ended.", "Wait for its end, then try again."),
    "deadline_too_short": ErrorCode(
        409, "The deadline cannot be met.", "Allow more time, or choose a smaller scale or fewer steps; see `quote`."
    ),
    "canceled": ErrorCode(409, "The job was canceled.", "Send the image again."),
    "idempotency_expired": ErrorCode(
        409, "The first request with this Idempotency-Key is unfinished or has expired.", "Use a new key.",
        "SEESR_KEEP",
    ),
    "too_large": ErrorCode(413, "The body, the image file or a part of it is too large.", "Send less."),
    "unsupported_media_type": ErrorCode(
        415, "The route does not take this Content-Type or Content-Encoding.", "Send one of the documented types."
    ),
    "wrong_host": ErrorCode(
        421, "A server without keys was called by a foreign host name.", "Call localhost, or set the public address.",
        "SEESR_PUBLIC_URL",
    ),
    "invalid_input": ErrorCode(
        422, "A value is missing, unknown or out of range, or the image cannot be used.", "Change the field in `field`."
    ),
    "url_not_allowed": ErrorCode(
        422, "The host of an image URL is not allowed.", "Allow the host, or send the image itself.", "SEESR_ALLOW_URLS"
    ),
    "version_not_found": ErrorCode(
        422, "The server has another version of the model.", "Send `OWNER/seesr` as the version."
    ),
    "idempotency_reused": ErrorCode(
        422, "This Idempotency-Key was used for another request.", "Use a new key for each request."
    ),
    "job_failed": ErrorCode(422, "The image could not be upscaled.", "Read `detail`."),
    "rate_limited": ErrorCode(
        429, "The key has sent too many requests.", "Wait as long as `Retry-After` says.", "SEESR_RATE"
    ),
    "quota_exceeded": ErrorCode(
        429, "The key has used its megapixels of the day.", "Wait for the next UTC day.", "SEESR_KEYS_FILE"
    ),
    "queue_full": ErrorCode(
        429, "The queue, or the key's share of it, is full.", "Wait as long as `Retry-After` says.", "SEESR_MAX_QUEUE"
    ),
    "internal_error": ErrorCode(500, "The server had an internal error.", "Send the `X-Request-Id` to the operator."),
    "no_quotes": ErrorCode(501, "No worker publishes its rates.", "Update the workers of the fleet."),
    "not_ready": ErrorCode(503, "The weights are loading, or the device has failed.", "Try again later."),
    "unavailable": ErrorCode(
        503, "The server is shutting down, or its queue or store cannot be reached.", "Try again later."
    ),
    "disk_full": ErrorCode(503, "The server cannot write to its disk.", "Free disk space.", "SEESR_DATA"),
}  # fmt: skip
CODE_OF_STATUS = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}  # errors of Starlette itself


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        code: a key of ERRORS.
        detail: what was wrong with which value, the limit and the next step; one line.
        field: the field of the request to change.
        headers: of the response.
    """

    def __init__(self, code: str, detail: str, field: str | None = None, **headers: str) -> None:
        super().__init__(detail)
        self.code, self.detail, self.field, self.headers = code, " ".join(detail.split()), field, headers

    @property
    def status(self) -> int:
        return ERRORS[self.code].status


def shown(value: Any) -> str:
    """A value for a message: a text as it is, everything else as Python writes it; 60 characters at most."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
