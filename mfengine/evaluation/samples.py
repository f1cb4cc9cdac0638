"""Samples that do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mfengine.data.format import LatentSpace
from mfengine.methods import Sampler, sample
from mfengine.ranks import World


@dataclass(frozen=True)
class SampleSet:
    """Samples to draw from a model, numbered from 0.

    Noise and label of sample i derive from (seed, i) alone. The network is called on fixed slices of the numbers, dealt
    to the ranks in turn. So any number of ranks draws the same samples. On CPUs they are equal to the bit if the
    processes have the same number of threads.
    """

    space: LatentSpace
    count: int
    batch: int
    """samples per call of the network"""
    seed: int = 0
    labels: Literal["balanced", "random"] | tuple[int, ...] = "balanced"
    """balanced: sample i has label i modulo the number of classes; a tuple: labels that samples take in turn"""
    sampler: Sampler = sample
    """sampler of the model's objective"""

    def draw(self, model: nn.Module, steps: int, world: World) -> Iterator[tuple[range, Tensor, Tensor]]:
        """This rank's share of the samples.

        Every rank calls the network equally often, because a sharded model needs it. A rank with no slice left repeats
        its last one and drops the result.

        Args:
            model: on the ranks' devices.
            steps: network evaluations per sample.
            world: the ranks that share the work.

        Yields:
            The numbers of n samples, their latents (n, C, H, W) float32 and their labels (n,) int64, on the device.
        """
        slices = [range(self.count)[first : first + self.batch] for first in range(0, self.count, self.batch)]
        for first in range(0, len(slices), world.size):
            mine = first + world.rank
            rows = slices[min(mine, len(slices) - 1)]
            inputs = [self._inputs(i) for i in rows]
            noise, labels = (torch.stack(parts).to(world.device) for parts in zip(*inputs, strict=True))
            latents = self.sampler(model, noise, labels, steps)
            if mine < len(slices):
                yield rows, latents, labels

    def _inputs(self, i: int) -> tuple[Tensor, Tensor]:
        """Noise (C, H, W) and label () of sample i."""
        # The spawn key separates these random numbers from those of training step i.
        state = np.random.SeedSequence([self.seed, i], spawn_key=(1,)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        noise = torch.randn(self.space.shape, generator=generator)
        if self.labels == "balanced":
            return noise, torch.tensor(i % self.space.num_classes)
        if isinstance(self.labels, tuple):
            return noise, torch.tensor(self.labels[i % len(self.labels)])
        return noise, torch.randint(self.space.num_classes, (), generator=generator)
