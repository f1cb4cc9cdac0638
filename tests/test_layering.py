"""The layers of the package: imports go only to lower layers, without cycles; the engine names no network."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    {"configs", "device", "errors", "files", "pickles", "progress", "ranks", "torch_private"},
    {"kernels"},
    {"ops", "optim"},
    {"networks"},
    {"methods"},
    {"backend", "data", "evaluation"},
    {"engine"},
    {"__init__", "__main__", "cli", "convert", "evaluate", "export", "generate", "info", "report", "prepare", "train"},
)
"""Packages and modules of mfengine, from the bottom up; modules of one package may import each other freely."""


def modules(root):
    """{module: file} of the package mfengine in `root`."""
    files = [*(root / "mfengine").rglob("*.py"), *(root / "mfengine/kernels").rglob("*.py")]
    names = {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imports(file, known):
    """Modules of mfengine that a file imports, also inside functions, but not only for annotations."""
    found = set()
    tree = ast.parse(file.read_text())
    for guard in [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]:
        guard.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in inner}
    return {name for name in found if name in known}


def floor_of(module):
    part = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def violations(root):
    known = modules(root)
    graph = {name: imports(file, known) for name, file in known.items()}
    return graph, [(a, b) for a, bs in graph.items() for b in bs if floor_of(b) > floor_of(a)]


def test_imports_go_to_lower_layers_without_cycles():
    graph, upward = violations(ROOT)
    assert len(graph) > 50
    assert upward == []
    tuple(TopologicalSorter(graph).static_order())  # CycleError names a circle


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("networks/a.py", "from mfengine.engine import trainer"),
        ("ops/a.py", "def f():\n    import mfengine.networks"),
        ("engine/a.py", "from mfengine.train import main"),
        ("kernels/a.py", "from mfengine import errors, ops"),
    ],
)
def test_import_of_a_higher_layer_is_detected(tmp_path, place, line):
    for floor in ("networks", "ops", "engine", "kernels"):
        (tmp_path / "mfengine" / floor).mkdir(parents=True)
        (tmp_path / "mfengine" / floor / "__init__.py").touch()
    for name in ("engine/trainer.py", "train.py", "errors.py"):
        (tmp_path / "mfengine" / name).touch()
    assert violations(tmp_path)[1] == []
    (tmp_path / "mfengine" / place).write_text(line)
    assert len(violations(tmp_path)[1]) == 1


def test_cycle_is_detected(tmp_path):
    (tmp_path / "mfengine/ops").mkdir(parents=True)
    (tmp_path / "mfengine/ops/a.py").write_text("from mfengine.ops import b")
    (tmp_path / "mfengine/ops/b.py").write_text("def f():\n    import mfengine.ops.a")
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(violations(tmp_path)[0]).static_order())


def test_engine_names_no_network_and_no_objective():
    for file in (ROOT / "mfengine/engine").glob("*.py"):
        named = re.search(r"\b(DiT|ModelConfig)\b|MeanFlow|\"(dit|meanflow)\"|\.blocks\b", file.read_text())
        assert file.name == "presets.py" or not named, f"{file.name}: {named[0]}"
