"""Loads weights of run folders, checkpoints, exports and other projects, to sample or to start a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfengine.configs import choose, parse_json, to_json
from mfengine.data.format import LatentSpace
from mfengine.data.pictures import draw_latents
from mfengine.data.vae import VAE
from mfengine.engine.checkpoint import checked, find_checkpoint, latent_space, load_state, read_description
from mfengine.engine.config import OTHERS, TrainConfig
from mfengine.engine.flops import meta_network
from mfengine.errors import InputError
from mfengine.files import write_atomic, writing
from mfengine.methods import OBJECTIVES, Objective
from mfengine.networks import NETWORKS, Network
from mfengine.pickles import Refused, load_tensors
from mfengine.ranks import World


class Trained(NamedTuple):
    """A model with averaged weights, ready to sample."""

    model: Network
    space: LatentSpace  # space of its latents
    path: Path  # the checkpoint or export that was read
    objective: Objective  # it knows how to sample
    class_names: tuple[str, ...] = ()  # in the order of the labels; () if unknown

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        shape, classes = " x ".join(map(str, self.space.shape)), self.space.num_classes
        return f"Trained({self.path}: {millions:.1f} M parameters, latents of {shape}, {classes} classes)"

    def sample(self, labels: Sequence[int] | Tensor, steps: int = 1, seed: int = 0, **conditions: float) -> Tensor:
        """Draw samples.

        Args:
            labels: (B,) classes.
            steps: network evaluations per sample.
            seed: seed of the noise.
            conditions: inputs of the objective besides labels, such as omega; others have the values of its
                configuration.

        Returns:
            (B, C, H, W) float32 latents, on the model's device.

        Raises:
            InputError: a label is out of range, or a condition is unknown.
            ValueError: steps is less than 1.
        """
        y = torch.as_tensor(labels, dtype=torch.int64)
        for label in y.unique().tolist():
            self.label(label)
        device = next(self.model.parameters()).device
        noise = torch.randn(len(y), *self.space.shape, generator=torch.Generator().manual_seed(seed))
        return self.objective.sampler(conditions)(self.model, noise.to(device), y.to(device), steps)

    def images(self, latents: Tensor, vae: str | Path | None = None) -> Tensor:
        """Latents (B, C, H, W) as images (B, 3, H', W') float32 in [0, 1].

        Args:
            latents: latents from `sample`.
            vae: the decoder: a folder or hub name that diffusers loads. None shows pixels as they are, and of other
                latents the first three channels.

        Raises:
            InputError: the VAE cannot be loaded, or its latents are different.
        """
        if vae is None:
            return draw_latents(latents, self.space)
        return VAE(vae, latents.device).decode(latents, self.space)

    def label(self, name: int | str) -> int:
        """A class, from its number or name; InputError if the model does not have it."""
        if isinstance(name, str) and not name.lstrip("-").isdecimal():
            if not self.class_names:
                raise InputError(
                    f"{self.path} has no class names: give a number from 0 to {self.space.num_classes - 1}, not {name}"
                )
            return self.class_names.index(choose("class", name, self.class_names))
        if not 0 <= (label := int(name)) < self.space.num_classes:
            raise InputError(f"there is no label {label}; the model has 0 to {self.space.num_classes - 1}")
        return label


def load(
    path: str | os.PathLike[str],
    *,
    ema_decay: float | None = None,
    device: torch.device | str | None = None,
    skip_checksums: bool = False,
) -> Trained:
    """Load a model to sample from; `mfengine.load`.

    Args:
        path: a run folder (for its newest checkpoint), a checkpoint folder, or an export (.safetensors).
        ema_decay: which moving average; None takes the first, or the only one of an export.
        device: where to put the model; None takes a GPU if there is one.
        skip_checksums: do not check the files of a checkpoint.

    Raises:
        InputError: the path does not exist, is damaged, or has an unknown architecture.

    Example:
        >>> import mfengine
        >>> digits = mfengine.load("runs/digits")  # doctest: +SKIP
        >>> latents = digits.sample([3, 7], steps=1)  # doctest: +SKIP
        >>> digits.images(latents).shape  # doctest: +SKIP
        torch.Size([2, 3, 8, 8])
    """
    trained = load_model(Path(path), ema_decay, skip_checksums)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return trained._replace(model=trained.model.to(device))


def load_model(path: Path, ema_decay: float | None = None, skip_checksums: bool = False) -> Trained:
    """A model to sample from, on the host, computing in float32.

    Args:
        path: a run folder (for its newest checkpoint), a checkpoint folder, or an export (.safetensors).
        ema_decay: which moving average; None takes the first, or the only one of an export.
        skip_checksums: do not check the files of a checkpoint.

    Raises:
        InputError: the path does not exist, is damaged, has another architecture, or names an unknown network or
            objective.
    """
    if path.suffix == ".safetensors":
        if ema_decay is not None:
            raise InputError(f"{path} is an export with only one moving average: omit its decay, or give the run")
        weights, description = _read_export(path)
    else:
        path = find_checkpoint(path)
        description = read_description(path)
        weights = _read_average(path, description, ema_decay, True, skip_checksums)
    model = NETWORKS.build(NETWORKS.read(description, "model", path)).for_sampling()
    _load_weights(model, weights, path)
    objective = OBJECTIVES.build(OBJECTIVES.read(description, "method", path))
    names = tuple(description.get("class_names", ()))
    return Trained(model.eval(), latent_space(description, path), path, objective, names)


def _load_weights(model: Network, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path} has another architecture: {str(error).splitlines()[1].strip():.200}") from None


def export_model(checkpoint: Path, out: Path, ema_decay: float | None = None, skip_checksums: bool = False) -> Path:
    """Write one moving average of the weights for sampling into a file; returns the checkpoint that was read.

    Args:
        checkpoint: a checkpoint, or a run folder.
        out: NAME.safetensors, with the description as metadata, or NAME.pth in the format of `Network.to_original`.
        ema_decay: which moving average; None takes the run's first.
        skip_checksums: do not check the files of the checkpoint.

    Raises:
        InputError: there is no such checkpoint, or it cannot be written in this format.
    """
    if checkpoint.suffix == ".safetensors":
        raise InputError(f"{checkpoint} is already an export: give a checkpoint or a run folder")
    checkpoint = find_checkpoint(checkpoint)
    description = read_description(checkpoint)
    weights = _read_average(checkpoint, description, ema_decay, True, skip_checksums)
    if out.suffix == ".safetensors":
        of_the_run = ("parts", "skipped_steps", "ema_decays", "files", "crc32")
        _write_export(out, weights, {key: value for key, value in description.items() if key not in of_the_run})
        return checkpoint
    network = NETWORKS[choose("network", {**NETWORKS.unnamed, **description}["network"], NETWORKS)]
    try:
        original = network.to_original(weights)
    except ValueError as error:
        raise InputError(f"cannot write {out}: {error}") from None
    with writing(out):
        write_atomic(out, lambda partial: torch.save(original, partial))
    return checkpoint


def export_other(path: Path, out: Path, config: TrainConfig, space: LatentSpace) -> None:
    """Write another project's weights into NAME.safetensors, like an export of a run of `config`.

    Raises:
        InputError: the weights cannot be read, have another architecture, or cannot be written.
    """
    model = NETWORKS.build(config.model)
    _load_weights(model, _read_other(type(model), path, config.init_reverse_time)[0], path)
    weights = {name: value.contiguous() for name, value in model.for_sampling().state_dict().items()}
    _write_export(out, weights, {**config.description(), "space": to_json(space), "step": 0})


def _write_export(out: Path, weights: dict[str, Tensor], description: dict[str, Any]) -> None:
    from safetensors import SafetensorError  # here, because `make gpu` runs without it
    from safetensors.torch import save_file

    try:
        with writing(out):
            metadata = {"mfengine": json.dumps(description)}
            write_atomic(out, lambda partial: save_file(weights, partial, metadata=metadata))
    except SafetensorError as error:
        raise InputError(f"cannot write {out}: {error}") from None


def load_initial_weights(model: Network, path: Path, reverse_time: bool, skip_checksums: bool = False) -> list[str]:
    """Start `model` from other weights.

    Args:
        model: the model, on the host.
        path: a path for `load_model`, or another project's checkpoint (.pt, .pth) for `Network.convert`.
        reverse_time: see `Network.convert`.
        skip_checksums: do not check the files of a checkpoint.

    Returns:
        The parameters that stay as initialised: an export lacks those for training only.

    Raises:
        InputError: the path does not exist, or has another architecture.
    """
    fresh: list[str] = []
    if path.suffix in OTHERS:
        weights, fresh = _read_other(type(model), path, reverse_time)
    elif path.suffix == ".safetensors":
        weights, _ = _read_export(path)
        sampled = meta_network(model.config).for_sampling().state_dict()
        own = {name: value for name, value in model.state_dict().items() if name not in sampled}
        fresh = [name for name in own if name not in weights]
        weights = own | weights
    else:
        checkpoint = find_checkpoint(path)
        weights = _read_average(checkpoint, read_description(checkpoint), None, False, skip_checksums)
    _load_weights(model, weights, path)
    return fresh


def _read_other(network: type[Network], path: Path, reverse_time: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Another project's weights, completed by fresh parameters, and the names of these."""
    try:
        weights, fresh, _ = network.convert(load_tensors(path), reverse_time)
    except Refused as name:
        raise InputError(f"{path} would run {name} when unpickled: refused") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    except (AttributeError, EOFError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: it is not a state dict of tensors: {error!r:.100}") from None
    return weights, fresh


def check_decay(checkpoint: Path, description: dict[str, Any], decay: float) -> None:
    """InputError if a checkpoint with this description has no moving average with this decay."""
    if decay not in description["ema_decays"]:
        raise InputError(f"{checkpoint} has no moving average with decay {decay}; it has {description['ema_decays']}")


def _read_average(
    checkpoint: Path, description: dict[str, Any], decay: float | None, sampling: bool, skip_checksums: bool
) -> dict[str, Tensor]:
    """One moving average of all weights, or of those for sampling."""
    decay = description["ema_decays"][0] if decay is None else decay
    check_decay(checkpoint, description, decay)
    model = meta_network(NETWORKS.read(description, "model", checkpoint))
    shapes = (model.for_sampling() if sampling else model).state_dict()
    state = {"ema": {str(decay): {name: torch.empty(value.shape) for name, value in shapes.items()}}}
    load_state(checkpoint, description, state, World(0, 1, torch.device("cpu")), skip_checksums)
    return state["ema"][str(decay)]


def _read_export(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open  # here for the same reason

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors has no public base class for its errors
        raise InputError(f"cannot read {path}: {error}") from None
    if "mfengine" not in metadata:
        raise InputError(f"{path} was not written by mfengine.export: it has no configuration")
    return weights, checked(parse_json(metadata["mfengine"], path), path)
