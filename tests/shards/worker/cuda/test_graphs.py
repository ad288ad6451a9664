"""Buckets, and the inputs that graphs read: padding, reuse, order of copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arriero.shards.protocol.step_plan import StepPlan
from arriero.shards.worker.cuda.block_table import DeviceBlockTable
from arriero.shards.worker.cuda.graphs import DecodeBatch, DecodeInputs, GraphRunner, buckets_up_to

from .stub import StubDevice

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [1, 2, 3, 8, 12, 64, 100, 256, 300, 1024])
def test_buckets(most: int) -> None:
    buckets = buckets_up_to(most)
    assert buckets[-1] == most
    assert list(buckets) == sorted(set(buckets))
    runner = GraphRunner(StubDevice(), buckets)
    for count in range(1, most + 1):
        size = runner.bucket(count)
        assert size >= count
        assert size - count < max(8, size // 4), "at most a quarter is padding, or seven rows"
    with pytest.raises(AssertionError, match=f"{most + 1} rows exceed"):
        runner.bucket(most + 1)


def batch(count: int, seed: int, blocks: int) -> DecodeBatch:
    rng = np.random.default_rng(seed)
    return DecodeBatch(
        tokens=rng.integers(-1, 50, count).astype(np.int32),
        slots=rng.permutation(9)[:count].astype(np.int32),
        positions=rng.integers(0, 4 * blocks, count).astype(np.int32),
        table=rng.integers(0, 30, (count, blocks)).astype(np.int32),
        temperature=rng.random(count).astype(np.float32),
        top_k=rng.integers(0, 9, count).astype(np.int32),
        top_p=rng.random(count).astype(np.float32),
        min_p=rng.random(count).astype(np.float32),
        seed=rng.integers(-(2**62), 2**62, count),
    )


@pytest.mark.parametrize("most", [7, 8])
def test_inputs(most: int) -> None:
    """Batches that shrink and grow leave nothing of one another where a graph reads."""
    inputs = DecodeInputs(
        StubDevice(),
        CPU,
        most=most,
        block_size=4,
        scratch_block=99,
        scratch_slot=9,
    )
    for seed, (count, bucket) in enumerate([(3, 4), (7, 7), (1, 2), (4, 4), (0, 2), (5, 7)]):
        one = batch(count, seed, 1 + seed % 5)
        inputs.fill(one, bucket)
        own, rest = slice(count), slice(count, bucket)
        for name, padding in (
            ("tokens", 0),
            ("slots", 9),
            ("positions", 0),
            ("top_k", 0),
        ):
            column = inputs.ints(name, bucket).numpy()
            assert (column[own] == getattr(one, name)).all()
            assert (column[rest] == padding).all()
        assert (inputs.ints("contexts", bucket).numpy()[own] == one.positions + 1).all()
        assert (inputs.ints("contexts", bucket).numpy()[rest] == 1).all()
        blocks = one.table[np.arange(count), one.positions // 4]
        slots = inputs.ints("cache_slots", bucket).numpy()
        assert (slots[own] == blocks * 4 + one.positions % 4).all()
        assert (slots[rest] == 99 * 4).all()
        rows = inputs.sampling_rows(bucket, all_greedy=False)
        for name in ("temperature", "top_p", "min_p", "seed"):
            column = getattr(rows, f"{name}_R").numpy()
            assert (column[own] == getattr(one, name)).all()
            assert (column[rest] == (1 if name == "top_p" else 0)).all()
        assert (rows.position_R.numpy()[own] == one.positions + 1).all()


def test_block_tables_on_the_device_follow_the_plans() -> None:
    tables = DeviceBlockTable(4, 5, scratch_slot=3, scratch_block=99, device=CPU)
    expected = np.zeros((4, 5), np.int32)
    expected[3, 0] = 99
    rng = np.random.default_rng(0)
    for count in (3, 0, 1, 2):
        slots, index = rng.integers(0, 3, count), rng.permutation(5)[:count]
        ids = rng.integers(0, 30, count)
        tables.apply(plan_of_blocks(slots, index, ids))
        expected[slots, index] = ids
        chosen = torch.tensor([3, 1, 0], dtype=torch.int32)
        assert (tables.rows(chosen).numpy() == expected[[3, 1, 0]]).all()
        assert (tables.rows(chosen, 2).numpy() == expected[[3, 1, 0], :2]).all()


def plan_of_blocks(slots: np.ndarray, index: np.ndarray, ids: np.ndarray) -> StepPlan:
    none = np.empty(0, np.int32)
    arrays = ("freed", "slots", "starts", "counts", "tokens", "samples")
    blocks = {"block_slots": slots, "block_index": index, "block_ids": ids}
    return StepPlan(
        step=0,
        new=[],
        **dict.fromkeys(arrays, none),
        **{name: array.astype(np.int32) for name, array in blocks.items()},
    )


def test_a_host_buffer_is_filled_again_only_once_its_copy_is_through() -> None:
    device = StubDevice()
    inputs = DecodeInputs(device, CPU, most=2, block_size=4, scratch_block=0, scratch_slot=2)
    for _ in range(2):
        inputs.fill(batch(2, 0, 2), 2)
    assert not device.waits, "the first two copies wait for nothing"
    inputs.fill(batch(2, 1, 2), 2)
    assert len(device.waits) == 1
