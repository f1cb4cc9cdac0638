"""Cases computed by the paper's own JAX code; `tests/golden/README.md` says what each array is."""

import ast
from pathlib import Path

import numpy as np
import torch

from mfengine import DiT, Draws, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.convert import from_jax

NAMES = ("guided_kappa", "guided_omega_train", "unguided")


class GoldenCase:
    """One file: the model, the method and the inputs it was computed with."""

    def __init__(self, name):
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.cfg = cfg = ast.literal_eval(str(self.arrays["cfg"]))
        self.model = DiT(
            ModelConfig(
                cfg["size"], cfg["patch"], 4, cfg["hidden"], cfg["depth"], cfg["heads"], num_classes=cfg["classes"]
            )
        )
        self.model.load_state_dict(self.parameters("params"))
        guidance = {k: cfg[k] for k in ("omega", "kappa", "t_start", "t_end")} if cfg["guidance"] else {}
        self.method = MeanFlow(
            MeanFlowConfig(**guidance, interval_share=1 - cfg["data_proportion"], norm_p=cfg["norm_p"])
        )

    def parameters(self, prefix):
        """The tree under `prefix` as a state dict."""
        return from_jax({k.removeprefix(prefix + "/"): v for k, v in self.arrays.items() if k.startswith(prefix + "/")})

    def image(self, key):
        """An array (B, H, W, C) as a tensor (B, C, H, W)."""
        return torch.from_numpy(self.arrays[key]).permute(0, 3, 1, 2).contiguous()

    def batch(self, prefix):
        """Latents, labels and draws of `in` or `step{i}`."""
        times = torch.sigmoid(
            torch.stack([torch.from_numpy(self.arrays[f"{prefix}/{n}"]).flatten() for n in ("n1", "n2")]) - 0.4
        )
        t, r = times.amax(0), times.amin(0)
        instant = int(len(t) * self.cfg["data_proportion"])
        r[:instant] = t[:instant]
        num_dropped = int((self.arrays[f"{prefix}/drop"] < 0.1).sum())
        labels = torch.from_numpy(self.arrays[f"{prefix}/y"]).long()
        return self.image(f"{prefix}/x"), labels, Draws(t, r, self.image(f"{prefix}/e"), num_dropped)


def relative_error(actual, expected):
    """Frobenius norm of the difference over that of `expected`."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
