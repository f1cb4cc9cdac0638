"""Batches of latents for training: DALI reads shards on the host, PyTorch draws from the posteriors on the device."""

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

SHUFFLE_BUFFER = 4096  # samples a reader holds to draw from: 134 MB of 4 x 32 x 32 latents with both flips


class Loader:
    """Endless batches of latents and labels from one part of the data.

    The data is dealt in `num_parts` equal parts, one per rank and accumulation pass. Within an epoch each sample is
    drawn once; parts change hands after each epoch, and batches run over its end. A flip is chosen anew each time.

    Args:
        dataset: where to read.
        batch: rows per batch.
        part, num_parts: which part of the data to read.
        seed: of shuffling and flips.
        device: where the latents are made.
        position: to continue from, as `position` returned it.

    Raises:
        InputError: there are fewer samples than parts.
        RankError: a shard cannot be read; also from `draw` and `next`.
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
        from nvidia.dali.plugin.pytorch import DALIGenericIterator  # importing mfengine does not need DALI

        self._dataset, self._device = dataset, device
        self._scale, self._bias = dataset.space.factors(device)
        pipeline = _pipeline(dataset, batch, part, num_parts, seed, position)
        with self._readable():
            self._batches = DALIGenericIterator([pipeline], ["moments", "labels"])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The next batch, with latents drawn from their posteriors.

        DALI hands over float16 moments and PyTorch draws: on two cores that is ten times as fast as DALI's own
        random numbers, and nothing of it need be saved to repeat it.

        Args:
            generator: a host generator; the noise on the device is seeded from it.

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
        """The state of reader and random numbers after the last batch."""
        return self._batches.checkpoints()[0]

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn DALI's report of unreadable data into the one line of it that says why."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).rpartition("encountered:")[2].strip().splitlines()[0]
            reason = re.sub("^Assert on .* failed: ", "", reason)
            raise RankError(f"cannot read {self._dataset.folder}: {reason}") from None


def _pipeline(dataset: Dataset, batch: int, part: int, num_parts: int, seed: int, position: bytes | None) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    paths = [dataset.folder / shard.file for shard in dataset.shards]

    # On the host alone, DALI depends on no driver and there are no streams to order.
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
            dont_use_mmap=True,  # to read a mapped shard beyond its end kills the process
        )
        moments = fn.reshape(moments, shape=[dataset.flips, 2, *dataset.space.shape])
        flip = fn.random.coin_flip() if dataset.flips > 1 else 0
        return moments[flip], label  # (2, C, H, W)

    return pipeline()
