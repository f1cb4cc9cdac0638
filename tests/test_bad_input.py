"""Wrong input and failing disks, for all commands: one line and exit code 2, nothing lost, nothing overwritten.

`pytest tests/test_bad_input.py -m "" -s` prints the table: each command, its exit code, and its last line.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, run_command
from PIL import Image

# ----------------------------------------------------------------------------
# Damage to the inputs before a command runs.


def edit(path, **changes):
    """Change values of a JSON file; outer__inner names a nested one, and an ellipsis removes a value."""

    def apply():
        values = json.loads(Path(path).read_text())
        for name, value in changes.items():
            *outer, last = name.split("__")
            place = values
            for part in outer:
                place = place[int(part) if part.isdigit() else part]
            place[last] = value
            if value is ...:
                del place[last]
        Path(path).write_text(json.dumps(values))

    return apply


def put(path, content=""):
    """Replace whatever is there with a file."""

    def apply():
        if Path(path).is_dir():
            shutil.rmtree(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def make(path):
    return lambda: Path(path).mkdir(parents=True)


def remove(path):
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def cut(path, size):
    return lambda: os.truncate(path, size)


def move(path, to):
    return lambda: Path(path).rename(to)


def link(path, to):
    return lambda: Path(path).symlink_to(to)


def array(path, **arrays):
    return lambda: np.savez(path, **arrays)


def weights(path, value):
    return lambda: torch.save(value, path)


def label(number):
    """Change the label of the first sample in the data."""

    def apply():
        at = int(Path("data/000000.idx").read_text().splitlines()[1].split()[5])
        with Path("data/000000.tar").open("r+b") as file:
            file.seek(at)
            file.write(np.array(number, "<i4").tobytes())

    return apply


def moment(value):
    """Change the mean of the first sample in the data."""

    def apply():
        at = int(Path("data/000000.idx").read_text().splitlines()[1].split()[1])
        with Path("data/000000.tar").open("r+b") as file:
            file.seek(at)
            file.write(np.array(value, "<f2").tobytes())

    return apply


def metadata(content):
    """Replace the description of the export with a text, or with changes to it."""

    def apply():
        from safetensors.torch import load_file, save_file

        tensors = load_file("model.safetensors")
        save_file(tensors, "model.safetensors", metadata={"mfengine": content} if content is not None else None)

    return apply


def described(**changes):
    """Change the description of the export."""

    def apply():
        from safetensors import safe_open

        with safe_open("model.safetensors", "pt") as file:
            text = file.metadata()["mfengine"]
        put("description.json", text)()
        edit("description.json", **changes)()
        text = Path("description.json").read_text()
        Path("description.json").unlink()
        metadata(text)()

    return apply


def crowd(folder):
    """Add many images."""

    def apply():
        for i in range(500):
            shutil.copy(f"{folder}/0.png", f"{folder}/more{i}.png")

    return apply


def mount(path, options):
    def apply():
        Path(path).mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")

    return apply


def full(path):
    """A disk without a free byte."""

    def apply():
        mount(path, "size=64k")()
        with Path(path, "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    return apply


def filled(path):
    """Like `full`, but with the earlier contents."""

    def apply():
        there = Path(path).rename("aside")
        mount(path, "size=8m")()
        shutil.copytree(there, path, dirs_exist_ok=True)
        shutil.rmtree(there)
        with Path(path, "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    return apply


def read_only(path):
    """The same contents on a disk that is mounted read-only."""

    def apply():
        Path(path).mkdir(parents=True, exist_ok=True)
        for options in ("bind", "remount,bind,ro"):
            done = subprocess.run(["mount", "-o", options, path, path], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")

    return apply


# ----------------------------------------------------------------------------
# The table.


@dataclass(frozen=True)
class Case:
    command: str
    damage: tuple = ()
    says: str = ""
    """a part of the line"""
    code: int = 2
    new: tuple[str, ...] = field(default=())
    """names of files that the command may create"""
    signum: int | None = None
    """signal to send to the process"""
    sent: str = ""
    """send it when this file exists; without a name, after some seconds"""


def case(command, *damage, says="", code=2, new=()):
    return Case(command, damage, says, code, new)


def interrupt(command, sent, *damage, signum=signal.SIGINT, says="interrupted", new=()):
    return Case(command, damage, says, 128 + signum, new, signum, sent)


TRAIN = f"train {' '.join(SMALL)} --data=data --steps=2 --name=new"
RESUME = f"train {' '.join(SMALL)} --data=data --steps=6 --resume=auto --optim.ema-decays 0.9 0.5"
IMAGES = "prepare images images out --vae=vae --size=16 --device=cpu"
EVALUATE = "evaluate runs/digits --data=data --num=20 --steps 1"
NEWEST = "runs/digits/checkpoints/step-00000004"
DESCRIPTION = f"{NEWEST}/checkpoint.json"

OPTIONS = [
    case("train xl3", says="there is no preset xl3; the nearest is xl2"),
    case("train digits xl2", says="unexpected argument xl2"),
    case("train --steps 5 digits", says="give one preset first"),
    case("train qqqqqq", says="there is no preset qqqqqq; there are digits, small-8"),
    case("train ''"),
    case("train --lr 1", says="the nearest is --optim.lr"),
    case("train --batch-sise 4", says="the nearest is --batch-size"),
    case("train --zzzzz 4", says="there is no option --zzzzz ("),
    case("train -x"),
    case("train --batch-size many", says="--batch-size"),
    case("train --batch-size 0", says="--batch-size must be at least 1, not 0"),
    case("train --batch-size 1.5"),
    case("train --batch-size"),
    case("train --accumulation 0", says="--accumulation must"),
    case("train --epochs nan", says="--epochs must be"),
    case("train --epochs inf", says="--epochs must be"),
    case("train --epochs=-1", says="--epochs must be"),
    case("train --epochs 0", says="--epochs must be"),
    case("train --steps 0", says="--steps must be at least 1, not 0"),
    case("train --steps=-3", says="--steps must be"),
    case("train --seed=-1", says="--seed must be at least 0 and below 2^63, not -1"),
    case("train --seed 99999999999999999999", says="--seed must be"),
    case("train --name ''", says="--name must be"),
    case("train --name a/b", says="--name must be"),
    case("train --name ..", says="--name must be"),
    case("train --name .", says="--name must be"),
    case("train --keep 0", says="--keep must be"),
    case("train --log-every 0", says="--log-every must be"),
    case("train --sample-every=-1", says="--sample-every must"),
    case("train --evaluate-every=-1", says="--evaluate-every must"),
    case("train --checkpoint-every 0", says="--checkpoint-every must"),
    case("train --checkpoint-minutes=-1", says="--checkpoint-minutes must"),
    case("train --checkpoint-minutes nan", says="--checkpoint-minutes must"),
    case("train --checkpoint-minutes inf", says="--checkpoint-minutes must"),
    case("train --max-skipped-steps=-1", says="--max-skipped-steps must"),
    case("train --replicas 0", says="--replicas must"),
    case("train --device gpu", says="--device"),
    case("train --precision fp8", says="--precision"),
    case("train --optim.lr 0", says="--optim.lr must"),
    case("train --optim.lr nan", says="--optim.lr must"),
    case("train --optim.lr inf", says="--optim.lr must"),
    case("train --optim.warmup-epochs=-1", says="--optim.warmup-epochs must"),
    case("train --optim.warmup-epochs nan", says="--optim.warmup-epochs must"),
    case("train --optim.warmup-epochs inf", says="--optim.warmup-epochs must"),
    case("train --config data", says="cannot read data"),
    case("train --config data/dataset.json", says="data/dataset.json"),
    case("train digits --config data/dataset.json", says="are both given: omit one"),
    case("train --profile 3", says="--profile must"),
    case("train --profile 3:2", says="--profile must"),
    case("train --profile 0:2", says="--profile must"),
    case("train --keep-every=-1", says="--keep-every must"),
    case("train --optim.hold-epochs=-1", says="--optim.hold-epochs must"),
    case("train --optim.schedule linear", says="--optim.schedule"),
    case("train --optim.ema-rampup-ratio=-0.1", says="--optim.ema-rampup-ratio must"),
    case("train --normalisation sd-vae", says="--normalisation"),
    case("train --optim.betas 0.9 1", says="--optim.betas must"),
    case("train --optim.betas 0.9 nan", says="--optim.betas must"),
    case("train --optim.betas 0.9", says="--optim.betas"),
    case("train --optim.eps 0", says="--optim.eps must"),
    case("train --optim.eps inf", says="--optim.eps must"),
    case("train --optim.weight-decay=-1", says="--optim.weight-decay must"),
    case("train --optim.weight-decay inf", says="--optim.weight-decay must"),
    case("train --optim.clip-norm 0", says="--optim.clip-norm must"),
    case("train --optim.clip-norm inf", says="--optim.clip-norm must"),
    case("train --optim.ema-decays", says="--optim.ema-decays must"),
    case("train --optim.ema-decays 1", says="--optim.ema-decays must"),
    case("train --optim.ema-decays 0.9 0.9", says="--optim.ema-decays must"),
    case("train --optim.ema-decays 500e3 500e3", says="--optim.ema-decays must"),
    case("train --optim.ema-decays nan", says="--optim.ema-decays must"),
    case("train --model.depth 0", says="--model.depth must be at least 1, not 0"),
    case("train --model.hidden-size 30", says="--model.hidden-size 30 is not a multiple of --model.num-heads 4"),
    case("train --model.num-heads 0", says="--model.num-heads must"),
    case("train --model.patch-size 3", says="--model.input-size 8 is not a multiple of --model.patch-size 3"),
    case("train --model.mlp-ratio nan", says="--model.mlp-ratio must"),
    case("train --model.mlp-ratio inf", says="--model.mlp-ratio must"),
    case("train --model.mlp-ratio 0", says="--model.mlp-ratio must"),
    case("train --method.omega nan", says="--method.omega must"),
    case("train --method.omega inf", says="--method.omega must"),
    case("train --method.kappa=-1", says="--method.kappa must"),
    case("train --method.kappa nan", says="--method.kappa must"),
    case("train --method.t-start 0.8 --method.t-end 0.2", says="--method.t-start"),
    case("train --method.t-start 2", says="--method.t-start must"),
    case("train --method.interval-share 2", says="--method.interval-share must"),
    case("train --method.label-dropout=-0.1", says="--method.label-dropout must"),
    case("train --method.logit-mean nan", says="--method.logit-mean must"),
    case("train --method.logit-std 0", says="--method.logit-std must"),
    case("train --method.logit-std inf", says="--method.logit-std must"),
    case("train --method.norm-p=-1", says="--method.norm-p must"),
    case("train --method.norm-p nan", says="--method.norm-p must"),
    case("train --method.norm-eps 0", says="--method.norm-eps must"),
    case("train --method.norm-eps nan", says="--method.norm-eps must"),
    case("train --init-reverse-time", says="--init-reverse-time needs --init"),
    case("train --ranks 2", says="--ranks"),
    case("train --dry-run --ranks 0", says="--ranks"),
    case("train --dry-run --ranks 3 --data data", says="--batch-size 256 is not a multiple"),
    case(f"{TRAIN} --batch-size=30", says="interval share"),
    case(f"{TRAIN} --accumulation=3", says="--batch-size 32 is not a multiple of ranks x --accumulation"),
    case(f"{TRAIN} --replicas=2", says="--replicas must divide the 1 rank(s); 2 does not"),
    case(f"{TRAIN} --model.input-size=16", says="holds latents of (1, 8, 8); the model takes"),
    case(f"{TRAIN} --model.num-classes=5", says="--model.num-classes is 5"),
    case(f"{TRAIN} --optim.backend=cuda", says="--optim.backend cuda"),
    case(f"{TRAIN} --optim.backend=apex", says="--optim.backend apex"),
    case(f"{TRAIN} --ops=triton --attention=flash-attn", says="--attention flash-attn is unavailable"),
    case("generate", says="CHECKPOINT"),
    case("generate runs/digits extra", says="unexpected argument extra"),
    case("generate runs/digits --stepz 1", says="the nearest is --steps"),
    case("generate runs/digits --steps 0", says="--steps must be different numbers, each at least 1"),
    case("generate runs/digits --per-label 0", says="--per-label must be at least 1, not 0"),
    case("generate runs/digits --seed=-1", says="--seed must"),
    case("generate runs/digits --labels 10", says="there is no label 10; the model has 0 to 9"),
    case("generate runs/digits --labels=-1", says="there is no label -1"),
    case("generate runs/digits --labels x"),
    case("generate runs/digits --out x.jpg", says="--out x.jpg must end in .png"),
    case("generate runs/digits --out ''"),
    case("generate runs/digits --ema-decay 0.1", says="has no moving average with decay 0.1"),
    case("generate runs/digits --ema-decay nan", says="--ema-decay must"),
    case("generate runs/digits --conditions omega 1", says="omega"),
    case("generate runs/digits --conditions omega", says="--conditions takes pairs of a name and a number"),
    case("generate runs/digits --conditions omega x", says="--conditions takes pairs of a name and a number"),
    case("generate runs/digits --conditions omega nan", says="--conditions must be finite"),
    case("generate model.safetensors --ema-decay 0.9", says="model.safetensors is an export"),
    case("generate runs/digits --vae nowhere/with/it", says="nowhere/with/it is not a folder"),
    case("generate runs/digits --vae mistyped/name", says="mistyped/name"),
    case("generate runs/digits --vae images", says="images"),
    case("generate runs/digits --vae vae", says="the VAE has 4 latent channels; the model has 1"),
    case("evaluate", says="CHECKPOINT"),
    case("evaluate runs/digits", says="nothing to do"),
    case(f"{EVALUATE} --num=1", says="--num must be at least 2, not 1"),
    case(f"{EVALUATE} --batch-size=0", says="--batch-size must be at least 1, not 0"),
    case(f"{EVALUATE} 0", says="--steps"),
    case(f"{EVALUATE} 1", says="--steps"),
    case(f"{EVALUATE} --seed=-1", says="--seed must"),
    case(f"{EVALUATE} --labels=all"),
    case(f"{EVALUATE} --ema-decay=inf", says="--ema-decay must"),
    case(f"{EVALUATE} --conditions kappa 1", says="kappa"),
    case(f"{EVALUATE} --inception=sit.pt", says="--inception needs --reference"),
    case(f"{EVALUATE} --sweep omega=1", says="there is no setting to sweep omega; there are steps, ema_decay"),
    case(f"{EVALUATE} --sweep steps", says="--sweep steps: values must be whole numbers"),
    case(f"{EVALUATE} --sweep ''", says="--sweep : values must be numbers"),
    case(f"{EVALUATE} --sweep steps=1,1.5", says="--sweep steps=1,1.5: values must be whole numbers"),
    case(f"{EVALUATE} --sweep steps=0", says="steps must be at least 1"),
    case(f"{EVALUATE} --sweep steps=1 steps=2", says="steps is given twice"),
    case(f"{EVALUATE} --sweep ema_decay=0.9,inf", says="must be finite and different"),
    case(f"{EVALUATE} --sweep ema_decay=0.9,0.9", says="must be finite and different"),
    case(f"{EVALUATE} --sweep ema_decay=0.9,0.1", says="has no moving average with decay 0.1"),
    case(f"{EVALUATE} --sweep ema_decay=0.9 --ema-decay=0.9", says="ema_decay is given twice"),
    case(f"{EVALUATE} --sweep steps=1 --save=x", says="--sweep needs"),
    case(f"{EVALUATE} --sweep steps=1 --out=x.png", says="--out x.png must end in .json"),
    case("evaluate runs/digits --sweep steps=1", says="nothing to do"),
    case("evaluate model.safetensors --data=data --sweep steps=1", says="--out"),
    case(f"{EVALUATE} --vae=vae", says="--vae needs --reference or --save"),
    case(f"{EVALUATE} --out=nowhere/metrics.json", says="nowhere"),
    case(f"{EVALUATE} --out=data", says="is a folder"),
    case(f"{EVALUATE} --save=data", says="data is not an empty folder"),
    case(f"{EVALUATE} --save=pictures.npz", put("pictures.npz"), says="pictures.npz exists"),
    case("evaluate runs/digits --reference references --num=5", says="--num must be at least 10 with --reference"),
    case("evaluate runs/digits --reference nowhere", says="nowhere"),
    case("evaluate runs/digits --reference data", says="data has no images"),
    case("evaluate runs/digits --reference x.npz", put("x.npz", "x"), says="x.npz"),
    case("evaluate runs/digits --reference x.npz", array("x.npz", mu=np.zeros(3), sigma=np.eye(3)), says="mu is (3,)"),
    case("evaluate runs/digits --reference x.npz", array("x.npz", a=np.zeros(3)), says="x.npz has a"),
    case(
        "evaluate runs/digits --reference x.npz", array("x.npz", arr_0=np.zeros((5, 8, 8, 3))), says="arr_0 is float64"
    ),
    case(
        "evaluate runs/digits --reference references", put("references/0.png", "x"), says="cannot read references/0.png"
    ),
    case("export", says="CHECKPOINT"),
    case("export runs/digits", says="OUT"),
    case("export runs/digits x.bin", says="x.bin must end in .safetensors or .pth"),
    case("export runs/digits model.safetensors", says="model.safetensors exists"),
    case("export runs/digits nowhere/x.safetensors", says="nowhere does not exist"),
    case("export runs/digits x.safetensors --ema-decay=0.1", says="decay 0.1"),
    case("export model.safetensors x.safetensors", says="model.safetensors is already an export"),
    case("export data x.safetensors", says="data must be a checkpoint"),
    case("prepare", says="no command is given"),
    case("prepare digts out", says="the nearest is digits"),
    case("prepare qqqq out", says="there is no command qqqq; there are digits"),
    case("prepare digits", says="OUT"),
    case("prepare digits out extra", says="unexpected argument extra"),
    case("prepare digits out --seed=-1", says="--seed must"),
    case("prepare digits data", says="data is not an empty folder"),
    case("prepare digits sit.pt", says="sit.pt is not an empty folder"),
    case("prepare digits .", says="."),
    case("prepare digits out", link("out", "nowhere"), says="out"),
    case("prepare images", says="SRC"),
    case("prepare images images", says="OUT"),
    case("prepare images images out", says="--vae"),
    case(f"{IMAGES} --size=0", says="--size must be at least 1, not 0"),
    case(f"{IMAGES} --size=15", says="size 15 is not a multiple of 2"),
    case(f"{IMAGES} --batch-size=0", says="--batch-size must be at least 1, not 0"),
    case(f"{IMAGES} --shard-samples=0", says="--shard-samples must be at least 1, not 0"),
    case(f"{IMAGES} --max-broken=1", says="--max-broken must"),
    case(f"{IMAGES} --max-broken=nan", says="--max-broken must"),
    case(f"{IMAGES} --seed=-1", says="--seed must"),
    case(f"{IMAGES} --num-classes=0", says="--num-classes must be at least 1, not 0"),
    case(f"{IMAGES} --num-classes=1", says="the highest label is 1"),
    case(f"{IMAGES} --precision=fp8", says="--precision"),
    case(IMAGES.replace("images out", "nowhere out"), says="nowhere does not exist"),
    case(IMAGES.replace("images out", "sit.pt out"), says="sit.pt is neither a folder, a .tar nor an LMDB"),
    case(IMAGES.replace("images out", "images/a out"), says="--one-class"),
    case(IMAGES.replace("images out", "images images/out"), says="images/out is inside the source images"),
    case(IMAGES.replace("images out", "images data"), says="data is not an empty folder"),
    case(IMAGES.replace("=vae", "=mistyped/name"), says="mistyped/name"),
    case(IMAGES.replace("=vae", "=./nowhere"), says="./nowhere is not a folder"),
    case(IMAGES.replace("=vae", "=images"), says="images"),
    case("prepare import npy", says="OUT"),
    case("prepare import nowhere out", says="nowhere does not exist"),
    case("prepare import images out", says="images cannot be imported: it must be an LMDB"),
    case("prepare import npy npy/out", says="npy/out is inside the source npy"),
    case("prepare import npy out --scale nan", says="--scale must"),
    case("prepare import npy out --scale 0", says="--scale must"),
    case("prepare import npy out --bias inf", says="--bias must"),
    case("prepare import npy out --normalisation sd --scale 1", says="--normalisation sd sets scale and bias"),
    case("prepare import npy out --normalisation sd --bias 1", says="--normalisation sd sets scale and bias"),
    case("prepare import npy out --normalisation std", says="--normalisation"),
    case("prepare import npy out --num-classes 0", says="--num-classes must"),
    case("prepare import npy out --max-broken 2", says="--max-broken must"),
    case("prepare import npy out --seed=-1", says="--seed must"),
    case("prepare import data out", says="data is already a data set of mfengine"),
    case("prepare check", says="DATA"),
    case("prepare check nowhere", says="nowhere"),
    case("prepare check runs/digits", says="runs/digits is a run folder"),
    case("prepare check sit.pt", says="sit.pt"),
    case("prepare normalise", says="DATA"),
    case("prepare normalise data", says="--to"),
    case("prepare normalise data --to std", says="--to"),
    case("prepare normalise data --to sd", says="normalisation sd is for 4 channels; these latents have 1"),
    case("prepare normalise nowhere --to sd", says="nowhere"),
    case("info extra", says="unexpected argument extra"),
    case("info --verbose", says="there is no option --verbose"),
]

DAMAGE = [
    case(f"{TRAIN} --data=nowhere", says="nowhere"),
    case(f"{TRAIN} --data=runs/digits", says="runs/digits is a run folder"),
    case(TRAIN, remove("data/000000.tar"), says="000000.tar is missing"),
    case(TRAIN, remove("data/000000.idx"), says="000000.idx is missing"),
    case(TRAIN, cut("data/000000.tar", 4096), says="000000.tar has 4096 bytes"),
    case(TRAIN, cut("data/000000.idx", 0), says="000000.idx"),
    case(TRAIN, put("data/000000.idx", "v1.2 1797\nmoments x y z\n"), says="000000.idx"),
    case(TRAIN, put("data/000000.idx", b"\xff\xfe\n"), says="000000.idx"),
    case(TRAIN, put("data/dataset.json", ""), says="data/dataset.json"),
    case(TRAIN, put("data/dataset.json", "[1]"), says="data/dataset.json"),
    case(TRAIN, put("data/dataset.json", "null"), says="data/dataset.json"),
    case(TRAIN, put("data/dataset.json", b"\xff\xfe\x00"), says="data/dataset.json"),
    case(TRAIN, put("data/dataset.json", "[" * 100_000), says="data/dataset.json"),
    case(TRAIN, remove("data/dataset.json"), make("data/dataset.json"), says="data/dataset.json"),
    *(
        case(command, edit("data/dataset.json", **change), says=says)
        for change, says in (
            ({"space__scale": 0}, "space.scale must not be 0"),
            ({"space__scale": float("nan")}, "space.scale"),
            ({"space__bias": float("inf")}, "space.bias"),
            ({"space__bias": "abc"}, "space.bias"),
            ({"space__scale": None}, "space.scale"),
            ({"space__scale": [1, 2]}, "space.scale must be a number, or one per channel (1)"),
            ({"space__scale": ["x"]}, "space.scale[0]"),
            ({"space__shape": [8]}, "space.shape"),
            ({"space__shape": 8}, "space.shape"),
            ({"space__shape": [1, 8, -8]}, "space.shape"),
            ({"space__pixel_range": "x"}, "space.pixel_range"),
            ({"space__pixel_range": [1, 1]}, "space.pixel_range"),
            ({"space__num_classes": 0}, "space.num_classes"),
            ({"space": None}, "space"),
            ({"space": ...}, "space"),
            ({"flips": 3}, "flips"),
            ({"flips": True}, "flips"),
            ({"count": "1797"}, "count"),
            ({"count": 5}, "5 samples"),
            ({"shards": []}, "shards"),
            ({"shards": 3}, "shards"),
            ({"shards__0__count": -1}, "shards[0].count"),
            ({"shards__0__file": 3}, "shards[0].file"),
            ({"shards__0__bytes": None}, "shards[0].bytes"),
            ({"class_counts": ["x"]}, "class_counts[0]"),
            ({"class_names": [3]}, "class_names"),
            ({"name": None}, "name"),
            ({"colour": "red"}, "colour"),
        )
        for command in (TRAIN, EVALUATE, "prepare check data")
    ),
    case(f"{TRAIN} --steps=200", label(77), says="label", new=("new",)),
    case(EVALUATE, label(77), says="label"),
    case(EVALUATE, label(-1), says="label"),
    case("prepare check data", label(77), says="damaged"),
    case(EVALUATE, moment(np.nan), says="not finite"),
    case("prepare check data", moment(np.nan), says="damaged"),
    case("prepare check data", remove("data/000000.tar"), says="damaged"),
    case("prepare normalise data --to measured", remove("data/000000.tar"), says="damaged"),
    # The run folder.
    case(TRAIN.replace("--name=new", "--name=digits"), says="continue it with --resume auto"),
    case(f"{RESUME} --seed=7", says="has a run with seed 0, not 7"),
    case(f"{RESUME} --model.depth=2", says="model.depth 1, not 2"),
    case(RESUME, put("runs/digits/config.json", ""), says="runs/digits/config.json"),
    case(RESUME, put("runs/digits/config.json", "[]"), says="runs/digits/config.json"),
    case(RESUME, put("runs/digits/config.json", "null"), says="runs/digits/config.json"),
    case(RESUME, put("runs/digits/config.json", b"\xff"), says="runs/digits/config.json"),
    case(RESUME, edit("runs/digits/config.json", model="x"), says="model"),
    case(RESUME, edit("runs/digits/config.json", space=None), says="space"),
    case(RESUME, remove("runs/digits/config.json"), says="is not a run folder"),
    case(RESUME, put("runs/digits/metrics.jsonl", b"\xff\xfe\n"), says="metrics.jsonl"),
    case(RESUME, remove("runs/digits/metrics.jsonl"), make("runs/digits/metrics.jsonl"), says="metrics.jsonl"),
    *(
        case(
            f"{RESUME}{dry}",
            *(edit(f"runs/digits/checkpoints/step-0000000{i}/checkpoint.json", step="x") for i in (2, 4)),
            says="step is",
        )
        for dry in ("", " --dry-run --device=cpu")
    ),
    case(TRAIN, put("runs/new"), says="runs/new"),
    case(TRAIN, put("runs"), says="runs"),
    case(TRAIN, put("runs/new/other", "x"), says="runs/new is not a run folder"),
    case(f"{TRAIN} --runs=sit.pt", says="sit.pt"),
    # Weights to start from.
    *(
        case(f"{TRAIN} --init={source}", *damage, says=source)
        for source, damage in (
            ("nowhere", ()),
            ("data", ()),
            ("nowhere.pt", ()),
            ("x.pt", (put("x.pt", "x"),)),
            ("x.pt", (put("x.pt", ""),)),
            ("x.pt", (weights("x.pt", [1]),)),
            ("x.pt", (weights("x.pt", {}),)),
            ("x.pt", (weights("x.pt", {"ema": {"x_embedder.proj.weight": 1, "final_layer.linear.weight": 2}}),)),
            ("x.pt", (weights("x.pt", {"x_embedder.proj.weight": torch.ones(2), "final_layer.linear.weight": 2}),)),
            ("x.pt", (weights("x.pt", {1: 2}),)),
            ("x.pt", (make("x.pt"),)),
            ("x.safetensors", (put("x.safetensors", "x"),)),
            ("x.safetensors", (make("x.safetensors"),)),
        )
    ),
    case(f"{TRAIN} --init=model.safetensors --model.hidden-size=64", says="another architecture"),
    case(f"{TRAIN} --init=runs/digits --model.hidden-size=64", says="another architecture"),
    case(f"{TRAIN} --init=sit.pt --model.depth=2", says="another architecture"),
    case(f"{TRAIN} --init=model.safetensors --init-reverse-time", says="--init-reverse-time"),
    # Checkpoints and exports.
    *(
        case(command, damage, says=says)
        for command in ("generate runs/digits", EVALUATE, "export runs/digits x.safetensors")
        for damage, says in (
            (put(DESCRIPTION, ""), "checkpoint.json"),
            (put(DESCRIPTION, "[]"), "checkpoint.json"),
            (put(DESCRIPTION, b"\xff"), "checkpoint.json"),
            (edit(DESCRIPTION, network="unet"), "there is no network unet"),
            (edit(DESCRIPTION, network=["dit"]), "network"),
            (edit(DESCRIPTION, objective="gan"), "there is no objective gan"),
            (edit(DESCRIPTION, model=None), "model"),
            (edit(DESCRIPTION, model__depth=0), "model.depth"),
            (edit(DESCRIPTION, model__depth="abc"), "model.depth"),
            (edit(DESCRIPTION, model__depth=None), "model.depth"),
            (edit(DESCRIPTION, model__mlp_ratio=float("nan")), "model.mlp_ratio"),
            (edit(DESCRIPTION, model__hidden_size=64), "checkpoints/step-00000004"),
            (edit(DESCRIPTION, method__omega="x"), "method.omega"),
            (edit(DESCRIPTION, method=3), "method"),
            (edit(DESCRIPTION, space__scale=0), "space.scale"),
            (edit(DESCRIPTION, space__shape=[8]), "space.shape"),
            (edit(DESCRIPTION, space=...), "space"),
            (edit(DESCRIPTION, space__shape=[4, 8, 8]), "space.shape"),
            (edit(DESCRIPTION, ema_decays=[]), "ema_decays"),
            (edit(DESCRIPTION, ema_decays="x"), "ema_decays"),
            (edit(DESCRIPTION, ema_decays=...), "ema_decays"),
        )
    ),
    *(
        case(command, damage, says=says)
        for command in ("generate model.safetensors", f"{TRAIN} --init=model.safetensors")
        for damage, says in (
            (metadata("x"), "model.safetensors"),
            (metadata("[]"), "model.safetensors"),
            (metadata("{}"), "model.safetensors"),
            (metadata(None), "was not written by mfengine.export"),
            (described(model__depth=True), "model.depth"),
            (described(space__bias=None), "space.bias"),
            (described(network="unet"), "there is no network unet"),
            (cut("model.safetensors", 1000), "model.safetensors"),
            (cut("model.safetensors", 0), "model.safetensors"),
        )
    ),
    case("generate model.safetensors", described(model__depth=3), says="another architecture"),
    case("generate nowhere", says="nowhere"),
    case("generate images", says="images must be a checkpoint"),
    case("generate sit.pt", says="sit.pt"),
    case("generate nowhere.safetensors", says="nowhere.safetensors"),
    # Sources of images and latents.
    case(
        IMAGES, *(put(f"images/{c}/{i}.png", "x") for c in "ab" for i in range(4)), says="broken", new=(".partial-out",)
    ),
    case(IMAGES, remove("images/b"), make("images/b"), says="images/b has no images"),
    case(IMAGES.replace("images out", "x.tar out"), put("x.tar", "x"), says="x.tar"),
    case(IMAGES.replace("images out", "x.tar out"), put("x.tar", ""), says="x.tar"),
    case(IMAGES.replace("images out", "x.tar out"), make("x.tar"), says="x.tar"),
    case(IMAGES.replace("images out", "x.lmdb out"), put("x.lmdb", "x"), says="x.lmdb"),
    case(IMAGES, put("vae/config.json", "{"), says="vae"),
    case(IMAGES, edit("vae/config.json", scaling_factor=0), says="scale"),
    case(IMAGES, edit("vae/config.json", scaling_factor="x"), says="vae"),
    case(IMAGES, cut("vae/diffusion_pytorch_model.safetensors", 100), says="vae"),
    case("prepare import npy out", put("npy/dataset.json", ""), says="npy/dataset.json"),
    case("prepare import npy out", put("npy/dataset.json", "[]"), says="npy/dataset.json"),
    case("prepare import npy out", put("npy/dataset.json", b"\xff"), says="npy/dataset.json"),
    case("prepare import npy out", put("npy/dataset.json", '{"labels": []}'), says="no samples"),
    case("prepare import npy out", put("npy/dataset.json", '{"labels": [["0.npy", "a"]]}'), says="labels"),
    case(
        "prepare import npy out",
        put("npy/dataset.json", '{"labels": [["0.npy", -1]]}'),
        says="label",
        new=(".partial-out",),
    ),
    case("prepare import npy out", put("npy/0.npy", "x"), put("npy/1.npy", "x"), says="0.npy"),
    case("prepare import npy.zip out", put("npy.zip", "x"), says="npy.zip"),
    case("prepare import pt out --num-classes=2", put("pt/0.pt", "x"), says="0.pt", new=(".partial-out",)),
    case("prepare import pt out", says="--num-classes"),
    case("prepare import pt out --num-classes=1", says="label 1", new=(".partial-out",)),
    case("prepare import x.lmdb out", put("x.lmdb", "x"), says="x.lmdb"),
    case(f"{IMAGES}", put(".partial-out/plan.json", "x"), says=".partial-out/plan.json", new=(".partial-out",)),
    case(f"{IMAGES}", put(".partial-out/plan.json", "[]"), says=".partial-out/plan.json", new=(".partial-out",)),
    case(f"{IMAGES}", put(".partial-out/plan.json", "{}"), says="was begun with", new=(".partial-out",)),
    case(f"{IMAGES}", put(".partial-out", ""), says=".partial-out"),
]

DISKS = [
    *(
        case(command, damage("disk"), says="disk")
        for damage in (full, read_only, put)
        for command in (
            f"{TRAIN} --runs=disk",
            "generate runs/digits --out=disk/x.png",
            f"{EVALUATE} --out=disk/x.json",
            f"{EVALUATE} --save=disk/x.npz",
            f"{EVALUATE} --save=disk/x",
            "export runs/digits disk/x.safetensors",
            "prepare digits disk/out",
            IMAGES.replace(" out", " disk/out"),
            "prepare import npy disk/out",
        )
    ),
    *(
        case(command, says="/proc")
        for command in (
            f"{TRAIN} --runs=/proc",
            "generate runs/digits --out=/proc/x.png",
            f"{EVALUATE} --out=/proc/x.json",
            f"{EVALUATE} --save=/proc/x",
            "export runs/digits /proc/x.safetensors",
            "prepare digits /proc/out",
            IMAGES.replace(" out", " /proc/out"),
            "prepare import npy /proc/out",
        )
    ),
    case(RESUME, filled("runs"), says="cannot write"),
    case(RESUME, read_only("runs"), says="runs/digits"),
    case(EVALUATE, read_only("runs"), says="runs/digits"),
    case(EVALUATE, filled("runs"), says="metrics.json"),
    case(f"{EVALUATE} --sweep steps=1", read_only("runs"), says="runs/digits"),
    case(f"{EVALUATE} --sweep steps=1", filled("runs"), says="sweep.json"),
    case(f"{EVALUATE} --sweep steps=1", put("runs/digits/sweep.json", "x"), says="cannot read runs/digits/sweep.json"),
    case(f"{EVALUATE} --sweep steps=1", put("runs/digits/sweep.json", "[1]"), says="is not a list of rows"),
    case(f"{EVALUATE} --sweep steps=1", make("runs/digits/sweep.png"), says="runs/digits/sweep.png"),
    case("prepare normalise data --to measured", read_only("data"), says="cannot write data/dataset.json"),
    case("prepare normalise data --to measured", filled("data"), says="cannot write data/dataset.json"),
    case("generate runs/digits --out=runs/x.png", put("runs/x.png", "good"), filled("runs"), says="runs/x.png"),
    case("generate runs/digits --out=x.png", make("x.png"), says="x.png is a folder"),
    case(f"{EVALUATE} --save=x.npz", make("x.npz"), says="x.npz"),
    case("export runs/digits x.safetensors", make("x.safetensors"), says="x.safetensors exists"),
    *(
        case(f"{command} > /dev/full", says="No space left", new=new)
        for command, new in (
            ("info", ()),
            ("train --help", ()),
            ("train --dry-run --data=data --device=cpu", ()),
            ("generate runs/digits", ("samples.png",)),
            (EVALUATE, ("metrics.json",)),
            ("export runs/digits x.safetensors", ("x.safetensors",)),
            ("prepare check data", ()),
            ("prepare digits out", ("out",)),
        )
    ),
]

INTERRUPTS = [
    *(
        interrupt(
            f"{TRAIN} --steps=99999 --checkpoint-every=9",
            "runs/new/checkpoints/step-00000009",
            signum=signum,
            says="stopped by",
            new=("new",),
        )
        for signum in (signal.SIGINT, signal.SIGTERM)
    ),
    interrupt("generate runs/digits --per-label=2000 --steps=1000", ""),
    interrupt("evaluate runs/digits --data=data --num=200000", ""),
    interrupt("evaluate runs/digits --save=x --num=200000", ".partial-x", new=(".partial-x",)),
    interrupt(IMAGES, ".partial-out/data/000000.tar.partial", crowd("images/a")),
    interrupt(f"{IMAGES} --shard-samples=1", ".partial-out/000000.json", crowd("images/a"), new=(".partial-out",)),
]


# ----------------------------------------------------------------------------
# The inputs, and the tests.


@pytest.fixture(scope="module")
def inputs(digits, tmp_path_factory):
    """A folder with one input of every kind that commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(digits, folder / "data")
    done = run_command(
        "mfengine.train", *SMALL, "--data=data", "--steps=4", "--checkpoint-every=2", "--log-every=1",
        "--optim.ema-decays", "0.9", "0.5", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_command("mfengine.export", "runs/digits", "model.safetensors", cwd=folder)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    torch.save({"ema": load_file(folder / "model.safetensors")}, folder / "sit.pt")
    rng = np.random.default_rng(0)
    for name in ("images/a", "images/b", "references"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    for name in ("npy", "pt"):
        (folder / name).mkdir()
    for i in range(2):
        moments = rng.uniform(0, 1, (8, 4, 4)).astype(np.float32)
        np.save(folder / f"npy/{i}.npy", moments)
        torch.save({"image": torch.tensor(moments), "label": torch.tensor(i)}, folder / f"pt/{i}.pt")
    (folder / "npy/dataset.json").write_text(json.dumps({"labels": [[f"{i}.npy", i] for i in range(2)]}))
    return folder


def contents(folder):
    """{path: checksum} of all files, and empty folders."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and not any(path.iterdir()):
            found[str(path.relative_to(folder))] = ""
    return found


def unmount(folder):
    with open("/proc/self/mounts") as mounts:
        for at in reversed([line.split()[1] for line in mounts]):
            if at.startswith(f"{folder}/"):
                subprocess.run(["umount", at], check=True)


def send(case, process):
    """Send a signal to a running command."""
    deadline = time.monotonic() + (60 if case.sent else 3)
    while process.is_alive() and time.monotonic() < deadline and not (case.sent and Path(case.sent).exists()):
        time.sleep(0.001)
    if process.is_alive():
        os.kill(process.pid, case.signum)


def ending(case, inputs, folder):
    """(exit code, last line, problem) of a command."""
    shutil.copytree(inputs, folder)
    before_cwd = Path.cwd()
    os.chdir(folder)
    try:
        for damage in case.damage:
            damage()
        before = contents(folder)
        command, _, stdout = case.command.partition(" > ")
        name, *args = shlex.split(command)
        done = run_command(
            f"mfengine.{name}", *args, cwd=folder, timeout=60, stdout=stdout or None,
            meanwhile=partial(send, case) if case.signum else None,
        )  # fmt: skip
        after = contents(folder)
    except subprocess.TimeoutExpired:
        return None, "", ["took more than a minute"]
    finally:
        os.chdir(before_cwd)
        unmount(folder)
        shutil.rmtree(folder)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    begin = "error: " if case.signum is None else case.says
    errors = [line for line in lines if line.startswith(begin)]
    line = errors[-1] if errors else lines[-1] if lines else ""
    new = {path for path in after if path not in before and not set(Path(path).parts) & {*case.new}}
    bad = {
        "traceback": "Traceback" in done.stderr,
        "exit code": done.returncode != case.code,
        "no line" if not errors else "several lines": len(errors) != 1 or lines[-1] != line,
        "long line": len(line) > 500,
        "noise": any("etry" in line for line in lines),
        f"does not say {case.says!r}": case.says not in line,
        "lost " + ", ".join(sorted(before.keys() - after.keys())): before.keys() - after.keys(),
        "changed files": any(before[path] != after[path] for path in before.keys() & after.keys()),
        "left " + ", ".join(sorted(new)): new,
    }
    return done.returncode, line, [name for name, is_so in bad.items() if is_so]


def check(cases, inputs, tmp_path):
    endings = [(case, *ending(case, inputs, tmp_path / "case")) for case in cases]
    for case, code, line, bad in endings:
        print(f"{code!s:4} {case.command}\n     {line}" + (f"\n     BAD: {'; '.join(bad)}" if bad else ""))
    wrong = [f"{case.command}: {'; '.join(bad)}: {line}" for case, _, line, bad in endings if bad]
    print(f"{len(endings)} endings, {len(wrong)} of them bad")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.forks
def test_sample_of_bad_input_ends_with_one_line(inputs, tmp_path):
    check([*OPTIONS[::150], *DAMAGE[::150], *DISKS[7::40]], inputs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases", [OPTIONS, DAMAGE, DISKS, INTERRUPTS], ids=["options", "damage", "disks", "interrupts"]
)
def test_every_bad_input_ends_with_one_line(cases, inputs, tmp_path):
    check(cases, inputs, tmp_path)
