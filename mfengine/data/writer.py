"""Writing data sets: any number of ranks write samples of any source to shards, in a global random order.

The order is one random permutation of the samples, and shard k is a fixed slice of it, however many ranks there are.
Ranks take shards in turn. A finished shard is renamed first; then its content and checksum are recorded. A writer that
was killed continues after the recorded shards, also with another number of ranks. Until all shards are written, the
files lie beside the future data set:

    .partial-NAME/plan.json           source, order and encoder: the writer continues only with the same
    .partial-NAME/000000.json ...     content of the finished shards
    .partial-NAME/data/000000.tar ... renamed to NAME at the end, with dataset.json in it
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from mfengine.configs import check_at_least, check_seed, flatten, read_json
from mfengine.data.format import BROKEN, DESCRIPTION, INDEX_VERSION, Dataset, LatentSpace, Shard
from mfengine.data.normalisation import ChannelSums, Normalisation, measured, published
from mfengine.errors import InputError, reason
from mfengine.files import check_writable, sync, write_atomic
from mfengine.progress import progress
from mfengine.ranks import World

T = TypeVar("T")

SHARD_BYTES = 2**30
ALONE = World(0, 1, torch.device("cpu"))
PLAN = "plan.json"
MEETING_S = 2.0  # how often the ranks exchange their progress
TIMEOUT_S = 60.0  # for files from another node to appear


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be read."""

    name: str
    """path or key by which the user finds it"""
    reason: str
    """one line"""


class Samples(Protocol):
    """Samples that any rank can read, in any order and repeatedly.

    Attributes:
        name: name of the data set.
        space: space of the latents.
        flips: 2 with mirror images, else 1.
        class_names: in the order of the labels; () if unknown.
        provenance: everything else that determines the content of the samples, as JSON: a fingerprint of the source
            (for example of its names and sizes), name and hash of the encoder, crop, size and precision. A writer that
            was killed continues only with the same. It is written to dataset.json.
    """

    @property
    def name(self) -> str: ...
    @property
    def space(self) -> LatentSpace: ...
    @property
    def flips(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def provenance(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int] | Broken]:
        """One sample for each index, in that order. Called once per shard, with all of the shard's indices.

        The result must depend on `indices` alone: samples that are encoded in batches need batches cut from `indices`.

        Args:
            indices: (n,) int64.

        Yields:
            Moments (flips, 2, C, H, W), cast to float16 if necessary, and the label; or Broken.

        Raises:
            InputError: reading cannot continue.
        """
        ...


@dataclass(frozen=True)
class ArraySamples:
    """Samples in memory."""

    name: str
    space: LatentSpace
    moments: np.ndarray
    """(count, flips, 2, C, H, W)"""
    labels: np.ndarray
    """(count,) integers"""
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def flips(self) -> int:
        return self.moments.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        for i in indices:
            yield self.moments[i], int(self.labels[i])


def order(count: int, seed: int) -> np.ndarray:
    """The order in which samples are written: a permutation of 0, ..., count - 1."""
    return np.random.default_rng(seed).permutation(count)


def check_vacant(folder: Path, source: Path | None = None) -> None:
    """InputError if a data set cannot be put there: something is in the way, or it cannot be renamed to that place.

    Args:
        folder: the data set's future place.
        source: a folder that must stay unchanged.
    """
    if source is not None and folder.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{folder} is inside the source {source}: write the data set to another place")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose another one, or remove it first")
    if folder.is_symlink() or folder.is_mount() or folder.resolve() == Path.cwd():
        raise InputError(
            f"{folder} is a link, a mount point or the current folder. A finished data set cannot be renamed to it: "
            "choose a new folder inside it"
        )
    check_writable(folder)


def check_settings(seed: int, max_broken: float, shard_samples: int | None = None) -> None:
    """ValueError if a setting of `write_dataset` is out of range."""
    check_seed(seed)
    check_at_least(1, shard_samples=shard_samples)
    if not 0 <= max_broken < 1:
        raise ValueError(f"max_broken must be at least 0 and less than 1, not {max_broken:g}")


def write_dataset(
    folder: Path,
    samples: Samples,
    world: World = ALONE,
    *,
    seed: int = 0,
    shard_samples: int | None = None,
    max_broken: float = 0.0,
    normalisation: Normalisation | None = None,
) -> Dataset:
    """Write a data set, or continue one; its folder gets its name when it is complete.

    Every rank calls this with the same arguments and gets the same data set. If `samples` is deterministic, its shards
    are identical, byte for byte, to those of a single uninterrupted rank. The first rank shows the progress of all.

    Args:
        folder: must not exist, or be empty.
        samples: the samples to write.
        world: the ranks that share the work.
        seed: seed of the order.
        shard_samples: samples per shard; None makes shards of about 1 GB.
        max_broken: the largest share of broken samples to accept; they are skipped and listed.
        normalisation: normalisation of the latents; None takes that of `samples`. "measured" measures what is written.

    Raises:
        InputError: the folder is not empty; the normalisation is for other latents; another data set was begun
            there; there are no samples, or one contradicts what `samples` says; too many are broken; the disk
            is full. Finished shards remain, and the same call continues after them.
    """
    if len(samples) == 0:
        raise InputError(f"{samples.name} has no samples")
    if shard_samples is None:
        shard_samples = max(1, SHARD_BYTES // _tar_bytes(samples))
    check_settings(seed, max_broken, shard_samples)
    with closing(_Writer(folder, samples, shard_samples, seed, normalisation)) as writer:
        _share_out(writer, world, max_broken)
        return world.on_main(writer.finish)


def _share_out(writer: _Writer, world: World, max_broken: float) -> None:
    """Write all missing shards, this rank its own; the ranks meet every few seconds."""
    whole = world.on_main(writer.begin)
    pending = [shard for shard in range(writer.num_shards) if shard not in whole]
    total = len(writer.samples)
    done = sum(count + broken for count, broken in whole.values())
    broken = sum(broken for _, broken in whole.values())
    found: list[Broken] = []  # by this rank
    ended = False
    with (
        closing(writer.write(pending[world.rank :: world.size])) as work,
        progress(total, "samples", initial=done, enabled=world.main) as bar,
    ):
        while not ended:
            finished, known, error = 0, len(found), None
            meeting = time.monotonic() + MEETING_S
            try:
                for outcome in work:
                    finished += 1
                    if outcome:
                        found.append(outcome)
                    if time.monotonic() > meeting:
                        break
                else:
                    ended = True
            except InputError as failure:
                error = str(failure)
            news = world.gather([finished, len(found) - known, ended, error is not None]).sum(0).tolist()
            if news[3]:
                raise InputError(next(message for message in _gather(world, error) if message))
            done, broken, ended = done + int(news[0]), broken + int(news[1]), news[2] == world.size
            bar.update(int(news[0]))
            if broken > max_broken * total:
                lists = _gather(world, found)
                report = world.on_main(lambda: writer.report([b for part in lists for b in part]))  # noqa: B023
                raise InputError(
                    f"{broken} of the first {done} samples are broken; --max-broken allows {max_broken:g} of all "
                    f"{total}. {report}"
                )


def _gather(world: World, value: T) -> list[T]:
    """The values of all ranks, in order."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


class _Writer:
    """One rank's part of writing a data set."""

    def __init__(
        self, folder: Path, samples: Samples, shard_samples: int, seed: int, normalisation: Normalisation | None
    ) -> None:
        self.folder, self.samples, self.shard_samples = folder, samples, shard_samples
        self.partial = folder.absolute().with_name(f".partial-{folder.absolute().name}")
        self.data = self.partial / "data"
        self.order = order(len(samples), seed)
        self.num_shards = math.ceil(len(samples) / shard_samples)
        self.lock: IO[str] | None = None  # held by the first rank from `begin` on
        self.made = False  # whether the first rank has made the partial folder
        self.measured = normalisation == "measured"
        space = samples.space
        if normalisation is not None and normalisation != "measured":
            space = published(space, normalisation)
        self.plan = {
            "name": samples.name,
            "count": len(samples),
            "seed": seed,
            "shard_samples": shard_samples,
            "flips": samples.flips,
            "space": dataclasses.asdict(space),
            "class_names": samples.class_names,
            "provenance": samples.provenance,
            **({"normalisation": "measured"} if self.measured else {}),
        }

    def begin(self) -> dict[int, tuple[int, int]]:
        """Make or find the partial folder; returns {shard: (samples, broken samples)} of its finished shards."""
        check_vacant(self.folder)
        self.made = not self.partial.exists()
        with self._disk():
            self.data.mkdir(parents=True, exist_ok=True)
            self.lock = (self.partial / "lock").open("w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing {self.folder}") from None
            except OSError:
                pass  # the file system has no locks
        path, plan = self.partial / PLAN, json.loads(json.dumps(self.plan))
        if path.exists():
            was, now = flatten(read_json(path)), flatten(plan)
            for name in now | was:
                # The same encoder may lie elsewhere: its checksum is compared instead.
                if was.get(name) == now.get(name) or name == "provenance.vae.name":
                    continue
                raise InputError(
                    f"{self.partial} was begun with {name} {was.get(name)!s:.80}, not {now.get(name)!s:.80}: "
                    f"continue with the same, or remove it to start again"
                )
        with self._disk():
            if not path.exists():
                _write_json(path, plan)
        records = {k: self._record(k) for k in range(self.num_shards)}
        return {k: (record["count"], len(record["broken"])) for k, record in records.items() if record}

    def _record(self, shard: int) -> dict[str, Any] | None:
        """The record of a finished shard; None if there is none."""
        try:
            record: dict[str, Any] = json.loads((self.partial / f"{shard:06d}.json").read_text())
            if record["count"] == 0:
                return record
            tar = self.data / record["file"]
            with tar.with_suffix(".idx").open() as index:
                indexed = index.readline().split() == [INDEX_VERSION, str(record["count"])]
            return record if indexed and tar.stat().st_size == record["bytes"] else None
        except (OSError, ValueError, KeyError, TypeError):  # missing, or incomplete after a power failure
            return None

    def report(self, found: list[Broken]) -> str:
        """Write the list of broken samples, new and recorded ones, and say where it is."""
        records = [record for k in range(self.num_shards) if (record := self._record(k))]
        broken = [sample for record in records for sample in record["broken"]]
        broken += [sample for sample in map(dataclasses.asdict, found) if sample not in broken]
        path = self.partial / BROKEN
        with self._disk():
            _write_lines(path, broken)
        return f"{path} lists them; the first is {broken[0]['name']}: {broken[0]['reason']}"

    def close(self) -> None:
        """Let another process write. Removes what was begun here unless a later run can use it."""
        if self.made and not any(self.partial.glob("[0b]*.json*")):  # no finished shards and no list of broken samples
            shutil.rmtree(self.partial, ignore_errors=True)
        if self.lock:
            self.lock.close()

    def write(self, shards: list[int]) -> Generator[Broken | None, None, None]:
        """Write shards. Yields one value per sample: Broken if it is broken, None if it was written."""
        for shard in shards:
            yield from self._write_shard(shard)

    def _write_shard(self, shard: int) -> Iterator[Broken | None]:
        samples, first = self.samples, shard * self.shard_samples
        path = self.data / f"{shard:06d}.tar"
        partial = path.with_suffix(".tar.partial")
        indices = self.order[first : first + self.shard_samples]
        entries: list[str] = []
        classes: Counter[int] = Counter()
        broken: list[Broken] = []
        sums = ChannelSums(samples.space.shape[0])
        with self._disk():
            file = partial.open("wb")
        try:
            tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            for number, sample in enumerate(samples.read(indices), start=first):
                if isinstance(sample, Broken):
                    broken.append(sample)
                    yield sample
                    continue
                moments, label = self._checked(*sample, index=int(self.order[number]))
                with self._disk():
                    entries.append(_add(tar, number, moments, label))
                classes[label] += 1
                if self.measured:
                    sums.add(moments)
                yield None
            found = len(entries) + len(broken)
            if found != len(indices):
                raise InputError(f"{samples.name} gave {found} samples for shard {shard} instead of {len(indices)}")
            with self._disk():
                tar.close()
                file.close()
                sync(partial)
                with partial.open("rb") as written:
                    digest = hashlib.file_digest(written, "sha256").hexdigest()
                record = {
                    "file": path.name,
                    "count": len(entries),
                    "bytes": partial.stat().st_size,
                    "sha256": digest,
                    "classes": dict(sorted(classes.items())),
                    "broken": [dataclasses.asdict(sample) for sample in broken],
                    **({"sums": sums.to_json()} if self.measured else {}),
                }
                if entries:
                    partial.rename(path)
                    write_atomic(path.with_suffix(".idx"), "\n".join([f"{INDEX_VERSION} {len(entries)}", *entries, ""]))
                _write_json(self.partial / f"{shard:06d}.json", record)
        finally:
            with suppress(OSError):  # the disk may be full
                file.close()
            partial.unlink(missing_ok=True)

    def _checked(self, moments: np.ndarray, label: int, index: int) -> tuple[np.ndarray, int]:
        samples, space = self.samples, self.samples.space
        if moments.shape != (samples.flips, 2, *space.shape):
            raise InputError(
                f"sample {index} of {samples.name} has moments of shape {moments.shape}, not "
                f"{(samples.flips, 2, *space.shape)}"
            )
        if not 0 <= label < space.num_classes:
            raise InputError(
                f"sample {index} of {samples.name} has label {label}; labels are 0 to {space.num_classes - 1}"
            )
        return moments.astype("<f2"), label

    def finish(self) -> Dataset:
        """Describe the data set and move it to its place; InputError unless all of its shards exist."""
        records, deadline = [], time.monotonic() + TIMEOUT_S
        for shard in range(self.num_shards):
            # Network file systems show files from another node with a delay.
            while (record := self._record(shard)) is None and time.monotonic() < deadline:
                time.sleep(0.5)
            if record is None:
                raise InputError(f"shard {shard} of {self.partial} is missing: run the same command again to write it")
            records.append(record)
        broken = [sample for record in records for sample in record["broken"]]
        classes: Counter[int] = Counter()
        for record in records:
            classes.update({int(label): count for label, count in record["classes"].items()})
        space = self.plan["space"]
        if self.measured:
            sums = ChannelSums(self.samples.space.shape[0])
            for record in records:  # in this order, so that any number of ranks gets the same bits
                sums.merge(record["sums"])
            space = dataclasses.asdict(measured(self.samples.space, sums))
        values = {
            **{name: self.plan[name] for name in ("name", "flips", "class_names", "provenance")},
            "space": space,
            "count": classes.total(),
            "shards": [{f.name: r[f.name] for f in dataclasses.fields(Shard)} for r in records if r["count"]],
            "broken": len(broken),
            "class_counts": [classes[label] for label in range(self.samples.space.num_classes)],
        }
        with self._disk():
            if broken:
                _write_lines(self.data / BROKEN, broken)
            _write_json(self.data / DESCRIPTION, values)
            if self.folder.exists():
                self.folder.rmdir()
            self.data.rename(self.folder)
            sync(self.partial.parent)
            shutil.rmtree(self.partial)
        return Dataset.read(self.folder)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn a disk error into one line."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                total = _tar_bytes(self.samples) * len(self.samples) / 1e9
                why = f"the disk is full ({error.strerror}); the whole data set needs {total:.3g} GB"
            else:
                why = reason(error)
            remain = ""
            if any(self.partial.glob("0*.json")):
                remain = f". The finished shards are in {self.partial}; run the same command again to continue"
            raise InputError(f"cannot write {self.folder}: {why}{remain}") from None


def _add(tar: tarfile.TarFile, number: int, moments: np.ndarray, label: int) -> str:
    """Add a sample to a shard; returns its line in the index."""
    entry = []
    for extension, array in (("moments", moments), ("label", np.array(label, "<i4"))):
        member = tarfile.TarInfo(f"{number:09d}.{extension}")
        member.size = array.nbytes
        offset = tar.offset + tarfile.BLOCKSIZE  # the header is one block
        tar.addfile(member, BytesIO(array.tobytes()))
        entry.append(f"{extension} {offset} {member.size} {member.name}")
    return " ".join(entry)


def _tar_bytes(samples: Samples) -> int:
    """Bytes of a sample in a shard: two components in whole blocks, each with a header."""
    moments = 2 * samples.flips * 2 * math.prod(samples.space.shape)
    return tarfile.BLOCKSIZE * (math.ceil(moments / tarfile.BLOCKSIZE) + 3)


def _write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(value) + "\n" for value in values))


def _write_json(path: Path, values: Any) -> None:
    write_atomic(path, json.dumps(values, indent=1) + "\n")
