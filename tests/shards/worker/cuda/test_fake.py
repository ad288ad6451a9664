"""The simulated device itself: what it refuses, counts and replays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from support.fake_cuda import Ledger, simulated
from support.fake_cuda.streams import UnorderedStreams


@pytest.fixture
def device() -> Iterator[Ledger]:
    with simulated(vendor_products=False) as ledger:
        yield ledger


def test_an_op_over_two_devices_raises(device: Ledger) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.is_cuda and there.device == torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.add(there, here)
    with pytest.raises(TypeError, match="convert cuda:0"):
        there.numpy()
    assert (there + 1).sum().cpu().item() == 6


def test_waits_are_counted(device: Ledger) -> None:
    x = torch.arange(4, device="cuda")
    assert not device.waits and not device.pageable
    assert int(x[2]) == 2 and x.tolist() == [0, 1, 2, 3]
    assert len(x[x > 1]) == 2
    torch.ones(2).to("cuda", non_blocking=True)
    assert sum(device.waits.values()) == 3, dict(device.waits)
    assert sum(device.pageable.values()) == 1
    torch.empty(2, pin_memory=True).copy_(x[:2], non_blocking=True)
    assert sum(device.waits.values()) == 3 and sum(device.pageable.values()) == 1


def test_a_replay_runs_what_was_recorded_over_the_same_memory(device: Ledger) -> None:
    x, out, factor = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(x * factor + 1)
    x.fill_(10)
    factor = 100
    graph.replay()
    assert out.tolist() == [21, 21, 21]


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: torch.ones(2).to("cuda", non_blocking=True),
        lambda x: torch.cuda.Event().synchronize(),
    ],
)
def test_a_capture_refuses(device: Ledger, forbidden: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(3, device="cuda")
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        forbidden(x)
    forbidden(x)


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_other_threads_while_one_captures(device: Ledger, mode: str) -> None:
    errors: list[str] = []

    def other() -> None:
        try:
            torch.cuda.Event().query()
            torch.zeros(2, pin_memory=True)
        except RuntimeError as error:
            errors.append(str(error))

    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == (mode == "global")


def test_streams_need_a_wait_between_a_write_and_a_read(device: Ledger) -> None:
    """The numbers are right here, since all runs at once; on a device they would not be."""
    side, x = torch.cuda.Stream(), torch.ones(3, device="cuda")
    with torch.cuda.stream(side), pytest.raises(UnorderedStreams, match=r"aten::add reads .*wait"):
        x + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        view = x[1:]  # a view reads nothing
        y = view + 1
        done = side.record_event()
        z = view * 2
    with pytest.raises(UnorderedStreams, match="aten::sum reads"):
        y.sum()
    done.wait()
    assert y.sum().item() == 4
    with pytest.raises(UnorderedStreams, match="aten::sum reads"):
        z.sum()  # it came after the event
    with pytest.raises(UnorderedStreams, match="aten::fill_ writes"):
        x.fill_(3)  # the other stream may not have read it yet
    torch.cuda.current_stream().wait_stream(side)
    x.fill_(3)


def test_a_wait_of_the_host_puts_streams_in_order(device: Ledger) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x, y = torch.ones(3, device="cuda"), torch.ones(3, device="cuda")
    side.record_event().query()
    with pytest.raises(UnorderedStreams):
        x + 1
    side.synchronize()
    assert (x + y).sum().item() == 6


def test_memory_returns_to_the_stream_that_it_came_from(device: Ledger) -> None:
    side, x = torch.cuda.Stream(), torch.ones(3, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    del x  # the other stream may still read it
    with pytest.raises(UnorderedStreams, match="freed tensor is given out"):
        torch.zeros(3, device="cuda")
    del y
    torch.zeros(3, device="cuda")


def test_a_capture_forks_and_joins(device: Ledger) -> None:
    side, x = torch.cuda.Stream(), torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        torch.cuda.current_stream().wait_stream(side)
        x.copy_(y)
    graph.replay()
    assert x.tolist() == [3, 3, 3]
    with pytest.raises(UnorderedStreams, match="no wait joins"), torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x + 1
    outside = torch.cuda.current_stream().record_event()
    with pytest.raises(UnorderedStreams, match="no part"), torch.cuda.graph(graph):
        with torch.cuda.stream(torch.cuda.Stream()):
            x + 1
    with pytest.raises(UnorderedStreams, match="outside of it"), torch.cuda.graph(graph):
        outside.wait()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), pytest.raises(UnorderedStreams, match="a graph"):
        graph.replay()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.replay()


def test_all_is_put_back() -> None:
    before = (torch.cuda.is_available(), torch.Tensor.to, torch.tensor, threading.Thread.run)
    with simulated():
        assert torch.cuda.is_available()
    after = (torch.cuda.is_available(), torch.Tensor.to, torch.tensor, threading.Thread.run)
    assert after == before
    assert torch.ones(2).to("cpu").tolist() == [1, 1]
