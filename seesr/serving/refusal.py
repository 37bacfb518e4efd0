"""`Refused`: the exception that becomes an HTTP error response with one line."""

from __future__ import annotations


class Refused(Exception):
    """A request that is answered with a status and one line.

    Args:
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, " ".join(detail.split()), headers
