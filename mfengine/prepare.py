"""`python -m mfengine.prepare COMMAND ...`, or the same under `torchrun`: write data sets of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from mfengine import cli
from mfengine.engine.data import Dataset, LatentSpace
from mfengine.engine.shards import ArraySamples, write_dataset
from mfengine.errors import InputError

PROG = "python -m mfengine.prepare"


@dataclass(frozen=True)
class DigitsArgs:
    """The 1,797 real 8 x 8 images that scikit-learn carries, as one-channel latents without variance."""

    out: tyro.conf.Positional[Path]
    """an empty or new folder"""
    seed: int = 0
    """of the order in which samples are written"""


def digits(args: DigitsArgs) -> None:
    """Write the digits: moments (1, 2, 1, 8, 8), pixels 0 to 16 and a standard deviation of 0."""
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


def report(dataset: Dataset) -> None:
    """Say what was written."""
    left_out = f", {dataset.broken} broken ones left out" if dataset.broken else ""
    print(f"{dataset.folder}: {dataset.count} samples in {len(dataset.shards)} shard(s){left_out}")


COMMANDS: dict[str, tuple[str, type[Any], Callable[[Any], None]]] = {
    # name: (arguments as the list of commands shows them, arguments, what does it)
    "digits": ("OUT", DigitsArgs, digits),
}


def main(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {PROG} COMMAND ...\n\nWrite data sets of latents, or check one.\n")
        for name, (operands, arguments, _) in COMMANDS.items():
            print(f"  {name} {operands:{16 - len(name)}} {(arguments.__doc__ or '').splitlines()[0]}")
        print(f"\n`{PROG} COMMAND --help` lists a command's options.")
        if args:
            raise SystemExit(0)
        raise InputError(f"say what to prepare: {', '.join(COMMANDS)}")
    name = cli.choose("command", args[0], COMMANDS)
    _, arguments, action = COMMANDS[name]
    action(cli.parse(arguments, args[1:], f"{PROG} {name}"))


if __name__ == "__main__":
    cli.run(main)
