"""adaLN: gated residual, LayerNorm without affine parameters, modulation.

x' = x + g * y;  n = (x' - mean) / sigma;  o = n * (1 + s) + b.
Tangent: dn = (dx' - mean(dx') - n * mean(n * dx')) / sigma;  do = dn * (1 + s) + n * ds + db.
The modulation s, b, g is per sample: (B, D) against tokens (B, N, D).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mfengine.ops.dual import A, accumulation_dtype, push

EPS = 1e-6  # of the reference code's LayerNorm


def adaln_modulate(x: A, shift: A, scale: A) -> A:
    """LN(x) * (1 + scale) + shift.

    Args:
        x: (B, N, D) float, the residual stream.
        shift, scale: (B, D) float.

    Returns:
        (B, N, D) in the dtype of scale; computed in float32.
    """
    return push(_modulate, _modulate_tangent, x, shift, scale)


def gated_residual(x: A, y: A, gate: A) -> A:
    """x + gate * y: x, y (B, N, D), gate (B, D); returns (B, N, D) in the dtype of x."""
    return push(_residual, _residual_tangent, x, y, gate)


def gated_residual_adaln(x: A, y: A, gate: A, shift: A, scale: A) -> tuple[A, A]:
    """x' = x + gate * y and LN(x') * (1 + scale) + shift, for shapes as in `adaln_modulate`.

    Returns:
        (x', o): the residual stream in the dtype of x, the modulated one in the dtype of scale.
    """
    x = gated_residual(x, y, gate)
    return x, adaln_modulate(x, shift, scale)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    n = F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS)
    return (n * (1 + scale.to(wide)).unsqueeze(1) + shift.to(wide).unsqueeze(1)).to(scale.dtype)


def _modulate_tangent(x: Tensor, shift: Tensor, scale: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor) -> Tensor:
    wide = accumulation_dtype(x)
    x, dx = x.to(wide), dx.to(wide)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = centred * rstd
    dn = (dx - dx.mean(-1, keepdim=True) - n * (n * dx).mean(-1, keepdim=True)) * rstd
    do = dn * (1 + scale.to(wide)).unsqueeze(1) + n * dscale.to(wide).unsqueeze(1) + dshift.to(wide).unsqueeze(1)
    return do.to(scale.dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + (gate.unsqueeze(1) * y).to(x.dtype)


def _residual_tangent(x: Tensor, y: Tensor, gate: Tensor, dx: Tensor, dy: Tensor, dgate: Tensor) -> Tensor:
    return dx + (dgate.unsqueeze(1) * y + gate.unsqueeze(1) * dy).to(dx.dtype)
