"""Every implementation of attention by the same tests: alone, beside fused duals, compiled; and which one is chosen."""

import json
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from conftest import SMALL, run_in_process
from golden_cases import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mfengine import ops
from mfengine.ops import Dual, choice

pytest.importorskip("triton", reason="the fused kernels need triton")

from benchmarks import attention as benchmark
from mfengine.kernels import attention as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = choice.WORK["training"]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, deterministic=False, return_attn_probs=False):
    """As flash-attn documents it: (B, N, H, d), half precision; with probabilities also the log-sum-exp (B, H, N)."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * scale
    o = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float()).to(q.dtype)
    return (o, scores.logsumexp(-1), None) if return_attn_probs else o


@pytest.fixture(autouse=True)
def _with_flash_attn(monkeypatch):
    """The package where it is installed, and else what is documented of it, on any device."""
    forget()
    if choice._does_not_import("flash_attn"):
        module = ModuleType("flash_attn")
        module.__spec__ = sys.__spec__
        module.__version__ = "as documented"
        module.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(choice, "FLASH_ATTN_DEVICES", (DEVICE,))
    forget()
    yield
    forget()


def forget():
    for function in (choice._cached_steps, choice._times, choice._does_not_import):
        function.cache_clear()


def takes(name, dtype, dim):
    if name == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        return False  # Triton's interpreter multiplies it wrongly
    return choice.why_not(name, "training", torch.device(DEVICE), dtype, dim) is None


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@contextmanager
def using(backend, name):
    with ops.use_backend(backend), ops.use_attention(name):
        yield


def packed(x):
    return ops.attention_packed(x, 2)


def strided(q, k, v):
    """Heads as every other channel, and queries that are not as many as keys."""
    return ops.attention(q[..., ::2], k[..., ::2], v[..., ::2], scale=0.3)


def from_projection(x):
    """As a projection leaves them: views of one product."""
    q, k, v = x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return ops.attention(q, k[:, :, 1:], v[:, :, 1:])


CASES = {
    "packed": (packed, [(3, 17, 3 * 2 * 24)]),
    "packed, one token": (packed, [(2, 1, 3 * 2 * 16)]),
    "strided": (strided, [(2, 2, 5, 2 * 16), (2, 2, 19, 2 * 16), (2, 2, 19, 2 * 16)]),
    "views": (from_projection, [(3, 9, 3 * 2 * 40)]),
    "any head dim": (ops.attention, [(2, 1, 4, 12), (2, 1, 7, 12), (2, 1, 7, 12)]),
}
DIMS = {"packed": 24, "packed, one token": 16, "strided": 16, "views": 40, "any head dim": 12}


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
    with using("torch", "auto"):
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
# Beside fused duals: rows without a tangent, and the backward of all rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("case", ["packed", "strided"])
@pytest.mark.parametrize("name", ["triton", "sdpa", "flash-attn"])
def test_beside_duals(name, case, rows, dtype):
    """What an implementation does not do there, float32 with flash-attn, is ours."""
    _, shapes = CASES[case]
    primals = [randn(i, 2, *shape[1:], dtype=dtype) for i, shape in enumerate(shapes)]
    tangents = [randn(20 + i, rows, *shape[1:], dtype=dtype) for i, shape in enumerate(shapes)]
    with ops.use_backend("torch"):
        exact = dual_results(case, [x.double() for x in primals], [x.double() for x in tangents])
    with using("triton", name):
        actual = dual_results(case, primals, tangents)
    for a, e in zip(actual, exact, strict=True):
        assert (a.dtype, a.shape) == (dtype, e.shape)
        assert not e.numel() or relative_error(a.cpu(), e.cpu()) <= BOUNDS[dtype]


def dual_results(case, primals, tangents):
    """Output, tangent, gradients."""
    leaves = [x.detach().requires_grad_() for x in primals]
    duals = [Dual(x, dx) for x, dx in zip(leaves, tangents, strict=True)]
    if case == "strided":
        o, do = ops.attention(*(ops.linear_map(lambda x: x[..., ::2], x) for x in duals), scale=0.3)
    else:
        o, do = packed(*duals)
    weights = randn(50, *o.shape).to(o.dtype)
    return [o.detach(), do, *torch.autograd.grad((o * weights).sum(), leaves)]


@pytest.mark.parametrize(
    ("name", "launched", "by_sdpa"),
    [
        ("triton", ["forward of 2", "dual of 1", "backward"], []),
        ("sdpa", ["dual of 1"], ["forward of 3", "backward"]),
        ("flash-attn", ["dual of 1", "backward"], []),
    ],
)
def test_who_computes_which_rows(name, launched, by_sdpa, monkeypatch):
    calls, others = [], []
    module = sys.modules["mfengine.ops.attention"]

    def recorded(f, calls, what):
        def call(*args):
            calls.append(what(*args))
            return f(*args)

        return call

    def launch(q, k, v, o, lse, scale, tangents=None):
        return f"{'dual' if tangents else 'forward'} of {len(q)}"

    monkeypatch.setattr(kernel, "_launch_forward", recorded(kernel._launch_forward, calls, launch))
    monkeypatch.setattr(kernel, "backward", recorded(kernel.backward, calls, lambda *_: "backward"))
    lse = recorded(module.WITH_LSE["sdpa"], others, lambda q, *_: f"forward of {len(q)}")
    monkeypatch.setitem(module.WITH_LSE, "sdpa", lse)
    monkeypatch.setattr(module, "_sdpa_backward", recorded(module._sdpa_backward, others, lambda *_: "backward"))
    x = randn(0, 3, 5, 96, dtype=torch.float16).requires_grad_()
    with using("triton", name):
        o, _ = packed(Dual(x, randn(1, 1, 5, 96, dtype=torch.float16)))
    o.sum().backward()
    assert (calls, others) == (launched, by_sdpa)


def test_calls_of_flash_attention_on_a_gpu():
    """PyTorch's operators there, on tensors without values: layouts and dtypes are those of ours."""
    module = sys.modules["mfengine.ops.attention"]
    with FakeTensorMode():
        qkv = torch.empty(3, 5, 3 * 2 * 72, device="cuda", dtype=torch.bfloat16)
        q, k, v = module._split_heads(qkv, 2)
        o, lse = module._sdpa_with_lse(q, k, v, None)
        assert (o.shape, o.transpose(1, 2).is_contiguous()) == (q.shape, True)
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == (q.shape[:3], torch.float32, True)
        gradients = module._sdpa_backward(q, k, v, o, lse, o, None)
        assert [(g.shape, g.dtype) for g in gradients] == [(q.shape, q.dtype)] * 3


def test_compiled_beside_duals():
    x, dx = randn(0, 3, 5, 96), randn(1, 1, 5, 96)
    torch._dynamo.reset()
    f = torch.compile(lambda x, dx: tuple(packed(Dual(x, dx))), fullgraph=True, backend="aot_eager")
    with using("triton", "sdpa"):
        for a, e in zip(f(x, dx), packed(Dual(x, dx)), strict=True):
            torch.testing.assert_close(a, e)


# ----------------------------------------------------------------------------
# Which one is chosen.


@pytest.fixture
def times(monkeypatch, tmp_path):
    """A function that replaces the measured times: {work: {(dim, tokens): {implementation: seconds, ...}}}."""

    def replace(work, found):
        rows = [
            {"work": work, "dtype": "float32", "dim": dim, "tokens": tokens, "heads": 1, "batch": 1,
             "times": {name: {"seconds": value} for name, value in seconds.items()}}
            for (dim, tokens), seconds in found.items()
        ]  # fmt: skip
        file = tmp_path / "times.json"
        file.write_text(json.dumps({"Some GPU": {"environment": {}, "rows": rows}}))
        monkeypatch.setattr(choice, "TIMES", file)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        forget()

    return replace


GPU = torch.device("cuda", 0)


def chosen(work, dim, tokens, device=GPU, dtype=torch.float32):
    return choice.choose(work, device, dtype, dim, tokens)


def test_fastest_at_the_nearest_measured_shape(times):
    ours, theirs = {"triton": 1.0, "sdpa": 2.0}, {"triton": 2.0, "sdpa": 1.0}
    times("forward", {(64, 16): ours, (64, 256): theirs, (128, 16): theirs})
    assert [chosen("forward", 64, n) for n in (1, 16, 64, 65, 9999)] == ["triton"] * 3 + ["sdpa"] * 2
    assert [chosen("forward", d, 16) for d in (8, 72, 96, 128)] == ["triton", "triton", "sdpa", "sdpa"]
    assert chosen("forward", 60, 16) == "sdpa"  # which our kernels do not take
    assert chosen("training", 64, 256) == "triton"  # not measured
    with ops.use_backend("torch"):
        assert chosen("forward", 64, 16) == "torch"
        with ops.use_attention("sdpa"):
            assert chosen("forward", 64, 16) == "sdpa"


def test_all_batches_count_together(times, tmp_path):
    times("forward", {(64, 16): {"triton": 3.0, "sdpa": 1.0}})
    measured = json.loads(choice.TIMES.read_text())
    larger = {**measured["Some GPU"]["rows"][0], "times": {"triton": {"seconds": 4.0}, "sdpa": {"seconds": 7.0}}}
    measured["Some GPU"]["rows"].append(larger)
    choice.TIMES.write_text(json.dumps(measured))
    forget()
    assert chosen("forward", 64, 16) == "triton"


def test_only_what_runs_here(times, monkeypatch):
    times("forward", {(64, 16): {"flash-attn": 1.0, "sdpa": 2.0, "triton": 3.0}})
    assert chosen("forward", 64, 16) == "sdpa"  # flash-attn takes no float32
    times("instant", {(64, 16): {"flash-attn": 1.0, "sdpa": 2.0, "triton": 3.0}})
    assert chosen("instant", 64, 16) == "triton"  # and neither does PyTorch's


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "expected"),
    [
        ("cuda", torch.float32, 64, "triton"),
        ("cuda", torch.float32, 12, "torch"),
        ("cuda", torch.float64, 64, "torch"),
        ("cpu", torch.float32, 64, "torch"),
        ("meta", torch.float32, 64, "torch"),
    ],
)
def test_device_without_times(device, dtype, dim, expected, times):
    times("backward", {})
    assert chosen("forward", dim, 256, torch.device(device), dtype) == expected
    assert chosen("backward", dim, 256, torch.device(device), dtype) == "triton"


def test_times_that_are_shipped():
    """Every row is of known work by known implementations, and a CPU's choice follows from them."""
    devices = json.loads(choice.TIMES.read_text())
    assert "CPU" in devices
    for entry in devices.values():
        assert entry["environment"]["torch"]
        for row in entry["rows"]:
            assert set(row["times"]) <= set(choice.WORK[row["work"]])
            assert all(0 < t["fastest"] <= t["seconds"] <= t["slowest"] for t in row["times"].values())
    rows = choice.measured("forward", torch.device("cpu"), torch.float32)
    assert {(row["dim"], row["tokens"]) for row in rows} == {shape[:2] for shape in benchmark.preset_shapes()}
    fastest = {
        name: sum(row["times"][name]["seconds"] for row in rows if row["dim"] == 72) for name in ("torch", "sdpa")
    }
    assert chosen("forward", 72, 256, torch.device("cpu")) == min(fastest, key=fastest.get)


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
    why = choice.why_not("triton", "forward", torch.device("cpu"), torch.float32, 64)
    assert why == "its kernels run on a GPU alone"


# ----------------------------------------------------------------------------
# Training, and the command that measures.


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


def test_measuring(tmp_path, monkeypatch, capsys):
    """All kinds of work, and the times of other devices stay."""
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"Some GPU": {"environment": {"torch": "2"}, "rows": []}}))
    monkeypatch.setattr(choice, "TIMES", file)
    monkeypatch.setattr(benchmark, "TIMES", file)
    monkeypatch.setattr(benchmark, "TURNS", 1)
    monkeypatch.setattr(sys, "argv", ["attention", "--out", str(file)])
    usual = benchmark.time_attention
    monkeypatch.setattr(benchmark, "time_attention", lambda device: usual(device, [(16, 3, 1)], (2,), 0.003))
    benchmark.main()
    devices = json.loads(file.read_text())
    assert set(devices) == {"Some GPU", choice.device_name(torch.device(DEVICE))}
    rows = devices[choice.device_name(torch.device(DEVICE))]["rows"]
    assert {row["work"] for row in rows} == set(choice.WORK)
    assert all({"triton", "sdpa"} <= set(row["times"]) for row in rows)
    assert "| backward " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]
    forget()
    fastest = {name: t["seconds"] for name, t in rows[0]["times"].items()}
    assert chosen("forward", 16, 3, torch.device(DEVICE)) == min(fastest, key=fastest.get)
