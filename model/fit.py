"""Factor analysis, or principal component analysis, of a data set as a checkpoint.

It is fitted by EM to the grey levels from 0 to 1 that are observed, in closed form, and served
like any model: every log p(x_o) is exact, and its completions are linear ones to compare with.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model import checkpoint, data
from model.checkpoint import Card, Checkpoint, provenance
from model.data import Dataset
from model.factor_analysis import FactorAnalysis
from model.factor_analysis import fit as climb
from model.latent import Architecture, LatentVariableModel
from model.masks import Incomplete
from model.networks import LinearDecoder
from model.noise import Noise
from model.pixels import GaussianPixels

__all__ = ["Fit", "fit"]

BATCH = 1000
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What is fitted to what."""

    data: str = "static-mnist"
    """A data set's name, a .npz file or a folder of PNG images."""
    missing: str = "none"
    """Which pixels the images lack beside their own holes, drawn once, such as patches:3."""
    latent: int = 40
    isotropic: bool = False
    """Whether all pixels have the same noise: principal component analysis."""
    iterations: int = 100
    tolerance: float = 0.01
    """Nats of an image by which log p(x_o) must still grow in an iteration."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latent", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of at least 1; got {getattr(self, name)}.")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"Expected a finite tolerance of at least 0; got {self.tolerance}.")


def fit(folder: Path, asked: Fit, *, console: Console | None = None) -> Card:
    """Fits and writes the checkpoint into a new folder; returns its card.

    Raises:
        DataError: There are no such data, or nothing of them is observed.
        MechanismError: There is no such missingness.
        ValueError: The folder is there already.
        OSError: It cannot be made.
    """
    if folder.exists():
        raise ValueError(f"Expected a new folder for the checkpoint; got {folder}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    dataset = data.load(asked.data)
    train, validation = (_batches(asked, dataset, part) for part in ("train", "validation"))
    with _progress(asked, console or Console(stderr=True)) as progress:
        found, history = climb(
            train,
            asked.latent,
            iterations=asked.iterations,
            isotropic=asked.isotropic,
            tolerance=asked.tolerance,
            noise=Noise(asked.seed).at("fit"),
            watch=lambda value: progress.update(
                progress.task_ids[0], advance=1, value=f"{value:.2f} nats"
            ),
        )
    channels, height, width = dataset.train.pixels.shape[1:]
    model = as_model(found, (channels, height, width))
    scores = torch.cat([found.log_likelihood(batch) for batch in validation])
    card = Card(
        name=folder.resolve().name,
        architecture=model.architecture,
        binarise="none",
        objective="ppca" if asked.isotropic else "factor-analysis",
        missing=f"{asked.missing}, drawn once",
        recipe=vars(asked).copy(),
        data=dataset.described(),
        training={
            "epochs": len(history) - 1,
            "best_epoch": len(history) - 2,
            "train_bound": round(history[-1], 4),
            "validation_bound": round(scores.mean().item(), 4),
            "seconds": round(time.monotonic() - started),
            **provenance(CPU),
        },
    )
    return checkpoint.write(folder, Checkpoint(model, card))


def as_model(found: FactorAnalysis, image_shape: tuple[int, int, int]) -> LatentVariableModel:
    """The member of the family with these parameters, in single precision."""
    architecture = Architecture(
        image_shape=image_shape,
        latent=found.loadings.shape[1],
        hidden=(),
        encoder="exact",
        decoder="linear",
        likelihood="gaussian",
    )
    model = architecture.build(Noise(0)).requires_grad_(requires_grad=False)
    assert isinstance(model.decoder, LinearDecoder)
    assert isinstance(model.likelihood, GaussianPixels)
    model.decoder.layer.weight.copy_(found.loadings)
    model.decoder.layer.bias.copy_(found.offset)
    model.likelihood.log_std.copy_(0.5 * found.variance.log().view(image_shape))
    return model


def _batches(asked: Fit, dataset: Dataset, part: str) -> list[Incomplete]:
    split = dataset.split(
        part,
        missing=asked.missing,
        redraw=False,
        binarise="none",
        noise=Noise(asked.seed).at(part),
        device=CPU,
    )
    starts = range(0, len(split), BATCH)
    return [split.batch(slice(at, at + BATCH), Noise(asked.seed)) for at in starts]


def _progress(asked: Fit, console: Console) -> Progress:
    progress = Progress(
        TextColumn("iteration"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    progress.add_task("", total=asked.iterations + 1, value="")
    return progress
