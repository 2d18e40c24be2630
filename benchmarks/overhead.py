"""The share of a training run, and of sampling, that is not spent in networks, in CPU seconds of one run.

    python benchmarks/overhead.py [--recipe recipes/mnist.yaml] [--steps 40] [key=value ...]

Of training: data loading, averages (EMA), collecting and writing the log, against whole steps; validation and checkpoints
are left out. Of sampling: everything but the calls of the network, for 256 samples of 4 steps in batches of 64.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from unittest.mock import patch

from distill.cpu import tune_cpu
from distill.ema import update_averages
from distill.log import Window
from distill.recipe import load_recipe, parse_overrides
from distill.sampling import generate
from distill.trainer import Trainer

NEVER = 10**9


class Clock:
    """CPU seconds by name."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def timed(self, name: str, function):
        def wrapper(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.process_time() - start

        return wrapper

    def shares(self, whole: str) -> dict[str, float]:
        total = self.seconds[whole]
        return {name: round(spent / total, 5) for name, spent in self.seconds.items() if name != whole}


class TimedBatches:
    def __init__(self, batches, clock: Clock):
        self.next = clock.timed("data", lambda: next(batches))

    def __next__(self):
        return self.next()


def training(trainer: Trainer) -> dict[str, float]:
    clock, loop = Clock(), trainer.loop
    trainer.log = clock.timed("log", trainer.log)
    trainer.validate = lambda log: {}
    trainer.save = lambda: None
    trainer.loop = clock.timed("run", lambda batches, log: loop(TimedBatches(batches, clock), log))
    averages = patch("distill.trainer.update_averages", clock.timed("averages", update_averages))
    with averages, patch.object(Window, "add", clock.timed("log", Window.add)):
        trainer.train()
    return clock.shares("run")


def sampling(trainer: Trainer) -> dict[str, float]:
    clock = Clock()
    network = trainer.student
    network.native.forward = clock.timed("network", network.native.forward)
    draw = lambda: list(generate(network, 256, num_inference_steps=4, role="student", batch_size=64))  # noqa: E731
    clock.timed("sampling", draw)()
    return {"beside the network": round(1 - clock.shares("sampling")["network"], 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/mnist.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", help="recipe values as key=value")
    options = parser.parse_args()
    tune_cpu()
    with tempfile.TemporaryDirectory() as folder:
        changes = {"output_dir": folder, "max_train_steps": options.steps, "evaluation": {"validation_samples": 0}}
        changes |= {"checkpointing_steps": NEVER, "validation_steps": NEVER}
        trainer = Trainer(load_recipe(options.recipe, {**changes, **parse_overrides(options.overrides)}))
        print(json.dumps({"training": training(trainer), "sampling": sampling(trainer)}, indent=2))


if __name__ == "__main__":
    main()
