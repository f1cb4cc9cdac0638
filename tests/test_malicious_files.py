"""Reading a malicious checkpoint or weights file executes nothing, and the refusal is one line."""

import functools
import importlib
import io
import json
import operator
import os
import pickle
import shutil
import subprocess
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, run_command
from torch.distributed.checkpoint import metadata as records

from mfengine.engine.checkpoint import DESCRIPTION, newest_checkpoint
from mfengine.engine.storage import METADATA

MARK = "executed"
TOUCH = f"touch {MARK}"


class Call:
    """Unpickles as a call, possibly of the result of another call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __call__(self):
        raise AssertionError("it is only pickled")

    def __reduce__(self):
        return self.function, self.args


def torch_file(pickled):
    """A file in the format of torch.save."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def dumps(value):
    return pickle.dumps(value, protocol=2)  # torch.save's


SYSTEM = dumps(Call(os.system, TOUCH))
LOAD = functools.partial(torch.load, weights_only=False)
EXECUTING = {
    "a call": SYSTEM,
    "eval": dumps(Call(eval, f"open('{MARK}', 'w')")),
    "a process": dumps(Call(subprocess.getoutput, TOUCH)),
    "a partial": dumps(Call(Call(functools.partial, Call(functools.partial, os.system), TOUCH))),
    "a pickle in a pickle": dumps(Call(pickle.loads, SYSTEM)),
    "a file of torch in a pickle": dumps(Call(LOAD, Call(io.BytesIO, torch_file(SYSTEM)))),
    "an attribute": dumps(Call(Call(operator.attrgetter("system"), Call(importlib.import_module, "os")), TOUCH)),
    "an array of objects": dumps(np.array([Call(os.system, TOUCH)], dtype=object)),
    "a name with dots": b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93\x8c"
    + bytes([len(TOUCH)])
    + TOUCH.encode()
    + b"\x85R.",
}
OTHERS = {
    "another type": dumps(7),
    "a persistent id": b"\x80\x02X\x01\0\0\0xQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "a change of a class": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x05\0\0\0stateK\x01s\x86b.",
}


def craft(checkpoint, place, pickled):
    """Put a pickle into a checkpoint, which then has no checksums, like those of version 0.1."""
    description = json.loads((checkpoint / DESCRIPTION).read_text())
    del description["files"], description["crc32"]
    (checkpoint / DESCRIPTION).write_text(json.dumps(description))
    if place == METADATA:
        (checkpoint / METADATA).write_bytes(pickled)
        return
    with (checkpoint / METADATA).open("rb") as file:
        metadata = pickle.load(file)
    (checkpoint / "hostile").write_bytes(torch_file(pickled))
    for index, entry in metadata.storage_data.items():
        if index.fqn.startswith(place):
            metadata.storage_data[index] = replace(
                entry, relative_path="hostile", offset=0, length=(checkpoint / "hostile").stat().st_size
            )
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = run_command("mfengine.train", *SMALL, f"--data={digits}", "--steps=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs/digits"


RESUME = ("mfengine.train", *SMALL, "--steps=2", "--resume=auto", "--data=DATA")
INIT = ("mfengine.train", *SMALL, "--steps=1", "--name=new", "--data=DATA")
ENTRIES = {
    "generate": (("ema.", METADATA), ("mfengine.generate", "runs/digits")),
    "export": (("ema.", METADATA), ("mfengine.export", "runs/digits", "out.safetensors")),
    "evaluate": (("ema.", METADATA), ("mfengine.evaluate", "runs/digits", "--data=DATA", "--num=10")),
    "resume": (("data.", "model.", METADATA), RESUME),
    "init": (("ema.", METADATA), (*INIT, "--init=runs/digits")),
    "init from .pt": ((), (*INIT, "--init=weights.pt")),
    "init from plain pickle": ((), (*INIT, "--init=weights.pth")),
}


FEW = ("a partial", "another type")


# Every pickle through one entry, which has both unpicklers, and two pickles through each of the others.
@pytest.mark.parametrize(
    ("entry", "kinds"),
    [
        ("generate", EXECUTING | OTHERS),
        *((entry, FEW) for entry in ENTRIES if entry != "generate"),
        *(pytest.param(entry, EXECUTING | OTHERS, marks=pytest.mark.slow) for entry in ENTRIES if entry != "generate"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_malicious_pickle_is_not_executed(entry, kinds, trained, digits, tmp_path):
    places, command = ENTRIES[entry]
    command = [part.replace("DATA", str(digits)) for part in command]
    told = []
    for kind in kinds:
        pickled = (EXECUTING | OTHERS)[kind]
        for place in places or (None,):
            cwd = tmp_path / f"{kind} {place}".replace(" ", "-")
            shutil.copytree(trained, cwd / "runs/digits")
            if place is None:
                (cwd / "weights.pt").write_bytes(torch_file(pickled))
                (cwd / "weights.pth").write_bytes(pickled)
            else:
                craft(newest_checkpoint(cwd / "runs/digits"), place, pickled)
            files = sorted(cwd.rglob("*"))
            done = run_command(*command, cwd=cwd)
            told.append(f"{kind} in {place}: {done.stderr}")
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert done.stderr.startswith("error: ")
            assert sorted(cwd.rglob("*")) == files
    assert not hasattr(records.Metadata, "state")
    print(*told, sep="")


def test_pickles_execute_without_protection(tmp_path, monkeypatch):
    for kind, pickled in EXECUTING.items():
        (tmp_path / kind).mkdir()
        monkeypatch.chdir(tmp_path / kind)
        pickle.loads(pickled)
        assert (tmp_path / kind / MARK).exists(), kind
    pickle.loads(OTHERS["a change of a class"])
    assert records.Metadata.state == 1
    del records.Metadata.state
