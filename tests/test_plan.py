"""The dry run: its plan against real tensors and the collectives of real steps, and its errors; nothing is written."""

import dataclasses
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, run_command, slow
from scaling_worker import CONFIG, fake_world, record_fake
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts import Saved
from mfengine import DiT, MeanFlow
from mfengine.data.format import LatentSpace
from mfengine.data.writer import ArraySamples, write_dataset
from mfengine.engine import plan as planning
from mfengine.engine import preflight, trainer
from mfengine.engine.config import OptimConfig, TrainConfig
from mfengine.engine.distributed import prepare_model
from mfengine.engine.optim import adamw_ema, averages
from mfengine.engine.plan import LiveBytes, make_plan, meta_pass
from mfengine.engine.presets import PRESETS
from mfengine.ops import choice, use_backend
from mfengine.optim import local
from mfengine.ranks import World
from mfengine.train import parse

GPU = torch.device("cuda")


def on_gpus(ranks):
    return World(0, ranks, GPU)


# ----------------------------------------------------------------------------
# The plan.


def nbytes(tensors):
    return sum(local(x).nbytes for x in tensors if x.ndim)  # without the optimizer's count of steps


@pytest.mark.parametrize(
    ("ranks", "decays"),
    [(1, (0.9,)), (16, (0.9, 0.5)), slow(1, (0.9, 0.5)), slow(2, (0.9,)), slow(2, (0.9, 0.5)), slow(16, (0.9,))],
)
def test_state_is_that_of_real_shards(ranks, decays):
    """Weights, moments and averages as made by the trainer; 18 labels over 16 ranks are padded."""
    config = dataclasses.replace(CONFIG, optim=OptimConfig(ema_decays=decays))
    memory = make_plan(config, on_gpus(ranks)).memory
    tensors = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_world(ranks) as here:
        with tensors:
            model = DiT(config.model, torch.bfloat16)
        if ranks > 1:
            prepare_model(model, here)
        with tensors:
            optimizer = adamw_ema(model, config.optim, whole=ranks == 1)
        assert memory["weights"] == nbytes(model.parameters())
        gradients = [torch.empty_like(local(p), dtype=p.grad_dtype, device="meta") for p in model.parameters()]
        assert memory["gradients"] == nbytes(gradients)
        assert memory.get("bfloat16 copies", 0) == nbytes(optimizer.copies.values())
        kept = [x for average in decays for x in averages(model, optimizer, average).values()]
        assert memory["averages"] == nbytes(kept)
        state = [x for s in optimizer.state.values() for x in s.values()]
        assert memory["optimizer state"] == nbytes(state) - nbytes(kept)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_of_real_tensors(recompute):
    config = dataclasses.replace(CONFIG, device="cpu", recompute=recompute)
    here = World(0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    model = prepare_model(DiT(config.model), here, recompute=recompute)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    method = MeanFlow(config.method)
    latents, labels = torch.randn(8, 4, 8, 8), torch.zeros(8, dtype=torch.int64)
    draws = method.draw(latents.shape, torch.Generator().manual_seed(config.seed))
    with LiveBytes([x for p in model.parameters() for x in (p, p.grad)]) as live:
        loss, figures = method.loss(model, latents, labels, draws)
        loss.backward()
        del loss, figures
    planned, _ = meta_pass(config.model, config.method, 8, torch.float32, fused=False, recompute=recompute)
    assert live.peak == pytest.approx(planned, rel=0.02)


def saved_bytes(config, depth, batch):
    """The bytes that a pass saves for its backward, measured with autograd's hooks instead of live storages."""
    with torch.device("meta"), use_backend("triton"):
        model = DiT(dataclasses.replace(config.model, depth=depth), torch.bfloat16).to("meta")
        latents, labels = torch.empty(batch, 4, 32, 32), torch.empty(batch, dtype=torch.int64)
        with torch.device("cpu"):
            draws = MeanFlow(config.method).draw(latents.shape, torch.Generator().manual_seed(0))
        draws = draws._replace(noise=torch.empty_like(latents))
        saved = Saved()
        with saved:
            MeanFlow(config.method).loss(model, latents, labels, draws)[0].backward()
    return saved.bytes


def test_activations_grow_by_what_a_layer_saves():
    """By what `benchmarks.counts` sees saved, 12.0 MB for XL/2; recomputing, by a block's inputs and their tangents."""
    config = PRESETS["xl2"][1]
    batch = 16

    def peak(depth, **changes):
        model = dataclasses.replace(config.model, depth=depth)
        return meta_pass(model, config.method, batch, torch.bfloat16, fused=True, **changes)[0]

    saved = saved_bytes(config, 2, batch) - saved_bytes(config, 1, batch)
    assert saved / batch == pytest.approx(12.0e6, rel=0.3)  # including cast weights, which count for so few rows
    assert peak(4) - peak(3) == pytest.approx(saved, rel=1e-3)
    deeper, shallow = (peak(depth, recompute=True, gathered=True) for depth in (4, 3))  # without casts of weights
    inputs = (deeper - shallow) / batch
    rows = 1 + config.method.interval_share
    assert inputs == pytest.approx(6 * rows * config.model.num_tokens * config.model.hidden_size, rel=0.02)


def test_activations_count_storages_once_and_while_they_live():
    kept = torch.empty(100)
    with LiveBytes([kept]) as live:
        a = torch.empty(10)
        b = a.view(2, 5)
        c = kept[:50] + 1
        assert live.now == 40 + 200
        del a
        assert live.now == 40 + 200  # a view holds it
        del b, c
    assert (live.now, live.peak) == (0, 240)


@pytest.mark.parametrize(("ranks", "layout", "guided"), [  # each layout, with and without guidance once
    slow(2, {}, True), (2, {"reshard": True}, False), slow(16, {}, False), slow(16, {"reshard": True}, True),
    slow(16, {"replicas": 2}, True),
])  # fmt: skip
def test_communication_is_that_of_a_real_step(ranks, layout, guided):
    """Byte for byte, in the pass that issues it; 18 labels over 16 ranks are padded."""
    config = dataclasses.replace(CONFIG, **layout)
    config = config if guided else dataclasses.replace(config, method=type(CONFIG.method)())
    assert Counter(make_plan(config, on_gpus(ranks)).communication) == record_fake(config, ranks)


def test_layouts_trade_memory_for_communication():
    plans = {
        name: make_plan(dataclasses.replace(PRESETS["b4"][1], **changes), on_gpus(8))
        for name, changes in {
            "default": {},
            "reshard": {"reshard": True},
            "replicas": {"replicas": 2},
            "accumulation": {"accumulation": 2},
        }.items()
    }
    memory = {name: plan.memory for name, plan in plans.items()}
    assert memory["reshard"]["gathered parameters"] < memory["default"]["gathered parameters"]
    gathered = {
        name: sum(c.bytes for c in plan.communication if c.kind == "all-gather") for name, plan in plans.items()
    }
    assert gathered["reshard"] == 3 * gathered["default"]
    assert memory["replicas"]["weights"] == pytest.approx(2 * memory["default"]["weights"], rel=0.01)
    assert memory["accumulation"]["accumulated gradients"] == 4 * plans["accumulation"].parameters
    assert memory["accumulation"]["activations"] < memory["default"]["activations"]


def test_plan_that_does_not_fit_is_a_warning(digits, monkeypatch, tmp_path):
    plans = {ranks: make_plan(PRESETS["digits"][1], on_gpus(ranks)) for ranks in (2, 8)}
    available = 10 * sum(plans[8].memory.values()) // 9
    monkeypatch.setattr(planning, "device_memory", lambda device: available)
    assert plans[8].warnings(GPU) == []
    (line,) = plans[2].warnings(GPU)
    assert re.search(
        r"per rank, but the device has \S+ [MG]B: save memory with more --accumulation, --recompute or more ranks", line
    )
    done = run_command("mfengine.train", "digits", "--dry-run", "--ranks=2", cwd=tmp_path)
    assert (done.returncode, line in done.stdout) == (2, True)  # there is no data

    for module in (planning, trainer):
        monkeypatch.setattr(module, "device_memory", lambda device: 1000)
    done = run_command("mfengine.train", *SMALL, f"--data={digits}", "--steps=1", cwd=tmp_path)
    assert (done.returncode, "warning: the plan needs" in done.stderr) == (0, True)


# ----------------------------------------------------------------------------
# The command.


@pytest.mark.slow
def test_xl2_on_eight_gpus(tmp_path):
    """Without data: the plan, one line of error, and no weights, which would take 2.7 GB."""
    done = run_command("mfengine.train", "xl2", "--dry-run", "--ranks=8", cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "676.4 M" in done.stdout
    assert "8 x cuda, 32 rows each, in bfloat16" in done.stdout
    assert "32 x all-gather over 8 ranks, 1.36 GB" in done.stdout
    assert "32 x reduce-scatter over 8 ranks, 2.71 GB" in done.stdout
    assert done.stderr == "error: data/imagenet256/dataset.json does not exist: see docs/data.md\n"
    assert list(tmp_path.iterdir()) == []


def dry(*args, cwd):
    return run_command("mfengine.train", *SMALL, "--dry-run", *args, cwd=cwd)


def test_success_writes_nothing(digits, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in digits.rglob("*")}
    done = dry(f"--data={digits}", "--ranks=2", "--epochs=1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "56 steps of 32 samples: 0.9972 epochs of 1,797" in done.stdout
    assert ("there is no GPU here" in done.stdout) is not torch.cuda.is_available()
    assert done.stdout.endswith("ready to start; nothing was written\n")
    assert list(tmp_path.iterdir()) == []
    assert {p: p.stat().st_mtime_ns for p in digits.rglob("*")} == before


@pytest.fixture(scope="module")
def run_folder(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    done = run_command("mfengine.train", *SMALL, f"--data={digits}", "--steps=2", "--device=cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs"


def test_run_that_can_be_continued(run_folder, digits, tmp_path):
    args = (f"--data={digits}", f"--runs={run_folder}", "--resume=auto")
    done = dry(*args, cwd=tmp_path)
    assert done.returncode == 0
    assert "ready to continue at step 2;" in done.stdout
    assert not {"dry_run", "ranks"} & json.loads((run_folder / "digits/config.json").read_text()).keys()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ranks=3"], "--batch-size 32 is not a multiple of ranks x --accumulation = 3 x 1"),
        (["--ranks=2", "--replicas=4"], "replicas must divide the 2 rank(s); 4 does not"),
        (["--optim.ema-decays", "0.9", "0.9"], "--optim.ema-decays must not repeat a number"),
        (["--ranks=0"], "--ranks needs --dry-run and must be at least 1"),
        (["--data=nowhere"], "dataset.json does not exist"),
        (["--data=CUT"], "000000.tar has"),
        (["--data=BROKEN"], "has a label outside 0 to 9"),
        (["--model.num-classes=5"], "has 10 classes; --model.num-classes is 5"),
        (["--init=nowhere"], "nowhere must be a checkpoint"),
        (["--init=list.pt"], "no DiT in this checkpoint"),
        (["--init=RUN/digits", "--model.depth=2"], "has another architecture"),
        (["--runs=RUN"], "holds a run: continue it with --resume auto"),
        (["--runs=RUN", "--resume=auto", "--seed=7"], "has a run with seed 0, not 7"),
        (["--batch-size=8192", "--ranks=2048"], "has 1797 samples, too few for 2048 parts"),
        (["--attention=flash-attn", "--model.hidden-size=1024"], "--attention flash-attn is unavailable: "),
        (["--attention=flash-attn", "--device=cpu"], "--attention flash-attn is unavailable: "),
        (["--ops=triton", "--model.hidden-size=1024"], "--ops triton is unavailable: q has head dim 512"),
        (["--optim.backend=apex"], "optim.backend apex: apex is not installed"),
        (["--optim.backend=cuda", "--device=cpu"], "optim.backend cuda: "),
        (["--data=LARGE", "--model.input-size=256", "--evaluate-every=5"], "latents of 65,536 numbers are too large"),
    ],
)
def test_dry_run_rejects_what_training_rejects(args, message, digits, run_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)  # makes the import of apex fail
    torch.save([1], tmp_path / "list.pt")
    for name in ("cut", "broken"):
        if f"--data={name.upper()}" not in args:
            continue
        shutil.copytree(digits, tmp_path / name)
        with (tmp_path / name / "000000.tar").open("r+b") as shard:
            if name == "cut":
                shard.truncate(1024)
            else:
                shard.write(b"\xff" * (digits / "000000.tar").stat().st_size)
    if "--data=LARGE" in args:
        space = LatentSpace((1, 256, 256), num_classes=10)
        write_dataset(tmp_path / "large", ArraySamples("x", space, np.zeros((10, 1, 2, *space.shape)), np.arange(10)))
    before = sorted(tmp_path.rglob("*"))
    places = {"LARGE": tmp_path / "large", "CUT": tmp_path / "cut", "BROKEN": tmp_path / "broken", "RUN": run_folder}
    for name, path in places.items():
        args = [part.replace(name, str(path)) for part in args]
    data = [] if any(part.startswith("--data") for part in args) else [f"--data={digits}"]
    done = dry(*data, *args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_library_without_a_gpu(digits, tmp_path, monkeypatch):
    """A missing library is an error. One that is built, but needs a GPU, is not."""
    args = (f"--data={digits}", "--optim.backend=cuda")
    monkeypatch.setattr(preflight, "LIBRARY", Path("nowhere"))
    done = dry(*args, cwd=tmp_path)
    assert (done.returncode, "optim.backend cuda: " in done.stderr) == (2, True)
    monkeypatch.setattr(preflight, "LIBRARY", Path(__file__))
    assert dry(*args, cwd=tmp_path).returncode == 0


def test_training_rejects_what_its_dry_run_rejects(digits, tmp_path, monkeypatch):
    """Kernels on a CPU, without the interpreter."""
    monkeypatch.setattr(pytest.importorskip("triton").knobs.runtime, "interpret", False)
    monkeypatch.setattr(choice, "_why_not", choice._why_not.__wrapped__)  # without its cache
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--ops=triton", "--device=cpu")
    for more in ([], ["--dry-run"]):
        done = run_command(*args, *more, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == "error: --ops triton is unavailable: its kernels run only on a GPU\n"
    assert list(tmp_path.iterdir()) == []


def test_ranks_need_a_dry_run(tmp_path):
    done = run_command("mfengine.train", *SMALL, "--ranks=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "--ranks needs --dry-run" in done.stderr


def test_arguments_make_the_run():
    args = parse(["b4", "--dry-run", "--ranks", "4", "--method.kappa", "0"])
    assert isinstance(args.run, TrainConfig)
    assert args.run.method.kappa == 0
    assert dataclasses.replace(args.run, method=PRESETS["b4"][1].method) == PRESETS["b4"][1]


@pytest.mark.slow
def test_torchrun_sets_the_ranks(digits, tmp_path):
    done = run_command("mfengine.train", *SMALL, "--dry-run", f"--data={digits}", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x cuda, 16 rows each") == done.stdout.count("ready to start") == 1
    assert list(tmp_path.iterdir()) == []
