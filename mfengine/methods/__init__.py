"""The method: what is trained and how it samples."""

from mfengine.methods.meanflow import Draws, MeanFlow, MeanFlowConfig
from mfengine.methods.sampling import sample

__all__ = ["Draws", "MeanFlow", "MeanFlowConfig", "sample"]
