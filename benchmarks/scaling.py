"""The scaling law of sCM (arXiv 2410.11081, figure 6) at our scale: is a student as far behind its teacher at every size?

    python benchmarks/scaling.py [--out runs/scaling] [--sizes s m l] [--teacher key=value ...] [--student key=value ...]

Trains the teachers of ``recipes/scaling``, distils each by ``recipes/scaling.yaml``, and plots the ratio of the students'
Fréchet distance to their teacher's. Everything is a run of ``distill/run.py``; one whose ``metrics.json`` is there is not
repeated, and one that was stopped goes on. Into ``OUT`` go ``scaling.json``, ``scaling.md`` and ``scaling.png``.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from distill import run  # noqa: E402
from distill.plan.networks import planned_networks  # noqa: E402
from distill.recipe import load_recipe, parse_overrides  # noqa: E402
from teachers.pretrained import write_atomically  # noqa: E402

SIZES = ("s", "m", "l")
METRIC = "MNIST-CNN-FD"


def finish(recipe: str, out: Path, overrides: list[str]) -> dict[str, dict]:
    """The rows of a run's final table, after the run if it is not complete."""
    table = out / "metrics.json"
    if not table.is_file():
        status = run.main([recipe, f"output_dir={out}", "resume_from_checkpoint=latest", *overrides])
        if status or not table.is_file():
            sys.exit(status or f"{recipe} was stopped; the same command goes on with it")
    return json.loads(table.read_text())


def measure(size: str, out: Path, teacher: list[str], student: list[str]) -> dict:
    """Parameters and Fréchet distances of one size."""
    overrides = [f"teacher={out / f'teacher-{size}'}", *student]
    finish(f"recipes/scaling/teacher-{size}.yaml", out / f"teacher-{size}", teacher)
    rows = finish("recipes/scaling.yaml", out / f"student-{size}", overrides)
    networks = planned_networks(load_recipe("recipes/scaling.yaml", parse_overrides(overrides)))
    distances = {title: row[METRIC] for title, row in rows.items()}
    reference = next(distance for title, distance in distances.items() if title.startswith("teacher"))
    students = {title.split(", ")[1]: distance for title, distance in distances.items() if title.startswith("this run")}
    return {
        "parameters": networks.trained(), "teacher": reference, "students": students,
        "ratios": {steps: distance / reference for steps, distance in students.items()},
    }  # fmt: skip


def markdown(results: dict[str, dict]) -> str:
    steps = list(next(iter(results.values()))["ratios"])
    lines = [
        "| size | parameters | teacher | " + " | ".join(f"student, {n}" for n in steps) + " | "
        + " | ".join(f"ratio, {n}" for n in steps) + " |",
        "|---" * (3 + 2 * len(steps)) + "|",
    ]  # fmt: skip
    for size, row in results.items():
        cells = [size, f"{row['parameters'] / 1e6:.2f}M", f"{row['teacher']:.2f}"]
        cells += [f"{row['students'][n]:.2f}" for n in steps] + [f"{row['ratios'][n]:.2f}" for n in steps]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    sizes = [row["parameters"] for row in results.values()]
    for steps in next(iter(results.values()))["ratios"]:
        axes.plot(sizes, [row["ratios"][steps] for row in results.values()], marker="o", label=steps)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="parameters", ylabel=f"{METRIC} of student / of teacher")
    axes.set_xticks(sizes, [f"{size / 1e6:.2f}M" for size in sizes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--teacher", nargs="*", default=[], metavar="key=value", help="recipe values of every teacher")
    parser.add_argument("--student", nargs="*", default=[], metavar="key=value", help="recipe values of every student")
    options = parser.parse_args(arguments)
    results = {size: measure(size, options.out, options.teacher, options.student) for size in options.sizes}
    text = markdown(results)
    write_atomically(options.out / "scaling.json", lambda path: path.write_text(json.dumps(results, indent=2)))
    write_atomically(options.out / "scaling.md", lambda path: path.write_text(text + "\n"))
    write_atomically(options.out / "scaling.png", lambda path: plot(results, path))
    print(text)


if __name__ == "__main__":
    main()
