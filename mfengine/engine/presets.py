"""Presets: configurations by name. To add one from outside: `PRESETS["mine"] = ("description", config)`."""

from __future__ import annotations

from pathlib import Path

from mfengine.engine.config import OptimConfig, TrainConfig
from mfengine.methods import ImprovedMeanFlowConfig, MeanFlowConfig
from mfengine.networks import IMFDiTConfig, ModelConfig


def _imagenet(name: str, patch: int, width: int, depth: int, heads: int, epochs: int, **guidance: float) -> TrainConfig:
    """A configuration of arXiv 2505.13447: ImageNet latents of 4 x 32 x 32."""
    return TrainConfig(
        data=Path("data/imagenet256"),
        name=name,
        model=ModelConfig(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads),
        method=MeanFlowConfig(**guidance),
        epochs=epochs,
        normalisation="sd",
    )


def _small(size: int, patch: int) -> tuple[str, TrainConfig]:
    """DiT-S (arXiv 2212.09748) for your own data."""
    return (
        f"your own latents, {size} x {size}: 33 M parameters, patches of {patch} x {patch}",
        TrainConfig(
            name=f"small-{size}",
            model=ModelConfig(input_size=size, patch_size=patch, hidden_size=384, depth=12, num_heads=6),
            method=MeanFlowConfig(),
        ),
    )


def _improved(name: str, width: int, depth: int, heads: int, omega: float, t_min: float, t_max: float) -> TrainConfig:
    """A configuration of arXiv 2512.02012: ImageNet latents of 4 x 32 x 32."""
    return TrainConfig(
        data=Path("data/imagenet256"),
        name=name,
        model=IMFDiTConfig(hidden_size=width, depth=depth, num_heads=heads),
        method=ImprovedMeanFlowConfig(omega=omega, t_min=t_min, t_max=t_max),
        optim=OptimConfig(warmup_epochs=10),
        batch_size=1024,
        epochs=640,
        normalisation="sd-vae-ft-mse",
    )


_AS_B2 = "640 epochs (trained like imf-b2: its own settings are not published)"

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "digits": (
        "the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels: minutes on two CPU cores",
        TrainConfig(
            data=Path("data/digits"),
            name="digits",
            model=ModelConfig(8, 4, 1, hidden_size=128, depth=4, num_heads=4, num_classes=10),
            method=MeanFlowConfig(),
            optim=OptimConfig(lr=2e-3, ema_decays=(0.995,)),
            batch_size=256,
            epochs=214,
            log_every=25,
            sample_every=500,
            evaluate_every=250,
            checkpoint_every=250,
        ),
    ),
    "small-8": _small(8, 1),
    "small-16": _small(16, 2),
    "small-32": _small(32, 2),
    "b4": ("ImageNet 256, 131 M parameters, 80 epochs", _imagenet("b4", 4, 768, 12, 12, 80, omega=1.0, kappa=0.5)),
    "b2": ("ImageNet 256, 131 M parameters, 240 epochs", _imagenet("b2", 2, 768, 12, 12, 240, omega=1.0, kappa=0.5)),
    "m2": (
        "ImageNet 256, 308 M parameters, 240 epochs (guidance as in b2: the published one is unconfirmed)",
        _imagenet("m2", 2, 1024, 16, 16, 240, omega=1.0, kappa=0.5),
    ),
    "l2": (
        "ImageNet 256, 459 M parameters, 240 epochs",
        _imagenet("l2", 2, 1024, 24, 16, 240, omega=0.2, kappa=0.92, t_end=0.8),
    ),
    "xl2": (
        "ImageNet 256, 676 M parameters, 240 epochs",
        _imagenet("xl2", 2, 1152, 28, 16, 240, omega=0.2, kappa=0.92, t_end=0.75),
    ),
    "xl2-plus": (
        "ImageNet 256, 676 M parameters, 1000 epochs (guidance as in xl2: the published one is unconfirmed)",
        _imagenet("xl2-plus", 2, 1152, 28, 16, 1000, omega=0.2, kappa=0.92, t_end=0.75),
    ),
    "digits-imf": (
        "the digits, with improved MeanFlow: minutes on two CPU cores",
        TrainConfig(
            data=Path("data/digits"),
            name="digits-imf",
            model=IMFDiTConfig(
                *(8, 8, 1),
                hidden_size=128,
                depth=2,
                num_heads=4,
                num_classes=10,
                head_depth=1,
                class_tokens=1,
                omega_tokens=1,
                interval_tokens=1,
                time_tokens=1,
            ),
            method=ImprovedMeanFlowConfig(
                interval_share=0.75,
                norm_p=0.5,
                logit_mean=-0.8,
                logit_std=1.2,
                omega_max=2.0,
                omega=1.5,
                t_min=0.2,
                t_max=0.8,
            ),
            optim=OptimConfig(lr=1.5e-2, schedule="cosine", warmup_epochs=5, ema_decays=(0.995,)),
            batch_size=128,
            epochs=130,
            log_every=25,
            sample_every=500,
            checkpoint_every=500,
        ),
    ),
    "imf-b2": (
        "ImageNet 256, improved MeanFlow, 89 M parameters (training: 146 M), 640 epochs",
        _improved("imf-b2", 768, 12, 12, 8.0, 0.4, 0.65),
    ),
    "imf-m2": (
        f"ImageNet 256, improved MeanFlow, 174 M parameters (training: 231 M), {_AS_B2}",
        _improved("imf-m2", 768, 24, 12, 10.5, 0.4, 0.6),
    ),
    "imf-l2": (
        f"ImageNet 256, improved MeanFlow, 409 M parameters (training: 510 M), {_AS_B2}",
        _improved("imf-l2", 1024, 32, 16, 10.5, 0.4, 0.6),
    ),
    "imf-xl2": (
        f"ImageNet 256, improved MeanFlow, 610 M parameters (training: 711 M), {_AS_B2}",
        _improved("imf-xl2", 1024, 48, 16, 8.0, 0.42, 0.62),
    ),
}
