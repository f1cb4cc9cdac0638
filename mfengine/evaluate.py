"""`python -m mfengine.evaluate CHECKPOINT --data FOLDER`: how near samples are to the data they imitate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mfengine import cli
from mfengine.engine.checkpoint import load_model
from mfengine.engine.data import Dataset, LatentSpace, read_means
from mfengine.engine.distributed import world
from mfengine.errors import InputError
from mfengine.method import sample


@dataclass(frozen=True)
class EvaluateArgs:
    """Compare samples of a trained model with its data set: Frechet distance, and the share read as their label.

    Both are taken on latents as the encoder gave them (pixels, for the digits), without another network.
    """

    checkpoint: tyro.conf.Positional[Path]
    """a run folder, one of its checkpoints, or an export (.safetensors)"""
    data: Path
    """the data set the model was trained on"""
    out: Path | None = None
    """where to write the figures; metrics.json in the run folder if not given, nowhere for an export"""
    num: int = 2000
    """samples to draw, their labels spread evenly"""
    seed: int = 0
    """of the noise"""
    batch_size: int = 500
    """samples drawn at a time"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets, (n, d) and (m, d).

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)), in float64 (Heusel et al., arXiv 1706.08500, eq. 6).
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the root is the sum of the roots of the eigenvalues, which are real and not negative.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def draw(
    model: nn.Module, space: LatentSpace, labels: Tensor, steps: int, seed: int, batch_size: int, device: torch.device
) -> np.ndarray:
    """Samples (n, C * H * W) on the scale of the encoder, one per label; each has noise of its own from `seed`."""
    noise = torch.randn(len(labels), *space.shape, generator=torch.Generator().manual_seed(seed))
    batches = zip(noise.split(batch_size), labels.split(batch_size), strict=True)
    latents = torch.cat([sample(model, z.to(device), y.to(device), steps).cpu() for z, y in batches])
    return space.unscale(latents).flatten(1).numpy()


def main(args: Sequence[str]) -> None:
    config = cli.parse(EvaluateArgs, args, "python -m mfengine.evaluate")
    if config.num < 2 or config.batch_size < 1:
        raise InputError("--num must be at least 2 and --batch-size at least 1")
    dataset = Dataset.open(config.data)
    with world(config.device) as here:
        model, space, path = load_model(config.checkpoint)
        dataset.check_model(model.config)
        model.to(here.device)
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise InputError("reading labels needs scikit-learn: pip install 'mfengine[digits]'") from None
        means, real_labels = read_means(dataset)
        real = means.reshape(len(means), -1).astype(np.float64)  # (n, C * H * W)
        spread = real.std()
        reader = LogisticRegression(max_iter=2000).fit(real / spread, real_labels)

        labels = torch.arange(config.num) % space.num_classes
        one = draw(model, space, labels, 1, config.seed, config.batch_size, here.device)
        two = draw(model, space, labels, 2, config.seed, config.batch_size, here.device)
    half = np.random.default_rng(config.seed).permutation(len(real))
    figures = {
        "frechet_1nfe": frechet_distance(one, real),
        "accuracy_1nfe": float((reader.predict(one / spread) == labels.numpy()).mean()),
        "frechet_2nfe": frechet_distance(two, real),
        "frechet_floor": frechet_distance(real[half[::2]], real[half[1::2]]),
        "samples": config.num,
        "checkpoint": path.name,
    }
    for name, value in figures.items():
        print(f"{name:14} {value:.4g}" if isinstance(value, float) else f"{name:14} {value}")
    out = config.out
    if out is None and path.parent.name == "checkpoints":
        out = path.parent.parent / "metrics.json"
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"written to {out}")


if __name__ == "__main__":
    cli.run(main)
