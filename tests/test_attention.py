"""Every implementation of attention in the same tests, eager and compiled; and the choice between them."""

import itertools
import json
import sys
from types import ModuleType
from typing import get_args

import pytest
import torch
from conftest import SMALL, run_command, slow
from golden_cases import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from mfengine import ops
from mfengine.ops import Dual, choice

pytest.importorskip("triton", reason="the fused kernels need triton")

from mfengine.kernels import attention as kernel
from mfengine.kernels import attention_tangent
from mfengine.kernels.launch import Config, forget_plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [name for name in get_args(choice.Attention) if name != "auto"]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
    """flash-attn's function as documented: (B, N, H, d), half precision."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert not causal
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float()).to(q.dtype)


@pytest.fixture(autouse=True)
def _with_flash_attn(monkeypatch):
    """Use the package if it is installed; otherwise a stand-in that follows its documentation, on any device."""
    forget()
    if choice._does_not_import("flash_attn"):
        module = ModuleType("flash_attn")
        module.__spec__ = sys.__spec__
        module.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(choice, "FLASH_ATTN_DEVICES", (DEVICE,))
    forget()
    yield
    forget()


def forget():
    for function in (choice._why_not, choice._does_not_import):
        function.cache_clear()


def takes(name, dtype, dim):
    if name == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        return False  # Triton's interpreter computes it wrongly
    return choice.why_not(name, torch.device(DEVICE), dtype, dim) is None


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def packed(x):
    return ops.attention_packed(x, 2)


def strided(q, k, v):
    """Heads that take every other channel, and fewer or more queries than keys."""
    return ops.attention(q[..., ::2], k[..., ::2], v[..., ::2], scale=0.3)


def from_projection(x):
    """Heads as views of one product, as a projection returns them."""
    q, k, v = x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return ops.attention(q, k[:, :, 1:], v[:, :, 1:])


def rotary(x, q_weight, k_weight):
    return ops.rotary_attention(x, q_weight, k_weight, 2)


def rotary_rows(x, q_weight, k_weight):
    """With tokens as rows."""
    return ops.rotary_attention(x.flatten(0, 1), q_weight, k_weight, 2, x.shape[1])


CASES = {
    "packed": (packed, [(3, 17, 3 * 2 * 24)]),
    "rotary": (rotary, [(2, 9, 3 * 2 * 16), (16,), (16,)]),
    "rotary, any head dim": (rotary_rows, [(2, 5, 3 * 2 * 12), (12,), (12,)]),
    "packed, one token": (packed, [(2, 1, 3 * 2 * 16)]),
    "strided": (strided, [(2, 2, 5, 2 * 16), (2, 2, 19, 2 * 16), (2, 2, 19, 2 * 16)]),
    "views": (from_projection, [(3, 9, 3 * 2 * 40)]),
    "any head dim": (ops.attention, [(2, 1, 4, 12), (2, 1, 7, 12), (2, 1, 7, 12)]),
}
DIMS = {
    "packed": 24, "packed, one token": 16, "rotary": 16, "rotary, any head dim": 12, "strided": 16, "views": 40,
    "any head dim": 12,
}  # fmt: skip


def forward_and_gradients(op, arguments):
    leaves = [x.detach().requires_grad_() for x in arguments]
    o = op(*leaves)
    weights = randn(50, *o.shape).to(o.dtype)
    return [o.detach(), *torch.autograd.grad((o * weights).sum(), leaves)]


# ----------------------------------------------------------------------------
# Without tangents.


# Triton runs only the cases that show something new.
REPEATED = (
    *((case, torch.float16) for case in ("packed, one token", "rotary", "strided", "views")),
    *((case, torch.float32) for case in ("packed", "views")),
)


@pytest.mark.parametrize(
    ("case", "dtype", "name"),
    [
        slow(*case) if case[:2] in REPEATED and case[2] == "triton" else case
        for case in itertools.product(CASES, BOUNDS, NAMES)
    ],
)
def test_forward_and_gradients(case, dtype, name):
    op, shapes = CASES[case]
    arguments = [randn(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    if not takes(name, dtype, DIMS[case]):
        if DEVICE == "cuda" or dtype != torch.bfloat16:
            with ops.use_attention(name), pytest.raises(ValueError, match=f"attention with {name}: "):
                op(*arguments)
        return
    with ops.use_backend("torch"):
        exact = forward_and_gradients(op, [x.double() for x in arguments])
    with ops.use_attention(name):
        actual = forward_and_gradients(op, arguments)
        with torch.no_grad():
            actual.append(op(*arguments))
    for a, e in zip(actual, [*exact, exact[0]], strict=True):
        assert (a.dtype, a.shape) == (dtype, e.shape)
        if e.norm() > 1e-6:  # with one token, nothing depends on the scores
            assert relative_error(a.cpu(), e.cpu()) <= BOUNDS[dtype]


class Operators(TorchDispatchMode):
    """Records the names of operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "operator"),
    [("torch", "aten::_softmax"), ("triton", "mfengine::"), ("sdpa", "aten::_scaled_dot_product_")],
)
def test_requested_implementation_runs(name, operator):
    for op in (packed, from_projection):
        with ops.use_attention(name), Operators() as operators:
            op(randn(0, 2, 5, 96))
        assert any(found.startswith(operator) for found in operators.names)


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows(name):
    with ops.use_attention(name):
        assert packed(randn(0, 0, 5, 3 * 2 * 16, dtype=torch.float16)).shape == (0, 5, 32)


@pytest.mark.slow  # `test_ops.py` compiles an op
@pytest.mark.parametrize(
    ("name", "dynamic"),  # flash-attn's own compilation is not our concern
    [("torch", True), ("triton", True), ("sdpa", True), ("triton", False)],
)
def test_compiled(name, dynamic):
    """One graph for any number of rows and tokens, and a new graph after another attention is chosen."""
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with ops.use_backend("torch"):
        compiled(randn(0, 2, 5, 96))
    for batch, tokens in ((2, 5), (3, 5), (3, 9)):
        x = randn(0, batch, tokens, 96)
        with ops.use_backend("torch"):
            expected = forward_and_gradients(packed, [x])
        with ops.use_attention(name):
            for a, e in zip(forward_and_gradients(compiled, [x]), expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "sdpa"])
def test_transforms_and_forward_mode_ignore_the_choice(name):
    x, dx = randn(0, 2, 5, 96), randn(1, 2, 5, 96)

    def results():
        return [
            *torch.func.jvp(packed, (x,), (dx,)),
            torch.func.grad(lambda x: packed(x).square().sum())(x),
            torch.func.vmap(packed)(x[:, None]),
            torch.func.jvp(torch.func.grad(lambda x: packed(x).square().sum()), (x,), (dx,))[1],
        ]

    with ops.use_backend("torch"):
        expected = results()
        with ops.use_attention(name):
            assert all(map(torch.equal, results(), expected))


# ----------------------------------------------------------------------------
# The choice.


@pytest.mark.parametrize(
    ("backend", "asked", "expected"),
    [
        ("auto", "auto", "sdpa"),
        ("torch", "auto", "torch"),
        ("triton", "auto", "triton"),
        ("torch", "sdpa", "sdpa"),
        ("triton", "torch", "torch"),
    ],
)
@pytest.mark.parametrize("dim", [16, 12, 136])  # kernels support only the first
def test_choice_without_a_tangent(backend, asked, expected, dim):
    q = torch.zeros(1, 1, 2, dim, device=DEVICE)
    with ops.use_backend(backend), ops.use_attention(asked):
        assert choice.choose(q, q, q, dim=dim) == expected


@pytest.mark.parametrize("asked", [name if name == "sdpa" else slow(name) for name in NAMES])
def test_backend_decides_with_a_tangent(asked, monkeypatch):
    """Then the kernels compute all rows, with and without a tangent, and their backward."""
    calls = []

    def recorded(name):
        f = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args, **options: (calls.append(name), f(*args, **options))[1])

    recorded("forward_dual_packed")
    recorded("backward_packed")
    x = randn(0, 3, 5, 96, dtype=torch.float16).requires_grad_()
    dx = randn(1, 3, 5, 96, dtype=torch.float16)
    with ops.use_backend("triton"), ops.use_attention(asked):
        packed(Dual(x, dx[2:])).primal.square().sum().backward()
        assert calls == ["forward_dual_packed", "backward_packed"]
        torch.func.jvp(packed, (x.detach(),), (dx,))
        assert calls[2:] == ["forward_dual_packed"]
    with ops.use_backend("torch"), ops.use_attention(asked):
        packed(Dual(x, dx[2:]))
        torch.func.jvp(packed, (x.detach(),), (dx,))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "message"),
    [
        ("triton", torch.float32, 12, "attention with triton: q has head dim 12; it must be a multiple of 8"),
        ("triton", torch.float64, 16, "attention with triton: q is torch.float64"),
        ("flash-attn", torch.float32, 16, "attention with flash-attn: it takes float16 or bfloat16 and head dims"),
        ("flash-attn", torch.float16, 264, "attention with flash-attn: .* up to 256, not torch.float16 and 264"),
    ],
)
def test_unsupported_arguments_of_an_implementation(name, dtype, dim, message):
    q = torch.zeros(1, 1, 2, dim, dtype=dtype, device=DEVICE)
    with ops.use_attention(name), pytest.raises(ValueError, match=message):
        ops.attention(q, q, q)


def test_unknown_or_missing_implementation(monkeypatch):
    accepted = "auto, torch, triton, sdpa, flash-attn"
    with (
        pytest.raises(ValueError, match=f"attention flash does not exist; it must be one of {accepted}"),
        ops.use_attention("flash"),
    ):
        pass
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    forget()
    with ops.use_attention("flash-attn"), pytest.raises(ValueError, match=r"flash-attn .*(not installed|not import)"):
        packed(randn(0, 1, 2, 96, dtype=torch.float16))


def test_triton_without_a_gpu_or_its_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    why = choice.why_not("triton", torch.device("cpu"), torch.float32, 64)
    assert why == "its kernels run only on a GPU"


# ----------------------------------------------------------------------------
# Causal, masks, grouped queries, cross lengths and sequences: output, tangent and gradients of both, fused, against
# plain PyTorch in float64. Plain PyTorch is compared with PyTorch's own attention.


def bool_mask(*shape):
    """A mask in which query 3 and queries from 17 on see nothing."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 3, :] = False
    mask[..., 17:, :] = False
    return mask.to(DEVICE)


def bias(*shape):
    """A bias with which only the first five keys are visible, and query 4 sees none."""
    term = randn(9, *shape)
    term[..., 5:] = -torch.inf
    term[..., 4, :] = -torch.inf
    return term


VARIANTS = {  # head dim, queries, keys, heads of queries, heads of keys, options
    "causal": (16, 37, 37, 2, 2, {"is_causal": True}),
    "causal, more queries": (24, 37, 20, 1, 1, {"is_causal": True}),
    "causal, more keys, grouped": (16, 20, 37, 4, 2, {"is_causal": True}),
    "one query": (72, 1, 17, 2, 1, {}),
    "mask of all samples": (16, 20, 37, 2, 2, {"mask": bool_mask(20, 37)}),
    "mask of each sample, grouped": (16, 20, 17, 4, 2, {"mask": bool_mask(2, 1, 20, 17)}),
    "term of each head": (16, 20, 37, 2, 2, {"mask": bias(1, 2, 20, 37)}),
    "whole blocks": (128, 16, 32, 1, 1, {"mask": bias(16, 32)}),
    "few, causal, grouped": (16, 5, 17, 2, 1, {"is_causal": True}),
    "few, mask": (16, 5, 17, 1, 1, {"mask": bool_mask(5, 17)}),
    "few, term": (24, 5, 17, 1, 1, {"mask": bias(5, 17)}),
}


def arguments(name, dtype=torch.float32):
    return arguments_of(*VARIANTS[name][:-1], dtype)


def arguments_of(dim, queries, keys, heads, key_heads, dtype=torch.float32):
    """Primals of two samples, tangents of the last one, and weights for output and tangent."""
    shapes = [(heads, queries, dim), (key_heads, keys, dim), (key_heads, keys, dim)]
    primals = [randn(i, 2, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    tangents = [randn(3 + i, 1, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    return primals, tangents, [randn(6, 2, *shapes[0], dtype=dtype), randn(7, 1, *shapes[0], dtype=dtype)]


def through_tangent(backend, primals, tangents, weights, op, through=True):
    """Output, tangent, and the gradients of a loss of both, or of the output alone."""
    leaves = [x.detach().requires_grad_() for x in (*primals, *tangents)]
    with ops.use_backend(backend), ops.differentiable_tangents(through):
        o, do = op(*map(Dual, leaves[:3], leaves[3:]))
        loss = (o * weights[0]).sum() + ((do * weights[1]).sum() if through else 0)
        return [o.detach(), do.detach(), *torch.autograd.grad(loss, leaves if through else leaves[:3])]


def assert_close(actual, exact, bound=1e-5):
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert a.isfinite().all()
        if e.norm() > 1e-9:
            assert relative_error(a.cpu(), e.cpu()) <= bound, i
        else:
            assert a.abs().max() <= 2e-6, i  # values have order 1


def double(x):
    return x.double() if x.is_floating_point() else x


def assert_fused_equals_plain(given, options, through=True):
    wide = {key: double(x) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    exact = through_tangent(
        "torch", *([x.double() for x in xs] for xs in given), lambda *x: ops.attention(*x, **wide), through
    )
    actual = through_tangent("triton", *given, lambda *x: ops.attention(*x, **options), through)
    assert_close(actual, exact)


@pytest.mark.parametrize(
    ("name", "through"),
    [  # few queries and a padded block of keys cover every branch of the kernels
        *((name, True) if name.startswith("few") else slow(name, True) for name in VARIANTS),
        ("few, causal, grouped", False),
        slow("term of each head", False),
    ],
)
def test_gradients_of_output_and_tangent(name, through):
    assert_fused_equals_plain(arguments(name), VARIANTS[name][-1], through)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "length"),
    [*itertools.product([16, 24, 64, 72, 80, 96, 128], [1, 17, 100]), *itertools.product([16, 72, 128], [257])],
)
def test_gradients_over_head_dims_and_lengths(dim, length, monkeypatch):
    """Lengths beyond the smallest block, in tiles of 128: the interpreter's time grows with the number of programs."""
    if length > 17:
        for module in (kernel, attention_tangent):
            for configs in module.CONFIGS.values():
                options = configs["float32"].kwargs
                blocks = {key: 128 for key in options if key.startswith("BLOCK")}
                monkeypatch.setitem(configs, "float32", Config(**options | blocks))
    seen = randn(9, length, length) > -0.5
    term = randn(9, length, length).masked_fill(~seen, -torch.inf)
    for heads, options in ((1, {}), (2, {"is_causal": True}), (1, {"mask": seen}), (2, {"mask": term})):
        assert_fused_equals_plain(arguments_of(dim, length, length, heads, 1), options)


@pytest.mark.parametrize("name", VARIANTS)
def test_plain_attention_equals_pytorch(name):
    *_, heads, key_heads, options = VARIANTS[name]
    options = {key: double(x) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    primals, _, weights = arguments(name, torch.float64)
    masked = {"attn_mask": options["mask"]} if "mask" in options else options

    def theirs(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **masked, enable_gqa=heads != key_heads)

    results = []
    for op in (theirs, lambda *x: ops.attention(*x, **options)):
        leaves = [x.detach().requires_grad_() for x in primals]
        with ops.use_backend("torch"):
            o = op(*leaves)
        results.append([o.detach(), *torch.autograd.grad((o * weights[0]).sum(), leaves)])
    assert_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("options", [slow({}), slow({"is_causal": True}), {"mask": bias(6, 7).double()}])
def test_gradcheck_of_plain_attention_with_its_tangent(options):
    shapes = [(1, 2, 6, 8), (1, 1, 7, 8), (1, 1, 7, 8)] * 2
    inputs = [randn(i, *shape, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]

    def both(*inputs):
        with ops.differentiable_tangents():
            return tuple(ops.attention(*map(Dual, inputs[:3], inputs[3:]), **options))

    with ops.use_backend("torch"):
        assert torch.autograd.gradcheck(both, inputs)


def test_gradients_through_the_tangent_repeat_bit_for_bit():
    given = arguments_of(16, 5, 17, 1, 1)
    first, second = (through_tangent("triton", *given, ops.attention) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("dim", "generation"),  # a tail, with separate launches for keys and values; three such launches; two tiles
    [(72, "Hopper"), (128, "Hopper"), (128, "Ampere")],
)
def test_gradients_through_the_tangent_in_half_precision(dim, generation, monkeypatch):
    monkeypatch.setattr(kernel, "_generation", lambda x: generation)
    forget_plans()
    shapes = [(1, 1, 17, dim)] * 8
    x = [randn(i, *shape, dtype=torch.float16) for i, shape in enumerate(shapes)]
    exact = through_tangent("torch", *([y.double() for y in ys] for ys in (x[:3], x[3:6], x[6:])), ops.attention)
    assert_close(through_tangent("triton", x[:3], x[3:6], x[6:], ops.attention), exact, 4e-3)


@pytest.mark.parametrize("rows", [1, slow(2)])
def test_packed_gradients_through_the_tangent(rows):
    x, dx = randn(0, 2, 9, 3 * 2 * 16), randn(1, rows, 9, 3 * 2 * 16)
    weights = randn(2, 2, 9, 32), randn(3, rows, 9, 32)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [y.to(dtype).requires_grad_() for y in (x, dx)]
        with ops.use_backend(backend), ops.differentiable_tangents():
            o, do = packed(Dual(*leaves))
        loss = (o * weights[0].to(dtype)).sum() + (do * weights[1].to(dtype)).sum()
        results.append(torch.autograd.grad(loss, leaves))
    assert_close(*results)


@pytest.mark.parametrize("is_causal", [slow(False), True])
def test_concatenated_sequences_equal_separate_ones(is_causal):
    """One sequence has no keys, another has nothing at all."""
    lengths_q, lengths_k = (7, 0, 13), (0, 0, 33)
    cu_q, cu_k = (
        torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )  # fmt: skip
    shapes = [(20, 4, 16), (33, 2, 16), (33, 2, 16)]
    primals, tangents = ([randn(3 * j + i, *shape) for i, shape in enumerate(shapes)] for j in range(2))
    weights = [randn(6, *shapes[0]), randn(7, *shapes[0])]

    def op(*x):
        return ops.attention_varlen(*x, cu_q, cu_k, 13, 33, is_causal=is_causal)

    actual = through_tangent("triton", primals, tangents, weights, op)
    exact = through_tangent("torch", *([x.double() for x in xs] for xs in (primals, tangents, weights)), op)
    assert_close(actual, exact)
    with ops.use_backend("torch"):
        alone = ops.attention(*(x[-n:].transpose(0, 1)[None] for x, n in zip(primals, (13, 33, 33), strict=True)),
                              is_causal=is_causal)  # fmt: skip
    torch.testing.assert_close(actual[0][7:], alone[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    assert not actual[0][:7].any()


@pytest.mark.parametrize("name", ["torch", "triton", "sdpa"])
def test_masks_and_grouped_queries_without_a_tangent(name):
    for case in ("causal, more queries", "mask of each sample, grouped", "term of each head"):
        primals, options = arguments(case)[0], VARIANTS[case][-1]
        with ops.use_backend("torch"):
            expected = ops.attention(*primals, **options)
        with ops.use_attention(name):
            torch.testing.assert_close(ops.attention(*primals, **options), expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_mask_is_never_dropped():
    primals = arguments("term of each head")[0]
    mask = randn(9, 1, 2, 20, 37).requires_grad_()
    with ops.use_backend("triton"):
        ops.attention(*primals, mask=mask).sum().backward()
    assert mask.grad.norm() > 0
    dmask = randn(8, 1, 2, 20, 37)
    with ops.use_backend("triton"):
        _, do = torch.func.jvp(lambda mask: ops.attention(*primals, mask=mask), (mask.detach(),), (dmask,))
    assert do.norm() > 0


@pytest.mark.slow  # `test_compiled` compiles the same operators
def test_compiled_with_a_mask():
    torch._dynamo.reset()
    primals, mask = arguments("mask of each sample, grouped")[0], VARIANTS["mask of each sample, grouped"][-1]["mask"]

    def op(q, k, v):
        return ops.attention(q, k, v, mask=mask)

    with ops.use_backend("triton"):
        expected = forward_and_gradients(op, primals)
        actual = forward_and_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), primals)
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(5, 6, dtype=torch.bool, device=DEVICE)}, r"mask must be broadcastable to \(1, 4, 5, 7\)"),
        ({"mask": torch.ones(5, 7, dtype=torch.int64, device=DEVICE)}, "mask must be bool, torch.float32 or float32"),
        ({"mask": torch.ones(5, 7, dtype=torch.bool, device=DEVICE), "is_causal": True}, "is_causal or a mask"),
    ],
)
def test_wrong_masks(options, message):
    q, k = randn(0, 1, 4, 5, 16), randn(1, 1, 2, 7, 16)
    with ops.use_backend("triton"), pytest.raises(ValueError, match=message):
        ops.attention(q, k, k, **options)


def test_wrong_groups_and_sequences():
    q, k = randn(0, 1, 4, 5, 16), randn(1, 1, 3, 5, 16)
    with ops.use_backend("triton"), pytest.raises(ValueError, match="G a divisor of 4 heads"):
        ops.attention(q, k, k)
    x, cu = randn(0, 5, 2, 16), torch.tensor([0, 5], device=DEVICE)
    with ops.use_backend("triton"), pytest.raises(ValueError, match=r"cu_q must be int32 of shape \(S \+ 1,\)"):
        ops.attention_varlen(x, x, x, cu, cu, 5, 5)
    with pytest.raises(ValueError, match="tangents of all tokens"):
        ops.attention_varlen(Dual(x, x[:1]), x, x, cu, cu, 5, 5)


def test_flops_of_causal_attention_and_of_the_backward_through_the_tangent():
    from mfengine.ops.attention import ATTENTION

    q, k = (1, 1, 3, 2), (1, 1, 2, 2)  # three queries that see one, two and two keys
    assert ATTENTION.flops(q, k, k, None, True, None) == tuple(2 * 5 * 2 * n for n in (2, 4, 7))
    assert ATTENTION.flops(q, k, k, None, False, None) == tuple(2 * 6 * 2 * n for n in (2, 4, 7))
    assert ATTENTION.backward_dual_flops(q, k, k, q, k, k, None, True, None) == 2 * 5 * 2 * 21


# ----------------------------------------------------------------------------
# Training.


def test_training_with_another_attention(digits, tmp_path):
    losses = {}
    for name in ("torch", "sdpa"):
        args = (*SMALL, f"--data={digits}", f"--name={name}", "--steps=5", f"--attention={name}", "--method.omega=2")
        done = run_command("mfengine.train", *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = json.loads(lines[-1])["loss"]
    assert losses["sdpa"] == pytest.approx(losses["torch"], rel=1e-4)


def test_training_rejects_a_missing_implementation(digits, tmp_path):
    args = (*SMALL, f"--data={digits}", "--attention=flash-attn", "--device=cpu", "--precision=float32")
    done = run_command("mfengine.train", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --attention flash-attn is unavailable: ")
    assert not (tmp_path / "runs").exists()
