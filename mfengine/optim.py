"""AdamW with moving averages of the weights: one optimizer for plain tensors and for FSDP2's DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mfengine import torch_private
from mfengine.kernels import multi_tensor
from mfengine.kernels.multi_tensor import Row

Backend = Literal["auto", "cuda", "torch", "apex"]


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), and averages <- d average + (1 - d) parameter after each step.

    A step never makes the host wait for the device. If gradients are not finite on any rank, or so large that the sum
    of their squares overflows float32, the step leaves parameters, state, averages and copies unchanged, bit for bit,
    and sets `skipped`. To know this before anything is written, a step reads gradients once more.

    Parameters, moments and averages are float32; gradients are float32 or bfloat16. For DTensors, each rank updates its
    own part. A parameter without a gradient is left alone, as in PyTorch; its averages still approach it. The state
    dict is that of `torch.optim.AdamW` with an `average_DECAY` for each decay. It is the same for every backend, so a
    run can continue with another one. Gradients may be left scaled.
    Args:
        params: parameters, or groups of them with their own settings, as for any PyTorch optimizer.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        ema_decays: the decay d of each moving average, at most 8; or a mapping from a number that names an average,
            such as its half-life, to its decay.
        clip_norm: scale gradients so that their norm over all parameters and ranks is at most this.
        skip_nonfinite: skip steps with gradients that are not finite. False saves reading the gradients, unless
            `clip_norm` needs it.
        copies: bfloat16 tensors, one for each parameter (its local part), for networks that compute in bfloat16. From
            now on they hold the rounded parameters. They are filled here, by each step, and by `refresh_copies` after
            weights were loaded.
        backend: "cuda", the whole step in one pass over memory, by mfengine's CUDA library; "torch", PyTorch's fused
            AdamW and foreach functions; "apex", NVIDIA's AdamW; "auto", "cuda" if available, else "torch".

    Raises:
        ValueError: a setting is out of range, a parameter is not float32, parameters are on different devices, or the
            backend is unavailable.

    Example:
        >>> import torch
        >>> from mfengine.optim import AdamWEMA
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamWEMA(model.parameters(), lr=1e-3, ema_decays=(0.999, 0.9999), clip_norm=1.0)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> with optimizer.averaged(model, 0.999):
        ...     predictions = model(torch.randn(8, 4))
    """

    ema_decays: dict[float, float]
    """decay of each moving average in the next step, by its name; may be changed between steps, like `lr` in
    `param_groups`. The state dict does not have it"""
    copies: dict[Tensor, Tensor]
    """parameter -> its copy"""
    skipped: Tensor
    """() float32 on the device: 1 if the last step was skipped because a gradient was not finite, else 0"""
    grad_norm: Tensor
    """() float32 on the device: norm of the last step's gradients before clipping, over all parameters and ranks; nan
    if it was not needed"""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ema_decays: tuple[float, ...] | Mapping[float, float] = (0.9999,),
        clip_norm: float | None = None,
        skip_nonfinite: bool = True,
        copies: Iterable[Tensor] | None = None,
        backend: Backend = "auto",
    ) -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"backend {backend} does not exist; it must be one of {', '.join(get_args(Backend))}")
        check_settings(lr, betas, eps, weight_decay, ema_decays, clip_norm)
        self.ema_decays = dict(
            ema_decays if isinstance(ema_decays, Mapping) else zip(ema_decays, ema_decays, strict=True)
        )
        self.clip_norm, self.skip_nonfinite = clip_norm, skip_nonfinite
        self.copies = {}
        self._inside_averaged = False
        # load_state_dict needs "fused": it keeps `step` on the device.
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, settings)
        self._device = local(self._parameters()[0]).device
        self.skipped = torch.zeros((), device=self._device)
        self.grad_norm = torch.full_like(self.skipped, torch.nan)
        self.backend = self._choose(backend)
        if copies is not None:
            self._keep_copies(list(copies))

    def average(self, p: Tensor, decay: float) -> Tensor:
        """The moving average of a parameter: float32, laid out like the parameter.

        Raises:
            ValueError: the optimizer does not hold the parameter, or has no average with this decay.
        """
        if decay not in self.ema_decays:
            raise ValueError(f"there is no moving average with decay {decay}; the decays are {tuple(self.ema_decays)}")
        if p not in self.state:  # a look-up would add an entry
            raise ValueError(f"a tensor of shape {tuple(p.shape)} is not a parameter of this optimizer")
        return self.state[p][_key(decay)]

    @contextmanager
    def averaged(self, model: nn.Module, decay: float | None = None) -> Iterator[None]:
        """A context in which the model has the weights of a moving average. Its own are restored, bit for bit.

        Buffers stay as they are. It takes memory for one more copy of the parameters. All ranks of an FSDP2 model enter
        it together.

        Args:
            model: a model whose parameters are this optimizer's.
            decay: which moving average; None takes the first.

        Raises:
            ValueError: the optimizer does not hold a parameter of the model, or has no average with this decay.
            RuntimeError: contexts are nested, or `step` is called inside one.
        """
        if self._inside_averaged:
            raise RuntimeError("the model already has the weights of a moving average: leave `averaged` first")
        if decay is None:
            if not self.ema_decays:
                raise ValueError("the optimizer has no moving average: its ema_decays are empty")
            decay = next(iter(self.ema_decays))
        averages = [local(self.average(p, decay)) for p in model.parameters()]
        own = [local(p).detach().clone() for p in model.parameters()]
        self._load(model, averages)
        self._inside_averaged = True
        try:
            yield
        finally:
            self._inside_averaged = False
            self._load(model, own)

    @torch.no_grad()
    def _load(self, model: nn.Module, values: list[Tensor]) -> None:
        """Replace this rank's part of each parameter of the model."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # so that the next forward gathers the new values
        torch_private.foreach_copy([local(p) for p in model.parameters()], values)
        self.refresh_copies()

    # ------------------------------------------------------------------------
    # State: created at once, so that it can be saved, and loaded into, before the first step.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_settings(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
        for p in group["params"]:
            first = self._parameters()[0]
            if p.dtype != torch.float32:
                raise ValueError(f"parameters must be float32, not {p.dtype}")
            if p.device != first.device:
                raise ValueError(f"parameters must be on one device, not on {first.device} and {p.device}")
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                **{_key(decay): p.detach().clone() for decay in self.ema_decays},
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of an AdamWEMA with the same decays and any backend.

        Raises:
            ValueError: the state is of other parameters, or lacks an average.
        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(keys, self._parameters(), strict=False):
            state = state_dict["state"].get(key, {})
            missing = [decay for decay in self.ema_decays if _key(decay) not in state]
            if missing:
                raise ValueError(f"the state has no moving average with decay {missing[0]}")
            for name in self.state[p].keys() - {"step"}:
                if state[name].shape != p.shape:
                    raise ValueError(
                        f"{name} of a parameter of {tuple(p.shape)} must have its shape, not {tuple(state[name].shape)}"
                    )
        super().load_state_dict(state_dict)
        for p in self._parameters():  # in the memory layout of the parameters here
            self.state[p] = {
                name: x if name == "step" else torch.empty_like(p, requires_grad=False).copy_(x)
                for name, x in self.state[p].items()
            }

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _keep_copies(self, copies: list[Tensor]) -> None:
        parameters = self._parameters()
        if len(copies) != len(parameters):
            raise ValueError(f"there are {len(parameters)} parameters, but {len(copies)} copies")
        for p, copy in zip(parameters, copies, strict=True):
            part = local(p.detach())
            alike = (copy.shape, copy.stride(), copy.device) == (part.shape, part.stride(), part.device)
            if copy.dtype != torch.bfloat16 or not alike:
                raise ValueError(
                    f"the copy of a parameter of shape {tuple(part.shape)} on {part.device} must be bfloat16, with the "
                    f"same shape, strides and device; it is {copy.dtype} of {tuple(copy.shape)} on {copy.device}"
                )
        self.copies = dict(zip(parameters, copies, strict=True))
        self.refresh_copies()

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Fill the copies again, after anything but a step has changed the parameters."""
        for p, copy in self.copies.items():
            copy.copy_(local(p))

    # ------------------------------------------------------------------------
    # A step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the current gradients; returns the result of `closure`.

        Raises:
            RuntimeError: inside `averaged`, where the parameters are a moving average.
        """
        if self._inside_averaged:
            raise RuntimeError("the parameters are a moving average: leave `averaged` before the next step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._rows()
        if self.skip_nonfinite or self.clip_norm is not None:
            squares = self._sum_of_squares([row for rows in groups for row in rows]).float()
            self.grad_norm = squares.sqrt()
            if self.skip_nonfinite:
                self.skipped = squares.isfinite().logical_not().float()
        skip = self.skipped if self.skip_nonfinite else None
        if skip is not None and not _makes_wait(self._device):
            if skip:
                return loss
            skip = None
        scale = None
        if self.clip_norm is not None:
            scale = (self.clip_norm / (self.grad_norm + 1e-6)).clamp(max=1)
        steps = [row.step for rows in groups for row in rows if row.grad is not None]
        if steps:
            torch_private.foreach_add(steps, [1 - self.skipped] * len(steps))
        update = {"cuda": self._step_cuda, "torch": self._step_torch, "apex": self._step_apex}[self.backend]
        for group, rows in zip(self.param_groups, groups, strict=True):
            if rows:
                update(group, rows, scale, skip)
        return loss

    def _rows(self) -> list[list[Row]]:
        """This rank's part of each parameter, by group; gradients are laid out like the parameters."""
        groups = []
        for group in self.param_groups:
            rows = []
            for p in group["params"]:
                state, part, grad = self.state[p], local(p), p.grad
                if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
                    grad = grad.redistribute(p.device_mesh, p.placements)
                grad = None if grad is None else local(grad)
                if grad is not None and (grad.stride() != part.stride() or grad.dtype not in multi_tensor.GRAD_DTYPES):
                    grad = torch.empty_like(part).copy_(grad)
                averages = [local(state[_key(decay)]) for decay in self.ema_decays]
                moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
                rows.append(Row(part, grad, *moments, state["step"], averages, self.copies.get(p)))
            groups.append(rows)
        return groups

    def _sum_of_squares(self, rows: list[Row]) -> Tensor:
        """Sum of squares of all gradients on all ranks, () float64."""
        parts: dict[Any, list[Tensor]] = {}  # by the ranks that share a gradient, and by dtype
        for p, row in zip(self._parameters(), rows, strict=True):
            if row.grad is None:
                continue
            shared = None
            if isinstance(p, DTensor):
                dims = tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())
                shared = (p.device_mesh, dims)
            parts.setdefault((shared, row.grad.dtype), []).append(row.grad)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for (shared, _), grads in parts.items():
            if self.backend == "cuda":
                squares = multi_tensor.library().sum_of_squares(grads)
            else:
                squares = torch.stack(torch_private.foreach_norm(grads, dtype=torch.float32)).double().square().sum()
            if shared is not None:
                mesh, dims = shared
                for dim in dims:
                    dist.all_reduce(squares, group=mesh.get_group(dim))
            total += squares
        return total

    def _step_cuda(self, group: dict[str, Any], rows: list[Row], scale: Tensor | None, skip: Tensor | None) -> None:
        multi_tensor.library().adamw_ema(
            rows,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
            decays=tuple(self.ema_decays.values()),
            grad_scale=scale,
            skip=skip,
        )

    def _step_torch(self, group: dict[str, Any], rows: list[Row], scale: Tensor | None, skip: Tensor | None) -> None:
        stepping = [row for row in rows if row.grad is not None]
        if stepping:
            torch_private.fused_adamw(
                [row.param for row in stepping],
                [row.grad.float() for row in stepping if row.grad is not None],
                [row.exp_avg for row in stepping],
                [row.exp_avg_sq for row in stepping],
                [],
                [row.step for row in stepping],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None if scale is None else 1 / scale,
                found_inf=skip,
            )
        self._follow(rows, skip)

    def _step_apex(self, group: dict[str, Any], rows: list[Row], scale: Tensor | None, skip: Tensor | None) -> None:
        if any(row.grad is None for row in rows):
            raise ValueError("backend apex counts steps for all parameters: each needs a gradient in every step")
        rows = [row for row in rows if row.param.numel()]  # apex skips whatever precedes an empty tensor
        if not rows:
            return
        import_module("amp_C").multi_tensor_adam_capturable(
            65536,  # elements per block
            self.skipped.int()[None],
            [
                [row.grad.float() for row in rows if row.grad is not None],
                [row.param for row in rows],
                [row.exp_avg for row in rows],
                [row.exp_avg_sq for row in rows],
            ],
            torch.full((1,), group["lr"], device=self._device),
            *group["betas"],
            group["eps"],
            rows[0].step.int()[None],
            1,  # decoupled weight decay
            1,  # bias correction
            group["weight_decay"],
            torch.ones(1, device=self._device) if scale is None else scale[None],
        )
        self._follow(rows, skip)

    def _follow(self, rows: list[Row], skip: Tensor | None) -> None:
        """Update averages and copies with PyTorch functions."""
        for i, decay in enumerate(self.ema_decays.values()):
            if skip is None:
                torch_private.foreach_lerp([row.averages[i] for row in rows], [row.param for row in rows], 1 - decay)
                continue
            for part in (
                rows[j : j + 16] for j in range(0, len(rows), 16)
            ):  # few at a time: the differences take memory
                averages = [row.averages[i] for row in part]
                away = torch_private.foreach_sub(averages, [row.param for row in part])
                # SGD applies it, because fused SGD is skipped by a flag on the device.
                torch_private.fused_sgd(
                    averages, away, [], weight_decay=0, momentum=0, lr=1 - decay, dampening=0, nesterov=False,
                    maximize=False, is_first_step=False, found_inf=skip,
                )  # fmt: skip
        copied = [(row.copy, row.param) for row in rows if row.copy is not None]
        if copied:  # after a skipped step, parameters and copies are unchanged
            copies, parameters = map(list, zip(*copied, strict=True))
            torch_private.foreach_copy(copies, parameters)

    def _choose(self, wish: Backend) -> Backend:
        why = None
        if wish in ("auto", "cuda"):
            why = self._why_not_cuda()
            if why is None:
                return "cuda"
        if wish == "apex":
            try:
                import_module("amp_C").multi_tensor_adam_capturable  # noqa: B018
            except (ImportError, AttributeError) as error:
                why = f"apex is not installed with its CUDA extensions, from NVIDIA's repository: {error}"
        if wish != "auto" and why is not None:
            raise ValueError(f"backend {wish}: {why}")
        return "torch" if wish == "auto" else wish

    def _why_not_cuda(self) -> str | None:
        try:
            library = multi_tensor.library()
        except OSError as error:
            return f"the CUDA library: {error}"
        if self._device.type != library.device:
            return f"the parameters are on {self._device.type}"
        if why := library.why_not():
            return f"the CUDA library: {why}"
        if any(p.stride() != torch.empty_like(p).stride() for p in map(local, self._parameters())):
            return "a parameter is not dense in memory"
        return None


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor. It shares memory with the tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def _makes_wait(device: torch.device) -> bool:
    """Whether reading a value makes the host wait for the device."""
    return device.type != "cpu"


def _key(decay: float) -> str:
    """The name of a moving average in the state."""
    return f"average_{decay}"


def check_settings(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decays: tuple[float, ...] | Mapping[float, float] = (),
    clip_norm: float | None = None,
) -> None:
    """ValueError if a setting of `AdamWEMA` is out of range."""
    if not lr >= 0:
        raise ValueError(f"lr must be at least 0, not {lr}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, not {weight_decay}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), not {betas}")
    decays = ema_decays.values() if isinstance(ema_decays, Mapping) else ema_decays
    if len(set(ema_decays)) < len(ema_decays) or not all(0 <= decay < 1 for decay in decays):
        raise ValueError(f"ema_decays must be different numbers in [0, 1), not {ema_decays}")
    if len(ema_decays) > multi_tensor.MAX_AVERAGES:
        raise ValueError(f"there must be at most {multi_tensor.MAX_AVERAGES} ema_decays, not {len(ema_decays)}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, not {clip_norm}")
