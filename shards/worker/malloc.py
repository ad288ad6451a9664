"""What the C library's heap does with memory that is given back.

glibc raises the size from which it maps a buffer on its own (and unmaps it when it is freed) to
that of the largest one freed so far. Quantizing while loading frees many large buffers of all
sizes; from then on smaller ones come out of the heap and leave holes in it, which stay with the
process: 200 MB for a model of 135 million parameters.

Knows `mallopt` (malloc.h; mallopt(3)); refuses to know who allocates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h's numbers
_WHILE_LOADING = 1 << 20
_WHILE_SERVING = 32 << 20  # the most that glibc raises it to: a step's buffers stay in the heap


@contextmanager
def returning_large_buffers() -> Iterator[None]:
    """Within, buffers of a MiB and more go back to the system when they are freed.

    Nothing changes where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _WHILE_LOADING)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _WHILE_SERVING)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _WHILE_SERVING)
        libc.malloc_trim(0)
