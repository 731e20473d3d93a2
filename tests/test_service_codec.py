"""The codec: every kind of picture is read as what it is, and anything else is a problem."""

import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.codec import FORMATS, Picture, encode, read_mask, read_picture
from service.errors import BadInput, Problem, UnknownFormat
from tests.wire import (
    COLOUR,
    KINDS,
    SHAPE,
    npy,
    picture,
    pixels_of,
    random_levels,
    random_mask,
    text,
)

LEVELS, MASK = random_levels(), random_mask()
MAGIC = [
    b"",
    b"\x93NUMPY\x01\x00",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"II*\x00",
    b"MM\x00*",
    b"RIFF\x10\x00\x00\x00WEBPVP8 ",
]


def _read(image: Any, mask: Any = None, shape: tuple[int, int, int] = SHAPE) -> Picture:
    return read_picture(image, mask, shape, field="image")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_it_came(kind: str):
    """Seen pixels have the values that were sent, and holes are where the image says."""
    read = _read(KINDS[kind].encoded)

    np.testing.assert_array_equal(read.missing, KINDS[kind].missing)
    seen = ~read.missing
    np.testing.assert_array_equal(read.pixels[0][seen], KINDS[kind].pixels[seen])
    assert read.pixels.dtype == KINDS[kind].pixels.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_between_zero_and_one(kind: str):
    """What the model is given is scaled, of single precision, and zero where missing."""
    hidden = KINDS[kind].missing | MASK
    read = _read(KINDS[kind].encoded, hidden.tolist())

    expected = KINDS[kind].pixels / (255 if KINDS[kind].pixels.dtype == np.uint8 else 1)
    np.testing.assert_array_equal(read.missing, hidden)
    np.testing.assert_array_equal(read.values[0], np.where(hidden, 0, expected).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["png", "npy", "list"])
def test_seen_pixels_survive_a_round_trip(kind: str, encoding: str):
    """An image with its holes filled is the image that was sent, outside the holes, to the bit."""
    read = _read(KINDS[kind].encoded, (KINDS[kind].missing | MASK).tolist())
    sent = KINDS[kind].pixels
    came = pixels_of(encode(read.completed(np.full(SHAPE, 0.25, np.float32)), encoding))

    seen = ~read.missing
    levels = sent.dtype == np.uint8
    as_sent = {"png": sent if levels else (sent * 255).round(), "npy": sent}
    np.testing.assert_array_equal(
        came[seen], as_sent.get(encoding, sent / 255 if levels else sent)[seen]
    )
    assert encoding != "npy" or came.dtype == sent.dtype
    filled = 0.25 if encoding != "png" and not (encoding == "npy" and levels) else 64
    np.testing.assert_allclose(came[~seen], 64 / 255 if encoding == "list" and levels else filled)


@pytest.mark.parametrize(
    "mask",
    [
        text(picture(np.where(MASK, 255, 0).astype(np.uint8))),
        text(picture(np.where(MASK, 128, 127).astype(np.uint8))),
        text(picture(Image.fromarray(MASK))),
        text(picture(np.repeat(np.where(MASK, 200, 3).astype(np.uint8)[..., None], 3, -1))),
        text(npy(MASK)),
        text(npy(MASK.astype(np.int32))),
        text(npy(MASK.astype(np.float32))),
        text(npy(np.where(MASK, 255, 0))),
        MASK.tolist(),
        MASK.astype(int).tolist(),
        [MASK.tolist()],
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, (3, *SHAPE[1:])])
def test_masks_of_every_kind(mask: Any, shape: tuple[int, int, int]):
    """Above 127 in a picture, true or nonzero in an array, for grey and colour models."""
    np.testing.assert_array_equal(read_mask(mask, shape, field="mask"), MASK)


def test_anything_may_be_under_the_mask():
    """NaN, infinity and values out of range do no harm where the mask says that they are missing.

    Also a marker such as -9999 among integer levels, which stay levels.
    """
    for stray in (np.nan, np.inf, -7.0):
        read = _read(text(npy(np.where(MASK, stray, 0.5))), MASK.tolist())
        np.testing.assert_array_equal(read.values[0], np.where(MASK, 0, 0.5))
    levels = np.where(MASK, -9999, LEVELS.astype(np.int16))
    marked = _read(text(npy(levels)), MASK.tolist())

    assert marked.pixels.dtype == np.uint8
    np.testing.assert_array_equal(marked.pixels[0][~MASK], LEVELS[~MASK])
    coloured = np.where(MASK[..., None], [255, 0, 0], LEVELS[..., None]).astype(np.uint8)
    np.testing.assert_array_equal(
        _read(text(picture(coloured)), MASK.tolist()).pixels[0][~MASK], LEVELS[~MASK]
    )


def test_colour_comes_channels_first():
    """A colour picture, and an array with its channels first or last, are the same image."""
    levels = random_levels(5, (*COLOUR[1:], 3))
    sent = [picture(levels), npy(levels), npy(levels.transpose(2, 0, 1))]

    for data in sent:
        read = _read(text(data), shape=COLOUR)
        np.testing.assert_array_equal(read.pixels, levels.transpose(2, 0, 1))
        np.testing.assert_array_equal(pixels_of(encode(read.pixels, "png")), levels)


def test_a_data_url_is_base64():
    """What a browser's canvas gives is taken as it is."""
    url = f"data:image/png;base64,{text(picture(LEVELS))}"

    np.testing.assert_array_equal(_read(url).pixels[0], LEVELS)


def _deep(colour: int, channels: int) -> bytes:
    """A black PNG of 16 bits a channel, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", SHAPE[2], SHAPE[1], 16, colour, 0, 0, 0)
    rows = bytes((1 + SHAPE[2] * 2 * channels) * SHAPE[1])
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _animated(kind: str) -> bytes:
    frames = [Image.fromarray(random_levels(seed)).convert("RGB") for seed in range(2)]
    return picture(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


HUGE_HEADER = npy(LEVELS)[:10] + (
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (4000000, 1000000)}".ljust(
        int.from_bytes(npy(LEVELS)[8:10], "little") - 1
    )
    + b"\n"
)
GREY = Image.fromarray(LEVELS)
BAD: dict[str, tuple[Any, type[Problem], str]] = {
    "another size": (text(picture(LEVELS[:5])), BadInput, "5x5"),
    "height for width": (text(picture(LEVELS.T.copy())), BadInput, "5x6"),
    "not an image": (text(b"hello"), UnknownFormat, "hello"),
    "a GIF": (text(picture(GREY, "GIF")), UnknownFormat, "GIF8"),
    "empty text": ("", UnknownFormat, "no bytes"),
    "a data URL without data": ("data:image/png;base64", UnknownFormat, "no bytes"),
    "an npz file": (text(b"PK\x03\x04rest"), UnknownFormat, "PK"),
    "not base64": ("?", BadInput, "base64"),
    "not ASCII": ("é", BadInput, "base64"),
    "a path": ("/etc/passwd", BadInput, "base64"),
    "animated WebP": (text(_animated("WEBP")), BadInput, "several"),
    "animated PNG": (text(_animated("PNG")), BadInput, "several"),
    "TIFF of two pages": (
        text(picture(GREY, "TIFF", save_all=True, append_images=[GREY])),
        BadInput,
        "several",
    ),
    "16-bit PNG": (text(_deep(colour=0, channels=1)), BadInput, "16"),
    "16-bit PNG with alpha": (text(_deep(colour=4, channels=2)), BadInput, "16"),
    "16-bit RGB PNG": (text(_deep(colour=2, channels=3)), BadInput, "16"),
    "float TIFF": (text(picture(GREY.convert("F"), "TIFF")), BadInput, "mode"),
    "CMYK JPEG": (text(picture(GREY.convert("CMYK"), "JPEG")), BadInput, "CMYK"),
    "colours": (text(picture(random_levels(1, (6, 5, 3)))), BadInput, "colours"),
    "bomb": (text(picture(Image.new("1", (10_000, 10_000)))), BadInput, "bomb"),
    "larger bomb": (
        text(picture(Image.new("1", (14_000, 14_000)))),
        BadInput,
        "bomb",
    ),
    "NPY with a huge header": (text(HUGE_HEADER), BadInput, "NPY"),
    "NPY cut short": (text(npy(LEVELS)[:-1]), BadInput, "NPY"),
    "NPY of objects": (
        text(npy(np.array([{1: 2}], dtype=object), allow_pickle=True)),
        BadInput,
        "Object arrays",
    ),
    "NPY of structures": (text(npy(np.zeros((6, 5), "f4,f4"))), BadInput, "f4"),
    "NPY of text": (text(npy(np.full((6, 5), "a"))), BadInput, "U1"),
    "NPY of complex": (text(npy(np.zeros((6, 5), complex))), BadInput, "complex"),
    "NPY of dates": (text(npy(np.zeros((6, 5), "M8[s]"))), BadInput, "datetime"),
    "NPY of a scalar": (text(npy(np.array(1.0))), BadInput, "a number"),
    "NPY of four axes": (text(npy(LEVELS[None, None])), BadInput, "1x1x6x5"),
    "infinity": (text(npy(np.full((6, 5), np.inf))), BadInput, "infinity in 30"),
    "a float above one": (text(npy(np.full((6, 5), 1.5))), BadInput, "1.5"),
    "a float below zero": (text(npy(np.full((6, 5), -0.5))), BadInput, "-0.5"),
    "a negative integer": (text(npy(np.full((6, 5), -1))), BadInput, "-1"),
    "an integer above 255": (text(npy(np.full((6, 5), 256))), BadInput, "256"),
    "an unsigned giant": (text(npy(np.full((6, 5), 2**64 - 1, np.uint64))), BadInput, "1844"),
    "ragged lists": ([[0.0, 1.0], [0.0]], BadInput, "rows"),
    "lists of another size": ([[0.0]], BadInput, "1x1"),
    "an empty list": ([], BadInput, "0"),
    "text in lists": ([["0.5"] * 5] * 6, BadInput, "rows"),
    "objects in lists": ([[{}] * 5] * 6, BadInput, "rows"),
    "levels in lists": ([[7] * 5] * 6, BadInput, "from 0 to 1"),
    "NaN in lists": ([[float("nan")] * 5] * 6, BadInput, "finite"),
    "infinity in lists": ([[float("inf")] * 5] * 6, BadInput, "finite"),
    "a giant in lists": ([[10**400] * 5] * 6, BadInput, "finite"),
}


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_problems_that_name_the_field(name: str):
    """Each is refused with the field, what was expected and what came."""
    sent, problem, got = BAD[name]
    with pytest.raises(problem) as failure:
        _read(sent)

    (error,) = failure.value.errors
    assert error.field == "image"
    assert error.expected
    assert got in f"{error.expected} {error.got}"


@pytest.mark.parametrize("depth", [3, 63, 64, 65, 1000, 20_000])
def test_deep_lists_are_a_problem(depth: int):
    """However deep, lists that are no image are refused."""
    with pytest.raises(BadInput):
        _read(_nested(depth))


@pytest.mark.parametrize(
    "mask",
    [
        text(picture(MASK[:5])),
        MASK[:5].tolist(),
        [[0.5] * 5] * 6,
        [[None] * 5] * 6,
        [[-1] * 5] * 6,
        [[256] * 5] * 6,
        text(npy(np.full((6, 5), np.inf))),
        text(npy(np.full((6, 5), np.nan))),
        text(npy(np.zeros((3, 6, 5)))),
        [["a"] * 5] * 6,
        [[1], [1, 2]],
    ],
)
def test_bad_masks_are_problems_that_name_the_mask(mask: Any):
    """A mask of another size or of other numbers is refused by its own name."""
    with pytest.raises(BadInput) as failure:
        _read(text(picture(LEVELS)), mask)

    assert failure.value.errors[0].field == "mask"


def test_a_hole_needs_the_mask_where_one_is_given():
    """NaN is missing by itself, but beside a mask it must be under it."""
    holed = np.where(MASK, np.nan, 0.5)
    np.testing.assert_array_equal(_read(text(npy(holed))).missing, MASK)
    smaller = MASK.copy()
    smaller[tuple(np.argwhere(MASK)[0])] = False

    with pytest.raises(BadInput, match="NaN or infinity in 1 pixels"):
        _read(text(npy(holed)), smaller.tolist())


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if isinstance(v.sent, bytes)])
def test_no_cut_of_a_file_is_a_fault(kind: str):
    """A file that ends early is read whole, or refused."""
    sent = KINDS[kind].sent
    assert isinstance(sent, bytes)
    for length in {0, 1, 7, 8, 9, 20, 33, 40, len(sent) // 2, len(sent) - 13, len(sent) - 1}:
        with suppress(Problem):
            _read(text(sent[:length]))


def _is_fine_or_a_problem(data: bytes, shape: tuple[int, int, int] = SHAPE) -> None:
    for mask in (None, text(data)):
        try:
            read = read_picture(text(data), mask, shape, field="image")
        except Problem:
            continue
        assert read.values.shape == shape
        assert np.isfinite(read.values).all()
        assert 0 <= read.values.min() <= read.values.max() <= 1


@given(st.binary(max_size=200), st.sampled_from(MAGIC))
def test_random_bytes_are_no_fault(data: bytes, start: bytes):
    """Bytes without meaning are a problem, whatever a file begins with."""
    _is_fine_or_a_problem(start + data)


@given(st.data())
def test_damaged_files_are_no_fault(data: st.DataObject):
    """A file with some of its bytes changed is an image or a problem, and nothing else."""
    sources = [v.sent for v in KINDS.values() if isinstance(v.sent, bytes)]
    content = bytearray(data.draw(st.sampled_from(sources)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    _is_fine_or_a_problem(bytes(content))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=6),
        max_leaves=40,
    )
)
def test_any_lists_are_no_fault(value: Any):
    """Whatever JSON may hold is an image or a problem."""
    sent = value if isinstance(value, list) else [value]
    try:
        read = _read(sent, shape=(1, 1, 2))
    except Problem:
        return
    assert read.pixels.shape == (1, 1, 2)


def test_a_picture_is_read_from_its_header_first():
    """The pixels of a picture of another size are never decoded."""
    whole = picture(Image.new("L", (5000, 5000)))
    cut = whole[:60]  # its header only
    with pytest.raises(BadInput, match="5000x5000"):
        _read(text(cut))
    assert isinstance(Image.open(io.BytesIO(cut)), Image.Image)


def test_what_reads_pictures_is_there_before_the_first() -> None:
    """After `warm` no format has to be loaded any more."""
    told = "from PIL import Image; from service import codec; codec.warm(); print(*Image.OPEN)"
    found = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True
    )

    assert set(FORMATS) <= set(found.stdout.split())
