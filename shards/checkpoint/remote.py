"""Checkpoints that are not on this machine yet: any fsspec URL, and Hugging Face's hub.

A folder is copied to this node once, whole files at a time and several at once; a copy that was
broken off goes on where it stopped. To load slices no weights are copied, but what the slices read
(see `ranges`). Knows names of files; refuses to know what is in them beyond the index, and never
fetches a pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.shards.checkpoint.cache import cache_folder
from arriero.shards.checkpoint.index import INDEX_FILE, SINGLE_FILE, weight_map
from arriero.shards.checkpoint.ranges import RangedFolder
from arriero.shards.errors import CheckpointError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CopyProgress = Callable[[int, int, str], None]
"""Called with bytes copied so far, bytes in all, and the name of a file."""

FILES_AT_ONCE = 4
SMALL_FILES = (
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Fetched where they exist, beside config.json and the weights."""
HUB_PATTERNS = ["config.json", INDEX_FILE, "*.safetensors", "tokenizer.model", *SMALL_FILES]

_HUB_NAME = re.compile(r"[\w.\-]{1,96}/[\w.\-]{1,96}", re.ASCII)
_STATE = ".arriero-copy.json"
_RANGES = ".ranges"
_NOT_THERE = (403, 404, 410)  # stores that do not list answer 403 for what is missing


def is_url(where: str) -> bool:
    """Whether it names a folder through fsspec, such as "s3://bucket/model"."""
    return "://" in where


def local_folder(where: str, progress: CopyProgress | None = None, *, weights: bool = True) -> Path:
    """The folder on this machine that `where` names, copied to the cache first if it is a URL.

    Several processes may ask at once: one copies, the others wait.

    Args:
        where: a path, or a URL whose scheme fsspec knows ("file", "http", "s3", "gs"...).
        progress: told of what is copied.
        weights: whether they are wanted; without them config, tokenizer and index come alone.

    Raises:
        CheckpointError: an unknown scheme, a file that is missing, or a copy that failed.
    """
    if not is_url(where):
        return Path(where)
    with _copy_of(where, progress) as copy:
        if isinstance(copy, Path):
            return copy
        copy.run(weights)
        return copy.folder


def ranged_folder(where: str) -> tuple[Path, RangedFolder | None]:
    """The folder on this machine that a URL names, and what fetches its weights as they are read.

    Returns:
        The folder, with config, tokenizer and index; and where its weights are, None where they
        all lie in it.

    Raises:
        CheckpointError: as `local_folder`.
    """
    with _copy_of(where, None) as copy:
        if isinstance(copy, Path):
            return copy, None
        return copy.folder, copy.ranged()


@contextmanager
def _copy_of(where: str, progress: CopyProgress | None) -> Iterator[_Copy | Path]:
    """What copies the URL's folder, alone on this node; or the folder, where it is local."""
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(where)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{where}: cannot be opened: {error}") from None
    if "local" in filesystem.protocol:
        yield Path(root)
        return
    digest = hashlib.blake2b(where.rstrip("/").encode(), digest_size=6).hexdigest()
    name = re.sub(r"[^\w.\-]", "_", where.rstrip("/").rpartition("/")[2])[:80]
    folder = cache_folder() / "remote" / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        try:
            yield _Copy(filesystem, root.rstrip("/"), folder, where, progress)
        except (OSError, ValueError) as error:  # what filesystems raise has no common base
            raise CheckpointError(f"{where}: cannot be copied: {error}") from None


class _Copy:
    """One folder's files, brought up to date."""

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        root: str,
        folder: Path,
        where: str,
        progress: CopyProgress | None,
    ) -> None:
        self._fs, self._root, self._folder, self._where = filesystem, root, folder, where
        self._progress = progress
        self._state: dict[str, list[Any]] = {}
        self._has_index = False
        self._lock = threading.Lock()
        self._done = self._total = 0

    @property
    def folder(self) -> Path:
        """Where the copy is."""
        return self._folder

    def run(self, with_weights: bool) -> None:
        """Copy what is missing or has changed."""
        self._fetch_small()
        if with_weights:
            self._fetch(self._weights())
            shutil.rmtree(self._folder / _RANGES, ignore_errors=True)

    def ranged(self) -> RangedFolder | None:
        """Copy what is small; what fetches the weights, None where they are all here.

        They are where they were copied whole before, and where the server knows no ranges.
        """
        self._fetch_small()
        found = self._weights()
        if all(self._is_here(name, one) for name, one in found.items()):
            return None
        if any(not size for size, _ in found.values()) or not self._serves_ranges(min(found)):
            self._fetch(found)
            return None
        return RangedFolder(self._fs, self._root, self._folder / _RANGES, found, self._where)

    def _fetch_small(self) -> None:
        file = self._folder / _STATE
        if file.is_file():
            self._state = json.loads(file.read_text())
        small = self._known(["config.json", *SMALL_FILES, INDEX_FILE])
        if "config.json" not in small:
            raise CheckpointError(f"{self._where}/config.json: missing; a model folder holds one")
        self._has_index = INDEX_FILE in small
        self._fetch(small)

    def _weights(self) -> dict[str, list[Any]]:
        """Size and version of each file of weights."""
        weights = [SINGLE_FILE]
        if self._has_index:
            weights = sorted(set(weight_map(self._folder / INDEX_FILE).values()))
        found = self._known(weights)
        if missing := [name for name in weights if name not in found]:
            raise CheckpointError(f"{self._where}: holds no {missing[0]}")
        return found

    def _serves_ranges(self, name: str) -> bool:
        """Plain web servers may send the whole file instead, which this breaks off."""
        if "http" not in self._fs.protocol:
            return True
        try:
            with self._fs.open(f"{self._root}/{name}", cache_type="none") as stream:
                stream.seek(8)  # from the start a whole file does for a range
                return len(stream.read(8)) == 8
        except (OSError, ValueError):
            return False

    def _is_here(self, name: str, known: list[Any]) -> bool:
        return self._state.get(name) == known and (self._folder / name).is_file()

    def _known(self, names: list[str]) -> dict[str, list[Any]]:
        """Size and version of each file that exists."""

        def look(name: str) -> list[Any] | None:
            try:
                info = self._fs.info(f"{self._root}/{name}")
            except FileNotFoundError as error:  # for HTTP, whatever went wrong
                cause = error.__cause__
                if cause is None or getattr(cause, "status", None) in _NOT_THERE:
                    return None
                raise CheckpointError(
                    f"{self._where}/{name}: cannot be reached: {cause or type(cause).__name__}"
                ) from None
            version = next((info[key] for key in _VERSIONS if info.get(key)), None)
            return [info.get("size"), str(version)]

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            looked = zip(names, pool.map(look, names), strict=True)
            return {name: one for name, one in looked if one is not None}

    def _fetch(self, known: dict[str, list[Any]]) -> None:
        due = {name: one for name, one in known.items() if not self._is_here(name, one)}
        with self._lock:
            self._total += sum(one[0] or 0 for one in due.values())
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda name: self._fetch_one(name, due[name]), due))

    def _fetch_one(self, name: str, known: list[Any]) -> None:
        file = self._folder / name
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        self._fs.get_file(f"{self._root}/{name}", str(partial))
        size = partial.stat().st_size
        if known[0] is not None and size != known[0]:
            raise CheckpointError(f"{self._where}/{name}: {size} bytes came instead of {known[0]}")
        partial.rename(file)
        with self._lock:
            self._state[name] = known
            (self._folder / _STATE).write_text(json.dumps(self._state))
            self._done += size
            if self._progress is not None:
                self._progress(self._done, max(self._total, self._done), name)


_VERSIONS = ("ETag", "etag", "md5", "version_id", "LastModified", "mtime", "last_modified")


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def pull_from_hub(name: str, revision: str | None = None) -> Path:
    """Download a model from Hugging Face's hub, or from $HF_ENDPOINT, into the hub's own cache.

    What was downloaded before, whole or in part, is not downloaded again.

    Args:
        name: "ORG/NAME".
        revision: branch, tag or commit; None for the main branch.

    Returns:
        The snapshot's folder.

    Raises:
        CheckpointError: no such model, no right to it, or no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{name[:200]!r} is not a model's name; give it as ORG/NAME")
    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=HUB_PATTERNS,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
        return Path(found)
    except GatedRepoError:
        why = "is gated: accept its licence on the hub, and set HF_TOKEN"
    except RepositoryNotFoundError:
        why = "is not on the hub, or is private: check the name, or set HF_TOKEN"
    except RevisionNotFoundError:
        why = f"has no revision {revision!r}"
    except LocalEntryNotFoundError as error:
        why = f"is not in the cache, and the hub cannot be reached: {_first_line(error)}"
    except (HfHubHTTPError, OSError) as error:
        why = f"cannot be downloaded: {_first_line(error)}"
    raise CheckpointError(f"{name}: {why}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
