"""`python -m mfengine.train [PRESET] [OPTIONS]`, or the same under `torchrun`: train a one-step generator."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

import mfengine
from mfengine import cli
from mfengine.configs import choose
from mfengine.data.format import Dataset
from mfengine.engine.config import TrainConfig
from mfengine.engine.preflight import dry_run, read_config
from mfengine.engine.presets import PRESETS
from mfengine.engine.trainer import train
from mfengine.errors import InputError
from mfengine.ranks import world


@dataclass(frozen=True)
class Arguments:
    """A run, and whether to do it."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: Path | None = None
    """a run's config.json, which takes the place of a preset: other options go over it"""
    dry_run: bool = False
    """print parameters, memory, communication and length of the run, refuse what training would refuse, and stop"""
    ranks: int | None = None
    """with --dry-run: plan for so many ranks; those that torchrun started if not given"""

    def __post_init__(self) -> None:
        if self.ranks is not None and (not self.dry_run or self.ranks < 1):
            raise ValueError("ranks needs --dry-run, and is at least 1; torchrun says how many ranks train")


def parse(args: Sequence[str]) -> Arguments:
    """A preset, or a run's configuration, with options over it; InputError for what there is not."""
    if args and args[0] in ("-h", "--help"):
        prog = cli.program("train")
        print(
            f"usage: {prog} [PRESET] [OPTIONS]\n\nTrain a one-step generator. Under torchrun, on all its processes.\n"
        )
        for name, (description, _) in PRESETS.items():
            print(f"  {name:10} {description}")
        print(f"\nThe preset is digits if none is given. `{prog} PRESET --help` lists its options.")
        print("--config RUN/config.json takes the place of a preset, to repeat a run.")
        print("Size and channels of latents and the number of classes are those of the data set, unless given.\n")
        print(
            f"  {prog} digits --resume auto\n  torchrun --nproc-per-node 8 -m mfengine.train xl2 --data DIR --name NAME"
        )
        raise SystemExit(0)
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--config", type=Path)
    known.add_argument("--data", type=Path)
    try:
        given = known.parse_known_args(args)[0]
        path, data = given.config, given.data
    except argparse.ArgumentError:
        path = data = None  # the parser of all options says what is wrong
    preset = "" if path else "digits"
    if args and not args[0].startswith("-"):
        if path:
            raise InputError(f"{args[0]} and --config {path} are both given: omit one")
        preset, args = choose("preset", args[0], PRESETS), args[1:]
    default = for_data(PRESETS[preset][1], data) if path is None else read_config(path)
    try:
        return cli.parse(Arguments, args, f"train {preset}".rstrip(), default=Arguments(default, path))
    except InputError as error:
        if str(error).startswith("unexpected argument"):
            raise InputError(f"{error}: one preset comes first, then options") from None
        raise


def for_data(preset: TrainConfig, data: Path | None) -> TrainConfig:
    """A preset whose network takes the latents and classes of its data set, or of the one in `data`.

    Where there is no such data set, or the network cannot take its latents, the preset is as it was: training refuses
    it then, and says why.
    """
    with suppress(ValueError):
        dataset = Dataset.read(data or preset.data)
        return replace(preset, model=preset.model.for_latents(dataset.space.shape, dataset.space.num_classes))
    return preset


def provenance() -> dict[str, str]:
    """Version of mfengine, its commit where it runs from a clone, and the command line of this process."""
    facts = {"version": mfengine.__version__, "command": shlex.join(sys.orig_argv)}
    root = Path(mfengine.__file__).parent.parent
    if (root / ".git").exists() and shutil.which("git"):
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
        facts |= {"commit": done.stdout.strip()} if done.returncode == 0 else {}
    return facts


def main(args: Sequence[str]) -> int:
    arguments = parse(args)
    config = arguments.run
    with world(config.device, one_rank_mesh=config.shard == "always") as here:
        if arguments.dry_run:
            if arguments.ranks not in (None, here.size) and here.size > 1:
                raise InputError(f"ranks is {arguments.ranks}, but torchrun started {here.size}: omit --ranks")
            dry_run(config, here, arguments.ranks or here.size)
            return 0
        signum = train(config, here, provenance() if here.main else {})
    return 128 + signum if signum else 0


if __name__ == "__main__":
    cli.run(main)
