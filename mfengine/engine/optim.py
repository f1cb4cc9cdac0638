"""The optimizer and the moving averages of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mfengine.engine.config import OptimConfig
from mfengine.engine.distributed import free_gathered, local


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in one pass over each parameter (fused), with its state there from the beginning.

    Reading the state of an optimizer that has none yet would make it, by a step that counts.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


class EMA:
    """Exponential moving averages of a model's parameters, average <- d average + (1 - d) parameter.

    Args:
        model: sharded or not; the averages are laid out as its parameters are, in float32.
        decays: one average for each d.
    """

    def __init__(self, model: nn.Module, decays: tuple[float, ...]) -> None:
        self._model = model
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: p.detach().clone() for name, p in model.named_parameters()} for decay in decays
        }

    @torch.no_grad()
    def update(self) -> None:
        parameters = [local(p) for p in self._model.parameters()]
        for decay, average in self.averages.items():
            torch._foreach_lerp_([local(a) for a in average.values()], parameters, 1 - decay)

    @contextmanager
    def applied(self, decay: float) -> Iterator[None]:
        """The model has the weights of one average inside, its own again after."""
        kept = [local(p).detach().clone() for p in self._model.parameters()]
        self._load([local(a) for a in self.averages[decay].values()])
        try:
            yield
        finally:
            self._load(kept)

    @torch.no_grad()
    def _load(self, values: list[Tensor]) -> None:
        free_gathered(self._model)
        torch._foreach_copy_([local(p) for p in self._model.parameters()], values)
