"""Improved MeanFlow takes the guidance weight omega as an input: one model draws a row of digits for each omega.

python -m mfengine.prepare digits data/digits    # once; needs mfengine[digits]
python -m mfengine.train digits-imf              # two to four minutes on two CPU cores
    python examples/imf_guidance.py [RUN]            # default RUN: runs/digits-imf; writes imf_guidance.png

`python -m mfengine.evaluate RUN --data data/digits --sweep omega=1,1.5,2` sweeps such conditions for any model.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits

import mfengine
from mfengine import cli
from mfengine.data.pictures import labelled_grid, write_picture
from mfengine.evaluation.frechet import Moments, frechet_distance

OMEGAS = (1, 1.25, 1.5, 1.75, 2)
SAMPLES = 2000


def gaussian(pixels):
    """The Gaussian fitted to images (B, 64)."""
    moments = Moments(64, torch.device("cpu"))
    moments.add(pixels)
    return moments.fit()


def main(args):
    digits = mfengine.load(args[0] if args else "runs/digits-imf", device="cpu")
    real = gaussian(torch.tensor(load_digits().data))
    labels = torch.arange(10).repeat(SAMPLES // 10)
    blocks = {}
    for omega in OMEGAS:
        latents = digits.sample(labels, steps=1, omega=omega, t_min=0.2, t_max=0.8)  # the same noise for every omega
        distance = frechet_distance(real, gaussian(digits.space.unscale(latents).flatten(1)))
        print(f"omega {omega:g}: Frechet distance of {SAMPLES:,} one-step samples from the data {distance:.1f}")
        blocks[f"omega {omega:g}"] = digits.images(latents[:20])
    write_picture(labelled_grid(blocks, [str(label) for label in range(10)]), Path("imf_guidance.png"))


if __name__ == "__main__":
    cli.run(main)
