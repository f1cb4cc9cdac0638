"""A block as one node of autograd's graph.

Autograd costs the host tens of microseconds per op. Inside a function decorated by `one_node`, ops run without it: each
records its own backward on a tape, and one node of the graph replays the tape in reverse. That node saves what the ops
need for their backward, so recomputation, FSDP2 and hooks on saved tensors see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfengine.ops.backend import fused
from mfengine.ops.dual import Dual, differentiable, primal_of
from mfengine.torch_private import in_forward_mode, intercepted, traced

_tape: Tape | None = None


def one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `forward` of a block, to make it one node of autograd's graph if fused kernels compute its duals.

    The arguments are tensors, duals or None. The forward may use only ops of `mfengine.ops` and parameters, and returns
    one tensor or dual, or a tuple of them. It runs undecorated with a graph but no dual, inside
    `differentiable_tangents`, on plain PyTorch, in forward mode and under torch.compile. Backward hooks of modules
    inside do not run.

    Raises:
        RuntimeError: an op inside gets a tensor that is not an argument, a parameter or the output of an op, so its
            gradient would be lost; or a backward runs with create_graph.
    """

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any) -> Any:
        records = torch.is_grad_enabled()
        if _tape is not None or torch.compiler.is_compiling() or traced() or in_forward_mode():
            return forward(self, *args)
        if records and (differentiable(explicit=True) or not any(isinstance(a, Dual) for a in args)):
            return forward(self, *args)
        primals = [primal_of(a) for a in args if a is not None]
        if not fused(*primals):
            return forward(self, *args)
        tape = Tape(primals, records)
        with torch.no_grad(), tape:
            result = forward(self, *args)
        if not records:
            return result
        results = result if type(result) is tuple else (result,)
        outputs = tape.finish([primal_of(r) for r in results])
        results = tuple(Dual(o, r.tangent) if isinstance(r, Dual) else o for o, r in zip(outputs, results, strict=True))
        return results if type(result) is tuple else results[0]

    return call


def recording() -> Tape | None:
    """The tape of the running block, on which ops record their backward."""
    return _tape


def eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether launchers may be called: all tensors have values, and nothing needs to see what runs."""
    if torch.compiler.is_compiling() or intercepted():
        return False
    return all(x is None or (type(x) in (Tensor, nn.Parameter) and not x.is_meta) for x in tensors)


class _Entry(NamedTuple):
    backward: Callable[..., Sequence[Tensor | None]]
    options: tuple[Any, ...]
    saved: list[int]
    inputs: list[int]
    outputs: list[int]


class Tape:
    """The ops of one block, in the order in which they ran. Tensors are numbered; saved tensors are numbered
    separately.

    Args:
        inputs: inputs of the block.
        records: whether a backward will follow. If not, nothing is recorded.
    """

    def __init__(self, inputs: Sequence[Tensor], records: bool) -> None:
        self.records = records
        self.eager = eager(inputs)
        self.entries: list[_Entry] = []
        self.saved: list[Tensor] = []
        self.leaves: list[Tensor] = []  # tensors that receive gradients
        self.leaf_numbers: list[int] = []
        self.output_numbers: list[int] = []
        self.count = 0
        self._tensors: list[Tensor] = []  # kept alive, so that their ids stay unique
        self._numbers: dict[int, int] = {}
        self._saved_numbers: dict[int, int] = {}
        if records:
            for x in inputs:
                self._add_leaf(x)

    def __enter__(self) -> None:
        global _tape
        _tape = self

    def __exit__(self, *_: object) -> None:
        global _tape
        _tape = None

    def record(
        self,
        backward: Callable[..., Sequence[Tensor | None]],
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        options: tuple[Any, ...] = (),
    ) -> None:
        """Record an op.

        Args:
            backward: (*saved, *gradients of the outputs, *options) -> a gradient, or None, for each input.
            inputs: primals; None for a missing one.
            outputs: primals.
            saved: tensors that the backward reads.
            options: options of the op.

        Raises:
            RuntimeError: an input is not an argument, parameter or output.
        """
        if self.records:
            numbers = [-1 if x is None else self._number(x) for x in inputs]
            self.entries.append(_Entry(backward, options, self._save(saved), numbers, [self._add(x) for x in outputs]))

    def finish(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, attached to a node. Releases what no backward needs."""
        self.output_numbers = [self._number(x) for x in outputs]
        self._tensors, self._numbers, self._saved_numbers = [], {}, {}
        leaves, self.leaves = self.leaves, []
        saved, self.saved = self.saved, []
        return _Node.apply(self, saved, outputs, *leaves)

    def replay(self, saved: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the leaves."""
        every: list[Tensor | None] = [None] * self.count
        for number, gradient in zip(self.output_numbers, gradients, strict=True):
            _accumulate(every, number, gradient)
        for backward, options, kept, inputs, outputs in reversed(self.entries):
            mine = [every[i] for i in outputs]
            for i in outputs:
                every[i] = None
            if any(g is not None for g in mine):
                found = backward(*[saved[i] for i in kept], *mine, *options)
                for number, gradient in zip(inputs, found, strict=True):
                    _accumulate(every, number, gradient)
        return [every[i] for i in self.leaf_numbers]

    def _number(self, x: Tensor) -> int:
        number = self._numbers.get(id(x))
        if number is not None:
            return number
        if isinstance(x, nn.Parameter):
            return self._add_leaf(x)
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} inside mfengine.ops.one_node is not an argument, a parameter or "
            "the output of an op of mfengine.ops"
        )

    def _add(self, x: Tensor) -> int:
        self._tensors.append(x)
        self._numbers[id(x)] = number = self.count
        self.count += 1
        return number

    def _add_leaf(self, x: Tensor) -> int:
        number = self._add(x)
        if x.requires_grad:
            self.leaves.append(x)
            self.leaf_numbers.append(number)
        return number

    def _save(self, tensors: Sequence[Tensor]) -> list[int]:
        numbers = []
        for x in tensors:
            number = self._saved_numbers.get(id(x))
            if number is None:
                self._saved_numbers[id(x)] = number = len(self.saved)
                self.saved.append(x)
            numbers.append(number)
        return numbers


def _accumulate(gradients: list[Tensor | None], number: int, gradient: Tensor | None) -> None:
    if gradient is not None and number >= 0:
        before = gradients[number]
        gradients[number] = gradient if before is None else before + gradient


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, saved: list[Tensor], outputs: Sequence[Tensor], *leaves: Tensor) -> Any:
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.tape = tape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'create_graph needs plain PyTorch for a block of fused ops: mfengine.ops.use_backend("torch")'
            )
        return (None, None, None, *ctx.tape.replay(ctx.saved_tensors, gradients))
