"""Training by several processes of this machine, for tests: gloo on CPUs. They are forked from a server that has imported
everything, so that each costs a fraction of a second.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from distill.data import training_data, training_loader
from distill.log import Window
from distill.parallel import whole, whole_state
from distill.recipe import parse_recipe
from distill.trainer import Trainer


def launch(world: int, function: Callable, *args, timeout: float = 240, **environment: str) -> list[int]:
    """Call ``function(*args)``, one of a module that can be imported, in ``world`` processes as torchrun would start them;
    returns their exit codes.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    processes = [
        server.Process(target=start, args=({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def start(environment: dict[str, str], function: Callable, args: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def train_all(cases: dict[str, tuple[dict, int]], folder: Path) -> None:
    """Every case's :func:`train`, one after the other; the main process writes what they return."""
    for name, (values, steps) in cases.items():
        result = train(values, steps)
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(result, folder / f"{name}.pt")


def train(values: dict, steps: int) -> dict[str, dict]:
    """The gradients of a recipe's first step, all weights after some ``steps``, each in one piece, and what was logged."""
    trainer = Trainer(parse_recipe(values, "test"))
    gradients, original = {}, trainer.optimizer_step

    def optimizer_step(optimizer, loss):
        if trainer.step == 0 and optimizer is trainer.optimizer:
            named = trainer.network.named_parameters()
            gradients.update({name: whole(p.grad).clone() for name, p in named if p.grad is not None})
        return original(optimizer, loss)

    trainer.optimizer_step = optimizer_step
    data = training_data(trainer.recipe, trainer.teacher, Path(trainer.output_dir) / "cache")
    batches, window = iter(training_loader(data, trainer.sampler(len(data)), 0)), Window()
    for _ in range(steps):
        trainer.train_step(batches, window)
    states = {name: whole_state(module) for name, module in trainer.modules().items()}
    return {"gradients": gradients, "states": states, "logs": window.means(trainer.placement.mean)}
