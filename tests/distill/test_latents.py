"""Cached latents: normalisations against their sources, a cache that survives being killed, and training from it."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderKL
from PIL import ExifTags
from PIL import Image as Picture
from safetensors.torch import load_file

from distill import cli, precompute, shards
from distill.data import StepSampler, as_tensors, load_images, stored_data, training_data, training_loader
from distill.latents import Latents
from distill.normalization import NORMALIZATIONS, LatentNormalization, decode, encode, normalization
from distill.precompute import precompute_latents
from distill.recipe import DataConfig, parse_recipe
from distill.run import check, run
from distill.trainer import Trainer

COUNT, SHARD = 22, 4


def tiny_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    config = dict(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return AutoencoderKL(**{**config, **changes}).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, vae) -> Path:
    """A folder with 22 images of 8x8 and an autoencoder."""
    folder = tmp_path_factory.mktemp("inputs")
    vae.save_pretrained(folder / "vae")
    write_images(folder / "train.parquet", 8)
    return folder


def write_images(path: Path, size: int, labels=None):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, size, size), dtype=np.uint8)
    labels = [i % 3 for i in range(COUNT)] if labels is None else labels
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": list(pixels), "label": labels}, features=features).to_parquet(path)


def make(inputs: Path, folder: Path, norm="scm", **changes) -> bool:
    data = DataConfig(str(inputs / "train.parquet"))
    return precompute_latents(data, folder, inputs / "vae", norm, **{"batch_size": 3, "shard_size": SHARD, **changes})


@pytest.fixture(scope="module")
def cached(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "latents"
    assert make(inputs, folder)
    return folder


def recipe(cached: Path, output: Path, **changes):
    data = Latents(cached)
    measured = torch.stack([data[i][0] for i in range(len(data))]).double().std().item()
    network = dict(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False)
    values = dict(
        objective="diffusion", output_dir=str(output), sigma_data=round(measured, 3), sample_shape=[4, 4, 4], num_classes=3,
        network={"name": "SiT", "config": network, "parameterization": "RECTIFIED_FLOW"}, data={"source": str(cached)},
        max_train_steps=6, train_batch_size=4, checkpointing_steps=2, logging_steps=1, validation_steps=6,
        evaluation={"num_samples": 50, "teacher_steps": 2},
    )  # fmt: skip
    return parse_recipe({**values, **changes}, "test")


# ---- formulas ---------------------------------------------------------------------------------------------------------


def by_hand(z: np.ndarray, mean, std, sigma_data: float) -> np.ndarray:
    return np.stack([(z[:, c] - mean[c]) / std[c] * sigma_data for c in range(z.shape[1])], 1)


def test_presets_are_those_of_their_papers():
    z = np.random.default_rng(0).normal(0, 5, (2, 4, 3, 3))
    expected = {
        "edm2": (0.0, by_hand(z, [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28], 0.5)),
        "scm": (-1.0, by_hand(z, [1.56, -0.695, 0.483, 0.729], [5.27, 5.91, 4.21, 4.31], 0.5)),
        "sd": (-1.0, z * 0.18215),
    }
    assert NORMALIZATIONS.keys() == expected.keys()
    for name, (low, x) in expected.items():
        norm = NORMALIZATIONS[name]
        assert norm.image_low == low
        torch.testing.assert_close(norm(torch.tensor(z)), torch.tensor(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.inverse(norm(torch.tensor(z))), torch.tensor(z), rtol=1e-12, atol=1e-12)
    # The constants as EDM2 rounds them.
    edm2 = NORMALIZATIONS["edm2"]
    assert np.round(edm2.scale, 4).tolist() == [0.1199, 0.1082, 0.1348, 0.1524]
    assert np.round(edm2.bias, 4).tolist() == [-0.6966, -0.3517, -0.0162, 0.3277]


@pytest.mark.parametrize(
    "config, expected",
    [
        (dict(scaling_factor=0.13025), lambda z: z * 0.13025),
        (dict(scaling_factor=1.5305, shift_factor=0.0609), lambda z: (z - 0.0609) * 1.5305),
        (
            dict(scaling_factor=0.5, latents_mean=[1.0, -2.0, 0.0, 3.0], latents_std=[2.0, 4.0, 1.0, 8.0]),
            lambda z: by_hand(z, [1.0, -2.0, 0.0, 3.0], [2.0, 4.0, 1.0, 8.0], 0.5),
        ),
    ],
    ids=["scaling", "shift", "mean and std"],
)
def test_the_autoencoder_says_its_own_normalization(config, expected):
    norm = normalization("vae", tiny_vae(**config))
    z = np.random.default_rng(0).normal(0, 5, (2, 4, 3, 3))
    assert norm.image_low == -1.0
    torch.testing.assert_close(norm(torch.tensor(z)), torch.tensor(expected(z)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["edm2", "scm"])
def test_encode_and_decode_use_the_range_of_the_source(vae, name):
    pixels = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    inside = pixels / 255 if name == "edm2" else pixels / 127.5 - 1
    norm = NORMALIZATIONS[name]
    mean, std = encode(vae, pixels / 127.5 - 1, norm)
    with torch.no_grad():
        posterior = vae.encode(inside).latent_dist
        raw = vae.decode(posterior.mean * 9).sample  # far enough out for the clamp to matter
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std, rtol=1e-4, atol=1e-5)
    images = decode(vae, norm(posterior.mean * 9), norm)
    wanted = raw.clamp(0, 1) * 2 - 1 if name == "edm2" else raw.clamp(-1, 1)
    assert (wanted != (raw * 2 - 1 if name == "edm2" else raw)).any()
    torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4)


def test_wrong_normalizations_are_one_sentence():
    with pytest.raises(ValueError, match="no normalization 'edm'; allowed: edm2, scm, sd, vae"):
        normalization("edm", tiny_vae())
    with pytest.raises(ValueError, match="'scm' is for 4 channels, the autoencoder's latents have 8"):
        normalization("scm", tiny_vae(latent_channels=8))
    with pytest.raises(ValueError, match=r"image_low is 0\.5"):
        LatentNormalization(0.5, (1.0,), (0.0,))


# ---- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_holds_every_image_in_order(inputs, cached, vae):
    images = precompute.load_images(DataConfig(str(inputs / "train.parquet")), 1)
    tensors = [load_file(path) for path in sorted(cached.glob("*.safetensors"))]
    assert [len(t["mean"]) for t in tensors] == [4, 4, 4, 4, 4, 2]
    mean, std = encode(vae, torch.stack([images[i][0] for i in range(COUNT)]), NORMALIZATIONS["scm"])
    torch.testing.assert_close(torch.cat([t["mean"] for t in tensors]), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([t["std"] for t in tensors]), std, rtol=1e-4, atol=1e-5)
    assert torch.cat([t["labels"] for t in tensors]).tolist() == [i % 3 for i in range(COUNT)]
    assert json.loads((cached / "manifest.json").read_text())["count"] == COUNT


def killed_while_writing(inputs: Path, folder: Path, shard: int) -> None:
    """Precompute in a process that is killed when half of a shard's bytes are on the disk."""
    whole = shards.save_file

    def half(tensors, path):
        whole(tensors, path)
        if f"latents-{shard:05d}" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    shards.save_file = half
    make(inputs, folder)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(inputs, cached, tmp_path, capsys):
    folder = tmp_path / "latents"
    child = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(inputs, folder, 3))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    whole = sorted(path.name for path in folder.glob("latents-*"))
    assert whole == [f"latents-{i:05d}.safetensors" for i in range(3)]
    with pytest.raises(ValueError, match="not finished: 3 of 6 files"):
        Latents(folder)
    before = {name: (folder / name).stat().st_mtime_ns for name in whole}
    assert make(inputs, folder)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in whole}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in cached.iterdir()
    }
    assert not make(inputs, folder)


def test_half_precision_and_no_labels(inputs, cached, tmp_path):
    data = DataConfig(str(inputs / "train.parquet"), label_column=None)
    precompute_latents(data, tmp_path / "half", inputs / "vae", "scm", shard_size=SHARD, dtype="float16")
    half, full = Latents(tmp_path / "half"), Latents(cached)
    assert load_file(tmp_path / "half" / half.shards.names[0])["std"].dtype == torch.float16
    torch.testing.assert_close(half[5][0], full[5][0], rtol=5e-3, atol=2e-3)
    assert half[5][1] == 0 and full[5][1] == 2
    with pytest.raises(ValueError, match="holds latents without labels, the recipe has 3 classes"):
        stored_data(recipe(tmp_path / "half", tmp_path / "run"))


def test_other_inputs_in_the_same_folder_are_an_error(inputs, cached, tmp_path):
    with pytest.raises(ValueError, match=r"another normalization \(scm; asked for: edm2\); give another folder"):
        make(inputs, cached, "edm2")
    with pytest.raises(ValueError, match="another dtype"):
        make(inputs, cached, dtype="float16")
    with pytest.raises(ValueError, match="another shard_size"):
        make(inputs, cached, shard_size=5)
    torch.manual_seed(1)
    other = tiny_vae()
    other.encoder.conv_in.weight.data += 0.1
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="another vae"):
        precompute_latents(DataConfig(str(inputs / "train.parquet")), cached, tmp_path / "vae", "scm", shard_size=SHARD)
    write_images(tmp_path / "train.parquet", 8)
    with pytest.raises(ValueError, match="another images"):
        precompute_latents(DataConfig(str(tmp_path / "train.parquet")), cached, inputs / "vae", "scm", shard_size=SHARD)


def test_bad_autoencoders_and_images_are_one_line(inputs, tmp_path, capsys):
    data = str(inputs / "train.parquet")

    def message(*arguments) -> str:
        assert cli.main(["precompute", "latents", *map(str, arguments), "--normalization", "scm"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "has no config.json" in message(data, tmp_path / "out", "--vae", tmp_path)
    assert "'teacher' stands for samples" in message("teacher", tmp_path / "out", "--vae", inputs / "vae")
    assert "hf://owner/name" in message(data, tmp_path / "out", "--vae", "hf://vae")
    broken = tmp_path / "broken"
    tiny_vae().save_pretrained(broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in message(data, tmp_path / "out", "--vae", broken)
    (broken / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    assert "supported: AutoencoderKL" in message(data, tmp_path / "out", "--vae", broken)
    assert "must be at least 1" in message(data, tmp_path / "out", "--vae", inputs / "vae", "--batch-size", 0)
    assert "is not empty and not a folder of latents: it holds broken" in message(data, tmp_path, "--vae", inputs / "vae")
    write_images(tmp_path / "odd.parquet", 7)
    assert "7x7, the autoencoder needs multiples of 2" in message(
        tmp_path / "odd.parquet", tmp_path / "out", "--vae", inputs / "vae"
    )
    write_images(tmp_path / "bare.parquet", 8, labels=[None] * COUNT)
    assert "without a label" in message(tmp_path / "bare.parquet", tmp_path / "out", "--vae", inputs / "vae")
    assert not (tmp_path / "out").exists()
    (tmp_path / "images").mkdir()
    for i, size in enumerate((8, 8, 8, 10)):
        Picture.new("L", (size, size)).save(tmp_path / f"images/{i}.png")
    mixed = [tmp_path / "images", tmp_path / "out", "--vae", inputs / "vae", "--normalization", "scm", "--no-labels"]
    for workers in "02":
        assert cli.main(["precompute", "latents", *map(str, mixed), "--num-workers", workers]) == 1
        *bar, error = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in bar)
        assert error == "error: image 3 of column 'image' cannot be read: it has 10x10 pixels, the first one 8x8"


def test_photographs_are_turned_as_their_camera_says(tmp_path):
    """Read one by one, and all at once."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    (tmp_path / "train").mkdir()
    for i, values in enumerate(pixels):
        exif = Picture.Exif()
        exif[ExifTags.Base.Orientation] = 6  # a quarter to the right
        Picture.fromarray(values).save(tmp_path / f"train/{i}.png", exif=exif)
    images = load_images(DataConfig(str(tmp_path), label_column=None), 1)
    expected = torch.from_numpy(np.rot90(pixels, -1, (1, 2)).copy())[:, None].float() / 127.5 - 1
    assert torch.equal(as_tensors(images)[0], expected) and torch.equal(images[2][0], expected[2])


def test_command_line(inputs, tmp_path, capsys):
    arguments = ["precompute", "latents", str(inputs / "train.parquet"), str(tmp_path / "out"), "--vae", str(inputs / "vae")]
    arguments += ["--normalization", "vae", "--no-labels", "--shard-size", "16"]
    assert cli.main(arguments) == 0 and f"latents in {tmp_path / 'out'}\n" in capsys.readouterr().out
    assert cli.main(arguments) == 0 and "were already complete" in capsys.readouterr().out
    assert not Latents(tmp_path / "out").labelled


# ---- reading back -----------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_epoch_and_row(cached):
    tensors = load_file(cached / "latents-00001.safetensors")
    data, row = Latents(cached, seed=3), 6
    draws = torch.stack([data[row + epoch * COUNT][0] for epoch in range(2000)])
    norm = NORMALIZATIONS["scm"]
    mean, std = tensors["mean"][2], tensors["std"][2] * torch.tensor(norm.scale)[:, None, None]
    assert torch.equal(draws[5], Latents(cached, seed=3)[row + 5 * COUNT][0])
    assert not torch.equal(draws[5], Latents(cached, seed=4)[row + 5 * COUNT][0])
    assert ((draws.mean(0) - norm(mean)).abs() < 5 * std / 2000**0.5).all()
    torch.testing.assert_close(draws.std(0), std, rtol=0.08, atol=0)
    other = (Latents(cached, seed=3)[row + 1][0] - norm(tensors["mean"][3])) / (tensors["std"][3] * std / tensors["std"][2])
    assert not torch.allclose(other, (draws[0] - norm(mean)) / std, atol=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_sampler_wherever_it_starts(cached, num_workers):
    data = Latents(cached)
    whole = list(training_loader(data, StepSampler(COUNT, 4, 0, 0, 12), num_workers))
    later = list(training_loader(data, StepSampler(COUNT, 4, 0, 7, 12), num_workers))
    for (a, labels_a), (b, labels_b) in zip(whole[7:], later, strict=True):
        assert torch.equal(a, b) and torch.equal(labels_a, labels_b)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))[:4].tolist()
    assert whole[5][1].tolist() == [i % 3 for i in order]  # the second epoch's first batch
    assert torch.equal(whole[5][0], torch.stack([data[COUNT + i][0] for i in order]))


def test_training_from_latents_end_to_end(cached, tmp_path, capsys):
    values = recipe(cached, tmp_path / "run")
    assert "recipe is valid" in check(values)
    model = run(values)
    assert model.role == "teacher" and (tmp_path / "run" / "grid.png").is_file()
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None]) == 6
    assert all(np.isfinite(loss) for loss in losses if loss is not None)


def test_a_resumed_run_sees_the_same_noise(cached, tmp_path):
    whole = Trainer(recipe(cached, tmp_path / "whole"))
    whole.train()
    first = Trainer(recipe(cached, tmp_path / "parts"))
    step = first.train_step

    def step_then_stop(*args):
        step(*args)
        first.stop_signal = signal.SIGTERM if first.step == 3 else None

    first.train_step = step_then_stop
    with pytest.raises(SystemExit):
        first.train()
    second = Trainer(recipe(cached, tmp_path / "parts", resume_from_checkpoint="latest"))
    second.train()
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[key]), key


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sigma_data": 3.0}, r"sigma_data is 3.0 in the recipe but .* measured on"),
        ({"sample_shape": [4, 8, 8]}, r"have shape \[4, 4, 4\], the recipe wants \[4, 8, 8\]"),
        ({"num_classes": 2}, "label 2 in data source .* is out of range for num_classes 2"),
    ],
)
def test_a_recipe_that_does_not_fit_the_latents(cached, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        training_data(recipe(cached, tmp_path / "run", **changes), None, tmp_path)


def test_stable_targets_want_images(cached, tmp_path):
    with pytest.raises(ValueError, match="is latents or too large"):
        Trainer(recipe(cached, tmp_path / "run", stable_targets=True)).train()


def test_a_damaged_cache_is_one_sentence(inputs, tmp_path):
    folder = tmp_path / "latents"
    make(inputs, folder)
    path = folder / "latents-00002.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"latents-00002.safetensors is not the file that its manifest describes"):
        Latents(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"latents-00002.safetensors is missing"):
        Latents(folder)
    assert make(inputs, folder) and path.read_bytes() == good
    assert len(Latents(folder)) == COUNT
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="is not a scm-distill-latents version 1 manifest"):
        Latents(folder)
    manifest.write_text(text[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        stored_data(parse_recipe({
            "objective": "training", "teacher": "mnist-edm", "output_dir": "x", "sigma_data": 0.5, "sample_shape": [4, 4, 4],
            "max_train_steps": 1, "train_batch_size": 1, "data": str(folder),
        }, "test"))  # fmt: skip
