import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distill
import teachers
from distill.export import export
from distill.pipeline import SCMPipeline

LABELS = [2, 0, 1, 1, 0]

# Loads an exported folder where neither of our packages can be imported, and saves its images.
STRANGER = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("distill", "teachers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
for steps in (1, 2, 4):
    images = pipe(class_labels=[2, 0, 1, 1, 0], num_inference_steps=steps, output_type="pt",
                  generator=torch.Generator().manual_seed(3)).images
    save_file({"images": images}, f"{sys.argv[2]}/{steps}.safetensors")
"""


@pytest.fixture
def folder(teacher, tmp_path):
    return export(teacher, tmp_path / "pipeline", {"role": "student", "teacher": "some-teacher", "guidance_scale": 1.5})


@pytest.fixture
def pipe(folder):
    pipe = SCMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_same_seed_same_images(teacher, pipe, steps):
    expected = distill.Model(teacher, {"role": "student"}).sample(5, steps, LABELS, seed=3)
    images = pipe(class_labels=LABELS, num_inference_steps=steps, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, expected, rtol=0, atol=1e-5)


def test_loads_without_this_package(teacher, folder, tmp_path):
    command = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path)]
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for steps in (1, 2, 4):
        images = teachers.pretrained.read_safetensors(tmp_path / f"{steps}.safetensors")["images"]
        expected = distill.Model(teacher, {"role": "student"}).sample(5, steps, LABELS, seed=3)
        torch.testing.assert_close(images * 2 - 1, expected, rtol=0, atol=1e-5)


def test_an_export_is_a_source_again(teacher, folder):
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 1.0]), torch.tensor([0, 1])
    assert torch.equal(teachers.load(folder)(x, t, y), teacher(x, t, y))
    assert distill.from_pretrained(folder).role == "student"


def test_image_i_depends_on_its_seed_only(pipe):
    many = pipe(class_labels=LABELS, generator=seeded(), output_type="pt").images
    few = pipe(class_labels=LABELS[:2], generator=seeded(), output_type="pt").images
    torch.testing.assert_close(few, many[:2], rtol=0, atol=1e-5)
    own = [torch.Generator().manual_seed(i) for i in (8, 9)]
    listed = pipe(class_labels=[0, 1], generator=own, output_type="pt").images
    alone = pipe(class_labels=[1], generator=[torch.Generator().manual_seed(9)], output_type="pt").images
    torch.testing.assert_close(alone[0], listed[1], rtol=0, atol=1e-5)


def test_output_types(pipe):
    pt = pipe(batch_size=2, generator=seeded(), output_type="pt").images
    np = pipe(batch_size=2, generator=seeded(), output_type="np").images
    pil = pipe(batch_size=2, generator=seeded()).images
    assert pt.shape == (2, 1, 8, 8) and np.shape == (2, 8, 8, 1)
    assert pil[0].size == (8, 8) and pil[0].mode == "L"
    assert torch.equal(torch.from_numpy(np)[..., 0], pt[:, 0])
    assert pipe(1, return_dict=False, output_type="pt")[0].shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_inference_steps=0), "num_inference_steps must be 1 to 8, got 0"),
        (dict(class_labels=[7]), "label 7 is out of range"),
        (dict(guidance_scale=3.0), "distilled at guidance scale 1.5"),
        (dict(output_type="jpg"), "allowed: pil, np, pt"),
        (dict(batch_size=3, class_labels=[0]), "needs as many class_labels"),
        (dict(timesteps=[1.0, 1.2]), "must decrease"),
        (dict(batch_size=2, generator=[torch.Generator()]), "2 images need 2 generators"),
    ],
)
def test_bad_arguments_are_one_sentence(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(**kwargs)


def test_guidance_as_an_input(make_teacher, tmp_path):
    student = make_teacher("SiT").student(guidance_embedding=True)
    student.native.g_embedder.mlp[2].weight.data.normal_()
    export(student, tmp_path / "p", {"role": "student", "guidance_range": [1.0, 3.0]})
    pipe = SCMPipeline.from_pretrained(tmp_path / "p")
    weak, strong = (pipe(2, guidance_scale=s, generator=seeded(), output_type="pt").images for s in (1.0, 3.0))
    assert (weak - strong).abs().max() > 1e-3


def test_exporting_again_replaces_only_a_pipeline(teacher, folder, tmp_path):
    export(teacher, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipeline"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not an exported pipeline"):
        export(teacher, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists()


def test_the_card_says_what_it_is(folder):
    card = (folder / "README.md").read_text()
    for text in ("library_name: diffusers", "license: apache-2.0", "teacher: some-teacher", "trust_remote_code=True"):
        assert text in card


def test_foreign_networks_cannot_be_exported(tmp_path):
    foreign = teachers.wrap(torch.nn.Conv2d(1, 1, 1), teachers.EDM, 0.5, (1, 8, 8))
    with pytest.raises(ValueError, match="not a registered network"):
        export(foreign, tmp_path / "x")
    assert not Path(tmp_path / "x").exists()
