"""Latents of other projects, written by the tests in those projects' formats; and checks of data sets for damage."""

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_command

from mfengine.data import importers
from mfengine.data.format import Dataset
from mfengine.data.importers import ImportedSamples
from mfengine.pickles import Refused, load_record

COUNT, CLASSES, SHAPE = 23, 5, (4, 6, 6)
LABELS = [3 * i % CLASSES for i in range(COUNT)]


def posteriors(flips):
    """Means and log variances of all samples, (COUNT, flips, 4, 6, 6) float32, like a VAE's: 5 wide, and certain."""
    rng = np.random.default_rng(0)
    shape = (COUNT, flips, *SHAPE)
    return 5 * rng.standard_normal(shape, np.float32), rng.uniform(-8, -2, shape).astype(np.float32)


def expected(flips):
    """Moments of all samples, (flips, 2, 4, 6, 6) float16 each."""
    mean, log_variance = posteriors(flips)
    return np.stack([mean, np.exp(0.5 * log_variance)], axis=2).astype(np.float16)


# ----------------------------------------------------------------------------
# The formats, written as in their projects.


def put(folder, records):
    """An LMDB with these records."""
    lmdb = pytest.importorskip("lmdb", reason="lmdb is an extra")
    environment = lmdb.open(str(folder), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode(), value)
    environment.close()
    return folder


def make_lmdb(folder, flips=2, protocol=None):
    """github.com/zhuyu-cs/MeanFlow, preprocess_imagenet/main_cache.py: `posterior.parameters` of diffusers."""
    mean, log_variance = posteriors(flips)
    moments = np.concatenate([mean, log_variance], axis=2)
    records = {"num_samples": str(COUNT).encode(), "created_at": b"2025-06-01 12:00:00.000000"}
    for i in range(COUNT):
        data = {"moments": moments[i, 0], "label": LABELS[i], "filename": f"n{LABELS[i]:08d}/img_{i:07d}.JPEG"}
        if flips == 2:
            data["moments_flip"] = moments[i, 1]
        records[str(i)] = pickle.dumps(data, protocol=protocol)
    return put(folder, records)


def make_pt(folder):
    """github.com/Gsunshine/meanflow, utils/data_util.py: mean and standard deviation, one file per sample."""
    mean, log_variance = posteriors(1)
    folder.mkdir()
    for i in range(COUNT):
        image = torch.from_numpy(np.concatenate([mean[i, 0], np.exp(0.5 * log_variance[i, 0])]))
        torch.save({"image": image, "label": torch.tensor(LABELS[i])}, folder / f"{i:08d}.pt")
    return folder


def npy_files():
    """github.com/NVlabs/edm2 and github.com/sihyun-yu/REPA, dataset_tool(s).py encode: names and content."""
    mean, log_variance = posteriors(1)
    labels = []
    for i in range(COUNT):
        file = io.BytesIO()
        np.save(file, np.concatenate([mean[i, 0], np.exp(0.5 * log_variance[i, 0])]))
        labels.append([f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy", LABELS[i]])
        yield labels[-1][0], file.getvalue()
    yield "dataset.json", json.dumps({"labels": labels}).encode()


def make_npy(folder):
    for name, content in npy_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make_repa(folder):
    """With images beside the latents, which have their own dataset.json."""
    (folder / "images").mkdir(parents=True)
    (folder / "images/dataset.json").write_text('{"labels": [["00000/img00000000.png", 1]]}')
    make_npy(folder / "vae-sd")
    return folder


def make_zip(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_STORED) as archive:
        for name, content in npy_files():
            archive.writestr(name, content)
    return path


FORMATS = {"lmdb": make_lmdb, "pt": make_pt, "npy": make_npy, "repa": make_repa, "zip": make_zip}


def written(dataset):
    """Moments and label of each sample in the shards, under a key that identifies the sample."""
    found = {}
    for shard in dataset.shards:
        with tarfile.open(dataset.folder / shard.file) as tar:
            parts = {member.name: tar.extractfile(member).read() for member in tar}
        for name in {name.partition(".")[0] for name in parts}:
            moments = np.frombuffer(parts[f"{name}.moments"], "<f2").reshape(dataset.flips, 2, *dataset.space.shape)
            found[moments.tobytes()] = int(np.frombuffer(parts[f"{name}.label"], "<i4")[0])
    return found


def prepare(*args, cwd):
    return run_command("mfengine.prepare", *args, cwd=cwd)


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip(form, tmp_path):
    source = FORMATS[form](tmp_path / "source")
    done = prepare("import", source, "out", f"--num-classes={CLASSES}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out: 23 samples in 1 shard(s)\n"
    dataset = Dataset.open(tmp_path / "out")
    flips = 2 if form == "lmdb" else 1
    assert (dataset.flips, dataset.space.shape, dataset.space.num_classes) == (flips, SHAPE, CLASSES)
    assert (dataset.space.scale, dataset.space.bias) == (0.18215, 0)
    samples = {moments.tobytes(): label for moments, label in zip(expected(flips), LABELS, strict=True)}
    found = written(dataset)
    assert len(found) == COUNT
    if form == "lmdb":  # exp may be rounded differently to float16
        stack = {tuple(np.frombuffer(k, "<f2").reshape(2, 2, -1)[:, 0].ravel()): k for k in found}
        for moments, label in zip(expected(2), LABELS, strict=True):
            key = stack[tuple(moments[:, 0].ravel())]
            assert found[key] == label
            np.testing.assert_allclose(np.frombuffer(key, "<f2").reshape(moments.shape), moments, rtol=2e-3)
    else:
        assert found == samples
    done = prepare("check", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert "out is intact: 23 samples" in done.stdout


@pytest.mark.forks
def test_two_ranks_write_what_one_writes(tmp_path):
    make_pt(tmp_path / "source")
    for ranks in (1, 2):
        done = run_command(
            "mfengine.prepare", "import", "source", f"out{ranks}", "--num-classes=5", "--normalisation=measured",
            cwd=tmp_path, ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("23 samples") == 1
    for name in ("000000.tar", "000000.idx", "dataset.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_classes_and_scale(tmp_path):
    make_npy(tmp_path / "npy")
    assert prepare("import", "npy", "a", "--scale=0.5", "--bias=1", cwd=tmp_path).returncode == 0
    space = Dataset.open(tmp_path / "a").space
    assert (space.num_classes, space.scale, space.bias) == (CLASSES, 0.5, 1.0)
    make_pt(tmp_path / "pt")
    done = prepare("import", "pt", "b", cwd=tmp_path)
    assert done.returncode == 2
    assert "does not give the number of classes: add --num-classes (1000 for ImageNet)" in done.stderr


def test_named_normalisations(tmp_path):
    """For an import, and for an existing data set, whose shards do not change."""
    make_npy(tmp_path / "npy")
    assert prepare("import", "npy", "out", "--normalisation=sd-vae-ft-mse", cwd=tmp_path).returncode == 0
    space = Dataset.open(tmp_path / "out").space
    assert space.bias == (0.86488, -0.27787343, 0.21616915, 0.3738409)
    assert space.scale == pytest.approx([1 / x for x in (4.85503674, 5.31922414, 3.93725398, 3.9870003)])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "normalised by sd-vae-ft-mse, latents have" in prepare("check", "out", cwd=tmp_path).stdout

    done = prepare("normalise", "out", "--to=sd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "latents are now normalised by sd, before by sd-vae-ft-mse. Earlier runs" in done.stdout
    assert Dataset.open(tmp_path / "out").space == replace(space, scale=0.18215, bias=0.0)
    assert prepare("normalise", "out", "--to=measured", cwd=tmp_path).returncode == 0
    done.stdout = prepare("check", "out", cwd=tmp_path).stdout
    mean, std = re.search("mean (.*) and standard deviation (.*) by channel", done.stdout).groups()
    np.testing.assert_allclose([float(x) for x in mean.split(", ")], 0, atol=1e-12)
    assert std == "1, 1, 1, 1"
    assert prepare("normalise", "out", "--to=sd-vae-ft-mse", cwd=tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_named_normalisation_of_other_latents(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    done = prepare("normalise", "data", "--to=sd", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: normalisation sd is for 4 channels; these latents have 1\n")
    assert (tmp_path / "data/dataset.json").read_bytes() == (digits / "dataset.json").read_bytes()


def test_broken_samples_are_listed_or_refused(tmp_path):
    source = make_pt(tmp_path / "source")
    (source / "00000000.pt").write_bytes(b"not a file of torch")  # the first one: the second gives the shape
    bad = torch.load(source / "00000005.pt")
    torch.save({**bad, "image": bad["image"] * float("nan")}, source / "00000005.pt")
    torch.save({**bad, "image": -bad["image"]}, source / "00000006.pt")
    torch.save({**bad, "image": bad["image"][:, :3]}, source / "00000007.pt")
    torch.save({"image": bad["image"]}, source / "00000008.pt")
    torch.save({**bad, "image": bad["image"].requires_grad_()}, source / "00000009.pt")  # is still read
    done = prepare("import", "source", "out", "--num-classes=5", cwd=tmp_path)
    assert done.returncode == 2
    assert "broken" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    done = prepare("import", "source", "out", "--num-classes=5", "--max-broken=0.3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "18 samples in 1 shard(s), 5 broken ones left out" in done.stdout
    broken = [json.loads(line) for line in (tmp_path / "out/broken.jsonl").read_text().splitlines()]
    reasons = {os.path.basename(sample["name"]): sample["reason"] for sample in broken}
    assert reasons.keys() == {f"0000000{i}.pt" for i in (0, 5, 6, 7, 8)}
    assert "finite" in reasons["00000005.pt"]
    assert "not a standard deviation" in reasons["00000006.pt"]
    assert "not 1 of (8, 6, 6)" in reasons["00000007.pt"]
    assert "its label is None" in reasons["00000008.pt"]


def records(tmp_path, **changes):
    """An LMDB of one good record, changed."""
    good = {"moments": np.full((8, 2, 2), -1, np.float32), "label": 0}
    changed = {key: value for key, value in {**good, **changes}.items() if value is not None}
    return put(tmp_path / "source", {"0": pickle.dumps(changed), "num_samples": b"1"})


def npy_with(tmp_path, labels):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/dataset.json").write_text(json.dumps({"labels": labels}))


def folder_of(tmp_path, *names):
    for name in names:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "source does not exist"),
        (lambda p: folder_of(p, "a.png"), "source cannot be imported: it must be an LMDB (data.mdb)"),
        (lambda p: folder_of(p, "train/0.pt"), ".pt files only in subfolders: give source/train"),
        (lambda p: folder_of(p, "data.mdb"), "cannot open source"),
        (lambda p: folder_of(p, "0.pt"), "source/0.pt: "),
        (lambda p: put(p / "source", {"0": b"x"}), "source has no num_samples"),
        (lambda p: put(p / "source", {"num_samples": b"0"}), "source has no samples"),
        (lambda p: put(p / "source", {"num_samples": b"3"}), "record 0 of source: the record is missing"),
        (lambda p: put(p / "source", {"num_samples": b"1", "0": b"x"}), "record 0 of source: it is not a pickle"),
        (lambda p: records(p, moments=None, image=b"JPEG"), "it has no moments, only label, image: latents are needed"),
        (lambda p: records(p, moments=np.ones((8, 2, 2), np.float32)), "so it is not a log variance"),
        (lambda p: records(p, moments=np.zeros((3, 2, 2), np.float32)), "its shape is (3, 2, 2), not (2 C, H, W)"),
        (lambda p: records(p, moments=np.zeros((8, 2, 2), np.int32)), "moments must be an array of floats"),
        (lambda p: records(p, moments=np.full((6, 2, 2), -1.0)), "with 3 channels are not from Stable Diffusion's"),
        (lambda p: records(p, label=5), "has label 5; labels are 0 to 4"),
        (lambda p: npy_with(p, None), "has no labels [[name, label], ...]"),
        (lambda p: npy_with(p, [["a.npy", [0.5, 0.5]]]), "has labels that are not integers"),
        (lambda p: npy_with(p, [["a.npy", 0]]), "No such file or directory"),
    ],
)
def test_wrong_source(make, message, tmp_path):
    make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock.mdb"}
    done = prepare("import", "source", "out", "--num-classes=5", cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()
    assert {p: p.read_bytes() for p in before} == before


def test_data_set_is_not_imported(digits, tmp_path):
    done = prepare("import", digits, "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "is already a data set of mfengine" in done.stderr


def test_continues_only_with_the_same_source(tmp_path):
    source = make_npy(tmp_path / "source")
    one = ImportedSamples(source).provenance
    assert one == ImportedSamples(source).provenance
    description = json.loads((source / "dataset.json").read_text())
    description["labels"][0][1] = 1
    (source / "dataset.json").write_text(json.dumps(description))
    assert ImportedSamples(source).provenance != one


# ----------------------------------------------------------------------------
# Pickles.


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def malicious(mark):
    """Pickles that execute `touch mark` under pickle.loads, in ways that a filter may overlook."""
    payload = Payload(mark)
    command = f"touch {mark}".encode()
    return {
        "in a field": pickle.dumps({"moments": np.zeros((8, 2, 2)), "label": payload}),
        "instead of the record": pickle.dumps(payload),
        "in an array of objects": pickle.dumps({"moments": np.array([payload], dtype=object)}),
        "as a key": pickle.dumps({("moments", payload): 1}),
        "in a list": pickle.dumps({"moments": [[payload]]}),
        "and then a good record": pickle.dumps(payload)[:-1] + b"0" + pickle.dumps({"moments": 1})[2:],
        "by hand": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
        "through numpy": b"cnumpy.core.multiarray\n__builtins__\n(S'eval'\ntR.",
        "through a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0bos.path.sys\x93.",
    }  # fmt: skip


def test_payload_runs_when_unpickled(tmp_path):
    mark = tmp_path / "mark"
    pickle.loads(malicious(mark)["in a field"])
    assert mark.exists()


@pytest.mark.parametrize("kind", malicious("mark"))
def test_malicious_pickle_is_refused(kind, tmp_path):
    mark = tmp_path / "mark"
    source = make_lmdb(tmp_path / "source")
    put(source, {"7": malicious(mark)[kind]})
    done = prepare("import", source, "out", "--num-classes=5", "--max-broken=0.5", cwd=tmp_path)
    assert done.returncode == 2
    assert "record 7 of" in done.stderr.splitlines()[-1]
    assert "refused" in done.stderr.splitlines()[-1]
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_label_of_lists_of_several_lengths():
    with pytest.raises(importers.SampleError, match=r"its label is \[\[1\], \[1, 2\]\], not one integer"):
        importers._label([[1], [1, 2]])


def test_malicious_pt_is_refused(tmp_path):
    source = make_pt(tmp_path / "source")
    torch.save({"image": torch.zeros(8, 6, 6), "label": Payload(tmp_path / "mark")}, source / "00000007.pt")
    done = prepare("import", source, "out", "--num-classes=5", "--max-broken=0.5", cwd=tmp_path)
    assert done.returncode == 2
    assert "00000007.pt would run posix.system when unpickled: refused" in done.stderr
    assert not (tmp_path / "mark").exists()


def test_npy_of_objects_is_refused(tmp_path):
    source = make_npy(tmp_path / "source")
    np.save(source / "00000/img-mean-std-00000007.npy", np.array([Payload(tmp_path / "mark")], dtype=object))
    done = prepare("import", source, "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "allow_pickle=False" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "mark").exists()


RECORD = {
    "c": np.arange(8, dtype=np.float32).reshape(2, 4),
    "fortran": np.asfortranarray(np.arange(8.0).reshape(2, 4)),
    "strided": np.arange(10)[::2],
    "big-endian": np.arange(3, dtype=">i4"),
    "half": np.float16([1, 2]),
    "empty": np.zeros((0, 3)),
    "scalar array": np.array(5.0),
    "number": np.int64(3),
    "text": "x",
    "bytes": b"\xff\x00",
    "none": None,
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_records_of_every_protocol(protocol):
    found = load_record(pickle.dumps(RECORD, protocol=protocol))
    assert found.keys() == RECORD.keys()
    for name, value in RECORD.items():
        if isinstance(value, np.ndarray):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert np.array_equal(found[name], value)


def test_records_of_numpy_1(tmp_path):
    """Its internals were called numpy.core, also in its pickles."""
    data = pickle.dumps(RECORD, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert np.array_equal(load_record(data)["c"], RECORD["c"])


@pytest.mark.parametrize(
    "value", [[1], (1,), {"a": 1}, {1}, 1j, np.array(["a"]), np.array([None]), np.zeros(1, [("a", "f4")]), np.float32]
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_types_are_rejected(value, protocol):
    with pytest.raises(Refused):
        load_record(pickle.dumps({"a": value}, protocol=protocol))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"garbage", pickle.dumps(RECORD)[:60], pickle.dumps([1]),
        b"\x80\x02cnumpy\ndtype\n)\x81.",  # a new object of a function
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",  # an array that is never filled
        b"\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n)Rs.",
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    ],
)  # fmt: skip
def test_invalid_record(data):
    with pytest.raises(ValueError, match=r"it is|it has"):
        load_record(data)


def test_a_record_cannot_change_the_reader():
    """BUILD sets attributes of an object on the stack, unless the object prevents it."""
    with pytest.raises(Refused, match="a change of a function"):
        load_record(b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.")
    assert np.array_equal(load_record(pickle.dumps(RECORD))["c"], RECORD["c"])


# ----------------------------------------------------------------------------
# Checking.


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A data set of three shards."""
    from mfengine.data.writer import write_dataset

    folder = tmp_path_factory.mktemp("check")
    return write_dataset(folder / "data", ImportedSamples(make_npy(folder / "source")), shard_samples=10).folder


def place(folder, shard, sample, part):
    """The offset of a component according to the index."""
    fields = (folder / f"{shard:06d}.idx").read_text().splitlines()[1 + sample].split()
    return int(fields[1 if part == "moments" else 5])


def poke(folder, at, value, keep_checksum=False, shard=1):
    """Write bytes into a shard, optionally with a matching checksum, so that only the content shows it."""
    import hashlib

    path = folder / f"{shard:06d}.tar"
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    if not keep_checksum:
        describe(folder, lambda d: d["shards"][shard].update(sha256=hashlib.sha256(data).hexdigest()))


def describe(folder, change):
    values = json.loads((folder / "dataset.json").read_text())
    change(values)
    (folder / "dataset.json").write_text(json.dumps(values))


def reindex(folder, change, shard=1):
    path = folder / f"{shard:06d}.idx"
    path.write_text(change(path.read_text()))


NAN, MINUS_ONE = np.array([np.nan, -1], "<f2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "000001.tar").unlink(), "000001.tar is missing"),
        (lambda f: os.truncate(f / "000001.tar", 5000), "000001.tar has 5000 bytes; dataset.json says"),
        (lambda f: (f / "000001.idx").unlink(), "000001.idx is missing"),
        (lambda f: poke(f, place(f, 1, 4, "moments") + 3, b"\x01", keep_checksum=True), "has changed since"),
        (lambda f: poke(f, place(f, 1, 4, "moments"), NAN.tobytes()), "its moments are not all finite"),
        (lambda f: poke(f, place(f, 1, 4, "moments") + 2 * 144, MINUS_ONE.tobytes()), "deviation is negative"),
        (lambda f: poke(f, place(f, 1, 4, "label"), b"\x05"), "its label is 5; labels are 0 to 4"),
        (lambda f: poke(f, place(f, 1, 4, "label") - 512, b"7"), "there is no file where the index puts"),
        (lambda f: poke(f, place(f, 1, 4, "moments") - 512, bytes(512)), "there is no file where the index puts"),
        (lambda f: reindex(f, lambda s: s.replace(f" {place(f, 1, 4, 'label')} ", " 999999 ")), "outside the shard"),
        (lambda f: reindex(f, lambda s: s.replace(f" {place(f, 1, 4, 'label')} ", f" {place(f, 1, 5, 'label')} ")),
         "there is a different file where"),
        (lambda f: reindex(f, lambda s: s.replace("moments 512 ", "moments 5 ", 1)), "outside the shard"),
        (lambda f: reindex(f, lambda s: s[: s.rindex(" label ")]), "its line in the index is malformed"),
        (lambda f: reindex(f, lambda s: "\n".join(s.splitlines()[:-1]) + "\n"), "has 9 samples, not 10"),
        (lambda f: describe(f, lambda d: d.update(class_counts=[23, 0, 0, 0, 0])), "do not match the samples"),
    ],
)  # fmt: skip
def test_check_finds_damage(damage, message, imported, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(imported, folder)
    damage(folder)
    done = prepare("check", "data", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    problems = [line for line in done.stderr.splitlines() if "problem: " in line]
    assert len(problems) == 1, done.stderr
    assert message in problems[0]
    assert done.stderr.splitlines()[-1] == "error: data is damaged: 1 problem(s)"


def test_shard_truncated_while_it_is_checked(imported, tmp_path, monkeypatch):
    shutil.copytree(imported, tmp_path / "data")
    check_shard = Dataset.check_shard

    def check_and_truncate(dataset, shard):
        check_shard(dataset, shard)
        os.truncate(dataset.folder / shard.file, shard.bytes // 2)

    monkeypatch.setattr(Dataset, "check_shard", check_and_truncate)
    done = prepare("check", "data", cwd=tmp_path)
    assert done.returncode == 2
    assert "000001.tar became shorter while it was read" in done.stderr


def test_check_lists_all_damage(imported, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(imported, folder)
    (folder / "000000.tar").unlink()
    for sample in (2, 4, 6):
        poke(folder, place(folder, 1, sample, "label"), b"\x09")
    os.truncate(folder / "000002.tar", 100)
    done = prepare("check", "data", cwd=tmp_path)
    assert done.returncode == 2
    assert "000000.tar is missing" in done.stderr
    assert "its label is 9; labels are 0 to 4 (2 more like it)" in done.stderr
    assert "000002.tar has 100 bytes" in done.stderr
    assert "3 problem(s)" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["space"].update(scale=5.0), "channel 0 has mean"),
        (lambda d: d["space"].update(bias=9.0), "far from the 0 and 1 of noise"),
        (lambda d: (d["space"].update(num_classes=7), d.update(class_counts=[])), "2 of 7 classes have no sample"),
        (lambda d: [shard.pop("sha256") for shard in d["shards"]], "some shards have no checksum"),
    ],
)
def test_check_warns(change, message, imported, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(imported, folder)
    assert "warning" not in prepare("check", "data", cwd=tmp_path).stderr
    describe(folder, change)
    done = prepare("check", "data", cwd=tmp_path)
    assert done.returncode == 0
    assert "data is intact" in done.stdout
    assert message in done.stderr


def test_check_says_what_the_latents_are(imported, tmp_path):
    done = prepare("check", imported, cwd=tmp_path)
    assert done.returncode == 0
    assert "3 shard(s), 1 flip(s) of (4, 6, 6), 5 classes of 4 to 5" in done.stdout
    mean, log_variance = posteriors(1)
    spread = 0.18215 * np.sqrt((mean**2 + np.exp(log_variance)).mean((0, 1, 3, 4)))
    found = re.search("normalised by sd, latents have mean .* and standard deviation (.*) by channel", done.stdout)[1]
    assert [float(x) for x in found.split(", ")] == pytest.approx(spread, rel=0.02)
