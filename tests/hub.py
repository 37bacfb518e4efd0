"""A loopback server that speaks as much of the model hub's API as a download needs, over folders of repositories."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".pth", ".bin")  # stored as LFS objects, which have a sha256


class Hub:
    """`with Hub(folder) as hub:` serves folder/{models,spaces}/owner/name/... at hub.url.

    Attributes:
        fail: path suffix -> how many more times a GET of it breaks off half-way (-1: always).
        lie: path suffixes whose bytes are sent with one byte flipped.
        requests: (method, path, Range header) of every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fail: dict[str, int] = {}
        self.lie: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []

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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path, request.headers.get("Range")))
        listing = re.fullmatch(r"/api/(models|spaces)/([^/]+/[^/]+)(?:/revision/.+)?", path)
        file = re.fullmatch(r"/(spaces/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if listing and (self.folder / listing[1] / listing[2]).is_dir():
            self.send(request, 200, json.dumps(self.listing(listing[1], listing[2])).encode(), body)
            return
        if file:
            target = self.folder / (file[1] or "models/").rstrip("/") / file[2] / file[3]
            if target.is_file():
                self.send_file(request, target, path, body)
                return
        request.send_response(404)
        request.send_header("X-Error-Code", "EntryNotFound" if file else "RepoNotFound")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def listing(self, kind: str, name: str) -> dict:
        root = self.folder / kind / name
        siblings = []
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": path.relative_to(root).as_posix(), "size": len(data), "blobId": blob}
            if path.name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {
            "id": name,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, body: bool, **headers: str) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if body:
            request.wfile.write(data)

    def send_file(self, request: BaseHTTPRequestHandler, target: Path, path: str, body: bool) -> None:
        data = target.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        if any(path.endswith(suffix) for suffix in self.lie):
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        if wanted:
            start = int(wanted[1])
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        suffix = next((s for s, left in self.fail.items() if path.endswith(s) and left), None)
        if body and suffix:
            self.fail[suffix] -= 1
            part = data[start:]
            request.send_response(206 if start else 200)
            request.send_header("Content-Length", str(len(part)))
            for name, value in headers.items():
                request.send_header(name.replace("_", "-"), value)
            request.end_headers()
            request.wfile.write(part[: len(part) // 2])
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        self.send(request, 206 if start else 200, data[start:], body, **headers)
