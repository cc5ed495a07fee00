"""Freed memory kept by the process, on Linux with glibc."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next tensors instead of returning it to the system; returns whether.

    Every page from the system comes zeroed, one page fault at a time, which is a fifth of a training step on a CPU.
    Call it once, before the first tensor. The process then holds its peak memory until it ends. The environment
    variable KMAX_D2_KEEP_MEMORY=0 turns this off. Other systems and C libraries are left as they are.
    """
    if os.environ.get("KMAX_D2_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    # PyTorch then aligns large tensors to pages. At its usual 64 bytes, the few bytes that glibc cuts off beside one go
    # to something small, and the place, once it is free, is too small for the next tensor of the same size.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = ctypes.CDLL(None).mallopt
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
