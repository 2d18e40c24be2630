"""What distillation and sampling cost, as ratios measured in one run.

    python benchmarks/cost.py [--recipe RECIPE] [key=value ...]

- one sCD step (teacher forward, derivative, forward, backward, optimizer, EMA) against one ordinary diffusion training
  step of the same network, batch and precision, in alternating blocks;
- the peak memory of each, in a process of its own;
- a student's 2 evaluations against the teacher's 18 Heun steps (35 evaluations), the same batch.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from distill.cpu import tune_cpu
from distill.log import Window
from distill.recipe import load_recipe, parse_overrides
from distill.sampling import sample_student, sample_teacher
from distill.trainer import Trainer
from teachers import load

WARM_UP, BLOCKS, STEPS = 3, 7, 4
OBJECTIVES = ("diffusion", "distillation")


class Steps:
    """Optimizer steps of one objective on random images."""

    def __init__(self, recipe: str, overrides: dict, objective: str, folder: str):
        # Only the objective differs: "diffusion" with a teacher trains the teacher's own network.
        changes = {**overrides, "objective": objective, "output_dir": folder}
        if objective == "diffusion":
            changes |= {"segments": None, "target_half_life_images": None}
        self.trainer = Trainer(load_recipe(recipe, changes))
        r = self.trainer.recipe
        generator = torch.Generator().manual_seed(0)
        self.images = r.sigma_data * torch.randn(r.train_batch_size, *r.sample_shape, generator=generator)
        self.labels = torch.randint(r.num_classes or 1, (r.train_batch_size,), generator=generator)

    def __call__(self, num: int) -> float:
        """Seconds per step over ``num`` steps."""
        batches = iter([(self.images, self.labels)] * num * self.trainer.recipe.gradient_accumulation_steps)
        synchronize()
        start = time.perf_counter()
        for _ in range(num):
            self.trainer.train_step(batches, Window())
        synchronize()
        return (time.perf_counter() - start) / num


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(first, second) -> tuple[float, float, float]:
    """Median seconds of both callables and the median of the ratios ``second / first`` of neighbouring blocks."""
    pairs = [(first(), second()) for _ in range(BLOCKS)]
    return (*(statistics.median(times) for times in zip(*pairs, strict=True)), statistics.median(b / a for a, b in pairs))


def step_times(recipe: str, overrides: dict, folder: str) -> dict:
    diffusion, distillation = (Steps(recipe, overrides, objective, folder) for objective in OBJECTIVES)
    diffusion(WARM_UP), distillation(WARM_UP)
    a, b, ratio = alternate(lambda: diffusion(STEPS), lambda: distillation(STEPS))
    return {"diffusion step (s)": a, "distillation step (s)": b, "ratio": ratio}


def sampling_times(recipe: str, overrides: dict, batch: int) -> dict:
    parsed = load_recipe(recipe, overrides)
    teacher = load(parsed.teacher, "cuda" if torch.cuda.is_available() else "cpu")
    labels = None if teacher.num_classes is None else torch.arange(batch) % teacher.num_classes
    seeds = list(range(batch))

    def timed(sample, steps: int) -> float:
        synchronize()
        start = time.perf_counter()
        sample(teacher, seeds, labels, steps)
        synchronize()
        return time.perf_counter() - start

    few, many = (lambda: timed(sample_student, 2)), (lambda: timed(sample_teacher, 18))
    few(), many()
    a, b, ratio = alternate(few, many)
    return {"2 evaluations (s)": a, "35 evaluations (s)": b, "ratio": ratio, "batch": batch}


def peak_memory(recipe: str, overrides: dict, objective: str, folder: str) -> float:
    """MiB: all weights and what training steps allocate at most; the data set is left out. In a process of its own."""
    steps = Steps(recipe, overrides, objective, folder)
    if torch.cuda.is_available():
        steps(WARM_UP)
        return torch.cuda.max_memory_allocated() / 2**20
    reset_peak()
    before = resident("VmRSS")
    steps(WARM_UP)
    trainer = steps.trainer
    modules = [trainer.network, trainer.teacher, *(ema.network for ema in trainer.averages)]
    return resident("VmHWM") - before + sum(size(module) for module in modules if module is not None)


def reset_peak() -> None:
    """Give freed memory back, or steps would hide in it, and let ``VmHWM`` start from what is left (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most since :func:`reset_peak`."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 2**10


def size(module: torch.nn.Module) -> float:
    """MiB of a module's weights."""
    return sum(p.nbytes for p in module.parameters()) / 2**20


def peaks(arguments: list[str], teacher_mib: float) -> dict:
    found = {}
    for objective in OBJECTIVES:
        command = [sys.executable, __file__, *arguments, "--peak", objective]
        found[objective] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    ratio = (found["distillation"] - teacher_mib) / found["diffusion"]
    named = {f"{objective} (MiB)": mib for objective, mib in found.items()}
    return {**named, "teacher's weights (MiB)": teacher_mib, "ratio without them": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/mnist-tangent.yaml", help="a distillation recipe")
    parser.add_argument("overrides", nargs="*", help="recipe values as key=value")
    parser.add_argument("--sampling-batch", type=int, default=100)
    parser.add_argument("--peak", choices=OBJECTIVES, help="print the peak memory of one objective in MiB, nothing else")
    options = parser.parse_args()
    overrides = parse_overrides(options.overrides)
    tune_cpu()
    with tempfile.TemporaryDirectory() as folder:
        if options.peak:
            print(peak_memory(options.recipe, overrides, options.peak, folder))
            return
        teacher = load(load_recipe(options.recipe, overrides).teacher)
        teacher_mib = size(teacher)
        report = {
            "step": step_times(options.recipe, overrides, folder),
            "peak memory": peaks(["--recipe", options.recipe, *options.overrides], teacher_mib),
            "sampling": sampling_times(options.recipe, overrides, options.sampling_batch),
            "threads": torch.get_num_threads(),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
