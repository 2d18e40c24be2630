"""Writing a student as a diffusers pipeline folder that needs nothing of this package to be loaded.

Any registered network, of ours or a user's, goes into a folder that carries its code (format ``scm``,
:mod:`distill.carried_code`); some families also fit a pipeline that diffusers has itself (format ``diffusers``,
:mod:`distill.standard_pipeline` and :mod:`distill.text_pipeline`). The adapters of a student trained with ``lora`` go
into the teacher's pipeline (format ``lora``).
"""

import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import diffusers
from diffusers import SCMScheduler
from safetensors import SafetensorError, safe_open

from distill.carried_code import CODE_NAME, carried_code
from distill.evaluation.table import format_table
from distill.latents import Decoder, constants_of
from distill.lora import LORA_WEIGHTS, MARK, adapters_file
from distill.pipeline import SCMNetwork
from distill.standard_pipeline import standard_pipeline
from distill.text_pipeline import (
    adapter_example,
    components,
    is_text_network,
    text_example,
    write_text_pipeline,
)
from teachers import Teacher
from teachers.diffusers import INDEX, read_json
from teachers.networks import is_ours
from teachers.pretrained import PIPELINE_WEIGHTS, check_target, model_config

CODE = f"{CODE_NAME}.py"
FORMATS = ("scm", "diffusers", "lora")
CONTENTS = {"README.md", INDEX, "network", "scheduler", "vae", CODE}
LORA_CONTENTS = {"README.md", LORA_WEIGHTS}


def export(
    model: Teacher, folder: str | Path, config: dict | None = None, format: str = "scm", vae: str | Path | None = None,
    pipeline: str | Path | None = None, normalization: str | None = None,
) -> Path:  # fmt: skip
    """Write ``model`` as a pipeline folder: fp32 safetensors, model card and code. Nothing is left half-written.

    Args:
        model: a student. A teacher can be exported too, with a warning: in a few steps it gives blurred means.
        folder: created, or replaced if it is an exported pipeline already.
        config: its ``config.json`` values; ``metrics`` (rows of a table) go into the model card.
        format: ``scm``; ``diffusers`` for a pipeline of diffusers' own classes, without code: ``DiTPipeline``,
            ``DDPMPipeline``, ``ConsistencyModelPipeline``, or the teacher's for a student of text; ``lora`` for the adapters
            of a student that was trained with them and loaded from its run. The card has the timesteps to use.
        vae: a folder of the autoencoder of the samples, if these are latents. Format ``scm`` without it gives
            latents; a ``DiTPipeline`` by default has that of the teacher's pipeline.
        pipeline: of a student of text in format ``diffusers``: the folder of the teacher's pipeline, whose text encoders and
            autoencoder it keeps; by default where the teacher was loaded from.
        normalization: of the latents in format ``scm``, as in ``distill precompute latents``: edm2, scm, sd, or vae, which
            is the default and what the autoencoder's config says.

    Load format ``scm`` with ``distill.pipeline.SCMPipeline.from_pretrained(folder)``, or where this package is not
    installed with ``diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``; format ``diffusers``
    with ``diffusers.DiffusionPipeline.from_pretrained(folder)``.

    Raises:
        ValueError: a network that is not registered or needs what the folder cannot carry, or for format ``diffusers`` of
            no pipeline of theirs; a VAE or pipeline that is missing or does not fit; no adapters; a folder that holds
            something else.
        OSError: it could not be written; an earlier export is as it was.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    target = Path(folder).resolve()
    check_replaceable(target)
    facts = {**(config or {}), **model_config(model, (config or {}).get("role", "student"))}
    if facts["role"] == "teacher":
        name = model.source or "this model"
        print(f"warning: {name} is a teacher, not distilled: in a few steps it gives blurred means", file=sys.stderr)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    text = is_text_network(model)
    if vae is not None and text:
        raise ValueError("a student of text keeps the autoencoder of its teacher's pipeline; leave the VAE (--vae) out")
    if vae is not None and (format == "lora" or not model.latents):
        raise ValueError("a VAE (--vae) belongs to a student of latents, in formats scm and diffusers; leave it out")
    if normalization is not None and (vae is None or format != "scm"):
        raise ValueError("a normalization (--normalization) belongs to format scm with a VAE (--vae); leave it out")
    if pipeline is not None and not (format == "diffusers" and text):
        raise ValueError("a pipeline (--pipeline) belongs to a student of text in format diffusers only; leave it out")
    if text and format == "scm":
        raise ValueError(TEXT_OBSTACLE)
    try:
        if format == "lora":
            write_lora(model, temporary, facts)
        elif format == "diffusers":
            write_standard_pipeline(model, temporary, facts, vae, pipeline)
        else:
            write_pipeline(model, temporary, facts, vae, normalization or "vae")
        replace_folder(target, temporary)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(temporary)):
            raise
        raise OSError(f"{folder} could not be written: {error.strerror}") from error  # without the temporary name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(folder)


def check_replaceable(folder: Path) -> None:
    """Raise ``ValueError`` unless ``folder`` is absent, empty, or an exported pipeline and nothing else."""
    expected = CONTENTS if (folder / CODE).exists() else marked_contents(folder)
    check_target(folder, expected, "an exported pipeline")


def marked_contents(folder: Path) -> set[str]:
    """What belongs into a folder that formats ``diffusers`` and ``lora`` wrote; nothing if they did not write this one."""
    try:
        index = read_json(folder / INDEX)
        if MARK.items() <= index.items():  # diffusers skips keys like this one
            return {"README.md", INDEX, *components(index)}
    except (OSError, ValueError):
        pass
    try:
        with safe_open(folder / LORA_WEIGHTS, "pt") as file:
            return LORA_CONTENTS if MARK.items() <= (file.metadata() or {}).items() else set()
    except (OSError, SafetensorError):
        return set()


def replace_folder(folder: Path, new: Path) -> None:
    """Rename ``new`` to ``folder``, whose old contents are removed only afterwards."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_pipeline(model: Teacher, folder: Path, facts: dict, vae: str | Path | None, norm_name: str) -> None:
    code = carried_code(model.native)
    decoder = None if vae is None else Decoder(vae, norm_name, model.sample_shape)
    keys = inspect.signature(SCMNetwork).parameters
    network = SCMNetwork(**{key: value for key, value in facts.items() if key in keys})
    network.model.native.load_state_dict(model.native.state_dict())
    network.save_pretrained(folder / "network")
    (folder / "network" / PIPELINE_WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    SCMScheduler(sigma_data=model.sigma_data).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": [CODE_NAME, "SCMPipeline"],
        "_diffusers_version": diffusers.__version__,
        "network": [CODE_NAME, "SCMNetwork"],
        "scheduler": ["diffusers", "SCMScheduler"],
    }
    if decoder is not None:
        decoder.vae.save_pretrained(folder / "vae")
        (folder / "vae" / PIPELINE_WEIGHTS).chmod(0o644)
        index["vae"] = ["diffusers", type(decoder.vae).__name__]
        index["normalization"] = constants_of(decoder.normalization, norm_name)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    form = "latent" if model.latents and decoder is None else None
    rights = code_license(model) + (VAE_LICENSE if decoder is not None else "")
    (folder / "README.md").write_text(model_card(facts, scm_usage(facts, form), rights), encoding="utf-8")
    for place in (folder, folder / "network"):  # diffusers looks for a component's code in the component's folder
        (place / CODE).write_text(code, encoding="utf-8")


def write_standard_pipeline(
    model: Teacher, folder: Path, facts: dict, vae: str | Path | None, pipeline: str | Path | None
) -> None:
    if is_text_network(model):
        name, index, example = write_text_pipeline(model, folder, facts, pipeline), {}, text_example(model, facts)
        copies = TEXT_LICENSE
    else:
        pipe, index, example = standard_pipeline(model, facts, vae)
        pipe.save_pretrained(folder)
        name, copies = type(pipe).__name__, VAE_LICENSE if hasattr(pipe, "vae") else ""
    for weights in folder.rglob("*.safetensors"):
        if weights.stat().st_nlink == 1:  # not a file of the teacher's
            weights.chmod(0o644)
    (folder / INDEX).write_text(json.dumps({**read_json(folder / INDEX), **index, **MARK}, indent=2) + "\n")
    card = model_card(facts, standard_usage(name, example), CODELESS_LICENSE + copies)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_lora(model: Teacher, folder: Path, facts: dict) -> None:
    file, example = adapters_file(model), adapter_example(model, facts)
    folder.mkdir(parents=True)
    shutil.copy(file, folder / LORA_WEIGHTS)
    card = model_card(facts, lora_usage(facts, example), CODELESS_LICENSE)
    (folder / "README.md").write_text(card, encoding="utf-8")


TEXT_OBSTACLE = (
    "a student of text needs the text encoders of its teacher's pipeline and leaves as that (format diffusers): distill "
    "export SOURCE OUT_DIR --format diffusers"
)
CODE_LICENSE = "The licence above is that of the weights; the code in this folder is Apache-2.0"
CODELESS_LICENSE = "The licence above is that of the weights; there is no code in this folder."
VAE_LICENSE = " The VAE is a copy and under its own."
TEXT_LICENSE = " All but the network and the scheduler is a copy of the teacher's pipeline and under its own."


def code_license(model: Teacher) -> str:
    own = "" if is_ours(model.native) else f", except for that of {type(model.native).__name__}, which is its author's"
    return f"{CODE_LICENSE}{own}."


def model_card(facts: dict, usage: str, rights: str) -> str:
    """A Hugging Face model card: what it is, how to sample, how it was made, how it scores."""
    training = dict(facts.get("training") or {})
    license = training.pop("license", "unknown")
    made = {"teacher": facts.get("teacher"), "sigma_data": facts["sigma_data"], **training}
    metrics = f"\n## Metrics\n\n{format_table(facts['metrics'])}\n" if facts.get("metrics") else ""
    return f"""---
library_name: diffusers
license: {license}
tags: [diffusers, consistency-model, scm]
---
# Continuous-time consistency model

{describe(facts)}

{usage}

## Training

{"".join(f"- {key}: {value}{chr(10)}" for key, value in made.items() if value is not None)}
{rights}
{metrics}"""


def scm_usage(facts: dict, output_type: str | None) -> str:
    form = "" if output_type is None else f", output_type={output_type!r}"
    return f"""```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
images = pipe({call_arguments(facts)}, generator=torch.Generator().manual_seed(0){form}).images
```

With `scm-distill` installed, `distill.pipeline.SCMPipeline.from_pretrained(folder)` runs no code from this folder."""


def standard_usage(pipeline: str, example: str) -> str:
    return f"""```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
{example}
```

This is a `{pipeline}` of diffusers: it needs no code from this folder, nor `scm-distill`."""


def lora_usage(facts: dict, example: str) -> str:
    return f"""```python
import diffusers
import torch

pipe = diffusers.DiffusionPipeline.from_pretrained({str(facts.get("teacher") or "path/to/the/teacher")!r})
{example}
```

These are adapters (LoRA) for the teacher's pipeline. `load_lora_weights` needs `peft`, not `scm-distill`."""


def describe(facts: dict) -> str:
    shape = "x".join(map(str, facts["sample_shape"]))
    classes = f", {facts['num_classes']} classes" if facts.get("num_classes") else ""
    name = facts["network_config"].get("cls", facts["network"])
    network = f"A {name} for samples of shape {shape}{classes}"
    if facts["role"] == "teacher":
        return f"{network}. It is a **teacher**, not distilled: in a few steps this pipeline gives blurred means."
    if facts.get("guidance_range"):
        low, high = facts["guidance_range"]
        guidance = f"Guidance is an input: `guidance_scale` from {low} to {high}."
    else:
        guidance = f"Guidance scale {facts.get('guidance_scale') or 1.0} is built in."
    return f"{network}, sampled in 1 to 8 network evaluations (sCM, arXiv 2410.11081). {guidance}"


def call_arguments(facts: dict) -> str:
    """The arguments of the card's example."""
    images = "batch_size=4"
    if facts.get("num_classes"):
        images = f"class_labels={[i % facts['num_classes'] for i in range(4)]}"
    guidance = f", guidance_scale={facts['guidance_range'][0]}" if facts.get("guidance_range") else ""
    return f"{images}, num_inference_steps=2{guidance}"
