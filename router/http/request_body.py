"""A request's body as the application reads it: whole, uncompressed, UTF-8, said to be JSON.

Clients send bodies in several encodings and under several content types. What can be read without
a doubt is read; anything else is refused in words that name the header or the byte at fault. Knows
bytes and headers; knows nothing of what a body means.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import zlib
from collections.abc import Mapping, Sequence

from starlette.types import Receive

Headers = list[tuple[bytes, bytes]]

_AS_JSON = frozenset(
    {
        "",
        "application/json",
        "application/octet-stream",
        "application/x-www-form-urlencoded",  # what curl says unless it is told otherwise
        "text/json",
        "text/plain",
    }
)
_JSON = re.compile(r"application/(json|[\w.+-]+\+json)|text/json")
_CHARSET = re.compile(r"charset\s*=\s*\"?([\w.:-]+)", re.IGNORECASE)
_TEXT_CODECS = re.compile(
    r"utf-(8|8-sig|16|16-le|16-be|32|32-le|32-be)|ascii|iso8859-\d+|cp\d+|mac-roman|koi8-[a-z]"
    r"|gb\w+|big5\w*|shift_jis\w*|euc_\w+"
)
_BOMS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's window bits of the three framings


class TooLarge(Exception):
    """The body passed the limit; `whole` says that it was received to its end."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole


class Unreadable(Exception):
    """The body cannot be read.

    Args:
        status: of HTTP.
        field: the header at fault; "" for the body.
        words: for the client.
    """

    def __init__(self, status: int, field: str, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.field = field


async def gather(receive: Receive, most: int) -> bytes | None:
    """The body as it was sent; None where the client went away before its end.

    Raises:
        TooLarge: it has more than `most` bytes.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise TooLarge
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def as_json(body: bytes, headers: Mapping[bytes, bytes], most: int) -> bytes:
    """The body as UTF-8 text without compression.

    Args:
        body: as it was sent.
        headers: of the request, names in lower case.
        most: bytes that it may have, also when it is decompressed.

    Raises:
        TooLarge: it decompresses to more.
        Unreadable: an encoding or a type that is not taken, or bytes that are not what they are
            said to be.
    """
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _AS_JSON and not _JSON.fullmatch(kind):
        raise Unreadable(
            415,
            "content-type",
            f"the header `content-type`={kind[:64]!r} is not taken; send application/json",
        )
    if b"origin" in headers and not _JSON.fullmatch(kind):
        # A page of any site can have a browser send the other types here without asking first.
        raise Unreadable(
            415,
            "content-type",
            f"the header `content-type`={kind[:64]!r} is not taken from a web page; send "
            "application/json",
        )
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    if encoding not in ("", "identity"):
        body = await asyncio.to_thread(_decompress, body, encoding, most)
    return _utf_8(body, content_type)


def rewritten(headers: Sequence[tuple[bytes, bytes]], size: int) -> Headers:
    """The headers of a body that `as_json` read."""
    replaced = {b"content-type", b"content-encoding", b"content-length", b"transfer-encoding"}
    kept = [(name, value) for name, value in headers if name not in replaced]
    length = (b"content-length", str(size).encode())
    return [*kept, (b"content-type", b"application/json"), length]


def _decompress(body: bytes, encoding: str, most: int) -> bytes:
    if encoding in ("gzip", "x-gzip"):
        window = _GZIP
    elif encoding == "deflate":
        # Meant is zlib's framing; some send the bare stream.
        bare = len(body) < 2 or body[0] & 15 != 8 or (body[0] * 256 + body[1]) % 31
        window = _RAW if bare else _ZLIB
    else:
        raise Unreadable(
            415,
            "content-encoding",
            f"the header `content-encoding`={encoding[:64]!r} is not taken; send the body in gzip "
            "or deflate, or as it is",
        )
    parts: list[bytes] = []
    room = most
    while body:
        stream = zlib.decompressobj(window)
        try:
            parts.append(stream.decompress(body, room + 1))
        except zlib.error as error:
            raise _broken(encoding, str(error)) from None
        room -= len(parts[-1])
        if room < 0:
            raise TooLarge(whole=True)
        if not stream.eof:
            raise _broken(encoding, "it ends early")
        body = stream.unused_data  # gzip may hold several members
        if body and window != _GZIP:
            raise _broken(encoding, "bytes follow its end")
    return b"".join(parts)


def _broken(encoding: str, reason: str) -> Unreadable:
    return Unreadable(
        400,
        "content-encoding",
        f"the body is not {encoding}, which the header `content-encoding` says: {reason}",
    )


def _utf_8(body: bytes, content_type: str) -> bytes:
    found = _CHARSET.search(content_type)
    if found is not None:
        name = found[1]
        try:
            codec = codecs.lookup(name).name
        except LookupError:
            codec = ""
        if not _TEXT_CODECS.fullmatch(codec):
            raise Unreadable(
                415, "content-type", f"the charset {name[:64]!r} is not known; send UTF-8"
            )
        if codec not in ("utf-8", "utf-8-sig", "ascii"):
            try:
                return body.decode(codec).removeprefix("\ufeff").encode()
            except UnicodeError:
                raise Unreadable(
                    400,
                    "content-type",
                    f"the body is not {name}, which its `content-type` says; send UTF-8",
                ) from None
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        body.decode()
    except UnicodeDecodeError as error:
        likely = next((name for bom, name in _BOMS.items() if body.startswith(bom)), "")
        guess = f"; it looks like {likely}" if likely else ""
        raise Unreadable(
            400,
            "",
            f"the body is not UTF-8 (byte {error.start} is 0x{body[error.start]:02x}{guess}); send "
            "it in UTF-8, or name its charset: content-type: application/json; charset=latin-1",
        ) from None
    return body
