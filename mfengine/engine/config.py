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

OTHERS = (".pt", ".pth")  # suffixes of files with weights of other projects
Schedule = Literal["constant", "cosine", "inverse-sqrt"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the moving averages of the weights."""

    lr: float = 1e-4
    """learning rate at the peak of the schedule"""
    schedule: Schedule = "constant"
    """learning rate after warm-up and hold: constant, cosine decay to 0 at the end of the run, or proportional to the
    inverse square root of the step"""
    warmup_epochs: float = 0
    """epochs over which the learning rate rises linearly from 0"""
    hold_epochs: float = 0
    """epochs, including the warm-up, before the learning rate starts to decay"""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates"""
    eps: float = 1e-8
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    clip_norm: float | None = None
    """clip the gradient's global norm to this value; None disables clipping"""
    ema_decays: tuple[float, ...] = (0.9999,)
    """decay of each moving average of the weights; samples are drawn with the first average. A number above 1 is a
    half-life in samples, such as 500e3"""
    ema_rampup_ratio: float = 0.05
    """limit half-lives to this fraction of the samples seen so far; 0 sets no limit"""
    backend: OptimBackend = "auto"
    """implementation of the optimizer step: mfengine's CUDA library in one pass, PyTorch, or apex; auto takes the first
    that is available"""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, not {self.lr}")
        for name in ("warmup_epochs", "hold_epochs", "ema_rampup_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if not self.ema_decays:
            raise ValueError("ema_decays must be one or more numbers")
        if not all(0 <= entry < 1 or 1 < entry < math.inf for entry in self.ema_decays):
            raise ValueError(f"ema_decays must be decays in [0, 1) or half-lives above 1, not {self.ema_decays}")
        decays = dict.fromkeys(self.ema_decays, 0.0)
        if len(decays) < len(self.ema_decays):
            raise ValueError(f"ema_decays must not repeat a number, not {self.ema_decays}")
        check_settings(self.lr, self.betas, self.eps, self.weight_decay, decays, self.clip_norm)

    def rate(self, step: int, steps_per_epoch: float, total_steps: int) -> float:
        """Learning rate of the optimizer step that follows `step` steps, out of `total_steps`."""
        warmup = self.warmup_epochs * steps_per_epoch
        hold = max(warmup, self.hold_epochs * steps_per_epoch)
        factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if self.schedule == "cosine" and step > hold:
            factor = 0.5 + 0.5 * math.cos(math.pi * (step - hold) / (total_steps - hold))
        elif self.schedule == "inverse-sqrt":
            factor *= math.sqrt(max(hold, 1) / max(hold, step + 1))
        return self.lr * factor

    def decays(self, step: int, batch_size: int) -> dict[float, float]:
        """Decay of each average, by its entry in `ema_decays`, in the step that follows `step` steps.

        Half-lives and their ramp-up are those of EDM (arXiv 2206.00364).
        """
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
    """Everything that defines a training run. The types of `model` and `method` select network and objective."""

    model: NetworkConfig
    method: ObjectiveConfig
    optim: OptimConfig = field(default_factory=OptimConfig)

    data: Path = Path("data/latents")
    """folder with dataset.json, as written by mfengine.prepare"""
    normalisation: Published | None = None
    """normalisation of the latents that this configuration was published with; a warning appears if the data's differs.
    None disables the check"""
    name: str = "run"
    """name of the run; its folder is RUNS/NAME"""
    runs: Path = Path("runs")
    """folder that holds the run folders"""

    batch_size: int = 256
    """samples per optimizer step, summed over all ranks"""
    accumulation: int = 1
    """split each rank's share of the batch into this many passes, to save memory"""
    epochs: float = 240
    """length of training in passes over the data"""
    steps: int | None = None
    """length of training in optimizer steps; overrides epochs"""
    seed: int = 0
    """seed of the weights, the order of the data, times, noise and dropped labels"""
    init: Path | None = None
    """start from these weights: a run, a checkpoint, an export, or a .pt or .pth file of another project"""
    init_reverse_time: bool = False
    """the .pt file given as --init has data at t = 1 and predicts data minus noise, as the original SiT does"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to train on; auto takes a GPU if there is one"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of matrix products; auto is bfloat16 on GPUs and float32 on CPUs. Weights stay in float32"""
    ops: Backend = "auto"
    """fused Triton kernels (triton) or plain PyTorch (torch); auto takes the kernels on GPUs in bfloat16"""
    attention: Attention = "auto"
    """implementation of attention without a tangent; auto follows --ops if that is set, and is PyTorch's SDPA
    otherwise"""
    compile: bool = False
    """compile the blocks with torch.compile"""
    recompute: bool = False
    """activation checkpointing: recompute each block in the backward to save memory"""
    shard: Literal["auto", "always"] = "auto"
    """shard parameters and optimizer state over the ranks (FSDP2): auto if there are several, always also for a single
    rank, as a test"""
    replicas: int = 1
    """copies of the sharded model (HSDP), for example one per node; must divide the number of ranks"""
    reshard: bool = False
    """free gathered parameters after each forward: less memory, more communication"""

    log_every: int = 50
    """steps between lines in metrics.jsonl and the tracker"""
    tracker: TrackerName = "tensorboard"
    """where to show metrics and sample pictures in addition to the run's own files; wandb needs the package wandb"""
    sample_every: int = 5000
    """steps between sample pictures; 0 draws none"""
    vae: str | None = None
    """VAE that decodes sample pictures: a folder or hub name that diffusers loads. Without it, pictures show the first
    three channels of the latents"""
    evaluate_every: int = 0
    """steps between measurements of the Frechet distance of one-step samples to the data, in latent space; 0 disables
    them"""
    checkpoint_every: int = 5000
    """steps between checkpoints; the end of the run always writes one"""
    checkpoint_minutes: float = 0
    """also write a checkpoint after this many minutes, by the clock of rank 0; 0 disables this"""
    keep: int = 3
    """number of newest checkpoints to keep"""
    keep_every: int = 0
    """also keep the checkpoints whose step is a multiple of this number; 0 disables this"""
    keep_best: str | None = None
    """also keep the checkpoint with the lowest value of this metric of metrics.jsonl, such as frechet_1nfe"""
    max_skipped_steps: int = 0
    """how many steps with a non-finite loss or gradient to skip before the run fails"""
    profile: str | None = None
    """START:STOP profiles these steps, counted from 1; a trace and a table go to the folder profile of the run"""
    debug_nonfinite: bool = False
    """repeat a step with a non-finite loss or gradient and report where the first non-finite value appears; with this
    option, the host waits for the device after each step"""
    resume: Literal["never", "auto"] = "never"
    """auto resumes from the newest intact checkpoint of the run folder, if there is one"""
    skip_checksums: bool = False
    """do not verify the checksums of checkpoint files when reading; file sizes are still verified"""

    def __post_init__(self) -> None:
        names = ("batch_size", "accumulation", "replicas", "log_every", "checkpoint_every", "keep", "steps")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f"name must be the name of a folder, not '{self.name}'")
        for name in ("sample_every", "evaluate_every", "keep_every", "max_skipped_steps", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be positive, not {self.epochs}")
        if self.init_reverse_time and (self.init is None or self.init.suffix not in OTHERS):
            raise ValueError(f"init_reverse_time needs --init with another project's weights ({' or '.join(OTHERS)})")
        check_seed(self.seed)
        if self.profile is not None and self.profiled is None:
            raise ValueError(f"profile must be START:STOP with 1 <= START <= STOP, such as 10:12, not {self.profile}")

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
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
        """Learning rate of the optimizer step that follows `step` steps, for a data set of `count` samples."""
        return self.optim.rate(step, count / self.batch_size, self.total_steps(count))

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        if self.precision == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.precision)

    def description(self) -> dict[str, Any]:
        """What every checkpoint records: network and objective, by name and with their settings."""
        return {**NETWORKS.describe(self.model, "model"), **OBJECTIVES.describe(self.method, "method")}

    def local_batch(self, world_size: int) -> int:
        """Rows of one forward pass on one rank; InputError if the batch cannot be divided evenly."""
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
            raise InputError(f"{error}; change --batch-size, --accumulation or one of the --method options") from None
        return local
