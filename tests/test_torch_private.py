"""Each private name of PyTorch that mfengine uses is still needed: a failure here says that a public way has come."""

import inspect

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mfengine import torch_private


def test_marking_a_constant_still_imports_the_compiler():
    assert "import torch._dynamo" in inspect.getsource(torch.compiler.assume_constant_result)


def test_active_transforms_and_modes_cannot_be_asked_for():
    public = {name for module in (torch.func, torch.overrides) for name in dir(module) if not name.startswith("_")}
    assert not [name for name in public if "active" in name or "stack" in name or "transform" in name]
    assert not hasattr(torch.utils, "python_dispatch")


def test_transforms_and_modes_are_noticed():
    seen = []

    def look(x):
        seen.append((torch_private.intercepted(), torch_private.transformed()))
        return x.sin()

    x = torch.ones(2)
    look(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(look)(x)
    torch.func.jvp(lambda x: torch.func.jvp(look, (x,), (x,))[1], (x,), (x,))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        look(x)
    assert seen == [(False, False), (True, False), (True, True), (True, True), (True, False)]


def test_a_mode_is_still_hidden_from_multi_head_attention():
    calls = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(1, 2, 4)
    with Mode():
        torch.nn.MultiheadAttention(4, 1, batch_first=True)(x, x, x, need_weights=False)
    assert F.multi_head_attention_forward in calls
    assert F.scaled_dot_product_attention not in calls
