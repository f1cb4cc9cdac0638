"""mfengine: training and sampling of MeanFlow models, one-step image generators (arXiv 2505.13447, 2512.02012)."""

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
    "jvp_attention",
    "sample",
]
__version__ = "0.2.0"
