"""A network namespace behind a link that loses and delays packets when it is told to.

Two TUN devices, one on each side, and a thread that carries packets between them: what `tc netem`
does, for kernels without it. Needs root and /dev/net/tun. Both ends are called by the same name, so
that one setting of NCCL's and gloo's interface fits both.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time

NAME, NAMESPACE = "ari0", "arriero-chaos"
HERE, THERE = "10.77.0.1", "10.77.0.2"
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x0001 | 0x1000
_CLONE_NEWNET = 0x40000000


class BadLink:
    """The link, good until `worsen`."""

    def __init__(self) -> None:
        _ip("netns", "add", NAMESPACE)
        try:
            self._here = _tun()
            self._there = _tun_inside(NAMESPACE)
            _ip("addr", "add", HERE, "peer", THERE, "dev", NAME)
            _ip("link", "set", NAME, "up")
            inside = ("-n", NAMESPACE)
            _ip(*inside, "addr", "add", THERE, "peer", HERE, "dev", NAME)
            _ip(*inside, "link", "set", NAME, "up")
            _ip(*inside, "link", "set", "lo", "up")
        except BaseException:
            _ip("netns", "del", NAMESPACE)
            raise
        self._loss, self._delay_s = 0.0, 0.0
        self._closing = False
        self._rng = random.Random(30)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def worsen(self, *, loss: float, delay_s: float) -> None:
        """From now on drop this share of the packets, and keep the others for so long."""
        self._loss, self._delay_s = loss, delay_s

    def close(self) -> None:
        """Take it down; processes inside must have ended."""
        self._closing = True
        self._thread.join()
        os.close(self._here)
        os.close(self._there)
        _ip("netns", "del", NAMESPACE)

    def _carry(self) -> None:
        due: list[tuple[float, int, int, bytes]] = []
        count = 0
        while not self._closing:
            wait_s = 0.05 if not due else min(0.05, max(0.0, due[0][0] - time.monotonic()))
            for fd in select.select([self._here, self._there], [], [], wait_s)[0]:
                packet = os.read(fd, 65536)
                if self._rng.random() < self._loss:
                    continue
                count += 1
                other = self._there if fd == self._here else self._here
                heapq.heappush(due, (time.monotonic() + self._delay_s, count, other, packet))
            while due and due[0][0] <= time.monotonic():
                _, _, fd, packet = heapq.heappop(due)
                os.write(fd, packet)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


def _tun() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", NAME.encode(), _IFF_TUN_NO_PI))
    return fd


def _tun_inside(namespace: str) -> int:
    """A device made inside a namespace; its descriptor works from outside."""
    found: list[int] = []

    def make() -> None:  # a namespace is a thread's own
        with open(f"/run/netns/{namespace}", "rb") as inside:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(inside.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        found.append(_tun())

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return found[0]
