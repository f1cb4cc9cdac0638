"""Batches of latents for training: DALI reads shards on the host, PyTorch samples the posteriors on the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mfengine.data.format import Dataset
from mfengine.device import device_generator, to_device
from mfengine.errors import InputError, RankError

SHUFFLE_BUFFER = 4096  # samples that a reader holds to draw from: 134 MB of 4 x 32 x 32 latents with both flips


class Loader:
    """Endless batches of latents and labels from one part of the data.

    The data is split into `num_parts` equal parts, one per rank and accumulation pass. Each sample is drawn once per
    epoch. Parts change hands after each epoch, batches span its end, and each draw chooses a flip anew.

    Args:
        dataset: the data set to read.
        batch: rows per batch.
        part, num_parts: which part of how many to read.
        seed: seeds shuffling and flips.
        device: where the latents are made.
        position: where to continue, from the attribute `position`.

    Raises:
        InputError: there are fewer samples than parts.
        RankError: a shard cannot be read. `draw` and `next` raise it, too.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        part: int,
        num_parts: int,
        seed: int,
        device: torch.device,
        position: bytes | None = None,
    ) -> None:
        if dataset.count < num_parts:
            raise InputError(f"{dataset.folder} has {dataset.count} samples, too few for {num_parts} parts")
        from nvidia.dali.plugin.pytorch import DALIGenericIterator  # here: importing mfengine does not need DALI

        self._dataset, self._device = dataset, device
        self._scale, self._bias = dataset.space.factors(device)
        pipeline = _pipeline(dataset, batch, part, num_parts, seed, position)
        with self._readable():
            self._batches = DALIGenericIterator([pipeline], ["moments", "labels"])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The next batch, with latents sampled from their posteriors.

        DALI hands over float16 moments, and PyTorch samples: on two cores that is ten times as fast as DALI's own
        random numbers, and there is no state to save for a resume.

        Args:
            generator: a host generator; it seeds the noise on the device.

        Returns:
            Latents (B, C, H, W) float32 on the device, labels (B,) int64 on the host.
        """
        moments, labels = next(self)
        mean, std = to_device(moments, self._device).unbind(1)  # (B, C, H, W) float16 each
        latents = torch.randn(mean.shape, generator=device_generator(generator, self._device), device=self._device)
        latents.mul_(std).add_(mean).sub_(self._bias).mul_(self._scale)
        return latents, labels

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch, on the host: moments (B, 2, C, H, W) float16, labels (B,) int64."""
        with self._readable():
            batch = next(self._batches)[0]
        y = batch["labels"].flatten().long()
        self._dataset.check_labels(int(y.min()), int(y.max()))
        return batch["moments"], y

    def position(self) -> bytes:
        """State of the reader and its random numbers after the last batch."""
        return self._batches.checkpoints()[0]

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Reduce DALI's report of unreadable data to the line that says why."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).rpartition("encountered:")[2].strip().splitlines()[0]
            reason = re.sub("^Assert on .* failed: ", "", reason)
            raise RankError(f"cannot read {self._dataset.folder}: {reason}") from None


def _pipeline(dataset: Dataset, batch: int, part: int, num_parts: int, seed: int, position: bytes | None) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    paths = [dataset.folder / shard.file for shard in dataset.shards]

    # On the host alone, DALI needs no driver, and there are no streams to order.
    @pipeline_def(  # type: ignore[call-overload]
        batch_size=batch,
        num_threads=2,
        device_id=None,
        seed=seed,
        enable_checkpointing=True,
        checkpoint=position,
    )
    def pipeline() -> tuple[Any, Any]:
        moments, label = fn.readers.webdataset(  # type: ignore[misc]
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["moments", "label"],
            dtypes=[types.DALIDataType.FLOAT16, types.DALIDataType.INT32],
            missing_component_behavior="error",
            shard_id=part,
            num_shards=num_parts,
            random_shuffle=True,
            initial_fill=min(SHUFFLE_BUFFER, dataset.count),
            dont_use_mmap=True,  # reading a mapped shard beyond its end would kill the process
        )
        moments = fn.reshape(moments, shape=[dataset.flips, 2, *dataset.space.shape])
        flip = fn.random.coin_flip() if dataset.flips > 1 else 0
        return moments[flip], label  # (2, C, H, W)

    return pipeline()
