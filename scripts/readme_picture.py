"""Draw docs/digits.png, README's picture: one step of MeanFlow beside one step of plain flow matching.

Trains both from the preset `digits` unless runs/digits and runs/digits-flow exist, two to four minutes each on two CPU
cores. Flow matching is MeanFlow without interval rows: the same network, data, steps and noise.
"""

import subprocess
import sys
from pathlib import Path

import mfengine
from mfengine.data.format import Dataset
from mfengine.data.pictures import labelled_grid, write_picture
from mfengine.generate import real_latents

DATA, DIGITS, ROWS = Path("data/digits"), range(10), 2


def run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True)


def main() -> None:
    if not DATA.exists():
        run("mfengine.prepare", "digits", str(DATA))
    run("mfengine.train", "digits", "--resume", "auto")
    run("mfengine.train", "digits", "--name", "digits-flow", "--method.interval-share", "0", "--resume", "auto")
    meanflow, flow = mfengine.load("runs/digits"), mfengine.load("runs/digits-flow")
    labels = list(DIGITS) * ROWS
    blocks = {"real": meanflow.images(real_latents(Dataset.open(DATA), DIGITS, ROWS))}
    blocks |= {
        name: each.images(each.sample(labels)) for name, each in (("MeanFlow", meanflow), ("flow matching", flow))
    }
    write_picture(labelled_grid(blocks, [str(digit) for digit in DIGITS]), Path("docs/digits.png"))


if __name__ == "__main__":
    main()
