"""The one place that connects an op's kernels to autograd, tangents, torch.compile and FLOP counting.

An op is declared once, as an `Op`. A call runs in one of three ways:

- plain PyTorch, where kernels do not run (`mfengine.ops.backend.fused`);
- its launchers, called directly, inside one `torch.autograd.Function` if a gradient is needed: eager, and the cheapest;
- operators of `torch.library`, where something must see what runs: torch.compile, fake and meta tensors, transforms
  of `torch.func`, a `TorchDispatchMode` such as `FlopCounterMode`. They cost the host about ten times as much.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from mfengine.ops.backend import fused
from mfengine.ops.dual import Dual, complete, differentiable, differentiable_tangents, primal_of, tangent_of
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
        forward: launcher of the primal, (*primals, *options) -> (*outputs, *auxiliary). Its parameters have the names
            of the arguments; those annotated as int, float or dtype are options.
        dual: (*primals, *tangents, *options) -> (*outputs, *auxiliary, *tangents of the outputs), for the tangents of
            the last K rows. The tangent of a parameter without one is None.
        backward: (*saved, *gradients of the outputs, *options) -> one gradient for each primal. The gradient of an
            unused output is None.
        plain: the specification in plain PyTorch: (*arguments, *options) -> outputs, tensors or duals.
        shapes: (*primals, *options) -> empty tensors like the results of `forward`.
        outputs, auxiliary: names of the results of `forward`; only the backward reads the auxiliary ones.
        saved: names of the arguments and outputs that are kept for the backward.
        like: for each argument that is not saved, the saved one with the shape and dtype of its gradient.
        parameters: how many of the last arguments are parameters, which have no rows; their tangents have their full
            shape.
        backward_dual: the backward if a gradient reaches a tangent: (*saved, *tangents, *tangents of the outputs,
            *auxiliary_dual, *gradients of the outputs, *gradients of their tangents, *options) -> (*gradients of the
            primals, *gradients of the tangents). A missing tangent or gradient is None, and the gradient of a missing
            tangent may be None. Without `backward_dual`, `plain` is recomputed and differentiated.
        differentiable_dual: `dual` for use with `backward_dual`; it also returns auxiliary_dual, at the end. None if
            there are none.
        auxiliary_dual: tensors that only `backward_dual` reads: their names, and the result of `forward` with the same
            shape and dtype (for the rows with tangents).
        backward_dual_flops: (*shapes of the primals, *shapes of the tangents, *options) -> FLOPs of `backward_dual`.
        flops: (*shapes of the primals, *options) -> FLOPs of forward, tangent and backward. None if there are no matrix
            products.
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
        backward_dual: Callable[..., tuple[Tensor | None, ...]] | None = None,
        differentiable_dual: Callable[..., tuple[Tensor, ...]] | None = None,
        auxiliary_dual: dict[str, str] | None = None,
        backward_dual_flops: Callable[..., int] | None = None,
    ) -> None:
        self.name, self.forward, self.dual, self.backward, self.plain = name, forward, dual, backward, plain
        self.shapes, self.flops, self.parameters = shapes, flops, parameters
        self.backward_dual, self.backward_dual_flops = backward_dual, backward_dual_flops
        self.differentiable_dual = differentiable_dual or dual
        signature = inspect.signature(forward).parameters
        annotations = {p: str(getattr(x.annotation, "__name__", x.annotation)) for p, x in signature.items()}
        self.arguments = tuple(name for name, kind in annotations.items() if kind not in _SCHEMA_TYPES)
        self.outputs, self.returned, self.saved = tuple(outputs), (*outputs, *auxiliary), tuple(saved)
        known = (*self.arguments, *self.returned)
        if unknown := [x for x in saved if x not in known]:
            raise ValueError(f"op {name}: saved names {unknown[0]!r}, which is none of {', '.join(known)}")
        if unlike := [x for x in self.arguments if (like or {}).get(x, x) not in saved]:
            raise ValueError(
                f"op {name}: name in like= the saved tensor that the gradient of {unlike[0]!r} resembles; if it is an "
                f"option, annotate it as one of {', '.join(_SCHEMA_TYPES)}"
            )
        self._keep = tuple(known.index(name) for name in saved)
        self._recomputed_from = tuple(i for i, name in enumerate(self.arguments) if name not in saved)
        self._auxiliary_dual = tuple(self.returned.index(name) for name in (auxiliary_dual or {}).values())
        self._like = tuple(self.saved.index((like or {}).get(name, name)) for name in self.arguments)
        options = {k: v for k, v in annotations.items() if v in _SCHEMA_TYPES}
        self._more = len(options)
        self._operators = self._register(options)
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
        """Run the kernels, whatever `use_backend` says.

        Raises:
            ValueError: the kernels do not support the arguments.
        """
        make: Callable[..., Any] = Dual
        if explicit := any(isinstance(a, Dual) for a in args):
            primals, tangents = self._take_apart(args)
        else:  # under `torch.func.jvp` and `torch.autograd.forward_ad`, tensors may be PyTorch's own duals
            pairs, make = [fwad.unpack_dual(x) for x in args], fwad.make_dual
            if all(pair.tangent is None for pair in pairs):
                return self._run(args, None, options)[: len(self.outputs)]
            primals = [pair.primal for pair in pairs]
            tangents = complete(primals, [pair.tangent for pair in pairs], self.parameters)
        through = torch.is_grad_enabled() and differentiable(explicit)
        returned = self._run(primals, tangents, options, explicit, through)
        return tuple(map(make, returned[: len(self.outputs)], returned[len(self.returned) :]))

    def bytes(self, *primals: Tensor, options: tuple[Any, ...] = ()) -> tuple[int, int, int]:
        """Least bytes that a forward, a dual of all rows, and a backward read and write."""
        returned = self.shapes(*primals, *options)
        known = (*primals, *returned)
        forward = _bytes(known)
        saved = [known[i] for i in self._keep]
        return forward, 2 * forward, _bytes([*saved, *returned[: len(self.outputs)], *(saved[i] for i in self._like)])

    # ------------------------------------------------------------------------
    # Execution.

    def _take_apart(self, args: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """Primals, and tangents from `complete`."""
        primals = [primal_of(a) for a in args]
        tangents = [tangent_of(a) for a in args]
        return primals, complete(primals, tangents, self.parameters)

    def _in_block(self, tape: Tape, args: Sequence[Any], options: tuple[Any, ...]) -> tuple[Any, ...]:
        """The op's outputs inside a block, as duals if any argument is one; its backward is recorded on the tape."""
        primals: Sequence[Tensor] = args
        if dual := Dual in map(type, args):
            primals, tangents = [primal_of(a) for a in args], [tangent_of(a) for a in args]
            if any(t is None for t in tangents[: len(args) - self.parameters]):
                tangents = complete(primals, tangents, self.parameters)
            by = (self.dual, options) if tape.eager else (self._operators.dual, (*options, True))
            returned = by[0](*primals, *tangents, *by[1])
        else:
            returned = (self.forward if tape.eager else self._operators.forward)(*primals, *options)
        returned = _tuple(returned)
        outputs = returned[: len(self.outputs)]
        if tape.records:
            known = (*primals, *returned)
            # A mode that saw the forward must see the backward, too.
            backward = self.backward if tape.eager else self._operator_gradients
            tape.record(backward, primals, outputs, [known[i] for i in self._keep], options)
        return tuple(map(Dual, outputs, returned[len(self.returned) :])) if dual else outputs

    def _run(
        self,
        primals: Sequence[Tensor],
        tangents: Sequence[Any] | None,
        options: tuple[Any, ...],
        explicit: bool = False,
        through: bool = False,
    ) -> tuple[Tensor, ...]:
        """The results of `forward`, `dual` or `differentiable_dual`, with their graph.

        If `through`, tangents with a graph of their own are differentiated. Otherwise, explicit tangents are constants,
        and a gradient that reaches any other tangent raises.
        """
        inputs = primals if tangents is None else (*primals, *tangents)
        constant = explicit and not through
        if not eager((*inputs, *(x for x in options if isinstance(x, Tensor)))):
            operators = self._operators
            if tangents is None:
                return _tuple(operators.forward(*inputs, *options))
            if through:
                return operators.differentiable_dual(*inputs, *options)
            return operators.dual(*inputs, *options, constant)
        if torch.is_grad_enabled():
            tracked = primals if constant else inputs
            if any(x is not None and x.requires_grad for x in tracked):
                return _Node.apply(self, tangents if constant else None, options, through, *tracked)
        return _tuple((self.forward if tangents is None else self.dual)(*inputs, *options))

    def _save(
        self,
        ctx: Any,
        inputs: Sequence[Any],
        returned: Sequence[Tensor],
        options: Any,
        constant: bool = False,
        through: bool = False,
    ) -> None:
        """Save tensors for the backward: the same with and without tangents, unless these are differentiated."""
        count, number = len(self.arguments), len(self.returned)
        known = (*inputs[:count], *returned[:number])
        kept = [known[i] for i in self._keep]
        if through and self.backward_dual is not None:
            kept += [*inputs[count : 2 * count], *returned[number:]]
        elif through:
            kept += [*(inputs[i] for i in self._recomputed_from), *inputs[count : 2 * count]]
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.through = options, through
        tangents = number if constant else number + len(self.outputs)
        ctx.mark_non_differentiable(*returned[len(self.outputs) : number], *returned[tangents:])

    def _differentiate(
        self, ctx: Any, gradients: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the primals, and of the tangents if these are differentiated.

        Args:
            ctx: context of the node.
            gradients: gradients of the node's results.
            needed: for each primal and tangent, whether its gradient is needed.

        Raises:
            RuntimeError: a tangent that is not differentiated has a gradient.
        """
        count, outputs = len(self.arguments), len(self.outputs)
        of_outputs = gradients[:outputs]
        of_tangents = gradients[len(self.returned) : len(self.returned) + outputs]
        if any(g is not None for g in of_tangents):
            if not ctx.through:
                raise RuntimeError(
                    f"a gradient reached the tangent of {self.name}, computed inside "
                    "mfengine.ops.differentiable_tangents(False): detach the tangent, or do not use that context"
                )
            if self.backward_dual is not None:
                found = self._gradients(*ctx.saved_tensors, *of_outputs, *of_tangents, *ctx.options, dual=True)
                return tuple(g if need else None for g, need in zip(found, needed, strict=True))
            return self._recompute(ctx, of_outputs, of_tangents, needed)
        rest = (None,) * (len(needed) - count)
        if all(g is None for g in of_outputs):
            return (None,) * count + rest
        return self._gradients(*ctx.saved_tensors[: len(self.saved)], *of_outputs, *ctx.options) + rest

    def _recompute(
        self, ctx: Any, of_outputs: Sequence[Any], of_tangents: Sequence[Any], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of primals and tangents through plain PyTorch."""
        if torch.is_grad_enabled():
            self._refuse()
        saved = ctx.saved_tensors
        known = dict(zip(self.saved, saved, strict=False))
        known |= {self.arguments[i]: x for i, x in zip(self._recomputed_from, saved[len(self.saved) :], strict=False)}
        primals = [known[name] for name in self.arguments]
        with torch.enable_grad(), differentiable_tangents():
            leaves: list[Any] = [
                x if x is None else x.detach().requires_grad_(need)
                for x, need in zip((*primals, *saved[-len(primals) :]), needed, strict=True)
            ]
            pairs = zip(leaves[: len(primals)], leaves[len(primals) :], strict=True)
            duals: Any = self.plain(*(x if dx is None else Dual(x, dx) for x, dx in pairs), *ctx.options)
        computed = zip(
            (*(o.primal for o in duals), *(o.tangent for o in duals)), (*of_outputs, *of_tangents), strict=True
        )
        roots, gradients = zip(*((x, g) for x, g in computed if g is not None and x.requires_grad), strict=True)
        wanted = [x for x, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(roots, wanted, gradients, allow_unused=True))
        return tuple(next(found) if need else None for need in needed)

    def _operator_gradients(self, *inputs: Any) -> tuple[Tensor, ...]:
        return _tuple(self._operators.backward(*inputs))

    def _gradients(self, *inputs: Any, dual: bool = False) -> tuple[Any, ...]:
        """The results of `backward` or `backward_dual`."""
        # With create_graph, the operator runs: it rejects second derivatives, where a launcher would omit them.
        direct = not torch.is_grad_enabled() and eager([x for x in inputs if isinstance(x, Tensor)])
        by: Any = self if direct else self._operators
        return _tuple((by.backward_dual if dual else by.backward)(*inputs))

    def _refuse(self, *_: Any) -> None:
        raise RuntimeError(
            f'second derivatives of {self.name} need plain PyTorch: use mfengine.ops.use_backend("torch")'
        )

    # ------------------------------------------------------------------------
    # Registration with PyTorch.

    def _register(self, options: dict[str, str]) -> _Operators:
        """Register an operator for each launcher, with its fake, autograd and FLOPs."""
        count, more = len(self.arguments), self._more
        rows, number, outputs = count - self.parameters, len(self.returned), len(self.outputs)

        def fake_dual(*inputs: Any, auxiliary: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
            primals, tangents, options = inputs[:count], inputs[count : 2 * count], inputs[2 * count :][:more]
            last = [x.new_empty(tangents[0].shape[0], *x.shape[1:]) for x in primals[:rows]]
            tangent = self.shapes(*last, *primals[rows:], *options)
            return (*self.shapes(*primals, *options), *tangent[:outputs], *(tangent[i] for i in auxiliary))

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            output = _tuple(output)
            dual = len(output) > number
            start = 2 * count if dual else count
            ctx.others = len(inputs) - start
            self._save(ctx, inputs, output, inputs[start:][:more], constant=dual and inputs[-1])

        def save_differentiable(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.others = more
            self._save(ctx, inputs, output, inputs[2 * count :], through=True)

        def differentiate(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            needed = ctx.needs_input_grad[: len(ctx.needs_input_grad) - ctx.others]
            return (*self._differentiate(ctx, gradients, needed), *[None] * ctx.others)

        def fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
            return tuple(inputs[i].new_empty(inputs[i].shape) for i in self._like)

        def fake_backward_dual(*inputs: Any) -> tuple[Tensor, ...]:
            tangents = inputs[len(self.saved) :][:count]
            return *fake_backward(*inputs), *(x.new_empty(x.shape) for x in _present(tangents, inputs[0]))

        tensors = [f"Tensor {name}" for name in self.arguments]
        tangents = [f"Tensor{'?' if i >= rows else ''} d{name}" for i, name in enumerate(self.arguments)]
        saved, gradients = [f"Tensor {x}" for x in self.saved], [f"Tensor? g{x}" for x in self.outputs]
        other = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in options.items()]
        forward = _operator(self.name, [*tensors, *other], number, self.forward, self.shapes)
        dual = _operator(
            f"{self.name}_dual",
            [*tensors, *tangents, *other, "bool constant"],
            number + outputs,
            lambda *inputs: self.dual(*inputs[:-1]),
            fake_dual,
        )
        differentiable_dual = _operator(
            f"{self.name}_differentiable_dual",
            [*tensors, *tangents, *other],
            number + outputs + len(self._auxiliary_dual),
            self.differentiable_dual,
            partial(fake_dual, auxiliary=self._auxiliary_dual),
        )
        backward = _operator(f"{self.name}_backward", [*saved, *gradients, *other], count, self.backward, fake_backward)
        for operator, setup in ((forward, save), (dual, save), (differentiable_dual, save_differentiable)):
            torch.library.register_autograd(operator, differentiate, setup_context=setup)
        torch.library.register_autograd(backward, self._refuse)
        backward_dual = None
        if (launch := self.backward_dual) is not None:
            read = [f"Tensor d{x}" for x in self.outputs] + [f"Tensor x{i}" for i in self._auxiliary_dual]
            backward_dual = _operator(
                f"{self.name}_backward_dual",
                [*saved, *tangents, *read, *gradients, *(f"Tensor? gd{x}" for x in self.outputs), *other],
                2 * count,
                lambda *inputs: _present(launch(*inputs), inputs[0]),
                fake_backward_dual,
            )
            torch.library.register_autograd(backward_dual, self._refuse)
        return _Operators(forward, dual, differentiable_dual, backward, backward_dual)

    def flop_formulas(self) -> dict[Any, Callable[..., int]]:
        """For each operator, its FLOPs as a function of its arguments, with shapes in place of tensors."""
        count, kept, more = len(self.arguments), len(self.saved) + len(self.outputs), self._more
        formula, through = self.flops, self.backward_dual_flops
        if formula is None:
            return {}

        def forward(*inputs: Any, **_: Any) -> int:
            return formula(*inputs)[0]

        def dual(*inputs: Any, **_: Any) -> int:
            primals, tangents, options = inputs[:count], inputs[count : 2 * count], inputs[2 * count :][:more]
            return formula(*primals, *options)[0] + formula(*tangents, *options)[1]

        def backward(*inputs: Any, **_: Any) -> int:
            return formula(*inputs[:count], *inputs[kept:])[2]  # `saved` begins with the arguments

        def backward_dual(*inputs: Any, **_: Any) -> int:
            assert through is not None
            return through(*inputs[:count], *inputs[len(self.saved) :][:count], *inputs[len(inputs) - more :])

        formulas = _Operators(forward, dual, dual, backward, backward_dual)
        pairs = zip(self._operators, formulas, strict=True)
        return {operator.overloadpacket: f for operator, f in pairs if operator is not None}


class _Operators(NamedTuple):
    """Operators of `torch.library`, named after the launchers that they run."""

    forward: Any
    dual: Any
    differentiable_dual: Any
    backward: Any
    backward_dual: Any


class _Node(torch.autograd.Function):
    """An op in eager PyTorch. A tuple hides constant tangents from autograd."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, tangents: Sequence[Any] | None, options: tuple[Any, ...], through: bool, *inputs: Any
    ) -> Any:
        constant = tangents is not None
        every = (*inputs, *tangents) if tangents is not None else inputs
        dual = op.differentiable_dual if through else op.dual
        returned = _tuple((dual if len(every) > len(op.arguments) else op.forward)(*every, *options))
        op._save(ctx, inputs, returned, options, constant, through)
        ctx.op = op
        return returned

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, None, None, None, *ctx.op._differentiate(ctx, gradients, ctx.needs_input_grad[4:])


def _operator(name: str, arguments: list[str], results: int, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator mfengine::name. For `torch.library`, a single result is not a tuple."""

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


def _present(tensors: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with an empty one for each None, which an operator cannot return."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
