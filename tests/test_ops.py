"""Every op's tangent rule against forward-mode autograd of its primal, in float64, over odd sizes and strides."""

import pytest
import torch

from mfengine import ops
from mfengine.ops import Dual


def attention_with_scale(q, k, v):
    return ops.attention(q, k, v, scale=0.3)


def packed_two_heads(qkv):
    return ops.attention_packed(qkv, num_heads=2)


def residual_adaln_stream(x, y, gate):
    return ops.gated_residual_adaln(x, y, gate, gate, gate)[0]


def biased_gelu(x):
    return ops.gelu(x, torch.linspace(-1, 1, 17).double())


def residual_adaln_output(*args):
    return ops.gated_residual_adaln(*args)[1]


def linear(x):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(5, x.shape[-1] if isinstance(x, torch.Tensor) else x.primal.shape[-1], generator=generator)
    return ops.linear(x, weight.double(), torch.randn(5, generator=generator).double())


B = 5
CASES = {
    "attention": (ops.attention, [(B, 3, 7, 12), (B, 3, 7, 12), (B, 3, 7, 12)]),
    "attention, cross": (attention_with_scale, [(B, 1, 4, 5), (B, 1, 9, 5), (B, 1, 9, 5)]),
    "attention, one token": (ops.attention, [(B, 2, 1, 3)] * 3),
    "attention_packed": (packed_two_heads, [(B, 7, 3 * 2 * 9)]),
    "adaln_modulate": (ops.adaln_modulate, [(B, 7, 13), (B, 13), (B, 13)]),
    "gated_residual_adaln, x": (residual_adaln_stream, [(B, 7, 13), (B, 7, 13), (B, 13)]),
    "gated_residual_adaln, o": (residual_adaln_output, [(B, 7, 13), (B, 7, 13), (B, 13), (B, 13), (B, 13)]),
    "gelu": (ops.gelu, [(B, 17)]),
    "gelu, biased": (biased_gelu, [(B, 3, 17)]),
    "silu": (ops.silu, [(B, 17)]),
    "linear": (linear, [(B, 3, 11)]),
    "sinusoid": (lambda t: ops.sinusoid(t, 16), [(B,)]),
    "add": (ops.add, [(B, 3), (B, 3)]),
    "add_constant": (lambda x: ops.add_constant(x, torch.arange(3.0).double()), [(B, 3)]),
    "chunk": (lambda x: ops.chunk(x, 3)[1], [(B, 9)]),
    "linear_map": (lambda x: ops.linear_map(lambda a: a.transpose(1, 2), x), [(B, 3, 4)]),
}


def randn(shape, seed, contiguous=True):
    generator = torch.Generator().manual_seed(seed)
    if contiguous:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)
    return wide[..., ::2]


@pytest.mark.parametrize("rows", [0, 1, 3, B])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_tangent_of_trailing_rows_is_the_jvp(name, contiguous, rows):
    op, shapes = CASES[name]
    primals = [randn(s, i, contiguous) for i, s in enumerate(shapes)]
    tangents = [randn(s, 100 + i, contiguous) for i, s in enumerate(shapes)]
    output, expected = torch.func.jvp(op, tuple(primals), tuple(tangents))
    dual = op(*(Dual(p, t[B - rows :]) for p, t in zip(primals, tangents, strict=True)))
    torch.testing.assert_close(dual.primal, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dual.tangent, expected[B - rows :], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_primal_of_a_dual_has_the_gradient_of_the_op(name):
    op, shapes = CASES[name]
    primals = [randn(s, i).requires_grad_() for i, s in enumerate(shapes)]
    output = op(*primals)
    weights = randn(output.shape, 50)
    expected = torch.autograd.grad((output * weights).sum(), primals)
    dual = op(*(Dual(p, randn(p.shape, 9)[2:]) for p in primals))
    assert not dual.tangent.requires_grad
    actual = torch.autograd.grad((dual.primal * weights).sum(), primals)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["attention", "attention_packed", "adaln_modulate", "gelu", "gated_residual_adaln, o"])
def test_tangent_is_the_finite_difference(name):
    op, shapes = CASES[name]
    primals, tangents = ([randn(s, i + shift) for i, s in enumerate(shapes)] for shift in (0, 100))
    step = 1e-5
    ahead = op(*(p + step * t for p, t in zip(primals, tangents, strict=True)))
    behind = op(*(p - step * t for p, t in zip(primals, tangents, strict=True)))
    dual = op(*(Dual(p, t) for p, t in zip(primals, tangents, strict=True)))
    torch.testing.assert_close(dual.tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("linear", "sinusoid", "add_constant", "gelu, biased")])
def test_lower_precision_keeps_its_dtype_and_stays_near(name, dtype, tolerance):
    op, shapes = CASES[name]
    primals, tangents = ([randn(s, i + shift).to(dtype) for i, s in enumerate(shapes)] for shift in (0, 100))
    low = op(*(Dual(p, t) for p, t in zip(primals, tangents, strict=True)))
    exact = op(*(Dual(p.double(), t.double()) for p, t in zip(primals, tangents, strict=True)))
    for actual, expected in zip(low, exact, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()


def test_attention_equals_pytorchs():
    q, k, v = (randn((2, 3, n, 8), i) for i, n in enumerate((5, 9, 9)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ops.attention(q, k, v), expected)


def test_mixed_dtypes_keep_the_residual_stream_wide():
    x = torch.randn(2, 3, 8)
    y, gate, shift, scale = (torch.randn(s, dtype=torch.bfloat16) for s in ((2, 3, 8), (2, 8), (2, 8), (2, 8)))
    stream, output = ops.gated_residual_adaln(*(Dual(a, torch.ones_like(a)) for a in (x, y, gate, shift, scale)))
    assert (stream.primal.dtype, stream.tangent.dtype) == (torch.float32, torch.float32)
    assert (output.primal.dtype, output.tangent.dtype) == (torch.bfloat16, torch.bfloat16)


def test_ops_work_under_compile():
    def f(qkv, dqkv):
        return tuple(ops.attention_packed(Dual(qkv, dqkv), 2))

    qkv = torch.randn(3, 4, 24)
    dqkv = torch.randn(2, 4, 24)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(qkv, dqkv), f(qkv, dqkv), strict=True):
        torch.testing.assert_close(actual, expected)
