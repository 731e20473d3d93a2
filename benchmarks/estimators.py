"""Estimates of log p(x_o) side by side: how far each is from the referee's, and what it takes.

The referee is annealed importance sampling at many times the temperatures of high quality.
Images come one at a time, as in the service, and the sides take turns on each of them.
The gap is that between the first side and the referee, and closed is a side's part of it; where
it is less than two standard errors there is none to close.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model import checkpoint
from model.estimators import QUALITIES, Quality, estimate
from model.evaluate import examples, hide
from model.latent import LatentVariableModel
from model.likelihood import Estimate
from model.masks import Incomplete
from model.noise import NoisePerImage
from model.stages import finish

FIRST = "standard"
SIDES = {
    FIRST: (QUALITIES["standard"], 1000),
    "standard, K = 5000": (QUALITIES["standard"], 5000),
    "fast": (QUALITIES["fast"], 1000),
    "own, K = 5000": (Quality("importance", "own"), 5000),
    "semi-amortised": (Quality("importance", "semi-amortised"), 1000),
    "jackknife": (Quality("jackknife", "laplace"), 1000),
    "adaptive": (Quality("adaptive", "laplace"), 1000),
    "high": (QUALITIES["high"], 1000),
}
REFEREE = "referee"
SIGNIFICANT = 2.0
"""Standard errors that a gap is wide, or else there is none."""


@dataclass
class Side:
    """What an estimator gave for every image."""

    values: list[float] = field(default_factory=list)
    reliable: list[bool] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, found: Estimate, seconds: float) -> None:
        """One more image."""
        self.values.append(found.value.item())
        self.reliable.append(bool(found.reliable.item()))
        self.sizes.append(found.effective_sample_size.item())
        self.seconds.append(seconds)


def main() -> None:
    """Prints a table for each mask."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--images", type=int, default=100)
    options.add_argument("--missing", nargs="+", default=["none", "patches:3", "patches:6"])
    options.add_argument("--referee", type=int, default=10_000, help="particles of the referee")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--seed", type=int, default=0)
    said = options.parse_args()
    torch.set_num_threads(said.threads)

    read = checkpoint.read(said.checkpoint)
    truth = examples(read.card, said.seed)[: said.images]
    sides = {**SIDES, REFEREE: (QUALITIES["high"], said.referee)}
    for spec in said.missing:
        title = f"{read.card.name}, {spec}, {said.images} images, {said.threads} threads"
        images = hide(truth, spec, said.seed)
        Console().print(_table(title, _measured(read.model.compiled(), images, sides, said.seed)))


def _measured(
    model: LatentVariableModel,
    images: Incomplete,
    sides: dict[str, tuple[Quality, int]],
    seed: int,
) -> dict[str, Side]:
    found: dict[str, Side] = defaultdict(Side)

    def timed(index: int, quality: Quality, particles: int) -> tuple[Estimate, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            stages = estimate(
                model,
                images[index : index + 1],
                NoisePerImage.of(seed, [index]),
                estimator=quality.estimator,
                particles=particles,
                proposal=quality.proposal,
            )
            return finish(stages), time.perf_counter() - start

    for quality, particles in sides.values():
        timed(0, quality, particles)  # what is compiled or loaded at its first use
    for index in track(range(len(images)), "images", console=Console(stderr=True)):
        for name, (quality, particles) in sides.items():
            found[name].add(*timed(index, quality, particles))
    return found


def _table(title: str, sides: dict[str, Side]) -> Table:
    table = Table(
        "", "log p", "gap to the referee", "closed", "reliable", "ESS", "ms an image", "times",
        title=title, title_justify="left",
    )  # fmt: skip
    first, referee = sides[FIRST], sides[REFEREE]
    whole, error = _mean_error(_gaps(first, referee))
    wide = whole > SIGNIFICANT * error
    for name, side in sides.items():
        gap, its_error = _mean_error(_gaps(side, referee))
        milliseconds, base = (1000 * _median(s.seconds) for s in (side, first))
        table.add_row(
            name,
            f"{sum(side.values) / len(side.values):.2f}",
            f"{gap:.3f} ± {its_error:.3f}",
            "" if name in (FIRST, REFEREE) else f"{1 - gap / whole:.0%}" if wide else "no gap",
            f"{sum(side.reliable) / len(side.reliable):.0%}",
            f"{_median(side.sizes):.0f}",
            f"{milliseconds:.0f}",
            f"{milliseconds / base:.1f}",
        )
    return table


def _gaps(side: Side, referee: Side) -> list[float]:
    return [r - v for r, v in zip(referee.values, side.values, strict=True)]


def _mean_error(values: Sequence[float]) -> tuple[float, float]:
    several = torch.tensor(values, dtype=torch.float64)
    return several.mean().item(), (several.std() / len(several) ** 0.5).item()


def _median(values: Sequence[float]) -> float:
    return torch.tensor(values).median().item()


if __name__ == "__main__":
    main()
