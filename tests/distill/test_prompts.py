"""Prompts: what a pipeline gives its network, a cache that survives being killed, and training and sampling from it."""

import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import text_pipelines
import torch
from datasets import Dataset
from safetensors.torch import load_file

from distill import cli, shards
from distill.precompute import precompute_prompts, read_captions
from distill.prompts import Prompts, TextEncoders

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


def given_to_the_network(pipe, prompt: str) -> dict[str, list[torch.Tensor]]:
    """Every row of every tensor by name that the pipeline's network is called with, guided, in one step."""
    rows = {}

    def record(module, args, kwargs):
        for name, value in {**kwargs, **(kwargs.get("added_cond_kwargs") or {})}.items():
            if torch.is_tensor(value) and value.ndim:
                rows.setdefault(name, []).extend(value)

    network = getattr(pipe, "transformer", None) or pipe.unet
    hook = network.register_forward_pre_hook(record, with_kwargs=True)
    takes = inspect.signature(pipe.__call__).parameters
    options = {name: value for name, value in {"num_frames": 1, "use_resolution_binning": False}.items() if name in takes}
    options |= {"true_cfg_scale": 3.0, "negative_prompt": " "} if "true_cfg_scale" in takes else {"guidance_scale": 3.0}
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


@pytest.mark.parametrize("build", text_pipelines.PIPELINES, ids=lambda build: build.__name__)
def test_embeddings_are_what_the_pipeline_gives_its_network(build, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    rows = given_to_the_network(pipe, "a cat sat")
    encoders = TextEncoders(tmp_path)
    negative = " " if encoders.encoding.negative is None else ""
    some, null = encoders(["a dog", "a cat sat"]), encoders.null_prompt(negative)
    assert some.keys() == null.keys() and "encoder_hidden_states" in some
    for name, tensor in some.items():
        if name == "encoder_hidden_states_mask" and name not in rows:
            continue  # Qwen's is left out when nothing is masked
        assert is_among(tensor[1], rows[name]) and is_among(null[name][0], rows[name]), name
        assert name.endswith("mask") or not is_among(tensor[0], rows[name])
    assert not torch.allclose(some["encoder_hidden_states"][1], null["encoder_hidden_states"][0], atol=1e-4)
    assert all(len(tensor) == 2 and tensor.shape[1:] == null[name].shape[1:] for name, tensor in some.items())


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
    with pytest.raises(ValueError, match="the prompts in .* are not finished: 2 of 4 files; run the same distill precompute"):
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
