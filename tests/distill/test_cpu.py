import os
import subprocess
import sys

COMMAND = """
import torch
from distill.cpu import tune_cpu
tune_cpu()
print(torch.get_num_threads(), (torch.tensor(1e-39) / 2).item())
"""


def threads_and_denormal(**environment) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", COMMAND], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def launched(tmp_path, **environment) -> list[str]:
    """The same of a process that ``accelerate launch`` starts."""
    script = tmp_path / "threads.py"
    script.write_text(COMMAND)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(script)]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, check=True).stdout.split()


def test_a_single_launched_process_gets_every_core_and_denormals_are_flushed(tmp_path):
    assert launched(tmp_path) == [str(len(os.sched_getaffinity(0))), "0.0"]


def test_asked_for_threads_are_kept(tmp_path):
    assert launched(tmp_path, OMP_NUM_THREADS="1")[0] == "1"
    assert threads_and_denormal(OMP_NUM_THREADS="1", WORLD_SIZE="2", ACCELERATE_MIXED_PRECISION="no")[0] == "1"
    assert threads_and_denormal(OMP_NUM_THREADS="1")[0] == "1"
