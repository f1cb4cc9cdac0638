"""What a training step costs whatever the machine: FLOPs, bytes saved, launches, waits. Counted exactly, without a GPU.

The step of the workload runs on meta tensors, which have shapes and no values, through the operators that a GPU would
run; a dispatch mode sees each of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import OURS, Update
from benchmarks.workload import torch_pair, training_step
from mfengine.engine.flops import sample_flops
from mfengine.methods import MeanFlowConfig
from mfengine.networks import ModelConfig
from mfengine.ops import use_backend
from mfengine.ops.flops import FlopCounterMode

META = torch.device("meta")
IDLE = {"detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "promote_types", "_unsafe_view"}
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")

_SHAPES = torch.library.Library("aten", "IMPL", "Meta")
_SHAPES.impl("_fused_sgd_", lambda *args, **kwargs: None)  # PyTorch has none for meta tensors


def launches(func: Any) -> bool:
    """Whether an operator gives the device something to do: no view, no bare allocation, no bookkeeping."""
    space, _, name = func._schema.name.partition("::")
    returns = func._schema.returns
    view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return space in ("aten", "mfengine", "fsdp", "c10d") and name not in IDLE and not view


class Recorder(TorchDispatchMode):
    """Counts the operators that launch kernels, one or more each, and those for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        result = func(*args, **(kwargs or {}))
        read, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        if any(x.is_meta for x in read) and (name in WAITS or any(not x.is_meta for x in made)):
            self.waits += 1
        self.launches += launches(func) and any(x.is_meta for x in read + made)
        return result


class Saved(saved_tensors_hooks):
    """Bytes that a forward keeps for its backward, beside the parameters."""

    def __init__(self) -> None:
        super().__init__(self._pack, lambda x: x)
        self._kept: dict[int, Tensor] = {}  # by storage; the tensor is held, so that no other gets its place

    def _pack(self, x: Tensor) -> Tensor:
        base = x._base if x._is_view() and x._base is not None else x
        if x.is_meta and not (base.is_leaf and base.requires_grad):
            self._kept[x.untyped_storage()._cdata] = x
        return x

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self._kept.values())


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, each tensor once per operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if launches(func):
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                unread = written and func._schema.name == "aten::_foreach_copy_"
                # Fused AdamW may write gradients, but does so only where it scales them.
                left = argument.name == "grads" and (kwargs or {}).get("grad_scale") is None
                self.bytes += (2 if written and not unread and not left else 1) * _bytes(value)
            if any(r.alias_info is None for r in func._schema.returns):
                self.bytes += _bytes(result)
        return result


def _bytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))


def count_optimizer(implementation: str, update: Update) -> dict[str, float]:
    """Bytes per parameter that a step of the optimizer moves: ours by the CUDA library, or else PyTorch's pair."""
    if implementation == OURS:
        return {"bytes_per_parameter": update.bytes}
    p = torch.nn.Parameter(torch.zeros(2**20, device=META))
    p.grad = torch.zeros_like(p)
    copies = [torch.empty_like(p, dtype=torch.bfloat16)] if update.copy else None
    step = torch_pair([p], update.clip_norm, copies)
    with Traffic() as traffic:
        step()
    return {"bytes_per_parameter": round(traffic.bytes / p.numel(), 2)}


def count(model: ModelConfig, objective: MeanFlowConfig, implementation: str, batch: int = 256) -> dict[str, Any]:
    """Counts of one optimizer step, in bfloat16 through the fused ops, as on a GPU.

    Args:
        model, objective, implementation: as `training_step`; a peer is counted in float32, meta tensors having no
            autocast, and so without its bytes.
        batch: rows.

    Returns:
        `flops` per sample, and `forwards`, the same in forward passes; for ours also `launches` and `host_waits` per
        step, and `saved_bytes` per sample and layer: what the forward keeps for the backward.
    """
    ours = implementation == OURS
    dtype = torch.bfloat16 if ours else torch.float32
    with use_backend("triton"):
        step = training_step(model, objective, batch, META, dtype, 1, implementation)
        with FlopCounterMode(display=False) as flops, Recorder() as recorder:
            step()
        per_sample = flops.get_total_flops() / batch
        found = {"flops": per_sample, "forwards": per_sample / sample_flops(model, objective)}
        if not ours:
            return found
        kept = []
        for depth in (1, 2):
            step = training_step(dataclasses.replace(model, depth=depth), objective, batch, META, dtype, 1, OURS)
            saved = Saved()
            with saved:
                step()
            kept.append(saved.bytes)
    return found | {
        "launches": recorder.launches,
        "host_waits": recorder.waits,
        "saved_bytes": (kept[1] - kept[0]) / batch,
    }
