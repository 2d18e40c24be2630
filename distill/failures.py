"""When one of several processes fails, all of them end soon, and the first error is the only one that is printed."""

import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil
import torch.distributed as dist

KEY = "distill/first_failure"
PROCESS, ENDED = "distill/process", "distill/ended"  # of each rank: its process, and whether it has ended by itself
GRACE = 10.0  # seconds in which a process that waits for a failed one may end by itself


class Watch:
    """Knows whether another process of the run has failed, by the store that all of them are connected to.

    Most processes notice by themselves, since the connection to the failed one is gone. One that waits on a GPU would do so
    for minutes, and one that validates while the others wait for it after that: a thread looks into the store, and for the
    processes of this machine, every second and ends the process.
    """

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.store.set(f"{PROCESS}/{self.rank}", json.dumps([machine(), os.getpid()]))
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        try:
            neighbours = self.neighbours()
            while not self.store.check([KEY]):
                for rank, process in neighbours.items():
                    if not is_running(process) and not self.store.check([f"{ENDED}/{rank}"]):
                        report_error(f"process {rank} was killed, as the system does when memory runs out", self)
                time.sleep(1)
        except RuntimeError:
            pass  # the process that held the store is gone
        time.sleep(GRACE)
        sys.stdout.flush()
        os._exit(1)

    def neighbours(self) -> dict[int, psutil.Process | None]:
        """The other processes of this machine by rank; ``None`` stands for one that is gone already."""
        found = {}
        for rank in set(range(self.world)) - {self.rank}:
            where, pid = json.loads(self.store.get(f"{PROCESS}/{rank}"))
            if where == machine():
                found[rank] = psutil.Process(pid) if psutil.pid_exists(pid) else None
        return found

    def end(self) -> None:
        """Say that this process ends by itself."""
        try:
            self.store.set(f"{ENDED}/{self.rank}", "")
        except RuntimeError:
            pass  # the process that held the store is gone

    def is_first(self) -> bool:
        """Whether this process, which has just failed, is the first one."""
        mine = f"rank {self.rank}"
        try:
            return self.store.compare_set(KEY, "", mine).decode() == mine
        except RuntimeError:
            return False


def machine() -> str:
    """Where process ids are those of this process: one machine, or one container of it."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip(), str(namespace.stat().st_ino)] if boot.exists() and namespace.exists() else []
    return " ".join([socket.gethostname(), *known])


def is_running(process: psutil.Process | None) -> bool:
    """Whether a process has not ended. One whose parent has not asked how it did is still there, but nothing more."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
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
