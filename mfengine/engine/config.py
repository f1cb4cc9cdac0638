"""Configuration of a training run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mfengine.configs import check_at_least, check_seed
from mfengine.data.normalisation import Published
from mfengine.engine.trackers import TrackerName
from mfengine.errors import InputError
from mfengine.methods import OBJECTIVES, ObjectiveConfig
from mfengine.networks import NETWORKS, NetworkConfig
from mfengine.ops.backend import Backend
from mfengine.ops.choice import Attention
from mfengine.optim import Backend as OptimBackend
from mfengine.optim import check_settings

OTHERS = (".pt", ".pth")  # how files with weights of other projects are named
Schedule = Literal["constant", "cosine", "inverse-sqrt"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the moving averages of the weights."""

    lr: float = 1e-4
    """learning rate, the highest of the schedule"""
    schedule: Schedule = "constant"
    """of the learning rate after warm-up and hold: constant, cosine to 0 at the end of the run, or the inverse square
    root of the step"""
    warmup_epochs: float = 0
    """passes over the data in which the learning rate rises linearly from 0"""
    hold_epochs: float = 0
    """passes over the data, the warm-up among them, before the learning rate falls"""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates"""
    eps: float = 1e-8
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    clip_norm: float | None = None
    """clip the gradient's global norm to this; None does not clip"""
    ema_decays: tuple[float, ...] = (0.9999,)
    """one moving average of the weights per decay; the first one is sampled from. A number above 1 is a half-life in
    samples, 500e3 say, from which the decay follows"""
    ema_rampup_ratio: float = 0.05
    """half-lives are at most this share of the samples seen so far; 0 does not shorten them"""
    backend: OptimBackend = "auto"
    """what computes a step: mfengine's CUDA library in one pass, PyTorch, or apex; auto takes the first it can"""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, not {self.lr}")
        for name in ("warmup_epochs", "hold_epochs", "ema_rampup_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, nor infinite, not {getattr(self, name)}")
        if not self.ema_decays:
            raise ValueError("ema_decays must be one or more numbers")
        if not all(0 <= entry < 1 or 1 < entry < math.inf for entry in self.ema_decays):
            raise ValueError(f"ema_decays must be decays below 1, or half-lives in samples, not {self.ema_decays}")
        decays = dict.fromkeys(self.ema_decays, 0.0)
        if len(decays) < len(self.ema_decays):
            raise ValueError(f"ema_decays must be different numbers, not {self.ema_decays}")
        check_settings(self.lr, self.betas, self.eps, self.weight_decay, decays, self.clip_norm)

    def rate(self, step: int, steps_per_epoch: float, total_steps: int) -> float:
        """Learning rate of the optimizer step after `step` others of `total_steps`."""
        warmup = self.warmup_epochs * steps_per_epoch
        hold = max(warmup, self.hold_epochs * steps_per_epoch)
        factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if self.schedule == "cosine" and step > hold:
            factor = 0.5 + 0.5 * math.cos(math.pi * (step - hold) / (total_steps - hold))
        elif self.schedule == "inverse-sqrt":
            factor *= math.sqrt(max(hold, 1) / max(hold, step + 1))
        return self.lr * factor

    def decays(self, step: int, batch_size: int) -> dict[float, float]:
        """Of each average in the step after `step` others, by its entry in `ema_decays` (EDM, arXiv 2206.00364)."""
        seen = step * batch_size
        decays = {}
        for entry in self.ema_decays:
            if entry > 1:
                halflife = min(entry, seen * self.ema_rampup_ratio) if self.ema_rampup_ratio else entry
                decays[entry] = 0.5 ** (batch_size / halflife) if halflife else 0.0
            else:
                decays[entry] = entry
        return decays


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run. The types of `model` and `method` say which network and objective."""

    model: NetworkConfig
    method: ObjectiveConfig
    optim: OptimConfig = field(default_factory=OptimConfig)

    data: Path = Path("data/latents")
    """folder with dataset.json, as written by mfengine.prepare"""
    normalisation: Published | None = None
    """of the latents that this configuration was published with; a warning tells where the data has another"""
    name: str = "run"
    """the run's folder is RUNS/NAME"""
    runs: Path = Path("runs")
    """where run folders are kept"""

    batch_size: int = 256
    """samples per optimizer step, over all ranks"""
    accumulation: int = 1
    """split each rank's share of the batch into this many passes, to save memory"""
    epochs: float = 240
    """how long to train, in passes over the data"""
    steps: int | None = None
    """how long to train, in optimizer steps; overrides epochs"""
    seed: int = 0
    """weights, order of the data, times, noise and dropped labels derive from it"""
    init: Path | None = None
    """start from these weights: a run, a checkpoint, an export, or another project's (.pt)"""
    init_reverse_time: bool = False
    """the .pt has data at t = 1 and predicts data minus noise, as the original SiT does"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products; auto is bfloat16 on GPUs and float32 on CPUs. Weights stay float32"""
    ops: Backend = "auto"
    """fused Triton kernels, or plain PyTorch; auto takes the kernels on GPUs in bfloat16"""
    attention: Attention = "auto"
    """who computes attention that needs no tangent; auto is what --ops says and else PyTorch's SDPA"""
    compile: bool = False
    """compile the blocks with torch.compile"""
    recompute: bool = False
    """activation checkpointing: recompute each block in the backward to save memory"""
    shard: Literal["auto", "always"] = "auto"
    """shard parameters and optimizer state (FSDP2) over several ranks, or always: over a single one, too, to test it"""
    replicas: int = 1
    """HSDP: keep this many copies of the sharded model, one per node say; it divides the ranks"""
    reshard: bool = False
    """free gathered parameters after each forward: less memory, more communication"""

    log_every: int = 50
    """steps between lines in metrics.jsonl and the tracker"""
    tracker: TrackerName = "tensorboard"
    """shows figures and pictures of the run beside its own files; wandb takes the library of that name"""
    sample_every: int = 5000
    """steps between sample pictures; 0 draws none"""
    vae: str | None = None
    """decode sample pictures with this VAE: a folder or hub name that diffusers loads. Without it the first three
    channels of latents are drawn"""
    evaluate_every: int = 0
    """steps between measurements of one-step samples: their Frechet distance from the data, in latents; 0 takes none"""
    checkpoint_every: int = 5000
    """steps between checkpoints; one is always written at the end"""
    checkpoint_minutes: float = 0
    """minutes after which a checkpoint is written as well, by the clock of rank 0; 0 counts steps alone"""
    keep: int = 3
    """newest checkpoints to keep"""
    keep_every: int = 0
    """keep those of each multiple of so many steps as well"""
    keep_best: str | None = None
    """keep the checkpoint at whose step this metric of metrics.jsonl was least as well: frechet_1nfe, say"""
    max_skipped_steps: int = 0
    """steps with a loss or gradient that is not finite to skip before giving up"""
    profile: str | None = None
    """START:STOP profiles those steps, counted from 1, into the run's folder profile: a trace and a table"""
    debug_nonfinite: bool = False
    """where loss or gradient is not finite, do the step again and say where the first such value is; the host then
    waits for the device after each step"""
    resume: Literal["never", "auto"] = "never"
    """auto continues the run folder's newest whole checkpoint, if there is one"""
    skip_checksums: bool = False
    """read checkpoints without comparing the checksums of their files; their sizes are compared anyway"""

    def __post_init__(self) -> None:
        names = ("batch_size", "accumulation", "replicas", "log_every", "checkpoint_every", "keep", "steps")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f"name must be the name of a folder, not '{self.name}'")
        for name in ("sample_every", "evaluate_every", "keep_every", "max_skipped_steps", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be positive, not {self.epochs}")
        if self.init_reverse_time and (self.init is None or self.init.suffix not in OTHERS):
            raise ValueError(f"init_reverse_time needs --init with another project's weights ({' or '.join(OTHERS)})")
        check_seed(self.seed)
        if self.profile is not None and self.profiled is None:
            raise ValueError(f"profile must be START:STOP, two steps from 1 on as in 10:12, not {self.profile}")

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step that are profiled."""
        match = re.fullmatch(r"(\d+):(\d+)", self.profile or "")
        span = (int(match[1]), int(match[2])) if match else (0, 0)
        return span if 1 <= span[0] <= span[1] else None

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def total_steps(self, count: int) -> int:
        """Optimizer steps of the run, over a data set of `count` samples."""
        return self.steps or max(1, round(self.epochs * count / self.batch_size))

    def learning_rate(self, step: int, count: int) -> float:
        """That of the optimizer step after `step` others, over a data set of `count` samples."""
        return self.optim.rate(step, count / self.batch_size, self.total_steps(count))

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        if self.precision == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.precision)

    def description(self) -> dict[str, Any]:
        """What every checkpoint says of it: network and objective, by name and with their settings."""
        return {**NETWORKS.describe(self.model, "model"), **OBJECTIVES.describe(self.method, "method")}

    def local_batch(self, world_size: int) -> int:
        """Rows of one forward pass on one rank; InputError if the batch cannot be divided so."""
        parts = world_size * self.accumulation
        if self.batch_size % parts:
            raise InputError(
                f"--batch-size {self.batch_size} is not a multiple of ranks x --accumulation = "
                f"{world_size} x {self.accumulation}"
            )
        local = self.batch_size // parts
        try:
            self.method.check_batch(local)
        except ValueError as error:
            raise InputError(f"{error}; change --batch-size, --accumulation or an option --method.*") from None
        return local
