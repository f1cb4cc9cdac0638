"""Calls any network u(z, t, h, y), and its JVP: with explicit tangents, or under `torch.func.jvp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mfengine.ops import differentiable_tangents

AnyNetwork = Callable[..., Any]
"""u(z, t, h, y) with an attribute `num_classes`: a module, or a function."""

Tangents = tuple[Tensor, Tensor, Tensor]
"""(dz, dt, dh) of the last K <= B rows: (K, C, H, W), (K,), (K,)."""


def null_class(network: AnyNetwork) -> int:
    """The label that stands for no label: `num_classes` of the network, also inside DDP or torch.compile.

    Raises:
        ValueError: the network has no such attribute.
    """
    for holder in (network, unwrapped(network)):
        if isinstance(null := getattr(holder, "num_classes", None), int):
            return null
    raise ValueError(
        f"{_name(network)} does not say which label is the null class; set it: `model.num_classes = 1000` for "
        "labels 0 to 999 and an embedding of 1001"
    )


def velocity(network: AnyNetwork, z: Tensor, t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """u(z, t, h, y) for B >= 0 rows, in the dtype of z.

    Some networks fail on zero rows, so they get one row of zeros and its output is dropped.

    Raises:
        TypeError: the network does not return a tensor.
        ValueError: the shape of the result differs from that of z.
    """
    if not len(z):
        return velocity(network, *(x.new_zeros(1, *x.shape[1:]) for x in (z, t, h, y)))[:0]
    u = network(z, t, h, y)
    if not isinstance(u, Tensor):
        raise TypeError(
            f"{_name(network)} returned {type(u).__name__}; u(z, t, h, y) must return one tensor in the shape of z "
            "(for a diffusers model, take `.sample` of the result)"
        )
    if u.shape != z.shape:
        raise ValueError(f"{_name(network)} returned {tuple(u.shape)}; u must have the shape of z, {tuple(z.shape)}")
    return u.to(z.dtype)


def velocity_and_jvp(
    network: AnyNetwork, z: Tensor, t: Tensor, h: Tensor, y: Tensor, tangents: Tangents
) -> tuple[Tensor, Tensor]:
    """u (B, C, H, W) with its graph, and the JVP (K, C, H, W) of its last K rows without one.

    A network with `takes_tangents = True` takes all rows at once. Any other is called twice: for the rows without a
    tangent, and under `torch.func.jvp` for the rest.

    Raises:
        TypeError, ValueError: as in `velocity`.
        NotImplementedError: part of the network is not differentiable in forward mode.
    """
    inner = unwrapped(network)
    if getattr(inner, "takes_tangents", False):
        return network(z, t, h, y, tangents=tangents)
    _check_sharding(inner)
    plain = len(z) - len(tangents[0])
    parts = []
    # The forward of DDP or of a compiled network is not differentiable in forward mode, so the JVP takes the network
    # inside. DDP reduces the gradients of all calls in a step as long as one of them goes through it: this one.
    if plain or inner is not network:
        parts.append(velocity(network, z[:plain], t[:plain], h[:plain], y[:plain]))

    def u_of(z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return velocity(inner, z, t, h, y[plain:])

    try:
        # With hooks, the backward would fail with a less helpful error.
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS), differentiable_tangents(False):
            u, du = torch.func.jvp(u_of, (z[plain:], t[plain:], h[plain:]), tangents)  # type: ignore[misc]
    except RuntimeError as error:  # or its subclass NotImplementedError
        reason = str(error).partition("\n")[0]
        if reason != _HOOKS and not any(sign in reason for sign in _SIGNS):
            raise
        hint = "" if reason == _HOOKS else f" {_HINT}"
        raise NotImplementedError(f"{_name(network)} cannot be differentiated forward: {reason}{hint}") from error
    return torch.cat([*parts, u]), du.detach()


def unwrapped(network: AnyNetwork) -> AnyNetwork:
    """The network inside DDP and torch.compile. FSDP2 does not wrap: it changes the class of a module."""
    if isinstance(network, DistributedDataParallel):
        return unwrapped(network.module)
    if isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
        return unwrapped(inner)
    return network


# ----------------------------------------------------------------------------
# Networks that are not differentiable in forward mode.

_SIGNS = ("forward AD", "forward mode AD", "functorch transforms")  # in PyTorch's messages
_HINT = (
    "If this is attention, compute the loss inside `with mfengine.jvp_attention():`, or, if blocks are those of DiT, "
    "SiT, timm or diffusers, swap them once with `mfengine.accelerate(model)`. If it is activation checkpointing, turn "
    "it off. If it is an autograd.Function of your own, give it setup_context and jvp."
)
_HOOKS = "activation checkpointing, or another hook on saved tensors, does not work under a JVP: turn it off"


def _check_sharding(network: AnyNetwork) -> None:
    """NotImplementedError for FSDP2 before torch 2.13, on every rank alike."""
    if torch.__version__ >= "2.13" or not isinstance(network, nn.Module):
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in network.modules()):
        raise NotImplementedError(
            f"torch {torch.__version__} cannot differentiate FSDP2 forward (pytorch #182641): use torch >= 2.13, "
            "DistributedDataParallel, or a network with `takes_tangents`, as mfengine.DiT"
        )


def _name(network: AnyNetwork) -> str:
    inner = unwrapped(network)
    return getattr(inner, "__name__", type(inner).__name__)
