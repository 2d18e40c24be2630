"""Run a recipe.

    accelerate launch --quiet distill/run.py recipes/mnist.yaml [key=value ...]
    accelerate launch --quiet distill/run.py recipes/mnist.yaml --check

Where the package is installed without its repository: python -m distill.run mnist.yaml
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from distill.carried_code import export_obstacle
from distill.checkpoint import find_checkpoint
from distill.cli import check_folder, sentence
from distill.cpu import tune_cpu
from distill.data import captioned, check_sigma_data, load_images, recipe_prompts, stored_data
from distill.evaluation import (
    Reference,
    evaluate,
    evaluation_data,
    evaluation_source,
    extract,
    format_table,
    recipe_reference,
)
from distill.evaluation.features import default_features, load_features
from distill.export import TEXT_OBSTACLE
from distill.failures import Watch, report_crash, report_error
from distill.jvp import check_jvp
from distill.lora import write_adapters
from distill.model import Model, from_pretrained
from distill.parallel import check_launch, start_processes, world_size
from distill.plan.memory import Memory, fit_to_device
from distill.prompts import Prompts
from distill.recipe import Recipe, load_recipe, parse_overrides
from distill.recipe_networks import (
    build_student,
    build_teacher,
    load_pretrained,
    load_velocity_teacher,
    teacher_verdicts,
    time_warnings,
)
from distill.sampling import count_evaluations, device_of, generate, search_times
from distill.text_pipeline import is_text_network
from distill.trainer import (
    Trainer,
    TrainingError,
    check_tracker,
    ordinary_student,
    save_model,
    trained_model,
    uses_derivative,
)
from distill.visual import labelled_grid
from teachers import Teacher, load_config
from teachers.networks import is_ours, is_registered
from teachers.pretrained import write_atomically, write_config


def run(recipe: Recipe, pretrained: Teacher | None = None) -> Model:
    """Train by a recipe, then write the student, a sample grid, a metrics table and, of a student, its pipeline.

    Args:
        pretrained: used in place of the recipe's ``teacher``, for a model in memory.

    Everything lands in ``recipe.output_dir``. Returns the trained model; its ``config["metrics"]`` holds the table's rows of
    itself and its teacher (main process).
    """
    fit_to_device(recipe, pretrained)
    check_evaluation(recipe)
    trainer = Trainer(recipe, pretrained)
    sure = recipe.is_diffusion or is_ours(trainer.student.native)  # nothing to export, or nothing in its way
    obstacle = None if sure else export_obstacle(ordinary_student(trainer).native)
    if not recipe.is_diffusion and is_text_network(trainer.student):
        obstacle = TEXT_OBSTACLE
    if obstacle is not None:
        trainer.print(f"warning: no pipeline will be written: {obstacle}")
    trainer.train()
    model, teacher = trained_model(trainer), trainer.teacher
    if teacher is not None and recipe.evaluation.teacher_steps:
        teacher = trainer.placement.gathered(teacher)
    if not trainer.accelerator.is_main_process:
        return model
    folder = trainer.output_dir / "student"
    save_model(model, folder)
    if recipe.lora is not None and recipe.student is None:  # adapters of the teacher, which its pipeline has
        write_adapters(folder, trainer.student)
    search_sampling_times(recipe, model, trainer.prompts)
    rows = report(recipe, model, teacher, trainer.prompts)
    others = tuple(f"{name}, " for name in recipe.evaluation.also)
    model.config["metrics"] = {title: row for title, row in rows.items() if not title.startswith(others)}
    written = ["grid.png", "metrics.md", "metrics.json", "curves.png", "student/"]
    if is_registered(model.network.native):
        write_config(folder, model.config)
        if model.role == "student" and obstacle is None:
            model.export(trainer.output_dir / "pipeline")
            written.append("pipeline/")
    print(f"\nresults in {trainer.output_dir}: {' '.join(written)}")
    return model


def check_evaluation(recipe: Recipe) -> None:
    """Look before the training at what is needed only after it, so that nothing is missing then.

    Raises:
        ValueError, FileNotFoundError: features, data or models that are not there or do not fit.
    """
    e, channels = recipe.evaluation, recipe.sample_shape[0]
    source = evaluation_source(recipe)
    if source is not None:
        features = default_features(source) if e.features is None else e.features
        extract(load_features(features), torch.zeros(1, *recipe.sample_shape), None)
    if e.data is not None:
        load_images(evaluation_data(recipe), channels)
    for name in e.also:
        config = load_config(name)
        if config["role"] != "student" or list(config["sample_shape"]) != recipe.sample_shape:
            raise ValueError(f"evaluation.also: {name} is not a student for samples of shape {recipe.sample_shape}")
    if recipe.resume_from_checkpoint not in (None, "latest"):
        find_checkpoint(Path(recipe.output_dir), recipe.resume_from_checkpoint, print)


def search_sampling_times(recipe: Recipe, model: Model, prompts: Prompts | None) -> None:
    """Replace a student's intermediate sampling times by those with the lowest Fréchet distance, if the recipe asks.

    The samples have another seed than those that are reported. The times go into the model's ``config``.
    """
    e = recipe.evaluation
    reference = recipe_reference(recipe) if e.search_samples and model.role == "student" else None
    if reference is None:
        return

    def score(times: list[float]) -> float:
        batches = generate(
            model.network, e.search_samples, num_inference_steps=len(times), role="student", seed=recipe.seed + 1,
            batch_size=e.batch_size, times=times, guidance=model.guidance(None), labels=prompts,
        )  # fmt: skip
        return reference.frechet_distance(batches)

    found = {}
    for n in e.num_inference_steps:
        start = recipe.sampling_times(n)
        found[str(n)], best = search_times(score, start)
        print(f"{n} steps: sampling times {[round(t, 3) for t in found[str(n)]]}, {reference.extractor.name}-FD {best:.3g}")
    model.config["sampling"] = model.config.get("sampling", {}) | found


def report(recipe: Recipe, trained: Model, teacher: Teacher | None, prompts: Prompts | None) -> dict[str, dict]:
    """Grid and table of the trained network beside its teacher and the students the recipe names."""
    e, output = recipe.evaluation, Path(recipe.output_dir)
    reference = recipe_reference(recipe)
    entries = [("this run" if teacher is not None else "trained network", trained)]
    entries += [(name, from_pretrained(name, device_of(trained.network))) for name in e.also]
    grid, rows = {}, {}
    if teacher is not None and e.teacher_steps:
        title = f"teacher, {count_evaluations(e.teacher_steps)} NFE"
        grid[title], rows[title] = sample_and_score(
            recipe, Model(teacher, {"role": "teacher"}), e.teacher_steps, reference, prompts
        )
    for name, model in entries:
        for n in e.num_inference_steps if model.role == "student" else [e.teacher_steps]:
            title = f"{name}, {n} step{'s' * (n > 1)}"
            grid[title], rows[title] = sample_and_score(recipe, model, n, reference, prompts)
            rows[title]["training (min)"] = model.config.get("training", {}).get("minutes")
    labelled_grid(grid, output / "grid.png", "the same noise, teacher and students")
    table = format_table(rows)
    against = "" if reference is None else f"; features: {reference.extractor.name}; reference: {evaluation_source(recipe)}"
    text = f"{table}\n\nSeed {recipe.seed}{against}.\n"
    write_atomically(output / "metrics.json", lambda path: path.write_text(json.dumps(rows, indent=2)))
    write_atomically(output / "metrics.md", lambda path: path.write_text(text))
    print("\n" + text)
    return rows


def sample_and_score(
    recipe: Recipe, model: Model, steps: int, reference: Reference | None, prompts: Prompts | None
) -> tuple[torch.Tensor, dict]:
    """The first 20 images of ``evaluation.num_samples`` and the scores of all (without a reference: their time alone)."""
    e = recipe.evaluation
    labels = prompts if model.network.text_condition is not None else None
    generated = model.generate(e.num_samples, steps, labels, recipe.seed, batch_size=e.batch_size, progress=True)
    batches = TimedBatches(generated, keep=20)
    scores = {"num_samples": sum(len(x) for x, _ in batches)} if reference is None else evaluate(batches, reference)
    return torch.cat(batches.first)[:20], {**scores, "ms/image": batches.seconds / e.num_samples * 1000}


class TimedBatches:
    """Passes batches of images on as they come, measures how long each took to be drawn, and keeps the first ``keep``."""

    def __init__(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor | None]], keep: int):
        self.batches, self.keep = batches, keep
        self.first: list[torch.Tensor] = []
        self.seconds = 0.0

    def __iter__(self):
        start = time.perf_counter()
        for images, labels in self.batches:
            self.seconds += time.perf_counter() - start
            if sum(map(len, self.first)) < self.keep:
                self.first.append(images.cpu())
            yield images, labels
            start = time.perf_counter()


def check(recipe: Recipe) -> str:
    """Validate a recipe without training: files, shapes, labels, whether the teacher denoises, the network's
    derivative, and a memory estimate.
    """
    check_folder(Path(recipe.output_dir), f"output_dir {recipe.output_dir}")
    check_evaluation(recipe)
    check_tracker(recipe)
    check_launch(recipe)
    memory = fit_to_device(recipe)
    pretrained = load_pretrained(recipe)
    teacher, velocity_teacher = build_teacher(recipe, pretrained), load_velocity_teacher(recipe, pretrained)
    student = build_student(recipe, pretrained)
    prompts = recipe_prompts(recipe)
    data = None if recipe.data.source == "teacher" else stored_data(recipe)
    if data is not None:
        check_sigma_data(data, recipe)
        data = captioned(data, prompts, recipe)
    verdicts = teacher_verdicts(recipe, teacher, velocity_teacher, data)
    jvp_error = None
    if uses_derivative(recipe):
        jvp_error = check_jvp(student)
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    part = "" if recipe.lora is None else f", of which {trained:,} are trained"
    lines = [
        f"recipe is valid: {objective(recipe)}, {recipe.max_train_steps} steps of {recipe.train_batch_size}",
        f"network: {type(student.native).__name__}, {parameters:,} parameters{part}",
        memory_line(recipe, memory),
    ]
    lines += verdicts
    if jvp_error is not None:
        lines += time_warnings(student)
        lines.append(f"derivative along the PF-ODE: within {jvp_error:.0e} of finite differences")
    return "\n".join(lines + ([f"note: {recipe.notes}"] if recipe.notes else []))


def objective(recipe: Recipe) -> str:
    """Its name and the optional sections that the recipe has: an override of one of their keys brings in all of one."""
    there = [key for key in ("segments", "vsd", "lora") if getattr(recipe, key) is not None and key != recipe.objective]
    return recipe.objective + (f" with {' and '.join(there)}" if there else "")


def memory_line(recipe: Recipe, memory: Memory | None) -> str:
    """What :func:`distill.plan.fit_to_device` found, as a sentence."""
    if memory is None:
        return "memory per process: cannot be estimated, because this network cannot be run without weights"
    state, activations = sum(memory.state.values()), memory.activations(recipe.train_batch_size // world_size())
    return (
        f"memory per process: about {(state + activations) / 2**20:,.0f} MiB ({state / 2**20:,.0f} for weights, gradients, "
        f"optimizer, EMA and teacher, {activations / 2**20:,.0f} for activations)"
    )


def stop(*_) -> None:
    """End on SIGTERM before or after the training loop: what was trained so far is in checkpoints."""
    print("stopped by SIGTERM outside the training loop; resume_from_checkpoint=latest goes on from the last checkpoint")
    raise SystemExit(0)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distill/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that ships with the package")
    parser.add_argument("overrides", nargs="*", default=[], help="recipe values as key=value; dots reach inside sections")
    parser.add_argument("--check", action="store_true", help="validate everything in seconds, train nothing")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; errors that a user can cause are one sentence on stderr and exit status 1."""
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, stop)  # inside its loop the trainer handles the signal itself
    tune_cpu()
    watch = None
    try:
        start_processes()
        watch = Watch() if dist.is_initialized() else None
        recipe = load_recipe(options.recipe, parse_overrides(options.overrides))
        if options.check:
            text = check(recipe)
            if watch is None or watch.rank == 0:
                print(text)
        else:
            run(recipe)
    except (ValueError, OSError, TrainingError) as error:
        return report_error(sentence(error), watch)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if watch is None:
            raise
        return report_crash(error, watch)
    finally:
        if watch is not None:
            watch.end()
    if watch is not None:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
