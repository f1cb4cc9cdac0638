"""Metrics of a run's weights, computed on the device and read once they are ready, so that the host never waits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfengine import torch_private
from mfengine.device import HostCopy
from mfengine.engine.distributed import parameter_groups
from mfengine.networks import Network
from mfengine.optim import AdamWEMA, local
from mfengine.ranks import World


class WeightHealth:
    """Weight norm of each block, and norm of the last update relative to it.

    The update is that of AdamW without weight decay, computed from the moments after the step. A block is a unit of
    `Network.shard_units`, named as in the state dict; `other` holds all parameters outside the units.

    Args:
        model: a model from `prepare_model`.
        optimizer: the optimizer of its parameters.
        world: the ranks, each with its part of the weights.
        replicas: copies of the sharded model.
    """

    def __init__(self, model: Network, optimizer: AdamWEMA, world: World, replicas: int) -> None:
        self._optimizer, self._world, self._replicas = optimizer, world, replicas
        names = {module: name for name, module in model.named_modules()}
        self._blocks = {names[unit.module] or "other": parts for unit, parts in parameter_groups(model) if parts}
        self._copy: HostCopy | None = None

    @torch.no_grad()
    def measure(self) -> None:
        """Queue the measurement, after a step of the optimizer."""
        self._copy = HostCopy(torch.stack([x for parts in self._blocks.values() for x in self._squares(parts)]))

    def read(self) -> dict[str, float]:
        """`weight_norm/BLOCK` and `update_ratio/BLOCK` of the last measurement, once; every rank calls it."""
        if self._copy is None:
            return {}
        squares = self._world.gather(self._copy.values()).sum(0) / self._replicas
        self._copy = None
        figures = {}
        for block, weights, update in zip(self._blocks, squares[::2].sqrt(), squares[1::2].sqrt(), strict=True):
            figures[f"weight_norm/{block}"] = float(weights)
            figures[f"update_ratio/{block}"] = float(update / weights)
        return figures

    def _squares(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Sums of squares () of this rank's part of these weights, and of their last update."""
        group = self._optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        states = [self._optimizer.state[p] for p in parameters]
        averages, squares = ([local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        step = states[0]["step"]
        root = (1 - beta2**step).sqrt()  # for the bias correction
        divisors = torch_private.foreach_sqrt(squares)
        torch_private.foreach_add(divisors, group["eps"] * root)
        updates = torch_private.foreach_div(averages, divisors)
        norms = (torch.stack(torch_private.foreach_norm(parts)) for parts in (list(map(local, parameters)), updates))
        weights, update = (norm.square().sum() for norm in norms)
        return weights, update * (group["lr"] * root / (1 - beta1**step)).square()
