"""The commands from start to end, as a user types them, and their errors for wrong input."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import SMALL, checkpoint_contents, forks, run_command, run_in_fork, slow
from PIL import Image

import mfengine
from mfengine import MeanFlow, __main__, cli, train
from mfengine.data.format import LatentSpace
from mfengine.data.writer import ArraySamples, order, write_dataset
from mfengine.engine import rates, trainer
from mfengine.engine.checkpoint import newest_checkpoint, read_description
from mfengine.engine.config import OptimConfig
from mfengine.engine.presets import PRESETS
from mfengine.engine.telemetry import METRICS, Telemetry
from mfengine.engine.weights import load_model
from mfengine.errors import InputError, RankTrainingError
from mfengine.evaluation.samples import SampleSet
from mfengine.methods import OBJECTIVES
from mfengine.networks import dit
from mfengine.ranks import World


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A finished run of 20 steps."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_command(
        "mfengine.train", *SMALL, f"--data={digits}", "--steps=20", "--checkpoint-every=5", "--keep=2",
        "--sample-every=10", "--optim.ema-decays", "0.9", "0.5", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "digits", done


def test_run_folder(trained):
    run, done = trained
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000015", "step-00000020"]
    assert json.loads((run / "config.json").read_text())["batch_size"] == 32
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(line["samples_per_second"] > 0 and 0 < line["loss"] <= 1 for line in lines)
    assert all(0 < line["mfu"] <= 1 for line in lines)
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["00000010.png", "00000020.png"]
    assert any((run / "tensorboard").iterdir())
    assert "M parameters, 20 steps of 32 samples, 1 x cpu in float32" in done.stderr
    assert "loss=" in done.stderr
    assert "samples/s" in done.stderr


def test_finished_run_has_nothing_to_do(trained, digits):
    run, _ = trained
    before = (newest_checkpoint(run) / "checkpoint.json").stat().st_mtime_ns
    done = run_command(
        "mfengine.train", *SMALL, f"--data={digits}", "--steps=20", "--resume=auto", "--optim.ema-decays", "0.9",
        "0.5", cwd=run.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (newest_checkpoint(run) / "checkpoint.json").stat().st_mtime_ns == before


def test_schedules_survive_a_kill(digits, tmp_path):
    """Rates and decays follow from the step, so a run killed during warm-up and ramp ends like one that was not."""
    args = (*SMALL, f"--data={digits}", "--steps=12", "--checkpoint-every=5", "--log-every=1", "--resume=auto")
    schedule = ("--optim.lr=1e-3", "--optim.warmup-epochs=0.16", "--optim.schedule=cosine")  # of 1,797 / 32 steps each
    train = ("mfengine.train", *args, *schedule, "--optim.ema-decays", "1e3", "0.5", "--optim.ema-rampup-ratio=0.5")
    assert run_command(*train, cwd=tmp_path).returncode == 0
    run = tmp_path / "runs/digits"
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    falling = [5e-4 + 5e-4 * math.cos(math.pi * (s - 8.985) / (12 - 8.985)) for s in (9, 10, 11)]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * s / 8.985 for s in range(1, 9)] + [1e-3] + falling)
    whole = checkpoint_contents(run)
    for step in (10, 12):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    assert "continuing runs/digits/checkpoints/step-00000005" in run_command(*train, cwd=tmp_path).stderr
    again = checkpoint_contents(run)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[k], whole[k]) for k in whole if torch.is_tensor(whole[k]))
    by_halflife, by_decay = (load_model(run, decay).model.state_dict() for decay in (1e3, 0.5))
    assert not all(torch.equal(by_halflife[k], by_decay[k]) for k in by_decay)


def test_config_repeats_a_run_and_best_checkpoints_stay(digits, tmp_path):
    """Besides the newest: multiples of --keep-every, and the checkpoint with the least value of a metric."""
    args = (*SMALL, f"--data={digits}", "--steps=7", "--log-every=1", "--checkpoint-every=1", "--optim.lr=1e-3")
    kept = ("--keep=1", "--keep-every=3", "--keep-best=error")
    done = run_command("mfengine.train", *args, *kept, "--name=first", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = tmp_path / "runs/first"
    errors = {line["step"]: line["error"] for line in map(json.loads, (first / METRICS).read_text().splitlines())}
    steps = {int(path.name[-8:]) for path in (first / "checkpoints").iterdir()}
    assert steps == {3, 6, 7, min(errors, key=errors.get)}

    again = ("mfengine.train", "--config=runs/first/config.json", "--name=second", "--keep=2")
    done = run_command(*again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((tmp_path / f"runs/{name}/config.json").read_text()) for name in ("first", "second"))
    assert after == {**before, "name": "second", "keep": 2}
    whole, repeated = (checkpoint_contents(tmp_path / "runs" / name) for name in ("first", "second"))
    assert all(torch.equal(repeated[k], whole[k]) for k in whole if torch.is_tensor(whole[k]))


def test_rates_and_decays():
    """Computed by hand, at 10 steps an epoch: warm-up, hold, fall; EDM's half-life of min(500, 5 % of samples seen)."""

    def rates(schedule, steps, warmup_epochs=0.4, hold_epochs=0.8):
        config = OptimConfig(1.0, schedule, warmup_epochs, hold_epochs)
        return pytest.approx([config.rate(step, 10, 108) for step in steps])

    assert rates("constant", (0, 1, 3, 4, 107)) == [0.25, 0.5, 1, 1, 1]
    assert rates("cosine", (0, 3, 8, 58, 107)) == [0.25, 1, 1, 0.5, 0.5 - 0.5 * math.cos(math.pi / 100)]
    assert rates("inverse-sqrt", (0, 7, 31, 71)) == [0.25, 1, 0.5, 1 / 3]
    assert rates("inverse-sqrt", (0, 3, 99), 0, 0) == [1, 0.5, 0.1]
    config = OptimConfig(ema_decays=(0.9, 500.0))
    assert config.decays(0, 100) == {0.9: 0.9, 500.0: 0}
    assert config.decays(20, 100)[500.0] == pytest.approx(0.5)  # 2,000 seen, so a half-life of 100
    assert config.decays(10**6, 100)[500.0] == pytest.approx(0.5**0.2)
    assert OptimConfig(ema_decays=(500.0,), ema_rampup_ratio=0).decays(0, 100)[500.0] == pytest.approx(0.5**0.2)


def test_unexpected_normalisation_is_reported(digits, tmp_path):
    """The warning is in the plan and at the start; a run continues only with the normalisation it began with."""
    shutil.copytree(digits, tmp_path / "data")
    args = ("mfengine.train", *SMALL, "--data=data", "--steps=1")
    warning = (
        "warning: this configuration was published with latents normalised by sd-vae-ft-mse; data has scale 0.166667 "
        "and bias 5. Change that with `python -m mfengine.prepare normalise data --to sd-vae-ft-mse`, or"
    )
    done = run_command(*args, "--normalisation=sd-vae-ft-mse", "--dry-run", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert warning in done.stdout
    assert warning in run_command(*args, "--normalisation=sd-vae-ft-mse", cwd=tmp_path).stderr
    assert run_command("mfengine.prepare", "normalise", "data", "--to=measured", cwd=tmp_path).returncode == 0
    done = run_command(*args, "--resume=auto", cwd=tmp_path)
    assert done.returncode == 2
    assert "has a run with space.scale 0.16666666666666666, not [0.1" in done.stderr


def test_export_holds_the_average_and_its_configuration(trained, tmp_path):
    run, _ = trained
    out = tmp_path / "model.safetensors"
    done = run_command("mfengine.export", run, out, "--ema-decay=0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exported, space, *_ = load_model(out)
    averaged, same_space, *_ = load_model(run, ema_decay=0.5)
    assert space == same_space
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), averaged.parameters(), strict=True))
    first = load_model(run)[0]
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), averaged.parameters(), strict=True))
    again = run_command("mfengine.export", run, out, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists: choose another name" in again.stderr


def test_sample_draws_the_same_from_run_checkpoint_and_export(trained, tmp_path):
    run, _ = trained
    run_command("mfengine.export", run, "model.safetensors", cwd=tmp_path)
    pictures = []
    for i, source in enumerate((run, newest_checkpoint(run), "model.safetensors")):
        done = run_command(
            "mfengine.generate", source, "--steps=2", "--labels", "3", "7", "--per-label=4", f"--out={i}.png",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        pictures.append(np.asarray(Image.open(tmp_path / f"{i}.png")))
    assert pictures[0].shape[0] > 1.2 * pictures[0].shape[1]  # four rows of two classes
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def test_generate_shows_real_images_beside_samples(trained, digits, tmp_path):
    args = ("mfengine.generate", trained[0], "--labels", "3", "7", "--per-label=2")
    sizes = []
    for more in (["--steps=1"], ["--steps", "1", "2"], ["--steps", "1", "2", f"--data={digits}"]):
        done = run_command(*args, *more, cwd=tmp_path)
        assert done.returncode == 0
        sizes.append(Image.open(tmp_path / "samples.png").size)
    assert "4 samples" in done.stdout
    assert sizes[1][0] == sizes[2][0] < 200  # two columns
    assert sizes[2][1] - sizes[1][1] == sizes[1][1] - sizes[0][1] > 100  # one more block of rows each time


def test_generate_writes_single_files(trained, tmp_path):
    args = ("mfengine.generate", trained[0], "--out=many", "--labels", "3", "7", "--per-label=2", "--batch-size=3")
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 0
    files = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert files == ["000000-3.png", "000001-7.png", "000002-3.png", "000003-7.png"]
    picture = np.asarray(Image.open(tmp_path / "many/000001-7.png"))
    expected = mfengine.load(trained[0], device="cpu")
    samples = SampleSet(expected.space, 4, 3, labels=(3, 7), sampler=expected.objective.sampler({}))
    _, latents, _ = next(samples.draw(expected.model, 1, World(0, 1, torch.device("cpu"))))
    pixels = (expected.images(latents)[1] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(picture, pixels)
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert "many is not an empty folder" in done.stderr


def test_classes_are_drawn_by_name(trained, tmp_path):
    checkpoint = tmp_path / "named"
    shutil.copytree(newest_checkpoint(trained[0]), checkpoint)
    description = json.loads((checkpoint / "checkpoint.json").read_text())
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert description["class_names"] == []  # the digits have none
    (checkpoint / "checkpoint.json").write_text(json.dumps({**description, "class_names": names}))
    draw = ("mfengine.generate", checkpoint, "--skip-checksums", "--per-label=1", "--out=drawn", "--labels")
    done = run_command(*draw, "seven", "3", cwd=tmp_path)
    assert done.returncode == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"000000-seven.png", "000001-three.png"}
    done = run_command(*draw, "sevn", cwd=tmp_path / "named")
    assert done.returncode == 2
    assert "there is no class sevn; the nearest is seven" in done.stderr


def test_loaded_model_draws_samples(trained):
    model = mfengine.load(trained[0], ema_decay=0.5)
    latents = model.sample([3, 7, 7], steps=2, seed=1)
    assert latents.shape == (3, 1, 8, 8)
    assert torch.equal(latents, model.sample(torch.tensor([3, 7, 7]), 2, 1))
    assert not torch.equal(latents, model.sample([3, 7, 7], 2, seed=2))
    assert model.images(latents).shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="there is no label 10; the model has 0 to 9"):
        model.sample([10])
    with pytest.raises(ValueError, match="there is no condition omga"):
        model.sample([1], omga=2.0)


@pytest.mark.parametrize("preset", ["small-16", "imf-b2"])
def test_network_takes_the_shapes_of_the_data(tmp_path, monkeypatch, capsys, preset):
    moments = np.zeros((4, 1, 2, 3, 16, 16), np.float16)
    samples = ArraySamples("own", LatentSpace((3, 16, 16), 5), moments, np.arange(4))
    write_dataset(tmp_path / "own", samples)
    model = train.parse([preset, f"--data={tmp_path / 'own'}"]).run.model
    assert (model.latent_shape, model.num_classes) == ((3, 16, 16), 5)
    assert model.hidden_size == PRESETS[preset][1].model.hidden_size
    given = train.parse([preset, f"--data={tmp_path / 'own'}", "--model.num-classes=7"]).run.model
    assert (given.latent_shape, given.num_classes) == ((3, 16, 16), 7)
    assert train.parse([preset, "--data=nowhere"]).run.model == PRESETS[preset][1].model


def test_script_runs_every_command(capsys, monkeypatch):
    for name in __main__.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mfengine", name, "--help"])
        with pytest.raises(SystemExit) as stop:
            __main__.script()
        assert not stop.value.code
        assert f"usage: mfengine {name}" in capsys.readouterr().out
    for args, code, said in (
        (["--version"], 0, mfengine.__version__),
        ([], 2, "train"),
        (["trian"], 2, "the nearest is train"),
    ):
        monkeypatch.setattr(sys, "argv", ["mfengine", *args])
        with pytest.raises(SystemExit) as stop:
            __main__.script()
        assert (stop.value.code or 0) == code
        assert said in "".join(capsys.readouterr())


def test_evaluate_writes_its_metrics(trained, digits):
    run, _ = trained
    done = run_command("mfengine.evaluate", run, f"--data={digits}", "--num=200", cwd=run)
    assert done.returncode == 0, done.stderr
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["frechet_1nfe"] > 100 > 25 > figures["frechet_floor"] > 10  # twenty steps learn little
    assert 0 <= figures["accuracy_1nfe"] <= 1
    assert "frechet_2nfe" in done.stdout
    assert "two random halves of the real data are" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_training_with_every_option(compiled, digits, tmp_path, monkeypatch):
    """With bf16, recomputation, accumulation, clipping, guidance and compilation, it runs and its loss is finite."""
    monkeypatch.setattr(rates, "matrix_rate", lambda *_: 1e12)  # CPUs multiply bfloat16 slowly
    done = run_command(
        "mfengine.train", *SMALL, f"--data={digits}", "--steps=3", "--precision=bfloat16", "--recompute",
        "--accumulation=2", "--optim.clip-norm=1", "--method.omega=0.2", "--method.kappa=0.92", "--name=all",
        *["--compile"] * compiled, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "runs/all/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["loss"])
    assert line["skipped_steps"] == 0


def test_running_out_of_memory_is_one_line(digits, tmp_path, monkeypatch):
    def loss(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which ..."
        )

    monkeypatch.setattr(MeanFlow, "loss", loss)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 78.24e9)
    args = ("mfengine.train", *SMALL, f"--data={digits}")
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB, and the peak was 78.2 GB: "
        "save memory with --recompute or a larger --accumulation"
    )
    assert "Traceback" not in done.stderr


def test_failure_of_one_rank_is_reported_by_that_rank(monkeypatch, capsys):
    def fail(_):
        raise RankTrainingError("out of memory")

    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert (stop.value.code, capsys.readouterr().err) == (1, "error: rank 3: out of memory\n")


@pytest.mark.parametrize(("initialized", "expected"), [(False, None), (True, 12.346)])
def test_metrics_hold_the_peak_of_the_gpus_memory(initialized, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12_345_678_901)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 3})
    with Telemetry(tmp_path, True, 0, 1, 32, lambda: 1.0) as reports:
        reports.log(1, 0.5, 1e-4, 0)
    assert json.loads((tmp_path / METRICS).read_text())["memory_gb"] == expected


def test_ceiling_is_measured_again_when_a_step_beats_it(tmp_path):
    """A rate measured on a busy device is corrected, so MFU never exceeds 100 %."""
    rates = [1e-6, 1e9]
    with Telemetry(tmp_path, True, 0, 2, 32, lambda: rates.pop(0)) as reports:
        reports.log(1, 0.5, 1e-4, 0)
        reports.log(2, 1.0, 1e-4, 0)
    first, second = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert rates == []
    assert max(first["mfu"], second["mfu"]) < 1


def test_full_disk_keeps_metrics_until_there_is_room(tmp_path, capsys):
    """A partly written line is completed; nothing is lost, and the run goes on."""

    class Disk:
        room, content = 10, b""

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken, self.room = data[: self.room], max(0, self.room - len(data))
            self.content += taken
            return len(taken)

        def close(self):
            pass

    with Telemetry(tmp_path, True, 0, 3, 32, lambda: 1e9) as reports:
        reports._metrics = disk = Disk()
        reports.log(1, 0.5, 1e-4, 0)
        reports.log(2, 1.0, 1e-4, 0)
        disk.room = 1 << 20
        reports.log(3, 1.5, 1e-4, 0)
    assert [json.loads(line)["step"] for line in disk.content.splitlines()] == [1, 2, 3]
    assert capsys.readouterr().err.count("warning: metrics.jsonl cannot be written: ") == 1


def test_tensorboard_that_cannot_write_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    tried = []

    class Writer:
        def __init__(self, *_, **__):
            tried.append(1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    with Telemetry(tmp_path, True, 0, 2, 32, lambda: 1e9) as reports:
        reports.log(1, 0.5, 1e-4, 0)
        reports.log(2, 1.0, 1e-4, 0)
        reports._retry_at = 0.0
        reports.picture(2, torch.zeros(4, 3, 8, 8), "one step")
    assert len(tried) == 2
    assert capsys.readouterr().err.count("warning: the tracker cannot be written: ") == 1
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2


def test_damaged_metrics_are_not_overwritten(tmp_path):
    whole = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / METRICS).write_bytes(whole + b'{"st')  # as after a kill
    with Telemetry(tmp_path, True, 1, 3, 32, lambda: 1e9):
        assert (tmp_path / METRICS).read_bytes() == b'{"step": 1}\n'
    (tmp_path / METRICS).write_bytes(b"\xff\n" + whole)
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged at line 1"):
        Telemetry(tmp_path, True, 1, 3, 32, lambda: 1e9)
    assert (tmp_path / METRICS).read_bytes() == b"\xff\n" + whole


def test_training_starts_from_other_weights(trained, digits, tmp_path):
    run, _ = trained
    model, *_ = load_model(run)
    sit = {k: v for k, v in model.state_dict().items() if not k.startswith("h_embedder")}
    torch.save({"ema": sit}, tmp_path / "sit.pt")
    done = run_command(
        "mfengine.train", *SMALL, f"--data={digits}", "--steps=1", "--init=sit.pt", "--optim.lr=1e-12", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "sit.pt leaves h_embedder.mlp.0.weight" in done.stderr
    started, *_ = load_model(tmp_path / "runs/digits")
    torch.testing.assert_close(started.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert started.h_embedder.mlp[2].weight.abs().max() < 1e-6
    other = run_command(
        "mfengine.train",
        *SMALL,
        "--model.hidden-size=64",
        f"--data={digits}",
        "--init=sit.pt",
        "--name=x",
        cwd=tmp_path,
    )
    assert other.returncode == 2
    assert "sit.pt has another architecture: size mismatch" in other.stderr


def test_restart_of_a_run_killed_at_its_start(digits, tmp_path):
    (tmp_path / "runs/digits").mkdir(parents=True)
    (tmp_path / "runs/digits/.partial-config.json").write_text("{")
    done = run_command("mfengine.train", *SMALL, f"--data={digits}", "--steps=1", "--resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_checkpoint_under_another_name(trained, tmp_path):
    shutil.copytree(newest_checkpoint(trained[0]), tmp_path / "best")
    done = run_command("mfengine.generate", "best", cwd=tmp_path)
    assert done.returncode == 0
    (tmp_path / "best/checkpoint.json").write_text("")
    done = run_command("mfengine.generate", "best", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot read best/checkpoint.json" in done.stderr


# ----------------------------------------------------------------------------
# Being stopped.


@pytest.mark.forks
@pytest.mark.parametrize("signum", [signal.SIGTERM, slow(signal.SIGINT)])
def test_signal_writes_a_checkpoint_before_exit(digits, tmp_path, signum):
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=100000")
    files = (os.devnull, tmp_path / "stderr")
    process = forks.Process(target=run_in_fork, args=(args, tmp_path, 1, dict(os.environ), files))
    process.start()
    metrics = tmp_path / "runs/digits/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert newest_checkpoint(tmp_path / "runs/digits") is None
    os.kill(process.pid, signum)
    process.join(60)
    errors = (tmp_path / "stderr").read_text()
    assert process.exitcode == 128 + signum, errors
    step = json.loads((newest_checkpoint(tmp_path / "runs/digits") / "checkpoint.json").read_text())["step"]
    assert f"step {step} of 100000, checkpoint runs/digits/checkpoints/step-{step:08d}" in errors


def not_finite(tmp_path):
    """A data set of ten batches, with two samples whose mean is infinite."""
    space = LatentSpace(shape=(1, 8, 8), num_classes=10)
    moments = np.zeros((320, 1, 2, 1, 8, 8))
    moments[order(320, 0)[159::160]] = np.inf
    write_dataset(tmp_path / "bad", ArraySamples("bad", space, moments, np.arange(320) % 10))


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    not_finite(tmp_path)
    args = ("mfengine.train", *SMALL, "--data=bad", "--steps=11", "--checkpoint-every=1", "--evaluate-every=0")
    done = run_command(*args, "--name=strict", cwd=tmp_path)
    assert done.returncode == 1
    kept = newest_checkpoint(tmp_path / "runs/strict")
    last = json.loads((kept / "checkpoint.json").read_text())["step"] if kept else 0
    where = f"last complete checkpoint: {os.path.relpath(kept, tmp_path) if kept else 'none'}"
    assert (
        f"error: the loss is not finite at step {last + 1} on rank 0, after 0 skipped step(s); {where}" in done.stderr
    )

    done = run_command(*args, "--name=lenient", "--max-skipped-steps=3", "--checkpoint-every=11", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, *_ = load_model(tmp_path / "runs/lenient")
    assert all(p.isfinite().all() for p in model.parameters())
    last_line = json.loads((tmp_path / "runs/lenient/metrics.jsonl").read_text().splitlines()[-1])
    assert last_line["skipped_steps"] in (1, 2, 3)
    assert "skipped, 1 of 3" in done.stderr


def test_gradient_that_is_not_finite_skips_the_step(digits, tmp_path, monkeypatch):
    """The third and the last step have a finite loss, but a gradient that is not."""

    class Bad(MeanFlow):
        calls = 0

        def loss(self, model, *args):
            loss, metrics = super().loss(model, *args)
            self.calls += 1
            if self.calls in (3, 6):
                weight = next(iter(model.parameters())).sum()
                loss = loss + 0 * (weight - weight.detach()).sqrt()
            return loss, metrics

    monkeypatch.setitem(OBJECTIVES, "meanflow", Bad)
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=6")
    done = run_command(*args, "--max-skipped-steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a gradient is not finite at step 3: skipped, 1 of 2" in done.stderr
    assert "a gradient is not finite at step 6: skipped, 2 of 2" in done.stderr
    contents = checkpoint_contents(tmp_path / "runs/digits")
    assert {float(value) for name, value in contents.items() if name.endswith("/step")} == {4.0}
    assert all(value.isfinite().all() for name, value in contents.items() if name.startswith(("/model", "/ema")))
    done = run_command(*args, "--name=strict", "--checkpoint-every=1", cwd=tmp_path)
    assert done.returncode == 1
    message = "error: a gradient is not finite at step 3, after 0 skipped step(s); last complete checkpoint: "
    assert message in done.stderr
    assert done.stderr.strip().endswith("step-00000002")


PLANTED = {
    "output of blocks.2.attn": lambda y: y._replace(primal=y.primal * math.nan),
    "tangent of blocks.2.attn": lambda y: y._replace(tangent=y.tangent * math.nan),
    "gradient of blocks.2.": lambda y: y._replace(primal=infinite_slope(y.primal)),
}


def infinite_slope(x):
    return x + 0 * (x - x.detach()).sqrt()


@pytest.mark.parametrize("where", PLANTED)
def test_first_value_that_is_not_finite_is_named(where, digits, tmp_path, monkeypatch):
    """Planted in the attention of block 2, from the third step on."""

    class Planted(dit.Attention):
        def forward(self, x):
            y = super().forward(x)
            return PLANTED[where](y) if self.planted and steps[0] > 3 else y  # a Dual

    steps, planted = [0], []
    loss = MeanFlow.loss

    def counted(self, *args):
        steps[0] += 1
        return loss(self, *args)

    def build(*args, **options):
        planted.append(Planted(*args, **options))
        planted[-1].planted = len(planted) % 4 == 3  # the third of four blocks of a network
        return planted[-1]

    monkeypatch.setattr(dit, "Attention", build)
    monkeypatch.setattr(MeanFlow, "loss", counted)
    monkeypatch.setattr(trainer, "step_flops", lambda *_: 1e9)  # the real one makes another network
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=6", "--model.depth=4", "--debug-nonfinite")
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 1
    what = "a gradient is" if where.startswith("gradient") else "the loss is"
    assert re.search(
        rf"error: {what} not finite at step \d.* \(the first value is in the {where}.* on rank 0\)", done.stderr
    ), done.stderr


def test_weights_that_are_not_finite_are_not_saved(digits, tmp_path):
    args = ("mfengine.train", *SMALL, f"--data={digits}", "--optim.lr=1e38", "--checkpoint-every=1", "--steps=50")
    done = run_command(*args, "--max-skipped-steps=50", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: the weights are not finite after step" in done.stderr
    kept = newest_checkpoint(tmp_path / "runs/digits")
    assert kept is None or all(p.isfinite().all() for p in load_model(kept)[0].parameters())


# ----------------------------------------------------------------------------
# Wrong input: one line, exit code 2, nothing written.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mfengine.train", "xl3"], "there is no preset xl3; the nearest is xl2"),
        (["mfengine.train", "digits", "--lr=1"], "there is no option --lr; the nearest is --optim.lr"),
        (["mfengine.train", "--batch-sise", "4"], "there is no option --batch-sise; the nearest is --batch-size"),
        (["mfengine.train", "--batch-size", "many"], "Error parsing --batch-size"),
        (["mfengine.train", "--model.depth", "0"], "depth must be at least 1, not 0"),
        (["mfengine.train", "--data=nowhere"], "dataset.json does not exist: see docs/data.md"),
        (["mfengine.train", "xl2", "digits"], "unexpected argument digits"),
        (["mfengine.train", "--optim.betas", "2", "3"], "betas must be in [0, 1)"),
        (["mfengine.train", "--data=DATA", "--device=cpu", "--optim.backend=cuda"], "optim.backend cuda: "),
        (["mfengine.train", "--epochs", "nan"], "epochs must be positive"),
        (["mfengine.train", "--name", ""], "name must be the name of a folder"),
        (["mfengine.train", "--data=DATA", "--init=list.pt"], "no DiT in this checkpoint: it is a list"),
        (["mfengine.train", "--data=DATA", "--batch-size=250"], "interval share of 0.25 does not divide"),
        (["mfengine.train", "--data=DATA", "--accumulation=3"], "not a multiple of ranks x --accumulation = 1 x 3"),
        (["mfengine.train", "--data=DATA", "--model.input-size=16"], "holds latents of (1, 8, 8); the model takes"),
        (["mfengine.train", "--data=DATA", "--model.num-classes=5"], "has 10 classes; --model.num-classes is 5"),
        (["mfengine.train", "--data=DATA", "--replicas=2"], "replicas must divide the 1 rank(s); 2 does not"),
        (["mfengine.train", "--data=DATA", "--init=nowhere"], "nowhere must be a checkpoint"),
        (["mfengine.train", "--data=DATA", "--device=cuda"], "--device cuda is unavailable"),
        (["mfengine.prepare", "digits", "DATA"], "is not an empty folder"),
        (["mfengine.prepare", "digts", "out"], "there is no command digts; the nearest is digits"),
        (["mfengine.prepare"], "no command is given: choose one of digits"),
        (["mfengine.generate", "nowhere"], "nowhere must be a checkpoint"),
        (["mfengine.generate", "RUN", "--labels", "10"], "there is no label 10; the model has 0 to 9"),
        (["mfengine.generate", "RUN", "--steps=0"], "--steps must be different numbers, each at least 1"),
        (["mfengine.generate", "RUN", "--seed=-1"], "seed must be at least 0 and below 2^63, not -1"),
        (["mfengine.generate", "RUN", f"--seed={2**64}"], "seed must be at least 0 and below 2^63"),
        (["mfengine.train", "--seed=-1"], "seed must be at least 0 and below 2^63, not -1"),
        (["mfengine.evaluate", "RUN", "--data=DATA", "--seed=-1"], "seed must be at least 0 and below 2^63, not -1"),
        (["mfengine.generate", "RUN", "--out=x.jpg"], "must end in .png"),
        (["mfengine.generate", "RUN", "--ema-decay=0.1"], "no moving average with decay 0.1; it has [0.9, 0.5]"),
        (["mfengine.generate", "broken.safetensors"], "cannot read broken.safetensors"),
        (["mfengine.export", "RUN", "out.bin"], "must end in .safetensors or .pth"),
        (["mfengine.evaluate", "RUN", "--data=nowhere"], "dataset.json does not exist"),
        (["mfengine.train", "--steps=5", "digits"], "unexpected argument digits"),
        (["mfengine.train", "qqqqqq"], "there is no preset qqqqqq; there are digits, small-8"),
        (["mfengine.train", "--zzzzz=1"], "there is no option --zzzzz (`"),
        (["mfengine.train", "--batch-size=0"], "--batch-size must be at least 1, not 0"),
        (["mfengine.train", "--model.hidden-size=30"], "--model.hidden-size 30 is not a multiple of --model.num-heads"),
        (["mfengine.train", "--optim.lr=inf"], "--optim.lr must be finite, not inf"),
        (
            ["mfengine.train", "--method.t-start=0.8", "--method.t-end=0.2"],
            "--method.t-start must be at most --method.t-end 0.2, not 0.8",
        ),
        (["mfengine.train", "--method.norm-p=-1"], "--method.norm-p must be at least 0, not -1.0"),
        (["mfengine.train", "--init-reverse-time"], "--init-reverse-time needs --init"),
        (["mfengine.generate", "RUN", "--conditions", "omega", "nan"], "--conditions must be finite, not nan"),
        (["mfengine.evaluate", "RUN", "--data=DATA", "--vae=x"], "--vae needs --reference or --save"),
        (["mfengine.export", "RUN"], "OUT must be given"),
        (["mfengine.export", "x.safetensors", "y.safetensors"], "x.safetensors is already an export"),
        (["mfengine.prepare", "images", "RUN"], "OUT and --vae must be given"),
        (["mfengine.prepare", "images", "RUN", "RUN/out", "--vae=x"], "/out is inside the source "),
        (["mfengine.prepare", "check", "RUN"], "is a run folder, not a data set"),
        (["mfengine.info", "extra"], "unexpected argument extra"),
    ],
)
def test_wrong_input(trained, digits, tmp_path, args, message):
    if "cuda" in args[-1] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    torch.save([1], tmp_path / "list.pt")
    places = {"DATA": str(digits), "RUN": str(trained[0])}
    args = [places.get(part, part) for part in args]
    args = [part.replace("=DATA", f"={digits}").replace("RUN/", f"{trained[0]}/") for part in args]
    done = run_command(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert {p.name for p in tmp_path.rglob("*")} == {"broken.safetensors", "list.pt"}


def test_wrong_input_exits_with_code_2(tmp_path):
    """The line is printed even if tyro cannot draw a frame; other tests have UTF-8."""
    done = run_command("mfengine.train", "--batch-size=many", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: Error parsing --batch-size: invalid literal")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "holds a run: continue it with --resume auto, or choose another --name"),
        (["--resume=auto", "--model.depth=2"], "has a run with model.depth 1, not 2"),
        (["--resume=auto", "--seed=7"], "has a run with seed 0, not 7, which must not change"),
        (["--resume=auto", "--method.kappa=0.5"], "has a run with method.kappa 0.0, not 0.5"),
        (["--resume=auto", "--optim.ema-decays", "0.9"], "has a run with optim.ema_decays [0.9, 0.5], not [0.9]"),
        (["--name=checkpoints", "--runs=RUN"], "is not a run folder"),
    ],
)
def test_occupied_run_folder(trained, digits, args, message):
    run, _ = trained
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    args = [part.replace("RUN", str(run)) for part in args]
    done = run_command(
        "mfengine.train", *SMALL, f"--data={digits}", "--optim.ema-decays", "0.9", "0.5", *args,
        cwd=run.parent.parent,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_checkpoint_of_another_architecture(trained, tmp_path):
    """The description was altered, and the shapes show it."""
    description = newest_checkpoint(trained[0]) / "checkpoint.json"
    kept = description.read_text()
    values = json.loads(kept)
    values["model"]["hidden_size"] = 64
    description.write_text(json.dumps(values))
    try:
        done = run_command("mfengine.generate", trained[0], "--skip-checksums", cwd=tmp_path)
    finally:
        description.write_text(kept)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "x"}, 'step is "x", not an integer'),
        ({"step": -1}, "step must be at least 0, not -1"),
        ({"ema_decays": []}, "ema_decays must not be empty"),
        ({"network": "unet"}, "there is no network unet; there are dit"),
        ({"network": ["dit"]}, "there is no network"),
        ({"model": {"depth": None}}, "model.depth is null, not an integer"),
        ({"model": {"mlp_ratio": math.inf}}, "model.mlp_ratio must be finite, not inf"),
        ({"model": {"depth": 0}}, "model.depth must be at least 1, not 0"),
        ({"method": 3}, "method is 3, not an object"),
        ({"space": None}, "space is null, not an object"),
        ({"space": {"shape": [4, 8, 8], "num_classes": 10}}, "does not fit the model"),
    ],
)
def test_description_of_a_checkpoint_is_validated(trained, tmp_path, change, message):
    description = json.loads((newest_checkpoint(trained[0]) / "checkpoint.json").read_text())
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps({**description, **change, "files": {}}))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_description(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


def test_help_of_every_command(tmp_path):
    for args, text in (
        (["mfengine.train", "--help"], "676 M parameters, 240 epochs"),
        (["mfengine.train", "b4", "--help"], "guidance weight of the sample's own velocity"),
        (["mfengine.generate", "--help"], "network evaluations per sample"),
    ):
        done = run_command(*args, cwd=tmp_path)
        assert done.returncode == 0
        assert text in " ".join(done.stdout.replace("│", " ").split())


@pytest.mark.slow  # starts a new Python
def test_closed_pipe_ends_the_command_silently(tmp_path):
    """Like `head`: no message, and the exit code of a process killed by SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "mfengine.train", *SMALL, "--dry-run"],
        cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def small_vae(folder, channels):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae


def test_pictures_of_a_run_are_decoded_and_end_in_a_strip(digits, tmp_path):
    """First columns side by side; a VAE with the wrong number of channels is rejected before the first step."""
    small_vae(tmp_path / "vae", 1)
    small_vae(tmp_path / "other", 4)
    train = ("mfengine.train", *SMALL, f"--data={digits}", "--steps=3", "--sample-every=1")
    done = run_command(*train, "--vae=other", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: --vae other has 4 latent channels; the data has 1",
    )
    assert not (tmp_path / "runs").exists()
    assert run_command(*train, "--vae=vae", cwd=tmp_path).returncode == 0
    run = tmp_path / "runs/digits"
    pictures = [np.asarray(Image.open(run / f"samples/0000000{step}.png")) for step in (1, 2, 3)]
    strip = np.asarray(Image.open(run / "strip.png"))
    width, side = pictures[0].shape[1] // 8, 16 * 8 + 9  # of 16 x 16 pixels each, which 8 x 8 latents become
    assert pictures[0].shape == (480 // side * side,) * 2 + (3,)
    expected = np.concatenate([picture[:, :width] for picture in pictures], 1)
    factor = len(strip) // len(expected)
    assert np.array_equal(strip[::factor, ::factor], expected)


def test_vae_decodes_latents(tmp_path):
    vae = small_vae(tmp_path / "vae", 4)
    from mfengine.data.vae import VAE

    space = LatentSpace(shape=(4, 8, 8), num_classes=10, scale=0.2, bias=0.5)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.2 + 0.5).sample / 2 + 0.5).clamp(0, 1)
    images = VAE(tmp_path / "vae", torch.device("cpu")).decode(latents, space)
    torch.testing.assert_close(images, expected)
    assert images.shape == (2, 3, 16, 16)
