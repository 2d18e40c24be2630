"""Run a recipe.

    accelerate launch distill/run.py recipes/mnist.yaml [key=value ...]
    accelerate launch distill/run.py recipes/mnist.yaml --check
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from distill import visual
from distill.data import load_images
from distill.evaluation import Reference, build_reference, evaluate, format_table
from distill.jvp import check_jvp
from distill.model import Model, from_pretrained
from distill.recipe import DataConfig, Recipe, load_recipe, parse_overrides
from distill.sampling import generate, search_times
from distill.schedule import student_times
from distill.trainer import Trainer, TrainingError, build_student, build_teacher, save_model, trained_model
from teachers import Teacher
from teachers.networks import is_registered
from teachers.pretrained import write_atomically


def run(recipe: Recipe, teacher: Teacher | None = None) -> Model:
    """Train by a recipe, then write the student, a sample grid, a metrics table and, of a student, its pipeline.

    Everything lands in ``recipe.output_dir``. Returns the trained model; its ``config["metrics"]`` holds the table's
    rows (main process).
    """
    trainer = Trainer(recipe, teacher)
    trainer.train()
    model = trained_model(trainer)
    if not trainer.accelerator.is_main_process:
        return model
    search_sampling_times(recipe, model)
    written = ["grid.png", "metrics.md", "metrics.json", "curves.png", "student/"]
    save_model(model, trainer.output_dir / "student")
    model.config["metrics"] = report(recipe, model, trainer.teacher)
    if model.role == "student" and is_registered(model.network.native):
        model.export(trainer.output_dir / "pipeline")
        written.append("pipeline/")
    print(f"\nresults in {trainer.output_dir}: {' '.join(written)}")
    return model


def search_sampling_times(recipe: Recipe, model: Model) -> None:
    """Replace a student's intermediate sampling times by those with the lowest Fréchet distance, if the recipe asks.

    The samples have another seed than those that are reported. The times go into the model's ``config``.
    """
    e = recipe.evaluation
    reference = build_recipe_reference(recipe) if e.search_samples and model.role == "student" else None
    if reference is None:
        return

    def score(times: list[float]) -> float:
        batches = generate(
            model.network, e.search_samples, num_inference_steps=len(times), role="student", seed=recipe.seed + 1,
            batch_size=e.batch_size, times=times, guidance=model.guidance(None),
        )  # fmt: skip
        return reference.frechet_distance(batches)

    found = {}
    for n in e.num_inference_steps:
        start = student_times(n, recipe.sigma_data)
        found[str(n)], best = search_times(score, start)
        print(f"{n} steps: sampling times {[round(t, 3) for t in found[str(n)]]}, {e.features}-FD {best:.3g}")
    model.config["sampling"] = found


def build_recipe_reference(recipe: Recipe) -> Reference | None:
    """What samples are scored against; ``None`` without a data set."""
    e = recipe.evaluation
    if e.data is None and recipe.data.source == "teacher":
        return None
    data = recipe.data if e.data is None else DataConfig(e.data)
    return build_reference(data.source, e.features, recipe.sample_shape[0], data.image_column, data.label_column)


def report(recipe: Recipe, student: Model, teacher: Teacher | None) -> dict[str, dict]:
    """Grid and table of the trained network beside its teacher and the students the recipe names."""
    e, output = recipe.evaluation, Path(recipe.output_dir)
    trained = "this run" if teacher is not None else "trained network"
    entries = [(trained, student), *((name, from_pretrained(name)) for name in e.also)]
    grid, rows = {}, {}
    if teacher is not None and e.teacher_steps:
        title = f"teacher, {2 * e.teacher_steps - 1} NFE"
        teacher_model = Model(teacher, {"role": "teacher"})
        grid[title], rows[title] = sample_and_score(recipe, teacher_model, e.teacher_steps)
    for name, model in entries:
        for n in e.num_inference_steps if model.role == "student" else [e.teacher_steps]:
            title = f"{name}, {n} step{'s' * (n > 1)}"
            grid[title], rows[title] = sample_and_score(recipe, model, n)
            rows[title]["training (min)"] = model.config.get("training", {}).get("minutes")
    visual.labelled_grid(grid, output / "grid.png", "the same noise, teacher and students")
    table = format_table(rows)
    text = f"{table}\n\nSeed {recipe.seed}; features: {e.features}; reference: {e.data or recipe.data.source}.\n"
    write_atomically(output / "metrics.json", lambda path: path.write_text(json.dumps(rows, indent=2)))
    write_atomically(output / "metrics.md", lambda path: path.write_text(text))
    print("\n" + text)
    return rows


def sample_and_score(recipe: Recipe, model: Model, steps: int) -> tuple[torch.Tensor, dict]:
    """The first 20 images of ``evaluation.num_samples`` and the scores of all."""
    e = recipe.evaluation
    start = time.perf_counter()
    batches = list(model.generate(e.num_samples, steps, seed=recipe.seed, batch_size=e.batch_size, progress=True))
    milliseconds = (time.perf_counter() - start) / e.num_samples * 1000
    reference = build_recipe_reference(recipe)
    scores = {} if reference is None else evaluate(batches, reference)
    images = torch.cat([x for x, _ in batches[: 1 + 20 // e.batch_size]])[:20].cpu()
    return images, {**scores, "ms/image": milliseconds}


def check(recipe: Recipe) -> str:
    """Validate a recipe without training: files, shapes, the network's derivative, and a memory estimate."""
    teacher = build_teacher(recipe)
    student = build_student(recipe, teacher)
    if recipe.data.source != "teacher":
        shape = list(load_images(recipe.data, recipe.sample_shape[0])[0][0].shape)
        if shape != recipe.sample_shape:
            raise ValueError(f"images of {recipe.data.source!r} have shape {shape}, the recipe wants {recipe.sample_shape}")
    jvp_error = None
    if teacher is not None and recipe.discrete_steps is None:
        jvp_error = check_jvp(student)
    parameters = sum(p.numel() for p in student.parameters())
    # Weights, gradients, two Adam moments, and per EMA and teacher one more copy.
    state = parameters * 4 * (4 + len(recipe.ema) + (teacher is not None))
    activations = recipe.train_batch_size * activation_bytes(student, recipe.mixed_precision)
    lines = [
        f"recipe is valid: {recipe.objective}, {recipe.max_train_steps} steps of {recipe.train_batch_size}",
        f"network: {type(student.native).__name__}, {parameters:,} parameters",
        f"memory per process: about {(state + activations) / 2**20:,.0f} MiB ({state / 2**20:,.0f} for weights, gradients, "
        f"optimizer, EMA and teacher, {activations / 2**20:,.0f} for activations)",
    ]
    if jvp_error is not None:
        lines.append(f"derivative along the PF-ODE: within {jvp_error:.0e} of finite differences")
    return "\n".join(lines + ([f"note: {recipe.notes}"] if recipe.notes else []))


def activation_bytes(student: Teacher, mixed_precision: str) -> int:
    """What a forward pass keeps for the backward pass per sample, measured on the CPU: two samples against one, so that
    weights and their bf16 copies do not count.
    """
    return kept_bytes(student, 2, mixed_precision) - kept_bytes(student, 1, mixed_precision)


def kept_bytes(student: Teacher, batch: int, mixed_precision: str) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    labels = None if student.num_classes is None else torch.zeros(batch, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
        result = student(torch.zeros(batch, *student.sample_shape), torch.ones(batch), labels)
    del result  # held the graph, and with it every storage, until all were seen
    return sum(kept.values())


def use_all_cores() -> None:
    """Undo what ``accelerate launch`` does to a single process on CPUs: one thread unless told otherwise."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        allowed = getattr(os, "sched_getaffinity", None)  # Linux only
        torch.set_num_threads(len(allowed(0)) if allowed else os.cpu_count())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distill/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that ships with the package")
    parser.add_argument("overrides", nargs="*", help="recipe values as key=value; dots reach inside sections")
    parser.add_argument("--check", action="store_true", help="validate everything in seconds, train nothing")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; errors that a user can cause are one sentence on stderr and exit status 1."""
    options = parse_arguments(arguments)
    use_all_cores()
    torch.set_flush_denormal(True)  # denormals slow small networks on CPUs down, up to ten times
    try:
        recipe = load_recipe(options.recipe, parse_overrides(options.overrides))
        if options.check:
            print(check(recipe))
        else:
            run(recipe)
    except (ValueError, OSError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
