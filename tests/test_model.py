"""The network: its dual forward against forward-mode autograd, its keys, sizes, initialisation and bad input."""

import pytest
import torch
from golden_cases import relative_error
from torch.utils import _pytree as pytree

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.engine.presets import PRESETS


def small_model(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = ModelConfig(**{"input_size": 6, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2,
                            "num_heads": 3, "num_classes": 4, **changes})  # fmt: skip
    model = DiT(config, compute_dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():  # the zeros of adaLN-zero would hide most of the network
            p.add_(0.2 * torch.randn_like(p))
    return model.to(torch.float64) if dtype == torch.float64 else model


def inputs(batch, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, 3, 6, 6, generator=g, dtype=torch.float64).to(dtype)
    t, h = torch.rand(2, batch, generator=g, dtype=torch.float64).to(dtype)
    return z, t, h, torch.randint(0, 5, (batch,), generator=g)


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_dual_forward_is_the_jvp(rows):
    model = small_model()
    z, t, h, y = inputs(5)
    dz, dt, dh, _ = inputs(5, seed=2)
    expected_u, expected_du = torch.func.jvp(lambda z, t, h: model(z, t, h, y), (z, t, h), (dz, dt, dh))
    u, du = model(z, t, h, y, tangents=(dz[5 - rows :], dt[5 - rows :], dh[5 - rows :]))
    torch.testing.assert_close(u, expected_u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(du, expected_du[5 - rows :], rtol=1e-8, atol=1e-8)
    assert u.requires_grad
    assert not du.requires_grad


def test_dual_forward_is_the_finite_difference():
    model = small_model()
    z, t, h, y = inputs(3)
    dz, dt, dh, _ = inputs(3, seed=2)
    step = 1e-5
    with torch.no_grad():
        ahead = model(z + step * dz, t + step * dt, h + step * dh, y)
        behind = model(z - step * dz, t - step * dt, h - step * dh, y)
        _, du = model(z, t, h, y, tangents=(dz, dt, dh))
    torch.testing.assert_close(du, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


def test_gradients_do_not_depend_on_tangents():
    model = small_model()
    z, t, h, y = inputs(4)
    model(z, t, h, y).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(z, t, h, y, tangents=(z[2:], t[2:], h[2:]))[0].square().sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-10, atol=1e-10)


def test_zero_rows():
    model = small_model()
    u = model(*inputs(0))
    assert u.shape == (0, 3, 6, 6)


def test_bfloat16_computes_near_float32_and_returns_float32():
    full, half = small_model(torch.float32), small_model(torch.bfloat16)
    z, t, h, y = inputs(8, torch.float32)
    tangents = (z[4:], t[4:], h[4:])
    u, du = full(z, t, h, y, tangents=tangents)
    u16, du16 = half(z, t, h, y, tangents=tangents)
    assert (u16.dtype, du16.dtype) == (torch.float32, torch.float32)
    assert (u16 - u).norm() < 0.02 * u.norm()
    assert (du16 - du).norm() < 0.03 * du.norm()
    u16.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in half.parameters())


@pytest.mark.slow  # `test_ops.py` compiles an op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_keep_output_tangent_and_gradient(backend):
    """With Dynamo and AOTAutograd, whose graphs could lose a tangent; Inductor takes a minute of C++."""
    torch._dynamo.reset()
    model = small_model(torch.float32)
    z, t, h, y = inputs(5, torch.float32)
    tangents = (z[3:], t[3:], h[3:])

    def run():
        model.zero_grad()
        u, du = model(z, t, h, y, tangents=tangents)
        u.square().sum().backward()
        return u.detach(), du, [p.grad.clone() for p in model.parameters()]

    expected = run()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    actual = run()
    assert expected[1].abs().sum() > 0  # a dropped tangent would be zero
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert relative_error(a, e) < 1e-5
    with torch.no_grad():
        assert relative_error(model(z, t, h, y), expected[0]) < 1e-5


def test_state_dict_keys_are_those_of_dit():
    keys = set(small_model().state_dict())
    block = {f"blocks.1.{m}.{p}" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
             for p in ("weight", "bias")}  # fmt: skip
    assert block <= keys
    assert {k for k in keys if not k.startswith("blocks.")} == {
        f"{m}.{p}"
        for m in (
            "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "h_embedder.mlp.0", "h_embedder.mlp.2",
            "final_layer.linear", "final_layer.adaLN_modulation.1",
        )
        for p in ("weight", "bias")
    } | {"y_embedder.embedding_table.weight"}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "millions"), [("b4", 131), ("b2", 131), ("m2", 308), ("l2", 459), ("xl2", 676), ("xl2-plus", 676)]
)
def test_presets_have_the_papers_sizes(preset, millions):
    with torch.device("meta"):
        model = DiT(PRESETS[preset][1].model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_initial_network_is_zero_and_its_weights_have_the_reference_scale():
    torch.manual_seed(0)
    model = DiT(ModelConfig(8, 2, 4, hidden_size=128, depth=2, num_heads=4, num_classes=10))
    z = torch.randn(2, 4, 8, 8)
    assert model(z, torch.rand(2), torch.rand(2), torch.tensor([0, 10])).abs().max() == 0
    assert model.y_embedder.embedding_table.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert model.h_embedder.mlp[0].weight.detach().std() == pytest.approx(0.02, rel=0.1)
    qkv = model.blocks[0].attn.qkv.weight
    assert qkv.detach().abs().max() == pytest.approx(
        (6 / (128 + 3 * 128)) ** 0.5, rel=0.01
    )  # Xavier over the packed matrix
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if n.endswith("bias") or "adaLN" in n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, "input_size 6 is not a multiple of patch_size 4"),
        ({"num_heads": 5}, "hidden_size 24 is not a multiple of num_heads 5"),
        ({"hidden_size": 6}, "hidden_size 6 is not a multiple of 4"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_bad_architecture(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


@pytest.mark.slow  # Dynamo traces eight graphs
def test_blocks_are_compiled_for_many_rows_and_for_one():
    """For any number of guided rows: first for a fixed number, then for any, and once more for a single row."""
    torch._dynamo.reset()  # graphs from other tests would count, too
    compiled, objective = [], MeanFlow(MeanFlowConfig(omega=0.2, kappa=0.9, t_end=0.75))
    model = small_model(torch.float32, depth=3)

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    latents, labels = torch.randn(8, 3, 6, 6), torch.zeros(8, dtype=torch.int64)
    draws = objective.draw(latents.shape, torch.Generator().manual_seed(0))

    def train(guided):
        t = torch.full((8,), 0.9)
        t[:guided] = 0.5
        r = torch.cat([t[:6], t[6:] / 2])
        objective.loss(model, latents, labels, draws._replace(t=t, r=r, num_dropped=0))[0].backward()
        return len(compiled)

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        warm = [train(guided) for guided in (4, 3, 1)][-1]
        # Guidance with a fixed number of rows, with any, with one; then the main pass. Each for the first block and
        # others.
        assert warm == 8
        assert [train(guided) for guided in (5, 0, 8, 2, 1, 6)] == [warm] * 6
