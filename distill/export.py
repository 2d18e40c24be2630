"""Writing a student as a diffusers pipeline folder that needs nothing of this package to be loaded.

Any registered network, of ours or a user's, goes into a folder that carries its code (format ``scm``,
:mod:`distill.carried_code`); some families also fit a pipeline that diffusers has itself (format ``diffusers``,
:mod:`distill.standard_pipeline`).
"""

import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import diffusers
from diffusers import SCMScheduler
from safetensors import SafetensorError

from distill.carried_code import CODE_NAME, carried_code
from distill.evaluation.table import format_table
from distill.pipeline import SCMNetwork
from distill.standard_pipeline import standard_pipeline
from teachers import Teacher
from teachers.diffusers import INDEX, read_json
from teachers.networks import is_ours
from teachers.pretrained import PIPELINE_WEIGHTS, model_config

CODE = f"{CODE_NAME}.py"
FORMATS = ("scm", "diffusers")
CONTENTS = {"README.md", INDEX, "network", "scheduler", CODE}
STANDARD_CONTENTS = {"README.md", INDEX, "scheduler", "transformer", "unet", "vae"}
MARK = {"_exported_by": "scm-distill"}  # in the index of a folder without our code; diffusers skips keys like this one


def export(
    model: Teacher, folder: str | Path, config: dict | None = None, format: str = "scm", vae: str | Path | None = None
) -> Path:
    """Write ``model`` as a pipeline folder: fp32 safetensors, model card and code. Nothing is left half-written.

    Args:
        model: a student. A teacher can be exported too, with a warning: in a few steps it gives blurred means.
        folder: created, or replaced if it is an exported pipeline already.
        config: its ``config.json`` values; ``metrics`` (rows of a table) go into the model card.
        format: ``scm``, or ``diffusers`` for a pipeline of diffusers' own classes, without code: ``DiTPipeline``,
            ``DDPMPipeline`` or ``ConsistencyModelPipeline``. The card has the timesteps to use.
        vae: of a ``DiTPipeline``: a folder of the ``AutoencoderKL`` of its latents; by default that of the teacher's
            pipeline.

    Load format ``scm`` with ``distill.pipeline.SCMPipeline.from_pretrained(folder)``, or where this package is not
    installed with ``diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``; format ``diffusers``
    with ``diffusers.DiffusionPipeline.from_pretrained(folder)``.

    Raises:
        ValueError: a network that is not registered or needs what the folder cannot carry, or for format ``diffusers`` of
            no pipeline of theirs; a VAE that is missing or does not fit; a folder that holds something else.
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
    try:
        if format == "diffusers":
            write_standard_pipeline(model, temporary, facts, vae)
        elif vae is not None:
            raise ValueError("a VAE (--vae) belongs to format diffusers only; leave it out")
        else:
            write_pipeline(model, temporary, facts)
        replace_folder(target, temporary)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(folder)


def check_replaceable(folder: Path) -> None:
    """Raise ``ValueError`` unless ``folder`` is absent, empty, or an exported pipeline and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another folder")
    names = sorted(os.listdir(folder)) if folder.exists() else []
    if CODE in names:
        expected = CONTENTS
    else:
        expected = STANDARD_CONTENTS if is_marked(folder / INDEX) else set()
    foreign = [name for name in names if name not in expected]
    if foreign:
        raise ValueError(f"{folder} is not empty and not an exported pipeline: it holds {foreign[0]}; choose another folder")


def is_marked(index: Path) -> bool:
    """Whether this ``model_index.json`` is of a pipeline that :func:`write_standard_pipeline` wrote."""
    try:
        return MARK.items() <= read_json(index).items()
    except (OSError, ValueError):
        return False


def replace_folder(folder: Path, new: Path) -> None:
    """Rename ``new`` to ``folder``, whose old contents are removed only afterwards."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_pipeline(model: Teacher, folder: Path, facts: dict) -> None:
    code = carried_code(model.native)
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
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(facts, scm_usage(facts), code_license(model)), encoding="utf-8")
    for place in (folder, folder / "network"):  # diffusers looks for a component's code in the component's folder
        (place / CODE).write_text(code, encoding="utf-8")


def write_standard_pipeline(model: Teacher, folder: Path, facts: dict, vae: str | Path | None) -> None:
    pipe, index, example = standard_pipeline(model, facts, vae)
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
    (folder / INDEX).write_text(json.dumps({**read_json(folder / INDEX), **index, **MARK}, indent=2) + "\n")
    rights = CODELESS_LICENSE + (VAE_LICENSE if hasattr(pipe, "vae") else "")
    card = model_card(facts, standard_usage(type(pipe).__name__, example), rights)
    (folder / "README.md").write_text(card, encoding="utf-8")


CODE_LICENSE = "The licence above is that of the weights; the code in this folder is Apache-2.0"
CODELESS_LICENSE = "The licence above is that of the weights; there is no code in this folder."
VAE_LICENSE = " The VAE is a copy and under its own."


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


def scm_usage(facts: dict) -> str:
    return f"""```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
images = pipe({call_arguments(facts)}, generator=torch.Generator().manual_seed(0)).images
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


def describe(facts: dict) -> str:
    shape = "x".join(map(str, facts["sample_shape"]))
    classes = f", {facts['num_classes']} classes" if facts.get("num_classes") else ""
    network = f"A {facts['network']} for samples of shape {shape}{classes}"
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
