"""Access control: which route needs a key, which the platform may call, and requests that web pages send."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from seesr.serving.keys import Key, Keys
from seesr.serving.refusal import Refused, shown

LOCAL = "local"  # owner of all jobs of a server without keys
LOCAL_KEY = Key(name=LOCAL, sha256="")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
OPEN = {  # (method, route) that need no key; every other one does
    ("GET", "/"),
    ("GET", "/page.css"),
    ("GET", "/texts.json"),
    ("GET", "/blend.js"),
    ("GET", "/editor.js"),
    ("GET", "/page.js"),
    ("GET", "/docs.css"),
    ("GET", "/docs"),
    ("GET", "/sample.webp"),
    ("GET", "/live"),
    ("GET", "/ready"),
    ("GET", "/health"),
    ("GET", "/ping"),
    ("GET", "/settings"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/outputs/{name}"),  # its link is signed
    ("GET", "/v1/predictions/{id}/stream"),  # so is this one: Replicate's JavaScript client sends no key here
}


def platform_routes(platform: str | None, environment: Mapping[str, str]) -> set[tuple[str, str]]:
    """The (method, route) pairs that a platform calls without an API key, because it checks its callers itself.

    Args:
        platform: SEESR_PLATFORM.

    Raises:
        ValueError: the platform has not set the variables that name its routes.
    """
    if platform == "vertex":
        names = ("AIP_HEALTH_ROUTE", "AIP_PREDICT_ROUTE")
        if missing := [name for name in names if not environment.get(name)]:
            raise ValueError(f"SEESR_PLATFORM=vertex needs {' and '.join(missing)}, which Vertex AI sets")
        return {("GET", environment[names[0]]), ("POST", environment[names[1]])}
    if platform == "sagemaker":
        return {("GET", "/ping"), ("POST", "/invocations")}
    return {("POST", "/")} if platform == "huggingface" else set()


def route_of(routes: Iterable[BaseRoute], scope: Scope) -> tuple[str, str] | None:
    """The (method, route) that will answer a request, HEAD as GET; None: no route will."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    for route in routes:
        if isinstance(route, Route) and route.matches(scope)[0] is Match.FULL:
            return method, route.path
    return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_remote(scope: Scope) -> bool:
    """Whether a request comes from another machine, by the address that a trusted proxy names if there is one."""
    try:
        return not ipaddress.ip_address((scope.get("client") or ("localhost", 0))[0]).is_loopback
    except ValueError:
        return False


class Access:
    """Decides whether a request is allowed, and who owns it.

    Args:
        keys: of all callers.
        routes: of the application.
        platform: SEESR_PLATFORM, owner of what the platform sends without a key.
        public_url: SEESR_PUBLIC_URL.
        environment: names the routes of Vertex AI.
        metrics_token: SEESR_METRICS_TOKEN.

    Attributes:
        local: there are neither keys nor a platform; every caller on this machine is LOCAL, and no other is allowed.

    Raises:
        ValueError: the environment is not the platform's; one line.
    """

    def __init__(
        self,
        keys: Keys,
        routes: Sequence[BaseRoute],
        platform: str | None,
        public_url: str | None,
        environment: Mapping[str, str],
        metrics_token: str = "",
    ) -> None:
        self.metrics_token = metrics_token
        self.keys, self.routes, self.platform = keys, routes, platform
        self.local = not (keys or platform)
        self.public = urlsplit(public_url or "")
        self.platform_routes = platform_routes(platform, environment)

    def admit(self, scope: Scope) -> Key | None:
        """The key of a request; None: it has none, for a route that needs none.

        Raises:
            Refused: 401, 403 or 421.
        """
        headers, route = Headers(scope=scope), route_of(self.routes, scope)
        host = headers.get("host", "").lower()
        if self.local:
            self.check_host(host)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and "origin" in headers:
            self.check_origin(headers["origin"], host)
        if self.local:
            if route not in OPEN and is_remote(scope):
                raise unauthorized(
                    "this server has no API keys and accepts requests of its own machine only; set SEESR_API_KEYS"
                )
            return LOCAL_KEY
        authorization = headers.get("authorization", "")
        key = self.key(authorization)
        if key is not None:
            return key
        if route in self.platform_routes:
            return Key(name=self.platform or LOCAL, sha256="")
        if route in OPEN or (route == ("GET", "/metrics") and self.may_scrape(authorization)):
            return None
        raise unauthorized("You did not pass a valid authentication token")

    def check_host(self, host: str) -> None:
        """Refuses foreign names on a local server: a web page can point its own name at this machine."""
        if not host:
            return
        name = urlsplit(f"//{host}").hostname if HOST.fullmatch(host) else None
        if name is None or not (is_loopback(name) or name == self.public.hostname):
            detail = (
                f"the Host header {shown(host)!r} is not allowed: call localhost, or set SEESR_PUBLIC_URL to allow it"
            )
            raise Refused("wrong_host", detail)

    def check_origin(self, origin: str, host: str) -> None:
        """Refuses what a browser sends for a page of another site."""
        netloc = origin.lower().partition("://")[2]
        if not netloc or netloc not in (host, self.public.netloc.lower()):
            detail = f"pages of {shown(origin)!r} may not call this server; set SEESR_PUBLIC_URL if that is its address"
            raise Refused("forbidden_origin", detail)

    def may_scrape(self, header: str) -> bool:
        """Whether an Authorization header has SEESR_METRICS_TOKEN."""
        kind, _, token = header.partition(" ")
        good = hmac.compare_digest(token.strip().encode(), self.metrics_token.encode())
        return bool(self.metrics_token) and kind.lower() == "bearer" and good

    def key(self, header: str) -> Key | None:
        """The key in an Authorization header; None: there is no valid one."""
        kind, _, token = header.partition(" ")
        return self.keys.find(token.strip()) if kind.lower() in ("bearer", "token") else None


def unauthorized(detail: str) -> Refused:
    return Refused("unauthorized", detail, **{"WWW-Authenticate": "Bearer"})
