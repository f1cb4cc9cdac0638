"""Objectives by name. To add your own: `OBJECTIVES["mine"] = Mine`."""

from mfengine.configs import Registry
from mfengine.methods.base import Health, Metrics, Objective, ObjectiveConfig, Sampler
from mfengine.methods.improved_meanflow import ImprovedDraws, ImprovedMeanFlow, ImprovedMeanFlowConfig
from mfengine.methods.meanflow import Draws, MeanFlow, MeanFlowConfig
from mfengine.methods.sampling import sample

OBJECTIVES: Registry[Objective] = Registry("objective", meanflow=MeanFlow, **{"improved-meanflow": ImprovedMeanFlow})

__all__ = [
    "OBJECTIVES",
    "Draws",
    "Health",
    "ImprovedDraws",
    "ImprovedMeanFlow",
    "ImprovedMeanFlowConfig",
    "MeanFlow",
    "MeanFlowConfig",
    "Metrics",
    "Objective",
    "ObjectiveConfig",
    "Sampler",
    "sample",
]
