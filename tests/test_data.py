"""Data sets: written, described, read by DALI in parts, continued, and refused when something is wrong."""

import json

import numpy as np
import pytest
import torch

from mfengine import ModelConfig
from mfengine.engine.data import DESCRIPTION, Dataset, LatentSpace, Loader, read_means, write_dataset
from mfengine.errors import InputError, RankError

CPU = torch.device("cpu")
SPACE = LatentSpace(shape=(2, 3, 3), num_classes=101, scale=0.5, bias=1.0)


def numbered(count=101, flips=1, std=0.0):
    """Samples whose mean is their label; the mirror image's mean is the label plus 1000."""
    for i in range(count):
        mean = np.stack([np.full(SPACE.shape, i + 1000 * flip) for flip in range(flips)])
        yield np.stack([mean, np.full_like(mean, std)], axis=1), i


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", "numbered", SPACE, numbered(), shard_samples=40)


def labels_of(loader, batches):
    return [int(y) for _ in range(batches) for y in next(loader)[1]]


def test_description_and_shards_are_read_back(dataset):
    assert Dataset.open(dataset.folder) == dataset
    assert [shard.count for shard in dataset.shards] == [40, 40, 21]
    means, labels = read_means(dataset)
    assert means.shape == (101, *SPACE.shape)
    assert np.array_equal(means[:, 0, 0, 0], labels)


def test_latents_are_scaled_and_belong_to_their_labels(dataset):
    latents, labels = Loader(dataset, 32, 0, 1, seed=0, device=CPU).draw(torch.Generator())
    assert (latents.dtype, latents.shape, labels.dtype) == (torch.float32, (32, *SPACE.shape), torch.int64)
    expected = ((labels.float() - SPACE.bias) * SPACE.scale)[:, None, None, None].expand_as(latents)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(SPACE.unscale(latents)[:, 0, 0, 0], labels.float())


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_each_epoch_has_every_sample_once(dataset, num_parts):
    sizes = [101 * (p + 1) // num_parts - 101 * p // num_parts for p in range(num_parts)]
    streams = [labels_of(Loader(dataset, 8, p, num_parts, seed=p, device=CPU), 14) for p in range(num_parts)]
    first = [y for stream, size in zip(streams, sizes, strict=True) for y in stream[:size]]
    assert sorted(first) == list(range(101))
    assert first != sorted(first)


def test_orders_differ_between_epochs_and_seeds(dataset):
    loader = Loader(dataset, 101, 0, 1, seed=0, device=CPU)
    orders = [labels_of(loader, 1), labels_of(loader, 1), labels_of(Loader(dataset, 101, 0, 1, 1, CPU), 1)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 20])
def test_position_continues_exactly(tmp_path, stop):
    dataset = write_dataset(tmp_path / "data", "n", SPACE, numbered(flips=2, std=1.0), shard_samples=40)
    loader = Loader(dataset, 16, 0, 1, seed=3, device=CPU)
    for _ in range(stop):
        next(loader)
    again = Loader(dataset, 16, 0, 1, seed=3, device=CPU, position=loader.position())
    for step in range(9):
        a, b = (x.draw(torch.Generator().manual_seed(step)) for x in (loader, again))
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_flips_and_posterior(tmp_path):
    dataset = write_dataset(tmp_path / "data", "n", SPACE, numbered(flips=2, std=2.0))
    loader = Loader(dataset, 101, 0, 1, seed=0, device=CPU)
    generator = torch.Generator().manual_seed(0)
    flipped, residuals = [], []
    for _ in range(20):
        latents, labels = loader.draw(generator)
        residual = SPACE.unscale(latents) - labels[:, None, None, None]
        flipped.append(residual.mean((1, 2, 3)) > 500)
        residuals.append(residual - 1000 * flipped[-1][:, None, None, None])
    assert torch.cat(flipped).float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.cat(residuals).mean() == pytest.approx(0, abs=0.1)
    assert torch.cat(residuals).std() == pytest.approx(2, rel=0.05)


# ----------------------------------------------------------------------------
# Wrong data.


def edit(dataset, **values):
    path = dataset.folder / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d.folder / DESCRIPTION).unlink(), "dataset.json does not exist: see docs/data.md"),
        (lambda d: (d.folder / DESCRIPTION).write_text("{"), "is not a description of a data set"),
        (lambda d: edit(d, shards=[]), "lists no shards"),
        (lambda d: edit(d, count=100), "says 100 samples"),
        (lambda d: (d.folder / "000001.tar").unlink(), "000001.tar is missing"),
        (lambda d: truncate(d.folder / "000001.tar", 0), "000001.tar has 0 bytes"),
        (lambda d: truncate(d.folder / "000002.tar", 1024), "000002.tar has 1024 bytes, dataset.json says"),
        (lambda d: (d.folder / "000000.idx").unlink(), "000000.idx is missing"),
        (lambda d: truncate(d.folder / "000000.idx", 0), "000000.idx does not list the 40 samples"),
        (lambda d: edit(d, space={**json.loads(json.dumps(vars(SPACE))), "shape": [2, 4, 4]}), "bytes per sample"),
        (lambda d: edit(d, flips=2), "bytes per sample"),
        (lambda d: (d.folder / "000000.idx").write_text("v1.2 40\nmoments 512"), "bytes per sample"),
        (lambda d: edit(d, space={"colour": 1}), "LatentSpace has no colour"),
    ],
)
def test_damaged_data_set(dataset, damage, message):
    damage(dataset)
    with pytest.raises(InputError, match=message):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(3, 1, 4, 8, 1, 1, num_classes=101), r"latents of \(2, 3, 3\); the model takes \(4, 3, 3\)"),
        (ModelConfig(3, 1, 2, 8, 1, 1, num_classes=10), "101 classes; model.num_classes is 10"),
    ],
)
def test_data_of_another_model(dataset, model, message):
    with pytest.raises(InputError, match=message):
        dataset.check_model(model)


def test_label_out_of_range(dataset):
    edit(dataset, space={**json.loads(json.dumps(vars(SPACE))), "num_classes": 50})
    loader = Loader(Dataset.open(dataset.folder), 101, 0, 1, seed=0, device=CPU)
    with pytest.raises(RankError, match="label outside of 0 to 49"):
        next(loader)


def test_shard_cut_off_while_training(dataset):
    dataset = Dataset.open(dataset.folder)
    truncate(dataset.folder / "000001.tar", 1024)
    with pytest.raises(RankError, match=r"cannot read .*data: Malformed index file .* outside of the archive"):
        labels_of(Loader(dataset, 101, 0, 1, seed=0, device=CPU), 2)


def test_too_few_samples_for_the_ranks(dataset):
    with pytest.raises(InputError, match="101 samples, too few for 200 parts"):
        Loader(dataset, 1, 0, 200, seed=0, device=CPU)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((np.zeros((1, 2, 2, 3, 4)), 0), "sample 0 has moments of"),
        ((np.zeros((1, 2, 2, 3, 3)), 101), "sample 0 has label 101"),
    ],
)
def test_writer_refuses_what_contradicts_the_description(tmp_path, sample, message):
    with pytest.raises(InputError, match=message):
        write_dataset(tmp_path / "data", "n", SPACE, [sample])
    assert not (tmp_path / "data" / DESCRIPTION).exists()


def test_writer_that_was_killed_leaves_no_data_set(tmp_path):
    def broken():
        yield from list(numbered())[:50]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", "n", SPACE, broken(), shard_samples=40)
    assert not (tmp_path / "data").exists()
    dataset = write_dataset(tmp_path / "data", "n", SPACE, numbered(), shard_samples=40)
    assert Dataset.open(tmp_path / "data") == dataset
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_writer_overwrites_nothing(dataset):
    with pytest.raises(InputError, match="is not an empty folder"):
        write_dataset(dataset.folder, "n", SPACE, numbered())
