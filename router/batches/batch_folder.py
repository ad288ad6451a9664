"""The folder of one batch: who owns it, its state, and the lines that are finished.

Ownership goes by epochs. The file `owner-N.json` holds the state as the owner of epoch N last wrote
it; only one gateway can create the file of an epoch, and the highest epoch counts. An owner that
was taken for dead and wakes again writes the files of its own, older epoch, which nobody reads for
the state. Each epoch appends its finished lines to files of its own; at the end the lines of all
epochs are merged, and the first line of each request counts. So no request is in the results twice.

Knows files; knows nothing of the work of a batch. Every method may block on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from arriero.router.batches.record import BatchRecord
from arriero.shards.protocol import wire

Kind = Literal["output", "errors"]
INPUT = "input.jsonl"
_CANCEL = "cancel"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnedBatch:
    """A batch and its owner.

    Attributes:
        record: the batch.
        epoch: number of the owner; 0 before the first.
        owner: id of the gateway; "" when a gateway may claim the batch at once.
        beat: grows while the owner lives.
    """

    record: BatchRecord
    epoch: int = 0
    owner: str = ""
    beat: int = 0


class BatchFolder:
    """The folder of a batch.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, record: BatchRecord, source: Path) -> None:
        """Make the folder of a new batch; the input stays until the batch ends."""
        temporary = self.path.with_name(f".new-{secrets.token_hex(8)}")
        temporary.mkdir(parents=True, mode=0o700)
        os.link(source, temporary / INPUT)
        batch = OwnedBatch(record=record)
        write_whole(temporary / _owner_name(0), _packed(batch))
        os.rename(temporary, self.path)
        sync_folder(self.path.parent)

    def read(self) -> OwnedBatch | None:
        """The batch as its owner last wrote it; None when the folder is gone."""
        for _ in range(2):  # a newer epoch may remove the file between the two looks
            epoch = self._epoch()
            if epoch is None:
                return None
            with contextlib.suppress(FileNotFoundError):
                data = json.loads((self.path / _owner_name(epoch)).read_bytes())
                return wire.from_builtins(data, OwnedBatch)
        return None

    def claim(self, batch: OwnedBatch, owner: str) -> OwnedBatch | None:
        """Become the owner of the next epoch; None when another gateway was faster."""
        claimed = replace(batch, epoch=batch.epoch + 1, owner=owner, beat=0)
        temporary = self.path / f".claim-{secrets.token_hex(8)}"
        try:
            write_whole(temporary, _packed(claimed))
            os.link(temporary, self.path / _owner_name(claimed.epoch))
        except (FileExistsError, FileNotFoundError):
            return None
        finally:
            temporary.unlink(missing_ok=True)
        (self.path / _owner_name(batch.epoch)).unlink(missing_ok=True)
        return claimed

    def write(self, batch: OwnedBatch) -> bool:
        """Write the state of an epoch; False when a newer epoch has the batch."""
        if self._epoch() != batch.epoch:
            return False
        write_whole(self.path / _owner_name(batch.epoch), _packed(batch))
        return True

    def request_cancel(self, now: int) -> None:
        """Ask the owner to cancel the batch."""
        with contextlib.suppress(FileExistsError):
            with (self.path / _CANCEL).open("x") as file:
                file.write(str(now))

    def cancelled_at(self) -> int | None:
        """When a client asked to cancel the batch; None for never."""
        try:
            text = (self.path / _CANCEL).read_text()
            return int(text) if text else int((self.path / _CANCEL).stat().st_mtime)
        except FileNotFoundError:
            return None

    def lines_path(self, kind: Kind, epoch: int) -> Path:
        """File of the lines that an epoch has finished."""
        return self.path / f"{kind}-{epoch:08d}.jsonl"

    def finished(self, kind: Kind) -> Iterator[tuple[str, bytes]]:
        """The finished lines of all epochs in order, each with its `custom_id`.

        A request may come twice, where an owner was taken for dead; the first line counts. Torn
        lines, as the loss of a machine leaves them, are left out.
        """
        for path in sorted(self.path.glob(f"{kind}-*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    custom_id = _custom_id(line) if line.endswith(b"\n") else None
                    if custom_id is not None:
                        yield custom_id, line

    def num_bytes(self) -> int:
        """Bytes that the batch holds besides its tenant's files."""
        total = 0
        for entry in os.scandir(self.path):
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                total += 0 if entry.name == INPUT and stat.st_nlink > 1 else stat.st_size
        return total

    def clear(self) -> None:
        """Remove all but the state, once the batch has ended."""
        for path in (*self.path.glob("*.jsonl"), self.path / _CANCEL):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _epoch(self) -> int | None:
        try:
            names = [name for name in os.listdir(self.path) if name.startswith("owner-")]
        except FileNotFoundError:
            return None
        return max((int(name[6:-5]) for name in names), default=None)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones, after a crash too."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive the loss of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _custom_id(line: bytes) -> str | None:
    """The name of the request of a finished line; None for a torn line."""
    try:
        name: str = json.loads(line)["custom_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return name


def _owner_name(epoch: int) -> str:
    return f"owner-{epoch:08d}.json"


def _packed(batch: OwnedBatch) -> bytes:
    value: Any = wire.to_builtins(batch)
    return json.dumps(value).encode()
