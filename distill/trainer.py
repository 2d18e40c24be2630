"""The training loop: one recipe from start, or from a checkpoint, to a trained network."""

import copy
import dataclasses
import hashlib
import importlib.util
import math
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from tqdm import tqdm

from distill import checkpoint as ckpt
from distill.data import StepSampler, recipe_prompts, training_data, training_loader
from distill.device import autocast
from distill.ema import EMA, update_averages
from distill.endpoint import TIMES, EndpointError, VelocityError, rising_at_small_t
from distill.evaluation import Reference, recipe_reference
from distill.jvp import probe_jvp
from distill.log import MetricsLog, Window
from distill.lora import adapters, merged
from distill.model import Model
from distill.noise import BatchGenerator
from distill.objectives.scm import Loss, build_objective
from distill.objectives.stable_targets import StableTargets
from distill.objectives.vsd import VSD, FakeScore
from distill.optimizer import build_optimizer, learning_rate, set_learning_rate
from distill.parallel import Placement, build_accelerator, whole, whole_optimizer_state, whole_state
from distill.prompts import Prompts
from distill.recipe import OptimizerConfig, Recipe, to_dict
from distill.recipe_networks import (
    build_student,
    build_teacher,
    few_images,
    license_of,
    load_pretrained,
    load_velocity_teacher,
    set_dropout,
    teacher_verdicts,
    time_warnings,
)
from distill.sampling import evaluation_mode, generate
from distill.transfer import Readback, to_device
from distill.visual import plot_curves, save_grid
from teachers import Teacher
from teachers.condition import Condition
from teachers.networks import is_registered
from teachers.pretrained import model_config, write_atomically, write_model, write_weights

LARGEST_OUTPUT = 100.0  # rms of F, which is about 1, beyond which a network has diverged
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What follows when a run goes on in another layout.
SAME = "every step has the same images and noise, summed in another order"
CHANGED = {"processes": f"{SAME}, and other dropout masks", "distributed": SAME, "images_per_step": "steps are other steps"}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


def build_stable_targets(data: Dataset, recipe: Recipe, device: torch.device) -> StableTargets:
    """The recipe's training set as targets of the diffusion loss.

    Raises:
        ValueError: a data set too large for the memory.
    """
    if not isinstance(data, TensorDataset):
        raise ValueError(f"stable_targets needs images that fit in memory; {recipe.data.source!r} is latents or too large")
    images, labels = data.tensors
    labels = None if recipe.num_classes is None else labels
    return StableTargets(images.to(device), labels, recipe.num_classes, recipe.sigma_data)


def uses_derivative(recipe: Recipe) -> bool:
    """Whether some step of the recipe differentiates the network along the PF-ODE."""
    segments = recipe.segments
    everywhere = segments is not None and (
        segments.everywhere_share >= 1 or (segments.below >= math.pi / 2 and not segments.tangent_share)
    )
    consistency = recipe.objective in ("distillation", "training")
    return consistency and recipe.discrete_steps is None and not everywhere


def check_tracker(recipe: Recipe) -> None:
    """Raise ``ValueError`` if what the recipe reports to is not installed: accelerate would silently do without."""
    if recipe.report_to and importlib.util.find_spec(recipe.report_to) is None:
        raise ValueError(f"report_to: {recipe.report_to} needs a package: pip install {recipe.report_to}")


def step_seed(seed: int, step: int, rank: int, *part) -> int:
    """The seed of one step's noise or a process' dropout. Nothing is carried over between steps, so resuming is exact."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, (seed, step, rank, *part))).encode()).digest()[:7])


def prepare(
    placement: Placement, network: Teacher, config: OptimizerConfig, objectives: list
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and its optimizer made ready for training, together with what else they train: the weightings of their
    objectives, which are replaced by prepared ones.
    """
    weighted = [objective for objective in objectives if objective.weighting is not None]
    network, optimizer, *weightings = placement.prepare(
        network, lambda parameters: build_optimizer(config, parameters), [objective.weighting for objective in weighted]
    )
    for objective, weighting in zip(weighted, weightings, strict=True):
        objective.weighting = weighting
    return network, optimizer


class FakeNetwork:
    """The fake score of VSD with its optimizer: a copy of the teacher, unguided, that follows the student's samples."""

    def __init__(self, placement: Placement, recipe: Recipe, pretrained: Teacher):
        network = pretrained.student(guidance_embedding=isinstance(recipe.guidance_scale, list))
        set_dropout(network.native, recipe.dropout)
        self.accelerator, self.objective = placement.accelerator, FakeScore(recipe)
        self.prepared, self.optimizer = prepare(placement, network, recipe.optimizer, [self.objective])
        self.network = self.accelerator.unwrap_model(self.prepared, keep_torch_compile=False)
        self.network.train(recipe.dropout > 0)
        own, other = recipe.vsd.fake_learning_rate, recipe.optimizer.learning_rate
        self.relative_learning_rate = 1.0 if own is None else own / other

    def modules(self) -> dict[str, nn.Module]:
        """Every module whose weights a checkpoint holds, by file name."""
        modules = {"fake": self.network.native}
        if self.objective.weighting is not None:
            modules["fake-weighting"] = self.accelerator.unwrap_model(self.objective.weighting)
        return modules


def build_objectives(recipe: Recipe, teacher: Teacher | None, fake: FakeNetwork | None) -> list[tuple]:
    """What the student learns by, each with its weight: the recipe's objective, VSD, or both."""
    vsd = [] if fake is None else [(VSD(recipe, teacher, fake.network), recipe.vsd.weight)]
    if recipe.objective == "vsd":
        return [(vsd[0][0], 1.0)]
    return [(build_objective(recipe, teacher), 1.0), *vsd]


def mean_logs(losses: list[Loss], parts: int) -> dict[str, Tensor]:
    """Means over the parts of a step of what its objectives log, and the sum of their losses."""
    values = {"loss": torch.stack([loss.loss for loss in losses]).sum() / parts}
    for loss in losses:
        for key, value in loss.logs.items():
            values[key] = values.get(key, 0) + value / parts
    return values


class Trainer:
    """Runs a recipe.

    Args:
        recipe: the experiment.
        pretrained: used in place of the recipe's ``teacher``, for a model in memory. It is not changed.

    After :meth:`train`, ``student`` holds the averaged weights of the recipe's first EMA.
    """

    def __init__(self, recipe: Recipe, pretrained: Teacher | None = None):
        self.recipe = recipe
        check_tracker(recipe)
        self.output_dir = Path(recipe.output_dir)
        self.accelerator = build_accelerator(recipe)
        self.placement = Placement(self.accelerator, recipe)
        self.device = self.accelerator.device
        if pretrained is not None and self.placement.rearranges(pretrained):
            pretrained = copy.deepcopy(pretrained)
        torch.manual_seed(recipe.seed)  # of weights that are new
        pretrained = load_pretrained(recipe, pretrained)
        self.prompts: Prompts | None = recipe_prompts(recipe)
        self.teacher = build_teacher(recipe, pretrained)
        network = build_student(recipe, pretrained)
        self.velocity_teacher = load_velocity_teacher(recipe, pretrained)
        for warning in time_warnings(network) if uses_derivative(recipe) else ():
            self.print(warning)
        frozen = self.teacher or self.velocity_teacher
        self.license = license_of(pretrained or frozen)
        guide = None if self.teacher is None else self.teacher.guidance_teacher
        if guide is not None and license_of(guide) != self.license:
            self.license = "other"  # of a student that learns from two networks
        self.fake = None if recipe.vsd is None else FakeNetwork(self.placement, recipe, pretrained)
        if frozen is not None:
            self.placement.place(frozen.eval())
        self.objectives = build_objectives(recipe, frozen, self.fake)
        self.emas = [EMA(network, e.half_life_images, e.sigma_rel) for e in recipe.ema]
        half_life = recipe.target_half_life_images
        self.target = None if half_life is None else EMA(network, half_life)
        for ema in self.averages:
            self.placement.place(ema.network, autocast=ema is self.target)
        self.prepared, self.optimizer = prepare(
            self.placement, network, recipe.optimizer, [objective for objective, _ in self.objectives]
        )
        # The derivative needs the bare network; it keeps the autocast that prepare added.
        self.network = self.accelerator.unwrap_model(self.prepared, keep_torch_compile=False)
        self.network.train(recipe.dropout > 0 or (recipe.lora is not None and recipe.lora.dropout > 0))
        if uses_derivative(recipe):
            probe_jvp(self.network)
        if recipe.compile is not None:
            self.compile_networks()
        self.step = 0
        self.nonfinite = {"in_a_row": 0, "total": 0}
        self.outcome: tuple[int, Readback] | None = None  # of the last step, until it is read
        self.endpoint: EndpointError | None = None
        self.velocity_error: VelocityError | None = None
        self.converged = False
        self.reference: Reference | None = None
        self.endpoint_history: list[dict[float, float]] = []
        self.stop_signal: signal.Signals | None = None  # that this process got
        self.agreed_signal: signal.Signals | None = None  # that any of several processes got, as all of them know
        self.signalled: list[Tensor] = []  # of several processes, the share that got each of STOP_SIGNALS by this step
        self.start, self.earlier_seconds = time.perf_counter(), 0.0

    def compile_networks(self) -> None:
        """In place, so that nothing else need know. Averages that only samples are drawn from stay as they are."""
        self.print(f"compile: {self.recipe.compile}; the networks are compiled in the first step, which can take minutes")
        torch._inductor.config.fallback_random = True  # dropout masks are replayed, so both graphs must draw alike
        networks = [self.network, self.teacher, self.velocity_teacher]
        networks += [holder.network for holder in (self.fake, self.target) if holder is not None]
        for network in filter(None, networks):
            network.compile(backend=self.recipe.compile)

    # ---- state ---------------------------------------------------------------------------------------------------

    @property
    def batch_images(self) -> int:
        """Images per optimizer step over all processes."""
        r = self.recipe
        return r.train_batch_size * r.gradient_accumulation_steps

    @property
    def averages(self) -> list[EMA]:
        """Every average of the network: those of the recipe's ``ema``, and the one that targets come from."""
        return self.emas if self.target is None else [*self.emas, self.target]

    @property
    def student(self) -> Teacher:
        """The averaged network of the first EMA."""
        return self.emas[0].network

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, over all the runs it was resumed in."""
        return self.earlier_seconds + time.perf_counter() - self.start

    def modules(self) -> dict[str, nn.Module]:
        """Every module whose weights a checkpoint holds, by file name; of a network with adapters, these alone."""
        networks = {"network": self.network, **{f"ema-{i}": ema.network for i, ema in enumerate(self.emas)}}
        if self.target is not None:
            networks["target"] = self.target.network
        modules = {name: n.native if self.recipe.lora is None else adapters(n.native) for name, n in networks.items()}
        for i, (objective, _) in enumerate(self.objectives):
            if objective.weighting is not None:
                modules["weighting" if i == 0 else f"weighting-{i}"] = self.accelerator.unwrap_model(objective.weighting)
        if self.fake is not None:
            modules |= self.fake.modules()
        return modules

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Every optimizer whose state a checkpoint holds, by file name."""
        return {"optimizer": self.optimizer} | ({} if self.fake is None else {"fake-optimizer": self.fake.optimizer})

    @property
    def layout(self) -> dict:
        """What may be another one when a run is resumed; the run says so."""
        return {"processes": self.placement.world, "distributed": self.placement.kind, "images_per_step": self.batch_images}

    def save(self) -> Path | None:
        """Write a checkpoint of the current step (main process; all take part)."""
        main = self.accelerator.is_main_process
        modules = {name: whole_state(module, keep=main) for name, module in self.modules().items()}
        optimizers = {name: whole_optimizer_state(optimizer, keep=main) for name, optimizer in self.optimizers().items()}
        if not main:
            return None
        errors = [list(e.values()) for e in self.endpoint_history]
        state = {"step": self.step, "nonfinite": self.nonfinite, "endpoint_history": errors, "seconds": self.seconds}
        state |= self.layout
        return ckpt.save_checkpoint(
            self.output_dir, self.step, modules, optimizers, state, self.recipe.checkpoints_total_limit
        )

    def resume(self) -> None:
        """Continue from the recipe's checkpoint, if it names one and one exists. What an earlier run left in the folder and
        this one would overwrite is moved aside.
        """
        asked = self.recipe.resume_from_checkpoint
        path = None if asked is None else ckpt.find_checkpoint(self.output_dir, asked, self.print)
        self.accelerator.wait_for_everyone()  # nobody looks at checkpoints any more that are moved now
        if self.accelerator.is_main_process:
            ckpt.remove_leftovers(self.output_dir)
            moved = ckpt.set_aside(self.output_dir, path)
            if moved:
                self.print(f"{self.output_dir} held an earlier run; what this run would overwrite is now in {moved}")
        self.accelerator.wait_for_everyone()
        if path is None:
            if asked is not None:
                self.print(f"no whole checkpoint in {self.output_dir}: training starts at step 0")
            return
        state = ckpt.load_checkpoint(path, self.modules(), self.optimizers())
        self.step, self.nonfinite, self.earlier_seconds = state["step"], state["nonfinite"], state["seconds"]
        self.endpoint_history = [dict(zip(TIMES, errors, strict=True)) for errors in state["endpoint_history"]]
        self.print(f"resumed from {path} at step {self.step}")
        for key, now in self.layout.items():
            if state.get(key, now) != now:
                self.print(f"{key.replace('_', ' ')}: {now}, until here {state[key]}; {CHANGED[key]}")

    def print(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> Teacher:
        """Train to ``max_train_steps``; returns the averaged network.

        Raises:
            TrainingError: too many non-finite steps in a row.
            ValueError, FileNotFoundError, OSError: bad data, checkpoints, or a disk that cannot be written.
        """
        recipe = self.recipe
        self.output_dir.mkdir(parents=True, exist_ok=True)
        data = self.probed_data()
        if recipe.stable_targets:
            self.objectives[0][0].stable_targets = build_stable_targets(data, recipe, self.device)
        self.resume()
        text = yaml.safe_dump(to_dict(recipe), sort_keys=False)
        log = MetricsLog(self.output_dir / "metrics.jsonl")
        if self.accelerator.is_main_process:
            log.cut(self.step)
            write_atomically(self.output_dir / "recipe.yaml", lambda path: path.write_text(text))
        if recipe.report_to:
            options = {"wandb": {"dir": recipe.output_dir}}
            self.accelerator.init_trackers("scm-distill", config={"recipe": text}, init_kwargs=options)
        batches = iter(training_loader(data, self.sampler(len(data)), recipe.data.num_workers))
        self.prepare_validation(data)
        if self.step == 0 or recipe.objective == "retrofit":  # which may be done already, also when it is resumed
            self.check_convergence(self.validate(log), last=False)
        self.loop(batches, log)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.student

    def probed_data(self) -> Dataset:
        """The training set; the teachers are probed on it, and before one draws the images itself."""
        recipe, cache = self.recipe, self.output_dir / "cache"
        own = recipe.data.source == "teacher"
        data = None if own else training_data(recipe, self.teacher, cache, self.prompts)
        for verdict in teacher_verdicts(recipe, self.teacher, self.velocity_teacher, data):
            self.print(verdict)
        if not own:
            return data
        # One process draws them and the others read what it drew, unless all hold a part of the teacher.
        first = nullcontext() if self.placement.sharded else self.accelerator.local_main_process_first()
        with first:
            return training_data(recipe, self.teacher, cache, self.prompts)

    def sampler(self, size: int) -> StepSampler:
        r, a = self.recipe, self.accelerator
        parts = r.gradient_accumulation_steps
        return StepSampler(
            size, r.train_batch_size, r.seed, self.step * parts, r.max_train_steps * parts, a.process_index,
            a.num_processes,
        )  # fmt: skip

    def loop(self, batches, log: MetricsLog) -> None:
        recipe = self.recipe
        previous = {number: signal.signal(number, self.request_stop) for number in STOP_SIGNALS}
        bar = tqdm(
            total=recipe.max_train_steps, initial=self.step, desc=recipe.objective, unit="step",
            disable=not self.accelerator.is_main_process, mininterval=1.0,
        )  # fmt: skip
        window = Window()
        try:
            while self.step < recipe.max_train_steps and not self.converged:
                self.train_step(batches, window)
                bar.update()
                last = self.step == recipe.max_train_steps
                logs, validates = self.step % recipe.logging_steps == 0, self.step % recipe.validation_steps == 0 or last
                if logs or validates or self.step % recipe.checkpointing_steps == 0:
                    self.settle()
                if logs:
                    self.log(log, bar, window)
                    window = Window()
                # After a step that was not finite the weights may be none to go on from.
                saves = (self.step % recipe.checkpointing_steps == 0 and not self.nonfinite["in_a_row"]) or last
                if validates or saves:
                    self.check_outputs()
                if validates:
                    self.check_convergence(self.validate(log), last)
                if saves or self.converged:
                    self.save()
                if self.signal is not None:
                    self.stop()
        except TrainingError:
            if window.steps:
                self.log(log, bar, window)
            if self.accelerator.is_main_process:
                plot_curves(log.path, self.output_dir / "curves.png")
            raise
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def train_step(self, batches, window: Window) -> None:
        """One optimizer step over the accumulated batches. A fake score is updated before, on the same labels.

        If something is not finite the step changes no weights. Whether it was, the host reads one step later: it would
        otherwise wait for the device, and this then for the host.
        """
        parts = [self.to_device(*next(batches)) for _ in range(self.recipe.gradient_accumulation_steps)]
        rate = learning_rate(self.recipe.optimizer, self.step, self.recipe.max_train_steps)
        set_learning_rate(self.optimizer, rate)
        all_finite, logs = [], {}
        if self.uses_vsd:
            set_learning_rate(self.fake.optimizer, rate * self.fake.relative_learning_rate)
            all_finite, logs = self.train_fake(parts)
        losses = [loss for number, part in enumerate(parts) for loss in self.backward(number, *part)]
        values = mean_logs(losses, len(parts))
        finite, grad_norm = self.optimizer_step(self.optimizer, values["loss"])
        finite = torch.stack([finite, *all_finite]).all()
        if hasattr(self.network.native, "normalize_weights"):
            self.network.native.normalize_weights()
        self.step += 1
        update_averages(self.averages, self.network, self.step * self.batch_images, self.batch_images)
        window.add({**values, "grad_norm": grad_norm, **logs}, finite)
        outcome = self.step, Readback(torch.cat([finite[None].float(), *self.signalled]))
        self.settle()
        self.outcome = outcome

    @property
    def uses_vsd(self) -> bool:
        """Whether VSD is part of this step."""
        vsd = self.recipe.vsd
        return vsd is not None and vsd.has_begun(self.step / self.recipe.max_train_steps)

    def to_device(self, x0: Tensor, labels: Condition) -> tuple[Tensor, Condition | None]:
        """Images and labels of a batch. The labels stay on the host if they are to choose stable targets there."""
        if not self.recipe.is_conditional:
            return to_device(x0, self.device), None
        return to_device(x0, self.device), labels if self.recipe.stable_targets else to_device(labels, self.device)

    def backward(self, part: int, x0: Tensor, labels: Condition | None) -> list[Loss]:
        """The gradients of one batch, of one objective after the other: no more than one graph is in memory."""
        parts, losses = self.recipe.gradient_accumulation_steps, []
        generator = self.seeded(part)
        frozen = self.target.network if self.recipe.averages_targets(self.step) else self.network
        objectives = [each for each in self.objectives if self.uses_vsd or not isinstance(each[0], VSD)]
        for objective, weight in objectives:
            last = part == parts - 1 and objective is objectives[-1][0]
            with self.placement.synchronization(self.prepared, last):
                result: Loss = objective(self.prepared, frozen, x0, labels, self.step, generator)
                self.accelerator.backward(weight * result.loss / parts)
            losses.append(Loss(weight * result.loss.detach(), result.logs))
        return losses

    def seeded(self, *part) -> torch.Generator:
        """The noise of one batch of this step. Dropout, whose masks are each process' own, is seeded too."""
        seed, step, rank = self.recipe.seed, self.step, self.accelerator.process_index
        torch.manual_seed(step_seed(seed, step, rank, *part))
        return BatchGenerator.seeded(step_seed(seed, step, 0, *part), rank, self.accelerator.num_processes)

    def train_fake(self, parts: list[tuple[Tensor, Condition | None]]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The fake score's updates of one step: of each whether it was finite, and what to log."""
        fake, finite = self.fake, []
        for update in range(self.recipe.vsd.fake_updates):
            losses = []
            for number, (x0, labels) in enumerate(parts):
                generator = self.seeded(number, f"fake {update}")
                with self.placement.synchronization(fake.prepared, number == len(parts) - 1):
                    loss = fake.objective(fake.prepared, self.network, x0, labels, generator)
                    self.accelerator.backward(loss / len(parts))
                losses.append(loss.detach())
            loss = torch.stack(losses).mean()
            finite.append(self.optimizer_step(fake.optimizer, loss)[0])
            if hasattr(fake.network.native, "normalize_weights"):
                fake.network.native.normalize_weights()
        return finite, {"fake_loss": loss}

    def optimizer_step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Step unless ``loss`` or the gradient is not finite on any process: whether they are, and the gradient's norm, both
        on the device.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm, limit = torch.nn.utils.get_total_norm(gradients), self.recipe.optimizer.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        grad_norm = whole(norm).to(loss.device)  # of offloaded gradients it is on the CPU
        finite = torch.isfinite(self.over_processes(loss) + grad_norm)
        # By it a fused optimizer changes nothing. To offloaded parameters it must have come before they are read.
        optimizer.found_inf = (~finite).float().to(parameters[0].device)
        optimizer.step()
        optimizer.zero_grad()
        return finite, grad_norm

    def over_processes(self, loss: Tensor) -> Tensor:
        """The mean of ``loss``; the signals that processes got go along."""
        if self.placement.world == 1:
            return loss
        got = torch.tensor([float(self.stop_signal == number) for number in STOP_SIGNALS])
        values = self.placement.mean(torch.cat([loss[None], to_device(got, loss.device).to(loss.dtype)]))
        self.signalled = [values[1:].float()]
        return values[0]

    def settle(self) -> None:
        """Take note of how the last step ended, if that was not read yet.

        Raises:
            TrainingError: too many steps in a row were not finite.
        """
        if self.outcome is None:
            return
        step, numbers = self.outcome[0], self.outcome[1].read()
        self.outcome = None
        if self.placement.world > 1:
            got = zip(STOP_SIGNALS, numbers[1:], strict=True)
            self.agreed_signal = next((n for n, share in got if share > 0), self.agreed_signal)
        self.count_nonfinite(step, bool(numbers[0]))

    def count_nonfinite(self, step: int, finite: bool) -> None:
        self.nonfinite["in_a_row"] = 0 if finite else self.nonfinite["in_a_row"] + 1
        self.nonfinite["total"] += not finite
        if not finite:
            self.print(f"step {step}: loss or gradient is not finite; skipped")
        if not finite and self.nonfinite["in_a_row"] >= self.recipe.max_nonfinite_steps:
            count = self.nonfinite["in_a_row"]
            raise self.divergence(f"{count} steps in a row were not finite at step {step}", step - count)

    def divergence(self, reason: str, since: int) -> TrainingError:
        """What a run ends with whose weights are no good ``since`` some step."""
        before = (path for path in reversed(ckpt.checkpoints(self.output_dir)) if ckpt.step_of(path) < since)
        asked = self.recipe.resume_from_checkpoint
        last = next(before, "none" if asked in (None, "latest") else asked)
        return TrainingError(
            f"training has diverged: {reason}; the last good checkpoint: {last}; gradient and tangent norms up to here: "
            f"{self.output_dir / 'curves.png'}; try a lower learning rate or a longer tangent warm-up"
        )

    @torch.no_grad()
    def check_outputs(self) -> None:
        """Look whether the network still is one: ``F`` has an rms of about 1 on whatever has that of ``sigma_data``.

        Raises:
            TrainingError: it has left all bounds, or is not finite.
        """
        generator = torch.Generator().manual_seed(self.recipe.seed)
        noise = torch.randn(8, *self.network.sample_shape, generator=generator).to(self.device)
        t, labels = torch.linspace(0.1, 1.5, 8, device=self.device), self.network.example_condition(8, self.device)
        with evaluation_mode(self.network), autocast(self.recipe.mixed_precision, self.device):
            rms = self.network(self.recipe.sigma_data * noise, t, labels).float().square().mean().sqrt().item()
        if not rms <= LARGEST_OUTPUT:
            raise self.divergence(f"at step {self.step} the network's output has an rms of {rms:.3g}, not 1", self.step)

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that all processes are to stop by."""
        return self.stop_signal if self.placement.world == 1 else self.agreed_signal

    def request_stop(self, number: int, _frame) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # who presses Ctrl-C twice does not want to wait for the checkpoint
        self.stop_signal = signal.Signals(number)

    def stop(self) -> None:
        self.settle()
        path = self.save()
        name = self.signal.name
        self.print(f"stopped by {name} at step {self.step}; continue with resume_from_checkpoint=latest ({path})")
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(0)

    # ---- logs and validation -------------------------------------------------------------------------------------

    def log(self, log: MetricsLog, bar: tqdm, window: Window) -> None:
        values = window.means(self.placement.mean)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["images_per_second"] = window.steps * self.batch_images / window.seconds()
        values["nonfinite_steps"] = self.nonfinite["total"]
        if self.accelerator.is_main_process:
            log.write(self.step, values)
        self.accelerator.log(values, step=self.step)
        shown = {k: f"{values[k]:.4g}" for k in ("loss", "tangent_norm") if k in values}
        bar.set_postfix({**shown, "images/s": f"{values['images_per_second']:.0f}"})

    def prepare_validation(self, data: Dataset) -> None:
        """Fix what validation looks at: a few training images for the endpoint or velocity error, and real features."""
        if (self.teacher or self.velocity_teacher) is None or not self.validates:
            return
        x0, labels = few_images(data, 16, self.recipe, self.device)
        if self.teacher is None:
            self.velocity_error = VelocityError(self.velocity_teacher, x0, labels, self.recipe.seed)
            return
        if self.recipe.evaluation.validation_samples:
            self.reference = recipe_reference(self.recipe)
        self.print("solving the teacher's ODE for the endpoint error")
        self.endpoint = EndpointError(self.teacher, x0, labels, self.recipe.seed)

    @property
    def validates(self) -> bool:
        """Whether this process takes part in validation: the main one does; with shards, which all hold, all do the same."""
        return self.accelerator.is_main_process or self.placement.sharded

    @property
    def validation_guidance(self) -> float | None:
        """For a student with a guidance input: the scale its teacher has in the endpoint error."""
        return self.teacher.guidance_scale if isinstance(self.recipe.guidance_scale, list) else None

    def check_convergence(self, values: dict[str, float], last: bool) -> None:
        """End objective ``retrofit`` once the velocity error that was just measured is low enough, on all processes."""
        if self.recipe.objective != "retrofit":
            return
        error = torch.tensor(values.get("velocity_error", 0.0), device=self.device)  # known to the main process alone
        error, limit = broadcast(error).item(), self.recipe.max_velocity_error
        self.converged = error <= limit
        if self.converged:
            self.print(f"step {self.step}: the velocity error is below {limit:g}; done")
        elif last:
            self.print(f"warning: the velocity error {error:.4g} is still above {limit:g}: train longer")

    def validate(self, log: MetricsLog) -> dict[str, float]:
        """Endpoint error, velocity error, sample grid and curves from the averaged weights; what was measured, on processes
        that took part.
        """
        if not self.validates:
            return {}
        values = {}
        if self.endpoint is not None:
            errors = self.endpoint(self.student, self.validation_guidance)
            self.endpoint_history.append(errors)
            values |= {f"endpoint_error/{t}": e for t, e in errors.items()}
            text = "endpoint error " + "  ".join(f"t={t}: {e:.4f}" for t, e in errors.items())
            if self.reference is not None:
                steps = self.validation_steps
                values[f"frechet_distance/{steps}"] = distance = self.validation_distance(steps)
                text += f"  {steps}-step {self.reference.extractor.name}-FD: {distance:.3g}"
            self.print(f"step {self.step}: {text}")
            if rising_at_small_t(self.endpoint_history):
                self.print("warning: the endpoint error at the smallest t is rising: training may diverge")
        if self.velocity_error is not None:
            values["velocity_error"] = self.velocity_error(self.student)
            self.print(f"step {self.step}: velocity error {values['velocity_error']:.4g}")
        rows = self.sample_rows()
        if not self.accelerator.is_main_process:
            return values
        save_grid(rows, self.output_dir / "samples" / f"{self.step:07d}.png")
        log.write(self.step, values)
        self.accelerator.log(values, step=self.step)
        plot_curves(self.output_dir / "metrics.jsonl", self.output_dir / "curves.png")
        return values

    @property
    def validation_steps(self) -> int:
        """In how many steps the samples are drawn whose distance is logged."""
        return max(self.recipe.vsd.step_counts) if self.recipe.objective == "vsd" else 2

    def validation_distance(self, steps: int) -> float:
        """The Fréchet distance of a few samples, always the same noise: for its course, not for its value."""
        r = self.recipe
        batches = generate(
            self.student, r.evaluation.validation_samples, num_inference_steps=steps, role="student", seed=r.seed,
            batch_size=r.evaluation.batch_size, times=r.sampling_times(steps), guidance=self.validation_guidance,
            labels=self.prompts,
        )  # fmt: skip
        return self.reference.frechet_distance(batches)

    def sample_rows(self) -> list[Tensor]:
        """Ten images a row from fixed seeds: a student at 1, 2 and 4 steps, a diffusion network by Heun's method."""
        if self.teacher is None:
            samples = generate(
                self.student, 40, num_inference_steps=18, role="teacher", seed=self.recipe.seed, labels=self.prompts
            )
            return list(next(samples)[0].split(10))
        return [
            next(generate(self.student, 10, num_inference_steps=n, role="student", seed=self.recipe.seed,
                          times=self.recipe.sampling_times(n), guidance=self.validation_guidance, labels=self.prompts))[0]
            for n in (1, 2, 4)
        ]  # fmt: skip


def ordinary_student(trainer: Trainer) -> Teacher:
    """The averaged network in one piece, without adapters of its own."""
    return trainer.placement.gathered(trainer.student) if trainer.recipe.lora is None else merged(trainer.student)


def trained_model(trainer: Trainer) -> Model:
    """A finished run's averaged network with everything a card says about it."""
    recipe = trainer.recipe
    network = ordinary_student(trainer)
    training = {
        "objective": recipe.objective, "steps": trainer.step, "images": trainer.step * trainer.batch_images,
        "seed": recipe.seed, "data": recipe.data.source, "minutes": round(trainer.seconds / 60, 1),
    }  # fmt: skip
    if recipe.data.prompts:
        training["prompts"] = recipe.data.prompts
    if recipe.lora is not None:
        training["lora"] = dataclasses.asdict(recipe.lora)
    extra = {"training": training}
    if recipe.teacher:
        key = "guidance_range" if isinstance(recipe.guidance_scale, list) else "guidance_scale"
        extra |= {"teacher": recipe.teacher, key: recipe.guidance_scale}
        if recipe.guidance_teacher:
            training["guidance_teacher"] = recipe.guidance_teacher
        if trainer.license is not None:
            training["license"] = trainer.license
    if recipe.intermediate_times:
        extra["sampling"] = {str(steps): recipe.sampling_times(steps) for steps in recipe.intermediate_times}
    role = "teacher" if recipe.is_diffusion else "student"
    if is_registered(network.native):
        return Model(network, model_config(network, role, **extra))
    return Model(network, {"role": role, **network.metadata(), **extra})


def save_model(model: Model, folder: Path) -> None:
    """Write a model folder; of a network that only its owner can build again, the weights alone."""
    if is_registered(model.network.native):
        write_model(folder, model.network, model.config)
        model.network.source = str(folder)
    else:
        write_weights(folder, model.network)
        model.network.source = None
