"""Training by several processes of this machine, for tests: gloo on CPUs. They are forked from a server that has imported
everything, so that each costs a fraction of a second.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.fsdp  # noqa: F401 (the server imports what its processes would)

from distill import failures
from distill.data import training_data, training_loader
from distill.log import Window
from distill.parallel import whole, whole_state
from distill.recipe import parse_recipe
from distill.run import main
from distill.trainer import Trainer


def launch(world: int, output: Path, function: Callable, *args, timeout: float = 500, **environment: str) -> list[int]:
    """Call ``function(*args)``, one of a module that can be imported, in ``world`` processes as torchrun would start them;
    returns their exit codes. What they print goes to the file ``output``, in the order in which they print it.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    processes = [
        server.Process(target=start, args=({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def start(environment: dict[str, str], output: Path, function: Callable, args: tuple) -> None:
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
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
    whole_networks = [trainer.placement.gathered(network) for network in (trainer.teacher, trainer.student)]
    outputs = []
    if trainer.accelerator.is_main_process:
        point = torch.linspace(-1, 1, 128).view(2, 1, 8, 8), torch.tensor([0.4, 1.2]), torch.tensor([0, 2])
        outputs = [network(*point).detach() for network in whole_networks]
    return {
        "gradients": gradients, "states": states, "logs": window.means(trainer.placement.mean), "outputs": outputs
    }  # fmt: skip


def run_recipe(*commands: list[str]) -> None:
    """``distill/run.py`` with each of these arguments, one after the other."""
    for arguments in commands:
        code = main(arguments)
        if code:
            raise SystemExit(code)


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
