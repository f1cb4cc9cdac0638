"""Objectives by name. Another one is put in from outside: `OBJECTIVES["mine"] = Mine`."""

from mfengine.configs import Registry
from mfengine.methods.base import Objective, ObjectiveConfig, Sampler
from mfengine.methods.meanflow import Draws, MeanFlow, MeanFlowConfig
from mfengine.methods.sampling import sample

OBJECTIVES: Registry[Objective] = Registry("objective", meanflow=MeanFlow)

__all__ = ["OBJECTIVES", "Draws", "MeanFlow", "MeanFlowConfig", "Objective", "ObjectiveConfig", "Sampler", "sample"]
