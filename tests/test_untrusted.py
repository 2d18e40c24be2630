"""Files from anywhere: whatever is in them, a loader loads them or says in one sentence why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux's means")
def test_no_file_is_run_or_takes_all_memory_or_has_no_end(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(ROOT / "tests/mutants.py"), str(tmp_path)]
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, f"ended ({result.returncode}) at {(tmp_path / 'progress').read_text()}"
    report = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert report["wrong"] == [] and sum(report["tried"].values()) > 1500 and min(report["tried"].values()) > 5
