r"""Training: incomplete images and a recipe become a checkpoint.

A run is a folder that continues from wherever it was stopped:

    recipe.json            what was asked for
    state.safetensors      weights, Adam's moments, the best weights so far, and where the run is
    metrics.jsonl          a line an epoch
    tensorboard/           the same curves
    checkpoint/            the best model so far, by validation on observed pixels

All that is drawn in a step comes from `Noise(seed).at("step", step)`, so the state needs no
generator and a run that was killed anywhere ends in the same weights as one that was not.
"""

import hashlib
import json
import math
import platform
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import checkpoint, data
from model.checkpoint import Card, Checkpoint
from model.latent import Architecture, LatentVariableModel
from model.masks import Incomplete, mechanism
from model.noise import Noise
from model.objectives import OBJECTIVES, P_STEPS, ascend

__all__ = ["Diverged", "Interrupted", "Recipe", "RecipeError", "read_recipe", "train"]


class RecipeError(ValueError):
    """A recipe that cannot be followed."""


class Diverged(RuntimeError):
    """The bound is no longer a finite number."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved its state."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a checkpoint is made; the defaults are the protocol of the slides."""

    data: str = "static-mnist"
    missing: str = "none"
    redraw: bool = False
    """Whether each image's mask is drawn anew every epoch rather than once."""
    binarise: str = "threshold"
    """threshold: above 127 is one; bernoulli: drawn anew in every batch from the grey level."""
    objective: str = "miss-iwem"
    p_step: str = "slides"
    particles: int = 50
    imputations: int = 1
    architecture: Architecture = field(default_factory=Architecture)
    batch: int = 100
    epochs: int = 1500
    learning_rate: float = 3e-4
    schedule: str = "constant"
    """constant, or cosine: down to zero at the last epoch."""
    anneal_epochs: int = 100
    patience: int = 50
    precision: str = "highest"
    """Of matrix products: highest (fp32), high (TF32) or medium (bf16 products, fp32 sums)."""
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("p_step", self.p_step, P_STEPS)
        _one_of("binarise", self.binarise, ("threshold", "bernoulli"))
        _one_of("schedule", self.schedule, ("constant", "cosine"))
        _one_of("precision", self.precision, ("highest", "high", "medium"))
        for name in ("particles", "imputations", "batch", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise RecipeError(f"Expected {name} of at least 1; got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise RecipeError(f"Expected a positive learning_rate; got {self.learning_rate}.")
        mechanism(self.missing)


def read_recipe(source: str | None, **changes: Any) -> Recipe:
    """The recipe of a TOML file, or one that comes with the package, with some values changed.

    Raises:
        RecipeError: No such recipe, an unknown name in it, or a value out of range.
    """
    raw = tomllib.loads(_recipe_text(source)) if source else {}
    raw |= {name: value for name, value in changes.items() if value is not None}
    known = {f.name for f in fields(Recipe)}
    sizes = {f.name for f in fields(Architecture)}
    if unknown := set(raw) - known - sizes:
        raise RecipeError(f"Expected names of {sorted(known | sizes)}; got {sorted(unknown)}.")
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    architecture = Architecture(**{k: v for k, v in lists.items() if k in sizes})
    settings = {k: v for k, v in lists.items() if k in known}
    return Recipe(**settings, architecture=architecture)


@dataclass
class State:
    """Where a run is; saved whole, so that it goes on from there."""

    model: LatentVariableModel
    optimizer: torch.optim.Adam
    best: dict[str, Tensor]
    step: int = 0
    bound_sum: float = 0.0
    best_bound: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0


class Run:
    """The training of one model in one folder."""

    def __init__(self, folder: Path, recipe: Recipe, *, device: str) -> None:
        self.folder = folder
        self.device = torch.device(_pick(device))
        self.dataset = data.load(recipe.data)
        shape = tuple(self.dataset.train.pixels.shape[1:])
        self.recipe = replace(
            recipe, architecture=replace(recipe.architecture, image_shape=shape)
        )
        self.noise = Noise(recipe.seed)
        self.train = Split(self.dataset.train, self.recipe, self.noise.at("train"), self.device)
        self.validation = Split(
            self.dataset.validation, self.recipe, self.noise.at("validation"), self.device
        )
        self.steps_per_epoch = math.ceil(len(self.train) / recipe.batch)
        self.state = self._begin()

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 0."""
        return self.state.step // self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or validation has stopped improving."""
        waited = self.epoch - max(self.state.best_epoch + 1, self._annealed_until())
        return self.epoch >= self.recipe.epochs or waited >= self.recipe.patience

    def step(self) -> Float[Tensor, ""]:
        """One step of the optimiser; returns the objective's bound on its batch."""
        recipe, state = self.recipe, self.state
        epoch, place = divmod(state.step, self.steps_per_epoch)
        order = self.train.order(epoch)[place * recipe.batch : (place + 1) * recipe.batch]
        noise = self.noise.at("step", state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        state.optimizer.zero_grad()
        bound = ascend(
            OBJECTIVES[recipe.objective],
            state.model,
            self.train.batch(order, epoch, noise),
            noise,
            particles=recipe.particles,
            imputations=recipe.imputations,
            alpha=self.alpha,
        )
        state.optimizer.step()
        state.step += 1
        return bound

    @property
    def alpha(self) -> float:
        """The share of Q̂ in the M-step: from 0 to 1 over the first epochs."""
        return min(1.0, self.epoch / max(1, self._annealed_until()))

    def validate(self) -> float:
        """The objective's bound on the observed pixels of the held-out incomplete images."""
        objective, recipe = OBJECTIVES[self.recipe.objective], self.recipe
        total = 0.0
        for start in range(0, len(self.validation), recipe.batch):
            noise = self.noise.at("validate", start)
            index = torch.arange(start, min(start + recipe.batch, len(self.validation)))
            images = self.validation.batch(index.to(self.device), 0, noise)
            with torch.no_grad():
                model = self.state.model
                proposal = objective.proposal(
                    model, images, noise, imputations=recipe.imputations
                )
                latents = proposal.draw(recipe.particles, noise)
                bound = objective.bound(model.particles(images, proposal, latents))
            total += bound.sum().item()
        return total / len(self.validation)

    def end_epoch(self) -> dict[str, Any]:
        """Validates, keeps the best model, writes the metrics; returns their line."""
        state, epoch = self.state, self.epoch - 1
        bound = self.validate()
        if not math.isfinite(bound):
            raise Diverged(self._divergence("validation bound"))
        if bound > state.best_bound:
            state.best_bound, state.best_epoch = bound, epoch
            state.best = {k: v.clone() for k, v in state.model.state_dict().items()}
        line = {
            "epoch": epoch,
            "step": state.step,
            "train_bound": state.bound_sum / self.steps_per_epoch,
            "validation_bound": bound,
            "best_epoch": state.best_epoch,
            "alpha": min(1.0, epoch / max(1, self._annealed_until())),
            "seconds": round(state.seconds, 1),
        }
        state.bound_sum = 0.0
        self.save()
        with (self.folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(line) + "\n")
        if state.best_epoch == epoch:
            self.write_checkpoint()
        return line

    def save(self) -> None:
        """Writes the state by atomic rename."""
        tensors = {f"model.{k}": v for k, v in self.state.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.state.best.items()}
        for index, moments in self.state.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in moments.items()}
        place = {name: getattr(self.state, name) for name in PLACE}
        fresh = self.folder / ".state.safetensors"
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, fresh, {"place": json.dumps(place)}
        )
        fresh.replace(self.folder / "state.safetensors")

    def resume(self) -> None:
        """Goes back to the saved state, if there is one, and drops metrics written after it."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt", device=str(self.device)) as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            place = json.loads(saved.metadata()["place"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "adam": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.state.model.load_state_dict(parts["model"])
        self.state.best = parts["best"]
        self._load_moments(parts["adam"])
        for name, value in place.items():
            setattr(self.state, name, value)
        self._drop_later_metrics()

    def write_checkpoint(self) -> None:
        """Writes the best model so far with its card."""
        model = self.recipe.architecture.build(Noise(0))
        model.load_state_dict({k: v.cpu() for k, v in self.state.best.items()})
        checkpoint.write(self.folder / "checkpoint", Checkpoint(model, self.card()))

    def card(self) -> Card:
        """The card of the best model so far."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "architecture"}
        drawn = "drawn anew every epoch" if self.recipe.redraw else "drawn once"
        return Card(
            name=self.folder.name,
            architecture=self.recipe.architecture,
            binarise=self.recipe.binarise,
            objective=self.recipe.objective,
            missing=f"{self.recipe.missing}, {drawn}",
            recipe=recipe,
            data={
                "name": self.dataset.name,
                "source": self.dataset.source,
                "sha256": self.dataset.sha256,
                "images": len(self.train),
            },
            training={
                "epochs": self.epoch,
                "best_epoch": self.state.best_epoch,
                "validation_bound": round(self.state.best_bound, 4),
                "seconds": round(self.state.seconds),
                "device": _device_name(self.device),
                "commit": _commit(),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            },
        )

    def _begin(self) -> State:
        model = self.recipe.architecture.build(self.noise.at("weights")).to(self.device)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=self.recipe.learning_rate, fused=True
        )
        return State(model, optimizer, {k: v.clone() for k, v in model.state_dict().items()})

    def _learning_rate(self) -> float:
        if self.recipe.schedule == "constant":
            return self.recipe.learning_rate
        done = self.state.step / (self.recipe.epochs * self.steps_per_epoch)
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _annealed_until(self) -> int:
        return self.recipe.anneal_epochs if OBJECTIVES[self.recipe.objective].annealed else 0

    def _load_moments(self, saved: dict[str, Tensor]) -> None:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = value
        whole = self.state.optimizer.state_dict()
        self.state.optimizer.load_state_dict({**whole, "state": moments})

    def _drop_later_metrics(self) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= self.state.step]
            path.write_text("".join(kept))

    def _divergence(self, what: str) -> str:
        return (
            f"The {what} is not a finite number at step {self.state.step} "
            f"(epoch {self.epoch + 1}). The last good state is kept in {self.folder}; "
            "a smaller learning_rate is the usual cure."
        )


PLACE = ("step", "bound_sum", "best_bound", "best_epoch", "seconds")


class Split:
    """One split of a data set on the device, with the holes that its images have."""

    def __init__(
        self, images: data.Images, recipe: Recipe, noise: Noise, device: torch.device
    ) -> None:
        self.pixels = images.pixels.to(device)
        self.own = None if images.observed is None else images.observed.to(device)
        self.recipe, self.noise, self.device = recipe, noise, device
        self.observed = self._observed(epoch=0)
        self.masks_of = 0

    def __len__(self) -> int:
        return len(self.pixels)

    def order(self, epoch: int) -> Int[Tensor, " count"]:
        """A permutation of the images, another in each epoch."""
        generator = self.noise.at("order", epoch).generator()
        return torch.randperm(len(self), generator=generator).to(self.device)

    def batch(self, index: Int[Tensor, " batch"], epoch: int, noise: Noise) -> Incomplete:
        """The images with these indices, binary and incomplete."""
        if self.recipe.redraw and epoch != self.masks_of:
            self.observed, self.masks_of = self._observed(epoch=epoch), epoch
        grey = self.pixels[index]
        if self.recipe.binarise == "threshold":
            values = (grey > 127).float()
        else:
            like = torch.empty(0, device=self.device)
            drawn = noise.at("binarise").uniform(*grey.shape, like=like)
            values = (drawn * 255 < grey).float()
        return Incomplete.hide(values, self.observed[index])

    def _observed(self, *, epoch: int) -> Tensor:
        shape = tuple(self.pixels.shape[1:])
        generator = self.noise.at("mask", epoch).generator()
        drawn = mechanism(self.recipe.missing)(len(self), shape, generator).to(self.device)
        return drawn if self.own is None else drawn & self.own


def train(
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> Card:
    """Trains until validation stops improving; returns the best model's card.

    Raises:
        RecipeError: The folder holds a run of another recipe, or one that `resume` was not
            asked for.
        Diverged: The bound became NaN or infinite; the last good state is kept.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    _claim(folder, recipe, resume=resume)
    torch.set_float32_matmul_precision(recipe.precision)
    run = Run(folder, recipe, device=device)
    run.resume()
    curves = _curves(folder, run.state.step)
    with _progress(console or Console(stderr=True), run) as show, _stop_signals() as stopping:
        while not run.finished:
            started = time.monotonic()
            bound = run.step().item()
            if not math.isfinite(bound):
                raise Diverged(run._divergence("objective"))
            run.state.bound_sum += bound
            run.state.seconds += time.monotonic() - started
            line = run.end_epoch() if run.state.step % run.steps_per_epoch == 0 else None
            curves(line)
            show(line)
            if stopping:
                run.save()
                raise Interrupted(f"Stopped at step {run.state.step}; go on with --resume.")
    return checkpoint.read_card(folder / "checkpoint")


def _claim(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    path = folder / "recipe.json"
    wanted = json.loads(json.dumps(asdict(recipe)))
    if path.exists():
        if not resume:
            raise RecipeError(f"{folder} already holds a run; add --resume, or name another --out.")
        if (got := json.loads(path.read_text())) != wanted:
            changed = sorted(k for k in wanted if wanted[k] != got.get(k))
            raise RecipeError(f"Expected the recipe of the run in {folder}; got another {changed}.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is filled when the process is asked to stop."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress(console: Console, run: Run) -> Iterator[Callable[[dict[str, Any] | None], None]]:
    """A bar over the steps, and a line an epoch."""
    steps = run.recipe.epochs * run.steps_per_epoch
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.speed:.1f} steps/s" if False else "{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    first, started = run.state.step, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, completed=first, epoch=run.epoch + 1, rate="")

        def show(line: dict[str, Any] | None) -> None:
            rate = (run.state.step - first) / (time.monotonic() - started)
            progress.update(
                task, completed=run.state.step, epoch=run.epoch + 1, rate=f"{rate:.1f} steps/s"
            )
            if line:
                console.print(
                    f"epoch {line['epoch'] + 1}: bound {line['train_bound']:.2f}, "
                    f"validation {line['validation_bound']:.2f} "
                    f"(best in epoch {line['best_epoch'] + 1}), {rate:.1f} steps/s",
                    highlight=False,
                )

        yield show


def _curves(folder: Path, step: int) -> Callable[[dict[str, Any] | None], None]:
    """Writes an epoch's numbers to TensorBoard, where that is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError:
        return lambda _line: None
    writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def write(line: dict[str, Any] | None) -> None:
        for name in ("train_bound", "validation_bound", "alpha") if line else ():
            writer.add_scalar(name, line[name], line["step"])
        if line:
            writer.flush()

    return write


def _recipe_text(source: str) -> str:
    shipped = resources.files("model") / "recipes" / f"{source}.toml"
    path = Path(source)
    if path.suffix == ".toml" and path.is_file():
        return path.read_text()
    if path.name == source and shipped.is_file():
        return shipped.read_text()
    names = sorted(
        r.name.removesuffix(".toml")
        for r in (resources.files("model") / "recipes").iterdir()
        if r.name.endswith(".toml")
    )
    raise RecipeError(f"Expected a .toml file or a recipe of {names}; got {source!r}.")


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise RecipeError(f"Expected {name} of {', '.join(known)}; got {value!r}.")


def _pick(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    source = Path(__file__).parent
    asked = subprocess.run(
        [git, "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"
