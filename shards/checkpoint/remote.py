"""Remote checkpoints: any fsspec URL, and the Hugging Face hub.

A node copies a folder once, whole files, several at a time; an interrupted copy continues where it
stopped. To load slices, only the bytes that the slices read are fetched (see `ranges`). Knows file
names; knows nothing of file contents except the index. Never fetches a pickle.
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
"""Called with bytes copied so far, total bytes, and the name of a file."""

FILES_AT_ONCE = 4
SMALL_FILES = (
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
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
"""Optional files, fetched beside config.json and the weights."""
HUB_PATTERNS = ["config.json", INDEX_FILE, "*.safetensors", "tokenizer.model", *SMALL_FILES]

_HUB_NAME = re.compile(r"[\w.\-]{1,96}/[\w.\-]{1,96}", re.ASCII)
_STATE = ".arriero-copy.json"
_RANGES = ".ranges"
_NOT_THERE = (403, 404, 410)  # stores without listing answer 403 for a missing file


def is_url(source: str) -> bool:
    """Whether a source is an fsspec URL, such as "s3://bucket/model"."""
    return "://" in source


def local_folder(
    source: str, progress: CopyProgress | None = None, *, weights: bool = True
) -> Path:
    """The local folder of a model; a URL is first copied to the cache.

    Several processes may call at the same time: one process copies, the others wait.

    Args:
        source: a path, or a URL with a scheme of fsspec ("file", "http", "s3", "gs"...).
        progress: called after each copied file.
        weights: copy the weights too; false copies only config, tokenizer and index.

    Raises:
        CheckpointError: unknown scheme, missing file, or failed copy.
    """
    if not is_url(source):
        return Path(source)
    with _copy_of(source, progress) as copy:
        if isinstance(copy, Path):
            return copy
        copy.run(weights)
        return copy.folder


def ranged_folder(url: str) -> tuple[Path, RangedFolder | None]:
    """The local folder of a URL, and the remote weight files.

    Returns:
        The folder with config, tokenizer and index; and the weight files, fetched on demand, or
        None if all weights are in the folder.

    Raises:
        CheckpointError: as for `local_folder`.
    """
    with _copy_of(url, None) as copy:
        if isinstance(copy, Path):
            return copy, None
        return copy.folder, copy.ranged()


@contextmanager
def _copy_of(url: str, progress: CopyProgress | None) -> Iterator[_FolderCopy | Path]:
    """The copy of a URL's folder, locked on this node; or the folder itself if it is local."""
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"{url}: cannot be opened: {error}; give a path or a URL of "
            "a scheme that fsspec supports"
        ) from None
    if "local" in filesystem.protocol:
        yield Path(root)
        return
    digest = hashlib.blake2b(url.rstrip("/").encode(), digest_size=6).hexdigest()
    name = re.sub(r"[^\w.\-]", "_", url.rstrip("/").rpartition("/")[2])[:80]
    folder = cache_folder() / "remote" / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        try:
            yield _FolderCopy(filesystem, root.rstrip("/"), folder, url, progress)
        except (OSError, ValueError) as error:  # file systems raise both
            raise CheckpointError(
                f"{url}: cannot be copied: {error}; check the network and the access rights"
            ) from None


class _FolderCopy:
    """Brings the local copy of a folder up to date."""

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        root: str,
        folder: Path,
        url: str,
        progress: CopyProgress | None,
    ) -> None:
        self._fs, self._root, self._folder, self._url = filesystem, root, folder, url
        self._progress = progress
        self._state: dict[str, list[Any]] = {}
        self._has_index = False
        self._lock = threading.Lock()
        self._done = self._total = 0

    @property
    def folder(self) -> Path:
        """The local folder."""
        return self._folder

    def run(self, with_weights: bool) -> None:
        """Copy missing and changed files."""
        self._fetch_small()
        if with_weights:
            self._fetch(self._weights())
            shutil.rmtree(self._folder / _RANGES, ignore_errors=True)

    def ranged(self) -> RangedFolder | None:
        """Copy the small files; return the weight files, or None if all weights are local.

        Weights are local after an earlier full copy, or if the server does not serve ranges.
        """
        self._fetch_small()
        weights = self._weights()
        if all(self._is_local(name, entry) for name, entry in weights.items()):
            return None
        if any(not size for size, _ in weights.values()) or not self._serves_ranges(min(weights)):
            self._fetch(weights)
            return None
        return RangedFolder(self._fs, self._root, self._folder / _RANGES, weights, self._url)

    def _fetch_small(self) -> None:
        file = self._folder / _STATE
        if file.is_file():
            self._state = json.loads(file.read_text())
        small = self._known(["config.json", *SMALL_FILES, INDEX_FILE])
        if "config.json" not in small:
            raise CheckpointError(
                f"{self._url}/config.json: is missing; give the URL of a model folder"
            )
        self._has_index = INDEX_FILE in small
        self._fetch(small)

    def _weights(self) -> dict[str, list[Any]]:
        """Size and version of each weight file."""
        weights = [SINGLE_FILE]
        if self._has_index:
            weights = sorted(set(weight_map(self._folder / INDEX_FILE).values()))
        known = self._known(weights)
        if missing := [name for name in weights if name not in known]:
            raise CheckpointError(f"{self._url}: holds no {missing[0]}; upload the file")
        return known

    def _serves_ranges(self, name: str) -> bool:
        """Whether the server serves byte ranges; plain web servers may send the whole file."""
        if "http" not in self._fs.protocol:
            return True
        try:
            with self._fs.open(f"{self._root}/{name}", cache_type="none") as stream:
                stream.seek(8)  # at the start of a file, a whole file looks like a range
                return len(stream.read(8)) == 8
        except (OSError, ValueError):
            return False

    def _is_local(self, name: str, known: list[Any]) -> bool:
        return self._state.get(name) == known and (self._folder / name).is_file()

    def _known(self, names: list[str]) -> dict[str, list[Any]]:
        """Size and version of each existing file."""

        def look_up(name: str) -> list[Any] | None:
            try:
                info = self._fs.info(f"{self._root}/{name}")
            except FileNotFoundError as error:  # for HTTP, any error
                cause = error.__cause__
                if cause is None or getattr(cause, "status", None) in _NOT_THERE:
                    return None
                raise CheckpointError(
                    f"{self._url}/{name}: cannot be reached: "
                    f"{cause or type(cause).__name__}; check the network and the access rights"
                ) from None
            version = next((info[key] for key in _VERSIONS if info.get(key)), None)
            return [info.get("size"), str(version)]

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            entries = zip(names, pool.map(look_up, names), strict=True)
            return {name: entry for name, entry in entries if entry is not None}

    def _fetch(self, known: dict[str, list[Any]]) -> None:
        outdated = {name: entry for name, entry in known.items() if not self._is_local(name, entry)}
        with self._lock:
            self._total += sum(size or 0 for size, _ in outdated.values())
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda name: self._fetch_file(name, outdated[name]), outdated))

    def _fetch_file(self, name: str, known: list[Any]) -> None:
        file = self._folder / name
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        self._fs.get_file(f"{self._root}/{name}", str(partial))
        size = partial.stat().st_size
        if known[0] is not None and size != known[0]:
            raise CheckpointError(
                f"{self._url}/{name}: {size} bytes came instead of {known[0]}; try again"
            )
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
    with file.open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield


def pull_from_hub(name: str, revision: str | None = None) -> Path:
    """Download a model from the Hugging Face hub, or from $HF_ENDPOINT, into the hub's cache.

    Files and parts of files in the cache are not downloaded again.

    Args:
        name: "ORG/NAME".
        revision: branch, tag or commit; None for the main branch.

    Returns:
        Folder of the snapshot.

    Raises:
        CheckpointError: no such model, no access right, or no connection.
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
        raise CheckpointError(f"{name[:200]!r} is not the name of a model; give ORG/NAME")
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=HUB_PATTERNS,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
        return Path(snapshot)
    except GatedRepoError:
        reason = "is gated: accept its licence on the hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "is not on the hub, or is private: check the name, or set HF_TOKEN"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}: check the branch, tag or commit"
    except LocalEntryNotFoundError as error:
        reason = f"is not in the cache, and the hub cannot be reached: {_first_line(error)}"
    except (HfHubHTTPError, OSError) as error:
        reason = f"cannot be downloaded: {_first_line(error)}"
    raise CheckpointError(f"{name}: {reason}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
