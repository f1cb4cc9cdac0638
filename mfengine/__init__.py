"""mfengine: training and sampling of MeanFlow models, one-step image generators (arXiv 2505.13447, 2512.02012)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mfengine import ops
from mfengine.backend import accelerate, jvp_attention
from mfengine.methods import (
    Draws,
    ImprovedDraws,
    ImprovedMeanFlow,
    ImprovedMeanFlowConfig,
    MeanFlow,
    MeanFlowConfig,
    sample,
)
from mfengine.networks import DiT, IMFDiT, IMFDiTConfig, ModelConfig

if TYPE_CHECKING:
    from mfengine import convert, optim
    from mfengine.engine.weights import load

__all__ = [
    "DiT",
    "Draws",
    "IMFDiT",
    "IMFDiTConfig",
    "ImprovedDraws",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowConfig",
    "MeanFlow",
    "MeanFlowConfig",
    "ModelConfig",
    "accelerate",
    "convert",
    "jvp_attention",
    "load",
    "ops",
    "optim",
    "sample",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """What takes long to import, or needs packages that kernels do without, is imported at its first use."""
    if name in ("convert", "optim"):
        return import_module(f"mfengine.{name}")
    if name == "load":
        from mfengine.engine.weights import load

        return load
    raise AttributeError(f"module mfengine has no attribute {name}")
