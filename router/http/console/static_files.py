"""The files of the console's page, with the headers that bind a browser to them.

Every file comes from the folder `static/` beside this module, so the page needs no build and no
other host. Knows files and headers; knows nothing of requests and of callers.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
PAGE = "index.html"
PREFIX = "/console"
"""Path of the page; a file's path is the prefix, a slash and the name below `static/`."""
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
"""Content types by suffix; files of other kinds are not served."""
_INLINE = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)
_HEADERS = {
    "cache-control": "no-cache",  # kept by the browser, and compared by ETag before each use
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "vary": "accept-encoding",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticFile:
    """A file of the page.

    Attributes:
        content: its bytes.
        zipped: the bytes in gzip.
        etag: value of the header `etag`.
        headers: headers of the answer; without the length and the encoding.
    """

    content: bytes
    zipped: bytes
    etag: str
    headers: Mapping[str, str]


def content_policy(page: str) -> str:
    """The Content-Security-Policy of the page: nothing from elsewhere, no inline code.

    Args:
        page: the HTML. The hash of its import map, the only script inside the page, is allowed.
    """
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in _INLINE.findall(page)
    ]
    scripts = " ".join(["'self'", *(f"'sha256-{value}'" for value in hashes)])
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {scripts}",
            "style-src 'self'",
            "img-src 'self' data: blob:",  # images of a chat, which the user gave
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    )


@cache
def paths() -> frozenset[str]:
    """The paths of all files, and the path of the page."""
    names = (
        file.relative_to(FOLDER).as_posix()
        for file in FOLDER.rglob("*")
        if file.is_file() and file.suffix in _KINDS
    )
    return frozenset({PREFIX, *(f"{PREFIX}/{name}" for name in names)})


@cache
def read(path: str) -> StaticFile | None:
    """The file at a path; None where `paths` has no such path.

    Only listed paths lead to a file, so no spelling of a path leaves the folder.
    """
    if path not in paths():
        return None
    file = FOLDER / (path.removeprefix(PREFIX).removeprefix("/") or PAGE)
    content = file.read_bytes()
    headers = {**_HEADERS, "content-type": _KINDS[file.suffix]}
    if file.suffix == ".html":
        headers["content-security-policy"] = content_policy(content.decode())
    return StaticFile(
        content=content,
        zipped=gzip.compress(content, mtime=0),
        etag=f'W/"{hashlib.sha256(content).hexdigest()[:32]}"',  # weak: of both encodings
        headers=headers,
    )
