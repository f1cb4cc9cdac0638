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
    """The 1,797 real 8 x 8 images that scikit-learn carries, as one-channel latents without variance."""

    out: cli.Out
    """an empty or new folder"""
    seed: int = 0
    """of the order in which samples are written"""

    def __post_init__(self) -> None:
        check_seed(self.seed)


def digits(args: DigitsArgs) -> None:
    """Write the digits: moments (1, 2, 1, 8, 8), pixels 0 to 16 and a standard deviation of 0."""
    check_vacant(args.out)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install 'mfengine[digits]'") from None
    data = load_digits()
    pixels = data.images[:, None]  # (1797, 1, 8, 8)
    moments = np.stack([pixels, np.zeros_like(pixels)], axis=1)[:, None]
    # Pixels from 0, black, to 16 have mean 4.9 and standard deviation 6.0.
    space = LatentSpace(shape=(1, 8, 8), num_classes=10, scale=1 / 6, bias=5.0, pixel_range=(0.0, 16.0))
    report(write_dataset(args.out, ArraySamples("digits", space, moments, data.target), seed=args.seed))


@dataclass(frozen=True)
class ImagesArgs:
    """Images of any sizes, cropped to squares as ADM does and encoded by a VAE. Goes on where it was killed."""

    src: cli.Source
    """a folder with a folder per class, WebDataset tars (one, or a folder of them), or an LMDB: see docs/data.md"""
    out: cli.Out
    """an empty or new folder"""
    vae: str
    """a folder or hub name that diffusers loads as AutoencoderKL"""
    size: int = 256
    """side of the squares, in pixels; smaller images are enlarged"""
    precision: Precision = "float32"
    """of the VAE's convolutions and matrix products"""
    normalisation: Normalisation | None = None
    """of latents: by the VAE's published mean and standard deviation of each channel (sd-vae-ft-mse, as iMF expects),
    by 0.18215 (sd, as MeanFlow expects), or by those measured; by the VAE's own scaling_factor if not given"""
    batch_size: int = 64
    """images encoded at a time by each rank"""
    seed: int = 0
    """of the order in which samples are written"""
    shard_samples: int | None = None
    """samples per shard; as many as make about 1 GB if not given"""
    max_broken: float = 0.001
    """the share of images that may be unreadable: they are listed and left out"""
    num_classes: int | None = None
    """labels are 0 to this less 1, for a subset without the last class, say; the highest label says it if not given"""
    one_class: bool = False
    """all images are of one class, in whatever folders they lie"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""

    def __post_init__(self) -> None:
        check_at_least(1, size=self.size, batch_size=self.batch_size, num_classes=self.num_classes)
        check_settings(self.seed, self.max_broken, self.shard_samples)


def images(args: ImagesArgs) -> None:
    """Encode images, on every rank."""
    with world(args.device, timeout=timedelta(hours=1)) as here:  # one rank lists the source, which may take long
        here.on_main(lambda: check_vacant(args.out, args.src))
        torch.backends.cudnn.allow_tf32 = False  # PyTorch lets convolutions round float32 to 10 bits of mantissa
        vae = VAE(args.vae, here.device, args.precision)
        vae.space(args.size, num_classes=1)  # refuses a size before the source is listed, which may take long
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
    """Latents that others have prepared: LMDB, .pt or .npy files, found by looking.

    An LMDB of pickled moments, .pt files with image and label, or a folder or zip of .npy with a dataset.json, as
    docs/data.md describes them. Pickles are never executed.
    """

    source: cli.Source
    """folder, LMDB or zip; nothing is written to it"""
    out: cli.Out
    """an empty or new folder"""
    num_classes: int | None = None
    """labels are 0 to this less 1; for .npy files the highest label says it if not given"""
    normalisation: Normalisation | None = None
    """of latents: by the VAE's published mean and standard deviation of each channel (sd-vae-ft-mse, as iMF expects),
    by 0.18215 (sd, as MeanFlow expects), or by those measured; by scale and bias if not given"""
    scale: float | None = None
    """latents are (mean + std normal - bias) scale; for four channels 0.18215, as Stable Diffusion's, if not given"""
    bias: float = 0.0
    """see scale"""
    seed: int = 0
    """of the order in which samples are written"""
    max_broken: float = 0.0
    """share of samples that may be unreadable: those are left out and listed in broken.jsonl"""

    def __post_init__(self) -> None:
        check_at_least(1, num_classes=self.num_classes)
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale must be positive, not {self.scale}")
        if self.normalisation is not None and (self.scale is not None or self.bias):
            raise ValueError(f"normalisation {self.normalisation} says scale and bias: omit --scale and --bias")
        check_settings(self.seed, self.max_broken)


def import_latents(args: ImportArgs) -> None:
    """Import a source of latents; under torchrun, all ranks share the work."""
    with world("cpu", timeout=timedelta(hours=1)) as here:  # listing a source may take one rank longer than another
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
    """Read a data set from end to end: checksums, indices, every sample, statistics."""

    folder: cli.Data
    """a data set; nothing is written to it"""


def check(args: CheckArgs) -> None:
    """Say what is wrong with a data set, a line each, or that nothing is."""
    found = verify(args.folder)
    for line in found.warnings:
        print(f"warning: {line}", file=sys.stderr)
    check_whole(found)
    counts, dataset = found.class_counts, found.dataset
    mean, std = (", ".join(f"{x:.3g}" for x in values) for values in (found.mean, found.std))
    print(
        f"{args.folder} is whole: {dataset.count} samples in {len(dataset.shards)} shard(s), {dataset.flips} flip(s) "
        f"of {dataset.space.shape}, {len(counts)} classes of {min(counts.values())} to {max(counts.values())}; "
        f"latents, normalised by {describe(dataset.space)}, have by channel mean {mean} and standard deviation {std}"
    )


def check_whole(found: Report) -> None:
    """InputError, after a line for each problem, if a data set has one."""
    for line in found.problems:
        print(f"problem: {line}", file=sys.stderr)
    if found.problems:
        raise InputError(f"{found.dataset.folder} is damaged: {len(found.problems)} problem(s)")


@dataclass(frozen=True)
class NormaliseArgs:
    """Change how latents are normalised, by scale and bias in dataset.json. Samples stay as the encoder gave them."""

    folder: cli.Data
    """a data set; its dataset.json is rewritten"""
    to: Normalisation
    """as of `prepare images`; measured reads the whole data set"""


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
        f"{path}: latents are normalised by {describe(space)}, no longer by {describe(dataset.space)}. A run that "
        "began before refuses to continue so: change it back for that run, or start another"
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
        print(f"usage: {prog} COMMAND ...\n\nWrite data sets of latents, check one, or normalise it otherwise.\n")
        for name, (operands, arguments, _) in COMMANDS.items():
            print(f"  {name} {operands:{16 - len(name)}} {(arguments.__doc__ or '').splitlines()[0]}")
        print(f"\n`{prog} COMMAND --help` lists a command's options.")
        if args:
            raise SystemExit(0)
        raise InputError(f"say what to prepare: {', '.join(COMMANDS)}")
    name = choose("command", args[0], COMMANDS)
    _, arguments, action = COMMANDS[name]
    action(cli.parse(arguments, args[1:], f"prepare {name}"))


if __name__ == "__main__":
    cli.run(main)
