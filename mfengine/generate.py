"""`python -m mfengine.generate CHECKPOINT --steps 1 --out grid.png`: draw samples as one picture or one file each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mfengine import cli
from mfengine.configs import check_at_least, check_seed
from mfengine.data.format import Dataset, iterate_means
from mfengine.data.image_files import ImageWriter, check_new
from mfengine.data.pictures import draw_latents, labelled_grid, write_picture
from mfengine.data.vae import VAE
from mfengine.engine.weights import load_model
from mfengine.errors import InputError
from mfengine.evaluation.samples import SampleSet
from mfengine.files import check_writable
from mfengine.progress import progress
from mfengine.ranks import World, world


@dataclass(frozen=True)
class GenerateArgs:
    """Draw samples from the averaged weights of a trained model, as one picture or as one file per sample."""

    checkpoint: cli.Checkpoint
    """a run folder, one of its checkpoints, or an export (.safetensors)"""
    out: Path = Path("samples.png")
    """NAME.png for one picture, with a column per class and a block of rows per value of --steps; an existing file is
    replaced. A name without a suffix is an empty or new folder for one file per sample, NUMBER-CLASS.png; under
    torchrun, all ranks share the work"""
    steps: tuple[int, ...] = (1,)
    """network evaluations per sample; several values give several blocks of rows in the picture"""
    labels: tuple[str, ...] = ()
    """classes to draw, by number, or by name if the data set has class names; by default the first ten"""
    per_label: int = 10
    """number of samples of each class"""
    data: Path | None = None
    """a data set; the picture then begins with real images of the same classes"""
    conditions: dict[str, float] = field(default_factory=dict)
    """conditions of the model's objective in addition to labels, such as --conditions omega 7.5 t_min 0.4; the others
    default to the model's configuration"""
    seed: int = 0
    """seed of the noise"""
    ema_decay: float | None = None
    """decay of the moving average of the weights to use; by default the run's first"""
    skip_checksums: bool = False
    """do not verify the checksums of checkpoint files when reading; file sizes are still verified"""
    vae: str | None = None
    """VAE that decodes the latents: a folder or hub name that diffusers loads. Without it, the picture shows the first
    three channels of the latents"""
    batch_size: int = 64
    """samples per call of the network"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to compute on; auto takes a GPU if there is one"""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ValueError("steps must be different numbers, each at least 1")
        check_at_least(1, per_label=self.per_label, batch_size=self.batch_size)
        check_seed(self.seed)
        if self.out.suffix not in (".png", ""):
            raise ValueError(f"out {self.out} must end in .png for a picture, or have no suffix for a folder")
        if self.out.suffix == "" and (len(self.steps) > 1 or self.data is not None):
            raise ValueError(f"out {self.out} is a folder: give one value of --steps and omit --data, or name a .png")


def main(args: Sequence[str]) -> None:
    config = cli.parse(GenerateArgs, args, "generate")
    single = config.out.suffix == ""
    if single:
        check_new(config.out)
    elif config.out.is_dir():
        raise InputError(f"--out {config.out} is a folder: name a file in it")
    check_writable(config.out)
    dataset = None if config.data is None else Dataset.open(config.data)
    with world(config.device) as here:
        trained = load_model(config.checkpoint, config.ema_decay, config.skip_checksums)
        model, space, path, objective, class_names = trained
        sampler = objective.sampler(config.conditions)
        labels = tuple(map(trained.label, config.labels or range(min(10, space.num_classes))))
        names = [class_names[label] if class_names else str(label) for label in labels]
        if dataset is not None:
            dataset.check_model(space.shape, space.num_classes)
        decode = VAE(config.vae, here.device).decode if config.vae else draw_latents
        count = len(labels) * config.per_label
        samples = SampleSet(space, count, config.batch_size, config.seed, labels, sampler)
        model.to(here.device)

        def images(steps: int, world: World) -> Iterator[tuple[range, Tensor]]:
            """This rank's share of the samples: their numbers, and images (n, 3, H, W) in [0, 1] on the host."""
            with progress(count, "samples", f"{steps} step(s)", enabled=here.main and count > config.batch_size) as bar:
                for rows, latents, _ in samples.draw(model, steps, world):
                    yield rows, decode(latents, space).cpu()
                    bar.update(len(rows))

        if single:
            _write_files(config.out, count, images(config.steps[0], here), names, here)
        elif here.main:  # rank 0 alone: a picture has few samples
            blocks = {}
            if dataset is not None:
                real = real_latents(dataset, labels, config.per_label)
                blocks["real"] = torch.cat([decode(part.to(here.device), space).cpu() for part in real.split(64)])
            for steps in config.steps:
                name = {1: "one step", 2: "two steps"}.get(steps, f"{steps} steps")
                blocks[name] = torch.cat([part for _, part in images(steps, World(0, 1, here.device))])
            write_picture(labelled_grid(blocks, names), config.out)
    if here.main:
        conditions = {**objective.conditions, **config.conditions}
        taken = "".join(f", {name} {value:g}" for name, value in conditions.items())
        print(f"{config.out}: {count} samples of {path} in {' and '.join(map(str, config.steps))} step(s){taken}")


def _write_files(out: Path, count: int, parts: Iterator[tuple[range, Tensor]], names: list[str], here: World) -> None:
    """Write the samples of all ranks as files; sample i is of the class names[i modulo their number]."""
    safe = [re.sub(r"[^\w.-]+", "-", name) for name in names]
    writer: ImageWriter | None = None
    for rows, part in parts:
        writer = writer or ImageWriter(out, count, part.shape[2], part.shape[3], here)
        writer.write(rows, (part * 255).round().to(torch.uint8), [safe[i % len(safe)] for i in rows])
    assert writer is not None
    writer.finish()


def real_latents(dataset: Dataset, labels: Sequence[int], rows: int) -> Tensor:
    """Latents of the data, row by row, with a column for each label: (n, C, H, W) float32.

    Args:
        dataset: provides the latents; the first samples of each class are taken.
        labels: classes of the columns.
        rows: maximum number of rows; fewer if a class has fewer samples.

    Raises:
        InputError: a class has no samples.
    """
    found: dict[int, list[Tensor]] = {label: [] for label in labels}
    for _, means, classes in iterate_means(dataset, batch=256):
        for mean, label in zip(means, classes.tolist(), strict=True):
            if len(found.get(label, range(rows))) < rows:
                found[label].append(torch.from_numpy(mean))
        if all(len(each) == rows for each in found.values()):
            break
    missing = [label for label, each in found.items() if not each]
    if missing:
        raise InputError(f"{dataset.folder} has no samples of class {missing[0]}")
    fewest = min(map(len, found.values()))
    chosen = torch.stack([found[label][row] for row in range(fewest) for label in labels])
    scale, bias = dataset.space.factors(chosen.device)
    return (chosen - bias) * scale


if __name__ == "__main__":
    cli.run(main)
