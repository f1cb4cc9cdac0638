"""`python -m mfengine.export CHECKPOINT OUT`: averaged weights in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mfengine import cli
from mfengine.engine.checkpoint import export_model
from mfengine.errors import InputError
from mfengine.files import check_file


@dataclass(frozen=True)
class ExportArgs:
    """Write the moving average of a checkpoint's weights into one file.

    As .safetensors with its configuration as metadata, which all commands take; or, of improved MeanFlow, as .pth for the
    authors' PyTorch code.
    """

    checkpoint: cli.Checkpoint
    """a checkpoint, or a run folder, whose newest checkpoint is taken"""
    out: cli.Out
    """a new file, NAME.safetensors or NAME.pth"""
    ema_decay: float | None = None
    """which moving average; the run's first if not given"""
    skip_checksums: bool = False
    """read a checkpoint without comparing the checksums of its files; their sizes are compared anyway"""


def main(args: Sequence[str]) -> None:
    config = cli.parse(ExportArgs, args, "python -m mfengine.export")
    if config.out.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{config.out} must end in .safetensors or .pth")
    if config.out.exists():
        raise InputError(f"{config.out} exists: choose another name")
    check_file(config.out)
    read = export_model(config.checkpoint, config.out, config.ema_decay, config.skip_checksums)
    print(f"{config.out}: weights of {read}")


if __name__ == "__main__":
    cli.run(main)
