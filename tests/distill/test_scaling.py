"""The benchmark of sizes on runs that are there; that a run works from end to end is tested elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support import import_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.chdir(ROOT)
    return import_file(ROOT / "benchmarks/scaling.py")


def finished(folder: Path, rows: dict[str, float]) -> None:
    shutil.copytree(ROOT / "teachers/zoo/mnist-edm", folder / "student")
    table = {title: {"MNIST-CNN-FD": distance, "ms/image": 1.0} for title, distance in rows.items()}
    (folder / "metrics.json").write_text(json.dumps(table))


def test_ratios_of_finished_runs(scaling, tmp_path, capsys):
    for size, factor in (("s", 1), ("m", 2)):
        finished(tmp_path / f"teacher-{size}", {"trained network, 18 steps": 1.0})
        rows = {"teacher, 19 NFE": 4.0, "this run, 1 step": 8.0 * factor, "this run, 2 steps": 6.0, "this run, 4 steps": 5.0}
        finished(tmp_path / f"student-{size}", rows)
    scaling.main(["--out", str(tmp_path), "--sizes", "s", "m"])
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert results["m"] == {
        "parameters": 744_401, "teacher": 4.0, "students": {"1 step": 16.0, "2 steps": 6.0, "4 steps": 5.0},
        "ratios": {"1 step": 4.0, "2 steps": 1.5, "4 steps": 1.25},
    }  # fmt: skip
    text = (tmp_path / "scaling.md").read_text()
    assert capsys.readouterr().out == text and "| s | 0.74M | 4.00 | 8.00 | 6.00 | 5.00 | 2.00 | 1.50 | 1.25 |" in text
    assert Image.open(tmp_path / "scaling.png").size[0] > 500


def test_what_is_missing_is_run_by_its_recipe(scaling, tmp_path, capsys):
    """With a mistake in it, so that it ends at once."""
    with pytest.raises(SystemExit) as stop:
        scaling.main(["--out", str(tmp_path), "--sizes", "s", "--teacher", "max_train_steps=0"])
    assert stop.value.code == 1 and "teacher-s.yaml: max_train_steps must be positive" in capsys.readouterr().err
    finished(tmp_path / "teacher-s", {"trained network, 18 steps": 1.0})
    with pytest.raises(SystemExit):
        scaling.main(["--out", str(tmp_path), "--sizes", "s", "--student", "max_train_steps=0"])
    assert "scaling.yaml: max_train_steps must be positive" in capsys.readouterr().err
