"""PyTorch's `scaled_dot_product_attention`, made differentiable in forward mode for models that call it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mfengine.ops.attention import attention
from mfengine.ops.backend import chosen, fused
from mfengine.torch_private import multi_head_attention_forward, transformed


def jvp_attention() -> AbstractContextManager[Any]:
    """Make `torch.nn.functional.scaled_dot_product_attention` differentiable in forward mode inside.

    For any model, by whatever name it imported the function, and for `torch.nn.MultiheadAttention`. Works under
    `torch.func.jvp`, `torch.func.jacfwd` and `torch.autograd.forward_ad`, with backward through the output afterwards,
    and in `torch.compile`, whether the context is inside of the compiled function or around it. Outside of forward mode
    PyTorch's own attention runs, as without the context.

    In forward mode the fused kernel runs where `mfengine.ops.attention` would run it and takes the arguments: q (B, H,
    N, d), k and v (B, H, M, d) of one dtype, float16, bfloat16 or float32, with d a multiple of 8 up to 128. All else
    is computed by plain PyTorch, correctly but with the scores in memory: attn_mask, is_causal and dropout_p, of which
    a warning tells once each; enable_gqa, other shapes and dtypes; `torch.func.vmap`, `grad` or a second jvp around the
    jvp, so `jacfwd` too. A gradient that reaches a fused tangent raises: to differentiate it, `use_backend("torch")`.
    `torch.utils.checkpoint` recomputes without tangents, and raises an error of its own.

    Raises:
        ValueError: in forward mode under `use_backend("triton")`, whatever the fused kernel does not take.

    Example:
        >>> import torch, mfengine
        >>> def model(x):
        ...     return torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> x, dx = torch.randn(2, 2, 4, 8, 16)
        >>> with mfengine.jvp_attention():
        ...     y, dy = torch.func.jvp(model, (x,), (dx,))
        >>> dy.shape
        torch.Size([2, 4, 8, 16])
    """
    return _ForwardModeAttention()


class _ForwardModeAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's function, which is what runs outside of forward mode; see `jvp_attention` for what runs in it."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not _forward_mode(query, key, value, attn_mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    query, key, value = _autocast(query, key, value)
    unfused = {"attn_mask": attn_mask is not None, "is_causal": is_causal, "dropout_p": dropout_p > 0}
    for name in (name for name, given in unfused.items() if given):
        if chosen() == "triton":
            raise ValueError(
                f'fused attention takes no {name} in forward mode; use_backend("auto") takes plain PyTorch'
            )
        if chosen() == "auto" and not torch.compiler.is_compiling():  # torch.compile cannot trace a warning
            _warn_plain(name)
    if not any(unfused.values()) and _fuses(query, key, value):
        return attention(query, key, value, scale)
    with sdpa_kernel(SDPBackend.MATH):  # the others are not differentiable in forward mode
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def _forward_mode(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors may have a tangent."""
    return transformed() or any(x is not None and fwad.unpack_dual(x).tangent is not None for x in tensors)


def _fuses(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if chosen() == "triton" or not fused(q):
        return chosen() == "triton"  # then what the kernels do not take is an error of theirs
    from mfengine.kernels.attention import check_arguments

    try:
        check_arguments(q, k, v)
    except ValueError:
        return False
    return True


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What PyTorch's function does to its arguments under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@cache
def _warn_plain(name: str) -> None:
    warnings.warn(
        f"forward mode through attention with {name} takes plain PyTorch: slower, and with the scores in memory",
        stacklevel=4,
    )


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward(scaled_dot_product_attention),
}
