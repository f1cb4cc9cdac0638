"""Registers our ops with PyTorch's FLOP counter. It imports Triton, so `mfengine.ops` does not import this module."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

import mfengine.ops  # noqa: F401 - declares them
from mfengine.ops.op import DECLARED

__all__ = ["FlopCounterMode", "flop_registry"]

for op in DECLARED:
    for operator, formula in op.flop_formulas().items():
        register_flop_formula(operator)(formula)
