"""The script `mfengine`: `mfengine train ...` is `python -m mfengine.train ...`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import mfengine
from mfengine import cli
from mfengine.configs import choose
from mfengine.errors import InputError

COMMANDS = {
    "prepare": "write data sets of latents, and check them",
    "train": "train a one-step generator",
    "generate": "draw samples",
    "evaluate": "measure samples: Frechet distance, FID, precision and recall",
    "report": "compare runs on one page of HTML",
    "export": "write averaged weights into one file",
    "info": "show what is active in this environment",
}


def main(args: Sequence[str]) -> int | None:
    if args and args[0] == "--version":
        print(f"mfengine {mfengine.__version__}")
        return None
    if not args or args[0] in ("-h", "--help"):
        print("usage: mfengine COMMAND ...\n\nTrain and sample MeanFlow models, one-step image generators.\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:9} {purpose}")
        print("\n`mfengine COMMAND --help` lists a command's options, `mfengine --version` prints the version.")
        print("On several GPUs: torchrun --nproc-per-node 8 -m mfengine.train ...")
        if args:
            return None
        raise InputError(f"say what to do: {', '.join(COMMANDS)}")
    name = choose("command", args[0], COMMANDS)
    done: int | None = import_module(f"mfengine.{name}").main(args[1:])
    return done


def script() -> None:
    """The entry point of the package."""
    cli.run(main)


if __name__ == "__main__":
    script()
