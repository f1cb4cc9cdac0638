"""`python -m mfengine.prepare COMMAND ...`, or the same under `torchrun`: write data sets of latents."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch

from mfengine import cli
from mfengine.configs import check_at_least, check_seed, choose, read_json
from mfengine.data.check import Report, verify
from mfengine.data.format import DESCRIPTION, Dataset, LatentSpace
from mfengine.data.images import EncodedImages
from mfengine.data.importers import ImportedSamples
from mfengine.data.normalisation import Normalisation, describe, measured, published
from mfengine.data.sources import open_source
from mfengine.data.vae import VAE, Precision
from mfengine.data.writer import ArraySamples, check_settings, check_vacant, write_dataset
from mfengine.errors import InputError
from mfengine.files import write_atomic, writing
from mfengine.ranks import world


@dataclass(frozen=True)
class DigitsArgs:
    """Write the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, as one-channel latents without variance."""

    out: cli.Out
    """an empty or new folder"""
    seed: int = 0
    """seed of the order in which samples are written"""

    def __post_init__(self) -> None:
        check_seed(self.seed)


def digits(args: DigitsArgs) -> None:
    """Write the digits as moments (1, 2, 1, 8, 8): pixels from 0 to 16 and a standard deviation of 0."""
    check_vacant(args.out)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install 'mfengine[digits]'") from None
    data = load_digits()
    pixels = data.images[:, None]  # (1797, 1, 8, 8)
    moments = np.stack([pixels, np.zeros_like(pixels)], axis=1)[:, None]
    # Pixels, from 0 (black) to 16, have mean 4.9 and standard deviation 6.0.
    space = LatentSpace(shape=(1, 8, 8), num_classes=10, scale=1 / 6, bias=5.0, pixel_range=(0.0, 16.0))
    report(write_dataset(args.out, ArraySamples("digits", space, moments, data.target), seed=args.seed))


@dataclass(frozen=True)
class ImagesArgs:
    """Crop images of any size to squares, as ADM does, and encode them with a VAE. Run again, it resumes."""

    src: cli.Source
    """a folder with a subfolder per class, a WebDataset tar or a folder of tars, or an LMDB; see docs/data.md"""
    out: cli.Out
    """an empty or new folder"""
    vae: str
    """the VAE: a folder or hub name that diffusers loads as AutoencoderKL"""
    size: int = 256
    """side of the squares in pixels; smaller images are enlarged"""
    precision: Precision = "float32"
    """precision of the VAE's convolutions and matrix products"""
    normalisation: Normalisation | None = None
    """normalisation of the latents: the published mean and standard deviation of each channel (sd-vae-ft-mse, which iMF
    expects), the factor 0.18215 (sd, which MeanFlow expects), or the measured ones; by default the VAE's own
    scaling_factor"""
    batch_size: int = 64
    """images that each rank encodes at a time"""
    seed: int = 0
    """seed of the order in which samples are written"""
    shard_samples: int | None = None
    """samples per shard; by default as many as fit in about 1 GB"""
    max_broken: float = 0.001
    """share of images that may be unreadable; they are left out and listed in broken.jsonl"""
    num_classes: int | None = None
    """number of classes, for example of a subset without the last class; by default the highest label plus 1"""
    one_class: bool = False
    """treat all images as one class, whatever their folders"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to compute on; auto takes a GPU if there is one"""

    def __post_init__(self) -> None:
        check_at_least(1, size=self.size, batch_size=self.batch_size, num_classes=self.num_classes)
        check_settings(self.seed, self.max_broken, self.shard_samples)


def images(args: ImagesArgs) -> None:
    """Encode images, on every rank."""
    with world(args.device, timeout=timedelta(hours=1)) as here:  # one rank lists the source while the others wait
        here.on_main(lambda: check_vacant(args.out, args.src))
        torch.backends.cudnn.allow_tf32 = False  # else convolutions round float32 to 10 bits of mantissa
        vae = VAE(args.vae, here.device, args.precision)
        vae.space(args.size, num_classes=1)  # checks the size before the source is listed, which may take long
        source = here.on_main(lambda: open_source(args.src, args.one_class))
        samples = EncodedImages(args.out.absolute().name, source, vae, args.size, args.batch_size, args.num_classes)
        if here.main:
            classes = samples.space.num_classes
            print(f"{args.src}, {source.kind}: {len(samples)} images in {classes} class(es)", file=sys.stderr)
        dataset = write_dataset(
            args.out,
            samples,
            here,
            seed=args.seed,
            shard_samples=args.shard_samples,
            max_broken=args.max_broken,
            normalisation=args.normalisation,
        )
        if here.main:
            report(dataset)


def report(dataset: Dataset) -> None:
    """Print a line about a new data set."""
    left_out = f", {dataset.broken} broken ones left out" if dataset.broken else ""
    print(f"{dataset.folder}: {dataset.count} samples in {len(dataset.shards)} shard(s){left_out}")


@dataclass(frozen=True)
class ImportArgs:
    """Import latents that other projects have prepared: LMDB, .pt or .npy files. The format is detected.

    The source is an LMDB of pickled moments, a folder of .pt files with image and label, or a folder or zip of .npy
    files with a dataset.json; see docs/data.md. Pickles are never executed.
    """

    source: cli.Source
    """a folder, LMDB or zip, which is only read"""
    out: cli.Out
    """an empty or new folder"""
    num_classes: int | None = None
    """number of classes; for .npy files by default the highest label plus 1"""
    normalisation: Normalisation | None = None
    """normalisation of the latents: the published mean and standard deviation of each channel (sd-vae-ft-mse, which iMF
    expects), the factor 0.18215 (sd, which MeanFlow expects), or the measured ones; by default --scale and --bias"""
    scale: float | None = None
    """factor that normalises latents: (mean + std * noise - bias) * scale; by default 0.18215 for four channels, as in
    Stable Diffusion"""
    bias: float = 0.0
    """offset that normalises latents: (mean + std * noise - bias) * scale"""
    seed: int = 0
    """seed of the order in which samples are written"""
    max_broken: float = 0.0
    """share of samples that may be unreadable; they are left out and listed in broken.jsonl"""

    def __post_init__(self) -> None:
        check_at_least(1, num_classes=self.num_classes)
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale must be positive, not {self.scale}")
        if self.normalisation is not None and (self.scale is not None or self.bias):
            raise ValueError(f"normalisation {self.normalisation} sets scale and bias: omit --scale and --bias")
        check_settings(self.seed, self.max_broken)


def import_latents(args: ImportArgs) -> None:
    """Import a source of latents; under torchrun, all ranks share the work."""
    with world("cpu", timeout=timedelta(hours=1)) as here:  # some ranks may list the source more slowly than others
        here.on_main(lambda: check_vacant(args.out, args.source))
        scale = args.scale if args.normalisation is None else 1.0
        samples = ImportedSamples(args.source, args.num_classes, scale, args.bias)
        dataset = write_dataset(
            args.out,
            samples,
            here,
            seed=args.seed,
            max_broken=args.max_broken,
            normalisation=args.normalisation,
        )
        if here.main:
            report(dataset)


@dataclass(frozen=True)
class CheckArgs:
    """Check a data set completely: checksums, indices, every sample, statistics."""

    folder: cli.Data
    """a data set, which is only read"""


def check(args: CheckArgs) -> None:
    """Print one line per problem of a data set, or a summary if there is none."""
    found = verify(args.folder)
    for line in found.warnings:
        print(f"warning: {line}", file=sys.stderr)
    check_whole(found)
    counts, dataset = found.class_counts, found.dataset
    mean, std = (", ".join(f"{x:.3g}" for x in values) for values in (found.mean, found.std))
    print(
        f"{args.folder} is intact: {dataset.count} samples in {len(dataset.shards)} shard(s), {dataset.flips} flip(s) "
        f"of {dataset.space.shape}, {len(counts)} classes of {min(counts.values())} to {max(counts.values())}; "
        f"normalised by {describe(dataset.space)}, latents have mean {mean} and standard deviation {std} by channel"
    )


def check_whole(found: Report) -> None:
    """Print a line for each problem of a data set; InputError if there is any."""
    for line in found.problems:
        print(f"problem: {line}", file=sys.stderr)
    if found.problems:
        raise InputError(f"{found.dataset.folder} is damaged: {len(found.problems)} problem(s)")


@dataclass(frozen=True)
class NormaliseArgs:
    """Change how latents are normalised: scale and bias in dataset.json. The samples themselves stay unchanged."""

    folder: cli.Data
    """a data set, whose dataset.json is rewritten"""
    to: Normalisation
    """new normalisation: the published mean and standard deviation of each channel (sd-vae-ft-mse), the factor 0.18215
    (sd), or the measured ones, which takes a pass over the data set"""


def normalise(args: NormaliseArgs) -> None:
    """Rewrite scale and bias in dataset.json."""
    dataset = Dataset.read(args.folder)
    if args.to == "measured":
        found = verify(args.folder)
        check_whole(found)
        space = measured(dataset.space, found.sums)
    else:
        space = published(dataset.space, args.to)
    path = args.folder / DESCRIPTION
    values = read_json(path)
    values["space"] |= {"scale": space.scale, "bias": space.bias}
    with writing(path):
        write_atomic(path, json.dumps(values, indent=1) + "\n")
    print(
        f"{path}: latents are now normalised by {describe(space)}, before by {describe(dataset.space)}. Earlier runs "
        "on this data cannot be resumed now: change it back for them, or start new ones"
    )


COMMANDS: dict[str, tuple[str, type[Any], Callable[[Any], None]]] = {
    # name: (operands as the list of commands shows them, arguments, function)
    "digits": ("OUT", DigitsArgs, digits),
    "images": ("SRC OUT", ImagesArgs, images),
    "import": ("SRC OUT", ImportArgs, import_latents),
    "check": ("DATA", CheckArgs, check),
    "normalise": ("DATA", NormaliseArgs, normalise),
}


def main(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        prog = cli.program("prepare")
        print(f"usage: {prog} COMMAND ...\n\nWrite data sets of latents, check them, or change their normalisation.\n")
        for name, (operands, arguments, _) in COMMANDS.items():
            print(f"  {name} {operands:{16 - len(name)}} {(arguments.__doc__ or '').splitlines()[0]}")
        print(f"\n`{prog} COMMAND --help` lists a command's options.")
        if args:
            raise SystemExit(0)
        raise InputError(f"no command is given: choose one of {', '.join(COMMANDS)}")
    name = choose("command", args[0], COMMANDS)
    _, arguments, action = COMMANDS[name]
    action(cli.parse(arguments, args[1:], f"prepare {name}"))


if __name__ == "__main__":
    cli.run(main)
