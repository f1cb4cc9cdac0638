"""Reads a whole data set: is it intact, and can a model be trained on it?"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mfengine.data.format import DESCRIPTION, Dataset, Shard
from mfengine.data.normalisation import ChannelSums, describe
from mfengine.errors import InputError
from mfengine.progress import progress

USUAL_MEAN, USUAL_STD = 0.5, (0.5, 2.0)  # limits for the latents as the network sees them; noise has mean 0, std 1


@dataclass
class Report:
    """The result of a check. The data set is intact if there are no `problems`."""

    dataset: Dataset
    problems: list[str] = field(default_factory=list)  # one line each
    warnings: list[str] = field(default_factory=list)  # one line each: unusual, but possibly intended
    class_counts: Counter[int] = field(default_factory=Counter)
    sums: ChannelSums = field(default_factory=lambda: ChannelSums(0))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(C,), per channel, of the latents as the network sees them"""
    std: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(C,)"""


def verify(folder: Path) -> Report:
    """Check the description, the checksums, the indices and every sample of a data set.

    Raises:
        InputError: there is no data set, or its description is too broken to check anything against.
    """
    dataset = Dataset.read(folder)
    sums = ChannelSums(dataset.space.shape[0])
    report = Report(dataset, sums=sums)
    size = sum(shard.bytes for shard in dataset.shards)
    with progress(size, "B", scale=True) as bar:
        for shard in dataset.shards:
            try:
                report.problems += _shard_problems(dataset, shard, report.class_counts, sums)
            except (InputError, OSError) as error:
                report.problems.append(str(error))
            bar.update(shard.bytes)
    if not report.problems and dataset.class_counts:
        counted = tuple(report.class_counts[label] for label in range(dataset.space.num_classes))
        if counted != dataset.class_counts:
            report.problems.append(f"the class counts in {DESCRIPTION} do not match the samples")
    if sums.count:
        scale, bias = map(np.array, (dataset.space.scale, dataset.space.bias))
        report.mean, report.std = (sums.mean - bias) * scale, sums.std * abs(scale)
    report.warnings += _unusual(report)
    return report


def _unusual(report: Report) -> Iterator[str]:
    dataset, counts = report.dataset, report.class_counts
    if not all(shard.sha256 for shard in dataset.shards):
        yield "some shards have no checksum: a changed byte in them goes unnoticed"
    empty = [label for label in range(dataset.space.num_classes) if not counts[label]]
    if empty and not report.problems:  # an unreadable sample may belong to any class
        yield f"{len(empty)} of {dataset.space.num_classes} classes have no samples, the first is {empty[0]}"
    for channel, (mean, std) in enumerate(zip(report.mean, report.std, strict=True)):
        if not (abs(mean) <= USUAL_MEAN and USUAL_STD[0] <= std <= USUAL_STD[1]):
            yield (
                f"channel {channel} has mean {mean:.3g} and standard deviation {std:.3g} after normalisation by "
                f"{describe(dataset.space)}, far from the 0 and 1 of noise: check that the right images were encoded, "
                "or change the normalisation with `mfengine.prepare normalise`"
            )


def _shard_problems(dataset: Dataset, shard: Shard, classes: Counter[int], sums: ChannelSums) -> Iterator[str]:
    """The problems of one shard, the first of each kind. Adds the shard's samples to `classes` and `sums`."""
    dataset.check_shard(shard)
    path = dataset.folder / shard.file
    lines = path.with_suffix(".idx").read_text(errors="replace").splitlines()[1:]
    if len(lines) != shard.count:
        yield f"index of shard {path} has {len(lines)} samples, not {shard.count}"
    found: dict[str, list[str]] = {}  # problem -> names of its samples
    with path.open("rb") as data:
        if shard.sha256 and hashlib.file_digest(data, "sha256").hexdigest() != shard.sha256:
            yield f"shard {path} has changed since it was written: its checksum differs from the one in {DESCRIPTION}"
        for line in lines:
            name, problem = _sample_problem(dataset, shard, data, line, classes, sums)
            if problem:
                found.setdefault(problem, []).append(name)
    for problem, names in found.items():
        more = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
        yield f"sample {names[0]} of shard {path} is wrong: {problem}{more}"


def _sample_problem(
    dataset: Dataset, shard: Shard, data: BinaryIO, line: str, classes: Counter[int], sums: ChannelSums
) -> tuple[str, str]:
    """A sample's name, from its line in the index, and its problem, or ""."""
    fields = line.split()
    if len(fields) != 8 or fields[0] != "moments" or fields[4] != "label":
        return repr(line[:40]), "its line in the index is malformed"
    name = fields[3].partition(".")[0]
    parts: dict[str, bytes] = {}
    for kind, offset, size, member in (fields[:4], fields[4:]):
        ends = tarfile.BLOCKSIZE, shard.bytes - dataset.sizes[kind]  # first and last possible offset
        if not (offset.isdigit() and size == str(dataset.sizes[kind]) and ends[0] <= int(offset) <= ends[1]):
            return name, f"the index puts the {kind} outside the shard"
        data.seek(int(offset) - tarfile.BLOCKSIZE)
        block, parts[kind] = data.read(tarfile.BLOCKSIZE), data.read(int(size))
        if len(parts[kind]) < int(size):
            raise OSError(f"shard {dataset.folder / shard.file} became shorter while it was read")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            return name, f"there is no file where the index puts the {kind}"
        if (header.name, header.size) != (member, int(size)):
            return name, f"there is a different file where the index puts the {kind}"
    moments = np.frombuffer(parts["moments"], "<f2").astype(np.float32).reshape(dataset.flips, 2, *dataset.space.shape)
    (label,) = np.frombuffer(parts["label"], "<i4").tolist()
    if not 0 <= label < dataset.space.num_classes:
        return name, f"its label is {label}; labels are 0 to {dataset.space.num_classes - 1}"
    classes[label] += 1
    if not np.isfinite(moments).all():
        return name, "its moments are not all finite"
    if (moments[:, 1] < 0).any():
        return name, "a standard deviation is negative"
    sums.add(moments)
    return name, ""
