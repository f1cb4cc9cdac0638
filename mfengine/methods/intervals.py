"""What the objectives of the MeanFlow family share: times r <= t, the order of rows, and the adaptive weight."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from mfengine.device import to_device
from mfengine.methods.base import Health, ObjectiveConfig


@dataclass(frozen=True)
class IntervalConfig(ObjectiveConfig):
    """Settings that the objectives share, in the symbols of arXiv 2505.13447."""

    interval_share: float = 0.25
    """fraction of the rows of each local batch with r < t; 0 is plain flow matching"""
    label_dropout: float = 0.1
    """probability that a label becomes the null class"""
    logit_mean: float = -0.4
    """mean of the normal distribution whose sigmoid gives the times"""
    logit_std: float = 1.0
    """standard deviation of the normal distribution whose sigmoid gives the times"""
    norm_p: float = 1.0
    """exponent of the adaptive weight 1 / (error + norm_eps)^norm_p"""
    norm_eps: float = 0.01
    """offset in the adaptive weight 1 / (error + norm_eps)^norm_p"""

    def __post_init__(self) -> None:
        check_shares(interval_share=self.interval_share, label_dropout=self.label_dropout)
        if not self.norm_p >= 0:
            raise ValueError(f"norm_p must be at least 0, not {self.norm_p}")
        for name in ("logit_std", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def check_batch(self, rows: int) -> None:
        self.num_interval(rows)

    def num_interval(self, batch: int) -> int:
        """Interval rows of a local batch; ValueError if the share does not divide it."""
        rows = batch * self.interval_share
        if abs(rows - round(rows)) > 1e-6:
            multiple = Fraction(self.interval_share).limit_denominator(1000).denominator
            raise ValueError(
                f"an interval share of {self.interval_share} does not divide a local batch of {batch}, which must be a "
                f"multiple of {multiple}"
            )
        return round(rows)

    def draw_rows(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Draw times and label dropout.

        Returns:
            Times t and r (B,), float32 on the host, with r < t only in the trailing rows; and the number of leading
            rows whose label becomes the null class.
        """
        num_instant = batch - self.num_interval(batch)
        times = torch.sigmoid(torch.randn(2, batch, generator=generator) * self.logit_std + self.logit_mean)
        t, r = times.amax(0), times.amin(0)
        r[:num_instant] = t[:num_instant]
        return t, r, int((torch.rand(batch, generator=generator) < self.label_dropout).sum())

    def weighted(self, error: Tensor) -> Tensor:
        """Squared errors (B,) divided by a power of themselves, which has no gradient."""
        return error / (error.detach() + self.norm_eps) ** self.norm_p


def by_kind(health: Health, rows: dict[str, Tensor], du_dt: Tensor, kinds: dict[str, Tensor]) -> Health:
    """Extend `health` by row metrics averaged over each kind of row, the shares of the kinds, and the norm of du/dt.

    Args:
        health: of the batch.
        rows: metrics (B,) by name. The mean of `error` over `instant` rows is named `error_instant`.
        du_dt: (K, C, H, W) of the interval rows.
        kinds: masks (B,) on the host, by name.
    """
    masks = torch.stack([*kinds.values()]).float()  # (k, B)
    counts, batch = masks.sum(1).tolist(), masks.shape[1]
    columns = torch.stack([*rows.values(), torch.ones_like(next(iter(rows.values())))], 1)  # (B, m + 1)
    sums = (to_device(masks, columns.device) @ columns).T.flatten()
    norm = torch.linalg.vector_norm(du_dt, dim=(1, 2, 3)).sum()
    weights = {f"{name}_{kind}": count for name in rows for kind, count in zip(kinds, counts, strict=True)}
    weights |= {f"share_{kind}": float(batch) for kind in kinds} | {"du_dt_norm": float(len(du_dt))}
    return Health(torch.cat([health.sums, sums, norm[None]]), health.weights | weights)


def row_kinds(t: Tensor, num_interval: int, num_dropped: int, guided: Tensor) -> dict[str, Tensor]:
    """Masks (B,) of the kinds of rows that a run logs separately; t_low, t_middle and t_high are thirds of [0, 1].

    Args:
        t: (B,) on the host.
        num_interval, num_dropped: the number of trailing interval rows and of leading rows with dropped labels.
        guided: (B,) bool on the host.
    """
    place = torch.arange(len(t))
    interval, third = place >= len(t) - num_interval, (3 * t).long()
    kinds = {"instant": ~interval, "interval": interval, "dropped": place < num_dropped, "guided": guided}
    return kinds | {"t_low": third == 0, "t_middle": third == 1, "t_high": third >= 2}


def check_rows(latents: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> None:
    """ValueError unless labels (B,), and t (B,) and noise of the draws, are those of latents (B, C, H, W)."""
    batch, shape = tuple(latents.shape[:1]), tuple(latents.shape)
    for name, x, due in (("labels", labels, batch), ("draws.t", t, batch), ("draws.noise", noise, shape)):
        if tuple(x.shape) != due:
            raise ValueError(f"{name} must be of shape {due} for latents of shape {shape}, not {tuple(x.shape)}")


def check_shares(**shares: float) -> None:
    """ValueError that names the first value that is not between 0 and 1."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {share}")


def column(t: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return t[:, None, None, None]
