"""The case of `test_scaling.py`; under torchrun, its collectives counted where ranks and tensors are real."""

import json
from contextlib import nullcontext
from pathlib import Path

from benchmarks.scaling import STRATEGIES, Step, count_step
from mfengine import MeanFlowConfig, ModelConfig
from mfengine.engine.config import TrainConfig
from mfengine.ranks import world

CONFIG = TrainConfig(
    model=ModelConfig(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=17),
    method=MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.75),
)


def collectives(step: Step) -> dict[str, list[list[object]]]:
    """All collectives by phase, in an order of their own, as JSON gives them back."""
    return {name: sorted([*c, count] for c, count in phase.collectives.items()) for name, phase in step.phases.items()}


if __name__ == "__main__":
    with world("cpu") as here:
        # Nodes of one rank: hybrid then is two replicas.
        steps = {strategy: count_step(CONFIG, here, strategy, 4, 1, nullcontext()) for strategy in STRATEGIES}
        if here.main:
            Path("collectives.json").write_text(json.dumps({s: collectives(step) for s, step in steps.items()}))
