"""FLOPs of a training step. Over those that the devices could do in the same time (`rates.py`), they are the MFU.

Counted are matrix products alone, two FLOPs per multiply-add, as `torch.utils.flop_counter` does; the backward is
two forwards, and nothing that is recomputed counts.
"""

from __future__ import annotations

from statistics import NormalDist

import torch

from mfengine.methods import MeanFlowConfig
from mfengine.networks import ModelConfig
from mfengine.networks.dit import TIME_FEATURES


def forward_flops(config: ModelConfig) -> int:
    """F: one forward pass of one sample."""
    d, n = config.hidden_size, config.num_tokens
    mlp = int(d * config.mlp_ratio)
    patch = config.patch_size**2 * config.in_channels
    per_token = config.depth * 2 * (4 * d * d + 2 * d * mlp) + 2 * 2 * patch * d
    conditioning = config.depth * 2 * 6 * d * d + 2 * 2 * d * d + 2 * 2 * (TIME_FEATURES * d + d * d)
    return n * per_token + attention_flops(config) + conditioning


def attention_flops(config: ModelConfig) -> int:
    """The part of F that is scores and their products with the values."""
    return config.depth * 2 * 2 * config.num_tokens**2 * config.hidden_size


def step_flops(config: ModelConfig, method: MeanFlowConfig) -> float:
    """Expected FLOPs of one training step for one sample.

    Forward and backward take 3 F; the tangent of an interval row takes F and, its scores having two terms and its
    output two, the attention's part once more; each guidance term F for the rows that need it.
    """
    guidance = 0.0
    if method.guided:
        unconditional = (1 - method.label_dropout) * bool(1 - method.omega - method.kappa)
        conditional = method.interval_share * bool(method.kappa)
        in_range = _share_below(method, method.t_end) - _share_below(method, method.t_start)
        guidance = (unconditional + conditional) * in_range
    forward = forward_flops(config)
    return (3 + guidance) * forward + method.interval_share * (forward + attention_flops(config))


def _share_below(method: MeanFlowConfig, t: float) -> float:
    """Probability that the larger of two draws is below t."""
    if t in (0, 1):
        return float(t)
    normal = NormalDist(method.logit_mean, method.logit_std)
    return normal.cdf(torch.logit(torch.tensor(t, dtype=torch.float64)).item()) ** 2
