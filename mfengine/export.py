"""`python -m mfengine.export CHECKPOINT OUT`: averaged weights in one file."""

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
    """Write the moving average of a checkpoint's weights into one file.

    As .safetensors with its configuration as metadata, which all commands take; or, of improved MeanFlow, as .pth for
    the authors' PyTorch code. With --preset, weights that others have published become such a .safetensors.
    """

    checkpoint: cli.Checkpoint
    """a checkpoint, or a run folder, whose newest checkpoint is taken; with --preset another project's .pt or .pth"""
    out: cli.Out
    """a new file, NAME.safetensors or NAME.pth"""
    ema_decay: float | None = None
    """which moving average; the run's first if not given"""
    skip_checksums: bool = False
    """read a checkpoint without comparing the checksums of its files; their sizes are compared anyway"""
    preset: str | None = None
    """whose network, sampling and latents another project's weights are of, such as imf-xl2"""


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
        raise InputError(f"--preset makes a .safetensors of a {' or '.join(OTHERS)}, not {out} of {path}")
    if preset.normalisation is None:
        raise InputError(f"nobody has published weights of the preset {name}: it does not say which latents they take")
    space = LatentSpace(preset.model.latent_shape, preset.model.num_classes)
    export_other(path, out, preset, published(space, preset.normalisation))


if __name__ == "__main__":
    cli.run(main)
