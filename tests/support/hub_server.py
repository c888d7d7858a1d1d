"""A local server that answers the requests of the Hugging Face client libraries from a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
TOKEN = "hf_of_the_tests"
"""The only token that may write."""


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``root/models/OWNER/NAME`` and ``root/datasets/OWNER/NAME``; names with "gated" are refused.

    Models can also be created and committed to, with `TOKEN`.

    Yields:
        The address, and a list of the requests so far.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Nothing is printed."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if urlsplit(self.path).path in ("/api/repos/create", "/api/validate-yaml") or "/commit/" in self.path:
                self._write(urlsplit(self.path).path, body)
            else:
                self._answer(body)

        def _write(self, path: str, body: bytes) -> None:
            """Create a repository, or commit files to it, if there is a token."""
            requests.append(f"POST {path.strip('/')}")
            address = f"http://127.0.0.1:{server.server_port}"
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, b'{"error": "Invalid token"}')
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
                (root / "models" / name).mkdir(parents=True, exist_ok=True)
                self._json({"url": f"{address}/{name}"})
            else:
                repo = "/".join(path.split("/")[3:5])
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        target = root / "models" / repo / entry["value"]["path"]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(base64.b64decode(entry["value"]["content"]))
                self._json({"commitOid": COMMIT, "commitUrl": f"{address}/{repo}/commit/{COMMIT}", "hookOutput": ""})

        def _answer(self, body: bytes = b"") -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            parts = path.split("/")
            if parts[0] == "api" and parts[1] in ("models", "datasets"):
                self._api(parts[1], "/".join(parts[2:4]), parts[4:], body)
            elif "resolve" in parts:
                kind, names = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
                self._file(kind, "/".join(names[:2]), "/".join(names[4:]))
            else:
                self._send(404, b"{}")

        def _api(self, kind: str, repo: str, rest: list[str], body: bytes) -> None:
            folder = root / kind / repo
            if not folder.is_dir():
                self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
                return
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            tree = [_entry(folder, file) for file in files]
            if rest[:1] == ["preupload"]:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self._json({"files": modes})
            elif rest[:1] == ["tree"]:
                below = "/".join(rest[2:])
                self._json([entry for entry in tree if entry["path"].startswith(below)])
            elif rest[:1] == ["paths-info"]:
                wanted = json.loads(body)["paths"]
                self._json([entry for entry in tree if entry["path"] in wanted])
            elif not rest or rest[0] == "revision":
                siblings = [{"rfilename": entry["path"]} for entry in tree]
                gated = "manual" if "gated" in repo else False
                self._json(
                    {"id": repo, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings, "tags": []}
                )
            else:
                self._send(404, b"{}")

        def _file(self, kind: str, repo: str, name: str) -> None:
            path = root / kind / repo / name
            if "gated" in repo:
                self._send(403, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
            elif not (root / kind / repo).is_dir():
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                content = path.read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                self._send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

        def _json(self, content: Any) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            start = 0
            wanted = self.headers.get("Range")
            if wanted and status == 200:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end, size = int(first), int(last or len(content) - 1), len(content)
                content, status = content[start : end + 1], 206
                headers = {**(headers or {}), "Content-Range": f"bytes {start}-{start + len(content) - 1}/{size}"}
            self.send_response(status)
            for name, value in {"Accept-Ranges": "bytes", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(folder: Path, file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {
        "type": "file",
        "path": file.relative_to(folder).as_posix(),
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
