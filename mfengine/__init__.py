"""mfengine: training and sampling of MeanFlow models, one-step image generators (arXiv 2505.13447)."""

from mfengine.method import Draws, MeanFlow, MeanFlowConfig, sample
from mfengine.model import DiT, ModelConfig
from mfengine.ops.sdpa import jvp_attention
from mfengine.swap import accelerate

__all__ = ["DiT", "Draws", "MeanFlow", "MeanFlowConfig", "ModelConfig", "accelerate", "jvp_attention", "sample"]
__version__ = "0.1.0"
