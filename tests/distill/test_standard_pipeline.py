"""Students as diffusers' own pipelines: the same function and the same images, with nothing but diffusers to load them."""

import json
import math
import subprocess
import sys

import diffusers
import pytest
import torch
from support import DIT, ONLY_DIFFUSERS, UNET2D

import distill
import teachers
from distill import cli
from distill.export import export
from distill.sampling import consistency_sample, sample_student
from distill.standard_pipeline import ddpm_steps, noise_levels, recommended_times
from teachers import openai
from teachers.networks import build
from teachers.retrofit import retrofit

OPENAI = dict(
    image_size=8, num_channels=32, num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[4], num_head_channels=16,
    num_classes=5, dropout=0.0,
)  # fmt: skip
SEEDS, LABELS = [11, 12, 13, 14], [2, 0, 1, 4]

# Loads exported folders where of all our dependencies only torch and diffusers can be found. Of each it saves what the
# card's example gives, images from seeds or fixed noise, and one scheduler step from each of given noisy samples.
STRANGER = ONLY_DIFFUSERS + """
import json
from safetensors.torch import load_file, save_file
seeds, labels = [11, 12, 13, 14], [2, 0, 1, 4]
for folder in sys.argv[1:]:
    card = open(folder + "/README.md").read()
    example = card.split("```python\\n")[1].split("```")[0].replace("path/to/this/folder", folder)
    found = {}
    exec(example, found)
    pipe = found["pipe"]
    saved = {"card": torch.stack([torch.tensor(image.getdata()) for image in found["images"]])}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    kind = type(pipe).__name__
    network = pipe.transformer if kind == "DiTPipeline" else pipe.unet
    if kind == "DDPMPipeline":
        saved["images"] = pipe(4, generators, 2, output_type="pt").images
    if kind == "ConsistencyModelPipeline":
        saved["images"] = pipe(4, labels, None, found["timesteps"][2], generators, output_type="pt").images
    if kind == "DiTPipeline":
        decode, latents = pipe.vae.decode, []
        pipe.vae.decode = lambda z: latents.append(z) or decode(z)
        torch.manual_seed(0)
        saved["images"] = pipe(labels, 1.0, None, 2, "pt").images
        saved["latents"] = latents[0] * pipe.vae.config.scaling_factor
    noisy = load_file(folder + ".noisy.safetensors")
    for name, y in noisy.items():
        if kind == "ConsistencyModelPipeline":
            pipe.scheduler.set_timesteps(timesteps=[int(name)])
        else:
            type(pipe.scheduler).set_timesteps(pipe.scheduler, timesteps=[int(name)])
        (t,) = pipe.scheduler.timesteps
        classes = None if kind == "DDPMPipeline" else torch.tensor(labels)
        with torch.no_grad():
            output = network(pipe.scheduler.scale_model_input(y, t), t[None], class_labels=classes, return_dict=False)[0]
        output = output[:, : y.shape[1]]
        saved[name] = pipe.scheduler.step(output, t, y, return_dict=False)[0]
    save_file({key: value.contiguous() for key, value in saved.items()}, folder + ".safetensors")
    print(json.dumps({"class": kind, "timesteps": found["timesteps"]}))
assert not {"distill", "teachers"} & set(sys.modules)
"""


def shaken(module, seed=0, by=0.05):
    """Random weights everywhere, also where zeros are the beginning."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += by * torch.randn(p.shape, generator=generator)
    return module.eval()


def unet_student(prediction="v_prediction", schedule="linear", **changes):
    torch.manual_seed(0)
    native = shaken(build("DiffusersUNet2D", {"config": {**UNET2D, **changes}}))
    convention, _ = teachers.diffusers.scheduler_convention(
        diffusers.DDPMScheduler(prediction_type=prediction, beta_schedule=schedule)
    )
    return teachers.wrap(native, convention, 0.5, (3, 8, 8), changes.get("num_class_embeds"))


def openai_student(**changes):
    torch.manual_seed(0)
    native = shaken(build("OpenAIUNet", {**OPENAI, **changes}))
    return teachers.wrap(native, openai.PARAMETERIZATION, 0.5, (3, 8, 8), {**OPENAI, **changes}["num_classes"])


def dit_student():
    torch.manual_seed(0)
    native = shaken(build("DiffusersDiT", {"config": DIT}))
    return teachers.wrap(native, teachers.DIT, 1.0, (4, 8, 8), 5)


def vae(channels=4):
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4, latent_channels=channels,
    )  # fmt: skip


def dit_teacher(folder):
    """The folder of a pipeline like the one that a DiT student was distilled from."""
    transformer = diffusers.DiTTransformer2DModel(**DIT)
    diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler()).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"0": "tench", "3": "shark, white shark"}}))
    return str(folder)


def noisy_at(student, number):
    """TrigFlow time, noisy sample and factor to the scheduler's own sample, at a step or noise level by its number."""
    edm = student.parameterization.family == "edm"
    if edm:  # the grid of CMStochasticIterativeScheduler
        t = math.atan(80.0 * (1 - number / 999) ** 7 / student.sigma_data)
        scale = 1 / math.cos(t)
    else:
        kept = diffusers.DDPMScheduler().alphas_cumprod.double()[number].item()
        t = math.atan(math.sqrt((1 - kept) / kept) / student.sigma_data)
        scale = math.sqrt(kept) / math.cos(t)
    x0, z = (torch.randn(4, *student.sample_shape, generator=torch.Generator().manual_seed(number + i)) for i in (0, 1))
    return t, student.sigma_data * (math.cos(t) * x0 + math.sin(t) * z), scale


NUMBERS = {"unet": (3, 200, 600, 932), "dit": (3, 200, 600, 932), "openai": (0, 300, 466, 800)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Three students, where each was exported to, and what a stranger to this package computes with it."""
    place = tmp_path_factory.mktemp("standard")
    students = {"unet": unet_student(), "openai": openai_student(), "dit": dit_student()}
    facts = {"role": "student", "teacher": dit_teacher(place / "teacher")}
    for name, student in students.items():
        export(student, place / name, facts, format="diffusers")
        noisy = {}
        for number in NUMBERS[name]:
            _, x_t, scale = noisy_at(student, number)
            noisy[str(number)] = (x_t * scale).contiguous()
        teachers.pretrained.save_file(noisy, place / f"{name}.noisy.safetensors")
    env = {"HF_HOME": str(place / "hf"), "PATH": "/usr/bin:/bin", "HOME": str(place), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, *(str(place / name) for name in students)]
    result = subprocess.run(command, cwd=place, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    said = dict(zip(students, map(json.loads, result.stdout.splitlines()), strict=True))
    values = {name: teachers.pretrained.read_safetensors(place / f"{name}.safetensors") for name in students}
    return students, place, said, values, result.stderr


def labels_of(student):
    return None if student.num_classes is None else torch.tensor(LABELS)


@pytest.mark.parametrize("name", NUMBERS)
def test_network_and_scheduler_are_the_consistency_function(exported, name):
    students, _, _, values, _ = exported
    student = students[name]
    for number in NUMBERS[name]:
        t, x_t, _ = noisy_at(student, number)
        times = torch.full((4,), t, dtype=torch.float64)
        with torch.no_grad():
            F = student(x_t, times, labels_of(student))
        x0 = math.cos(t) * x_t - math.sin(t) * student.sigma_data * F
        scale = max(1.0, x0.abs().max().item())  # an eps-network at large noise: x0 is divided by alpha
        torch.testing.assert_close(values[name][str(number)] / scale, x0 / scale, rtol=0, atol=1e-4)


def test_ddpm_pipeline_gives_the_images_of_the_same_seeds(exported):
    students, _, said, values, _ = exported
    assert said["unet"]["class"] == "DDPMPipeline"
    student, steps = students["unet"], said["unet"]["timesteps"]["2"]
    t = [noisy_at(student, step)[0] for step in steps]
    images = sample_student(student, SEEDS, times=t)
    assert images.std() > 0.05
    expected = (images / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(values["unet"]["images"], expected, rtol=0, atol=2e-4)  # the first noise differs by 6e-5


def test_consistency_pipeline_gives_the_images_of_the_same_seeds(exported):
    students, _, said, values, _ = exported
    assert said["openai"]["class"] == "ConsistencyModelPipeline"
    student, levels = students["openai"], said["openai"]["timesteps"]["2"]
    assert levels[-1] == 0
    t = [noisy_at(student, level)[0] for level in reversed(levels)]
    images = sample_student(student, SEEDS, torch.tensor(LABELS), times=t)
    assert images.std() > 0.05
    torch.testing.assert_close(values["openai"]["images"], (images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_dit_pipeline_gives_the_latents_of_the_same_noise(exported):
    """Its noise is that of torch's global generator, a batch at a time."""
    students, _, said, values, _ = exported
    assert said["dit"]["class"] == "DiTPipeline"
    student = students["dit"]
    t = [noisy_at(student, step)[0] for step in said["dit"]["timesteps"]["2"]]
    torch.manual_seed(0)
    latents = consistency_sample(
        lambda x, time: student(x, time, torch.tensor(LABELS)), lambda: torch.randn(4, 4, 8, 8), t, student.sigma_data
    )
    scale = latents.abs().max()
    torch.testing.assert_close(values["dit"]["latents"] / scale, latents / scale, rtol=0, atol=1e-4)
    images = values["dit"]["images"]
    assert images.shape == (4, 3, 8, 8) and images.isfinite().all() and 0 <= images.min() and images.max() <= 1


def test_the_cards_example_runs_and_its_times_are_the_students(exported):
    students, _, said, values, errors = exported
    complaints = [line for line in errors.splitlines() if "Expected types" in line or "will be ignored" in line]
    assert all("for id2label" in line for line in complaints)  # JSON has no integer keys: diffusers says so of every DiT
    for name, student in students.items():
        assert values[name]["card"].shape == (4, 64, 3)
        for steps, numbers in said[name]["timesteps"].items():
            assert len(numbers) == int(steps)
            ordered = reversed(numbers) if name == "openai" else numbers
            found = [noisy_at(student, number)[0] for number in ordered]
            assert found == pytest.approx(recommended_times(student, {})[int(steps)], abs=0.005)


def test_a_folder_holds_a_pipeline_and_a_card_only(exported):
    _, place, _, _, _ = exported
    listing = {name: sorted(p.name for p in (place / name).iterdir()) for name in NUMBERS}
    assert listing["unet"] == listing["openai"] == ["README.md", "model_index.json", "scheduler", "unet"]
    assert listing["dit"] == ["README.md", "model_index.json", "scheduler", "transformer", "vae"]
    assert not list(place.glob("*/**/*.py"))
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in place.glob("*/*/*.safetensors") if p.parts[-3] != "teacher")
    for name in NUMBERS:
        card = (place / name / "README.md").read_text()
        assert "trust_remote_code" not in card and "license: unknown" in card and "there is no code in this folder" in card


def test_class_names_and_vae_come_from_the_teachers_pipeline(exported):
    _, place, _, _, _ = exported
    pipe = diffusers.DiTPipeline.from_pretrained(place / "dit")
    assert pipe.get_label_ids(["white shark", "tench"]) == [3, 0]
    for key, value in vae().state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[key], value)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_noise_schedule_is_kept(tmp_path, schedule, prediction):
    student = unet_student(prediction, schedule)
    export(student, tmp_path / "p", format="diffusers")
    scheduler = diffusers.LCMScheduler.from_pretrained(tmp_path / "p", subfolder="scheduler")
    original = diffusers.DDPMScheduler(beta_schedule=schedule)
    assert torch.equal(scheduler.alphas_cumprod, original.alphas_cumprod)
    assert scheduler.config.prediction_type == prediction and not scheduler.config.clip_sample
    scheduler.set_timesteps(2)
    first, second = scheduler.timesteps.tolist()
    noise = ((1 - original.alphas_cumprod) / original.alphas_cumprod).sqrt()
    assert first == (noise - 80).abs().argmin() and abs(second - first / 2) <= 1  # 80, or the noisiest


def test_times_found_for_a_student_are_those_of_the_card(tmp_path):
    student = openai_student(num_classes=None)
    first = recommended_times(student, {})[1][0]
    facts = {"role": "student", "sampling": {"2": [first, 0.7]}}
    card = (export(student, tmp_path / "p", facts, "diffusers") / "README.md").read_text()
    assert str(noise_levels([first, 0.7], 0.5)) in card and "class_labels" not in card
    other = unet_student()
    card = (export(other, tmp_path / "q", facts, "diffusers") / "README.md").read_text()
    assert f"2: {ddpm_steps(other, [first, 0.7])}" in card


@pytest.mark.parametrize(
    "changes",
    [dict(legacy_attention=True), dict(use_scale_shift_norm=False, resblock_updown=False), dict(attention_resolutions=[])],
)
def test_openai_unets_of_every_kind(changes):
    from distill.unet2d import as_unet2d

    native = openai_student(**changes).native
    x, time = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([-300.0, 800.0])
    labels = torch.tensor([1, 4])
    with torch.no_grad():
        theirs = as_unet2d(native)(x, time, labels).sample
        torch.testing.assert_close(theirs, native(x, time, labels), rtol=0, atol=1e-4)


def test_another_sigma_data_inside_the_preconditioning(tmp_path):
    student = openai_student(num_classes=None)
    convention = teachers.Parameterization("edm", "raw", "log_sigma/4", time_scale=1000.0, teacher_sigma_data=0.5)
    wider = teachers.wrap(student.native, convention, 0.7, (3, 8, 8))
    pipe = diffusers.DiffusionPipeline.from_pretrained(export(wider, tmp_path / "p", format="diffusers"))
    assert pipe.scheduler.config.sigma_data == 0.5
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipe(4, None, None, [466, 0], generators, output_type="pt").images
    t = [noisy_at(wider, level)[0] for level in (0, 466)]
    expected = (sample_student(wider, SEEDS, times=t) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-4)


def test_a_learned_variance_is_dropped(tmp_path):
    student = unet_student(out_channels=6)
    pipe = diffusers.DiffusionPipeline.from_pretrained(export(student, tmp_path / "p", format="diffusers"))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(x, 100).sample, student.native(x, torch.tensor([100.0, 100.0])))


def test_the_vae_can_be_named(tmp_path):
    student = dit_student()
    vae().save_pretrained(tmp_path / "its-vae")
    for place in (tmp_path / "its-vae", dit_teacher(tmp_path / "teacher")):
        folder = distill.Model(student, {"role": "student"}).export(tmp_path / "p", "diffusers", place)
        assert "vae" in json.loads((folder / "model_index.json").read_text())


def with_time(student, **changes):
    convention = teachers.Parameterization(**{**student.parameterization.to_dict(), **changes})
    return teachers.wrap(student.native, convention, 0.5, student.sample_shape, student.num_classes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: unet_student(num_class_embeds=5), "DDPMPipeline has no labels .*--format scm"),
        (lambda: with_time(unet_student(), time="log_snr", schedule=None), "of DDPM's steps, not vp v at time 'log_snr'; "),
        (lambda: with_time(openai_student(), time_scale=1.0), "time 250 log.sigma. only; .*--format scm"),
        (lambda: dit_student(), "VAE of its latents, and what the network was loaded from is no pipe.*--vae FOLDER.*scm"),
        (lambda: retrofit(unet_student()), "take a DiffusersUNet2D of DDPM's steps, not vp v at time .trigflow"),
    ],
)
def test_what_has_no_pipeline_is_one_sentence(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as error:
        export(make(), tmp_path / "p", format="diffusers")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_other_networks_keep_their_own_format(make_teacher, tmp_path):
    with pytest.raises(ValueError, match="no pipeline of diffusers has a SiT, only DiffusersDiT, .*--format scm"):
        export(make_teacher("SiT"), tmp_path / "p", format="diffusers")
    with pytest.raises(ValueError, match="format is 'onnx'; allowed: scm, diffusers"):
        export(make_teacher("SiT"), tmp_path / "p", format="onnx")
    for student, format in ((make_teacher("SiT"), "scm"), (unet_student(), "diffusers")):
        with pytest.raises(ValueError, match="--vae.* belongs to"):
            export(student, tmp_path / "p", format=format, vae=tmp_path)


def test_a_vae_that_does_not_fit_is_one_sentence(tmp_path):
    student = dit_student()
    (tmp_path / "empty").mkdir()
    vae(channels=8).save_pretrained(tmp_path / "other")
    diffusers.VQModel(latent_channels=4).save_pretrained(tmp_path / "vq")
    diffusers.UNet2DModel(**UNET2D).save_pretrained(tmp_path / "unet")
    vae().save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name, message in {
        "empty": "no autoencoder in", "other": "a VAE of 8 latent channels, but this model has 4",
        "vq": "vq is of a VQModel; a DiTPipeline takes an AutoencoderKL",
        "unet": "is of a UNet2DModel; supported: AutoencoderKL", "damaged": "damaged cannot be loaded",
    }.items():  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            export(student, tmp_path / "p", format="diffusers", vae=tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "p").exists()


def test_only_an_exported_pipeline_is_replaced(make_teacher, tmp_path):
    folder = export(unet_student(), tmp_path / "p", format="diffusers")
    export(openai_student(), folder, format="diffusers")
    assert "OpenAIUNet" in (folder / "README.md").read_text()
    export(make_teacher("SiT"), folder)
    export(unet_student(), folder, format="diffusers")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model_index.json", "scheduler", "unet"]
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="it holds thesis.txt; choose another folder"):
        export(unet_student(), folder, format="diffusers")
    theirs = dit_teacher(tmp_path / "theirs")
    with pytest.raises(ValueError, match="not an exported pipeline"):
        export(unet_student(), theirs, format="diffusers")


def test_the_command(tmp_path, capsys):
    teachers.save_pretrained(dit_student(), tmp_path / "student", "student", teacher=dit_teacher(tmp_path / "teacher"))
    assert cli.main(["export", str(tmp_path / "student"), str(tmp_path / "p"), "--format", "diffusers"]) == 0
    assert (tmp_path / "p" / "vae" / "config.json").is_file()
    assert cli.main(["export", str(tmp_path / "student"), str(tmp_path / "p"), "--format", "png"]) == 1
    assert "allowed: scm, diffusers" in capsys.readouterr().err
