"""When one of several processes fails, all of them end soon, and the first error is the only one that is printed."""

import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

KEY = "distill/first_failure"
GRACE = 10.0  # seconds in which a process that waits for a failed one may end by itself


class Watch:
    """Knows whether another process of the run has failed, by the store that all of them are connected to.

    Most processes notice by themselves, since the connection to the failed one is gone. One that waits on a GPU would do so
    for minutes: a thread looks into the store every second and ends the process.
    """

    def __init__(self):
        self.rank = dist.get_rank()
        self.store = dist.distributed_c10d._get_default_store().clone()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        try:
            while not self.store.check([KEY]):
                time.sleep(1)
        except RuntimeError:
            pass  # the process that held the store is gone
        time.sleep(GRACE)
        sys.stdout.flush()
        os._exit(1)

    def is_first(self) -> bool:
        """Whether this process, which has just failed, is the first one."""
        mine = f"rank {self.rank}"
        try:
            return self.store.compare_set(KEY, "", mine).decode() == mine
        except RuntimeError:
            return False


def report_error(message: str, watch: Watch | None) -> int:
    """Print an error, if it is the first one of the run; the exit status."""
    if watch is None or watch.is_first():
        who = "" if watch is None else f"process {watch.rank}: "
        print(f"{who}error: {message}", file=sys.stderr, flush=True)
    return 1


def report_crash(error: Exception, watch: Watch) -> int:
    """As :func:`report_error`, for what is no user's mistake: with a traceback, unless a lost connection says all."""
    if is_lost_connection(error):
        return report_error("the connection to another process of this run was lost", watch)
    return report_error("".join(traceback.format_exception(error)), watch)


def is_lost_connection(error: Exception) -> bool:
    """Whether an error comes from ``torch.distributed`` or, since DDP reduces inside of autograd, from gloo's sockets."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename.replace(os.sep, "/")
    return isinstance(error, RuntimeError) and ("distributed" in where.split("/") or "gloo/transport" in str(error))
