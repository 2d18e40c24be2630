"""Run a recipe.

    accelerate launch distill/run.py recipes/mnist.yaml [key=value ...]
    accelerate launch distill/run.py recipes/mnist.yaml --check
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from distill import visual
from distill.data import load_images
from distill.evaluation import build_reference, evaluate, format_table
from distill.model import Model, from_pretrained
from distill.recipe import Recipe, load_recipe, parse_overrides
from distill.trainer import Trainer, TrainingError, build_student, build_teacher, save_student
from teachers import Teacher, load, load_config
from teachers.pretrained import write_atomically


def run(recipe: Recipe, teacher: Teacher | None = None) -> dict[str, dict]:
    """Train by a recipe, then write the student, its exported pipeline, a sample grid and a metrics table.

    Everything lands in ``recipe.output_dir``. Returns the table's rows (empty on other than the main process).
    """
    start = time.perf_counter()
    trainer = Trainer(recipe, teacher)
    trainer.train()
    if not trainer.accelerator.is_main_process:
        return {}
    seconds = time.perf_counter() - start
    folder = trainer.output_dir / "student"
    save_student(trainer, folder)
    rows = report(recipe, Model(load(folder), load_config(folder)), trainer.teacher, seconds)
    student = from_pretrained(folder)
    student.config["metrics"] = rows
    student.export(trainer.output_dir / "pipeline")
    print(f"\nresults in {trainer.output_dir}: grid.png metrics.md metrics.json curves.png student/ pipeline/")
    return rows


def report(recipe: Recipe, student: Model, teacher: Teacher | None, seconds: float) -> dict[str, dict]:
    """Grid and table of the trained network beside its teacher and the students the recipe names."""
    e, output = recipe.evaluation, Path(recipe.output_dir)
    trained = "this run" if teacher is not None else "trained network"
    entries = [(trained, student, seconds / 60)]
    entries += [(name, from_pretrained(name), training_minutes(name)) for name in e.also]
    grid, rows = {}, {}
    if teacher is not None and e.teacher_steps:
        title = f"teacher, {2 * e.teacher_steps - 1} NFE"
        teacher_model = Model(teacher.cpu(), {"role": "teacher"})
        grid[title], rows[title] = sample_and_score(recipe, teacher_model, e.teacher_steps)
    for name, model, minutes in entries:
        for n in e.num_inference_steps if model.role == "student" else [e.teacher_steps]:
            title = f"{name}, {n} step{'s' * (n > 1)}"
            grid[title], rows[title] = sample_and_score(recipe, model, n)
            rows[title]["training (min)"] = minutes
    visual.labelled_grid(grid, output / "grid.png", "the same noise, teacher and students")
    table = format_table(rows)
    text = f"{table}\n\nSeed {recipe.seed}; features: {e.features}; reference: training split of {recipe.data.source}.\n"
    write_atomically(output / "metrics.json", lambda path: path.write_text(json.dumps(rows, indent=2)))
    write_atomically(output / "metrics.md", lambda path: path.write_text(text))
    print("\n" + text)
    return rows


def training_minutes(name: str) -> float | None:
    return load_config(name).get("training", {}).get("minutes")


def sample_and_score(recipe: Recipe, model: Model, steps: int) -> tuple[torch.Tensor, dict]:
    """The first 20 images of ``evaluation.num_samples`` and the scores of all."""
    e = recipe.evaluation
    start = time.perf_counter()
    batches = list(model.generate(e.num_samples, steps, seed=recipe.seed, batch_size=e.batch_size))
    milliseconds = (time.perf_counter() - start) / e.num_samples * 1000
    source = "mnist" if recipe.data.source == "teacher" else recipe.data.source
    scores = evaluate(batches, build_reference(source, e.features, recipe.sample_shape[0]))
    images = torch.cat([x for x, _ in batches[: 1 + 20 // e.batch_size]])[:20]
    return images, {**scores, "ms/image": milliseconds}


def check(recipe: Recipe) -> str:
    """Validate a recipe without training: files, shapes, one forward pass on one sample, and a memory estimate."""
    teacher = build_teacher(recipe)
    student = build_student(recipe, teacher)
    if recipe.data.source != "teacher":
        shape = list(load_images(recipe.data, recipe.sample_shape[0])[0][0].shape)
        if shape != recipe.sample_shape:
            raise ValueError(f"images of {recipe.data.source!r} have shape {shape}, the recipe wants {recipe.sample_shape}")
    labels = None if recipe.num_classes is None else torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        student(torch.zeros(1, *recipe.sample_shape), torch.ones(1), labels)
    parameters = sum(p.numel() for p in student.parameters())
    # Weights, gradients, two Adam moments, and per EMA and teacher one more copy; activations come on top.
    copies = 4 + len(recipe.ema) + (teacher is not None)
    lines = [
        f"recipe is valid: {recipe.objective}, {recipe.max_train_steps} steps of {recipe.train_batch_size}",
        f"network: {type(student.native).__name__}, {parameters:,} parameters",
        f"memory for weights, gradients, optimizer, EMA, teacher: {parameters * 4 * copies / 2**20:.0f} MiB "
        "(activations come on top)",
    ]
    return "\n".join(lines + ([f"note: {recipe.notes}"] if recipe.notes else []))


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
