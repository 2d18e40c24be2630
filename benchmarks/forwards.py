"""What a step of sCD costs in plain forward passes of the network, in CPU seconds of one run.

    python benchmarks/forwards.py [--batch 4] [--blocks 7]

The network is EDM's for CIFAR-10 (55.73M parameters) with random weights, in fp32; the step is Algorithm 1 by
``recipes/cifar10.yaml`` on random images, with RAdam and three averages: with two forward passes of the student, and with
one (``tangent.shared_primal``). After five steps of each, since RAdam's first
ones are cheaper, every block runs each once, in turn; printed are medians, and of ratios the medians over
blocks. Six passes are the least that the first can cost if a derivative costs two and a backward pass two.

A plain forward is that of the network as ``teachers.load`` gives it. The trainer keeps the weights in another memory format
on a CPU, in which this pass is faster too; printed as well are ratios to that one, in "own forwards".
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cost import Steps
from torch import nn

import teachers
from distill import trigflow
from distill.cpu import tune_cpu
from distill.jvp import jvp
from teachers.networks import build
from teachers.released import released_config

TEACHER = "edm-cifar10-32x32-uncond-vp"
PLAIN, OWN = "plain forward", "own forward"
AVERAGES = [{"sigma_rel": width} for width in (0.05, 0.10, 0.25)]


def randomize(network: nn.Module, seed: int) -> None:
    """Add noise to every weight, those that start at zero included."""
    torch.manual_seed(seed)
    for p in network.parameters():
        p.data += 0.02 * torch.randn_like(p)


def random_teacher(folder: str, name: str = TEACHER) -> str:
    """A model folder of a released network with random weights in every layer, also in those that start at zero."""
    torch.manual_seed(0)
    config = released_config(name)
    network = build(config["network"], config["network_config"])
    form = [config[key] for key in ("sigma_data", "sample_shape", "num_classes", "label_format")]
    return save_randomized(teachers.wrap(network, teachers.EDM, *form), Path(folder, name))


def save_randomized(teacher: teachers.Teacher, folder: Path) -> str:
    """Make every weight random and write the model folder; its path."""
    randomize(teacher, seed=0)
    teachers.save_pretrained(teacher, folder, "teacher")
    return str(folder)


def steps(teacher: str, batch: int, shared: bool, folder: str) -> Steps:
    changes = {
        "teacher": teacher, "train_batch_size": batch, "data": {"source": "teacher"},
        "ema": AVERAGES, "tangent": {"shared_primal": shared}, "evaluation": {"validation_samples": 0},
    }  # fmt: skip
    return Steps("recipes/cifar10.yaml", changes, "distillation", folder)


def parts(step: Steps, teacher: str) -> dict[str, Callable]:
    """A plain forward pass, and what a step is made of, each by itself."""
    student, x0 = step.trainer.network, step.images
    loaded = teachers.load(teacher)
    t = torch.linspace(0.1, 1.5, len(x0))
    x_t = trigflow.perturb(x0, torch.randn_like(x0), t)

    def forward_and_backward():
        student(x_t, t).square().mean().backward()
        student.zero_grad()

    return {
        PLAIN: lambda: torch.no_grad()(loaded)(x_t, t),
        OWN: lambda: torch.no_grad()(student)(x_t, t),
        "derivative": lambda: jvp(student, (x_t, t), (torch.randn_like(x_t), torch.ones_like(t))),
        "forward and backward": forward_and_backward,
    }


def take_turns(calls: dict[str, Callable], measure: Callable[[Callable], Any], blocks: int) -> dict[str, list]:
    """What ``measure`` gives for each of the calls, once a block; a first block warms up and is left out."""
    measured = {name: [] for name in calls}
    for block in range(blocks + 1):
        for name, call in calls.items():
            result = measure(call)
            if block > 0:
                measured[name].append(result)
    return measured


def median_ratio(spent: list[float], unit: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(spent, unit, strict=True))


def cpu_seconds(call: Callable) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=7)
    options = parser.parse_args()
    tune_cpu()
    with tempfile.TemporaryDirectory() as folder:
        teacher = random_teacher(folder)
        two, one = (steps(teacher, options.batch, shared, f"{folder}/{shared}") for shared in (False, True))
        for step in (two, one):
            step(5)  # RAdam's first steps are cheaper than the others
        calls = {**parts(two, teacher), "step, two passes": lambda: two(1), "step, one pass": lambda: one(1)}
        seconds = take_turns(calls, cpu_seconds, options.blocks)
    report = {
        name: {
            "CPU seconds": statistics.median(spent),
            **{f"{unit}s": median_ratio(spent, seconds[unit]) for unit in (PLAIN, OWN)},
        }
        for name, spent in seconds.items()
    }
    print(json.dumps({**report, "batch": options.batch, "threads": torch.get_num_threads()}, indent=2))


if __name__ == "__main__":
    main()
