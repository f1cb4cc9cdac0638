"""Every implementation of attention by the same tests: alone, compiled; and which one is chosen."""

import json
import sys
from types import ModuleType
from typing import get_args

import pytest
import torch
from conftest import SMALL, run_in_process
from golden_cases import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from mfengine import ops
from mfengine.ops import Dual, choice

pytest.importorskip("triton", reason="the fused kernels need triton")

from mfengine.kernels import attention as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [name for name in get_args(choice.Attention) if name != "auto"]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, deterministic=False):
    """As flash-attn documents it: (B, N, H, d), half precision."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float()).to(q.dtype)


@pytest.fixture(autouse=True)
def _with_flash_attn(monkeypatch):
    """The package where it is installed, and else what is documented of it, on any device."""
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
        return False  # Triton's interpreter multiplies it wrongly
    return choice.why_not(name, torch.device(DEVICE), dtype, dim) is None


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def packed(x):
    return ops.attention_packed(x, 2)


def strided(q, k, v):
    """Heads as every other channel, and queries that are not as many as keys."""
    return ops.attention(q[..., ::2], k[..., ::2], v[..., ::2], scale=0.3)


def from_projection(x):
    """As a projection leaves them: views of one product."""
    q, k, v = x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return ops.attention(q, k[:, :, 1:], v[:, :, 1:])


def rotary(x, q_weight, k_weight):
    return ops.rotary_attention(x, q_weight, k_weight, 2)


def rotary_rows(x, q_weight, k_weight):
    """Of tokens as rows."""
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
# Alone: no row has a tangent.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case, dtype, name):
    op, shapes = CASES[case]
    arguments = [randn(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    if not takes(name, dtype, DIMS[case]):
        if DEVICE == "cuda" or dtype != torch.bfloat16:
            with ops.use_attention(name), pytest.raises(ValueError, match=f"attention by {name}: "):
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
        if e.norm() > 1e-6:  # of one token, nothing depends on the scores
            assert relative_error(a.cpu(), e.cpu()) <= BOUNDS[dtype]


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

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
def test_the_one_asked_for_runs(name, operator):
    for op in (packed, from_projection):
        with ops.use_attention(name), Operators() as operators:
            op(randn(0, 2, 5, 96))
        assert any(found.startswith(operator) for found in operators.names)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    with ops.use_attention(name):
        assert packed(randn(0, 0, 5, 3 * 2 * 16, dtype=torch.float16)).shape == (0, 5, 32)


@pytest.mark.parametrize("name", ["torch", "triton", "sdpa"])  # that flash-attn compiles is its own matter
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(name, dynamic):
    """One graph, for any number of rows and tokens, and another when another attention is asked for."""
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
def test_transforms_and_forward_mode_take_no_notice(name):
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
# Which one is chosen.


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
@pytest.mark.parametrize("dim", [16, 12, 136])  # kernels take the first
def test_choice_without_a_tangent(backend, asked, expected, dim):
    q = torch.zeros(1, 1, 2, dim, device=DEVICE)
    with ops.use_backend(backend), ops.use_attention(asked):
        assert choice.choose(q, q, q, dim=dim) == expected


@pytest.mark.parametrize("asked", NAMES)
def test_backend_decides_where_there_is_a_tangent(asked, monkeypatch):
    """Rows without a tangent beside those with one, and the backward of all, are by the kernels then."""
    calls = []

    def recorded(name):
        f = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args: (calls.append(name), f(*args))[1])

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
        ("triton", torch.float32, 12, "attention by triton: q has head dim 12; accepted are multiples of 8"),
        ("triton", torch.float64, 16, "attention by triton: q is torch.float64"),
        ("flash-attn", torch.float32, 16, "attention by flash-attn: it takes float16 and bfloat16 and head dims"),
        ("flash-attn", torch.float16, 264, "attention by flash-attn: .* up to 256, not torch.float16 of 264"),
    ],
)
def test_what_an_implementation_does_not_take(name, dtype, dim, message):
    q = torch.zeros(1, 1, 2, dim, dtype=dtype, device=DEVICE)
    with ops.use_attention(name), pytest.raises(ValueError, match=message):
        ops.attention(q, q, q)


def test_unknown_and_missing(monkeypatch):
    accepted = "auto, torch, triton, sdpa, flash-attn"
    with pytest.raises(ValueError, match=f"no attention flash; accepted are {accepted}"), ops.use_attention("flash"):
        pass
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    forget()
    with ops.use_attention("flash-attn"), pytest.raises(ValueError, match=r"flash-attn .*(not installed|not import)"):
        packed(randn(0, 1, 2, 96, dtype=torch.float16))


def test_triton_without_a_gpu_or_its_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    why = choice.why_not("triton", torch.device("cpu"), torch.float32, 64)
    assert why == "its kernels run on a GPU alone"


# ----------------------------------------------------------------------------
# Training.


def test_training_with_another_attention(digits, tmp_path, monkeypatch, capsys):
    losses = {}
    for name in ("torch", "sdpa"):
        args = (*SMALL, f"--data={digits}", f"--name={name}", "--steps=5", f"--attention={name}", "--method.omega=2")
        code, _, err = run_in_process("mfengine.train", *args, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, err
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = json.loads(lines[-1])["loss"]
    assert losses["sdpa"] == pytest.approx(losses["torch"], rel=1e-4)


def test_training_refuses_what_is_not_there(digits, tmp_path, monkeypatch, capsys):
    args = (*SMALL, f"--data={digits}", "--attention=flash-attn", "--device=cpu", "--precision=float32")
    code, _, err = run_in_process("mfengine.train", *args, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.startswith("error: --attention flash-attn is unavailable: ")
    assert not (tmp_path / "runs").exists()
