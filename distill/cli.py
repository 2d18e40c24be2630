"""The ``distill`` command. Each verb imports what it needs: torch and diffusers take seconds."""

import argparse
import json
import os
import sys
from pathlib import Path


def sample(options: argparse.Namespace) -> None:
    """Samples as a PNG grid or as arrays."""
    import numpy as np

    from distill.model import from_pretrained
    from distill.sampling import cycle_labels
    from distill.visual import save_grid, to_uint8
    from teachers.pretrained import write_atomically

    if options.out.suffix.lower() not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {options.out}")
    if options.columns < 1:
        raise ValueError(f"--columns must be at least 1, got {options.columns}")
    check_folder(options.out.parent, f"--out {options.out}")
    model = from_pretrained(options.source, options.device)
    labels = repeat_labels(options.labels, options.num)
    samples = model.sample(
        options.num, options.steps, labels, options.seed, options.guidance_scale, options.batch_size, progress=True,
        solver=options.solver, guidance_teacher=options.guidance_teacher, prompts=options.prompts, vae=options.vae,
        normalization=options.normalization, mixed_precision=options.mixed_precision,
        intermediate_times=options.intermediate_times,
    )  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.suffix.lower() == ".png":
        save_grid(list(samples.split(options.columns)), options.out)
    else:
        used = cycle_labels(model.network, options.num) if labels is None else labels
        latents = model.network.latents and options.vae is None
        arrays = {"latents": samples.cpu().numpy()} if latents else {"images": to_uint8(samples)}
        arrays |= {} if used is None else {"labels": np.asarray(used)}
        write_atomically(options.out, lambda path: save_npz(path, arrays))
    kind = "latents" if model.network.latents and options.vae is None else "images"
    print(f"{options.num} {kind} in {options.out}")


def save_npz(path: Path, arrays: dict) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def repeat_labels(labels: list[int] | None, num: int) -> list[int] | None:
    """``--labels 3`` for all images, ``--labels 0 1 2`` cycled."""
    return None if labels is None else [labels[i % len(labels)] for i in range(num)]


def check_folder(folder: Path, what: str) -> None:
    """Raise ``OSError`` unless ``folder`` can be written to, or could be made: known before minutes of work."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{what}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{what}: {there} cannot be written")


def evaluate(options: argparse.Namespace) -> None:
    """Metrics of a model, printed and optionally written as JSON."""
    from distill.evaluation import format_table
    from distill.model import from_pretrained
    from teachers.pretrained import write_atomically

    if options.out is not None:
        check_folder(options.out.parent, f"--out {options.out}")
    model = from_pretrained(options.source, options.device)
    steps = model.number_of_steps(options.steps, options.intermediate_times)
    scores = model.evaluate(
        options.num, steps, options.features, options.data, options.seed, progress=True,
        guidance_scale=options.guidance_scale, guidance_teacher=options.guidance_teacher, prompts=options.prompts,
        vae=options.vae, normalization=options.normalization, batch_size=options.batch_size, solver=options.solver,
        mixed_precision=options.mixed_precision, intermediate_times=options.intermediate_times,
    )  # fmt: skip
    print(format_table({f"{options.source}, {steps} step{'s' * (steps != 1)}": scores}))
    if options.out is not None:
        write_atomically(options.out, lambda path: path.write_text(json.dumps(scores, indent=2)))


def compare(options: argparse.Namespace) -> None:
    """Quality and diversity of any models side by side: a report to look at; goes on where an earlier call stopped."""
    import shlex

    from distill.comparison import run
    from distill.comparison.table import format_rows
    from distill.recipe import parse_overrides

    command = shlex.join(["distill", "compare", options.config, *options.overrides])
    report = run(options.config, parse_overrides(options.overrides), command)
    print(format_rows(report))
    print(f"\nreport in {report['config']['output_dir']}/report.html")


def export(options: argparse.Namespace) -> None:
    """A diffusers pipeline folder, or the adapters of a student trained with lora for its teacher's pipeline."""
    from distill.model import from_pretrained

    folder = from_pretrained(options.source, "cpu").export(
        options.out_dir, options.format, options.vae, options.pipeline, options.normalization
    )
    print(f"{'adapters' if options.format == 'lora' else 'diffusers pipeline'} in {folder}")


def list_teachers(options: argparse.Namespace) -> None:
    """The models that ship with the package; ``inspect`` tells more about any model."""
    import teachers

    for name in teachers.bundled():
        config = teachers.load_config(name)
        print(f"{name:18} {config['role']:8} {config['network']:9} {'x'.join(map(str, config['sample_shape']))}")


def inspect_teacher(options: argparse.Namespace) -> None:
    """What is known of one model and, of a teacher, whether it denoises."""
    import teachers

    facts = teachers.inspect(options.source)
    for key, value in facts.items():
        print(f"{key}: {value}")
    if facts["role"] == "teacher":
        print(f"probe: {teachers.probe(teachers.load(options.source))['verdict']}")


def convert_teacher(options: argparse.Namespace) -> None:
    """Write a model, such as a released checkpoint, as a folder of safetensors and config.json."""
    import teachers

    teachers.pretrained.check_model_target(options.out_dir)
    model, config = teachers.load(options.source), teachers.load_config(options.source)
    instead = ", in place of the one that was there" if (options.out_dir / "config.json").exists() else ""
    teachers.pretrained.write_model(options.out_dir, model, config)
    print(f"model folder in {options.out_dir}{instead}")


def precompute_latents(options: argparse.Namespace) -> None:
    """Encode images once by an autoencoder, for training on latents; goes on where an earlier run stopped."""
    from distill.precompute import precompute_latents as precompute
    from distill.recipe import DataConfig

    label_column = None if options.no_labels else options.label_column
    data = DataConfig(
        options.data, options.split, options.image_column, label_column, num_workers=options.num_workers
    )
    done = precompute(
        data, options.out_dir, options.vae, options.normalization, options.batch_size, options.shard_size, options.dtype
    )
    print(f"latents in {options.out_dir}{'' if done else ' were already complete'}")


def precompute_prompts(options: argparse.Namespace) -> None:
    """Embed prompts once by a pipeline's text encoders, for training without them; goes on where an earlier run stopped."""
    from distill.precompute import precompute_prompts as precompute
    from distill.precompute import read_captions

    captions = read_captions(options.captions, options.caption_column, options.split)
    done = precompute(
        options.pipeline, captions, options.out_dir, options.captions, options.negative_prompt, options.batch_size,
        options.shard_size, options.dtype, options.max_sequence_length,
    )  # fmt: skip
    print(f"{len(captions)} prompts in {options.out_dir}{'' if done else ' were already complete'}")


def plan(options: argparse.Namespace) -> None:
    """What a recipe costs, before anything is loaded: FLOPs, memory by how it is run, hours, and samples."""
    from distill.plan import Hardware, as_text
    from distill.plan import plan as make_plan
    from distill.recipe import load_recipe, parse_overrides

    hardware = Hardware(options.gpus, options.gpu_memory, options.utilization, options.gpu_tflops)
    values = make_plan(load_recipe(options.recipe, parse_overrides(options.overrides)), hardware)
    print(json.dumps(values, indent=2) if options.json else as_text(values))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill", description="Few-step consistency models from your teacher.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    p = add_verb(verbs, "sample", sample, "distill sample mnist-edm-scm --num 64 --steps 2 --labels 3 --out grid.png")
    add_source(p)
    p.add_argument("--num", type=int, default=64, help="number of images (64)")
    add_steps_and_seed(p)
    p.add_argument("--labels", type=int, nargs="+", help="classes, cycled; default: all in turn")
    add_guidance(p)
    add_prompts_and_vae(p)
    add_computation(p)
    p.add_argument("--columns", type=int, default=8, help="images a row of the grid (8)")
    arrays = "a .png grid, or .npz with images (uint8 NHWC), or latents (NCHW), and labels"
    p.add_argument("--out", type=Path, required=True, help=arrays)

    p = add_verb(verbs, "evaluate", evaluate, "distill evaluate mnist-edm-scm --steps 2 --num 10000")
    add_source(p)
    p.add_argument("--num", type=int, default=10_000, help="number of samples (10000)")
    add_steps_and_seed(p)
    add_guidance(p)
    add_prompts_and_vae(p)
    add_computation(p)
    p.add_argument("--features", help="feature extractor: MNIST-CNN or pixels (MNIST-CNN for MNIST, else pixels)")
    p.add_argument("--data", default="mnist", help="data with train and test splits to score against")
    p.add_argument("--out", type=Path, help="write the scores as JSON")

    p = add_verb(verbs, "compare", compare, "distill compare compare/report.yaml num_samples=500")
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that ships: compare/report.yaml")
    p.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="its values; dots reach inside sections")

    p = add_verb(verbs, "export", export, "distill export runs/sd3 my-pipeline --format diffusers --pipeline sd3-medium")
    add_source(p)
    p.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    kinds = "scm carries its code; diffusers is one of its own pipelines; lora is the adapters alone (scm)"
    p.add_argument("--format", default="scm", help=kinds)
    p.add_argument("--vae", metavar="FOLDER", help="of a student of latents (DiTPipeline: that of the teacher's pipeline)")
    p.add_argument("--normalization", metavar="NAME", help="of these latents, format scm: edm2, scm, sd or vae (vae)")
    p.add_argument("--pipeline", metavar="FOLDER", help="of a student of text: its teacher's pipeline (where it was)")

    example = "distill plan imagenet512-s.yaml --gpus 8 --gpu-memory 80"
    p = add_verb(verbs, "plan", plan, example)
    p.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that ships with the package")
    p.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe values; dots reach inside sections")
    p.add_argument("--gpus", type=int, default=1, help="on which it is run together (1)")
    p.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of each (80)")
    peak = "dense peak of each in the recipe's precision (an A100's: 312 in bf16, 19.5 in fp32)"
    p.add_argument("--gpu-tflops", type=float, metavar="T", help=peak)
    p.add_argument("--utilization", type=float, default=0.35, metavar="U", help="share of the peak that is reached (0.35)")
    p.add_argument("--json", action="store_true", help="print plain values")

    p = add_verb(verbs, "teachers", list_teachers, "distill teachers inspect mnist-edm")
    nested = p.add_subparsers(metavar="list|inspect|convert")
    add_verb(nested, "list", list_teachers, "distill teachers list")
    add_source(add_verb(nested, "inspect", inspect_teacher, "distill teachers inspect mnist-edm"))
    p = add_verb(nested, "convert", convert_teacher, "distill teachers convert edm-cifar10-32x32-uncond-vp.pkl my-teacher")
    add_source(p)
    p.add_argument("out_dir", type=Path, metavar="OUT_DIR")

    p = verbs.add_parser("precompute", help="Prepare data once, before any training.")
    nested = p.add_subparsers(required=True, metavar="latents|prompts")
    example = "distill precompute latents images/ latents/ --vae sd-vae-ft-mse --normalization scm"
    p = add_verb(nested, "latents", precompute_latents, example)
    p.add_argument("data", metavar="DATA", help="a data source, as data.source of a recipe")
    p.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="becomes data.source of a recipe")
    p.add_argument("--vae", required=True, metavar="FOLDER", help="an autoencoder of diffusers, or hf://owner/name of one")
    p.add_argument("--normalization", required=True, metavar="NAME", help="edm2, scm, sd, or vae: what its config says")
    p.add_argument("--batch-size", type=int, default=16, help="images encoded at once (16)")
    p.add_argument("--shard-size", type=int, default=4096, help="images a file (4096)")
    p.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is kept (float32)")
    p.add_argument("--split", default="train", help="(train)")
    p.add_argument("--image-column", default="image", help="(image)")
    p.add_argument("--label-column", default="label", help="(label)")
    p.add_argument("--no-labels", action="store_true", help="for data without labels")
    p.add_argument("--num-workers", type=int, default=0, help="processes that read images (0)")
    example = "distill precompute prompts sd3-pipeline captions.txt prompts/"
    p = add_verb(nested, "prompts", precompute_prompts, example)
    p.add_argument("pipeline", type=Path, metavar="PIPELINE", help="a diffusers pipeline folder with its text encoders")
    p.add_argument("captions", metavar="CAPTIONS", help="a .txt file, one prompt a line, or a data source with text")
    p.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="becomes data.prompts of a recipe")
    p.add_argument("--caption-column", default="text", help="of a data source (text)")
    p.add_argument("--split", default="train", help="of a data source (train)")
    p.add_argument("--negative-prompt", default="", metavar="TEXT", help="to guide away from (what the pipeline does)")
    p.add_argument("--batch-size", type=int, default=16, help="prompts encoded at once (16)")
    p.add_argument("--shard-size", type=int, default=1024, help="prompts a file (1024)")
    p.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of what is kept (float16)")
    p.add_argument("--max-sequence-length", type=int, metavar="N", help="tokens a prompt (what the pipeline takes)")
    return parser


def add_verb(verbs, name: str, action, example: str) -> argparse.ArgumentParser:
    text = action.__doc__.replace("``", "")
    parser = verbs.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    parser.set_defaults(action=action)
    return parser


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="bundled name, model, run or pipeline folder, file, or hf://owner/name")


def add_steps_and_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="student: evaluations (2); teacher: Heun steps (18, 35 NFE)")
    times = "of a student: its times after the first step, in radians, as 1.1 0.8 0.4 (its own)"
    parser.add_argument("--intermediate-times", type=float, nargs="+", metavar="T", help=times)
    parser.add_argument("--seed", type=int, default=0)


def add_guidance(parser: argparse.ArgumentParser) -> None:
    scale = "guidance of a teacher, or of a student distilled over a range"
    parser.add_argument("--guidance-scale", type=float, metavar="W", help=scale)
    name = "network that a teacher is guided away from (its own null class)"
    parser.add_argument("--guidance-teacher", metavar="SOURCE", help=name)


def add_prompts_and_vae(parser: argparse.ArgumentParser) -> None:
    prompts = "of distill precompute prompts, for a model of texts: row i for image i, cycled"
    parser.add_argument("--prompts", type=Path, metavar="FOLDER", help=prompts)
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="an autoencoder of diffusers that decodes latents")
    norm = "of these latents: edm2, scm, sd, or vae: what its config says (vae)"
    parser.add_argument("--normalization", default="vae", metavar="NAME", help=norm)


def add_computation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=250, help="images drawn at once (250)")
    parser.add_argument("--solver", default="heun", help="of a teacher: heun or dpmpp_2m (heun)")
    precision = "no or bf16, in which the network is then evaluated (no)"
    parser.add_argument("--mixed-precision", default="no", metavar="P", help=precision)
    parser.add_argument("--device", metavar="D", help="such as cpu or cuda:1 (a GPU if there is one)")


def sentence(error: Exception) -> str:
    """The message of an error for the command line; one of the operating system with its path in front."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be read or written: {error.strerror}"
    text = str(error)
    if "in DataLoader worker process" in text:  # torch puts the traceback of the worker in front of its message
        last = text.rstrip().splitlines()[-1]
        return last.partition(": ")[2] or last
    return text


def main(arguments: list[str] | None = None) -> int:
    """Entry point; errors that a user can cause are one sentence on stderr and exit status 1."""
    options = build_parser().parse_args(arguments)
    from distill.cpu import tune_cpu

    tune_cpu()
    try:
        options.action(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output needs no more of it, as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return 141  # as a command that SIGPIPE ends
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
