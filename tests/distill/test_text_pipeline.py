"""Students of text in their teacher's pipeline, whole or as adapters: diffusers alone gives the student's samples."""

import json
import math
import subprocess
import sys

import diffusers
import pytest
import text_pipelines
import torch
from safetensors import safe_open
from support import ONLY_DIFFUSERS

import teachers
from distill import cli
from distill.export import export
from distill.lora import adapted_layers, add_adapters, merged, sharing_student, write_adapters
from distill.recipe import LoRAConfig
from distill.sampling import consistency_sample
from distill.text_pipeline import flow_levels
from teachers.condition import Embeddings
from teachers.networks import build
from teachers.parameterization import Parameterization

TOKENS, BATCH = 6, 2
MASK, POOLED = "encoder_attention_mask", "pooled_projections"
# What each pipeline feeds its network as time, and how its call names the embeddings.
FLOW = {
    "stable_diffusion_3": (("velocity", "s", 1000.0), {POOLED: "pooled_prompt_embeds"}),
    "flux": (("velocity", "s", 1.0), {POOLED: "pooled_prompt_embeds"}),
    "sana": (("velocity", "s", 1000.0), {MASK: "prompt_attention_mask"}),
    "lumina2": (("-velocity", "1-s", 1.0), {MASK: "prompt_attention_mask"}),
    "aura_flow": (("velocity", "s", 1.0), {}),
    "qwen_image": (("velocity", "s", 1.0), {"encoder_hidden_states_mask": "prompt_embeds_mask"}),
    "wan": (("velocity", "s", 1000.0), {}),
}  # fmt: skip
VP = {
    "stable_diffusion": {}, "stable_diffusion_xl": {"text_embeds": "pooled_prompt_embeds"},
    "pixart": {MASK: "prompt_attention_mask"},
}  # fmt: skip
SHAPES = {"flux": (4, 8, 8), "qwen_image": (4, 8, 8), "wan": (4, 2, 8, 8)}  # others say their own
LINEAR = dict(beta_start=0.0001, beta_end=0.02, num_train_timesteps=1000)


def saved_teacher(name, folder):
    pipe = getattr(text_pipelines, name)()
    pipe.save_pretrained(folder)
    return pipe


def convention_of(name):
    if name in VP:
        return Parameterization("vp", "eps", "ddpm_linear", schedule=LINEAR)
    prediction, time, scale = FLOW[name][0]
    return Parameterization("flow", prediction, time, time_scale=scale)


def student_of(pipe, name, seed=1, **network):
    """A student with the architecture of a pipeline's network and other weights, not zero anywhere."""
    theirs = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    own = {key: value for key, value in theirs.config.items() if not key.startswith("_")} | network
    native = build("DiffusersText", {"cls": type(theirs).__name__, "config": json.loads(json.dumps(own))})
    generator = torch.Generator().manual_seed(seed)
    for p in native.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    shape = SHAPES.get(name) or native.default_sample_shape
    return teachers.wrap(native, convention_of(name), 0.8 if name in FLOW else 1.0, shape).eval()


def prompts_for(student):
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for key, shape in student.text_condition.items():
        size = shape if len(shape) == 1 and not key.endswith("mask") else (TOKENS, *shape[1:])
        tensors[key] = torch.randn(BATCH, *size, generator=generator)
        if key.endswith("mask"):
            tensors[key] = torch.tensor([[1.0] * TOKENS, [1.0] * 4 + [0.0] * 2])
    return Embeddings(tensors)


class PipelineNoise:
    """The noise that a pipeline draws: the latents it is given, then those of torch's generator, each in its own shape."""

    def __init__(self, student, pipe):
        self.student, self.pipe = student, pipe
        self.first = self.draw(torch.Generator().manual_seed(7))
        self.calls = 0

    @property
    def packs(self):
        return hasattr(self.pipe, "_pack_latents")

    def draw(self, generator=None):
        c, height, width = (*self.student.sample_shape, 0)[:3]
        shape = (BATCH, height * width // 4, 4 * c) if self.packs else (BATCH, *self.student.sample_shape)
        return torch.randn(shape, generator=generator)

    def unpacked(self, noise):
        if not self.packs:
            return noise
        height, width = self.student.sample_shape[-2:]
        return self.pipe._unpack_latents(noise, 8 * height, 8 * width, 8).reshape(BATCH, *self.student.sample_shape)

    def __call__(self):
        self.calls += 1
        return self.student.sigma_data * self.unpacked(self.first if self.calls == 1 else self.draw())


def students_samples(student, pipe, prompts, times):
    noise = PipelineNoise(student, pipe)
    torch.manual_seed(0)
    samples = consistency_sample(lambda x, t: student(x, t.double(), prompts), noise, times, student.sigma_data)
    return noise.first, samples


def call_arguments(name, prompts):
    """The embeddings as the pipeline's call has them."""
    names = {"encoder_hidden_states": "prompt_embeds", **(VP[name] if name in VP else FLOW[name][1])}
    arguments = {names[key]: value for key, value in prompts.tensors.items()}
    arguments = {key: value.long() if key.endswith("mask") else value for key, value in arguments.items()}
    if name == "aura_flow":  # its network never sees the mask
        arguments["prompt_attention_mask"] = torch.ones(BATCH, TOKENS)
    return arguments


def loaded(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, vae=None)  # these have none; latents are looked at
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe, name, student, prompts, latents, **times):
    """Final latents of a pipeline called with embeddings."""
    if name != "qwen_image":
        times["guidance_scale"] = 1.0
    if name in ("sana", "pixart"):
        times["use_resolution_binning"] = False
    if name in SHAPES:
        times |= {"height": 8 * student.sample_shape[-2], "width": 8 * student.sample_shape[-1]}
    if name == "wan":
        times["num_frames"] = 5
    torch.manual_seed(0)
    out = pipe(**call_arguments(name, prompts), latents=latents, output_type="latent", **times)
    return out.frames if name == "wan" else out.images


def assert_same(found, expected):
    assert expected.std() > 0.05
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FLOW)
def test_a_flow_pipeline_gives_the_students_samples(name, tmp_path):
    student = student_of(saved_teacher(name, tmp_path / "teacher"), name)
    facts = {"role": "student", "teacher": str(tmp_path / "teacher")}
    pipe = loaded(export(student, tmp_path / "p", facts, "diffusers"))
    prompts, sigmas = prompts_for(student), [1.0, 0.7, 0.35]
    times = [math.atan2(s, 0.8 * (1 - s)) for s in sigmas]
    latents, expected = students_samples(student, pipe, prompts, times)
    if name == "wan":  # it asks for a number only: the card's lines
        set_timesteps = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(sigmas=sigmas, device=device)
        found = sampled(pipe, name, student, prompts, latents, num_inference_steps=3)
    else:
        found = sampled(pipe, name, student, prompts, latents, sigmas=sigmas)
    assert_same(PipelineNoise(student, pipe).unpacked(found), expected)


@pytest.mark.parametrize("name", VP)
def test_a_vp_pipeline_gives_the_students_samples(name, tmp_path):
    student = student_of(saved_teacher(name, tmp_path / "teacher"), name)
    facts = {"role": "student", "teacher": str(tmp_path / "teacher")}
    pipe = loaded(export(student, tmp_path / "p", facts, "diffusers"))
    prompts, steps = prompts_for(student), [932, 500, 200]
    kept = diffusers.DDPMScheduler().alphas_cumprod.double()[steps]
    latents, expected = students_samples(student, pipe, prompts, (1 / kept - 1).sqrt().atan().tolist())
    assert_same(sampled(pipe, name, student, prompts, latents, timesteps=steps), expected)


def sprint_student(pipe, scale=1.0):
    """One with a guidance input, as teachers for SanaSprintPipeline have."""
    student = student_of(pipe, "sana", guidance_embeds=True)
    convention = Parameterization("flow", "velocity", "s", time_scale=scale)
    return teachers.wrap(student.native, convention, 0.8, student.sample_shape).eval()


def test_sana_with_a_guidance_input_is_sana_sprint(tmp_path):
    transformer = text_pipelines.sana().transformer.config | {"guidance_embeds": True}
    pipe = text_pipelines.sana()
    pipe.register_modules(transformer=diffusers.SanaTransformer2DModel.from_config(transformer))
    pipe.save_pretrained(tmp_path / "teacher")
    student = sprint_student(pipe)
    facts = {"role": "student", "teacher": str(tmp_path / "teacher"), "guidance_range": [2.0, 5.0]}
    folder = export(student, tmp_path / "p", facts, "diffusers")
    pipe = loaded(folder)
    assert type(pipe) is diffusers.SanaSprintPipeline and type(pipe.scheduler) is diffusers.SCMScheduler
    card = (folder / "README.md").read_text()
    found = {"pipe": pipe, "torch": torch}
    exec(card.split("```python\n")[1].split("images = ")[0].split('folder")\n')[1], found)
    assert "guidance_scale=2.0, num_inference_steps=2" in card
    times = [math.atan(math.tan(t) / 0.8) for t in found["timesteps"][2]]  # in our units; the first is pi / 2
    times[0] = math.pi / 2
    prompts = prompts_for(student)
    guidance = torch.full((BATCH,), 3.0)
    noise = PipelineNoise(student, pipe)
    torch.manual_seed(0)
    expected = consistency_sample(lambda x, t: student(x, t.double(), prompts, guidance), noise, times, 0.8)
    torch.manual_seed(0)
    images = pipe(
        **call_arguments("sana", prompts), latents=noise.first, output_type="latent", guidance_scale=3.0, height=256,
        width=256, num_inference_steps=2, use_resolution_binning=False,
    ).images  # fmt: skip
    assert_same(images, expected)
    with pytest.raises(ValueError, match="takes a network with times from 0 to 1, this student's go up to 1000"):
        export(sprint_student(pipe, 1000.0), tmp_path / "q", facts, "diffusers")


# Runs the example of each folder's card where of all our dependencies only torch, diffusers and transformers can be found.
STRANGER = ONLY_DIFFUSERS.replace(', "transformers"', "") + """
import json
for folder in sys.argv[1:]:
    card = open(folder + "/README.md").read()
    found = {}
    exec(card.split("```python\\n")[1].split("```")[0].replace("path/to/this/folder", folder), found)
    steps = found["sigmas"] if "sigmas" in found else found["timesteps"]
    print(json.dumps({"class": type(found["pipe"]).__name__, "size": found["images"][0].size, "steps": steps}))
assert not {"distill", "teachers"} & set(sys.modules)
"""


def autoencoder():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4, latent_channels=4, shift_factor=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Exported pipelines with every part, from teachers with every part: one of each kind of scheduler."""
    place = tmp_path_factory.mktemp("complete")
    students = {}
    for name in ("stable_diffusion_3", "stable_diffusion"):
        pipe = getattr(text_pipelines, name)()
        pipe.register_modules(vae=autoencoder())
        pipe.save_pretrained(place / f"{name}-teacher")
        students[name] = student_of(pipe, name)
        facts = {"role": "student", "teacher": str(place / f"{name}-teacher"), "guidance_scale": 5.0}
        export(students[name], place / name, facts, "diffusers")
    return place, students


def test_the_cards_example_runs_without_this_package(complete):
    place, students = complete
    env = {"HF_HOME": str(place / "hf"), "PATH": "/usr/bin:/bin", "HOME": str(place), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, *(str(place / name) for name in students)]
    result = subprocess.run(command, cwd=place, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    flow, vp = map(json.loads, result.stdout.splitlines())
    assert (flow["class"], vp["class"]) == ("StableDiffusion3Pipeline", "StableDiffusionPipeline")
    assert flow["size"] == vp["size"] == [8, 8]
    assert flow["steps"]["2"] == [1.0, pytest.approx(math.tan(1.1) * 0.8 / (1 + math.tan(1.1) * 0.8), abs=1e-4)]
    kept = diffusers.DDPMScheduler().alphas_cumprod
    assert vp["steps"]["2"][0] == ((1 / kept - 1).sqrt() - 80).abs().argmin() and len(vp["steps"]["4"]) == 4
    assert "Expected types" not in result.stderr and "will be ignored" not in result.stderr


def test_all_but_network_and_scheduler_is_the_teachers(complete):
    place, _ = complete
    for name in ("stable_diffusion_3", "stable_diffusion"):
        teacher, folder = place / f"{name}-teacher", place / name
        replaced = {"scheduler", "unet", "transformer"}
        theirs = {p.relative_to(teacher): p for p in teacher.glob("*/**/*") if p.is_file()}
        kept = {part: path for part, path in theirs.items() if part.parts[0] not in replaced}
        assert len(kept) > 5
        for part, path in kept.items():
            assert (folder / part).read_bytes() == path.read_bytes()
            assert (folder / part).samefile(path) == (path.suffix == ".safetensors")  # no second copy of large weights
        ours = {p.relative_to(folder) for p in folder.glob("*/**/*") if p.is_file()}
        assert {part for part in ours if part.parts[0] not in replaced} == kept.keys()
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == json.loads((teacher / "model_index.json").read_text())["_class_name"]


def test_the_card_says_what_differs(complete):
    place, _ = complete
    card = (place / "stable_diffusion_3" / "README.md").read_text()
    assert "A SD3Transformer2DModel for samples of shape 4x8x8" in card and "Guidance scale 5.0 is built in" in card
    assert "guidance_scale=1.0, sigmas=sigmas[2]" in card and "torch.manual_seed(0)" in card
    assert "is a copy of the teacher's pipeline and under its own" in card and "trust_remote_code" not in card


def test_another_size_than_the_pipelines_own_is_asked_for(tmp_path):
    pipe = saved_teacher("flux", tmp_path / "teacher")
    folder = export(student_of(pipe, "flux"), tmp_path / "p", {"teacher": str(tmp_path / "teacher")}, "diffusers")
    card = (folder / "README.md").read_text()
    assert "height=8 * pipe.vae_scale_factor, width=8 * pipe.vae_scale_factor, guidance_scale=1.0, " in card


def test_times_found_for_a_student_are_those_of_the_card(tmp_path):
    student = student_of(saved_teacher("sana", tmp_path / "teacher"), "sana")
    facts = {"teacher": str(tmp_path / "teacher"), "sampling": {"2": [1.5608, 0.9]}}
    card = (export(student, tmp_path / "p", facts, "diffusers") / "README.md").read_text()
    assert f"2: {flow_levels([1.5608, 0.9], 0.8)}, 4: [1.0, " in card


def test_what_cannot_be_exported_is_one_sentence(tmp_path, make_teacher):
    student = student_of(saved_teacher("sana", tmp_path / "teacher"), "sana")
    other = student_of(saved_teacher("flux", tmp_path / "other"), "flux")
    with pytest.raises(ValueError, match=r"but it is not known; name it \(--pipeline FOLDER\)"):
        export(student, tmp_path / "p", {}, "diffusers")
    with pytest.raises(ValueError, match="other is a FluxPipeline without a SanaTransformer2DModel, which this student is"):
        export(student, tmp_path / "p", {}, "diffusers", pipeline=tmp_path / "other")
    for format, model in (("scm", student), ("diffusers", make_teacher("SiT"))):
        with pytest.raises(ValueError, match="a pipeline .--pipeline. belongs to a student of text in format diffusers"):
            export(model, tmp_path / "p", {}, format, pipeline=tmp_path / "teacher")
    with pytest.raises(ValueError, match="keeps the autoencoder of its teacher's pipeline"):
        export(student, tmp_path / "p", {}, "diffusers", vae=tmp_path / "teacher")
    with pytest.raises(ValueError, match="needs the text encoders of its teacher's pipeline .* --format diffusers"):
        export(student, tmp_path / "p")
    retrofitted = teachers.wrap(student.native, Parameterization("flow", "velocity", "trigflow"), 0.8, student.sample_shape)
    with pytest.raises(ValueError, match="time embedding is not its pipeline's"):
        export(retrofitted, tmp_path / "p", {"teacher": str(tmp_path / "teacher")}, "diffusers")
    (tmp_path / "other" / "tokenizer_2").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="other has no folder tokenizer_2, which its model_index.json names"):
        export(other, tmp_path / "p", {}, "diffusers", pipeline=tmp_path / "other")
    assert not (tmp_path / "p").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "other", "teacher"]


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapted(teacher, targets=("to_q", "to_k", "to_v", "to_out.0")):
    student = sharing_student(teacher)
    add_adapters(student.native, LoRAConfig(rank=2, alpha=6.0, target_modules=list(targets)), seed=3)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(student.native).values():
        weight = layer.lora_B["default"].weight
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return student


def teacher_in(folder, name):
    """The network of a pipeline itself, and the folder of a run that trained adapters of it."""
    pipe = saved_teacher(name, folder / "teacher")
    network = student_of(pipe, name, seed=2)
    theirs = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    theirs.load_state_dict(network.native.model.state_dict())
    pipe.save_pretrained(folder / "teacher")
    return network


def run_card(folder, pipe):
    """The example's lines between the loading of the teacher's pipeline and the call."""
    example = (folder / "README.md").read_text().split("```python\n")[1].split("images = ")[0]
    lines = example.replace("path/to/this/folder", str(folder)).splitlines()
    assert [line for line in lines if line.startswith("pipe = ")] == [lines[3]]
    exec("\n".join(lines[:3] + lines[4:]), {"pipe": pipe})


@pytest.mark.parametrize("name", [*FLOW, "stable_diffusion", "stable_diffusion_xl"])
def test_adapters_in_the_teachers_pipeline_are_the_student(name, tmp_path):
    teacher = teacher_in(tmp_path, name)
    student = adapted(teacher)
    ordinary = merged(student)
    teachers.save_pretrained(ordinary, tmp_path / "run" / "student", "student", teacher=str(tmp_path / "teacher"))
    write_adapters(tmp_path / "run" / "student", student)
    command = ["export", str(tmp_path / "run"), str(tmp_path / "adapters"), "--format", "lora"]
    assert cli.main(command) == 0
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]
    assert cli.main(command) == 0  # replaced
    pipe = loaded(tmp_path / "teacher")
    theirs = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    prompts = prompts_for(student)
    generator = torch.Generator().manual_seed(8)
    x, time = torch.randn(BATCH, *student.sample_shape, generator=generator), torch.tensor([0.3, 0.8])
    plain = build("DiffusersText", student.native.config)  # around the very network of the pipeline
    plain.model = theirs
    with torch.no_grad():
        before, expected = teacher.native(x, time, prompts.tensors), ordinary.native(x, time, prompts.tensors)
        assert (before - expected).abs().max() > 1e-3
        run_card(tmp_path / "adapters", pipe)
        if name not in ("flux", "qwen_image"):  # ours feeds those two another time than theirs
            torch.testing.assert_close(plain(x, time, prompts.tensors), expected, rtol=0, atol=1e-5)
    if name in VP:
        assert isinstance(pipe.scheduler, diffusers.LCMScheduler)
        return
    sigmas = flow_levels([1.5608, 1.1], 0.8)  # as in the card
    times = [math.atan2(s, 0.8 * (1 - s)) for s in sigmas]
    latents, samples = students_samples(ordinary, pipe, prompts, times)
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    if name == "wan":
        images = sampled(pipe, name, student, prompts, latents, num_inference_steps=2)
    else:
        images = sampled(pipe, name, student, prompts, latents, sigmas=sigmas)
    assert_same(PipelineNoise(student, pipe).unpacked(images), samples)


def test_the_file_of_adapters_needs_no_metadata(tmp_path):
    teacher = teacher_in(tmp_path, "stable_diffusion_3")
    student = adapted(teacher)
    file = write_adapters(tmp_path, student)
    with safe_open(file, "pt") as tensors:
        assert "lora_adapter_metadata" not in tensors.metadata()
        key = "transformer.transformer_blocks.0.attn.to_q"
        product = tensors.get_tensor(f"{key}.lora_B.weight") @ tensors.get_tensor(f"{key}.lora_A.weight")
    name = "model.transformer_blocks.0.attn.to_q"
    difference = merged(student).native.get_submodule(name).weight - teacher.native.get_submodule(name).weight
    torch.testing.assert_close(product, difference, rtol=0, atol=1e-5)  # alpha / rank is in it


def test_adapters_that_are_not_there_are_one_sentence(tmp_path, make_teacher, capsys):
    student = student_of(saved_teacher("pixart", tmp_path / "teacher"), "pixart")
    with pytest.raises(ValueError, match="no pipeline of diffusers reads adapters for a PixArtTransformer2DModel"):
        export(student, tmp_path / "p", {}, "lora")
    with pytest.raises(ValueError, match="no pipeline of diffusers reads adapters for a SiT"):
        export(make_teacher("SiT"), tmp_path / "p", {}, "lora")
    sana = student_of(text_pipelines.sana(), "sana")
    teachers.save_pretrained(sana, tmp_path / "student", "student")
    assert cli.main(["export", str(tmp_path / "student"), str(tmp_path / "p"), "--format", "lora"]) == 1
    said = capsys.readouterr().err
    assert "student has no pytorch_lora_weights.safetensors: name the run of a student trained with lora" in said
    assert not (tmp_path / "p").exists()
