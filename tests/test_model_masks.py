"""Mechanisms of missingness: what each hides, and images that carry holes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.masks import MECHANISMS, Incomplete, MechanismError, mechanism
from model.noise import Noise

SHAPE = (1, 28, 28)

ANGLES = torch.arange(0, math.pi, math.pi / 60)
DIRECTIONS = torch.stack([ANGLES.cos(), ANGLES.sin()])

SPECS = [
    "none",
    "patches:0",
    "patches:4",
    "patches:9",
    "mcar:0",
    "mcar:0.3",
    "mcar:1",
    "block",
    "block:5",
    "block:100",
    "half",
    "strokes",
    "strokes:1",
    "file:one.npy",
    "file:many.npy",
]


@pytest.fixture(autouse=True)
def mask_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A file of one mask and one of seven, in the working directory; gives the seven."""
    monkeypatch.chdir(tmp_path)
    masks = np.random.default_rng(0).random((7, 28, 28)) < 0.4
    np.save("one.npy", masks[0])
    np.save("many.npy", masks)
    return masks


def _draw(
    spec: str, count: int = 50, shape: tuple[int, int, int] = SHAPE, *, seed: int = 0
) -> Tensor:
    return mechanism(spec)(count, shape, Noise(seed).generator())


def test_every_mechanism_is_tested():
    """The laws below hold for each name in the table."""
    assert {spec.partition(":")[0] for spec in SPECS} == set(MECHANISMS)


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("spec", SPECS)
def test_masks_have_the_images_shape_and_one_plane(spec: str, count: int):
    """A mask is Boolean, has the shape of the images, and hides a pixel in every channel."""
    observed = _draw(spec, count, (3, 28, 28))

    assert observed.dtype == torch.bool
    assert observed.shape == (count, 3, 28, 28)
    assert torch.equal(observed, observed[:, :1].expand_as(observed))


@pytest.mark.parametrize("spec", SPECS)
def test_masks_depend_on_the_generator_alone(spec: str):
    """The same generator gives the same masks; where there is chance, another gives others."""
    constant = {"none", "patches:0", "patches:9", "mcar:0", "mcar:1", "block:100", "file:one.npy"}

    assert torch.equal(_draw(spec), _draw(spec))
    assert torch.equal(_draw(spec), _draw(spec, seed=1)) == (spec in constant)


FRACTIONS = {
    "none": 1.0,
    "patches:0": 1.0,
    "patches:9": 0.0,
    "mcar:0": 1.0,
    "mcar:1": 0.0,
    "half": 0.5,
    "block": 1 - 14**2 / 28**2,
    "block:5": 1 - 5**2 / 28**2,
    "block:100": 0.0,
}


@pytest.mark.parametrize(("spec", "fraction"), FRACTIONS.items(), ids=FRACTIONS.keys())
def test_every_mask_observes_the_documented_fraction(spec: str, fraction: float):
    """Not on average but in each image."""
    seen = _draw(spec).double().mean((1, 2, 3))

    torch.testing.assert_close(seen, torch.full((50,), fraction, dtype=torch.float64))


@pytest.mark.parametrize("removed", range(10))
def test_patches_are_removed_whole(removed: int):
    """Exactly n of the nine patches are hidden, with sides 9, 9 and 10 (28 = 9 + 9 + 10)."""
    observed = _draw(f"patches:{removed}", 200)[:, 0]
    patches = [
        part.flatten(1)
        for rows in observed.split([9, 9, 10], 1)
        for part in rows.split([9, 9, 10], 2)
    ]
    kept = torch.stack([p.all(1) for p in patches], 1)
    gone = torch.stack([~p.any(1) for p in patches], 1)

    assert (kept ^ gone).all()
    assert (gone.sum(1) == removed).all()


def test_every_patch_is_removed_as_often():
    """Each of the nine is among three removed ones a third of the time."""
    gone = ~_draw("patches:3", 3000)[:, 0, [0, 0, 0, 13, 13, 13, 27, 27, 27], [0, 13, 27] * 3]
    error = math.sqrt(1 / 3 * 2 / 3 / 3000)

    assert (gone.double().mean(0) - 1 / 3).abs().max() < 4.5 * error


def test_pixels_go_missing_by_their_rate():
    """mcar:P hides each pixel with probability P, wherever it is."""
    gone = ~_draw("mcar:0.3", 1000)

    assert abs(gone.double().mean().item() - 0.3) < 4 * math.sqrt(0.21 / gone.numel())
    by_pixel = gone.double().mean(0)
    assert (by_pixel - 0.3).abs().max() < 5 * math.sqrt(0.21 / 1000)


@pytest.mark.parametrize("side", [1, 5, 14])
def test_a_block_is_one_square(side: int):
    """The hidden pixels are side × side neighbours, anywhere in the image."""
    gone = ~_draw(f"block:{side}", 2000)[:, 0]
    rows, columns = gone.any(2), gone.any(1)

    for hidden in (rows, columns):
        assert (hidden.sum(1) == side).all()
        assert (hidden.diff(dim=1).sum(1) <= 2).all()
        assert hidden.any(0).all()
    assert torch.equal(gone, rows[:, :, None] & columns[:, None, :])


def test_a_half_is_one_of_four():
    """The upper, lower, left or right half is seen, each about as often."""
    observed = _draw("half", 1000)[:, 0]
    kinds, counts = observed.flatten(1).unique(dim=0, return_counts=True)

    assert len(kinds) == 4
    assert (counts - 250).abs().max() < 4 * math.sqrt(1000 * 3 / 16)


@pytest.mark.parametrize("strokes", [1, 3, 10])
def test_strokes_hide_something_but_not_all(strokes: int):
    """Every image loses pixels to its strokes and keeps some; more strokes hide more."""
    observed = _draw(f"strokes:{strokes}", 300).flatten(1)

    assert (~observed).any(1).all()
    assert observed.any(1).all()
    if strokes > 1:
        fewer = _draw(f"strokes:{strokes - 1}", 300)
        assert observed.double().mean() < fewer.double().mean()


def test_a_stroke_is_a_thick_line_anywhere():
    """What one stroke hides is convex, no wider than a fifth of the image, and anywhere."""
    gone = ~_draw("strokes:1", 3000)[:, 0]
    for image in gone[:30]:
        places = image.nonzero()
        sums = places[:, None] + places[None]
        middles = sums[(sums % 2 == 0).all(-1)] // 2
        narrowest = (places.float() @ DIRECTIONS).aminmax(dim=0)

        assert image[middles[:, 0], middles[:, 1]].all()
        assert (narrowest.max - narrowest.min).min() <= 2 * 0.1 * 28
    assert gone.any(0).all()
    assert gone.sum((1, 2)).max() > 4 * gone.sum((1, 2)).min()


def test_one_mask_is_for_every_image(mask_files: np.ndarray):
    """A file of one mask hides the same pixels everywhere: those where it is true."""
    observed = _draw("file:one.npy")

    assert torch.equal(observed[:, 0], ~torch.from_numpy(mask_files[:1]).expand(50, -1, -1))


def test_as_many_masks_as_images_go_in_order(mask_files: np.ndarray):
    """The i-th image gets the i-th mask."""
    assert torch.equal(_draw("file:many.npy", 7)[:, 0], ~torch.from_numpy(mask_files))


def test_other_numbers_of_images_pick_masks_at_random(mask_files: np.ndarray):
    """Every image has one of the file's masks, and all of them come up."""
    observed = _draw("file:many.npy", 200)[:, 0]
    same = (observed[:, None] == ~torch.from_numpy(mask_files)).flatten(2).all(-1)

    assert (same.sum(1) == 1).all()
    assert same.any(0).all()


def test_grey_masks_are_cut_above_127(mask_files: np.ndarray):
    """A mask of grey levels is missing where it is white."""
    np.save("grey.npy", np.where(mask_files, 128, 127).astype(np.uint8))

    assert torch.equal(_draw("file:grey.npy", 7)[:, 0], ~torch.from_numpy(mask_files))


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32])
def test_masks_of_0_and_1_are_missing_where_they_are_1(mask_files: np.ndarray, kind: type):
    """As those that were saved as numbers."""
    np.save("numbers.npy", mask_files.astype(kind))

    assert torch.equal(_draw("file:numbers.npy", 7)[:, 0], ~torch.from_numpy(mask_files))


def test_masks_of_another_size_are_refused():
    """The error names the expected size, the file and the size that came."""
    with pytest.raises(MechanismError, match=r"Expected masks of 6x5 .*one\.npy; got 28x28"):
        _draw("file:one.npy", 2, (1, 6, 5))


REFUSED = {
    "": r"Expected a missingness of the form none, patches:N .*; got ''",
    "nothing": r"Expected a missingness of the form .*; got 'nothing'",
    "none:1": r"'none:1': Expected no argument; got '1'",
    "half:2": r"'half:2': Expected no argument; got '2'",
    "patches": r"Expected a whole number from 0 to 9; got ''",
    "patches:10": r"Expected a whole number from 0 to 9; got '10'",
    "patches:-1": r"Expected a whole number from 0 to 9; got '-1'",
    "patches:1.5": r"Expected a whole number from 0 to 9; got '1.5'",
    "mcar:1.1": r"Expected a number from 0.0 to 1.0; got '1.1'",
    "mcar:nan": r"Expected a number from 0.0 to 1.0; got 'nan'",
    "mcar:half": r"Expected a number from 0.0 to 1.0; got 'half'",
    "block:0": r"Expected a whole number from 1 to 4096; got '0'",
    "strokes:65": r"Expected a whole number from 1 to 64; got '65'",
    "file:": r"Cannot read the missingness 'file:'",
    "file:absent.npy": r"'file:absent.npy': .*No such file",
    "file:empty.npy": r"Expected an array of masks; got an empty file",
    "file:text.npy": r"Cannot read the missingness 'file:text.npy'",
    "file:pickle.npy": r"allow_pickle=False",
    "file:flat.npy": r"Expected an array of masks, each of height x width; got \(784,\)",
    "file:none.npy": r"Expected an array of masks, each of height x width; got \(0, 28, 28\)",
    "file:several.npz": r"Expected an array of masks, .* got several arrays",
    "file:grey.npy": r"Expected masks of booleans, .* above 127 .*; got 100 at most",
    "file:nan.npy": r"Expected masks of booleans, .* above 127 .*; got nan at most",
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.items(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused(spec: str, message: str):
    """One error for every way to be wrong; it names what was expected and what came."""
    Path("empty.npy").touch()
    Path("text.npy").write_text("not an array")
    np.save("pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save("flat.npy", np.zeros(784, dtype=bool))
    np.save("none.npy", np.zeros((0, 28, 28), dtype=bool))
    np.savez("several.npz", a=np.zeros(1), b=np.zeros(1))
    np.save("grey.npy", np.full((28, 28), 100, dtype=np.uint8))
    np.save("nan.npy", np.full((28, 28), np.nan))

    with pytest.raises(MechanismError, match=message):
        mechanism(spec)


# Images with holes.


def _images() -> tuple[Tensor, Tensor]:
    return torch.rand(4, 2, 3, 3, generator=Noise(0).generator()), _draw("mcar:0.5", 4, (2, 3, 3))


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -5.0])
def test_hiding_leaves_nothing_of_a_hole(rubbish: float):
    """Whatever a missing pixel holds, NaN included, is zero afterwards; the others stay."""
    values, observed = _images()
    images = Incomplete.hide(torch.where(observed, values, rubbish), observed)

    assert (images.values[~observed] == 0).all()
    assert torch.equal(images.values[observed], values[observed])


def test_filling_keeps_what_was_seen():
    """Only holes take the imputed values, for any number of imputations at once."""
    values, observed = _images()
    imputed = 2 + torch.rand(5, *values.shape, generator=Noise(1).generator())
    filled = Incomplete.hide(values, observed).fill(imputed)

    assert torch.equal(filled, torch.where(observed, values, imputed))


def test_complete_images_miss_nothing():
    """`complete` observes every pixel."""
    values, _ = _images()

    assert Incomplete.complete(values).observed.all()


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 0])], ids=["slice", "indices"])
def test_a_part_of_the_images_keeps_its_masks(index: slice | Tensor):
    """Values and masks are indexed together."""
    values, observed = _images()
    part = Incomplete.hide(values, observed)[index]

    assert len(part) == 2
    assert torch.equal(part.observed, observed[index])
    assert torch.equal(part.values, torch.where(observed, values, 0.0)[index])
