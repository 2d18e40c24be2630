"""Each stabiliser of the objective switched off alone, and what this project adds: what happens to the student.

    python benchmarks/ablations.py [--recipe RECIPE] [key=value ...] --out runs/ablations

Every row is the recipe with one change, the same seed and the same number of steps. Rows that are already in
``OUT/results.json`` are kept, so a stopped run goes on where it was. Reported are the endpoint error (RMS distance to the
teacher's ODE solution, units of sigma_data) of the averaged weights at the end, and the 2-step Fréchet distance.
"""

import argparse
import json
from pathlib import Path

from distill.cpu import tune_cpu
from distill.evaluation import build_reference
from distill.recipe import load_recipe, parse_overrides
from distill.sampling import generate
from distill.trainer import Trainer, TrainingError
from teachers.pretrained import write_atomically

ROWS = {
    "the recipe": {},
    "no tangent normalisation": {"tangent.normalization": "none"},
    "tangent clipped to [-1, 1] instead": {"tangent.normalization": "clip", "tangent.constant": 1.0},
    "no JVP rearrangement": {"tangent.rearrangement": False},
    "no tangent warm-up": {"tangent.warmup_steps": 0},
    "adaptive weighting switched": {"adaptive_weighting": None},
    "discrete time, N = 64": {"discrete_steps": 64},
    "discrete time, N = 1024": {"discrete_steps": 1024},
    "targets from an average": {"target_half_life_images": 2000.0},
    "segments where t < 1, at first everywhere": {
        "target_half_life_images": 2000.0, "segments.everywhere_share": 0.5, "tangent.warmup_steps": 0,
        "optimizer.learning_rate": 1e-3,
    },  # fmt: skip
}


def measure(name: str, recipe_name: str, overrides: dict, folder: Path, num: int) -> dict:
    """Train one row and score it; a training that stops itself is a result too."""
    change = ROWS[name]
    if "adaptive_weighting" in change:
        change = {"adaptive_weighting": not load_recipe(recipe_name, overrides).adaptive_weighting}
    recipe = load_recipe(recipe_name, {**overrides, **change, "output_dir": str(folder)})
    trainer = Trainer(recipe)
    try:
        trainer.train()
    except TrainingError as error:
        return {"steps": trainer.step, "stopped": str(error)}
    batches = generate(trainer.student, num, num_inference_steps=2, role="student", seed=recipe.seed)
    distance = build_reference(channels=recipe.sample_shape[0]).frechet_distance(batches)
    return {
        "steps": trainer.step, "skipped": trainer.nonfinite["total"], "FD": distance,
        "start": trainer.endpoint_history[0], "end": trainer.endpoint_history[-1],
    }  # fmt: skip


def table(results: dict[str, dict]) -> str:
    """Markdown."""
    scored = {name: row for name, row in results.items() if "end" in row}
    first = next(iter(scored.values()))
    lines = [
        "| | " + " | ".join(f"t = {t}" for t in first["start"]) + " | 2-step FD |",
        "|---" * (len(first["start"]) + 2) + "|",
        "| step 0 | " + " | ".join(f"{e:.3f}" for e in first["start"].values()) + " | |",
    ]
    for name, row in scored.items():
        lines.append(f"| {name} | " + " | ".join(f"{e:.3f}" for e in row["end"].values()) + f" | {row['FD']:.1f} |")
    return "\n".join(lines + [f"\n{name}: {row['stopped']}" for name, row in results.items() if "stopped" in row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/mnist-tangent.yaml")
    parser.add_argument("overrides", nargs="*", help="recipe values as key=value, for every row")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--num", type=int, default=2000, help="samples of the Fréchet distance (2000)")
    options = parser.parse_args()
    tune_cpu()
    path = options.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for index, name in enumerate(ROWS):
        if name in results:
            continue
        folder = options.out / f"row-{index}"
        results[name] = measure(name, options.recipe, parse_overrides(options.overrides), folder, options.num)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(results, indent=2)))
    print(table(results))


if __name__ == "__main__":
    main()
