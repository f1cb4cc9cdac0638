"""Cases computed with the authors' own JAX code; `tests/golden/README.md` describes each array."""

import ast
from pathlib import Path

import numpy as np
import torch

from mfengine import (
    DiT,
    Draws,
    IMFDiT,
    IMFDiTConfig,
    ImprovedDraws,
    ImprovedMeanFlow,
    ImprovedMeanFlowConfig,
    MeanFlow,
    MeanFlowConfig,
    ModelConfig,
)
from mfengine.convert import from_jax, from_jax_imf

NAMES = ("guided_kappa", "guided_omega_train", "unguided")
IMPROVED_NAMES = ("imf_train", "imf_beta")


def golden_case(name):
    return (ImprovedCase if name in IMPROVED_NAMES else GoldenCase)(name)


class GoldenCase:
    """One file: a model, a method, and the inputs and results of the authors' code."""

    convert = staticmethod(from_jax)
    intermediate = ("v_g", "u", "du_dt")
    figures = ("v_loss",)

    def __init__(self, name):
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.cfg = ast.literal_eval(str(self.arrays["cfg"]))
        self.build()
        self.model.load_state_dict(self.parameters("params"))

    def build(self):
        cfg = self.cfg
        self.model = DiT(
            ModelConfig(
                cfg["size"], cfg["patch"], 4, cfg["hidden"], cfg["depth"], cfg["heads"], num_classes=cfg["classes"]
            )
        )
        guidance = {k: cfg[k] for k in ("omega", "kappa", "t_start", "t_end")} if cfg["guidance"] else {}
        self.method = MeanFlow(
            MeanFlowConfig(**guidance, interval_share=1 - cfg["data_proportion"], norm_p=cfg["norm_p"])
        )
        self.conditions = {}

    def parameters(self, prefix):
        """The tree under `prefix` as a state dict."""
        leaves = {k.removeprefix(prefix + "/"): v for k, v in self.arrays.items() if k.startswith(prefix + "/")}
        return self.convert(leaves)

    def image(self, key):
        """An array (B, H, W, C) as a tensor (B, C, H, W)."""
        return torch.from_numpy(self.arrays[key]).permute(0, 3, 1, 2).contiguous()

    def batch(self, prefix):
        """Latents, labels and draws of `in` or `step{i}`."""
        labels = torch.from_numpy(self.arrays[f"{prefix}/y"]).long()
        return self.image(f"{prefix}/x"), labels, self.draws(prefix)

    def draws(self, prefix):
        times = torch.sigmoid(torch.stack([self.column(f"{prefix}/{n}") for n in ("n1", "n2")]) - 0.4)
        t, r = times.amax(0), times.amin(0)
        r[: self.num_instant] = t[: self.num_instant]
        return Draws(t, r, self.image(f"{prefix}/e"), int((self.arrays[f"{prefix}/drop"] < 0.1).sum()))

    def column(self, key):
        return torch.from_numpy(self.arrays[key]).flatten()

    @property
    def num_instant(self):
        return int(len(self.arrays["in/y"]) * self.cfg["data_proportion"])


class ImprovedCase(GoldenCase):
    """A case of improved MeanFlow."""

    convert = staticmethod(from_jax_imf)
    intermediate = ("v_g", "v_c", "u", "v", "du_dt")
    figures = ("loss_u", "loss_v")

    def build(self):
        cfg = self.cfg
        self.model = IMFDiT(
            IMFDiTConfig(
                *(cfg["size"], cfg["patch"], 4, cfg["hidden"], cfg["depth"], cfg["heads"]),
                num_classes=cfg["classes"],
                head_depth=cfg["aux"],
            )
        )
        share = 1 - cfg["data_proportion"]
        self.method = ImprovedMeanFlow(
            ImprovedMeanFlowConfig(interval_share=share, omega_beta=cfg["cfg_beta"], norm_p=cfg["norm_p"])
        )
        self.conditions = {name: float(self.arrays[f"sample/{name}"]) for name in ("omega", "t_min", "t_max")}

    def draws(self, prefix):
        t_min, t_max = 0.5 * self.column(f"{prefix}/u_tmin"), 0.5 + 0.5 * self.column(f"{prefix}/u_tmax")
        t_min[: self.num_instant], t_max[: self.num_instant] = 0, 1
        omega = self.method.config.draw_omega(self.column(f"{prefix}/u_omega"))
        return ImprovedDraws(*super().draws(prefix), omega, t_min, t_max)


def relative_error(actual, expected):
    """Frobenius norm of the difference over that of `expected`."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
