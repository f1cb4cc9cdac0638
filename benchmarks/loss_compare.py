"""Do two settings, or two commits, train alike? Compares the losses of 100 steps and the final weights.

    python -m benchmarks.loss_compare                                        # with the accepted losses of this device
    python -m benchmarks.loss_compare --accept                               # accept the losses
    python -m benchmarks.loss_compare --baseline="" --test="--recompute"
    python -m benchmarks.loss_compare --baseline main --test "HEAD --recompute"

A side is a list of options of `mfengine.train`, after a commit unless it is this working tree. Both sides train the
digits from the same seed, on one CPU thread or on the GPU, in separate processes. The exit code is 1 if they differ by
more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import ROOT, environment, short_name

RUN = (
    *("digits", "--batch-size=64", "--log-every=1", "--sample-every=0", "--evaluate-every=0", "--name=run"),
    *("--data=data", "--optim.ema-decays", "0"),  # with decay 0, the average equals the weights
)
COMPARED = ("loss", "v_loss", "loss_u", "loss_v")
FILE = "losses.json"


class Side(NamedTuple):
    """The results of one run."""

    losses: dict[str, list[float]]  # name -> value at every step
    weights: dict[str, Tensor]


def train(side: str, steps: int, data: Path) -> Side:
    """Train in a separate process.

    Args:
        side: `[COMMIT] OPTIONS`.
        steps: number of steps.
        data: folder of the digits.

    Raises:
        RuntimeError: git or the training failed; the message says how.
    """
    words = shlex.split(side)
    commit = words.pop(0) if words and not words[0].startswith("-") else None
    with tempfile.TemporaryDirectory() as folder, _tree(commit, Path(folder)) as tree:
        (Path(folder) / "data").symlink_to(data)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
        env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for deterministic sums
        command = [sys.executable, "-m", "mfengine.train", *RUN, f"--steps={steps}", *words]
        _run(command, cwd=folder, env=env)
        run = Path(folder) / "runs/run"
        export = [sys.executable, "-m", "mfengine.export", str(run), "weights.safetensors"]
        _run(export, cwd=folder, env=env)
        from safetensors.torch import load_file

        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {name: [line[name] for line in lines] for name in COMPARED if name in lines[0]}
        return Side(losses, load_file(Path(folder) / "weights.safetensors"))


@contextmanager
def _tree(commit: str | None, folder: Path) -> Iterator[Path]:
    """The files of a commit, in a temporary worktree; for None, this working tree."""
    if commit is None:
        yield ROOT
        return
    tree, git = folder / "tree", ["git", "-C", str(ROOT), "worktree"]
    _run([*git, "add", "--detach", str(tree), commit])
    try:
        yield tree
    finally:
        _run([*git, "remove", "--force", str(tree)])


def _run(command: list[str], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def furthest(a: list[float], b: list[float]) -> tuple[float, int]:
    """The largest relative difference of two curves, and its step, counted from 1. NaN counts as largest."""
    differences = [abs(x - y) / max(abs(x), 1e-30) for x, y in zip(a, b, strict=True)]
    i = int(np.argmax(differences))
    return differences[i], i + 1


def compare(baseline: Side, test: Side) -> dict[str, float]:
    """Relative differences: the largest of each loss, and the norm of that of all weights."""
    found = {}
    for name in baseline.losses.keys() & test.losses.keys():
        difference, step = furthest(baseline.losses[name], test.losses[name])
        found[f"{name}, largest at step {step}"] = difference
    if baseline.weights and test.weights:
        a, b = (
            torch.cat([side.weights[name].flatten().double() for name in baseline.weights]) for side in (baseline, test)
        )
        found["weights"] = float((a - b).norm() / a.norm())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", metavar="SIDE", help="default: the accepted losses of this device")
    parser.add_argument("--test", metavar="SIDE", default="", help="default: this working tree without further options")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tolerance", type=float, help="relative difference; default 0, or 1e-3 for accepted losses")
    parser.add_argument("--accept", action="store_true", help="accept the losses of the tested side")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accepted = ROOT / "benchmarks/results" / short_name(device) / FILE
    if args.baseline is None and not args.accept and not accepted.exists():
        parser.error(f"there are no accepted losses for {short_name(device)}: add --baseline or --accept")
    with tempfile.TemporaryDirectory() as folder:
        try:
            data = Path(folder) / "data"
            _run([sys.executable, "-m", "mfengine.prepare", "digits", str(data)])
            test = train(args.test, args.steps, data)
            if args.accept:
                accepted.parent.mkdir(parents=True, exist_ok=True)
                content = {"environment": environment(device), "side": args.test, "losses": test.losses}
                accepted.write_text(json.dumps(content, indent=1) + "\n")
                print(accepted.relative_to(ROOT))
                return 0
            if args.baseline is None:
                known = json.loads(accepted.read_text())["losses"]
                baseline = Side({name: values[: args.steps] for name, values in known.items()}, {})
            else:
                baseline = train(args.baseline, args.steps, data)
            found = compare(baseline, test)
        except (RuntimeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    tolerance = args.tolerance if args.tolerance is not None else 1e-3 if args.baseline is None else 0.0
    for what, difference in found.items():
        print(f"{what}: {difference:.2e} relative{'' if difference <= tolerance else f', above {tolerance:g}'}")
    return int(not all(difference <= tolerance for difference in found.values()))


if __name__ == "__main__":
    sys.exit(main())
