"""Checkpoints: written under a temporary name, renamed when complete, and read into a run.

A checkpoint is a folder `checkpoints/step-00001000` with the shards of `torch.distributed.checkpoint` and
`checkpoint.json`, which lists them with sizes and checksums. A folder is renamed to `step-...` only when it is
complete. `storage.py` reads and writes the files; `weights.py` reads models from them.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from mfengine.configs import check_at_least, from_json, read_json
from mfengine.data.format import LatentSpace
from mfengine.engine.storage import Planner, Reader, Sum, Writer, intact
from mfengine.errors import InputError
from mfengine.files import sync, write_atomic, writing
from mfengine.methods import OBJECTIVES
from mfengine.networks import NETWORKS
from mfengine.pickles import Refused, explained
from mfengine.ranks import World

# A single process has no process group, by design.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

T = TypeVar("T")

DESCRIPTION = "checkpoint.json"
_WHOLE = re.compile(r"step-(\d{8})")


class Checkpointer:
    """Writes a run's checkpoints.

    Args:
        folder: the run's folder.
        world: the ranks that write.
        keep: how many of the newest checkpoints to keep.
        keep_every: also keep every checkpoint whose step is a multiple of this.
        best: returns the best of these steps, whose checkpoint is kept, too, or None.
        asynchronous: write in the background. `save` then only copies the state into host memory, which is allocated
            once (in torch 2.11, for each save) and pinned if the state is on a GPU. `poll` and `wait` report how the
            write ended.

    Attributes:
        newest: the newest complete checkpoint.
        failed: why the last checkpoint could not be written; None if it was written or is still being written.
        notes: failures since the reader last emptied the list.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        keep: int,
        asynchronous: bool,
        keep_every: int = 0,
        best: Callable[[list[int]], int | None] = lambda steps: None,
    ) -> None:
        self._folder, self._world = folder / "checkpoints", world
        self._keep, self._keep_every, self._best = keep, keep_every, best
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        if asynchronous:
            cuda = world.device.type == "cuda"
            # A new thread starts on the first GPU: without this, every rank would create a context there.
            self._writer = ThreadPoolExecutor(
                1, initializer=partial(torch.cuda.set_device, world.device) if cuda else None
            )
            # Copies are queued after the optimizer's step and waited for: later work may change the weights.
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
                )
            )
            # The background write needs a process group of its own, apart from that of training.
            self._group = dist.new_group(backend="gloo") if world.sharded else None
        self.newest = world.on_main(lambda: newest_checkpoint(folder))
        self.failed: str | None = None
        self.notes: list[str] = []

    def save(self, step: int, state: dict[str, Any], description: dict[str, Any]) -> None:
        """Write a checkpoint of `step`; every rank calls it.

        Args:
            step: optimizer steps done.
            state: nested dict of tensors and picklable values.
            description: content of checkpoint.json, to which the step is added.
        """
        self.wait()
        description = {"step": step, **description}
        if self._writer is None:
            self._write(step, state, description)
        else:
            staged = self._stager.stage(state)
            assert isinstance(staged, dict)
            self._writing = self._writer.submit(self._write, step, staged, description)

    def poll(self) -> None:
        """Record the result of a background write that has ended."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the background write, if there is one."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, step: int, state: dict[str, Any], description: dict[str, Any]) -> None:
        """Write a folder under a temporary name, rename it when it is complete, and remove old ones."""
        unfinished, whole = (self._folder / f"{name}-{step:08d}" for name in (".partial-step", "step"))
        try:
            writer = Writer(unfinished)
            dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=not self._world.sharded)
            sums = self._gather(writer.sums)
            if self._world.main:  # all ranks have written by now: rank 0 writes the metadata last
                description["files"] = {name: each._asdict() for name, each in sorted(sums.items())}
                description["crc32"] = _own_checksum(description)
                write_atomic(unfinished / DESCRIPTION, json.dumps(description, indent=1) + "\n")
                sync(unfinished)
                unfinished.rename(whole)
                sync(self._folder)
        except (dcp.CheckpointException, OSError) as error:
            if self._world.main:
                shutil.rmtree(unfinished, ignore_errors=True)  # it may have filled the disk
            self.failed = f"cannot write {whole}: {_reason(error)}; last complete checkpoint: {self.newest or 'none'}"
            self.notes.append(self.failed)
            return
        self.newest, self.failed = whole, None
        if self._world.main:
            try:
                for old in self._superfluous():
                    # Renamed first: a kill during the removal must not leave a folder that looks complete.
                    doomed = old.with_name(f".removed-{old.name}")
                    old.rename(doomed)
                    shutil.rmtree(doomed)
            except OSError as error:  # for example, because it is in use
                self.notes.append(f"cannot remove {old}: {error.strerror}")

    def _superfluous(self) -> list[Path]:
        """Checkpoints to remove."""
        whole = {int(path.name.removeprefix("step-")): path for path in _whole_checkpoints(self._folder)}
        kept = {*[*whole][-self._keep :], self._best([*whole])}
        if self._keep_every:
            kept |= {step for step in whole if step % self._keep_every == 0}
        return [path for step, path in whole.items() if step not in kept]

    def _gather(self, sums: dict[str, Sum]) -> dict[str, Sum]:
        """The sums of all ranks, on rank 0."""
        if not self._world.sharded:
            return sums
        everyones: list[dict[str, Sum]] | None = [{} for _ in range(self._world.size)] if self._world.main else None
        dist.gather_object(sums, everyones, group=self._group)
        return {name: each for part in everyones or () for name, each in part.items()}


def remove_leftovers(run: Path) -> None:
    """Remove unfinished checkpoints of a killed job from a run folder: they may fill the disk."""
    for leftover in (*run.rglob(".partial-*"), *run.glob("checkpoints/.removed-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _WHOLE.fullmatch(path.name))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    return next(iter(checkpoints_of(run)), None)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return _whole_checkpoints(run / "checkpoints")[::-1]


def find_checkpoint(path: Path) -> Path:
    """The path if it is a checkpoint, the newest one if it is a run folder, else InputError."""
    if (path / DESCRIPTION).is_file() and not path.resolve().name.startswith("."):
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise InputError(f"{path} must be a checkpoint, a run folder with a checkpoint, or a .safetensors file")
    return newest


def first_whole(checkpoints: list[Path], read: Callable[[Path], T]) -> tuple[T, list[str]]:
    """The result of `read` for the first readable checkpoint, and the problem of each one before it.

    Args:
        checkpoints: at least one.
        read: reads a checkpoint; raises InputError, on all ranks alike.

    Raises:
        InputError: no checkpoint is readable.
    """
    problems: list[str] = []
    for checkpoint in checkpoints:
        try:
            return read(checkpoint), problems
        except InputError as error:
            problems.append(str(error))
    older = f"; none of the {len(problems) - 1} older one(s) can be read either" if problems[1:] else ""
    raise InputError(problems[0] + older)


def set_aside(damaged: list[Path]) -> None:
    """Rename checkpoints to `damaged-...`, to make room for new ones of the same steps."""
    for checkpoint in damaged:
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        with writing(aside):
            if aside.exists():
                shutil.rmtree(aside)
            checkpoint.rename(aside)


@dataclass(frozen=True)
class _Progress:
    """Fields of checkpoint.json besides network, objective and latent space; an export has only the step."""

    step: int
    parts: int = 1
    skipped_steps: int = 0
    ema_decays: tuple[float, ...] = (0.0,)
    class_names: tuple[str, ...] = ()  # in the order of the labels; () if unknown

    def __post_init__(self) -> None:
        check_at_least(0, step=self.step, skipped_steps=self.skipped_steps)
        check_at_least(1, parts=self.parts)
        if not self.ema_decays:
            raise ValueError("ema_decays must not be empty")


def read_description(checkpoint: Path) -> dict[str, Any]:
    """Contents of checkpoint.json; InputError if they are invalid, or a listed file has the wrong size."""
    path = checkpoint / DESCRIPTION
    description = read_json(path)
    for name in ("parts", "skipped_steps", "ema_decays"):
        if name not in description:
            raise InputError(f"{path}: {name} is missing")
    for name, expected in _files(checkpoint, description).items():
        file = checkpoint / name
        if not file.is_file():
            raise InputError(f"{checkpoint} is damaged: {name} is missing")
        if (size := file.stat().st_size) != expected.bytes:
            raise InputError(f"{checkpoint} is damaged: {name} has {size} bytes, not {expected.bytes}")
    return checked(description, path)


def checked(description: dict[str, Any], where: Path) -> dict[str, Any]:
    """The description of a checkpoint or an export if it is valid; otherwise InputError."""
    fields = [field.name for field in dataclasses.fields(_Progress)]
    from_json(_Progress, {name: description[name] for name in fields if name in description}, where)
    model = NETWORKS.read(description, "model", where)
    OBJECTIVES.read(description, "method", where)
    space = latent_space(description, where)
    if (space.shape, space.num_classes) != (model.latent_shape, model.num_classes):
        raise InputError(
            f"{where}: space.shape {space.shape} with {space.num_classes} classes does not fit the model, which takes "
            f"{model.latent_shape} with {model.num_classes}"
        )
    if len(names := description.get("class_names", ())) not in (0, space.num_classes):
        raise InputError(f"{where}: class_names has {len(names)} entries for {space.num_classes} classes")
    return description


def latent_space(description: dict[str, Any], where: Path) -> LatentSpace:
    return from_json(LatentSpace, description.get("space"), where, "space.")


def _files(checkpoint: Path, description: dict[str, Any]) -> dict[str, Sum]:
    """The files of a checkpoint by name; empty for version 0.1, which did not list them."""
    try:
        return {name: Sum(**values) for name, values in description.get("files", {}).items()}
    except (AttributeError, TypeError):
        raise InputError(f"{checkpoint / DESCRIPTION} does not list sizes and checksums of files") from None


def _own_checksum(description: dict[str, Any]) -> int:
    """Checksum of the contents of checkpoint.json, independent of their layout."""
    content = {name: value for name, value in description.items() if name != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def load_state(
    checkpoint: Path, description: dict[str, Any], state: dict[str, Any], world: World, skip_checksums: bool = False
) -> None:
    """Fill `state` in place with the values of a checkpoint under the same keys.

    Each file is checked against its checksum by one rank during the read. Nothing in the files is executed.

    Args:
        checkpoint: the checkpoint's folder.
        description: its description; before version 0.2 it has no checksums.
        state: nested dict of tensors and values.
        world: the ranks that read, each its part of the state; every one calls this.
        skip_checksums: skip the check.

    Raises:
        InputError: the checkpoint is damaged, lacks part of the state, or has other shapes. `state` may then be partly
            filled.
    """
    files = {} if skip_checksums else _files(checkpoint, description)
    names = sorted(files)
    error: BaseException | None = None
    try:
        reader = Reader(checkpoint)
    except (OSError, ValueError, Refused) as failed:
        error = failed
    failures = world.gather([error is not None])  # either all ranks read, or none
    damaged: list[int] = []
    if not failures.any():
        with ThreadPoolExecutor(4) as pool:
            mine = names[world.rank :: world.size]
            good = pool.map(lambda name: intact(checkpoint / name, files[name]), mine)
            try:
                dcp.load(state, storage_reader=reader, planner=Planner(), no_dist=not world.sharded)
            except dcp.CheckpointException as failed:
                error = next(iter(failed.failures.values()))[0]
                if isinstance(error, KeyboardInterrupt):
                    raise error from None
            except (RuntimeError, ValueError) as failed:
                error = failed
            damaged = [names.index(name) for name, is_good in zip(mine, good, strict=True) if not is_good]
    ranks = world.gather([min(damaged, default=len(names)), error is not None])  # each knows only its own files
    first = int(ranks[:, 0].min())
    if first < len(names):
        raise InputError(f"{checkpoint} is damaged: the content of {names[first]} has changed")
    summed = description.keys() & {"files", "crc32"}  # one damaged key must not make it look like an old version
    if summed and not skip_checksums and description.get("crc32") != _own_checksum(description):
        raise InputError(f"{checkpoint} is damaged: the content of {DESCRIPTION} has changed")
    if isinstance(error, pickle.UnpicklingError) and not isinstance(error, Refused):
        error = explained(error)
    if isinstance(error, Refused):
        raise InputError(f"{checkpoint} would run {error} when unpickled: refused")
    if ranks[:, 1].any():
        raise InputError(f"cannot read {checkpoint}: {_reason(error) if error else 'another rank could not'}")


def _reason(error: BaseException) -> str:
    """The disk error behind it, or else its last line: DCP's messages begin with the tracebacks of all ranks."""
    cause: BaseException | None = error
    if isinstance(error, dcp.CheckpointException):
        cause = next(iter(error.failures.values()))[0]
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if cause is not None and cause.strerror:
        return cause.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
