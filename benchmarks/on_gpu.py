"""A step of distillation on a GPU against what ``distill plan`` says of it: memory, seconds, and the share of the peak.

    python benchmarks/on_gpu.py RECIPE [key=value ...] [--tflops 989] [--steps 9]

The teacher has the recipe's network with random weights: that of a released checkpoint by its name, or ``sit-b-2``, a
SiT-B/2 (130M parameters), at 64x64 with 1,024 tokens. Steps are on random images. Memory is what PyTorch's allocator holds
at most during them, and ``reserved`` what it has asked the GPU for. ``--tflops`` is the GPU's dense peak, by default an
H100's in bf16. One process measures one recipe.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cost import Steps, synchronize
from forwards import random_teacher, save_randomized

import teachers
from distill.device import autocast
from distill.jvp import jvp
from distill.plan.memory import GB, step_memory
from distill.plan.networks import planned_networks
from distill.plan.passes import Passes
from distill.plan.report import step_flops
from distill.recipe import Recipe, load_recipe, parse_overrides
from teachers.networks import build

SIT = "sit-b-2"


def random_sit(folder: str, recipe: Recipe) -> str:
    """A model folder of SiT-B/2 with random weights, for samples of the recipe's shape."""
    torch.manual_seed(0)
    channels, size, _ = recipe.sample_shape
    network = build("SiT", dict(
        input_size=size, patch_size=2, in_channels=channels, hidden_size=768, depth=12, num_heads=12,
        num_classes=recipe.num_classes, learn_sigma=False,
    ))  # fmt: skip
    teacher = teachers.wrap(network, teachers.RECTIFIED_FLOW, recipe.sigma_data, recipe.sample_shape, recipe.num_classes)
    return save_randomized(teacher, Path(folder, SIT))


def seconds(call, times: int) -> float:
    """The median of so many calls, after two."""
    spent = []
    for _ in range(2 + times):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[2:])


def passes(steps: Steps, times: int) -> dict[str, float]:
    """Seconds of the student's forward pass and derivative, in the precision of the step."""
    trainer = steps.trainer
    student, x0 = trainer.network, steps.images.to(trainer.device)
    labels = None if student.num_classes is None else steps.labels.to(trainer.device)
    t = torch.linspace(0.1, 1.5, len(x0), device=trainer.device)
    guidance = t if student.accepts_guidance else None
    tangents = torch.randn_like(x0), torch.ones_like(t)
    with autocast(trainer.recipe.mixed_precision, trainer.device):
        forward = seconds(lambda: torch.no_grad()(student)(x0, t, labels, guidance), times)
        derivative = seconds(lambda: jvp(lambda x, t: student(x, t, labels, guidance), (x0, t), tangents), times)
    return {"forward (s)": forward, "derivative (s)": derivative}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--tflops", type=float, default=989.0)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("overrides", nargs="*", help="recipe values as key=value")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    changes = parse_overrides(options.overrides) | {"data": {"source": "teacher"}, "evaluation": {"validation_samples": 0}}
    named = load_recipe(options.recipe, changes)
    with tempfile.TemporaryDirectory() as folder:
        teacher = random_sit(folder, named) if named.teacher == SIT else random_teacher(folder, named.teacher)
        recipe = load_recipe(options.recipe, changes | {"teacher": teacher})
        batch = recipe.train_batch_size
        planned = Passes(recipe, planned_networks(recipe), gpu=True)
        flops = batch * recipe.gradient_accumulation_steps * sum(step_flops(planned).values())
        memory = step_memory(planned, recipe.activation_checkpointing).total(batch)
        steps = Steps(options.recipe, changes | {"teacher": teacher}, "distillation", folder)
        steps(5)  # RAdam's first steps are cheaper than the others; compiles
        torch.cuda.reset_peak_memory_stats()
        step = seconds(lambda: steps(1), options.steps)
        held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        apart = passes(steps, options.steps)
    print(json.dumps({
        "GPU": torch.cuda.get_device_name(), "torch": torch.__version__, "recipe": [options.recipe, *options.overrides],
        "batch": batch, "planned memory (GB)": memory / GB, "allocated (GB)": held / GB, "reserved (GB)": reserved / GB,
        "planned / allocated": memory / held, "step (s)": step, **apart, "step (forwards)": step / apart["forward (s)"],
        "derivative (forwards)": apart["derivative (s)"] / apart["forward (s)"], "TFLOPs of a step": flops / 1e12,
        "utilization": flops / step / options.tflops / 1e12,
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
