r"""Filling in a checkpoint's card: how good the model is on test images, and what it does.

Three scores, each with what it was measured with:

- `raw`: log p(x) of test images, with the encoder's own proposal;
- `tight`: the same with an encoder that was refitted on these images, the decoder as it was;
- `predictive`: log p(x_m | x_o) of the pixels that a mask hides, as the service computes it.
  It is a normalised distribution over $x_m$, so that no bad proposal can flatter it.

The masks of the last go from the one that was trained on to kinds that were never seen.
Of test images that lack pixels themselves the first two are log p(x_o) of what was observed, and
x_m are pixels that were observed and that the mask hides.
`diagnostics` say how the latents are used, what the ELBO loses, whether what is predicted of
missing pixels comes true, and whether what is unlike the data is found unlikely.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from model import checkpoint, data
from model.checkpoint import Card, Checkpoint
from model.diagnostics import (
    Gaps,
    anomaly,
    calibration,
    gaps,
    latent_use,
    ranks,
    uniformity,
)
from model.estimators import QUALITIES, Quality
from model.imputation import Completions, impute
from model.latent import LatentVariableModel
from model.likelihood import Estimate, Scores, score
from model.masks import Incomplete, mechanism
from model.noise import Noise, NoisePerImage
from model.objectives import OBJECTIVES
from model.refit import BATCH, tightened
from model.stages import Stages, finish
from model.step import flushed

__all__ = ["CHUNK", "MASKS", "evaluate", "examples", "hide", "in_chunks", "picture"]

T = TypeVar("T")
MASKS = ("patches:3", "patches:6", "block:14", "half", "strokes:3", "mcar:0.5")
REFIT_EPOCHS = 20
"""How often the images pass by an encoder that is refitted for them."""
SERVED = "laplace"
"""The proposal of the service's answers."""
CHUNK = 16
"""Images that are worked on together: their blocks fill the processor's caches, not more."""
FEWEST = 2
"""Images that have a standard error."""
AMONG = 200
"""Images of which the most ambiguous are shown."""
DRAWS, RANK_BINS, OUTSIDE = 99, 20, 5
"""Of the test of draws; the truth is outside of them if so few are beyond it."""
LOOKED_AT, ODD, HELD_OUT = 100, 20, 100
"""Images of the gaps, images whose percentiles are given, and images that these are among."""


def evaluate(
    folder: Path,
    *,
    scores: Sequence[str] = ("raw", "predictive", "diagnostics"),
    images: int = 1000,
    particles: int = 1000,
    raw_images: int | None = None,
    raw_particles: int = 5000,
    masks: Sequence[str] = MASKS,
    source: str | None = None,
    seed: int = 0,
) -> Card:
    """Measures a checkpoint on its data set's test images and writes the results into its card.

    Scores that were not asked for stay as they are in the card. The data set is the card's, or
    the one at `source`, such as the file or the folder that the training was given.

    Raises:
        CheckpointError: The folder holds no checkpoint.
        DataError: The data set is not there, or has fewer than two test images of the model's
            size.
        ValueError: There is no such score, a mask hides nothing, or too little of a number.
    """
    _check(images, FEWEST, "images")
    _check(raw_images, FEWEST, "raw_images")
    _check(particles, 1, "particles")
    _check(raw_particles, 1, "raw_particles")
    if unknown := set(scores) - set(SCORES):
        raise ValueError(f"Expected scores of {', '.join(SCORES)}; got {', '.join(unknown)}.")
    read = checkpoint.read(folder)
    read.model.compiled()
    if "tight" in scores and read.model.exact is not None:
        raise ValueError("Expected a model with an encoder for tight; got one that needs none.")
    truth = examples(read.card, seed, source=source)
    _check_test(truth, masks if set(scores) & MASKED else None, seed)
    test = _Test(read, truth, seed, Console(stderr=True))
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
    if "diagnostics" in scores:
        fresh["diagnostics"] = test.diagnostics(images, masks, particles=particles)
    card = replace(read.card, results={**read.card.results, **fresh})
    checkpoint.rewrite_card(folder, card)
    return card


SCORES = ("raw", "tight", "predictive", "diagnostics")
MASKED = {"predictive", "diagnostics"}
"""Those that hide pixels."""


def picture(
    folder: Path,
    path: Path,
    *,
    missing: str = "patches:3",
    images: int = 10,
    draws: int = 5,
    ambiguous: bool = False,
    particles: int = 1000,
    source: str | None = None,
    seed: int = 0,
) -> None:
    """Writes a PNG with a column an image: the truth, what was seen, the mean, and draws.

    With `ambiguous` they are those of 200 test images whose draws differ most. What is not known
    is grey.

    Raises:
        CheckpointError, DataError: As of `evaluate`.
        ValueError: There are not so many images, or too little of a number.
        OSError: There is no place for the picture.
    """
    for name, count in (("images", images), ("draws", draws), ("particles", particles)):
        _check(count, 1, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    read = checkpoint.read(folder)
    truth = examples(read.card, seed, source=source)[: AMONG if ambiguous else images]
    if images > len(truth):
        raise ValueError(f"Expected images of at most {len(truth)}; got {images}.")
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
                torch.where(truth.observed[index], truth.values[index], 0.5),
                torch.where(hidden.observed[index], hidden.values[index], 0.5),
                parts[index].mean[0],
                parts[index].draws[0, :, 0],
            ]
        )
        for index in chosen
    ]
    data.save_picture(path, torch.stack(columns, 1), upscale=2)


@dataclass(frozen=True)
class _Test:
    """Test images, and the model that is measured on them."""

    read: Checkpoint
    truth: Incomplete
    """Of which all is known, or some of their pixels are."""
    seed: int
    show: Console

    def raw(self, images: int | None, *, particles: int) -> dict[str, Any]:
        """Log p(x) by the encoder's own proposal."""
        return self._whole(self.read.model, self.truth[:images], "raw", particles)

    def tight(self, images: int | None, *, particles: int) -> dict[str, Any]:
        """Log p(x) by an encoder that was refitted on these images; the decoder is as it was."""
        truth = self.truth[:images]
        steps = REFIT_EPOCHS * math.ceil(len(truth) / BATCH)
        stages = tightened(self.read.model, truth, Noise(self.seed).at("tight"), steps=steps)
        with flushed():
            model = _watched(stages, steps, "refit", self.show).frozen()
        result = self._whole(model, truth, "tight", particles, two_pass=False)
        return {**result, "proposal": "own, refitted on these images", "refit_steps": steps}

    @property
    def two_pass(self) -> bool:
        """Whether the encoder was trained on images that were filled, and not with zeros."""
        last = self.read.card.objective.rpartition(",")[2].strip()
        return last not in OBJECTIVES or OBJECTIVES[last].two_pass

    def _whole(
        self,
        model: LatentVariableModel,
        truth: Incomplete,
        title: str,
        particles: int,
        *,
        two_pass: bool | None = None,
    ) -> dict[str, Any]:
        """Log p of all that is known of the images."""
        proposal = _own(two_pass=self.two_pass if two_pass is None else two_pass)

        def work(index: Int[Tensor, " chunk"]) -> Scores:
            noise = NoisePerImage.of(self.seed, index.tolist())
            stages = score(model, truth[index], noise, particles=particles, proposal=proposal)
            return finish(stages)

        scores = [s.log_likelihood for s in in_chunks(work, len(truth), title, self.show)]
        return {
            "what": "test log p(x) of complete images, nats an image"
            if truth.observed.all()
            else "test log p(x_o) of incomplete images, nats an image",
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
        judged = truth.observed & ~hidden.observed
        missing = judged.sum().item() / len(truth)

        def work(index: Int[Tensor, " chunk"]) -> Scores:
            noise = NoisePerImage.of(self.seed, index.tolist())
            stages = score(
                self.read.model,
                hidden[index],
                noise,
                particles=particles,
                proposal=_own(two_pass=self.two_pass) if proposal == "own" else proposal,
                truth=truth.values[index],
                known=judged[index],
            )
            return finish(stages)

        scores = list(in_chunks(work, len(truth), f"{spec}, {proposal}", self.show))
        conditional = [s.conditional for s in scores if s.conditional is not None]
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

    def diagnostics(self, images: int, masks: Sequence[str], *, particles: int) -> dict[str, Any]:
        """What the latents do, what the ELBO loses, and what comes true of what is predicted."""
        truth, model = self.truth[:images], self.read.model
        hidden, noise = hide(truth, masks[0], self.seed), Noise(self.seed)
        use = latent_use(model, hidden, noise.at("use"), two_pass=self.two_pass)
        own = Incomplete.complete(model.sample(len(truth), noise.at("own")))
        found: dict[str, Any] = {
            "images": len(truth),
            "mask": masks[0],
            "latents": len(use.variance),
            "active_units": use.active,
            "variance_of_means": _rounded(use.variance),
            "divergences": _rounded(use.divergence),
            "calibration": [
                *(self._coming_true(truth, spec, "test images", particles) for spec in masks[:2]),
                self._coming_true(own, masks[0], "its own samples", particles),
            ],
            "seed": self.seed,
        }
        whole = self.truth.values[self.truth.observed.all((1, 2, 3))]
        if len(whole) >= FEWEST:
            found["anomaly"] = self._anomaly(whole, masks[0], particles=particles)
        if model.exact is None:
            found["gaps"] = self._gaps(masks[0], particles=particles)
        return found

    def _coming_true(
        self, truth: Incomplete, spec: str, of: str, particles: int
    ) -> dict[str, Any]:
        """Whether missing pixels, and the ink of all that are known, are as they were said to be.

        Of the model's own samples they are if the inference is right, whatever the model is.
        """
        hidden = hide(truth, spec, self.seed)

        def work(index: Int[Tensor, " chunk"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            mean, draws, doubt = self._completed(hidden[index], index, particles=particles)
            noise = NoisePerImage.of(self.seed, index.tolist()).at("ties")
            values, known = truth.values[index], truth.observed[index]
            judged = known & ~hidden.observed[index]
            rank = ranks(torch.where(known[:, None], draws, 0.0), values, noise)
            return mean[judged], values[judged], rank, doubt

        parts = list(in_chunks(work, len(truth), f"{spec}, calibration", self.show))
        probability, came, rank, doubt = (torch.cat(part) for part in zip(*parts, strict=True))
        counts = rank.bincount(minlength=DRAWS + 1).view(RANK_BINS, -1).sum(1).tolist()
        inside = (rank >= OUTSIDE) & (rank <= DRAWS - OUTSIDE)
        found: dict[str, Any] = {
            "of": of,
            "mask": spec,
            "particles": particles,
            "quality": "auto",
            "in_doubt": round(doubt.double().mean().item(), 3),
            "rank_counts": counts,
            "rank_p_value": float(f"{uniformity(counts):.2g}"),
            "coverage": round(inside.double().mean().item(), 3),
            "coverage_expected": round((DRAWS + 1 - 2 * OUTSIDE) / (DRAWS + 1), 3),
        }
        if self.read.model.likelihood.binary:
            curve = calibration(probability, came)
            found["expected_calibration_error"] = round(curve.error, 4)
            found["predicted"] = _rounded(curve.predicted)
            found["came_true"] = _rounded(curve.came_true)
            found["pixels"] = curve.count.tolist()
        return found

    def _completed(
        self, images: Incomplete, index: Int[Tensor, " chunk"], *, particles: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means, draws, and which were in doubt and so completed in high quality."""

        def completed(images: Incomplete, index: Tensor, quality: Quality) -> Completions:
            stages = impute(
                self.read.model,
                images,
                NoisePerImage.of(self.seed, index.tolist()),
                particles=particles,
                draws=DRAWS,
                proposal=quality.proposal,
                estimator=quality.estimator,
            )
            return finish(stages)

        whole = completed(images, index, QUALITIES["standard"])
        mean, draws, doubt = whole.mean, whole.draws, whole.log_likelihood.doubtful
        if doubt.any():
            picked = doubt.nonzero()[:, 0]
            better = completed(images[picked], index[picked], QUALITIES["high"])
            mean, draws = mean.clone(), draws.clone()
            mean[picked], draws[picked] = better.mean, better.draws
        return mean, draws, doubt

    def _gaps(self, spec: str, *, particles: int) -> dict[str, Any]:
        """What the ELBO loses by one encoder for all images, and by its Gaussians."""
        hidden = hide(self.truth[:LOOKED_AT], spec, self.seed)

        def work(index: Int[Tensor, " chunk"]) -> Gaps:
            noise = NoisePerImage.of(self.seed, index.tolist()).at("gaps")
            stages = gaps(
                self.read.model,
                hidden[index],
                noise,
                quality=QUALITIES["high"],
                particles=particles,
                two_pass=self.two_pass,
            )
            return finish(stages)

        parts = list(in_chunks(work, len(hidden), "gaps", self.show))
        found: dict[str, Any] = {"images": len(hidden), "mask": spec, "particles": particles}
        for name in ("amortisation", "approximation"):
            mean, error = _mean(torch.cat([getattr(part, name) for part in parts]))
            found[name], found[f"{name}_standard_error"] = mean, error
        return found

    def _anomaly(self, whole: Tensor, spec: str, *, particles: int) -> dict[str, Any]:
        """The percentiles of complete images, and of these turned by a quarter, if square."""
        odd = min(ODD, len(whole) // 2)
        shown, held_out = whole[:odd], whole[odd : odd + HELD_OUT]
        turns = 1 if shown.shape[2] == shown.shape[3] else 2
        found: dict[str, Any] = {"images": len(shown), "held_out": len(held_out), "mask": spec}
        for name, values in (("as they are", shown), ("turned", shown.rot90(turns, (2, 3)))):
            hidden = hide(Incomplete.complete(values), spec, self.seed)

            def work(index: Int[Tensor, " chunk"], hidden: Incomplete = hidden) -> Tensor:
                stages = anomaly(
                    self.read.model,
                    hidden[index],
                    held_out,
                    Noise(self.seed).at("anomaly", *index[:1].tolist()),
                    quality=QUALITIES["standard"],
                    particles=particles,
                )
                return finish(stages)

            parts = in_chunks(work, len(hidden), f"percentiles, {name}", self.show, chunk=1)
            found[name] = _rounded(torch.cat(list(parts)))
        return found


def _own(*, two_pass: bool) -> str:
    """The name of an encoder's proposal that sees images as in training."""
    return "own" if two_pass else "zero-filled"


def _check_test(truth: Incomplete, masks: Sequence[str] | None, seed: int) -> None:
    if len(truth) < FEWEST:
        raise data.DataError(f"Expected {FEWEST} test images or more; got {len(truth)}.")
    if masks is None:
        return
    idle = [
        spec for spec in masks if torch.equal(hide(truth, spec, seed).observed, truth.observed)
    ]
    if idle or not masks:
        raise ValueError(f"Expected masks that hide some pixels; got {', '.join(idle) or masks}.")


def _check(count: int | None, least: int, name: str) -> None:
    if count is not None and count < least:
        raise ValueError(f"Expected {name} of at least {least}; got {count}.")


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean over images and its standard error, in thousandths of a nat."""
    error = values.std() / len(values) ** 0.5
    return round(values.mean().item(), 3), round(error.item(), 3)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


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
    mean, error = _mean(value)
    return {
        "images": len(value),
        "mean": mean,
        "standard_error": error,
        "median_effective_sample_size": round(sizes.median().item(), 1),
        "reliable_share": round(reliable.double().mean().item(), 3),
    }


def in_chunks(
    work: Callable[[Int[Tensor, " chunk"]], T],
    count: int,
    title: str,
    show: Console,
    *,
    chunk: int = CHUNK,
) -> Iterator[T]:
    """The results of chunks, of which as many are worked on at a time as PyTorch has threads.

    One thread a chunk: what is small is then not waited for by the other threads.
    """
    threads = torch.get_num_threads()

    def alone(index: Int[Tensor, " chunk"]) -> T:
        with torch.inference_mode():
            return work(index)

    chunks = torch.arange(count).split(chunk)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = pool.map(alone, chunks)
        yield from track(parts, title, len(chunks), console=show, disable=not show.is_terminal)


def examples(card: Card, seed: int, *, source: str | None = None) -> Incomplete:
    """The test images in an order drawn by the seed: files are often sorted by class.

    They are those of the card's data set, which may be at another place.

    Raises:
        DataError: It is another data set, or has not the size of the model's images.
    """
    dataset = data.load(source or card.data["name"])
    if card.data.get("sha256", dataset.sha256) != dataset.sha256:
        raise data.DataError(
            f"Expected the images that {card.name} was trained on, of sha256 "
            f"{card.data['sha256']}, whose test images it has not seen; got others from "
            f"{source or dataset.name}, of {dataset.sha256}."
        )
    test, pixels = dataset.test, dataset.test.pixels
    if (got := tuple(pixels.shape[1:])) != card.architecture.image_shape:
        raise data.DataError(
            f"Expected test images of the model's shape {card.architecture.image_shape}, "
            f"channels, height and width; got {got}."
        )
    order = torch.randperm(len(pixels), generator=Noise(seed).at("test").generator())
    values = data.as_seen(pixels[order], card.binarise, Noise(seed).at("binarise"))
    if test.observed is None:
        return Incomplete.complete(values)
    return Incomplete.hide(values, test.observed[order])


def hide(truth: Incomplete, spec: str, seed: int) -> Incomplete:
    """The images with more holes, which the seed draws by this mechanism."""
    count, channels, height, width = truth.values.shape
    generator = Noise(seed).at("mask", spec).generator()
    drawn = mechanism(spec)(count, (channels, height, width), generator)
    return Incomplete.hide(truth.values, truth.observed & drawn)


def _most_varied(parts: Sequence[Completions]) -> list[int]:
    spread = torch.stack([part.draws[0].var(0).sum() for part in parts])
    return spread.argsort(descending=True).tolist()
