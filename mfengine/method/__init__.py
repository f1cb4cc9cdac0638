"""The method: what is trained and how it samples."""

from mfengine.method.objective import Draws, MeanFlow, MeanFlowConfig
from mfengine.method.sampler import sample

__all__ = ["Draws", "MeanFlow", "MeanFlowConfig", "sample"]
