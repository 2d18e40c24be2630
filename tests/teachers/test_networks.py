import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import teachers
from distill.jvp import check_jvp
from teachers.networks import DhariwalUNet, EDM2UNet, LightningDiT, SiT, SongUNet, build, is_registered
from teachers.networks.layers import GroupNorm, dropout, expand_pixels, scaled_sum, upsample_nearest
from teachers.networks.lightning_dit import RotaryEmbedding, SwiGLU
from teachers.networks.song_unet import Conv2d

UNET = dict(
    img_resolution=8, in_channels=1, out_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4],
)  # fmt: skip


NCSNPP = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1))


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    "config, parameters",
    [
        (dict(img_resolution=32, label_dim=0, augment_dim=9, channel_mult=(2, 2, 2)), 55_733_891),  # cifar10 uncond-vp
        (dict(img_resolution=32, label_dim=10, augment_dim=9, channel_mult=(2, 2, 2)), 55_735_299),  # cifar10 cond-vp
        (dict(img_resolution=64, label_dim=0, augment_dim=9, channel_mult=(1, 2, 2, 2)), 61_805_571),  # ffhq-64 -vp
        (dict(img_resolution=32, label_dim=10, augment_dim=9, channel_mult=(2, 2, 2), **NCSNPP), 56_400_643),  # cond-ve
        (dict(img_resolution=32, label_dim=0, augment_dim=9, channel_mult=(2, 2, 2), **NCSNPP), 56_397_827),  # uncond-ve
        (dict(img_resolution=64, label_dim=0, augment_dim=9, channel_mult=(1, 2, 2, 2), **NCSNPP), 62_761_091),  # ffhq -ve
    ],
)
def test_song_unet_has_the_published_parameter_counts(config, parameters):
    with torch.device("meta"):
        assert count(SongUNet(in_channels=3, out_channels=3, **config)) == parameters


def test_adm_has_the_published_parameter_count():
    with torch.device("meta"):
        assert count(DhariwalUNet(64, 3, 3, label_dim=1000)) == 295_899_267  # imagenet-64x64-cond-adm


@pytest.mark.parametrize("channels, label_dim, millions", [(64, 1000, 31.3), (128, 1000, 124.71), (128, 0, 124.2),
                                                           (192, 1000, 280.21), (192, 0, 279.44), (256, 1000, 497.81),
                                                           (320, 1000, 777.5), (384, 1000, 1119.28), (448, 1000, 1523.16)])
def test_edm2_has_the_published_parameter_counts(channels, label_dim, millions):
    with torch.device("meta"):
        network = EDM2UNet(64, 4, label_dim, model_channels=channels)
    # The published counts include the loss weighting of training: a linear layer on 128 channels.
    assert round((count(network) + 128) / 1e6, 1 if millions in (31.3, 124.2, 777.5) else 2) == millions


def test_sit_xl_has_the_published_parameter_count():
    with torch.device("meta"):
        assert count(SiT()) == 675_129_632


def test_lightning_dit_xl_has_the_published_size():
    with torch.device("meta"):
        network = LightningDiT(16, 1, 32, use_swiglu=True, use_rope=True, use_rmsnorm=True)
    assert round(count(network) / 1e6) == 675
    norms = 57 * 1152  # two in each block and one at the end
    patches = (32 + 1) * 1152 + (1152 + 1) * 32 + 256 * 1152  # and positions: what differs from SiT without sigma
    sit_patches = (4 * 4 + 1) * 1152 + (1152 + 1) * 32 + 256 * 1152
    # Three matrices of two thirds of the width cost as much as two of the whole; a bias is 2 * 3072 in place of 4608.
    assert count(network) == 675_129_632 + norms + patches - sit_patches + 28 * (2 * 3072 - 4608)


def test_tensor_names_of_lightning_dit():
    with torch.device("meta"):
        names = LightningDiT(16, 1, 32, use_swiglu=True, use_rope=True, use_rmsnorm=True).state_dict()
        plain, sit = LightningDiT(32, 2, 4).state_dict(), SiT(learn_sigma=False).state_dict()
    own = {
        "blocks.27.norm1.weight": (1152,), "blocks.0.norm2.weight": (1152,), "final_layer.norm_final.weight": (1152,),
        "blocks.0.mlp.w12.weight": (6144, 1152), "blocks.0.mlp.w12.bias": (6144,), "blocks.0.mlp.w3.weight": (1152, 3072),
        "blocks.0.mlp.w3.bias": (1152,), "feat_rope.freqs_cos": (256, 72), "feat_rope.freqs_sin": (256, 72),
        "x_embedder.proj.weight": (1152, 32, 1, 1), "pos_embed": (1, 256, 1152), "final_layer.linear.weight": (32, 1152),
        "blocks.0.adaLN_modulation.1.weight": (6 * 1152, 1152), "blocks.0.attn.qkv.bias": (3 * 1152,),
    }  # fmt: skip
    assert {key: tuple(names[key].shape) for key in own} == own
    assert not any("q_norm" in key or "fc1" in key for key in names)
    assert list(plain) == list(sit)  # without its additions it is SiT


def test_tensor_names_are_those_of_released_checkpoints():
    with torch.device("meta"):
        unet = SongUNet(32, 3, 3, augment_dim=9, channel_mult=(2, 2, 2)).state_dict()
        sit = SiT().state_dict()
    for name in (
        "map_augment.weight", "map_layer0.weight", "map_layer1.bias", "enc.32x32_conv.weight",
        "enc.32x32_block0.skip.bias", "enc.16x16_down.conv0.resample_filter", "enc.16x16_block3.qkv.weight",
        "dec.8x8_in0.proj.bias", "dec.8x8_in1.affine.weight", "dec.32x32_up.skip.weight",
        "dec.32x32_aux_norm.weight", "dec.32x32_aux_conv.bias",
        "enc.8x8_down.norm1.weight", "dec.16x16_block4.norm2.bias", "enc.16x16_block0.conv1.weight",
    ):  # fmt: skip
        assert name in unet
    assert not any(name.startswith(("map_label", "map_noise", "map_guidance")) for name in unet)
    assert unet["enc.16x16_block0.qkv.weight"].shape == (3 * 256, 256, 1, 1)
    assert "dec.16x16_block3.qkv.weight" not in unet  # attention in the last block of a decoder level only
    for name in (
        "pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.bias",
        "blocks.27.attn.qkv.bias", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias",
        "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias",
    ):  # fmt: skip
        assert name in sit
    assert sit["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert sit["final_layer.linear.weight"].shape == (2 * 2 * 8, 1152)


def test_tensor_names_of_ncsnpp_and_adm():
    with torch.device("meta"):
        ve = SongUNet(32, 3, 3, label_dim=10, augment_dim=9, channel_mult=(2, 2, 2), **NCSNPP).state_dict()
        adm = DhariwalUNet(64, 3, 3, label_dim=1000).state_dict()
    assert ve["map_noise.freqs"].shape == (128,) and ve["map_label.weight"].shape == (256, 10)
    assert ve["enc.16x16_aux_residual.weight"].shape == (256, 3, 3, 3)
    assert ve["enc.8x8_aux_residual.resample_filter"].shape == (1, 1, 4, 4)
    assert adm["map_label.weight"].shape == (768, 1000) and "map_label.bias" not in adm
    assert adm["enc.32x32_block0.affine.weight"].shape == (2 * 384, 768)  # a scale and a shift
    assert "enc.32x32_down.skip.weight" not in adm and "enc.32x32_down.skip.resample_filter" in adm
    assert {"out_norm.bias", "out_conv.weight", "dec.8x8_block0.qkv.weight", "dec.32x32_block3.qkv.weight"} <= set(adm)


EDM2 = dict(img_resolution=8, img_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
            attn_resolutions=[4], channels_per_head=16)  # fmt: skip


@pytest.mark.parametrize(
    "kind, config",
    [("SongUNet", {**UNET, "dropout": 0.0, **NCSNPP}), ("DhariwalUNet", {**UNET, "dropout": 0.0}), ("EDM2UNet", EDM2)],
    ids=["NCSN++", "ADM", "EDM2"],
)
def test_released_networks_map_samples_to_samples(kind, config):
    torch.manual_seed(0)
    native = build(kind, config)
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    teacher = teachers.wrap(native, teachers.EDM, 0.5, (1, 8, 8), 3, "one_hot").eval()
    out = teacher(torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.5]), torch.tensor([0, 3]))
    assert out.shape == (2, 1, 8, 8) and out.isfinite().all()


def test_a_fused_downsampling_is_a_convolution_by_both_filters():
    torch.manual_seed(0)
    layer = Conv2d(2, 3, kernel=3, down=True, resample_filter=(1, 3, 3, 1), fused=True)
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    x = torch.randn(1, 2, 8, 8)
    wide = F.conv2d(x, layer.weight, padding=2)
    expected = F.conv2d(wide, taps.outer(taps).expand(3, 1, 4, 4), stride=2, groups=3)
    assert layer(x).shape == (1, 3, 4, 4)
    torch.testing.assert_close(layer(x), expected)


def test_attention_of_adm_has_64_channels_a_head():
    with torch.device("meta"):
        network = DhariwalUNet(64, 3, 3)
    assert network.enc["32x32_block0"].num_heads == 6 and network.dec["8x8_in0"].num_heads == 12


def test_tensor_names_of_edm2():
    with torch.device("meta"):
        names = EDM2UNet(64, 4, 1000).state_dict()
    assert {"out_gain", "emb_fourier.freqs", "emb_fourier.phases", "emb_noise.weight", "emb_label.weight", "out_conv.weight",
            "enc.64x64_block0.emb_gain", "enc.32x32_block0.conv_skip.weight", "dec.16x16_block3.attn_qkv.weight",
            "dec.8x8_in0.attn_proj.weight", "dec.64x64_up.emb_linear.weight"} <= set(names)  # fmt: skip
    assert names["enc.64x64_conv.weight"].shape == (192, 5, 3, 3)  # a channel of ones in place of biases
    assert not any(name.endswith("bias") for name in names)


def test_edm2_keeps_magnitudes():
    """Unit variance in gives unit variance through every block at initialisation, which is what the network is made for."""
    torch.manual_seed(0)
    network = EDM2UNet(**{**EDM2, "img_resolution": 16, "model_channels": 64, "channels_per_head": 64})
    seen = {}
    for name, module in [*network.enc.items(), *network.dec.items()]:
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.square().mean().sqrt().item()}))
    with torch.no_grad():
        network(torch.randn(4, 1, 16, 16), torch.randn(4), torch.eye(3)[[0, 1, 2, 0]])
    assert all(0.6 < rms < 1.5 for rms in seen.values()), seen


def test_edm2_weights_count_by_direction_and_are_brought_back():
    torch.manual_seed(0)
    network = build("EDM2UNet", EDM2)
    network.out_gain.data.fill_(1.0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.1, -0.5])
    before = network(x, t)
    for p in network.parameters():
        if p.ndim > 1:
            p.data *= 3
    torch.testing.assert_close(network(x, t), before, rtol=1e-3, atol=1e-3)
    network.normalize_weights()
    rms = network.out_conv.weight.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network(x, t), before, rtol=1e-3, atol=1e-3)


def test_output_has_the_shape_of_the_input(teacher):
    x = torch.randn(2, 1, 8, 8)
    assert teacher(x, torch.tensor([0.1, 1.5]), torch.tensor([0, 2])).shape == x.shape


@pytest.mark.parametrize("size", [9, 12])
@pytest.mark.parametrize("kind", ["SongUNet", "SiT"])
def test_sizes_that_do_not_fit_are_one_sentence(make_teacher, kind, size):
    native = make_teacher(kind).native
    if kind == "SongUNet" and size == 12:  # a convolutional network takes every multiple
        assert native(torch.randn(1, 1, 12, 12), torch.zeros(1)).shape == (1, 1, 12, 12)
        return
    with pytest.raises(ValueError, match=r"height and width must be .*, got \("):
        native(torch.randn(1, 1, size, size), torch.zeros(1))


def test_null_class_of_song_unet_is_zeros(make_teacher):
    teacher = make_teacher("SongUNet")
    native, x, time = teacher.native, torch.randn(2, 1, 8, 8), torch.zeros(2)
    torch.testing.assert_close(teacher.native_condition(torch.tensor([2, 3]), x), torch.eye(4)[[2, 3], :3])
    torch.testing.assert_close(native(x, time), native(x, time, torch.zeros(2, 3)))
    assert (native(x, time) - native(x, time, torch.eye(3)[:2])).abs().max() > 1e-4


def test_null_class_of_sit_is_the_row_after_the_last(make_teacher):
    teacher = make_teacher("SiT")
    native, x, time = teacher.native, torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert native.y_embedder.embedding_table.num_embeddings == 4
    torch.testing.assert_close(native(x, time), native(x, time, torch.tensor([3, 3])))
    native.y_embedder.embedding_table.weight.data[3] += 1
    assert (native(x, time) - native(x, time, torch.tensor([0, 1]))).abs().max() > 1e-4
    assert SiT(8, 2, 1, 16, 1, 2, num_classes=3, class_dropout_prob=0).y_embedder.embedding_table.num_embeddings == 3


@pytest.mark.parametrize("kind", ["SongUNet", "SiT"])
def test_labels_are_never_dropped_by_the_network(make_teacher, kind):
    key = "label_dropout" if kind == "SongUNet" else "class_dropout_prob"
    teacher = make_teacher(kind, **{key: 0.9}).train()
    x, t, y = torch.randn(1, 1, 8, 8).expand(16, -1, -1, -1), torch.full((16,), 0.5), torch.ones(16, dtype=torch.long)
    out = teacher(x, t, y)
    torch.testing.assert_close(out, out[:1].expand_as(out))


@pytest.mark.parametrize("kind", ["SongUNet", "SiT"])
def test_guidance_input_starts_without_effect(make_teacher, kind):
    teacher = make_teacher(kind)
    student = teacher.student(guidance_embedding=True)
    x, t, y, w = torch.randn(2, 1, 8, 8), torch.tensor([0.4, 1.2]), torch.tensor([0, 1]), torch.tensor([1.0, 3.0])
    assert student.accepts_guidance and not teacher.accepts_guidance
    torch.testing.assert_close(student(x, t, y, w), teacher(x, t, y))
    for name, p in student.native.named_parameters():
        p.data += 0.1 * ("map_guidance" in name or "g_embedder" in name)
    assert (student(x, t, y, w) - student(x, t, y, w + 1)).abs().max() > 1e-5  # and it is heard once trained


@pytest.mark.parametrize("direction", ["up", "down"])
def test_box_resampling_equals_its_convolution(direction):
    layer = Conv2d(6, 6, 0, **{direction: True})
    x = torch.randn(2, 6, 8, 8)
    fast = layer(x)
    layer.box = False
    torch.testing.assert_close(fast, layer(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_resampling_by_a_longer_filter(direction):
    """NCSN++'s filter keeps constants (inside), halves or doubles the size, and is differentiable."""
    layer = Conv2d(2, 2, 0, **{direction: True}, resample_filter=(1, 3, 3, 1))
    out = layer(torch.full((1, 2, 8, 8), 3.0))
    size = 16 if direction == "up" else 4
    assert out.shape == (1, 2, size, size)
    torch.testing.assert_close(out[:, :, 1:-1, 1:-1], torch.full((1, 2, size - 2, size - 2), 3.0))


def random_group_norm():
    torch.manual_seed(0)
    norm = GroupNorm(4, 8).double()
    norm.weight.data.normal_(), norm.bias.data.normal_()
    plain = lambda x: F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)  # noqa: E731
    return norm, plain, *torch.randn(2, 3, 8, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_tangent_is_that_of_torch(memory_format, grad):
    norm, plain, x, v = random_group_norm()
    expected = torch.func.jvp(plain, (x,), (v,))
    x, v = x.contiguous(memory_format=memory_format), v.contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        got = torch.func.jvp(norm, (x,), (v,))
    assert got[1].requires_grad == grad
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    h = 1e-6
    torch.testing.assert_close(got[1], (norm(x + h * v) - norm(x - h * v)) / (2 * h), rtol=1e-6, atol=1e-7)


def test_group_norm_tangent_without_space():
    norm, plain, *_ = random_group_norm()
    x, v = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (v,)), torch.func.jvp(plain, (x,), (v,)))


@pytest.mark.parametrize("grad", [False, True])
def test_dropout_masks_depend_on_nothing_but_the_generator(grad):
    x = torch.randn(2, 8, 5, 4).abs() + 1
    masks = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        z = x.contiguous(memory_format=memory_format).requires_grad_(grad)
        for function in (dropout, lambda z, *rest: torch.func.jvp(lambda z: dropout(z, *rest), (z,), (z,))[0]):
            torch.manual_seed(0)
            masks.append(function(z, 0.5, True) / x)
    assert all(torch.equal(mask, masks[0]) for mask in masks) and set(masks[0].unique().tolist()) == {0.0, 2.0}
    assert dropout(x, 0.5, False) is x


def test_group_norm_tangent_has_the_gradient_of_torch():
    norm, plain, x, v = random_group_norm()
    gradients = []
    for function in (norm, plain):
        x = x.detach().requires_grad_()
        y, tangent = torch.func.jvp(function, (x,), (v,))
        loss = y.cos().sum() + tangent.sin().sum()
        gradients.append(torch.autograd.grad(loss, [x, norm.weight, norm.bias]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(3, 8, 5, 5), (3, 8, 7), (3, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_group_norm_has_the_gradient_of_torch(shape, memory_format):
    norm, plain, *_ = random_group_norm()
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.contiguous(memory_format=memory_format) if x.ndim == 4 else x).requires_grad_()
    graphs = CompileCounterWithBackend("aot_eager")
    gradients = []
    for function in (torch.compile(norm, backend=graphs, fullgraph=True), plain):
        gradients.append(torch.autograd.grad(function(x).cos().sum(), [x, norm.weight, norm.bias]))
    torch.testing.assert_close(*gradients)
    assert "autograd_function_apply" in graphs.graphs[0].code  # or the plain one was compared with itself


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampling_its_tangent_and_gradient_are_those_of_torch(memory_format):
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 8, 5, 4, dtype=torch.float64)
    x, v = (z.contiguous(memory_format=memory_format).requires_grad_() for z in (x, v))
    results = []
    for function in (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), upsample_nearest, expand_pixels):
        y, tangent = torch.func.jvp(function, (x,), (v,))
        assert y.is_contiguous(memory_format=memory_format)
        loss = y.cos().sum() + tangent.sin().sum()
        results.append((function(x), y, tangent, *torch.autograd.grad(loss, [x, v])))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "pair", [lambda x, y: (x, x * y), lambda x, y: (x, y), lambda x, y: (y, x)], ids=["both", "first", "second"]
)
def test_a_scaled_sum_its_tangent_and_gradient_are_those_of_torch(pair):
    torch.manual_seed(0)
    x, y, v = torch.randn(3, 2, 4, dtype=torch.float64).requires_grad_()
    results = []
    for function in (lambda a, b: scaled_sum(a, b, 0.7), lambda a, b: (a + b) * 0.7):
        out, tangent = torch.func.jvp(lambda x, f=function: f(*pair(x, y)), (x,), (v,))
        results.append((function(x, y), out, tangent, *torch.autograd.grad(out.cos().sum() + tangent.sin().sum(), [x, v])))
    torch.testing.assert_close(*results, rtol=1e-15, atol=0)


def test_group_norm_keeps_dtypes_under_autocast():
    norm = GroupNorm(4, 8)
    x, v = torch.randn(2, 3, 8, 5, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.func.jvp(norm, (x,), (v,))
    assert [o.dtype for o in out] == [torch.bfloat16] * 2
    exact = F.group_norm(x.float(), 4, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(out[0].float(), exact, rtol=1e-2, atol=1e-2)


def test_song_unet_embeds_time_and_class_like_the_released_weights(make_teacher):
    """Sines before cosines; one-hot labels times sqrt(label_dim)."""
    native = make_teacher("SongUNet").native
    c = torch.tensor([-1.3, 0.7])
    angles = c[:, None] * 10_000 ** -(torch.arange(8) / 7)
    emb = torch.cat([angles.sin(), angles.cos()], 1)
    emb = emb + math.sqrt(3) * native.map_label.weight.T[[0, 2]] + native.map_label.bias
    expected = F.silu(native.map_layer1(F.silu(native.map_layer0(emb))))
    torch.testing.assert_close(native.embed(c, torch.eye(3)[[0, 2]], None), expected, rtol=1e-4, atol=1e-5)


def test_sit_embeds_time_like_the_released_weights(make_teacher):
    """Cosines before sines, 256 of them, without the last frequency."""
    embedder = make_teacher("SiT").native.t_embedder
    t = torch.tensor([0.2, 0.9])
    angles = t[:, None] * 10_000 ** -(torch.arange(128) / 128)
    torch.testing.assert_close(embedder(t), embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1)))


@pytest.mark.parametrize("double_norm", [False, True])
def test_sit_block_modulates_in_the_released_order(make_teacher, double_norm):
    """Shift, scale and gate of the attention, then of the MLP; sCM's double normalisation on request."""
    block = make_teacher("SiT", double_norm=double_norm).native.blocks[0]
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    unit = (lambda v: v / v.square().mean(1, keepdim=True).sqrt()) if double_norm else (lambda v: v)
    chunks = (F.silu(c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias).split(32, dim=1)
    norm = lambda x: (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-6).sqrt()  # noqa: E731
    expected = x
    for layer, (shift, scale, gate) in ((block.attn, chunks[:3]), (block.mlp, chunks[3:])):
        inner = norm(expected) * unit(1 + scale)[:, None] + unit(shift)[:, None]
        expected = expected + gate[:, None] * layer(inner)
    torch.testing.assert_close(block(x, c), expected, rtol=1e-3, atol=1e-4)


def test_sit_position_table_is_that_of_released_checkpoints():
    """Token ``row * size + column``; sine and cosine of the column, then of the row."""
    table = SiT(6, 2, in_channels=1, hidden_size=16, depth=1, num_heads=2).pos_embed
    omega = 10_000 ** -(torch.arange(4) / 4)
    row, column = 2, 1
    expected = torch.cat([f(place * omega) for place in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[0, row * 3 + column], expected)


def test_attention_splits_its_channels_like_the_released_weights():
    """Released order of the 3C outputs is (heads, C / heads, 3)."""
    torch.manual_seed(0)
    block = build("SongUNet", {**UNET, "attn_resolutions": [8]}).enc["8x8_block0"]
    x = torch.randn(2, 16, 4, 4)
    torch.nn.init.normal_(block.proj.weight)
    q, k, v = block.qkv(x).reshape(2, 16, 3, 16).unbind(2)
    weights = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(16), dim=2)
    expected = block.proj(torch.einsum("nqk,nck->ncq", weights, v).reshape(2, 16, 4, 4))
    torch.testing.assert_close(block.attention(x), expected, rtol=1e-4, atol=1e-5)


def test_sit_patches_come_back_where_they_were():
    """Token (row, column), offsets (p, q), channel fastest."""
    sit = SiT(4, 2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=0, learn_sigma=False)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2).reshape(1, 4, 4)
    torch.testing.assert_close(sit.unpatchify(patches), image)


def test_rotary_positions_are_rotations_in_the_complex_plane():
    """EVA-02's, in which channel pairs of a head's first half turn by the row and of its second half by the column."""
    grid, head_dim = 3, 16
    x = torch.randn(2, 2, grid**2, head_dim, dtype=torch.float64)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    speed = 1 / 10_000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = torch.cat([row.flatten()[:, None] * speed, column.flatten()[:, None] * speed], dim=1)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(RotaryEmbedding(head_dim, grid).double()(x), expected, rtol=0, atol=1e-6)


def test_attention_between_rotated_tokens_hangs_on_their_distance():
    rope = RotaryEmbedding(8, 4)
    q, k = (rope(v.expand(1, 1, 16, 8))[0, 0].unflatten(0, (4, 4)) for v in torch.randn(2, 8))
    score = lambda i, j, m, n: q[i, j] @ k[m, n]  # noqa: E731
    torch.testing.assert_close(score(0, 1, 2, 3), score(1, 0, 3, 2))
    assert (score(0, 1, 2, 3) - score(0, 1, 3, 2)).abs() > 1e-3


def lightning_dit_by_hand(p, x, t, y, heads, eps=1e-6):
    """The paper's network with patches of one pixel, from its tensors ``p`` alone."""

    def linear(name, v):
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def rms(name, v):
        return v / (v.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"]

    def rotate(v):
        swapped = torch.stack([-v[..., 1::2], v[..., ::2]], -1).flatten(-2)
        return v * p["feat_rope.freqs_cos"] + swapped * p["feat_rope.freqs_sin"]

    b, c, size, _ = x.shape
    tokens = x.flatten(2).mT @ p["x_embedder.proj.weight"].flatten(1).T + p["x_embedder.proj.bias"] + p["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    cond = F.silu(time + p["y_embedder.embedding_table.weight"][y])
    for block in ("blocks.0", "blocks.1"):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", cond)[:, None].chunk(6, -1)
        qkv = linear(f"{block}.attn.qkv", rms(f"{block}.norm1", tokens) * (1 + scale1) + shift1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        if f"{block}.attn.q_norm.weight" in p:
            q, k = rms(f"{block}.attn.q_norm", q), rms(f"{block}.attn.k_norm", k)
        weights = (rotate(q) @ rotate(k).mT / math.sqrt(q.shape[-1])).softmax(-1)
        tokens = tokens + gate1 * linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        first, second = linear(f"{block}.mlp.w12", rms(f"{block}.norm2", tokens) * (1 + scale2) + shift2).chunk(2, -1)
        tokens = tokens + gate2 * linear(f"{block}.mlp.w3", first * first.sigmoid() * second)
    shift, scale = linear("final_layer.adaLN_modulation.1", cond)[:, None].chunk(2, -1)
    out = linear("final_layer.linear", rms("final_layer.norm_final", tokens) * (1 + scale) + shift)
    return out.mT.view(b, c, size, size)


LIGHTNING = dict(input_size=4, patch_size=1, in_channels=6, hidden_size=32, depth=2, num_heads=2, num_classes=3)


def lightning_dit(**changes):
    torch.manual_seed(0)
    network = build("LightningDiT", {**LIGHTNING, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, **changes})
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return network.eval()


@pytest.mark.parametrize("use_qknorm", [False, True])
def test_lightning_dit_computes_what_its_paper_says(use_qknorm):
    network = lightning_dit(use_qknorm=use_qknorm)
    x, t, y = torch.randn(3, 6, 4, 4), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        expected = lightning_dit_by_hand(network.state_dict(), x, t, y, heads=2)
        torch.testing.assert_close(network(x, t, y), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_swiglu():
    layer, x = SwiGLU(4, 6), torch.randn(2, 4)
    gate, value = x @ layer.w12.weight[:6].T, x @ layer.w12.weight[6:].T
    torch.nn.init.zeros_(layer.w12.bias)
    torch.testing.assert_close(layer(x), layer.w3(gate * gate.sigmoid() * value))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_qknorm": True, "patch_size": 2, "learn_sigma": True},
        {"use_qknorm": True, "use_rmsnorm": False},
        {"wo_shift": True, "use_swiglu": False, "use_rope": False},
    ],
)
def test_options_of_lightning_dit_are_differentiable_along_the_ode(changes):
    teacher = teachers.wrap(lightning_dit(**changes), teachers.SIT, 1.0, (6, 4, 4), 3)
    check_jvp(teacher)
    student = teacher.student(guidance_embedding=True)
    x, t, y, w = torch.randn(2, 6, 4, 4), torch.tensor([0.4, 1.2]), torch.tensor([0, 1]), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(student(x, t, y, w), teacher(x, t, y))
    assert not student.native.pos_embed.requires_grad


def test_blocks_without_shift_are_those_whose_shift_is_zero():
    network, wider = lightning_dit(wo_shift=True), lightning_dit()
    tensors = network.state_dict()
    for key in [key for key in tensors if "blocks" in key and "adaLN" in key]:
        scale1, gate1, scale2, gate2 = tensors[key].chunk(4)
        tensors[key] = torch.cat([torch.zeros_like(scale1), scale1, gate1, torch.zeros_like(scale2), scale2, gate2])
    wider.load_state_dict(tensors)
    x, t, y = torch.randn(2, 6, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([1, 3])
    torch.testing.assert_close(network(x, t, y), wider(x, t, y))


def test_lightning_dit_without_its_additions_is_sit():
    network = lightning_dit(use_swiglu=False, use_rope=False, use_rmsnorm=False)
    sit = build("SiT", {**LIGHTNING, "learn_sigma": False})
    sit.load_state_dict(network.state_dict())
    x, t, y = torch.randn(2, 6, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([1, 3])
    torch.testing.assert_close(network(x, t, y), sit(x, t, y))


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("LightningDiT", {**LIGHTNING, "use_rope": True, "num_heads": 16}, "a multiple of 4 channels per head, got 2"),
        ("UNet", {}, "network is 'UNet'; allowed: SongUNet, DhariwalUNet, EDM2UNet, SiT, LightningDiT"),
        ("SiT", {"hiden_size": 8}, "SiT has no argument 'hiden_size'"),
        ("SiT", [1], "SiT needs a mapping of constructor arguments"),
        ("SongUNet", {}, "SongUNet cannot be built from its config: .* missing 3 required"),
        ("SongUNet", {**UNET, "img_resolution": 9}, "img_resolution 9 is not a multiple of 2"),
        ("SongUNet", {**UNET, "resample_filter": [1, 2, 1]}, "even number of taps"),
        ("SongUNet", {**UNET, "model_channels": 2}, "SongUNet cannot be built"),
        ("SongUNet", {**UNET, "model_channels": "many"}, "SongUNet: model_channels must be a whole number, got 'many'"),
        ("SongUNet", {**UNET, "img_resolution": 8.5}, "SongUNet: img_resolution must be a whole number, got 8.5"),
        ("SongUNet", {**UNET, "channel_mult": 2}, "SongUNet: channel_mult must be a list of numbers, got 2"),
        ("SongUNet", {**UNET, "encoder_type": 2}, "SongUNet: encoder_type must be a word, got 2"),
        ("DiffusersDiT", {"config": 2}, "DiffusersDiT: config must be a mapping, got 2"),
        ("SiT", {"input_size": 9, "patch_size": 2}, "input_size 9 is not a multiple of patch_size 2"),
        ("SiT", {"hidden_size": 32, "num_heads": 5}, "hidden_size 32 is not a multiple of 4 and of num_heads 5"),
        ("SiT", {"hidden_size": -4, "num_heads": 2}, "SiT: hidden_size must be a whole number, got -4"),
    ],
)
def test_bad_configs_are_one_sentence(name, config, message):
    with pytest.raises(ValueError, match=message) as error:
        build(name, config)
    assert "\n" not in str(error.value)


def test_build_records_its_arguments():
    network = build("SongUNet", UNET)
    assert network.config == UNET and network.config is not UNET
    assert is_registered(network)
    assert not is_registered(SongUNet(**UNET))  # nothing to build it again from
    foreign = torch.nn.Identity()
    foreign.config = {}  # as diffusers' models have
    assert not is_registered(foreign)
