"""Pictures and arrays on the wire, to and from numpy; the only part of the service that sees PIL.

What comes in keeps its own kind (8-bit levels, or floats from 0 to 1), so that observed pixels
can go out exactly as they came. Sizes are read from headers and checked before any pixel is.
"""

import base64
import binascii
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from service.errors import BadInput, UnknownFormat

__all__ = [
    "Picture",
    "Shape",
    "encode",
    "read_mask",
    "read_picture",
    "to_npy",
    "to_png",
    "warm",
]

Shape = tuple[int, int, int]
Encoded = str | bytes | list[Any]
NPY = b"\x93NUMPY"
MAX_LEVEL, MASK_CUT, MAX_AXES = 255, 127, 3
NUMBERS = {np.dtype(kind).type for kind in "?bBhHiIlLqQefd"}
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def warm() -> None:
    """Loads what reads each format, so that the first picture does not wait for it."""
    Image.init()


@dataclass(frozen=True)
class Picture:
    """A decoded image with its holes."""

    pixels: np.ndarray
    """As they came, channels first: uint8 levels from 0 to 255, or floats from 0 to 1."""
    missing: np.ndarray
    """Height by width."""

    @cached_property
    def values(self) -> np.ndarray:
        """The pixels as floats from 0 to 1, zero where missing."""
        scaled = self.pixels / 255 if self.pixels.dtype == np.uint8 else self.pixels
        return np.where(self.missing, 0.0, scaled).astype(np.float32)

    def completed(self, imputed: np.ndarray) -> np.ndarray:
        """The pixels as they came, and imputed ones, cut to what pixels are, where missing."""
        imputed = imputed.clip(0, 1)
        if self.pixels.dtype == np.uint8:
            imputed = (imputed * 255).round()
        return np.where(self.missing, imputed, self.pixels).astype(self.pixels.dtype)


def read_picture(
    image: Encoded, mask: Encoded | None, shape: Shape, *, field: str, mask_field: str = "mask"
) -> Picture:
    """The image that a file, its base64 text or nested lists hold, and what of it is missing.

    Missing is what the mask says, and besides alpha 0 and null; without a mask NaN too. What is
    under the mask may be anything.

    Raises:
        UnknownFormat: The bytes are no image or array.
        BadInput: Another size, more than one frame, values out of range, or NaN or infinity
            where nothing is missing.
    """
    hidden = None if mask is None else read_mask(mask, shape, field=mask_field)
    content = _content(image, field)
    if isinstance(content, bytes):
        return _from_image(_open(content, field, shape), hidden, field, shape[0])
    array = _channels_first(content, field, shape)
    missing = np.asarray(np.isnan(array).any(0))
    if hidden is not None:
        missing = hidden | missing if isinstance(image, list) else hidden
    seen = np.where(missing, array.dtype.type(0), array)
    return Picture(_levels_or_floats(seen, field), missing)


def read_mask(value: Encoded, shape: Shape, *, field: str) -> np.ndarray:
    """Height by width, true where missing: above 127 in a picture, true or nonzero otherwise."""
    content = _content(value, field)
    if isinstance(content, bytes):
        return np.asarray(_open(content, field, shape).convert("L")) > MASK_CUT
    array = _channels_first(content, field, (1, *shape[1:]))[0]
    with np.errstate(invalid="ignore"):  # signalling NaN
        whole = np.isin(array, np.arange(MAX_LEVEL + 1))
    if not whole.all():
        raise BadInput.of(field, "true and false, or 0 and 1, or levels to 255", "other numbers")
    return array > (0 if array.max(initial=0) <= 1 else MASK_CUT)


def encode(pixels: np.ndarray, encoding: str) -> Any:
    """The pixels, channels first, as base64 PNG, base64 NPY or nested lists."""
    if encoding == "list":
        floats = pixels / 255 if pixels.dtype == np.uint8 else pixels
        return floats.squeeze(0).tolist() if len(pixels) == 1 else floats.tolist()
    data = to_png(pixels) if encoding == "png" else to_npy(pixels)
    return base64.b64encode(data).decode()


def to_png(pixels: np.ndarray) -> bytes:
    """The pixels, channels first, as a PNG of eight bits."""
    levels = pixels
    if pixels.dtype != np.uint8:
        levels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def to_npy(pixels: np.ndarray) -> bytes:
    """The pixels, channels first or of one channel, as an NPY array."""
    out = io.BytesIO()
    np.save(out, pixels[0] if len(pixels) == 1 else pixels, allow_pickle=False)
    return out.getvalue()


def _base64(text: str, field: str) -> bytes:
    try:
        return base64.b64decode(
            text.partition(",")[2] if text[:5] == "data:" else text, validate=True
        )
    except (binascii.Error, ValueError) as error:
        raise BadInput.of(field, "base64 text", f"text that is not ({error})") from error


def _content(value: Encoded, field: str) -> np.ndarray | bytes:
    """The array of nested lists or of an NPY file, or the bytes of any other file."""
    if isinstance(value, list):
        return _nested(value, field)
    data = value if isinstance(value, bytes) else _base64(value, field)
    return _npy(data, field) if data.startswith(NPY) else data


def _open(data: bytes, field: str, shape: Shape) -> Image.Image:
    """The picture, of the right size, as RGBA."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except BOMBS as error:
        raise BadInput.of(field, _size(shape), f"a decompression bomb ({error})") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise UnknownFormat.of(
            field, f"a picture ({', '.join(FORMATS)}) or an NPY array", _beginning(data)
        ) from error
    if sorted(image.size) != sorted(shape[1:]):
        raise BadInput.of(field, _size(shape), f"{image.height}x{image.width}")
    if image.mode not in EIGHT_BIT or "16" in _raw_mode(image):
        raise BadInput.of(field, "grey or colour of 8 bits", f"mode {_raw_mode(image)}")
    try:
        several = getattr(image, "is_animated", False)  # to count them can take minutes
        upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:
        raise BadInput.of(field, "a whole picture", f"one that is damaged ({error})") from error
    if several:
        raise BadInput.of(field, "one frame", "several")
    if upright.size != (shape[2], shape[1]):
        raise BadInput.of(field, _size(shape), f"{upright.height}x{upright.width}")
    return upright


def _raw_mode(image: Image.Image) -> str:
    """How the file holds the pixels: it may have more bits than the mode that PIL reads it in."""
    arguments = image.tile[0].args if isinstance(image, ImageFile) and image.tile else None
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return str(raw or image.mode)


def _from_image(
    image: Image.Image, hidden: np.ndarray | None, field: str, channels: int
) -> Picture:
    rgba = np.asarray(image)
    colour, missing = rgba[..., :3], rgba[..., 3] == 0
    if hidden is not None:
        missing = missing | hidden
    if channels == 1:
        seen = colour[~missing]
        if (seen != seen[:, :1]).any():
            raise BadInput.of(field, "a grey picture", "colours")
        colour = colour[..., :1]
    return Picture(np.ascontiguousarray(colour.transpose(2, 0, 1)), missing)


def _levels_or_floats(seen: np.ndarray, field: str) -> np.ndarray:
    """Integers as levels to 255 where one is above 1, and everything else as floats."""
    if not np.isfinite(seen).all():
        stray = int((~np.isfinite(seen)).any(0).sum())
        raise BadInput.of(
            field, "finite numbers where nothing is missing", f"NaN or infinity in {stray} pixels"
        )
    floats = seen.dtype.kind == "f"
    low, high, top = seen.min(initial=0), seen.max(initial=0), 1 if floats else MAX_LEVEL
    if low < 0 or high > top:
        raise BadInput.of(field, f"values from 0 to {top}", f"values from {low} to {high}")
    if floats:
        return seen
    return seen.astype(np.float32 if high <= 1 else np.uint8)


def _nested(value: list[Any], field: str) -> np.ndarray:
    """An array of floats from nested lists, whose nulls become NaN."""
    try:
        array = np.array(value, dtype=object)
    except ValueError:
        array = np.array(None)
    flat = array.ravel().tolist()
    if not 0 < array.ndim <= MAX_AXES or not all(_is_number(v) for v in flat):
        raise BadInput.of(
            field, "rows of equally many finite numbers, true, false or null", "other lists"
        )
    return array.astype(bool if all(isinstance(v, bool) for v in flat) else np.float64)


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max
    return value is None or (isinstance(value, int | float) and -largest <= value <= largest)


def _npy(data: bytes, field: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy too, of a damaged header
        raise BadInput.of(field, "an NPY array without objects", str(error)) from error
    if array.dtype.type not in NUMBERS:
        raise BadInput.of(field, "booleans, integers or floats", f"an array of {array.dtype}")
    return array


def _channels_first(array: np.ndarray, field: str, shape: Shape) -> np.ndarray:
    channels, height, width = shape
    readings: dict[tuple[int, ...], Callable[[], np.ndarray]] = {
        (channels, height, width): lambda: array,
        (height, width, channels): lambda: array.transpose(2, 0, 1),
    }
    if channels == 1:
        readings[(height, width)] = lambda: array[None]
    if array.shape not in readings:
        got = "x".join(map(str, array.shape)) or "a number"
        raise BadInput.of(field, _size(shape), got)
    return readings[array.shape]()


def _size(shape: Shape) -> str:
    channels, height, width = shape
    return f"{height}x{width} pixels" + (f" of {channels} channels" if channels > 1 else "")


def _beginning(data: bytes) -> str:
    return f"{len(data)} bytes that begin with {data[:8]!r}" if data else "no bytes"
