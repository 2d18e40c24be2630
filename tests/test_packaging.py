"""The wheel carries everything that the package needs at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_carries_models_data_and_recipes(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w"]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("scm_distill-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "distill/assets/mnist/train.parquet", "distill/assets/mnist/test.parquet", "distill/assets/mnist-cnn.safetensors",
        "distill/recipes/mnist.yaml", "distill/recipes/teachers/mnist-edm.yaml", "distill/objectives/scm.py",
        "teachers/zoo/mnist-edm/config.json", "teachers/zoo/mnist-edm/model.safetensors",
        "teachers/zoo/mnist-flow/model.safetensors", "teachers/networks/sit.py",
    ):  # fmt: skip
        assert name in names
