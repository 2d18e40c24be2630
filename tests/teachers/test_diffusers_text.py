"""Text-conditional pipelines of diffusers as teachers: their own loops, with tiny random networks, are the reference."""

import copy
import json
import math
import shutil
from contextlib import nullcontext
from functools import cache

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

import teachers
from distill.jvp import check_jvp, probe_jvp
from distill.recipe import parse_recipe
from distill.recipe_networks import check_fits, fitted
from teachers.condition import Embeddings
from teachers.diffusers import read_diffusers
from teachers.networks import build
from teachers.networks.trigflow_time import TrigFlowTime, time_embeddings
from teachers.retrofit import retrofit

TOKENS, WIDTH, POOLED = 5, 12, 10
UNET = dict(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH,
    attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
PIXART = dict(
    sample_size=8, num_layers=1, num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24, caption_channels=WIDTH
)
NETWORKS = {
    "sd": ("UNet2DConditionModel", UNET),
    "sdxl": ("UNet2DConditionModel", dict(
        UNET, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + POOLED,
    )),
    "pixart-alpha": ("PixArtTransformer2DModel", dict(PIXART, sample_size=128)),  # is told the size, therefore
    "pixart-sigma": ("PixArtTransformer2DModel", PIXART),
    "sd3": ("SD3Transformer2DModel", dict(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=POOLED, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )),
    "flux": ("FluxTransformer2DModel", dict(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )),
    "sana": ("SanaTransformer2DModel", dict(  # narrower, its ReLUs have denominators that bf16 cannot hold
        sample_size=8, in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=32, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        qk_norm="rms_norm_across_heads",
    )),
    "auraflow": ("AuraFlowTransformer2DModel", dict(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pos_embed_max_size=64,
    )),
    "lumina2": ("Lumina2Transformer2DModel", dict(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 16, 16), cap_feat_dim=WIDTH,
    )),
    "qwen": ("QwenImageTransformer2DModel", dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )),
    "wan": ("WanTransformer3DModel", dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=16, ffn_dim=32,
        num_layers=1,
    )),
}  # fmt: skip
NAMES = list(NETWORKS)
SD_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
VP = ("sd", "sdxl", "pixart-alpha", "pixart-sigma")


def pipeline(name):
    """An empty shell around a network of random weights: no text encoder, no VAE."""
    torch.manual_seed(0)
    cls, config = NETWORKS[name]
    network = getattr(diffusers, cls)(**config).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    euler = diffusers.FlowMatchEulerDiscreteScheduler
    shell, scheduler, absent = {
        "sd": (
            diffusers.StableDiffusionPipeline, ddim(**SD_BETAS), "text_encoder tokenizer safety_checker feature_extractor",
        ),
        "sdxl": (
            diffusers.StableDiffusionXLPipeline, ddim(prediction_type="v_prediction", **SD_BETAS),
            "text_encoder text_encoder_2 tokenizer tokenizer_2",
        ),
        "pixart-alpha": (diffusers.PixArtAlphaPipeline, ddim(), "text_encoder tokenizer"),
        "pixart-sigma": (diffusers.PixArtSigmaPipeline, ddim(), "text_encoder tokenizer"),
        "sd3": (
            diffusers.StableDiffusion3Pipeline, euler(shift=3.0),
            "text_encoder text_encoder_2 text_encoder_3 tokenizer tokenizer_2 tokenizer_3",
        ),
        "flux": (
            diffusers.FluxPipeline, euler(shift=3.0, use_dynamic_shifting=True),
            "text_encoder text_encoder_2 tokenizer tokenizer_2",
        ),
        "sana": (
            diffusers.SanaPipeline,
            diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
            ),
            "text_encoder tokenizer",
        ),
        "auraflow": (diffusers.AuraFlowPipeline, euler(shift=1.73), "text_encoder tokenizer"),
        "lumina2": (diffusers.Lumina2Pipeline, euler(shift=6.0), "text_encoder tokenizer"),
        "qwen": (
            diffusers.QwenImagePipeline, euler(shift=1.0, use_dynamic_shifting=True), "text_encoder tokenizer",
        ),
        "wan": (
            diffusers.WanPipeline,
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            "text_encoder tokenizer",
        ),
    }[name]  # fmt: skip
    part = "unet" if name in ("sd", "sdxl") else "transformer"
    more = {"requires_safety_checker": False} if name == "sd" else {}
    return shell(vae=None, scheduler=scheduler, **{part: network}, **dict.fromkeys(absent.split()), **more), network


def ddim(**config):
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name to pipeline, network, the folder they were saved in, and the teacher from there; each made once."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        pipe, network = pipeline(name)
        pipe.save_pretrained(folder)
        teacher = teachers.load(folder).at_sigma_data(1.0)
        return pipe, network, folder, teacher.twin(null_prompt=prompts(teacher, 1))

    return make


def prompts(teacher, num, seed=0):
    """Noise for the texts, fewer tokens than pipelines pad to, of which some are masked."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in teacher.text_condition.items():
        is_mask = name.endswith("mask")
        shape = (TOKENS, *shape[1:]) if is_mask or len(shape) == 2 else shape
        tensors[name] = torch.randn(num, *shape, generator=generator)
        if is_mask:
            tensors[name] = (torch.arange(TOKENS) < 3).long().expand(num, TOKENS)
    return Embeddings(tensors)


# By our names, where the pipelines' arguments have others.
ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask",
    "encoder_hidden_states_mask": "prompt_embeds_mask", "pooled_projections": "pooled_prompt_embeds",
    "text_embeds": "pooled_prompt_embeds",
}  # fmt: skip
OPTIONS = {
    "pixart-alpha": dict(use_resolution_binning=False), "pixart-sigma": dict(use_resolution_binning=False),
    "sana": dict(use_resolution_binning=False), "qwen": dict(true_cfg_scale=1.0), "wan": dict(num_frames=5),
    "flux": dict(guidance_scale=3.0), "auraflow": dict(prompt_attention_mask=torch.ones(1, TOKENS)),
}  # fmt: skip


def run(pipe, name, teacher, monkeypatch):
    """What the pipeline itself hands to its scheduler in two steps: the prediction, the time, the noisy sample."""
    seen, step = [], pipe.scheduler.step

    def recorded(output, t, sample, *args, **kwargs):
        seen.append((output.clone(), t.item(), sample.clone()))
        return step(output, t, sample, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", recorded)
    pipe.set_progress_bar_config(disable=True)
    text = {ARGUMENTS[key]: value for key, value in prompts(teacher, 1).tensors.items()}
    options = {"guidance_scale": 1.0, **text, **OPTIONS.get(name, {})}
    if name == "qwen":
        del options["guidance_scale"]
    height, width = (32, 48) if name in ("wan", "pixart-alpha", "sdxl") else (64, 64)
    torch.manual_seed(1)
    pipe(height=height, width=width, num_inference_steps=2, output_type="latent", **options)
    if name in ("flux", "qwen"):
        seen = [(unpacked(pipe, u, height, width), t, unpacked(pipe, x, height, width)) for u, t, x in seen]
    assert len(seen) == 2
    return seen


def unpacked(pipe, tokens, height, width):
    latents = pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)
    return latents[:, :, 0] if latents.ndim == 5 else latents


def alpha_sigma(name, scheduler, t):
    """Of the scheduler itself, at one of its times."""
    if name in VP:
        kept = scheduler.alphas_cumprod[int(t)].double().item()
        return math.sqrt(kept), math.sqrt(1 - kept)
    return 1 - t / 1000, t / 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_is_what_its_pipeline_steps_with(saved, name, monkeypatch):
    pipe, _, _, teacher = saved(name)
    for output, time, y in run(pipe, name, teacher, monkeypatch):
        alpha, sigma = alpha_sigma(name, pipe.scheduler, time)
        t = math.atan2(sigma, alpha)
        x_t = y * math.cos(t) / alpha if alpha > 1e-6 else y / sigma
        guidance = torch.full((1,), 3.0) if name == "flux" else None
        with torch.no_grad():
            sized = teacher.at_sample_shape(y.shape[1:])
            F = sized(x_t, torch.full((1,), t, dtype=torch.float64), prompts(teacher, 1), guidance)
        x0, eps = math.cos(t) * x_t - math.sin(t) * F, math.sin(t) * x_t + math.cos(t) * F
        if name not in VP:
            ours = eps - x0
        else:
            ours = alpha * eps - sigma * x0 if name == "sdxl" else eps
        torch.testing.assert_close(ours, output[:, : y.shape[1]], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_pipeline_is_read_whole(saved, name):
    _, network, folder, teacher = saved(name)
    assert teacher.num_classes is None
    state = teacher.native.state_dict()
    assert state.keys() == {f"model.{key}" for key in network.state_dict()}
    assert all(torch.equal(state[f"model.{key}"], value) for key, value in network.state_dict().items())
    p = teacher.parameterization
    assert (p.family, p.prediction, p.time, p.time_scale) == {
        "sd": ("vp", "eps", "ddpm_scaled_linear", 1), "sdxl": ("vp", "v", "ddpm_scaled_linear", 1),
        "pixart-alpha": ("vp", "eps", "ddpm_linear", 1), "pixart-sigma": ("vp", "eps", "ddpm_linear", 1),
        "sd3": ("flow", "velocity", "s", 1000), "wan": ("flow", "velocity", "s", 1000),
        "sana": ("flow", "velocity", "s", 1000), "flux": ("flow", "velocity", "s", 1), "qwen": ("flow", "velocity", "s", 1),
        "auraflow": ("flow", "velocity", "s", 1), "lumina2": ("flow", "-velocity", "1-s", 1),
    }[name]  # fmt: skip
    large = dict.fromkeys(("flux", "qwen", "pixart-alpha"), (4, 128, 128))
    assert teacher.sample_shape == {**large, "wan": (4, 21, 60, 104)}.get(name, (4, 8, 8))
    assert teacher.accepts_guidance == (name == "flux")


SHAPES = {"wan": (4, 2, 4, 4)}


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative(saved, name):
    teacher = saved(name)[3].at_sample_shape(SHAPES.get(name, (4, 8, 8)))
    assert check_jvp(teacher) < 1e-5
    probe_jvp(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < check_jvp(teacher, tolerance=2e-2)


class HostCopies(TorchFunctionMode):
    """Counts what goes from the host to the device, here that of shapes alone, which stands for any other."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        of_host = any(torch.is_tensor(arg) and arg.device.type == "cpu" for arg in args)
        of_numbers = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        self.count += (of_host or of_numbers) and torch.is_tensor(result) and result.device.type == "meta"
        return result


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lumina2", "qwen")])
def test_a_guided_evaluation_copies_nothing_to_the_device(saved, name, monkeypatch):
    """Neither sizes, nor the table of the noise schedule, nor the null prompt: the host would wait for what is queued."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device has not
    teacher = copy.deepcopy(saved(name)[3].at_sample_shape(SHAPES.get(name, (4, 8, 8)))).guided_by(2.0).to("meta")
    x, t = torch.empty(2, *teacher.sample_shape, device="meta"), torch.empty(2, device="meta")
    given = prompts(teacher, 2).to("meta")
    teacher(x, t, given)  # what is made once
    with HostCopies() as copies:
        teacher(x, t, given)
    assert copies.count == 0
    with HostCopies() as copies:
        x.new_tensor([1.0, 2.0])
        torch.ones(2).to("meta")
    assert copies.count == 2


def test_autocast_leaves_the_trunk_of_a_u_net_in_fp32(saved):
    """The time, and the sample from end to end past all residual branches, whose own layers are rounded."""
    teacher, dtypes = copy.deepcopy(saved("sdxl")[3]), {}
    for name, module in teacher.native.model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: dtypes.__setitem__(name, out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        teacher(torch.randn(1, 4, 8, 8), torch.tensor([0.7]), prompts(teacher, 1))
    dtypes = {name: out.dtype for name, out in dtypes.items() if torch.is_tensor(out)}
    wide = ("_embedding", "time_emb_proj", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out")
    trunk = [name for name in dtypes if name.endswith(wide) or name.split(".")[-2:-1] in (["resnets"], ["downsamplers"])]
    assert len(trunk) > 20 and {dtypes[name] for name in trunk} == {torch.float32}
    narrow = [name for name in dtypes if name.endswith(("resnets.0.conv1", "resnets.0.conv2", "to_q", "net.2"))]
    assert len(narrow) > 10 and {dtypes[name] for name in narrow} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_trained_whole_and_saved(saved, name, tmp_path):
    _, network, _, teacher = saved(name)
    shape = SHAPES.get(name, (4, 8, 8))
    student = teacher.at_sample_shape(shape).requires_grad_(False).student()
    x_t, t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4, 1.3])
    student(x_t, t, prompts(teacher, 2)).square().sum().backward()
    trained = {key for key, parameter in student.native.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, parameter in student.native.named_parameters() if parameter.grad is not None}
    unused = len(list(network.parameters())) - len(trained)
    assert unused == (6 if name == "qwen" else 0)
    teachers.save_pretrained(student, tmp_path, "student")
    again = teachers.load(tmp_path)
    assert again.sample_shape == shape and again.metadata() == student.metadata()
    with torch.no_grad():
        torch.testing.assert_close(again(x_t, t, prompts(teacher, 2)), student(x_t, t, prompts(teacher, 2)))
    assert load_file(tmp_path / "model.safetensors").keys() == student.native.state_dict().keys()


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_bf16_does_not_round_the_time(saved, name):
    """Two times that are one in bf16, and whose embeddings are far apart."""
    teacher = saved(name)[3].at_sample_shape((4, 8, 8))
    embedding = next(iter(time_embeddings(teacher.native).values()))
    seen = []
    hook = embedding.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for t in (0.7, 0.7005):
            teacher(torch.zeros(1, 4, 8, 8), torch.full((1,), t))
    hook.remove()
    s = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in (0.7, 0.7005)]
    for waves, time in zip(seen, s, strict=True):
        assert waves[0, 0].item() == pytest.approx(math.cos(1000 * time), abs=1e-5)


def test_guidance_inputs(saved):
    flux = saved("flux")[3].at_sample_shape((4, 8, 8))
    x_t, t, text = torch.randn(2, 4, 8, 8), torch.tensor([0.4, 1.3]), prompts(flux, 2)
    one, three = (flux(x_t, t, text, torch.full((2,), w)) for w in (1.0, 3.0))
    torch.testing.assert_close(flux(x_t, t, text), one)
    torch.testing.assert_close(flux.guided_by(3.0)(x_t, t, text), three)
    assert not torch.allclose(one, three)

    cls, config = NETWORKS["sana"]
    config = {**config, "guidance_embeds": True, "guidance_embeds_scale": 0.1}
    sana = build("DiffusersText", {"cls": cls, "config": config}).eval()
    x, time, text = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), prompts(sana, 2).tensors
    theirs = sana.model(x, guidance=torch.full((2,), 0.45), timestep=time, return_dict=False, **text)[0]
    assert sana.guidance_embedding
    torch.testing.assert_close(sana(x, time, text, torch.full((2,), 4.5)), theirs, atol=1e-5, rtol=1e-4)


def test_a_time_embedding_is_replaced_and_no_other(saved):
    for name in ("flux", "sdxl", "pixart-alpha"):
        teacher = saved(name)[3].at_sample_shape((4, 8, 8))
        smooth = retrofit(teacher)
        assert len([m for m in smooth.native.modules() if isinstance(m, TrigFlowTime)]) == 1
        F = smooth(torch.randn(2, 4, 8, 8), torch.tensor([0.4, 1.3]))
        assert torch.isfinite(F).all()


def recipe(folder, **changes):
    values = {
        "objective": "distillation", "teacher": str(folder), "output_dir": "x", "sample_shape": [4, 16, 8], "data": "mnist",
        "max_train_steps": 1, "train_batch_size": 1, "ema": [{"half_life_images": 10}], "sigma_data": 0.7, **changes,
    }  # fmt: skip
    return parse_recipe(values, "test")


def test_a_recipe_may_ask_for_another_size(saved):
    folder = saved("sana")[2]
    wanted = recipe(folder)
    teacher = fitted(teachers.load(folder), wanted)
    check_fits(teacher, "sana", wanted)
    assert teacher.sample_shape == (4, 16, 8) and teacher.sigma_data == 0.7
    assert teacher(torch.randn(1, 4, 16, 8), torch.ones(1), prompts(teacher, 1)).shape == (1, 4, 16, 8)
    video = fitted(saved("wan")[3], recipe(folder, sample_shape=[4, 3, 8, 8]))
    assert video.sample_shape == (4, 3, 8, 8)
    other = recipe(folder, sample_shape=[8, 16, 8])
    with pytest.raises(ValueError, match="has sample_shape"):
        check_fits(fitted(teacher, other), "sana", other)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("sd", (4, 9, 8), r"multiples of 2, not \(9, 8\)"),
        ("sd3", (4, 32, 8), "multiples of 2 up to 16"),
        ("auraflow", (4, 18, 8), "multiples of 2 up to 16"),
        ("wan", (4, 8, 8), "takes samples like"),
    ],
)
def test_a_size_that_does_not_fit(saved, name, shape, message):
    with pytest.raises(ValueError, match=message):
        saved(name)[3].at_sample_shape(shape)


SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False}


def edited(folder, into, file, changes):
    """A copy of a saved pipeline with other values in one file."""
    shutil.copytree(folder, into)
    path = into / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return into


def test_latents_have_unit_variance_by_default(saved, tmp_path):
    """These pipelines were saved without the VAE that a released one names."""
    folder = edited(saved("sd3")[2], tmp_path / "x", INDEX, {"vae": ["diffusers", "AutoencoderKL"]})
    assert read_diffusers(folder)[0]["sigma_data"] == 1.0 and read_diffusers(saved("sd3")[2])[0]["sigma_data"] == 0.5


@pytest.mark.parametrize(
    "name, file, changes, message",
    [
        ("sana", INDEX, {"scheduler": ["diffusers", "SCMScheduler"]}, "distilled already"),
        ("sdxl", INDEX, {"scheduler": ["diffusers", "LCMScheduler"]}, "distilled already"),
        ("sdxl", SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr are not supported"),
        ("sdxl", INDEX, {"requires_aesthetics_score": True}, "is a refiner"),
        ("sd3", SCHEDULER, {"invert_sigmas": True}, "invert_sigmas is not supported"),
        ("wan", INDEX, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has two transformers"),
    ],
)
def test_what_is_no_teacher_says_so(saved, tmp_path, name, file, changes, message):
    with pytest.raises(ValueError, match=message):
        read_diffusers(edited(saved(name)[2], tmp_path / "x", file, changes))


def test_turbo_is_refused_unless_its_user_knows_better(saved, tmp_path):
    folder, kind = edited(saved("sd")[2], tmp_path / "x", SCHEDULER, TURBO), TURBO["_class_name"]
    edit = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**edit, "scheduler": ["diffusers", kind]}))
    with pytest.raises(ValueError, match="like SD-Turbo .* set timestep_spacing to 'leading' in"):
        read_diffusers(folder)
    again = edited(folder, tmp_path / "y", SCHEDULER, {"timestep_spacing": "leading"})
    assert teachers.load(again).parameterization == saved("sd")[3].parameterization


def test_schnell_is_refused_unless_its_user_knows_better(tmp_path):
    pipe, _ = pipeline("flux")
    config = {**pipe.transformer.config, "guidance_embeds": False}
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(config)
    pipe.save_pretrained(tmp_path / "dev")
    folder = edited(tmp_path / "dev", tmp_path / "schnell", SCHEDULER, SCHNELL)
    with pytest.raises(ValueError, match="like FLUX.1-schnell.* set use_dynamic_shifting to true in"):
        read_diffusers(folder)
    assert not teachers.load(tmp_path / "dev").accepts_guidance


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("sd", {"in_channels": 9}, "takes 9 channels and gives 4 needs more than noise, time and text"),
        ("sd", {"num_class_embeds": 3}, "num_class_embeds 3 needs more"),
        ("sd", {"addition_embed_type": "text"}, "addition_embed_type 'text' is not supported"),
        ("qwen", {"zero_cond_t": True}, "zero_cond_t True needs more"),
        ("qwen", {"out_channels": 3}, "takes 16 channels and gives 12"),
        ("wan", {"in_channels": 36}, "takes 36 channels"),
        ("wan", {"image_dim": 8}, "image_dim 8 needs more"),
    ],
)
def test_networks_of_other_inputs(name, changes, message):
    cls, config = NETWORKS[name]
    with pytest.raises(ValueError, match=message):
        build("DiffusersText", {"cls": cls, "config": {**config, **changes}})


def test_an_unknown_class():
    with pytest.raises(ValueError, match="class is 'AutoencoderKL'; allowed: UNet2DConditionModel, "):
        build("DiffusersText", {"cls": "AutoencoderKL", "config": {}})


def test_a_flow_network_needs_a_flow_scheduler(tmp_path):
    pipe, _ = pipeline("sd3")
    diffusers.StableDiffusion3Pipeline.save_pretrained(pipe, tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    with pytest.raises(ValueError, match="is a flow network, but the scheduler is of another family"):
        read_diffusers(tmp_path)
