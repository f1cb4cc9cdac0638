"""Models of timm, diffusers and transformers, small and random, that PyTorch cannot differentiate in forward mode.

Inside `jvp_attention`, the JVP of each model, and the gradient of a loss of it, are checked against finite differences.
"""

import importlib

import pytest
import torch
from torch.func import jvp

from mfengine import jvp_attention, ops


def module(name):
    """A package; skips if it is missing or does not run here: timm needs torchvision with its operators."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def timm_vit():
    model = module("timm").models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, qk_norm=True
    )
    return model, lambda model, x: model(x), (2, 3, 16, 16)


def stable_diffusion_3():
    """Joint attention of image and text."""
    model = module("diffusers").SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    text, pooled, t = randn(1, 2, 5, 24), randn(2, 2, 16), torch.tensor([300.0, 800.0])
    return model, lambda model, x: model(x, text.to(x), pooled.to(x), t.to(x)).sample, (2, 4, 8, 8)


def flux():
    model = module("diffusers").FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    text, pooled, t, ids = randn(1, 2, 5, 24), randn(2, 2, 16), torch.tensor([0.3, 0.8]), torch.arange(18.0).view(6, 3)
    call = lambda model, x: model(x, text.to(x), pooled.to(x), t.to(x), ids, torch.zeros(5, 3)).sample  # noqa: E731
    return model, call, (2, 6, 8)


def wan():
    """Self-attention with RoPE, and cross-attention to the text."""
    model = module("diffusers").WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    text, t = randn(1, 2, 5, 24), torch.tensor([300.0, 800.0])
    return model, lambda model, x: model(x, t.to(x), text.to(x)).sample, (2, 4, 2, 4, 4)


def transformers(name, mask=False, **config):
    """It takes embeddings; with a mask, the last tokens of the second text are padding."""
    library = module("transformers")
    config = getattr(library, f"{name}Config")(vocab_size=11, **config, attn_implementation="sdpa")
    seen = torch.tensor([[1] * 6, [1] * 4 + [0] * 2]) if mask else None
    call = lambda model, x: model(inputs_embeds=x, attention_mask=seen).last_hidden_state  # noqa: E731
    return getattr(library, f"{name}Model")(config), call, (2, 6, 32)


def llama():
    """Causal, with grouped queries."""
    return transformers(
        "Llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )


def padded_llama():
    return transformers(
        "Llama", mask=True, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip


def padded_bert():
    return transformers(
        "Bert", mask=True, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )


MODELS = [timm_vit, stable_diffusion_3, flux, wan, llama, padded_llama, padded_bert]


def build(make, dtype):
    torch.manual_seed(0)
    model, call, shape = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # makes all gates nonzero
    return model.to(dtype).eval(), call, randn(3, *shape).to(dtype), randn(4, *shape).to(dtype)


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def loss(model, call, x, dx):
    """A loss of output and tangent."""
    y, dy = jvp(lambda x: call(model, x), (x,), (dx,))
    return y, dy, (y - dy).square().mean()


@torch.no_grad()
def derivative(f, tensors, along, step=3e-3):
    """Derivative of f() along tensors, from five points: parts of the models use float32, so a small step is noise."""
    value, at = 0, 0
    for to, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1), (0, 0)):
        for x, dx in zip(tensors, along, strict=True):
            x += (to - at) * step * dx
        at = to
        value = value + weight * f() / (12 * step)
    return value


@pytest.mark.slow  # their libraries take seconds to import, and `test_backend.py` has a diffusers model
@pytest.mark.parametrize("make", MODELS)
def test_model_in_forward_mode(make):
    model, call, x, dx = build(make, torch.float64)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(lambda x: call(model, x), (x,), (dx,))
    x.requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with jvp_attention():
        y, dy, total = loss(model, call, x, dx)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        along = [torch.zeros_like(x) if g is None else g / g.norm() for x, g in zip(leaves, gradients, strict=True)]
        slope = sum(g.norm() for g in gradients if g is not None)
        errors = {
            "jvp": error(dy, derivative(lambda: call(model, x), [x], [dx])),
            "gradient": error(slope, derivative(lambda: loss(model, call, x, dx)[2], leaves, along)),
        }

    model, call, x, dx = build(make, torch.float32)
    x.requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with jvp_attention(), ops.use_backend("triton"):
        fused = loss(model, call, x, dx)
        found = torch.autograd.grad(fused[2], leaves, allow_unused=True)
    errors["fused output"], errors["fused tangent"] = error(fused[0], y), error(fused[1], dy)
    whole = [torch.cat([g.flatten() for g in each if g is not None]) for each in (found, gradients)]
    errors["fused gradients"] = error(*whole)
    print(make.__name__, {name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors["jvp"], errors["gradient"]) <= 1e-4
    assert max(value for name, value in errors.items() if "fused" in name) <= 1e-5
