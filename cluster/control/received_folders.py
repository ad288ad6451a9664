"""Where nodes keep the weights that a trainer sent, and the end of these folders.

Knows paths and nodes; knows nothing of tensors and of groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import ray

from arriero.cluster.hosts import nodes
from arriero.cluster.replica.weight_actions import WantedWeights

MEMORY = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp")
"""Folder in the memory of a node."""
LIMIT_S = 10.0


def folder_of(model: str, path: str) -> Path:
    """Folder of all versions of a model.

    Args:
        model: name of the model.
        path: model folder of the spec.
    """
    digest = hashlib.blake2b(path.encode(), digest_size=4).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", model)[:64]
    return MEMORY / f"arriero-weights-{os.getuid()}" / f"{name}-{digest}"


def folders_to_delete(stored: Mapping[str, WantedWeights]) -> list[str]:
    """The folders of models that serve, or have served, a trainer's weights.

    Args:
        stored: pushed weights by model; without sources after a reset.
    """
    folders = []
    for model, wanted in stored.items():
        folder = folder_of(model, wanted.path)
        received = any(Path(source).parent == folder for source in wanted.sources)
        if received or not wanted.sources:
            folders.append(str(folder))
    return folders


def delete_on_nodes(folders: Iterable[str]) -> None:
    """Delete folders on all nodes of the connected cluster that answer within `LIMIT_S`."""
    folders = list(folders)
    if folders:
        asyncio.run(_delete_on_nodes(folders))


async def _delete_on_nodes(folders: list[str]) -> None:
    node_ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    own = ray.get_runtime_context().get_node_id()
    _delete(folders)  # at once: a worker of a busy node takes seconds to start
    work = (nodes.run_on(node_id, _delete, folders) for node_id in node_ids if node_id != own)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*work, return_exceptions=True)


def _delete(folders: list[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
