"""Prompts: what a pipeline gives its network, a cache that survives being killed, and training and sampling from it."""

import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import text_pipelines
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderKL
from PIL import Image as Picture
from safetensors.torch import load_file
from support import TextNetwork

import distill
import teachers
from distill import cli, shards
from distill.data import teacher_samples, training_data
from distill.latents import Decoder, Latents
from distill.precompute import precompute_latents, precompute_prompts, read_captions
from distill.prompts import Prompts, TextEncoders
from distill.recipe import DataConfig, parse_recipe, to_dict
from distill.run import main, run
from distill.sampling import generate
from distill.trainer import Trainer
from distill.visual import to_uint8
from teachers.condition import Embeddings
from teachers.networks import NETWORKS, build

CAPTIONS = ["a red cat", "", "two dogs", "a very long walk in the wood", "sun", "rain", "a hat"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    text_pipelines.stable_diffusion_3().save_pretrained(folder)
    return folder


def make(pipeline: Path, folder: Path, captions=CAPTIONS, **changes) -> bool:
    values = dict(batch_size=2, shard_size=3, max_sequence_length=4)
    return precompute_prompts(pipeline, captions, folder, **{**values, **changes})


@pytest.fixture(scope="module")
def prompts(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "prompts"
    assert make(pipeline, folder)
    return folder


# ---- what each pipeline gives its network -----------------------------------------------------------------------------


def given_to_the_network(pipe, prompt: str, negative: str) -> dict[str, list[torch.Tensor]]:
    """Every row of every tensor by name that the pipeline's network is called with in one guided step."""
    rows = {}

    def record(module, args, kwargs):
        for name, value in {**kwargs, **(kwargs.get("added_cond_kwargs") or {})}.items():
            if torch.is_tensor(value) and value.ndim:
                rows.setdefault(name, []).extend(value)

    network = getattr(pipe, "transformer", None) or pipe.unet
    hook = network.register_forward_pre_hook(record, with_kwargs=True)
    takes = inspect.signature(pipe.__call__).parameters
    options = {name: value for name, value in {"num_frames": 1, "use_resolution_binning": False}.items() if name in takes}
    options |= {"true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale": 3.0}
    options |= {"negative_prompt": negative} if negative else {}
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt=prompt, num_inference_steps=1, output_type="latent", height=64, width=64, **options)
    hook.remove()
    return rows


def is_among(row: torch.Tensor, rows: list[torch.Tensor]) -> bool:
    """Whether some of ``rows`` is this one, or its beginning when the rest is zeros."""
    for other in rows:
        n = len(other)
        if torch.allclose(row[:n].float(), other.float(), atol=1e-5) and not row[n:].any():
            return True
    return False


@pytest.mark.parametrize(
    "build", [*text_pipelines.PIPELINES, text_pipelines.stable_diffusion_3_without_t5], ids=lambda build: build.__name__
)
def test_embeddings_are_what_the_pipeline_gives_its_network(build, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    encoders = TextEncoders(tmp_path)
    some = encoders(["a dog", "a cat sat"])
    for negative in ("blur", "") if encoders.encoding.negative else ("blur",):  # Flux and Qwen have no prompt for none
        rows, null = given_to_the_network(pipe, "a cat sat", negative), encoders.null_prompt(negative)
        assert some.keys() == null.keys() and "encoder_hidden_states" in some
        for name, tensor in some.items():
            if name == "encoder_hidden_states_mask" and name not in rows:
                continue  # Qwen's is left out when nothing is masked
            assert is_among(tensor[1], rows[name]) and is_among(null[name][0], rows[name]), name
            assert name.endswith("mask") or not is_among(tensor[0], rows[name])
            assert len(tensor) == 2 and tensor.shape[1:] == null[name].shape[1:]
        assert not torch.allclose(some["encoder_hidden_states"][1], null["encoder_hidden_states"][0], atol=1e-4)


def test_stable_diffusion_3_without_t5(tmp_path):
    """Embeddings are those of the pipeline's own ``encode_prompt``: zeros, as wide as its network wants, for T5's tokens."""
    pipe = text_pipelines.stable_diffusion_3_without_t5()
    folder = tmp_path / "pipeline"
    pipe.save_pretrained(folder)
    for length in (256, 5):
        encoders = TextEncoders(folder, None if length == 256 else length)
        ours, null = encoders(["a dog", "a cat"]), encoders.null_prompt("blur")
        theirs = pipe.encode_prompt(
            ["a dog", "a cat"], None, None, negative_prompt=["blur"] * 2, max_sequence_length=length, device="cpu"
        )
        for tensors, text, pooled in ((ours, theirs[0], theirs[2]), (null, theirs[1][:1], theirs[3][:1])):
            torch.testing.assert_close(tensors["encoder_hidden_states"], text, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tensors["pooled_projections"], pooled, rtol=1e-4, atol=1e-5)
            assert text.shape[1:] == (12 + length, 16) and not text[:, 12:].any() and text[:, :12].any()
    assert make(folder, tmp_path / "prompts") and len(Prompts(tmp_path / "prompts")) == len(CAPTIONS)
    teacher = teachers.load(folder)
    assert distill.from_pretrained(teacher).sample(2, 1, prompts=tmp_path / "prompts").isfinite().all()

    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(ValueError, match="its text_encoder_2 is left out; prompts are embedded by all text encoders"):
        TextEncoders(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "joint_attention_dim": None}))
    with pytest.raises(ValueError, match="config.json: joint_attention_dim must be a whole number above 0, got None"):
        TextEncoders(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="needs the width of its network's text: no .*config.json"):
        TextEncoders(folder)


def test_rows_of_a_batch_are_padded_alike(tmp_path):
    text_pipelines.qwen_image().save_pretrained(tmp_path)
    encoders = TextEncoders(tmp_path, max_sequence_length=400)
    one, two = encoders(["a"]), encoders(["a", "a much longer one"])
    assert one["encoder_hidden_states"].shape[1:] == two["encoder_hidden_states"].shape[1:] == (400, 8)
    torch.testing.assert_close(one["encoder_hidden_states"][0], two["encoder_hidden_states"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(one["encoder_hidden_states_mask"][0], two["encoder_hidden_states_mask"][0])
    short, long = two["encoder_hidden_states_mask"].sum(1).tolist()
    assert short < long < 400


# ---- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_holds_every_prompt_in_order(pipeline, prompts):
    tensors = [load_file(path) for path in sorted(prompts.glob("prompts-*.safetensors"))]
    assert [len(t["pooled_projections"]) for t in tensors] == [3, 3, 1]
    encoders, cached = TextEncoders(pipeline, 4), Prompts(prompts)
    for name, expected in encoders(CAPTIONS).items():
        whole = torch.cat([t[name] for t in tensors])
        assert whole.dtype == torch.float16
        torch.testing.assert_close(whole.float(), expected, rtol=2e-3, atol=2e-3)
        assert torch.equal(cached[[6, 0, 9]].tensors[name], whole[[6, 0, 2]])  # from the start again after the end
        assert torch.equal(cached[5:8].tensors[name], whole[[5, 6, 0]])
        torch.testing.assert_close(cached.null.tensors[name].float(), encoders.null_prompt()[name], rtol=2e-3, atol=2e-3)
    manifest = json.loads((prompts / "manifest.json").read_text())
    assert manifest["count"] == len(CAPTIONS) == len(cached) and manifest["pipeline"] == "StableDiffusion3Pipeline"
    assert manifest["shapes"] == {"encoder_hidden_states": [16, 16], "pooled_projections": [12]}


def killed_while_writing(pipeline: Path, folder: Path) -> None:
    """Precompute in a process that is killed when half of the second file's bytes are on the disk."""
    whole = shards.save_file

    def half(tensors, path):
        whole(tensors, path)
        if "prompts-00001" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    shards.save_file = half
    make(pipeline, folder)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(pipeline, prompts, tmp_path):
    folder = tmp_path / "prompts"
    child = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(pipeline, folder))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="the prompts in .* are not finished: 2 of 4 files; run the same"):
        Prompts(folder)
    assert make(pipeline, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in prompts.iterdir()}
    assert not make(pipeline, folder)


def test_other_inputs_in_the_same_folder_are_an_error(pipeline, prompts, tmp_path):
    for changes, key in [
        ({"captions": CAPTIONS[::-1]}, "prompts"), ({"negative_prompt": "bad"}, "negative_prompt"),
        ({"dtype": "float32"}, "dtype"), ({"max_sequence_length": 5}, "max_sequence_length"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"holds prompts with another {key} .*give another folder"):
            make(pipeline, prompts, **changes)
    other = text_pipelines.stable_diffusion_3()
    other.text_encoder_3.shared.weight.data += 0.1
    other.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="another text_encoders"):
        make(tmp_path / "pipeline", prompts)
    (tmp_path / "manifest.json").write_text('{"format": "scm-distill-latents"}')
    with pytest.raises(ValueError, match="is not a scm-distill-prompts version 1 manifest"):
        make(pipeline, tmp_path)


def test_the_negative_prompt_is_kept(pipeline, prompts, tmp_path):
    make(pipeline, tmp_path / "prompts", negative_prompt="blur")
    null = Prompts(tmp_path / "prompts").null
    expected = TextEncoders(pipeline, 4)(["blur"])
    for name, tensor in null.tensors.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2e-3, atol=2e-3)
        assert not torch.equal(tensor, Prompts(prompts).null.tensors[name])


def test_captions_of_files(tmp_path):
    (tmp_path / "some.txt").write_bytes("a cat\r\n\nähre \u2028 \n".encode())
    assert read_captions(str(tmp_path / "some.txt")) == ["a cat", "", "ähre \u2028 "]
    Dataset.from_dict({"caption": ["x", "y"], "n": [1, 2]}).to_parquet(tmp_path / "some.parquet")
    assert read_captions(str(tmp_path / "some.parquet"), "caption") == ["x", "y"]
    Dataset.from_dict({"text": ["x", None]}).to_parquet(tmp_path / "gap.parquet")
    for arguments, message in [
        (("some.parquet",), "has no column 'text'; it has: caption, n"), (("some.parquet", "n"), "'n' .* holds no text"),
        (("gap.parquet",), "row 1 of data source .* has no text"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_captions(str(tmp_path / arguments[0]), *arguments[1:])
    with pytest.raises(FileNotFoundError, match="no file .*none.txt with prompts"):
        read_captions(str(tmp_path / "none.txt"))


def test_command_line(pipeline, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    arguments = ["precompute", "prompts", str(pipeline), str(tmp_path / "captions.txt"), str(tmp_path / "out")]
    assert cli.main(arguments) == 0 and f"2 prompts in {tmp_path / 'out'}\n" in capsys.readouterr().out
    assert cli.main(arguments) == 0 and "were already complete" in capsys.readouterr().out
    assert Prompts(tmp_path / "out").null.shapes()["encoder_hidden_states"] == (268, 16)


def test_bad_pipelines_are_one_line(pipeline, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a cat\n")

    def message(folder, *changes) -> str:
        captions, out = str(tmp_path / "captions.txt"), str(tmp_path / "out")
        assert cli.main(["precompute", "prompts", str(folder), captions, out, *changes]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        return error

    assert "has no model_index.json" in message(tmp_path)
    assert "max_sequence_length must be at least 1, got 0" in message(pipeline, "--max-sequence-length", "0")
    assert "must be at least 1" in message(pipeline, "--shard-size", "0")
    bare = tmp_path / "bare"
    text_pipelines.stable_diffusion().save_pretrained(bare)
    assert "StableDiffusionPipeline has a fixed number of tokens" in message(bare, "--max-sequence-length", "9")
    index = json.loads((bare / "model_index.json").read_text())
    weights = bare / "text_encoder/model.safetensors"

    def changed(**values):
        (bare / "model_index.json").write_text(json.dumps({**index, **values}))
        return message(bare)

    assert "is a KandinskyPipeline; prompts can be embedded by: StableDiffusionPipeline" in changed(
        _class_name="KandinskyPipeline"
    )
    assert "its text_encoder is left out" in changed(text_encoder=[None, None])
    assert "its tokenizer is a mine.Tokenizer, not of transformers" in changed(tokenizer=["mine", "Tokenizer"])
    assert "has no NoSuchModel" in changed(text_encoder=["transformers", "NoSuchModel"])
    kept = load_file(weights)
    shards.save_file({k: v for k, v in kept.items() if "layers.1.mlp.fc1" not in k}, weights, {"format": "pt"})
    assert "lacks tensors of a CLIPTextModel" in changed()
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{bare / 'text_encoder'} cannot be read" in changed()
    (tmp_path / "captions.txt").write_text("")
    assert "there are no prompts in" in message(pipeline)
    assert not (tmp_path / "out").exists()


def test_without_transformers_it_says_what_to_install(pipeline, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(ValueError, match=r"need the package transformers: pip install scm-distill\[text\]"):
        TextEncoders(pipeline)


# ---- training and sampling --------------------------------------------------------------------------------------------


def text_teacher(latents: bool | None = None) -> teachers.Teacher:
    """For samples of 1x2x2 and the embeddings of the tiny pipeline."""
    network = TextNetwork(4, tokens=16, width=16, pooled=12)
    return teachers.wrap(network, teachers.RECTIFIED_FLOW, 0.5, (1, 2, 2), latents=latents)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """As many images of 2x2 as there are captions."""
    path = tmp_path_factory.mktemp("images") / "train.parquet"
    return write_images(path, len(CAPTIONS))


def write_images(path: Path, num: int) -> str:
    pixels = (np.random.default_rng(0).normal(0, 0.5, (num, 2, 2)) * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
    Dataset.from_dict({"image": list(pixels)}, features=Features({"image": Image()})).to_parquet(path)
    return str(path)


def recipe(prompts: Path | None, output: Path, source: str, **changes):
    sigma_data = 0.5
    if source != "teacher":
        pixels = np.stack([np.asarray(row["image"]) for row in Dataset.from_parquet(source)]) / 127.5 - 1
        sigma_data = round(float(pixels.std()), 3)
    data = {"source": source, "label_column": None, "num_teacher_samples": 12, "teacher_steps": 2}
    values = dict(
        objective="distillation", teacher="in memory", output_dir=str(output), sigma_data=sigma_data, sample_shape=[1, 2, 2],
        data={**data, "prompts": prompts and str(prompts)}, max_train_steps=2, train_batch_size=4, checkpointing_steps=1,
        logging_steps=1, validation_steps=2, tangent={"warmup_steps": 2}, guidance_scale=3.0,
        evaluation={"num_samples": 50, "teacher_steps": 2, "validation_samples": 0, "features": "pixels"},
    )  # fmt: skip
    return parse_recipe({**values, **changes}, "test")


def weights(trainer):
    return [v.clone() for name in sorted(trainer.modules()) for v in trainer.modules()[name].state_dict().values()]


SEGMENTS = {
    "segments": {"everywhere_share": 0.5, "below": 0.8, "solver_steps": 2}, "target_half_life_images": 30.0,
}  # fmt: skip


@pytest.mark.parametrize("source, changes", [("teacher", {}), ("images", SEGMENTS)], ids=["data-free", "segments"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(prompts, images, tmp_path, source, changes):
    source = images if source == "images" else source
    whole = Trainer(recipe(prompts, tmp_path / "whole", source, **changes), text_teacher())
    start = weights(whole)
    whole.train()
    first = Trainer(recipe(prompts, tmp_path / "parts", source, **changes), text_teacher())
    step = first.train_step

    def step_then_stop(*args):
        step(*args)
        first.stop_signal = signal.SIGTERM if first.step == 1 else None

    first.train_step = step_then_stop
    with pytest.raises(SystemExit):
        first.train()
    second = Trainer(recipe(prompts, tmp_path / "parts", source, resume_from_checkpoint="latest", **changes), text_teacher())
    second.train()
    pairs = list(zip(weights(second), weights(whole), start, strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(b, c) for _, b, c in pairs)


def test_every_image_has_its_own_prompt(prompts, images, tmp_path):
    values = recipe(prompts, tmp_path, images)
    cached = Prompts(prompts)
    data = training_data(values, None, tmp_path, cached)
    pixels = [np.asarray(row["image"]) for row in Dataset.from_parquet(images)]
    trainer = Trainer(values, text_teacher())
    batches = iter(distill.trainer.training_loader(data, trainer.sampler(len(data)), num_workers=0))
    x0, text = next(batches)
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0))[:4].tolist()
    assert torch.equal(x0, torch.stack([torch.tensor(pixels[i])[None].float() / 127.5 - 1 for i in order]))
    assert isinstance(text, Embeddings)
    assert all(torch.equal(tensor, cached[order].tensors[name]) for name, tensor in text.tensors.items())


def test_latents_of_an_epoch_keep_their_prompts(prompts, images, tmp_path):
    torch.manual_seed(0)
    tiny_vae().save_pretrained(tmp_path / "vae")
    latents = tmp_path / "latents"
    precompute_latents(DataConfig(images, label_column=None), latents, tmp_path / "vae", "scm", shard_size=3)
    spread = torch.stack([Latents(latents)[i][0] for i in range(len(CAPTIONS))]).double().std().item()
    changes = {"sample_shape": [4, 1, 1], "sigma_data": round(spread, 3)}
    values = recipe(prompts, tmp_path, images, data={"source": str(latents), "prompts": str(prompts)}, **changes)
    network = TextNetwork(4, tokens=16, width=16, pooled=12)
    teacher = teachers.wrap(network, teachers.RECTIFIED_FLOW, values.sigma_data, (4, 1, 1))
    assert teacher.latents
    trainer, cached = Trainer(values, teacher), Prompts(prompts)
    data = training_data(values, None, tmp_path, cached)
    trainer.step = 1  # the second batch is the first of another epoch
    x0, text = next(iter(distill.trainer.training_loader(data, trainer.sampler(len(data)), num_workers=0)))
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(1))[:4].tolist()
    assert torch.equal(x0, torch.stack([Latents(latents)[len(CAPTIONS) + i][0] for i in order]))
    assert torch.equal(text.tensors["pooled_projections"], cached[order].tensors["pooled_projections"])
    trainer.step = 0
    trainer.train()
    assert trainer.step == 2


def test_a_teacher_draws_samples_for_the_prompts(prompts, images, tmp_path):
    values, cached = recipe(prompts, tmp_path, "teacher"), Prompts(prompts)
    teacher = text_teacher().twin(null_prompt=cached.null).guided_by(3.0)
    samples, _ = teacher_samples(teacher, values, tmp_path / "cache", cached)
    rows = [i % len(CAPTIONS) for i in range(12)]
    expected, _ = next(generate(teacher, 12, num_inference_steps=2, role="teacher", labels=cached[rows]))
    torch.testing.assert_close(samples, expected, rtol=0, atol=1.01 / 255)
    data = training_data(values, teacher, tmp_path / "cache", cached)
    assert torch.equal(data[9][1]["pooled_projections"], cached[[2]].tensors["pooled_projections"][0])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_prompts_are_other_samples(pipeline, prompts, tmp_path):
    make(pipeline, tmp_path / "other", CAPTIONS[::-1])
    values, teacher = recipe(prompts, tmp_path, "teacher"), text_teacher()
    a, b = (teacher_samples(teacher, values, tmp_path / "cache", Prompts(p))[0] for p in (prompts, tmp_path / "other"))
    assert not torch.equal(a, b) and len(list((tmp_path / "cache").iterdir())) == 2


def test_samples_of_latents_are_not_clamped(prompts, tmp_path):
    values, cached = recipe(prompts, tmp_path, "teacher"), Prompts(prompts)
    wide = text_teacher(latents=True)
    wide.native.mix.bias.data -= 5
    samples, _ = teacher_samples(wide, values, tmp_path / "cache", cached)
    expected = torch.cat([x for x, _ in generate(wide, 12, num_inference_steps=2, role="teacher", labels=cached)])
    assert expected.abs().max() > 3
    torch.testing.assert_close(samples, expected, rtol=1e-3, atol=1e-3)
    images, _ = next(generate(wide.twin(latents=False), 12, num_inference_steps=2, role="teacher", labels=cached))
    assert torch.equal(images, expected.clamp(-1, 1))


def test_captions_to_a_student_to_samples(pipeline, tmp_path, monkeypatch, capsys):
    """The whole way by commands, data-free, and then the student's samples for other prompts than those it learned from."""
    monkeypatch.setitem(NETWORKS, "TextNetwork", TextNetwork)
    native = build("TextNetwork", dict(size=4, tokens=16, width=16, pooled=12))
    teacher = teachers.wrap(native, teachers.RECTIFIED_FLOW, 0.5, (1, 2, 2))
    teachers.save_pretrained(teacher, tmp_path / "teacher", "teacher")
    (tmp_path / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    arguments = ["precompute", "prompts", str(pipeline), str(tmp_path / "captions.txt"), str(tmp_path / "prompts")]
    assert cli.main([*arguments, "--max-sequence-length", "4", "--shard-size", "2"]) == 0
    values = recipe(tmp_path / "prompts", tmp_path / "run", "teacher", teacher=str(tmp_path / "teacher"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(values)))
    assert main([str(tmp_path / "recipe.yaml"), "--check"]) == 0 and "recipe is valid" in capsys.readouterr().out
    assert main([str(tmp_path / "recipe.yaml"), "--check", "data.prompts=null"]) == 1
    assert "name a folder of distill precompute prompts as data.prompts" in capsys.readouterr().err
    assert main([str(tmp_path / "recipe.yaml")]) == 0 and (tmp_path / "run/grid.png").is_file()
    make(pipeline, tmp_path / "new", ["blue", "green", "grey"])
    command = ["sample", str(tmp_path / "run"), "--num", "5", "--out", str(tmp_path / "samples.npz")]
    assert cli.main([*command, "--prompts", str(tmp_path / "new")]) == 0
    model = distill.from_pretrained(tmp_path / "run")
    assert model.role == "student" and model.config["training"]["prompts"] == str(tmp_path / "prompts")
    labels = Prompts(tmp_path / "new")[[0, 1, 2, 0, 1]]
    samples = model.sample(5, 2, labels, batch_size=2)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["images"], to_uint8(samples)) and "labels" not in arrays
    assert not torch.equal(samples, model.sample(5, 2, prompts=tmp_path / "prompts"))
    assert cli.main(command) == 1 and "needs the embeddings of a prompt for each sample" in capsys.readouterr().err
    with pytest.raises(ValueError, match="either labels or prompts"):
        model.sample(5, 2, labels, prompts=tmp_path / "new")
    scores = model.evaluate(50, 1, data=write_images(tmp_path / "real.parquet", 80), prompts=tmp_path / "new")
    assert scores["num_samples"] == 50 and "asked class" not in scores


def test_training_with_data_is_scored(prompts, images, tmp_path):
    evaluation = dict.fromkeys(("num_samples", "validation_samples", "search_samples"), 50)
    evaluation |= {"teacher_steps": 2, "num_inference_steps": [1, 2], "data": write_images(tmp_path / "real.parquet", 80)}
    model = run(recipe(prompts, tmp_path / "run", images, evaluation=evaluation), text_teacher())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("frechet_distance/2" in line for line in lines) and any("endpoint_error/0.3" in line for line in lines)
    assert model.config["metrics"].keys() == {"teacher, 3 NFE", "this run, 1 step", "this run, 2 steps"}


def test_a_teacher_is_guided_away_from_the_null_prompt_of_the_folder(pipeline, prompts, tmp_path):
    make(pipeline, tmp_path / "other", negative_prompt="blur")
    model = distill.from_pretrained(text_teacher())
    guided = [model.sample(3, 2, prompts=p, guidance_scale=4.0) for p in (prompts, tmp_path / "other")]
    assert not torch.equal(*guided) and model.network.null_prompt is None
    cached = Prompts(prompts)
    expected = distill.from_pretrained(text_teacher().twin(null_prompt=cached.null))
    assert torch.equal(guided[0], expected.sample(3, 2, cached[:3], guidance_scale=4.0))


def test_retrofit_and_diffusion_drop_prompts(prompts, images, tmp_path):
    changes = {"objective": "diffusion", "guidance_scale": 1.0, "label_dropout": 0.5}
    trainer = Trainer(recipe(prompts, tmp_path / "run", images, **changes), text_teacher())
    seen = []
    forward = trainer.network.native.forward
    trainer.network.native.forward = lambda x, t, text: (seen.append(text["pooled_projections"]), forward(x, t, text))[1]
    trainer.train()
    null = Prompts(prompts).null.tensors["pooled_projections"][0].float()
    dropped = [bool(torch.equal(row, null)) for batch in seen if len(batch) == 4 for row in batch]
    assert any(dropped) and not all(dropped)


# ---- what does not fit ------------------------------------------------------------------------------------------------


def test_prompts_that_do_not_fit(pipeline, prompts, images, tmp_path, make_teacher):
    def refused(match, folder, teacher=None, kind=ValueError, **changes):
        with pytest.raises(kind, match=match):
            values = recipe(folder, tmp_path / "run", changes.pop("source", images), **changes)
            Trainer(values, teacher or text_teacher()).train()

    make(pipeline, tmp_path / "few", CAPTIONS[:5])
    refused(r"few' holds 5 prompts, data source .* 7 images; there must be one prompt for each", tmp_path / "few")
    refused("conditioned on text: name a folder of distill precompute prompts as data.prompts", None)
    refused("conditioned on text: name a folder", None, source="teacher")
    refused("no prompts in .*nowhere: it has no manifest.json", tmp_path / "nowhere", kind=FileNotFoundError)
    text_pipelines.flux().save_pretrained(tmp_path / "flux")
    make(tmp_path / "flux", tmp_path / "narrow")
    refused(r"holds text embeddings of shapes .*\(4, 10\).*'in memory' takes .*\(16, 16\)", tmp_path / "narrow")
    classes = make_teacher("SiT")
    refused("the network 'in memory' takes no text embeddings; remove data.prompts", prompts, classes,
            sample_shape=[1, 8, 8], num_classes=3, sigma_data=0.5)  # fmt: skip
    unfinished = tmp_path / "few/manifest.json"
    manifest = json.loads(unfinished.read_text())
    del manifest["shards"]["prompts-00001.safetensors"]
    unfinished.write_text(json.dumps(manifest))
    refused("few are not finished: 2 of 3 files", tmp_path / "few")
    with pytest.raises(ValueError, match="stable_targets average over classes"):
        recipe(prompts, tmp_path, images, objective="diffusion", guidance_scale=1.0, stable_targets=True)
    with pytest.raises(ValueError, match="takes no text embeddings"):
        distill.from_pretrained("mnist-edm").sample(2, 2, prompts=prompts)


# ---- decoding ---------------------------------------------------------------------------------------------------------


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    ).eval()  # fmt: skip


@pytest.fixture
def latent_model(make_teacher, tmp_path):
    """A class-conditional student of latents on disk, and an autoencoder."""
    teacher = make_teacher("SiT", in_channels=4, input_size=4)
    model = teacher.twin(sample_shape=(4, 4, 4), latents=True)
    teachers.save_pretrained(model, tmp_path / "model", "student")
    torch.manual_seed(0)
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path


def test_latents_are_decoded_by_a_vae(latent_model):
    model = distill.from_pretrained(latent_model / "model")
    latents = model.sample(3, 1)
    images = model.sample(3, 1, vae=latent_model / "vae", batch_size=2)
    assert latents.abs().max() > 1 and images.shape == (3, 1, 8, 8)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(latent_model / "vae").decode(latents / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    out = latent_model / "samples.npz"
    command = ["sample", str(latent_model / "model"), "--num", "3", "--steps", "1", "--out"]
    assert cli.main([*command, str(out)]) == 0
    with np.load(out) as arrays:
        assert arrays["latents"].dtype == np.float32 and np.array_equal(arrays["latents"], latents.numpy())
        assert arrays["labels"].tolist() == [0, 1, 2] and "images" not in arrays
    assert cli.main([*command, str(out), "--vae", str(latent_model / "vae"), "--normalization", "vae"]) == 0
    with np.load(out) as arrays:
        assert arrays["images"].shape == (3, 8, 8, 1)
    assert cli.main([*command, str(latent_model / "grid.png"), "--vae", str(latent_model / "vae")]) == 0
    assert Picture.open(latent_model / "grid.png").size == (3 * 10 * 2, 10 * 2)


def test_what_cannot_be_decoded_or_scored(latent_model):
    model = distill.from_pretrained(latent_model / "model")
    with pytest.raises(ValueError, match="samples of this model are latents; scores are of images"):
        model.evaluate(50, 1)
    real = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": list(real), "label": [0] * 80}, features=features).to_parquet(latent_model / "real.parquet")
    out = latent_model / "scores.json"
    command = ["evaluate", str(latent_model / "model"), "--num", "50", "--steps", "1", "--out", str(out), "--data"]
    assert cli.main([*command, str(latent_model / "real.parquet"), "--vae", str(latent_model / "vae")]) == 0
    assert json.loads(out.read_text())["num_samples"] == 50
    with pytest.raises(ValueError, match="no normalization 'sd3'"):
        model.sample(2, 1, vae=latent_model / "vae", normalization="sd3")
    with pytest.raises(ValueError, match="the samples of this model are images already"):
        distill.from_pretrained("mnist-edm-scm").sample(2, 1, vae=latent_model / "vae")
    with pytest.raises(ValueError, match="is an autoencoder of 4 latent channels, but the model's samples have 16"):
        Decoder(latent_model / "vae", "vae", (16, 4, 4))


def test_whether_samples_are_latents_is_kept(make_teacher, tmp_path):
    model = make_teacher("SiT").twin(latents=True)
    teachers.save_pretrained(model, tmp_path / "model", "teacher")
    assert teachers.load(tmp_path / "model").latents and model.student().latents
    assert not make_teacher("SiT").latents and "latents" not in make_teacher("SiT").metadata()
    distill.from_pretrained(tmp_path / "model").export(tmp_path / "pipeline")
    assert teachers.load(tmp_path / "pipeline").latents
