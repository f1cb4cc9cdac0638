"""Records the collectives of one real step on fake ranks or, under torchrun, on real ones, and writes the latter."""

import dataclasses
import json
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.engine.config import TrainConfig
from mfengine.engine.distributed import prepare_model, reduce_gradients
from mfengine.engine.optim import adamw_ema
from mfengine.engine.plan import Collective
from mfengine.ops import use_backend
from mfengine.ranks import World, world

CONFIG = TrainConfig(
    model=ModelConfig(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=17),
    method=MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.75),
)
LAYOUTS = {"full": {"reshard": True}, "gathered once": {}, "hybrid": {"replicas": 2}}
KINDS = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
}


class Recorder(TorchDispatchMode):
    """Records collectives that pass PyTorch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.collectives = Counter()
        self.phase = "guidance"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # PyTorch then calls it again with this rank's part
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Times and row numbers are on the host and have values, because they decide which rows are guided.
        real = bool(tensors) and not any(isinstance(x, FakeTensor) for x in tensors)
        with unset_fake_temporarily() if real else nullcontext():
            out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            ranks = len(dist.get_process_group_ranks(group))
            whole = max(sum(x.nbytes for x in tree_leaves(a) if isinstance(x, Tensor)) for a in args)
            self.collectives[Collective(self.phase, KINDS[func._schema.name], ranks, whole)] += 1
        return out


def record_step(config, here, tensors):
    """The collectives of one real step of rank `here.rank`; tensors are made in the context `tensors`."""
    method, shape = MeanFlow(config.method), (4, *config.model.latent_shape)
    draws = method.draw(shape, torch.Generator().manual_seed(0))
    labels = torch.zeros(4, dtype=torch.int64)
    with tensors:
        model = DiT(config.model, torch.bfloat16)
    prepare_model(model, here, replicas=config.replicas, reshard=config.reshard)
    recorder = Recorder()

    def enter_pass(*_):
        recorder.phase = "forward" if torch.is_grad_enabled() else "guidance"

    model.register_forward_pre_hook(enter_pass, prepend=True)  # before FSDP's own hook, which gathers
    with tensors:
        optimizer = adamw_ema(model, config.optim)
        latents, noise = torch.zeros(shape), torch.zeros(shape)
        with recorder:
            loss, _ = method.loss(model, latents, labels, draws._replace(noise=noise))
            recorder.phase = "backward"
            reduce_gradients(model, True, config.reshard)
            loss.backward()
            recorder.phase = "optimizer"
            with patch("mfengine.optim._makes_wait", lambda device: True):  # as on a GPU
                optimizer.step()
    return recorder.collectives


@contextmanager
def fake_world(ranks):
    """Rank 0 of `ranks`, in a process group that communicates nothing."""
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, torch.device("cpu"))
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def record_fake(config, ranks):
    with fake_world(ranks) as here, use_backend("triton"):
        return record_step(config, here, FakeTensorMode(allow_non_fake_inputs=True))


def as_json(collectives):
    return sorted([*c, count] for c, count in collectives.items())


if __name__ == "__main__":
    with world("cpu") as here:
        found = {}
        for name, layout in LAYOUTS.items():
            found[name] = as_json(record_step(dataclasses.replace(CONFIG, **layout), here, nullcontext()))
        if here.main:
            Path("collectives.json").write_text(json.dumps(found))
