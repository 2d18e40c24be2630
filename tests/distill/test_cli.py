"""The commands as a user types them, and the errors they print."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import teachers
from distill import cli, run
from distill.recipe import load_recipe
from distill.sampling import generate
from distill.schedule import student_times

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(make_teacher, tmp_path):
    teachers.save_pretrained(make_teacher("SiT"), tmp_path / "model", "student")
    return str(tmp_path / "model")


def test_sample_a_grid(model, tmp_path, capsys):
    out = tmp_path / "new/grid.png"
    assert cli.main(["sample", model, "--num", "16", "--steps", "2", "--labels", "1", "--out", str(out)]) == 0
    assert Image.open(out).size == (8 * 10 * 2, 2 * 10 * 2)
    assert "16 images in" in capsys.readouterr().out
    assert cli.main(["sample", model, "--num", "7", "--columns", "5", "--out", str(out)]) == 0
    assert Image.open(out).size == (5 * 10 * 2, 2 * 10 * 2)  # the last row is not full


def test_a_teacher_is_sampled_with_a_guidance_teacher(tmp_path):
    arrays = []
    for changes in ([], ["--guidance-scale", "2"], ["--guidance-scale", "2", "--guidance-teacher", "mnist-flow"]):
        command = ["sample", "mnist-edm", "--num", "2", "--steps", "3", "--out", str(tmp_path / "samples.npz"), *changes]
        assert cli.main(command) == 0
        with np.load(tmp_path / "samples.npz") as samples:
            arrays.append(samples["images"])
    guide, teacher = teachers.load("mnist-flow"), distill.from_pretrained("mnist-edm")
    images = teacher.sample(2, 3, guidance_scale=2.0, guidance_teacher=guide)
    expected = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(arrays[2], expected)
    assert not any(np.array_equal(arrays[i], arrays[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    assert teacher.network.guidance_teacher is None


def test_numbers_of_samples_and_steps_are_whole(model):
    for wrong in ({"num": 2.5}, {"num": "2"}, {"num_inference_steps": 1.5}, {"batch_size": 2.0}, {"seed": None}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer, got"):
            distill.from_pretrained(model).sample(**{"num": 2, **wrong})
    assert len(distill.from_pretrained(model).sample(np.int64(2))) == 2


def test_a_student_is_sampled_at_given_times(model, tmp_path):
    out, student = tmp_path / "samples.npz", distill.from_pretrained(model)
    assert cli.main(["sample", model, "--num", "3", "--intermediate-times", "0.9", "0.4", "--out", str(out)]) == 0
    times = student_times(3, student.network.sigma_data, [0.9, 0.4])
    expected, _ = next(generate(student.network, 3, num_inference_steps=3, role="student", times=times))
    assert torch.equal(student.sample(3, intermediate_times=[0.9, 0.4]), expected)
    with np.load(out) as samples:
        assert np.array_equal(samples["images"], ((expected + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    for steps, wrong, message in (
        (2, [0.9, 0.4], "2 steps need 1 intermediate times"), (None, 1.1, "must be a list of numbers, got 1.1"),
        (None, [0.4, 0.9], "must decrease"), (None, [0.1] * 8, "must be 1 to 8, got 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            student.sample(3, steps, intermediate_times=wrong)
    with pytest.raises(ValueError, match="intermediate_times are a student's"):
        distill.from_pretrained("mnist-edm").sample(2, 3, intermediate_times=[1.1, 0.4])


def test_sample_arrays(model, tmp_path):
    out = tmp_path / "samples.npz"
    assert cli.main(["sample", model, "--num", "7", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert arrays["images"].shape == (7, 8, 8, 1) and arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "samples.npz"]


def test_python_and_command_line_agree(model, tmp_path):
    out = tmp_path / "samples.npz"
    cli.main(["sample", model, "--num", "4", "--steps", "1", "--seed", "5", "--out", str(out)])
    images = distill.from_pretrained(model).sample(4, num_inference_steps=1, seed=5)
    expected = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    with np.load(out) as arrays:
        assert np.array_equal(arrays["images"], expected)


def test_export_and_teachers(model, tmp_path, capsys):
    assert cli.main(["export", model, str(tmp_path / "pipe")]) == 0
    assert (tmp_path / "pipe/model_index.json").is_file()
    assert cli.main(["teachers", "list"]) == 0
    assert "mnist-edm" in capsys.readouterr().out
    assert cli.main(["teachers", "inspect", "mnist-edm"]) == 0
    assert "SongUNet" in capsys.readouterr().out


def test_a_model_is_converted_to_an_empty_or_an_old_model_folder_only(model, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        assert cli.main(["teachers", "convert", model, str(out)]) == 0
    pipeline = str(tmp_path / "pipeline")
    assert cli.main(["export", model, pipeline]) == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "bert"}')
    (out / "notes.txt").write_text("mine")
    for folder, what in ((pipeline, "README.md"), (tmp_path / "theirs", "config.json"), (out, "notes.txt")):
        assert cli.main(["teachers", "convert", model, str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"is not empty and not a model folder: it holds {what}; choose another" in error
    assert cli.main(["teachers", "convert", model, str(out / "notes.txt")]) == 1
    assert "notes.txt is a file; choose another folder" in capsys.readouterr().err
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == {"model_type": "bert"}


def test_evaluate(tmp_path, capsys, digits):
    out = tmp_path / "scores.json"
    data = ["--data", digits, "--features", "MNIST-CNN"]
    assert cli.main(["evaluate", "mnist-edm", "--steps", "2", "--num", "60", "--out", str(out), *data]) == 0
    scores = json.loads(out.read_text())
    assert scores["num_samples"] == 60 and scores["floor"]["num_samples"] == 60
    assert "real test images (60)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb",
    [["sample"], ["evaluate"], ["compare"], ["export"], ["plan"], ["precompute", "latents"], ["precompute", "prompts"],
     ["teachers", "inspect"], ["teachers", "list"]],
)
def test_every_verb_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb, "--help"])
    assert stop.value.code == 0 and "example: distill " + " ".join(verb) in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sample", "mnist-emd", "--out", "x.png"], "did you mean 'mnist-edm'?"),
        (["sample", "mnist-edm", "--out", "x.jpg"], "must end in .png or .npz"),
        (["sample", "mnist-edm", "--steps", "0", "--out", "x.png"], "num_inference_steps must be at least 1"),
        (["sample", "mnist-edm", "--labels", "12", "--out", "x.png"], "label 12 is out of range"),
        (["sample", "mnist-edm", "--labels", "10", "--out", "x.png"], "this model has classes 0 to 9"),
        (["sample", "mnist-edm", "--solver", "euler", "--out", "x.png"], "allowed: heun, dpmpp_2m"),
        (["sample", "mnist-edm", "--mixed-precision", "fp16", "--out", "x.png"], "is 'fp16'; allowed: no, bf16"),
        (["sample", "mnist-edm", "--device", "gpu", "--out", "x.png"], "'gpu' is no device; allowed are cpu, and with"),
        (["evaluate", "mnist-edm-scm", "--num", "60", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        # Of two mistakes the cheap one is found first: samples are asked for before their reference is read.
        (["evaluate", "mnist-edm-scm", "--steps", "0", "--data", "not-there"], "num_inference_steps must be 1 to 8, got 0"),
        (["sample", "mnist-edm", "--columns", "0", "--out", "x.png"], "--columns must be at least 1"),
        (["sample", "mnist-edm", "--batch-size", "0", "--out", "x.png"], "batch_size must be at least 1"),
        (["sample", "mnist-edm", "--num", "0", "--out", "x.png"], "at least 1"),
        (["sample", "mnist-edm", "--guidance-scale", "nan", "--out", "x.png"], "must be a finite number, got nan"),
        (["sample", "mnist-edm", "--seed", str(2**70), "--out", "x.png"], "seed must be from 0"),
        (["sample", "mnist-edm-scm", "--solver", "dpmpp_2m", "--out", "x.png"], "a student solves no ODE"),
        (["sample", "mnist-edm", "--guidance-teacher", "mnist-flow", "--out", "x.png"], "needs a guidance_scale"),
        (["sample", "mnist-edm", "--guidance-scale", "2", "--guidance-teacher", "mnist-flo", "--out", "x.png"],
         "did you mean 'mnist-flow'?"),
        (["sample", "mnist-edm", "--guidance-scale", "2", "--guidance-teacher", "mnist-edm-scm", "--out", "x.png"],
         "'mnist-edm-scm' is a student"),
        (["evaluate", "mnist-edm-scm", "--guidance-scale", "2", "--guidance-teacher", "mnist-flow"], "for a teacher"),
        (["evaluate", "mnist-edm-scm", "--num", "60", "--solver", "dpmpp_2m"], "a student solves no ODE"),
        (["evaluate", "mnist-edm-scm", "--num", "60", "--steps", "0", "--data", "DIGITS"], "1 to 8, got 0"),
        (["evaluate", "mnist-edm-scm", "--num", "49"], "metrics need at least 50 samples, got 49"),
        (["evaluate", "mnist-edm-scm", "--out", "/dev/null/x.json"], "--out /dev/null/x.json: /dev/null is a file"),
        (["sample", "mnist-edm-scm", "--out", "/dev/null/x.png"], "--out /dev/null/x.png: /dev/null is a file"),
        (["evaluate", "mnist-edm", "--num", "60", "--features", "inception"], "allowed: MNIST-CNN, pixels"),
        (["evaluate", "mnist-edm", "--num", "60", "--data", "no-such/mnist"], "data source 'no-such/mnist' does not exist"),
        (["evaluate", "mnist-edm", "--num", "60", "--data", "hf://no-such/mnist"], "'hf://no-such/mnist' does not exist"),
        (["evaluate", "mnist-edm", "--num", "60", "--data", "data/my/mnist"], "a folder, or a hub id (owner/name)"),
        (["evaluate", "mnist-edm", "--num", "60", "--data", "teacher"], "stands for samples that a distillation draws"),
        (["teachers", "inspect", "google/ddpm-cifar10-32"], "it would be hf://google/ddpm-cifar10-32"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    assert cli.main([digits if argument == "DIGITS" else argument for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["recipes/nothing.yaml"], "no recipe 'recipes/nothing.yaml'; recipes that ship: "),
        (["recipes/mnist-flwo.yaml"], "did you mean mnist-flow.yaml?"),
        (["recipes/compare/report.yaml"], "is a comparison, which trains nothing: run distill compare"),
        (["mnist.yaml", "max_train_stepz=3"], "did you mean max_train_steps?"),
        (["mnist.yaml", "teacher=nobody", "--check"], "no model 'nobody'"),
        (["mnist.yaml", "sample_shape=[3,32,32]", "--check"], "take samples of shape [1, 28, 28], got [3, 32, 32]"),
        (["mnist.yaml", "evaluation.also=[mnist-edm]"], "mnist-edm is not a student"),
        (["mnist.yaml", "evaluation.features=inception"], "allowed: MNIST-CNN, pixels"),
        (["mnist.yaml", "teacher=mnist-edm-scm"], "'mnist-edm-scm' is a student"),
        (["mnist.yaml", "guidance_scale=2", "guidance_teacher=mnist-edm-scm", "--check"], "name its teacher instead"),
        (["teachers/mnist-edm.yaml", "network=null", "teacher=mnist-edm", "stable_targets=false",
          "velocity_teacher=mnist-edm-scm", "--check"], "name its teacher instead"),
        (["mnist.yaml", "output_dir=LICENSE/run", "--check"], "LICENSE is a file"),
        (["mnist-tangent.yaml", "train_batch_size=10000000", "--check"], "GB can be used; what would fit: "),
        (["mnist.yaml", "resume_from_checkpoint=nowhere"], "'nowhere' is not a checkpoint"),
        (["mnist.yaml", "seed=-1", "--check"], "seed must be from 0 to 2^63 - 1, got -1"),
        (["mnist.yaml", "seed=99999999999999999999", "--check"], "seed must be from 0 to 2^63 - 1"),
    ],
)
def test_recipe_mistakes_are_one_line(arguments, message, capsys):
    assert run.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err


# Recipes for a model that is not here -> its name, and what they say of it.
ELSEWHERE = {
    "cifar10.yaml": ("edm-cifar10-32x32-uncond-vp", "not run here"), "imagenet64.yaml": ("edm2-img64-s", "not run here"),
    "imagenet512.yaml": ("edm2-img512-s", "not run here"), "imagenet512-vsd.yaml": ("edm2-img512-s", "not run here"),
    **{f"imagenet64-{size}.yaml": (f"edm2-img64-{size}", "not run here") for size in ("s", "m", "l", "xl")},
    **{f"imagenet512-{size}.yaml": (f"edm2-img512-{size}", "not run here") for size in ("s", "m", "l", "xl", "xxl")},
    "scaling.yaml": ("runs/scaling/teacher-s", "benchmarks/scaling.py"),
    "sd3.yaml": ("stable-diffusion-3-medium", "not run here"),
    "mnist-edm2.yaml": ("runs/mnist-edm2-retrofit", "first run mnist-edm2-retrofit.yaml"),
    "families/ddpm-retrofit.yaml": ("runs/teachers/ddpm", "benchmarks/diffusers_teachers.py ddpm"),
    "families/ddpm.yaml": ("runs/teachers/ddpm", "families/ddpm-retrofit.yaml"),
    "families/dit-retrofit.yaml": ("runs/teachers/dit", "benchmarks/diffusers_teachers.py dit"),
    "families/dit.yaml": ("runs/teachers/dit", "families/dit-retrofit.yaml"),
}  # fmt: skip
RECIPES = sorted(p.relative_to(ROOT / "recipes").as_posix() for p in (ROOT / "recipes").rglob("*.yaml"))
RECIPES = [name for name in RECIPES if not name.startswith("compare/")]  # for distill compare, they train nothing


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ELSEWHERE])
def test_check_passes_every_recipe_and_trains_nothing(recipe, capsys, tmp_path):
    path = ROOT / "recipes" / recipe
    assert run.main([str(path), "--check", f"output_dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "recipe is valid" in printed and "for activations" in printed and not list(tmp_path.iterdir())
    assert ("derivative along the PF-ODE" in printed) == (load_recipe(path).objective in ("distillation", "training"))


@pytest.mark.parametrize("recipe, missing, note", [(name, *rest) for name, rest in ELSEWHERE.items()])
def test_a_recipe_for_a_model_that_is_not_here_says_which(recipe, missing, note, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main([str(ROOT / "recipes" / recipe), "--check"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"no model {missing!r}" in error and note in error


@pytest.fixture
def mistaken(tmp_path):
    """``mnist-flow`` saved as if its time ran the other way."""
    teacher = teachers.load("mnist-flow")
    teacher.parameterization = teachers.Parameterization("flow", "velocity", "1-s")
    teachers.save_pretrained(teacher, tmp_path / "mistaken", "teacher")
    return str(tmp_path / "mistaken")


def test_a_teacher_under_a_wrong_convention_is_refused_before_training(mistaken, tmp_path, capsys, digits):
    for changes in ([f"data={digits}", "--check"], ["data=teacher"]):
        arguments = ["mnist-flow.yaml", f"teacher={mistaken}", f"output_dir={tmp_path / 'run'}", *changes]
        assert run.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "mistaken denoises badly under its parameterization Parameterization(" in error
        assert "under RECTIFIED_FLOW it is 0." in error and ("on its own samples" in error) == ("data=teacher" in changes)
    assert not list((tmp_path / "run").glob("*"))
    assert cli.main(["teachers", "inspect", mistaken]) == 1
    captured = capsys.readouterr()
    assert "network: SiT" in captured.out and "under RECTIFIED_FLOW it is 0." in captured.err


def test_so_are_those_that_give_guidance_or_a_velocity(mistaken, capsys):
    velocity = ["teachers/mnist-edm.yaml", "network=null", "teacher=mnist-edm", "stable_targets=false"]
    for arguments in (
        [*velocity, f"velocity_teacher={mistaken}"], ["mnist.yaml", "guidance_scale=2", f"guidance_teacher={mistaken}"],
    ):  # fmt: skip
        assert run.main([*arguments, "--check"]) == 1
        assert "mistaken denoises badly under its parameterization" in capsys.readouterr().err
        assert run.main([argument.replace(mistaken, "mnist-flow") for argument in arguments] + ["--check"]) == 0
        assert f"{arguments[-1].split('_')[0]} teacher: its parameterization fits" in capsys.readouterr().out


def test_check_names_sections_and_warns_of_a_steep_time(capsys):
    """An override of ``vsd.share`` alone brings in all of VSD."""
    assert run.main(["mnist.yaml", "vsd.share=0.5", "--check"]) == 0
    assert "recipe is valid: distillation with segments and vsd, 440 steps of 64\n" in capsys.readouterr().out
    assert run.main(["mnist-edm2.yaml", "student=null", "--check"]) == 0
    assert "warning: the student's time embedding turns at a speed of 2, above 1: it may" in capsys.readouterr().out


def test_inspect_tells_whether_a_teacher_denoises(model, capsys):
    assert cli.main(["teachers", "inspect", "mnist-flow"]) == 0
    assert "probe: its parameterization fits: denoising error 0." in capsys.readouterr().out
    assert cli.main(["teachers", "inspect", model]) == 0  # a student
    assert "probe" not in capsys.readouterr().out


def test_help_imports_nothing_slow():
    script = "import sys; from distill import cli\ntry: cli.main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "Few-step consistency models" in result.stdout
    assert not {"torch", "numpy", "diffusers", "datasets", "accelerate", "teachers"} & set(result.stderr.split())


def test_a_reader_that_stops_is_no_error(capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["teachers", "list"]) == 141
    assert not capfd.readouterr().err


def test_a_student_cannot_be_distilled():
    with pytest.raises(ValueError, match="has no PF-ODE velocity"):
        distill.from_pretrained("mnist-edm-scm").train("mnist.yaml")


def on_one_core():
    """Before a process starts that would use all of them: the other tests need them too."""
    if hasattr(os, "sched_setaffinity"):  # Linux only
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])


def test_the_main_job_end_to_end(tmp_path, digits):
    """``accelerate launch distill/run.py`` on the real recipe with small numbers, then the Python API on its result."""
    command = [
        shutil.which("accelerate", path=str(Path(sys.executable).parent)), "launch", "--num_processes", "1",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "distill/run.py", "recipes/mnist.yaml",
        f"output_dir={tmp_path / 'run'}", "max_train_steps=3", "train_batch_size=8", "evaluation.num_samples=50",
        "evaluation.teacher_steps=2", "evaluation.validation_samples=50", f"evaluation.data={digits}",
        "evaluation.features=MNIST-CNN",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=on_one_core)
    assert result.returncode == 0, result.stderr[-3000:]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"grid.png", "metrics.json", "metrics.md", "curves.png", "student", "pipeline", "metrics.jsonl"} <= names
    rows = json.loads((tmp_path / "run/metrics.json").read_text())
    assert {"teacher, 3 NFE", "this run, 1 step", "this run, 2 steps", "this run, 4 steps"} <= rows.keys()
    assert "MNIST-CNN-FD" in result.stdout and "MNIST-CNN-FD" in (tmp_path / "run/pipeline/README.md").read_text()
    model = distill.from_pretrained(tmp_path / "run")
    images = model.sample(4, num_inference_steps=2, labels=[3] * 4, seed=0)
    assert model.role == "student" and images.shape == (4, 1, 28, 28) and images.abs().max() <= 1


def test_python_api_trains_and_exports(make_teacher, tmp_path, digits):
    sizes = dict(input_size=28, patch_size=4, depth=1, num_classes=10)  # with the real teacher it takes half a minute
    teacher = make_teacher("SiT", sigma_data=0.616, classes=10, **sizes).twin(sample_shape=(1, 28, 28))
    teachers.save_pretrained(teacher, tmp_path / "teacher", "teacher")
    model = distill.from_pretrained(tmp_path / "teacher")
    model.train(
        "recipes/mnist.yaml", max_train_steps=2, train_batch_size=4, output_dir=str(tmp_path / "run"),
        evaluation__num_samples=50, evaluation__teacher_steps=0, evaluation__num_inference_steps=[1, 2],
        evaluation__search_samples=50, data=digits, intermediate_times={4: [1.1, 0.8, 0.4]},
    )  # fmt: skip
    assert model.role == "student" and model.config["metrics"].keys() == {"this run, 1 step", "this run, 2 steps"}
    model.export(tmp_path / "pipeline")
    assert (tmp_path / "pipeline/model_index.json").is_file()
    # The searched times, and the recipe's, are in every form the student takes, and are what it samples at.
    times = model.config["sampling"]["2"]
    default = student_times(2, model.network.sigma_data)
    assert model.config["sampling"]["4"] == [default[0], 1.1, 0.8, 0.4]
    assert times[0] == default[0] and 0 < times[1] < times[0]
    saved = distill.from_pretrained(tmp_path / "run")
    exported = distill.from_pretrained(tmp_path / "pipeline")
    for key in ("sampling", "metrics"):
        assert saved.config[key] == exported.config[key] == model.config[key]
    used, _ = next(generate(saved.network, 3, num_inference_steps=2, role="student", times=times))
    assert torch.equal(saved.sample(3, 2), used)
