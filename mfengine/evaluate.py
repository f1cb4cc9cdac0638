"""`python -m mfengine.evaluate CHECKPOINT --data FOLDER --reference STATS_OR_FOLDER`: how good samples are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mfengine import cli
from mfengine.configs import check_at_least, check_seed
from mfengine.data.format import Dataset
from mfengine.data.image_files import check_new
from mfengine.data.pictures import draw_latents
from mfengine.data.vae import VAE
from mfengine.engine.checkpoint import load_model
from mfengine.errors import InputError
from mfengine.evaluation.fidelity import SPLITS, Reference
from mfengine.evaluation.metrics import Decode, evaluate, write_metrics
from mfengine.evaluation.samples import SampleSet
from mfengine.files import check_file
from mfengine.ranks import world


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure samples of a trained model. Under torchrun, on all of its processes; the samples are the same.

    Against its data set: the Frechet distance of latents as the encoder gave them, without another network, and for
    images of few pixels the share read as their label. Against reference images: FID, Inception Score, precision and
    recall.
    """

    checkpoint: cli.Checkpoint
    """a run folder, one of its checkpoints, or an export (.safetensors)"""
    steps: tuple[int, ...] = (1, 2)
    """network evaluations per sample; all metrics are taken for each value"""
    # torchrun on Python 3.11 stumbles over --num, which is how options of its own begin.
    num: Annotated[int, tyro.conf.arg(aliases=("--num-samples",))] = 2000
    """samples to draw; 50000 is usual for FID. Under torchrun write --num-samples"""
    labels: Literal["balanced", "random"] = "balanced"
    """of the samples: in turn, so that classes are equally many, or drawn at random"""
    conditions: dict[str, float] = field(default_factory=dict)
    """what the model's objective takes beside labels, as pairs NAME VALUE; its own values if not given"""
    seed: int = 0
    """noise and label of a sample derive from it and the sample's number"""
    ema_decay: float | None = None
    """which moving average; the run's first if not given"""
    skip_checksums: bool = False
    """read a checkpoint without comparing the checksums of its files; their sizes are compared anyway"""
    batch_size: int = 64
    """samples per call of the network, on one rank"""

    data: Path | None = None
    """the data set the model was trained on"""
    reference: Path | None = None
    """a folder of images, or an .npz with mu and sigma of Inception features, images (arr_0), or both, as ADM's"""
    inception: Path | None = None
    """a file with the weights of torch-fidelity's Inception; torch-fidelity fetches them if not given"""
    vae: str | None = None
    """decode latents with this VAE: a folder or hub name that diffusers loads"""
    save: Path | None = None
    """write the images, of the first of --steps: NAME.npz as ADM's evaluation takes it, or a folder for PNG files"""
    out: Path | None = None
    """where to write the metrics; metrics.json in the run folder if not given, nowhere for an export. Those of the same
    samples that are there already stay"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""

    def __post_init__(self) -> None:
        check_at_least(2, num=self.num)
        check_at_least(1, batch_size=self.batch_size)
        check_seed(self.seed)
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ValueError("steps must be different numbers, each at least 1")
        if self.data is None and self.reference is None and self.save is None:
            raise ValueError(
                "nothing to do: give --data or --reference to measure against, or --save to keep the images"
            )
        if self.reference is not None and self.num < SPLITS:
            raise ValueError(
                f"num must be at least {SPLITS} with --reference: Inception Score splits the samples in so many"
            )
        if self.inception is not None and self.reference is None:
            raise ValueError("inception needs --reference")
        if self.vae is not None and self.reference is None and self.save is None:
            raise ValueError("vae needs --reference or --save: nothing else is measured on images")


def main(args: Sequence[str]) -> None:
    config = cli.parse(EvaluateArgs, args, "python -m mfengine.evaluate")
    if config.save is not None:
        check_new(config.save)
    if config.out is not None:
        check_file(config.out)
    dataset = Dataset.open(config.data) if config.data is not None else None
    reference = Reference(config.reference) if config.reference is not None else None
    with world(config.device) as here:
        model, space, path, objective = load_model(config.checkpoint, config.ema_decay, config.skip_checksums)
        sampler = objective.sampler(config.conditions)
        out = config.out
        if out is None and (dataset is not None or reference is not None) and path.parent.name == "checkpoints":
            out = path.parent.parent / "metrics.json"
        if out is not None:
            check_file(out)
        if dataset is not None:
            dataset.check_model(model.config.latent_shape, model.num_classes)
        decode: Decode | None = None
        if config.reference is not None or config.save is not None:
            if config.vae is not None:
                decode = VAE(config.vae, here.device).decode
            elif space.pixel_range is not None:
                decode = draw_latents
            else:
                raise InputError(f"latents of {space.shape} become images by a VAE: give it with --vae")
        metrics = evaluate(
            model.to(here.device),
            SampleSet(space, config.num, config.batch_size, config.seed, config.labels, sampler),
            config.steps,
            here,
            dataset=dataset,
            reference=reference,
            inception=config.inception,
            decode=decode,
            save=config.save,
        )
    if not here.main:
        return
    origin = {
        **{name: getattr(config, name) for name in ("seed", "labels", "batch_size", "ema_decay")},
        **({"conditions": config.conditions} if config.conditions else {}),
        "samples": config.num,
        "checkpoint": str(path.resolve()),
        **{name: str(part.resolve()) for name in ("data", "reference") if (part := getattr(config, name)) is not None},
        **({"vae": config.vae} if config.vae is not None else {}),
    }
    width = max(len(name) for name in (*metrics, *origin))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.4g}")
    for name, value in origin.items():
        if value is not None:
            print(f"{name:{width}} {value}")
    if out is not None:
        write_metrics(metrics, origin, out)
        print(f"written to {out}")


if __name__ == "__main__":
    cli.run(main)
