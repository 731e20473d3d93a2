r"""Filling in a checkpoint's card: how good the model is on test images, and what it does.

Three scores, each with what it was measured with:

- `raw`: log p(x) of complete test images, with the encoder's own proposal;
- `tight`: the same with an encoder that was refitted on these images, the decoder as it was;
- `predictive`: log p(x_m | x_o) of the pixels that a mask hides, as the service computes it.
  It is a normalised distribution over $x_m$, so that no bad proposal can flatter it.

The masks of the last go from the one that was trained on to kinds that were never seen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from model import checkpoint, data
from model.checkpoint import Card, Checkpoint
from model.imputation import Completions, impute
from model.latent import LatentVariableModel
from model.likelihood import Estimate, Scores, Stages, finish, score
from model.masks import Incomplete, mechanism
from model.noise import Noise, NoisePerImage
from model.refit import BATCH, tightened

__all__ = ["CHUNK", "MASKS", "evaluate", "hide", "in_chunks", "picture", "test_images"]

T = TypeVar("T")
MASKS = ("patches:3", "patches:6", "block:14", "half", "strokes:3", "mcar:0.5")
REFIT_EPOCHS = 20
"""How often the images pass by an encoder that is refitted for them."""
SERVED = "laplace"
"""The proposal of the service's answers."""
CHUNK = 16
"""Images that are worked on together: their blocks fill the processor's caches, not more."""


def evaluate(
    folder: Path,
    *,
    scores: Sequence[str] = ("raw", "predictive"),
    images: int = 1000,
    particles: int = 1000,
    raw_images: int | None = None,
    raw_particles: int = 5000,
    masks: Sequence[str] = MASKS,
    seed: int = 0,
    console: Console | None = None,
) -> Card:
    """Measures a checkpoint on its data set's test images and writes the results into its card.

    Scores that were not asked for stay as they are in the card.

    Raises:
        CheckpointError: The folder holds no checkpoint.
        DataError: The data set is not there.
        ValueError: There is no such score.
    """
    if unknown := set(scores) - set(SCORES):
        raise ValueError(f"Expected scores of {', '.join(SCORES)}; got {', '.join(unknown)}.")
    read = checkpoint.read(folder)
    read.model.compiled()
    test = _Test(read, test_images(read.card, seed), seed, console or Console(stderr=True))
    fresh: dict[str, Any] = {}
    if "raw" in scores:
        fresh["raw"] = test.raw(raw_images, particles=raw_particles)
    if "tight" in scores:
        fresh["tight"] = test.tight(raw_images, particles=raw_particles)
    if "predictive" in scores:
        fresh["predictive"] = [
            test.predictive(images, spec, proposal, particles=particles)
            for proposal in (SERVED, "own")
            for spec in (masks if proposal == SERVED else masks[:2])
        ]
    results = {**read.card.results, **fresh}
    return checkpoint.write(folder, replace(read, card=replace(read.card, results=results)))


SCORES = ("raw", "tight", "predictive")


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
    truth = test_images(read.card, seed)[: 200 if ambiguous else images]
    hidden = hide(truth, missing, seed)
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


@dataclass(frozen=True)
class _Test:
    """Complete test images, and the model that is measured on them."""

    read: Checkpoint
    truth: Tensor
    seed: int
    show: Console

    def raw(self, images: int | None, *, particles: int) -> dict[str, Any]:
        """Log p(x) by the encoder's own proposal."""
        return self._complete(self.read.model, self.truth[:images], "raw", particles)

    def tight(self, images: int | None, *, particles: int) -> dict[str, Any]:
        """Log p(x) by an encoder that was refitted on these images; the decoder is as it was."""
        truth = self.truth[:images]
        steps = REFIT_EPOCHS * math.ceil(len(truth) / BATCH)
        stages = tightened(self.read.model, truth, Noise(self.seed).at("tight"), steps=steps)
        model = _watched(stages, steps, "refit", self.show)
        result = self._complete(model, truth, "tight", particles)
        return {**result, "proposal": "own, refitted on these images", "refit_steps": steps}

    def _complete(
        self, model: LatentVariableModel, truth: Tensor, title: str, particles: int
    ) -> dict[str, Any]:
        def work(index: Int[Tensor, " chunk"]) -> Scores:
            images = Incomplete.complete(truth[index])
            noise = NoisePerImage.of(self.seed, index.tolist())
            return finish(score(model, images, noise, particles=particles, proposal="own"))

        scores = [s.log_likelihood for s in in_chunks(work, len(truth), title, self.show)]
        return {
            "what": "test log p(x) of complete images, nats an image",
            **_summary(scores),
            "particles": particles,
            "proposal": "own",
            "estimator": scores[0].estimator,
            "seed": self.seed,
        }

    def predictive(
        self, images: int, spec: str, proposal: str, *, particles: int
    ) -> dict[str, Any]:
        """Log p(x_m | x_o) of what a mask hides."""
        truth = self.truth[:images]
        hidden = hide(truth, spec, self.seed)

        def work(index: Int[Tensor, " chunk"]) -> Scores:
            noise = NoisePerImage.of(self.seed, index.tolist())
            stages = score(
                self.read.model,
                hidden[index],
                noise,
                particles=particles,
                proposal=proposal,
                truth=truth[index],
            )
            return finish(stages)

        scores = list(in_chunks(work, len(truth), f"{spec}, {proposal}", self.show))
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
            "seed": self.seed,
        }


def _watched(stages: Stages[T], count: int, title: str, show: Console) -> T:
    """The result of so many stages, with a progress bar over them."""
    with Progress(console=show, disable=not show.is_terminal) as progress:
        task = progress.add_task(title, total=count)
        while True:
            try:
                next(stages)
            except StopIteration as done:
                return done.value
            progress.advance(task)


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


def in_chunks(
    work: Callable[[Int[Tensor, " chunk"]], Scores], count: int, title: str, show: Console
) -> Iterator[Scores]:
    """The scores of chunks, of which as many are worked on at a time as PyTorch has threads.

    One thread a chunk: what is small is then not waited for by the other threads.
    """
    threads = torch.get_num_threads()

    def alone(index: Int[Tensor, " chunk"]) -> Scores:
        with torch.inference_mode():
            return work(index)

    chunks = torch.arange(count).split(CHUNK)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = pool.map(alone, chunks)
        yield from track(parts, title, len(chunks), console=show, disable=not show.is_terminal)


def test_images(card: Card, seed: int) -> Float[Tensor, "count channels height width"]:
    """The test images in an order drawn by the seed: files are often sorted by class."""
    pixels = data.load(card.data["name"]).test.pixels
    order = torch.randperm(len(pixels), generator=Noise(seed).at("test").generator())
    grey = pixels[order].float()
    if card.binarise == "threshold":
        return (grey > THRESHOLD).float()
    drawn = Noise(seed).at("binarise").uniform(*grey.shape, like=grey)
    return (drawn * 255 < grey).float()


THRESHOLD = 127


def hide(truth: Tensor, spec: str, seed: int) -> Incomplete:
    """The images with holes that the seed draws by this mechanism."""
    shape = (truth.shape[1], truth.shape[2], truth.shape[3])
    generator = Noise(seed).at("mask", spec).generator()
    return Incomplete.hide(truth, mechanism(spec)(len(truth), shape, generator))


def _most_varied(parts: Sequence[Completions]) -> list[int]:
    spread = torch.stack([part.draws[0].var(0).sum() for part in parts])
    return spread.argsort(descending=True).tolist()
