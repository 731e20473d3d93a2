r"""Filling in a checkpoint's card: how good the model is on test images, and what it does.

Two scores, each with what it was measured with (METHOD: never one without the other's name):

- `raw`: log p(x) of complete test images, with the encoder's own proposal;
- `predictive`: log p(x_m | x_o) of the pixels that a mask hides, as the service computes it.
  It is a normalised distribution over $x_m$, so that no bad proposal can flatter it.

The masks of the second go from the one that was trained on to kinds that were never seen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor

from model import checkpoint, data
from model.checkpoint import Card, Checkpoint
from model.imputation import Completions, impute
from model.likelihood import Estimate, Scores, finish, score
from model.masks import Incomplete, mechanism
from model.noise import Noise, NoisePerImage

__all__ = ["MASKS", "evaluate", "picture"]

MASKS = ("patches:3", "patches:6", "block:14", "half", "strokes:3", "mcar:0.5")
CHUNK = 10
"""Images that are worked on together: their blocks fill the processor's caches, not more."""


def evaluate(
    folder: Path,
    *,
    images: int = 1000,
    particles: int = 1000,
    raw_images: int | None = None,
    raw_particles: int = 5000,
    masks: Sequence[str] = MASKS,
    seed: int = 0,
    console: Console | None = None,
) -> Card:
    """Measures a checkpoint on its data set's test images and writes the results into its card.

    Raises:
        CheckpointError: The folder holds no checkpoint.
        DataError: The data set is not there.
    """
    read = checkpoint.read(folder)
    truth = _test_images(read.card, seed)
    show = console or Console(stderr=True)
    results = {
        "raw": _raw(read, truth[:raw_images], particles=raw_particles, seed=seed, show=show),
        "predictive": [
            _predictive(read, truth[:images], spec, proposal, particles, seed, show)
            for proposal in ("adapted", "own")
            for spec in (masks if proposal == "adapted" else masks[:2])
        ],
    }
    return checkpoint.write(folder, replace(read, card=replace(read.card, results=results)))


def picture(
    folder: Path,
    path: Path,
    *,
    missing: str = "patches:3",
    images: int = 10,
    draws: int = 5,
    ambiguous: bool = False,
    particles: int = 1000,
    seed: int = 0,
) -> None:
    """Writes a PNG with a column an image: the truth, what was seen, the mean, and draws.

    With `ambiguous` they are those of 200 test images whose draws differ most.
    """
    read = checkpoint.read(folder)
    truth = _test_images(read.card, seed)[: 200 if ambiguous else images]
    hidden = _hide(truth, missing, seed)
    parts = [
        finish(
            impute(
                read.model,
                hidden[index : index + 1],
                NoisePerImage.of(seed, [index]),
                particles=particles,
                draws=draws,
            )
        )
        for index in range(len(truth))
    ]
    chosen = _most_varied(parts)[:images] if ambiguous else list(range(images))
    columns = [
        torch.cat(
            [
                truth[index],
                torch.where(hidden.observed[index], truth[index], 0.5),
                parts[index].mean[0],
                parts[index].draws[0, :, 0],
            ]
        )
        for index in chosen
    ]
    data.save_picture(path, torch.stack(columns, 1), upscale=2)


def _raw(
    read: Checkpoint, truth: Tensor, *, particles: int, seed: int, show: Console
) -> dict[str, Any]:
    """Log p(x) of complete images, by the encoder's own proposal."""

    def work(index: Int[Tensor, " chunk"]) -> Scores:
        images = Incomplete.complete(truth[index])
        noise = NoisePerImage.of(seed, index.tolist())
        return finish(score(read.model, images, noise, particles=particles, proposal="own"))

    scores = [s.log_likelihood for s in _in_chunks(work, len(truth), "raw", show)]
    return {
        "what": "test log p(x) of complete images, nats an image",
        **_summary(scores),
        "particles": particles,
        "proposal": "own",
        "estimator": scores[0].estimator,
        "seed": seed,
    }


def _predictive(
    read: Checkpoint,
    truth: Tensor,
    spec: str,
    proposal: str,
    particles: int,
    seed: int,
    show: Console,
) -> dict[str, Any]:
    """Log p(x_m | x_o) of what a mask hides."""
    hidden = _hide(truth, spec, seed)

    def work(index: Int[Tensor, " chunk"]) -> Scores:
        noise = NoisePerImage.of(seed, index.tolist())
        stages = score(
            read.model,
            hidden[index],
            noise,
            particles=particles,
            proposal=proposal,
            truth=truth[index],
        )
        return finish(stages)

    scores = list(_in_chunks(work, len(truth), f"{spec}, {proposal}", show))
    conditional = [s.conditional for s in scores if s.conditional is not None]
    missing = (~hidden.observed).sum().item() / len(truth)
    summary = _summary(conditional)
    return {
        "what": "test log p(x_m | x_o), nats an image",
        "mask": spec,
        "missing_pixels": round(missing, 1),
        **summary,
        "nats_per_missing_pixel": round(summary["mean"] / missing, 4),
        "particles": particles,
        "proposal": proposal,
        "estimator": conditional[0].estimator,
        "seed": seed,
    }


def _summary(estimates: Sequence[Estimate]) -> dict[str, Any]:
    value = torch.cat([e.value for e in estimates])
    sizes = torch.cat([e.effective_sample_size for e in estimates])
    reliable = torch.cat([e.reliable for e in estimates])
    return {
        "images": len(value),
        "mean": round(value.mean().item(), 3),
        "standard_error": round((value.std() / len(value) ** 0.5).item(), 3),
        "median_effective_sample_size": round(sizes.median().item(), 1),
        "reliable_share": round(reliable.double().mean().item(), 3),
    }


def _in_chunks(
    work: Callable[[Int[Tensor, " chunk"]], Scores], count: int, title: str, show: Console
) -> Iterator[Scores]:
    chunks = torch.arange(count).split(CHUNK)
    with torch.inference_mode():
        for index in track(chunks, title, console=show, disable=not show.is_terminal):
            yield work(index)


def _test_images(card: Card, seed: int) -> Float[Tensor, "count channels height width"]:
    """The test images in an order drawn by the seed: files are often sorted by class."""
    pixels = data.load(card.data["name"]).test.pixels
    order = torch.randperm(len(pixels), generator=Noise(seed).at("test").generator())
    grey = pixels[order].float()
    if card.binarise == "threshold":
        return (grey > THRESHOLD).float()
    drawn = Noise(seed).at("binarise").uniform(*grey.shape, like=grey)
    return (drawn * 255 < grey).float()


THRESHOLD = 127


def _hide(truth: Tensor, spec: str, seed: int) -> Incomplete:
    shape = (truth.shape[1], truth.shape[2], truth.shape[3])
    generator = Noise(seed).at("mask", spec).generator()
    return Incomplete.hide(truth, mechanism(spec)(len(truth), shape, generator))


def _most_varied(parts: Sequence[Completions]) -> list[int]:
    spread = torch.stack([part.draws[0].var(0).sum() for part in parts])
    return spread.argsort(descending=True).tolist()
