"""A step of sCD compiled (``compile: inductor``) against the same step as it is: CPU seconds, and what it changes.

    python benchmarks/compiled.py [--recipe recipes/mnist-tangent.yaml] [--steps 6] [key=value ...]

Both start from the same weights and see the same random images; the steps take turns. The first compiles and is left out.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from cost import Steps

from distill.cpu import tune_cpu
from distill.recipe import parse_overrides


def weights(steps: Steps) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in steps.trainer.network.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/mnist-tangent.yaml", help="a distillation recipe")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("overrides", nargs="*", help="recipe values as key=value")
    options = parser.parse_args()
    tune_cpu()
    changes = parse_overrides(options.overrides) | {"evaluation": {"validation_samples": 0}}
    seconds = {None: [], "inductor": []}
    with tempfile.TemporaryDirectory() as folder:
        both = {
            backend: Steps(options.recipe, changes | {"compile": backend}, "distillation", f"{folder}/{backend}")
            for backend in seconds
        }
        start = weights(both[None])
        for _ in range(1 + options.steps):
            for backend, steps in both.items():
                before = time.process_time()
                steps(1)
                seconds[backend].append(time.process_time() - before)
        plain, compiled = (weights(steps) for steps in both.values())
    report = {
        "step (CPU s)": statistics.median(seconds[None][1:]),
        "compiled step (CPU s)": statistics.median(seconds["inductor"][1:]),
        "ratio": statistics.median(a / b for a, b in list(zip(*seconds.values(), strict=True))[1:]),
        "first compiled step (CPU s)": seconds["inductor"][0],
        "difference of the weights, of their change": ((compiled - plain).norm() / (plain - start).norm()).item(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
