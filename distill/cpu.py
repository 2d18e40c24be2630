"""Process-wide settings that make small networks faster on CPUs."""

import ctypes
import os
import sys
from pathlib import Path

import torch

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def tune_cpu() -> None:
    """Flush denormals to zero, use every core, and keep freed memory: call it once, before anything is computed.

    Results do not change, except that numbers below 1e-38 become zero.
    """
    torch.set_flush_denormal(True)  # denormals slow small networks down, up to ten times
    use_all_cores()
    keep_freed_memory()


def use_all_cores() -> None:
    """Undo what ``accelerate launch`` does to a single process on CPUs: one thread unless told otherwise, by
    ``OMP_NUM_THREADS`` in its own environment too.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and not parent_has("OMP_NUM_THREADS")
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        allowed = getattr(os, "sched_getaffinity", None)  # Linux only
        torch.set_num_threads(len(allowed(0)) if allowed else os.cpu_count())


def parent_has(variable: str) -> bool:
    """Whether the process that started this one was given an environment variable; unknown outside Linux: no."""
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(f"{variable}=".encode()) for entry in environment.split(b"\0"))


def keep_freed_memory() -> None:
    """Let glibc hand freed activations out again instead of returning them to the kernel and faulting every page in anew,
    which costs a fifth of a training step of the bundled networks. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_TOP_PAD, 64 * 2**20)
