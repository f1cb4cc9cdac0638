"""Compares a mesh of one rank with none: FSDP2, DTensors and their checkpoints on a single device, without torchrun."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.configs import read_json
from mfengine.engine.checkpoint import DESCRIPTION, Checkpointer, load_state
from mfengine.engine.distributed import prepare_model
from mfengine.optim import AdamWEMA, local
from mfengine.ranks import World, world

CONFIG = ModelConfig(8, 2, 4, hidden_size=144, depth=2, num_heads=2, num_classes=10)  # head dim 72, as in XL/2
METHOD = MeanFlow(MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.75))
BATCH = 16


def check_one_rank(device: torch.device) -> list[dict[str, Any]]:
    """Compare a guided training step and a checkpoint of a model sharded over one rank with those of a whole model.

    It runs in bfloat16 on a GPU, in float32 on a CPU. It starts a process group and ends it.

    Returns:
        Rows of `check`, `error` and `bound`. The errors are the relative error of the weights' change, and the number
        of tensors that a checkpoint, written in the background while the weights change, does not restore exactly.
    """
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    with world(device.type, one_rank_mesh=True) as mesh:
        whole, sharded = (_model(dtype, ranks) for ranks in (World(0, 1, mesh.device), mesh))
        before = [p.detach().clone() for p in whole.parameters()]
        for model in (whole, sharded):
            _step(model, mesh.device)
        with torch.no_grad():
            moved = torch.cat([(p - old).flatten() for p, old in zip(whole.parameters(), before, strict=True)])
            pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
            apart = torch.cat([(local(p) - q).flatten() for p, q in pairs])
            error = float(apart.norm() / moved.norm())
        lost = _lost_in_checkpoint(sharded, _model(dtype, World(0, 1, mesh.device)), mesh)
        del whole, sharded
    return [
        {"check": "step of FSDP2 on one rank", "error": error, "bound": 0.02 if gpu else 0},
        {"check": "checkpoint of FSDP2 on one rank", "error": lost, "bound": 0},
    ]


def _model(dtype: torch.dtype, ranks: World) -> DiT:
    torch.manual_seed(0)
    model = DiT(CONFIG, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # also to parameters initialised as zero
    return prepare_model(model, ranks)


def _step(model: DiT, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(BATCH, CONFIG.in_channels, CONFIG.input_size, CONFIG.input_size, generator=generator)
    labels = torch.randint(CONFIG.num_classes, (BATCH,), generator=generator)
    draws = METHOD.draw(latents.shape, generator, device)
    # With this large epsilon the step is proportional to the gradient; Adam's first step is otherwise its sign.
    optimizer = AdamWEMA(model.parameters(), lr=1e-2, eps=1.0)
    METHOD.loss(model, latents.to(device), labels.to(device), draws)[0].backward()
    optimizer.step()


@torch.no_grad()
def _lost_in_checkpoint(written: DiT, read: DiT, mesh: World) -> int:
    def state(model: DiT) -> dict[str, Any]:
        return {"model": {name: p.detach() for name, p in model.named_parameters()}}

    values: list[Tensor] = [local(p).clone() for p in written.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), mesh, keep=1, asynchronous=True)
        checkpointer.save(1, state(written), {})
        for p in written.parameters():
            local(p).zero_()
        checkpointer.wait()
        assert checkpointer.newest is not None
        newest = checkpointer.newest
        load_state(newest, read_json(newest / DESCRIPTION), state(read), World(0, 1, mesh.device))
    return sum(not torch.equal(p, value) for p, value in zip(read.parameters(), values, strict=True))
