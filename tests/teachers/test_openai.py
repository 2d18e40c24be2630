"""OpenAI's U-Net against diffusers' definition of it, and its state dicts as teachers."""

import inspect
import json
import math

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import teachers
from distill.jvp import check_jvp
from distill.unet2d import as_unet2d, unet2d_config
from teachers import openai
from teachers.networks import DhariwalUNet, OpenAIUNet, build
from teachers.networks.openai_unet import OpenAIAttention, OpenAIResBlock

TINY = dict(
    image_size=16, in_channels=3, out_channels=3, num_channels=32, num_res_blocks=2, channel_mult=[1, 2, 2],
    attention_resolutions=[8, 4], num_head_channels=16, num_classes=5, dropout=0.0,
)  # fmt: skip
LSUN = dict(num_channels=256, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), use_scale_shift_norm=False)
SMALL = dict(image_size=64, num_channels=64, num_res_blocks=1, num_classes=10)


def network(seed: int = 0, **changes) -> OpenAIUNet:
    """Random weights everywhere, also where zeros are the beginning."""
    torch.manual_seed(seed)
    native = build("OpenAIUNet", {**TINY, **changes}).eval()
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return native


def on_meta(**config) -> OpenAIUNet:
    with torch.device("meta"):
        return build("OpenAIUNet", config)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("scale_shift, updown", [(True, True), (False, True), (True, False), (False, False)])
def test_it_is_the_network_of_diffusers(scale_shift, updown):
    native = network(use_scale_shift_norm=scale_shift, resblock_updown=updown)
    twin = as_unet2d(native)
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([4, 1])
    time = torch.tensor([250 * math.log(0.002), 250 * math.log(80.0)])
    with torch.no_grad():
        torch.testing.assert_close(native(x, time, labels), twin(x, time, labels).sample, rtol=1e-4, atol=1e-4)


def test_legacy_attention_puts_heads_first_and_has_one_dimension():
    native, legacy = network(), build("OpenAIUNet", {**TINY, "legacy_attention": True}).eval()
    tensors = native.state_dict()
    for name in [name for name in tensors if ".qkv." in name or ".proj_out." in name]:
        value = tensors[name].squeeze(-1)
        if ".qkv." in name:
            value = value.unflatten(0, (3, -1, 16)).transpose(0, 1).flatten(0, 2)
        tensors[name] = value
    legacy.load_state_dict(tensors)
    assert legacy.state_dict()["middle_block.1.qkv.weight"].shape == (192, 64, 1)
    x, time, labels = torch.randn(2, 3, 16, 16), torch.tensor([-300.0, 200.0]), torch.tensor([0, 2])
    with torch.no_grad():
        torch.testing.assert_close(legacy(x, time, labels), native(x, time, labels), rtol=1e-4, atol=1e-5)


def test_parameter_counts_of_the_released_networks():
    """ImageNet-64: that of EDM's ADM, the same layers under other names. LSUN: that of diffusers' model of it."""
    imagenet = on_meta(image_size=64, num_classes=1000)
    with torch.device("meta"):
        assert count(imagenet) == count(DhariwalUNet(64, 3, 3, label_dim=1000)) == 295_899_267
    lsun = on_meta(image_size=256, **LSUN)
    with torch.device("meta"):
        twin = UNet2DModel(**unet2d_config(lsun))
    assert count(lsun) == count(twin) == 526_304_771


def test_tensor_names_are_those_of_guided_diffusion():
    shapes = {name: tuple(value.shape) for name, value in on_meta(image_size=64, num_classes=1000).state_dict().items()}
    for name, shape in {
        "time_embed.0.weight": (768, 192), "time_embed.2.bias": (768,), "label_emb.weight": (1000, 768),
        "input_blocks.0.0.weight": (192, 3, 3, 3), "input_blocks.4.0.in_layers.2.weight": (192, 192, 3, 3),
        "input_blocks.5.0.skip_connection.weight": (384, 192, 1, 1), "input_blocks.5.1.qkv.weight": (1152, 384, 1, 1),
        "input_blocks.5.0.emb_layers.1.weight": (768, 768), "input_blocks.15.1.proj_out.bias": (768,),
        "middle_block.0.out_layers.3.weight": (768, 768, 3, 3), "middle_block.1.norm.weight": (768,),
        "middle_block.2.out_layers.0.bias": (768,), "output_blocks.3.1.qkv.bias": (2304,),
        "output_blocks.3.2.in_layers.0.weight": (768,), "output_blocks.0.0.in_layers.2.weight": (768, 1536, 3, 3),
        "output_blocks.15.0.skip_connection.bias": (192,), "out.0.weight": (192,), "out.2.bias": (3,),
    }.items():  # fmt: skip
        assert shapes[name] == shape, name
    assert not any("input_blocks.1.1." in name or "input_blocks.16" in name for name in shapes)


@pytest.mark.parametrize("changes", [{}, dict(use_scale_shift_norm=False, num_classes=None, resblock_updown=False)])
def test_it_is_differentiable_along_the_ode(changes):
    native = network(image_size=8, attention_resolutions=[4], num_res_blocks=1, channel_mult=[1, 2], **changes)
    classes = native.config["num_classes"]
    teacher = teachers.wrap(native, openai.PARAMETERIZATION, 0.5, (3, 8, 8), classes).eval()
    check_jvp(teacher, tolerance=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # a rounded time would be off by about 1, a rounded encoder by 0.02
        assert 1e-3 < check_jvp(teacher, tolerance=0.015)


def test_autocast_leaves_the_time_path_and_the_residual_stream_in_fp32():
    native, dtypes = network(num_res_blocks=1, channel_mult=[1, 2]), {}
    for name, module in native.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: dtypes.__setitem__(name, out.dtype))
    x, time, label = torch.randn(1, 3, 16, 16), torch.tensor([-300.0]), torch.tensor([2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        native(x, time, label)
    wide = ("time_embed.0", "time_embed.2", "label_emb", "emb_layers.1", "skip_connection", "qkv", "proj_out", "out.2")
    blocks = [name for name, module in native.named_modules() if isinstance(module, (OpenAIResBlock, OpenAIAttention))]
    checked = blocks + [name for name in dtypes if name.endswith(wide)]
    assert len(checked) > 20 and {dtypes[name] for name in checked} == {torch.float32}
    convolutions = "input_blocks.1.0.in_layers.2", "output_blocks.0.0.in_layers.2"
    assert [dtypes[name] for name in convolutions] == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.bfloat16):
        torch.func.jvp(lambda x: native(x, time, label), (x,), (x,))
    # In a derivative every later layer amplifies what the first ones round.
    assert [dtypes[name] for name in convolutions] == [torch.float32, torch.bfloat16]


def test_it_has_no_null_class():
    teacher = teachers.wrap(network(), openai.PARAMETERIZATION, 0.5, (3, 16, 16), 5)
    x, t = torch.randn(1, 3, 16, 16), torch.ones(1)
    with pytest.raises(ValueError, match="trained without label dropout"):
        teacher(x, t)
    with pytest.raises(ValueError, match="needs labels"):
        teacher.native(x, t)
    with pytest.raises(ValueError, match=r"multiples of 4, got \(18, 18\)"):
        teacher.native(torch.randn(1, 3, 18, 18), t, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 18}, "image_size 18 is not a multiple of 4"),
        ({"num_head_channels": 48}, "64 channels of attention are not a multiple of num_head_channels 48"),
        ({"num_channels": 24}, "cannot be built from its config"),
    ],
)
def test_bad_arguments_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        build("OpenAIUNet", {**TINY, **changes})


RELEASED = [
    dict(image_size=64, num_classes=1000),
    dict(image_size=256, **LSUN),
    dict(image_size=64, num_channels=128, num_res_blocks=1, resblock_updown=False, use_scale_shift_norm=False),
    dict(image_size=128, num_channels=128, num_res_blocks=1, channel_mult=(1, 1, 2, 3, 4), legacy_attention=True),
    dict(image_size=512, num_channels=128, num_res_blocks=1, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), in_channels=4,
         out_channels=4),
]  # fmt: skip


@pytest.mark.parametrize("arguments", RELEASED)
def test_a_config_is_read_off_the_tensors(arguments):
    original = on_meta(**arguments)
    tensors = original.state_dict()
    assert openai.matches(tensors)
    config = openai.config(tensors)
    defaults = {k: v.default for k, v in inspect.signature(OpenAIUNet).parameters.items() if k != "dropout"}
    as_lists = lambda v: list(v) if isinstance(v, tuple) else v  # noqa: E731
    expected = {k: as_lists(v) for k, v in {**defaults, **arguments}.items()}
    assert {"num_classes": None, **config["network_config"]} == expected
    size, channels = arguments["image_size"], arguments.get("in_channels", 3)
    assert config["sample_shape"] == [channels, size, size] and config["num_classes"] == arguments.get("num_classes")
    teachers.pretrained.check_config(config, "file")
    assert json.loads(json.dumps(config)) == config
    teachers.pretrained.check_tensors(on_meta(**config["network_config"]), tensors, "file")


def test_tensors_become_the_denoiser_of_consistency_models():
    """``D = c_skip y + c_out net(c_in y, 1000 * 0.25 * log(sigma + 1e-44))``, karras_diffusion.py."""
    torch.manual_seed(0)
    native = OpenAIUNet(**SMALL).eval()
    for p in native.parameters():  # zeros would hide the time and the label
        p.data += 0.02 * torch.randn_like(p)
    config = openai.config(native.state_dict())
    loaded = build(config["network"], config["network_config"]).eval()
    loaded.load_state_dict(native.state_dict())
    convention = teachers.Parameterization(**config["parameterization"])
    keys = ("sigma_data", "sample_shape", "num_classes", "label_format")
    teacher = teachers.Teacher(loaded, convention, *(config[key] for key in keys))
    sigma, x_t, label = 3.0, torch.randn(1, 3, 64, 64), torch.tensor([7])
    t = torch.tensor([math.atan(sigma / 0.5)], dtype=torch.float64)
    y, norm = x_t / t.cos().float(), math.hypot(sigma, 0.5)
    with torch.no_grad():
        inner = native(y / norm, torch.tensor([1000 * 0.25 * math.log(sigma + 1e-44)]), label)
        denoised = 0.25 / norm**2 * y + sigma * 0.5 / norm * inner
        F = (t.cos().float() * x_t - denoised) / (0.5 * t.sin().float())
        torch.testing.assert_close(teacher(x_t, t, label), F, rtol=1e-3, atol=1e-3)
    assert F.std() > 0.1


def test_other_tensors_are_not_taken_for_it():
    assert not openai.matches({})
    with torch.device("meta"):
        assert not openai.matches(DhariwalUNet(64, 3, 3).state_dict())
    latent_diffusion = on_meta(image_size=64).state_dict()
    del latent_diffusion["middle_block.1.qkv.weight"]
    assert not openai.matches(latent_diffusion)


def released_tensors(**changes):
    return on_meta(**{**SMALL, **changes}).state_dict()


@pytest.mark.parametrize(
    "tensors, message",
    [
        (released_tensors(out_channels=6), "6 outputs for 3 channels: a guided-diffusion network"),
        (released_tensors(channel_mult=(1, 2, 4)), r"widths 64, 128, 256 is of no published .* 64 times 1, 2, 3, 4 \(64"),
        (released_tensors(channel_mult=(1,), attention_resolutions=()), "widths 64 is of no published image size"),
        ({k: v for k, v in released_tensors().items() if k != "time_embed.0.weight"}, "incomplete .*'time_embed.0.weight'"),
        ({k: v for k, v in released_tensors().items() if "input_blocks.3" not in k}, "incomplete .*'input_blocks.3.0.out_"),
        ({**released_tensors(), "out.2.weight": torch.tensor(1.0)}, "incomplete or misshapen"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tensors, message):
    assert openai.matches(tensors)
    with pytest.raises(ValueError, match=message) as error:
        openai.config(tensors)
    assert "\n" not in str(error.value)
