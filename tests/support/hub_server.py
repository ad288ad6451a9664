"""A server on this machine that answers as Hugging Face's hub does for one model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class Hub:
    """What it serves, and what it was asked."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.sha = hashlib.sha1(name.encode()).hexdigest()
        self.status = 200
        self.break_after: dict[str, int] = {}  # bytes of a file, after which one answer breaks off
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.url = ""

    def files(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob("*") if p.is_file())


@contextmanager
def hub(name: str, folder: Path) -> Iterator[Hub]:
    served = Hub(name, folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = urlsplit(self.path).path
            served.asked.append((self.command, path, self.headers.get("Range")))
            api = f"/api/models/{served.name}"
            if served.status != 200:
                return self.reply(served.status, b"{}", {"X-Error-Code": "GatedRepo"})
            if path in (api, f"{api}/revision/main"):
                names = [{"rfilename": str(p.relative_to(folder))} for p in served.files()]
                found = {"id": served.name, "sha": served.sha, "siblings": names}
                return self.reply(200, json.dumps(found).encode())
            if path.startswith(f"{api}/tree/"):
                listed = [
                    {
                        "type": "file",
                        "path": str(p.relative_to(folder)),
                        "size": p.stat().st_size,
                        "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                    }
                    for p in served.files()
                ]
                return self.reply(200, json.dumps(listed).encode())
            for revision in ("main", served.sha):
                start = f"/{served.name}/resolve/{revision}/"
                if path.startswith(start) and (folder / path[len(start) :]).is_file():
                    return self.file(folder / path[len(start) :], body)
            code = "RepoNotFound" if served.name not in path else "EntryNotFound"
            return self.reply(404, b"{}", {"X-Error-Code": code})

        def file(self, file: Path, body: bool) -> None:
            data = file.read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "X-Repo-Commit": served.sha,
                "Accept-Ranges": "bytes",
            }
            status, asked = 200, self.headers.get("Range")
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                piece = data[int(first) : int(last) + 1 if last else len(data)]
                end = int(first) + len(piece) - 1
                headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
                status, data = 206, piece
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if not body:
                return
            cut = served.break_after.pop(file.name, None)
            if cut is not None:
                self.close_connection = True
                data = data[:cut]
            self.wfile.write(data)

        def reply(self, status: int, data: bytes, more: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (more or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
