"""The benchmark of sizes from end to end, with tiny numbers."""

import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_one_command_trains_distils_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    import scaling

    few = ["max_train_steps=1", "train_batch_size=2", "evaluation.num_samples=50", "evaluation.teacher_steps=1"]
    arguments = ["--out", str(tmp_path), "--sizes", "s", "--teacher", *few, "stable_targets=false", "--student", *few]
    scaling.main(arguments)
    results = json.loads((tmp_path / "scaling.json").read_text())
    row = results["s"]
    assert row["parameters"] == 358_345 and row["ratios"].keys() == {"1 step", "2 steps", "4 steps"}
    assert row["ratios"]["2 steps"] == row["students"]["2 steps"] / row["teacher"]
    assert Image.open(tmp_path / "scaling.png").size[0] > 500 and "| s | 0.36M |" in (tmp_path / "scaling.md").read_text()
    made = (tmp_path / "student-s/metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    scaling.main(arguments)  # everything is there: no run is started
    assert capsys.readouterr().out.startswith("| size |") and "distill" not in capsys.readouterr().out
    assert (tmp_path / "student-s/metrics.json").stat().st_mtime_ns == made
    sys.modules.pop("scaling")
