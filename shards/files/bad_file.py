"""Explanations for unusable files: pointers, error pages, broken downloads, dead links.

All readers of a model folder use this module, so that each error gives the same cause and remedy.
Knows first bytes and file-system errors; knows nothing of tensors, configs and tokenizers.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

HEAD_BYTES = 1024
"""Bytes at the start of a file that show the kind of file."""

UNFINISHED = (
    ".part",
    ".partial",
    ".incomplete",
    ".aria2",
    ".crdownload",
    ".download",
    ".tmp",
    ".filepart",
)
"""Suffixes that programs give to unfinished downloads."""

_FETCH = "fetch the file again"
_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # "ggml" and its successors, as stored


def explain_head(head: bytes, size: int) -> str | None:
    """The real kind of a file that cannot belong to a model, from the first bytes.

    Args:
        head: first `HEAD_BYTES` bytes, or all bytes of a shorter file.
        size: bytes of the file.

    Returns:
        A clause with cause and remedy, to follow the file name and a colon; None if the head shows
        no defect.
    """
    if size == 0:
        return f"is empty (0 bytes): the download did not begin; {_FETCH}"
    if head.startswith(_LFS):
        stated = _LFS_SIZE.search(head)
        target = f" to a file of {int(stated[1]):,} bytes" if stated else ""
        return (
            f"is a git-lfs pointer{target}, not the file: run `git lfs pull` in the folder, or "
            "fetch the model with `arriero models pull`"
        )
    if b"/annex/objects/" in head[:200]:
        return "is a git-annex pointer, not the file: run `git annex get` in the folder"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            f"is a web page or an error message of a server ({size:,} bytes of HTML or XML), not "
            f"the file: check the address and the access token, then {_FETCH}"
        )
    if not head.strip(b"\0"):
        return f"begins with {len(head)} zero bytes: the download was not finished; {_FETCH}"
    return None


def explain_binary(head: bytes, size: int) -> str | None:
    """As `explain_head`, and other kinds of files that cannot be a weight file."""
    reason = explain_head(head, size)
    if reason is not None:
        return reason
    if head.startswith(_PICKLES):
        return "looks like a pickle file, which can run code: convert it to safetensors"
    if head.startswith(b"GGUF"):
        return "is a GGUF file: convert it to a model folder with `arriero models import FILE`"
    if head.startswith(_OLD_GGML):
        return "is a GGML file, older than GGUF: convert the original checkpoint instead"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"is compressed ({name}): unpack it first"
    if size <= HEAD_BYTES and _is_text(head):
        text = " ".join(head.decode("utf-8").split())[:120]
        return f"is a text of {size} bytes ({text!r}), not a file of weights; {_FETCH}"
    return None


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(text) > 1 and all(letter.isprintable() or letter in "\r\n\t" for letter in text)


def explain_error(file: Path, error: OSError) -> str:
    """Why a file could not be opened or read, as a clause with the remedy.

    Args:
        file: path of the file.
        error: error of the system.
    """
    if error.errno == errno.ENOENT:
        if file.is_symlink():
            target = os.readlink(file)
            return (
                f"is a link to {target[:300]}, which is missing (an emptied cache, or a copy "
                "without the targets of links): fetch the model again with `arriero models pull`"
            )
        unfinished = unfinished_of(file)
        if unfinished is not None:
            return f"No such file, but {unfinished}, an unfinished download; {_FETCH}"
        return f"No such file; {_FETCH}"
    if error.errno == errno.EISDIR or (error.errno == errno.ENODEV and file.is_dir()):
        return "is a folder, not a file: remove the folder and fetch the file again"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            "cannot be read: permission denied; give the user that runs arriero read access "
            "(`chmod a+r`, and `chmod a+x` on the folders)"
        )
    if error.errno == errno.ELOOP:
        return f"is a link to itself; {_FETCH}"
    return f"cannot be read: {error.strerror or error}"


def unfinished_of(file: Path) -> str | None:
    """Name of an unfinished download beside `file`; None without such a file."""
    for suffix in UNFINISHED:
        if os.path.lexists(f"{file}{suffix}"):
            return f"{file.name}{suffix}"
    return None


def head_of(file: Path) -> tuple[bytes, int]:
    """The first bytes and the size of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        return stream.read(HEAD_BYTES), size
