"""A loopback replica of the model hub and of GitHub's raw files, over folders, with their typical failures."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".pth", ".bin")  # stored as LFS objects, which have a sha256


class Hub:
    """`with Hub(folder) as hub:` serves folder/{models,spaces,github}/owner/name/... at hub.url and hub.raw.

    Attributes:
        missing: repositories that do not exist.
        gated: repository -> 401 or 403 for its files; its listing is open, as on the hub.
        closed: repository -> 401 or 403 for its listing too.
        moved: repository -> its new name, which the old one is redirected to.
        busy: path suffix -> how many more times it is answered 429 with `Retry-After: 1`.
        fail: path suffix -> how many more times a GET of it breaks off half-way (-1: always).
        lie: path suffixes whose bytes are sent with one byte flipped.
        ranges: whether parts of files are sent.
        slept: seconds that the client would have waited.
        requests: (method, path, Range header, token) of every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: set[str] = set()
        self.gated: dict[str, int] = {}
        self.closed: dict[str, int] = {}
        self.moved: dict[str, str] = {}
        self.busy: dict[str, int] = {}
        self.fail: dict[str, int] = {}
        self.lie: set[str] = set()
        self.ranges = True
        self.slept: list[float] = []
        self.requests: list[tuple[str, str, str | None, str | None]] = []

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, True)

            def do_HEAD(self) -> None:
                hub.answer(self, False)

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.raw = f"http://localhost:{self.server.server_address[1]}/raw"  # another host than the hub
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self, suffix: str = "") -> list[tuple[str, str | None]]:
        """(path, Range header) of every GET of a file that ends so."""
        return [(path, r) for method, path, r, _ in self.requests if method == "GET" and path.endswith(suffix)]

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = urlsplit(request.path).path
        headers = request.headers
        self.requests.append((request.command, path, headers.get("Range"), headers.get("Authorization")))
        listing = re.fullmatch(r"/api/(models|spaces)/([^/]+/[^/]+)(?:/revision/.+)?", path)
        file = re.fullmatch(r"/(spaces/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        raw = re.fullmatch(r"/raw/([^/]+/[^/]+)/[^/]+/(.+)", path)
        kind = listing[1] if listing else "github" if raw else (file[1] or "models/").rstrip("/") if file else ""
        name = listing[2] if listing else raw[1] if raw else file[2] if file else ""
        suffix = next((suffix for suffix, left in self.busy.items() if path.endswith(suffix) and left), None)
        if suffix:
            self.busy[suffix] -= 1
            return self.send(request, 429, b"", body, Retry_After="1")
        if name in self.moved:
            return self.send(request, 307, b"", body, Location=request.path.replace(name, self.moved[name]))
        if not (self.folder / kind / name).is_dir() or f"{kind}/{name}" in self.missing:
            # the hub answers 401 to strangers, so that they cannot tell a private repository from none
            return self.send(request, 404 if raw else 401, b"", body, X_Error_Code="RepoNotFound")
        status = self.closed.get(name) or (None if listing else self.gated.get(name))
        if status:
            return self.send(request, status, b"", body, X_Error_Code="GatedRepo")
        if listing:
            return self.send(request, 200, json.dumps(self.listing(kind, name)).encode(), body)
        target = self.folder / kind / name / (raw[2] if raw else file[3] if file else "")
        if not target.is_file():
            return self.send(request, 404, b"", body, X_Error_Code="EntryNotFound")
        return self.send_file(request, target, path, body)

    def listing(self, kind: str, name: str) -> dict:
        root = self.folder / kind / name
        siblings = []
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": path.relative_to(root).as_posix(), "size": len(data), "blobId": blob}
            if path.name.endswith(LARGE):
                entry["blobId"] = hashlib.sha1(entry["blobId"].encode()).hexdigest()  # of the pointer to the object
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "disabled": False}

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, body: bool, **headers: str) -> None:
        request.send_response(status)
        headers = {"Content_Length": str(len(data))} | headers
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if body:
            request.wfile.write(data)

    def send_file(self, request: BaseHTTPRequestHandler, target: Path, path: str, body: bool) -> None:
        data = target.read_bytes()
        if any(path.endswith(suffix) for suffix in self.lie):
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT}
        status, part = 200, data
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if requested and self.ranges:
            start, end = int(requested[1]), int(requested[2] or len(data) - 1)
            status, part = 206, data[start : end + 1]
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
        suffix = next((s for s, left in self.fail.items() if path.endswith(s) and left), None)
        if body and suffix:
            self.fail[suffix] -= 1
            self.send(request, status, part[: len(part) // 2], True, Content_Length=str(len(part)), **headers)
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        self.send(request, status, part, body, **headers)
