"""Text embeddings in the place of labels: batching, the null prompt, guidance, and what does not fit."""

import pytest
import torch
from support import TextNetwork
from torch import nn

import teachers
from distill.objectives.scm import Consistency, Diffusion
from distill.recipe import parse_recipe
from distill.sampling import generate
from teachers.condition import Embeddings, join, replace_rows

WIDTH, TOKENS = 5, 3


def prompts(num, seed=1, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return Embeddings({
        "encoder_hidden_states": torch.randn(num, tokens, WIDTH, generator=generator),
        "encoder_attention_mask": torch.ones(num, tokens, dtype=torch.long),
        "pooled_projections": torch.randn(num, 2, generator=generator),
    })  # fmt: skip


@pytest.fixture
def teacher():
    network = TextNetwork(4, TOKENS, WIDTH, 2, mask=True)
    wrapped = teachers.wrap(network, teachers.RECTIFIED_FLOW, sigma_data=0.5, sample_shape=(1, 2, 2))
    return wrapped.twin(null_prompt=prompts(1, seed=9))


def noisy(num):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num, 1, 2, 2, generator=generator), torch.linspace(0.2, 1.4, num)


def test_rows_are_selected_in_every_tensor():
    some = prompts(6)
    for rows in (slice(2, 4), torch.tensor([True, False] * 3), torch.tensor([5, 0])):
        picked = some[rows]
        assert all(torch.equal(picked.tensors[name], tensor[rows]) for name, tensor in some.tensors.items())
    assert len(some[torch.tensor([5, 0])]) == 2


def test_a_dtype_leaves_the_mask_alone():
    cast = prompts(2).to(dtype=torch.float64).tensors
    assert cast["encoder_hidden_states"].dtype == torch.float64 and cast["encoder_attention_mask"].dtype == torch.long


def test_replaced_rows():
    some, null = prompts(4), prompts(1, seed=9).expand(4)
    mixed = replace_rows(some, torch.tensor([False, True, False, True]), null)
    assert torch.equal(mixed.tensors["pooled_projections"][0], some.tensors["pooled_projections"][0])
    assert torch.equal(mixed.tensors["pooled_projections"][3], null.tensors["pooled_projections"][0])
    labels = replace_rows(torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([7, 7]))
    assert labels.tolist() == [7, 2]


def test_guidance_combines_prompt_and_null_prompt(teacher):
    (x_t, t), some = noisy(3), prompts(3)
    guided = teacher.guided_by(2.5)(x_t, t, some)
    F, F_null = teacher(x_t, t, some), teacher(x_t, t, teacher.null_prompt.expand(3))
    torch.testing.assert_close(guided, F_null + 2.5 * (F - F_null))
    torch.testing.assert_close(teacher(x_t, t), F_null)  # no prompt is the null prompt
    assert not torch.allclose(F, F_null)


def test_a_guide_may_be_without_text(teacher):
    plain = teachers.wrap(nn.Identity(), teachers.RECTIFIED_FLOW, 0.5, (1, 2, 2))
    plain.native.forward = lambda x, time: 0.1 * x
    (x_t, t), some = noisy(3), prompts(3)
    guided = teacher.guided_by(2.0, guidance_teacher=plain)(x_t, t, some)
    torch.testing.assert_close(guided, 2 * teacher(x_t, t, some) - plain(x_t, t))


@pytest.mark.parametrize("tokens", [1, 8])
def test_any_number_of_tokens(teacher, tokens):
    x_t, t = noisy(2)
    assert teacher(x_t, t, prompts(2, tokens=tokens)).shape == x_t.shape


def test_samples_do_not_depend_on_the_batch_size(teacher):
    whole = next(generate(teacher, 5, num_inference_steps=3, role="teacher", labels=prompts(5)))[0]
    parts = [x for x, _ in generate(teacher, 5, num_inference_steps=3, role="teacher", labels=prompts(5), batch_size=2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def recipe(objective, **values):
    base = {
        "objective": objective, "teacher": "x", "output_dir": "x", "sample_shape": [1, 2, 2], "sigma_data": 0.5,
        "data": "mnist", "max_train_steps": 10, "train_batch_size": 4, "ema": [{"half_life_images": 10}],
    }  # fmt: skip
    return parse_recipe({**base, **values}, "test")


def test_distillation_learns_from_prompts(teacher):
    objective = Consistency(recipe("distillation", guidance_scale=2.0), teacher.guided_by(2.0))
    student = teacher.student()
    x0 = noisy(4)[0]
    losses = [objective(student, student, x0, prompts(4, seed), 5, torch.Generator().manual_seed(0)).loss for seed in (1, 2)]
    losses[0].backward()
    assert student.native.text.weight.grad.abs().sum() > 0 and losses[0] != losses[1]


class ScaledTextNetwork(TextNetwork):
    """With a guidance input."""

    guidance_embedding = True

    def forward(self, x, time, text, guidance=None):
        return super().forward(x, time, text) * (1.0 if guidance is None else 1 + guidance.view(-1, 1, 1, 1) / 10)


def test_segments_over_a_range_of_guidance(teacher):
    segments = {"segments": {"below": 0.9, "solver_steps": 2}, "target_half_life_images": 30.0}
    values = recipe("distillation", guidance_scale=[1.0, 4.0], **segments)
    objective = Consistency(values, teacher.guided_by(1.0))
    network = ScaledTextNetwork(4, TOKENS, WIDTH, 2, mask=True)
    student = teacher.twin(native=network)
    x0, some, generator = torch.randn(16, 1, 2, 2), prompts(16), torch.Generator().manual_seed(0)
    batch = objective.noisy_batch(x0, some, objective.sample_times(16, generator), generator)
    on_segment = values.segments.covers(batch.t, 0.5)
    assert on_segment.any() and not on_segment.all() and 1 <= batch.guidance.min() < batch.guidance.max() <= 4
    target, g = objective.segment_targets(student, batch, on_segment, 5, torch.Generator().manual_seed(1))
    # Each row by itself, with its own prompt and its own scale, is what it is in the batch.
    length = values.segments.max_length * torch.rand(16, generator=torch.Generator().manual_seed(1)).clamp(min=1e-3)
    for i in range(16):
        rows = batch.rows(torch.arange(16) == i)
        if on_segment[i]:
            alone = objective.segment_end(student, rows.x_t, rows.t, length[i : i + 1], rows.labels, rows.guidance)
        else:
            alone, g_alone = objective.tangent(student, rows, 5, None)
            torch.testing.assert_close(g[i : i + 1], g_alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_dropped_prompts_become_the_null_prompt(teacher):
    rows = torch.tensor([True, False, True, False])
    dropped = teacher.drop_condition(prompts(4), rows)
    assert torch.equal(dropped.tensors["pooled_projections"][2], teacher.null_prompt.tensors["pooled_projections"][0])
    x0 = noisy(4)[0]
    network = {"name": "SiT", "config": {}, "parameterization": "SIT"}
    loss = Diffusion(recipe("diffusion", label_dropout=0.5, teacher=None, network=network))
    assert torch.isfinite(loss(teacher.student(), teacher, x0, prompts(4), 0, torch.Generator().manual_seed(0)).loss)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([1, 2]), "takes text embeddings encoder_hidden_states, pooled_projections, encoder_attention_mask"),
        (Embeddings({"encoder_hidden_states": torch.zeros(2, 3, WIDTH)}), "takes text embeddings of shapes"),
        (prompts(2).tensors | {"pooled_projections": torch.zeros(2, 3)}, "takes text embeddings of shapes"),
    ],
)
def test_a_condition_that_does_not_fit(teacher, labels, message):
    labels = Embeddings(labels) if isinstance(labels, dict) else labels
    with pytest.raises(ValueError, match=message):
        teacher(*noisy(2), labels)


def test_what_cannot_be_batched(teacher):
    with pytest.raises(ValueError, match="as many in each"):
        Embeddings({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="do not go into one batch"):
        join(prompts(2), prompts(2, tokens=7))
    with pytest.raises(ValueError, match="5 samples need 5 prompts, got 4"):
        generate(teacher, 5, num_inference_steps=2, role="teacher", labels=prompts(4))
    with pytest.raises(ValueError, match="needs the embeddings of a prompt"):
        generate(teacher, 5, num_inference_steps=2, role="teacher")
    with pytest.raises(ValueError, match="has none of an empty prompt"):
        teacher.twin(null_prompt=None)(*noisy(2))
    plain = teachers.load("mnist-edm")
    with pytest.raises(ValueError, match="takes no text embeddings"):
        generate(plain, 2, num_inference_steps=2, role="teacher", labels=prompts(2))
