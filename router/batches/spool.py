"""Files and batches of all tenants in a folder that several gateways may share.

    tenants/TENANT/files/ID.json, ID.jsonl     a file's facts and its bytes
    tenants/TENANT/batches/ID/                 a batch (see `batch_folder`)
    open/TENANT.ID                             a batch that has not ended

TENANT is a digest of the tenant's name, so that a name is never a path. A tenant's bytes and counts
are bounded: what would exceed a bound is refused. Knows files; knows nothing of HTTP and of the
work of a batch. Every method may block on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from arriero.router.batches.batch_folder import BatchFolder, OwnedBatch, sync_folder, write_whole
from arriero.router.batches.config import BatchesConfig
from arriero.router.batches.record import BatchRecord, on_time
from arriero.shards.errors import InvalidRequest, NotFound
from arriero.shards.protocol import wire

_ABANDONED_S = 60.0
"""Seconds after which the mark of a batch without a folder is left from a crash."""
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file, in the terms of the OpenAI API; times are seconds since 1970.

    Attributes:
        id: id of the file.
        filename: name that the client gave.
        purpose: `batch` for requests, `batch_output` for results.
        bytes: size of the file.
        created_at, expires_at: first and last moment of the file.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int

    def to_json(self) -> dict[str, Any]:
        """The file as in the OpenAI API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that has not ended: its name among all, and its folder."""

    name: str
    folder: BatchFolder


class Spool:
    """The folder of files and batches.

    Args:
        config: the folder and its limits.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, config: BatchesConfig) -> None:
        self.config = config
        self._tenants, self._open = config.path / "tenants", config.path / "open"
        for folder in (self._tenants, self._open):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def store(
        self, tenant: str, source: BinaryIO, *, filename: str, purpose: str, now: int, keep_s: float
    ) -> FileRecord:
        """Keep a file of a tenant; `source` is read from its position on.

        Raises:
            InvalidRequest: a bound of the tenant would be exceeded.
        """
        with self._locked(tenant) as folder:
            temporary = folder / f".new-{secrets.token_hex(8)}"
            try:
                with temporary.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    size = file.tell()
                    self._check_room(tenant, size)
                    file.flush()
                    os.fsync(file.fileno())
                record = FileRecord(
                    id=f"file-{secrets.token_hex(12)}",
                    filename=filename,
                    purpose=purpose,
                    bytes=size,
                    created_at=now,
                    expires_at=now + int(keep_s),
                )
                self.adopt(tenant, temporary, record)
            finally:
                temporary.unlink(missing_ok=True)
        return record

    def adopt(self, tenant: str, source: Path, record: FileRecord) -> None:
        """Make a written file one of a tenant's files, in place of a file with its id."""
        folder = self.files_folder(tenant)
        os.replace(source, folder / f"{record.id}.jsonl")
        write_whole(folder / f"{record.id}.json", json.dumps(wire.to_builtins(record)).encode())

    def files(self, tenant: str) -> list[FileRecord]:
        """A tenant's files, newest first."""
        records = [self._read_file(path) for path in self.files_folder(tenant).glob("file-*.json")]
        kept = (record for record in records if record is not None)
        return sorted(kept, key=lambda record: (-record.created_at, record.id))

    def file(self, tenant: str, file_id: str) -> FileRecord:
        """A file of a tenant.

        Raises:
            NotFound: the tenant has no such file.
        """
        path = self.files_folder(tenant) / f"{file_id}.json"
        record = self._read_file(path) if _ID.fullmatch(file_id) else None
        if record is None:
            raise NotFound(
                f"there is no file {file_id[:128]!r}; `GET /v1/files` lists the files",
                field="file_id",
                code="file_not_found",
            )
        return record

    def content(self, tenant: str, file_id: str) -> Path:
        """Path of a file's bytes; errors as of `file`."""
        return self.files_folder(tenant) / f"{self.file(tenant, file_id).id}.jsonl"

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file; a batch that runs keeps its input. Errors as of `file`."""
        record = self.file(tenant, file_id)
        for suffix in (".json", ".jsonl"):
            (self.files_folder(tenant) / f"{record.id}{suffix}").unlink(missing_ok=True)

    def create_batch(self, record: BatchRecord) -> None:
        """Keep a new batch.

        Raises:
            NotFound: the tenant has no such input file.
            InvalidRequest: the tenant has too many batches that have not ended.
        """
        tenant, most = record.tenant, self.config.max_batches
        with self._locked(tenant):
            source = self.content(tenant, record.input_file_id)
            name = _digest(tenant)
            num_open = sum(entry.startswith(f"{name}.") for entry in os.listdir(self._open))
            if num_open >= most:
                raise InvalidRequest(
                    "batches",
                    f"the tenant has {num_open} batches that have not ended; the limit "
                    f"`gateway.batches.max_batches` is {most}; wait for the end of one",
                    "too_many_batches",
                )
            # Without the mark no gateway would ever run the batch, so the mark comes first.
            (self._open / f"{name}.{record.id}").touch()
            self._batch_folder(tenant, record.id).create(record, source)

    def batches(self, tenant: str, now: int) -> list[BatchRecord]:
        """A tenant's batches, newest first."""
        folders = self._batches_folder(tenant).glob("batch_*")
        records = (self._record(BatchFolder(path), now) for path in folders)
        kept = [record for record in records if record is not None]
        return sorted(kept, key=lambda record: (-record.created_at, record.id))

    def batch(self, tenant: str, batch_id: str, now: int) -> BatchRecord:
        """A batch of a tenant.

        Raises:
            NotFound: the tenant has no such batch.
        """
        folder = self._batch_folder(tenant, batch_id)
        record = self._record(folder, now) if _ID.fullmatch(batch_id) else None
        if record is None:
            raise NotFound(
                f"there is no batch {batch_id[:128]!r}; `GET /v1/batches` lists the batches",
                field="batch_id",
                code="batch_not_found",
            )
        return record

    def cancel(self, tenant: str, batch_id: str, now: int) -> BatchRecord:
        """Ask for the end of a batch; errors as of `batch`.

        Raises:
            InvalidRequest: the batch has ended.
        """
        record = self.batch(tenant, batch_id, now)
        if record.has_ended:
            raise InvalidRequest(
                "batch_id",
                f"batch {batch_id} is {record.status}; only a batch that has not ended can be "
                "cancelled",
                "batch_ended",
            )
        self._batch_folder(tenant, batch_id).request_cancel(now)
        return self.batch(tenant, batch_id, now)

    def open_batches(self) -> list[OpenBatch]:
        """The batches that have not ended, of all tenants, in no order."""
        entries = []
        for name in os.listdir(self._open):
            tenant, _, batch_id = name.partition(".")
            folder = BatchFolder(self._tenants / tenant / "batches" / batch_id)
            entries.append(OpenBatch(name, folder))
        return entries

    def close_batch(self, batch: OpenBatch) -> None:
        """Note that a batch has ended."""
        (self._open / batch.name).unlink(missing_ok=True)

    def forget_abandoned(self, batch: OpenBatch) -> None:
        """Remove the mark of a batch whose creation broke off."""
        with contextlib.suppress(FileNotFoundError):
            mark = self._open / batch.name
            if time.time() - mark.stat().st_mtime > _ABANDONED_S:
                mark.unlink()

    def room(self, tenant: str) -> int:
        """Bytes that a tenant may still store."""
        return self.config.max_bytes - self._num_bytes(tenant)

    def remove_old(self, now: int) -> None:
        """Remove files and ended batches whose time is over, and what a crash left behind."""
        for folder in self._tenants.iterdir():
            for path in (folder / "files").glob("file-*.json"):
                record = self._read_file(path)
                if record is not None and record.expires_at <= now:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".jsonl").unlink(missing_ok=True)
            for path in (folder / "batches").glob("batch_*"):
                batch = BatchFolder(path)
                state = batch.read()
                if state is not None and state.record.has_ended:
                    if state.record.expires_at + self.config.keep_s <= now:
                        batch.remove()

    def files_folder(self, tenant: str) -> Path:
        """Folder of a tenant's files."""
        return self._folder(tenant, "files")

    def _batches_folder(self, tenant: str) -> Path:
        return self._folder(tenant, "batches")

    def _batch_folder(self, tenant: str, batch_id: str) -> BatchFolder:
        return BatchFolder(self._batches_folder(tenant) / Path(batch_id).name)

    def _folder(self, tenant: str, kind: str) -> Path:
        folder = self._tenants / _digest(tenant) / kind
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _record(self, folder: BatchFolder, now: int) -> BatchRecord | None:
        state: OwnedBatch | None = folder.read()
        if state is None:
            return None
        return on_time(state.record, cancelled_at=folder.cancelled_at(), now=now)

    def _read_file(self, path: Path) -> FileRecord | None:
        with contextlib.suppress(FileNotFoundError):
            return wire.from_builtins(json.loads(path.read_bytes()), FileRecord)
        return None

    def _num_bytes(self, tenant: str) -> int:
        total = sum(record.bytes for record in self.files(tenant))
        folders = self._batches_folder(tenant).glob("batch_*")
        return total + sum(BatchFolder(path).num_bytes() for path in folders)

    def _check_room(self, tenant: str, size: int) -> None:
        num_files = len(self.files(tenant))
        if num_files >= self.config.max_files:
            raise InvalidRequest(
                "file",
                f"the tenant has {num_files} files; the limit `gateway.batches.max_files` is "
                f"{self.config.max_files}; delete some",
                "too_many_files",
            )
        room = self.room(tenant)
        if size > room:
            raise InvalidRequest(
                "file",
                f"the file has {size} bytes, and the tenant has room for {max(0, room)} of "
                f"`gateway.batches.max_bytes`={self.config.max_bytes}; delete some files",
                "storage_full",
            )

    @contextmanager
    def _locked(self, tenant: str) -> Iterator[Path]:
        """The tenant's folder of files, for one gateway at a time."""
        folder = self.files_folder(tenant)
        with (folder / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
            sync_folder(folder)


def result_id(batch_id: str, kind: str) -> str:
    """Id of a result of a batch: the same at each gateway, so that a second try replaces it."""
    return f"file-{hashlib.sha256(f'{batch_id} {kind}'.encode()).hexdigest()[:24]}"


def _digest(tenant: str) -> str:
    return hashlib.sha256(tenant.encode()).hexdigest()[:32]
