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
    """What the steps since the last log line had to log, kept on the device until read."""

    def __init__(self):
        self.rows: list[tuple[dict[str, Tensor], Tensor]] = []
        self.start = time.perf_counter()

    @property
    def steps(self) -> int:
        return len(self.rows)

    def add(self, values: dict[str, Tensor], finite: Tensor) -> None:
        """One step: scalars by name (of VSD only once it has begun), and whether they count."""
        self.rows.append(({key: value.detach() for key, value in values.items()}, finite))

    def means(self, over_processes: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """By name, averaged over processes too, and the largest norms, whose single spikes a mean would hide: one
        reduction, and one wait for the device. Nothing if no step counts.
        """
        if not self.rows:
            return {}
        values = {"steps": torch.stack([finite for _, finite in self.rows]).float().sum()}
        for key in dict.fromkeys(key for row, _ in self.rows for key in row):
            found = [(row[key], finite) for row, finite in self.rows if key in row]
            numbers, count = (torch.stack(column) for column in zip(*found, strict=True))
            values[key] = torch.where(count, numbers, 0).sum() / count.sum()
            if key.endswith("_norm"):
                values[f"largest_{key}"] = torch.where(count, numbers, -math.inf).max()
        means = dict(zip(values, over_processes(torch.stack(list(values.values()))).tolist(), strict=True))
        counted = means.pop("steps")
        return {key: value for key, value in means.items() if counted and math.isfinite(value)}

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
