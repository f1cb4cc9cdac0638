"""Costs of a training step on any machine: FLOPs, bytes saved, launches, waits. Counted exactly, without a GPU.

The step of the workload runs on meta tensors, which have shapes and no values, through the operators that would run on
a GPU. A dispatch mode counts them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.cases import OURS, Update
from benchmarks.operators import Recorder, total
from benchmarks.roofline import roofline
from benchmarks.workload import of_blocks, torch_pair, training_step
from mfengine.engine.config import TrainConfig
from mfengine.engine.flops import META, sample_flops
from mfengine.methods import ObjectiveConfig
from mfengine.networks.layers import TransformerConfig
from mfengine.ops import use_backend

_SHAPES = torch.library.Library("aten", "IMPL", "Meta")
_SHAPES.impl("_fused_sgd_", lambda *args, **kwargs: None)  # PyTorch lacks it for meta tensors


class Saved(saved_tensors_hooks):
    """Bytes that a forward saves for its backward, without the parameters."""

    def __init__(self) -> None:
        super().__init__(self._pack, lambda x: x)
        self._kept: dict[int, Tensor] = {}  # storage -> tensor, held so that no other one takes the same address

    def _pack(self, x: Tensor) -> Tensor:
        base = x._base if x._is_view() and x._base is not None else x
        if x.is_meta and not (base.is_leaf and base.requires_grad):
            self._kept[x.untyped_storage()._cdata] = x
        return x

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self._kept.values())


def count_optimizer(implementation: str, update: Update) -> dict[str, float]:
    """Bytes per parameter that an optimizer step moves: ours with the CUDA library, or PyTorch's pair."""
    if implementation == OURS:
        return {"bytes_per_parameter": update.bytes}
    p = torch.nn.Parameter(torch.zeros(2**20, device=META))
    p.grad = torch.zeros_like(p)
    copies = [torch.empty_like(p, dtype=torch.bfloat16)] if update.copy else None
    step = torch_pair([p], update.clip_norm, copies)
    with Recorder() as recorder:
        step()
    return {"bytes_per_parameter": round(total(recorder.operators, "read", "written") / p.numel(), 2)}


def count(
    model: TransformerConfig, objective: ObjectiveConfig, implementation: str, batch: int = 256
) -> dict[str, Any]:
    """Counts of one optimizer step, in bfloat16 with the fused ops, as on a GPU.

    Args:
        model, objective, implementation: as in `training_step`. A peer is counted in float32, because meta tensors have
            no autocast, and therefore without bytes.
        batch: rows.

    Returns:
        `flops` per sample, and `forwards`, the same in forward passes. For ours also `operators`, `launches` and
        `host_waits` per step, and `saved_bytes` per sample and layer, which the forward saves for the backward.
    """
    ours = implementation == OURS
    dtype = torch.bfloat16 if ours else torch.float32
    with use_backend("triton"):
        step = training_step(model, objective, batch, META, dtype, 1, implementation)
        with Recorder() as recorder:
            step()
        per_sample = total(recorder.operators, "flops") / batch
        found = {"flops": per_sample, "forwards": per_sample / sample_flops(model, objective)}
        if not ours:
            return found
        kept = []
        for depth in (2, 3):  # the difference is one layer; in improved MeanFlow, of the trunk
            step = training_step(of_blocks(model, depth), objective, batch, META, dtype, 1, OURS)
            saved = Saved()
            with saved:
                step()
            kept.append(saved.bytes)
    return found | {
        "operators": recorder.operators.total(),
        "launches": total(recorder.operators, "launches"),
        "host_waits": recorder.waits,
        "saved_bytes": (kept[1] - kept[0]) / batch,
    }


def count_roofline(config: TrainConfig, rows: int) -> dict[str, float]:
    """Sums of `python -m benchmarks.roofline` for an H200: `flops` per sample, the others per step."""
    found = roofline(config.model, config.method, rows, "h200", optim=config.optim)
    return {
        "flops": found.flops / rows,
        "moved_bytes": found.bytes,
        "operators": sum(found.dispatched.values()),
        "launches": sum(found.launches.values()),
        "least_ms": round(1e3 * sum(found.device.values()), 3),
    }
