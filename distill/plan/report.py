"""What a whole recipe costs: FLOPs and memory of a step, hours, and samples against the teacher."""

import math
from dataclasses import dataclass
from statistics import NormalDist, mean

from distill.parallel import check_processes
from distill.plan.memory import GB, USABLE, Option, options, what_would_fit
from distill.plan.networks import planned_networks
from distill.plan.passes import Passes
from distill.recipe import Recipe
from distill.sampling import count_evaluations
from distill.trainer import uses_derivative

# Dense peaks of an A100 with 80 GB: in bf16, and in fp32 as PyTorch computes it by default.
TFLOPS = {"bf16": 312.0, "no": 19.5}


@dataclass
class Hardware:
    """What a plan is made for."""

    gpus: int = 1
    memory_gb: float = 80.0  # of each
    utilization: float = 0.35  # share of the peak that training reaches
    tflops: float | None = None  # peak of each; null: an A100's in the recipe's precision

    def check(self) -> None:
        for name, value in (("gpus", self.gpus), ("gpu-memory", self.memory_gb), ("gpu-tflops", self.tflops)):
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be positive, got {value:g}")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"--utilization must be above 0 and at most 1, got {self.utilization:g}")


def plan(recipe: Recipe, hardware: Hardware) -> dict:
    """What a recipe costs, as plain values; ``distill plan --json`` prints them.

    Raises:
        FileNotFoundError, ValueError: as :func:`planned_networks` and :class:`Passes`.
        ValueError: so many GPUs cannot train the recipe.
    """
    hardware.check()
    check_processes(recipe, hardware.gpus)
    networks = planned_networks(recipe)
    passes = Passes(recipe, networks, gpu=True, processes=hardware.gpus)
    flops = step_flops(passes)
    available = USABLE * hardware.memory_gb * GB
    return {
        "objective": recipe.objective,
        "network": type(networks.student.native).__name__,
        "parameters": sum(p.numel() for p in networks.student.parameters()),
        "trained parameters": networks.trained(),
        "frozen parameters": networks.frozen(),
        "assumed": networks.assumed,
        "hardware": {
            "gpus": hardware.gpus, "GB a GPU": hardware.memory_gb, "GB that can be used": available / GB,
            "TFLOPS a GPU": hardware.tflops or TFLOPS[recipe.mixed_precision], "utilization": hardware.utilization,
        },
        "flops an image": flops,
        "memory": [memory_row(way, recipe, available) for way in options(passes, hardware.gpus)],
        "fits": what_would_fit(passes, available, hardware.gpus),
        "time": duration(recipe, sum(flops.values()), hardware),
        "sampling": sampling_costs(recipe, passes),
    }  # fmt: skip


def segment_share(recipe: Recipe) -> float:
    """The share of all samples of a training that learn from segments."""
    s = recipe.segments
    if s is None:
        return 0.0
    below = 1.0 if s.below >= math.pi / 2 else 0.0
    if 0 < s.below < math.pi / 2:
        below = NormalDist(recipe.p_mean, recipe.p_std).cdf(math.log(recipe.sigma_data * math.tan(s.below)))
    return s.everywhere_share + (1 - s.everywhere_share - s.tangent_share) * below


def passes_per_image(recipe: Recipe) -> dict[str, float]:
    """How often each pass is run for one image of a step, in the mean: ``teacher`` and student (``evaluation``) without
    gradients, ``derivative``, and ``training``, a forward and a backward pass.
    """
    count = dict.fromkeys(("teacher", "evaluation", "derivative", "training"), 0.0)
    if recipe.is_diffusion:
        count["training"] += 1
        count["teacher"] += recipe.objective == "retrofit" or recipe.velocity_teacher is not None
    elif recipe.objective != "vsd":
        on_segments = segment_share(recipe)
        count["training"] += 1
        if not recipe.tangent.shared_primal:
            count["derivative"] += (1 - on_segments) * uses_derivative(recipe)
        count["evaluation"] += on_segments + 2 * (recipe.discrete_steps is not None)
        if recipe.objective == "distillation":
            count["teacher"] += 1 - on_segments + on_segments * (recipe.segments.solver_steps if recipe.segments else 0)
    if recipe.vsd is not None:  # the fake score is a network like the student
        drawing, updates = (mean(recipe.vsd.step_counts) - 1) / 2, recipe.vsd.fake_updates
        share = recipe.vsd.share
        count["teacher"] += share
        count["evaluation"] += share * (drawing + 1 + updates * (drawing + 1))
        count["training"] += share * (1 + updates)
    return count


def step_flops(passes: Passes) -> dict[str, float]:
    """FLOPs of a step for an image, by what they are spent on. Averages and the optimizer are left out."""
    count, forward = passes_per_image(passes.recipe), passes.student_evaluation.flops
    found = {"teacher": 0.0, "derivative": 0.0, "evaluations without gradient": count["evaluation"] * forward}
    if count["teacher"]:
        found["teacher"] = count["teacher"] * passes.teacher_evaluation.flops
    if count["derivative"]:
        found["derivative"] = count["derivative"] * passes.derivative.flops
    found["forward"] = count["training"] * forward
    found["backward"] = count["training"] * passes.training.flops - found["forward"]
    if passes.shared_primal:  # the forward of the loss has a tangent
        found["derivative"] = passes.derivative.flops - forward
        found["backward"] -= found["derivative"]
    return found


def memory_row(way: Option, recipe: Recipe, available: float) -> dict:
    """One option as plain values, in GB."""
    batch = max(1, recipe.train_batch_size // way.devices)
    total = way.memory.total(batch)
    return {
        "option": way.name, **{name: size / GB for name, size in way.memory.state.items()},
        "activations": way.memory.activations(batch) / GB, "total": total / GB, "fits": total <= available,
        "largest batch": way.memory.largest_batch(available),
    }  # fmt: skip


def duration(recipe: Recipe, flops: float, hardware: Hardware) -> dict[str, float]:
    """How long a step and the training take, without validations; FLOPs are those of one image."""
    images = recipe.train_batch_size * recipe.gradient_accumulation_steps
    rate = hardware.utilization * (hardware.tflops or TFLOPS[recipe.mixed_precision]) * 1e12
    seconds = images * flops / hardware.gpus / rate
    hours = seconds * recipe.max_train_steps / 3600
    return {
        "images a step": images, "flops a step": images * flops, "steps": recipe.max_train_steps, "seconds a step": seconds,
        "hours": hours, "GPU-hours": hours * hardware.gpus,
    }  # fmt: skip


def sampling_costs(recipe: Recipe, passes: Passes) -> dict[str, dict[str, float]]:
    """Network evaluations and FLOPs of one sample, of the teacher by Heun's method and of the student; of a network that is
    to be a teacher, its own.
    """
    e, student = recipe.evaluation, passes.student_evaluation.flops
    teacher = passes.teacher_evaluation.flops if recipe.needs_velocity else student
    evaluations = count_evaluations(max(e.teacher_steps, 1))
    title = f"{'trained network' if recipe.is_diffusion else 'teacher'}, {max(e.teacher_steps, 1)} Heun steps"
    found = {title: {"evaluations": evaluations, "flops": evaluations * teacher}}
    if not recipe.is_diffusion:
        for n in e.num_inference_steps:
            found[f"student, {n} step{'s' * (n > 1)}"] = {"evaluations": n, "flops": n * student}
    whole = found[title]["flops"]
    return {name: {**row, "share": row["flops"] / whole} for name, row in found.items()}


def as_text(values: dict) -> str:
    """A plan for people."""
    h, time = values["hardware"], values["time"]
    trained = "" if values["trained parameters"] == values["parameters"] else f", {values['trained parameters']:,} trained"
    lines = [
        f"{values['objective']}: {values['network']}, {values['parameters']:,} parameters{trained}; "
        f"{values['frozen parameters']:,} frozen",
        *(f"assumed: {sentence}" for sentence in values["assumed"]),
        "",
        *table(["FLOPs of a step", "an image", "share"], flops_rows(values["flops an image"])),
        "",
        f"memory of each of {h['gpus']} GPU{'s' * (h['gpus'] > 1)} in GB, of {h['GB a GPU']:g} GB of which "
        f"{h['GB that can be used']:.1f} can be used",
        *table(*memory_table(values["memory"])),
        f"what fits: {'the recipe as it is' if values['memory'][0]['fits'] else values['fits']}",
        "",
        f"{time['images a step']:,} images a step, {si(time['flops a step'])}FLOPs; at {h['utilization']:.0%} of "
        f"{h['TFLOPS a GPU']:g} TFLOPS a GPU {time['seconds a step']:.3g} s a step",
        f"{time['steps']:,} steps: {time['hours']:,.1f} hours, {time['GPU-hours']:,.1f} GPU-hours",
        "",
        *table(["one sample", "evaluations", "FLOPs", "share"], [
            [name, str(row["evaluations"]), si(row["flops"]), f"{row['share']:.1%}"]
            for name, row in values["sampling"].items()
        ]),
    ]  # fmt: skip
    return "\n".join(lines)


def flops_rows(flops: dict[str, float]) -> list[list[str]]:
    total = sum(flops.values())
    rows = [[name, si(value), f"{value / total:.0%}"] for name, value in flops.items() if value]
    return [*rows, ["total", si(total), ""]]


def memory_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; columns that no option has are left out."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("option", "fits")]
    names.sort(key=("activations", "total", "largest batch").count)  # these last
    cells = [
        [row["option"], *(f"{row[n]:,}" if n == "largest batch" else f"{row.get(n, 0):.3g}" for n in names)] for row in rows
    ]
    return ["option", *names], cells


def si(value: float) -> str:
    """``1.2 T`` for 1.2e12."""
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g} "


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table with aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    aligned = [f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths)]
    return ["  ".join(aligned).format(*row).rstrip() for row in (header, *rows)]
