"""What a slice reads ahead is what it loads; what it has packed is given back."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from arriero.kernels.reference.backend import ReferenceOps
from arriero.shards.checkpoint.formats.stored import byte_ranges, reads, tensor_specs
from arriero.shards.checkpoint.pager import Pager, ranges_read
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.dense import partition
from arriero.shards.leader.loading import Loading
from arriero.shards.models import loader
from arriero.shards.models.loader import Loader
from support.eventually import eventually
from support.models import tiny_llama


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_ranges_cover_what_a_rank_reads(tmp_path: Path, tp: int, pp: int) -> None:
    config = tiny_llama(tmp_path, sharded=True)
    checkpoint = Checkpoint.open(tmp_path)
    due = tensor_specs(config, None)
    for part in partition(config, GroupConfig(model_path=str(tmp_path), tp=tp, pp=pp)):
        covered = list(ranges_read(checkpoint, due, part))
        for tensor in due:
            stored = checkpoint.stored[tensor.name]
            for box in reads(tensor, part):
                for a, b in byte_ranges(stored.shape, stored.dtype.itemsize, box, stored.start):
                    assert any(f == stored.file and s <= a and b <= e for f, s, e in covered)
        assert all(e <= os.path.getsize(f) for f, _, e in covered)


def test_progress_is_in_bytes_and_ends_at_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PAGED_BYTES", 0)  # a pager even for this
    config = tiny_llama(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    (part,) = partition(config, GroupConfig(model_path=str(tmp_path)))
    told: list[tuple[int, int]] = []
    loading = Loader(
        checkpoint,
        None,
        tensor_specs(config, None),
        part,
        ReferenceOps(torch.device("cpu")),
        dtype=torch.float32,
        progress=lambda done, total: told.append((done, total)),
    )
    with loading:
        for index in (0, 1, None):
            loading.finished(index)
    whole = sum(one.nbytes for one in checkpoint.stored.values())
    assert told[0] == (0, whole) and told[-1] == (whole, whole)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_pages_are_given_back(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=100_000, hidden=128, layers=1)
    checkpoint = Checkpoint.open(tmp_path)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    name = "model.embed_tokens.weight"
    table = checkpoint.tensor(name)
    before = resident()
    total = float(table.sum())
    assert resident() - before > table.nbytes // 2
    pager = Pager(checkpoint, [(checkpoint.stored[name].file, 0, table.nbytes)])
    pager.start()
    eventually(lambda: resident() - before <= table.nbytes // 4, state=resident)
    pager.close()
    assert resident() - before < table.nbytes // 4
    assert float(table.sum()) == total  # views stay good


def test_words_of_progress() -> None:
    assert str(Loading(0, 0, 1.0)) == "loading 0 %"
    said = str(Loading(2_100_000_000, 4_200_000_000, 2.0))
    assert said == "loading 50 %: 2.10 of 4.20 GB, 1.05 GB/s, 2 s left"
