"""Every op of the table, with its kernels and in plain PyTorch, against the plain reference in float64.

Without a GPU, kernels run in Triton's interpreter, where bfloat16 products are wrong, so float32 and float16 are
tested.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwad
from conftest import slow
from golden_cases import relative_error
from torch.utils._pytree import tree_leaves

from mfengine import ops
from mfengine.ops import OPS, Dual
from mfengine.ops.flops import FlopCounterMode
from mfengine.ops.table import SHAPES, Shape, random_tensors

pytest.importorskip("triton", reason="the fused kernels need triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ODD = SHAPES["odd"]
SMALL = Shape(2, 3, 1, 16)
FUSED = [name for name, make in OPS.items() if make(SMALL, random_tensors(torch.float32, "meta")).op]
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]
each_op = pytest.mark.parametrize("name", OPS)
each_fused = pytest.mark.parametrize("name", FUSED)
ATTENTION = ("attention", "attention_packed", "rotary_attention")  # slowest in the interpreter
SHARED = ("attention_packed", "adaln_modulate", "rotary_attention")  # share their kernels with other ops
each_small_kernel = pytest.mark.parametrize(
    "name", [slow(name) if name in (*ATTENTION, *SHARED) else name for name in FUSED]
)
each_kernel = pytest.mark.parametrize("name", [slow(name) if name in SHARED else name for name in FUSED])


def example(name, shape=SMALL, dtype=torch.float32, seed=0):
    return OPS[name](shape, random_tensors(dtype, DEVICE, torch.Generator().manual_seed(seed)))


def whole(x):
    """Outputs as a list, for ops that return one or a tuple."""
    return list(x) if isinstance(x, tuple) and not isinstance(x, Dual) else [x]


def duals(arguments, tangents, parameters, rows):
    """Duals whose last `rows` rows have tangents; tangents of parameters have their full shape."""
    count = len(arguments) - parameters
    return [
        Dual(x, dx[len(dx) - rows :] if i < count else dx)
        for i, (x, dx) in enumerate(zip(arguments, tangents, strict=True))
    ]


def results(case, tangents, rows, backend):
    """Outputs, tangents and gradients, with explicit duals."""
    leaves = [x.detach().requires_grad_() for x in case.arguments]
    with ops.use_backend(backend):
        outputs = whole(case.function(*duals(leaves, tangents, case.parameters, rows)))
        assert not any(o.tangent.requires_grad for o in outputs)
        total = sum((o.primal * torch.linspace(-1, 1, o.primal.shape[-1]).to(o.primal)).sum() for o in outputs)
        return [x.detach() for o in outputs for x in o] + list(torch.autograd.grad(total, leaves))


def jvp(case, tangents, which):
    """Tangents of the outputs along some arguments, with PyTorch's own forward mode."""

    def f(*some):
        arguments = list(case.arguments)
        for i, x in zip(which, some, strict=True):
            arguments[i] = x
        return case.function(*arguments)

    along = tuple(tangents[i] for i in which)
    return whole(torch.func.jvp(f, tuple(case.arguments[i] for i in which), along)[1])


def assert_near(actual, expected, bound=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert not e.numel() or (a.double() - e).norm() <= bound * max(e.norm(), 1e-3), relative_error(a, e)


# ----------------------------------------------------------------------------
# Values.


SIZES = [
    *((ODD, 1, dtype) for dtype in DTYPES),
    # Sizes and dtypes do not interact, so each size has one dtype.
    (Shape(1, 1, 1, 16), 1, torch.float32),  # one token
    (Shape(1, 33, 1, 72), 0, torch.float16),  # no row has a tangent
    (Shape(2, 9, 1, 16), 2, torch.float32),  # every row has one
    (Shape(0, 5, 2, 16), 0, torch.float16),  # no rows
]


def cases_of_sizes():
    """Attention takes seconds in the interpreter, and `test_kernels.py` has more sizes: here one odd one in float16."""
    for name in FUSED:
        for size in SIZES:
            is_odd_half = size[:1] + size[2:] == (ODD, torch.float16)
            quick = is_odd_half and name != "attention_packed" if name in ATTENTION else name not in SHARED
            yield (name, *size) if quick else slow(name, *size)


@pytest.mark.parametrize(("name", "shape", "rows", "dtype"), list(cases_of_sizes()), ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(name, shape, rows, dtype):
    case, tangents = example(name, shape, dtype), example(name, shape, dtype, seed=1).arguments
    exact = results(case.double(), [x.double() for x in tangents], rows, "torch")
    plain = results(case, tangents, rows, "torch")
    fused = results(case, tangents, rows, "triton")
    for a, p, e in zip(fused, plain, exact, strict=True):
        assert (a.shape, a.dtype) == (e.shape, p.dtype)
        if e.numel():
            error, allowed = ((x.double() - e).norm() / max(e.norm(), 1) for x in (a, p))
            # Kernels compute in float32. Plain PyTorch may be exact if nothing depends on an argument, such as the
            # scores of one token.
            depends = e.norm() > 1e-6 and (shape.tokens > 1 or not any(case.flops))
            rounding = torch.finfo(torch.float32).eps if depends else 4 * torch.finfo(dtype).eps
            assert error <= 2 * allowed + rounding


@pytest.mark.parametrize("name", [slow("gated_residual_adaln"), "gated_residual_rms_norm"])
def test_widest_rows(name):
    case, tangents = (example(name, Shape(2, 1, 1, 8192), seed=seed) for seed in (0, 1))
    actual = results(case, tangents.arguments, 1, "triton")
    assert_near(actual, results(case.double(), tangents.double().arguments, 1, "torch"))


@pytest.mark.parametrize(("backend", "compiled"), [("torch", False), ("triton", False), slow("triton", True)])
def test_rms_norm_of_a_stream_in_the_dtype_of_the_products(backend, compiled):
    """Output and tangent have that dtype, and so has the gradient."""
    dtype = torch.bfloat16
    x, dx, weight = torch.randn(3, 5, 24, device=DEVICE), torch.randn(1, 5, 24, device=DEVICE), torch.ones(24)
    weight = weight.to(DEVICE).requires_grad_()

    def f(x, dx):
        return tuple(ops.rms_norm(Dual(x, dx), weight, dtype=dtype))

    leaf = x.double().requires_grad_()
    expected = torch.nn.functional.rms_norm(leaf, (24,), weight.double(), eps=1e-6)
    (gradient,) = torch.autograd.grad(expected.sin().sum(), leaf)
    leaf = x.clone().requires_grad_()
    with ops.use_backend(backend):
        o, do = (torch.compile(f, backend="aot_eager") if compiled else f)(leaf, dx)
        assert (o.dtype, do.dtype) == (dtype, dtype)
        (gx,) = torch.autograd.grad(o.double().sin().sum(), leaf)
    assert gx.dtype == torch.float32
    assert_near([o.detach(), gx], [expected.detach(), gradient], 4 * torch.finfo(dtype).eps)


@each_kernel
def test_arguments_of_any_strides(name):
    """With every other column of wider tensors, and gradients that are expanded or columns."""

    def new(*size, wide=False):
        return torch.randn(*size[:-1], 2 * size[-1], device=DEVICE)[..., ::2]

    case, tangents = OPS[name](SMALL, new), OPS[name](SMALL, new).arguments
    exact = case.double()
    assert_near(results(case, tangents, 1, "triton"), results(exact, [x.double() for x in tangents], 1, "torch"))
    for weights in (lambda o: 1.0, lambda o: torch.linspace(-1, 1, o.shape[-2], device=DEVICE).to(o)[:, None]):
        gradients = []
        for each, backend in ((case, "triton"), (exact, "torch")):
            leaves = [x.detach().requires_grad_() for x in each.arguments]
            with ops.use_backend(backend):
                total = sum((weights(o) * o).sum() for o in whole(each.function(*leaves)))
            gradients.append(torch.autograd.grad(total, leaves))
        assert_near(*gradients)


@pytest.mark.parametrize("rows", [0, 1, 2])
@each_op
def test_plain_tangent_is_the_jvp_of_the_reference(name, rows):
    case, tangents = example(name, ODD).double(), example(name, ODD, seed=1).double().arguments
    expected = jvp(case, tangents, range(len(tangents)))
    outputs = whole(case.function(*duals(case.arguments, tangents, case.parameters, rows)))
    assert_near([o.tangent for o in outputs], [dx[len(dx) - rows :] for dx in expected], 1e-12)
    assert_near([o.primal for o in outputs], whole(case.function(*case.arguments)), 1e-12)


@pytest.mark.parametrize(
    ("op", "width"),
    [
        (lambda x: ops.chunk(x, 3)[1], 9),
        (partial(ops.linear_map, lambda x: x.mT), 4),
        (lambda x: ops.add(x, BIAS), 4),
        (lambda x: ops.add(ops.linear_map(torch.Tensor.half, x), BIAS), 4),
    ],
    ids=["chunk", "linear_map", "add a constant", "add a wider constant"],
)
def test_tangent_of_a_linear_function(op, width):
    x, dx = torch.randn(2, 3, 5, width)
    output, tangent = op(Dual(x, dx[1:]))
    expected = torch.func.jvp(op, (x,), (dx,))
    torch.testing.assert_close((output, tangent), (expected[0], expected[1][1:]))


BIAS = torch.arange(4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_op
def test_plain_pytorch_stays_near_in_lower_precision(name, dtype):
    case, tangents = example(name, ODD, dtype), example(name, ODD, dtype, seed=1).arguments
    exact = results(case.double(), [x.double() for x in tangents], 1, "torch")
    low = results(case, tangents, 1, "torch")
    assert_near(low, exact, 8 * torch.finfo(dtype).eps)
    # Outputs and tangents have one dtype: the residual stream's if there is one, else that of the products.
    kinds = [x.dtype for x in low[: len(low) - len(tangents)]]
    assert kinds[::2] == kinds[1::2]
    assert kinds[-1] == (torch.float32 if name == "sinusoid" else dtype)


# ----------------------------------------------------------------------------
# A tangent of any argument.

ARGUMENTS = [(name, i) for name in OPS for i in range(len(example(name).arguments))]


@pytest.mark.parametrize(
    ("name", "i", "backend"),
    [
        slow(*case, backend) if case[0] in SHARED and backend == "triton" else (*case, backend)
        for case in ARGUMENTS
        for backend in ("torch", "triton")
    ],
)
def test_tangent_of_one_argument_alone(name, i, backend):
    """Explicit duals, torch.func.jvp and forward_ad give the same."""
    case, tangents = example(name), example(name, seed=1).arguments
    expected = jvp(case.double(), [x.double() for x in tangents], [i])
    assert any(dx.norm() > 0 for dx in expected)
    arguments = list(case.arguments)
    with ops.use_backend(backend):
        assert_near(jvp(case, tangents, [i]), expected)
        with fwad.dual_level():
            arguments[i] = fwad.make_dual(case.arguments[i], tangents[i])
            found = [fwad.unpack_dual(o).tangent for o in whole(case.function(*arguments))]
            zeros = [torch.zeros_like(e) if dx is None else dx for dx, e in zip(found, expected, strict=True)]
            assert_near(zeros, expected)
        arguments[i] = Dual(case.arguments[i], tangents[i])
        assert_near([o.tangent for o in whole(case.function(*arguments))], expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tangents_of_different_numbers_of_rows_are_refused(backend):
    x, row = torch.zeros(3, 2, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE)
    with (
        ops.use_backend(backend),
        pytest.raises(ValueError, match="tangents must have the same number of rows, not 2 and 1"),
    ):
        ops.adaln_modulate(Dual(x, x[1:]), Dual(row, row[:1]), row)


# ----------------------------------------------------------------------------
# Gradients of tangents.


def differentiated(case, tangents, how, backend, rows=2, compiled=False):
    """Outputs, tangents, and the gradients of a loss of both, for all arguments and their tangents."""
    leaves, seeds = ([x.detach().requires_grad_() for x in xs] for xs in (case.arguments, tangents))

    def f(leaves, seeds):
        if how == "dual":
            with ops.differentiable_tangents():
                return [tuple(o) for o in whole(case.function(*duals(leaves, seeds, case.parameters, rows)))]
        if how == "func.jvp":
            outputs = torch.func.jvp(case.function, tuple(leaves), tuple(seeds))
            return [*zip(*map(whole, outputs), strict=True)]
        with fwad.dual_level():
            return [tuple(fwad.unpack_dual(o)) for o in whole(case.function(*map(fwad.make_dual, leaves, seeds)))]

    with ops.use_backend(backend):
        outputs = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(leaves, seeds)
        total = 0
        for o, do in outputs:
            weights = torch.linspace(-1, 1, o.shape[-1], device=DEVICE).to(o)
            total = total + (weights * o).sum() + (weights * do * (do + o[len(o) - len(do) :])).sum()
        return [x.detach() for o in outputs for x in o] + list(torch.autograd.grad(total, [*leaves, *seeds]))


@pytest.mark.parametrize(
    ("name", "how", "rows"),
    [
        (name, how, rows) if name not in SHARED and (name != "attention" or rows == 1) else slow(name, how, rows)
        for name in FUSED
        for how, rows in (("dual", 1), ("dual", 0), ("func.jvp", 2), ("forward_ad", 2))
    ],
)
def test_gradients_of_a_loss_of_output_and_tangent(name, how, rows):
    """For arguments, parameters and their tangents."""
    case, tangents = example(name), example(name, seed=1)
    exact = differentiated(case.double(), tangents.double().arguments, "dual", "torch", rows)
    assert_near(differentiated(case, tangents.arguments, how, "triton", rows), exact)


@each_op
def test_gradients_through_plain_tangents_equal_pytorchs_forward_mode(name):
    case, tangents = example(name).double(), example(name, seed=1).double().arguments
    assert_near(*(differentiated(case, tangents, how, "torch") for how in ("dual", "func.jvp")), 1e-12)


@pytest.mark.parametrize(
    ("name", "how", "backend"),
    [  # operators and their autograd are the same for all ops; LayerNorm differs in forward mode
        slow("gelu", "dual", "triton"),
        slow("attention", "func.jvp", "triton"),
        slow("adaln_modulate", "func.jvp", "torch"),
    ],
)
def test_compiled_gradients_of_a_loss_of_output_and_tangent(name, how, backend):
    case, tangents = example(name), example(name, seed=1).arguments
    torch._dynamo.reset()
    expected = [x.double() for x in differentiated(case, tangents, how, backend)]
    assert_near(differentiated(case, tangents, how, backend, compiled=True), expected, 1e-6)


@each_kernel
def test_tangents_that_are_not_differentiated_are_not_saved(name):
    """Explicit tangents, and those of forward mode in `differentiable_tangents(False)`, where a gradient raises."""
    case, tangents = example(name), example(name, seed=1).arguments
    leaves = [x.detach().requires_grad_() for x in case.arguments]

    def run(how):
        if how == "forward mode":
            with fwad.dual_level():
                return list(map(fwad.unpack_dual, whole(case.function(*map(fwad.make_dual, leaves, tangents)))))
        return whole(case.function(*(leaves if how == "primal" else duals(leaves, tangents, case.parameters, 2))))

    saved = []
    for how, mode in (("primal", None), ("dual", None), ("forward mode", False), ("forward mode", None)):
        kept = []
        pack = lambda x: kept.append(x.shape) or x  # noqa: E731, B023
        context = nullcontext() if mode is None else ops.differentiable_tangents(mode)
        with ops.use_backend("triton"), context, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = run(how)
        saved.append(kept)
        if mode is False:
            with pytest.raises(RuntimeError, match=f"tangent of {case.op.name}, .*differentiable_tangents.*detach"):
                outputs[0].tangent.sum().backward()
    assert saved[0] == saved[1] == saved[2] != saved[3]


@each_kernel
def test_second_derivatives_through_a_tangent_are_refused(name):
    case, tangents = example(name), example(name, seed=1).arguments
    leaves = [x.detach().requires_grad_() for x in case.arguments]
    with ops.use_backend("triton"), ops.differentiable_tangents():
        total = sum(
            o.tangent.square().sum() for o in whole(case.function(*duals(leaves, tangents, case.parameters, 2)))
        )
        with pytest.raises(RuntimeError, match=f"second derivatives of {case.op.name} need plain PyTorch"):
            torch.autograd.grad(torch.autograd.grad(total, leaves, create_graph=True)[0].sum(), leaves)


@pytest.mark.parametrize(
    ("how", "backend"), [("func.jvp", "torch"), slow("func.jvp", "triton"), ("dual", "torch"), ("dual", "triton")]
)
def test_loss_of_the_tangent_of_two_attentions(how, backend):
    """With a layer in between: no gradient is lost."""
    torch.manual_seed(0)
    layer, explicit = torch.nn.Linear(16, 16).to(DEVICE), how == "dual"
    heads, along = torch.randn(2, 3, 1, 2, 4, 16, device=DEVICE)

    def loss(attention, layer, heads, along):
        def f(q, k, v):
            y = layer(attention(q, k, v))
            return attention(y, y, y)

        if attention is not ops.attention or not explicit:
            return torch.func.jvp(f, tuple(heads), tuple(along))[1].square().mean()
        with ops.differentiable_tangents():
            y = ops.linear(ops.attention(*map(Dual, heads, along)), layer.weight, layer.bias)
            return ops.attention(y, y, y).tangent.square().mean()

    def plain(q, k, v):
        return torch.softmax(q @ k.mT / 4, -1) @ v

    found = []
    for attention, dtype in ((ops.attention, torch.float32), (plain, torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (heads, along)]
        with ops.use_backend(backend):
            total = loss(attention, layer.to(dtype), *leaves)
            found.append(torch.autograd.grad(total, [*leaves, layer.weight, layer.bias]))
    assert_near(*found)


@each_kernel
def test_second_derivatives_are_refused(name):
    case = example(name)
    leaves = [x.detach().requires_grad_() for x in case.arguments]
    with ops.use_backend("triton"):
        outputs = whole(case.function(*leaves))
        gradients = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=f"second derivatives of {case.op.name} need plain PyTorch"):
            gradients[0].sum().backward()


# ----------------------------------------------------------------------------
# Execution: eager, with launchers, and with operators of torch.library where PyTorch must see the op.


def run_everything(case, tangents):
    leaves = [x.detach().requires_grad_() for x in case.arguments]
    for outputs in (case.function(*leaves), case.function(*duals(leaves, tangents, case.parameters, 1))):
        sum(tree_leaves(o)[0].sum() for o in whole(outputs)).backward()
    with torch.no_grad():
        case.function(*leaves)
    differentiated(case, tangents, "dual", "triton", 1)


@each_small_kernel
def test_eager_calls_cost_no_operator(name, monkeypatch):
    case, tangents = example(name), example(name, seed=1).arguments

    def refuse(*_):
        raise AssertionError("an operator of torch.library")

    monkeypatch.setattr(case.op, "_operators", type(case.op._operators)(*[refuse] * 5))
    with ops.use_backend("triton"):
        run_everything(case, tangents)
        with FlopCounterMode(display=False), pytest.raises(AssertionError, match="an operator"):
            run_everything(case, tangents)


@each_small_kernel
def test_fake_operators_match_real_ones(name):
    """Fake tensors have the shapes, strides and dtypes of the kernels' outputs, and nothing is changed in place."""
    case, tangents = example(name), example(name, seed=1).arguments
    operators = case.op._operators
    returned = case.op.forward(*case.arguments, *case.options)
    known = dict(zip((*case.op.arguments, *case.op.returned), (*case.arguments, *returned), strict=True))
    last = [dx[1:] if i < len(tangents) - case.parameters else dx for i, dx in enumerate(tangents)]
    calls = [
        (operators.forward, (*case.arguments, *case.options)),
        (operators.dual, (*case.arguments, *last, *case.options, True)),
        (operators.differentiable_dual, (*case.arguments, *last, *case.options)),
        (operators.backward, (*[known[x] for x in case.op.saved], *[known[x] for x in case.op.outputs], *case.options)),
    ]
    if operators.backward_dual is not None:
        more = case.op.differentiable_dual(*case.arguments, *last, *case.options)[len(case.op.returned) :]
        saved, outputs = ([known[x] for x in names] for names in (case.op.saved, case.op.outputs))
        calls.append((operators.backward_dual, (*saved, *last, *more, *outputs, *more[: len(outputs)], *case.options)))
    for operator, inputs in calls:
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_plain_rotary_attention_is_the_same_compiled():
    """Compiled, it rotates by real numbers instead of complex ones, which Inductor does not fuse."""
    case = example("rotary_attention")
    compiled = torch.compile(case.function, fullgraph=True, backend="eager")
    assert_near([compiled(*case.arguments)], [case.function(*case.double().arguments)], 1e-6)


@pytest.mark.parametrize(
    ("name", "transform"),  # all operators share one forward-mode rule
    [
        ("gelu", "dual"),
        *(slow(name, "dual") for name in FUSED if name != "gelu"),
        slow("attention", "func.jvp"),
        slow("gated_residual_adaln", "func.jvp"),
    ],
)
def test_compiled(name, transform):
    """The whole graph with the tangent, and the gradient through it."""
    case, tangents = example(name), example(name, seed=1).arguments

    def f(primals, tangents):
        if transform == "dual":
            return [tuple(o) for o in whole(case.function(*duals(primals, tangents, case.parameters, 1)))]
        outputs, douts = torch.func.jvp(case.function, tuple(primals), tuple(tangents))
        return [(o, dx.detach()) for o, dx in zip(whole(outputs), whole(douts), strict=True)]

    torch._dynamo.reset()
    found = []
    with ops.use_backend("triton"):
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            leaves = [x.detach().requires_grad_() for x in case.arguments]
            outputs = g(leaves, tangents)
            gradients = torch.autograd.grad(sum(o.square().sum() for o, _ in outputs), leaves)
            found.append([*(x.detach() for o in outputs for x in o), *gradients])
    assert_near(found[1], [x.double() for x in found[0]], 1e-6)


@each_fused
def test_flops_and_saved_tensors_on_meta_tensors(name):
    """Tangents do not change what is saved, and FLOPs follow the formulas of the table."""
    case = OPS[name](ODD, random_tensors(torch.bfloat16, "meta"))
    forward, tangent, backward = case.flops
    leaves = [x.detach().requires_grad_() for x in case.arguments]
    counted = []
    with ops.use_backend("triton"):
        for arguments, expected in (
            (leaves, forward + backward),
            (duals(leaves, leaves, case.parameters, ODD.batch), forward + tangent + backward),
        ):
            saved = []
            pack = lambda x: saved.append((x.shape, x.dtype)) or x  # noqa: E731, B023
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
                FlopCounterMode(display=False) as flops,
            ):
                outputs = whole(case.function(*arguments))
                sum(tree_leaves(o)[0].sum() for o in outputs).backward()
            assert flops.get_total_flops() == expected
            counted.append(saved)
    assert counted[0] == counted[1]
    assert (forward > 0) == ("attention" in name)
    own = sum(x.numel() * x.element_size() for x in case.arguments)
    assert case.bytes[1] == 2 * case.bytes[0] > 2 * own


# ----------------------------------------------------------------------------
# Wrong arguments, and packed layers.


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_arguments_of_rotary_attention_and_swiglu(backend):
    qkv, weight = torch.zeros(2, 5, 3 * 2 * 8), torch.zeros(8)
    with ops.use_backend(backend):
        with pytest.raises(ValueError, match="heads must have an even number of them, not 9"):
            ops.rotary_attention(torch.zeros(2, 5, 27), torch.zeros(9), torch.zeros(9), 1)
        with pytest.raises(ValueError, match=r"k_weight must be of shape \(8,\), not \(4,\)"):
            ops.rotary_attention(qkv, weight, weight[:4], 2)
        with pytest.raises(ValueError, match="must be two halves, not 5 channels"):
            ops.swiglu(torch.zeros(2, 5))


def test_rotary_attention_equals_its_formula():
    """The formula uses pairs of channels as complex numbers."""
    x, weights = torch.randn(2, 5, 3 * 2 * 8).double(), torch.randn(2, 1, 1, 8).double()
    q, k, v = x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    angle = torch.arange(5.0).double()[:, None] * 10_000 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(x, weight):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    p = torch.softmax(rotated(q, weights[0]) @ rotated(k, weights[1]).mT / 8**0.5, -1)
    expected = (p @ v).transpose(1, 2).flatten(2)
    for tokens in (x, x.flatten(0, 1)):
        o = ops.rotary_attention(tokens, *weights[:, 0, 0], 2, 5)
        torch.testing.assert_close(o, expected.view(o.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [10, 11, 16])
def test_packed_linear_pads_rows_and_columns(columns):
    """Padding is zero; it gets no gradient and contributes none."""
    x = torch.randn(2, 3, 16 if columns > 10 else 10, requires_grad=True)
    weights = [torch.randn(rows, columns, requires_grad=True) for rows in (5, 8)]
    o = ops.packed_linear(x, weights, 8, 8)
    expected = [torch.nn.functional.linear(x[..., :columns], w) for w in weights]
    assert_near([o[..., :5], o[..., 8:]], [e.double() for e in expected])
    assert (o[..., 5:8] == 0).all()
    found = torch.autograd.grad(o.square().sum(), [x, *weights])
    assert_near(found, torch.autograd.grad(sum(e.double().square().sum() for e in expected), [x, *weights]))
    assert (found[0][..., columns:] == 0).all()


def test_packed_linear_rejects_another_width():
    with pytest.raises(ValueError, match=r"x has width 12, but a weight has 10 columns \(rounded to 8\)"):
        ops.packed_linear(torch.zeros(2, 12), [torch.zeros(3, 10)], 8, 8)


def test_packed_linear_uses_a_single_fitting_weight_directly():
    weight = torch.nn.Parameter(torch.randn(8, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.data_ptr()), x)[1], lambda x: x):
        ops.packed_linear(torch.randn(2, 16, requires_grad=True), [weight], 8).sum().backward()
    assert weight.data_ptr() in kept


# ----------------------------------------------------------------------------
# Attention.


def test_attention_equals_pytorch():
    q, k, v = (torch.randn(2, 3, n, 8, device=DEVICE, dtype=torch.float64) for n in (5, 9, 9))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with ops.use_attention("torch"):
        torch.testing.assert_close(ops.attention(q, k, v), expected)
