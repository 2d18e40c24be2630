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


def test_a_single_launched_process_gets_every_core_and_denormals_are_flushed():
    cores = str(len(os.sched_getaffinity(0)))
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}
    assert threads_and_denormal(**launched) == [cores, "0.0"]


def test_asked_for_threads_are_kept():
    assert threads_and_denormal(OMP_NUM_THREADS="1", WORLD_SIZE="2", ACCELERATE_MIXED_PRECISION="no")[0] == "1"
    assert threads_and_denormal(OMP_NUM_THREADS="1")[0] == "1"
