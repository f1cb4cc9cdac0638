"""Reports of a run during training: its health, its progress, and its tracker."""

import json
import sys
import time
from types import ModuleType

import pytest
import torch
from conftest import SMALL, run_command

from mfengine import DiT, IMFDiT, IMFDiTConfig, ImprovedMeanFlow, ImprovedMeanFlowConfig, MeanFlow, MeanFlowConfig
from mfengine.data.loader import Loader
from mfengine.engine.config import OptimConfig
from mfengine.engine.health import WeightHealth
from mfengine.engine.optim import adamw_ema
from mfengine.engine.telemetry import METRICS, Telemetry
from mfengine.networks import ModelConfig
from mfengine.ranks import World

SIZE = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
CPU = torch.device("cpu")


def read_metrics(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


# ----------------------------------------------------------------------------
# Health.


@pytest.fixture(params=["meanflow", "improved"])
def step(request):
    """(network, objective, loss, metrics, draws) for twelve guided rows."""
    torch.manual_seed(0)
    if request.param == "meanflow":
        model, method = DiT(ModelConfig(**SIZE, num_classes=3)), MeanFlow(MeanFlowConfig(omega=2.0, t_end=0.7))
    else:
        model = IMFDiT(IMFDiTConfig(**SIZE, num_classes=3, head_depth=1))
        method = ImprovedMeanFlow(ImprovedMeanFlowConfig())
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    shape = (12, 1, 8, 8)
    draws = method.draw(shape, torch.Generator().manual_seed(3))
    return model, method, *method.loss(model, torch.randn(shape), torch.arange(12) % 3, draws), draws


def test_scalar_metrics_and_tensors_are_separate(step):
    _, _, loss, metrics, _ = step
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert torch.equal(metrics["loss"], loss.detach())
    assert metrics["u"] is metrics.tensors["u"]
    assert metrics["u"].shape == (12, 1, 8, 8)
    assert len(repr(metrics)) < 200
    with pytest.raises(KeyError):
        metrics["w"]


def test_health_splits_rows_by_kind(step):
    _, method, loss, metrics, draws = step
    sums, weights = method.health(loss, metrics, draws)
    figures = {name: value / n for (name, n), value in zip(weights.items(), sums.tolist(), strict=True) if n}
    row = next(name for name in ("v_loss", "error_u") if name in metrics.tensors)
    kinds = {
        "instant": draws.t == draws.r,
        "interval": draws.t > draws.r,
        "t_low": draws.t < 1 / 3,
        "t_middle": (draws.t >= 1 / 3) & (draws.t < 2 / 3),
        "t_high": draws.t >= 2 / 3,
    }
    for kind, rows in kinds.items():
        assert figures[f"share_{kind}"] == pytest.approx(float(rows.float().mean())), kind
        if rows.any():
            assert figures[f"{row}_{kind}"] == pytest.approx(float(metrics[row][rows].mean())), kind
    assert figures["share_dropped"] == draws.num_dropped / 12
    assert figures["du_dt_norm"] == pytest.approx(float(metrics["du_dt"].flatten(1).norm(dim=1).mean()))
    assert figures["loss"] == pytest.approx(loss.item())


def test_weight_health_matches_the_step(step):
    model, _, loss, _, _ = step
    optimizer = adamw_ema(model, OptimConfig(lr=1e-3))
    health = WeightHealth(model, optimizer, World(0, 1, CPU), replicas=1)
    assert health.read() == {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss.backward()
    optimizer.step()
    health.measure()
    figures = health.read()
    name, block = next((name, m) for name, m in model.named_modules() if name.endswith("blocks.0"))
    weights = {f"{name}.{key}": p.detach() for key, p in block.named_parameters()}
    norm = torch.cat([p.flatten() for p in weights.values()]).norm()
    update = torch.cat([(p - before[key]).flatten() for key, p in weights.items()]).norm()
    assert figures[f"weight_norm/{name}"] == pytest.approx(float(norm), rel=1e-5)
    assert figures[f"update_ratio/{name}"] == pytest.approx(float(update / norm), rel=1e-3)
    assert health.read() == {}  # each measurement is returned once


def test_slow_loader_shows_as_data_wait(digits, tmp_path, monkeypatch):
    draw = Loader.draw

    def slow(self, generator):
        time.sleep(0.05)
        return draw(self, generator)

    monkeypatch.setattr(Loader, "draw", slow)
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=10", "--tracker=none")
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = read_metrics(tmp_path / "runs/digits")
    assert min(first["data_wait_ms"], last["data_wait_ms"]) >= 50
    assert last["host_ms"] > 0
    assert last["grad_norm"] > 0
    assert 0 < last["update_ratio/blocks.0"] < 1
    assert not (tmp_path / "runs/digits/tensorboard").exists()
    assert [line for line in done.stderr.splitlines() if line.startswith("step 5/10: v_loss=")]
    assert "\r" not in done.stderr  # no bar unless stderr is a terminal


# ----------------------------------------------------------------------------
# Progress and trackers.


def test_means_are_over_rows_not_over_steps(tmp_path):
    """A step weighs as much as its rows of a kind; without any, or if it is not finite, it does not count."""
    with Telemetry(tmp_path, True, 0, 4, 32, lambda: 1e9, shown=("a",), tracker="none") as reports:
        for total, weight in ((2.0, 2.0), (9.0, 1.0), (0.0, 0.0), (float("nan"), 5.0)):
            reports.step({"a": (total, weight), "b": (0.0, 0.0)})
        reports.log(4, 0.5, 1e-4, 0)
    (line,) = read_metrics(tmp_path)
    assert line["a"] == pytest.approx(11 / 3)
    assert line["b"] is None


def test_bar_shows_steps_and_main_metrics_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Telemetry(tmp_path, True, 0, 2, 32, lambda: 1e9, shown=("v_loss", "loss"), tracker="none") as reports:
        reports.figure(0, "frechet_1nfe", 17.6)
        for _ in range(2):
            time.sleep(0.25)  # the bar is redrawn after 0.2 s
            reports.step({"loss": (0.99, 1.0), "v_loss": (6.0, 2.0)})
        reports.log(2, 1.0, 1e-4, 0)
    err = capsys.readouterr().err
    assert "2/2" in err
    assert "v_loss=3, loss=0.99, frechet_1nfe=17.6" in err
    assert "step 2/2" not in err


def test_wandb_gets_the_same_metrics(tmp_path, monkeypatch):
    told = []

    class Run:
        log = staticmethod(lambda values, step: told.append((step, values)))
        finish = staticmethod(lambda: told.append("finished"))

    wandb = ModuleType("wandb")
    wandb.init = lambda **options: told.append(options) or Run
    wandb.Image = lambda image, caption: (tuple(image.shape), caption)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    facts = {"version": "1", "config": {"seed": 0}}
    with Telemetry(tmp_path, True, 0, 2, 32, lambda: 1e9, tracker="wandb", facts=facts) as reports:
        reports.figure(1, "frechet_1nfe", 17.6)
        reports.picture(1, torch.zeros(4, 3, 8, 8), "one step")
    options, figure, picture, end = told
    assert options["config"] == facts
    assert figure == (1, {"frechet_1nfe": 17.6})
    assert picture == (1, {"samples": ((3, 475, 475), "one step")})  # 19 pixels, enlarged
    assert end == "finished"
