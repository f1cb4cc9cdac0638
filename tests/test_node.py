"""A block as one node of autograd's graph: outputs, tangents, gradients, saved tensors, and errors."""

import pytest
import torch
import torch.autograd.forward_ad as fwad
from golden_cases import relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the fused kernels need triton")

from mfengine import DiT, ModelConfig, ops
from mfengine.engine.distributed import _recomputed
from mfengine.networks.dit import Block
from mfengine.ops import Dual
from mfengine.ops.flops import FlopCounterMode

CONFIG = ModelConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=1, num_heads=1, num_classes=3)
BATCH, DUALS, TOKENS, WIDTH = 2, 1, 4, 16
each_op = Block.forward.__wrapped__


def new_block():
    torch.manual_seed(0)
    block = Block(CONFIG)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block


def arguments(seed=0, requires_grad=True):
    g = torch.Generator().manual_seed(seed)
    made = []
    for rows in (TOKENS, TOKENS, 1, 1):  # stream, branch, gate, conditioning
        x, dx = (torch.randn(n * rows, WIDTH, generator=g) for n in (BATCH, DUALS))
        made.append(Dual(x.requires_grad_(requires_grad), dx))
    return made


def run(forward, block):
    inputs = arguments()
    with ops.use_backend("triton"):
        outputs = forward(block, *inputs)
        weights = [torch.linspace(-1, 1, o.primal.numel()).view_as(o.primal) for o in outputs]
        total = sum((o.primal * w).sum() for o, w in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(total, [*(x.primal for x in inputs), *block.parameters()])
    return [x.detach() for o in outputs for x in o] + list(gradients)


def test_one_node_computes_what_each_op_computes():
    block = new_block()
    for actual, expected in zip(run(Block.forward, block), run(each_op, block), strict=True):
        assert actual.dtype == expected.dtype
        assert relative_error(actual, expected) <= 1e-6


def test_graph_has_one_node():
    with ops.use_backend("triton"):
        outputs = new_block()(*arguments())
    (node,) = {o.primal.grad_fn for o in outputs}
    assert all(type(before).__name__ == "AccumulateGrad" for before, _ in node.next_functions if before is not None)
    assert not any(o.tangent.requires_grad for o in outputs)


def test_recomputing_saves_the_arguments_and_repeats_the_gradients():
    block, kept = new_block(), []

    def recomputed(block, *args):
        return _recomputed(block.forward, without_tangents=True)(*args)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        run(Block.forward, block)
    everything = sum(x.numel() for x in kept)
    kept.clear()
    for actual, expected in zip(run(recomputed, block), run(Block.forward, block), strict=True):
        assert torch.equal(actual, expected)
    assert everything > 10 * TOKENS * BATCH * WIDTH


def test_saved_tensors_are_those_of_each_op():
    """No tangents are saved."""

    def saved(forward):
        storages = {}
        block = new_block()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: (storages.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}), x)[1],
            lambda x: x,
        )
        with hooks, ops.use_backend("triton"):
            outputs = forward(block, *arguments())
        return sum(storages.values()), outputs

    (one, _), (each, _) = saved(Block.forward), saved(each_op)
    assert one <= each


@pytest.mark.parametrize("stray", ["input", "output"])
def test_tensor_from_outside_the_ops_is_rejected(stray):
    class Stray(nn.Module):
        @ops.one_node
        def forward(self, x):
            return ops.rms_norm(x._replace(primal=x.primal * 2), WEIGHT) if stray == "input" else Dual(*map(abs, x))

    with (
        ops.use_backend("triton"),
        pytest.raises(RuntimeError, match="is not an argument, a parameter or the output of an op"),
    ):
        Stray()(arguments()[0])
    with ops.use_backend("triton"), torch.no_grad():
        Stray()(arguments()[0])  # without gradients, nothing can be lost


WEIGHT = nn.Parameter(torch.ones(WIDTH))


def test_error_inside_clears_the_tape():
    class Broken(nn.Module):
        @ops.one_node
        def forward(self, x):
            raise KeyError("inside")

    block = new_block()
    with ops.use_backend("triton"):
        for _ in range(2):
            with pytest.raises(KeyError, match="inside"):
                Broken()(arguments()[0])
    assert len(run(Block.forward, block)) == 6 + 4 + 10


def test_second_derivatives_are_refused():
    inputs = arguments()
    with ops.use_backend("triton"):
        o = new_block()(*inputs)[0].primal
        with pytest.raises(RuntimeError, match="create_graph needs plain PyTorch"):
            torch.autograd.grad(o.square().sum(), inputs[0].primal, create_graph=True)


def test_gradients_through_the_tangents_of_a_block():
    """Then each op is a separate node."""

    def gradients(forward, dtype, backend):
        block = new_block().to(dtype)
        inputs = [Dual(*(x.detach().to(dtype).requires_grad_() for x in dual)) for dual in arguments()]
        with ops.use_backend(backend), ops.differentiable_tangents():
            total = sum((o.tangent + o.primal[-len(o.tangent) :]).square().sum() for o in forward(block, *inputs))
            return torch.autograd.grad(total, [*(x for dual in inputs for x in dual), *block.parameters()])

    found, exact = gradients(Block.forward, torch.float32, "triton"), gradients(each_op, torch.float64, "torch")
    for actual, expected in zip(found, exact, strict=True):
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("of", ["an argument", "a parameter"])
def test_tangents_of_forward_mode_are_not_lost(of):
    block = new_block()
    x, branch, gate, c = (x.primal.detach() for x in arguments())
    weight = block.attn.proj.weight.detach().clone()
    del block.attn.proj.weight
    with fwad.dual_level(), torch.no_grad():
        if of == "an argument":
            branch = fwad.make_dual(branch, torch.ones_like(branch))
        block.attn.proj.weight = fwad.make_dual(weight, torch.ones_like(weight)) if of == "a parameter" else weight
        found = []
        for backend in ("triton", "torch"):
            with ops.use_backend(backend):
                found.append(fwad.unpack_dual(block(x, branch, gate, c)[0]).tangent)
    assert relative_error(*found) <= 1e-5


def test_modes_see_forward_and_backward():
    """They also count the same FLOPs as for separate ops."""

    def flops(forward):
        with FlopCounterMode(display=False) as counter, ops.use_backend("triton"):
            sum(o.primal.sum() for o in forward(new_block(), *arguments())).backward()
        return counter.get_total_flops()

    assert flops(Block.forward) == flops(each_op) > 0


class Copies(TorchDispatchMode):
    """Records casts."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


def test_gradients_of_biases_need_no_cast():
    """Except GELU's, which its kernel sums in the dtype of the parameter."""
    block, inputs = new_block(), arguments()
    inputs = [inputs[0], *(Dual(x.primal.detach().half().requires_grad_(), x.tangent.half()) for x in inputs[1:])]
    casts = []
    with ops.use_backend("triton"):
        for dtype in (torch.float16, torch.float32):
            for p in block.parameters():
                p.grad, p.grad_dtype = None, dtype
            total = sum(o.primal.float().mean() for o in block(*inputs))
            with Copies() as copies:
                total.backward()
            casts.append([shape for shape in copies.shapes if len(shape) == 1])
            assert {p.grad.dtype for p in block.parameters()} == {dtype}
    assert casts == [[block.mlp.fc1.bias.shape], []]


class Casts(TorchDispatchMode):
    """Counts casts of parameters."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.count += 1
        return result


def test_fixed_weights_are_cast_once():
    torch.manual_seed(0)
    model = DiT(CONFIG, torch.float16)
    block, inputs = model.blocks[0], arguments()
    inputs = [inputs[0], *(Dual(x.primal.detach().half(), x.tangent.half()) for x in inputs[1:])]

    def casts(copies=None):
        with Casts() as mode, ops.use_backend("triton"), ops.fixed_weights(copies):
            with torch.no_grad():
                block(*(x.primal for x in inputs))
            outputs = block(*inputs)
        return mode.count, outputs

    once, expected = casts()
    assert once == 9  # five products, one of which leaves its bias to GELU
    copies = {p: p.detach().half() for p in block.parameters()}
    none, outputs = casts(copies)
    assert none == 0
    assert all(torch.equal(a, b) for x, y in zip(outputs, expected, strict=True) for a, b in zip(x, y, strict=True))
    for p in block.parameters():  # with separate ops, only parameters that take such gradients use their copies
        p.grad_dtype = torch.float16
    with Casts() as mode, ops.use_backend("torch"), ops.fixed_weights(copies):
        each_op(block, *inputs)[1].primal.float().sum().backward()
    assert mode.count == 0
    assert {p.grad.dtype for p in block.parameters()} == {torch.float16}
    with torch.no_grad():  # outside the context, current weights are used
        block.mlp.fc2.bias.add_(1)
        with ops.use_backend("triton"):
            moved = block(*(x.primal for x in inputs))[1]
    torch.testing.assert_close(moved, expected[1].primal + 1, rtol=2e-3, atol=2e-3)


class GatedBlock(nn.Module):
    """A block like improved MeanFlow's: packed and padded layers, rotary attention, only the last tokens at the end,
    and gates without rows."""

    HIDDEN = 12  # padded to 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = {f"w{i}": (WIDTH, WIDTH) for i in range(4)}
        shapes |= {"w4": (self.HIDDEN, WIDTH), "w5": (self.HIDDEN, WIDTH), "w6": (WIDTH, self.HIDDEN)}
        shapes |= {"q_norm": (8,), "k_norm": (8,), "norm": (WIDTH,), "gate": (WIDTH,), "mlp_gate": (WIDTH,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape)))

    def compute(self, x, h):
        qkv = ops.packed_linear(h, [self.w0, self.w1, self.w2])
        y = ops.linear(ops.rotary_attention(qkv, self.q_norm, self.k_norm, 2, TOKENS), self.w3)
        x, y = (ops.last_tokens(a, TOKENS, TOKENS - 1) for a in (x, y))
        x, h = ops.gated_residual_rms_norm(x, y, self.gate, self.norm)
        h = ops.swiglu(ops.packed_linear(h, [self.w4, self.w5], 8))
        return x, ops.packed_linear(h, [self.w6], in_multiple=8), ops.clone(self.mlp_gate)

    forward = ops.one_node(compute)


def outputs_and_gradients(run, block, inputs, backend, **fixed):
    with ops.use_backend(backend), ops.fixed_weights(**fixed):
        x, y, gate = run(block, *inputs)
    with ops.use_backend(backend):
        weights = torch.linspace(-1, 1, WIDTH)
        total = sum((o.primal.double() * weights).sin().sum() for o in (x, y)) + gate.double().cos().sum()
        gradients = torch.autograd.grad(total, [*(i.primal for i in inputs), *block.parameters()])
    return [*x, *y, gate, *gradients]


def gated_inputs(dtype=torch.float32):
    return [Dual(x.primal.detach().to(dtype).requires_grad_(), x.tangent.to(dtype)) for x in arguments()[:2]]


def test_a_gated_block_is_one_node():
    """Each parameter gets its gradient in its own shape, including those packed in one product."""
    block = GatedBlock()
    found = outputs_and_gradients(GatedBlock.forward, block, gated_inputs(), "triton")
    assert found[0].grad_fn is found[2].grad_fn is found[4].grad_fn
    block.double()
    expected = outputs_and_gradients(GatedBlock.compute, block, gated_inputs(torch.float64), "torch")
    for actual, exact in zip(found, expected, strict=True):
        assert actual.shape == exact.shape
        assert relative_error(actual.detach(), exact.detach()) <= 1e-5


class Packings(Casts):
    """Counts casts of parameters, and how often several are packed."""

    packed = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.packed += function in (torch.ops.aten.cat.default, torch.ops.aten.constant_pad_nd.default)
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_fixed_weights_are_packed_once(backend):
    """In a one-node block and with separate ops, from the optimizer's copies if there are any."""
    block = GatedBlock()
    stream, h = gated_inputs()
    inputs = [stream, Dual(h.primal.detach().half().requires_grad_(), h.tangent.half())]
    copies = {p: p.detach().half() for p in block.parameters() if p.ndim == 2}
    results = []
    for fixed in ({}, {"copies": copies}):
        for p in block.parameters():
            p.grad_dtype = torch.float16 if fixed and p.ndim == 2 else None
        with Packings() as mode, ops.use_backend(backend), ops.fixed_weights(**fixed):
            with torch.no_grad():
                block(*(x.primal for x in inputs))
            block(*inputs)
        assert mode.packed == 5  # q, k and v; two padded, and joined; one padded
        # Seven matrices, of which one is not packed: with separate ops, each use casts it.
        assert mode.count == (0 if fixed else 7 if backend == "triton" else 8)
        results.append(outputs_and_gradients(GatedBlock.forward, block, inputs, backend, **fixed))
    for plain, copied in zip(*results, strict=True):
        torch.testing.assert_close(copied.float(), plain.float(), rtol=1e-3, atol=1e-3)


def test_packed_layers_of_parameters_in_the_dtype_of_the_products():
    """As gathered by FSDP2."""
    block = GatedBlock().half()
    for run in (GatedBlock.forward, GatedBlock.compute):
        stream, h = gated_inputs()
        inputs = [stream, Dual(h.primal.detach().half().requires_grad_(), h.tangent.half())]
        found = outputs_and_gradients(run, block, inputs, "triton")
        assert [x.dtype for x in found[5:]] == [torch.float32, *[torch.float16] * 13]
        assert all(x.isfinite().all() for x in found)
