"""A smooth time embedding in place of a network's own."""

import pytest
import torch
from safetensors.torch import load_file

import teachers
from distill.jvp import check_jvp
from teachers.networks import build
from teachers.networks.trigflow_time import TrigFlowTime, time_embeddings
from teachers.pretrained import student_needs, time_embedding_speed
from teachers.retrofit import fit, retrofit, training_times

EDM2 = dict(
    img_resolution=8, img_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4], channel_mult_noise=4, label_dropout=0.1,
)  # fmt: skip


def edm2_teacher():
    torch.manual_seed(0)
    native = build("EDM2UNet", EDM2)
    for name, parameter in native.named_parameters():
        if name.endswith("gain"):  # zero at first: then time and labels do not matter
            parameter.data.fill_(1.0)
    return teachers.wrap(native, teachers.EDM, 0.5, (1, 8, 8), 3, "one_hot").eval()


def velocities(*models):
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.randn(32, 1, 8, 8, generator=generator)
    t, labels = torch.linspace(0.01, 1.56, 32), torch.arange(32) % 3
    with torch.no_grad():
        return [model(x, t, labels) for model in models]


def relative_error(a, b):
    return ((a - b).square().mean() / b.square().mean()).item()


def test_edm2s_embedding_becomes_slow_and_nothing_else_changes():
    teacher = edm2_teacher()
    smooth = retrofit(teacher)
    assert time_embedding_speed(teacher) > 1 > time_embedding_speed(smooth)
    assert (smooth.parameterization.prediction, smooth.parameterization.time) == ("raw", "trigflow")
    assert student_needs(time_embedding_speed(teacher)).endswith("objective retrofit")
    assert student_needs(time_embedding_speed(smooth)) == "can start from this network as it is"
    own, new = teacher.native.state_dict(), smooth.native.state_dict()
    assert own.keys() - new.keys() == {"emb_fourier.freqs", "emb_fourier.phases"}
    assert all(torch.equal(own[key], new[key]) for key in own.keys() & new.keys())
    assert check_jvp(smooth) < 1e-3


def test_a_slow_embedding_is_imitated(make_teacher):
    """SiT's and DDPM++'s own embeddings are smooth already: the fitted one gives nearly the same velocity."""
    for kind in ("SiT", "SongUNet"):
        teacher = make_teacher(kind)
        a, b = velocities(retrofit(teacher), teacher)
        assert relative_error(a, b) < 1e-2


def test_the_fit_is_ridge_regression():
    torch.manual_seed(0)
    embedding, t = TrigFlowTime(5), training_times(0.5)
    true = TrigFlowTime(5).double()
    fit(embedding, t, true(t).detach())
    assert (embedding.double()(t) - true(t)).abs().max() < 1e-3


def test_it_is_saved_and_loaded_and_made_a_student(tmp_path):
    smooth = retrofit(edm2_teacher())
    teachers.save_pretrained(smooth, tmp_path, "teacher")
    again = teachers.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(*velocities(smooth, again), strict=True))
    assert "emb_fourier.linear.weight" in load_file(tmp_path / "model.safetensors")
    student = again.student(guidance_embedding=True)
    assert student.accepts_guidance and list(time_embeddings(student.native)) == ["emb_fourier"]


def test_what_cannot_be_retrofitted_says_so():
    with pytest.raises(ValueError, match="Linear is not one of our networks"):
        retrofit(teachers.wrap(torch.nn.Linear(2, 2), teachers.EDM, 0.5, (1, 2, 2)))
    with pytest.raises(ValueError, match="has a smooth time embedding already"):
        retrofit(retrofit(edm2_teacher()))


@pytest.mark.parametrize("kind, argument", [("SiT", "qk_norm"), ("LightningDiT", "use_qknorm")])
def test_queries_and_keys_are_normalised_by_the_same_route(tmp_path, kind, argument):
    """At first attention is about as sharp as it was; with scales of 1 it is not."""
    torch.manual_seed(0)
    small = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    teacher = teachers.wrap(build(kind, {**small, "learn_sigma": False}), teachers.SIT, 0.5, (1, 8, 8), 3).eval()
    for name, parameter in teacher.native.named_parameters():
        if parameter.requires_grad:
            parameter.data += (0.6 if "qkv" in name else 0.3) * torch.randn(parameter.shape)
    assert retrofit(teacher, qk_norm=True).native.config == {**teacher.native.config, argument: True, "trigflow_time": True}
    smooth = retrofit(teacher)  # so that what is left is the normalisation's doing
    changed, flat = retrofit(smooth, qk_norm=True), retrofit(smooth, qk_norm=True)
    norms = [m for name, m in flat.native.named_modules() if name.endswith(("q_norm", "k_norm"))]
    assert len(norms) == 4
    for norm in norms:
        norm.weight.data.fill_(1.0)
    own, scaled, unscaled = velocities(smooth, changed, flat)
    assert relative_error(scaled, own) < relative_error(unscaled, own)
    teachers.save_pretrained(changed, tmp_path, "teacher")
    assert torch.equal(velocities(teachers.load(tmp_path))[0], scaled)
    with pytest.raises(ValueError, match="normalises its queries and keys already"):
        retrofit(changed, qk_norm=True)


def test_the_scales_are_the_spread_of_queries_and_keys():
    """Where that is the same everywhere, normalising changes nothing: queries of +-2, keys of +-3, whatever the image."""
    small = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    native = build("SiT", small)
    qkv = native.blocks[0].attn.qkv
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    qkv.weight.data.zero_()
    qkv.bias.data.copy_(torch.cat([2 * signs, 3 * signs, torch.zeros(16)]))
    attn = retrofit(teachers.wrap(native, teachers.SIT, 0.5, (1, 8, 8), 3).eval(), qk_norm=True).native.blocks[0].attn
    for norm, spread in ((attn.q_norm, 2), (attn.k_norm, 3)):
        heads = spread * signs.view(2, 8)
        torch.testing.assert_close(norm(heads), heads, rtol=1e-4, atol=0)


def test_a_smooth_teacher_gets_the_normalisation_alone(make_teacher):
    smooth = retrofit(make_teacher("SiT"))
    changed = retrofit(smooth, qk_norm=True)
    assert changed.parameterization == smooth.parameterization
    old, new = smooth.native.state_dict(), changed.native.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old) and new.keys() > old.keys()


def test_only_transformers_have_queries_to_normalise(make_teacher):
    with pytest.raises(ValueError, match="qk_norm is for SiT and LightningDiT: SongUNet has no such normalisation"):
        retrofit(make_teacher("SongUNet"), qk_norm=True)
