"""Images of users' archives and folders, their splits, and pictures of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.data import DataError, Dataset, Images, Split, load, save_picture
from model.noise import Noise


def _images(seed: int, *shape: int, top: int = 255) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top + 1, shape, dtype=np.uint8)


def _splits(dataset: Dataset) -> tuple[Images, Images, Images]:
    return dataset.train, dataset.validation, dataset.test


# Users' archives.


def _archive(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path / "mine.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return str(path / "mine.npz")


def test_archive_without_splits_is_split_80_10_10(tmp_path: Path) -> None:
    """The splits are disjoint, cover everything, are shuffled, and are the same every time."""
    numbered = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 3), np.uint8)
    mine = load(_archive(tmp_path, train=numbered))
    numbers = [part.pixels[:, 0, 0, 0].tolist() for part in _splits(mine)]

    assert [len(part) for part in numbers] == [40, 5, 5]
    assert sorted(number for part in numbers for number in part) == list(range(50))
    assert numbers[0] != sorted(numbers[0])
    assert load(_archive(tmp_path, train=numbered)).sha256 == mine.sha256
    assert (mine.name, mine.source, mine.binary) == ("mine", "mine.npz", False)


def test_splitting_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    """A load changes no random numbers drawn elsewhere."""
    before = torch.get_rng_state()
    load(_archive(tmp_path, train=_images(0, 30, 4, 4)))

    assert torch.equal(torch.get_rng_state(), before)


def test_given_splits_are_kept(tmp_path: Path) -> None:
    """Only the split that is absent is taken from the training images."""
    train, test = _images(0, 20, 4, 4), _images(1, 7, 4, 4)
    mine = load(_archive(tmp_path, train=train, test=test))

    assert [len(part) for part in _splits(mine)] == [18, 2, 7]
    assert torch.equal(mine.test.pixels[:, 0], torch.from_numpy(test))


def test_nan_and_masks_are_missing(tmp_path: Path) -> None:
    """NaN and nonzero mask entries are unobserved, and what is there is set to zero."""
    train = np.full((10, 4, 4), 0.5, np.float32)
    train[0, 0, 0] = np.nan
    missing = np.zeros((10, 4, 4), np.uint8)
    missing[1, 1, 1] = 255
    whole = np.ones((2, 4, 4), np.float32)
    mine = load(
        _archive(tmp_path, train=train, train_missing=missing, validation=whole, test=whole)
    )

    assert mine.train.observed is not None
    assert (~mine.train.observed).nonzero().tolist() == [[0, 0, 0, 0], [1, 0, 1, 1]]
    assert (mine.train.pixels == torch.where(mine.train.observed, 128, 0)).all()
    assert mine.test.observed is None
    assert mine.test.pixels.min() == 255


def test_masks_follow_their_images_through_the_split(tmp_path: Path) -> None:
    """A shuffled split takes each image's mask along."""
    train = np.arange(1, 31, dtype=np.uint8)[:, None, None] * np.ones((1, 5, 5), np.uint8)
    missing = np.zeros((30, 5, 5), bool)
    missing[np.arange(30), 0, np.arange(30) % 5] = True
    mine = load(_archive(tmp_path, train=train, train_missing=missing))

    for part in _splits(mine):
        assert part.observed is not None
        hole = (~part.observed[:, 0, 0]).long().argmax(-1)
        assert torch.equal(hole, (part.pixels[:, 0, 4, 4].long() - 1) % 5)


@pytest.mark.parametrize(
    ("train", "top"),
    [
        (_images(0, 12, 4, 4, top=1), 255),
        (_images(0, 12, 4, 4, top=1).astype(bool), 255),
        (_images(0, 12, 4, 4, top=1).astype(np.float64), 255),
        (_images(0, 12, 4, 4, top=1) * np.uint8(255), 255),
        (_images(0, 12, 4, 4, top=2), 2),
    ],
    ids=["0/1", "bool", "0.0/1.0", "0/255", "grey"],
)
def test_binary_in_whatever_type(train: np.ndarray, top: int, tmp_path: Path) -> None:
    """Zero and one mean black and white, of whatever type they are."""
    mine = load(_archive(tmp_path, train=train))

    assert mine.binary == (top == 255)
    assert mine.train.pixels.max() == top


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((10, 16), (1, 4, 4)),
        ((10, 4, 5), (1, 4, 5)),
        ((10, 4, 5, 3), (3, 4, 5)),
        ((10, 3, 4, 5), (3, 4, 5)),
        ((10, 4, 5, 1), (1, 4, 5)),
    ],
)
def test_layouts(shape: tuple[int, ...], expected: tuple[int, int, int], tmp_path: Path) -> None:
    """Flat squares, grey images, and colour before or after the sides are all understood."""
    mine = load(_archive(tmp_path, train=_images(0, *shape)))

    assert mine.train.pixels.shape == (8, *expected)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"pixels": _images(0, 9, 4, 4)}, "Expected an array train in mine.npz; got pixels."),
        ({"train": _images(0, 9, 4, 5, 6)}, "got 9 x 4 x 5 x 6."),
        ({"train": _images(0, 0, 4, 4)}, "Expected at least one image in train; got none."),
        ({"train": _images(0, 1, 4, 4)}, "Expected more than 1 training images"),
        ({"train": np.arange(160).reshape(10, 4, 4)}, "floats or booleans; got int64."),
        ({"train": np.full((10, 4, 4), 7.5)}, "from 0 to 1, or NaN; got 7.5 to 7.5."),
        ({"train": np.full((10, 4, 4), np.inf)}, "from 0 to 1, or NaN; got inf to inf."),
        (
            {"train": _images(0, 9, 4, 4), "test": _images(0, 9, 5, 6)},
            "Expected test images of 4x4 pixels in 1 channel, as in train; got 6x5 pixels",
        ),
        (
            {"train": _images(0, 9, 4, 4), "train_missing": _images(0, 8, 4, 4)},
            "Expected train_missing for 9 images of 4x4 pixels in 1 channel; got 8 of 4x4",
        ),
        ({"train": np.array([{}, {}])}, "Expected mine.npz as a .npz file; got: Object arrays"),
    ],
)
def test_archive_that_cannot_be_used(
    arrays: dict[str, np.ndarray], sentence: str, tmp_path: Path
) -> None:
    """An archive that is not as expected is refused in a sentence; a pickle is never loaded."""
    with pytest.raises(DataError) as error:
        load(_archive(tmp_path, **arrays))

    assert sentence in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x80\x04N."])
def test_file_that_is_no_archive(content: bytes, tmp_path: Path) -> None:
    """Something else under the name of an archive is refused."""
    (tmp_path / "mine.npz").write_bytes(content)

    with pytest.raises(DataError, match=r"Expected mine\.npz as a \.npz file"):
        load(str(tmp_path / "mine.npz"))


def test_bytes_of_0_and_1_beside_floats(tmp_path: Path) -> None:
    """Whether a byte of 1 is white is a matter of the bytes, not of other splits' numbers."""
    ones = np.ones((12, 2, 2))
    path = _archive(
        tmp_path,
        train=ones.astype(np.float32),
        validation=(ones * 0.004).astype(np.float32),
        test=ones.astype(np.uint8),
    )
    dataset = load(path)

    assert [int(part.pixels.max()) for part in _splits(dataset)] == [255, 1, 255]


def test_content_hash_sees_pixels_masks_and_splits(tmp_path: Path) -> None:
    """Two data sets have one hash only if every split, pixel and mask is the same."""
    train, hole = _images(0, 12, 4, 4), np.zeros((12, 4, 4), bool)
    hole[3] = True
    emptied = np.where(hole, 0, train).astype(np.uint8)
    hashes = {
        load(_archive(tmp_path, **arrays)).sha256
        for arrays in (
            {"train": train},
            {"train": train, "test": train},
            {"train": emptied},
            {"train": emptied, "train_missing": hole},
            {"train": train.reshape(12, 2, 8)},
        )
    }

    assert len(hashes) == 5


def test_colour_masks_may_be_per_pixel(tmp_path: Path) -> None:
    """One mask of the sides hides all channels of a pixel."""
    missing = np.zeros((10, 4, 5), bool)
    missing[:, 1, 2] = True
    mine = load(_archive(tmp_path, train=_images(0, 10, 4, 5, 3), train_missing=missing))

    assert mine.train.observed is not None
    assert not mine.train.observed[:, :, 1, 2].any()
    assert mine.train.observed.sum() == 8 * 3 * 19


# Users' pictures.


def _picture(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def test_folder_of_pictures_with_masks_and_alpha(tmp_path: Path) -> None:
    """A mask above 127 and an alpha of 0 are missing; the names give the order."""
    folder = tmp_path / "holiday"
    folder.mkdir()
    for number in range(10):
        _picture(folder / f"{number}.png", np.full((3, 4), 10 + number, np.uint8))
    _picture(folder / "0.mask.png", np.array([[255, 128, 127, 0]] * 3, np.uint8))
    with_alpha = np.full((3, 4, 2), 11, np.uint8)
    with_alpha[2, :, 1] = 0
    _picture(folder / "1.png", with_alpha)
    mine = load(str(folder))

    assert (mine.name, mine.source) == ("holiday", "PNG images of the folder holiday")
    assert [len(part) for part in _splits(mine)] == [8, 1, 1]
    pixels = torch.cat([part.pixels for part in _splits(mine)])[:, 0]
    seen = torch.cat([part.observed for part in _splits(mine) if part.observed is not None])[:, 0]
    levels = {int(p.max()): o for p, o in zip(pixels, seen, strict=True) if not o.all()}
    assert levels[10].tolist() == [[False, False, True, True]] * 3
    assert levels[11].tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert pixels.amax((1, 2)).sort().values.tolist() == list(range(10, 20))


def test_folder_of_colour_pictures(tmp_path: Path) -> None:
    """Colour, colour with alpha, and a palette are all three channels."""
    colour = _images(0, 3, 4, 3)
    for number in range(8):
        _picture(tmp_path / f"{number}.png", colour)
    _picture(tmp_path / "8.png", np.dstack([colour, np.full((3, 4), 255, np.uint8)]))
    Image.fromarray(colour).quantize(12).save(tmp_path / "9.png")
    mine = load(str(tmp_path))

    assert mine.train.pixels.shape == (8, 3, 3, 4)
    assert mine.train.observed is None


def _with_two(tmp_path: Path, name: str, array: np.ndarray) -> str:
    _picture(tmp_path / "a.png", _images(0, 28, 28))
    _picture(tmp_path / name, array)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        (
            "b.png",
            _images(0, 30, 32),
            "Expected b.png of 28x28 pixels in 1 channel, as a.png; "
            "got 32x30 pixels in 1 channel.",
        ),
        (
            "b.png",
            _images(0, 28, 28, 3),
            "Expected b.png of 28x28 pixels in 1 channel, as a.png; "
            "got 28x28 pixels in 3 channels.",
        ),
        ("a.mask.png", _images(0, 30, 32), "Expected a.mask.png of 28x28 pixels; got 32x30."),
        ("c.mask.png", _images(0, 28, 28), "Expected an image beside c.mask.png; got none."),
        (
            "b.png",
            _images(0, 28, 28).astype(np.uint16),
            "Expected b.png of 8 bits a channel; got mode I;16.",
        ),
    ],
)
def test_picture_that_does_not_fit(
    name: str, array: np.ndarray, sentence: str, tmp_path: Path
) -> None:
    """The picture or mask that does not fit is named with what was expected and what came."""
    with pytest.raises(DataError) as error:
        load(_with_two(tmp_path, name, array))

    assert str(error.value) == sentence


def test_broken_picture_is_named(tmp_path: Path) -> None:
    """A file that is no picture is refused by its name."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")

    with pytest.raises(DataError, match=r"Expected a\.png as a \.png file"):
        load(str(tmp_path))


def test_empty_folder(tmp_path: Path) -> None:
    """A folder without pictures is refused."""
    with pytest.raises(DataError, match=f"Expected PNG images in {tmp_path}; got none"):
        load(str(tmp_path))


# Splits and pictures.


def test_images_are_sliced_with_their_masks() -> None:
    """A slice or an index takes pixels and masks together."""
    pixels = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    part = Images(pixels=pixels, observed=pixels > 0)
    picked = part[torch.tensor([4, 0])]

    assert len(part[1:3]) == 2
    assert picked.pixels.flatten().tolist() == [4, 0]
    assert picked.observed is not None
    assert picked.observed.flatten().tolist() == [True, False]


def _split(images: Images, **changes: Any) -> Split:
    settings: dict[str, Any] = {"missing": "none", "redraw": False, "binarise": "threshold"}
    device, noise = torch.device("cpu"), Noise(0)
    return Split(images, **{**settings, **changes}, noise=noise, device=device)


@pytest.mark.parametrize("redraw", [True, False])
def test_masks_of_each_epoch(*, redraw: bool) -> None:
    """Masks are drawn once, or others in every epoch, the same whenever one returns to it."""
    images = Images(pixels=torch.zeros(20, 1, 6, 6, dtype=torch.uint8))
    split, masks = _split(images, missing="patches:3", redraw=redraw), list[torch.Tensor]()
    for epoch in (0, 1, 2, 0, 1):
        split.turn_to(epoch)
        masks.append(split.observed)
    differ = [not torch.equal(masks[0], mask) for mask in masks]

    assert differ == ([False, True, True, False, True] if redraw else [False] * 5)
    assert torch.equal(masks[1], masks[4])
    assert (~masks[2]).flatten(1).sum(1).tolist() == [12] * 20


def test_own_masks_stay_hidden() -> None:
    """A pixel that an image lacks is lacking under every mechanism."""
    own = torch.rand(20, 1, 6, 6, generator=Noise(1).generator()) < 0.5
    pixels = torch.full((20, 1, 6, 6), 255, dtype=torch.uint8)
    split = _split(Images(pixels=pixels, observed=own), missing="mcar:0.5", redraw=True)
    split.turn_to(3)
    batch = split.batch(slice(0, 20), Noise(0))

    assert not (batch.observed & ~own).any()
    assert torch.equal(batch.values == 1, batch.observed)
    assert 100 < batch.observed.sum() < own.sum()


def test_every_epoch_has_an_order_of_its_own() -> None:
    """An epoch visits each image once."""
    split = _split(Images(pixels=torch.zeros(20, 1, 1, 1, dtype=torch.uint8)))
    orders = [split.order]
    split.turn_to(1)
    orders.append(split.order)

    assert not torch.equal(*orders)
    assert all(order.sort().values.tolist() == list(range(20)) for order in orders)


def test_threshold_is_fixed_and_bernoulli_drawn() -> None:
    """Above 127 is one; or one with the probability of the level, anew for every batch."""
    levels = torch.tensor([0, 64, 127, 128, 255], dtype=torch.uint8)
    images = Images(pixels=levels.expand(4000, 1, 1, 5).contiguous())
    fixed = _split(images).batch(slice(0, 4000), Noise(1)).values
    split = _split(images, binarise="bernoulli")
    drawn = [split.batch(slice(0, 4000), Noise(seed)).values for seed in (1, 2, 1)]

    assert fixed.mean((0, 1, 2)).tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.allclose(drawn[0].mean((0, 1, 2)), levels / 255, atol=0.03)
    assert drawn[0][..., 0].max() == 0
    assert drawn[0][..., 4].min() == 1


def test_picture_is_a_grid_with_separators(tmp_path: Path) -> None:
    """Each image is enlarged and framed by lines of one pixel; values are clamped to 0..1."""
    rows = torch.tensor([[[[0.0, 2.0]], [[1.0, -1.0]]]])
    save_picture(tmp_path / "grid.png", rows, upscale=2)
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image)

    line = [128] * 11
    row = [128, 0, 0, 255, 255, 128, 255, 255, 0, 0, 128]
    assert grid.tolist() == [line, row, row, line]
