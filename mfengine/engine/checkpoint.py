"""Checkpoints: written aside and renamed when whole, read into a run or as a model to sample from.

A checkpoint is a folder `checkpoints/step-00001000` with the shards of `torch.distributed.checkpoint` and
`checkpoint.json`, which says what is in them. A folder of that name is always whole.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from mfengine.configs import check_at_least, from_json, parse_json, read_json
from mfengine.data.format import LatentSpace
from mfengine.engine.flops import meta_network
from mfengine.errors import InputError, TrainingError
from mfengine.files import sync, write_atomic, writing
from mfengine.methods import OBJECTIVES, Objective
from mfengine.networks import NETWORKS, Network
from mfengine.ranks import World

# A single process has no process group, which is as it should be.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

DESCRIPTION = "checkpoint.json"
_WHOLE = re.compile(r"step-(\d{8})")


class Checkpointer:
    """Writes a run's checkpoints.

    Args:
        folder: the run's.
        world: the ranks that write.
        keep: how many to keep.
        asynchronous: write while training goes on. `save` then only copies the state, into host memory that it
            allocates once (torch 2.11 does for each save), pinned if it comes from a GPU. `poll` and `wait` tell how
            the writing ended.

    `save`, `poll` and `wait` raise TrainingError if a checkpoint could not be written.
    """

    def __init__(self, folder: Path, world: World, keep: int, asynchronous: bool) -> None:
        self._folder, self._world, self._keep = folder / "checkpoints", world, keep
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[Path] | None = None
        self._group: dist.ProcessGroup | None = None
        if asynchronous:
            cuda = world.device.type == "cuda"
            # A new thread works on the first GPU: every rank would start a context there.
            self._writer = ThreadPoolExecutor(
                1, initializer=partial(torch.cuda.set_device, world.device) if cuda else None
            )
            # Copies are queued behind the optimizer's step and waited for: whatever comes next may change the weights.
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
                )
            )
            # Ranks talk in the background too, and must not be heard by those that train meanwhile.
            self._group = dist.new_group(backend="gloo") if world.sharded else None
        self.newest = world.on_main(lambda: newest_checkpoint(folder))
        if world.main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self._folder.glob(".partial-*"), *self._folder.glob(".removed-*")):
                shutil.rmtree(leftover)

    def save(self, step: int, state: dict[str, Any], description: dict[str, Any]) -> None:
        """Write a checkpoint of `step`; every rank calls it.

        Args:
            step: optimizer steps done.
            state: nested dict of tensors and picklable values.
            description: goes to checkpoint.json, with the step.
        """
        self.wait()
        description = {"step": step, **description}
        if self._writer is None:
            self.newest = self._write(step, state, description)
        else:
            staged = self._stager.stage(state)
            assert isinstance(staged, dict)
            self._writing = self._writer.submit(self._write, step, staged, description)

    def poll(self) -> None:
        """Take note of the end of a write in the background."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write in the background, if there is one."""
        if self._writing:
            writing, self._writing = self._writing, None
            self.newest = writing.result()

    def _write(self, step: int, state: dict[str, Any], description: dict[str, Any]) -> Path:
        """Write a folder under another name, rename it when it is whole, and remove old ones."""
        unfinished, whole = (self._folder / f"{name}-{step:08d}" for name in (".partial-step", "step"))
        try:
            if self._world.main:
                unfinished.mkdir(exist_ok=True)  # the other ranks may be ahead
                write_atomic(unfinished / DESCRIPTION, json.dumps(description, indent=1) + "\n")
            dcp.save(state, checkpoint_id=unfinished, process_group=self._group, no_dist=not self._world.sharded)
            if self._world.main:  # all ranks have written: rank 0 ends with the metadata
                sync(unfinished)
                unfinished.rename(whole)
                sync(self._folder)
                for old in _whole_checkpoints(self._folder)[: -self._keep]:
                    # Renamed first: a kill in the midst of the removal must not leave a folder that looks whole.
                    doomed = old.with_name(f".removed-{old.name}")
                    old.rename(doomed)
                    shutil.rmtree(doomed)
        except (dcp.CheckpointException, OSError) as error:
            raise TrainingError(
                f"cannot write {whole}: {_reason(error)}; last whole checkpoint: {self.newest or 'none'}"
            ) from None
        return whole


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step-*") if _WHOLE.fullmatch(path.name))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    found = _whole_checkpoints(run / "checkpoints")
    return found[-1] if found else None


@dataclass(frozen=True)
class _Progress:
    """What checkpoint.json says beside the network, the objective and the latent space; an export has the step alone."""

    step: int
    parts: int = 1
    skipped_steps: int = 0
    ema_decays: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        check_at_least(0, step=self.step, skipped_steps=self.skipped_steps)
        check_at_least(1, parts=self.parts)
        if not self.ema_decays:
            raise ValueError("ema_decays must be one or more numbers")


def read_description(checkpoint: Path) -> dict[str, Any]:
    """What checkpoint.json says; InputError if it cannot be read or is not valid."""
    path = checkpoint / DESCRIPTION
    description = read_json(path)
    for name in ("parts", "skipped_steps", "ema_decays"):
        if name not in description:
            raise InputError(f"{path}: {name} is missing")
    return _checked(description, path)


def _checked(description: dict[str, Any], where: Path) -> dict[str, Any]:
    """The description of a checkpoint or an export, once all of it is valid; otherwise InputError."""
    names = [field.name for field in dataclasses.fields(_Progress)]
    from_json(_Progress, {name: description[name] for name in names if name in description}, where)
    model = NETWORKS.read(description, "model", where)
    OBJECTIVES.read(description, "method", where)
    space = _space(description, where)
    if (space.shape, space.num_classes) != (model.latent_shape, model.num_classes):
        raise InputError(
            f"{where}: space.shape {space.shape} with {space.num_classes} classes does not fit the model, which takes "
            f"{model.latent_shape} with {model.num_classes}"
        )
    return description


def _space(description: dict[str, Any], where: Path) -> LatentSpace:
    return from_json(LatentSpace, description.get("space"), where, "space.")


def load_state(checkpoint: Path, state: dict[str, Any], world: World) -> None:
    """Fill `state` in place with what the checkpoint has under the same keys.

    Raises:
        InputError: the checkpoint has not all of it, or in other shapes.
    """
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=not world.sharded)
    except (dcp.CheckpointException, RuntimeError, ValueError) as error:
        raise InputError(f"cannot read {checkpoint}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The last line of an error: DCP's begin with the tracebacks of all ranks."""
    return str(error).strip().splitlines()[-1]


# ----------------------------------------------------------------------------
# Models to sample from.


class Trained(NamedTuple):
    """A model with averaged weights, for sampling, on the host."""

    model: Network
    space: LatentSpace  # what its latents mean
    path: Path  # the checkpoint or export that was read
    objective: Objective  # how to sample from it


def load_model(path: Path, ema_decay: float | None = None) -> Trained:
    """A model to sample from, computing in float32.

    Args:
        path: a run folder (its newest checkpoint is taken), a checkpoint folder, or an export (.safetensors).
        ema_decay: which moving average; the first if None. An export holds one.

    Raises:
        InputError: there is no such thing, or it is of another architecture, or its network or objective is unknown.
    """
    if path.suffix == ".safetensors":
        weights, description = _read_export(path)
    else:
        path = _find_checkpoint(path)
        description = read_description(path)
        weights = _read_average(path, description, ema_decay, sampling=True)
    model = NETWORKS.build(NETWORKS.read(description, "model", path)).for_sampling()
    _load_weights(model, weights, path)
    objective = OBJECTIVES.build(OBJECTIVES.read(description, "method", path))
    return Trained(model.eval(), _space(description, path), path, objective)


def _load_weights(model: Network, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path} is of another architecture: {str(error).splitlines()[1].strip():.200}") from None


def export_model(checkpoint: Path, out: Path, ema_decay: float | None = None) -> Path:
    """Write a moving average of what sampling needs, with its description, as safetensors; the checkpoint read."""
    from safetensors.torch import save_file  # here, since `make gpu` runs without it

    if checkpoint.suffix == ".safetensors":
        raise InputError(f"{checkpoint} is an export already: give a checkpoint or a run folder")
    checkpoint = _find_checkpoint(checkpoint)
    description = read_description(checkpoint)
    weights = _read_average(checkpoint, description, ema_decay, sampling=True)
    kept = {key: value for key, value in description.items() if key not in ("parts", "skipped_steps", "ema_decays")}
    with writing(out):
        write_atomic(out, lambda partial: _save(weights, partial, {"mfengine": json.dumps(kept)}))
    return checkpoint


def load_initial_weights(model: Network, path: Path, reverse_time: bool) -> list[str]:
    """Start `model` from other weights.

    Args:
        model: on the host.
        path: what `load_model` takes, or another project's checkpoint (.pt, .pth) as `Network.convert` takes it.
        reverse_time: of `Network.convert`.

    Returns:
        The parameters that it left fresh: an export has none that only training uses.

    Raises:
        InputError: there is no such thing, or it is of another architecture.
    """
    fresh: list[str] = []
    if path.suffix in (".pt", ".pth"):
        try:
            weights, fresh, _ = model.convert(torch.load(path, map_location="cpu", weights_only=True), reverse_time)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
        except (AttributeError, EOFError, KeyError, TypeError) as error:
            raise InputError(f"cannot read {path}: it is not a state dict of tensors: {error!r:.100}") from None
    elif path.suffix == ".safetensors":
        weights, _ = _read_export(path)
        sampled = meta_network(model.config).for_sampling().state_dict()
        own = {name: value for name, value in model.state_dict().items() if name not in sampled}
        fresh = [name for name in own if name not in weights]
        weights = own | weights
    else:
        checkpoint = _find_checkpoint(path)
        weights = _read_average(checkpoint, read_description(checkpoint), None, sampling=False)
    _load_weights(model, weights, path)
    return fresh


def _find_checkpoint(path: Path) -> Path:
    if (path / DESCRIPTION).is_file() and not path.resolve().name.startswith("."):
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise InputError(f"{path} is neither a checkpoint, nor a run folder with one, nor a .safetensors file")
    return newest


def _read_average(
    checkpoint: Path, description: dict[str, Any], decay: float | None, sampling: bool
) -> dict[str, Tensor]:
    """A moving average of all weights, or of those that sampling needs."""
    decays = description["ema_decays"]
    decay = decays[0] if decay is None else decay
    if decay not in decays:
        raise InputError(f"{checkpoint} has no moving average of decay {decay}; it has {decays}")
    model = meta_network(NETWORKS.read(description, "model", checkpoint))
    shapes = (model.for_sampling() if sampling else model).state_dict()
    state = {"ema": {str(decay): {name: torch.empty(value.shape) for name, value in shapes.items()}}}
    load_state(checkpoint, state, World(0, 1, torch.device("cpu")))
    return state["ema"][str(decay)]


def _read_export(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open  # likewise

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors has no public base class for its errors
        raise InputError(f"cannot read {path}: {error}") from None
    if "mfengine" not in metadata:
        raise InputError(f"{path} was not written by mfengine.export: it has no configuration")
    return weights, _checked(parse_json(metadata["mfengine"], path), path)
