"""A network and an objective outside mfengine, as in a user script: `python user_script.py mfengine.train sketch`.

Like improved MeanFlow, the network has two heads and conditions besides the label, but does not take t.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mfengine import MeanFlowConfig, cli
from mfengine.engine.config import OptimConfig, TrainConfig
from mfengine.engine.presets import PRESETS
from mfengine.errors import InputError
from mfengine.methods import OBJECTIVES, Objective, ObjectiveConfig
from mfengine.networks import NETWORKS, Network, NetworkConfig, ShardUnit


@dataclass(frozen=True)
class SketchConfig(NetworkConfig):
    width: int = 16
    num_classes: int = 10
    latent_shape = (1, 8, 8)


class Sketch(Network):
    Config = SketchConfig

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__(config, compute_dtype)
        self.y_embedder = nn.Embedding(config.num_classes + 1, 64)
        self.trunk = nn.Linear(66, config.width)
        self.u_head, self.v_head = nn.Linear(config.width, 64), nn.Linear(config.width, 64)

    def forward(self, z, h, y, *, strength):
        features = torch.cat([z.flatten(1) + self.y_embedder(y), h[:, None], strength[:, None]], 1)
        x = self.trunk(features.to(self.trunk.weight.dtype)).float().tanh()
        heads = (self.u_head, self.v_head) if hasattr(self, "v_head") else (self.u_head,)
        return tuple(head(x.to(head.weight.dtype)).float().view_as(z) for head in heads)

    def shard_units(self):
        return [ShardUnit(self.y_embedder, torch.float32, block=False), ShardUnit(self.trunk, self.compute_dtype)]

    def for_sampling(self):
        del self.v_head
        return self


@dataclass(frozen=True)
class TwoHeadsConfig(ObjectiveConfig):
    strength: float = 2.0
    """default condition for samples"""
    t_min: float = 0.0
    """start time of the condition, which is 0 before"""


class TwoHeadsDraws(NamedTuple):
    t: Tensor
    strength: Tensor
    noise: Tensor


class TwoHeads(Objective):
    Config = TwoHeadsConfig
    scalars = ("loss_u", "loss_v")

    @property
    def conditions(self):
        return {"strength": self.config.strength, "t_min": self.config.t_min}

    def sampler(self, conditions):
        sampler = super().sampler(conditions)
        if not 0 <= conditions.get("t_min", 0) <= 1:
            raise InputError(f"t_min must be between 0 and 1, not {conditions['t_min']}")
        return sampler

    def draw(self, shape, generator, device="cpu"):
        t, strength = torch.rand(2, shape[0], generator=generator)
        return TwoHeadsDraws(t.to(device), strength.to(device), torch.randn(shape, generator=generator).to(device))

    def loss(self, model, latents, labels, draws):
        t = draws.t[:, None, None, None]
        z, v_t = (1 - t) * latents + t * draws.noise, draws.noise - latents
        u, v = model(z, draws.t, labels, strength=draws.strength)
        losses = {"loss_u": (u - v_t).square().mean(), "loss_v": (v - v_t).square().mean()}
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def sample(self, model, noise, labels, steps=1, *, strength=1.0, t_min=0.0):
        h = noise.new_full((len(noise),), 1 / steps)
        for i in range(steps):
            applied = strength if 1 - i / steps >= t_min else 0
            noise = noise - model(noise, h, labels, strength=torch.full_like(h, applied))[0] / steps
        return noise


@dataclass(frozen=True)
class PlainConfig(SketchConfig):
    width: int = 8


class Plain(Sketch):
    """u(z, t, h, y) without tangents, for MeanFlow."""

    Config = PlainConfig

    def forward(self, z, t, h, y):
        return super().forward(z, h, y, strength=t)[0]


NETWORKS |= {"sketch": Sketch, "plain": Plain}
OBJECTIVES["two-heads"] = TwoHeads
for name, network, method in (("sketch", Sketch, TwoHeadsConfig()), ("plain", Plain, MeanFlowConfig(omega=2.0))):
    config = TrainConfig(network.Config(), method, OptimConfig(ema_decays=(0.9,)), batch_size=32, name=name)
    PRESETS[name] = ("a sketch", config)

if __name__ == "__main__":
    command = import_module(sys.argv.pop(1))
    cli.run(command.main)
