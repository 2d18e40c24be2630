"""Several processes of this machine, for tests, as torchrun would start them: gloo on CPUs. No wait for one is without
limit, and none outlives its test.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
LIMIT = 120.0  # seconds that processes may take
GRACE = 30.0  # seconds in which the others end when one has failed


class Server:
    """``tests/fork_server.py``, which has imported everything, so that a process that it forks costs a fraction of a second.
    It is started when it is needed, and again if it was killed.
    """

    def __init__(self):
        self.server: subprocess.Popen | None = None
        self.running: set[int] = set()

    def start(self, function: str, *arguments, output: Path, **options) -> int:
        """Call ``module:function(*arguments)`` in a new process; its process id. What it prints is added to ``output``.

        Args:
            options: the ``environment`` it gets in addition, and the largest ``file_size`` it may write.
        """
        if self.server is None or self.server.poll() is not None:
            self.start_server()
        pid = int(self.ask({"function": function, "arguments": arguments, "output": str(output), **options}))
        self.running.add(pid)
        return pid

    def start_server(self) -> None:
        command = [sys.executable, str(ROOT / "tests/fork_server.py")]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        self.server = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        assert self.answer() == "ready"

    def ask(self, job: dict) -> str:
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return self.answer()

    def answer(self) -> str:
        if not select.select([self.server.stdout], [], [], LIMIT)[0]:
            self.close()
            raise TimeoutError(f"the fork server did not answer in {LIMIT:g} s")
        return self.server.stdout.readline().rstrip("\n")

    def end(self, pids: list[int], output: Path, limit: float = LIMIT) -> list[int]:
        """Wait for processes; their exit statuses (negative: of a signal).

        Raises:
            TimeoutError: some are still there after ``limit`` seconds, or ``GRACE`` after one has failed. They are killed,
                and the message has what they printed and the stacks of their threads.
        """
        statuses: dict[int, int] = {}
        start, limits = time.monotonic(), [limit]
        files = {os.pidfd_open(pid): pid for pid in pids}
        try:
            while len(statuses) < len(pids):
                left = start + min(limits) - time.monotonic()
                running = [file for file, pid in files.items() if pid not in statuses]
                ended = select.select(running, [], [], max(left, 0))[0]
                if not ended:
                    self.give_up([files[file] for file in running], output, min(limits))
                for file in ended:
                    statuses[files[file]] = status = self.status(files[file])
                    if status != 0:
                        limits.append(time.monotonic() - start + GRACE)
        finally:
            for file in files:
                os.close(file)
        return [statuses[pid] for pid in pids]

    def status(self, pid: int) -> int:
        """Of a process that has ended."""
        status = int(self.ask({"end": pid}))
        self.running.discard(pid)
        return status

    def give_up(self, pids: list[int], output: Path, limit: float) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)  # it writes the stacks of its threads
            time.sleep(1)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            self.status(pid)
        raise TimeoutError(f"{len(pids)} processes did not end in {limit:.0f} s:\n{output.read_text()}")

    def close(self) -> None:
        """Kill the server and all that it has forked."""
        if self.server is None:
            return
        if self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait(LIMIT)
        self.server.stdin.close(), self.server.stdout.close()
        self.server = None
        self.running.clear()

    def launch(self, world: int, function: str, *arguments, output: Path, limit: float = LIMIT, **environment) -> list[int]:
        """Call a function in ``world`` processes that are connected; their exit statuses. What they print goes to the file
        ``output``, in the order in which they print it.
        """
        pids, _store = self.start_all(world, function, *arguments, output=output, **environment)
        return self.end(pids, output, limit)

    def start_all(self, world: int, function: str, *arguments, output: Path, **environment) -> tuple[list[int], dist.Store]:
        """As :meth:`launch`, but without waiting: process ids, and the store to be kept until they have ended."""
        # The store is here, as with torchrun in the launcher: a port that is found free for one of the processes to take
        # could be another's by then, and the others would wait for half an hour.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", **environment,
        }  # fmt: skip
        output.unlink(missing_ok=True)
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        return [self.start(function, *arguments, output=output, environment=rank) for rank in ranks], store
