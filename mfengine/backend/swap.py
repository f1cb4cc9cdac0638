"""Replaces attention and adaLN in any model by fused ones, in place."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mfengine import ops
from mfengine.backend.sdpa import scaled_dot_product_attention

ROWS, TOKENS = 2, 16  # shape of the random input for checking a swap


@dataclass(frozen=True)
class Swaps:
    """What `accelerate` did, by module name; `print` it."""

    swapped: dict[str, str] = field(default_factory=dict)
    """module name -> what the module is now, from this or an earlier call"""
    left: dict[str, str] = field(default_factory=dict)
    """name of a module that looks like attention or adaLN -> why it was left unchanged"""

    def __str__(self) -> str:
        lines = []
        for verb, modules in (("swapped", self.swapped), ("left", self.left)):
            groups = defaultdict(list)
            for name, what in modules.items():
                groups[what].append(name or "the model itself")
            for what, names in groups.items():
                shown = ", ".join(names if len(names) < 4 else [names[0], "...", names[-1]])
                lines.append(f"{verb} {len(names)} ({shown}): {what}")
        return "\n".join(lines) or (
            "found no block of DiT, SiT, timm or diffusers to swap; other attention is differentiable "
            "inside `with mfengine.jvp_attention():`"
        )


def accelerate(model: nn.Module) -> Swaps:
    """Replace a model's attention and adaLN by ones that are differentiable in forward mode and fused on a GPU.

    Known families: timm's `Attention` as in DiT and SiT (qkv, proj, num_heads, scale), the blocks of DiT and SiT
    (norm1, attn, norm2, mlp, adaLN_modulation), diffusers' `Attention` and its adaLN-zero `BasicTransformerBlock`. A
    module is recognised by its attributes. It is swapped only if the old and the new forward agree on a small random
    input with random parameters, on its device and in its dtype, in evaluation and in training. Modules with the same
    configuration are checked once. A module that differs stays unchanged, and the report says why.

    Parameters, buffers, state-dict keys, names and hooks stay. A swapped module becomes a subclass of its class, so
    isinstance, copy, pickle and torch.compile work as before; diffusers' attention gets a processor. A second call
    changes nothing. Attention becomes that of `jvp_attention`; adaLN becomes `ops.adaln_modulate` and
    `ops.gated_residual_adaln`, which raise if a gradient reaches their tangents where they are fused.

    Args:
        model: any module; its children are searched too.

    Returns:
        What was swapped and what was left. If nothing was swapped, there is a warning.

    Raises:
        ValueError: model is not an `nn.Module`.

    Example:
        >>> import mfengine
        >>> print(mfengine.accelerate(model))  # doctest: +SKIP
        swapped 28 (blocks.0.attn, ..., blocks.27.attn): attention
        swapped 28 (blocks.0, ..., blocks.27): adaLN block
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    swaps = Swaps()
    verdicts: dict[Any, str | None] = {}  # configuration -> result of the check
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("mfengine."):  # already ours
            continue
        family = next((family for family in _FAMILIES if family.fits(module)), None)
        if family is None:
            if "attention" in kind.__name__.lower() or hasattr(module, "adaLN_modulation"):
                swaps.left[name] = f"{kind.__name__}: {_UNKNOWN}"
            continue
        if not family.done(module):
            if reason := _why_not(family, module, verdicts):
                swaps.left[name] = f"{kind.__name__}: {reason}"
                continue
            family.put(module)
        swaps.swapped[name] = family.title
    if not swaps.swapped:
        warnings.warn(f"nothing was swapped: {swaps}", stacklevel=2)
    return swaps


# ----------------------------------------------------------------------------
# New forwards. A swapped module's class is a subclass of one of these and of its old class.


class _Swapped(nn.Module):
    _argument_names: tuple[str, ...]  # of the old forward

    def _first(self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The first arguments of the forward, by position or by name; None if others are given, too."""
        if len(args) > len(self._argument_names):
            return None
        named = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        first = [named.pop(name, None) for name in self._argument_names[:count]]
        return None if any(a is None for a in first) or _any_given(*named.values()) else first

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The subclass is in no module, so copy and load must make it again."""
        new, old = type(self).__bases__
        return _empty, (new, old), self.__getstate__()


class _TimmAttention(_Swapped):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, D) -> (B, N, D); the old forward for a mask or any other argument."""
        first = self._first(1, args, kwargs)
        if first is None or first[0].ndim != 3:
            return super().forward(*args, **kwargs)
        (x,) = first
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d)
        q, k = _apply(self, "q_norm", q), _apply(self, "k_norm", k)
        dropout = self.attn_drop.p if self.training and hasattr(self, "attn_drop") else 0.0
        o = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        o = _apply(self, "norm", o.transpose(1, 2).flatten(2))  # (B, N, D)
        return _apply(self, "proj_drop", self.proj(o))


class _DiTBlock(_Swapped):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, D), c (B, C) -> (B, N, D); the old forward for any other argument."""
        first = self._first(2, args, kwargs)
        if first is None or (first[0].ndim, first[1].ndim) != (3, 2):
            return super().forward(*args, **kwargs)
        x, c = first
        return _block(x, self.adaLN_modulation(c), self.norm1, self.attn, self.norm2, self.mlp)


class _DiffusersBlock(_Swapped):
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None, timestep: Any = None, cross_attention_kwargs: Any = None,
        class_labels: Any = None, added_cond_kwargs: Any = None,
    ) -> Tensor:  # fmt: skip
        """hidden_states (B, N, D), timestep (B,), class_labels (B,) -> (B, N, D); the old forward for a mask."""
        context = attention_mask, encoder_hidden_states, encoder_attention_mask
        if hidden_states.ndim != 3 or _any_given(*context, cross_attention_kwargs, self._chunk_size):
            return super().forward(
                hidden_states, *context, timestep, cross_attention_kwargs, class_labels, added_cond_kwargs
            )
        x, norm = hidden_states, self.norm1
        modulation = norm.linear(norm.silu(norm.emb(timestep, class_labels, hidden_dtype=x.dtype)))
        return _block(x, modulation, norm.norm, self.attn1, self.norm3, self.ff)


class _DiffusersProcessor:
    """Attention processor for diffusers; calls the old processor for a mask or any other argument."""

    def __init__(self, old: Any) -> None:
        self.old = old

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """hidden_states (B, N, D), encoder_hidden_states (B, M, C) -> (B, N, D)."""
        others = attention_mask, attn.spatial_norm, attn.group_norm, attn.norm_cross
        if hidden_states.ndim != 3 or _any_given(*others):
            return self.old(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)  # (B, H, N or M, d)
        q, k = _apply(attn, "norm_q", q), _apply(attn, "norm_k", k)
        o = scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)  # (B, N, H * d)
        o = attn.to_out[1](attn.to_out[0](o))
        if attn.residual_connection:
            o = o + hidden_states
        return o / attn.rescale_output_factor


def _block(x: Tensor, modulation: Tensor, norm1: Any, attn: Any, norm2: Any, mlp: Any) -> Tensor:
    """adaLN-zero block: x (B, N, D), modulation (B, 6 D) -> (B, N, D)."""
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # each (B, D)
    o = ops.adaln_modulate(x, shift_attn, scale_attn, norm1.eps)
    x, o = ops.gated_residual_adaln(x, attn(o), gate_attn, shift_mlp, scale_mlp, norm2.eps)
    return x + gate_mlp.unsqueeze(1) * mlp(o)


def _apply(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """x through a child module that only some versions of a class have."""
    child = getattr(module, name, None)
    return x if child is None else child(x)


def _any_given(*arguments: Any) -> bool:
    return any(a is not None and a is not False for a in arguments)


@cache
def _subclass(new: Any, old: Any) -> Any:
    names = tuple(inspect.signature(old.forward).parameters)[1:]
    body = {"__module__": old.__module__, "__qualname__": old.__qualname__, "_argument_names": names}
    return type(old.__name__, (new, old), body)


def _empty(new: type, old: type) -> Any:
    cls = _subclass(new, old)
    return cls.__new__(cls)


# ----------------------------------------------------------------------------
# Families: how to recognise a module, and which input to check it with.


class _Family:
    title = "adaLN block"
    attributes: tuple[str, ...]
    new: type
    inputs: Callable[[Any, Callable[..., Tensor]], tuple[Any, ...]]  # arguments for a module's forward

    def fits(self, module: Any) -> bool:
        return all(hasattr(module, name) for name in self.attributes)

    def done(self, module: Any) -> bool:
        return isinstance(module, self.new)

    def unfit(self, module: Any) -> str | None:
        """A reason against a swap that is known before anything runs."""
        return "its forward was replaced on the instance" if "forward" in vars(module) else None

    def put(self, module: Any) -> None:
        module.__class__ = _subclass(self.new, module.__class__)


class _TimmAttentions(_Family):
    title = "attention"
    attributes = ("qkv", "proj", "num_heads", "scale")
    new = _TimmAttention

    def inputs(self, module: Any, randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        return (randn(ROWS, TOKENS, module.qkv.in_features),)


class _DiTBlocks(_Family):
    attributes = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
    new = _DiTBlock

    def unfit(self, module: Any) -> str | None:
        return super().unfit(module) or _unfit_norms(module.norm1, module.norm2)

    def inputs(self, module: Any, randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        width, condition = module.norm1.normalized_shape[0], module.adaLN_modulation[-1].in_features
        return randn(ROWS, TOKENS, width), randn(ROWS, condition)


class _DiffusersAttentions(_Family):
    title = "attention"
    attributes = ("to_q", "to_k", "to_v", "to_out", "heads", "processor", "set_processor")
    new = _DiffusersProcessor
    processors = ("AttnProcessor", "AttnProcessor2_0")

    def done(self, module: Any) -> bool:
        return isinstance(module.processor, self.new)

    def unfit(self, module: Any) -> str | None:
        name = type(module.processor).__name__
        if name not in self.processors:
            return f"its processor is {name}; known ones are {' and '.join(self.processors)}"
        return super().unfit(module)

    def put(self, module: Any) -> None:
        module.set_processor(_DiffusersProcessor(module.processor))

    def inputs(self, module: Any, randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        x = randn(ROWS, TOKENS, module.to_q.in_features)
        return (x, randn(ROWS, TOKENS, module.to_k.in_features)) if module.is_cross_attention else (x,)


class _DiffusersBlocks(_Family):
    attributes = ("norm1", "attn1", "norm3", "ff", "norm_type")
    new = _DiffusersBlock

    def fits(self, module: Any) -> bool:
        return super().fits(module) and module.norm_type == "ada_norm_zero"

    def unfit(self, module: Any) -> str | None:
        if module.attn2 is not None or module.pos_embed is not None or hasattr(module, "fuser"):
            return "it has cross-attention, positions or a fuser"
        return super().unfit(module) or _unfit_norms(module.norm1.norm, module.norm3, module.norm1)

    def inputs(self, module: Any, randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        x = randn(ROWS, TOKENS, module.norm3.normalized_shape[0])
        index = torch.arange(ROWS, device=x.device)
        return x, None, None, None, index, None, index  # times and labels


_FAMILIES = (_TimmAttentions(), _DiTBlocks(), _DiffusersAttentions(), _DiffusersBlocks())
_UNKNOWN = "not a known family (its scaled_dot_product_attention works inside jvp_attention())"


def _unfit_norms(norm1: Any, norm2: Any, *around: nn.Module) -> str | None:
    for norm in (norm1, norm2):
        if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
            return f"its norm is {type(norm).__name__}, not a LayerNorm over channels"
        if norm.elementwise_affine:
            return "its LayerNorm has parameters of its own"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(norm, name) for norm in (norm1, norm2, *around) for name in hooks):
        return "its norms have hooks, which would not be called"
    return None


# ----------------------------------------------------------------------------
# Whether old and new forward agree.


def _configuration(module: nn.Module) -> Any:
    """Modules with equal configurations compute the same function of their parameters."""

    def settings(part: nn.Module) -> Any:
        for name, value in vars(part).items():
            yield name, repr(value) if isinstance(value, (bool, int, float, str, tuple)) else type(value)
        for name, x in (*part._parameters.items(), *part._buffers.items()):
            yield name, x if x is None else (x.shape, x.dtype, x.device)

    return tuple((name, type(part), *settings(part)) for name, part in module.named_modules())


def _why_not(family: _Family, module: nn.Module, verdicts: dict[Any, str | None]) -> str | None:
    """A reason against swapping the module, or None."""
    try:
        if reason := family.unfit(module):
            return reason
        key = _configuration(module)
        if key not in verdicts:
            verdicts[key] = _difference(family, module)
        return verdicts[key]
    except Exception as e:  # the model's own code may fail in any way on this input
        return f"it could not be checked: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def _difference(family: _Family, module: nn.Module) -> str | None:
    """How the new forward differs from the old one. Both run on copies with random parameters, in both modes."""
    old = copy.deepcopy(module)
    like = next(p for p in old.parameters() if p.is_floating_point())
    if like.is_meta:
        return "it is on the meta device, where nothing can be checked"
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    with torch.no_grad():
        for p in old.parameters():
            if p.ndim and p.numel():
                p.copy_(randn(*p.shape) * (p.shape[0] / p.numel()) ** 0.5)
    new = copy.deepcopy(old)
    family.put(new)
    inputs = family.inputs(old, randn)
    for training in (False, True):
        expected, actual = (_run(part.train(training), inputs) for part in (old, new))
        if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
            return "its forward returns a different shape or dtype from ours"
        if not (expected - actual).norm() <= torch.finfo(like.dtype).eps ** 0.5 * expected.norm():
            return "its forward computes something different from ours" + " in training" * training
    return None


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The output, with the same dropout each time. Restores the random generators."""
    devices = {x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return module(*inputs)
