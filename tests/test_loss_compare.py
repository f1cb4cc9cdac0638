"""The comparison of losses and weights of two runs."""

import pytest
import torch

from benchmarks.loss_compare import Side, compare, main


def test_differences_are_relative_and_say_where():
    a = Side({"loss": [1.0, 2.0, 4.0]}, {"w": torch.tensor([3.0, 4.0])})
    b = Side({"loss": [1.0, 2.2, 4.0], "v_loss": [0.0]}, {"w": torch.tensor([3.0, 4.5])})
    assert compare(a, b) == {"loss, largest at step 2": pytest.approx(0.1), "weights": pytest.approx(0.1)}
    nan = Side({"loss": [1.0, float("nan"), 4.0]}, {})
    assert not compare(a, nan)["loss, largest at step 2"] <= 1e9


@pytest.mark.slow
@pytest.mark.parametrize(("options", "code"), [("--method.norm-p 1.0", 0), ("--optim.lr=1e-2", 1)])
def test_sides_are_trained_and_compared(options, code, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["loss_compare", "--baseline=", f"--test={options}", "--steps=3"])
    assert main() == code
    assert "weights: " in capsys.readouterr().out
