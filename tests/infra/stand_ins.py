"""Stand-ins for `ray` and `arriero`, which write down how they were called."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

_RECORD = """
import json, os, sys
with open({log!r}, "a") as log:
    seen = dict(os.environ)
    log.write(json.dumps([{name!r}, sys.argv[1:], seen]) + "\\n")
"""


@dataclass(frozen=True)
class Call:
    """One call of a stand-in."""

    name: str
    args: list[str]
    environment: dict[str, str]

    def flag(self, name: str) -> str | None:
        """The value of `--name VALUE`; None without the flag."""
        return self.args[self.args.index(name) + 1] if name in self.args else None


class StandIns:
    """A folder of commands for the head of PATH."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()

    def add(self, name: str, then: str = "") -> None:
        """A command that records its call and then runs the Python text `then`."""
        body = _RECORD.format(log=str(self._log), name=name) + then
        path = self.bin / name
        path.write_text(f"#!{sys.executable}\n{body}")
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """An environment with nothing of this process's but its PATH."""
        return {"PATH": f"{self.bin}:{os.environ['PATH']}", **more}

    def calls(self) -> list[Call]:
        """All calls until now."""
        if not self._log.exists():
            return []
        return [Call(*json.loads(line)) for line in self._log.read_text().splitlines()]
