"""Why a file cannot be what its name says: pointers, error pages, broken downloads, dead links.

One place for all readers of a model folder, so that each names the same cause and the same remedy.
Knows heads of files and what the file system says; knows nothing of tensors, configs or tokenizers.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

HEAD_BYTES = 1024
"""Bytes from the start of a file that tell what it is."""

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
"""Suffixes under which programs keep a download that has not ended."""

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
    """What a file is, from its first bytes, where it is none of the files of a model.

    Args:
        head: the first `HEAD_BYTES` bytes, or all of a shorter file.
        size: bytes of the file.

    Returns:
        A clause with the remedy, to follow the file's name and a colon; None where the head shows
        nothing wrong.
    """
    if size == 0:
        return f"is empty (0 bytes): the download did not begin; {_FETCH}"
    if head.startswith(_LFS):
        stated = _LFS_SIZE.search(head)
        of = f" to a file of {int(stated[1]):,} bytes" if stated else ""
        return (
            f"is a git-lfs pointer{of}, not the file: run `git lfs pull` in its folder, or fetch "
            "the model with `arriero models pull`"
        )
    if b"/annex/objects/" in head[:200]:
        return "is a git-annex pointer, not the file: run `git annex get` in its folder"
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
    """`explain_head`, and what only a file of weights cannot be: another kind of file."""
    told = explain_head(head, size)
    if told is not None:
        return told
    if head.startswith(_PICKLES):
        return "looks like a pickle, which could run code: convert it to safetensors"
    if head.startswith(b"GGUF"):
        return "is a GGUF file: `arriero models import FILE` makes a folder of it"
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
    return len(text) > 1 and all(one.isprintable() or one in "\r\n\t" for one in text)


def explain_error(file: Path, error: OSError) -> str:
    """Why a file could not be opened or read, as a clause with the remedy.

    Args:
        file: as it was asked for.
        error: what the system said.
    """
    if error.errno == errno.ENOENT:
        if file.is_symlink():
            target = os.readlink(file)
            return (
                f"is a link to {target[:300]}, which is missing (a cache that was emptied, or a "
                "copy without what its links lead to): fetch the model again with `arriero models "
                "pull`"
            )
        unfinished = unfinished_of(file)
        if unfinished is not None:
            return f"No such file, but {unfinished}: a download that was not finished; {_FETCH}"
        return f"No such file; {_FETCH}"
    if error.errno == errno.EISDIR or (error.errno == errno.ENODEV and file.is_dir()):
        return "is a folder, not a file: move the file of this name out of it, or fetch it again"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            "cannot be read: permission denied; give the user that runs arriero the right to read "
            "it (`chmod a+r`, and `a+x` on its folders)"
        )
    if error.errno == errno.ELOOP:
        return f"is a link that leads to itself; {_FETCH}"
    return f"cannot be read: {error.strerror or error}"


def unfinished_of(file: Path) -> str | None:
    """Name of a download of `file` that was not finished, beside it; None where there is none."""
    for suffix in UNFINISHED:
        if os.path.lexists(f"{file}{suffix}"):
            return f"{file.name}{suffix}"
    return None


def head_of(file: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its size.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        return stream.read(HEAD_BYTES), size
