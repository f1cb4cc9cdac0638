"""FLOPs counted on the real code. Over those that the devices could do in the same time (`rates.py`), they are the MFU.

Counted are matrix products alone, two FLOPs per multiply-add, by `torch.utils.flop_counter` on meta tensors, which have
shapes and no values. The plain ops run, so nothing that fused ones compute twice counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mfengine.methods import OBJECTIVES, ObjectiveConfig
from mfengine.networks import NETWORKS, Network, NetworkConfig
from mfengine.ops import use_attention, use_backend

META = torch.device("meta")
COUNTED_ROWS = 8192  # at least: which rows take which passes varies with the draws


def meta_network(config: NetworkConfig, dtype: torch.dtype = torch.float32) -> Network:
    """The network without values, computing in this dtype."""
    with META:
        return NETWORKS.build(config, dtype).to(META)


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    with use_backend("torch"), use_attention("torch"), FlopCounterMode(display=False) as counter:
        yield counter


@cache
def step_flops(model: NetworkConfig, method: ObjectiveConfig, batch: int) -> float:
    """Expected FLOPs of one training step for one sample, in local batches of `batch` rows."""
    rows = -(-COUNTED_ROWS // batch) * batch
    network, objective = meta_network(model), OBJECTIVES.build(method)
    shape = (rows, *model.latent_shape)
    draws = objective.draw(shape, torch.Generator().manual_seed(0), META)
    latents, labels = torch.empty(shape, device=META), torch.empty(rows, dtype=torch.int64, device=META)
    with _counted() as counter:
        objective.loss(network, latents, labels, draws)[0].backward()
    return counter.get_total_flops() / rows


def sample_flops(model: NetworkConfig, method: ObjectiveConfig) -> int:
    """F: FLOPs of one sample drawn in one step."""
    noise, label = torch.empty(1, *model.latent_shape, device=META), torch.empty(1, dtype=torch.int64, device=META)
    with torch.no_grad(), _counted() as counter:
        OBJECTIVES.build(method).sampler({})(meta_network(model).for_sampling(), noise, label, 1)
    return counter.get_total_flops()
