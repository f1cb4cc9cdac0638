"""The network of improved MeanFlow: tangents, heads, layouts, the authors' weights, and its commands."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import run_command
from golden_cases import IMPROVED_NAMES, ImprovedCase, golden_case, relative_error

from mfengine import IMFDiT, IMFDiTConfig, sample
from mfengine.convert import to_imf
from mfengine.data.normalisation import describe
from mfengine.engine.distributed import prepare_model
from mfengine.engine.presets import PRESETS
from mfengine.engine.weights import load_model
from mfengine.ranks import World


def small_model(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = IMFDiTConfig(**{"input_size": 6, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 3,
                             "num_heads": 3, "num_classes": 4, "head_depth": 1, **changes})  # fmt: skip
    model = IMFDiT(config, compute_dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():  # zero gates and outputs would hide most of the network
            p.add_(0.2 * torch.randn_like(p))
    return model.to(torch.float64) if dtype == torch.float64 else model


def inputs(batch, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, 3, 6, 6, generator=g, dtype=torch.float64).to(dtype)
    h, omega, t_min, t_max = torch.rand(4, batch, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 5, (batch,), generator=g)
    return z, h, y, {"omega": 1 + 7 * omega, "t_min": t_min / 2, "t_max": 0.5 + t_max / 2}


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_dual_forward_is_the_jvp(rows):
    model = small_model()
    z, h, y, conditions = inputs(5)
    dz, dh, *_ = inputs(5, seed=2)
    (expected_u, expected_v), (expected_du, _) = torch.func.jvp(
        lambda z, h: model(z, h, y, **conditions), (z, h), (dz, dh)
    )
    u, v, du = model(z, h, y, **conditions, tangents=(dz[5 - rows :], dh[5 - rows :]))
    torch.testing.assert_close(u, expected_u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(v, expected_v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(du, expected_du[5 - rows :], rtol=1e-8, atol=1e-8)
    assert u.requires_grad
    assert v.requires_grad
    assert not du.requires_grad


def test_each_head_alone_equals_both():
    model = small_model()
    z, h, y, conditions = inputs(3)
    u, v = model(z, h, y, **conditions)
    assert torch.equal(model(z, h, y, **conditions, heads="u"), u)
    assert torch.equal(model(z, h, y, **conditions, heads="v"), v)
    with pytest.raises(ValueError, match="tangents need both heads, not u"):
        model(z, h, y, **conditions, heads="u", tangents=(z, h))


def test_last_block_of_a_head_computes_only_patches_after_attention():
    model, rows = small_model(), {}
    for name, layer in model.named_modules():
        if name.endswith(("attn.out_proj", "mlp")):
            layer.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: len(args[0])}))
    z, h, y, conditions = inputs(2)
    model(z, h, y, **conditions)
    patches, tokens = 2 * 9, 2 * model.config.num_tokens
    for name in ("attn.out_proj", "mlp"):
        assert [rows[f"shared_blocks.{i}.{name}"] for i in range(2)] == [tokens, tokens]
        assert [rows[f"{head}.0.{name}"] for head in ("u_heads", "v_heads")] == [patches, patches]


def test_network_for_sampling_has_no_head_of_v():
    model = small_model()
    z, h, y, conditions = inputs(3)
    u, _ = model(z, h, y, **conditions)
    model.for_sampling()
    assert not any(name.startswith("v_") for name in model.state_dict())
    assert torch.equal(model(z, h, y, **conditions, heads="u"), u)
    with pytest.raises(ValueError, match="no head for v"):
        model(z, h, y, **conditions)


def test_zero_rows():
    z, h, y, conditions = inputs(0)
    u, v, du = small_model()(z, h, y, **conditions, tangents=(z, h))
    assert u.shape == v.shape == du.shape == (0, 3, 6, 6)


def test_bfloat16_computes_near_float32_and_returns_float32():
    z, h, y, conditions = inputs(4, torch.float32)
    (u, v, du), (u16, v16, du16) = (
        small_model(dtype)(z, h, y, **conditions, tangents=(z[2:], h[2:])) for dtype in (torch.float32, torch.bfloat16)
    )
    assert u16.dtype == v16.dtype == du16.dtype == torch.float32
    for low, full in ((u16, u), (v16, v), (du16, du)):
        assert relative_error(low.detach(), full.detach()) < 0.05


@pytest.mark.parametrize("layout", ["recompute", pytest.param("compile", marks=pytest.mark.slow)])
def test_layouts_agree_with_the_authors_code(layout):
    """Recomputed and compiled blocks: a dropped tangent would be zero, a lost gradient None."""
    case = golden_case("imf_train")
    case.model = prepare_model(case.model, World(0, 1, torch.device("cpu")), **{layout: True})
    loss, metrics = case.method.loss(case.model, *case.batch("in"))
    loss.backward()
    assert relative_error(loss.detach(), case.arrays["out/loss"]) < 1e-5
    for name in case.intermediate:
        expected, actual = case.image(f"mid/{name}"), metrics[name]
        assert relative_error(actual, expected[len(expected) - len(actual) :]) < 1e-5, name
    gradients = case.parameters("grads")
    for name, p in case.model.named_parameters():
        assert relative_error(p.grad, gradients[name]) < 1e-5, name


@pytest.mark.parametrize(
    ("preset", "millions", "sampling"),
    [("imf-b2", 146, 89), ("imf-m2", 231, 174), ("imf-l2", 510, 409), ("imf-xl2", 711, 610)],
)
def test_presets_have_the_papers_sizes(preset, millions, sampling):
    with torch.device("meta"):
        model = IMFDiT(PRESETS[preset][1].model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    assert sum(p.numel() for p in model.for_sampling().parameters()) / 1e6 == pytest.approx(sampling, abs=1)


def test_initial_network_is_zero_and_its_weights_have_the_authors_scale():
    torch.manual_seed(0)
    model = IMFDiT(IMFDiTConfig(8, 2, 4, 128, 2, 4, 10, head_depth=1))
    h = torch.rand(2)
    u, v = model(torch.randn(2, 4, 8, 8), h, torch.tensor([0, 10]), omega=1 + h, t_min=h, t_max=h)
    assert u.abs().max() == v.abs().max() == 0
    block = model.shared_blocks[0]
    for p, scale in (
        (block.attn.q_proj.weight, 0.32 / 128**0.5),
        (block.mlp.w2.weight, 0.32 / 341**0.5),
        (model.h_embedder.mlp[0].weight, 256**-0.5),
        (model.y_embedder.embedding_table.weight, 128**-0.5),
        (model.class_tokens, 128**-0.5),
    ):
        assert p.detach().std() == pytest.approx(scale, rel=0.1)
    assert model.x_embedder.proj.weight.detach().abs().max() == pytest.approx((6 / (16 + 128)) ** 0.5, rel=0.01)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith(("bias", "_scale")):
            assert (p == 0).all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_depth": 3}, "head_depth must be at least 1 and less than the depth 3, not 3"),
        ({"hidden_size": 21, "num_heads": 3}, "rotary positions need an even number"),
        ({"time_tokens": 0}, "time_tokens must be at least 1"),
        ({"patch_size": 4}, "input_size 6 is not a multiple of patch_size 4"),
    ],
)
def test_bad_architecture(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


# ----------------------------------------------------------------------------
# Weights of the authors' code.


def pth(case, **changes):
    """The case's weights, from the authors' JAX code, in the layout of their PyTorch code."""
    state = to_imf(case.model.state_dict())
    assert "net.shared_blocks.0.attn.q_proj._flax_linear.weight" in state
    assert "net.y_embedder.embedding_table._flax_embedding.weight" in state
    assert not any(name.startswith("net.v_heads.") for name in state)
    return {**state, **changes}


@pytest.mark.parametrize("name", IMPROVED_NAMES)
def test_from_jax_to_pth_and_back_are_the_same_samples(name):
    case = golden_case(name)
    state, fresh, unused = IMFDiT.convert(pth(case), reverse_time=False)
    assert fresh
    assert all(key.startswith("v_heads.") for key in fresh)
    assert not unused
    model = IMFDiT(case.model.config)
    model.load_state_dict(state)
    noise, labels = case.image("sample/z"), torch.from_numpy(case.arrays["sample/y"]).long()
    for network in (model, model.for_sampling()):
        assert torch.equal(
            sample(network, noise, labels, 2, **case.conditions),
            sample(case.model, noise, labels, 2, **case.conditions),
        )


def test_jax_parameters_nested_or_flat():
    case = ImprovedCase("imf_beta")
    nested = {}
    for key, leaf in case.arrays.items():
        if key.startswith("params/"):
            *path, name = key.split("/")
            tree = nested
            for part in path:
                tree = tree.setdefault(part, {})
            tree[name] = leaf
    state = case.convert(nested)
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())


def test_unrelated_checkpoint_is_rejected():
    with pytest.raises(ValueError, match=r"no u_final_layer\.linear\.weight or time_tokens"):
        IMFDiT.convert({"model": {"blocks.0.attn.qkv.weight": torch.zeros(1)}}, reverse_time=False)
    with pytest.raises(ValueError, match="there is no time to reverse"):
        IMFDiT.convert(pth(ImprovedCase("imf_beta")), reverse_time=True)


def test_through_all_commands(digits, tmp_path, monkeypatch):
    def run(*args):
        return run_command(*args, cwd=tmp_path)

    tiny = ("--model.hidden-size=16", "--model.num-heads=2", "--model.depth=2", "--model.head-depth=1")
    train = ("mfengine.train", "digits-imf", f"--data={digits}", *tiny, "--batch-size=32", "--log-every=1")
    done = run(*train, "--steps=2", "--sample-every=2", "--name=run")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_u"] > 0 and line["loss_v"] > 0 for line in lines if "loss" in line)
    for out in ("model.safetensors", "model.pth"):
        assert run("mfengine.export", "runs/run", out).returncode == 0
    pictures = []
    for source, more in (("runs/run", ()), ("model.safetensors", ()), ("runs/run", ("--conditions", "omega", "3"))):
        assert run("mfengine.generate", source, "--per-label=2", *more).returncode == 0
        pictures.append((tmp_path / "samples.png").read_bytes())
    assert pictures[0] == pictures[1]
    done = run("mfengine.export", "model.pth", "small.safetensors", "--preset=digits-imf")
    assert done.returncode == 2
    assert "there are no published weights for preset digits-imf" in done.stderr
    preset = PRESETS["imf-b2"][1]  # made shallower, to save time
    monkeypatch.setitem(PRESETS, "imf-b2", ("", replace(preset, model=replace(preset.model, depth=2, head_depth=1))))
    done = run("mfengine.export", "model.pth", "large.safetensors", "--preset=imf-b2")
    assert done.returncode == 2
    assert "model.pth has another architecture" in done.stderr
    done = run(*train, "--steps=1", "--name=again", "--init=model.pth")
    assert done.returncode == 0, done.stderr
    assert "model.pth leaves v_heads.* as initialised" in done.stderr
    done = run("mfengine.generate", "runs/run", "--conditions", "omega", "0.5")
    assert (done.returncode, done.stderr) == (2, "error: conditions: omega must be at least 1, not 0.5\n")


def test_published_weights_become_an_export(digits, tmp_path, monkeypatch):
    """A .pth for inference only, with the latents and the sampling of its preset."""
    case = golden_case("imf_beta")
    torch.save(pth(case), tmp_path / "published.pth")
    preset = replace(PRESETS["imf-b2"][1], model=case.model.config)
    monkeypatch.setitem(PRESETS, "imf-b2", ("", preset))
    done = run_command(
        *("mfengine.export", "published.pth", "model.safetensors", "--preset=imf-b2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    model, space, _, objective, _ = load_model(tmp_path / "model.safetensors")
    assert describe(space) == "sd-vae-ft-mse"
    assert objective.conditions == {"omega": 8, "t_min": 0.4, "t_max": 0.65}
    noise, labels = case.image("sample/z"), torch.from_numpy(case.arrays["sample/y"]).long()
    drawn = objective.sampler(case.conditions)(model, noise, labels, 1)
    assert relative_error(drawn, case.image("sample/nfe1")) < 1e-5
