"""mfengine: training and sampling of MeanFlow models, one-step image generators (arXiv 2505.13447)."""

from mfengine.backend import accelerate, jvp_attention
from mfengine.methods import Draws, MeanFlow, MeanFlowConfig, sample
from mfengine.networks import DiT, ModelConfig

__all__ = ["DiT", "Draws", "MeanFlow", "MeanFlowConfig", "ModelConfig", "accelerate", "jvp_attention", "sample"]
__version__ = "0.1.0"
