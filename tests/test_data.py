"""Data sets: written, described, read by DALI in parts, continued, and rejected if something is wrong."""

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from conftest import forks

from mfengine.data import writer
from mfengine.data.format import BROKEN, DESCRIPTION, Dataset, LatentSpace, read_means
from mfengine.data.loader import Loader
from mfengine.data.writer import ArraySamples, Broken, order, write_dataset
from mfengine.errors import InputError, RankError

CPU = torch.device("cpu")
SPACE = LatentSpace(shape=(2, 3, 3), num_classes=101, scale=0.5, bias=1.0)


def numbered(flips=1, std=0.0):
    """101 samples whose mean is their label; the mirror image's mean is the label plus 1000."""
    means = np.arange(101)[:, None] + 1000 * np.arange(flips)  # (101, flips)
    moments = np.stack([means, np.full_like(means, std)], axis=2)[..., None, None, None]
    return ArraySamples("n", SPACE, np.broadcast_to(moments, (101, flips, 2, *SPACE.shape)), np.arange(101))


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", numbered(), shard_samples=40)


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


def test_each_channel_has_its_own_scale_and_bias(tmp_path):
    space = replace(SPACE, scale=(0.5, 2.0), bias=(1.0, -3.0))
    dataset = write_dataset(tmp_path / "data", replace(numbered(), space=space))
    assert Dataset.open(dataset.folder).space == space
    latents, labels = Loader(dataset, 32, 0, 1, seed=0, device=CPU).draw(torch.Generator())
    expected = torch.stack([(labels - 1) * 0.5, (labels + 3) * 2.0], 1)
    torch.testing.assert_close(latents, expected[..., None, None].expand_as(latents))
    torch.testing.assert_close(space.unscale(latents)[:, :, 0, 0], labels[:, None].float().expand(-1, 2))


def posteriors():
    """101 samples with both flips; the channels have means 3 and -50 and standard deviations 5 and 0.1."""
    moments = np.abs(np.random.default_rng(0).standard_normal((101, 2, 2, *SPACE.shape)))
    place = np.array([[3, -50], [0, 0]])[..., None, None]
    return replace(numbered(), moments=moments * np.array([5, 0.1])[:, None, None] + place)


def test_measured_normalisation_is_that_of_what_was_written(tmp_path):
    written = posteriors().moments.astype(np.float16).astype(np.float64)
    mean, std = written[:, :, 0], written[:, :, 1]
    expected = np.sqrt((std**2).mean((0, 1, 3, 4)) + mean.var((0, 1, 3, 4)))
    dataset = write_dataset(tmp_path / "data", posteriors(), shard_samples=40, normalisation="measured")
    assert dataset.space.bias == pytest.approx(mean.mean((0, 1, 3, 4)), rel=1e-12)
    assert dataset.space.scale == pytest.approx(1 / expected, rel=1e-9)
    loader = Loader(dataset, 101, 0, 1, seed=0, device=CPU)
    latents = torch.cat([loader.draw(torch.Generator().manual_seed(i))[0] for i in range(30)])
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.03)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), rtol=0, atol=0.03)


def test_measurement_that_was_killed_continues(tmp_path):
    whole = write_dataset(tmp_path / "data", posteriors(), shard_samples=40, normalisation="measured")
    with pytest.raises(KeyboardInterrupt):
        write_dataset(
            tmp_path / "again", Unreliable(**vars(posteriors()), last=50), shard_samples=40, normalisation="measured"
        )
    rest = Unreliable(**vars(posteriors()))
    write_dataset(tmp_path / "again", rest, shard_samples=40, normalisation="measured")
    assert len(rest.read_so_far) == 61
    assert contents(tmp_path / "again") == contents(whole.folder)


def test_constant_channel_is_measured(tmp_path):
    constant = replace(numbered(), moments=numbered().moments * np.array([1, 0])[:, None, None])
    space = write_dataset(tmp_path / "data", constant, normalisation="measured").space
    assert (space.scale[1], space.bias[1]) == (1, 0)


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
    dataset = write_dataset(tmp_path / "data", numbered(flips=2, std=1.0), shard_samples=40)
    loader = Loader(dataset, 16, 0, 1, seed=3, device=CPU)
    for _ in range(stop):
        next(loader)
    again = Loader(dataset, 16, 0, 1, seed=3, device=CPU, position=loader.position())
    for step in range(9):
        a, b = (x.draw(torch.Generator().manual_seed(step)) for x in (loader, again))
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_flips_and_posterior(tmp_path):
    dataset = write_dataset(tmp_path / "data", numbered(flips=2, std=2.0))
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


IMPORTS_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("PIL", "nvidia", "safetensors", "tensorboard", "tqdm", "tyro"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Missing())
import mfengine.data.format, mfengine.data.loader, mfengine.data.writer
"""


@pytest.mark.slow
def test_format_loader_and_writer_need_only_torch_and_numpy():
    """As in benchmarks on a machine without further packages."""
    done = subprocess.run([sys.executable, "-c", IMPORTS_WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
        (lambda d: (d.folder / DESCRIPTION).write_text("{"), "dataset.json: it is not JSON"),
        (lambda d: edit(d, shards=[]), "dataset.json: shards must not be empty"),
        (lambda d: edit(d, count=100), "dataset.json: count is 100 samples, but the shards do not add up to it"),
        (lambda d: (d.folder / "000001.tar").unlink(), "000001.tar is missing"),
        (lambda d: truncate(d.folder / "000001.tar", 0), "000001.tar has 0 bytes"),
        (lambda d: truncate(d.folder / "000002.tar", 1024), "000002.tar has 1024 bytes; dataset.json says"),
        (lambda d: (d.folder / "000000.idx").unlink(), "000000.idx is missing"),
        (lambda d: truncate(d.folder / "000000.idx", 0), "000000.idx does not list the 40 samples"),
        (lambda d: edit(d, space={**json.loads(json.dumps(vars(SPACE))), "shape": [2, 4, 4]}), "bytes per sample"),
        (lambda d: edit(d, flips=2), "bytes per sample"),
        (lambda d: (d.folder / "000000.idx").write_text("v1.2 40\nmoments 512"), "bytes per sample"),
        (lambda d: edit(d, space={"colour": 1}), "space.colour is unknown"),
        (lambda d: edit(d, space={"num_classes": 101}), "space.shape is missing"),
        (lambda d: edit(d, space={**vars(SPACE), "scale": math.nan}), "space.scale must be finite, not nan"),
        (lambda d: edit(d, space={**vars(SPACE), "scale": 0}), "space.scale must not be 0"),
        (lambda d: edit(d, space={**vars(SPACE), "bias": "abc"}), 'space.bias is "abc", not a number'),
        (lambda d: edit(d, space={**vars(SPACE), "scale": [1, 0]}), "space.scale must not be 0"),
        (lambda d: edit(d, space={**vars(SPACE), "scale": [1]}), r"space.scale must be a number, or one per channel"),
        (lambda d: edit(d, space={**vars(SPACE), "bias": [1, "x"]}), r'space.bias\[1\] is "x", not a number'),
        (lambda d: edit(d, space={**vars(SPACE), "shape": [8]}), "space.shape is .8., not a list of 3"),
        (lambda d: edit(d, space={**vars(SPACE), "pixel_range": "x"}), 'space.pixel_range is "x", not a list of 2'),
        (lambda d: edit(d, flips=True), "flips is true, not an integer"),
        (lambda d: edit(d, class_names=[None]), r"class_names.0. is null, not a text"),
    ],
)
def test_damaged_data_set(dataset, damage, message):
    damage(dataset)
    with pytest.raises(InputError, match=message):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize(
    ("shape", "num_classes", "message"),
    [
        ((4, 3, 3), 101, r"latents of \(2, 3, 3\); the model takes \(4, 3, 3\)"),
        ((2, 3, 3), 10, "101 classes; --model.num-classes is 10"),
    ],
)
def test_data_of_another_model(dataset, shape, num_classes, message):
    with pytest.raises(InputError, match=message):
        dataset.check_model(shape, num_classes)


def test_label_out_of_range(dataset):
    edit(dataset, space={**json.loads(json.dumps(vars(SPACE))), "num_classes": 50})
    loader = Loader(Dataset.open(dataset.folder), 101, 0, 1, seed=0, device=CPU)
    with pytest.raises(RankError, match="label outside 0 to 49"):
        next(loader)


def read_while_a_shard_is_truncated(dataset):
    loader = Loader(dataset, 8, 0, 1, seed=0, device=CPU)
    next(loader)
    os.truncate(dataset.folder / dataset.shards[0].file, 100_000)
    with pytest.raises(RankError, match=r"^cannot read .*data: Malformed index file .* outside of the archive file$"):
        labels_of(loader, 2 * dataset.count // 8)


@pytest.mark.forks
def test_shard_truncated_under_a_running_loader(tmp_path):
    """In a separate process, which SIGBUS would kill if the file were mapped. The shuffle buffer holds only a part."""
    moments = np.broadcast_to(np.float16(0), (5000, 1, 2, *SPACE.shape))
    dataset = write_dataset(tmp_path / "data", ArraySamples("zeros", SPACE, moments, np.arange(5000) % 101))
    process = forks.Process(target=read_while_a_shard_is_truncated, args=(dataset,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_too_few_samples_for_the_ranks(dataset):
    with pytest.raises(InputError, match="101 samples, too few for 200 parts"):
        Loader(dataset, 1, 0, 200, seed=0, device=CPU)


# ----------------------------------------------------------------------------
# Writing.


@dataclass(frozen=True)
class Unreliable(ArraySamples):
    """Samples that include broken ones, and raise after a given number of reads."""

    broken: tuple[int, ...] = ()
    last: int = 101
    read_so_far: list[int] = field(default_factory=list)

    def read(self, indices):
        for i, sample in zip(indices, super().read(indices), strict=True):
            if len(self.read_so_far) == self.last:
                raise KeyboardInterrupt
            self.read_so_far.append(i)
            yield Broken(f"image {i}", "no image") if i in self.broken else sample


def unreliable(**what):
    return Unreliable(**vars(numbered()), **what)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [
        ((1, 2, 2, 3, 4), 0, r"sample 0 of n has moments of shape \(1, 2, 2, 3, 4\), not \(1, 2, 2, 3, 3\)"),
        ((1, 2, 2, 3, 3), 101, "sample 0 of n has label 101; labels are 0 to 100"),
    ],
)
def test_writer_rejects_samples_that_contradict_the_description(tmp_path, shape, label, message):
    with pytest.raises(InputError, match=message):
        write_dataset(tmp_path / "data", ArraySamples("n", SPACE, np.zeros((1, *shape)), np.array([label])))
    assert not (tmp_path / "data").exists()


def test_writer_describes_what_it_wrote(dataset):
    digests = [hashlib.sha256((dataset.folder / shard.file).read_bytes()).hexdigest() for shard in dataset.shards]
    assert [shard.sha256 for shard in dataset.shards] == digests
    assert (dataset.class_counts, dataset.broken) == ((1,) * 101, 0)
    assert read_means(dataset)[1].tolist() == order(101, 0).tolist()
    assert sorted(contents(dataset.folder)) == sorted(
        [DESCRIPTION, *(f"00000{k}.{end}" for k in range(3) for end in ("idx", "tar"))]
    )


@pytest.mark.parametrize("stop", [0, 39, 40, 41, 100])
def test_writer_that_was_killed_continues(tmp_path, dataset, stop):
    """Finished shards are kept, and nothing looks like a data set in between."""
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "again", unreliable(last=stop), shard_samples=40)
    assert not (tmp_path / "again").exists()
    rest = unreliable()
    write_dataset(tmp_path / "again", rest, shard_samples=40)
    assert len(rest.read_so_far) == 101 - stop // 40 * 40
    assert contents(tmp_path / "again") == contents(dataset.folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "data"]


def test_incomplete_data_set_is_not_renamed(tmp_path, dataset, monkeypatch):
    """As if another node's files did not appear."""
    monkeypatch.setattr(writer, "TIMEOUT_S", 0.1)
    whole = writer._Writer._record
    monkeypatch.setattr(writer._Writer, "_record", lambda self, k: None if k == 1 else whole(self, k))
    with pytest.raises(InputError, match=r"shard 1 of .* is missing: run the same command again to write it"):
        write_dataset(tmp_path / "again", numbered(), shard_samples=40)
    assert not (tmp_path / "again").exists()
    monkeypatch.undo()
    write_dataset(tmp_path / "again", numbered(), shard_samples=40)
    assert contents(tmp_path / "again") == contents(dataset.folder)


@pytest.mark.parametrize("name", ["000000.json", "data/000000.idx"])
def test_writer_repeats_a_shard_with_an_empty_record(tmp_path, dataset, name):
    """As a power failure may leave it."""
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "again", unreliable(last=90), shard_samples=40)
    truncate(tmp_path / ".partial-again" / name, 0)
    write_dataset(tmp_path / "again", numbered(), shard_samples=40)
    assert contents(tmp_path / "again") == contents(dataset.folder)


def test_writer_repeats_a_truncated_shard(tmp_path, dataset):
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "again", unreliable(last=90), shard_samples=40)
    truncate(tmp_path / ".partial-again/data/000000.tar", 1024)
    write_dataset(tmp_path / "again", numbered(), shard_samples=40)
    assert contents(tmp_path / "again") == contents(dataset.folder)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"seed": 1}, "was begun with seed 0, not 1: continue with the same, or remove it"),
        ({}, {"shard_samples": 20}, "was begun with shard_samples 40, not 20"),
        ({}, {"normalisation": "measured"}, "was begun with normalisation None, not measured"),
        ({"provenance": {"vae": {"sha256": "ab"}}}, {}, "was begun with provenance.vae.sha256 None, not ab"),
        ({"space": replace(SPACE, scale=2.0)}, {}, r"was begun with space.scale 0.5, not 2.0"),
    ],
)
def test_writer_does_not_continue_a_different_data_set(tmp_path, change, options, message):
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", unreliable(last=50), shard_samples=40)
    before = contents(tmp_path / ".partial-data/data")
    with pytest.raises(InputError, match=message):
        write_dataset(tmp_path / "data", replace(numbered(), **change), **{"shard_samples": 40, **options})
    assert contents(tmp_path / ".partial-data/data") == before


def test_broken_samples_are_listed_and_left_out(tmp_path):
    first_shard = tuple(order(101, 0)[:20])
    dataset = write_dataset(tmp_path / "data", unreliable(broken=(7, *first_shard)), shard_samples=20, max_broken=0.3)
    gone = {7, *first_shard}
    assert Dataset.open(dataset.folder) == dataset
    assert (dataset.count, dataset.broken) == (101 - len(gone), len(gone))
    assert [i for i, count in enumerate(dataset.class_counts) if count == 0] == sorted(gone)
    lines = [json.loads(line) for line in (dataset.folder / BROKEN).read_text().splitlines()]
    assert {(line["name"], line["reason"]) for line in lines} == {(f"image {i}", "no image") for i in gone}
    assert dataset.shards[0].file == "000001.tar"  # all samples of the first are broken
    assert sorted(labels_of(Loader(dataset, dataset.count, 0, 1, 0, CPU), 1)) == sorted(set(range(101)) - gone)


def test_too_many_broken_samples(tmp_path):
    """Those found so far are listed, and a larger share continues."""
    samples = unreliable(broken=(3, 5))
    with pytest.raises(InputError, match=r"2 of the first 101 .* allows 0.01 of all 101. .* is image [35]: no image"):
        write_dataset(tmp_path / "data", samples, shard_samples=40, max_broken=0.01)
    assert not (tmp_path / "data").exists()
    assert len((tmp_path / f".partial-data/{BROKEN}").read_text().splitlines()) == 2
    again = unreliable(broken=(3, 5))
    dataset = write_dataset(tmp_path / "data", again, shard_samples=40, max_broken=0.02)
    assert (dataset.count, dataset.broken, again.read_so_far) == (99, 2, [])


def test_writer_on_a_full_disk(tmp_path, dataset):
    """The disk takes only files of a few samples: the writer says so, and continues once there is room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"cannot write .*: the disk is full .*; the whole data set needs [\d.]+ GB$"
        ):
            write_dataset(tmp_path / "full", numbered(), shard_samples=40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*full*"))
    write_dataset(tmp_path / "full", numbered(), shard_samples=40)
    assert contents(tmp_path / "full") == contents(dataset.folder)


def test_two_writers_of_one_data_set(tmp_path):
    class Meddled(Unreliable):
        def read(self, indices):
            write_dataset(tmp_path / "data", numbered(), shard_samples=40)
            yield from super().read(indices)

    with pytest.raises(InputError, match=r"another process is writing .*data"):
        write_dataset(tmp_path / "data", Meddled(**vars(numbered())), shard_samples=40)


def test_description_of_an_older_version(dataset):
    values = json.loads((dataset.folder / DESCRIPTION).read_text())
    for name in ("broken", "class_counts", "class_names", "provenance"):
        del values[name]
    for shard in values["shards"]:
        del shard["sha256"]
    (dataset.folder / DESCRIPTION).write_text(json.dumps(values))
    assert Dataset.open(dataset.folder).count == 101


def test_writer_overwrites_nothing(dataset):
    with pytest.raises(InputError, match="is not an empty folder"):
        write_dataset(dataset.folder, numbered())
