"""Every class of autoencoders that supported pipelines have, tiny and with random weights, against these pipelines' own
decoding.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import text_pipelines
import torch
from datasets import Dataset, Features, Image
from support import UNET2D
from torch.nn.functional import mse_loss

import distill
import teachers
from distill import cli
from distill.autoencoders import AUTOENCODERS
from distill.data import load_images, stored_data
from distill.export import export
from distill.latents import Decoder, Latents, load_vae
from distill.normalization import decode, encode, normalization
from distill.pipeline import SCMPipeline
from distill.precompute import precompute_latents, precompute_prompts
from distill.recipe import DataConfig, parse_recipe
from teachers.networks import build
from teachers.networks.diffusers_text import unpack_latents

MEAN, STD = [1.0, -2.0, 0.0, 3.0], [2.0, 4.0, 1.0, 8.0]
OF_VIDEOS = dict(
    base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=MEAN, latents_std=STD,
)  # fmt: skip
BLOCKS = dict(
    block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)  # fmt: skip
# Class, config, and by hand what becomes of a latent's channels.
TINY = {
    "kl": ("AutoencoderKL", {**BLOCKS, "scaling_factor": 1.5, "shift_factor": 0.1}, lambda z: (z - 0.1) * 1.5),
    "dc": (
        "AutoencoderDC", dict(
            latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()), scaling_factor=0.41,
        ), lambda z: z * 0.41,
    ),
    "qwen": ("AutoencoderKLQwenImage", OF_VIDEOS, lambda z: (z - columns(MEAN)) / columns(STD)),
    "wan": ("AutoencoderKLWan", {**OF_VIDEOS, "scale_factor_spatial": 2}, lambda z: (z - columns(MEAN)) / columns(STD)),
    "wan22": (
        "AutoencoderKLWan",
        {**OF_VIDEOS, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8},
        lambda z: (z - columns(MEAN)) / columns(STD),
    ),
    "vq": ("VQModel", {**BLOCKS, "vq_embed_dim": 3, "num_vq_embeddings": 8, "scaling_factor": 0.3}, lambda z: z * 0.3),
}  # fmt: skip
SHAPES = {"vq": [3, 4, 4], "wan22": [4, 2, 2]}  # of the latents of images of 8x8; of others [4, 4, 4]
VIDEO = ("qwen", "wan", "wan22")


def columns(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def tiny(kind: str) -> torch.nn.Module:
    name, config, _ = TINY[kind]
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with each autoencoder, and six colour images of 8x8."""
    folder = tmp_path_factory.mktemp("inputs")
    for kind in TINY:
        tiny(kind).save_pretrained(folder / kind)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    Dataset.from_dict({"image": list(pixels)}, features=Features({"image": Image()})).to_parquet(folder / "train.parquet")
    return folder


def make(inputs: Path, folder: Path, kind: str) -> Latents:
    data = DataConfig(str(inputs / "train.parquet"), label_column=None)
    precompute_latents(data, folder, inputs / kind, "vae", batch_size=4)
    return Latents(folder)


def test_every_class_is_tried():
    assert {name for name, _, _ in TINY.values()} == AUTOENCODERS.keys()


@pytest.mark.parametrize("kind", TINY)
def test_latents_of_images(inputs, tmp_path, kind):
    vae, (_, _, expected) = load_vae(inputs / kind), TINY[kind]
    norm = normalization("vae", vae)
    z = torch.randn(2, SHAPES.get(kind, [4])[0], 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(norm(z), expected(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.inverse(norm(z)), z, rtol=1e-12, atol=1e-12)

    source = load_images(DataConfig(str(inputs / "train.parquet"), label_column=None), 3)
    images = torch.stack([source[i][0] for i in range(6)])
    mean, std = encode(vae, images, norm)
    with torch.no_grad():
        encoded = tiny(kind).encode(images[:, :, None] if kind in VIDEO else images)
    posterior = encoded.latent_dist if "latent_dist" in encoded else None
    wanted = encoded[0] if posterior is None else posterior.mean
    torch.testing.assert_close(mean, wanted.view_as(mean), rtol=1e-4, atol=1e-5)
    spread = torch.zeros_like(mean) if posterior is None else posterior.std.view_as(std)
    torch.testing.assert_close(std, spread, rtol=1e-4, atol=1e-5)

    cached = make(inputs, tmp_path / "latents", kind)
    assert cached.shape == SHAPES.get(kind, [4, 4, 4]) == list(mean.shape[1:])
    x = cached[5][0]
    assert x.shape == mean[5].shape and ((x - norm(mean[5])).abs() <= 6 * std[5] * norm(std).abs().max()).all()
    if posterior is None:
        torch.testing.assert_close(x, norm(mean[5]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TINY)
def test_images_of_latents(inputs, kind):
    shape = SHAPES.get(kind, [4, 4, 4])
    decoder, vae = Decoder(inputs / kind, "vae", shape), tiny(kind)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 4
    z = decoder.normalization.inverse(x)
    with torch.no_grad():
        wanted = vae.decode(z[:, :, None]).sample[:, :, 0] if kind in VIDEO else vae.decode(z).sample
    images = decoder(x)
    assert images.shape == (3, 3, 8, 8) and decoder.image_channels == 3
    torch.testing.assert_close(images, wanted.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(Decoder(inputs / kind, "vae", [shape[0], 1, *shape[1:]])(x[:, :, None]), images)


@pytest.mark.parametrize("kind, build", [(k, getattr(text_pipelines, b)) for k, b in
    {"kl": "stable_diffusion_3", "dc": "sana", "qwen": "qwen_image", "wan": "wan"}.items()])  # fmt: skip
def test_decoding_is_that_of_the_pipeline(kind, build, inputs):
    """SD3, Sana, Qwen-Image and Wan make their images of their own last latents as we do."""
    pipe = build()
    pipe = type(pipe)(**{**pipe.components, "vae": tiny(kind)})
    pipe.set_progress_bar_config(disable=True)
    options = {"num_frames": 1} if kind == "wan" else {"num_images_per_prompt": 1}
    if kind == "dc":
        options["use_resolution_binning"] = False
    size = 32
    options |= {"height": size, "width": size, "num_inference_steps": 1, "prompt": "a cat"}

    def call(form: str):
        out = pipe(output_type=form, generator=torch.Generator().manual_seed(0), **options)
        return out.frames if kind == "wan" else out.images

    latents, images = call("latent"), call("pt")
    if kind == "qwen":
        latents = unpack_latents(latents, size // 4, size // 4)
    ours = decode(load_vae(inputs / kind), latents, normalization("vae", pipe.vae))
    images = images[:, 0] if kind == "wan" else images
    assert images.shape == (1, 3, size, size) and images.std() > 0.01
    torch.testing.assert_close((ours + 1) / 2, images, rtol=1e-4, atol=1e-4)


def test_a_network_of_videos_from_images_to_images(inputs, tmp_path, capsys):
    """Wan: latents of images are videos of one frame, in training and for sampling."""
    pipe = text_pipelines.wan()
    pipe = type(pipe)(**{**pipe.components, "vae": tiny("wan")})
    pipe.save_pretrained(tmp_path / "wan")
    precompute_prompts(tmp_path / "wan", ["a cat"], tmp_path / "prompts", max_sequence_length=4)
    still = make(inputs, tmp_path / "latents", "wan")
    values = dict(
        objective="diffusion", output_dir=str(tmp_path / "run"), sample_shape=[4, 1, 4, 4], teacher=str(tmp_path / "wan"),
        data={"source": str(tmp_path / "latents"), "prompts": str(tmp_path / "prompts")}, max_train_steps=1,
        train_batch_size=2, sigma_data=1.0,
    )  # fmt: skip
    data = stored_data(parse_recipe(values, "test"))
    assert torch.equal(data[7][0], still[7][0][:, None])
    with pytest.raises(ValueError, match=r"have shape \[4, 1, 4, 4\], the recipe wants \[4, 2, 4, 4\]"):
        stored_data(parse_recipe({**values, "sample_shape": [4, 2, 4, 4]}, "test"))

    teacher = teachers.load(tmp_path / "wan").at_sample_shape((4, 1, 4, 4))
    options = dict(prompts=tmp_path / "prompts")
    latents = distill.from_pretrained(teacher).sample(2, 1, **options)
    images = distill.from_pretrained(teacher).sample(2, 1, vae=tmp_path / "wan", **options)
    assert latents.shape == (2, 4, 1, 4, 4) and images.shape == (2, 3, 8, 8)
    assert mse_loss(images, decode(pipe.vae, latents[:, :, 0], normalization("vae", pipe.vae))) < 1e-10
    command = ["sample", str(tmp_path / "wan"), "--num", "1", "--prompts", str(tmp_path / "prompts")]
    assert cli.main([*command, "--vae", str(tmp_path / "wan"), "--out", str(tmp_path / "videos.png")]) == 1
    assert "are videos of 21 latent frames; images are decoded of one frame" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dc", "qwen"])
def test_exported_pipelines_have_any_of_them(inputs, tmp_path, kind):
    torch.manual_seed(0)
    native = build("SiT", dict(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, learn_sigma=False))
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    student = teachers.wrap(native, teachers.SIT, 1.0, (4, 4, 4), native.num_classes).eval()
    folder = export(student, tmp_path / "p", vae=inputs / kind)
    pipe = SCMPipeline.from_pretrained(folder)
    images = pipe(class_labels=[1, 0], generator=torch.Generator().manual_seed(3), output_type="pt").images
    expected = distill.Model(student, {"role": "student"}).sample(2, 2, [1, 0], seed=3, vae=inputs / kind)
    torch.testing.assert_close(images * 2 - 1, expected, rtol=0, atol=1e-4)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", TINY[kind][0]]
    index["vae"][1] = "AutoencoderTiny"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="the vae in .*p is of a AutoencoderTiny; supported: AutoencoderKL, AutoencoderDC"):
        SCMPipeline.from_pretrained(folder)


def test_other_classes_are_one_sentence(inputs, tmp_path):
    diffusers.UNet2DModel(**UNET2D).save_pretrained(tmp_path / "unet")
    for name in ("UNet2DModel", ["scm_pipeline", "AutoencoderKL"], None):
        config = json.loads((tmp_path / "unet" / "config.json").read_text())
        (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": name}))
        with pytest.raises(ValueError, match="supported: AutoencoderKL, AutoencoderDC, AutoencoderKLQwenImage, ") as error:
            load_vae(tmp_path / "unet")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is an autoencoder of 3 latent channels, but the model's samples have 4"):
        Decoder(inputs / "vq", "vae", (4, 4, 4))
    odd = Features({"image": Image()})
    Dataset.from_dict({"image": [np.zeros((6, 6, 3), np.uint8)]}, features=odd).to_parquet(tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match="6x6, the autoencoder needs multiples of 4"):
        data = DataConfig(str(tmp_path / "odd.parquet"), label_column=None)
        precompute_latents(data, tmp_path / "latents", inputs / "wan22", "vae")


def test_the_autoencoder_of_a_pipeline_of_latent_diffusion(inputs, tmp_path):
    """``LDMPipeline`` keeps it as ``vqvae``."""
    diffusers.LDMPipeline(tiny("vq"), diffusers.UNet2DModel(**UNET2D), diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    model = distill.from_pretrained(tmp_path)
    assert model.network.latents and model.sample(2, 1, vae=tmp_path).shape == (2, 3, 16, 16)
