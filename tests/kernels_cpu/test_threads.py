"""The threads under what a server does to them: crowding, forks, callers at once, idleness."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from .small import VARIANTS, Small, cpu, tokens

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built")


def test_more_threads_than_cores() -> None:
    prompt = tokens(60, 0)
    expected = Small(cpu(1), torch.bfloat16).step([(0, 0, prompt)])[0]
    crowded = Small(cpu(16), torch.bfloat16)
    for _ in range(5):
        assert torch.equal(crowded.step([(0, 0, prompt)])[0], expected)


def test_callers_at_once() -> None:
    """Calls from several Python threads go one after the other."""
    model = Small(cpu(3), torch.bfloat16)
    linear = model.layers[0].gate_up
    x = torch.randn(33, linear.in_features)
    expected = model.ops.linear(x, linear)
    results: list[torch.Tensor] = []

    def call() -> None:
        results.extend(model.ops.linear(x, linear) for _ in range(50))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 200 and all(torch.equal(one, expected) for one in results)


def test_idle_threads_sleep() -> None:
    model = Small(cpu(4), torch.bfloat16)
    model.step([(0, 0, tokens(5, 0))])
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


_FORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from small import Small, cpu, tokens
model, prompt = Small(cpu(3), torch.bfloat16), tokens(40, 0)
expected = model.step([(0, 0, prompt)])[0]
child = os.fork()
same = all(torch.equal(model.step([(0, 0, prompt)])[0], expected) for _ in range(20))
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
print("both computed")
"""


def test_fork() -> None:
    """A child starts its own threads; the parent keeps its own."""
    tests = __file__.rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK.format(tests=tests)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "both computed", done.stderr
