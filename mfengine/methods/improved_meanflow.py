"""The objective of improved MeanFlow (Geng et al., arXiv 2512.02012).

The network predicts two velocities, u and v, and takes its guidance as an input: a weight omega and the times
[t_min, t_max] where it applies. The compound velocity V = u + (t - r) sg(du/dt) is regressed onto the guided velocity
v_g, and so is v, which gives the tangent of z in du/dt and the terms of the guidance.

Rows are ordered so that each kind of work is done for the rows that need it and no others:

    | dropped labels ... | instant rows, r = t ... | interval rows, r < t |

The conditional velocity v_c of an instant row is the v of the main pass. So the pass for the guidance, through trunk
and v-head alone, has interval rows for v_c, and for the unconditional velocity v_u those that are guided. The tangent
goes through trunk and u-head alone, for interval rows. All of this is decided on the host from `ImprovedDraws`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfengine.device import device_generator, to_device
from mfengine.errors import InputError
from mfengine.methods.base import Health, Metrics, Objective, Sampler
from mfengine.methods.intervals import IntervalConfig, by_kind, check_rows, check_shares, column, row_kinds
from mfengine.methods.sampling import sample
from mfengine.networks.velocity import null_class
from mfengine.ops import fixed_weights


@dataclass(frozen=True)
class ImprovedMeanFlowConfig(IntervalConfig):
    """The objective's settings, in the paper's symbols."""

    interval_share: float = 0.5
    """fraction of the rows of each local batch with r < t"""
    omega_beta: float = 1.0
    """exponent of the density of guidance weights in training, which is proportional to omega^-omega_beta"""
    omega_max: float = 8.0
    """largest guidance weight in training; the smallest is 1"""
    omega: float = 8.0
    """default guidance weight for sampling"""
    t_min: float = 0.4
    """default start of the interval [t_min, t_max] of times with guidance in sampling"""
    t_max: float = 0.65
    """default end of the interval [t_min, t_max] of times with guidance in sampling"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.omega_max < math.inf:
            raise ValueError(f"omega_max must be above 1 and finite, not {self.omega_max}")
        check_conditions(self.omega, self.t_min, self.t_max)

    def draw_omega(self, uniform: Tensor) -> Tensor:
        """Guidance weights from uniform numbers in [0, 1), by the inverse of their distribution function."""
        log = math.log(self.omega_max)
        power = 1 - self.omega_beta
        if power == 0:
            return torch.exp(uniform * log)
        return torch.exp(torch.log1p(uniform * math.expm1(power * log)) / power)


def check_conditions(omega: float, t_min: float, t_max: float) -> None:
    """ValueError unless these conditions are valid for sampling."""
    if not omega >= 1:
        raise ValueError(f"omega must be at least 1, not {omega}")
    check_shares(t_min=t_min, t_max=t_max)
    if t_min > t_max:
        raise ValueError(f"t_min must be at most t_max {t_max}, not {t_min}: no time would be guided")


class ImprovedDraws(NamedTuple):
    """Everything random in one step of B rows."""

    t: Tensor  # (B,) float32 on the host: the larger time
    r: Tensor  # (B,) float32 on the host: the smaller; equals t but for the trailing interval rows
    noise: Tensor  # (B, C, H, W) float32, on the device of the latents
    num_dropped: int  # leading rows whose label becomes the null class
    omega: Tensor  # (B,) float32 on the host: the guidance weight
    t_min: Tensor  # (B,) float32 on the host: the earliest guided time; 0 in instant rows
    t_max: Tensor  # (B,) float32 on the host: the latest guided time; 1 in instant rows


def guidance_now(draws: ImprovedDraws) -> Tensor:
    """omega' of the paper (B,): the guidance weight of rows whose t is in the interval, else 1."""
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    return torch.where(inside, draws.omega, 1)


class ImprovedMeanFlow(Objective):
    """Draws and loss of improved MeanFlow training.

    Args:
        config: the settings.
    """

    Config = ImprovedMeanFlowConfig
    scalars = ("loss_u", "loss_v")
    config: ImprovedMeanFlowConfig

    @property
    def conditions(self) -> dict[str, float]:
        return {"omega": self.config.omega, "t_min": self.config.t_min, "t_max": self.config.t_max}

    def draw(
        self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> ImprovedDraws:
        """Draw times, noise, label dropout and guidance for one local batch.

        Args:
            shape: (B, C, H, W) of the latents.
            generator: a host generator; the noise on `device` is seeded from it.
            device: where the noise is made.

        Raises:
            ValueError: the interval share does not divide B.
        """
        cfg, batch = self.config, shape[0]
        t, r, num_dropped = cfg.draw_rows(batch, generator)
        omega, start, end = torch.rand(3, batch, generator=generator)
        t_min, t_max = 0.5 * start, 0.5 + 0.5 * end
        num_instant = batch - cfg.num_interval(batch)
        t_min[:num_instant], t_max[:num_instant] = 0, 1
        noise = torch.randn(shape, generator=device_generator(generator, device), device=device)
        return ImprovedDraws(t, r, noise, num_dropped, cfg.draw_omega(omega), t_min, t_max)

    @fixed_weights()
    def loss(self, model: Any, latents: Tensor, labels: Tensor, draws: ImprovedDraws) -> tuple[Tensor, Metrics]:
        """The training loss of one local batch.

        Args:
            model: an `IMFDiT`, or a network with the same interface; its attribute `num_classes` is the null class. It
                is called twice for any draws, so ranks that share the parameters stay in step.
            latents: (B, C, H, W) float32, clean.
            labels: (B,) int64.
            draws: of `draw`.

        Returns:
            The loss, a scalar with a graph, and detached metrics: `loss` (), and the mean squared errors `loss_u` of V
            and `loss_v` of v (); and as tensors the squared errors `error_u`, `error_v` (B,), the velocities `v_g`,
            `u`, `v` (B, C, H, W), and `v_c`, `du_dt` (K, C, H, W) of the K interval rows.

        Raises:
            ValueError: the interval share does not divide B, labels or draws are of another batch, or the model has no
                `num_classes`.
        """
        check_rows(latents, labels, draws.t, draws.noise)
        cfg, device = self.config, latents.device
        batch, num_interval = latents.shape[0], cfg.num_interval(latents.shape[0])
        num_instant = batch - num_interval

        t, h, omega, t_min, t_max = (
            to_device(x, device) for x in (draws.t, draws.t - draws.r, draws.omega, draws.t_min, draws.t_max)
        )
        x, e = latents, draws.noise
        z = (1 - column(t)) * x + column(t) * e
        v_t = e - x
        null = null_class(model)

        # Velocities for the guidance, at h = 0 and for all times: v_u of guided rows, v_c of interval rows.
        omega_now = guidance_now(draws)
        guided = (omega_now[draws.num_dropped :] != 1).nonzero()[:, 0] + draws.num_dropped
        interval = torch.arange(num_instant, batch)
        rows = torch.cat([guided, interval])
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64)  # the network is always called
        at = to_device(rows, device)
        y = labels[at]
        y[: len(guided)] = null
        weight = omega_now[rows]
        weight[: len(guided)] = 1
        with torch.no_grad():
            zero = torch.zeros_like(at, dtype=z.dtype)
            v_guide = model(z[at], zero, y, omega=to_device(weight, device), t_min=zero, t_max=zero + 1, heads="v")
        v_u, v_c = v_guide[: len(guided)], v_guide[len(guided) : len(guided) + num_interval]

        # Both velocities of all rows and, for interval rows, the JVP of u along (v_c, 1, 0) in (z, t, r).
        y = labels.clone()
        y[: draws.num_dropped] = null
        condition = {"omega": omega, "t_min": t_min, "t_max": t_max}
        if num_interval:
            one = torch.ones(num_interval, device=device)
            u, v, du_dt = model(z, h, y, **condition, tangents=(v_c, one))
        else:
            u, v = model(z, h, y, **condition)
            du_dt = u.detach()[:0]

        # Guided velocity: v_g = v_t + (1 - 1 / omega') (v_c - v_u).
        with torch.no_grad():
            at, weight = to_device(guided, device), to_device(1 - 1 / omega_now[guided], device)
            v_g = v_t.clone()
            v_g[at] += column(weight) * (torch.cat([v[:num_instant], v_c])[at] - v_u)
            correction = torch.cat([torch.zeros_like(u[:num_instant]), column(h[num_instant:]) * du_dt])

        error_u = (u + correction - v_g).square().flatten(1).sum(1)  # (B,), of the compound velocity V
        error_v = (v - v_g).square().flatten(1).sum(1)
        loss = (cfg.weighted(error_u) + cfg.weighted(error_v)).mean()
        scalars = {"loss": loss, "loss_u": error_u.mean() / x[0].numel(), "loss_v": error_v.mean() / x[0].numel()}
        tensors = {"error_u": error_u, "error_v": error_v, "v_g": v_g, "v_c": v_c, "u": u, "v": v, "du_dt": du_dt}
        return loss, Metrics(scalars, tensors)

    def health(self, loss: Tensor, metrics: Mapping[str, Tensor], draws: ImprovedDraws) -> Health:
        rows = {name: metrics[name] for name in ("error_u", "error_v")}
        guided = guidance_now(draws) != 1
        guided[: draws.num_dropped] = False
        kinds = row_kinds(draws.t, self.config.num_interval(len(draws.t)), draws.num_dropped, guided)
        return by_kind(super().health(loss, metrics, draws), rows, metrics["du_dt"], kinds)

    def sample(
        self,
        model: Any,
        noise: Tensor,
        labels: Tensor,
        steps: int = 1,
        *,
        omega: float = 8.0,
        t_min: float = 0.4,
        t_max: float = 0.65,
    ) -> Tensor:
        return sample(model, noise, labels, steps, omega=omega, t_min=t_min, t_max=t_max)

    def sampler(self, conditions: Mapping[str, float]) -> Sampler:
        sampler = super().sampler(conditions)
        try:
            check_conditions(**{**self.conditions, **conditions})
        except ValueError as error:
            raise InputError(f"conditions: {error}") from None
        return sampler
