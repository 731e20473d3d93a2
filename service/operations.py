"""The operations on an image: their options, the job that these make, and its result.

Requests and batches have the same ones, and so the same answers.
"""

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from service import codec, schemas
from service.codec import Picture
from service.errors import BadInput
from service.models import Card, Model
from service.work import (
    FEWEST,
    MAX_SEED,
    STOPPING,
    Estimate,
    Imputation,
    Impute,
    Score,
    Scoring,
    image_seed,
)

__all__ = [
    "OPERATIONS",
    "Imputing",
    "LogLikelihood",
    "Operation",
    "Pictures",
    "a_seed",
    "read",
    "results",
]

Encode = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Pictures:
    """An image with its holes and, where it was sent, what was behind them."""

    image: Picture
    truth: Picture | None


def read(image: Any, mask: Any, truth: Any, shape: codec.Shape, *, field: str = "") -> Pictures:
    """The pictures of one item; the field is where it stands, with a dot at its end.

    Raises:
        UnknownFormat: The bytes are no image or array.
        BadInput: Another size, values that no pixels have, or a truth with holes.
    """
    seen = codec.read_picture(image, mask, shape, field=f"{field}image", mask_field=f"{field}mask")
    if truth is None:
        return Pictures(seen, None)
    known = codec.read_picture(truth, None, shape, field=f"{field}truth")
    if known.missing.any():
        holes = f"{int(known.missing.sum())} missing pixels"
        raise BadInput.of(f"{field}truth", "a complete image", holes)
    return Pictures(seen, known)


def a_seed(given: int | None) -> int:
    """The one that was given, or one by chance."""
    return secrets.randbelow(MAX_SEED + 1) if given is None else given


@dataclass(frozen=True)
class Imputing:
    """Completing images."""

    Options: ClassVar = schemas.ImputeOptions
    options: schemas.ImputeOptions
    model: Model
    seed: int

    @staticmethod
    def check(options: schemas.ImputeOptions) -> None:
        """Refuses options that do not go together.

        Raises:
            BadInput: They do not.
        """
        _check_tolerance(options.tolerance, None, options.quality)

    def job(self, index: int, pictures: Pictures) -> Impute:
        """The work on the image of this number."""
        return Impute(
            model=self.model,
            values=pictures.image.values,
            missing=pictures.image.missing,
            particles=self.options.particles,
            tolerance=self.options.tolerance,
            draws=self.options.draws,
            levels=self._levels,
            seed=image_seed(self.seed, index),
            **_quality(self.options.quality),
        )

    def result(
        self,
        index: int,
        name: str | None,
        pictures: Pictures,
        done: Imputation,
        encode: Encode | None = None,
    ) -> schemas.Imputed:
        """What is told of the image of this number."""
        picture, asked = pictures.image, self.options.outputs
        code = encode or self._encode

        def one(output: str, pixels: Callable[[], np.ndarray]) -> Any:
            return code(pixels()) if output in asked else None

        def several(output: str, pixels: Iterable[np.ndarray]) -> list[Any] | None:
            return [code(picture.completed(p)) for p in pixels] if output in asked else None

        return schemas.Imputed(
            id=name,
            mean=one("mean", lambda: picture.completed(done.mean)),
            draws=several("draws", done.draws),
            std=one("std", lambda: done.std),
            median=one("median", lambda: picture.completed(done.quantiles[-1])),
            quantiles=several("quantiles", done.quantiles[: len(self.options.levels)]),
            log_likelihood=_estimate(done.log_likelihood),
            quality=done.quality,
            seed=image_seed(self.seed, index),
            binarised=_binarised(picture, self.model.card),
        )

    @property
    def _levels(self) -> tuple[float, ...]:
        """Those that the outputs need; the median is the last."""
        levels = self.options.levels if "quantiles" in self.options.outputs else []
        return (*levels, *([0.5] if "median" in self.options.outputs else []))

    def _encode(self, pixels: np.ndarray) -> Any:
        return codec.encode(pixels, self.options.encoding)


@dataclass(frozen=True)
class LogLikelihood:
    """Scoring images."""

    Options: ClassVar = schemas.LogLikelihoodOptions
    options: schemas.LogLikelihoodOptions
    model: Model
    seed: int

    @staticmethod
    def check(options: schemas.LogLikelihoodOptions) -> None:
        """Refuses options that do not go together.

        Raises:
            BadInput: They do not.
        """
        if options.estimator is not None:
            _check_estimator(options.estimator, options.quality, options.particles)
        _check_tolerance(options.tolerance, options.estimator, options.quality)

    def job(self, index: int, pictures: Pictures) -> Score:
        """The work on the image of this number."""
        quality = "standard" if self.options.estimator else self.options.quality
        return Score(
            model=self.model,
            values=pictures.image.values,
            missing=pictures.image.missing,
            truth=None if pictures.truth is None else pictures.truth.values,
            particles=self.options.particles,
            tolerance=self.options.tolerance,
            estimator=self.options.estimator,
            seed=image_seed(self.seed, index),
            **_quality(quality),
        )

    def result(
        self,
        index: int,
        name: str | None,
        pictures: Pictures,
        done: Scoring,
        _encode: Encode | None = None,
    ) -> schemas.Scored:
        """What is told of the image of this number."""
        return schemas.Scored(
            id=name,
            log_likelihood=_estimate(done.log_likelihood),
            conditional=done.conditional and _estimate(done.conditional),
            difference=done.difference and _estimate(done.difference),
            quality=done.quality,
            seed=image_seed(self.seed, index),
            binarised=_binarised(pictures.image, self.model.card),
        )


Operation = Imputing | LogLikelihood
OPERATIONS: dict[str, type[Any]] = {"impute": Imputing, "log-likelihood": LogLikelihood}


def results(
    operation: Any, names: Sequence[str | None], pictures: Sequence[Pictures], done: Sequence[Any]
) -> list[Any]:
    """What is told of each image in turn."""
    together = enumerate(zip(names, pictures, done, strict=True))
    return [operation.result(index, *each) for index, each in together]


def _quality(asked: schemas.Quality) -> dict[str, Any]:
    """What a job is told of the quality that was asked for."""
    auto = asked == "auto"
    return {"quality": "standard" if auto else asked, "escalates": auto}


def _check_estimator(estimator: str, quality: str, particles: int) -> None:
    if quality != "auto":
        raise BadInput.of("estimator", f"none with the quality {quality}", estimator)
    if particles < (fewest := FEWEST.get(estimator, 1)):
        raise BadInput.of("particles", f"at least {fewest} with {estimator}", str(particles))


def _check_tolerance(tolerance: float | None, estimator: str | None, quality: str) -> None:
    if tolerance is None or (quality != "high" and (estimator is None or estimator in STOPPING)):
        return
    with_what = estimator or f"the quality {quality}"
    raise BadInput.of("tolerance", f"none with {with_what}, which has one length", str(tolerance))


def _estimate(estimate: Estimate) -> schemas.Estimate:
    return schemas.Estimate(**vars(estimate))


def _binarised(picture: Picture, card: Card) -> bool:
    if card.binarise == "none":
        return False
    seen = picture.values[:, ~picture.missing]
    return bool(((seen != 0) & (seen != 1)).any())
