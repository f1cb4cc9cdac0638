"""The training loop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)

from mfengine.configs import to_json
from mfengine.data.format import Dataset
from mfengine.data.loader import Loader
from mfengine.data.pictures import GRID, draw_latents
from mfengine.data.vae import VAE
from mfengine.device import HostCopy, step_generator, to_device
from mfengine.engine.checkpoint import (
    Checkpointer,
    first_whole,
    load_state,
    read_description,
    remove_leftovers,
    set_aside,
)
from mfengine.engine.config import TrainConfig
from mfengine.engine.distributed import prepare_model, reduce_gradients
from mfengine.engine.flops import step_flops
from mfengine.engine.health import WeightHealth
from mfengine.engine.lock import hold
from mfengine.engine.nonfinite import first_nonfinite
from mfengine.engine.optim import adamw_ema, averages
from mfengine.engine.plan import device_memory, make_plan
from mfengine.engine.preflight import check_run, check_run_folder, other_normalisation, write_config
from mfengine.engine.profile import Profile
from mfengine.engine.rates import peak_rate
from mfengine.engine.telemetry import METRICS, Telemetry, best_step
from mfengine.engine.weights import load_initial_weights
from mfengine.errors import InputError, RankTrainingError, TrainingError
from mfengine.evaluation.frechet import Gaussian, fit_data, latent_distance
from mfengine.evaluation.samples import SampleSet
from mfengine.methods import OBJECTIVES, Health
from mfengine.networks import NETWORKS
from mfengine.ops import fixed_weights, use_attention, use_backend
from mfengine.optim import local
from mfengine.ranks import World

Batch = tuple[Tensor, Tensor, Any]  # latents, labels on the host, draws
PICTURE_SAMPLES = GRID**2
MEASURED_SAMPLES = 10_000  # for --evaluate-every: the covariance of 4 x 32 x 32 latents needs more than 4,096


def train(config: TrainConfig, world: World, provenance: Mapping[str, str] = MappingProxyType({})) -> int:
    """Train to the end of `config`, or until SIGTERM or SIGINT.

    Args:
        config: the run.
        world: the ranks that train.
        provenance: version, commit and command line, for the tracker.

    Returns:
        0 at the end, or the number of the signal that stopped the run, after a checkpoint was written.

    Raises:
        InputError: the configuration, the data or the run folder is not usable.
        TrainingError: the loss is not finite, or memory runs out.
    """
    config.local_batch(world.size)
    dataset = world.on_main(lambda: Dataset.open(config.data))
    check_run(config, dataset, world)
    world.on_main(lambda: check_run_folder(config, dataset))  # before the lock, which writes into the folder
    try:
        with ExitStack() as held, use_backend(config.ops), use_attention(config.attention):
            unlocked = world.on_main(lambda: held.enter_context(hold(config.folder)))
            trainer = Trainer(config, world, dataset, provenance)
            if unlocked is not None:
                trainer.telemetry.say(f"warning: {unlocked}")
            with caught_signals(world.main) as caught:
                return trainer.run(caught)
    except torch.OutOfMemoryError as error:
        asked = ". ".join(str(error).split(". ")[:2])  # PyTorch's next sentences depend on its version
        peak = torch.cuda.max_memory_allocated() / 1e9
        raise RankTrainingError(
            f"{asked}, and the peak was {peak:.1f} GB: save memory with --recompute or a larger --accumulation"
        ) from None


# ----------------------------------------------------------------------------
# The run.


class Trainer:
    """One run on one rank: its state, and the loop that advances it."""

    def __init__(self, config: TrainConfig, world: World, dataset: Dataset, provenance: Mapping[str, str]) -> None:
        self.config, self.world, self.dataset = config, world, dataset
        self.total_steps = config.total_steps(dataset.count)
        self.objective = OBJECTIVES.build(config.method)
        self.step = 0
        self.skipped = 0
        self.first_bad = ""
        self.saved_at = time.monotonic()

        checkpoints = world.on_main(lambda: check_run_folder(config, dataset))
        torch.manual_seed(config.seed)
        model = NETWORKS.build(config.model, config.compute_dtype(world.device))
        notes = [
            f"{config.folder}: {NETWORKS.name_of(config.model)} by {OBJECTIVES.name_of(config.method)}, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
            f"{self.total_steps} steps of {config.batch_size} samples, "
            f"{world.size} x {world.device.type} in {str(model.compute_dtype).removeprefix('torch.')}",
            *other_normalisation(config, dataset),
        ]
        if config.init is not None and not checkpoints:
            fresh = load_initial_weights(model, config.init, config.init_reverse_time, config.skip_checksums)
            if fresh:
                if len(fresh) > 4:  # for example a whole head
                    fresh = list(dict.fromkeys(f"{name.split('.')[0]}.*" for name in fresh))
                notes.append(f"{config.init} leaves {', '.join(fresh)} as initialised")
        self.model = prepare_model(
            model,
            world,
            replicas=config.replicas,
            reshard=config.reshard,
            compile=config.compile,
            recompute=config.recompute,
        )
        whole = not world.sharded and not config.compile
        self.optimizer = adamw_ema(self.model, config.optim, whole=whole, accumulation=config.accumulation)
        self.weights = fixed_weights(self.optimizer.copies)
        self.weight_health = WeightHealth(self.model, self.optimizer, world, config.replicas)
        positions: dict[int, bytes] = {}
        damaged: list[str] = []
        if checkpoints:
            (positions, resumed), damaged = first_whole(checkpoints, self._resume)
            aside = (f"set aside as damaged-{path.name}" for path in checkpoints)
            notes += [f"{problem}; {where}" for problem, where in zip(damaged, aside, strict=False)] + resumed
        self.profile = Profile(config.profiled if world.main else None, config.folder / "profile", self.model)
        self.loaders = self._open_data(positions)
        self.data = fit_data(dataset, world) if config.evaluate_every else None
        self.vae: VAE | None = None
        world.on_main(self._open_vae)

        # Nothing is written before this point, so that wrong input leaves nothing behind.
        world.on_main(lambda: remove_leftovers(config.folder))
        world.on_main(lambda: write_config(config, dataset))
        world.on_main(lambda: set_aside(checkpoints[: len(damaged)]))
        self.checkpointer = Checkpointer(
            config.folder,
            world,
            config.keep,
            asynchronous=world.device.type == "cuda",
            keep_every=config.keep_every,
            best=self._best,
        )
        if world.main and device_memory(world.device) is not None:
            notes += make_plan(config, world).warnings(world.device)
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if world.main and world.device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
            notes.append(f"the cores are busy (load {load:.0f} on {cores}): OMP_NUM_THREADS=1 may be faster")

        def peak() -> float:
            flops = step_flops(config.model, config.method, config.local_batch(world.size))
            return world.size * peak_rate(world.device, model.compute_dtype) / flops

        self.telemetry = Telemetry(
            config.folder,
            world.main,
            self.step,
            self.total_steps,
            config.batch_size,
            peak,
            shown=(*self.objective.scalars[:1], "loss"),
            tracker=config.tracker,
            facts={**provenance, "config": to_json(config)},
        )
        for note in notes:
            self.telemetry.say(note)

    def run(self, caught: list[int]) -> int:
        """Train until the end, or until `caught` holds a signal on any rank; returns the signal or 0."""
        with self.telemetry:
            while self.step < self.total_steps:
                with self.profile.step(self.step + 1):
                    signum, overdue = self._train_step(caught)
                self.checkpointer.poll()
                self._tell()
                if self.data is not None and self.step % self.config.evaluate_every == 0 and not signum:
                    self._measure_samples(self.data)  # before checkpoints are removed: this one may be the best
                due = self.step % self.config.checkpoint_every == 0 or self.step == self.total_steps
                if due or overdue or signum:
                    self._save()
                    self._tell()
                if self.config.sample_every and self.step % self.config.sample_every == 0:
                    self._draw_samples()
                if signum and self.step < self.total_steps:
                    break
            else:
                signum = 0
            self.telemetry.strip(self.step)
            self.checkpointer.wait()
        if self.checkpointer.failed:
            raise TrainingError(self.checkpointer.failed)
        if self.world.main:  # the last line, below the progress bar
            stopped = f"stopped by {signal.Signals(signum).name}: " if signum else ""
            done = f"step {self.step} of {self.total_steps}, checkpoint {self.checkpointer.newest}"
            print(stopped + done, file=sys.stderr, flush=True)
        return signum

    def _train_step(self, caught: list[int]) -> tuple[int, bool]:
        """One optimizer step; returns a signal that any rank has caught, or 0, and whether it is time to save."""
        config, world, started, data_wait = self.config, self.world, time.monotonic(), 0.0
        passes: list[Health] = []
        batches: list[Batch] = []
        for i, loader in enumerate(self.loaders):
            last = i == config.accumulation - 1
            generator = step_generator(config.seed, self.step, self._part(i))
            asked = time.monotonic()
            with self.profile.label("data"):
                latents, labels = loader.draw(generator)
            data_wait += time.monotonic() - asked
            draws = self.objective.draw(latents.shape, generator, world.device)
            with self.weights:
                loss, metrics = self.objective.loss(self.model, latents, to_device(labels, world.device), draws)
            passes.append(self.objective.health(loss, metrics, draws))
            if config.debug_nonfinite:
                batches.append((latents, labels, draws))
            if last:
                # Copied before the backward is queued, so that reading it waits only for the forward.
                before = torch.stack([self.optimizer.skipped, self.optimizer.grad_norm])  # of the previous step
                copied = HostCopy(torch.cat([torch.stack([each.sums for each in passes]).sum(0), before]))
            reduce_gradients(self.model, last, config.reshard)
            with self.profile.label("backward"):
                (loss / config.accumulation).backward()

        # All ranks see the same values, so they decide the same.
        asked = time.monotonic()
        *sums, skipped, grad_norm = copied.values()
        names = passes[0].weights
        weights = [sum(each.weights[name] for each in passes) for name in names]
        row = {
            "loss": sums[0],
            "skipped": skipped,
            "signal": caught[0] if caught else 0,
            "overdue": 0 < config.checkpoint_minutes * 60 <= time.monotonic() - self.saved_at,
            "data_wait": data_wait,
        }
        everyones = world.gather([*row.values(), *sums, *weights])
        ranks = dict(zip(row, everyones.T, strict=False))  # name -> (ranks,)
        device_wait = time.monotonic() - asked
        if ranks["skipped"][0]:
            self._skipped_gradient()  # one step late, so that the host never waits for it
        finite = ranks["loss"].isfinite()
        lr = config.learning_rate(self.step, self.dataset.count)
        if finite.all():
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.ema_decays.update(config.optim.decays(self.step, config.batch_size))
            with self.profile.label("optimizer"):
                self.optimizer.step()
            if config.debug_nonfinite and self.optimizer.skipped:
                self.first_bad = self._first_nonfinite(batches)
        else:
            rank = int(finite.logical_not().nonzero()[0])
            where = self._first_nonfinite(batches) if config.debug_nonfinite else ""
            self._skipped(f"the loss is not finite at step {self.step + 1} on rank {rank}{where}")
        self.optimizer.zero_grad()
        self.step += 1

        totals, weights = everyones[finite, len(row) :].sum(0).view(2, -1).tolist()
        host = time.monotonic() - started - data_wait - device_wait
        seconds = {"data_wait": float(ranks["data_wait"].max()), "device_wait": device_wait, "host": host}
        self.telemetry.step(
            {
                **dict(zip(names, zip(totals, weights, strict=True), strict=True)),
                "grad_norm": (grad_norm, 1.0),
                **{f"{name}_ms": (1000 * value, 1.0) for name, value in seconds.items()},
            }
        )
        if self._logs(self.step):
            epoch = self.step * config.batch_size / self.dataset.count
            self.telemetry.log(self.step, epoch, lr, self.skipped, **self.weight_health.read())
        if self._logs(self.step + 1):  # the next step waits for its forward, when the metrics of this one are ready
            self.weight_health.measure()
        return int(ranks["signal"].max()), bool(ranks["overdue"][0])

    def _logs(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total_steps

    def _skipped_gradient(self) -> None:
        """Report that the optimizer skipped the last step."""
        self.optimizer.skipped.zero_()  # so that it is reported once
        self._skipped(f"a gradient is not finite at step {self.step}{self.first_bad}")

    def _first_nonfinite(self, batches: list[Batch]) -> str:
        """Repeat the passes of a step with a loss or gradient that is not finite, and say where that begins."""
        self.optimizer.zero_grad()

        def again() -> Iterator[tuple[str, Tensor]]:
            for i, (latents, labels, draws) in enumerate(batches):
                yield "latents", latents
                with self.weights:
                    labels = to_device(labels, self.world.device)
                    loss, _ = self.objective.loss(self.model, latents, labels, draws)
                yield "loss", loss
                reduce_gradients(self.model, i == len(batches) - 1, self.config.reshard)
                (loss / self.config.accumulation).backward()

        return f" ({first_nonfinite(self.model, again, self.world)})"

    def _skipped(self, what: str) -> None:
        """Report a step that left the weights unchanged; TrainingError after too many of them."""
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            self._give_up(f"{what}, after {self.skipped - 1} skipped step(s)")
        self.telemetry.say(f"{what}: skipped, {self.skipped} of {self.config.max_skipped_steps}")

    def _give_up(self, why: str) -> NoReturn:
        self.checkpointer.wait()
        raise TrainingError(f"{why}; last complete checkpoint: {self.checkpointer.newest or 'none'}")

    def _draw_samples(self) -> None:
        """Draw one-step samples with averaged weights, on all ranks, because a sharded model needs them."""
        device, space = self.world.device, self.dataset.space
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(PICTURE_SAMPLES, *space.shape, generator=generator).to(device)
        labels = (torch.arange(PICTURE_SAMPLES, device=device) * space.num_classes) // PICTURE_SAMPLES
        with self.optimizer.averaged(self.model):
            latents = self.objective.sampler({})(self.model, noise, labels, 1)
        if not self.world.main:
            return
        if self.vae is not None:
            self.telemetry.picture(self.step, self.vae.decode(latents, space).cpu(), "one step, decoded")
        else:
            what = "one step" if space.pixel_range is not None else "one step, first three channels of the latents"
            self.telemetry.picture(self.step, draw_latents(latents.cpu(), space), what)

    def _open_vae(self) -> None:
        """Open the VAE on rank 0, the only one that draws pictures."""
        if self.config.vae is not None:
            self.vae = VAE(self.config.vae, self.world.device)
            if self.vae.channels != (channels := self.dataset.space.shape[0]):
                raise InputError(
                    f"--vae {self.config.vae} has {self.vae.channels} latent channels; the data has {channels}"
                )

    def _measure_samples(self, data: Gaussian) -> None:
        """Log the distance between the data and one-step samples with averaged weights, the same samples each time."""
        config = self.config
        batch, sampler = config.local_batch(self.world.size), self.objective.sampler({})
        samples = SampleSet(self.dataset.space, MEASURED_SAMPLES, batch, config.seed, sampler=sampler)
        with self.optimizer.averaged(self.model):
            distance = latent_distance(self.model, samples, 1, data, self.world)
        self.telemetry.figure(self.step, "frechet_1nfe", distance)

    # --------------------------------------------------------------------
    # State.

    def _part(self, i: int) -> int:
        """The part of the data and of the random numbers for accumulation pass i of this rank.

        Two ranks do the same work as one rank in two passes.
        """
        return self.world.rank * self.config.accumulation + i

    @property
    def _num_parts(self) -> int:
        return self.world.size * self.config.accumulation

    def _open_data(self, positions: dict[int, bytes]) -> list[Loader]:
        # Without a position, the order differs from that of every earlier epoch.
        epoch = self.step * self.config.batch_size // self.dataset.count
        loaders = []
        for i in range(self.config.accumulation):
            part = self._part(i)
            seed = int(np.random.SeedSequence([self.config.seed, epoch, part]).generate_state(1)[0] >> 1)
            loaders.append(
                Loader(
                    self.dataset,
                    self.config.local_batch(self.world.size),
                    part,
                    self._num_parts,
                    seed,
                    self.world.device,
                    positions.get(part),
                )
            )
        return loaders

    def _state(self) -> dict[str, Any]:
        """The state for a checkpoint. It shares memory with model and optimizer."""
        # The optimizer's settings come from the configuration, which may change when a run continues.
        optimizer: Any = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": {
                name: {key: value for key, value in state.items() if key in ("step", "exp_avg", "exp_avg_sq")}
                for name, state in optimizer.items()
            },
            "ema": {str(d): averages(self.model, self.optimizer, d) for d in self.config.optim.ema_decays},
        }

    def _best(self, steps: list[int]) -> int | None:
        """The step, among `steps`, with the least value of the metric that --keep-best names."""
        if self.config.keep_best is None:
            return None
        return best_step(self.config.folder / METRICS, self.config.keep_best, steps)

    def _tell(self) -> None:
        """Report checkpoints that could not be written or removed. Training goes on, and so does saving."""
        for note in self.checkpointer.notes:
            self.telemetry.say(f"warning: {note}; training goes on")
        self.checkpointer.notes.clear()

    def _save(self) -> None:
        self.telemetry.flush()
        if self.optimizer.skipped:
            self._skipped_gradient()
        # However it happened, weights that are not finite must not replace good ones.
        finite = bool(torch.stack([local(p).isfinite().all() for p in self.model.parameters()]).all())
        ranks = self.world.gather([finite])[:, 0]
        if not ranks.all():
            self._give_up(f"the weights are not finite after step {self.step} on rank {int(ranks.argmin())}")
        state = self._state()
        state["data"] = {str(self._part(i)): loader.position() for i, loader in enumerate(self.loaders)}
        description = {
            "parts": self._num_parts,
            "skipped_steps": self.skipped,
            "ema_decays": self.config.optim.ema_decays,
            **self.config.description(),
            "space": to_json(self.dataset.space),
            "class_names": self.dataset.class_names,
        }
        self.checkpointer.save(self.step, state, description)
        self.saved_at = time.monotonic()

    def _resume(self, path: Path) -> tuple[dict[int, bytes], list[str]]:
        """Continue from a checkpoint; returns the data positions, if they still apply, and notes to print."""
        description = self.world.on_main(lambda: read_description(path))
        notes = [f"continuing {path}"]
        state = self._state()
        same_parts = description["parts"] == self._num_parts
        if same_parts:
            state["data"] = {str(self._part(i)): b"" for i in range(self.config.accumulation)}
        else:
            notes.append(
                f"the data was dealt in {description['parts']} part(s), now in {self._num_parts}: "
                "its position restarts at the beginning of the epoch"
            )
        load_state(path, description, state, self.world, self.config.skip_checksums)
        set_model_state_dict(self.model, state["model"])  # the optimizer's state was filled in place
        self.optimizer.refresh_copies()
        self.step, self.skipped = description["step"], description["skipped_steps"]
        return {int(part): position for part, position in state.get("data", {}).items()}, notes


@contextmanager
def caught_signals(speaks: bool) -> Iterator[list[int]]:
    """A list that receives SIGTERM and SIGINT.

    The first SIGINT is answered at once. A second one ends the process at once with exit code 130, even if the main
    thread is waiting for a device, a disk or another rank. SIGTERM may come twice, from a scheduler and through
    torchrun.

    Args:
        speaks: whether this rank prints the answer.
    """
    caught: list[int] = []
    usual = {s: signal.signal(s, lambda signum, _: caught.append(signum)) for s in (signal.SIGTERM, signal.SIGINT)}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    usual_fd = signal.set_wakeup_fd(writing)
    thread = threading.Thread(target=_answer, args=(reading, speaks), daemon=True)
    thread.start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(usual_fd)
        os.close(writing)
        thread.join()
        os.close(reading)
        for signum, handler in usual.items():
            signal.signal(signum, handler)


def _answer(reading: int, speaks: bool) -> None:
    """Read signal numbers from a pipe until it is closed."""
    interrupted = False
    while number := os.read(reading, 1):
        if number[0] != signal.SIGINT:
            continue
        if speaks:
            # torchrun forwards only the first one.
            again = "" if "TORCHELASTIC_RUN_ID" in os.environ else "; press Ctrl-C again to exit without it"
            said = "exiting without a checkpoint" if interrupted else f"writing a checkpoint{again}"
            os.write(2, f"\ninterrupted: {said}\n".encode())
        if interrupted:
            os._exit(128 + signal.SIGINT)
        interrupted = True
