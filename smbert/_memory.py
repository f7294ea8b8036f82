"""What freed memory costs whoever measures time."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# mallopt(3): parameter, its value while memory is kept, and the one that glibc itself goes to once a process has freed large blocks.
_KEPT = (
    (-1, -1, 64 << 20),  # M_TRIM_THRESHOLD: never
    (-3, 32 << 20, 32 << 20),  # M_MMAP_THRESHOLD
    (-4, 0, 65536),  # M_MMAP_MAX: no block of its own mapping, which would go back to the system when freed
)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, what a forward pass frees stays with the process, and the next one need not fault its pages in again.

    Whether glibc gives blocks back depends on what the process did before. Where it does, the faults are a tenth of a wide model's
    time and less of a narrow one's, so that one pair of models was 1.96x apart in one process and 1.79x in another. The first few
    passes (nine at most were seen) still fault: torch asks for aligned blocks, glibc looks for the size and the alignment together,
    and the hole that a block leaves is too small for the next like it until holes have merged. So time after a warm-up. Elsewhere
    than on glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for parameter, kept, _ in _KEPT:
        libc.mallopt(parameter, kept)
    try:
        yield
    finally:
        for parameter, _, usual in _KEPT:
            libc.mallopt(parameter, usual)
        libc.malloc_trim(0)
