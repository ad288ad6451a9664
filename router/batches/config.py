"""Limits of the batches of a gateway.

Knows numbers and a folder; knows nothing of files in the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchesConfig:
    """Settings of `/v1/files` and `/v1/batches`.

    Attributes:
        path: folder of files and batches; gateways with the same folder share the work.
        max_bytes: most bytes of a tenant's files, outputs included.
        max_file_bytes: most bytes of an uploaded file.
        max_files: most files of a tenant.
        max_batches: most batches of a tenant that have not ended.
        max_lines: most requests of a batch.
        in_flight: most requests of a batch that a gateway holds at once; how many of these compute
            is the admission's decision.
        keep_s: seconds for which files and ended batches are kept.
    """

    path: Path
    max_bytes: int = 10 * 2**30
    max_file_bytes: int = 200 * 2**20
    max_files: int = 1000
    max_batches: int = 100
    max_lines: int = 50_000
    in_flight: int = 32
    keep_s: float = 30 * DAY_S
