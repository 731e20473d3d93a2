r"""A run: the training of one model in one folder, which continues from wherever it was stopped.

    recipe.json            what was asked for
    state.safetensors      weights, Adam's moments, the best weights so far, and where the run is
    metrics.jsonl          a line an epoch
    ledger.jsonl           a line for each time that somebody worked on it: device, seconds, steps
    tensorboard/           the same curves
    checkpoint/            the best model so far, by validation on observed pixels
    polish.safetensors     the encoder that is being polished, only while it is
    .lock                  held by who works on it

All that is drawn in a step comes from `Noise(seed).at("step", step)`, so the state needs no
generator and a run that was killed anywhere ends in the same weights as one that was not.
Everything is written beside its place and renamed into it, in an order in which whatever is
lost is made again: an epoch's metrics, then the state that counts the epoch, then the checkpoint.
A folder may be moved to another machine; the weights then are those of both machines' arithmetic.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model import checkpoint, data
from model.checkpoint import (
    Card,
    Checkpoint,
    CheckpointError,
    device_name,
    provenance,
    to_disk,
)
from model.data import Dataset, Split
from model.latent import LatentVariableModel
from model.masks import Incomplete
from model.noise import Noise
from model.objectives import Climbed, bound
from model.optimizers import give_moments, moments, optimizer
from model.recipe import Recipe, RecipeError, to_json
from model.refit import Refit, polish
from model.stages import Stages
from model.step import Asked, Stepper, products
from model.team import Team

__all__ = ["CHECKPOINT", "LOCK", "RECIPE", "Diverged", "Metrics", "Run"]

RECIPE, STATE, METRICS, LEDGER, CHECKPOINT, POLISH, LOCK = (
    "recipe.json",
    "state.safetensors",
    "metrics.jsonl",
    "ledger.jsonl",
    "checkpoint",
    "polish.safetensors",
    ".lock",
)
SAVE_EVERY = 60.0
"""Seconds of work that a kill may cost."""
LOOK_EVERY = 100
"""Steps between two looks at the bounds, each of which waits for the device."""


class Diverged(RuntimeError):
    """The bound, or a weight, is no longer a finite number."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """An epoch in numbers."""

    epoch: int
    step: int
    train_bound: float
    validation_bound: float
    best_epoch: int
    alpha: float
    elbo_variance: float | None = None
    """Of the ELBO as an estimate from an image's particles: the mean over the epoch."""
    q_hat_variance: float | None = None
    """Of Q̂ likewise."""
    seconds: float


@dataclass
class State:
    """Where a run is; saved whole, so that it goes on from there."""

    model: LatentVariableModel
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    step: int = 0
    validated: int = 0
    """Epochs that are over and validated."""
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of the bound, and of the variances of the ELBO and Q̂, over the epoch's steps."""
    best_bound: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0


PLACE = ("step", "validated", "sums", "best_bound", "best_epoch", "seconds")


class Run:
    """The training of one model in one folder."""

    def __init__(
        self, folder: Path, recipe: Recipe, *, device: str = "auto", team: Team | None = None
    ) -> None:
        self.team = team or Team()
        device = self.team.device if device == "auto" else device
        self.folder, self.device, self.asked = folder, _pick(device), recipe
        self.dataset = data.load(recipe.data)
        channels, height, width = self.dataset.train.pixels.shape[1:]
        architecture = replace(recipe.architecture, image_shape=(channels, height, width))
        self.recipe = replace(recipe, architecture=architecture)
        self.noise = Noise(recipe.seed)
        self.images = _content(self.dataset, recipe.missing)
        self.train = self._split("train")
        self.validation = self._split("validation")
        self.steps_per_epoch = math.ceil(len(self.train) / recipe.batch)
        self._check_parts()
        model = architecture.build(self.noise.at("weights")).to(self.device).compiled()
        self.state = State(model, self.optimizer(model), _copy(model))
        self.stepper = self.stepping(model, self.state.optimizer)
        self.unseen: list[Climbed] = []
        self.refit: Refit | None = None
        """The polish, while there is one."""
        self.polish_seconds = 0.0
        self.since, self.ledger = replace(self.state), ""
        self.clock = self.saved = time.monotonic()

    @property
    def steps(self) -> int:
        """How many steps the recipe allows."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or validation has stopped improving."""
        recipe, done = self.recipe, self.state.validated
        annealing = recipe.anneal_epochs if recipe.last_objective.annealed else 0
        settled = max(recipe.begun(recipe.epochs) + annealing, recipe.warm_up_epochs)
        waited = done - max(self.state.best_epoch + 1, settled)
        return done >= recipe.epochs or waited >= recipe.patience

    @property
    def validating(self) -> bool:
        """Whether the steps of an epoch are done and its validation is not."""
        return self.state.step >= (self.state.validated + 1) * self.steps_per_epoch

    @property
    def due(self) -> bool:
        """Whether the state was last saved so long ago that it should be saved now."""
        return time.monotonic() - self.saved >= SAVE_EVERY

    def begin(self) -> None:
        """Makes the folder that of this run, and goes back to its saved state if it has one."""
        if self.team.leads:
            self._begin()
        self.team.wait()
        if not self.team.leads:
            self._restore()
        self.team.wait()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / RECIPE, to_json(self.asked).encode())
        known = (self.folder / STATE).exists()
        if known:
            self._restore()
        path = self.folder / LEDGER
        self.ledger = path.read_text() if path.exists() else ""
        # A kill may have come between the state and its line: the work goes to the next one.
        entries = [json.loads(line) for line in self.ledger.splitlines()]
        self.since = replace(
            self.state,
            step=min(entries[-1]["to_step"] if entries else 0, self.state.step),
            seconds=sum((entry["seconds"] for entry in entries), 0.0),
        )
        if not known:
            self._write_state()
        kept = "".join(_line(metrics) for metrics in self.history())
        _write(self.folder / METRICS, kept.encode())
        for stray in self.folder.glob(f".{CHECKPOINT}-*"):
            shutil.rmtree(stray)
        if self.state.best_epoch >= 0:
            self.up_to_date_card()

    def rest(self) -> Iterator[Metrics | None]:
        """What is left to do, in parts after each of which the run may be saved and left.

        Gives an epoch's metrics at its end.
        """
        while not self.finished:
            if self.validating:
                yield (yield from self.end_epoch())
            else:
                self.step()
                yield None

    @property
    def polished(self) -> bool:
        """Whether the checkpoint is what it is to be in the end."""
        steps = self.recipe.polish_steps
        return not steps or self.up_to_date_card().training.get("polish_steps") == steps

    def polish(self) -> Iterator[int]:
        """Trains the best model's encoder on the model's completions, and writes the checkpoint.

        Gives how many steps were taken after each of them: there it may be saved and left, and
        goes on later. Nothing is done if it is done or the recipe has no steps of it.
        """
        if not self.team.leads:
            return
        if not self.polished:
            yield from self._polish()
        (self.folder / POLISH).unlink(missing_ok=True)

    def _polish(self) -> Iterator[int]:
        refit, self.clock = self._refit(), time.monotonic()
        self.refit = refit
        while refit.taken < refit.steps:
            with products(self.recipe.precision, self.device):
                refit.step()
            yield refit.taken
        self.save()
        self.refit = None
        done = {"polish_steps": refit.steps, "polish_seconds": round(self.polish_seconds)}
        card = self.card()
        card = replace(card, training={**card.training, **done})
        checkpoint.write(self.folder / CHECKPOINT, Checkpoint(refit.model.cpu(), card))

    def _refit(self) -> Refit:
        """The polish of the best model, from where it was saved."""
        size = self.recipe.batch
        self.train.turn_to(self.state.validated - 1)

        def batch(noise: Noise) -> Incomplete:
            generator = noise.at("polish").generator()
            return self.train.batch(
                torch.randint(len(self.train), (size,), generator=generator), noise
            )

        refit = polish(
            self.best_model().to(self.device).compiled(),
            self.recipe.last_objective,
            batch,
            self.noise.at("polish"),
            steps=self.recipe.polish_steps,
        )
        if (self.folder / POLISH).exists():
            place, parts = self._read(POLISH)
            refit.taken, self.polish_seconds = place["taken"], place["seconds"]
            refit.model.load_state_dict(parts["model"], strict=False)
            give_moments(refit.optimizer, parts["adam"])
        return refit

    def _write_polish(self, refit: Refit) -> None:
        self.polish_seconds += self._elapsed()
        tensors = {f"model.{name}": weight for name, weight in refit.trained.items()}
        place = {"taken": refit.taken, "seconds": self.polish_seconds}
        self._keep(POLISH, {**tensors, **_kept(refit.optimizer)}, place)
        _write(self.folder / LEDGER, (self.ledger + self._entry()).encode())

    def step(self) -> None:
        """One step of training."""
        self.stepped(self.stepper.take(self.ask(), self.learning_rate))

    def optimizer(self, model: LatentVariableModel) -> torch.optim.Optimizer:
        """What takes the recipe's steps with a model's weights."""
        recipe = self.recipe
        return optimizer(
            model,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            name=recipe.optimizer,
        )

    def stepping(self, model: LatentVariableModel, optimizer: torch.optim.Optimizer) -> Stepper:
        """What takes the recipe's steps."""
        recipe = self.recipe
        return Stepper(
            model,
            optimizer,
            particles=recipe.particles,
            precision=recipe.precision,
            team=self.team,
        )

    @property
    def epoch(self) -> int:
        """That of the next step."""
        return self.state.step // self.steps_per_epoch

    def ask(self) -> Asked:
        """What the next step is taken with."""
        batch, epoch = self.recipe.batch, self.epoch
        self.train.turn_to(epoch)
        place = self.state.step % self.steps_per_epoch
        index = self.train.order[place * batch : (place + 1) * batch]
        mine, noise = self.team.part(index), self._own(self.noise.at("step", self.state.step))
        return Asked(
            objective=self.recipe.objective_in(epoch),
            images=self.train.batch(mine, noise),
            noises=(noise,),
            alpha=self.alpha(epoch),
            warmth=self.warmth(epoch),
            share=len(mine) / len(index),
        )

    def stepped(self, saw: Climbed) -> None:
        """Counts a step that was taken."""
        self.unseen.append(saw)
        self.state.step += 1
        if len(self.unseen) >= LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Adds up the bounds of the last steps, which had not left the device.

        Raises:
            Diverged: One of them is not a finite number.
        """
        first = self.state.step - len(self.unseen)
        seen = [torch.stack([c.bound, c.elbo_variance, c.q_hat_variance]) for c in self.unseen]
        of_team = self.team.total(torch.stack(seen)) / self.team.size if seen else torch.empty(0)
        numbers: list[list[float]] = of_team.tolist()
        self.unseen.clear()
        for step, of_step in enumerate(numbers, start=first + 1):
            if not math.isfinite(of_step[0]):
                raise self._diverged("objective", step)
            bound, elbo, q_hat = (s + n for s, n in zip(self.state.sums, of_step, strict=True))
            self.state.sums = (bound, elbo, q_hat)

    def alpha(self, epoch: int) -> float:
        """The share of Q̂ in the M-step: from 0 to 1 over an annealed objective's first epochs."""
        recipe = self.recipe
        if not (recipe.anneal_epochs and recipe.objective_in(epoch).annealed):
            return 1.0
        return min(1.0, (epoch - recipe.begun(epoch)) / recipe.anneal_epochs)

    def warmth(self, epoch: int) -> float:
        """The part of the latents' cost that counts: from nothing to all over the first epochs."""
        until = self.recipe.warm_up_epochs
        return min(1.0, (epoch + 1) / until) if until else 1.0

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        if self.recipe.schedule == "constant":
            return self.recipe.learning_rate
        done = self.state.step / self.steps
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def validate(self) -> Stages[float]:
        """The objective's bound on the observed pixels of the held-out incomplete images."""
        recipe, model = self.recipe, self.state.model
        sums: list[Tensor] = []
        count, batch, team = len(self.validation), recipe.batch, self.team
        for first in range(0, count, batch * team.size):
            start = first + team.rank * batch
            noise = self.noise.at("validate", start)
            if start < count:
                images = self.validation.batch(slice(start, start + batch), noise)
                with products(recipe.precision, self.device):
                    bounds = bound(
                        recipe.last_objective, model, images, noise, particles=recipe.particles
                    )
                sums.append(bounds.sum())
            yield
        mine = torch.tensor([sum(torch.stack(sums).tolist()) if sums else 0.0]).double()
        return team.total(mine).item() / count

    def end_epoch(self) -> Stages[Metrics]:
        """Validates, keeps the best model, and writes everything down; returns the metrics."""
        self.look()
        state, epoch = self.state, self.state.validated
        found = yield from self.validate()
        if not math.isfinite(found):
            raise self._diverged("validation bound", state.step)
        if found > state.best_bound:
            state.best_bound, state.best_epoch, state.best = found, epoch, _copy(state.model)
        self.state.seconds += self._elapsed()
        metrics = Metrics(
            epoch=epoch,
            step=state.step,
            train_bound=state.sums[0] / self.steps_per_epoch,
            validation_bound=found,
            best_epoch=state.best_epoch,
            alpha=self.alpha(epoch),
            elbo_variance=state.sums[1] / self.steps_per_epoch,
            q_hat_variance=state.sums[2] / self.steps_per_epoch,
            seconds=round(state.seconds, 1),
        )
        state.sums, state.validated = (0.0, 0.0, 0.0), epoch + 1
        if self.team.leads:
            _append(self.folder / METRICS, _line(metrics))
        self.save()
        if self.team.leads and state.best_epoch == epoch:
            self.write_checkpoint()
        return metrics

    def history(self) -> list[Metrics]:
        """The metrics of the epochs that the state knows of."""
        path = self.folder / METRICS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        written = [Metrics(**json.loads(line)) for line in lines if line.endswith("\n")]
        return [metrics for metrics in written if metrics.epoch < self.state.validated]

    def save(self) -> None:
        """Writes the state, as a whole or not at all.

        Raises:
            Diverged: It has a number that is not finite; the state that was saved before stays.
        """
        if self.refit is not None:
            self._write_polish(self.refit)
        else:
            self.look()
            if self.team.leads:
                self._write_state()
        self.saved = time.monotonic()

    def _write_state(self) -> None:
        self.state.seconds += self._elapsed()
        state = self.state
        tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in state.best.items()}
        place = {name: getattr(state, name) for name in PLACE}
        place["data"] = self.images
        self._keep(STATE, {**tensors, **_kept(state.optimizer)}, place)
        _write(self.folder / LEDGER, (self.ledger + self._entry()).encode())

    def _keep(self, file: str, tensors: dict[str, Tensor], place: dict[str, Any]) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise self._diverged("model", self.state.step)
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        _write(self.folder / file, save(contiguous, {"place": json.dumps(place)}))

    def write_checkpoint(self) -> Card:
        """Replaces the checkpoint by the best model so far; returns its card."""
        return checkpoint.write(
            self.folder / CHECKPOINT, Checkpoint(self.best_model(), self.card())
        )

    def best_model(self) -> LatentVariableModel:
        """The best model so far, by validation."""
        model = self.recipe.architecture.build(Noise(0))
        model.load_state_dict({name: tensor.cpu() for name, tensor in self.state.best.items()})
        return model

    def up_to_date_card(self) -> Card:
        """The best model's card, which is written anew where it is not of this state."""
        try:
            card = checkpoint.read_card(self.folder / CHECKPOINT)
        except CheckpointError:
            return self.write_checkpoint()
        known = (card.training.get("epochs"), card.training.get("best_epoch"))
        if known == (self.state.validated, self.state.best_epoch):
            return card
        return self.write_checkpoint()

    def card(self) -> Card:
        """What there is to say of the best model so far."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "architecture"}
        drawn = "drawn anew every epoch" if self.recipe.redraw else "drawn once"
        return Card(
            name=self.folder.resolve().name,
            architecture=self.recipe.architecture,
            binarise=self.recipe.binarise,
            objective=self.recipe.objective,
            missing=f"{self.recipe.missing}, {drawn}",
            recipe=recipe,
            data=self.dataset.described(),
            training={
                "epochs": self.state.validated,
                "best_epoch": self.state.best_epoch,
                "validation_bound": round(self.state.best_bound, 4),
                "seconds": round(self.state.seconds),
                **provenance(self.device),
            },
        )

    def _own(self, noise: Noise) -> Noise:
        """The noise of this process, which alone has that of the recipe."""
        return noise if self.team.size == 1 else noise.at("rank", self.team.rank)

    def _check_parts(self) -> None:
        smallest = len(self.train) % self.recipe.batch or self.recipe.batch
        if smallest < self.team.size:
            raise RecipeError(
                f"Expected a batch with an image for each of {self.team.size} processes; "
                f"got one of {smallest}."
            )

    def _split(self, name: str) -> Split:
        return self.dataset.split(
            name,
            missing=self.recipe.missing,
            redraw=self.recipe.redraw,
            binarise=self.recipe.binarise,
            noise=self.noise.at(name),
            device=self.device,
        )

    def _read(self, file: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Where it was, and the tensors of each part by their names in it."""
        parts, path = defaultdict[str, dict[str, Tensor]](dict), self.folder / file
        try:
            with safe_open(path, "pt", device=str(self.device)) as saved:
                place = json.loads(saved.metadata()["place"])
                for name in saved.keys():  # noqa: SIM118  # it is no dict, and cannot be iterated
                    part, _, rest = name.partition(".")
                    parts[part][rest] = saved.get_tensor(name)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"Expected the state of a run in {path}; got: {error}.") from error
        return place, parts

    def _restore(self) -> None:
        place, parts = self._read(STATE)
        if place.get("data", self.images) != self.images:
            raise RecipeError(
                f"Expected the images and masks that the run in {self.folder} began with, of "
                f"sha256 {place['data']}; got others from {self.recipe.data} and "
                f"{self.recipe.missing}, of {self.images}."
            )
        give_moments(self.state.optimizer, parts["adam"])
        self.state.model.load_state_dict(parts["model"])
        self.state.best = parts["best"]
        # Version 0.1.0 saved at an epoch's end only after it was validated, and did not say so.
        place.setdefault("validated", place["step"] // self.steps_per_epoch)
        place.setdefault("sums", (place.get("bound_sum"), 0.0, 0.0))
        for name in PLACE:
            value = place[name]
            setattr(self.state, name, tuple(value) if isinstance(value, list) else value)

    def _entry(self) -> str:
        """What was done since this run was begun, for the ledger."""
        entry = {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "from_step": self.since.step,
            "to_step": self.state.step,
            "seconds": round(self.state.seconds + self.polish_seconds - self.since.seconds, 1),
        }
        if self.refit is not None:
            entry["polish_steps"] = self.refit.taken
        return json.dumps(entry) + "\n"

    def _elapsed(self) -> float:
        """Seconds since it was last asked."""
        before, self.clock = self.clock, time.monotonic()
        return self.clock - before

    def _diverged(self, what: str, step: int) -> Diverged:
        return Diverged(
            f"The {what} is not a finite number after step {step} "
            f"(epoch {math.ceil(step / self.steps_per_epoch)}). The last good state is kept in "
            f"{self.folder}; a smaller learning_rate is the usual cure."
        )


def _kept(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its moments as they are called in a state, whichever optimiser it is."""
    return {f"adam.{name}": moment for name, moment in moments(optimizer).items()}


def _line(metrics: Metrics) -> str:
    return json.dumps(asdict(metrics)) + "\n"


def _write(path: Path, content: bytes) -> None:
    """Puts a file in its place once the disk has it: not even a power cut tears it."""
    fresh = path.with_name(f".{path.name}")
    to_disk(fresh, content)
    fresh.replace(path)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _copy(model: LatentVariableModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _content(dataset: Dataset, missing: str) -> str:
    """A hash of all that a run reads: the images, and their masks where these are a file."""
    kind, _, path = missing.partition(":")
    if kind != "file":
        return dataset.sha256
    return hashlib.sha256(dataset.sha256.encode() + Path(path).read_bytes()).hexdigest()


def _pick(device: str) -> torch.device:
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=automatic if device == "auto" else device).device
    except (RuntimeError, AssertionError) as error:  # the latter, where torch has no CUDA at all
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"Expected a device of this machine; got {device!r}: {reason}"
        ) from error
