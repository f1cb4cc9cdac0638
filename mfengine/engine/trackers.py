"""Trackers show a run outside its folder: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from mfengine.errors import InputError

TrackerName = Literal["tensorboard", "wandb", "none"]


class Tracker(Protocol):
    """Shows a run. The constructor and every method may raise an OSError.

    Args:
        folder: the run's folder.
        step: the step at which the run starts; reports of later steps become void.
        facts: facts about the run, as JSON values.
    """

    def __init__(self, folder: Path, step: int, facts: Mapping[str, Any]) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show metrics of a step."""

    def picture(self, step: int, image: Tensor, caption: str) -> None:
        """Show samples, an image (3, H, W) in [0, 1]."""

    def close(self) -> None:
        """Write what is pending."""


class TensorBoard:
    def __init__(self, folder: Path, step: int, facts: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: reading a configuration does not need it

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        for name, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value, indent=1)
            self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, image: Tensor, caption: str) -> None:
        self._writer.add_image(f"samples/{caption}", image, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, folder: Path, step: int, facts: Mapping[str, Any]) -> None:
        import wandb

        # One run per folder: a continued run keeps its id.
        name = str(folder.resolve()).replace("/", "-").strip("-")
        self._images = wandb.Image
        self._run = wandb.init(project="mfengine", id=name[-64:], name=folder.name, dir=folder, config=dict(facts),
                               resume="allow")  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, image: Tensor, caption: str) -> None:
        self._run.log({"samples": self._images(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_tracker(name: TrackerName) -> None:
    """InputError if the tracker's library is not installed."""
    if name == "wandb" and find_spec("wandb") is None:
        raise InputError("--tracker wandb needs the wandb library: pip install wandb")
