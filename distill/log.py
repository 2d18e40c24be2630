"""What a run logs: means of values over a few steps, and the file that they are written to."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from teachers.pretrained import write_atomically


class Window:
    """Sums of logged values since the last log line, kept on the device until read."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # of VSD fewer than steps where it begins
        self.largest: dict[str, Tensor] = {}  # of norms, whose single spikes a mean would hide
        self.steps, self.start = 0, time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        self.steps += 1
        for key, value in values.items():
            value = value.detach()
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1
            if key.endswith("_norm"):
                name = f"largest_{key}"
                self.largest[name] = torch.maximum(self.largest.get(name, value), value)

    def means(self, over_processes: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """By name, averaged over processes too, and the largest norms: one reduction, and one wait for the device."""
        if not self.sums:
            return {}
        values = {key: total / self.counts[key] for key, total in self.sums.items()} | self.largest
        return dict(zip(values, over_processes(torch.stack(list(values.values()))).tolist(), strict=True))

    def seconds(self) -> float:
        return time.perf_counter() - self.start


class MetricsLog:
    """A JSONL file, one object a line."""

    def __init__(self, path: Path):
        self.path = path

    def cut(self, step: int) -> None:
        """Keep the lines up to ``step``, from which a run goes on; a line that was not written to its end goes too."""
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        kept = [line + "\n" for line in lines if self.step(line) <= step]
        write_atomically(self.path, lambda temporary: temporary.write_text("".join(kept)))

    @staticmethod
    def step(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return math.inf

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
