"""The one place that joins an op's kernels with autograd, tangents, torch.compile and FLOP counting.

An op is declared once, as an `Op`. Calling it takes one of three ways:

- plain PyTorch where kernels do not run (`mfengine.ops.backend.fused`);
- its launchers directly, inside one `torch.autograd.Function` if a gradient is wanted: the eager way, the cheapest;
- operators of `torch.library`, where something has to see what runs: torch.compile, fake and meta tensors, transforms
  of `torch.func`, a `TorchDispatchMode` such as `FlopCounterMode`. They cost the host some ten times as much.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from mfengine.ops.backend import fused
from mfengine.ops.dual import Dual, complete, primal_of, tangent_of
from mfengine.ops.node import Tape, eager, recording
from mfengine.torch_private import uncompiled

_SCHEMA_TYPES = {
    "int": "int", "bool": "bool", "float": "float", "float | None": "float?", "torch.dtype | None": "ScalarType?",
    "Tensor | None": "Tensor?",
}  # fmt: skip
DECLARED: list[Op] = []


class Op:
    """An op with kernels: takes tensors or duals, and returns a tuple of outputs of the same kind.

    Args:
        forward: the launcher of the primal, (*primals, *options) -> (*outputs, *auxiliary). The names of its parameters
            are those of the arguments; options are those annotated as int, float or dtype.
        dual: (*primals, *tangents, *options) -> (*outputs, *auxiliary, *tangents of the outputs), for the tangents of
            the last K rows. None is the tangent of a parameter that has none.
        backward: (*saved, *gradients of the outputs, *options) -> one gradient for each primal. The gradient of an
            output that nothing used is None.
        plain: the same in plain PyTorch, the specification: (*arguments, *options) -> outputs, tensors or duals.
        shapes: (*primals, *options) -> empty tensors like what `forward` returns.
        outputs, auxiliary: names of what `forward` returns; auxiliary is what only the backward reads.
        saved: names of the arguments and outputs that are kept for the backward.
        like: for each argument that is not saved, the saved one whose shape and dtype its gradient has.
        parameters: how many of the last arguments are parameters, which have no rows; their tangents are whole.
        flops: (*shapes of the primals, *options) -> FLOPs of the forward, of the tangent beside it and of the backward.
            None if there are no matrix products.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., tuple[Tensor, ...]],
        dual: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor, ...]],
        plain: Callable[..., tuple[Any, ...]],
        shapes: Callable[..., tuple[Tensor, ...]],
        outputs: Sequence[str],
        saved: Sequence[str],
        auxiliary: Sequence[str] = (),
        like: dict[str, str] | None = None,
        parameters: int = 0,
        flops: Callable[..., tuple[int, int, int]] | None = None,
    ) -> None:
        self.name, self.forward, self.dual, self.backward, self.plain = name, forward, dual, backward, plain
        self.shapes, self.flops, self.parameters = shapes, flops, parameters
        annotations = {p.name: str(p.annotation) for p in inspect.signature(forward).parameters.values()}
        self.arguments = tuple(name for name, kind in annotations.items() if kind not in _SCHEMA_TYPES)
        self.outputs, self.returned, self.saved = tuple(outputs), (*outputs, *auxiliary), tuple(saved)
        known = (*self.arguments, *self.returned)
        self._keep = tuple(known.index(name) for name in saved)
        self._like = tuple(self.saved.index((like or {}).get(name, name)) for name in self.arguments)
        self._operators = self._register({k: v for k, v in annotations.items() if v in _SCHEMA_TYPES})
        DECLARED.append(self)

    def __call__(self, *args: Any, options: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        tape = recording()
        if tape is not None:
            return self._in_block(tape, args, options)
        if fused(*map(primal_of, args)):
            return self.by_kernels(*args, options=options)
        if any(isinstance(a, Dual) for a in args):
            primals, tangents = self._take_apart(args)
            args = tuple(p if t is None else Dual(p, t) for p, t in zip(primals, tangents, strict=True))
        return self.plain(*args, *options)

    def by_kernels(self, *args: Any, options: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        """By the kernels, whatever `use_backend` says.

        Raises:
            ValueError: the kernels do not take the arguments.
        """
        make: Callable[..., Any] = Dual
        if explicit := any(isinstance(a, Dual) for a in args):
            primals, tangents = self._take_apart(args)
        else:  # under `torch.func.jvp` and `torch.autograd.forward_ad` tensors may be duals of PyTorch's own
            pairs, make = [fwad.unpack_dual(x) for x in args], fwad.make_dual
            if all(pair.tangent is None for pair in pairs):
                return self._run(args, None, options)[: len(self.outputs)]
            primals = [pair.primal for pair in pairs]
            tangents = complete(primals, [pair.tangent for pair in pairs], self.parameters)
        returned = self._run(primals, tangents, options, constant=explicit)
        return tuple(map(make, returned[: len(self.outputs)], returned[len(self.returned) :]))

    def bytes(self, *primals: Tensor, options: tuple[Any, ...] = ()) -> tuple[int, int, int]:
        """What a forward, a dual of all rows, and a backward read and write at least."""
        returned = self.shapes(*primals, *options)
        known = (*primals, *returned)
        forward = _bytes(known)
        saved = [known[i] for i in self._keep]
        return forward, 2 * forward, _bytes([*saved, *returned[: len(self.outputs)], *(saved[i] for i in self._like)])

    # ------------------------------------------------------------------------
    # How it runs.

    def _take_apart(self, args: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """Primals, and tangents as `complete` makes them."""
        primals = [primal_of(a) for a in args]
        tangents = [tangent_of(a) for a in args]
        return primals, complete(primals, tangents, self.parameters)

    def _in_block(self, tape: Tape, args: Sequence[Any], options: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the op returns, of duals if any argument is one; its backward is put on the tape."""
        primals: Sequence[Tensor] = args
        if dual := Dual in map(type, args):
            primals, tangents = [primal_of(a) for a in args], [tangent_of(a) for a in args]
            if any(t is None for t in tangents[: len(args) - self.parameters]):
                tangents = complete(primals, tangents, self.parameters)
            by = (self.dual, options) if tape.eager else (self._operators[1], (*options, True))
            returned = by[0](*primals, *tangents, *by[1])
        else:
            returned = (self.forward if tape.eager else self._operators[0])(*primals, *options)
        returned = _tuple(returned)
        outputs = returned[: len(self.outputs)]
        if tape.records:
            known = (*primals, *returned)
            # A mode that saw the forward sees the backward too.
            backward = self.backward if tape.eager else self._operator_gradients
            tape.record(backward, primals, outputs, [known[i] for i in self._keep], options)
        return tuple(map(Dual, outputs, returned[len(self.returned) :])) if dual else outputs

    def _run(
        self,
        primals: Sequence[Tensor],
        tangents: Sequence[Any] | None,
        options: tuple[Any, ...],
        constant: bool = False,
    ) -> tuple[Tensor, ...]:
        """What `forward` or `dual` returns, with its graph. Constant tangents have none."""
        inputs = primals if tangents is None else (*primals, *tangents)
        if not eager(inputs):
            forward, dual, _ = self._operators
            return _tuple(forward(*inputs, *options) if tangents is None else dual(*inputs, *options, constant))
        if torch.is_grad_enabled():
            differentiable = primals if constant else inputs
            if any(x is not None and x.requires_grad for x in differentiable):
                return _Node.apply(self, tangents if constant else None, options, *differentiable)
        return (self.forward if tangents is None else self.dual)(*inputs, *options)

    def _save(self, ctx: Any, inputs: Sequence[Any], returned: Sequence[Tensor], options: Any, constant: bool) -> None:
        """Keep for the backward what it needs, which is the same with and without tangents."""
        known = (*inputs[: len(self.arguments)], *returned[: len(self.returned)])
        ctx.save_for_backward(*[known[i] for i in self._keep])
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.mark_non_differentiable(*returned[len(self.outputs) : None if constant else len(self.returned)])

    def _differentiate(self, ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of the primals.

        Raises:
            RuntimeError: there is a gradient of a tangent.
        """
        if any(g is not None for g in gradients[len(self.returned) :]):
            raise RuntimeError(
                f"a gradient reached the tangent of {self.name}, which fused kernels do not differentiate: detach the "
                "tangent (a compiled function must return it detached), or take plain PyTorch by "
                'mfengine.ops.use_backend("torch")'
            )
        gradients = gradients[: len(self.outputs)]
        if all(g is None for g in gradients):
            return (None,) * len(self.arguments)
        return self._gradients(*ctx.saved_tensors, *gradients, *ctx.options)

    def _operator_gradients(self, *inputs: Any) -> tuple[Tensor, ...]:
        return _tuple(self._operators[2](*inputs))

    def _gradients(self, *inputs: Any) -> tuple[Tensor, ...]:
        """What `backward` returns."""
        # With create_graph, the operator: it refuses second derivatives, where a launcher would give none.
        direct = not torch.is_grad_enabled() and eager(inputs[: len(self.saved) + len(self.outputs)])
        return _tuple((self.backward if direct else self._operators[2])(*inputs))

    def _refuse(self, *_: Any) -> None:
        raise RuntimeError(
            f'second derivatives of {self.name} need plain PyTorch: mfengine.ops.use_backend("torch") does it'
        )

    # ------------------------------------------------------------------------
    # How PyTorch knows it.

    def _register(self, options: dict[str, str]) -> tuple[Any, Any, Any]:
        """Operators for forward, dual and backward, with their fakes, autograd and FLOPs."""
        count, more = len(self.arguments), len(options)
        rows, number = count - self.parameters, len(self.returned)

        def fake_dual(*inputs: Any) -> tuple[Tensor, ...]:
            primals, tangents, options = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]
            last = [x.new_empty(tangents[0].shape[0], *x.shape[1:]) for x in primals[:rows]]
            tangent = self.shapes(*last, *primals[rows:], *options[:more])[: len(self.outputs)]
            return (*self.shapes(*primals, *options[:more]), *tangent)

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.others, output = len(inputs) - count, _tuple(output)
            dual = len(output) > number
            constant = dual and inputs[-1]
            start = 2 * count if dual else count
            self._save(ctx, inputs, output, inputs[start : start + more], constant)

        def differentiate(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            return (*self._differentiate(ctx, gradients), *[None] * ctx.others)

        tensors = [f"Tensor {name}" for name in self.arguments]
        tangents = [f"Tensor{'?' if i >= rows else ''} d{name}" for i, name in enumerate(self.arguments)]
        saved, gradients = [f"Tensor {x}" for x in self.saved], [f"Tensor? g{x}" for x in self.outputs]
        other = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in options.items()]
        forward = _operator(self.name, [*tensors, *other], number, self.forward, self.shapes)
        dual = _operator(
            f"{self.name}_dual",
            [*tensors, *tangents, *other, "bool constant"],
            number + len(self.outputs),
            lambda *inputs: self.dual(*inputs[:-1]),
            fake_dual,
        )
        backward = _operator(
            f"{self.name}_backward",
            [*saved, *gradients, *other],
            count,
            self.backward,
            lambda *inputs: tuple(inputs[i].new_empty(inputs[i].shape) for i in self._like),
        )
        for operator in (forward, dual):
            torch.library.register_autograd(operator, differentiate, setup_context=save)
        torch.library.register_autograd(backward, self._refuse)
        return forward, dual, backward

    def flop_formulas(self) -> dict[Any, Callable[..., int]]:
        """For each operator, its FLOPs from what it is called with, shapes in place of tensors."""
        count, kept = len(self.arguments), len(self.saved) + len(self.outputs)
        formula = self.flops
        if formula is None:
            return {}

        def forward(*inputs: Any, **_: Any) -> int:
            return formula(*inputs)[0]

        def dual(*inputs: Any, **_: Any) -> int:
            primals, tangents, options = inputs[:count], inputs[count : 2 * count], inputs[2 * count : -1]
            return formula(*primals, *options)[0] + formula(*tangents, *options)[1]

        def backward(*inputs: Any, **_: Any) -> int:
            return formula(*inputs[:count], *inputs[kept:])[2]  # the arguments come first in `saved`

        names = (operator.overloadpacket for operator in self._operators)
        return dict(zip(names, (forward, dual, backward), strict=True))


class _Node(torch.autograd.Function):
    """An op in eager PyTorch. Constant tangents are hidden from autograd, in a tuple."""

    @staticmethod
    def forward(ctx: Any, op: Op, tangents: Sequence[Any] | None, options: tuple[Any, ...], *inputs: Any) -> Any:
        constant = tangents is not None
        every = (*inputs, *tangents) if tangents is not None else inputs
        returned = (op.dual if len(every) > len(op.arguments) else op.forward)(*every, *options)
        op._save(ctx, inputs, returned, options, constant)
        ctx.op, ctx.others = op, len(inputs) - len(op.arguments)
        return returned

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return (None, None, None, *ctx.op._differentiate(ctx, gradients), *[None] * ctx.others)


def _operator(name: str, arguments: list[str], results: int, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator mfengine::name. Where one result is returned, it is no tuple for `torch.library`."""

    def unpacked(f: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *inputs: f(*inputs)[0]) if results == 1 else f

    qualified = f"mfengine::{name}"
    schema = f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * results)})"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", uncompiled(unpacked(run)))
    torch.library.register_fake(qualified, unpacked(fake))
    return getattr(torch.ops.mfengine, name).default


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
