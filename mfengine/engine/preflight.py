"""Checks before a run starts, and the dry run, which makes only these checks and prints the plan."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfengine.configs import flatten, from_json, read_json, to_json
from mfengine.data.format import Dataset
from mfengine.data.loader import Loader
from mfengine.data.normalisation import describe
from mfengine.engine.checkpoint import checkpoints_of, first_whole, read_description
from mfengine.engine.config import TrainConfig
from mfengine.engine.flops import meta_network
from mfengine.engine.lock import LOCK
from mfengine.engine.optim import adamw_ema
from mfengine.engine.plan import make_plan
from mfengine.engine.telemetry import METRICS, kept_metrics
from mfengine.engine.trackers import check_tracker
from mfengine.engine.weights import load_initial_weights
from mfengine.errors import InputError
from mfengine.evaluation.frechet import check_dimensions
from mfengine.files import write_atomic, writing
from mfengine.kernels.multi_tensor import LIBRARY
from mfengine.methods import OBJECTIVES
from mfengine.networks import NETWORKS
from mfengine.ops.choice import why_not
from mfengine.ranks import World
from mfengine.torch_private import FakeTensorMode

CONFIG = "config.json"
FIXED = (  # what a run learns, and from what; a continued run may change how this is computed, logged and stored
    *("network", "model.", "objective", "method.", "optim.ema_decays", "batch_size", "seed"),
    *("space.shape", "space.num_classes", "space.scale", "space.bias", "dataset."),
)


def check_run(config: TrainConfig, dataset: Dataset, world: World) -> None:
    """Reject a run that does not fit its data or cannot run on the devices. Nothing is written.

    Args:
        config: the run.
        dataset: the data to learn from.
        world: the ranks that will train. Without a GPU, only packages and libraries are checked.

    Raises:
        InputError: model and data do not fit; kernels, attention or optimizer are unavailable; the latents have too
            many dimensions for the requested evaluation.
    """
    check_tracker(config.tracker)
    dataset.check_model(config.model.latent_shape, config.model.num_classes)
    head = config.model.head_dim
    for option, name in (("ops", config.ops), ("attention", config.attention)):
        if name == "auto" or head is None:
            continue
        if why := why_not(name, world.device, config.compute_dtype(world.device), head):
            raise InputError(f"--{option} {name} is unavailable: {why}")
    optim = config.optim
    if optim.backend == "cuda" and absent(world.device) and LIBRARY.is_file():
        optim = replace(optim, backend="auto")  # without a GPU, the library reports nothing else
    with FakeTensorMode():
        adamw_ema(nn.ParameterList([torch.empty(1, device=world.device.type)]), optim)
    if config.evaluate_every:
        check_dimensions(dataset.space)


def other_normalisation(config: TrainConfig, dataset: Dataset) -> list[str]:
    """A warning if the latents are not normalised as in the publication of this configuration."""
    wanted, found = config.normalisation, describe(dataset.space)
    if wanted in (None, found):
        return []
    return [
        f"warning: this configuration was published with latents normalised by {wanted}; {config.data} has {found}. "
        f"Change that with `python -m mfengine.prepare normalise {config.data} --to {wanted}`, or accept it with "
        "--normalisation None"
    ]


def absent(device: torch.device) -> bool:
    """Whether the device is a GPU that is not present: a plan for another machine."""
    return device.type == "cuda" and not torch.cuda.is_available()


# ----------------------------------------------------------------------------
# The run folder.


def check_run_folder(config: TrainConfig, dataset: Dataset) -> list[Path]:
    """Checkpoints that a run in this folder may continue from, newest first; empty if it must start anew.

    Raises:
        InputError: the folder holds something else, a run that must not be continued, or a run with another
            architecture.
    """
    folder, path = config.folder, config.folder / CONFIG
    if not folder.exists() or (folder.is_dir() and all(_leftover(p) for p in folder.iterdir())):
        return []
    if not path.is_file():
        raise InputError(f"{folder} is not a run folder: choose another --name")
    checkpoints = checkpoints_of(folder)
    if not checkpoints and not _size(folder / METRICS):
        return []  # a run that ended before it did anything: the next one may have other settings
    if config.resume == "never":
        raise InputError(f"{folder} holds a run: continue it with --resume auto, or choose another --name")
    before = {**NETWORKS.unnamed, **OBJECTIVES.unnamed, **flatten(read_json(path))}
    for name, value in flatten(_config_values(config, dataset)).items():
        if before.get(name) != value and name.startswith(FIXED):
            raise InputError(
                f"{folder} has a run with {name} {before.get(name)}, not {value}, which must not change: "
                "start another run from its weights with --init"
            )
    kept_metrics(folder / METRICS)  # rejects a damaged file
    return checkpoints


def _leftover(path: Path) -> bool:
    """Whether a run that was killed at its start may have left this."""
    return path.name == LOCK or path.name.startswith(".partial-")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def write_config(config: TrainConfig, dataset: Dataset) -> None:
    """Write the resolved configuration into the run's folder."""
    path = config.folder / CONFIG
    with writing(path):
        config.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(_config_values(config, dataset), indent=1) + "\n")


def read_config(path: Path) -> TrainConfig:
    """The configuration written by `write_config`; InputError if it cannot be read."""
    values = read_json(path)
    model, method = NETWORKS.read(values, "model", path), OBJECTIVES.read(values, "method", path)
    described = {"network", "objective", "space", "dataset"}  # keys besides the configuration
    values = {name: value for name, value in values.items() if name not in described}
    return from_json(TrainConfig, {**values, "model": model, "method": method}, path)


def _config_values(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """The configuration, and the data that it was trained on."""
    description = {"name": dataset.name, "count": dataset.count, "flips": dataset.flips}
    return {**config.description(), **to_json(config), "space": to_json(dataset.space), "dataset": description}


# ----------------------------------------------------------------------------
# The dry run.


def dry_run(config: TrainConfig, here: World, ranks: int) -> None:
    """Print the plan of a run, and reject what training would reject. Nothing is written.

    The plan is for GPUs unless the configuration says `--device cpu`, even on a machine without one.

    Args:
        config: the run.
        here: the ranks of this command.
        ranks: how many ranks will train.

    Raises:
        InputError: the configuration, the data or the run folder is not usable. The plan, if there is one, is printed
            first.
    """
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    plan = make_plan(config, World(0, ranks, device, here.one_rank_mesh))
    dataset: Dataset | None = None
    refused: InputError | None = None
    try:
        dataset = here.on_main(lambda: Dataset.open(config.data))
    except InputError as error:
        refused = error
    if here.main:
        unlike = other_normalisation(config, dataset) if dataset is not None else ()
        print(*plan.lines(dataset), *plan.warnings(here.device), *unlike, sep="\n", flush=True)
    if refused is not None:
        raise refused
    assert dataset is not None
    check_run(config, dataset, plan.world)
    checkpoints = here.on_main(lambda: check_run_folder(config, dataset))
    step = 0
    problems: list[str] = []
    if checkpoints:
        step, problems = here.on_main(lambda: first_whole(checkpoints, lambda path: read_description(path)["step"]))
    elif config.init is not None:
        model = meta_network(config.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # only shapes count
            load_initial_weights(model, config.init, config.init_reverse_time, config.skip_checksums)
    part, parts = here.rank * config.accumulation, ranks * config.accumulation
    next(Loader(dataset, config.local_batch(ranks), part, parts, config.seed, torch.device("cpu")))
    if here.main:
        if absent(device):
            print("there is no GPU here: kernels, attention and optimizer were not tried on one")
        for problem in problems:
            print(f"warning: {problem}")
        print(f"ready to {f'continue at step {step:,}' if checkpoints else 'start'}; nothing was written")
