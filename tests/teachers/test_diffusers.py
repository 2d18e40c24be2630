"""Teachers from diffusers pipeline folders, against the networks and schedulers of diffusers themselves."""

import importlib
import json
import math
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DIT, UNET2D

import teachers
from distill.jvp import check_jvp, probe_jvp
from teachers.diffusers import VP_PREDICTIONS, read_diffusers, scheduler_convention
from teachers.pretrained import TOLERABLE_SPEED, time_embedding_speed
from teachers.retrofit import retrofit

UNET = {**UNET2D, "in_channels": 1, "out_channels": 1}


def ddpm_pipeline(folder, scheduler=None, **changes):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**{**UNET, **changes})
    diffusers.DDPMPipeline(unet, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return unet.eval()


def dit_pipeline(folder):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(**DIT)
    for parameter in transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
    )  # fmt: skip
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(folder)
    return transformer.eval()


def test_a_ddpm_is_the_network_at_the_schedulers_steps(tmp_path):
    unet, scheduler = ddpm_pipeline(tmp_path), diffusers.DDPMScheduler()
    teacher = teachers.load(tmp_path)
    assert teacher.sample_shape == (1, 8, 8) and teacher.num_classes is None and teacher.sigma_data == 0.5
    for step in (5, 300, 990):
        kept = scheduler.alphas_cumprod[step].double().item()
        alpha, sigma = math.sqrt(kept), math.sqrt(1 - kept)
        t = math.atan(sigma / (alpha * teacher.sigma_data))
        x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        y = x_t * alpha / math.cos(t)
        with torch.no_grad():
            eps = unet(y, step).sample
            F = teacher(x_t, torch.full((2,), t))
        x0 = (y - sigma * eps) / alpha
        assert torch.allclose(math.cos(t) * x_t - math.sin(t) * teacher.sigma_data * F, x0, atol=2e-3 * x0.abs().max())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_scheduler_says_what_is_predicted(tmp_path, prediction):
    ddpm_pipeline(tmp_path, diffusers.DDIMScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2"))
    convention = teachers.load(tmp_path).parameterization
    assert (convention.prediction, convention.time) == ({"v_prediction": "v", "sample": "x0"}[prediction], "ddpm_cosine")


def test_flow_and_edm_schedulers():
    flow, sigma_data = scheduler_convention(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert (flow.family, flow.prediction, flow.time, flow.time_scale, sigma_data) == ("flow", "velocity", "s", 1000, None)
    assert scheduler_convention(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"))[0] == flow
    assert scheduler_convention(diffusers.EDMEulerScheduler(sigma_data=0.7)) == (teachers.EDM, 0.7)


def test_a_dit_keeps_its_labels_and_drops_its_variance(tmp_path):
    transformer = dit_pipeline(tmp_path)
    teacher = teachers.load(tmp_path)
    assert (teacher.sample_shape, teacher.num_classes, teacher.sigma_data) == ((4, 8, 8), 5, 1.0)
    x, labels = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 5])
    with torch.no_grad():
        theirs = transformer(x, torch.full((3,), 17.0), labels).sample[:, :4]
        ours = teacher.native.train()(x, torch.full((3,), 17.0), labels)  # no label is dropped
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("make", [ddpm_pipeline, dit_pipeline])
def test_the_derivative_and_the_round_trip(tmp_path, make):
    network = make(tmp_path / "pipeline")
    teacher = teachers.load(tmp_path / "pipeline")
    assert check_jvp(teacher) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert check_jvp(teacher, tolerance=2e-2) > 1e-4
    probe_jvp(teacher)  # one sample alone has other strides
    teachers.save_pretrained(teacher, tmp_path / "saved", "teacher")
    again = teachers.load(tmp_path / "saved")
    assert again.metadata() == teacher.metadata()
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[f"model.{key}"], value) for key, value in network.state_dict().items())


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("model_index.json", {"scheduler": ["diffusers", "LCMScheduler"]}, "distilled already"),
        ("model_index.json", {"scheduler": ["diffusers", "NoScheduler"]}, "has no NoScheduler"),
        ("model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "is a UNet1DModel; supported"),
        ("model_index.json", {"unet": ["my_code", "UNet"]}, "must be a class of diffusers"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1}, "num_train_timesteps must be at least 3"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}, "must be an integer up to 1,000,000"),
        ("unet/config.json", {"layers_per_block": 10**6}, "a network far larger than its weights"),
        ("scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "'continuous' is not supported"),
        ("scheduler/scheduler_config.json", {"prediction_type": "score"}, "prediction_type 'score'"),
    ],
)
def test_what_is_not_supported_says_so(tmp_path, file, changes, message):
    ddpm_pipeline(tmp_path)
    edit(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=message):
        read_diffusers(tmp_path)


def test_a_time_embedding_that_cannot_be_differentiated_is_refused(tmp_path):
    ddpm_pipeline(tmp_path, time_embedding_type="fourier")
    with pytest.raises(ValueError, match="its unet has a fourier time embedding"):
        teachers.load(tmp_path)


def test_a_part_of_a_pipeline_is_not_a_teacher(tmp_path):
    ddpm_pipeline(tmp_path / "ddpm")
    for part in ("unet", "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "scheduler"):
        with pytest.raises(ValueError, match="it is a part of a pipeline: name its folder .*ddpm, whose scheduler"):
            teachers.load(tmp_path / "ddpm" / part)
    (tmp_path / "ddpm" / "model_index.json").unlink()
    with pytest.raises(ValueError, match="part of a pipeline: name the pipeline's folder, whose scheduler"):
        teachers.load(tmp_path / "ddpm" / "unet")


def test_a_table_of_positions_far_larger_than_the_weights_is_refused(tmp_path):
    dit_pipeline(tmp_path)
    edit(tmp_path / "transformer" / "config.json", sample_size=3000)
    with pytest.raises(ValueError, match="config.json: it asks for 1500x1500 positions, far more"):
        teachers.load(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_tensors_that_do_not_fit_are_named(tmp_path, kind):
    ddpm_pipeline(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    conv = tensors.pop("conv_in.weight") if kind == "missing" else tensors["conv_in.weight"]
    save_file(tensors if kind == "missing" else {**tensors, "conv_in.weight": conv, "own": conv.clone()}, weights)
    name = "conv_in.weight" if kind == "missing" else "own"
    with pytest.raises(ValueError, match=rf"unet: its weights do not fit its config: 1 {kind} \({name}\)"):
        teachers.load(tmp_path)


def test_a_damaged_pipeline_is_one_sentence(tmp_path):
    ddpm_pipeline(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="unet cannot be read"):
        teachers.load(tmp_path)


@pytest.fixture
def teachers_script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("diffusers_teachers")


@pytest.mark.parametrize("kind, prediction", [("ddpm", "epsilon"), ("ddpm", "v_prediction"), ("dit", "v_prediction")])
def test_the_benchmarks_teachers_are_read_and_can_be_retrofitted(teachers_script, tmp_path, kind, prediction):
    torch.manual_seed(0)
    network, scheduler = teachers_script.build(kind, prediction)
    first = "conv_in.weight" if kind == "ddpm" else "pos_embed.proj.weight"
    before = network.state_dict()[first].clone()
    images, labels = torch.rand(8, 1, 28, 28) * 2 - 1, torch.arange(8)
    teachers_script.train(network, scheduler, images, labels, steps=2, batch_size=4)
    teachers_script.save(kind, network, scheduler, tmp_path)
    teacher = teachers.load(tmp_path)
    assert (teacher.sample_shape, teacher.num_classes) == ((1, 28, 28), 10)
    assert teacher.sigma_data == 0.5  # pixels: the DiT's pipeline names a VAE, but has none
    assert teacher.parameterization.prediction == VP_PREDICTIONS[prediction]
    after = teacher.native.model.state_dict()[first]
    assert torch.equal(after, network.state_dict()[first]) and not torch.equal(after, before)
    assert time_embedding_speed(teacher) > TOLERABLE_SPEED > time_embedding_speed(retrofit(teacher))
