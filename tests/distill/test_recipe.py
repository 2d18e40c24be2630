import dataclasses
from pathlib import Path

import pytest

from distill import recipe as recipes
from distill.recipe import Recipe, load_recipe, parse_overrides, parse_recipe, recipe_path, to_dict

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in ROOT.joinpath("recipes").rglob("*.yaml") if p.parent.name != "compare")  # see test_comparison.py
SECTIONS = [value for value in vars(recipes).values() if dataclasses.is_dataclass(value) and value is not Recipe]
MINIMAL = dict(
    objective="distillation", output_dir="x", sigma_data=0.5, max_train_steps=1, train_batch_size=4, sample_shape=[1, 8, 8],
    teacher="mnist-edm", data="mnist",
)  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_that_ships_is_valid(path):
    recipe = load_recipe(path)
    assert parse_recipe(to_dict(recipe), "round trip") == recipe


def test_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("recipes/mnist.yaml").is_file() and recipe_path("teachers/mnist-edm.yaml").is_file()
    with pytest.raises(FileNotFoundError, match="recipes that ship: .*mnist.yaml"):
        recipe_path("recipes/nothing-like-it")
    with pytest.raises(FileNotFoundError, match="did you mean mnist.yaml?"):
        recipe_path("recipes/minst.yaml")


def test_a_recipe_inherits_from_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "objective: distillation\nteacher: mnist-edm\noutput_dir: a\nsigma_data: 0.5\nmax_train_steps: 5\n"
        "train_batch_size: 4\nsample_shape: [1, 8, 8]\ndata: mnist\noptimizer: {name: adam, learning_rate: 1e-3}\n"
    )
    (tmp_path / "child.yaml").write_text("base: base.yaml\nmax_train_steps: 7\noptimizer: {learning_rate: 2e-4}\n")
    recipe = load_recipe(tmp_path / "child.yaml")
    assert (recipe.max_train_steps, recipe.optimizer.name, recipe.optimizer.learning_rate) == (7, "adam", 2e-4)


def test_a_recipe_cannot_be_its_own_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match="a.yaml is, through base, its own base recipe"):
        load_recipe(tmp_path / "a.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "grid.yaml").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="grid.yaml is not valid YAML"):
        load_recipe(tmp_path / "grid.yaml")


def test_overrides_reach_inside_sections():
    overrides = parse_overrides(["optimizer.learning_rate=1e-5", "max_train_steps=3", "guidance_scale=[1, 2.5]"])
    recipe = load_recipe("mnist.yaml", overrides)
    assert (recipe.optimizer.learning_rate, recipe.max_train_steps, recipe.guidance_scale) == (1e-5, 3, [1.0, 2.5])
    with pytest.raises(ValueError, match="must look like key=value"):
        parse_overrides(["max_train_steps"])


def test_an_unquoted_no_is_the_word():
    assert load_recipe("mnist.yaml", parse_overrides(["mixed_precision=no"])).mixed_precision == "no"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_train_step": 5}, "unknown key max_train_step; did you mean max_train_steps?"),
        ({"optimizer": {"learningrate": 1}}, "unknown key optimizer.learningrate; did you mean optimizer.learning_rate?"),
        ({"learning_rate": 1e-4}, "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ({"segments": 3}, "segments must be a mapping or null, got 3"),
        ({"ema": 3}, "ema must be a list, each item a mapping, got 3"),
        ({"segments": {"below": 9.0}, "target_half_life_images": 9.0}, "below must be from 0 to pi/2 radians, got 9.0"),
        ({"max_train_steps": "many"}, "max_train_steps must be an integer, got 'many'"),
        ({"max_train_steps": 1.5}, "max_train_steps must be an integer"),
        ({"adaptive_weighting": 1}, "adaptive_weighting must be true or false"),
        ({"sample_shape": [1, "a", 8]}, r"sample_shape\[1\] must be an integer"),
        ({"sigma_data": -1.0}, "sigma_data must be positive"),
        ({"objective": "gan"}, "objective is 'gan'; allowed: diffusion, distillation, training"),
        ({"tangent": {"normalization": "max"}}, "allowed: rms, l2, clip, none"),
        ({"tangent": 3}, "tangent must be a mapping"),
        ({"ema": [{"half_life_images": 5, "sigma_rel": 0.1}]}, "exactly one of half_life_images and sigma_rel"),
        ({"ema": []}, "at least one entry"),
        ({"guidance_scale": [2.0, 1.0]}, "number or"),
        ({"objective": "diffusion", "teacher": None}, "exactly one of network"),
        ({"objective": "diffusion", "network": {"name": "SiT", "config": {}}}, "exactly one of network"),
        ({"teacher": None}, "needs the key teacher"),
        ({"evaluation": {"num_inference_steps": [0]}}, "must be 1 to 8, got .0."),
        ({"evaluation": {"num_inference_steps": [9]}}, "must be 1 to 8, got .9."),
        ({"evaluation": {"num_samples": 10}}, "evaluation.num_samples must be at least 50, got 10"),
        ({"objective": "retrofit", "evaluation": {"teacher_steps": 0}}, "1 or more: retrofit trains a teacher"),
        ({"evaluation": {"search_samples": 10}}, "evaluation.search_samples must be 0 or at least 50, got 10"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"tangent": {"warmup_steps": -1}}, "tangent.warmup_steps must be 0 or more, got -1"),
        ({"discrete_steps": 1}, "discrete_steps must be 2 or more"),
        ({"guidance_interval": [0.2, 1.0]}, "guidance_interval needs a guidance_scale other than 1"),
        ({"guidance_teacher": "mnist-flow"}, "guidance_teacher needs a guidance_scale other than 1"),
        ({"guidance_teachers": "mnist-flow"}, "unknown key guidance_teachers; did you mean guidance_teacher?"),
        ({"guidance_scale": 2.0, "guidance_interval": [1.0, 0.2]}, r"guidance_interval must be \[low, high\]"),
        ({"ema": [{"half_life_images": 0.0}]}, r"ema\[0\].half_life_images must be positive"),
        ({"segments": {}}, "segments need target_half_life_images"),
        ({"segments": {"length": 1.0}}, "unknown key segments.length; did you mean segments.max_length?"),
        ({"segments": {}, "discrete_steps": 64}, "segments belong to objective distillation without discrete_steps"),
        ({"segments": {}, "objective": "training"}, "segments belong to objective distillation"),
        ({"segments": {"solver_steps": 0}, "target_half_life_images": 9.0}, "solver_steps of at least 1"),
        ({"segments": {"everywhere_share": 2.0}, "target_half_life_images": 9.0}, "everywhere_share must be from 0 to 1"),
        (
            {"segments": {"everywhere_share": 0.75, "tangent_share": 0.3}, "target_half_life_images": 9.0},
            "tangent_share must be from 0 to 0.25, what everywhere_share leaves, got 0.3",
        ),
        ({"intermediate_times": [1.1]}, "intermediate_times must be a mapping of an integer to a list, each item a number"),
        ({"intermediate_times": {"two": [1.1]}}, "a key of intermediate_times must be an integer, got 'two'"),
        ({"intermediate_times": {9: [1.1]}}, r"intermediate_times\[9\]: num_inference_steps must be 1 to 8, got 9"),
        ({"intermediate_times": {4: [1.1]}}, r"intermediate_times\[4\]: 4 steps need 3 intermediate times, got \[1.1\]"),
        ({"intermediate_times": {3: [0.5, 1.1]}}, r"intermediate_times\[3\]: sampling times must decrease within"),
        ({"target_half_life_images": 0.0}, "target_half_life_images must be positive"),
        ({"data": {"split": "train"}}, "the key data.source is missing"),
    ],
)
def test_mistakes_are_one_sentence(change, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_recipe({**MINIMAL, **change}, "recipe.yaml")
    assert str(error.value).startswith("recipe.yaml: ") and "\n" not in str(error.value)


def test_intermediate_times_are_of_a_number_of_steps():
    recipe = load_recipe("mnist.yaml", parse_overrides(["intermediate_times.4=[1.1, 0.8, 0.4]"]))
    assert recipe.sampling_times(4) == [recipe.sampling_times(1)[0], 1.1, 0.8, 0.4]
    assert recipe.sampling_times(2) == load_recipe("mnist.yaml").sampling_times(2)
    diffusion = {**MINIMAL, "objective": "diffusion", "intermediate_times": {2: [1.1]}}
    with pytest.raises(ValueError, match="intermediate_times are a student's; remove them"):
        parse_recipe(diffusion, "recipe.yaml")


def keys_of(config, prefix=""):
    for field in dataclasses.fields(config):
        inner = next((c for c in SECTIONS if c.__name__ in str(field.type)), None)
        yield from keys_of(inner, f"{field.name}.") if inner else [(prefix, field.name)]


def test_the_documentation_names_every_key():
    text = ROOT.joinpath("docs/recipes.md").read_text()
    keys = list(keys_of(Recipe))
    assert len(keys) > 60
    for section, key in keys:
        assert f"`{key}`" in text, f"{section}{key}"


def test_data_by_its_source_alone_can_be_overridden_in_parts(tmp_path):
    recipe = load_recipe("mnist.yaml", parse_overrides(["data.split=test"]))
    assert (recipe.data.source, recipe.data.split) == ("mnist", "test")
    with pytest.raises(ValueError, match=r"'\[1,' is not a YAML value"):
        parse_overrides(["sample_shape=[1,"])


def test_missing_keys_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="the key sigma_data is missing"):
        parse_recipe({k: v for k, v in MINIMAL.items() if k != "sigma_data"}, "r")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\nb")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(broken)
    broken.write_text("!!python/object/apply:os.system [echo]")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(broken)
    broken.write_text("- 1")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_recipe(broken)
