"""The real trainer in processes that are killed, run out of disk, or find their checkpoints damaged: it goes on from the
newest whole checkpoint, ends with the weights of a run that nothing happened to, and leaves nothing behind.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from processes import Server

from distill.checkpoint import checkpoints

STEPS = 8
SIT = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=2, learn_sigma=False)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes by Linux's means")


class Runs:
    """Runs of one recipe, one at a time, in processes of their own."""

    def __init__(self, server: Server, folder: Path, recipe: dict):
        self.server, self.recipe, self.output = server, folder / "recipe.yaml", folder / "output.txt"
        self.recipe.write_text(yaml.safe_dump(recipe))

    def arguments(self, run: Path, *overrides: str) -> list[str]:
        return [str(self.recipe), f"output_dir={run}", "resume_from_checkpoint=latest", *overrides]

    def start(self, run: Path, *overrides: str, file_size: int | None = None) -> int:
        """Begin a run that goes on in the folder ``run``; its process id."""
        self.output.unlink(missing_ok=True)
        arguments = self.arguments(run, *overrides)
        self.pid = self.server.start("distill.run:main", arguments, output=self.output, file_size=file_size)
        return self.pid

    def end(self) -> tuple[int, str]:
        """Wait for it; exit status and what it has printed."""
        [status] = self.server.end([self.pid], self.output)
        return status, self.output.read_text() if self.output.exists() else ""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "train.parquet"
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(64, 4, 4, generator=generator) * 68 + 127).clamp(0, 255).byte().numpy()
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": list(pixels), "label": [i % 2 for i in range(64)]}, features=features).to_parquet(path)
    return path


@pytest.fixture
def runs(server, images, tmp_path):
    recipe = dict(
        objective="diffusion", network={"name": "SiT", "config": SIT, "parameterization": "RECTIFIED_FLOW"},
        output_dir="given at each run", sigma_data=0.5, sample_shape=[1, 4, 4], num_classes=2, label_dropout=0.2,
        data={"source": str(images)}, max_train_steps=STEPS, train_batch_size=4,
        checkpointing_steps=1, logging_steps=1, validation_steps=100, optimizer={"learning_rate": 1e-2},
        ema=[{"half_life_images": 20}],
        evaluation={"features": "pixels", "num_samples": 50, "teacher_steps": 1, "validation_samples": 0},
    )  # fmt: skip
    return Runs(server, tmp_path, recipe)


# ---- what goes wrong: each starts a run, disturbs it, and says whether it was in time ------------------------------------


def killed(runs, run, rng, number=signal.SIGKILL):
    pid = runs.start(run)
    time.sleep(rng.random() * runs.seconds / 2)  # most have less to do than the undisturbed one
    os.kill(pid, number)
    status, output = runs.end()
    return status == -number or "stopped by SIGTERM" in output


def terminated(runs, run, rng):
    return killed(runs, run, rng, signal.SIGTERM)


def killed_while_it_saves(runs, run, rng):
    pid, first = runs.start(run), rng.randrange(3)
    seen = set()
    while len(seen) <= first and is_running(pid):
        seen.update(run.glob(".checkpoint-*.tmp"))
    time.sleep(rng.random() * 0.004)
    os.kill(pid, signal.SIGKILL)
    return runs.end()[0] == -signal.SIGKILL


def is_running(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def without_room(runs, run, rng):
    """As on a full disk, no file can grow beyond some size."""
    runs.start(run, file_size=rng.randrange(6_000, 70_000))
    return refused(runs)


def without_a_folder(runs, run, rng):
    """A file is where the run wants a folder: unlike permissions, that binds every user."""
    run.mkdir(exist_ok=True)
    folder = run / rng.choice(["samples", "student"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("not a folder")
    runs.start(run)
    happened = refused(runs)
    if folder.is_file():  # it may have been set aside, and there is a folder
        folder.unlink()
    return happened


def refused(runs):
    status, output = runs.end()
    if status == 0:  # it had written everything by then
        return False
    assert status == 1 and [line[:7] for line in output.splitlines()].count("error: ") == 1 and "Traceback" not in output
    return True


def truncated(runs, run, rng):
    return damaged(run, rng, lambda data: data[: rng.randrange(len(data))])


def flipped(runs, run, rng):
    def flip(data):
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]

    return damaged(run, rng, flip)


def damaged(run, rng, change):
    newest = next(reversed(checkpoints(run)), None)
    if newest is None:
        return False
    path = rng.choice(sorted(newest.iterdir()))
    path.write_bytes(change(path.read_bytes()))
    return True


FAULTS = (killed, terminated, killed_while_it_saves, without_room, without_a_folder, truncated, flipped)


# ---- and what must come of it --------------------------------------------------------------------------------------------


def whole(checkpoint):
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        return all(facts["sha256"] == digest(checkpoint / name) for name, facts in files.items())
    except (OSError, ValueError, KeyError):
        return False


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results(run, steps=STEPS):
    files = [run / f"checkpoint-{steps}" / f"{name}.safetensors" for name in ("network", "ema-0", "weighting")]
    return [digest(path) for path in [*files, run / "student/model.safetensors"]]


def complete(runs, run):
    """Run to the end, from where it has to go on."""
    found = checkpoints(run) if run.exists() else []
    expected = next((path for path in reversed(found) if whole(path)), None)
    runs.start(run)
    status, output = runs.end()
    assert status == 0, output
    assert (f"resumed from {expected} at step" if expected else "training starts at step 0") in output
    for path in found[found.index(expected) + 1 if expected else 0 :]:
        assert f"warning: checkpoint {path} is damaged: " in output
    assert not [path for path in run.rglob(".*")]


def test_a_run_survives_whatever_happens_to_it(runs, tmp_path):
    start = time.perf_counter()
    complete(runs, tmp_path / "undisturbed")
    runs.seconds = time.perf_counter() - start
    undisturbed = results(tmp_path / "undisturbed")
    happened = dict.fromkeys(FAULTS, 0)
    for chain in range(12):
        rng, run = random.Random(chain), tmp_path / f"run-{chain}"
        first = rng.choice(FAULTS[:3])  # which may leave a checkpoint for others to damage
        for fault in (first, *rng.sample(FAULTS, len(FAULTS))):
            if not enough(happened):
                happened[fault] += fault(runs, run, rng)
        complete(runs, run)
        assert results(run) == undisturbed
        if enough(happened):
            break
    assert enough(happened), f"only {happened} in {chain + 1} runs"


def enough(happened):
    return sum(happened.values()) >= 30 and all(happened.values())


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_exits_cleanly(runs, tmp_path, number, status):
    pid = runs.start(tmp_path / "run", "max_train_steps=100000", "checkpointing_steps=5")
    # However slow the machine: before the first checkpoint the loop, and so its signal handler, may not be there yet.
    while not checkpoints(tmp_path / "run"):
        assert is_running(pid), runs.end()
        time.sleep(0.01)
    os.kill(pid, number)
    ended, output = runs.end()
    assert ended == status, output
    assert f"stopped by {number.name} at step" in output
    assert "continue with resume_from_checkpoint=latest" in output and "Traceback" not in output
    assert not [path for path in (tmp_path / "run").rglob(".*")]


def test_two_processes_survive_the_death_of_one(runs, server, tmp_path):
    rng, steps, output = random.Random(0), 30, tmp_path / "output.txt"

    def job(run):
        return 2, "distill.run:main", runs.arguments(run, f"max_train_steps={steps}")

    def complete(run):
        assert server.launch(*job(run), output=output) == [0, 0], output.read_text()
        return results(run, steps)

    undisturbed = complete(tmp_path / "undisturbed")
    for rank in (0, 1):
        run = tmp_path / f"run-{rank}"
        pids, _store = server.start_all(*job(run), output=output)
        after = rng.randrange(1, 10)
        while not (run / f"checkpoint-{after}").exists():
            assert all(map(is_running, pids)), output.read_text()
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)  # in a step, or in a checkpoint
        os.kill(pids[rank], signal.SIGKILL)
        statuses = server.end(pids, output, limit=30)
        assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1, output.read_text()
        text = output.read_text()
        said = "the connection to another process of this run was lost", f"process {rank} was killed"
        assert text.count("error:") == 1 and any(sentence in text for sentence in said), text
        assert complete(run) == undisturbed
        assert "resumed from" in output.read_text()


def test_a_death_is_noticed_by_a_process_that_validates(runs, server, tmp_path):
    """The other one would wait for it, and itself it would validate for minutes before it looks for the other one."""
    output, run = tmp_path / "output.txt", tmp_path / "run"
    runs.start(tmp_path / "teacher", "max_train_steps=300", "checkpointing_steps=300")
    assert runs.end()[0] == 0
    student = ["objective=distillation", "network=null", f"teacher={tmp_path / 'teacher'}"]
    arguments = runs.arguments(run, *student, "evaluation.validation_samples=10000000")
    pids, _store = server.start_all(2, "distill.run:main", arguments, output=output)
    while not (output.exists() and "solving the teacher's ODE" in output.read_text()):  # validation comes next
        assert all(map(is_running, pids)), output.read_text()
        time.sleep(0.01)
    time.sleep(1)
    os.kill(pids[1], signal.SIGKILL)
    assert server.end(pids, output, limit=30) == [1, -signal.SIGKILL]
    text = output.read_text()
    assert text.count("error:") == 1 and "process 0: error: process 1 was killed" in text, text
