r"""Images with holes, and the mechanisms that make the holes.

An image is a pair $x = (x_o, x_m)$ of observed and missing pixels.
It is carried as values and a mask of the same shape,

$$ x = (v, o), \qquad o_d = 1 \text{ where pixel } d \text{ was seen}, \qquad
   v_d = 0 \text{ where } o_d = 0, $$

so that what is missing can never leak into a computation.
A mechanism draws $o$ without looking at $v$ (missing completely at random).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

__all__ = ["MECHANISMS", "Incomplete", "Mechanism", "MechanismError", "mechanism"]

ImageShape = tuple[int, int, int]
Number = TypeVar("Number", int, float)
Mechanism = Callable[[int, ImageShape, Generator], Bool[Tensor, "batch channels height width"]]
"""Draws which pixels are observed of so many images of one shape."""


class MechanismError(ValueError):
    """A mechanism that does not exist, or an argument that it cannot take."""


@dataclass(frozen=True)
class Incomplete:
    """Images of which only some pixels were seen; the values of the others are zero."""

    values: Float[Tensor, "batch channels height width"]
    observed: Bool[Tensor, "batch channels height width"]

    @classmethod
    def hide(
        cls,
        values: Float[Tensor, "batch channels height width"],
        observed: Bool[Tensor, "batch channels height width"],
    ) -> "Incomplete":
        """The images with every pixel that is not observed set to zero, NaN included."""
        return cls(torch.where(observed, values, 0.0), observed)

    @classmethod
    def complete(cls, values: Float[Tensor, "batch channels height width"]) -> "Incomplete":
        """The images with nothing missing."""
        return cls(values, torch.ones_like(values, dtype=torch.bool))

    def copy(self) -> "Incomplete":
        """The same images in memory of their own."""
        return Incomplete(self.values.clone(), self.observed.clone())

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | Int[Tensor, " picked"]) -> "Incomplete":
        return Incomplete(self.values[index], self.observed[index])

    def fill(
        self, imputed: Float[Tensor, "*more batch channels height width"]
    ) -> Float[Tensor, "*more batch channels height width"]:
        """The observed values, with the imputed ones only where nothing was seen."""
        return torch.where(self.observed, self.values, imputed)


def mechanism(spec: str) -> Mechanism:
    """The mechanism that a text such as `patches:3`, `half` or `file:holes.npy` names.

    Raises:
        MechanismError: There is none of this name, or its argument is out of range.
    """
    name, _, argument = spec.partition(":")
    if name not in MECHANISMS:
        raise MechanismError(
            f"Expected a missingness of the form {', '.join(FORMS)}; got {spec!r}."
        )
    try:
        return MECHANISMS[name](argument)
    except (ValueError, OSError) as error:
        raise MechanismError(f"Cannot read the missingness {spec!r}: {error}") from error


def _nothing(argument: str) -> Mechanism:
    _refuse(argument)
    return lambda count, shape, _generator: torch.ones(count, *shape, dtype=torch.bool)


def _patches(argument: str) -> Mechanism:
    removed = _number(argument, int, 0, 9)

    def draw(count: int, shape: ImageShape, generator: Generator) -> Tensor:
        kept = torch.rand(count, 9, generator=generator).argsort(dim=1) >= removed
        rows, columns = (_third(side) for side in shape[1:])
        return _every_channel(kept[:, rows[:, None] * 3 + columns], shape)

    return draw


def _mcar(argument: str) -> Mechanism:
    rate = _number(argument, float, 0.0, 1.0)

    def draw(count: int, shape: ImageShape, generator: Generator) -> Tensor:
        seen = torch.rand(count, *shape[1:], generator=generator) >= rate
        return _every_channel(seen, shape)

    return draw


def _block(argument: str) -> Mechanism:
    side_of_block = _number(argument or "14", int, 1, 4096)

    def draw(count: int, shape: ImageShape, generator: Generator) -> Tensor:
        hidden = [
            _interval(side, min(side_of_block, side), count, generator) for side in shape[1:]
        ]
        return _every_channel(~(hidden[0][:, :, None] & hidden[1][:, None, :]), shape)

    return draw


def _half(argument: str) -> Mechanism:
    _refuse(argument)

    def draw(count: int, shape: ImageShape, generator: Generator) -> Tensor:
        _, height, width = shape
        upper = (torch.arange(height) < height // 2)[:, None].expand(height, width)
        left = (torch.arange(width) < width // 2).expand(height, width)
        halves = torch.stack([upper, ~upper, left, ~left])
        return _every_channel(halves[torch.randint(4, (count,), generator=generator)], shape)

    return draw


def _strokes(argument: str) -> Mechanism:
    strokes = _number(argument or "3", int, 1, 64)

    def draw(count: int, shape: ImageShape, generator: Generator) -> Tensor:
        scale = torch.tensor(shape[1:], dtype=torch.float32)
        ends = torch.rand(count, strokes, 2, 2, generator=generator) * scale
        radius = (0.04 + 0.06 * torch.rand(count, strokes, generator=generator)) * scale.min()
        grid = torch.stack(
            torch.meshgrid(*(torch.arange(side) + 0.5 for side in shape[1:]), indexing="ij"), -1
        )
        hidden = [
            (_distance(grid, some) <= wide[:, :, None, None]).any(1)
            for some, wide in zip(ends.split(AT_ONCE), radius.split(AT_ONCE), strict=True)
        ]
        return _every_channel(~torch.cat(hidden), shape)

    return draw


def _file(argument: str) -> Mechanism:
    missing = _masks_of(Path(argument))

    def draw(count: int, shape: ImageShape, generator: Generator) -> Tensor:
        if missing.shape[1:] != shape[1:]:
            raise MechanismError(
                f"Expected masks of {shape[1]}x{shape[2]} pixels in {Path(argument).name}; "
                f"got {missing.shape[1]}x{missing.shape[2]}."
            )
        picked = torch.randint(len(missing), (count,), generator=generator)
        own = torch.arange(count) if len(missing) == count else picked
        return _every_channel(~missing[own], shape)

    return draw


MECHANISMS: dict[str, Callable[[str], Mechanism]] = {
    "none": _nothing,
    "patches": _patches,
    "mcar": _mcar,
    "block": _block,
    "half": _half,
    "strokes": _strokes,
    "file": _file,
}
FORMS = (
    "none",
    "patches:N (N of the 3x3 patches)",
    "mcar:P (each pixel with probability P)",
    "block[:SIDE]",
    "half",
    "strokes[:N]",
    "file:MASKS.npy (true, 1 in masks of 0 and 1, or above 127, is missing)",
)

NAMES: dict[type, str] = {int: "a whole number", float: "a number"}
MISSING_ABOVE = 127
AT_ONCE = 64
"""Images whose strokes are drawn together, for the memory that every pixel's distances take."""


def _masks_of(path: Path) -> Bool[Tensor, "masks height width"]:
    try:
        array = np.load(path, allow_pickle=False)
    except EOFError as error:
        raise ValueError("Expected an array of masks; got an empty file.") from error
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.size == 0:  # noqa: PLR2004
        raise ValueError(
            "Expected an array of masks, each of height x width; "
            f"got {getattr(array, 'shape', 'several arrays')}."
        )
    largest = array.max()
    if not (largest <= 1 or largest > MISSING_ABOVE):
        raise ValueError(
            f"Expected masks of booleans, of 0 and 1, or with values above {MISSING_ABOVE} where "
            f"pixels are missing; got {largest} at most."
        )
    missing = array > (0 if largest <= 1 else MISSING_ABOVE)
    return torch.from_numpy(missing).reshape(-1, *array.shape[-2:])


def _number(argument: str, kind: type[Number], low: Number, high: Number) -> Number:
    expected = f"Expected {NAMES[kind]} from {low} to {high}; got {argument!r}."
    try:
        value = kind(argument)
    except ValueError as error:
        raise ValueError(expected) from error
    if not low <= value <= high:
        raise ValueError(expected)
    return value


def _refuse(argument: str) -> None:
    if argument:
        raise ValueError(f"Expected no argument; got {argument!r}.")


def _third(side: int) -> Int[Tensor, " side"]:
    place = torch.arange(side)
    return (place >= side // 3).long() + (place >= 2 * side // 3).long()


def _every_channel(
    seen: Bool[Tensor, "batch height width"], shape: ImageShape
) -> Bool[Tensor, "batch channels height width"]:
    return seen[:, None].expand(-1, *shape).contiguous()


def _interval(
    side: int, length: int, count: int, generator: Generator
) -> Bool[Tensor, "batch side"]:
    start = torch.randint(side - length + 1, (count, 1), generator=generator)
    place = torch.arange(side)
    return (place >= start) & (place < start + length)


def _distance(
    grid: Float[Tensor, "height width 2"], ends: Float[Tensor, "batch strokes 2 2"]
) -> Float[Tensor, "batch strokes height width"]:
    """How far each pixel's centre is from each line segment, in pixels."""
    start, along = ends[..., 0, :], ends[..., 1, :] - ends[..., 0, :]
    offset = grid - start[:, :, None, None]
    along = along[:, :, None, None]
    share = (offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)
    return (offset - share.clamp(0, 1)[..., None] * along).norm(dim=-1)
