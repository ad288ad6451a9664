"""Adapters that come and go for a minute under mixed traffic, and 200 adapters over 8 slots."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from arriero.shards.config.adapters import AdapterFile, AdapterSlots
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.types import SequenceOutput
from support.adapters import write_adapter
from support.groups import Group, running
from support.models import tiny_llama

from .test_slots import add, config_of

pytestmark = pytest.mark.slow
SOAK_S = 60.0
NUM_ADAPTERS = 12
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=0)


def made(folder: Path, num_adapters: int) -> list[Path]:
    """A model, and folders of adapters."""
    tiny_llama(folder / "model", vocab=400)
    (folder / "adapters").mkdir()
    names = [folder / "adapters" / f"a{number}" for number in range(num_adapters)]
    for seed, path in enumerate(names):
        write_adapter(path, seed)
    return names


def resident_kb() -> int:
    """Memory of this process in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def answers_of(root: Path, folders: list[Path], prompt: list[int]) -> dict[str, list[int]]:
    """Tokens of each adapter by digest, from a group that lists all of them."""
    files = [AdapterFile(name=folder.name, path=str(folder)) for folder in folders]
    with running(config_of(root, *files)) as group:
        digests = ["", *group.engine.config.adapters]
        answers = group.wait([group.submit(prompt, PARAMS, adapter=d) for d in digests])
    return {d: answer.tokens for d, answer in zip(digests, answers, strict=True)}


@pytest.mark.timeout(1200)
def test_a_minute_of_loads_and_unloads(tmp_path: Path) -> None:
    folders = made(tmp_path, NUM_ADAPTERS)
    prompt = list(range(5, 25))
    expected = answers_of(tmp_path, folders, prompt)
    slots = AdapterSlots(device=3, host=5, max_rank=8, root=str(tmp_path / "adapters"))
    rng = random.Random(1)
    with running(config_of(tmp_path, slots=slots)) as group:
        served = {add(group, tmp_path, folder): folder for folder in folders}
        assert set(served) | {""} == set(expected)
        away: list[str] = []
        memory: list[int] = []
        finished = failed = wrong = changes = 0
        ends_s = time.monotonic() + SOAK_S
        while time.monotonic() < ends_s:
            going = ""
            if len(away) > 4 or (away and rng.random() < 0.5):
                digest = away.pop(0)
                error = group.engine.add_adapter(digest, str(served[digest])).result(60)
                assert not error, error
            else:
                going = rng.choice([d for d in served if d not in away])
            offered = ["", *(d for d in served if d not in away)]
            chosen = [*rng.choices(offered, k=7), going]
            names = [group.submit(prompt, PARAMS, adapter=d) for d in chosen]
            if going:  # while requests for it run and wait
                group.engine.remove_adapter(going).result(60)
                away.append(going)
            for digest, answer in zip(chosen, group.wait(names), strict=True):
                finished += 1
                failed += answer.finish_reason != "length"
                wrong += answer.tokens != expected[digest]
            changes += 1
            memory.append(resident_kb())
        stats = group.engine.stats().adapters
    quarter = len(memory) // 4
    growth_kb = statistics.median(memory[-quarter:]) - statistics.median(
        memory[quarter : 2 * quarter]
    )
    print(
        f"\n{finished} requests, {failed} failed, {wrong} wrong; {changes} loads and unloads, "
        f"{stats.changes} changes of slots; memory {memory[0]} KiB, growth {growth_kb:.0f} KiB"
    )
    assert not failed and not wrong
    assert growth_kb < 20_000, "memory grows"


class Timed:
    """Times of first tokens."""

    def __init__(self, group: Group) -> None:
        self.group, self.first_s = group, dict[str, float]()
        self.take_before = group.take
        group.take = self.take  # type: ignore[method-assign]

    def take(self, outputs: list[SequenceOutput]) -> None:
        now_s = time.perf_counter()
        for output in outputs:
            if output.tokens:
                self.first_s.setdefault(output.request_id, now_s)
        self.take_before(outputs)

    def run(self, digest: str, prompt: list[int]) -> float:
        """Seconds until the first token of a request by itself."""
        start_s = time.perf_counter()
        (answer,) = self.group.wait([name := self.group.submit(prompt, PARAMS, adapter=digest)])
        assert answer.error is None
        return self.first_s[name] - start_s


@pytest.mark.timeout(1200)
def test_200_adapters_over_8_slots(tmp_path: Path) -> None:
    """A few adapters get most requests (Zipf), as in practice: hits in slots, and added delay."""
    folders = made(tmp_path, 200)
    slots = AdapterSlots(device=8, host=32, max_rank=8, root=str(tmp_path / "adapters"))
    rng = random.Random(2)
    with running(config_of(tmp_path, slots=slots)) as group:
        digests = [add(group, tmp_path, folder) for folder in folders]
        timed = Timed(group)
        weights = [1 / (place + 1) for place in range(len(digests))]
        hits: list[float] = []
        misses: list[float] = []
        recent: OrderedDict[str, None] = OrderedDict()  # the definition: least recently used goes
        for number in range(400):
            digest = rng.choices(digests, weights)[0]
            before = set(group.engine.stats().adapters.in_slots)
            assert before == set(recent), "the slots hold others than the most recently used"
            recent.pop(digest, None)
            recent[digest] = None
            if len(recent) > slots.device:
                recent.popitem(last=False)
            prompt = [rng.randrange(5, 390) for _ in range(20)]
            delay_s = timed.run(digest, prompt)
            if number >= 50:
                (hits if digest in before else misses).append(delay_s)
    hit_ms, miss_ms = (1000 * statistics.median(delays) for delays in (hits, misses))
    share = len(hits) / (len(hits) + len(misses))
    print(
        f"\nhit rate {share:.0%}; first token {hit_ms:.2f} ms in a slot, {miss_ms:.2f} ms else: "
        f"{miss_ms - hit_ms:.2f} ms more"
    )
    assert hits and misses
    assert threading.active_count() < 50
