"""The MeanFlow objective (Geng et al., arXiv 2505.13447, algorithm 1 and section 4).

The network predicts the average velocity u(z, r, t). Its target follows from the MeanFlow identity
u = v - (t - r) du/dt, with du/dt the JVP of (z, t, r) -> u along (v, 1, 0).

Rows are ordered so that each kind of work is done for the rows that need it and no others:

    | dropped labels ... | instant rows, r = t ... | interval rows, r < t |

A tangent is computed for interval rows only (for r = t it would be multiplied by zero), guidance for guided rows
only, and the conditional guidance term of an instant row is its own primal output. All of this is decided on the
host from `Draws`, before the step, so the step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mfengine.device import device_generator, to_device
from mfengine.methods.base import Health, Metrics, Objective
from mfengine.methods.intervals import IntervalConfig, by_kind, check_rows, check_shares, column, row_kinds
from mfengine.methods.sampling import sample
from mfengine.networks.velocity import AnyNetwork, null_class, velocity, velocity_and_jvp
from mfengine.ops import fixed_weights


@dataclass(frozen=True)
class MeanFlowConfig(IntervalConfig):
    """The objective's settings, in the paper's symbols."""

    omega: float = 1.0
    """guidance weight of the sample's own velocity"""
    kappa: float = 0.0
    """guidance weight of the network's conditional velocity; omega 1 with kappa 0 disables guidance"""
    t_start: float = 0.0
    """start of the interval [t_start, t_end] of times t with guidance"""
    t_end: float = 1.0
    """end of the interval [t_start, t_end] of times t with guidance"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(t_start=self.t_start, t_end=self.t_end)
        if self.t_start > self.t_end:
            raise ValueError(f"t_start must be at most t_end {self.t_end}, not {self.t_start}: no row would be guided")
        if not self.kappa >= 0:
            raise ValueError(f"kappa must be at least 0, not {self.kappa}")

    @property
    def guided(self) -> bool:
        return self.omega != 1 or self.kappa != 0

    def guided_rows(self, t: Tensor, num_dropped: int) -> Tensor:
        """Which rows of times t (B,) are guided, if there is guidance: (B,) bool."""
        rows = (t >= self.t_start) & (t <= self.t_end)
        rows[:num_dropped] = False
        return rows


class Draws(NamedTuple):
    """Everything random in one step of B rows."""

    t: Tensor  # (B,) float32 on the host: the larger time
    r: Tensor  # (B,) float32 on the host: the smaller; equals t but for the trailing interval rows
    noise: Tensor  # (B, C, H, W) float32, on the device of the latents
    num_dropped: int  # leading rows whose label becomes the null class


class MeanFlow(Objective):
    """Draws and loss of MeanFlow training.

    Args:
        config: the settings.
    """

    Config = MeanFlowConfig
    scalars = ("v_loss", "error")
    config: MeanFlowConfig

    def draw(
        self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Draws:
        """Draw times, noise and label dropout for one local batch.

        Args:
            shape: (B, C, H, W) of the latents.
            generator: a host generator; the noise on `device` is seeded from it.
            device: where the noise is made.

        Raises:
            ValueError: the interval share does not divide B.
        """
        t, r, num_dropped = self.config.draw_rows(shape[0], generator)
        noise = torch.randn(shape, generator=device_generator(generator, device), device=device)
        return Draws(t, r, noise, num_dropped)

    @fixed_weights()
    def loss(self, model: AnyNetwork, latents: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Metrics]:
        """The training loss of one local batch.

        Args:
            model: the network u(z, t, h, y), z (B, C, H, W), t and h (B,), y (B,) int64 -> (B, C, H, W); its attribute
                `num_classes` is the null class. A network with `takes_tangents`, such as `DiT`, returns du/dt itself;
                any other is differentiated by `torch.func.jvp`. The sequence of calls does not depend on the draws (a
                row of zeros replaces an empty batch), so ranks that share the parameters stay in step.
            latents: (B, C, H, W) float32, clean.
            labels: (B,) int64.
            draws: of `draw`.

        Returns:
            The loss, a scalar with a graph, and detached metrics: `loss` (), and as tensors `error`, `v_loss` (B,), the
            squared distances of u to its target and to the sample's own velocity, `v_g`, `u` (B, C, H, W), and `du_dt`
            (K, C, H, W) of the K interval rows.

        Raises:
            ValueError: the interval share does not divide B, labels or draws are of another batch, the model has no
                `num_classes`, or it returns a shape other than that of z.
            TypeError: the model does not return a tensor.
            NotImplementedError: an operator of the model does not support forward-mode differentiation.
        """
        check_rows(latents, labels, draws.t, draws.noise)
        cfg, device = self.config, latents.device
        batch, num_interval = latents.shape[0], cfg.num_interval(latents.shape[0])
        num_instant = batch - num_interval

        t, r = to_device(draws.t, device), to_device(draws.r, device)
        h = (t - r).clamp(0, 1)
        x, e = latents, draws.noise
        z = (1 - column(t)) * x + column(t) * e
        v = e - x
        y = labels.clone()
        null = null_class(model)
        y[: draws.num_dropped] = null

        # Guided velocity: v_g = omega v + (1 - omega - kappa) u(z, t, 0, null) + kappa u(z, t, 0, y).
        v_g = v.clone()
        if cfg.guided:
            guided = cfg.guided_rows(draws.t, draws.num_dropped).nonzero()[:, 0]
            interval = to_device(guided[guided >= num_instant], device)
            instant = to_device(guided[guided < num_instant], device)
            guided = to_device(guided, device)
            unconditional = 1 - cfg.omega - cfg.kappa
            null_rows = guided if unconditional else guided[:0]
            cond_rows = interval if cfg.kappa else interval[:0]

            rows = torch.cat([null_rows, cond_rows])
            y_guide = y[rows]
            y_guide[: len(null_rows)] = null
            with torch.no_grad():
                u_guide = velocity(model, z[rows], t[rows], torch.zeros_like(t[rows]), y_guide)
            u_null, u_cond = u_guide.split([len(null_rows), len(cond_rows)])
            v_g[guided] = cfg.omega * v[guided]
            v_g[null_rows] += unconditional * u_null
            v_g[cond_rows] += cfg.kappa * u_cond

        # Average velocity u and, for interval rows, its JVP along (v_g, 1, 0) in (z, t, r), so 1 in h = t - r.
        if num_interval:
            one = torch.ones(num_interval, device=device)
            u, du_dt = velocity_and_jvp(model, z, t, h, y, (v_g[num_instant:], one, one))
        else:
            u = velocity(model, z, t, h, y)
            du_dt = u.detach()[:0]

        with torch.no_grad():
            if cfg.guided and cfg.kappa:
                v_g[instant] += cfg.kappa * u[instant]
            u_tgt = v_g.clone()
            u_tgt[num_instant:] -= column(h[num_instant:]) * du_dt

        error = (u - u_tgt).square().flatten(1).sum(1)
        loss = cfg.weighted(error).mean()
        with torch.no_grad():
            v_loss = (u - v).square().flatten(1).sum(1)
        return loss, Metrics({"loss": loss}, {"error": error, "v_loss": v_loss, "v_g": v_g, "u": u, "du_dt": du_dt})

    def health(self, loss: Tensor, metrics: Mapping[str, Tensor], draws: Draws) -> Health:
        rows = {name: metrics[name] for name in ("error", "v_loss")}
        guided = self.config.guided_rows(draws.t, draws.num_dropped) & self.config.guided
        kinds = row_kinds(draws.t, self.config.num_interval(len(draws.t)), draws.num_dropped, guided)
        return by_kind(super().health(loss, metrics, draws), rows, metrics["du_dt"], kinds)

    def sample(self, model: AnyNetwork, noise: Tensor, labels: Tensor, steps: int = 1) -> Tensor:
        return sample(model, noise, labels, steps)
