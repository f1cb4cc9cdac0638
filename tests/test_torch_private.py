"""Each private name of PyTorch that mfengine uses is still needed: a failure here means that a public API exists."""

import inspect
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mfengine import torch_private
from mfengine.engine.storage import Reader


@pytest.mark.parametrize("public", [torch.compiler.assume_constant_result, torch.compiler.disable])
def test_the_public_way_still_imports_the_compiler(public):
    assert "import torch._dynamo" in inspect.getsource(public)


def test_active_transforms_and_modes_have_no_public_query():
    assert not [name for name in dir(torch.func) if not name.startswith("_") and ("active" in name or "level" in name)]
    assert not hasattr(torch.utils, "python_dispatch")
    forward_mode = [name for name in dir(torch.autograd.forward_ad) if not name.startswith("_")]
    assert not [name for name in forward_mode if "active" in name or "current" in name]


def test_forward_mode_is_detected():
    found = [torch_private.in_forward_mode()]
    with torch.autograd.forward_ad.dual_level():
        found.append(torch_private.in_forward_mode())
    assert [*found, torch_private.in_forward_mode()] == [False, True, False]


def test_transforms_and_modes_are_detected():
    seen = []

    def look(x):
        seen.append((torch_private.intercepted(), torch_private.transformed()))
        return x.sin()

    x = torch.ones(2)
    look(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(look)(x)
    torch.func.jvp(lambda x: torch.func.jvp(look, (x,), (x,))[1], (x,), (x,))
    with FlopCounterMode(display=False):
        look(x)
    assert seen == [(False, False), (True, False), (True, True), (True, True), (True, False)]


def test_backward_of_the_softmax_has_no_public_name():
    assert not [name for name in (*dir(torch), *dir(F)) if "softmax_backward" in name and not name.startswith("_")]
    p, g = torch.randn(3, 4).softmax(-1), torch.randn(3, 4)
    expected = p * (g - (p * g).sum(-1, keepdim=True))
    torch.testing.assert_close(torch_private.softmax_backward(g, p, -1, p.dtype), expected)


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


def test_private_names_are_only_in_torch_private():
    private = re.compile(
        r"(?:torch|fwad|functorch|aten)(?:\.\w+)*\._(?!_)\w+|^\s*from torch[\w.]*\._\w+ import|\._cdata\b", re.MULTILINE
    )
    package = Path(torch_private.__file__).parent
    found = {str(path.relative_to(package)): private.findall(path.read_text()) for path in package.rglob("*.py")}
    assert [name for name, uses in found.items() if uses] == ["torch_private.py"]


@pytest.mark.parametrize("name", ["foreach_lerp", "fused_adamw"])
def test_operations_on_many_tensors_have_no_public_name(name):
    assert not [public for public in dir(torch) if public.startswith(name)]


@pytest.mark.parametrize("module", ["python_dispatch", "pytree", "fake_tensor"])
def test_modes_and_fake_tensors_have_no_public_module(module):
    public = {name for place in (torch, torch.utils) for _, name, _ in pkgutil.iter_modules(place.__path__)}
    assert module not in public


def test_names_that_dcp_pickles_are_still_private(tmp_path):
    """A restricted unpickler needs only these and public names."""
    place, memory_format, layout = torch_private.checkpoint_names()
    assert [name for name in (place.__name__, memory_format.__name__, layout.__name__) if name[0] != "_"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        dcp.save({"x": torch.ones(2, 3), "y": {"z": b"bytes"}}, checkpoint_id=tmp_path, no_dist=True)
    Reader(tmp_path)


def test_storages_of_meta_tensors_have_no_public_identity():
    x, y = torch.empty(2, 3, device="meta")
    other = torch.empty(3, device="meta")
    assert torch_private.storage_key(x) == torch_private.storage_key(y) != torch_private.storage_key(other)
    assert x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() == 0
