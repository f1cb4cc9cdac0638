"""`python -m mfengine.export CHECKPOINT OUT`: write averaged weights to one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mfengine import cli
from mfengine.configs import choose
from mfengine.data.format import LatentSpace
from mfengine.data.normalisation import published
from mfengine.engine.config import OTHERS
from mfengine.engine.presets import PRESETS
from mfengine.engine.weights import export_model, export_other
from mfengine.errors import InputError
from mfengine.files import check_file


@dataclass(frozen=True)
class ExportArgs:
    """Write a moving average of a checkpoint's weights to one file.

    A .safetensors file holds the configuration as metadata, and all commands accept it. A .pth file, for improved
    MeanFlow, is in the format of the authors' PyTorch code. With --preset, published weights of another project are
    converted to such a .safetensors file.
    """

    checkpoint: cli.Checkpoint
    """a checkpoint, or a run folder, whose newest checkpoint is used; with --preset, a .pt or .pth file of another
    project"""
    out: cli.Out
    """a new file, NAME.safetensors or NAME.pth"""
    ema_decay: float | None = None
    """decay of the moving average of the weights to write; by default the run's first"""
    skip_checksums: bool = False
    """do not verify the checksums of checkpoint files when reading; file sizes are still verified"""
    preset: str | None = None
    """preset that describes the network, sampling and latents of another project's weights, such as imf-xl2"""


def main(args: Sequence[str]) -> None:
    config = cli.parse(ExportArgs, args, "export")
    if config.out.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{config.out} must end in .safetensors or .pth")
    if config.out.exists():
        raise InputError(f"{config.out} exists: choose another name")
    check_file(config.out)
    read = config.checkpoint
    if config.preset is None:
        read = export_model(read, config.out, config.ema_decay, config.skip_checksums)
    else:
        _export_published(read, config.out, choose("preset", config.preset, PRESETS))
    print(f"{config.out}: weights of {read}")


def _export_published(path: Path, out: Path, name: str) -> None:
    preset = PRESETS[name][1]
    if path.suffix not in OTHERS or out.suffix != ".safetensors":
        raise InputError(f"--preset converts a {' or '.join(OTHERS)} file to .safetensors, not {path} to {out}")
    if preset.normalisation is None:
        raise InputError(f"there are no published weights for preset {name}: choose one that states a normalisation")
    space = LatentSpace(preset.model.latent_shape, preset.model.num_classes)
    export_other(path, out, preset, published(space, preset.normalisation))


if __name__ == "__main__":
    cli.run(main)
