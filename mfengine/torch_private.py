"""All private PyTorch that mfengine uses, each with its reason. tests/test_torch_private.py fails when one can go."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["FakeTensorMode", "TorchDispatchMode", "tree_leaves"]
# Fake tensors, modes that see every operator, and the tensors of nested results are documented in PyTorch's notes on
# extending it, but have no public module.

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_for_compiler(function: _Function) -> _Function:
    """Let torch.compile call a function while it traces, and take the result as a constant.

    This is `torch.compiler.assume_constant_result` without the import of the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_for_compiler  # the compiler guards on the transforms that are active
def transformed() -> bool:
    """Whether transforms of `torch.func` other than a single jvp are active. `torch.func` does not tell."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return len(stack) > 1 or any(level.key() != torch._C._functorch.TransformType.Jvp for level in stack)


def traced() -> bool:
    """Whether a transform of `torch.func` or torch.compile must see every operator. The compiler also looks at the
    functions that a frame calls that it could not compile. PyTorch does not tell.
    """
    compiler = torch._C._dynamo.eval_frame.get_eval_frame_callback()
    return torch._C._are_functorch_transforms_active() or bool(compiler)


def in_forward_mode() -> bool:
    """Whether tensors may be duals of `torch.autograd.forward_ad`, which does not tell."""
    return forward_ad._current_level >= 0


def intercepted() -> bool:
    """Whether anything must see every operator: `traced`, or a `TorchDispatchMode`. PyTorch does not tell."""
    return torch._C._len_torch_dispatch_stack() > 0 or traced()


uncompiled = _disable_dynamo
"""Decorator: torch.compile leaves the function alone. As `torch.compiler.disable`, but without its import of the
compiler."""

foreach_add, foreach_copy, foreach_lerp = torch._foreach_add_, torch._foreach_copy_, torch._foreach_lerp_
foreach_div, foreach_norm, foreach_sqrt = torch._foreach_div, torch._foreach_norm, torch._foreach_sqrt
foreach_sub = torch._foreach_sub
fused_adamw, fused_sgd = torch._fused_adamw_, torch._fused_sgd_
"""One operation on many tensors in few launches. `torch.optim` runs on these, but offers no average of weights, and no
step that a flag on the device leaves out."""

softmax_backward = torch.ops.aten._softmax_backward_data
"""(gradient, softmax, dim, dtype) -> P * (gradient - rowsum(P * gradient)), in one pass over memory, not three."""


def storage_key(x: Tensor) -> int:
    """The same for two tensors if they share memory; on the meta device too, where data pointers are 0."""
    return x.untyped_storage()._cdata


def checkpoint_names() -> tuple[Any, Any, Any]:
    """What DCP pickles into the list of a checkpoint's contents under private names: where a tensor lies, and how its
    layout and memory format are told. A restricted unpickler has to know them.
    """
    # Here, since it takes a second to import, and operators need none of it.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
    from torch.serialization import _get_layout

    return _StorageInfo, _MEM_FORMAT_ENCODING, _get_layout


def multi_head_attention_forward(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`F.multi_head_attention_forward` on another `scaled_dot_product_attention`.

    PyTorch hides a `TorchFunctionMode` from the body of a function that the mode calls. So the body gets a
    global of ours.
    """
    names = {**vars(F), "scaled_dot_product_attention": attention}
    del names["__name__"]  # torch.compile would look for globals in the module of that name
    original = F.multi_head_attention_forward
    return FunctionType(original.__code__, names, argdefs=original.__defaults__)
