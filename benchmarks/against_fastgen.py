"""A step of sCD here against the same step of NVIDIA's FastGen, in one run: seconds, and whether the gradients agree.

    python benchmarks/against_fastgen.py CLONE [--batch 4] [--blocks 5]

CLONE is a checkout of https://github.com/NVlabs/FastGen whose requirements are installed; its code is run, on a GPU if there
is one. Both train EDM's CIFAR-10 network (55.73M parameters, random weights) by Algorithm 1 with RAdam and three averages.
Left out of FastGen's step is what its trainer adds: clipping, statistics, logging. Each variant takes its step once a block,
in turn; printed are medians, and of ratios the medians over blocks. In bf16 FastGen computes the derivative in fp32, its
default.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from cost import Steps, synchronize
from forwards import AVERAGES, random_teacher, randomize, take_turns
from torch import Tensor, nn

from distill import trigflow
from distill.cpu import tune_cpu
from distill.device import default_device
from distill.objectives.scm import NoisyBatch, build_objective, mean_square, normalize_tangent

WARMED_UP = 10_000  # steps after which the tangent counts in full, in FastGen's configuration and in recipes/cifar10.yaml
DEVICE = default_device()
SIGMAS = (0.05, 0.3, 1.0, 5.0)  # noise levels at which gradients are compared


class FastGen:
    """FastGen's model for sCD on CIFAR-10, with weights of our networks; ``student``'s are also those of the averages."""

    def __init__(self, student: dict[str, Tensor], teacher: dict[str, Tensor], batch: int, precision: str | None):
        from fastgen.callbacks.callback import CallbackDict
        from fastgen.configs.experiments.EDM.config_scd_cifar10 import create_config
        from fastgen.utils import instantiate

        config = create_config()
        config.model.device, config.model.pretrained_model_path = DEVICE.type, ""
        config.model.precision_amp = precision
        averages = {key: value for key, value in config.trainer.callbacks.items() if key.startswith("ema")}
        config.model.use_ema, config.trainer.callbacks = list(averages), averages
        config.dataloader_train.batch_size = batch
        config.model_class.config = config.model
        self.model = instantiate(config.model_class)
        self.model.on_train_begin(is_fsdp=False)
        load(self.model.teacher.model, teacher)
        for network in (self.model.net, *(getattr(self.model, name) for name in averages)):
            load(network.model, student)
        self.model.init_optimizers()
        self.averages = CallbackDict(config=config, trainer=None)
        self.data = {"real": 0.5 * torch.randn(batch, 3, 32, 32, device=DEVICE)}
        self.data |= dict.fromkeys(("condition", "neg_condition"), torch.zeros(batch, 0, device=DEVICE))

    def __call__(self, num: int) -> None:
        for _ in range(num):
            self.step(WARMED_UP)

    def step(self, iteration: int) -> None:
        model = self.model
        with model.autocast():
            losses, outputs = model.single_train_step(self.data, iteration)
        model.grad_scaler.scale(losses["total_loss"]).backward()
        model.optimizers_schedulers_step(iteration)
        model.optimizers_zero_grad(iteration)
        self.averages.on_training_step_end(
            model=model, data_batch=self.data, output_batch=outputs, loss_dict=losses, iteration=iteration
        )

    def gradients(self, x0: Tensor, seed: int) -> dict[str, Tensor]:
        """Of the loss at ``SIGMAS``, times the number of dimensions by which FastGen divides once more."""
        torch.manual_seed(seed)
        t, labels = torch.tensor(SIGMAS, device=DEVICE).double(), torch.zeros(len(x0), 0, device=DEVICE)
        loss = self.model._compute_scm_loss(x0, t, labels, iteration=WARMED_UP)[0]
        (x0[0].numel() * loss.mean()).backward()
        return gradients_of(self.model.net.model)


def load(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Our weights, and zeros for FastGen's learned weighting, which we do not compare: it weights by one then."""
    own = {f"logvar_linear.{key}": torch.zeros_like(p) for key, p in network.logvar_linear.named_parameters()}
    network.load_state_dict(weights | own)


def our_gradients(steps: Steps, x0: Tensor, seed: int) -> dict[str, Tensor]:
    """Of the loss at ``SIGMAS``, weighted by ``1 / sigma`` as FastGen weights it."""
    trainer, sd = steps.trainer, steps.trainer.recipe.sigma_data
    torch.manual_seed(seed)
    z = sd * torch.randn_like(x0)
    sigma = torch.tensor(SIGMAS, device=DEVICE)
    t = trigflow.time_from_sigma(sigma, sd)
    batch = NoisyBatch(x0, z, trigflow.perturb(x0, z, t), t, None, None, None)
    _, g = build_objective(trainer.recipe, trainer.teacher).tangent(trainer.network, batch, WARMED_UP, None)
    F = trainer.network(batch.x_t, t)
    error = mean_square(F - (F.detach() + normalize_tangent(g, trainer.recipe.tangent)))
    (error / sigma).mean().backward()
    return gradients_of(trainer.network.native)


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    a, b = (torch.cat([found[name].double().flatten() for name in ours]) for found in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def seconds(steps: Callable[[int], object]) -> tuple[float, float]:
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    steps(1)
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", metavar="CLONE")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, options.clone)
    tune_cpu()
    with tempfile.TemporaryDirectory() as folder:
        teacher = random_teacher(folder)

        def ours(precision: str, shared: bool) -> Steps:
            changes = {
                "teacher": teacher, "train_batch_size": options.batch, "data": {"source": "teacher"}, "ema": AVERAGES,
                "mixed_precision": precision, "tangent": {"shared_primal": shared, "warmup_steps": 0},
                "evaluation": {"validation_samples": 0},
            }  # fmt: skip
            return Steps("recipes/cifar10.yaml", changes, "distillation", f"{folder}/{precision}-{shared}")

        plain = ours("no", False)
        randomize(plain.trainer.network, seed=1)  # a student that is not its teacher
        weights = [network.native.state_dict() for network in (plain.trainer.network, plain.trainer.teacher)]
        fastgen = FastGen(*weights, options.batch, None)
        x0 = 0.5 * torch.randn(len(SIGMAS), 3, 32, 32, device=DEVICE)
        report = {"gradients differ by": difference(our_gradients(plain, x0, 2), fastgen.gradients(x0, 2))}
        variants = {
            "FastGen, fp32": fastgen, "fp32": plain, "fp32, shared primal": ours("no", True),
            "FastGen, bf16": FastGen(*weights, options.batch, "bfloat16"), "bf16": ours("bf16", False),
            "bf16, shared primal": ours("bf16", True),
        }  # fmt: skip
        for steps in variants.values():
            steps(5)  # RAdam's first steps are cheaper than the others
        taken = take_turns(variants, seconds, options.blocks)
    for name, spent in taken.items():
        reference = taken["FastGen, bf16" if "bf16" in name else "FastGen, fp32"]
        wall, cpu = (statistics.median(values) for values in zip(*spent, strict=True))
        report[name] = {
            "wall seconds": wall, "CPU seconds": cpu,
            "FastGen's wall time over this": statistics.median(b[0] / a[0] for a, b in zip(spent, reference, strict=True)),
        }  # fmt: skip
    report |= {"batch": options.batch, "device": DEVICE.type, "threads": torch.get_num_threads()}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
