"""Improved MeanFlow is told how strongly to guide when it draws: one model, and a row of digits for each weight omega.

python -m mfengine.prepare digits data/digits    # once; needs mfengine[digits]
python -m mfengine.train digits-imf              # about two minutes on two CPU cores
python examples/imf_guidance.py [RUN]            # runs/digits-imf if none is given; writes imf_guidance.png

`python -m mfengine.evaluate RUN --data data/digits --sweep omega=1,1.5,2` sweeps any conditions, of any model.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from mfengine import cli
from mfengine.data.pictures import draw_latents, image_grid, save_picture
from mfengine.engine.checkpoint import load_model
from mfengine.evaluation.frechet import Moments, frechet_distance

OMEGAS = (1, 1.25, 1.5, 1.75, 2)
SAMPLES, SHOWN = 2000, 20


def gaussian(pixels):
    """The Gaussian fitted to images (B, 64)."""
    moments = Moments(64, torch.device("cpu"))
    moments.add(pixels)
    return moments.fit()


def main(args):
    model, space, path, method = load_model(Path(args[0] if args else "runs/digits-imf"))
    real = gaussian(torch.tensor(load_digits().data))
    noise = torch.randn(SAMPLES, *space.shape, generator=torch.manual_seed(0))
    labels = torch.arange(10).repeat(SAMPLES // 10)
    rows = []
    for omega in OMEGAS:
        sampler = method.sampler({"omega": omega, "t_min": 0.2, "t_max": 0.8})
        latents = sampler(model, noise, labels, 1)  # one evaluation of the network
        distance = frechet_distance(real, gaussian(space.unscale(latents).flatten(1)))
        print(f"omega {omega:g}: Frechet distance {distance:.1f} of {SAMPLES:,} samples from the data")
        rows.append(latents[:SHOWN])
    save_picture(image_grid(draw_latents(torch.cat(rows), space), columns=SHOWN), Path("imf_guidance.png"))
    print(f"imf_guidance.png: a row for each omega, drawn by {path} from the same noise")


if __name__ == "__main__":
    cli.run(main)
