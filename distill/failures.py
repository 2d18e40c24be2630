"""When one of several processes fails, all of them end soon, and the first error is the only one that is printed."""

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
PROCESSES = "distill/processes"  # of each machine: a line with rank and process id for each process
ENDED = "distill/ended"  # of each rank: there once it has ended by itself
GRACE = 10.0  # seconds in which a process that waits for a failed one may end by itself


class Watch:
    """Knows whether another process of the run has failed, by the store that all of them are connected to.

    Most processes notice by themselves, since the connection to the failed one is gone. One that waits on a GPU would do so
    for minutes, and one that validates while the others wait for it after that: a thread looks into the store, and for the
    processes of this machine, every second and ends the process.
    """

    def __init__(self):
        self.rank, self.here = dist.get_rank(), f"{PROCESSES}/{machine()}"
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.lock, self.asked = threading.Lock(), False
        self.store.append(self.here, f"{self.rank} {os.getpid()}\n")
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        missing: set[int] = set()
        try:
            while not self.store.check([KEY]):
                before, missing = missing, self.missing()
                for rank in missing & before:  # twice: what it said last may have been on its way
                    report_error(f"process {rank} was killed, as the system does when memory runs out", self)
                time.sleep(1)
        except RuntimeError:
            pass  # the process that held the store is gone
        time.sleep(GRACE)
        sys.stdout.flush()
        os._exit(1)

    def missing(self) -> set[int]:
        """The other ranks of this machine whose process is not there any more, and has not said that it would end."""
        processes = [line.split() for line in self.store.get(self.here).decode().splitlines()]
        gone = {int(rank) for rank, pid in processes if has_ended(int(pid))}
        return {rank for rank in gone - {self.rank} if not self.store.check([f"{ENDED}/{rank}"])}

    def end(self) -> None:
        """Say that this process ends by itself."""
        ended = f"{ENDED}/{self.rank}"
        try:
            self.store.set(ended, "")
            self.store.check([ended])  # answered when the store has it
        except RuntimeError:
            pass  # the process that held the store is gone

    def is_first(self) -> bool:
        """Whether this process, which has just failed or seen another one gone, is the first one; only once."""
        with self.lock:
            again, self.asked = self.asked, True
        mine = f"rank {self.rank}"
        try:
            return not again and self.store.compare_set(KEY, "", mine).decode() == mine
        except RuntimeError:
            return False


def machine() -> str:
    """Where process ids are those of this process: one machine, or one container of it; or, if those that can be seen are of
    another one, this process alone.
    """
    proc = Path("/proc/self")
    if not proc.exists():
        return socket.gethostname()
    boot, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.stat(proc / "ns/pid").st_ino
    own = [] if os.readlink(proc) == str(os.getpid()) else [f"rank {dist.get_rank()}"]
    return " ".join([socket.gethostname(), boot, str(namespace), *own])


def has_ended(pid: int) -> bool:
    """Whether no process has this number any more, or one that has ended and is waited for. In doubt it has not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
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
