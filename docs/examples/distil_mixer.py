"""Train the mixer on MNIST with a loop of its own, distil it without data, export the student.

    python docs/examples/distil_mixer.py
"""

import torch
from mixer import MixerScore
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distill
import teachers
from distill.data import as_tensors, load_images
from distill.recipe import DataConfig


def train_score_network(steps, batch_size=64):
    """Denoising score matching (arXiv 1907.05600) under the Ornstein-Uhlenbeck process."""
    torch.manual_seed(0)
    images, labels = as_tensors(load_images(DataConfig("mnist"), channels=1))  # in [-1, 1]
    network = MixerScore()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        batch = torch.randint(len(images), (batch_size,))
        t = torch.log1p((2 * (1.5 * torch.randn(batch_size) - 0.5)).exp())  # log-normal noise-to-signal ratio
        signal, noise = (-t / 2).exp().view(-1, 1, 1, 1), (-torch.expm1(-t)).sqrt().view(-1, 1, 1, 1)
        eps = torch.randn(batch_size, 1, 28, 28)
        score = network(signal * images[batch] + noise * eps, t, labels[batch])
        loss = ((score + eps / noise).square() * (noise / signal).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return average.module.eval()


if __name__ == "__main__":
    network = train_score_network(steps=4000)
    convention = teachers.Parameterization("vp", "score", "-2log(alpha)")
    teacher = teachers.wrap(network, convention, sigma_data=0.616, sample_shape=(1, 28, 28), num_classes=10)
    teachers.save_pretrained(teacher, "runs/mixer-teacher", role="teacher")

    model = distill.from_pretrained(teacher)
    model.train(
        "recipes/mnist-datafree.yaml", output_dir="runs/mixer", max_train_steps=300, data__num_teacher_samples=2000,
        evaluation__also=[],
    )
    model.export("runs/mixer-pipeline")
