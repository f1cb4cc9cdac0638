"""Images to a data set: found, decoded, cropped, encoded, by several processes, killed and continued."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import kill, run_command, slow
from PIL import Image

from mfengine.data.format import BROKEN, Dataset, LatentSpace
from mfengine.data.image_files import open_rgb
from mfengine.data.images import adm_crop
from mfengine.data.loader import Loader
from mfengine.data.sources import open_source
from mfengine.data.vae import VAE
from mfengine.data.writer import order
from mfengine.errors import InputError

pytestmark = pytest.mark.skipif(
    not find_spec("diffusers") or not find_spec("sklearn"), reason="needs diffusers and scikit-learn"
)
CPU = torch.device("cpu")
COUNT = 120


@pytest.fixture(scope="module")
def photographs():
    from sklearn.datasets import load_sample_images

    return load_sample_images().images  # two of 427 x 640


@pytest.fixture(scope="module")
def pictures(photographs, tmp_path_factory):
    """120 images of mixed sizes and formats in four classes; the last is the digits, grey and 8 x 8."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("pictures") / "train"
    rng = np.random.default_rng(0)
    digits = load_digits().images
    for i in range(COUNT):
        if i % 4 == 3:
            image = Image.fromarray((digits[i] * 15.9).astype(np.uint8))
        else:
            height, width = rng.integers(10, 150, 2)
            top, left = rng.integers(0, 250, 2)
            image = Image.fromarray(photographs[i % 2][top : top + height, left : left + width])
        path = folder / f"class{i % 4}" / f"part{i % 3}" / f"{i:03d}.{('JPEG', 'png', 'webp')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (folder / "class1/._001.png").write_bytes(b"what another system leaves behind")
    (folder / "class1/list.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with a small VAE, whose latents have half the side of the images."""
    folder = tmp_path_factory.mktemp("vae") / "small"
    save_vae(folder)
    return folder


def save_vae(folder, **changes):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        **{
            "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4,
            "scaling_factor": 0.5, "shift_factor": 0.25, **changes,
        }
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def arguments(pictures, vae):
    """Arguments of the command, except the output."""
    options = ("--size=32", "--shard-samples=16", "--batch-size=8", "--device=cpu", "--normalisation=measured")
    return pictures, f"--vae={vae}", *options


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The data set of a single, uninterrupted process."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    done = run_command("mfengine.prepare", "images", arguments[0], folder, *arguments[1:], cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "train, a folder per class: 120 images in 4 class(es)" in done.stderr
    assert f"100%|██████████| {COUNT}/{COUNT}" in done.stderr
    assert "data: 120 samples in 8 shard(s)" in done.stdout
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(dataset):
    """{number: (moments, label)} of the samples in the tars."""
    found = {}
    for shard in dataset.shards:
        with tarfile.open(dataset.folder / shard.file) as tar:
            for member in tar:
                found.setdefault(int(member.name[:9]), {})[member.name[10:]] = tar.extractfile(member).read()
    shape = (dataset.flips, 2, *dataset.space.shape)
    return {
        number: (np.frombuffer(parts["moments"], "<f2").reshape(shape), int(np.frombuffer(parts["label"], "<i4")[0]))
        for number, parts in found.items()
    }


def pil_crop(image, size):
    """The central square as in ADM's training: halved with a box filter, then scaled with a bicubic one."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


# ----------------------------------------------------------------------------
# The command.


def test_samples_are_the_posteriors_of_the_cropped_images(whole, pictures, vae):
    from diffusers import AutoencoderKL

    dataset = Dataset.open(whole)
    network = AutoencoderKL.from_pretrained(vae)
    files = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("[0-9]*.*"))
    written = samples(dataset)
    assert sorted(written) == list(range(COUNT))
    assert [label for _, (_, label) in sorted(written.items())] == [int(files[i][5]) for i in order(COUNT, 0)]
    for number in range(0, COUNT, 7):
        crop = pil_crop(Image.open(pictures / files[order(COUNT, 0)[number]]).convert("RGB"), 32)
        image = torch.tensor(crop).permute(2, 0, 1)[None] / 127.5 - 1
        for moments, x in zip(written[number][0], (image, image.flip(-1)), strict=True):
            with torch.no_grad():
                posterior = network.encode(x).latent_dist
            np.testing.assert_allclose(moments[0], posterior.mean[0], atol=5e-2)
            np.testing.assert_allclose(moments[1], posterior.std[0], atol=5e-2)


def test_description_has_the_provenance(whole, vae):
    dataset = Dataset.open(whole)
    space = VAE(vae, CPU).space(32, num_classes=4)
    assert space == LatentSpace((4, 16, 16), num_classes=4, scale=0.5, bias=0.25)  # without --normalisation
    mean, std = (
        np.stack([moments for moments, _ in samples(dataset).values()]).astype(np.float64).transpose(2, 3, 0, 1, 4, 5)
    )  # of each channel first
    bias, scale = mean.mean((1, 2, 3, 4)), 1 / np.sqrt((std**2).mean((1, 2, 3, 4)) + mean.var((1, 2, 3, 4)))
    assert dataset.space.scale == pytest.approx(scale)
    assert dataset.space.bias == pytest.approx(bias)
    assert replace(dataset.space, scale=0.5, bias=0.25) == space
    assert (dataset.count, dataset.flips, dataset.broken, dataset.class_counts) == (COUNT, 2, 0, (30,) * 4)
    assert dataset.class_names == ("class0", "class1", "class2", "class3")
    assert dataset.provenance["vae"]["name"] == str(vae)
    assert dataset.provenance["vae"]["sha256"] == VAE(vae, CPU).sha256()
    assert (dataset.provenance["size"], dataset.provenance["precision"]) == (32, "float32")
    for shard in dataset.shards:
        assert shard.sha256 == hashlib.sha256((whole / shard.file).read_bytes()).hexdigest()
    latents, labels = Loader(dataset, COUNT, 0, 1, seed=0, device=CPU).draw(torch.Generator())
    assert latents.isfinite().all()
    assert latents.shape == (COUNT, 4, 16, 16)
    assert labels.bincount().tolist() == [30] * 4


@pytest.mark.slow  # starts torchrun twice per kill
def test_two_processes_that_are_killed_write_what_one_writes(whole, arguments, tmp_path, pytestconfig):
    out, partial = tmp_path / "data", tmp_path / ".partial-data"
    command = ["mfengine.prepare", "images", arguments[0], out, *arguments[1:]]
    kept = {}
    for kills in range(min(3, pytestconfig.getoption("--kills"))):  # there are 8 shards
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", *map(str, command)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(list(partial.glob("0*.json"))) < 2 * kills + 1 and time.monotonic() < deadline:
            time.sleep(0.0005)
        kill(process)
        assert not out.exists()
        assert 2 * kills < len(list(partial.glob("0*.json"))) < 8
        assert {name: (partial / name).stat().st_mtime_ns for name in kept} == kept  # nothing finished is repeated
        recorded = [partial / "data" / f"{record.stem}.tar" for record in partial.glob("0*.json")]
        kept = {str(p.relative_to(partial)): p.stat().st_mtime_ns for p in recorded}  # a kill may precede a record
    done = run_command(*command, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)
    assert {f"data/{p.name}": p.stat().st_mtime_ns for p in out.glob("*.tar")}.items() >= kept.items()
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Run `prepare images` in this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return lambda *args: run_command("mfengine.prepare", "images", *args, cwd=tmp_path)


def test_unreachable_hub_is_asked_once(pictures, tmp_path, monkeypatch, prepare):
    asked = []

    def refuse(url):
        asked.append(url)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    done = prepare(pictures, "out", "--vae=mistyped/name")
    assert (done.returncode, len(asked)) == (2, 1)
    assert done.stderr == (
        "error: cannot load the VAE mistyped/name, which is not a folder, from the hub: no route to the hub\n"
    )


def test_broken_images_are_left_out(whole, pictures, arguments, tmp_path, prepare):
    source = tmp_path / "train"
    gif = io.BytesIO()
    Image.new("RGB", (40, 40)).save(gif, "GIF")
    jpeg = (pictures / "class0/part0/000.JPEG").read_bytes()
    broken = {
        "class0/part0/000.JPEG": (jpeg[: len(jpeg) // 2], "truncated"),
        "class0/part1/004.png": (b"", "not an image of a known format: its 0 bytes"),
        "class1/part2/005.webp": (b"<html>404</html>", "its 16 bytes begin with b'<html>40'"),
        "class3/part0/003.JPEG": (gif.getvalue(), "begin with b'GIF87a"),
        "class2/part2/002.webp": (None, "No such file"),
    }  # fmt: skip
    for path in pictures.rglob("[0-9]*.*"):
        name = str(path.relative_to(pictures))
        data, _ = broken.get(name, (path.read_bytes(), ""))
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            (source / name).symlink_to("nowhere")
        else:
            (source / name).write_bytes(data)
    done = prepare(source, "data", *arguments[1:], "--shard-samples=200")
    assert done.returncode == 2
    assert "of the first 120 samples are broken; --max-broken allows 0.001 of all 120" in done.stderr
    assert ".partial-data/broken.jsonl lists them" in done.stderr
    done = prepare(source, "data", *arguments[1:], "--shard-samples=200", "--max-broken=0.05")
    assert done.returncode == 0, done.stderr
    assert "115 samples in 1 shard(s), 5 broken ones left out" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "data" / BROKEN).read_text().splitlines()]
    assert {line["name"] for line in lines} == set(broken)
    for line in lines:
        assert broken[line["name"]][1] in line["reason"]
    reference, found = samples(Dataset.open(whole)), samples(Dataset.open(tmp_path / "data"))
    assert len(found) == 115
    for number, (moments, label) in found.items():  # batches have other sizes now, and rounding depends on them
        assert label == reference[number][1]
        np.testing.assert_allclose(moments, reference[number][0], atol=1e-2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", "out"], "nowhere does not exist"),
        (["list.txt", "out"], "list.txt is neither a folder, a .tar nor an LMDB"),
        (["empty", "out"], "empty, a folder per class, has no images (.jpg, .jpeg, .png, .webp, .bmp"),
        (["flat", "out"], "flat has images but no subfolders: each class needs a folder of its own"),
        (["PARENT", "out"], "has only the class train: if the folders in PARENT/train are the classes, give that"),
        (["gap", "out"], "gap/b has no images: each folder in gap is a class; remove it"),
        (["labels.tar", "out"], 'labels.tar/x.png has no label: it needs a .cls with an integer from 0, or a .json'),
        (["cut.tar", "out"], "cannot read cut.tar"),
        (["PICTURES", "taken"], "taken is not an empty folder"),
        (["PICTURES", "out", "--size=33"], "size 33 is not a multiple of 2, the pixels per latent of"),
        (["PICTURES", "out", "--size=0"], "--size must be at least 1, not 0"),
        (["PICTURES", "out", "--seed=-1"], "seed must be at least 0 and below 2^63, not -1"),
        (["PICTURES", "out", "--num-classes=3"], "the highest label is 3: --num-classes must be at least 4"),
        (["PICTURES", "."], "is not an empty folder"),
        (["PICTURES", "link"], "link is a link, a mount point or the current folder"),
        (["PICTURES", "out", "--batch-size=0"], "--batch-size must be at least 1, not 0"),
        (["PICTURES", "out", "--shard-samples=0"], "--shard-samples must be at least 1, not 0"),
        (["PICTURES", "out", "--max-broken=1"], "--max-broken must be at least 0 and less than 1, not 1"),
        (["PICTURES", "out", "--vae=some/vae"], "cannot load the VAE some/vae, which is not a folder, from the hub: "),
        (["PICTURES", "out", "--vae=./vae"], "./vae is not a folder with a VAE in it"),
        (["PICTURES", "out", "--vae=empty"], "cannot load the VAE empty: "),
        (["PICTURES", "out", "--vae=grey"], "the VAE grey encodes images of 1 channel(s); RGB has 3"),
        (["PICTURES", "out", "--vea=x"], "there is no option --vea; the nearest is --vae"),
    ],
)  # fmt: skip
def test_wrong_input(pictures, photographs, arguments, tmp_path, prepare, args, message):
    image = Image.fromarray(photographs[0][:20, :20])
    for folder in ("empty", "flat", "gap/a", "gap/b", "taken"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("list.txt", "flat/x.png", "gap/a/x.png", "taken/x.png"):
        image.save(tmp_path / name, "PNG")
    with tarfile.open(tmp_path / "labels.tar", "w") as tar:
        tar.add(tmp_path / "flat/x.png", "x.png")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "labels.tar").read_bytes()[:700])
    if "--vae=grey" in args:
        save_vae(tmp_path / "grey", in_channels=1, out_channels=1)
    before = sorted(tmp_path.rglob("*"))
    args = [arg.replace("PICTURES", str(pictures)).replace("PARENT", str(pictures.parent)) for arg in args]
    done = prepare(*args[:2], *arguments[1:], *args[2:])
    assert done.returncode == 2
    assert message.replace("PARENT", str(pictures.parent)) in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(arguments, whole, small_disk, prepare):
    """One line, nothing that looks complete; and it continues once there is room."""
    command = (arguments[0], small_disk / "data", *arguments[1:])
    done = prepare(*command)
    assert done.returncode == 2
    assert f"cannot write {small_disk}/data: the disk is full (No space left on device)" in done.stderr.splitlines()[-1]
    assert [p.name for p in small_disk.iterdir()] == [".partial-data"]
    assert list(small_disk.glob(".partial-data/data/*.tar"))
    subprocess.run(["mount", "-o", "remount,size=3m", small_disk], check=True)
    done = prepare(*command)
    assert done.returncode == 0, done.stderr
    assert contents(small_disk / "data") == contents(whole)


# ----------------------------------------------------------------------------
# Sources.


def as_tars(folder, to, label):
    """The images of a folder in two tars, with labels from `label(number)`: (extension, content)."""
    to.mkdir()
    files = sorted(path for path in folder.rglob("[0-9]*.*"))
    for number, part in enumerate((files[:70], files[70:])):
        with tarfile.open(to / f"{number}.tar", "w") as tar:
            for path in part:
                key = f"train/{path.stem}"
                extension, content = label(int(path.relative_to(folder).parts[0][5:]))
                for name, data in ((f"{key}{extension}", content), (f"{key}{path.suffix}", path.read_bytes())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return to


def as_lmdb(folder, to):
    lmdb = pytest.importorskip("lmdb", reason="lmdb is an extra")
    with lmdb.open(str(to), map_size=2**28) as environment, environment.begin(write=True) as transaction:
        for i, path in enumerate(sorted(folder.rglob("[0-9]*.*")), start=1):
            transaction.put(f"image-{i:09d}".encode(), path.read_bytes())
            transaction.put(f"label-{i:09d}".encode(), path.relative_to(folder).parts[0][5:].encode())
        transaction.put(b"num-samples", b"120")
    return to


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda folder, to: as_tars(folder, to, lambda y: (".cls", f"{y}\n".encode())), "WebDataset tars"),
        (lambda folder, to: as_tars(folder, to, lambda y: (".json", b'{"label": %d}' % y)), "WebDataset tars"),
        (as_lmdb, "an LMDB"),
    ],
)
def test_sources_hold_the_same_images(pictures, tmp_path, make, kind):
    expected, source = open_source(pictures), open_source(make(pictures, tmp_path / "source"))
    assert (source.kind, len(source.names), source.class_names) == (kind, COUNT, ())

    def images(source):
        return {source.read(i): int(label) for i, label in enumerate(source.labels)}

    assert open_source(tmp_path / "source").fingerprint == source.fingerprint != expected.fingerprint
    assert images(source) == images(expected)


@pytest.mark.parametrize("cut", [True, False])
def test_damaged_tar_is_not_read_as_a_shorter_one(pictures, tmp_path, cut):
    """Python's tarfile takes a damaged header, or the end of the file, for the end of the archive."""
    tars = as_tars(pictures, tmp_path / "tars", lambda y: (".cls", b"%d" % y))
    with tarfile.open(tars / "0.tar") as tar:
        header = tar.getmembers()[40].offset
    with (tars / "0.tar").open("r+b") as file:
        if cut:
            file.truncate(header)
        else:
            file.seek(header)
            file.write(b"xyz")
    with pytest.raises(InputError, match=rf"0\.tar is damaged or cut off at byte {header}"):
        open_source(tars)


def test_truncated_lmdb(pictures, tmp_path):
    """Reading beyond the end of a mapped file would end the process."""
    path = as_lmdb(pictures, tmp_path / "source")
    with (path / "data.mdb").open("r+b") as file:
        file.truncate(40_000)
    with pytest.raises(InputError, match="source is cut off: it has 40000 bytes of"):
        open_source(path)


def test_lmdb_is_opened_once_by_many_threads(pictures, tmp_path):
    source = open_source(as_lmdb(pictures, tmp_path / "source"))
    with ThreadPoolExecutor(16) as readers:
        assert all(readers.map(source.read, range(16)))


def test_more_classes_than_there_are_labels(arguments, tmp_path, prepare):
    done = prepare(arguments[0], "out", *arguments[1:], "--num-classes=10")
    assert done.returncode == 0, done.stderr
    assert Dataset.open(tmp_path / "out").space.num_classes == 10


def test_one_tar_and_one_class(pictures, tmp_path):
    """If all images are of one class, labels are not read."""
    tars = as_tars(pictures, tmp_path / "tars", lambda y: (".txt", b"a caption"))
    with pytest.raises(InputError, match="has no label"):
        open_source(tars)
    assert len(open_source(tars / "0.tar", one_class=True).names) == 70
    for source in (open_source(tars, one_class=True), open_source(pictures, one_class=True)):
        assert (len(source.names), source.labels.tolist(), source.class_names) == (COUNT, [0] * COUNT, ())


# ----------------------------------------------------------------------------
# Decoding, cropping, encoding.


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def formats(image):
    """One image in various file formats."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    see_through = image.convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "JPEG": encoded(image, "JPEG"),
        "JPEG 4:4:4": encoded(image, "JPEG", subsampling=0),
        "progressive JPEG": encoded(image, "JPEG", progressive=True),
        "grey JPEG": encoded(image.convert("L"), "JPEG"),
        "CMYK JPEG": encoded(image.convert("CMYK"), "JPEG"),
        "turned JPEG": encoded(image, "JPEG", exif=exif),
        "PNG": encoded(image, "PNG"),
        "grey PNG": encoded(image.convert("L"), "PNG"),
        "black and white PNG": encoded(image.convert("1"), "PNG"),
        "transparent PNG": encoded(see_through, "PNG"),
        "PNG with a palette": encoded(image.quantize(64), "PNG"),
        "PNG with a transparent colour": encoded(image.quantize(64), "PNG", transparency=3),
        "WebP": encoded(image, "WEBP", quality=95),
        "BMP": encoded(image, "BMP"),
        "transparent WebP": encoded(see_through, "WEBP", lossless=True),
    }


def decoded(data):
    return np.asarray(open_rgb(io.BytesIO(data)))


def test_images_become_rgb(photographs):
    """From any format; lossless ones exactly."""
    image = Image.fromarray(photographs[0][:101, :150])
    files = formats(image)
    found = {name: decoded(data) for name, data in files.items()}
    assert {array.shape for array in found.values()} == {(101, 150, 3)}
    for name in ("PNG", "transparent PNG", "transparent WebP", "BMP"):
        assert np.array_equal(found[name], image), name
    for name in ("grey JPEG", "grey PNG", "black and white PNG"):
        assert np.array_equal(found[name], np.repeat(found[name][..., :1], 3, 2)), name
    for name in ("JPEG", "JPEG 4:4:4", "progressive JPEG", "CMYK JPEG", "turned JPEG", "PNG with a palette", "WebP"):
        assert np.abs(found[name].astype(int) - np.asarray(image)).mean() < 8, name


def test_16_bits_become_8(photographs):
    grey = np.asarray(Image.fromarray(photographs[0]).convert("L"))
    for low in (0, 255):
        image = decoded(encoded(Image.fromarray(grey.astype(np.uint16) * 256 + low), "PNG"))
        assert np.array_equal(image, np.repeat(grey[..., None], 3, 2))


def bicubic(x):
    """The cubic convolution kernel, a = -0.5."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def resized(x, side, kernel):
    """Resize the last axis but one of uint8 (..., n, 3) to `side`; kernels span pixels of the smaller scale."""
    scale = x.shape[-2] / side
    centres = (np.arange(side)[:, None] + 0.5) * scale
    weights = kernel((np.arange(x.shape[-2]) - centres + 0.5) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    return np.clip(np.floor(weights @ x.astype(float) + 0.5), 0, 255).astype(np.uint8)


def crop_by_formula(x, size):
    """ADM's crop in float64, with PIL's rounding to 8 bits between rows and columns."""
    kernel, side = box, np.array(x.shape[:2])
    while kernel is box:
        kernel = box if min(side) >= 2 * size else bicubic
        side = side // 2 if kernel is box else np.round(side * (size / min(side))).astype(int)
        x = resized(resized(x, side[1], kernel).swapaxes(0, 1), side[0], kernel).swapaxes(0, 1)
    top, left = (side - size) // 2
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"),
    [(640, 427), (375, 500), (128, 128), (129, 128), (75, 50), (257, 703), (514, 1027), slow(600, 3)],
)
def test_crop_equals_that_of_adm(photographs, width, height):
    """Within one level of 8 bits: PIL's weights have 22 bits. Pillow 13 filters columns of tall images first."""
    image = Image.fromarray(photographs[1]).resize((width, height), Image.Resampling.BICUBIC)
    crop = adm_crop(image, 128)
    assert np.array_equal(crop, pil_crop(image, 128))
    difference = np.abs(crop.astype(int) - crop_by_formula(np.asarray(image), 128))
    assert difference.max() <= 1
    assert difference.mean() < (1e-3 if height < 2 * width else 0.2)


def test_images_are_encoded_in_float32_unless_asked_otherwise(arguments, tmp_path, prepare, monkeypatch):
    """Not even TF32 is used, which is the default of cuDNN's convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen, encode = set(), VAE.encode

    def watched(vae, images):
        seen.add((vae.precision, torch.backends.cudnn.allow_tf32))
        return encode(vae, images)

    monkeypatch.setattr(VAE, "encode", watched)
    done = prepare(arguments[0], "data", *arguments[1:])
    assert done.returncode == 0, done.stderr
    assert seen == {("float32", False)}


def test_vae_in_bfloat16_is_close(vae, photographs):
    images = torch.tensor(photographs[0][:64, :64]).permute(2, 0, 1)[None] / 127.5 - 1
    exact, near = (VAE(vae, CPU, precision).encode(images) for precision in ("float32", "bfloat16"))
    for a, b in zip(exact, near, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05


def test_vae_hash_depends_only_on_weights(vae, tmp_path):
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(vae)
    network.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert VAE(tmp_path / "pickled", CPU).sha256() == VAE(vae, CPU).sha256()
    with torch.no_grad():
        network.encoder.conv_in.bias[0] += 1e-3
    network.save_pretrained(tmp_path / "other")
    assert VAE(tmp_path / "other", CPU).sha256() != VAE(vae, CPU).sha256()
