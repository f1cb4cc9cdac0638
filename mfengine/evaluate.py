"""`python -m mfengine.evaluate CHECKPOINT --data FOLDER --reference STATS_OR_FOLDER`: how good samples are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mfengine import cli
from mfengine.configs import check_at_least, check_seed, choose
from mfengine.data.format import Dataset
from mfengine.data.image_files import check_new
from mfengine.data.pictures import draw_latents
from mfengine.data.vae import VAE
from mfengine.engine.checkpoint import read_description
from mfengine.engine.weights import Trained, check_decay, load_model
from mfengine.errors import InputError
from mfengine.evaluation.fidelity import SPLITS, Reference
from mfengine.evaluation.metrics import Decode, Evaluation, write_metrics
from mfengine.evaluation.samples import SampleSet
from mfengine.evaluation.sweep import (
    Axes,
    best_first,
    check_matplotlib,
    heat_map,
    key,
    parse_axes,
    read_rows,
    table,
    write_rows,
)
from mfengine.files import check_file
from mfengine.ranks import World, world


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
    """network evaluations per sample; all metrics are taken for each value, in a sweep for the first one"""
    # torchrun on Python 3.11 stumbles over --num, which is how options of its own begin.
    num: Annotated[int, tyro.conf.arg(aliases=("--num-samples",))] = 2000
    """samples to draw; 50000 is usual for FID. Under torchrun write --num-samples"""
    labels: Literal["balanced", "random"] = "balanced"
    """of the samples: in turn, so that classes are equally many, or drawn at random"""
    conditions: dict[str, float] = field(default_factory=dict)
    """what the model's objective takes beside labels, as in --conditions omega 7.5 t_min 0.4; those that are not given
    have the values of its configuration"""
    seed: int = 0
    """noise and label of a sample derive from it and the sample's number"""
    ema_decay: float | None = None
    """which moving average; the run's first if not given"""
    skip_checksums: bool = False
    """read a checkpoint without comparing the checksums of its files; their sizes are compared anyway"""
    batch_size: int = 64
    """samples per call of the network, on one rank"""

    sweep: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE,VALUE ...")] = ()
    """measure all combinations of values of conditions, steps and ema_decay, such as omega=1,2,4 steps=1,2. A table has
    the best one first, by FID or else by Frechet distance, and a heat map shows all"""

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
    """where to write the metrics; metrics.json, or sweep.json, in the run folder if not given, nowhere for an export.
    Those of the same samples that are there already stay, and a sweep goes on after them"""
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
        if self.sweep and (self.save is not None or (self.data is None and self.reference is None)):
            raise ValueError("sweep needs --data or --reference to measure against, and writes no images for --save")
        if self.sweep and self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"out {self.out} must end in .json with --sweep: its picture ends in .png")
        if self.vae is not None and self.reference is None and self.save is None:
            raise ValueError("vae needs --reference or --save: nothing else is measured on images")


def main(args: Sequence[str]) -> None:
    config = cli.parse(EvaluateArgs, args, "evaluate")
    axes = parse_axes(config.sweep)
    if config.save is not None:
        check_new(config.save)
    if config.out is not None:
        check_file(config.out)
    dataset = Dataset.open(config.data) if config.data is not None else None
    reference = Reference(config.reference) if config.reference is not None else None
    with world(config.device) as here:
        ema_decay = axes["ema_decay"][0] if "ema_decay" in axes else config.ema_decay
        trained = load_model(config.checkpoint, ema_decay, config.skip_checksums)
        model, space, path, objective, _ = trained
        if axes:
            check_axes(axes, config, trained)
        else:
            sampler = objective.sampler(config.conditions)
        out = config.out
        if out is None and (dataset is not None or reference is not None) and path.parent.name == "checkpoints":
            out = path.parent.parent / ("sweep.json" if axes else "metrics.json")
        if axes and out is None:
            raise InputError(f"{path} is not in a run folder: say with --out where to write the rows of --sweep")
        if out is not None:
            check_file(out)
        if out is not None and axes:
            check_file(out.with_suffix(".png"))
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
        begin = partial(
            Evaluation,
            SampleSet(space, config.num, config.batch_size, config.seed, config.labels),
            here,
            dataset=dataset,
            reference=reference,
            inception=config.inception,
            decode=decode,
            save=config.save,
        )
        conditions = {**objective.conditions, **config.conditions}
        origin = {
            **{name: getattr(config, name) for name in ("seed", "labels", "batch_size", "ema_decay")},
            **({"conditions": conditions} if conditions else {}),
            "samples": config.num,
            "checkpoint": str(path.resolve()),
            **{k: str(part.resolve()) for k in ("data", "reference") if (part := getattr(config, k)) is not None},
            **({"vae": config.vae} if config.vae is not None else {}),
        }
        if axes:
            assert out is not None
            sweep(config, axes, origin, out, trained, begin, here)
            return
        evaluation = begin()
        metrics: dict[str, float] = {}
        model.to(here.device)
        for steps in config.steps if dataset is not None or reference is not None else config.steps[:1]:
            found = evaluation.measure(model, sampler, steps, f"{steps} step(s)")
            metrics |= {f"{name}_{steps}nfe": value for name, value in found.items()}
        metrics |= evaluation.floor
    if not here.main:
        return
    width = max(len(name) for name in (*metrics, *origin))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:.4g}")
    for name, value in origin.items():
        if value is not None:
            print(f"{name:{width}} {value}")
    if out is not None:
        write_metrics(metrics, origin, out)
        print(f"written to {out}")
    if "frechet_floor" in metrics:
        reached = ", ".join(f"{metrics[f'frechet_{steps}nfe']:.1f} in {steps} step(s)" for steps in config.steps)
        print(
            f"Frechet distance {reached}; two random halves of the real data are {metrics['frechet_floor']:.1f} apart"
        )


# ----------------------------------------------------------------------------
# Sweeps.


def check_axes(axes: Axes, config: EvaluateArgs, trained: Trained) -> None:
    """InputError, before anything is drawn, for settings that there are not, or that an option says already."""
    check_matplotlib()
    for name in config.conditions:  # whose values fit some combinations, perhaps
        choose("condition", name, trained.objective.conditions)
    for name in axes:
        choose("setting to sweep", name, (*trained.objective.conditions, "steps", "ema_decay"))
        if name in config.conditions or (name == "ema_decay" and config.ema_decay is not None):
            raise InputError(f"{name} is in --sweep: omit it elsewhere")
    for decay in axes.get("ema_decay", ()):  # an export was refused when it was to be read
        check_decay(trained.path, read_description(trained.path), decay)


def sweep(
    config: EvaluateArgs,
    axes: Axes,
    origin: dict[str, Any],
    out: Path,
    trained: Trained,
    begin: Callable[[], Evaluation],
    here: World,
) -> None:
    """Measure all combinations, those that `out` has not yet, and show them; every rank calls it.

    Args:
        config: the command line.
        axes: what is combined.
        origin: what all rows have in common.
        out: the file of rows; the picture has its name and .png.
        trained: the model with the first of the moving averages.
        begin: reads what samples are compared with.
        here: the ranks that share the work.
    """
    rows, left_out = [], []
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        conditions = {name: chosen.get(name, value) for name, value in origin.get("conditions", {}).items()}
        row = {**origin, "conditions": conditions, "steps": config.steps[0]}
        row |= {name: chosen[name] for name in ("steps", "ema_decay") if name in chosen}
        try:
            trained.objective.sampler(conditions)
            rows.append(key(row))
        except InputError as error:
            left_out.append(f"{', '.join(f'{name} {value:g}' for name, value in chosen.items())}: {error}")
    if not rows:
        raise InputError(f"no combination of --sweep can be drawn: {left_out[0]}")
    if left_out and here.main:
        print(f"note: {len(left_out)} combination(s) left out, as {left_out[0]}", file=sys.stderr)

    metric = "frechet" if config.reference is None else "fid"
    there = here.on_main(lambda: read_rows(out))
    found = [row for row in there if key(row) in rows and metric in row]
    others = [row for row in there if row not in found]
    measured = [key(row) for row in found]
    pending = [row for row in rows if row not in measured]
    decays = axes.get("ema_decay", (config.ema_decay,))
    pending.sort(key=lambda row: decays.index(row["ema_decay"]))  # so that each one's weights are read once
    decay = decays[0]
    evaluation = begin() if pending else None
    for number, row in enumerate(pending, start=len(found) + 1):
        assert evaluation is not None
        if row["ema_decay"] != decay:
            decay = row["ema_decay"]
            trained = load_model(trained.path, decay, config.skip_checksums)
        model, sampler = trained.model.to(here.device), trained.objective.sampler(row["conditions"])
        metrics = evaluation.measure(model, sampler, row["steps"], f"row {number} of {len(rows)}")
        found = best_first([*found, {**row, **metrics, **evaluation.floor}], metric) if here.main else found
        here.on_main(lambda: write_rows([*found, *others], out))  # noqa: B023
    if here.main:
        print(table(best_first(found, metric), axes))
        heat_map(found, axes, metric, out.with_suffix(".png"))
        print(f"written to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main)
