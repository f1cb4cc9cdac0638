"""Weights of other code bases: a DiT and a SiT written here in their published layout, with their own forward."""

import math

import pytest
import torch
from golden_cases import GoldenCase
from torch import nn

from mfengine import DiT, ModelConfig
from mfengine.convert import from_jax, from_sit

CONFIG = ModelConfig(4, 2, 3, hidden_size=16, depth=2, num_heads=2, num_classes=5)


class SiT(nn.Module):
    """A SiT in timm's layout: only x_embedder, one time embedder, blocks; `out` times the channels."""

    def __init__(self, out=1, second_embedder=None):
        super().__init__()
        width = CONFIG.hidden_size

        def module(**children):
            m = nn.Module()
            for name, child in children.items():
                m.add_module(name, child)
            return m

        def embedder():
            return module(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))

        self.x_embedder = module(proj=nn.Conv2d(3, width, 2, 2))
        self.t_embedder = embedder()
        if second_embedder:
            self.add_module(second_embedder, embedder())
        self.y_embedder = module(embedding_table=nn.Embedding(6, width))
        self.pos_embed = nn.Parameter(DiT(CONFIG).pos_embed[None].clone(), requires_grad=False)
        self.blocks = nn.ModuleList(
            module(
                attn=module(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)),
                mlp=module(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)),
                adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
            )
            for _ in range(2)
        )
        self.final_layer = module(
            linear=nn.Linear(width, 2 * 2 * 3 * out),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        )
        self.out = out

    def embed(self, embedder, t):
        args = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return embedder.mlp(torch.cat([args.cos(), args.sin()], -1))

    def forward(self, x, t, y, h=None):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.embed(self.t_embedder, t) + self.y_embedder.embedding_table(y)
        if h is not None:
            c = c + self.embed(self.r_embedder, h)
        norm = lambda x: nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)  # noqa: E731
        for block in self.blocks:
            b1, s1, g1, b2, s2, g2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            qkv = block.attn.qkv(norm(x) * (1 + s1) + b1).reshape(len(x), 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
            o = nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
            x = x + g1 * block.attn.proj(o)
            o = block.mlp.fc1(norm(x) * (1 + s2) + b2)
            x = x + g2 * block.mlp.fc2(nn.functional.gelu(o, approximate="tanh"))
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        x = self.final_layer.linear(norm(x) * (1 + scale) + shift)
        return torch.einsum("nhwpqc->nchpwq", x.reshape(len(x), 2, 2, 2, 2, -1)).reshape(len(x), -1, 4, 4)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(4, 3, 4, 4), torch.rand(4), torch.rand(4), torch.tensor([0, 2, 4, 5])


def converted(checkpoint, **options):
    result = from_sit(checkpoint, **options)
    model = DiT(CONFIG)
    model.load_state_dict(result.state_dict)
    return model, result


def test_sit_without_second_embedder_is_the_same_velocity_for_every_h(batch):
    z, t, h, y = batch
    sit = SiT()
    model, result = converted({"ema": sit.state_dict(), "opt": {}})
    torch.testing.assert_close(model(z, t, h, y), sit(z, t, y), rtol=1e-4, atol=1e-5)
    assert result.fresh == [f"h_embedder.mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    assert result.unused == ["pos_embed"]
    model(z, t, h, y).square().sum().backward()
    assert model.h_embedder.mlp[2].weight.grad.abs().sum() > 0  # training can change it


def test_dit_that_predicts_variances_keeps_the_means(batch):
    z, t, h, y = batch
    dit = SiT(out=2)
    model, _ = converted(dit.state_dict())
    torch.testing.assert_close(model(z, t, h, y), dit(z, t, y)[:, :3], rtol=1e-4, atol=1e-5)


def test_meanflow_port_with_its_second_embedder(batch):
    z, t, h, y = batch
    port = SiT(second_embedder="r_embedder")
    model, result = converted({"model": {f"module.{k}": v for k, v in port.state_dict().items()}})
    torch.testing.assert_close(model(z, t, h, y), port(z, t, y, h), rtol=1e-4, atol=1e-5)
    assert result.fresh == []


def test_reversed_time_is_folded_into_the_weights(batch):
    z, t, h, y = batch
    sit = SiT()
    model, _ = converted(sit.state_dict(), reverse_time=True)
    torch.testing.assert_close(model(z, t, h, y), -sit(z, 1 - t, y), rtol=1e-3, atol=1e-4)


def test_checkpoint_without_a_dit():
    with pytest.raises(ValueError, match="no DiT in this checkpoint"):
        from_sit({"conv1.weight": torch.zeros(3)})


def test_jax_parameters_nested_or_flat():
    case = GoldenCase("unguided")
    flat = {k.removeprefix("params/"): v for k, v in case.arrays.items() if k.startswith("params/")}
    nested = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    a, b = from_jax(flat), from_jax({"params": nested})
    assert a.keys() == b.keys() == case.model.state_dict().keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_jax_leaf_of_unknown_kind():
    with pytest.raises(ValueError, match="unknown parameter net/norm/scale"):
        from_jax({"net/norm/scale": [1.0]})
