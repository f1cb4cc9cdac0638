"""Checks that run on each rank of a process group; `test_distributed.py` starts them under torchrun."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from golden_cases import golden_case, relative_error
from stock_network import StockNetwork
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from mfengine import DiT, Draws, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.configs import read_json
from mfengine.engine.checkpoint import DESCRIPTION, Checkpointer, load_state, newest_checkpoint
from mfengine.engine.distributed import prepare_model
from mfengine.errors import TrainingError
from mfengine.kernels import multi_tensor
from mfengine.optim import AdamWEMA, local
from mfengine.ranks import world

CONFIG = ModelConfig(4, 2, 2, hidden_size=16, depth=2, num_heads=2, num_classes=3)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = DiT(CONFIG, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    latents = torch.randn(4, 2, 4, 4, generator=generator)
    t = torch.full((4,), 0.9) if rank else torch.full((4,), 0.3)  # only rank 0 has guided rows
    r = torch.tensor([1.0, 1.0, 1.0, 0.5]) * t
    return latents, torch.tensor([0, 1, 2, 0]), Draws(t, r, torch.randn(4, 2, 4, 4, generator=generator), 1)


METHOD = MeanFlow(MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.5))


def zero_guided_rows(here):
    """A rank without guided rows does not block the others, and gradients are the mean over ranks."""
    reference = make_model()
    for rank in range(here.size):
        (METHOD.loss(reference, *batch(rank))[0] / here.size).backward()
    model = prepare_model(make_model(), here)
    METHOD.loss(model, *batch(here.rank))[0].backward()
    for (name, p), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = p.grad.full_tensor()
        assert (gradient - expected.grad).norm() <= 1e-5 * expected.grad.norm() + 1e-9, name


def stock_network(here):
    """A network without tangents in DDP and FSDP2, and ours in DDP: gradients are the mean over ranks to 1e-5.

    By default, DDP broadcasts buffers in its forward, and `find_unused_parameters` adds an autograd.Function to it.
    Neither is differentiable in forward mode.
    """

    def shard(network, reshard):
        for module in (*network.blocks, network):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        return network

    def network(cls):
        network = cls(CONFIG)
        network.load_state_dict(make_model().state_dict())
        return network

    mesh = init_device_mesh("cpu", (here.size,))
    wrappers = {
        "DDP": lambda: DistributedDataParallel(network(StockNetwork)),
        "DDP, unused": lambda: DistributedDataParallel(network(StockNetwork), find_unused_parameters=True),
        "DDP, compiled": lambda: DistributedDataParallel(torch.compile(network(StockNetwork), backend="eager")),
        "DDP, ours": lambda: DistributedDataParallel(network(DiT)),
        "FSDP2": lambda: shard(network(StockNetwork), True),
        "FSDP2, gathered": lambda: shard(network(StockNetwork), False),
    }
    batches = [batch(rank) for rank in range(here.size)]
    for share in (0.25, 1.0):
        method = MeanFlow(replace(METHOD.config, interval_share=share))
        reference = make_model()
        for latents, labels, draws in batches:
            (method.loss(reference, latents, labels, draws)[0] / here.size).backward()
        for name, wrap in wrappers.items():
            model = wrap()
            for _ in range(2):  # DDP treats the first step differently
                model.zero_grad()
                method.loss(model, *batches[here.rank])[0].backward()
            for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
                gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                error = (gradient - expected.grad).norm() / expected.grad.norm()
                assert error <= 1e-5, (name, share, error)
    with (
        mock.patch.object(torch, "__version__", TorchVersion("2.12.1")),
        pytest.raises(NotImplementedError, match=r"torch 2\.12\.1 cannot differentiate FSDP2 forward"),
    ):
        METHOD.loss(shard(network(StockNetwork), True), *batch(here.rank))


def bfloat16(here):
    """Times, tangents and reductions stay in float32 when parameters are gathered in bfloat16."""
    reference = make_model(torch.bfloat16)
    for rank in range(here.size):
        (METHOD.loss(reference, *batch(rank))[0] / here.size).backward()
    model = prepare_model(make_model(torch.bfloat16), here)
    _, metrics = METHOD.loss(model, *batch(here.rank))
    assert metrics["u"].dtype == metrics["du_dt"].dtype == torch.float32
    METHOD.loss(model, *batch(here.rank))[0].backward()
    for (name, p), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        gradient = p.grad.full_tensor()
        assert (gradient - expected.grad).norm() <= 0.02 * expected.grad.norm() + 1e-6, name


def asynchronous_checkpoint(here):
    """The checkpoint has the state at the call, even if the weights change meanwhile; old checkpoints are removed."""
    model = prepare_model(make_model(), here)
    run = Path("run")
    checkpointer = Checkpointer(run, here, keep=2, asynchronous=True)
    dist.barrier()
    state = {"model": dict(model.named_parameters()), "note": {str(here.rank): b"rank %d" % here.rank}}
    saved = {}
    for step in (1, 2, 3):
        with torch.no_grad():
            for p in model.parameters():
                local(p).fill_(step)
        saved[step] = {name: local(p).clone() for name, p in model.named_parameters()}
        checkpointer.save(step, state, {})
        with torch.no_grad():
            for p in model.parameters():
                local(p).fill_(-1)
        for _ in range(20):  # training continues, with communication of its own
            assert here.gather([here.rank])[:, 0].tolist() == list(range(here.size))
            checkpointer.poll()
    checkpointer.wait()
    dist.barrier()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    state["note"] = {str(here.rank): b""}
    newest = newest_checkpoint(run)
    load_state(newest, read_json(newest / DESCRIPTION), state, here)
    assert state["note"] == {str(here.rank): b"rank %d" % here.rank}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        assert torch.equal(local(p), saved[3][name])


def optimizer(here):
    """Both backends on shards, with clipping, equal one process; a bad gradient on one rank skips the step on all."""
    library = multi_tensor.Library(Path(sys.argv[1]))
    multi_tensor.library = lambda: library
    for backend in ("cuda", "torch"):
        whole, model = make_model(), prepare_model(make_model(), here)
        optimizers = [
            AdamWEMA(side.parameters(), lr=1e-2, eps=1e-4, ema_decays=(0.9,), clip_norm=0.1, backend=backend)
            for side in (whole, model)
        ]
        for _ in range(3):
            for side in (whole, model):
                side.zero_grad()
            for rank in range(here.size):
                (METHOD.loss(whole, *batch(rank))[0] / here.size).backward()
            METHOD.loss(model, *batch(here.rank))[0].backward()
            for each in optimizers:
                each.step()
        assert abs(optimizers[1].grad_norm / optimizers[0].grad_norm - 1) < 1e-5
        assert optimizers[1].grad_norm > 0.1
        for (name, p), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            for actual, right in (
                (p, expected),
                (optimizers[1].average(p, 0.9), optimizers[0].average(expected, 0.9)),
            ):
                error = (actual.full_tensor() - right).norm() / right.norm()
                assert error <= 1e-5, (backend, name, error)

        before = [local(p).clone() for p in model.parameters()]
        first = local(next(iter(model.parameters())).grad)
        if here.rank == 1:
            first.view(-1)[0] = torch.nan
        optimizers[1].step()
        assert optimizers[1].skipped == 1
        assert all(torch.equal(local(p), old) for p, old in zip(model.parameters(), before, strict=True))


def improved_meanflow(here):
    """Two ranks that share the authors' batch get the authors' gradients, in all layouts of FSDP2."""
    for layout in ({}, {"reshard": True, "recompute": True}):
        case = golden_case("imf_train")
        model = prepare_model(case.model, here, **layout)
        latents, labels, draws = case.batch("in")
        each = case.num_instant // here.size  # instant rows per rank
        first = here.rank * each
        mine = [*range(first, first + each), *range(case.num_instant + first, case.num_instant + first + each)]
        draws = type(draws)(*(x[mine] if isinstance(x, torch.Tensor) else x for x in draws))
        draws = draws._replace(num_dropped=min(max(draws.num_dropped - first, 0), each))
        case.method.loss(model, latents[mine], labels[mine], draws)[0].backward()
        gradients = case.parameters("grads")
        for name, p in model.named_parameters():
            assert relative_error(p.grad.full_tensor(), gradients[name]) <= 1e-5, (layout, name)


def lost_rank(here):
    """The hosts' exchange fails with one error if a rank has ended silently."""
    if here.rank == 0:
        with pytest.raises(TrainingError, match=r"^another rank has ended or does not answer: [^\n]+$"):
            here.gather([1.0])
    print("passed lost_rank\n", end="", flush=True)
    os._exit(0)


CHECKS = (
    *(zero_guided_rows, bfloat16, improved_meanflow, optimizer, asynchronous_checkpoint, stock_network),
    lost_rank,
)
"""In this order: the last check ends the processes."""


if __name__ == "__main__":
    with world("cpu") as here:
        for check in CHECKS:
            check(here)
            print(f"passed {check.__name__}\n", end="", flush=True)  # in one write, because the ranks share a pipe
