"""Settings of the C library's heap for freed memory.

glibc maps buffers above a threshold separately, and unmaps each when it is freed; the threshold
rises to the size of the largest mapped buffer freed so far. Quantization during loading frees many
large buffers; later buffers below the new threshold come from the heap and leave holes, which stay
with the process: 200 MB for a model of 135 million parameters.

Knows `mallopt` (malloc.h; mallopt(3)); knows nothing of the buffers' owners.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h's numbers
_WHILE_LOADING = 1 << 20
_WHILE_SERVING = 32 << 20  # glibc's largest threshold: a step's buffers stay in the heap


@contextmanager
def returning_large_buffers() -> Iterator[None]:
    """In this context, freed buffers of 1 MiB and more go back to the system.

    Has no effect when the C library is not glibc.
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
