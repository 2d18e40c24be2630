import math

import pytest
import torch
import torch.nn.functional as F

from teachers.networks import SiT, SongUNet, build
from teachers.networks.layers import GroupNorm
from teachers.networks.song_unet import Conv2d


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    "config, parameters",
    [
        (dict(img_resolution=32, label_dim=0, augment_dim=9, channel_mult=(2, 2, 2)), 55_733_891),  # cifar10 uncond-vp
        (dict(img_resolution=32, label_dim=10, augment_dim=9, channel_mult=(2, 2, 2)), 55_735_299),  # cifar10 cond-vp
        (dict(img_resolution=64, label_dim=0, augment_dim=9, channel_mult=(1, 2, 2, 2)), 61_805_571),  # ffhq-64 -vp
    ],
)
def test_song_unet_has_the_published_parameter_counts(config, parameters):
    with torch.device("meta"):
        assert count(SongUNet(in_channels=3, out_channels=3, **config)) == parameters


def test_sit_xl_has_the_published_parameter_count():
    with torch.device("meta"):
        assert count(SiT()) == 675_129_632


def test_tensor_names_are_those_of_released_checkpoints():
    with torch.device("meta"):
        unet = SongUNet(32, 3, 3, augment_dim=9, channel_mult=(2, 2, 2)).state_dict()
        sit = SiT().state_dict()
    for name in (
        "map_augment.weight", "map_layer0.weight", "map_layer1.bias", "enc.32x32_conv.weight", "enc.32x32_block0.skip.bias",
        "enc.16x16_down.conv0.resample_filter", "enc.16x16_block3.qkv.weight", "dec.8x8_in0.proj.bias",
        "dec.8x8_in1.affine.weight", "dec.32x32_up.skip.weight", "dec.32x32_aux_norm.weight", "dec.32x32_aux_conv.bias",
    ):  # fmt: skip
        assert name in unet
    for name in (
        "pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.bias",
        "blocks.27.attn.qkv.bias", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias",
        "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias",
    ):  # fmt: skip
        assert name in sit
    assert sit["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert sit["final_layer.linear.weight"].shape == (2 * 2 * 8, 1152)


def test_output_has_the_shape_of_the_input(teacher):
    x = torch.randn(2, 1, 8, 8)
    assert teacher(x, torch.tensor([0.1, 1.5]), torch.tensor([0, 2])).shape == x.shape


@pytest.mark.parametrize("kind", ["SongUNet", "SiT"])
def test_guidance_input_starts_without_effect(make_teacher, kind):
    teacher = make_teacher(kind)
    student = teacher.student(guidance_embedding=True)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.4, 1.2]), torch.tensor([0, 1])
    assert student.accepts_guidance and not teacher.accepts_guidance
    torch.testing.assert_close(student(x, t, y, torch.tensor([1.0, 3.0])), teacher(x, t, y))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_box_resampling_equals_its_convolution(direction):
    layer = Conv2d(6, 6, 0, **{direction: True})
    x = torch.randn(2, 6, 8, 8)
    taps = layer.resample_filter.expand(6, 1, -1, -1)
    slow = F.conv_transpose2d(x, 4 * taps, stride=2, groups=6) if layer.up else F.conv2d(x, taps, stride=2, groups=6)
    torch.testing.assert_close(layer(x), slow)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_tangent_is_that_of_torch(memory_format):
    torch.manual_seed(0)
    norm = GroupNorm(4, 8).double()
    norm.weight.data.normal_(), norm.bias.data.normal_()
    x, v = torch.randn(2, 3, 8, 5, 5, dtype=torch.float64)
    plain = lambda x: F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)  # noqa: E731
    expected = torch.func.jvp(plain, (x,), (v,))
    x, v = x.contiguous(memory_format=memory_format), v.contiguous(memory_format=memory_format)
    got = torch.func.jvp(norm, (x,), (v,))
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    h = 1e-6
    torch.testing.assert_close(got[1], (norm(x + h * v) - norm(x - h * v)) / (2 * h), rtol=1e-6, atol=1e-7)


def test_attention_splits_its_channels_like_the_released_weights():
    """Released order of the 3C outputs is (heads, C / heads, 3)."""
    torch.manual_seed(0)
    block = build("SongUNet", dict(img_resolution=4, in_channels=1, out_channels=1, model_channels=16, channel_mult=[1],
                                   num_blocks=1, attn_resolutions=[4])).enc["4x4_block0"]  # fmt: skip
    x = torch.randn(2, 16, 4, 4)
    torch.nn.init.normal_(block.proj.weight)
    q, k, v = block.qkv(x).reshape(2, 16, 3, 16).unbind(2)
    weights = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(16), dim=2)
    expected = block.proj(torch.einsum("nqk,nck->ncq", weights, v).reshape(2, 16, 4, 4))
    torch.testing.assert_close(block.attention(x), expected, rtol=1e-4, atol=1e-5)


def test_sit_patches_come_back_where_they_were():
    """Token (row, column), offsets (p, q), channel fastest."""
    sit = build("SiT", dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=0,
                            learn_sigma=False))  # fmt: skip
    image = torch.arange(16.0).view(1, 1, 4, 4)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2).reshape(1, 4, 4)
    torch.testing.assert_close(sit.unpatchify(patches), image)


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("UNet", {}, "network is 'UNet'; allowed: SongUNet, SiT"),
        ("SiT", {"hiden_size": 8}, "SiT has no argument 'hiden_size'"),
        ("SongUNet", {}, "SongUNet cannot be built"),
        ("SiT", {"input_size": 9, "patch_size": 2}, "not a multiple"),
    ],
)
def test_bad_configs_are_one_sentence(name, config, message):
    with pytest.raises(ValueError, match=message):
        build(name, config)
