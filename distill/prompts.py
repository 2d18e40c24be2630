"""Prompts as embeddings: made once by the text encoders of a diffusers pipeline, and read back for training and sampling.

``distill precompute prompts`` (:mod:`distill.precompute`) keeps what the pipeline's own ``encode_prompt`` returns, under the
names by which its network takes it, so that no text encoder is in memory while a student trains.
"""

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from distill.device import default_device
from distill.shards import Kind, Shards, hash_of, model_hash, read_manifest, verify
from teachers.condition import Embeddings, is_mask
from teachers.diffusers import INDEX, read_json
from teachers.pretrained import is_size, read_safetensors

PROMPTS = Kind("prompts", frozenset({"shapes", "negative_prompt"}))
NULL = "null.safetensors"  # the null prompt, one row


# ---- what each pipeline gives its network -----------------------------------------------------------------------------


class Encoding(NamedTuple):
    """Names by which a network takes embeddings, and where they are in what ``encode_prompt`` returns."""

    prompt: dict[str, int]
    negative: dict[str, int] | None  # of the negative prompt; None: it is encoded as any other prompt


TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
SD3 = "StableDiffusion3Pipeline"
T5_OF_SD3 = ("text_encoder_3", "tokenizer_3")  # without the first, the pipeline has zeros in its place
MASKED = Encoding({TEXT: 0, MASK: 1}, {TEXT: 2, MASK: 3})
# Flux makes its txt_ids in the network; AuraFlow has multiplied its mask in.
ENCODINGS = {
    "StableDiffusionPipeline": Encoding({TEXT: 0}, {TEXT: 1}),
    "StableDiffusionXLPipeline": Encoding({TEXT: 0, "text_embeds": 2}, {TEXT: 1, "text_embeds": 3}),
    SD3: Encoding({TEXT: 0, POOLED: 2}, {TEXT: 1, POOLED: 3}),
    "FluxPipeline": Encoding({TEXT: 0, POOLED: 1}, None),
    "PixArtAlphaPipeline": MASKED,
    "PixArtSigmaPipeline": MASKED,
    "SanaPipeline": MASKED,
    "Lumina2Pipeline": MASKED,
    "AuraFlowPipeline": Encoding({TEXT: 0}, {TEXT: 2}),
    "QwenImagePipeline": Encoding({TEXT: 0, f"{TEXT}_mask": 1}, None),
    "WanPipeline": Encoding({TEXT: 0}, {TEXT: 1}),
}


class TextEncoders:
    """The text encoders and tokenizers of a pipeline, in fp32, on a GPU if there is one; called with prompts.

    Prompts are encoded as the pipeline does when it is called with its defaults: with its instructions in front (Sana,
    Lumina 2), and with its number of tokens unless ``max_sequence_length`` says otherwise. Stable Diffusion 3
    may lack T5, whose tokens are then zeros.

    Raises:
        FileNotFoundError, ValueError: no such folder, a pipeline that is not supported, one without all its text encoders,
            damaged files, or a number of tokens that cannot be had; one sentence each.
    """

    def __init__(self, folder: str | Path, max_sequence_length: int | None = None):
        self.pipeline = load_text_pipeline(Path(folder))
        self.name = type(self.pipeline).__name__
        self.encoding = ENCODINGS[self.name]
        self.device = default_device()
        self.pipeline.to(self.device)
        self.takes = inspect.signature(self.pipeline.encode_prompt).parameters
        self.defaults = {name: p.default for name, p in inspect.signature(self.pipeline.__call__).parameters.items()}
        self.arguments = {name: self.defaults[name] for name in self.takes.keys() & self.defaults.keys() - {"prompt"}}
        if max_sequence_length is not None:
            self.choose_length(max_sequence_length)
        self.max_sequence_length: int | None = self.arguments.get("max_sequence_length")

    def choose_length(self, length: int) -> None:
        if "max_sequence_length" not in self.arguments:
            raise ValueError(f"a {self.name} has a fixed number of tokens; leave max_sequence_length out")
        if length < 1:
            raise ValueError(f"max_sequence_length must be at least 1, got {length}")
        self.arguments["max_sequence_length"] = length

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings by the names that the network takes, one row a prompt."""
        return self.encode(self.encoding.prompt, prompt=prompts, do_classifier_free_guidance=False)

    def null_prompt(self, negative: str = "") -> dict[str, Tensor]:
        """One row: the negative prompt as the pipeline guides away from it; an empty one is what it takes for none."""
        if self.encoding.negative is None:
            return self([negative])
        given = [negative] if negative else self.defaults["negative_prompt"]
        return self.encode(self.encoding.negative, prompt=[""], negative_prompt=given, do_classifier_free_guidance=True)

    @torch.no_grad()
    def encode(self, places: dict[str, int], **arguments) -> dict[str, Tensor]:
        given = {**self.arguments, **arguments, "device": self.device}
        with quiet():  # it warns of every batch with a prompt that is cut off
            results = self.pipeline.encode_prompt(**{name: x for name, x in given.items() if name in self.takes})
        tensors = {name: results[place] for name, place in places.items()}
        text = tensors[TEXT]
        for name in filter(is_mask, places):
            if tensors[name] is None:  # of Qwen: nothing is masked
                tensors[name] = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        return {name: self.padded(name, tensor) for name, tensor in tensors.items()}

    def padded(self, name: str, tensor: Tensor) -> Tensor:
        """With zeros up to ``max_sequence_length`` tokens; Qwen's have as many as the longest prompt of a batch."""
        short = (self.max_sequence_length or 0) - tensor.shape[1]
        if short <= 0 or not (tensor.ndim == 3 or is_mask(name)):
            return tensor
        return nnf.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, short))

    def digest(self) -> str:
        """Of the encoders' weights and the tokenizers' words."""
        components = sorted(self.pipeline.components.items())
        parts = {key: part for key, part in components if is_text_component(key) and part is not None}
        weights = [model_hash(part, {}) for part in parts.values() if isinstance(part, nn.Module)]
        words = [sorted(part.get_vocab().items()) for part in parts.values() if not isinstance(part, nn.Module)]
        return hash_of([weights, words])


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of diffusers."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def is_text_component(name: str) -> bool:
    return name.startswith(("text_encoder", "tokenizer"))


def load_text_pipeline(folder: Path):
    """A diffusers pipeline with its text encoders and tokenizers alone; see :class:`TextEncoders` for what is raised."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("text encoders need the package transformers: pip install scm-distill[text]")
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"no pipeline in {folder}: it has no {INDEX}")
    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    if name not in ENCODINGS:
        raise ValueError(f"{folder} is a {name}; prompts can be embedded by: {', '.join(ENCODINGS)}")
    parts = {key: value for key, value in index.items() if isinstance(value, list)}
    without = T5_OF_SD3 if name == SD3 and parts.get(T5_OF_SD3[0]) == [None, None] else ()
    for key, value in parts.items():
        if is_text_component(key) and key not in without and value[0] != "transformers":
            got = "left out" if value[0] is None else f"a {'.'.join(map(str, value))}, not of transformers"
            raise ValueError(f"{folder}: its {key} is {got}; prompts are embedded by all text encoders of a {name}")
    left_out = {key: None for key in parts if key in without or not is_text_component(key) and key != "scheduler"}
    if "requires_safety_checker" in index:
        left_out["requires_safety_checker"] = False
    needed = [key for key in parts if key.startswith("text_encoder") and key not in without]
    encoders = {key: load_text_encoder(folder, key, parts[key][1]) for key in needed}
    import diffusers  # slow, and only needed here

    pipeline = from_folder(getattr(diffusers, name), folder, **left_out, **encoders)
    if without:  # of its network, which is left out, the pipeline reads only this
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=text_width(folder)))
    return pipeline


def text_width(folder: Path) -> int:
    """Of what Stable Diffusion 3's network takes, and so of the zeros in place of T5."""
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"a {SD3} without its text_encoder_3 needs the width of its network's text: no {config}")
    width = read_json(config).get("joint_attention_dim")
    if not is_size(width):
        raise ValueError(f"{config}: joint_attention_dim must be a whole number above 0, got {str(width)[:80]}")
    return width


def load_text_encoder(folder: Path, key: str, name: str) -> nn.Module:
    """One text encoder in fp32, with all of its weights."""
    import transformers  # slow, and only needed here

    if not hasattr(transformers, name):
        raise ValueError(f"{folder}: transformers {transformers.__version__} has no {name}")
    model, info = from_folder(getattr(transformers, name), folder / key, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder / key} lacks tensors of a {name}: {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.eval()


def from_folder(cls, folder: Path, **options):
    try:
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
    except Exception as error:  # of many kinds, for missing and damaged files
        raise ValueError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}") from error


# ---- reading back -----------------------------------------------------------------------------------------------------


class Prompts:
    """A finished folder of prompts. Rows are read from the disk as they are asked for, and start again after the last.

    ``prompts[i:j]`` and ``prompts[[i, j, ...]]`` are the :class:`teachers.condition.Embeddings` of these rows.

    Raises:
        FileNotFoundError, ValueError: see :class:`distill.shards.Shards`.
    """

    def __init__(self, folder: str | Path):
        self.shards = Shards(folder, PROMPTS, extra=(NULL,))
        self.null = null_prompt(folder)
        self.shards.check_rows({name: tuple(tensor.shape[1:]) for name, tensor in self.null.tensors.items()})

    def __len__(self) -> int:
        return self.shards.count

    def __getitem__(self, rows: slice | list[int]) -> Embeddings:
        numbers = range(rows.start or 0, rows.stop) if isinstance(rows, slice) else rows
        found = [self.row(i) for i in numbers]
        return Embeddings({name: torch.stack([row[name] for row in found]) for name in self.null.tensors})

    def row(self, index: int) -> dict[str, Tensor]:
        """One prompt's tensors by name."""
        shard, place = self.shards.place(index % len(self))
        return {name: shard.get_slice(name)[place] for name in self.null.tensors}

    def digest(self) -> str:
        """A hash of all of them, and of the null prompt."""
        return hash_of(self.shards.manifest["shards"])


def null_prompt(folder: str | Path) -> Embeddings:
    """The null prompt of a folder of prompts, one row, without a look at the others.

    Raises:
        FileNotFoundError, ValueError: as :class:`Prompts`.
    """
    folder = Path(folder)
    verify(folder, PROMPTS, [NULL], read_manifest(folder, PROMPTS)["shards"])
    return Embeddings(read_safetensors(folder / NULL))
