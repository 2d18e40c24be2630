"""Calls functions in forks of one process, which has imported everything: that takes many times as long as the runs of a
test. :class:`processes.Server` talks to it.

A line on stdin asks for a process, as JSON: the ``function`` as ``module:name``, its ``arguments``, the file for its
``output``, and if wanted a larger ``environment`` and the largest ``file_size`` it may write. The answer is its process id,
which is no other's until a line ``{"end": id}`` asks for its exit status (negative: of a signal).
"""

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import torch

# What processes import when they get there.
LATER = (
    "distill.run", "parallel_runs", "matplotlib.backends.backend_agg", "matplotlib.pyplot", "PIL.PngImagePlugin",
    "scipy.linalg", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor",
)  # fmt: skip
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def child(function: str, arguments: list, output: str, environment: dict | None = None, file_size: int | None = None) -> int:
    die_with_parent()
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    os.environ.update(environment or {})
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    module, name = function.split(":")
    try:
        return getattr(importlib.import_module(module), name)(*arguments) or 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 70


def fork(job: dict) -> int:
    pid = os.fork()
    if pid == 0:
        status = child(**job)
        sys.stdout.flush()
        os._exit(status)
    return pid


def serve() -> None:
    die_with_parent()
    for name in LATER:
        importlib.import_module(name)
    torch.set_num_threads(1)
    # A fork has one thread, and would wait forever for what another one held; jemalloc looks after its own.
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, threads
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        answer = os.waitstatus_to_exitcode(os.waitpid(job["end"], 0)[1]) if "end" in job else fork(job)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
