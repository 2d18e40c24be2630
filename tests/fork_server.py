"""Runs recipes in forks of one process, which has imported everything: that takes many times as long as the runs of a test.

A line on stdin asks for a run, as JSON: the ``arguments`` of ``distill.run``, the file for its ``output``, and the largest
``file_size`` it may write, or null. The answer is its process id, which is no other's until the next line. That may be empty
and asks for the exit status (negative: of a signal).
"""

import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path

import distill.run

# What a run imports when it gets there.
LATER = (
    "diffusers.utils.loading_utils", "distill.export", "matplotlib.backends.backend_agg", "matplotlib.pyplot",
    "PIL.PngImagePlugin", "scipy.linalg", "torch._dynamo",
)  # fmt: skip


def child(arguments: list[str], output: str, file_size: int | None) -> int:
    file = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        return distill.run.main(arguments)
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 70


def serve() -> None:
    for name in LATER:
        importlib.import_module(name)
    # A fork has one thread, and would wait forever for what another one held; jemalloc looks after its own.
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, threads
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = child(**job)
            sys.stdout.flush()
            os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
