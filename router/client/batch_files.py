"""The output files of a batch run: appended line by line, and read back to resume the run.

A line counts once its end is written; a torn last line is cut off at the next start. Knows files
and the form of their lines; knows nothing of gateways.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from arriero.router.batches.append_file import AppendFile
from arriero.shards.errors import SpecError


@dataclass(slots=True)
class DoneLines:
    """The requests that an earlier run has finished.

    Attributes:
        custom_ids: names of the requests with an answer or an error.
        lines: numbers of the lines that held no request.
        num_errors: lines in the file of errors.
    """

    custom_ids: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)
    num_errors: int = 0


class OutputFiles:
    """The files of answers and errors; one run at a time writes them.

    Args:
        output: file of answers.
        errors: file of errors.

    Attributes:
        done: requests that earlier runs have finished.

    Raises:
        SpecError: another run writes the files, or a file holds other lines.
        OSError: a file cannot be opened.
    """

    def __init__(self, output: Path, errors: Path) -> None:
        self.done = DoneLines()
        with ExitStack() as stack:
            files = [stack.enter_context(_locked(path)) for path in (output, errors)]
            self._resume(files[0], output)
            self.done.num_errors = self._resume(files[1], errors)
            self._output, self._errors = map(AppendFile, files)
            self._stack = stack.pop_all()

    async def answer(self, line: bytes) -> None:
        """Append an answer; returns once the line is on the disk."""
        await self._output.append(line)

    async def error(self, line: bytes) -> None:
        """Append an error; returns once the line is on the disk."""
        await self._errors.append(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _resume(self, file: BinaryIO, path: Path) -> int:
        """Read the lines of earlier runs and cut off a torn last line; returns their number."""
        end = num_lines = 0
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            num_lines += 1
            try:
                value = json.loads(line)
                custom_id, error = value["custom_id"], value["error"] or {}
            except (ValueError, KeyError, TypeError):
                raise SpecError(
                    f"{path}: line {number} is no line of a batch's output; give a new file"
                ) from None
            if error.get("line") is not None:
                self.done.lines.add(error["line"])
            else:
                self.done.custom_ids.add(custom_id)
        file.truncate(end)
        file.seek(end)
        return num_lines


def _locked(path: Path) -> BinaryIO:
    """The file, opened for this process alone."""
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SpecError(f"{path}: another run writes the file; wait for its end") from None
    return file
