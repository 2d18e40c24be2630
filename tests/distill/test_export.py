"""Exported pipelines: the same images by every route, nothing of this package needed, nothing of the user's lost."""

import ast
import resource
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, SCMScheduler
from support import ONLY_DIFFUSERS

import distill
import teachers
from distill.export import CODE, carried_code, export
from distill.pipeline import SCMNetwork, SCMPipeline
from distill.sampling import sample_student
from teachers.networks import build

LABELS = [2, 0, 1, 1, 0]
EXPORTED = ["README.md", "model_index.json", "network", "scheduler", "scm_pipeline.py"]

# Loads exported folders where of all our dependencies only torch and diffusers can be found, and saves their images.
STRANGER = ONLY_DIFFUSERS + """
from safetensors.torch import save_file
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = {str(steps): pipe(class_labels=[2, 0, 1, 1, 0], num_inference_steps=steps, output_type="pt",
                               generator=torch.Generator().manual_seed(3)).images for steps in (1, 2, 4)}
    save_file(images, f"{folder}.safetensors")
assert not {"distill", "teachers"} & set(sys.modules)
"""


@pytest.fixture
def folder(teacher, tmp_path):
    return export(teacher, tmp_path / "pipeline", {"role": "student", "teacher": "some-teacher", "guidance_scale": 1.5})


@pytest.fixture
def pipe(folder):
    return load(folder)


def load(folder):
    pipe = SCMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def check_same(images, teacher, steps, **options):
    expected = distill.Model(teacher, {"role": "student"}).sample(5, steps, LABELS, seed=3, **options)
    torch.testing.assert_close(images * 2 - 1, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_same_seed_same_images(teacher, pipe, steps):
    images = pipe(class_labels=LABELS, num_inference_steps=steps, generator=seeded(), output_type="pt").images
    check_same(images, teacher, steps)
    assert images.std() > 0.05


def test_loads_without_this_package(make_teacher, tmp_path):
    students = {kind: make_teacher(kind) for kind in ("SongUNet", "SiT")}
    folders = [str(export(student, tmp_path / kind)) for kind, student in students.items()]
    students["latents"], decoding = latents_student(), {"vae": vae_in(tmp_path / "vae"), "normalization": "scm"}
    folders.append(str(export(students["latents"], tmp_path / "latents", **decoding)))
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, *folders]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Expected types" not in result.stderr and "not found in your environment" not in result.stderr
    for kind, student in students.items():
        images = teachers.pretrained.read_safetensors(tmp_path / f"{kind}.safetensors")
        for steps in (1, 2, 4):
            check_same(images[str(steps)], student, steps, **(decoding if kind == "latents" else {}))


def test_code_in_the_folder_needs_trust(folder):
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)


def test_our_class_runs_nothing_from_the_folder(teacher, folder):
    for place in (folder, folder / "network"):
        (place / CODE).write_text("raise SystemExit('executed')")
    images = load(folder)(class_labels=LABELS, generator=seeded(), output_type="pt").images
    check_same(images, teacher, 2)


def test_carried_code_is_complete_and_names_nothing_twice(tmp_path):
    code = carried_code()
    tree = ast.parse(code)
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert not [m for m in modules if m.split(".")[0] in ("distill", "teachers")]
    assigned = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)] + assigned
    assert {"SCMPipeline", "SCMNetwork", "Teacher", "SongUNet", "SiT"} <= set(defined)
    assert len(defined) == len(set(defined))
    (tmp_path / "code.py").write_text(code)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", str(tmp_path / "code.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout  # no undefined names


def test_an_export_is_a_source_again(teacher, folder):
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 1.0]), torch.tensor([0, 1])
    assert torch.equal(teachers.load(folder)(x, t, y), teacher(x, t, y))
    model = distill.from_pretrained(folder)
    assert model.role == "student" and model.config["teacher"] == "some-teacher"
    assert model.export(folder.parent / "again").is_dir()


def test_weights_are_fp32_safetensors_that_others_can_read(make_teacher, tmp_path):
    folder = export(make_teacher("SongUNet").to(torch.bfloat16), tmp_path / "p")
    weights = folder / "network/diffusion_pytorch_model.safetensors"
    tensors = teachers.pretrained.read_safetensors(weights)
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    assert weights.stat().st_mode & 0o777 == 0o644


def test_image_i_depends_on_its_seed_only(pipe):
    many = pipe(class_labels=LABELS, generator=seeded(), output_type="pt").images
    few = pipe(class_labels=LABELS[:2], generator=seeded(), output_type="pt").images
    torch.testing.assert_close(few, many[:2], rtol=0, atol=1e-5)
    assert (many[2] - many[3]).abs().max() > 1e-2  # one class, two seeds
    listed = pipe(class_labels=[0, 1], generator=[seeded(8), seeded(9)], output_type="pt").images
    alone = pipe(class_labels=[1], generator=[seeded(9)], output_type="pt").images
    torch.testing.assert_close(alone[0], listed[1], rtol=0, atol=1e-5)


def test_without_a_generator_the_global_one_decides(pipe):
    torch.manual_seed(5)
    first, second = (pipe(2, output_type="pt").images for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(pipe(2, output_type="pt").images, first)
    assert not torch.equal(first, second)


def test_labels_default_to_all_classes_in_turn(pipe):
    def images(*args, **kwargs):
        return pipe(*args, generator=seeded(), output_type="pt", **kwargs).images

    assert torch.equal(images(5), images(class_labels=[0, 1, 2, 0, 1]))
    assert torch.equal(images(3, class_labels=2), images(class_labels=torch.tensor([2, 2, 2])))
    assert images(class_labels=1).shape == (1, 1, 8, 8)


def test_times_given_found_or_default(teacher, tmp_path):
    pipe = load(export(teacher, tmp_path / "p", {"sampling": {"2": [1.5, 0.7]}}))
    given = pipe(class_labels=LABELS, timesteps=[1.5, 0.7], generator=seeded(), output_type="pt").images
    found = pipe(class_labels=LABELS, num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert torch.equal(given, found)
    assert torch.equal(pipe.scheduler.timesteps, torch.tensor([1.5, 0.7, 0.0]))
    check_same(pipe(class_labels=LABELS, num_inference_steps=3, generator=seeded(), output_type="pt").images, teacher, 3)


def test_output_types(pipe):
    pt = pipe(batch_size=2, generator=seeded(), output_type="pt").images
    np = pipe(batch_size=2, generator=seeded(), output_type="np").images
    pil = pipe(batch_size=2, generator=seeded()).images
    assert pt.shape == (2, 1, 8, 8) and np.shape == (2, 8, 8, 1)
    assert 0 <= pt.min() and pt.max() <= 1
    assert pil[0].size == (8, 8) and pil[0].mode == "L"
    assert pil[1].getpixel((3, 5)) == round(pt[1, 0, 5, 3].item() * 255)
    assert torch.equal(torch.from_numpy(np)[..., 0], pt[:, 0])
    assert pipe(1, return_dict=False, output_type="pt")[0].shape == (1, 1, 8, 8)


def unconditional(channels):
    config = dict(input_size=8, in_channels=channels, hidden_size=32, depth=1, num_heads=2, num_classes=0)
    return teachers.wrap(build("SiT", {**config, "learn_sigma": False}), teachers.SIT, 0.5, (channels, 8, 8))


def test_unconditional_colour(tmp_path):
    student = unconditional(3)
    pipe = load(export(student, tmp_path / "p"))
    assert pipe(2).images[1].mode == "RGB"
    expected = distill.Model(student, {"role": "student"}).sample(2, 2, seed=3)
    images = pipe(2, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="unconditional and takes no class_labels"):
        pipe(class_labels=[1])


def latents_student(channels=4, latents=None):
    torch.manual_seed(0)
    config = dict(input_size=8, in_channels=channels, hidden_size=32, depth=1, num_heads=2, num_classes=3, learn_sigma=False)
    native = build("SiT", config)
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return teachers.wrap(native, teachers.SIT, 1.0, (channels, 8, 8), 3, latents=latents).eval()


def vae_in(folder, channels=4):
    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=channels, scaling_factor=0.3, shift_factor=0.1,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_latents_without_an_autoencoder_are_handed_out_as_they_are(tmp_path):
    student = latents_student()
    folder = export(student, tmp_path / "p")
    pipe = load(folder)
    expected = distill.Model(student, {"role": "student"}).sample(5, 2, LABELS, seed=3)
    assert expected.abs().max() > 1.5  # where images would be clamped
    for form in ("latent", "pt"):
        samples = pipe(class_labels=LABELS, generator=seeded(), output_type=form).images
        torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)
    array = pipe(class_labels=LABELS, generator=seeded(), output_type="np").images
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), samples)
    with pytest.raises(ValueError, match="4 channels are no PIL images"):
        pipe(1)
    with pytest.raises(ValueError, match="3 channels are no PIL images"):
        load(export(latents_student(3, latents=True), tmp_path / "q"))(1)
    assert "output_type='latent'" in (folder / "README.md").read_text()
    assert sorted(p.name for p in folder.iterdir()) == EXPORTED


@pytest.mark.parametrize("name", ["sd", "edm2", "scm", "vae"])
def test_an_autoencoder_makes_images_of_latents(tmp_path, name):
    student, source = latents_student(), vae_in(tmp_path / "vae")
    facts = {"role": "student", "training": {"license": "mit"}}
    folder = export(student, tmp_path / "p", facts, vae=source, normalization=None if name == "vae" else name)
    pipe = load(folder)
    images = pipe(class_labels=LABELS, generator=seeded(), output_type="pt").images
    assert images.shape == (5, 3, 16, 16) and 0 <= images.min() and images.max() <= 1
    check_same(images, student, 2, vae=source, normalization=name)
    assert pipe(1).images[0].size == (16, 16)
    latents = pipe(class_labels=LABELS, generator=seeded(), output_type="latent").images
    expected = distill.Model(student, {"role": "student"}).sample(5, 2, LABELS, seed=3)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*EXPORTED, "vae"])
    card = (folder / "README.md").read_text()
    assert "output_type" not in card and "The VAE is a copy and under its own" in card
    export(student, folder)  # an export again, that this may replace
    assert sorted(p.name for p in folder.iterdir()) == EXPORTED


def test_a_pipeline_with_an_autoencoder_is_saved_and_loaded_by_diffusers(tmp_path):
    student, source = latents_student(), vae_in(tmp_path / "vae")
    pipe = load(export(student, tmp_path / "p", vae=source, normalization="scm"))
    pipe.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    first, second = (p(class_labels=LABELS, generator=seeded(), output_type="pt").images for p in (pipe, again))
    assert torch.equal(first, second)


def test_an_autoencoder_that_does_not_belong_is_one_sentence(make_teacher, tmp_path):
    source = vae_in(tmp_path / "vae")
    for student, options, message in (
        (make_teacher("SiT"), {"vae": source}, "a VAE .--vae. belongs to a student of latents"),
        (latents_student(), {"normalization": "sd"}, "a normalization .--normalization. belongs to format scm with a VAE"),
        (latents_student(), {"vae": source, "normalization": "sdxl"}, "no normalization 'sdxl'; allowed: edm2, scm"),
        (latents_student(8), {"vae": source}, "an autoencoder of 4 latent channels, but the model's samples have 8"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            export(student, tmp_path / "p", **options)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no autoencoder in .*nowhere"):
        export(latents_student(), tmp_path / "p", vae=tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_inference_steps=0), "num_inference_steps must be 1 to 8, got 0"),
        (dict(num_inference_steps=9), "num_inference_steps must be 1 to 8, got 9"),
        (dict(class_labels=[7]), "label 7 is out of range: this model has classes 0 to 2"),
        (dict(class_labels=3), "label 3 is out of range"),
        (dict(class_labels=[-1]), "label -1 is out of range"),
        (dict(class_labels=[0.5]), r"class_labels must be an integer or a list of integers, got \[0.5\]"),
        (dict(class_labels=["seven"]), "class_labels must be an integer"),
        (dict(class_labels=[]), "class_labels must be an integer"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(batch_size=3, class_labels=[0]), "batch_size 3 needs as many class_labels, got 1"),
        (dict(guidance_scale=3.0), "guidance scale of this student is fixed at 1.5"),
        (dict(output_type="jpg"), "output_type is 'jpg'; allowed: pil, np, pt"),
        (dict(timesteps=[1.0, 1.2]), "must decrease"),
        (dict(timesteps=[]), "must decrease"),
        (dict(batch_size=2, generator=[torch.Generator()]), "2 images need 2 generators, got 1"),
    ],
)
@pytest.mark.parametrize("teacher", ["SiT"], indirect=True)
def test_bad_arguments_are_one_sentence(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**kwargs)
    assert "\n" not in str(error.value)


def test_low_precision_is_autocast(teacher, folder, pipe):
    with torch.autocast("cpu", torch.bfloat16):
        rough = pipe(2, generator=seeded(), output_type="pt").images
    exact = pipe(2, generator=seeded(), output_type="pt").images
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.05
    low = SCMPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="inside torch.autocast"):
        low(2)


@pytest.mark.parametrize("kind", ["SongUNet", "SiT"])
def test_guidance_as_an_input(make_teacher, tmp_path, kind):
    student = make_teacher(kind).student(guidance_embedding=True)
    for name, parameter in student.native.named_parameters():
        if name in ("map_guidance.weight", "g_embedder.mlp.2.weight"):
            parameter.data.normal_()
    folder = export(student, tmp_path / "p", {"role": "student", "guidance_range": [1.0, 3.0]})
    pipe = load(folder)
    for scale in (1.0, 2.5):
        images = pipe(class_labels=LABELS, guidance_scale=scale, generator=seeded(), output_type="pt").images
        check_same(images, student, 2, guidance_scale=scale)
    weak, strong = (pipe(2, guidance_scale=s, generator=seeded(), output_type="pt").images for s in (1.0, 3.0))
    assert (weak - strong).abs().max() > 1e-3
    assert torch.equal(pipe(2, generator=seeded(), output_type="pt").images, weak)  # the lowest is the default
    model = distill.Model(student, {"role": "student", "guidance_range": [1.0, 3.0]})
    assert torch.equal(model.sample(2), model.sample(2, guidance_scale=1.0))
    with pytest.raises(ValueError, match="takes a guidance_scale from 1.0 to 3.0, got 7.0"):
        pipe(2, guidance_scale=7.0)
    with pytest.raises(ValueError, match="takes a guidance_scale from 1.0 to 3.0, got 7.0"):
        model.sample(2, guidance_scale=7.0)
    with pytest.raises(ValueError, match="needs a guidance_scale"):
        sample_student(student, [0, 1], torch.tensor([0, 1]))
    assert "guidance_scale=1.0" in (folder / "README.md").read_text()


def test_the_scheduler_is_diffusers_own(pipe):
    assert type(pipe.scheduler) is SCMScheduler and pipe.scheduler.config.sigma_data == 0.5


def test_exporting_again_replaces_only_a_pipeline(make_teacher, tmp_path):
    folder = export(make_teacher("SiT"), tmp_path / "new/pipeline")
    other = make_teacher("SongUNet")
    export(other, folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["pipeline"]
    assert sorted(p.name for p in folder.iterdir()) == EXPORTED
    check_same(load(folder)(class_labels=LABELS, generator=seeded(), output_type="pt").images, other, 2)


@pytest.mark.parametrize("exported", [True, False])
def test_what_is_not_ours_is_never_deleted(make_teacher, tmp_path, exported):
    student, folder = make_teacher("SiT"), tmp_path / "mine"
    folder.mkdir()
    if exported:
        export(student, folder)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an exported pipeline: it holds thesis.txt; choose another folder"):
        export(student, folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match="is a file; choose another folder"):
        export(student, folder / "thesis.txt")


def test_another_pipeline_is_never_deleted(make_teacher, tmp_path):
    for name in ("README.md", "model_index.json"):
        (tmp_path / name).write_text("Stable Diffusion")
    with pytest.raises(ValueError, match="not an exported pipeline"):
        export(make_teacher("SiT"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "model_index.json"]


def test_a_full_disk_leaves_the_earlier_export(teacher, folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # every write beyond 20 kB fails
    try:
        with pytest.raises(OSError):
            export(teacher, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]
    check_same(load(folder)(class_labels=LABELS, generator=seeded(), output_type="pt").images, teacher, 2)


def test_the_card_says_what_it_is(make_teacher, tmp_path):
    facts = {
        "teacher": "some-teacher", "guidance_scale": 1.5, "metrics": {"2 steps": {"num_samples": 50, "FD": 1.25}},
        "training": {"steps": 700, "data": "MNIST training split", "license": "apache-2.0"},
    }  # fmt: skip
    card = (export(make_teacher("SiT"), tmp_path / "p", facts) / "README.md").read_text()
    for text in (
        "library_name: diffusers", "license: apache-2.0", "A SiT for samples of shape 1x8x8, 3 classes",
        "Guidance scale 1.5 is built in", "- teacher: some-teacher", "- steps: 700", "- data: MNIST training split",
        "trust_remote_code=True", "class_labels=[0, 1, 2, 0], num_inference_steps=2", "| 2 steps | 50 | 1.25 |",
    ):  # fmt: skip
        assert text in card
    snippet = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "p"))
    compile(snippet, "card", "exec")


def test_the_card_invents_nothing(make_teacher, tmp_path):
    card = (export(make_teacher("SiT"), tmp_path / "p", {"role": "teacher"}) / "README.md").read_text()
    assert "license: unknown" in card and "None" not in card and "Metrics" not in card
    assert "is a **teacher**, not distilled" in card


def test_foreign_networks_cannot_be_exported(tmp_path):
    foreign = teachers.wrap(torch.nn.Conv2d(1, 1, 1), teachers.EDM, 0.5, (1, 8, 8))
    with pytest.raises(ValueError, match="Conv2d is not registered and cannot be saved as a model folder or exported"):
        export(foreign, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_network_is_a_diffusers_model(teacher, folder):
    network = SCMNetwork.from_pretrained(folder, subfolder="network")
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 1.0]), torch.tensor([0, 1])
    assert torch.equal(network(x, t, y), teacher(x, t, y)) and not network.training
