"""`python -m mfengine.train [PRESET] [OPTIONS]`, or the same under `torchrun`: train a MeanFlow model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mfengine import cli
from mfengine.engine.config import TrainConfig
from mfengine.engine.preflight import dry_run
from mfengine.engine.presets import PRESETS
from mfengine.engine.trainer import train
from mfengine.errors import InputError
from mfengine.ranks import world

PROG = "python -m mfengine.train"


@dataclass(frozen=True)
class TrainArgs(TrainConfig):
    """The run, and whether to do it."""

    dry_run: bool = False
    """print parameters, memory, communication and length of the run, refuse what training would refuse, and stop"""
    ranks: int | None = None
    """with --dry-run: plan for so many ranks; those that torchrun started if not given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and (not self.dry_run or self.ranks < 1):
            raise ValueError("ranks is for --dry-run, and at least 1; torchrun says how many ranks train")

    @classmethod
    def of(cls, config: TrainConfig) -> TrainArgs:
        return cls(**_fields(config))

    @property
    def run(self) -> TrainConfig:
        """What of this defines the run."""
        return TrainConfig(**_fields(self))


def _fields(config: TrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}


def parse(args: Sequence[str]) -> TrainArgs:
    """A preset with options over it; InputError for what there is not."""
    if args and args[0] in ("-h", "--help"):
        print(f"usage: {PROG} [PRESET] [OPTIONS]\n\nTrain a MeanFlow model. Under torchrun, on all of its processes.\n")
        for name, (description, _) in PRESETS.items():
            print(f"  {name:10} {description}")
        print(f"\nThe preset is digits if none is given. `{PROG} PRESET --help` lists its options.\n")
        print(
            f"  {PROG} digits --resume auto\n  torchrun --nproc-per-node 8 -m mfengine.train xl2 --data DIR --name NAME"
        )
        raise SystemExit(0)
    preset = "digits"
    if args and not args[0].startswith("-"):
        preset, args = cli.choose("preset", args[0], PRESETS), args[1:]
    return cli.parse(TrainArgs, args, f"{PROG} {preset}", default=TrainArgs.of(PRESETS[preset][1]))


def main(args: Sequence[str]) -> int:
    config = parse(args)
    with world(config.device, one_rank_mesh=config.shard == "always") as here:
        if config.dry_run:
            if config.ranks not in (None, here.size) and here.size > 1:
                raise InputError(f"ranks is {config.ranks}, but torchrun started {here.size}: leave --ranks away")
            dry_run(config.run, here, config.ranks or here.size)
            return 0
        signum = train(config.run, here)
    return 128 + signum if signum else 0


if __name__ == "__main__":
    cli.run(main)
