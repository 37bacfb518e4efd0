"""Downloads image URLs safely: only allowed hosts and public addresses, checked at each redirect."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from urllib.parse import urljoin, urlsplit

import httpx

from seesr.serving.refusal import Refused

REDIRECTS = 5
SECONDS = 60.0  # for the whole of it
TRANSLATED = [  # IPv6 networks whose addresses contain an IPv4 address: NAT64, 6to4, IPv4-compatible
    ipaddress.IPv6Network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "::/96")
]


def permitted(host: str, allowed: str) -> bool:
    """Whether SEESR_ALLOW_URLS ("*" or a list of hosts; subdomains of .name) has this host."""
    names = {name.strip().lower() for name in allowed.split(",") if name.strip()}
    host = host.lower()
    return "*" in names or host in names or any(name.startswith(".") and host.endswith(name) for name in names)


def is_public(address: str) -> bool:
    """Whether an address leads to the internet, and not through a translation to an IPv4 address that may not."""
    ip = ipaddress.ip_address(address)
    if not ip.is_global or ip.is_multicast:
        return False
    return ip.version == 4 or not (ip.is_site_local or any(ip in network for network in TRANSLATED))


async def public_address(host: str, port: int) -> str:
    """One address of a host, all of which must be public.

    Raises:
        ValueError: there is none, or one is private.
    """
    try:
        loop = asyncio.get_running_loop()
        entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ValueError(f"the host {host} cannot be found") from None
    addresses = [str(entry[4][0]) for entry in entries]
    if not addresses or not all(is_public(address) for address in addresses):
        raise ValueError(f"the host {host} has an address that is not public")
    return addresses[0]


async def fetch(url: str, allowed: str) -> AsyncIterator[bytes]:
    """The bytes at a URL, piece by piece. The address that was checked is the one that is asked.

    Raises:
        Refused: the host is not allowed.
        ValueError: it is not public, or there is no file; one line.
    """
    try:
        async with asyncio.timeout(SECONDS), httpx.AsyncClient(timeout=10, trust_env=False) as client:
            for _ in range(REDIRECTS + 1):
                parts = urlsplit(url)
                host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
                if not port or not host:
                    raise ValueError("image must be an http(s) URL")
                if not permitted(host, allowed):
                    raise Refused(
                        "url_not_allowed",
                        f"URLs of {host} are not allowed here: set SEESR_ALLOW_URLS={host} on the server, or send the "
                        "image itself",
                        "image",
                    )
                address = await public_address(host, port)
                netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
                target = parts._replace(netloc=netloc).geturl()
                headers = {"Host": parts.netloc.rpartition("@")[2], "Accept-Encoding": "identity"}
                extensions = {"sni_hostname": host}
                async with client.stream("GET", target, headers=headers, extensions=extensions) as response:
                    if response.is_redirect:
                        url = urljoin(url, response.headers.get("location", ""))
                        continue
                    if response.status_code != 200:
                        raise ValueError(f"the image URL answers {response.status_code}")
                    async for chunk in response.aiter_raw():
                        yield chunk
                    return
            raise ValueError(f"the image URL redirects more than {REDIRECTS} times")
    except TimeoutError:
        raise ValueError(f"the image URL took longer than {SECONDS:.0f} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"the image URL cannot be fetched ({type(error).__name__})") from None
