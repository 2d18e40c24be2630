"""``distill compare``: what it computes, what it keeps, what it refuses, and the page that it writes."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from browser import Browser
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from safetensors.torch import load_file

import distill
import teachers
from distill import cli
from distill.comparison import prepare, words
from distill.comparison.config import ComparisonConfig, ModelConfig, ReferenceConfig, load_comparison, to_dict
from distill.comparison.entries import Point
from distill.comparison.plots import Line, lines_over, plot
from distill.comparison.rows import Row
from distill.comparison.scores import METRICS, Samples, Scorer, combine, outside
from distill.evaluation import Reference, metrics
from distill.evaluation.diversity import near_duplicates, vendi_score
from distill.evaluation.features import FeatureExtractor, load_features
from distill.sampling import sample_teacher
from distill.schedule import sample_seeds
from distill.visual import to_uint8
from teachers.networks import build

ROOT = Path(__file__).parents[2]
NUM = 60


def network(**changes):
    config = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    torch.manual_seed(0)
    native = build("SiT", {**config, "learn_sigma": False, **changes})
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    size = native.config["input_size"]
    return teachers.wrap(native, teachers.RECTIFIED_FLOW, 0.5, (1, size, size), native.config["num_classes"], "index")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Data of three classes, a tiny teacher with a student of a guidance range and one of a fixed scale, and a folder."""
    folder = tmp_path_factory.mktemp("comparison")
    random = np.random.default_rng(0)
    kinds = Features({"image": Image(), "label": Value("int64")})
    (folder / "data").mkdir()
    for split in ("train", "test"):
        pixels = list(random.integers(0, 256, (90, 8, 8), dtype=np.uint8))
        rows = Dataset.from_dict({"image": pixels, "label": [i % 3 for i in range(90)]}, features=kinds)
        rows.to_parquet(folder / "data" / f"{split}.parquet")
    (folder / "images").mkdir()
    for i, pixels in enumerate(random.integers(0, 256, (NUM, 8, 8), dtype=np.uint8)):
        Picture.fromarray(pixels).save(folder / "images" / f"{i}.png")
    teachers.save_pretrained(network(), folder / "teacher", "teacher")
    teachers.save_pretrained(network(), folder / "fixed", "student", guidance_scale=1.5)
    teachers.save_pretrained(network(), folder / "strong", "student", guidance_scale=3.0)
    teachers.save_pretrained(network(guidance_embedding=True), folder / "ranged", "student", guidance_range=[1.0, 4.0])
    return folder


def values(work, out, **changes):
    models = [
        {"name": "teacher", "source": str(work / "teacher"), "steps": [2], "solver": "dpmpp_2m"},
        {"name": "ranged", "source": str(work / "ranged"), "steps": [1, 2]},
        {"name": "fixed", "source": str(work / "fixed"), "steps": [1]},
        {"name": "folder", "images": str(work / "images")},
    ]
    return {
        "output_dir": str(out), "models": models, "data": str(work / "data"), "num_samples": NUM, "seeds": [0, 1],
        "guidance_scales": [1.0, 3.0], **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(work):
    """A finished comparison: its folder and what it returned."""
    return work / "out", distill.compare(values(work, work / "out"))


def row(report, model, steps=None, guidance=None):
    wanted = {"model": model, "steps": steps, "guidance_scale": guidance}
    (found,) = [r for r in report["rows"] if wanted.items() <= r.items()]
    return found


def test_every_model_has_the_points_that_it_can_have(compared):
    folder, report = compared
    points = [(r["model"], r["steps"], r["guidance_scale"], r["network_evaluations"], r["seeds"]) for r in report["rows"]]
    assert points == [
        ("teacher", 2, 1.0, 2, [0, 1]), ("teacher", 2, 3.0, 4, [0, 1]),
        ("ranged", 1, 1.0, 1, [0, 1]), ("ranged", 1, 3.0, 1, [0, 1]), ("ranged", 2, 1.0, 2, [0, 1]),
        ("ranged", 2, 3.0, 2, [0, 1]), ("fixed", 1, 1.5, 1, [0, 1]), ("folder", None, None, None, []),
    ]  # fmt: skip
    assert report == json.loads((folder / "report.json").read_text())
    assert {p.name for p in (folder / "images").iterdir()} == {
        "cost-nfe.png", "cost-ms-per-image.png", "guidance-distance.png", "guidance-precision.png", "guidance-recall.png",
        "samples-guidance-1.png", "samples-guidance-1.5.png", "samples-guidance-3.png",
    }  # fmt: skip


def load_points(folder, **facts):
    found = [json.loads(path.read_text()) for path in (folder / "points").glob("*.json")]
    return [point for point in found if facts.items() <= point["facts"].items()]


def pixels_of(work, split):
    rows = Dataset.from_parquet(str(work / "data" / f"{split}.parquet")).with_format("numpy")
    return torch.from_numpy(np.stack(rows["image"][:])).float()[:, None] / 127.5 - 1


def test_scores_and_pictures_are_those_of_samples_with_these_seeds_and_labels(compared, work):
    folder, report = compared
    extract = load_features("pixels").extract
    seeds = sample_seeds(NUM, torch.Generator().manual_seed(0))
    images = sample_teacher(
        teachers.load(work / "teacher"), seeds, torch.arange(NUM) % 3, 2, "dpmpp_2m", guidance=3.0
    ).clamp(-1, 1)
    real, fake = (metrics.FeatureStatistics().update(extract(x)) for x in (pixels_of(work, "train"), images))
    (point,) = load_points(folder, role="teacher", guidance=3.0, seed=0)
    assert point["scores"]["pixels-FD"] == pytest.approx(metrics.frechet_distance(real, fake), rel=1e-4)
    assert point["scores"]["pixels-Vendi"] == pytest.approx(vendi_score(extract(images)), rel=1e-4)
    nearest = row(report, "teacher", 2, 3.0)["nearest_pairs"]
    assert [p["distance"] for p in nearest] == pytest.approx([d for d, *_ in near_duplicates(extract(images), 6)], rel=1e-4)
    kept = load_file(folder / "points" / point["samples"])
    for which in ("grid", "pair"):
        shown = kept["pairs" if which == "pair" else "grid"].numpy().astype(int)
        drawn = to_uint8(images[kept[f"{which}_indices"]]).astype(int)
        assert len(drawn) == (36 if which == "grid" else 12) and abs(shown - drawn).max() <= 1
    assert report["real"]["num_samples"] == NUM


def test_a_comparison_goes_on_and_computes_only_what_is_missing(compared, work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    times = {path.name: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    (point,) = load_points(out, role="teacher", guidance=3.0, seed=1)
    (other,) = load_points(out, role="teacher", guidance=1.0, seed=0)
    (scores,) = (out / "points").glob(other["samples"].replace(".safetensors", "-*.json"))
    for path in (*(out / "points").glob(point["samples"].replace(".safetensors", "*")), scores):
        path.unlink()
    more = values(work, out)
    more["models"].append({"name": "again", "source": str(work / "fixed"), "steps": [2]})
    report = distill.compare(more)
    now = {path.name: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    changed = {name for name in times if times[name] != now[name]}
    assert len(changed) == 3 and point["samples"] in changed and len(now) == len(times) + 4
    assert other["samples"] not in changed  # its samples were there and were only scored
    for old, new in zip(compared[1]["rows"], report["rows"][: len(compared[1]["rows"])], strict=True):
        assert new["scores"] == old["scores"]


def damaged_safetensors(path):
    data = bytearray(path.read_bytes())
    data[-400:] = bytes(400)
    path.write_bytes(data)


DAMAGE = {
    "no json": (".json", lambda path: path.write_bytes(b"")),
    "cut off": (".json", lambda path: path.write_bytes(path.read_bytes()[:100])),
    "not text": (".json", lambda path: path.write_bytes(b"\xff\xfe")),
    "other json": (".json", lambda path: path.write_text("[]")),
    "no scores": (".json", lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "scores": {}}))),
    "null": (".json", lambda path: path.write_text(path.read_text().replace('"pixels-FD": ', '"pixels-FD": null, "x": '))),
    "samples cut off": (".safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000])),
    "samples zeroed": (".safetensors", damaged_safetensors),
    "samples gone": (".safetensors", Path.unlink),
}


@pytest.mark.parametrize("suffix, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_point_is_made_anew(compared, work, tmp_path, capsys, suffix, damage):
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    (point,) = load_points(out, role="student", guidance=1.5, seed=0)
    stem = point["samples"].removesuffix(".safetensors")
    (path,) = (out / "points").glob(f"{stem}*{suffix}")
    damage(path)
    report = distill.compare(values(work, out, models=values(work, out)["models"][1:3]))
    assert row(report, "fixed", 1, 1.5)["scores"] == row(compared[1], "fixed", 1, 1.5)["scores"]
    if damage is not Path.unlink:
        assert f"{path} is damaged: fixed, 1 step, guidance 1.5, seed 0 is" in capsys.readouterr().out


def test_another_precision_is_another_point(compared, work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    models = values(work, out)["models"][1:3]
    report = distill.compare(values(work, out, models=models, seeds=[0], mixed_precision="bf16"))
    (half,) = load_points(out, role="student", guidance=1.5, seed=0, mixed_precision="bf16")
    (plain,) = [p for p in load_points(out, role="student", guidance=1.5, seed=0) if "mixed_precision" not in p["facts"]]
    kept = [load_file(out / "points" / p["samples"]) for p in (half, plain)]
    features = [tensors["features"] for tensors in kept]
    assert 0 < (features[0] - features[1]).norm() / features[1].norm() < 0.05
    assert row(report, "fixed", 1, 1.5)["points"] == [half["samples"]]
    page = (out / "report.html").read_text()
    assert "in bf16, on" in page and "in fp32, on" in (compared[0] / "report.html").read_text()


def test_intervals_are_over_seeds_or_of_one_set_or_absent(compared):
    _, report = compared
    drawn, folder = row(report, "teacher", 2, 1.0)["scores"], row(report, "folder")["scores"]
    assert all(score["from"] == "2 seeds" for score in drawn.values())
    assert {key for key, score in folder.items() if score["from"] == "one set of samples"} == {
        "pixels-precision (k=3)", "pixels-precision (k=5)", "pixels-density (k=5)", "pixels-nearest training image",
        "pixels-memorised",
    }  # fmt: skip
    assert folder["pixels-FD"]["interval"] is None and "pixels-asked class" not in folder
    assert report["real"]["scores"]["pixels-memorised"]["value"] == pytest.approx(1 / NUM)
    for score in (*drawn.values(), *folder.values()):
        low, high = score["interval"] or (score["value"],) * 2
        assert low <= score["value"] <= high


def test_students_each_of_its_own_scale_are_one_line(work, tmp_path):
    sources = [str(work / name) for name in ("strong", "fixed")]
    models = [
        {"name": "teacher", "source": str(work / "teacher"), "steps": [2], "guidance_scales": [1.5, 3.0]},
        {"name": "both", "source": sources, "steps": [1, 2]},
    ]
    report = distill.compare(values(work, tmp_path / "out", models=models, seeds=[0]))
    points = [(r["model"], r["steps"], r["guidance_scale"], r["source"]) for r in report["rows"][2:]]
    assert points == [("both", n, scale, source) for scale, source in ((1.5, sources[1]), (3.0, sources[0])) for n in (1, 2)]
    assert set(report["sha256"]["both"]) == set(sources)
    page = (tmp_path / "out/report.html").read_text()
    assert all(source in page for source in sources) and "<h1>" in page and "teacher and both: 60 samples" in page


def test_a_difference_counts_only_outside_both_intervals():
    def score(low, high):
        return {"interval": [low, high]}

    assert [outside(score(0, 1), score(*other)) for other in ((0.5, 2), (1.5, 2), (-2, -1))] == [0, -1, 1]
    rows = [{"scores": {"x-recall (k=3)": v}, "intervals": {}} for v in (0.9, 1.0)]
    combined = combine(rows)["x-recall (k=3)"]
    assert combined["value"] == pytest.approx(0.95) and combined["interval"] == [pytest.approx(0.95 - 12.706 * 0.05), 1.0]
    same = combine([{"scores": {"x-asked class": 1.0}, "intervals": {}, "num_samples": 100}] * 2)["x-asked class"]
    assert same["interval"] == [pytest.approx(200 / (200 + 1.96**2), abs=1e-5), 1.0]


def test_scores_of_collapsed_and_of_memorised_samples():
    generator = torch.Generator().manual_seed(0)
    training, real = torch.randn(300, 8, generator=generator), torch.randn(100, 8, generator=generator)
    labels = torch.arange(100) % 4
    extractor = FeatureExtractor("own", lambda x: x)
    reference = Reference(extractor, metrics.FeatureStatistics().update(training), training, real, None)
    scorer = Scorer(reference, Samples(real, labels, labels), 4)
    good, _ = scorer.score(Samples(torch.randn(100, 8, generator=generator), labels, labels))
    collapsed, _ = scorer.score(Samples(real[labels] + 1e-3 * torch.randn(100, 8, generator=generator), labels, labels))
    copied, intervals = scorer.score(Samples(training[:100] + 1e-4, labels, (labels + (labels == 0)) % 4))
    for key in ("recall (k=3)", "coverage (k=5)", "Vendi", "Vendi in a class", "distance in a class"):
        assert collapsed[f"own-{key}"] < 0.6 * good[f"own-{key}"], key
    assert collapsed["own-near duplicates"] == 1 and good["own-near duplicates"] < 0.1
    assert copied["own-memorised"] == 1 and good["own-memorised"] < 0.1
    assert copied["own-asked class"] == 0.75 and good["own-class entropy"] == pytest.approx(math.log(4))
    low, high = intervals["own-asked class"]
    assert 0.65 < low < 0.75 < high < 0.85


MISTAKES = [
    ({"num_sample": 5}, "unknown key num_sample; did you mean num_samples?"),
    ({"models": [{"name": "a", "source": "teacher", "step": [1]}]}, "models[0].step; did you mean models[0].steps?"),
    ({"models": []}, "models must hold at least one model"),
    ({"models": [{"name": "real images", "source": "teacher"}]}, "no model can be named 'real images'"),
    ({"models": [{"name": "a", "source": "two"}]}, "the models know 2 classes, 'data' has labels up to 2"),
    ({"output_dir": " "}, "output_dir must name a folder"),
    ({"output_dir": "images/0.png/out"}, "0.png is a file"),
    ({"models": [{"name": "a"}]}, "models[0] needs exactly one of source, a model, and images"),
    ({"models": [{"name": "a", "images": "images", "steps": [1]}]}, "models[0].steps belongs to a model"),
    ({"models": [{"name": "a", "source": "teacher"}] * 2}, "names of models must differ, got 'a' twice"),
    ({"models": [{"name": "a", "source": "teacher", "solver": "euler"}]}, "allowed: heun, dpmpp_2m"),
    ({"models": [{"name": "a", "source": "fixed", "solver": "heun"}]}, "is a student and solves no ODE"),
    ({"models": [{"name": "a", "source": "fixed", "steps": [9]}]}, "model 'a': num_inference_steps must be 1 to 8, got 9"),
    ({"models": [{"name": "a", "source": "fixed", "guidance_scales": [2.0]}]}, "distilled at the fixed guidance scale 1.5"),
    ({"models": [{"name": "a", "source": "ranged"}], "guidance_scales": [5.0]}, "scales from 1 to 4, and is asked for 5"),
    ({"models": [{"name": "a", "source": "teacher"}, {"name": "b", "source": "mnist-edm"}]}, "images of one shape: 'a' has"),
    ({"models": [{"name": "a", "source": "teacher"}, {"name": "b", "source": "five"}]}, "'a' has 3, 'b' has 5"),
    ({"models": [{"name": "a", "source": "nobody"}]}, "no model"),
    ({"models": [{"name": "a", "source": []}]}, "models[0].source must hold at least one value"),
    ({"models": [{"name": "a", "source": ["fixed", "fixed"]}]}, "models[0].source must differ, got 'fixed' twice"),
    ({"models": [{"name": "a", "source": ["fixed", "./fixed"]}]}, "'fixed' and './fixed' are both of 1.5"),
    ({"models": [{"name": "a", "source": ["fixed", "teacher"]}]}, "'teacher' is a teacher"),
    ({"models": [{"name": "a", "source": ["ranged", "fixed"]}]}, "'ranged' is a student of a range of scales"),
    ({"models": [{"name": "a", "images": "nowhere"}]}, "data source 'nowhere' does not exist"),
    ({"models": [{"name": "a", "images": "empty"}]}, "cannot be loaded"),
    ({"models": [{"name": "a", "images": "broken"}]}, "'broken': image "),
    ({"models": [{"name": "a", "images": "few"}]}, "'few' holds 49 images, scores need at least 50"),
    ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'; allowed: no, bf16"),
    ({"num_samples": 49}, "num_samples must be at least 50, got 49"),
    ({"seeds": []}, "seeds must hold at least one value"),
    ({"guidance_scales": [1.0, 1.0]}, "guidance_scales must differ, got 1.0 twice"),
    ({"guidance_scales": [-1.0]}, "must be finite numbers of 0 or more"),
    ({"features": "MNIST-CNN"}, "features MNIST-CNN take images of shape [1, 28, 28], got [1, 8, 8]"),
    ({"features": "inception"}, "allowed: MNIST-CNN, pixels"),
    ({"data": "no-such/data"}, "data source 'no-such/data' does not exist"),
]


@pytest.fixture(scope="module")
def wrong(work):
    teachers.save_pretrained(network(num_classes=5), work / "five", "teacher")
    teachers.save_pretrained(network(num_classes=2), work / "two", "teacher")
    for name in ("empty", "broken", "few"):
        (work / name).mkdir()
    for i, path in enumerate(sorted((work / "images").iterdir())):
        (work / "broken" / f"{i}.png").write_bytes(b"no picture" if i == 3 else path.read_bytes())
        if i < 49:
            shutil.copy(path, work / "few")
    return work


@pytest.mark.parametrize("change, message", MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_one_sentence_before_anything_is_drawn(change, message, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(wrong)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values(Path("."), tmp_path / "out"), **change}))
    assert cli.main(["compare", str(tmp_path / "config.yaml")]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0], error
    assert not (tmp_path / "out").exists()


def test_the_command_line_overrides_values(work, compared, tmp_path, capsys):
    shutil.copytree(compared[0], tmp_path / "out")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(work, "nowhere")))
    assert cli.main(["compare", str(tmp_path / "config.yaml"), f"output_dir={tmp_path / 'out'}", "seeds=[0]"]) == 0
    printed = capsys.readouterr().out
    assert "| ranged, 2 steps, guidance 3 | 60 | 2 |" in printed and f"report in {tmp_path / 'out'}/report.html" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["command"].startswith("distill compare ") and "seeds=[0]" in report["command"]
    assert row(report, "teacher", 2, 1.0)["seeds"] == [0]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/compare").glob("*.yaml")), ids=lambda p: p.name)
def test_every_comparison_that_ships_can_be_drawn(path, tmp_path, monkeypatch):
    config = load_comparison(path)
    assert load_comparison(to_dict(config)) == config
    sources = [source for model in config.models for source in model.sources]
    monkeypatch.chdir(tmp_path)  # what was trained here is not there for everyone
    if own := [source for source in sources if source.startswith("runs/")]:
        with pytest.raises(FileNotFoundError, match=f"no model '{own[0]}'"):
            prepare(config)
    else:
        assert [e.source for e in prepare(config)] == sources


def test_the_documentation_names_every_key_and_score():
    text = (ROOT / "docs/compare.md").read_text()
    for section in (ComparisonConfig, ModelConfig, ReferenceConfig):
        for field in dataclasses.fields(section):
            assert f"`{field.name}`" in text, field.name
    for metric in METRICS:
        assert f"`{metric.key}`" in text, metric.key


def drawn_row(name, role, guidance, distance, steps=1):
    """A row of two seeds, whose distances differ by little."""
    entry = SimpleNamespace(name=name, role=role, source=name, config={})
    scores = [{"x-FD": distance - 0.1}, {"x-FD": distance + 0.1}]
    results = [{"scores": found, "intervals": {}, "num_samples": 50, "ms_per_image": 2.0} for found in scores]
    return Row([Point(entry, steps, guidance, seed, 50, steps) for seed in (0, 1)], results, Path("none"))


def test_captions_compare_like_with_like():
    rows = [drawn_row("t", "teacher", w, d, 12) for w, d in ((1.0, 3.0), (4.0, 30.0))]
    rows += [drawn_row("s", "student", 4.0, 10.0), drawn_row("r", "student", 1.0, 3.5)]
    at_four = words.about_cost([rows[1], rows[2]], "x-FD", "nfe")
    assert "s in 1 step, has" in at_four and "0.33 times the 30.0 of t in 12 steps at" in at_four and "within" not in at_four
    assert "1.17 times" in (close := words.about_cost([rows[0], rows[3]], "x-FD", "nfe")) and "within the intervals" in close
    mixed = words.about_cost([rows[0], rows[2]], "x-FD", "nfe")
    assert "s in 1 step at guidance scale 4, has" in mixed and "of t in 12 steps at guidance scale 1 at" in mixed
    inner = [drawn_row("u", "student", w, d) for w, d in ((1.5, 50.0), (2.0, 90.0))]
    caption = words.about_guidance([*rows[:2], *inner, *(drawn_row("v", "student", w, w) for w in (1.0, 4.0))], "x-FD", "FD")
    changes = "from 3.00 to 30.0 for t in 12 steps and from 1.00 to 4.00 for v in 1 step"
    assert caption == f"From guidance scale 1 to 4, FD goes {changes}."


def test_a_model_has_one_marker_and_an_axis_enough_ticks():
    rows = [drawn_row(name, "student", w, 20 + w, steps) for name in "ab" for steps in (1, 2) for w in (1.0, 4.0)]
    over_cost, over_scale = (lines_over(rows, "x-FD", x, by_steps) for x, by_steps in (("nfe", False), ("guidance", True)))
    markers = {line.name.split(",")[0]: line.drawn["marker"] for line in over_cost}
    assert all(line.drawn["marker"] == markers[line.name.split(",")[0]] for line in over_scale)
    assert len({(line.drawn["marker"], str(line.drawn["linestyle"])) for line in over_scale}) == len(over_scale) == 4
    figure = plot(over_cost, None, "evaluations", "distance", (True, True))
    assert len(figure.axes[0].get_yticks()) >= 3


@pytest.mark.parametrize("name", ["sCD", "EDM teacher, 12 steps", "a student of sCD and VSD, 4 steps"])
def test_names_beside_a_plot_are_whole(name):
    lines = [Line(f"{name}{i}", i, i, [(1.0, 2.0 + i, None), (2.0, 3.0, None)]) for i in range(2)]
    figure = plot(lines, 1.0, "guidance scale", "distance", (False, False))
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [f"{name}0", f"{name}1", "real images"]
    for text in axes.texts:
        assert axes.bbox.x1 < text.get_window_extent().x0 and text.get_window_extent().x1 <= figure.bbox.x1


def test_the_page_needs_nothing_else(compared):
    page = (compared[0] / "report.html").read_text()
    assert {address.split("/")[2] for address in re.findall(r'https?://[^"\s]+', page)} == {"www.w3.org"}  # names of XML
    sha = hashlib.sha256((Path(compared[1]["rows"][0]["source"]) / "model.safetensors").read_bytes()).hexdigest()
    assert sha in page and "distill.compare(" in page and page.count("<svg") == 5


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


SHOWN = """[...document.querySelectorAll('[data-line] img')].map(i => i.src).join()"""
PAIRS = """document.querySelector('[data-pairs]').innerHTML"""
TABLES = """[...document.querySelectorAll('tbody[data-scale]:not([hidden])')].map(b => b.dataset.scale).join()"""
NOTES = """[...document.querySelectorAll('[data-line] .at')].map(n => n.textContent).join('|')"""
STATUS = "document.getElementById('status').textContent"


def test_slider_and_picker_change_what_is_shown(compared, browser):
    browser.open(compared[0] / "report.html")
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    first, pairs = browser.evaluate(SHOWN), browser.evaluate(PAIRS)
    assert browser.evaluate(STATUS) == "Showing guidance scale 1, all classes."
    browser.evaluate("document.getElementById('guidance').focus()")
    for _ in range(2):
        browser.press("ArrowRight")
    assert browser.evaluate(STATUS) == "Showing guidance scale 3, all classes."
    assert browser.evaluate("document.getElementById('guidance').getAttribute('aria-valuetext')") == "3"
    guided = browser.evaluate(SHOWN)
    assert guided != first and browser.evaluate(PAIRS) != pairs
    assert browser.evaluate(TABLES) == "3.0,3.0" and browser.evaluate(NOTES) == "|||at guidance scale 1.5||"
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.id") == "class"
    browser.press("ArrowDown")
    assert browser.evaluate(STATUS) == "Showing guidance scale 3, class 0."
    assert browser.evaluate(SHOWN) not in (first, guided)
    assert browser.evaluate("location.hash") == "#guidance=3&class=0"
    assert browser.problems == [] and {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


def test_an_address_leads_to_what_was_shown(compared, browser):
    browser.open(compared[0] / "report.html", fragment="#guidance=1.5&class=2")
    assert browser.evaluate(STATUS) == "Showing guidance scale 1.5, class 2."
    assert browser.problems == []


def test_the_page_fits_a_phone_and_prints(compared, browser):
    browser.open(compared[0] / "report.html", width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.evaluate("document.querySelector('table.scores').scrollWidth > 390")  # it scrolls in its own box
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF") and browser.problems == []
