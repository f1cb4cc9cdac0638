"""The optimizer of a training run, and its averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mfengine import torch_private
from mfengine.engine.config import OptimConfig
from mfengine.engine.distributed import free_gathered
from mfengine.errors import InputError
from mfengine.optim import AdamWEMA, local


def adamw_ema(model: nn.Module, config: OptimConfig) -> AdamWEMA:
    """The optimizer that `config` describes; InputError if its backend cannot be used here."""
    try:
        return AdamWEMA(
            model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            ema_decays=config.ema_decays,
            clip_norm=config.clip_norm,
            backend=config.backend,
        )
    except ValueError as error:
        raise InputError(f"--optim.{error}") from None


def averages(model: nn.Module, optimizer: AdamWEMA, decay: float) -> dict[str, Tensor]:
    """One moving average of each parameter, by name."""
    return {name: optimizer.average(p, decay) for name, p in model.named_parameters()}


@contextmanager
def averaged(model: nn.Module, optimizer: AdamWEMA, decay: float) -> Iterator[None]:
    """The model has the weights of one moving average inside, its own again after."""
    kept = [local(p).detach().clone() for p in model.parameters()]
    _load(model, [local(average) for average in averages(model, optimizer, decay).values()])
    try:
        yield
    finally:
        _load(model, kept)


@torch.no_grad()
def _load(model: nn.Module, values: list[Tensor]) -> None:
    free_gathered(model)
    torch_private.foreach_copy([local(p) for p in model.parameters()], values)
