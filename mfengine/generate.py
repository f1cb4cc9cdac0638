"""`python -m mfengine.generate CHECKPOINT --steps 1 --out grid.png`: draw a grid of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from mfengine import cli
from mfengine.configs import check_at_least, check_seed
from mfengine.data.pictures import draw_latents, image_grid, save_picture
from mfengine.data.vae import VAE
from mfengine.engine.weights import load_model
from mfengine.errors import InputError
from mfengine.files import check_writable
from mfengine.ranks import world


@dataclass(frozen=True)
class SampleArgs:
    """Draw samples of a trained model, with its averaged weights, as one picture."""

    checkpoint: cli.Checkpoint
    """a run folder, one of its checkpoints, or an export (.safetensors)"""
    out: Path = Path("samples.png")
    """the picture; an existing one is replaced"""
    steps: int = 1
    """network evaluations per sample"""
    labels: tuple[int, ...] = ()
    """classes to draw, one row each; the first ten if not given"""
    per_label: int = 10
    """samples of each class"""
    conditions: dict[str, float] = field(default_factory=dict)
    """what the model's objective takes beside labels, as in --conditions omega 7.5 t_min 0.4; those that are not given
    have the values of its configuration"""
    seed: int = 0
    """of the noise"""
    ema_decay: float | None = None
    """which moving average; the run's first if not given"""
    skip_checksums: bool = False
    """read a checkpoint without comparing the checksums of its files; their sizes are compared anyway"""
    vae: str | None = None
    """decode latents with this VAE: a folder or hub name that diffusers loads. Without it they are drawn as they are"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, per_label=self.per_label)
        check_seed(self.seed)


def main(args: Sequence[str]) -> None:
    config = cli.parse(SampleArgs, args, "python -m mfengine.generate")
    if config.out.suffix != ".png":
        raise InputError(f"--out {config.out} must end in .png")
    if config.out.is_dir():
        raise InputError(f"--out {config.out} is a folder: name a file in it")
    check_writable(config.out)
    with world(config.device) as here:
        model, space, path, objective = load_model(config.checkpoint, config.ema_decay, config.skip_checksums)
        sampler = objective.sampler(config.conditions)
        classes = config.labels or tuple(range(min(10, space.num_classes)))
        for label in classes:
            if not 0 <= label < space.num_classes:
                raise InputError(f"there is no label {label}; the model has 0 to {space.num_classes - 1}")
        decode = VAE(config.vae, here.device).decode if config.vae else draw_latents
        labels = torch.tensor(classes).repeat_interleave(config.per_label)
        noise = torch.randn(len(labels), *space.shape, generator=torch.Generator().manual_seed(config.seed))
        latents = sampler(model.to(here.device), noise.to(here.device), labels.to(here.device), config.steps)
        save_picture(image_grid(decode(latents, space), columns=config.per_label), config.out)
    taken = "".join(f", {name} {value:g}" for name, value in {**objective.conditions, **config.conditions}.items())
    print(f"{config.out}: {len(labels)} samples of {path} in {config.steps} step(s){taken}")


if __name__ == "__main__":
    cli.run(main)
