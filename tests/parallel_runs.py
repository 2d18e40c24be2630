"""What tests let several connected processes do (:meth:`processes.Server.launch`)."""

import os
import time
from pathlib import Path

import torch

from distill import failures
from distill.data import training_data, training_loader
from distill.log import Window
from distill.parallel import whole, whole_state
from distill.recipe import parse_recipe
from distill.run import main
from distill.trainer import Trainer


def train_all(cases: dict[str, dict], steps: int, folder: str) -> None:
    """Every case's :func:`train`, one after the other; the main process writes what they return."""
    for name, values in cases.items():
        result = train(values, steps)
        if os.environ["RANK"] == "0":
            torch.save(result, Path(folder) / f"{name}.pt")


def train(values: dict, steps: int) -> dict[str, dict]:
    """The gradients of a recipe's first step, all weights after some ``steps``, each in one piece, and what was logged.

    ``values["broken"]``, which is no key of a recipe, names steps in which the first process' loss is not finite.
    """
    broken = values.get("broken", ())
    trainer = Trainer(parse_recipe({key: value for key, value in values.items() if key != "broken"}, "test"))
    gradients, original = {}, trainer.optimizer_step

    def optimizer_step(optimizer, loss):
        if trainer.step == 0 and optimizer is trainer.optimizer:
            named = trainer.network.named_parameters()
            gradients.update({name: whole(p.grad).clone() for name, p in named if p.grad is not None})
        if trainer.step + 1 in broken and trainer.accelerator.process_index == 0:
            loss = loss * float("nan")
        return original(optimizer, loss)

    trainer.optimizer_step = optimizer_step
    data = training_data(trainer.recipe, trainer.teacher, Path(trainer.output_dir) / "cache")
    batches, window = iter(training_loader(data, trainer.sampler(len(data)), 0)), Window()
    for _ in range(steps):
        trainer.train_step(batches, window)
    states = {name: whole_state(module) for name, module in trainer.modules().items()}
    whole_networks = [trainer.placement.gathered(network) for network in (trainer.teacher, trainer.student)]
    outputs = []
    if trainer.accelerator.is_main_process:
        point = torch.linspace(-1, 1, 128).view(2, 1, 8, 8), torch.tensor([0.4, 1.2]), torch.tensor([0, 2])
        outputs = [network(*point).detach() for network in whole_networks]
    return {
        "gradients": gradients, "states": states, "logs": window.means(trainer.placement.mean), "outputs": outputs
    }  # fmt: skip


def fail(arguments: list[str], stuck: bool) -> None:
    """``distill/run.py``, where an image of process 1 turns out to be bad in the second step. Process 0 waits for it in a
    reduction over both or, ``stuck``, as if it waited on a device.
    """
    failures.GRACE = 1.0
    original = Trainer.train_step

    def train_step(self, *args):
        if self.step == 1 and self.accelerator.process_index == 1:
            raise ValueError("image 7 is damaged")
        if self.step == 1 and stuck:
            time.sleep(1000)
        original(self, *args)

    Trainer.train_step = train_step
    raise SystemExit(main(arguments))
