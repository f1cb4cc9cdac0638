"""`python -m mfengine.train [PRESET] [OPTIONS]`, or the same under `torchrun`: train a MeanFlow model."""

from __future__ import annotations

from collections.abc import Sequence

from mfengine import cli
from mfengine.engine.config import PRESETS, TrainConfig
from mfengine.engine.distributed import world
from mfengine.engine.trainer import train

PROG = "python -m mfengine.train"


def parse(args: Sequence[str]) -> TrainConfig:
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
    return cli.parse(TrainConfig, args, f"{PROG} {preset}", default=PRESETS[preset][1])


def main(args: Sequence[str]) -> int:
    config = parse(args)
    with world(config.device) as here:
        signum = train(config, here)
    return 128 + signum if signum else 0


if __name__ == "__main__":
    cli.run(main)
