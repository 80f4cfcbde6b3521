"""How the process deals with the memory that it has freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for what is allocated next; whether this is done (elsewhere nothing is).

    By default every large tensor on the CPU lies in fresh pages, which the kernel must first clear: much of the time
    of a forward pass of maps that are soon freed again.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
