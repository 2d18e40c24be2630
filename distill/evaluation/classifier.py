"""The small MNIST classifier that ships with the package: features for metrics, and a judge of class labels.

    python -m distill.evaluation.classifier OUT.safetensors

trains it again (about 5 minutes on one core).
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.data import as_tensors, load_images
from distill.recipe import DataConfig
from teachers.pretrained import write_atomically


class MNISTClassifier(nn.Module):
    """Two convolutions and two linear layers; ``features`` ``(N, 128)`` are the last hidden layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(48 * 7 * 7, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def features(self, images: Tensor) -> Tensor:
        """``(N, 128)`` for images ``(N, 1, 28, 28)`` in [-1, 1]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits ``(N, 10)``."""
        return self.head(self.features(images))


def shifted(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """The batch moved by a random amount: augmentation."""
    dy, dx = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, (pixels,) * 4, value=-1.0)
    return padded[..., pixels + dy : pixels + dy + images.shape[-2], pixels + dx : pixels + dx + images.shape[-1]]


def train(epochs: int = 6, batch_size: int = 128, seed: int = 0) -> tuple[MNISTClassifier, float]:
    """Train on the training split; returns the classifier and its accuracy on the test split."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = as_tensors(load_images(DataConfig("mnist", "train"), 1))
    model = MNISTClassifier()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(images) // batch_size) == 0:
            order = torch.randperm(len(images), generator=generator)
        rows = order[(step % (len(images) // batch_size)) * batch_size :][:batch_size]
        hidden = F.dropout(model.features(shifted(images[rows], generator)), 0.3)
        loss = F.cross_entropy(model.head(hidden), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    return model.eval(), accuracy(model)


@torch.no_grad()
def accuracy(model: MNISTClassifier) -> float:
    """Share of the test split that is classified correctly."""
    images, labels = as_tensors(load_images(DataConfig("mnist", "test"), 1))
    hits = [(model(x).argmax(1) == y).float() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return torch.cat(hits).mean().item()


def main() -> None:
    model, score = train()
    facts = {"command": "python -m distill.evaluation.classifier", "seed": "0", "test_accuracy": f"{score:.4f}"}
    print(facts)
    write_atomically(Path(sys.argv[1]), lambda path: save_file(model.state_dict(), path, facts))


if __name__ == "__main__":
    main()
