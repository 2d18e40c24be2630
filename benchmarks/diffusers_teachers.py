"""Small teachers of diffusers' own classes, trained on MNIST as its users train theirs, and saved as pipeline folders.

    python benchmarks/diffusers_teachers.py ddpm runs/teachers/ddpm   # UNet2DModel, DDPMScheduler, v
    python benchmarks/diffusers_teachers.py dit runs/teachers/dit     # DiTTransformer2DModel, DDIMScheduler, v

Both are class-conditional. The training is diffusers' and torch's alone; ``teachers.load`` reads the folders. What they and
students of theirs reach is in ``docs/families.md``.
"""

import argparse
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import trange

from distill.cpu import tune_cpu
from distill.data import as_tensors, load_images
from distill.recipe import DataConfig

STEPS = {"ddpm": 4800, "dit": 7200}
LEARNING_RATE, WARMUP = 2e-3, 100


def build(kind: str, prediction: str = "v_prediction") -> tuple[nn.Module, diffusers.SchedulerMixin]:
    """A network with random weights and its scheduler: ``ddpm`` (0.69M parameters) or ``dit`` (1.43M)."""
    if kind == "ddpm":
        network = diffusers.UNet2DModel(
            sample_size=28, in_channels=1, out_channels=1, block_out_channels=(16, 32, 64), layers_per_block=1,
            norm_num_groups=8, attention_head_dim=32, num_class_embeds=10,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        return network, diffusers.DDPMScheduler(prediction_type=prediction)
    network = diffusers.DiTTransformer2DModel(
        sample_size=28, in_channels=1, patch_size=4, num_layers=4, num_attention_heads=4, attention_head_dim=32,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return network, diffusers.DDIMScheduler(prediction_type=prediction)


def train(network: nn.Module, scheduler, images: Tensor, labels: Tensor, steps: int, batch_size: int) -> None:
    """Ho et al.'s simple loss at uniform steps; afterwards ``network`` holds the averaged weights."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    average = EMAModel(network.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)
    bar = trange(steps)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        picked = torch.randint(0, len(images), (batch_size,))
        x0, noise = images[picked], torch.randn(batch_size, *images.shape[1:])
        k = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,))
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(x0, noise, k) if is_v else noise
        output = network(scheduler.add_noise(x0, noise, k), k, class_labels=labels[picked]).sample
        loss = nn.functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.step(network.parameters())
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    average.copy_to(network.parameters())


def save(kind: str, network: nn.Module, scheduler, folder: Path) -> None:
    """A pipeline folder: ``DDPMPipeline``, or a ``DiTPipeline`` of pixels, which has no VAE."""
    if kind == "ddpm":
        pipeline = diffusers.DDPMPipeline(network, scheduler)
    else:
        pipeline = diffusers.DiTPipeline(network, vae=None, scheduler=scheduler)
    pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=STEPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help=f"training steps ({STEPS})")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="v_prediction")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tune_cpu()
    torch.manual_seed(options.seed)
    network, scheduler = build(options.kind, options.prediction)
    images, labels = as_tensors(load_images(DataConfig("mnist"), channels=1))
    train(network, scheduler, images, labels, options.steps or STEPS[options.kind], options.batch_size)
    save(options.kind, network, scheduler, options.out)
    print(f"pipeline folder in {options.out}")


if __name__ == "__main__":
    main()
