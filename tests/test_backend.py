"""The fast backend inside any PyTorch model: jvp_attention, accelerate, and the public ops."""

import copy
import doctest
import importlib
import pickle
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from conftest import slow
from torch import nn
from torch.func import grad, jacfwd, jvp, vmap
from torch.nn.functional import scaled_dot_product_attention as sdpa_by_name
from torch.utils._python_dispatch import TorchDispatchMode

from mfengine import accelerate, jvp_attention, ops
from mfengine.backend import sdpa
from mfengine.ops.backend import chosen
from mfengine.ops.dual import Dual

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


# ----------------------------------------------------------------------------
# Models as others write them.


class Attention(nn.Module):
    """Like timm's: attention with PyTorch's function, or written out unless fused_attn."""

    def __init__(self, dim, num_heads=2, qk_norm=False, attn_drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape  # noqa: N806
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class MLP(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, dim, **attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, **attention)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g.unsqueeze(1) * self.attn(modulate(self.norm1(x), a, b))
        return x + h.unsqueeze(1) * self.mlp(modulate(self.norm2(x), d, e))


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiT(nn.Module):
    """Tokens are pixels. Here, SiT is the same with normalised queries and keys and the opposite sign."""

    def __init__(self, dim=32, depth=2, sign=1.0, **attention):
        super().__init__()
        self.sign = sign
        self.x_embedder = nn.Linear(4, dim)
        self.t_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = nn.Embedding(11, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, **attention) for _ in range(depth))
        self.final_layer = FinalLayer(dim, 4)

    def forward(self, z, t, y):
        x = self.x_embedder(z.flatten(2).transpose(1, 2))
        c = self.t_embedder(t[:, None]) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.sign * self.final_layer(x, c).transpose(1, 2).reshape(z.shape)


class Diffusers(nn.Module):
    """diffusers' DiT, with the calling convention of the others."""

    def __init__(self, depth=2, **config):
        super().__init__()
        diffusers = pytest.importorskip("diffusers")
        self.model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=depth, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10, **config,
        )  # fmt: skip
        self.eval()  # training mode drops labels

    def forward(self, z, t, y):
        return self.model(z, timestep=t * 1000, class_labels=y).sample


CASES = {"diffusers": Diffusers, "DiT": DiT, "SiT": lambda **kw: DiT(sign=-1.0, qk_norm=True, **kw)}
NAMES = pytest.mark.parametrize("name", CASES)


def build(name, depth=2):
    torch.manual_seed(0)
    model = CASES[name](depth=depth)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # no gate is zero
    size = 8 if name == "diffusers" else 4
    z, dz = torch.randn(2, 2, 4, size, size).unbind(0)
    t, dt = torch.tensor([0.3, 0.8]), torch.ones(2)
    return model, (z.clone(), t), (dz.clone(), dt)


def velocity(model):
    y = torch.tensor([1, 10])
    return lambda z, t: model(z, t, y)


def plain(model):
    """A copy with attention written out as products and a softmax."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "set_processor"):
            module.set_processor(importlib.import_module("diffusers.models.attention_processor").AttnProcessor())
    return model


def run(model, primals, tangents, transform=lambda f: f):
    """Output, tangent, and the gradients of a loss like MeanFlow's."""
    model.zero_grad()

    def f(primals, tangents):
        u, du = jvp(velocity(model), primals, tangents)
        return u, du.detach()

    u, du = transform(f)(primals, tangents)
    (u - 1 + 0.1 * du.detach()).square().mean().backward()
    return [u.detach(), du.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_near(actual, expected, bound=1e-5):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=bound, atol=bound)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


# ----------------------------------------------------------------------------
# These models in forward mode.


@NAMES
def test_forward_mode_fails_without_jvp_attention(name):
    model, primals, tangents = build(name)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(velocity(model), primals, tangents)


CASES_AND_BACKENDS = pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "torch") for name in CASES), ("DiT", "triton"), slow("SiT", "triton"), slow("diffusers", "triton")],
)


@CASES_AND_BACKENDS
def test_forward_mode_inside_jvp_attention(name, backend):
    model, primals, tangents = build(name, depth=1 if backend == "triton" else 2)
    expected = run(plain(model), primals, tangents)
    with ops.use_backend(backend), jvp_attention():
        assert_near(run(model, primals, tangents), expected)


@CASES_AND_BACKENDS
def test_accelerated_model_in_forward_mode(name, backend):
    depth = 1 if backend == "triton" else 2
    model, primals, tangents = build(name, depth)
    expected = run(plain(model), primals, tangents)
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    swaps = accelerate(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(swaps.swapped.values()) == ["adaLN block"] * depth + ["attention"] * depth
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
    with ops.use_backend(backend):
        assert_near(run(model, primals, tangents), expected)


# Compiled tests are slow: the compiler takes seconds to import, and `test_ops.py` compiles one op.


@pytest.mark.slow
@NAMES
def test_compiled_inside_jvp_attention(name):
    model, primals, tangents = build(name, depth=1)
    expected = run(plain(model), primals, tangents)

    def inside(f):
        def g(primals, tangents):
            with jvp_attention():
                return f(primals, tangents)

        return compiled(g)

    assert_near(run(model, primals, tangents, inside), expected)


@pytest.mark.slow
def test_compiled_with_jvp_attention_around():
    model, primals, tangents = build("DiT", depth=1)
    expected = run(plain(model), primals, tangents)
    f = compiled(lambda p, t: jvp(velocity(model), p, t))
    with jvp_attention():
        assert_near(run(model, primals, tangents, lambda _: f), expected)
    with pytest.raises(Exception, match="forward AD"):  # outside the context, the graph is not reused
        f(primals, tangents)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [("DiT", "triton"), ("SiT", "torch"), ("diffusers", "torch"), ("diffusers", "triton")]
)
def test_compiled_accelerated(name, backend):
    model, primals, tangents = build(name, depth=1)
    expected = run(plain(model), primals, tangents)
    accelerate(model)
    with ops.use_backend(backend):
        assert_near(run(model, primals, tangents, compiled), expected)


@pytest.mark.slow
@BACKENDS
def test_jvp_of_a_compiled_model(backend):
    """There, torch.func.jvp and torch.autograd.forward_ad run compiled code eagerly."""
    model, primals, tangents = build("DiT", depth=1)
    u, du, *_ = run(plain(model), primals, tangents)
    f = torch.compile(velocity(model), backend="aot_eager")
    f(*primals)
    with ops.use_backend(backend), jvp_attention():
        assert_near(jvp(f, primals, tangents), (u, du))
        with fwad.dual_level():
            dual = f(*(fwad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)))
            assert_near(fwad.unpack_dual(dual), (u, du))


# ----------------------------------------------------------------------------
# The function with all of its options.


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written_out(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:]).tril().bool()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


MASK = torch.tensor([[True, False, True, True, False]] * 4 + [[True] * 5])
SELF = [(2, 2, 5, 16)] * 3
OPTIONS = {
    "self": (SELF, {}),
    "cross": ([(2, 2, 3, 16), (2, 2, 5, 16), (2, 2, 5, 16)], {}),
    "scale": (SELF, {"scale": 0.3}),
    "boolean mask": (SELF, {"attn_mask": MASK}),
    "float mask": (SELF, {"attn_mask": randn(5, 2, 1, 5, 5)}),
    "causal": (SELF, {"is_causal": True}),
    "causal cross": ([(2, 2, 3, 16), (2, 2, 5, 16), (2, 2, 5, 16)], {"is_causal": True}),
    "gqa": ([(2, 4, 5, 16), (2, 2, 5, 16), (2, 2, 5, 16)], {"enable_gqa": True}),
    "gqa, causal": ([(2, 4, 5, 16), (2, 2, 5, 16), (2, 2, 5, 16)], {"enable_gqa": True, "is_causal": True}),
    "head dim 12": ([(2, 2, 5, 12)] * 3, {}),
    "head dim 136": ([(2, 2, 5, 136)] * 3, {}),
    "head dims of k and v": ([(2, 2, 5, 16), (2, 2, 5, 16), (2, 2, 5, 24)], {}),
    "2-D": ([(5, 16)] * 3, {}),
    "3-D": ([(2, 5, 16)] * 3, {}),
    "5-D": ([(2, 3, 2, 5, 16)] * 3, {}),
    "broadcast": ([(2, 2, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)], {}),
}
FUSED = ("self", "cross", "scale", "boolean mask", "float mask", "causal", "causal cross", "gqa", "gqa, causal")


def duals(shapes):
    return tuple(randn(i, *s) for i, s in enumerate(shapes)), tuple(randn(50 + i, *s) for i, s in enumerate(shapes))


# Dynamo traces options alike: one case each for a mask, grouped heads, an odd head dim and other dimensions.
COMPILED = ("boolean mask", "gqa, causal", "head dim 12", "3-D")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in OPTIONS for how in ("func", "forward_ad")),
        *(slow(name, "compile") for name in COMPILED),
    ],
)
def test_options(name, how):
    shapes, options = OPTIONS[name]
    primals, tangents = duals(shapes)
    expected = jvp(lambda *x: written_out(*x, **options), primals, tangents)
    f = lambda *x: sdpa_by_name(*x, **options)  # noqa: E731
    with jvp_attention():
        if how == "func":
            actual = jvp(f, primals, tangents)
        elif how == "compile":
            actual = compiled(lambda p, t: jvp(f, p, t))(primals, tangents)
        else:
            with fwad.dual_level():
                actual = fwad.unpack_dual(f(*(fwad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True))))
    assert_near(actual, expected)


ALIKE = ("cross", "scale", "causal", "float mask", "gqa, causal")  # combinations whose parts are in other cases


@pytest.mark.parametrize("name", [slow(name) if name in ALIKE else name for name in OPTIONS])
def test_options_with_the_fused_path_forced(name):
    shapes, options = OPTIONS[name]
    primals, tangents = duals(shapes)
    f = lambda *x: sdpa_by_name(*x, **options)  # noqa: E731
    with ops.use_backend("triton"), jvp_attention():
        if name in FUSED:
            assert_near(jvp(f, primals, tangents), jvp(lambda *x: written_out(*x, **options), primals, tangents))
        else:
            with pytest.raises(ValueError, match=r"(head dim|must be).*takes plain PyTorch"):
                jvp(f, primals, tangents)


@pytest.mark.parametrize("name", OPTIONS)
def test_auto_fuses_what_the_kernels_take(name, monkeypatch):
    """As on a GPU, with a marker in place of the fused op."""
    fused = []
    monkeypatch.setattr(sdpa, "fused", lambda x: True)

    def attention(q, k, v, scale, is_causal, mask):
        fused.append(chosen() == "auto")
        return written_out(q, k, v, mask, is_causal, scale, enable_gqa=True)

    monkeypatch.setattr(sdpa, "attention", attention)
    warned = []
    monkeypatch.setattr(sdpa, "_warn_plain", warned.append)
    shapes, options = OPTIONS[name]
    primals, tangents = duals(shapes)
    with jvp_attention():
        actual = jvp(lambda *x: sdpa_by_name(*x, **options), primals, tangents)
    assert_near(actual, jvp(lambda *x: written_out(*x, **options), primals, tangents))
    assert any(fused) == (name in FUSED)
    assert len(warned) == (name not in FUSED)


def test_dropout():
    primals, tangents = duals(SELF)
    f = lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.5)  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.manual_seed(3)
        expected = jvp(f, primals, tangents)
    with jvp_attention():
        torch.manual_seed(3)
        assert_near(jvp(f, primals, tangents), expected)
        assert (expected[0] - jvp(f, primals, tangents)[0]).abs().max() > 0.1
        with ops.use_backend("triton"), pytest.raises(ValueError, match="dropout_p is not fused"):
            jvp(f, primals, tangents)


def test_tangent_of_one_argument_or_none():
    (q, k, v), (dq, _, dv) = duals(SELF)
    of_q, of_v = (lambda f: lambda x: f(x, k, v)), (lambda f: lambda x: f(q, k, x))
    for backend in ("torch", "triton"):
        with ops.use_backend(backend), jvp_attention():
            for of, x, dx in ((of_q, q, dq), (of_v, v, dv)):
                actual = jvp(of(F.scaled_dot_product_attention), (x,), (dx,))
                assert_near(actual, jvp(of(written_out), (x,), (dx,)))
            y, dy = jvp(lambda x: x * F.scaled_dot_product_attention(q, k, v), (q,), (dq,))
            assert_near((y, dy), (q * written_out(q, k, v), dq * written_out(q, k, v)))
            y, dy = jvp(lambda x: x * F.scaled_dot_product_attention(q, k, v, MASK), (q,), (dq,))
            assert_near((y, dy), (q * written_out(q, k, v, MASK), dq * written_out(q, k, v, MASK)))
    mask, dmask = randn(7, 5, 5), randn(8, 5, 5)
    with ops.use_backend("torch"), jvp_attention():
        actual = jvp(lambda m: F.scaled_dot_product_attention(q, k, v, m), (mask,), (dmask,))
    assert_near(actual, jvp(lambda m: written_out(q, k, v, m), (mask,), (dmask,)))


TRANSFORMS = {
    "jacfwd": lambda f, x, dx: jacfwd(f)(x),
    "vmap": lambda f, x, dx: vmap(f)(x[None]),
    "vmap of jvp": lambda f, x, dx: vmap(lambda a, b: jvp(f, (a,), (b,))[1])(x[None], dx[None]),
    "jvp of vmap": lambda f, x, dx: jvp(vmap(f), (x[None],), (dx[None],))[1],
    "grad of jvp": lambda f, x, dx: grad(lambda x: jvp(f, (x,), (dx,))[1].sum())(x),
    "jvp of grad": lambda f, x, dx: jvp(grad(lambda x: f(x).square().sum()), (x,), (dx,))[1],
    "jvp of jvp": lambda f, x, dx: jvp(lambda a: jvp(f, (a,), (dx,))[1], (x,), (dx,))[1],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    transform = TRANSFORMS[name]
    x, dx = randn(0, 1, 2, 3, 8), randn(1, 1, 2, 3, 8)
    k, v = randn(2, 1, 2, 4, 8), randn(3, 1, 2, 4, 8)
    expected = transform(lambda x: written_out(x, k, v), x, dx)
    f = lambda x: F.scaled_dot_product_attention(x, k, v)  # noqa: E731
    with jvp_attention():
        assert_near([transform(f, x, dx)], [expected])
    with ops.use_backend("triton"), pytest.raises(ValueError, match=r"under a single torch.func.jvp"):
        transform(lambda x: ops.attention(x, k, v), x, dx)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", sorted(TRANSFORMS.keys() - {"vmap of jvp"}))  # which PyTorch 2.13 cannot compile
def test_compiled_transforms(name):
    transform = TRANSFORMS[name]
    x, dx = randn(0, 1, 2, 3, 8), randn(1, 1, 2, 3, 8)
    k, v = randn(2, 1, 2, 4, 8), randn(3, 1, 2, 4, 8)
    expected = transform(lambda x: written_out(x, k, v), x, dx)
    torch._dynamo.reset()
    with jvp_attention():
        compiled = torch.compile(transform, backend="aot_eager")
        assert_near([compiled(lambda x: F.scaled_dot_product_attention(x, k, v), x, dx)], [expected])


@BACKENDS
def test_multi_head_attention_of_pytorch(backend):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    (x,), (dx,) = duals([(2, 5, 32)])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = jvp(layer, (x,), (dx,))
    with ops.use_backend(backend), jvp_attention():
        assert_near(jvp(layer, (x,), (dx,)), expected)


@pytest.mark.slow
@BACKENDS
def test_compiled_multi_head_attention_of_pytorch(backend):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    (x,), (dx,) = duals([(2, 5, 32)])
    f = lambda x: attention(x, x, x, need_weights=False)[0]  # noqa: E731
    with ops.use_backend(backend), jvp_attention():
        compiled_jvp = compiled(lambda x, dx: [y.detach() for y in jvp(f, (x,), (dx,))])
        assert_near(compiled_jvp(x, dx), jvp(f, (x,), (dx,)))


class Operators(TorchDispatchMode):
    """Records the names of operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_pytorch_attention_runs_outside_forward_mode():
    (q, k, v), tangents = duals(SELF)
    with jvp_attention(), ops.use_backend("triton"):
        with Operators() as native:
            F.scaled_dot_product_attention(q, k, v)
        with Operators() as forward:
            jvp(F.scaled_dot_product_attention, (q, k, v), tangents)
    assert any("flash" in name for name in native.names)
    assert "attention_differentiable_dual" in forward.names


def test_autocast_casts_like_pytorch():
    (q, k, v), tangents = duals(SELF)
    with jvp_attention(), torch.autocast("cpu", torch.bfloat16):
        o, do = jvp(lambda q, k, v: F.scaled_dot_product_attention(q, k.bfloat16(), v), (q, k, v), tangents)
        assert o.dtype == do.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert_near((o.float(), do.float()), jvp(written_out, (q, k, v), tangents), bound=0.1)


def test_each_reason_for_plain_attention_warns_once(monkeypatch):
    """On a device where kernels run."""
    sdpa._warn_plain.cache_clear()
    primals, tangents = duals(SELF)
    f = lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.1)  # noqa: E731
    with jvp_attention(), warnings.catch_warnings():
        warnings.simplefilter("error")
        jvp(f, primals, tangents)
        monkeypatch.setattr(sdpa, "fused", lambda x: True)
        with pytest.warns(UserWarning, match="plain PyTorch.*dropout_p is not fused"):
            jvp(f, primals, tangents)
        jvp(f, primals, tangents)


@pytest.mark.parametrize("backend", ["torch", slow("triton")])
def test_masks_with_a_gradient_and_rows_without_keys(backend):
    """Gradients are finite, also through the tangent, and the mask's gradient is kept."""
    (q, k, v), tangents = duals(SELF)
    bias = randn(5, 5, 5).masked_fill(~MASK, -torch.inf)
    bias[1] = -torch.inf
    for mask in (bias, bias > -torch.inf):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with ops.use_backend(backend), jvp_attention():
            o, do = jvp(lambda *x: F.scaled_dot_product_attention(*x, mask), tuple(leaves), tangents)  # noqa: B023
        assert not any(x[:, :, 1].any() for x in (o, do))
        assert all(g.isfinite().all() for g in torch.autograd.grad(do.square().sum(), leaves))
    mask = randn(6, 5, 5).requires_grad_()
    with jvp_attention():
        do = jvp(lambda *x: F.scaled_dot_product_attention(*x, mask), (q, k, v), tangents)[1]
    expected = jvp(lambda *x: written_out(*x, mask), (q, k, v), tangents)[1]
    assert_near(torch.autograd.grad(do.sin().sum(), mask), torch.autograd.grad(expected.sin().sum(), mask))


@pytest.mark.parametrize("how", ["func", "forward_ad"])
def test_gradients_through_the_tangent_of_layer_norm(how):
    """PyTorch's own gradients are wrong."""
    x, dx, weight, bias = randn(0, 2, 5, 4), randn(1, 2, 5, 4), randn(2, 5, 4), randn(3, 5, 4)

    def written(x, weight, bias):
        centred = x - x.mean((1, 2), keepdim=True)
        return centred / (centred.square().mean((1, 2), keepdim=True) + 0.1).sqrt() * weight + bias

    def gradients(f, how):
        leaves = [x.clone().requires_grad_() for x in (x, weight, bias)]
        if how == "func":
            y, dy = jvp(lambda x: f(x, *leaves[1:]), (leaves[0],), (dx,))
        else:
            with fwad.dual_level():
                y, dy = fwad.unpack_dual(f(fwad.make_dual(leaves[0], dx), *leaves[1:]))
        return [y, dy, *torch.autograd.grad((y + dy.square()).sum(), leaves)]

    f = lambda x, weight, bias: F.layer_norm(x, (5, 4), weight, bias, 0.1)  # noqa: E731
    expected = gradients(written, "func")
    assert (gradients(f, how)[2] - expected[2]).norm() > 0.1 * expected[2].norm()
    with jvp_attention():
        assert_near(gradients(f, how), expected)
        with ops.differentiable_tangents(False), Operators() as names:
            jvp(lambda x: f(x, weight, bias), (x,), (dx,))
    assert "native_layer_norm" in names.names


# ----------------------------------------------------------------------------
# Modules that accelerate swaps or leaves.


class Causal(Attention):
    def forward(self, x):
        B, N, C = x.shape  # noqa: N806
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, N, C))


class HeadsFirst(Attention):
    def forward(self, x):
        B, N, C = x.shape  # noqa: N806
        q, k, v = self.qkv(x).reshape(B, N, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class DropPath(DiTBlock):
    def forward(self, x, c):
        y = super().forward(x, c)
        return x + F.dropout(y - x, 0.1, self.training)


class ScaleFirst(DiTBlock):
    def forward(self, x, c):
        b, a, g, e, d, h = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g.unsqueeze(1) * self.attn(modulate(self.norm1(x), a, b))
        return x + h.unsqueeze(1) * self.mlp(modulate(self.norm2(x), d, e))


def with_attributes(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module):
    module.norm1.register_forward_hook(lambda *_: None)
    return module


STRANGERS = {
    "causal": (lambda: Causal(32), "computes something different"),
    "heads first": (lambda: HeadsFirst(32), "computes something different"),
    "another scale": (lambda: with_attributes(Attention(32), scale=1.0), "computes something different"),
    "no Linear": (lambda: with_attributes(Attention(32), qkv=nn.Identity()), "could not be checked: AttributeError"),
    "meta": (lambda: Attention(32).to("meta"), "meta device"),
    "forward of its own": (lambda: with_attributes(Attention(32), forward=lambda x: x), "replaced on the instance"),
    "drop path": (lambda: DropPath(32), "computes something different from ours in training"),
    "scale first": (lambda: ScaleFirst(32), "computes something different"),
    "affine": (lambda: with_attributes(DiTBlock(32), norm2=nn.LayerNorm(32)), "LayerNorm has parameters"),
    "RMSNorm": (lambda: with_attributes(DiTBlock(32), norm1=nn.RMSNorm(32)), "its norm is RMSNorm"),
    "hooks": (lambda: hooked(DiTBlock(32)), "hooks"),
    "PyTorch's": (lambda: nn.MultiheadAttention(32, 2), "not a known family"),
}


@pytest.mark.filterwarnings("ignore:nothing was swapped")
@pytest.mark.parametrize("name", STRANGERS)
def test_unsupported_modules_are_left(name):
    make, reason = STRANGERS[name]
    module = make()
    before = type(module)
    swaps = accelerate(module)
    assert reason in swaps.left[""]
    assert type(module) is before


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_eps_of_a_block(eps):
    torch.manual_seed(0)
    block = DiTBlock(32)
    block.norm1.eps = block.norm2.eps = eps
    x, c = 0.3 * randn(0, 2, 4, 32), randn(1, 2, 32)
    expected = block(x, c)
    assert "" in accelerate(block).swapped
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            torch.testing.assert_close(block(x, c), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_checked_and_swapped(dtype):
    model = DiT().to(dtype)
    assert len(accelerate(model).swapped) == 4
    z, t, y = torch.randn(2, 4, 4, 4, dtype=dtype), torch.rand(2, dtype=dtype), torch.tensor([1, 2])
    u, du = jvp(lambda z: model(z, t, y), (z,), (z,))
    assert u.dtype == du.dtype == dtype


def test_one_configuration_is_checked_once(monkeypatch):
    from mfengine.backend import swap

    checked = []
    difference = swap._difference
    monkeypatch.setattr(swap, "_difference", lambda *args: (checked.append(1), difference(*args))[1])
    model = DiT(depth=5)
    model.blocks[3].attn.scale = 1.0
    swaps = accelerate(model)
    assert len(checked) == 4  # a block and its attention, and those of block 3
    assert swaps.swapped.keys() == {f"blocks.{i}" for i in range(5)} | {f"blocks.{i}.attn" for i in (0, 1, 2, 4)}
    assert swaps.left.keys() == {"blocks.3.attn", "final_layer"}


def test_accelerate_twice_copy_pickle_and_report():
    model = DiT()
    report = str(accelerate(model))
    assert "swapped 2 (blocks.0, blocks.1): adaLN block" in report
    assert "left 1 (final_layer): FinalLayer: not a known family" in report
    types = [type(m) for m in model.modules()]
    assert str(accelerate(model)) == report
    assert [type(m) for m in model.modules()] == types
    assert isinstance(model.blocks[0], DiTBlock)
    assert repr(model.blocks[0]).startswith("DiTBlock(")
    inputs = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 2])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in copied.modules()] == types
        torch.testing.assert_close(copied(*inputs), model(*inputs))
        next(copied.parameters()).data.zero_()
        assert next(model.parameters()).abs().max() > 0


def test_mask_and_dropout_after_accelerate():
    torch.manual_seed(0)
    old = Attention(32, attn_drop=0.5)
    new = copy.deepcopy(old)
    accelerate(new)
    x = randn(0, 2, 5, 32)
    for training in (True, False):
        outputs = []
        for module in (old, new):
            torch.manual_seed(1)
            outputs.append(module.train(training)(x))
        torch.testing.assert_close(*outputs)
    for arguments in ({"attn_mask": MASK}, {"attn_mask": None}):
        torch.testing.assert_close(new(x, **arguments), old(x, **arguments))
        torch.testing.assert_close(new(x=x, **arguments), old(x, **arguments))


def test_arguments_by_name():
    """Arguments go by their names in the old forward."""

    class Block(DiTBlock):
        def forward(self, tokens, condition, extra=None):
            return super().forward(tokens, condition) + (0 if extra is None else extra)

    torch.manual_seed(0)
    block, x, c = Block(32), randn(0, 2, 5, 32), randn(1, 2, 32)
    expected = block(x, c)
    assert "" in accelerate(block).swapped
    with Operators() as fused, ops.use_backend("triton"):
        torch.testing.assert_close(block(x, condition=c), expected)
    assert "residual_adaln" in fused.names
    torch.testing.assert_close(block(condition=c, tokens=x, extra=x), expected + x)
    torch.testing.assert_close(block(x, c, x), expected + x)


def test_diffusers_attention_of_other_models():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    cross = processors.Attention(32, cross_attention_dim=24, heads=2, dim_head=16, qk_norm="layer_norm")
    x, context, mask = randn(0, 2, 5, 32), randn(1, 2, 7, 24), torch.zeros(2, 1, 7)
    expected = cross(x, context), cross(x, context, mask)
    model = nn.ModuleDict({"cross": cross, "added": processors.Attention(32, heads=2, dim_head=16)})
    model["added"].set_processor(processors.AttnAddedKVProcessor2_0())
    swaps = accelerate(model)
    assert list(swaps.swapped) == ["cross"]
    assert "its processor is AttnAddedKVProcessor2_0" in swaps.left["added"]
    torch.testing.assert_close((cross(x, context), cross(x, context, mask)), expected)


def test_wrong_use_of_accelerate():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, not dict"):
        accelerate({})
    with pytest.warns(UserWarning, match="nothing was swapped: found no block of DiT"):
        swaps = accelerate(nn.Linear(2, 2))
    assert not swaps.swapped


# ----------------------------------------------------------------------------
# The public ops.


def test_wrong_tangents_on_the_fused_path():
    x, row = torch.zeros(2, 5, 16), torch.zeros(2, 16)
    heads = torch.zeros(2, 3, 5, 16)
    wrong = (
        (ops.attention, [(heads, heads[:, :2]), (heads, heads), (heads, heads)], r"dq must be of shape \(2, 3, 5, 1"),
        (ops.attention, [(heads.double(), heads.double())] * 3, "q is torch.float64; it must be float16"),
        (ops.adaln_modulate, [(x, x[:, :4]), (row, row), (row, row)], r"dx must be \(K, 5, 16\) with K at most 2"),
        (ops.adaln_modulate, [(x, x), (row, row[:1]), (row, row)], "the same number of rows, not 2 and 1"),
        (ops.gated_residual_adaln, [(x, x), (x, x[..., :1])] + [(row, row)] * 3, r"dy must be of shape \(2, 5, 16\)"),
        (ops.gelu, [(x, torch.zeros(3, 5, 16))], r"dx must be \(K, ...\) like x"),
    )  # fmt: skip
    with ops.use_backend("triton"):
        for op, arguments, message in wrong:
            with pytest.raises(ValueError, match=message):
                op(*(Dual(*a) for a in arguments))


@pytest.mark.parametrize(
    "name", ["ops.attention", "ops.adaln", "ops.activations", "ops.dual", "backend.sdpa", "backend.swap"]
)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"mfengine.{name}"), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0
