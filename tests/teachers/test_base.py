import pytest
import torch

import teachers

X = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
T = torch.tensor([0.3, 1.2])
Y = torch.tensor([0, 2])
NULL = torch.tensor([3, 3])


def test_guidance_extrapolates_from_the_null_class(teacher):
    conditional, null = teacher(X, T, Y), teacher(X, T, NULL)
    teacher.guidance_scale = 2.5
    torch.testing.assert_close(teacher(X, T, Y), null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-5)


def test_guidance_per_sample_is_guidance_at_each_scale(teacher):
    mixed = teacher(X, T, Y, torch.tensor([1.0, 4.0]))
    teacher.guidance_scale = 4.0
    torch.testing.assert_close(mixed[1], teacher(X, T, Y)[1], rtol=1e-4, atol=1e-5)
    teacher.guidance_scale = 1.0
    torch.testing.assert_close(mixed[0], teacher(X, T, Y)[0], rtol=1e-4, atol=1e-5)


def test_guidance_interval_leaves_other_times_alone(teacher):
    plain = teacher(X, T, Y)
    teacher.guidance_scale, teacher.guidance_interval = 3.0, (1.0, 1.5)
    guided = teacher(X, T, Y)
    torch.testing.assert_close(guided[0], plain[0], rtol=1e-4, atol=1e-5)
    assert (guided[1] - plain[1]).abs().max() > 1e-3


def test_no_labels_are_the_null_class(teacher):
    torch.testing.assert_close(teacher(X, T), teacher(X, T, NULL))
    assert (teacher(X, T) - teacher(X, T, Y)).abs().max() > 1e-4


def test_guidance_without_labels_is_refused(teacher):
    teacher.guidance_scale = 2.0
    with pytest.raises(ValueError, match="needs labels"):
        teacher(X, T)


def test_labels_out_of_range_name_the_range(teacher):
    with pytest.raises(ValueError, match="label 4 is out of range: this model has classes 0 to 2"):
        teacher.check_labels(torch.tensor([1, 4]))


def test_student_is_an_unguided_copy(teacher):
    teacher.guidance_scale = 2.0
    student = teacher.student()
    before = teacher(X, T, Y)
    for p in student.parameters():
        p.data.add_(1.0)
    torch.testing.assert_close(teacher(X, T, Y), before)
    assert student.guidance_scale == 1.0 and student.sigma_data == teacher.sigma_data


def test_position_table_is_never_trained(make_teacher):
    student = make_teacher("SiT").student()
    trained = {name for name, p in student.native.named_parameters() if p.requires_grad}
    assert "pos_embed" not in trained and "blocks.0.attn.qkv.weight" in trained


def test_any_module_in_one_line():
    class Zero(torch.nn.Module):
        def forward(self, x, time):
            return torch.zeros_like(x)

    teacher = teachers.wrap(Zero(), teachers.TRIGFLOW, 0.5, (1, 8, 8))
    assert teacher(X, T).abs().max() == 0
    with pytest.raises(ValueError, match="unconditional"):
        teacher.check_labels(torch.tensor([0]))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="label_format is 'words'"):
        teachers.wrap(torch.nn.Identity(), teachers.EDM, 0.5, (1, 8, 8), 3, "words")
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        teachers.wrap(torch.nn.Identity(), teachers.EDM, 0.0, (1, 8, 8))
