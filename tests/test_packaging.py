"""The wheel carries everything that a user without a checkout needs, and the pins cover the dependencies."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
TREES = ("distill", "teachers", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What an installed copy must do with no checkout near it.
USE_INSTALLED = """
import distill, teachers
from distill.recipe import load_recipe
from importlib.metadata import distribution

print(distill.__file__, teachers.__file__)
assert teachers.load("mnist-edm").sample_shape == (1, 28, 28)
assert load_recipe("recipes/mnist.yaml").teacher == "mnist-edm"
(command,) = distribution("scm-distill").entry_points.select(group="console_scripts", name="distill")
command.load()(["teachers", "list"])
"""


def run(*command: str, **options) -> str:
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built offline from a copy, so that the checkout gets no build products."""
    try:
        setuptools = version("setuptools")
    except PackageNotFoundError:
        pytest.skip("building a wheel offline needs setuptools")
    if Version(setuptools) < Version("77"):
        pytest.skip(f"building a wheel needs setuptools 77 or newer, found {setuptools}")
    source = tmp_path_factory.mktemp("source")
    for name in TREES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source))
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_source_file_and_nothing_else(wheel):
    """Recipes move from the top of the checkout into ``distill``; everything else keeps its place."""
    files = [p.relative_to(ROOT) for tree in TREES for p in (ROOT / tree).rglob("*") if p.is_file()]
    files = [p for p in files if "__pycache__" not in p.parts and not p.name.startswith(".")]
    expected = {str("distill" / p if p.parts[0] == "recipes" else p) for p in files}
    metadata = f"scm_distill-{PROJECT['version']}.dist-info/"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if not n.startswith(metadata)} == expected
    assert {metadata + "licenses/LICENSE", metadata + "licenses/NOTICE"} <= names


def test_wheel_carries_models_data_and_recipes(wheel):
    archive = zipfile.ZipFile(wheel)
    for name in (
        "teachers/zoo/mnist-edm/model.safetensors", "teachers/zoo/mnist-flow/config.json",
        "distill/assets/mnist/train.parquet", "distill/assets/mnist-cnn.safetensors",
        "distill/recipes/mnist.yaml", "distill/recipes/teachers/mnist-edm.yaml",
    ):  # fmt: skip
        assert archive.getinfo(name).file_size > 0


def test_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    output = run(sys.executable, "-c", USE_INSTALLED, cwd=tmp_path, env=environment)
    assert f"{site}/distill/__init__.py {site}/teachers/__init__.py" in output
    assert re.search(r"mnist-edm +teacher", output)


def test_constraints_pin_every_dependency_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): Version(number) for name, number in pins.items()}
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
