"""PyTorch's `scaled_dot_product_attention`, made differentiable in forward mode for models that call it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mfengine.ops import use_backend
from mfengine.ops.adaln import written_out
from mfengine.ops.attention import attention
from mfengine.ops.backend import chosen, fused
from mfengine.ops.dual import accumulation_dtype, through_forward_mode
from mfengine.torch_private import multi_head_attention_forward, transformed


def jvp_attention() -> AbstractContextManager[Any]:
    """Make `torch.nn.functional.scaled_dot_product_attention` differentiable in forward mode inside this context.

    It works for any model, under whatever name the model imported the function, and for `torch.nn.MultiheadAttention`.
    It works under `torch.func.jvp`, `torch.func.jacfwd` and `torch.autograd.forward_ad`, and in `torch.compile`, with
    the context inside or around the compiled function. A backward may follow, through the output and through the
    tangent. Outside of forward mode, PyTorch's own attention runs, as without the context.

    In forward mode on a GPU, fused kernels compute q (B, H, N, d), k and v (B, G, M, d) of one dtype, float16, bfloat16
    or float32, with d a multiple of 8 up to 128, also with `is_causal`, a mask, or `enable_gqa`. Plain PyTorch, with
    the scores in memory, computes the rest. With a warning for each reason, once: dropout, other dtypes and shapes,
    and a mask that has a tangent or a gradient of its own. Without one: `torch.func.vmap`, `grad` or a second jvp
    around the jvp, and so `jacfwd`, too.

    PyTorch's gradients through the tangent of `torch.nn.functional.layer_norm` are wrong (pytorch #196700). Inside the
    context, it is therefore written out wherever forward mode keeps a graph. If the tangent will be detached,
    `mfengine.ops.differentiable_tangents(False)` keeps PyTorch's function, and fused attention saves no tangents.
    `torch.utils.checkpoint` recomputes without tangents, and raises an error of its own.

    Raises:
        ValueError: in forward mode under `use_backend("triton")`, for anything the fused kernels do not take.

    Example:
        >>> import torch, mfengine
        >>> def model(x):
        ...     return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
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
    """PyTorch's function, and what runs outside of forward mode; see `jvp_attention` for forward mode."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not _forward_mode(query, key, value, attn_mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    query, key, value = _autocast(query, key, value)
    why_not = None
    if chosen() == "triton" or fused(query):
        why_not = _why_not(query, key, value, attn_mask, dropout_p)
        if why_not and chosen() == "triton":
            raise ValueError(f'{why_not}; in forward mode use_backend("auto") takes plain PyTorch')
        if why_not and not torch.compiler.is_compiling():  # torch.compile cannot trace a warning
            _warn_plain(why_not)
    heads = [x.shape[1] for x in (query, key, value) if x.ndim == 4]
    if len(heads) == 3 and heads[1] == heads[2] and (enable_gqa or heads[0] == heads[1]) and not dropout_p:
        with use_backend("torch") if why_not else nullcontext():
            return attention(query, key, value, scale, is_causal, attn_mask)
    with sdpa_kernel(SDPBackend.MATH):  # the only one that is differentiable in forward mode
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """PyTorch's function, but written out if its tangent may be differentiated."""
    if not (through_forward_mode() and _forward_mode(input, weight, bias)):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    autocast = input.is_cuda and torch.is_autocast_enabled(input.device.type)  # to float32
    x = input.to(accumulation_dtype(input))
    n = written_out(x.flatten(-len(normalized_shape)), eps)[0].view(x.shape)
    n = n if weight is None else n * weight
    return (n if bias is None else n + bias).to(x.dtype if autocast else input.dtype)


def _forward_mode(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors may have a tangent."""
    return transformed() or any(x is not None and fwad.unpack_dual(x).tangent is not None for x in tensors)


def _why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> str | None:
    """Why the fused kernels cannot compute this attention; None if they can."""
    from mfengine.kernels.attention import check_arguments, check_mask

    if dropout > 0:
        return "dropout_p is not fused"
    if mask is not None and (fwad.unpack_dual(mask).tangent is not None or mask.requires_grad):
        return "an attn_mask with a tangent or a gradient is not fused"
    try:
        check_arguments(q, k, v)
        if mask is not None:
            check_mask(mask, q, k.shape[2])
    except ValueError as error:
        return str(error)
    return None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The arguments as PyTorch's function casts them under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@cache
def _warn_plain(why: str) -> None:
    warnings.warn(
        f"attention in forward mode uses plain PyTorch, which is slower and keeps the scores in memory: {why}",
        stacklevel=4,
    )


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward(scaled_dot_product_attention),
    F.layer_norm: layer_norm,
}
