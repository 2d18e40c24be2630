"""A recipe: one experiment as checked, typed values. YAML in, dataclasses out; anything unknown is a clear error."""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from distill.device import PRECISIONS
from distill.schedule import INTERMEDIATE_TIMES, student_times

# Of a recipe's file, and of its values with every alias written out.
MAX_BYTES, MAX_CHARACTERS = 100_000, 1_000_000
MAX_NUMBER = 10**300  # what a float can hold, and infinity not
OBJECTIVES = ("diffusion", "distillation", "training", "retrofit", "vsd")


@dataclass
class NetworkConfig:
    """A network to be trained from scratch (objective ``diffusion`` only)."""

    name: str  # a registered network, such as SongUNet or SiT
    config: dict  # its constructor arguments
    parameterization: str | dict = "EDM"  # a preset of teachers, or the fields of teachers.Parameterization
    label_format: str = "index"


@dataclass
class DataConfig:
    """Where training images come from."""

    source: str  # "mnist" (bundled), "teacher", a parquet file, an image folder, cached latents, or a hub id
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = "label"  # null: no labels
    prompts: str | None = None  # a folder of distill precompute prompts, for a network of texts; row i is image i's
    num_teacher_samples: int = 10_000  # for source "teacher": drawn once, cached on disk
    teacher_steps: int = 18  # Heun steps (18 = 35 evaluations) of those samples
    num_workers: int = 0


@dataclass
class TangentConfig:
    """How the tangent ``g`` becomes a target (sCM, section 4.2). Each part can be switched off alone."""

    normalization: str = "rms"  # "rms" or "l2": g / (norm(g) + c), they differ by sqrt(D); "clip": to [-c, c]; "none"
    constant: float = 0.1  # c
    warmup_steps: int = 1000  # r goes 0 -> 1 over this many steps; 0: no warm-up
    rearrangement: bool = True  # false: differentiate first, multiply by cos t sin t afterwards
    shared_primal: bool = False  # one forward pass for the loss and the derivative: less work, little more memory
    flash_attention: bool = False  # attention's derivative by jvp_flash_attention's Triton kernel (a GPU, bf16)


@dataclass
class SegmentConfig:
    """Targets from the far end of a stretch of the teacher's PF-ODE in place of the tangent (distillation only)."""

    max_length: float = 4.0  # in log tan t; the length of each is uniform from 0 to this
    solver_steps: int = 5  # steps of the teacher along it, one evaluation each
    everywhere_share: float = 0.0  # of the training, from its start: segments at every t
    below: float = 1.0  # afterwards only at TrigFlow times below this, and the tangent above
    tangent_share: float = 0.0  # of the training, at its end: Algorithm 1 alone, of the network itself

    def are_over(self, progress: float) -> bool:
        """Whether Algorithm 1 is alone when this share of the training is done."""
        return progress >= 1 - self.tangent_share

    def covers(self, t, progress: float):
        """Which of the times ``t``, a tensor ``(B,)``, are on segments when this share of the training is done."""
        return t < (math.inf if progress < self.everywhere_share else self.below)


@dataclass
class OptimizerConfig:
    name: str = "radam"  # radam, adam or adamw
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None  # null: no clipping
    lr_scheduler: str = "constant"  # constant, linear (to zero) or inverse_sqrt
    lr_warmup_steps: int = 0
    lr_reference_steps: int = 35_000  # inverse_sqrt: lr / sqrt(max(step / lr_reference_steps, 1))


@dataclass
class LoRAConfig:
    """Low-rank adapters, the only part of the student that is trained (:mod:`distill.lora`)."""

    rank: int = 16
    alpha: float = 16.0  # an adapter's contribution is multiplied by alpha / rank
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # ends of names
    dropout: float = 0.0  # of the adapters' inputs


@dataclass
class VSDConfig:
    """Variational score distillation: alone (objective ``vsd``), or added to the consistency loss (``distillation``)."""

    weight: float = 1.0  # of its loss beside the consistency loss
    weighting: str = "adaptive"  # adaptive (sCM, appendix C) or dmd: over mean |x - D_teacher|
    p_mean: float = 0.4  # noise at which teacher and fake score are compared: log(sigma_data tan t) ~ N(p_mean, p_std^2)
    p_std: float = 2.0
    fake_p_mean: float = -0.8  # noise of the fake score's own training
    fake_p_std: float = 1.6
    fake_updates: int = 1  # of the fake score before each of the student; DMD2 has 5
    fake_learning_rate: float | None = None  # null: that of the student; everything else is as in optimizer
    steps: int | list[int] = 1  # in which the student draws the samples that are compared; of several, one at random
    share: float = 1.0  # of the training, at its end, that VSD is part of; before it the consistency loss is alone

    def has_begun(self, progress: float) -> bool:
        """Whether VSD is part of the training when this share of it is done."""
        return progress >= 1 - self.share

    @property
    def step_counts(self) -> list[int]:
        return self.steps if isinstance(self.steps, list) else [self.steps]


@dataclass
class EMAConfig:
    """One exponential moving average: exactly one of the two widths."""

    half_life_images: float | None = None  # images after which a weight's share has halved (EDM)
    sigma_rel: float | None = None  # relative width of a power-function profile (EDM2, arXiv 2312.02696)


@dataclass
class EvaluationConfig:
    features: str | None = None  # a feature extractor; null: MNIST-CNN for data: mnist, else pixels
    data: str | None = None  # what samples are scored against; null: the training images, if there are any
    num_samples: int = 2_000
    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 4])  # 1 to 8 each
    teacher_steps: int = 18  # Heun steps; 0 leaves the teacher out
    batch_size: int = 250
    validation_samples: int = 500  # samples in 2 steps whose Fréchet distance is logged at every validation; 0: none
    search_samples: int = 0  # samples per trial of a search for better intermediate sampling times; 0: the defaults stay
    also: list[str] = field(default_factory=list)  # bundled students to show in the final grid and table


@dataclass
class Recipe:
    """One training run. ``docs/recipes.md`` explains every key."""

    # diffusion, distillation (sCD), training (sCT), retrofit (a smooth time embedding for a teacher) or vsd (a baseline)
    objective: str
    output_dir: str
    sigma_data: float
    max_train_steps: int
    train_batch_size: int  # per accumulation step, over all processes
    sample_shape: list[int]  # [C, H, W], of videos [C, F, H, W]
    data: DataConfig  # a string is short for its source
    num_classes: int | None = None
    teacher: str | None = None  # bundled name, file, folder or hf://owner/name that the run starts from
    network: NetworkConfig | None = None
    seed: int = 0
    # Time proposal: log(sigma_data tan t) ~ N(p_mean, p_std^2).
    p_mean: float = -1.0
    p_std: float = 1.4
    # Guidance of the teacher: a scale to bake in, or [low, high] to make the scale an input of the student.
    guidance_scale: float | list[float] = 1.0
    guidance_interval: list[float] | None = None  # TrigFlow times [low, high]
    guidance_teacher: str | None = None  # the network to guide away from; null: the teacher with its null class
    # The student's sampling times after t_max by number of steps, {4: [1.1, 0.8, 0.4]}, where the defaults are not wanted.
    intermediate_times: dict[int, list[float]] = field(default_factory=dict)
    tangent: TangentConfig = field(default_factory=TangentConfig)
    segments: SegmentConfig | None = None
    target_half_life_images: float | None = None  # targets are made by an EMA of the student; null: by the student itself
    adaptive_weighting: bool = True  # learn w(t) (equation 8)
    discrete_steps: int | None = None  # N: discrete-time consistency (appendix E) instead of the JVP
    label_dropout: float = 0.1  # objective diffusion: how often a label becomes the null class
    stable_targets: bool = False  # objective diffusion: targets averaged over the data set (arXiv 2302.00670)
    velocity_teacher: str | None = None  # objective diffusion: the network whose velocity is the target; null: the data's
    student: str | None = None  # distillation, vsd: the network to start from, as a retrofitted one; null: the teacher's
    lora: LoRAConfig | None = None  # consistency objectives, vsd: train adapters of the teacher only; null: all weights
    qk_norm: bool = False  # retrofit: also normalise the queries and keys of a transformer
    max_velocity_error: float = 0.01  # retrofit: train until the mean squared velocity error, relative to F's, is this low
    dropout: float = 0.0
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"  # no or bf16
    distributed: str | None = None  # several processes: ddp, fsdp or hsdp; null: what accelerate was configured for
    compile: str | None = None  # a backend of torch.compile, as inductor, for the networks and the derivative
    activation_checkpointing: bool = False  # recompute each block in the backward pass in place of keeping its activations
    cpu_offload: bool = False  # fsdp and hsdp: weights, gradients, averages and optimizer in the memory of the CPU
    vsd: VSDConfig | None = None  # vsd, and distillation, to whose loss it is added
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: list[EMAConfig] = field(default_factory=lambda: [EMAConfig(half_life_images=500_000)])
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None  # latest, or a checkpoint folder
    logging_steps: int = 10
    validation_steps: int = 250  # sample grid and endpoint error
    max_nonfinite_steps: int = 20  # skipped steps in a row before the run stops
    report_to: str | None = None  # tensorboard or wandb; the JSONL log is always written
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    notes: str | None = None  # printed by --check, for example that a recipe was never run here

    def sampling_times(self, num_inference_steps: int) -> list[float]:
        """At which the student samples in so many steps, in radians."""
        return student_times(num_inference_steps, self.sigma_data, self.intermediate_times.get(num_inference_steps))

    @property
    def needs_velocity(self) -> bool:
        """Whether the recipe's ``teacher`` must have a PF-ODE velocity to learn from, as a student has not."""
        return self.objective in ("distillation", "retrofit", "vsd")

    def averages_targets(self, step: int) -> bool:
        """Whether the targets of this step come from the average, and not from the network itself."""
        over = self.segments is not None and self.segments.are_over(step / self.max_train_steps)
        return self.target_half_life_images is not None and not over

    @property
    def is_conditional(self) -> bool:
        """Whether the network is told a class or a prompt."""
        return self.num_classes is not None or self.data.prompts is not None

    @property
    def is_diffusion(self) -> bool:
        """Whether a velocity is learned, for a network that is a teacher afterwards, not a consistency function."""
        return self.objective in ("diffusion", "retrofit")


CHOICES = {
    "objective": OBJECTIVES,
    "mixed_precision": PRECISIONS,
    "compile": (None, "inductor", "aot_eager"),
    "distributed": (None, "ddp", "fsdp", "hsdp"),
    "report_to": (None, "tensorboard", "wandb"),
    "tangent.normalization": ("rms", "l2", "clip", "none"),
    "optimizer.name": ("radam", "adam", "adamw"),
    "optimizer.lr_scheduler": ("constant", "linear", "inverse_sqrt"),
}
POSITIVE = (
    "sigma_data", "max_train_steps", "train_batch_size", "p_std", "gradient_accumulation_steps", "checkpointing_steps",
    "checkpoints_total_limit", "logging_steps", "validation_steps", "max_nonfinite_steps", "optimizer.learning_rate",
    "optimizer.epsilon", "optimizer.lr_reference_steps", "tangent.constant", "data.num_teacher_samples",
    "data.teacher_steps", "evaluation.batch_size", "max_velocity_error",
)  # fmt: skip
NOT_NEGATIVE = (
    "tangent.warmup_steps", "optimizer.lr_warmup_steps", "optimizer.weight_decay", "data.num_workers",
    "evaluation.teacher_steps", "evaluation.validation_samples", "evaluation.search_samples",
)  # fmt: skip
SHARES = ("dropout", "label_dropout", "optimizer.beta1", "optimizer.beta2")  # at least 0, below 1
MINIMUM_SAMPLES = 50  # of any score
MAX_STEPS = max(INTERMEDIATE_TIMES)


def recipe_path(name: str | Path, kind: str = "recipe") -> Path:
    """The file of a recipe: a path, or the name of a recipe that ships with the package (``recipes/mnist.yaml``).

    Args:
        kind: ``recipe``, or ``comparison`` for what ``distill compare`` takes.

    Raises:
        FileNotFoundError: naming those that ship with the package.
    """
    path = Path(name)
    if path.is_file():
        return path
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent / "recipes"):
        relative = Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
        if (folder / relative).is_file():
            return folder / relative
        if folder.is_dir():
            found = sorted(p.relative_to(folder) for p in folder.rglob("*.yaml"))
            shipped = [str(p) for p in found if (p.parts[0] == "compare") == (kind == "comparison")]
            stems = {str(Path(file).with_suffix("")): file for file in shipped}
            near = difflib.get_close_matches(str(relative.with_suffix("")), stems, n=1)
            hint = f"did you mean {stems[near[0]]}?" if near else f"{kind}s that ship: {', '.join(shipped)}"
            raise FileNotFoundError(f"no {kind} {str(name)!r}; {hint}")
    raise FileNotFoundError(f"no {kind} {str(name)!r}")


def load_recipe(source: str | Path, overrides: dict | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, or the name of one that ships with the package. ``base: other.yaml`` inherits from a
            recipe beside it.
        overrides: values by dotted key, such as ``{"optimizer.learning_rate": 1e-4}``.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: a comparison, an unknown key, a wrong type, or a value that is not allowed; one sentence each.
    """
    path = recipe_path(source)
    values = read_yaml(path)
    if "models" in values and "objective" not in values:
        raise ValueError(f"{path} is a comparison, which trains nothing: run distill compare {path}")
    for key, value in (overrides or {}).items():
        set_dotted(values, key, {"source": value} if key == "data" and isinstance(value, str) else value)
    return parse_recipe(values, str(path))


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> dict:
    """The recipe's values over those of its base; ``heirs`` are the recipes that asked for it as theirs."""
    if path.resolve() in heirs:
        raise ValueError(f"{path} is, through base, its own base recipe")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES:,} bytes, which no recipe is")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of recipe keys, got {type(values).__name__}")
    expand_data(values)
    base = values.pop("base", None)
    if base is None:
        return values
    if not (path.parent / str(base)).is_file():
        raise FileNotFoundError(f"{path}: base recipe {base!r} does not exist beside it")
    return merge(read_yaml(path.parent / base, (*heirs, path.resolve())), values)


def parse_yaml(text: str):
    """Plain values: no tag makes anything else, and aliases cannot multiply them without bounds.

    Raises:
        ValueError: anything else, in one sentence.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None and written_out(node, {}) > MAX_CHARACTERS:
            raise ValueError(f"its aliases stand for more than {MAX_CHARACTERS:,} characters, or for what they are part of")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # the last, of malformed scalars
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def written_out(node: yaml.Node, lengths: dict[int, float]) -> float:
    """Characters of a YAML node when every alias is replaced by what it stands for; infinite for one inside itself."""
    if id(node) not in lengths:
        lengths[id(node)] = math.inf  # until it is known
        parts = node.value if isinstance(node.value, list) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        own = 1 if parts else 1 + len(node.value)
        lengths[id(node)] = own + sum(written_out(child, lengths) for child in children)
    return lengths[id(node)]


def expand_data(values: dict) -> None:
    """``data: mnist`` as ``data: {source: mnist}``, so that a later override of one of its keys keeps the source."""
    if isinstance(values.get("data"), str):
        values["data"] = {"source": values["data"]}


def merge(base: dict, values: dict) -> dict:
    """``values`` over ``base``; mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def set_dotted(values: dict, key: str, value) -> None:
    # Numbers of steps are keys too, in intermediate_times.
    *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    for parent in parents:
        values[parent] = dict(values[parent]) if isinstance(values.get(parent), dict) else {}
        values = values[parent]
    values[last] = value


def parse_overrides(arguments: list[str]) -> dict:
    """``["optimizer.learning_rate=1e-4", ...]`` as a mapping with YAML values."""
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"override {argument!r} must look like key=value")
        try:
            value = parse_yaml(text)
        except ValueError:
            raise ValueError(f"override {argument!r}: {text!r} is not a YAML value") from None
        overrides[key] = number(value) if isinstance(value, str) else value
    return overrides


def number(text: str):
    """YAML 1.1 reads ``1e-4`` as a string; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_recipe(values: dict, where: str) -> Recipe:
    """Check a mapping of plain values and build the :class:`Recipe`; errors name ``where`` and the key."""
    values = dict(values)
    expand_data(values)
    recipe = parse_dataclass(Recipe, values, where, "")
    for key, allowed in CHOICES.items():
        value = get_dotted(recipe, key)
        if value not in allowed:
            names = ", ".join("null" if a is None else str(a) for a in allowed)
            raise ValueError(f"{where}: {key} is {shown(value)}; allowed: {names}")
    for key in POSITIVE:
        if not get_dotted(recipe, key) > 0:
            raise ValueError(f"{where}: {key} must be positive, got {get_dotted(recipe, key)}")
    for key in NOT_NEGATIVE:
        if get_dotted(recipe, key) < 0:
            raise ValueError(f"{where}: {key} must be 0 or more, got {get_dotted(recipe, key)}")
    for key in SHARES:
        if not 0 <= get_dotted(recipe, key) < 1:
            raise ValueError(f"{where}: {key} must be at least 0 and below 1, got {get_dotted(recipe, key)}")
    check_consistency(recipe, where)
    return recipe


def check_consistency(recipe: Recipe, where: str) -> None:
    """Rules between keys."""
    if recipe.objective != "retrofit" and recipe.qk_norm:
        raise ValueError(f"{where}: qk_norm belongs to objective retrofit; remove it")
    if recipe.objective == "retrofit" and recipe.network is not None:
        raise ValueError(f"{where}: objective retrofit changes its teacher's network; remove network")
    if recipe.objective not in ("distillation", "vsd") and recipe.student is not None:
        raise ValueError(f"{where}: student belongs to objectives distillation and vsd; remove it")
    if recipe.objective == "diffusion" and (recipe.network is None) == (recipe.teacher is None):
        raise ValueError(
            f"{where}: objective diffusion needs exactly one of network (trained from scratch) and teacher (continued)"
        )
    if recipe.objective != "diffusion" and recipe.teacher is None:
        raise ValueError(f"{where}: objective {recipe.objective} needs the key teacher")
    for key in ("stable_targets", "velocity_teacher"):
        if recipe.objective != "diffusion" and getattr(recipe, key):
            raise ValueError(f"{where}: {key} belongs to objective diffusion; remove it")
    if recipe.stable_targets and recipe.velocity_teacher:
        raise ValueError(f"{where}: stable_targets and velocity_teacher are two sources of one target; remove one of them")
    if recipe.stable_targets and recipe.data.prompts:
        raise ValueError(f"{where}: stable_targets average over classes, and not over prompts; remove it")
    if recipe.objective == "training" and recipe.guidance_scale != 1.0:
        raise ValueError(f"{where}: consistency training has no teacher to guide; remove guidance_scale")
    if recipe.is_diffusion and recipe.guidance_scale != 1.0:
        raise ValueError(f"{where}: guidance_scale belongs to objective distillation; remove it")
    if recipe.discrete_steps is not None and recipe.discrete_steps < 2:
        raise ValueError(f"{where}: discrete_steps must be 2 or more, or null for continuous time")
    if not 0 <= recipe.seed < 2**63:
        raise ValueError(f"{where}: seed must be from 0 to 2^63 - 1, got {recipe.seed}")
    check_targets(recipe, where)
    check_intermediate_times(recipe, where)
    check_lora(recipe, where)
    check_vsd(recipe, where)
    interval = recipe.guidance_interval
    if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
        raise ValueError(f"{where}: guidance_interval must be [low, high], got {interval}")
    if interval is not None and recipe.guidance_scale == 1.0:
        raise ValueError(f"{where}: guidance_interval needs a guidance_scale other than 1")
    if recipe.guidance_teacher is not None and recipe.guidance_scale == 1.0:
        raise ValueError(f"{where}: guidance_teacher needs a guidance_scale other than 1")
    if isinstance(recipe.guidance_scale, list) and not (
        len(recipe.guidance_scale) == 2 and recipe.guidance_scale[0] < recipe.guidance_scale[1]
    ):
        raise ValueError(f"{where}: guidance_scale must be a number or [low, high], got {recipe.guidance_scale}")
    if recipe.data.source == "teacher" and recipe.is_diffusion:
        raise ValueError(f"{where}: data: teacher belongs to the consistency objectives, not to {recipe.objective}")
    for i, ema in enumerate(recipe.ema):
        if (ema.half_life_images is None) == (ema.sigma_rel is None):
            raise ValueError(f"{where}: ema[{i}] needs exactly one of half_life_images and sigma_rel")
        if ema.half_life_images is not None and ema.half_life_images <= 0:
            raise ValueError(f"{where}: ema[{i}].half_life_images must be positive, got {ema.half_life_images}")
    if not recipe.ema:
        raise ValueError(f"{where}: ema needs at least one entry; samples are drawn with the first")
    e = recipe.evaluation
    if not e.num_inference_steps or any(not 1 <= n <= MAX_STEPS for n in e.num_inference_steps):
        raise ValueError(f"{where}: evaluation.num_inference_steps must be 1 to {MAX_STEPS}, got {e.num_inference_steps}")
    if recipe.is_diffusion and e.teacher_steps == 0:
        raise ValueError(f"{where}: evaluation.teacher_steps must be 1 or more: {recipe.objective} trains a teacher")
    if e.num_samples < MINIMUM_SAMPLES:
        raise ValueError(f"{where}: evaluation.num_samples must be at least {MINIMUM_SAMPLES}, got {e.num_samples}")
    for key in ("validation_samples", "search_samples"):
        if 0 < getattr(e, key) < MINIMUM_SAMPLES:
            raise ValueError(f"{where}: evaluation.{key} must be 0 or at least {MINIMUM_SAMPLES}, got {getattr(e, key)}")


def check_intermediate_times(recipe: Recipe, where: str) -> None:
    """Numbers of steps that there are, with as many times as they need."""
    if recipe.is_diffusion and recipe.intermediate_times:
        raise ValueError(f"{where}: intermediate_times are a student's; remove them")
    for steps in recipe.intermediate_times:
        try:
            recipe.sampling_times(steps)
        except ValueError as error:
            raise ValueError(f"{where}: intermediate_times[{steps}]: {error}") from None


def check_lora(recipe: Recipe, where: str) -> None:
    """Rules for adapters."""
    lora = recipe.lora
    if lora is None:
        return
    if recipe.is_diffusion:
        raise ValueError(f"{where}: lora belongs to the consistency objectives, not to {recipe.objective}; remove it")
    if lora.rank < 1 or not lora.alpha > 0 or not 0 <= lora.dropout < 1:
        raise ValueError(f"{where}: lora needs a rank of at least 1, a positive alpha, and a dropout of at least 0, below 1")
    if not lora.target_modules:
        raise ValueError(f"{where}: lora.target_modules must name at least one module")


def check_targets(recipe: Recipe, where: str) -> None:
    """Rules for segments and for what makes the targets."""
    segments, half_life = recipe.segments, recipe.target_half_life_images
    if recipe.tangent.shared_primal:
        check_shared_primal(recipe, where)
    if recipe.tangent.flash_attention:
        check_flash_attention(recipe, where)
    if half_life is not None and (half_life <= 0 or recipe.is_diffusion or recipe.objective == "vsd"):
        raise ValueError(f"{where}: target_half_life_images must be positive, and belongs to the consistency objectives")
    if segments is None:
        return
    if recipe.objective != "distillation" or recipe.discrete_steps is not None:
        raise ValueError(f"{where}: segments belong to objective distillation without discrete_steps; remove them")
    if half_life is None:
        raise ValueError(f"{where}: segments need target_half_life_images, the average that their targets come from")
    if segments.max_length <= 0 or segments.solver_steps < 1:
        raise ValueError(f"{where}: segments need a positive max_length and solver_steps of at least 1")
    if not 0 <= segments.below <= math.pi / 2:
        raise ValueError(f"{where}: segments.below must be from 0 to pi/2 radians, got {segments.below}")
    if not 0 <= segments.everywhere_share <= 1:
        raise ValueError(f"{where}: segments.everywhere_share must be from 0 to 1, got {segments.everywhere_share}")
    left = 1 - segments.everywhere_share
    if not 0 <= segments.tangent_share <= left + 1e-9:
        raise ValueError(
            f"{where}: segments.tangent_share must be from 0 to {left:g}, what everywhere_share leaves, "
            f"got {segments.tangent_share}"
        )


def check_shared_primal(recipe: Recipe, where: str) -> None:
    """One forward pass can serve both only where the derivative is of the very network, at the very samples, of the loss."""
    for key in ("segments", "target_half_life_images", "discrete_steps"):
        if getattr(recipe, key) is not None:
            raise ValueError(f"{where}: tangent.shared_primal needs Algorithm 1 as it is; remove {key}")
    if recipe.is_diffusion or recipe.objective == "vsd":
        raise ValueError(f"{where}: tangent.shared_primal belongs to the consistency objectives; remove it")
    if recipe.activation_checkpointing:
        raise ValueError(f"{where}: tangent.shared_primal does not go with activation_checkpointing; remove one of them")


def check_flash_attention(recipe: Recipe, where: str) -> None:
    """The kernel is for derivatives in half precision, without a graph and outside compiled code."""
    if recipe.is_diffusion or recipe.objective == "vsd":
        raise ValueError(f"{where}: tangent.flash_attention belongs to the consistency objectives; remove it")
    if recipe.mixed_precision != "bf16":
        raise ValueError(f"{where}: tangent.flash_attention needs mixed_precision: bf16, in fp32 it would round to TF32")
    for key in ("tangent.shared_primal", "compile", "discrete_steps"):
        if get_dotted(recipe, key) not in (None, False):
            raise ValueError(f"{where}: tangent.flash_attention does not go with {key}; remove one of them")


def check_vsd(recipe: Recipe, where: str) -> None:
    """Rules for the section ``vsd``."""
    vsd = recipe.vsd
    if vsd is None:
        if recipe.objective == "vsd":
            raise ValueError(f"{where}: objective vsd needs the section vsd (vsd: {{}} for its defaults)")
        return
    if recipe.objective not in ("distillation", "vsd"):
        raise ValueError(f"{where}: vsd belongs to objectives vsd and distillation, which it is added to; remove it")
    for key in ("weight", "p_std", "fake_p_std", "fake_learning_rate"):
        value = getattr(vsd, key)
        if value is not None and value <= 0:
            raise ValueError(f"{where}: vsd.{key} must be positive, got {value}")
    if vsd.weighting not in ("adaptive", "dmd"):
        raise ValueError(f"{where}: vsd.weighting is {vsd.weighting!r}; allowed: adaptive, dmd")
    if vsd.fake_updates < 1:
        raise ValueError(f"{where}: vsd.fake_updates must be at least 1, got {vsd.fake_updates}")
    if not 0 < vsd.share <= 1:
        raise ValueError(f"{where}: vsd.share must be above 0 and at most 1, got {vsd.share}")
    if recipe.objective == "vsd" and vsd.weight != 1:
        raise ValueError(f"{where}: vsd.weight is against sCD's loss, of objective distillation; remove it")
    if recipe.objective == "vsd" and vsd.share < 1:
        raise ValueError(f"{where}: vsd.share belongs to objective distillation: before VSD nothing would train; remove it")
    if not vsd.steps or not all(1 <= steps <= MAX_STEPS for steps in vsd.step_counts):
        raise ValueError(f"{where}: vsd.steps must be 1 to {MAX_STEPS}, or a list of such numbers, got {vsd.steps}")


def get_dotted(recipe: Recipe, key: str):
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def parse_dataclass(cls, values, where: str, prefix: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.')} must be a mapping, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = section_keys(hints, str(key)) or [prefix + k for k in difflib.get_close_matches(str(key), hints, n=1)]
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(hints)}"
            raise ValueError(f"{where}: unknown key {prefix}{key}; {hint}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ValueError(f"{where}: the key {prefix}{f.name} is missing")
    return cls(**{k: parse_value(hints[k], v, where, prefix + k) for k, v in values.items()})


def section_keys(hints: dict, key: str) -> list[str]:
    """Dotted keys of sections that hold a key of this very name, such as ``optimizer.learning_rate``."""
    options = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items()}
    sections = {name: next(filter(dataclasses.is_dataclass, kinds), None) for name, kinds in options.items()}
    return [f"{name}.{key}" for name, cls in sections.items() if cls and key in typing.get_type_hints(cls)]


WORDS = {float: "a number", int: "an integer", bool: "true or false", str: "text", dict: "a mapping", type(None): "null"}


def describe(hint) -> str:
    """A type in words: a section is a mapping."""
    if isinstance(hint, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list, each item {describe(*typing.get_args(hint))}"
    if typing.get_origin(hint) is dict:
        return "a mapping of {} to {}".format(*(describe(part) for part in typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return WORDS.get(hint, hint.__name__)


def parse_value(hint, value, where: str, key: str):
    """``value`` as the annotated type ``hint``, or a ``ValueError`` that says what was expected."""
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        section = next(filter(dataclasses.is_dataclass, options), None)
        if section is not None and isinstance(value, dict):
            return parse_value(section, value, where, key)  # its own message says which key is wrong
        for option in options:
            try:
                return parse_value(option, value, where, key)
            except ValueError:
                continue
    elif dataclasses.is_dataclass(hint):
        return parse_dataclass(hint, value, where, key + ".")
    elif typing.get_origin(hint) is list and isinstance(value, list):
        (item,) = typing.get_args(hint)
        return [parse_value(item, v, where, f"{key}[{i}]") for i, v in enumerate(value)]
    elif typing.get_origin(hint) is dict and isinstance(value, dict):
        name, item = typing.get_args(hint)
        keys = [parse_value(name, n, where, f"a key of {key}") for n in value]
        return {n: parse_value(item, v, where, f"{key}[{n}]") for n, v in zip(keys, value.values(), strict=True)}
    elif hint is float and not isinstance(value, bool):
        value = number(value) if isinstance(value, str) else value
        if isinstance(value, int | float) and abs(value) < MAX_NUMBER:
            return float(value)
    elif hint is type(None) and value is None:
        return None
    elif hint is str and value is False:
        return "no"  # YAML 1.1 reads an unquoted `no` as false
    elif hint in (int, str, bool, dict) and type(value) is hint:
        return value
    raise ValueError(f"{where}: {key} must be {describe(hint)}, got {shown(value)}")


def shown(value) -> str:
    """A value in an error message, which it must not fill."""
    huge = isinstance(value, int) and abs(value) > MAX_NUMBER  # Python refuses to write some down
    text = "a number with too many digits" if huge else repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def to_dict(recipe: Recipe) -> dict:
    """Plain values, as written to ``recipe.yaml`` in the run folder."""
    return dataclasses.asdict(recipe)
