"""`python -m benchmarks.split PRESET`: the time of a guided training step by pass, from a profiler trace.

Under torchrun the model is sharded as in training, and communication shows. On a GPU, the time of a pass is that of the
kernels it launches; on a CPU, that of the pass itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.workload import OBJECTIVES, make_model, small
from mfengine import MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.data.format import LatentSpace
from mfengine.data.loader import Loader
from mfengine.data.writer import ArraySamples, write_dataset
from mfengine.device import to_device
from mfengine.engine.config import OptimConfig
from mfengine.engine.distributed import prepare_model
from mfengine.engine.optim import adamw_ema
from mfengine.engine.presets import PRESETS
from mfengine.ops import fixed_weights
from mfengine.ranks import World, world

PASSES = ("data wait", "guidance", "primal", "tangent", "backward", "optimizer", "communication", "rest")
STEPS = 5


class Labelled:
    """A network whose passes are labelled in a trace."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.num_classes, self.takes_tangents = model.num_classes, model.takes_tangents

    def __call__(self, z: Tensor, t: Tensor, h: Tensor, y: Tensor, tangents: Any = None) -> Any:
        with record_function("forward" if torch.is_grad_enabled() else "guidance"):
            return self._model(z, t, h, y, tangents)


def split(
    config: ModelConfig,
    objective: MeanFlowConfig,
    world: World,
    dtype: torch.dtype,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """Seconds of one step by pass.

    The tangent is the time of the forward beyond that of one without tangents, which runs separately. Communication
    that overlaps with other work counts in both, so parts may add up to more than the step.

    Args:
        config, objective: network and method.
        world: the ranks, one process each.
        dtype: dtype of matrix products.
        batches: endless; latents (B, C, H, W) and labels (B,), on the device.

    Returns:
        Seconds for each of `PASSES`, and `step`, the whole.
    """
    device = world.device
    model = prepare_model(make_model(config, torch.device("cpu"), dtype), world)
    optimizer = adamw_ema(model, OptimConfig(), whole=not world.sharded)
    weights = fixed_weights(optimizer.copies)
    method, labelled = MeanFlow(objective), Labelled(model)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with record_function("data wait"):
            latents, labels = next(batches)
        draws = method.draw(latents.shape, generator, device)
        with weights:
            loss, _ = method.loss(labelled, latents, labels, draws)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    def primal() -> None:
        latents, labels = next(batches)
        t = torch.full((len(latents),), 0.5, device=device)
        with record_function("primal"):
            model(latents, t, torch.zeros_like(t), labels)

    for run in (step, primal, step):
        run()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as trace:
        for name, run in (("step", step), ("alone", primal)):
            for _ in range(STEPS):
                with record_function(name):
                    run()
                    synchronise(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]

    spent = seconds_of_passes(events, device.type == "cuda")
    found = {name: spent.get(name, 0.0) / STEPS for name in ("step", *PASSES)}
    found["tangent"] = max(0.0, spent["forward"] / STEPS - found["primal"])
    found["rest"] = max(0.0, found["step"] - sum(found[name] for name in PASSES[:-2]))
    return found


def seconds_of_passes(events: list[dict[str, Any]], gpu: bool) -> dict[str, float]:
    """Seconds by the name of a labelled range; `communication` is the time of collectives inside steps."""
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e.get("ph") == "X"]
    steps = [e for e in ranges if e["name"] == "step"]

    def in_step(event: dict[str, Any]) -> bool:
        return any(s["ts"] <= event["ts"] < s["ts"] + s["dur"] for s in steps)

    spent: dict[str, float] = {"communication": 0.0}
    for event in ranges:
        if event["name"].startswith("gloo:") and in_step(event):
            spent["communication"] += event["dur"] / 1e6
        elif not gpu or event["name"] == "step":
            spent[event["name"]] = spent.get(event["name"], 0.0) + event["dur"] / 1e6
    if not gpu:
        return spent
    # PyTorch launches through CUDA's runtime, Triton through its driver.
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {e["args"]["correlation"]: e["ts"] for e in calls if "correlation" in e["args"]}
    passes = [e for e in ranges if e["name"] not in ("step", "alone") and ":" not in e["name"]]
    for kernel in events:
        if kernel.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        at = launched.get(kernel["args"].get("correlation"))
        if "nccl" in kernel["name"]:
            spent["communication"] += kernel["dur"] / 1e6
            continue
        for event in passes:
            if at is not None and event["ts"] <= at < event["ts"] + event["dur"]:
                spent[event["name"]] = spent.get(event["name"], 0.0) + kernel["dur"] / 1e6
    return spent


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches(config: ModelConfig, world: World, batch: int, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Random latents for a model, from shards through DALI as in training, or made on the device without DALI."""
    shape = (config.in_channels, config.input_size, config.input_size)
    labels = torch.zeros(batch, dtype=torch.long, device=world.device)
    if not (find_spec("nvidia") and find_spec("nvidia.dali")):
        latents = torch.randn(batch, *shape, device=world.device)
        while True:
            yield latents, labels
    space = LatentSpace(shape, config.num_classes)
    moments = np.random.default_rng(0).standard_normal((1, 2, *shape))
    samples = ArraySamples(
        "random", space, np.broadcast_to(moments, (4 * batch, *moments.shape)), np.zeros(4 * batch, np.int32)
    )
    dataset = write_dataset(folder / f"rank-{world.rank}", samples)
    loader = Loader(dataset, batch, 0, 1, 0, world.device)
    generator = torch.Generator().manual_seed(0)
    while True:
        latents, labels = loader.draw(generator)
        yield latents, to_device(labels, world.device)


def guided_split(config: ModelConfig, batch: int, ranks: World) -> dict[str, float]:
    """`split` of a guided step, in bfloat16 on a GPU."""
    gpu = ranks.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        inputs = batches(config, ranks, batch, Path(folder))
        return split(config, OBJECTIVES["guided"], ranks, torch.bfloat16 if gpu else torch.float32, inputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=[name for name in PRESETS if name != "digits"])
    parser.add_argument("--batch", type=int, default=16, help="samples per rank")
    args = parser.parse_args()
    with world("auto") as ranks:
        config = PRESETS[args.preset][1].model
        found = guided_split(config if ranks.device.type == "cuda" else small(config), args.batch, ranks)
    if ranks.main:
        for name, seconds in found.items():
            print(f"{name:14} {seconds * 1e3:9.3f} ms {seconds / found['step']:7.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
