"""All commands in sequence: from a folder of images to the metrics of one-step samples."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import kill, run_command
from PIL import Image

CLASSES, PER_CLASS, SIZE, SHARD = 10, 60, 32, 100
TINY = (
    "b4", "--model.input-size=16", "--model.patch-size=4", "--model.hidden-size=32", "--model.depth=2",
    "--model.num-heads=2", "--model.num-classes=10", "--batch-size=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """600 crops of two photographs, in several sizes and formats; those of one class are close to each other."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    folder = tmp_path_factory.mktemp("end-to-end") / "photographs"
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class-{label}").mkdir(parents=True)
        image = images[label % 2]
        for i in range(PER_CLASS):
            height, width = generator.integers(24, 90, 2)
            top = generator.integers(0, image.shape[0] - height)
            left = 60 * (label // 2) + generator.integers(0, 60)
            crop = Image.fromarray(image[top : top + height, left : left + width])
            crop.save(folder / f"class-{label}" / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def vae(photographs):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
    )
    autoencoder.save_pretrained(photographs.parent / "vae")
    return photographs.parent / "vae"


def killed(args, cwd, records, ranks=2):
    """Run the command until this many shards are finished, then kill all of its processes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", *map(str, args)],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(whole_shards(cwd)) < records and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    kill(process)


def whole_shards(cwd):
    return sorted(cwd.glob(".partial-latents/[0-9]*.json"))


@pytest.mark.slow
def test_photographs_to_metrics(photographs, vae):
    cwd = photographs.parent
    prepare = ("mfengine.prepare", "images", photographs, "latents", f"--vae={vae}", f"--size={SIZE}",
               f"--shard-samples={SHARD}", "--batch-size=16")  # fmt: skip

    def run(*args, **kwargs):
        done = run_command(*args, cwd=cwd, **kwargs)
        assert done.returncode == 0, done.stderr
        return done

    # Prepared by two processes, killed twice on the way.
    for records in (1, 3):
        killed(prepare, cwd, records)
        assert not (cwd / "latents").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in cwd.glob(".partial-latents/data/*.tar")}
    records = [path.stem for path in whole_shards(cwd)]
    assert records
    run(*prepare, ranks=2)
    assert all((cwd / f"latents/{name}.tar").stat().st_mtime_ns == kept[f"{name}.tar"] for name in records)
    run(*prepare[:3], "straight", *prepare[4:])
    for path in (cwd / "straight").iterdir():
        if path.suffix in (".tar", ".idx"):
            assert path.read_bytes() == (cwd / "latents" / path.name).read_bytes(), path.name
    described, straight = (json.loads((cwd / name / "dataset.json").read_text()) for name in ("latents", "straight"))
    assert described["count"] == CLASSES * PER_CLASS
    assert described["shards"] == straight["shards"]
    assert len(described["shards"]) == CLASSES * PER_CLASS / SHARD

    run("mfengine.prepare", "check", "latents")
    plan = run("mfengine.train", *TINY, "--data=latents", "--dry-run", "--name=tiny")
    assert "ready to start; nothing was written" in plan.stdout
    run(
        "mfengine.train",
        *TINY,
        "--data=latents",
        "--steps=50",
        "--evaluate-every=25",
        "--sample-every=50",
        "--name=tiny",
    )
    measured = [json.loads(line) for line in (cwd / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert any("frechet_1nfe" in line for line in measured)
    run("mfengine.generate", "runs/tiny", f"--vae={vae}", "--out=grid.png", "--per-label=2")
    assert Image.open(cwd / "grid.png").size[0] >= SIZE * 2
    run(
        "mfengine.evaluate",
        "runs/tiny",
        "--data=latents",
        f"--vae={vae}",
        "--steps=1",
        "--num=100",
        "--save=images.npz",
    )
    figures = json.loads((cwd / "runs/tiny/metrics.json").read_text())
    assert figures["frechet_1nfe"] > 0
    images = np.load(cwd / "images.npz")["arr_0"]
    assert images.shape == (100, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    run("mfengine.export", "runs/tiny", "tiny.safetensors")
    run("mfengine.generate", "tiny.safetensors", f"--vae={vae}", "--out=again.png", "--per-label=2")
    assert (cwd / "again.png").read_bytes() == (cwd / "grid.png").read_bytes()
