"""Evaluation: samples and metrics that do not depend on the number of ranks, and agree with other libraries."""

import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import SMALL, run_command
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mfengine import DiT, ModelConfig
from mfengine.configs import to_json
from mfengine.data.format import Dataset, LatentSpace, iterate_means, read_means
from mfengine.data.image_files import ImageArchive, ImageFolder
from mfengine.data.vae import VAE
from mfengine.data.writer import ArraySamples, order, write_dataset
from mfengine.engine import trainer
from mfengine.engine.checkpoint import newest_checkpoint
from mfengine.engine.weights import load_model
from mfengine.errors import InputError, RankError
from mfengine.evaluation.frechet import Moments, data_moments, fit_data, frechet_distance, latent_distance
from mfengine.evaluation.metrics import SAMPLES, LabelReader, write_metrics
from mfengine.evaluation.samples import SampleSet
from mfengine.networks import NETWORKS
from mfengine.ranks import World

ALONE = World(0, 1, torch.device("cpu"))
TRAIN = (
    *("mfengine.train", *SMALL, "--evaluate-every=10", "--checkpoint-every=10"),
    *("--optim.lr=1e-3", "--optim.ema-decays=0.5"),
)
LATENTS = LatentSpace(shape=(4, 8, 8), num_classes=10, scale=(0.2, 0.3, 0.5, 1.0), bias=(0.5, -1.0, 2.0, 0.0))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A run of 20 steps that evaluates samples twice, but fewer than usual."""
    folder = tmp_path_factory.mktemp("trained")
    with mock.patch.object(trainer, "MEASURED_SAMPLES", 2000):
        done = run_command(*TRAIN, f"--data={digits}", "--steps=20", "--accumulation=2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs/digits", done


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An untrained model of VAE latents: 4 x 8 x 8."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(8, 4, 4, hidden_size=32, depth=1, num_heads=2, num_classes=10))
    for p in model.final_layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("export") / "model.safetensors"
    description = {"step": 0, **NETWORKS.describe(model.config, "model"), "space": to_json(LATENTS)}
    save_file(model.state_dict(), path, metadata={"mfengine": json.dumps(description)})
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vae") / "vae"
    network.save_pretrained(path)
    return path, network


# ----------------------------------------------------------------------------
# Samples.


class Shifting(torch.nn.Module):
    """A network whose one-step sample from noise e is e / 2 - y."""

    def forward(self, z, t, h, y):
        return z / 2 + y[:, None, None, None]


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_a_sample_depends_on_seed_and_number_alone(labels):
    def drawn(count, batch, seed=0, ranks=1):
        samples = SampleSet(LATENTS, count, batch, seed, labels)
        found = {}
        for rank in range(ranks):
            for rows, latents, y in samples.draw(Shifting(), 1, World(rank, ranks, ALONE.device)):
                found |= dict(zip(rows, zip(latents, y.tolist(), strict=True), strict=True))
        assert sorted(found) == list(range(count))
        return found

    whole = drawn(40, 40)
    for other in (drawn(40, 7), drawn(33, 16), drawn(40, 7, ranks=3), drawn(5, 2, ranks=8)):
        assert all(torch.equal(whole[i][0], latents) and whole[i][1] == y for i, (latents, y) in other.items())
    noise = torch.stack([latents + y for latents, y in whole.values()]) * 2
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(drawn(1, 1, seed=1)[0][0] * 2, noise[0])
    numbers = [y for _, y in whole.values()]
    assert (numbers == [i % 10 for i in range(40)]) == (labels == "balanced")
    assert set(numbers) <= set(range(10))
    assert len(set(numbers)) > 5


def test_every_rank_calls_the_network_equally_often():
    """As a sharded model needs it: 5 slices over 3 ranks."""

    class Counting(Shifting):
        calls = 0

        def forward(self, z, t, h, y):
            self.calls += 1
            return super().forward(z, t, h, y)

    models = [Counting() for _ in range(3)]
    for rank, model in enumerate(models):
        list(SampleSet(LATENTS, 10, 2).draw(model, 2, World(rank, 3, ALONE.device)))
    assert [model.calls for model in models] == [4, 4, 4]


# ----------------------------------------------------------------------------
# The Frechet distance of latents.


def by_scipy(a, b):
    """The distance with SciPy's matrix square root."""
    linalg = pytest.importorskip("scipy.linalg", reason="SciPy comes with the extra digits")
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(sum(covariances) - 2 * linalg.sqrtm(covariances[0] @ covariances[1]).real)


def fitted(x, pieces=1):
    moments = Moments(x.shape[1], ALONE.device)
    for piece in np.array_split(x, pieces):
        moments.add(torch.from_numpy(piece))
    return moments.fit()


@pytest.mark.parametrize("n", [2000, 30], ids=["regular", "singular"])
def test_frechet_distance_agrees_with_scipy(n):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((2, 40, 40))
    a, b = rng.standard_normal((n, 40)) @ mix[0] + 3, rng.standard_normal((n + 5, 40)) @ mix[1]
    assert frechet_distance(fitted(a), fitted(b)) == pytest.approx(by_scipy(a, b), rel=1e-4 if n < 40 else 1e-9)
    assert frechet_distance(fitted(a), fitted(a)) == pytest.approx(0, abs=1e-4)


def test_moments_equal_numpys_in_any_pieces():
    x = np.random.default_rng(0).standard_normal((300, 20)) * 6 + 5
    halves = [Moments(20, ALONE.device) for _ in range(2)]
    for half, part in zip(halves, (x[:100], x[100:]), strict=True):
        half.add(torch.from_numpy(part))
    halves[0].merge(halves[1])
    for gaussian in (fitted(x), fitted(x, pieces=7), halves[0].fit()):
        np.testing.assert_allclose(gaussian.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_distance_of_nonfinite_samples_is_nan():
    x = np.random.default_rng(0).standard_normal((30, 4))
    broken = np.where(x == x[0, 0], np.inf, x)
    assert np.isnan(frechet_distance(fitted(x), fitted(broken)))


@pytest.mark.parametrize("num_parts", [1, 3])
def test_means_are_read_in_parts(tmp_path, num_parts):
    moments = np.random.default_rng(0).standard_normal((50, 2, 2, *LATENTS.shape))
    labels, written = np.arange(50) % 10, order(50, seed=0)
    dataset = write_dataset(tmp_path / "data", ArraySamples("x", LATENTS, moments, labels), shard_samples=20)
    found = [piece for part in range(num_parts) for piece in iterate_means(dataset, part, num_parts, batch=7)]
    assert np.array_equal(np.concatenate([means for _, means, _ in found]), moments[written, 0, 0].astype(np.float16))
    assert np.array_equal(np.concatenate([labels for _, _, labels in found]), labels[written])
    assert [first for first, _, _ in found] == list(np.cumsum([0] + [len(means) for _, means, _ in found])[:-1])


def test_unreadable_means(tmp_path):
    zeros = ArraySamples("x", LATENTS, np.zeros((3, 1, 2, *LATENTS.shape)), np.zeros(3, int))
    dataset = write_dataset(tmp_path / "data", zeros)
    index = tmp_path / "data/000000.idx"
    kept = index.read_text()
    for wrong, message in (
        (kept.replace("label", "lebal"), "'label'"),
        (kept.replace(" 4 ", "99999 4 "), "it ends before the last sample in its index"),
    ):
        index.write_text(wrong)
        with pytest.raises(RankError, match=rf"cannot read .*000000.tar: {message}"):
            list(iterate_means(dataset))


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [(0.0, [0, 1, 7], "a label outside 0 to 3"), (np.nan, [0, 1, 2], "means that are not finite")],
)
def test_data_that_training_rejects_is_not_evaluated(tmp_path, values, labels, message):
    space = LatentSpace((1, 2, 2), num_classes=8)
    moments = np.full((3, 1, 2, *space.shape), values)
    dataset = write_dataset(tmp_path / "data", ArraySamples("x", space, moments, np.array(labels)))
    path = dataset.folder / "dataset.json"
    path.write_text(path.read_text().replace('"num_classes": 8', '"num_classes": 4'))
    with pytest.raises(InputError, match=message):
        read_means(Dataset.read(dataset.folder))


def test_labels_of_one_class_cannot_be_read(tmp_path):
    moments = np.zeros((3, 1, 2, 1, 2, 2))
    samples = ArraySamples("x", LatentSpace((1, 2, 2), num_classes=4), moments, np.array([1, 1, 1]))
    with pytest.raises(InputError, match="samples of only one class"):
        LabelReader(write_dataset(tmp_path / "data", samples))


def test_halves_of_the_data(digits):
    """The floor is the distance between two random halves; together they are the data."""
    dataset = Dataset.open(digits)
    pixels = read_means(dataset)[0].reshape(dataset.count, -1).astype(np.float64)
    first, second = (half.fit() for half in data_moments(dataset, ALONE))
    order = np.random.default_rng(0).permutation(dataset.count)
    assert frechet_distance(first, second) == pytest.approx(by_scipy(pixels[order[::2]], pixels[order[1::2]]), rel=1e-6)
    np.testing.assert_allclose(fit_data(dataset, ALONE).covariance, np.cov(pixels, rowvar=False), rtol=1e-9, atol=1e-12)


def test_labels_are_read(digits):
    dataset = Dataset.open(digits)
    pixels, labels = (torch.from_numpy(x) for x in read_means(dataset))
    reader = LabelReader(dataset)
    assert reader.hits(pixels.flatten(1), labels) > 0.97 * dataset.count
    assert reader.hits(pixels.flatten(1), (labels + 1) % 10) < 0.03 * dataset.count


# ----------------------------------------------------------------------------
# In training.


def measured(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["frechet_1nfe"] for line in lines if "frechet_1nfe" in line}


def test_training_measures_its_samples(trained, digits):
    run, done = trained
    figures = measured(run)
    assert list(figures) == [10, 20]
    assert f"step 20: frechet_1nfe {figures[20]:.4g}" in done.stderr
    model, space, *_ = load_model(run)
    samples = SampleSet(space, 2000, 32)
    distance = latent_distance(model, samples, 1, fit_data(Dataset.open(digits), ALONE), ALONE)
    assert figures[20] == pytest.approx(distance, rel=1e-6)
    assert figures[10] > figures[20]


@pytest.mark.slow  # a test of the command, below, has two processes
def test_two_processes_measure_the_same_and_a_resumed_run_repeats_it(digits, tmp_path):
    """The model is sharded, and 10,000 samples are dealt to two ranks in slices of 16."""
    alone = run_command(*TRAIN, f"--data={digits}", "--steps=20", "--accumulation=2", "--name=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    for steps, resume in ((10, "never"), (20, "auto")):
        args = (f"--data={digits}", f"--steps={steps}", f"--resume={resume}")
        done = run_command(*TRAIN, *args, cwd=tmp_path, ranks=2)
        assert done.returncode == 0, done.stderr
    assert measured(tmp_path / "runs/digits") == pytest.approx(measured(tmp_path / "runs/alone"), rel=1e-4)


# ----------------------------------------------------------------------------
# The command.


def images_of(path):
    """Images (N, H, W, 3) from a folder or an .npz."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            assert list(arrays.keys()) == ["arr_0"]
            return arrays["arr_0"]
    names = sorted(p.name for p in path.iterdir())
    assert names == [f"{i:06d}.png" for i in range(len(names))]
    return np.stack([np.asarray(Image.open(path / name)) for name in names])


@pytest.mark.forks
def test_two_processes_give_the_metrics_and_images_of_one(trained, digits, tmp_path):
    """71 samples in slices of 16: three slices for the first rank, two for the second."""
    args = ("mfengine.evaluate", trained[0], f"--data={digits}", "--num-samples=71", "--batch-size=16")
    done = run_command(*args, "--save=folder", "--out=two.json", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "samples/s" in done.stderr
    done = run_command(*args, "--save=one.npz", "--out=one.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert {"frechet_1nfe", "accuracy_1nfe", "frechet_2nfe", "frechet_floor", "samples", "checkpoint"} <= one.keys()
    for name, value in one.items():
        assert two[name] == (pytest.approx(value, rel=1e-8) if isinstance(value, float) else value), name
        assert name in done.stdout or value is None
    images = images_of(tmp_path / "one.npz")
    assert images.shape == (71, 8, 8, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images_of(tmp_path / "folder"), images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "one.json", "one.npz", "two.json"]

    model, space, *_ = load_model(trained[0])
    pixels = torch.cat([latents for _, latents, _ in SampleSet(space, 71, 16).draw(model, 1, ALONE)])
    expected = (space.unscale(pixels) / 16 * 255).clamp(0, 255).to(torch.uint8)  # rounded down
    assert np.array_equal(images[..., 0], expected[:, 0])


def test_images_of_latents_are_decoded(export, vae, tmp_path):
    args = ("mfengine.evaluate", export, "--num=5", "--batch-size=3", f"--vae={vae[0]}", "--steps", "2")
    done = run_command(*args, "--save=x.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, space, *_ = load_model(export)
    latents = torch.cat([latents for _, latents, _ in SampleSet(space, 5, 3).draw(model, 2, ALONE)])
    with torch.no_grad():
        scale, bias = (torch.tensor(value)[:, None, None] for value in (LATENTS.scale, LATENTS.bias))
        images = vae[1].decode(latents / scale + bias).sample
    expected = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    found = images_of(tmp_path / "x.npz")
    assert found.shape == (5, 16, 16, 3)
    assert np.abs(found.astype(int) - expected.numpy()).max() <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]  # no metrics


def test_too_few_samples_are_reported(export, tmp_path):
    moments = np.random.default_rng(0).standard_normal((300, 1, 2, *LATENTS.shape))
    write_dataset(tmp_path / "data", ArraySamples("x", LATENTS, moments, np.arange(300) % 10))
    args = ("mfengine.evaluate", export, "--data=data", "--steps=1", "--out=metrics.json")
    done = run_command(*args, "--num=256", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: 256 samples are too few: the covariance of 256 dimensions is singular" in done.stderr
    figures = json.loads((tmp_path / "metrics.json").read_text())
    named = {*SAMPLES} - {"conditions"}  # which are named only if some are given
    assert figures.keys() == {"frechet_1nfe", "frechet_floor", *named, "data"}  # no pixels, no labels to read
    done = run_command(*args, "--num=300", cwd=tmp_path)
    assert (done.returncode, "note:" in done.stderr) == (0, False)


def test_metrics_of_the_same_samples_are_kept(tmp_path):
    """Metrics against data stay when references are added; nothing stays from other samples or other data."""
    path = tmp_path / "metrics.json"
    path.write_text('{"fid_1nfe": 1.0, "samples": 9, "checkpoint": "step-1"}')  # as mfengine 0.1 wrote it
    samples = dict.fromkeys(SAMPLES, 1)
    measured = {**samples, "data": "a"}
    write_metrics({"frechet_1nfe": 2.0}, measured, path)
    assert json.loads(path.read_text()) == {"frechet_1nfe": 2.0, **measured}
    write_metrics({"fid_1nfe": 3.0}, {**samples, "reference": "b", "vae": "c"}, path)
    both = {"frechet_1nfe": 2.0, "fid_1nfe": 3.0, **measured, "reference": "b", "vae": "c"}
    assert json.loads(path.read_text()) == both
    write_metrics({"frechet_2nfe": 4.0}, measured, path)
    assert json.loads(path.read_text()) == {**both, "frechet_2nfe": 4.0}
    for other in ({**measured, "data": "d"}, {**measured, "seed": 2}):
        write_metrics({"frechet_1nfe": 5.0}, other, path)
        assert json.loads(path.read_text()) == {"frechet_1nfe": 5.0, **other}
    path.write_text("[]")
    write_metrics({"frechet_1nfe": 5.0}, measured, path)
    assert json.loads(path.read_text()) == {"frechet_1nfe": 5.0, **measured}


def test_metrics_name_their_samples(trained, digits, tmp_path):
    done = run_command(
        "mfengine.evaluate", trained[0], f"--data={digits}", "--num=20", "--batch-size=10", "--seed=3", "--steps=1",
        "--labels=random", "--ema-decay=0.5", "--out=x.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "x.json").read_text())
    assert {name: value for name, value in figures.items() if "nfe" not in name and name != "frechet_floor"} == {
        "seed": 3, "labels": "random", "batch_size": 10, "ema_decay": 0.5, "samples": 20,
        "checkpoint": str(newest_checkpoint(trained[0])), "data": str(digits),
    }  # fmt: skip


def test_too_little_memory_to_decode(vae, monkeypatch):
    decoder = VAE(vae[0], ALONE.device)

    def too_little(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decoder._vae, "decode", too_little)
    with pytest.raises(RankError, match="too little GPU memory to decode 2 latents at a time: choose a smaller batch"):
        decoder.decode(torch.zeros(2, *LATENTS.shape), LATENTS)


# ----------------------------------------------------------------------------
# Wrong input.


@pytest.fixture(scope="module")
def made_references(tmp_path_factory):
    """A valid reference of 8 x 8 images, and several invalid ones."""
    folder = tmp_path_factory.mktemp("references")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    mu, sigma = np.zeros(2048, np.float32), np.eye(2048)
    np.savez(folder / "good.npz", images, mu=mu, sigma=sigma)
    np.savez(folder / "keys.npz", mean=mu, cov=sigma)
    np.savez(folder / "mu.npz", mu=mu[:64], sigma=sigma)
    np.savez(folder / "sigma.npz", mu=mu, sigma=sigma[:64])
    np.savez(folder / "float.npz", images / 255)
    np.savez(folder / "planar.npz", images.transpose(0, 3, 1, 2))
    np.savez(folder / "few.npz", images[:3])
    np.savez(folder / "object.npz", np.array([{}], dtype=object))
    (folder / "broken.npz").write_bytes(b"PK broken")
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text/a.png").write_text("no image")
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"images/{i}.png")
    np.save(folder / "w.pt", mu)
    zeros = ArraySamples("x", LATENTS, np.zeros((10, 1, 2, *LATENTS.shape)), np.arange(10))
    write_dataset(folder / "latents", zeros)
    return folder


@pytest.fixture
def references(made_references, tmp_path):
    """The references in the test's folder; large files are links."""
    shutil.copytree(made_references, tmp_path, copy_function=os.link, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to do: give --data or --reference to measure against, or --save"),
        (["--data=DATA", "--num=1"], "--num must be at least 2"),
        (["--data=DATA", "--num=0"], "--num must be at least 2"),
        (["--data=DATA", "--steps", "0"], "--steps must be different numbers, each at least 1"),
        (["--data=DATA", "--steps"], "--steps must be different numbers"),
        (["--data=DATA", "--labels=even"], "even"),
        (["--data=DATA", "--number=3"], "there is no option --number; the nearest is --num"),
        (["--data=DATA", "--out=nowhere/x.json"], "folder nowhere does not exist"),
        (["--data=DATA", "--out=images"], "images is a folder: name a file in it"),
        (["--data=DATA", "--save=good.npz/x"], "good.npz is not a writable folder"),
        (["--data=DATA", "--seed=-1"], "seed must be at least 0 and below 2^63, not -1"),
        (["--data=DATA", "--ema-decay=0.1"], "no moving average with decay 0.1; it has [0.5]"),
        (["--data=DATA", "--sweep", "omega=1"], "no setting to sweep omega; there are steps, ema_decay"),
        (["--data=DATA", "--sweep", "steps=1.5"], "--sweep steps=1.5: values must be whole numbers, as in"),
        (["--data=DATA", "--sweep", "steps"], "--sweep steps: values must be whole numbers"),
        (["--data=DATA", "--sweep", "steps=0"], "--sweep steps=0: steps must be at least 1"),
        (["--data=DATA", "--sweep", "ema_decay=0.5,nan"], "values must be finite and different"),
        (["--data=DATA", "--sweep", "steps=1", "steps=2"], "--sweep steps=2: steps is given twice"),
        (["--data=DATA", "--sweep", "ema_decay=0.5,0.1"], "no moving average with decay 0.1; it has [0.5]"),
        (["--sweep", "steps=1", "--save=x"], "--sweep needs --data or --reference"),
        (["--data=DATA", "--sweep", "steps=1", "--out=x.png"], "--out x.png must end in .json with --sweep"),
        (["--data=DATA", "--conditions", "omega"], "--conditions takes pairs of a name and a number, as in"),
        (["--data=DATA", "--conditions", "omega", "x"], "--conditions takes pairs of a name and a number, as in"),
        (["--data=nowhere"], "dataset.json does not exist"),
        (["--data=DATA", "--device=cuda"], "--device cuda is unavailable"),
        (["--data=LATENTS"], "holds latents of (4, 8, 8); the model takes (1, 8, 8)"),
        (["--save=images"], "images is not an empty folder"),
        (["--save=good.npz"], "good.npz exists: choose another name"),
        (["--reference=good.npz", "--num=9"], "--num must be at least 10 with --reference"),
        (["--reference=nowhere"], "reference nowhere is neither a folder of images nor an .npz file"),
        (["--reference=w.pt"], "reference w.pt is neither"),
        (["--reference=keys.npz"], "keys.npz has cov, mean; it needs reference statistics as mu and sigma"),
        (["--reference=mu.npz"], "mu.npz: mu is (64,); for Inception features it must be (2048,)"),
        (["--reference=sigma.npz"], "sigma.npz: sigma is (64, 2048); for Inception features it must be (2048, 2048)"),
        (["--reference=float.npz"], "arr_0 is float64 (5, 8, 8, 3); images must be uint8 (N, H, W, 3)"),
        (["--reference=planar.npz"], "arr_0 is uint8 (5, 3, 8, 8); images must be uint8 (N, H, W, 3)"),
        (["--reference=few.npz"], "few.npz has 3 image(s); a reference needs more than 3"),
        (["--reference=object.npz"], "arr_0 is object"),
        (["--reference=broken.npz"], "broken.npz is not an .npz file"),
        (["--reference=empty"], "empty has no images (.jpg"),
        (["--reference=text"], "cannot read text/a.png: cannot identify image file"),
    ],
)
def test_wrong_input(trained, digits, references, tmp_path, args, message):
    if "--device=cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = sorted(tmp_path.rglob("*"))
    args = [part.replace("DATA", str(digits)).replace("LATENTS", "latents") for part in args]
    done = run_command("mfengine.evaluate", trained[0], *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_run_folder_that_cannot_be_written_to(trained, digits, tmp_path, monkeypatch):
    """It is found before samples are drawn."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    done = run_command("mfengine.evaluate", trained[0], f"--data={digits}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot write {trained[0] / 'metrics.json'}: {trained[0]} is not a writable folder\n"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--save=x.npz"], "latents of (4, 8, 8) need a VAE to become images: give it with --vae"),
        (["--save=x", "--vae=empty"], "cannot load the VAE empty"),
        (["--save=x", "--vae=THREE"], "the VAE has 3 latent channels; the model has 4"),
        (["--reference=good.npz", "--vae=VAE"], "the images of good.npz are 8 x 8, but those of the model are 16 x 16"),
        (["--reference=images", "--vae=VAE"], "the images of images are 8 x 8, but those of the model are 16 x 16"),
    ],
)
def test_decoders_and_references_that_do_not_fit(export, vae, references, tmp_path, args, message):
    if "THREE" in args[-1]:
        type(vae[1]).from_config({**vae[1].config, "latent_channels": 3}).save_pretrained(tmp_path / "three")
    before = sorted(tmp_path.rglob("*"))
    args = [part.replace("VAE", str(vae[0])).replace("THREE", "three") for part in args]
    done = run_command("mfengine.evaluate", export, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_reference_image_that_is_broken_or_of_another_size(references, tmp_path):
    for name in ("2.png", "4.png"):
        content = (tmp_path / "images" / name).read_bytes()
        (tmp_path / "images" / name).unlink()  # a link
        (tmp_path / "images" / name).write_bytes(content)
    Image.new("RGB", (9, 8)).save(tmp_path / "images/4.png")
    folder = ImageFolder(tmp_path / "images")
    assert folder.read(range(4)).shape == (4, 3, 8, 8)
    with pytest.raises(RankError, match=r"4.png is 9 x 8, but 0.png is 8 x 8: crop all images to one size"):
        folder.read(range(3, 5))
    (tmp_path / "images/2.png").write_bytes((tmp_path / "images/2.png").read_bytes()[:60])
    with pytest.raises(RankError, match=r"cannot read .*2.png"):
        folder.read(range(4))


def test_reference_images_of_a_compressed_archive(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 4, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images)
    archive = ImageArchive(tmp_path / "x.npz")
    assert (len(archive), archive.height, archive.width) == (20, 8, 4)
    for rows in (range(3, 9), range(15, 20), range(2)):
        assert np.array_equal(archive.read(rows).permute(0, 2, 3, 1), images[rows.start : rows.stop])


@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_images_that_cannot_be_written(trained, tmp_path, name):
    """A limit on the size of files simulates a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
    try:
        done = run_command(
            "mfengine.evaluate", trained[0], f"--save={name}", "--num=80",
            cwd=tmp_path,
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: cannot write {name}: File too large"
    assert not (tmp_path / name).exists()
    done = run_command(
        "mfengine.evaluate", trained[0], f"--save={name}", "--num=80",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(images_of(tmp_path / name)) == 80
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no partial files


def test_samples_that_are_not_finite(export, digits, tmp_path):
    weights, metadata = load_file(export), {}
    with safe_open(export, "pt") as file:
        metadata = file.metadata()
    weights["final_layer.linear.bias"].fill_(torch.inf)
    save_file(weights, tmp_path / "broken.safetensors", metadata=metadata)
    zeros = ArraySamples("x", LATENTS, np.zeros((10, 1, 2, *LATENTS.shape)), np.arange(10))
    write_dataset(tmp_path / "data", zeros)
    done = run_command(
        "mfengine.evaluate", "broken.safetensors", "--data=data", "--out=x.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == "error: samples in 1 step(s) are not finite: these weights cannot be evaluated"
    )
    assert not (tmp_path / "x.json").exists()


# ----------------------------------------------------------------------------
# torch-fidelity.


class Missing:
    """Makes torch-fidelity appear not installed."""

    def find_spec(self, name, *_):
        if name == "torch_fidelity":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--reference needs the torch-fidelity library: pip install 'mfengine[fid]'"),
        ("import torchvision_of_another_torch", "its import fails: No module named 'torchvision_of_another_torch'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
    ],
)
def test_torch_fidelity_with_a_failing_import(trained, references, tmp_path, monkeypatch, content, message):
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    if content is None:
        monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    else:
        (tmp_path / "torch_fidelity").mkdir()
        (tmp_path / "torch_fidelity/__init__.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    done = run_command(
        "mfengine.evaluate", trained[0], "--reference=good.npz", "--num=16", "--save=x",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not list(tmp_path.glob("*x"))


STAND_IN = {
    # The parts of torchvision that torch-fidelity needs to import itself and to read a folder of PNG files.
    "__init__.py": "from torchvision import datasets, transforms",
    "datasets.py": "class CIFAR10: pass\nclass CIFAR100: pass\nclass STL10: pass",
    "transforms/__init__.py": """
from torchvision.transforms import functional
class Compose:
    def __init__(self, steps):
        self.steps = steps
    def __call__(self, x):
        for step in self.steps:
            x = step(x)
        return x
""",
    "transforms/functional.py": """
import numpy, torch
def pil_to_tensor(image):
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
""",
}

MAKE_WEIGHTS = """
import torch
from torch_fidelity import feature_extractor_inceptionv3 as inception
inception.load_state_dict_from_url = lambda *args, **kwargs: None
inception.FeatureExtractorInceptionV3.load_state_dict = lambda self, weights: None
torch.manual_seed(0)
network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
for p in network.parameters():
    if p.dim() > 1:
        torch.nn.init.kaiming_normal_(p)
torch.save(network.state_dict(), "inception.pth")
"""

MEASURE_DIRECTLY = """
import json, torch, numpy, torch_fidelity
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached
options = dict(
    feature_extractor="inception-v3-compat", feature_extractor_weights_path="inception.pth", cuda=False, verbose=False,
    save_cpu_ram=True, input1="samples", input2="reference", input2_cache_name="reference", cache_root="cache",
)
figures = torch_fidelity.calculate_metrics(isc=True, fid=True, prc=True, **options)
network = create_feature_extractor("inception-v3-compat", ["2048"], **options)
features = extract_featuresdict_from_input_id_cached(2, network, **options)["2048"]
statistics = fid_features_to_statistics(features)
images = numpy.load("reference.npy")
numpy.savez("adm.npz", images, **statistics, mu_s=numpy.zeros(2023), sigma_s=numpy.zeros((2023, 2023)))
numpy.savez("statistics.npz", **statistics)
print(json.dumps(figures))
"""


@pytest.fixture
def fidelity_path(tmp_path):
    """The PYTHONPATH with which torch-fidelity imports: empty, or with a stand-in if torchvision cannot be imported."""
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name, content in STAND_IN.items():
            path = tmp_path / "path/torchvision" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return os.pathsep.join([str(tmp_path / "path"), str(Path(__file__).parent.parent)])


def test_metrics_equal_those_of_torch_fidelity(trained, tmp_path, fidelity_path):
    """With random Inception weights: two processes, then one, against the library called on the images themselves."""
    env = {"PYTHONPATH": fidelity_path, "OMP_NUM_THREADS": "1"}

    def script(text):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", text],
            cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def evaluate(reference, *args, ranks=1):
        done = run_command(
            "mfengine.evaluate", trained[0], f"--reference={reference}", "--inception=inception.pth",
            "--num-samples=11", "--batch-size=3", "--steps=1", "--out=out.json", *args,
            cwd=tmp_path, ranks=ranks, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        figures = json.loads((tmp_path / "out.json").read_text())
        for name in (*SAMPLES, "reference"):
            figures.pop(name, None)  # conditions are named only if there are some
        return figures, done.stderr

    script(MAKE_WEIGHTS)
    # Between a grey image and noise like the samples after 20 steps, so that both overlap in part.
    noise = np.random.default_rng(0).standard_normal((9, 8, 8, 1)) * np.linspace(0, 6, 9).reshape(9, 1, 1, 1) + 5
    images = np.repeat(noise.clip(0, 16) * 255 / 16, 3, axis=3).astype(np.uint8)
    np.save(tmp_path / "reference.npy", images)
    (tmp_path / "reference").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"reference/{i:02d}.png")

    two, _ = evaluate("reference", "--save=samples", ranks=2)
    direct = json.loads(script(MEASURE_DIRECTLY))
    names = {"fid": "frechet_inception_distance", "inception_score": "inception_score_mean"}
    for name in ("fid", "inception_score", "inception_score_std", "precision", "recall"):
        assert two[f"{name}_1nfe"] == pytest.approx(direct[names.get(name, name)], rel=1e-4), name
    done = run_command(
        "mfengine.evaluate", trained[0], "--reference=reference", "--inception=inception.pth", "--num-samples=11",
        "--batch-size=3", "--sweep", "steps=2,1", "--out=sweep.json", cwd=tmp_path, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["fid"] for row in rows] == sorted(row["fid"] for row in rows)
    (row,) = (row for row in rows if row["steps"] == 1)
    for name in ("fid", "precision", "recall"):
        assert row[name] == pytest.approx(two[f"{name}_1nfe"], rel=1e-4), name
    one, _ = evaluate("adm.npz")
    assert one == pytest.approx(two, rel=1e-4)
    without, errors = evaluate("statistics.npz")
    assert "note: no precision and recall: statistics.npz has no images" in errors
    assert without == pytest.approx({k: v for k, v in one.items() if not k.startswith(("pre", "rec"))}, rel=1e-4)

    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "inception.pth")
    done = run_command(
        "mfengine.evaluate", trained[0], "--reference=adm.npz", "--inception=inception.pth", cwd=tmp_path, env=env
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: inception.pth does not hold the weights of torch-fidelity's Inception: ")
