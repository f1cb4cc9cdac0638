"""FLOPs counted on the real code. Divided by the peak FLOPs of the devices in the same time (`rates.py`), they give
MFU.

Only matrix products count, with two FLOPs per multiply-add. `torch.utils.flop_counter` counts them on meta tensors,
which have shapes and no values. The plain ops run, so what fused ops compute twice counts once.
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
COUNTED_ROWS = 8192  # at least this many, because the draws decide which rows take which passes


def meta_network(config: NetworkConfig, dtype: torch.dtype = torch.float32) -> Network:
    """The network on the meta device, without values, computing in this dtype."""
    with META:
        return NETWORKS.build(config, dtype).to(META)


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    with use_backend("torch"), use_attention("torch"), FlopCounterMode(display=False) as counter:
        yield counter


@cache
def step_flops(model: NetworkConfig, method: ObjectiveConfig, batch: int) -> float:
    """Expected FLOPs per sample of one training step, with local batches of `batch` rows."""
    rows = -(-COUNTED_ROWS // batch) * batch
    network, objective = meta_network(model), OBJECTIVES.build(method)
    shape = (rows, *model.latent_shape)
    draws = objective.draw(shape, torch.Generator().manual_seed(0), META)
    latents, labels = torch.empty(shape, device=META), torch.empty(rows, dtype=torch.int64, device=META)
    with _counted() as counter:
        objective.loss(network, latents, labels, draws)[0].backward()
    return counter.get_total_flops() / rows


def sample_flops(model: NetworkConfig, method: ObjectiveConfig) -> int:
    """F: FLOPs of drawing one sample in one step."""
    noise, label = torch.empty(1, *model.latent_shape, device=META), torch.empty(1, dtype=torch.int64, device=META)
    with torch.no_grad(), _counted() as counter:
        OBJECTIVES.build(method).sampler({})(meta_network(model).for_sampling(), noise, label, 1)
    return counter.get_total_flops()
