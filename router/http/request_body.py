"""Reads a request's body: whole, decompressed, as UTF-8, with the content type of JSON.

Clients send bodies in several encodings and with several content types. An unambiguous body is
read; other bodies are refused with the name of the header or the position of the byte at fault.
Knows bytes and headers; knows nothing of the meaning of a body.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import zlib
from collections.abc import Mapping, Sequence

from starlette.types import Message, Receive

Headers = list[tuple[bytes, bytes]]

_AS_JSON = frozenset(
    {
        "",
        "application/json",
        "application/octet-stream",
        "application/x-www-form-urlencoded",  # curl's default
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
FORM_PATH = "/v1/files"
"""The only path that takes forms with files."""
MAX_FORM_BYTES = 64 * 1024
"""Bytes of a form besides its file."""
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's window bits of the three framings


class TooLarge(Exception):
    """The body exceeds the limit; `whole`: the body was received to its end."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole


class Unreadable(Exception):
    """The body cannot be read.

    Args:
        status: HTTP status.
        field: header at fault; "" for the body.
        words: error text for the client.
    """

    def __init__(self, status: int, field: str, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.field = field


async def gather(receive: Receive, most: int) -> bytes | None:
    """Receive the whole body; None when the client disconnected before its end.

    Raises:
        TooLarge: the body has more than `most` bytes.
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


def is_form(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the body is a form with files."""
    return headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")


def check_form(path: str, headers: Mapping[bytes, bytes]) -> None:
    """Refuse a form that the path does not take, or that any web page could send.

    Raises:
        Unreadable: the path takes no form, or the form comes from a web page without a key.
    """
    if path != FORM_PATH:
        words = f"only {FORM_PATH} takes multipart/form-data; send application/json"
        raise Unreadable(415, "content-type", words)
    if b"origin" in headers and b"authorization" not in headers:
        # A browser sends forms from a page of any site; a header of its own needs a preflight.
        words = "a form from a web page needs the header `authorization`"
        raise Unreadable(415, "content-type", words)


def bounded(receive: Receive, most: int) -> Receive:
    """A `receive` that raises `TooLarge` once the body has more than `most` bytes."""
    size = 0

    async def next_message() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise TooLarge
        return message

    return next_message


async def as_json(body: bytes, headers: Mapping[bytes, bytes], most: int) -> bytes:
    """The body as UTF-8 text without compression.

    Args:
        body: the bytes as sent.
        headers: headers of the request, names in lower case.
        most: most bytes of the decompressed body.

    Raises:
        TooLarge: the decompressed body has more than `most` bytes.
        Unreadable: an encoding or a content type is not supported, or does not match the bytes.
    """
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _AS_JSON and not _JSON.fullmatch(kind):
        raise Unreadable(
            415,
            "content-type",
            f"the header `content-type`={kind[:64]!r} is not supported; send application/json",
        )
    if b"origin" in headers and not _JSON.fullmatch(kind):
        # A browser sends other types from a page of any site without a preflight request.
        raise Unreadable(
            415,
            "content-type",
            f"the header `content-type`={kind[:64]!r} is not allowed from a web page; send "
            "application/json",
        )
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    if encoding not in ("", "identity"):
        body = await asyncio.to_thread(_decompress, body, encoding, most)
    return _utf_8(body, content_type)


def rewritten(headers: Sequence[tuple[bytes, bytes]], size: int) -> Headers:
    """The headers that match a body from `as_json`."""
    replaced = {b"content-type", b"content-encoding", b"content-length", b"transfer-encoding"}
    others = [(name, value) for name, value in headers if name not in replaced]
    length = (b"content-length", str(size).encode())
    return [*others, (b"content-type", b"application/json"), length]


def _decompress(body: bytes, encoding: str, most: int) -> bytes:
    if encoding in ("gzip", "x-gzip"):
        window = _GZIP
    elif encoding == "deflate":
        # The standard means zlib's framing; some clients send the bare stream.
        bare = len(body) < 2 or body[0] & 15 != 8 or (body[0] * 256 + body[1]) % 31
        window = _RAW if bare else _ZLIB
    else:
        raise Unreadable(
            415,
            "content-encoding",
            f"the header `content-encoding`={encoding[:64]!r} is not supported; send gzip, "
            "deflate, or an uncompressed body",
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
            raise _broken(encoding, "the data ends early")
        body = stream.unused_data  # gzip data may have several members
        if body and window != _GZIP:
            raise _broken(encoding, "bytes follow the end of the data")
    return b"".join(parts)


def _broken(encoding: str, reason: str) -> Unreadable:
    return Unreadable(
        400,
        "content-encoding",
        f"the body is not {encoding} as in the header `content-encoding`: {reason}",
    )


def _utf_8(body: bytes, content_type: str) -> bytes:
    charset = _CHARSET.search(content_type)
    if charset is not None:
        name = charset[1]
        try:
            codec = codecs.lookup(name).name
        except LookupError:
            codec = ""
        if not _TEXT_CODECS.fullmatch(codec):
            raise Unreadable(
                415, "content-type", f"the charset {name[:64]!r} is unknown; send UTF-8"
            )
        if codec not in ("utf-8", "utf-8-sig", "ascii"):
            try:
                return body.decode(codec).removeprefix("\ufeff").encode()
            except UnicodeError:
                raise Unreadable(
                    400,
                    "content-type",
                    f"the body is not {name} as in the header `content-type`; send UTF-8",
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
            "UTF-8, or name the charset: content-type: application/json; charset=latin-1",
        ) from None
    return body
