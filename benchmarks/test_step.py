"""Time of one training step; on a CPU with a small network, on a GPU with that of b2."""

import pytest
import torch

from benchmarks.workload import OBJECTIVES, small, training_step
from mfengine.engine.config import PRESETS


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_step(benchmark, objective):
    config = PRESETS["b2"][1].model
    if torch.cuda.is_available():
        device, dtype, batch = torch.device("cuda"), torch.bfloat16, 32
    else:
        device, dtype, batch, config = torch.device("cpu"), torch.float32, 16, small(config)
    step = training_step(config, OBJECTIVES[objective], batch, device, dtype)

    def timed() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=10, warmup_rounds=3)
    benchmark.extra_info["samples_per_second"] = batch / benchmark.stats["median"]
