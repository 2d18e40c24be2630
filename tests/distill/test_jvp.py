import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import teachers
from distill.jvp import ForwardModeError, SDPACastFirst, check_jvp, jvp, record_rng, replay_rng
from distill.trigflow import expand
from teachers.networks.layers import DualLinear, silu, unrounded_value
from teachers.networks.song_unet import Conv2d


def rearranged(teacher, time, batch_size=4):
    """A noisy batch, its time, and the rearranged tangents along a random velocity."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, batch_size, *teacher.sample_shape, generator=generator)
    t = torch.full((batch_size,), time)
    scale = t.cos() * t.sin()
    return (x, t), (expand(scale, x) * v, scale)


def times(sigma_data):
    return torch.atan(torch.tensor([0.002, 0.02, 0.3, 2.0, 20.0, 80.0]) / sigma_data).tolist()


NCSNPP = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1))
VARIANTS = [
    ("SongUNet", {}),
    ("SongUNet", NCSNPP),
    ("DhariwalUNet", {}),
    ("EDM2UNet", {}),
    ("SiT", {}),
    ("SiT", {"qk_norm": True}),
    ("SiT", {"double_norm": True}),
    ("SiT", {"qk_norm": True, "double_norm": True}),
]
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
LABELS = torch.tensor([0, 1, 2, 1])


def relative_error(teacher, autocast, batch_size=4):
    """The worst error of the tangent against fp64, over all times."""
    reference, errors = copy.deepcopy(teacher).double(), []
    labels = torch.arange(batch_size) % 3
    for time in times(teacher.sigma_data):
        primals, tangents = rearranged(teacher, time, batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tangent = jvp(lambda x, t: teacher(x, t, labels), primals, tangents)[1]
        wide = [tuple(v.double() for v in pair) for pair in (primals, tangents)]
        expected = jvp(lambda x, t: reference(x, t, labels), *wide)[1]
        errors.append(((tangent - expected).norm() / expected.norm()).item())
    return max(errors)


@pytest.mark.parametrize("kind, changes", VARIANTS)
def test_fp32_is_exact_at_every_time(make_teacher, kind, changes):
    assert relative_error(strengthened(make_teacher(kind, **changes)), autocast=False) < 1e-5


@pytest.mark.parametrize("kind, changes", VARIANTS)
def test_bf16_is_within_two_percent_at_every_time(make_teacher, kind, changes):
    teacher = strengthened(make_teacher(kind, **changes))
    assert 1e-4 < relative_error(teacher, autocast=True) < 2e-2  # above 0: autocast was on


@pytest.mark.parametrize("kind, changes", VARIANTS)
def test_check_passes_for_every_network(make_teacher, kind, changes):
    teacher = strengthened(make_teacher(kind, **changes))
    check_jvp(teacher, tolerance=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        check_jvp(teacher, tolerance=2e-2)


def strengthened(teacher):
    """What starts at zero, made to count: a small SiT's output would vanish beside the exact ``x_t`` in ``F``, and its
    errors with it; so would the time in EDM2.
    """
    if hasattr(teacher.native, "final_layer"):
        teacher.native.final_layer.linear.weight.data *= 20
    for parameter in teacher.native.parameters():
        if parameter.ndim == 0:
            parameter.data.fill_(0.5)
    return teacher


@pytest.mark.parametrize("kind", ["SongUNet", "EDM2UNet", "SiT"])
def test_autocast_leaves_the_time_path_and_the_residual_stream_in_fp32(make_teacher, kind):
    teacher, dtypes = make_teacher(kind), {}
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: dtypes.__setitem__(name, out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        teacher(*rearranged(teacher, 0.7)[0], LABELS)
    wide = ("affine", "skip", "map_layer0", "map_layer1", "adaLN_modulation", "t_embedder", "emb_noise", "emb_linear")
    blocks = [n for n in dtypes if n.rsplit(".", 1)[0].endswith((".enc", ".dec", ".blocks"))]
    checked = blocks + [n for n in dtypes if n.endswith(wide)]
    assert len(checked) > 3 and {dtypes[n] for n in checked} == {torch.float32}
    assert torch.bfloat16 in dtypes.values()


@pytest.mark.parametrize("name", ["mnist-edm", "mnist-flow"])
def test_bundled_teachers_in_fp32_and_bf16(name):
    teacher = teachers.load(name)
    assert relative_error(teacher, autocast=False) < 1e-5
    assert relative_error(teacher, autocast=True) < 2e-2


def test_check_passes_in_training_mode_with_dropout(make_teacher):
    teacher = make_teacher("SongUNet", dropout=0.3).train()
    assert check_jvp(teacher, tolerance=1e-3) < 1e-3


def test_the_loss_forward_sees_the_same_dropout_masks(make_teacher):
    teacher = make_teacher("SongUNet", dropout=0.3).train()
    primals, tangents = rearranged(teacher, 0.7)
    rng = record_rng(torch.device("cpu"))
    primal, _ = jvp(lambda x, t: teacher(x, t, LABELS), primals, tangents)
    with replay_rng(rng):
        assert torch.equal(teacher(*primals, LABELS), primal)
    assert (teacher(*primals, LABELS) - primal).abs().max() > 1e-3


class Wrapped(nn.Module):
    """A native network around one questionable layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, time):
        return self.layer(x) * (1 + time.view(-1, 1, 1, 1))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.conv, self.use_reentrant = nn.Conv2d(1, 1, 3, padding=1), use_reentrant

    def forward(self, x):
        return checkpoint(self.conv, x, use_reentrant=self.use_reentrant)


class Attention(nn.Module):
    """As a foreign network would have it: torch's own function, two heads of four channels."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(1, 24, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, 4)).mT.contiguous().unbind(1)
        return F.scaled_dot_product_attention(q, k, v).mean((1, 3)).view(x.shape)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return Square.apply(x) * self.weight


class Detached(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.detach()) + x


def wrap(layer):
    return teachers.wrap(Wrapped(layer), teachers.TRIGFLOW, 0.5, (1, 8, 8))


@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet", "EDM2UNet", "SiT"])
def test_one_pass_gives_the_gradient_of_the_value_and_a_derivative_without_a_graph(make_teacher, kind):
    teacher = make_teacher(kind).double()
    (x, t), tangents = rearranged(teacher, 1.0)
    inputs, tangents = (x.double(), t.double()), [v.double() for v in tangents]
    call = lambda x, t: teacher(x, t, LABELS)  # noqa: E731
    value, derivative = jvp(call, inputs, tangents, keep_graph=True)
    assert not derivative.requires_grad
    torch.testing.assert_close(derivative, jvp(call, inputs, tangents)[1])
    trained = [p for p in teacher.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(v.square().sum(), trained, allow_unused=True) for v in (value, call(*inputs))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_a_compiled_derivative_is_the_same(make_teacher, backend, keep_graph):
    """Value, tangent and gradients: those of the value with a tangent, or where that has no graph, of the network itself."""
    teacher = make_teacher("SongUNet", channel_mult=[1], attn_resolutions=[]).double()
    (x, t), tangents = rearranged(teacher, 1.0)
    inputs, tangents = (x.double(), t.double()), tuple(v.double() for v in tangents)
    trained = [p for p in teacher.parameters() if p.requires_grad]
    call = lambda x, t: teacher(x, t, LABELS)  # noqa: E731

    def results(backend):
        value, derivative = jvp(call, inputs, tangents, keep_graph, backend)
        if not keep_graph:
            value = (torch.compile(call, backend=backend) if backend else call)(*inputs)
        return value, derivative, torch.autograd.grad(value.square().sum(), trained, allow_unused=True)

    torch._dynamo.reset()
    torch.testing.assert_close(results(backend), results(None), rtol=1e-9, atol=1e-9)


# Not SiT: the derivative of PyTorch's tangent of layer_norm takes its mean and deviation for constants.
@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet", "EDM2UNet"])
def test_elsewhere_the_derivative_can_be_differentiated_by_the_weights(make_teacher, kind):
    teacher = make_teacher(kind).double()
    (x, t), tangents = rearranged(teacher, 1.0)
    inputs, tangents = (x.double(), t.double()), tuple(v.double() for v in tangents)

    def projected():
        return torch.func.jvp(lambda x, t: teacher(x, t, LABELS), inputs, tangents)[1].square().sum()

    trained = [p for p in teacher.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(projected(), trained, allow_unused=True)
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype) for p in trained]
    slope = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True) if g is not None)
    sides, h = [], 1e-6
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, v in zip(trained, directions, strict=True):
                p += step * v
            sides.append(projected())
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / (2 * h), rtol=1e-5, atol=0)


def test_elsewhere_the_derivative_of_a_linear_layer_can_be_differentiated_by_its_weights():
    layer, x = DualLinear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = tuple(p.detach().requires_grad_() for p in layer.parameters())

    def projected(weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.jvp(lambda x: silu(torch.func.functional_call(layer, parameters, (x,))), (x,), (x.cos(),))[1]

    assert torch.autograd.gradcheck(projected, weights)


@pytest.mark.parametrize("options", [{}, {"down": True}])
def test_a_value_without_rounding_has_the_tangent_and_the_gradient_of_autocast(options):
    layer = Conv2d(3, 5, kernel=3, **options)
    layer.bias.data.normal_()
    x, v = torch.randn(2, 2, 3, 8, 8).unbind()
    x.requires_grad_()

    direction = torch.randn_like(layer(x))

    def gradients(y):
        return torch.autograd.grad((y.float() * direction).sum(), (x, layer.weight, layer.bias))

    linear = copy.deepcopy(layer)
    linear.bias.data.zero_()
    wide = gradients(layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        y, dy = jvp(lambda x: unrounded_value(layer, x), (x,), (v,), keep_graph=True)
        assert torch.equal(jvp(lambda x: unrounded_value(layer, x), (x,), (v,))[0], y)
        expected, without, tangent = gradients(layer(x)), unrounded_value(layer, x), linear(v)
        found = gradients(y)
    assert y.dtype == dy.dtype == torch.float32 and torch.equal(y, layer(x))
    assert without.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(dy, tangent.float(), rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not any(torch.equal(a, b) for a, b in zip(found[:2], wide[:2], strict=True))


def test_checkpointing_is_passed():
    assert check_jvp(wrap(Checkpointed(use_reentrant=False))) < 1e-4


def test_attention_of_foreign_networks_is_passed():
    torch.manual_seed(0)
    assert check_jvp(wrap(Attention())) < 1e-4


def test_attention_may_be_cast_before_it_is_called():
    """What a GPU needs; autocast would round between the operations that it is made of, inside ``torch.func.jvp``."""
    q, k, v, mask = torch.randn(4, 2, 2, 8, 8).unbind()
    rounded = [x.bfloat16() for x in (q, k, v, mask)]
    with torch.autocast("cpu", torch.bfloat16), SDPACastFirst():
        got = F.scaled_dot_product_attention(q, k, value=v, attn_mask=mask)
        assert (q @ k.mT).dtype == torch.bfloat16
    assert torch.equal(got, F.scaled_dot_product_attention(*rounded[:3], attn_mask=rounded[3]))
    with SDPACastFirst():
        assert torch.equal(F.scaled_dot_product_attention(query=q, key=k, value=v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    "layer, message",
    [
        (CustomFunction(), r"cannot pass module 'native.layer' \(CustomFunction\)"),
        (nn.BatchNorm2d(1), r"cannot pass module 'native.layer' \(BatchNorm2d\)"),
        (Checkpointed(use_reentrant=True), r"cannot pass module 'native.layer' \(Checkpointed\)"),
        (Detached(1, 1, 3, padding=1), "drops or changes tangents"),
    ],
)
def test_networks_that_cannot_be_differentiated_are_named(layer, message):
    with pytest.raises(ForwardModeError, match=message):
        check_jvp(wrap(layer).train())


class Stepwise(nn.Module):
    """A network whose time has no derivative: rounded, or looked up by its integer."""

    def __init__(self, table: bool):
        super().__init__()
        self.scale = nn.Embedding(4, 1) if table else nn.Linear(1, 1)

    def forward(self, x, t):
        steps = (t * 2).round()
        scale = self.scale(steps.long() if isinstance(self.scale, nn.Embedding) else steps[:, None])
        return x.sin() * scale[:, :, None, None]


@pytest.mark.parametrize("table", [False, True], ids=["rounded", "table"])
def test_a_time_without_a_derivative_is_named(table):
    """Differences over small distances agree with a derivative of zero."""
    torch.manual_seed(0)
    network = teachers.wrap(Stepwise(table), teachers.TRIGFLOW, 0.5, (1, 8, 8)).eval()
    with pytest.raises(ForwardModeError, match="Stepwise has no derivative in time, though it differs between times"):
        check_jvp(network)
