"""Finds the source of the first value that is not finite, by repeating a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfengine.networks import Network
from mfengine.ops import Dual
from mfengine.optim import local
from mfengine.ranks import World
from mfengine.torch_private import tree_leaves

KINDS = ("weight", "latents", "guidance output", "output", "tangent", "loss", "gradient")


class _Check(NamedTuple):
    kind: int  # index into KINDS
    name: int  # index of the module or parameter, in the order of the network
    bad: Tensor  # () bool on the device


def first_nonfinite(model: Network, step: Callable[[], Iterator[tuple[str, Tensor]]], world: World) -> str:
    """Kind and place of the first value of a step that is not finite; every rank calls it.

    Modules are checked in the order in which they end, so the innermost one is named. Among gradients, the last
    parameter with a bad one is named, because a backward goes from the last to the first.

    Args:
        model: in its state before the step.
        step: repeats the step's passes and backwards on all ranks. It yields the latents and the loss of each pass as
            soon as it has them, and leaves the gradients in place.
        world: the ranks.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    checks: list[_Check] = [
        _Check(KINDS.index("weight"), i, ~local(p).detach().isfinite().all()) for i, p in enumerate(parameters.values())
    ]
    with _watched(model, checks):
        for kind, x in step():
            checks.append(_Check(KINDS.index(kind), 0, ~x.detach().isfinite().all()))
    for i, p in [*enumerate(parameters.values())][::-1]:
        if p.grad is not None:
            checks.append(_Check(KINDS.index("gradient"), i, ~local(p.grad).isfinite().all()))
    bad = torch.stack([check.bad for check in checks]).tolist()
    first = next((check for check, is_bad in zip(checks, bad, strict=True) if is_bad), None)
    # The first on any rank: values that are not finite reach the other ranks through the gradients.
    place: list[float] = [len(KINDS), 0] if first is None else [first.kind, first.name]
    ranks = world.gather(place).long().tolist()
    rank = min(range(len(ranks)), key=lambda i: ranks[i][0])
    kind, name = ranks[rank]
    if kind == len(KINDS):
        return "the step is finite when repeated: the error is not reproducible"
    what = KINDS[kind]
    if what in ("latents", "loss"):
        return f"the first value is in the {what} on rank {rank}"
    names = list(parameters) if what in ("weight", "gradient") else list(modules)
    return f"the first value is in the {what} of {names[name] or 'the network'} on rank {rank}"


@contextmanager
def _watched(model: Network, checks: list[_Check]) -> Iterator[None]:
    """Record the outputs of all modules in `checks`, in the order in which they occur."""
    guiding = False

    def begin(*_: Any) -> None:
        nonlocal guiding
        guiding = not torch.is_grad_enabled()  # asked of the whole network: blocks may compute without a graph

    def hook(i: int) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if type(output) is tuple else (output,)
            for x in outputs:
                for kind, leaf in (("output", x[0]), ("tangent", x[1])) if isinstance(x, Dual) else (("output", x),):
                    for tensor in tree_leaves(leaf):
                        if isinstance(tensor, Tensor) and tensor.is_floating_point():
                            kind = "guidance output" if guiding and kind == "output" else kind
                            checks.append(_Check(KINDS.index(kind), i, ~local(tensor).detach().isfinite().all()))

        return look

    handles = [model.register_forward_pre_hook(begin)]
    handles += [module.register_forward_hook(hook(i)) for i, module in enumerate(model.modules())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
