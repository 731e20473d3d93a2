"""The images that a model learns from.

A data set is three splits of one image size, 8 bits a channel; a pixel may be missing.
`load` takes a name of `DATASETS`, a `.npz` file or a folder of PNG images.

What has no validation or test split lends a tenth of its training images to each,
drawn with a fixed seed, so that everyone's split of the same file is the same.
Two loads hold the same data exactly when their `sha256` agree, whichever file each was read from.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image
from torch import Tensor

from model.masks import Incomplete, mechanism
from model.noise import Noise, Source
from model.published import (
    DATASETS,
    Arrays,
    DataError,
    Download,
    Published,
    data_folder,
    fetch,
    find,
    reading,
    stored_in,
)

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "Download",
    "Images",
    "Published",
    "Split",
    "as_seen",
    "data_folder",
    "fetch",
    "load",
    "save_picture",
]

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 0
SEPARATOR = 128
MISSING_ABOVE = 127
THRESHOLD = 127


@dataclass(frozen=True, kw_only=True)
class Images:
    """One split: levels from 0 to 255, and which pixels were observed where not all were.

    A pixel that is missing has level 0.
    """

    pixels: UInt8[Tensor, "count channels height width"]
    observed: Bool[Tensor, "count channels height width"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: slice | Int[Tensor, " picked"]) -> "Images":
        observed = None if self.observed is None else self.observed[index]
        return Images(pixels=self.pixels[index], observed=observed)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits of one image size; `binary` where every level is 0 or 255."""

    name: str
    train: Images
    validation: Images
    test: Images
    binary: bool
    sha256: str
    source: str

    def described(self) -> dict[str, Any]:
        """What a card says of the data of a training."""
        return {
            "name": self.name,
            "source": self.source,
            "sha256": self.sha256,
            "images": len(self.train),
        }

    def split(
        self,
        part: str,
        *,
        missing: str,
        redraw: bool,
        binarise: str,
        noise: Noise,
        device: torch.device,
    ) -> "Split":
        """A part, train, validation or test, as training goes through it.

        Raises:
            DataError: No pixel of it is observed.
        """
        images: Images = getattr(self, part)
        split = Split(
            images,
            missing=missing,
            redraw=redraw,
            binarise=binarise,
            noise=noise,
            device=device,
        )
        if not bool(split.observed.any()):
            raise DataError(
                f"Expected {part} images of {self.name} with pixels that are observed "
                f"under the missingness {missing}; got {len(images)} without any."
            )
        return split


def as_seen(
    levels: UInt8[Tensor, "batch channels height width"], binarise: str, noise: Source
) -> Float[Tensor, "batch channels height width"]:
    """Levels from 0 to 255 as a model sees them: binary in either way, or from 0 to 1."""
    if binarise == "none":
        return levels.float() / 255
    if binarise == "threshold":
        return (levels > THRESHOLD).float()
    like = torch.empty(0, device=levels.device)
    return (noise.uniform(*levels.shape, like=like) * 255 < levels).float()


class Split:
    """A split on a device as training goes through it, with the holes that images have.

    `missing` hides pixels beside those that the images lack, once or anew in every epoch;
    `binarise` is threshold, above 127 is one; bernoulli, drawn from the grey level in every batch;
    or none, the level from 0 to 1.
    """

    def __init__(
        self,
        images: Images,
        *,
        missing: str,
        redraw: bool,
        binarise: str,
        noise: Noise,
        device: torch.device,
    ) -> None:
        self.pixels = images.pixels.to(device)
        self.own = None if images.observed is None else images.observed.to(device)
        self.mechanism, self.redraw, self.binarise = mechanism(missing), redraw, binarise
        self.noise, self.device, self.epoch = noise, device, 0
        self.order, self.observed = self._order(), self._observed()

    def __len__(self) -> int:
        return len(self.pixels)

    def turn_to(self, epoch: int) -> None:
        """Draws another order of the images and, where they are drawn anew, other masks."""
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._order(epoch)
            self.observed = self._observed(epoch) if self.redraw else self.observed

    def batch(self, index: slice | Int[Tensor, " batch"], noise: Noise) -> Incomplete:
        """The incomplete images with these indices."""
        values = as_seen(self.pixels[index], self.binarise, noise.at("binarise"))
        return Incomplete.hide(values, self.observed[index])

    def _order(self, epoch: int = 0) -> Int[Tensor, " count"]:
        generator = self.noise.at("order", epoch).generator()
        return torch.randperm(len(self), generator=generator).to(self.device)

    def _observed(self, epoch: int = 0) -> Bool[Tensor, "count channels height width"]:
        count, channels, height, width = self.pixels.shape
        generator = self.noise.at("mask", epoch).generator()
        drawn = self.mechanism(count, (channels, height, width), generator).to(self.device)
        return drawn if self.own is None else drawn & self.own


def load(name: str, *, folder: Path | None = None) -> Dataset:
    """The data set of this name, or in the `.npz` file or folder of PNG images at this path.

    A `.npz` has `train` and may have `validation`, `test` and, for each, a mask such as
    `train_missing`, nonzero where a pixel is missing. Floats lie in 0..1, or are NaN where
    missing, and are rounded to 8 bits; bytes are levels, unless the largest is 1.
    Beside `NAME.png` may be `NAME.mask.png`, above 127 where a pixel is missing; so is a pixel
    whose alpha is 0.

    Raises:
        DataError: There are no such data, or they cannot be read.
    """
    if name in DATASETS:
        entry, found = DATASETS[name], find(name, folder=folder or data_folder())
        return _dataset(
            name,
            found.arrays,
            source=found.source,
            held_out=entry.held_out,
            shuffled=entry.shuffled,
        )
    path = Path(name)
    if path.is_dir():
        label = path.resolve().name
        return _dataset(label, _pictures(path), source=f"PNG images of the folder {label}")
    if path.is_file() and path.suffix == ".npz":
        return _dataset(path.stem, _unpack_splits(path), source=path.name)
    raise DataError(
        f"Expected one of {', '.join(DATASETS)}, a .npz file or a folder of PNG images; "
        f"got {name!r}."
    )


def save_picture(
    path: Path, rows: Float[Tensor, "rows columns height width"], *, upscale: int = 1
) -> None:
    """Writes images with values in 0..1 as one PNG grid with thin separators."""
    levels = (rows.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    tiles = levels.repeat_interleave(upscale, 2).repeat_interleave(upscale, 3)
    framed = torch.nn.functional.pad(tiles, (1, 0, 1, 0), value=SEPARATOR)
    grid = framed.permute(0, 2, 1, 3).flatten(0, 1).flatten(1, 2)
    closed = torch.nn.functional.pad(grid, (0, 1, 0, 1), value=SEPARATOR)
    Image.fromarray(closed.numpy()).save(path, format="PNG")


# From arrays to a data set.


def _dataset(
    name: str, arrays: Arrays, *, source: str, held_out: int | None = None, shuffled: bool = True
) -> Dataset:
    parts = {split: _images(arrays, split) for split in SPLITS if split in arrays}
    of_bytes = {split: part for split, part in parts.items() if arrays[split].dtype == np.uint8}
    if max((int(part.pixels.max()) for part in of_bytes.values()), default=0) == 1:
        parts |= {s: replace(part, pixels=part.pixels * 255) for s, part in of_bytes.items()}
    held_out = max(1, len(parts["train"]) // 10) if held_out is None else held_out
    for split in ("test", "validation"):
        if split not in parts:
            parts |= _hold_out(parts["train"], held_out, split=split, shuffled=shuffled)
    _same_size(parts)
    return Dataset(
        name=name,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        binary=all(bool((part.pixels % 255 == 0).all()) for part in parts.values()),
        sha256=_content_hash(parts),
        source=source,
    )


def _hold_out(train: Images, count: int, *, split: str, shuffled: bool) -> dict[str, Images]:
    if len(train) <= count:
        raise DataError(
            f"Expected more than {count} training images, to hold out {count}; got {len(train)}."
        )
    order = torch.arange(len(train))
    if shuffled:
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        order = torch.randperm(len(train), generator=generator)
    return {"train": train[order[:-count]], split: train[order[-count:]]}


def _same_size(parts: Mapping[str, Images]) -> None:
    expected = parts["train"].pixels.shape[1:]
    for split, part in parts.items():
        if part.pixels.shape[1:] != expected:
            raise DataError(
                f"Expected {split} images of {_size(expected)}, as in train; "
                f"got {_size(part.pixels.shape[1:])}."
            )


def _size(shape: Iterable[int]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels in {channels} channel{'s' if channels > 1 else ''}"


def _content_hash(parts: Mapping[str, Images]) -> str:
    hasher = hashlib.sha256()
    for split in SPLITS:
        for kind, tensor in (("pixels", parts[split].pixels), ("observed", parts[split].observed)):
            if tensor is not None:
                hasher.update(f"{split} {kind} {tuple(tensor.shape)}\n".encode())
                hasher.update(tensor.contiguous().numpy().data)
    return hasher.hexdigest()


def _images(arrays: Arrays, split: str) -> Images:
    array = _channels_first(arrays[split], split)
    missing = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, dtype=bool)
    if (mask := arrays.get(f"{split}_missing")) is not None:
        missing = missing | _mask(mask, f"{split}_missing", array.shape)
    pixels = np.ascontiguousarray(np.where(missing, 0, _levels(array, split)))
    observed = torch.from_numpy(~missing) if missing.any() else None
    return Images(pixels=torch.from_numpy(pixels), observed=observed)


def _channels_first(
    array: Shaped[np.ndarray, "..."], name: str
) -> Shaped[np.ndarray, "count channels height width"]:
    match array.shape:
        case (0, *_):
            raise DataError(f"Expected at least one image in {name}; got none.")
        case shape if 0 in shape:
            raise DataError(
                f"Expected images with pixels in {name}; got {' x '.join(map(str, shape))}."
            )
        case (count, area) if math.isqrt(area) ** 2 == area:
            return array.reshape(count, 1, math.isqrt(area), math.isqrt(area))
        case (_, _, _):
            return array[:, None]
        case (_, _, _, 1 | 3):
            return np.moveaxis(array, -1, 1)
        case (_, 1 | 3, _, _):
            return array
        case shape:
            raise DataError(
                f"Expected {name} as count x height x width, with 1 or 3 channels before or "
                f"after these two if any; got {' x '.join(map(str, shape))}."
            )


def _mask(
    array: Shaped[np.ndarray, "..."], name: str, shape: tuple[int, ...]
) -> Bool[np.ndarray, "count channels height width"]:
    mask = _channels_first(array, name)
    if mask.shape not in (shape, (shape[0], 1, *shape[2:])):
        raise DataError(
            f"Expected {name} for {shape[0]} images of {_size(shape[1:])}; "
            f"got {len(mask)} of {_size(mask.shape[1:])}."
        )
    return np.broadcast_to(mask != 0, shape)


def _levels(
    array: Shaped[np.ndarray, "count channels height width"], name: str
) -> UInt8[np.ndarray, "count channels height width"]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype.kind != "f":
        raise DataError(f"Expected {name} of bytes, floats or booleans; got {array.dtype}.")
    values = np.where(np.isnan(array), 0, array)
    if values.min() < 0 or values.max() > 1:
        raise DataError(
            f"Expected {name} from 0 to 1, or NaN; got {values.min():g} to {values.max():g}."
        )
    return np.rint(values * 255).astype(np.uint8)


# From users' files to arrays.


def _unpack_splits(path: Path) -> Arrays:
    with stored_in(path) as stored:
        if "train" not in stored:
            raise DataError(
                f"Expected an array train in {path.name}; got {', '.join(stored) or 'none'}."
            )
        names = [name for split in SPLITS for name in (split, f"{split}_missing")]
        return {name: stored[name] for name in names if name in stored}


def _pictures(folder: Path) -> Arrays:
    masks = set(folder.glob("*.mask.png"))
    paths = sorted(set(folder.glob("*.png")) - masks)
    if not paths:
        raise DataError(f"Expected PNG images in {folder}; got none.")
    if orphans := masks - {path.with_suffix(".mask.png") for path in paths}:
        raise DataError(f"Expected an image beside {min(orphans).name}; got none.")
    pictures = [_picture(path) for path in paths]
    expected = pictures[0][:-1].shape
    for path, picture in zip(paths, pictures, strict=True):
        if picture[:-1].shape != expected:
            raise DataError(
                f"Expected {path.name} of {_size(expected)}, as {paths[0].name}; "
                f"got {_size(picture[:-1].shape)}."
            )
    planes = np.moveaxis(np.stack(pictures), 1, -1)
    return {"train": planes[..., :-1], "train_missing": planes[..., -1] == 0}


def _picture(path: Path) -> UInt8[np.ndarray, "channels_and_alpha height width"]:
    """The levels of a picture with, last, an alpha that is 0 exactly where it is missing."""
    with reading(path), Image.open(path) as image:
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise DataError(f"Expected {path.name} of 8 bits a channel; got mode {image.mode}.")
        levels = np.array(image.convert("LA" if image.mode in ("1", "L", "LA") else "RGBA"))
    mask = path.with_suffix(".mask.png")
    if mask.is_file():
        with reading(mask), Image.open(mask) as image:
            missing = np.asarray(image.convert("L")) > MISSING_ABOVE
        if missing.shape != levels.shape[:2]:
            raise DataError(
                f"Expected {mask.name} of {levels.shape[1]}x{levels.shape[0]} pixels; "
                f"got {missing.shape[1]}x{missing.shape[0]}."
            )
        levels[missing, -1] = 0
    return np.moveaxis(levels, -1, 0)
