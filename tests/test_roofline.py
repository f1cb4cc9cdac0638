"""The roofline of a step: work counted by hand and by PyTorch's counter, and the command."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from conftest import run_command

from benchmarks.cases import Machine
from benchmarks.cases import step as step_case
from benchmarks.operators import Operator, Recorder, step_operators, total
from benchmarks.roofline import Assumptions, Roofline, markdown, predicted_seconds, roofline
from mfengine import MeanFlowConfig, ModelConfig
from mfengine.engine.config import OptimConfig
from mfengine.engine.distributed import parameter_groups
from mfengine.engine.flops import META, meta_network
from mfengine.engine.rates import data_sheet
from mfengine.methods import OBJECTIVES
from mfengine.ops import use_backend
from mfengine.ops.flops import FlopCounterMode

MODEL = ModelConfig(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=17)
METHOD = MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.75)
H200 = data_sheet("h200")
ASSUMED = Assumptions()


@pytest.fixture(scope="module")
def found():
    return roofline(MODEL, METHOD, 8, "h200")


def recorded(call):
    with Recorder() as recorder:
        call()
    return recorder.operators


def cost(operator):
    return Roofline(H200, ASSUMED, 1, Counter(), Counter()).cost(operator)


def bounds_of(operator):
    return Roofline(H200, ASSUMED, 1, Counter([operator]), Counter()).bounds


def test_flops_add_up_to_the_counter_of_pytorch(found):
    network, objective, shape = meta_network(MODEL, torch.bfloat16), OBJECTIVES.build(METHOD), (8, *MODEL.latent_shape)
    draws = objective.draw(shape, torch.Generator().manual_seed(0), META)
    labels = torch.empty(8, dtype=torch.int64, device=META)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        objective.loss(network, torch.empty(shape, device=META), labels, draws)[0].backward()
    assert found.flops == counter.get_total_flops()
    assert sum(n * o.flops for o, n in found.operators.items() if o.kind in ("product", "attention")) == found.flops


def test_product_by_hand():
    """256 tiles are 1.94 waves of 132 and take as long as 2; the bytes take less time."""
    a, b = (torch.empty(2048, 2048, device=META, dtype=torch.bfloat16) for _ in range(2))
    ((operator, n),) = recorded(lambda: a @ b).items()
    assert n == 1
    assert operator == Operator(
        phase="guidance", kind="product", name="aten::mm", shapes="2 * bf16[2048,2048] -> bf16[2048,2048]",
        dtype="bf16", flops=2 * 2048**3, read=2 * 2 * 2048**2, written=2 * 2048**2, tiles=256, launches=1,
    )  # fmt: skip
    seconds, bound, waves = cost(operator)
    assert waves == pytest.approx(256 / 132)
    assert bound == "product"
    needed = 2 * 2048**3 / (0.8 * 989.4e12)
    assert seconds == pytest.approx(needed * 264 / 256)
    assert bounds_of(operator) == pytest.approx(
        {"product": needed, "last wave": needed * 8 / 256, "memory": 0, "launch": 0}
    )


def test_float32_products_do_not_run_at_the_rate_of_bfloat16():
    a = torch.empty(1024, 1024, device=META)
    (operator,) = recorded(lambda: a @ a)
    assert cost(operator).seconds > 10 * 2 * 1024**3 / 989.4e12


@pytest.mark.parametrize(
    ("call", "read", "written"),
    [
        (lambda x: x + 1, 4096, 4096),
        (lambda x: x.add_(1), 4096, 4096),
        (lambda x: x.copy_(x[:1].expand(32, 32)), 128, 4096),  # overwritten data is not read, and repeats are read once
        (lambda x: x.bfloat16(), 4096, 2048),
        (lambda x: torch.add(x, 1, out=torch.empty(32, 32, device=META)), 4096, 4096),
    ],
    ids=["new", "in place", "copy", "cast", "out"],
)
def test_bytes_by_hand(call, read, written):
    operators = [o for o in recorded(lambda: call(torch.empty(32, 32, device=META))) if o.launches]
    assert [(o.read, o.written) for o in operators] == [(read, written)]


def test_view_costs_only_host_time(found):
    x = torch.empty(32, 32, device=META)
    (operator,) = recorded(lambda: x.t())
    assert (operator.kind, operator.read, operator.launches, cost(operator).seconds) == ("view", 0, 0, 0.0)
    assert sum(found.dispatched.values()) == found.operators.total()
    assert found.host["forward"] == pytest.approx(
        (5 * found.dispatched["forward"] + 10 * found.launches["forward"]) * 1e-6
    )


def test_small_kernel_takes_the_minimum_time():
    x = torch.empty(4, device=META)
    (operator,) = recorded(x.neg)
    assert cost(operator)[:2] == (2.5e-6, "launch")


@pytest.mark.parametrize(("decays", "expected"), [((0.9,), 34), ((0.9, 0.99), 42)])
def test_optimizer_traffic_matches_the_cuda_library(decays, expected):
    """The gradient twice, in bfloat16 if products take the parameter. Per parameter, the weight, moments and averages
    are read once and written once, 4 bytes each, and the copy is written, 2 bytes.
    """
    network = meta_network(MODEL, torch.bfloat16)
    gradients = sum(p.numel() * unit.dtype.itemsize for unit, group in parameter_groups(network) for p in group)
    operators, _ = step_operators(MODEL, METHOD, 8, OptimConfig(ema_decays=decays))
    moved = Counter()
    for operator in operators:
        moved[operator.name] += operator.read + operator.written
    assert moved["mfengine::sum_of_squares"] == gradients
    assert moved["mfengine::adamw_ema"] == gradients + expected * sum(p.numel() for p in network.parameters())


def test_passes_add_up_to_the_device(found):
    passes = {name: sum(kinds.values()) for name, kinds in found.kinds.items()}
    assert passes["primal"] + passes["tangent"] == pytest.approx(found.device["forward"])
    assert sum(passes.values()) == pytest.approx(sum(found.device.values()))
    assert min(passes.values()) > 0
    assert 0 < total(found.primal, "flops") < total(found.operators, "flops", phase="forward")
    flow = roofline(MODEL, MeanFlowConfig(interval_share=0.0), 8, "h200")
    assert total(flow.primal, "flops") == total(flow.operators, "flops", phase="forward")
    assert sum(found.bounds.values()) == pytest.approx(sum(found.device.values()))
    assert found.seconds >= max(sum(found.device.values()), sum(found.host.values()))
    assert found.samples_per_s == pytest.approx(8 / found.seconds)


def test_measured_host_replaces_the_modelled_one(found):
    given = dataclasses.replace(found, measured_host=0.5)
    assert sum(given.host.values()) == pytest.approx(0.5)
    assert given.seconds == pytest.approx(0.5)


def test_gathered_parameters_are_not_cast():
    alone, gathered = (step_operators(MODEL, METHOD, 8, gathered=g)[0] for g in (False, True))
    assert sum(n for o, n in gathered.items() if o.name == "aten::_to_copy") < sum(
        n for o, n in alone.items() if o.name == "aten::_to_copy"
    )


def test_step_of_a_gpu_run_is_predicted(tmp_path):
    rehearsal = step_case(Machine(torch.device("cpu"), tmp_path, rehearse=True), "xl2", 4, "guided")
    assert rehearsal.row("mfengine", [0.1]).predicted > 0
    assert rehearsal.row("port", [0.1]).predicted == 0
    assert predicted_seconds(MODEL, METHOD, 8, "NVIDIA GeForce GTX 1080") == 0


def command(*args, tmp_path):
    return run_command("benchmarks.roofline", *args, cwd=tmp_path)


def test_command_writes_every_operator(tmp_path):
    args = ("digits", "--rows", "8", "16", "--gpu", "a100", "--host-ms", "40", "--json", "out.json")
    done = command(*args, tmp_path=tmp_path)
    assert done.returncode == 0
    assert "## digits, 8 rows on one A100" in done.stdout
    assert "108 multiprocessors" in done.stdout
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert first["rows"] == 8
    assert sum(first["host"].values()) == pytest.approx(0.04)
    assert second["flops"] > first["flops"]
    for one in (first, second):
        assert sum(row["count"] for row in one["operators"]) == sum(one["dispatched"].values())
        assert sum(row["total"] for row in one["operators"]) == pytest.approx(sum(one["device"].values()))
        assert sum(row["count"] * row["flops"] for row in one["operators"]) == one["flops"]


def test_table_has_the_largest_operators_first(found):
    lines = markdown(found, "small", "h200").rpartition("largest operators:\n\n")[2].splitlines()[2:]
    shares = [float(line.split("|")[-2].strip().rstrip("%")) for line in lines]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("xl3",), "there is no preset xl3; the nearest is xl2"),
        (("b2", "--gpu", "h400"), "unknown GPU h400; known are gb200, b200, "),
        (("b2", "--rows", "3"), "does not divide a local batch of 3"),
        (("b2", "--rows", "0"), "must be positive"),
        (("b2", "--rows", "many"), "invalid int value"),
        (("b2", "--json", "nowhere/out.json"), "cannot write nowhere/out.json: the folder nowhere does not exist"),
    ],
)
def test_bad_arguments_are_one_line(args, message, tmp_path):
    done = command(*args, tmp_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
