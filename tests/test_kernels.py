"""Every kernel against the plain reference in float64: output, tangent and gradients.

Without a GPU they run in Triton's interpreter, where bfloat16 products are wrong, so float32 and float16 are tested.
"""

import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import slow
from golden_cases import IMPROVED_NAMES, NAMES, golden_case, relative_error

pytest.importorskip("triton", reason="the fused kernels need triton")

from benchmarks import static
from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig, ops
from mfengine.kernels import adaln, attention, gelu, rmsnorm, rope, swiglu
from mfengine.kernels.launch import Config, Launch, aligned
from mfengine.kernels.multi_tensor import LIBRARY
from mfengine.ops import Dual
from mfengine.ops.attention import ROTARY_ATTENTION
from mfengine.ops.backend import fused
from mfengine.ops.rope import angles as norm_rope_angles
from mfengine.ops.rope import norm_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3}
if DEVICE == "cuda":
    BOUNDS[torch.bfloat16] = 8e-3
DTYPES = pytest.mark.parametrize("dtype", BOUNDS)


@pytest.fixture(autouse=True)
def _reference_in_float64():
    """The tests call kernels through ops, whose plain path is the reference."""
    with ops.use_backend("torch"):
        yield


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def run(op, backend, primals, tangents, weights):
    """Outputs, tangents, and the gradients of the weighted outputs."""
    leaves = [p.detach().requires_grad_() for p in primals]
    with ops.use_backend(backend):
        result = op(*(Dual(p, t) for p, t in zip(leaves, tangents, strict=True)))
        result = result if isinstance(result[0], Dual) else (result,)
        total = sum((r.primal * w).sum() for r, w in zip(result, weights, strict=True))
        gradients = torch.autograd.grad(total, leaves)
    assert not any(r.tangent.requires_grad for r in result)
    return [x.detach() for r in result for x in r] + list(gradients)


def check(op, primals, tangents, weights):
    """Fused against float64, within the dtype's bound and 1.5 times the error of plain PyTorch in that dtype."""
    wide = [[x.double() for x in xs] for xs in (primals, tangents, weights)]
    exact = run(op, "torch", *wide)
    plain = run(op, "torch", primals, tangents, weights)
    actual = run(op, "triton", primals, tangents, weights)
    bound = BOUNDS[min((p.dtype for p in primals), key=lambda d: torch.finfo(d).bits)]
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert a.shape == e.shape
        assert a.dtype == p.dtype
        if e.numel() and e.norm() > 1e-6:
            error = relative_error(a.cpu(), e.cpu())
            assert error <= bound, (i, error)
            assert error <= max(1.5 * relative_error(p.cpu(), e.cpu()), 1e-6), (i, error)


# ----------------------------------------------------------------------------
# Attention.


# The interpreter takes seconds for many of these. So each class of tiles, with and without a tail, runs with one query
# and a padded block of keys, and one head dim without a tail runs with whole blocks.
# `test_rotary_attention_of_odd_sizes` has several partly filled blocks of queries. The other kinds of heads, and
# float32 in large heads, are slow.
ATTENTION = [
    (8, 1, 17, torch.float32),
    *((dim, 1, 17, dtype) for dim in (8, 72, 128) for dtype in BOUNDS if dtype != torch.float32),
    (64, 64, 64, torch.float16),
    *(slow(dim, 1, 17, torch.float32) for dim in (72, 128)),
    slow(24, 33, 20, torch.float32),
    *(slow(dim, 64, 64, torch.float16) for dim in (8, 24, 72, 96, 120, 128)),
    *(slow(*case, torch.float16) for case in [(72, 64, 128), (72, 100, 37), (128, 100, 37)]),
]


@pytest.mark.parametrize(("dim", "queries", "keys", "dtype"), ATTENTION)
def test_attention(dim, queries, keys, dtype):
    """Two of three samples have a tangent; queries, keys and values are strided views of packed products."""
    tokens = max(queries, keys)

    def qkv(seed, batch):
        packed = randn(seed, batch, tokens, 3, 2, dim, dtype=dtype).permute(2, 0, 3, 1, 4)  # (3, B, H, N, d)
        return [packed[0, :, :, :queries], packed[1, :, :, :keys], packed[2, :, :, :keys]]

    check(ops.attention, qkv(0, 3), qkv(1, 2), [randn(2, 3, 2, queries, dim, dtype=dtype)])


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [  # the number of rows does not interact with the dtype
        *(slow(1, dtype) if dtype == torch.float32 else (1, dtype) for dtype in BOUNDS),
        (0, torch.float16),
        slow(2, torch.float16),
    ],
)
def test_attention_packed(rows, dtype):
    tokens, heads = (129 if dtype == torch.float16 else 49, 1) if rows == 1 else (33, 2)
    primals, tangents = [randn(0, 2, tokens, 3 * 16, dtype=dtype)], [randn(1, rows, tokens, 3 * 16, dtype=dtype)]
    op = lambda x: ops.attention_packed(x, heads)  # noqa: E731
    check(op, primals, tangents, [randn(2, 2, tokens, 16, dtype=dtype)])


@pytest.mark.skipif(DEVICE == "cuda", reason="tensor cores make these products themselves")
@pytest.mark.parametrize("dim", [72, slow(128)])
def test_float32_attention_from_tf32_products(dim, monkeypatch):
    """The interpreter multiplies in float32; here in three products of TF32 operands, as the kernels request."""
    from triton.runtime import interpreter

    def tf32(x):
        return ((x.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)

    def dot(self, a, b, acc, precision, _):
        assert precision.name == "TF32x3"
        a, b = a.data, b.data
        a_high, b_high = tf32(a), tf32(b)
        product = tf32(a - a_high) @ b_high + a_high @ tf32(b - b_high) + a_high @ b_high
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    q, k, v, dq, dk, dv, w = (randn(i, 1, 1, 17, dim) for i in range(7))
    check(ops.attention, [q, k, v], [dq, dk, dv], [w])


def test_attention_with_strided_heads_and_a_scale():
    q, k, v, dq, dk, dv = (randn(i, 1, 2, 19, 2 * 24)[..., ::2] for i in range(6))
    op = lambda q, k, v: ops.attention(q, k, v, scale=0.05)  # noqa: E731
    check(op, [q, k, v], [dq, dk, dv], [randn(7, 1, 2, 19, 24)])


def test_attention_survives_large_scores():
    q, k, v, dq, dk, dv = (randn(i, 1, 1, 33, 16) for i in range(6))
    check(ops.attention, [q * 5, k, v], [dq, dk, dv], [randn(7, 1, 1, 33, 16)])


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_zero_length_attention(batch, queries, keys):
    q, k, v = (randn(0, batch, 2, n, 16) for n in (queries, keys, keys))
    o, lse, do = attention.forward_dual(q, k, v, q, k, v)
    assert o.shape == do.shape == q.shape
    assert (o == 0).all()
    assert (do == 0).all()
    assert all((g == 0).all() for g in attention.backward(q, k, v, o, lse, o))


@pytest.mark.parametrize(
    ("dtype", "lse", "keys"),
    [
        (torch.float16, -10, 257),
        (torch.float32, -100, 77),
        *(slow(torch.float16, -10, keys) for keys in (77, 100)),
        *(slow(torch.float32, -100, keys) for keys in (100, 257)),
    ],
)
def test_padded_keys_add_nothing_at_a_very_negative_log_sum_exp(dtype, lse, keys):
    q, k, v, dq, dk, dv, go = (randn(i, 1, 1, n, 16, dtype=dtype) for i, n in enumerate((3, keys, keys) * 2 + (3,)))
    q[..., 0], k[..., 0] = 4 * (math.log(keys) - lse), -1
    assert attention.forward(q, k, v)[1].sub(lse).abs().max() < 2
    arguments = [q, k, v], [dq, dk, dv], [8 * go]
    exact = run(ops.attention, "torch", *([x.double() for x in xs] for xs in arguments))
    plain, actual = (run(ops.attention, backend, *arguments) for backend in ("torch", "triton"))
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert relative_error(a.cpu(), e.cpu()) <= max(2 * relative_error(p.cpu(), e.cpu()), BOUNDS[dtype])


@pytest.mark.parametrize("layout", [slow("odd strides"), "odd pointers", slow("columns")])
@pytest.mark.parametrize("dtype", [torch.float16])  # the copy is the same for every dtype
def test_attention_with_unaligned_layouts(layout, dtype):
    def empty(tokens):
        if layout == "odd strides":
            return torch.empty(1, 2, tokens, 73, dtype=dtype, device=DEVICE)[..., :72]
        if layout == "odd pointers":
            return torch.empty(2 * tokens * 72 + 1, dtype=dtype, device=DEVICE)[1:].view(1, 2, tokens, 72)
        return torch.empty(1, 2, 72, tokens, dtype=dtype, device=DEVICE).mT

    values = [randn(i, 1, 2, n, 72, dtype=dtype) for i, n in enumerate((5, 19, 19, 5, 19, 19, 5))]
    odd = [empty(x.shape[2]).copy_(x) for x in values]
    assert not any(aligned(x) is x for x in odd)
    results = []
    for q, k, v, dq, dk, dv, go in (values, odd):
        o, lse, do = attention.forward_dual(q, k, v, dq, dk, dv)
        results.append([o, lse, do, *attention.backward(q, k, v, o, lse, go)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dim", range(8, 129, 8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_takes_packed_and_dense_heads_without_a_copy(dim, dtype):
    packed = torch.empty(2, 7, 3, 4, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    dense = torch.empty(2, 4, 7, dim, dtype=dtype)
    assert all(aligned(x) is x for x in (*packed, dense, dense[1:]))


def test_log_sum_exp():
    q, k, v = (randn(i, 2, 2, 21, 24) for i in range(3))
    _, lse = attention.forward(q, k, v)
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT * 24**-0.5, -1))


# ----------------------------------------------------------------------------
# Sizes and devices.

FAR = 2**30 + 8  # elements between two rows: the third lies beyond 32 bits


@pytest.fixture(scope="module")
def far_apart():
    """(3, 8) float16 in a view that spans 4 GB, but touches only three pages."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    x = torch.empty(2 * FAR + 8, dtype=torch.float16, device=DEVICE).as_strided((3, 8), (FAR, 1))
    return x.copy_(randn(0, 3, 8))


def test_attention_of_a_view_that_spans_more_than_32_bits(far_apart):
    near = far_apart.clone()
    x, y = far_apart[None, None], near[None, None]
    assert torch.equal(attention.forward(x, x, x)[0], attention.forward(y, y, y)[0])


def test_adaln_of_a_view_that_spans_more_than_32_bits(far_apart):
    row, near = randn(1, 1, 8), far_apart.clone()
    forward = [adaln.forward(x[None], None, None, row, row, 1e-6)[1] for x in (far_apart, near)]
    backward = [adaln.backward(x[None], None, None, row, None, x[None], 1e-6) for x in (far_apart, near)]
    assert torch.equal(*forward)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*backward, strict=True))


def test_rope_of_rows_that_lie_beyond_32_bits(far_apart):
    weight, near = randn(1, 4), far_apart.clone()
    results = []
    for x in (far_apart, near):
        o = rope.forward(x, weight, weight, 1, 3, 1e-6)
        results.append([o, *rope.backward(x, weight, weight, o, gx := torch.empty_like(near), 1, 3, 1e-6), gx])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_grids_take_any_number_of_heads_and_samples(monkeypatch):
    """Axes 1 and 2 of a grid end at 65,535."""
    grids = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: grids.append(self.grid))
    q, lse = torch.empty(70_000, 2, 1, 8, device="meta"), torch.empty(70_000, 2, 1, device="meta")
    attention.forward(q, q, q)
    attention.forward_dual(q, q, q, q, q, q)
    attention.backward(q, q, q, q, lse, q)
    assert grids == [(140_000, 1, 1)] * 5
    x, row = torch.empty(70_000, 1, 8, device="meta"), torch.empty(70_000, 8, device="meta")
    adaln.forward(x, x, row, row, row, 1e-6)
    adaln.backward(x, x, row, row, x, x, 1e-6)
    gelu.forward(x, row[0])
    gelu.backward(x, row[0], x)
    rmsnorm.forward(x, x, row[0], row[0], 1e-6, x.dtype)
    rmsnorm.backward(x, x, row[0], row[0], x, x, 1e-6)
    assert [grid[0] for grid in grids[5:7]] == [70_000] * 2
    assert all(n == 1 for grid in grids[5:] for n in grid[1:])
    swiglu.forward(torch.empty(70_000, 1, 4, device="meta"))
    rope.forward(torch.empty(70_000, 8, device="meta"), row[0, :4], row[0, :4], 1, 1, 1e-6)
    assert grids[-1] == (70_000, 2, 1)
    assert all(n <= 2 for n in grids[-2][1:])


class Compiled:
    """Stands for a Triton kernel and its compiled code, and records calls of both."""

    arg_names = ("x_ptr", "o_ptr", "none_ptr", "width", "eps", "BLOCK", "EVEN")

    def __init__(self, current=(None,)):
        self.by_triton, self.direct, self.current = [], [], current

    def __getitem__(self, grid):
        def call(*args, **options):
            self.by_triton.append(
                (self.current[0], grid, [x if x is None else x.data_ptr() for x in args[:3]], options)
            )
            return {grid: lambda *args: self.direct.append((self.current[0], args))}

        return call


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch):
    """They do not use the current device, which changes only if it differs."""
    current, switches = [0], []

    @contextmanager
    def device(other):
        switches.append(other.index)
        before, current[0] = current[0], other.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = Compiled(current)
    for index in (1, 0):
        x = SimpleNamespace(
            is_cuda=True, device=torch.device("cuda", index), data_ptr=lambda: 32, element_size=lambda: 4
        )
        launch = Launch(kernel, (3,), (64, 1e-6), {"BLOCK": 16, "EVEN": True})
        for _ in range(2):
            launch(x, x, None)
    assert [call[0] for call in kernel.by_triton] == [1, 0]
    assert [call[0] for call in kernel.direct] == [1, 0]
    assert switches == [1, 1]
    assert current == [0]


def test_later_launches_pass_addresses_to_compiled_code():
    kernel, (x, o) = Compiled(), torch.zeros(2, 64)
    launch = Launch(kernel, (3,), (64, 1e-6), {"EVEN": True, "BLOCK": 16, "num_warps": 4}, starts=(0, 8))
    pointers = [x.data_ptr(), o.data_ptr() + 8 * 4, None]
    launch(x, o, None)
    assert kernel.by_triton == [(None, (3, 1, 1), pointers, {"EVEN": True, "BLOCK": 16, "num_warps": 4})]
    launch(x, o, None)
    assert kernel.direct == [(None, (*pointers, 64, 1e-6, 16, True))]
    launch(x[1:], o, None)  # 4 bytes further, which needs other code
    assert len(kernel.by_triton) == 2
    launch(o, x, None)
    assert kernel.direct[1][1][:3] == (o.data_ptr(), x.data_ptr() + 8 * 4, None)


def test_unaligned_addresses_get_separate_code():
    kernel, x = Compiled(), torch.zeros(64)
    launch = Launch(kernel, (3,), (64, 1e-6), {"EVEN": True, "BLOCK": 16})
    for start in (1, 0, 1, 0):
        launch(x[start:], x, None)
    assert [pointers[0] % 16 for _, _, pointers, _ in kernel.by_triton] == [4, 0]
    assert [args[0] % 16 for _, args in kernel.direct] == [4, 0]


def test_plans_follow_configurations(monkeypatch):
    """As in a search for the best tiles, which changes configurations between calls."""
    grids = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: grids.append(self.grid[0]))
    q = torch.empty(1, 1, 256, 64, device="meta", dtype=torch.float16)
    for rows in (32, 64, 64):
        config = Config(BLOCK_M=rows, BLOCK_N=32, num_warps=4, num_stages=1)
        monkeypatch.setitem(attention.CONFIGS["forward"], "narrow", config)
        attention.forward(q, q, q)
    assert grids == [8, 4, 4]


# ----------------------------------------------------------------------------
# adaLN and GELU.


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "rows", "dtype"),
    [  # the backward takes 16 tokens at a time
        (1, 33, 100, 1, torch.float16),
        (3, 5, 72, 1, torch.float32),
        (1, 1, 1152, 0, torch.float32),
        *(slow(3, 17, 72, 1, dtype) for dtype in BOUNDS),
        slow(2, 33, 100, 2, torch.float16),
    ],
)
def test_adaln(batch, tokens, width, rows, dtype):
    """The residual stream is always float32; the modulation is a slice of a wider product."""

    def inputs(seed, n):
        stream, branch = randn(seed, n, tokens, width), randn(seed + 1, n, tokens, width, dtype=dtype)
        modulation = randn(seed + 2, n, 6 * width, dtype=dtype).chunk(6, -1)
        return [stream, branch, modulation[0], modulation[3], modulation[5]]

    primals, tangents = inputs(0, batch), inputs(10, rows)
    weights = [randn(20, batch, tokens, width), randn(21, batch, tokens, width, dtype=dtype)]
    check(ops.gated_residual_adaln, primals, tangents, weights)
    first = [0, 3, 4]
    check(ops.adaln_modulate, [primals[i] for i in first], [tangents[i] for i in first], weights[1:])


@pytest.mark.parametrize("kernel", adaln.ELEMENTS)
@pytest.mark.parametrize("width", [8, 72, 384, 768, 1024, 1152, 1920, 8192])
def test_adaln_rows_occupy_few_lanes(kernel, width):
    """A row of XL/2 takes 1152 columns or, if two warps share it, 1280; a lane takes four columns at a time."""
    tile = adaln.tile(kernel, width)
    columns, lanes = tile["HEAD"] + tile["TAIL"], 32 * tile["num_warps"]
    assert width <= columns <= max(1.15 * width, width + 4 * lanes)
    assert columns <= lanes * adaln.ELEMENTS[kernel]
    assert tile["TAIL"] == 0 or tile["TAIL"] >= 4 * lanes


def test_sums_over_tokens_are_deterministic():
    x, go = randn(0, 1, 70, 64), randn(1, 1, 70, 64)
    scale = randn(2, 1, 64)
    runs = [adaln.backward(x, x, scale, scale, None, go, 1e-6) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@DTYPES
@pytest.mark.parametrize(("shape", "rows"), [((3, 17, 100), 1), ((2, 9, 1500), 2), ((1, 1, 8), 0), ((0, 3, 8), 0)])
def test_gelu(shape, rows, dtype):
    bias = randn(3, shape[-1], dtype=dtype)
    primals, tangents = [randn(0, *shape, dtype=dtype) * 2], [randn(1, rows, *shape[1:], dtype=dtype)]
    check(
        lambda x: ops.gelu(x, bias.to(ops.dual.primal_of(x).dtype)), primals, tangents, [randn(2, *shape, dtype=dtype)]
    )


def test_gelu_gradient_of_the_bias():
    x, bias = randn(0, 3, 70, 40), randn(1, 40)
    go = randn(2, 3, 70, 40)
    gx, gbias = gelu.backward(x, bias, go)
    leaves = [t.double().requires_grad_() for t in (x, bias)]
    out = torch.nn.functional.gelu(leaves[0] + leaves[1], approximate="tanh")
    for actual, expected in zip((gx, gbias), torch.autograd.grad(out, leaves, go.double()), strict=True):
        assert relative_error(actual.cpu(), expected.cpu()) < 1e-5


# ----------------------------------------------------------------------------
# RMSNorm with a gated residual, SwiGLU, and RMSNorm with RoPE.


@DTYPES
@pytest.mark.parametrize(("shape", "rows"), [((3, 17, 72), 1), ((37, 100), 37), ((2, 3, 1500), 1), ((4, 7), 0)])
def test_gated_residual_rms_norm(shape, rows, dtype):
    """With tokens as rows or not; the residual stream is always float32."""

    def inputs(seed, n):
        size = (n, *shape[1:])
        return [randn(seed, *size), randn(seed + 1, *size, dtype=dtype), *randn(seed + 2, 2, shape[-1], dtype=dtype)]

    weights = [randn(20, *shape), randn(21, *shape, dtype=dtype)]
    check(ops.gated_residual_rms_norm, inputs(0, shape[0]), inputs(10, rows), weights)


@pytest.mark.parametrize("used", [0, 1])
def test_gated_residual_with_one_output_used(used):
    arguments = [randn(0, 2, 5, 24), randn(1, 2, 5, 24), randn(2, 24), randn(3, 24)]
    gradients = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in arguments]
        with ops.use_backend(backend):
            output = ops.gated_residual_rms_norm(*leaves)[used]
            gradients.append(torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True))
    for expected, actual in zip(*gradients, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


@DTYPES
@pytest.mark.parametrize(
    ("shape", "rows"), [((3, 17, 2 * 100), 1), ((2, 9, 2 * 344), 2), ((5, 2 * 33), 0), ((1, 1, 2), 1), ((0, 3, 8), 0)]
)
def test_swiglu(shape, rows, dtype):
    primals, tangents = [randn(0, *shape, dtype=dtype) * 2], [randn(1, rows, *shape[1:], dtype=dtype)]
    check(ops.swiglu, primals, tangents, [randn(2, *shape[:-1], shape[-1] // 2, dtype=dtype)])


@DTYPES
@pytest.mark.parametrize(
    ("heads", "dim", "tokens", "rows"), [(1, 64, 45, 1), (1, 72, 5, 2), (3, 8, 17, 1), (12, 6, 7, 0)]
)
def test_norm_and_rope(heads, dim, tokens, rows, dtype):
    """Queries and keys are in a packed product; its values are not read, nor is their gradient written."""

    def inputs(seed, batch):
        return [randn(seed, batch * tokens, 3 * heads * dim, dtype=dtype), *randn(seed + 1, 2, dim)]

    def norm(x, q_weight, k_weight):
        first = ops.linear_map(lambda x: x[:, : 2 * heads * dim], x)
        return norm_rope(first, q_weight, k_weight, heads, tokens, 1e-6)

    check(norm, inputs(0, 2), inputs(10, rows), [randn(20, 2 * tokens, 2 * heads * dim, dtype=dtype)])


@pytest.mark.parametrize("tokens", [1, 276])
def test_angles_are_exact_to_float32(tokens):
    expected = norm_rope_angles(tokens, 64, torch.device("cpu")).flatten(1)
    assert torch.equal(rope.angles(tokens, 64, torch.device("cpu")), expected.float())


def test_rotary_attention_of_odd_sizes():
    """Tokens fill blocks only in part, at the networks' head dim."""

    def inputs(seed, batch):
        return [randn(seed, batch, 65, 3 * 64, dtype=torch.float16), *randn(seed + 1, 2, 64)]

    op = lambda x, q, k: ops.rotary_attention(x, q, k, 1)  # noqa: E731
    check(op, inputs(0, 2), inputs(10, 1), [randn(20, 2, 65, 64, dtype=torch.float16)])


def test_rotary_attention_copies_nothing(monkeypatch):
    """Attention reads the values in place in the packed product, and writes their gradient in place."""
    launches = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: launches.append((self.kernel.__name__, tensors)))
    for f in ("clone", "zero_", "copy_"):
        monkeypatch.setattr(torch.Tensor, f, lambda *_, **__: pytest.fail("a copy"))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("a copy"))
    qkv, weight = torch.empty(2, 7, 3 * 32, device="meta"), torch.empty(16, device="meta")
    arguments, options = (qkv, weight, weight), (2, 7, 1e-6)
    o, qk, lse = ROTARY_ATTENTION.forward(*arguments, *options)
    ROTARY_ATTENTION.dual(*arguments, qkv[1:], None, None, *options)
    assert [name for name, _ in launches] == ["forward_kernel"] * 6  # the second with first rows and with last rows
    assert launches[1][1][:3] == (qk, qk, qkv)
    assert launches[5][1][5] is not None
    launches.clear()
    gqkv, *_ = ROTARY_ATTENTION.backward(*arguments, qk, o, lse, o, *options)
    names = ["delta_kernel", "backward_kv_kernel", "backward_q_kernel", "backward_kernel", "sum_kernel"]
    assert [name for name, _ in launches] == names
    assert launches[1][1][6] is gqkv
    assert launches[3][1][5]._base is gqkv


def test_sums_over_rows_are_deterministic():
    x, go, weight = randn(0, 100, 64), randn(1, 100, 64), randn(2, 64)
    head = weight[:16].clone()
    runs = [
        [
            *rmsnorm.backward(x, x, weight, weight, None, go, 1e-6),
            *rope.backward(x, head, head, go, torch.empty_like(x), 2, 50, 1e-6),
        ]
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kernel", rmsnorm.ELEMENTS)
@pytest.mark.parametrize("width", [64, 768, 1024, 1152, 8192])
def test_rms_norm_lanes_hold_few_elements(kernel, width):
    """One warp, or in the backward two, hold a whole row of iMF's networks."""
    tile = rmsnorm.tile(kernel, width)
    assert width > 1024 or tile["num_warps"] <= (2 if kernel == "backward" else 1)
    assert tile["ROWS"] * tile["BLOCK"] <= 32 * tile["num_warps"] * rmsnorm.ELEMENTS[kernel]
    assert width <= tile["BLOCK"] < 2 * width


# ----------------------------------------------------------------------------
# The network on fused kernels.


@pytest.mark.slow  # a smaller network is below, and `test_golden.py` has these cases on plain PyTorch
@pytest.mark.parametrize("name", [*NAMES, *IMPROVED_NAMES])
def test_golden_cases_through_the_fused_path(name):
    case = golden_case(name)
    case.model.to(DEVICE)
    latents, labels, draws = case.batch("in")
    draws = draws._replace(noise=draws.noise.to(DEVICE))
    with ops.use_backend("triton"):
        loss, metrics = case.method.loss(case.model, latents.to(DEVICE), labels.to(DEVICE), draws)
        loss.backward()
    assert relative_error(loss.detach().cpu(), case.arrays["out/loss"]) < 1e-5
    for key in case.intermediate:
        actual, expected = metrics[key].cpu(), case.image(f"mid/{key}")
        assert relative_error(actual, expected[len(expected) - len(actual) :]) < 1e-5, key
    gradients = case.parameters("grads")
    for parameter, p in case.model.named_parameters():
        assert relative_error(p.grad.cpu(), gradients[parameter]) < 1e-5, parameter


def test_network_on_meta_tensors_and_in_half_precision():
    model = DiT(ModelConfig(8, 2, 4, hidden_size=48, depth=1, num_heads=2, num_classes=3), torch.float16)
    z, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tangents = (z[1:], t[1:], t[1:])
    plain = model.to(DEVICE)(
        z.to(DEVICE), t.to(DEVICE), t.to(DEVICE), y.to(DEVICE), tuple(x.to(DEVICE) for x in tangents)
    )
    with ops.use_backend("triton"):
        fused = model(z.to(DEVICE), t.to(DEVICE), t.to(DEVICE), y.to(DEVICE), tuple(x.to(DEVICE) for x in tangents))
        shape = model.to("meta")(z.to("meta"), t.to("meta"), t.to("meta"), y.to("meta")).shape
    assert shape == z.shape
    for a, e in zip(fused, plain, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a.detach().cpu(), e.detach().cpu()) < 5e-3


def test_step_of_a_network_through_the_fused_path():
    """With guidance: its loss and each gradient."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(4, 2, 2, hidden_size=16, depth=1, num_heads=2, num_classes=3))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    method = MeanFlow(MeanFlowConfig(omega=0.2, kappa=0.92))
    draws = method.draw((4, 2, 4, 4), torch.Generator().manual_seed(0))
    results = []
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            loss, _ = method.loss(model.to(DEVICE), randn(0, 4, 2, 4, 4), torch.tensor([0, 1, 2, 0]).to(DEVICE),
                                  draws._replace(noise=draws.noise.to(DEVICE)))  # fmt: skip
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual.cpu(), expected.cpu()) < 1e-5


# ----------------------------------------------------------------------------
# Wrong arguments are rejected before anything is launched.


def attention_arguments(**changes):
    q = torch.zeros(2, 3, 5, 16, device=DEVICE)
    return [changes.get(name, q) for name in ("q", "k", "v")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 16)}, r"q must be \(B, H, N, d\)"),
        ({"q": torch.zeros(2, 3, 5, 12)}, "q has head dim 12; it must be a multiple of 8 from 8 to 128"),
        ({"q": torch.zeros(2, 3, 5, 136)}, "q has head dim 136"),
        ({"q": torch.zeros(2, 3, 5, 16, dtype=torch.float64)}, r"q is torch.float64; it must be float16"),
        ({"k": torch.zeros(2, 4, 5, 16)}, r"k must be \(2, G, M, 16\), G a divisor of 3 heads, not of"),
        ({"k": torch.zeros(2, 3, 5, 16).half()}, r"k must be torch.float32, not torch.float16"),
        ({"v": torch.zeros(2, 3, 6, 16)}, r"v must be of shape \(2, 3, 5, 16\), not \(2, 3, 6, 16\)"),
        ({"v": torch.zeros(2, 3, 5, 16, device="meta")}, "v must be on .*, not meta"),
    ],
)
def test_wrong_attention_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        attention.forward(*attention_arguments(**changes))


def test_wrong_tangents():
    q, k, v = attention_arguments()
    with pytest.raises(ValueError, match="dq has 3 rows, more than the 2 of q"):
        attention.forward_dual(q, k, v, *(torch.zeros(3, 3, 5, 16, device=DEVICE) for _ in range(3)))
    with pytest.raises(ValueError, match=r"dk must be of shape \(1, 3, 5, 16\), not \(1, 3, 4, 16\)"):
        attention.forward_dual(q, k, v, q[:1], q[:1, :, :4], v[:1])
    with pytest.raises(ValueError, match=r"dq must be on .*, not meta"):
        attention.forward_dual(q, k, v, q.to("meta"), k, v)
    x, row = torch.zeros(2, 5, 8, device=DEVICE), torch.zeros(2, 8, device=DEVICE)
    dx, drow = x.to("meta"), row.to("meta")
    with pytest.raises(ValueError, match=r"dx must be on .*, not meta"):
        adaln.forward_dual(x, None, None, row, row, dx, None, None, drow, drow, 1e-6)
    with pytest.raises(ValueError, match=r"dx must be on .*, not meta"):
        gelu.forward_dual(x, row[0], dx)


def test_wrong_adaln_and_gelu_arguments():
    x, row = torch.zeros(2, 5, 8, device=DEVICE), torch.zeros(2, 8, device=DEVICE)
    for arguments, message in (
        ((x[0], None, None, row, row), r"x must be \(B, N, D\)"),
        ((x, x, None, row, row), "y and gate must be given together"),
        ((x, None, None, row[:, :4], row), r"shift must be of shape \(2, 8\), not \(2, 4\)"),
        ((x, None, None, row, row.double()), r"scale is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            adaln.forward(*arguments, 1e-6)
    for arguments, message in (
        ((x, row[0, :4]), r"bias must be \(F,\) for x"),
        ((x.transpose(1, 2), torch.zeros(5, device=DEVICE)), "x must be contiguous"),
        ((x.double(), row[0]), r"x is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            gelu.forward(*arguments)


def test_wrong_rms_norm_swiglu_and_rope_arguments():
    x, weight = torch.zeros(2, 5, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    head = weight[:4]
    for launch, message in (
        (lambda: rmsnorm.forward(x, x, None, weight, 1e-6, x.dtype), "y and gate must be given together"),
        (lambda: rmsnorm.forward(x, x[:1], weight, weight, 1e-6, x.dtype), r"y must be of shape \(2, 5, 8\)"),
        (lambda: rmsnorm.forward(x, x, head, weight, 1e-6, x.dtype), r"gate must be of shape \(8,\), not \(4,\)"),
        (lambda: rmsnorm.forward(x.mT, None, None, weight[:5], 1e-6, x.dtype), "x must be contiguous"),
        (lambda: rmsnorm.forward(x.double(), None, None, weight, 1e-6, x.dtype), "x is torch.float64"),
        (lambda: rmsnorm.backward(x, None, None, weight, None, x[:1], 1e-6), "gradients must be contiguous, of shape"),
        (lambda: swiglu.forward(x[..., :7]), r"x must be contiguous"),
        (lambda: swiglu.forward(x.view(16, 5)), r"x must be \(..., 2 \* F\)"),
        (lambda: swiglu.forward_dual(x, x.to("meta")), "dx must be on .*, not meta"),
        (lambda: swiglu.forward_dual(x[:1], x), r"dx must be \(K, ...\) like x"),
        (lambda: swiglu.backward(x, x), "the gradient must have half the width"),
        (lambda: rope.forward(x, head, weight, 1, 5, 1e-6), r"k_weight must be \(d,\)"),
        (lambda: rope.forward(x, weight[:3], weight[:3], 1, 5, 1e-6), "with an even d from 2 to 256"),
        (lambda: rope.forward(x, head, head, 2, 5, 1e-6), "W at least 16, not of shape"),
        (lambda: rope.forward(x, head, head, 1, 3, 1e-6), "with N = 3"),
        (lambda: rope.forward(x.mT, head[:2], head[:2], 1, 8, 1e-6), "must be contiguous and evenly spaced"),
        (lambda: rope.forward_dual(x, head, head, x, head, None, 1, 5, 1e-6), "dk_weight must be given together"),
        (lambda: rope.backward(x, head, head, x[0], x, 1, 5, 1e-6), "the gradient must be contiguous, of width 8"),
    ):
        with pytest.raises(ValueError, match=message):
            launch()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_cuda", [True, False])
def test_auto_fuses_what_the_kernels_take(is_cuda, dtype):
    with ops.use_backend("auto"):
        assert fused(SimpleNamespace(is_cuda=is_cuda, dtype=dtype)) == (is_cuda and dtype != torch.float64)


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend cudnn does not exist; it must be one of auto, triton, torch"),
        ops.use_backend("cudnn"),
    ):
        pass


# ----------------------------------------------------------------------------
# The compiled code.


def compiling(module, *arguments):
    """The output of a module run with Triton's compiler instead of its interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def gate(only):
    output = compiling("benchmarks.static", "--only", only)
    assert " 0 failed" in output
    return output


def test_direct_launches_pass_the_same_arguments_as_triton():
    """Three tensors for the first rows, six for the last ones; everything else is equal, too."""
    assert "9 inputs alike" in compiling("tests.direct_launch_worker")


@pytest.mark.slow  # compiles for three architectures; benchmarks/static.py has all of them
def test_static_gate():
    """XL/2's dual attention: no stack, tensor cores, and accesses of at least 8 bytes, on all architectures."""
    output = gate("attention_packed XL/2 bf16 dual")
    assert all(arch in output for arch in ("sm_80", "sm_90", "sm_100", "3 compiled"))


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARY.is_file(), reason="the CUDA library was not built, which takes nvcc")
def test_static_gate_of_the_cuda_library():
    """No stack, and 128 bits at a time for all data of the parameters' size."""
    gate("optim.")


def test_static_gate_finds_faults():
    good = {"stack": 0, "tensor_core": 4, "accesses": {"4": 1, "16": 8}}
    assert static.faults(good, dots=True, narrow=1) == []
    assert static.faults(good | {"stack": 8}, dots=True, narrow=1) == ["stack"]
    assert static.faults(good | {"tensor_core": 0}, dots=True, narrow=1) == ["no tensor cores"]
    assert static.faults(good | {"tensor_core": 0}, dots=False, narrow=1) == []
    assert static.faults(good, dots=True, narrow=0) == ["narrow accesses"]
    few = good | {"stack": 8}
    assert static.faults(few, dots=True, narrow=1, stack=8) == []
    assert static.faults(few | {"stack": 16}, dots=True, narrow=1, stack=8) == ["stack"]


def test_allowed_stack_is_of_one_kernel_head_dim_and_architecture():
    allowed = static.stack_allowed
    assert allowed("attention d128 bf16 term through", "backward_q_kernel", 80) == 16
    for other in (("attention d128 bf16 term through", "backward_q_kernel", 90),
                  ("attention d96 bf16 term through", "backward_q_kernel", 80),
                  ("attention d128 bf16 term through", "delta_dual_kernel", 80)):  # fmt: skip
        assert not allowed(*other)


def test_static_gate_counts_global_accesses_of_loops():
    lines = [
        "LDG.E.U16 R1, [R2]", "@P0 LDG.E.U16.CONSTANT R1, [R2]", "LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2]", "LDGDEPBAR",
        "@!P1 BRA 0x0010", "STG.E [R2], R1", "EXIT", "NANOSLEEP", "BRA 0x0020", "BRA 0x0090",
    ]  # fmt: skip
    sass = "\n".join(f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))
    assert static.accesses(sass) == {"2": 1, "16": 1}
    assert static.accesses(sass.replace("@!P1 BRA 0x0010", "NOP")) == {"2": 2, "4": 1, "16": 1}


def test_static_gate_fails_by_its_exit_code(monkeypatch, capsys):
    row = {"kernel": "k", "arch": "sm_90", "registers": 255, "stack": 8, "shared": 0, "tensor_core": 4, "accesses": {}}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["static"])
    monkeypatch.setattr(static, "LIBRARY", Path("nowhere"))
    for faults, code in ((["stack"], 1), ([], 0)):
        monkeypatch.setattr(static, "rows", lambda only, faults=faults: [row | {"faults": faults}])
        assert static.main() == code
        assert ("FAILED: stack" in capsys.readouterr().out) == bool(faults)


def test_head_dims_are_split():
    assert [attention.widths(d) for d in (8, 16, 24, 64, 72, 80, 96, 104, 128)] == [
        (16, 0), (16, 0), (16, 16), (64, 0), (64, 16), (64, 16), (64, 32), (64, 64), (128, 0),
    ]  # fmt: skip
    assert attention.shape_constants(torch.empty(1, 1, 1, 72)) == {"DIM": 72, "HEAD": 64, "TAIL": 32}
