"""Items: what a batch's file holds, whatever it is and however it is damaged."""

import gzip
import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.lib import format as npy_format

from service import items
from service.errors import BadInput, Problem, UnknownFormat
from service.items import Item, read_items, read_part, write_part
from service.operations import Pictures, read
from tests.wire import SHAPE, npy, picture, random_levels, random_mask

NAMES = ["b", "deep/a", "c.d"]
LEVELS = [random_levels(seed) for seed in range(3)]
MASKS = [random_mask(seed) for seed in range(3)]


def _zip(files: dict[str, bytes], **options: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


def _parquet(**columns: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _files(dot: str = ".") -> dict[str, bytes]:
    """Pictures with masks and truths, by the names that archives give them."""
    files: dict[str, bytes] = {}
    for name, levels, mask in zip(NAMES, LEVELS, MASKS, strict=True):
        files[f"{name}.png"] = picture(levels)
        files[f"{name}{dot}mask.png"] = picture(mask * np.uint8(255))
        files[f"{name}{dot}truth.npy"] = npy(levels)
    return files


def _shard() -> dict[str, bytes]:
    """The same as a WebDataset has it, where names end at their first dot."""
    return {f"./{name.replace('c.d', 'c')}": data for name, data in _files().items()}


ARRAYS = {"images": np.stack(LEVELS), "masks": np.stack(MASKS), "truths": np.stack(LEVELS)}
COLUMNS: dict[str, list[Any]] = {
    "image": [picture(levels) for levels in LEVELS],
    "mask": [mask.tolist() for mask in MASKS],
    "truth": [{"bytes": npy(levels), "path": None} for levels in LEVELS],
    "label": [1, 2, 3],
}
WHOLE: dict[str, tuple[bytes, list[str | None]]] = {
    "npz": (_npz(**ARRAYS, ids=np.array(NAMES)), [*NAMES]),
    "npz without ids": (_npz(**ARRAYS), [None] * 3),
    "zip": (_zip({**_files(), "deep/": b"", "__MACOSX/._b.png": b"?"}), [*NAMES]),
    "tar": (_tar({**_shard(), "./b.json": b"{}"}), ["b", "deep/a", "c"]),
    "tar.gz": (gzip.compress(_tar(_shard())), ["b", "deep/a", "c"]),
    "parquet": (_parquet(**COLUMNS, custom_id=NAMES), [*NAMES]),
    "parquet without ids": (_parquet(**COLUMNS), [None] * 3),
}


def _read(path: Path, content: bytes) -> list[Item]:
    path.write_bytes(content)
    return list(read_items(path))


def _pictures(item: Item) -> Pictures:
    assert item.problem is None
    return read(item.image, item.mask, item.truth, SHAPE)


@pytest.mark.parametrize("kind", WHOLE)
def test_all_kinds_of_files_hold_the_same_items(kind: str, tmp_path: Path):
    """Whatever the file is, its items are the same images, masks, truths and names, in order."""
    content, names = WHOLE[kind]

    found = _read(tmp_path / "file", content)

    assert [item.name for item in found] == names
    for item, levels, mask in zip(found, LEVELS, MASKS, strict=True):
        pictures = _pictures(item)
        assert (pictures.image.missing == mask).all()
        assert (pictures.image.pixels[0][~mask] == levels[~mask]).all()
        assert pictures.truth is not None
        assert (pictures.truth.pixels[0] == levels).all()


def test_an_npy_array_is_images_without_masks(tmp_path: Path):
    """An array in a file of its own is one image a row, NaN where it is missing."""
    floats = np.where(np.stack(MASKS), np.nan, np.stack(LEVELS) / 255)

    found = _read(tmp_path / "file", npy(floats))

    masks = [_pictures(item).image.missing for item in found]

    assert (np.stack(masks) == np.stack(MASKS)).all()
    assert len(found) == 3


NOTHING: dict[str, tuple[bytes, type[Problem], str]] = {
    "no bytes": (b"", UnknownFormat, "got nothing"),
    "text": (b"image,mask\n", UnknownFormat, "begins with b'image,ma'"),
    "zip without an end": (WHOLE["zip"][0][:-30], BadInput, "one that is damaged"),
    "npz without an end": (WHOLE["npz"][0][:-30], BadInput, "one that is damaged"),
    "parquet without an end": (WHOLE["parquet"][0][:-30], BadInput, "one that is damaged"),
    "empty zip": (_zip({}), BadInput, "at least one item; got none"),
    "tar of a folder": (_tar({".hidden/a.png": b""}), BadInput, "at least one item; got none"),
    "no rows": (npy(np.zeros((0, 6, 5))), BadInput, "at least one item; got none"),
    "no rows in columns": (_parquet(image=[]), BadInput, "at least one item; got none"),
    "pickled": (
        npy(np.array([{}, {}], dtype=object), allow_pickle=True),
        BadInput,
        "arrays without objects; got images of object",
    ),
    "pickled in npz": (
        _zip({"images.npy": npy(np.array([{}]), allow_pickle=True)}),
        BadInput,
        "arrays without objects",
    ),
    "a number": (npy(np.array(3.0)), BadInput, "rows in C order; got images of shape ()"),
    "in Fortran's order": (npy(np.asfortranarray(np.zeros((3, 6, 5)))), BadInput, "in C order"),
    "npz without images": (_npz(masks=np.zeros(2)), BadInput, "an array named images"),
    "npz with others": (
        _npz(images=np.zeros((1, 6, 5)), labels=np.zeros(1)),
        BadInput,
        "arrays named images, masks, truths and ids; got labels.npy",
    ),
    "npz of two lengths": (
        _npz(images=np.zeros((2, 6, 5)), masks=np.zeros((3, 6, 5))),
        BadInput,
        "as many rows in every array; got [2, 3]",
    ),
    "parquet without images": (_parquet(picture=[b""]), BadInput, "named image; got picture"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_what_holds_no_items_says_why(kind: str, tmp_path: Path):
    """A file of which nothing can be used is refused with what it should have been and is."""
    content, problem, sentence = NOTHING[kind]

    with pytest.raises(problem) as refused:
        _read(tmp_path / "file", content)

    assert sentence in str(refused.value)


@pytest.mark.parametrize("archive", [_zip, _tar])
@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../up", "back\\slash", "line\nbreak", "x" * 129]
)
def test_names_that_lead_elsewhere_are_refused(
    archive: Callable[..., bytes], name: str, tmp_path: Path
):
    """A name that is no harmless one for a file fails alone, and what is beside it is read."""
    content = archive({f"{name}.png": picture(LEVELS[0]), "good.png": picture(LEVELS[0])})

    bad, good = _read(tmp_path / "file", content)

    assert bad.problem is not None
    assert bad.problem["errors"][0]["field"] == "id"
    assert bad.image is None
    assert (good.name, good.problem) == ("good", None)


def test_a_name_that_was_there_before_is_refused(tmp_path: Path):
    """Results have their items' names, so that a second item of one name would hide the first."""
    content = _parquet(image=[picture(LEVELS[0])] * 3, id=["a", "b", "a"])

    found = _read(tmp_path / "file", content)

    assert [item.problem is None for item in found] == [True, True, False]
    assert "a name of its own" in str(found[2].problem)


def test_a_mask_without_an_image_is_an_item_that_fails(tmp_path: Path):
    """Nothing that was sent is passed over in silence."""
    content = _zip({"a.png": picture(LEVELS[0]), "b.mask.png": picture(LEVELS[0])})

    good, bad = _read(tmp_path / "file", content)

    assert good.problem is None
    assert bad.name == "b"
    assert "an image beside its mask or truth" in str(bad.problem)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "parquet"])
def test_an_item_that_grows_beyond_measure_fails_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a decompression bomb no more is read than an item may have."""
    monkeypatch.setattr(items, "MAX_ITEM", 10_000)
    files = {"bomb.png": bytes(10_001), "good.png": picture(LEVELS[0])}
    content = {
        "zip": lambda: _zip(files, compression=zipfile.ZIP_DEFLATED),
        "tar.gz": lambda: gzip.compress(_tar(files)),
        "parquet": lambda: _parquet(image=list(files.values())),
    }[kind]()

    bomb, good = _read(tmp_path / "file", content)

    assert "at most 10000 bytes" in str(bomb.problem)
    assert good.problem is None


def test_rows_that_are_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An array's rows are as limited as files are."""
    monkeypatch.setattr(items, "MAX_ITEM", 100)

    with pytest.raises(BadInput, match=r"1 to 100 bytes a row; got images of shape \(2, 6, 5\)"):
        _read(tmp_path / "file", npy(np.zeros((2, 6, 5))))


@pytest.mark.parametrize("shape", [(4, -6, 5), (10**12, 0, 5)])
def test_rows_of_no_bytes_are_refused(shape: tuple[int, ...], tmp_path: Path):
    """A header with a count below one neither has all of the file read at once nor never ends."""
    out = io.BytesIO()
    npy_format.write_array_header_1_0(
        out, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )

    with pytest.raises(BadInput, match=r"1 to \d+ bytes a row"):
        _read(tmp_path / "file", out.getvalue() + bytes(1000))


def test_of_a_table_one_row_is_held_at_a_time(tmp_path: Path):
    """A small file in which one large value stands for many rows does not fill the memory."""
    large = pa.array([bytes(2**20)]).dictionary_encode().take(pa.array([0] * 64))
    out = io.BytesIO()
    pq.write_table(pa.table({"image": large}), out, compression="zstd")
    (tmp_path / "file").write_bytes(out.getvalue())
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        count = sum(1 for _ in read_items(tmp_path / "file"))
    finally:
        pa.set_memory_pool(before)

    assert len(out.getvalue()) < 10_000
    assert count == 64
    assert 2**20 < (pool.max_memory() or 0) < 16 * 2**20


def test_of_a_tar_one_member_is_held_at_a_time(tmp_path: Path):
    """Of what has been read nothing stays, however many there are."""
    (tmp_path / "file").write_bytes(_tar({f"{n}.png": b"?" for n in range(3000)}))
    tracemalloc.start()
    try:
        held = [tracemalloc.get_traced_memory()[0] for _ in read_items(tmp_path / "file")]
    finally:
        tracemalloc.stop()

    assert len(held) == 3000
    assert held[-1] - held[999] < 2000 * 200


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_details_of_a_member_without_end_are_damage(kind: bytes, tmp_path: Path):
    """They are not read into the memory, of which a file of a few bytes may ask for any amount."""
    out = io.BytesIO()
    with gzip.open(out, "wb") as file:
        member = tarfile.TarInfo("details")
        member.type, member.size = kind, 2**26
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(2**26))
    (tmp_path / "file").write_bytes(out.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="67108864 bytes of details"):
            list(read_items(tmp_path / "file"))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most < 2**22


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_ids_may_be_bytes(kind: str, tmp_path: Path):
    """They are the text that they encode, and not what Python shows of them."""
    content = {
        "npz": lambda: _npz(images=np.zeros((2, 6, 5), np.uint8), ids=np.array([b"a", b"b"])),
        "parquet": lambda: _parquet(image=[picture(LEVELS[0])] * 2, id=[b"a", b"b"]),
    }[kind]()

    assert [item.name for item in _read(tmp_path / "file", content)] == ["a", "b"]


@pytest.mark.parametrize(("place", "value"), [(6, 1), (8, 9)], ids=["password", "method"])
def test_an_archive_that_cannot_be_opened_is_damaged(place: int, value: int, tmp_path: Path):
    """One with a password, or compressed in a way of which nobody here knows, is no fault."""
    content = bytearray(_npz(images=np.zeros((2, 6, 5))))
    content[place] = content[content.index(b"PK\1\2") + place + 2] = value

    with pytest.raises(BadInput, match="a whole file"):
        _read(tmp_path / "file", bytes(content))


def test_a_damaged_member_fails_alone(tmp_path: Path):
    """One picture of an archive whose bytes were changed fails, and the others do not."""
    content = bytearray(_zip({f"{n}.png": picture(LEVELS[n]) for n in range(3)}))
    content[content.index(picture(LEVELS[1])) + 20] ^= 255

    found = _read(tmp_path / "file", bytes(content))

    assert [item.problem is None for item in found] == [True, False, True]
    assert "Bad CRC-32" in str(found[1].problem)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "npy"])
def test_what_is_before_a_damage_is_kept(kind: str, tmp_path: Path):
    """A file that ends too early gives the items before that, and then one that says so."""
    many = {f"{n:03}.png": np.random.default_rng(n).bytes(2000) for n in range(20)}
    content = {
        "tar": lambda: _tar(many),
        "tar.gz": lambda: gzip.compress(_tar(many)),
        "npy": lambda: npy(np.random.default_rng(0).random((20, 6, 5))),
    }[kind]()

    found = _read(tmp_path / "file", content[: len(content) // 2 - 700])

    assert 5 < len(found) < 15
    assert [item.problem is None for item in found] == [True] * (len(found) - 1) + [False]
    assert "one that is damaged" in str(found[-1].problem)


@pytest.mark.parametrize("cell", [None, 3.5, ["a", "b"], [[1.0], [1.0, 2.0]], {"path": "x"}])
def test_a_cell_that_is_no_picture_fails_alone(cell: Any, tmp_path: Path):
    """A row of which the image is null, ragged or of another type is one failed item."""
    (item,) = _read(tmp_path / "file", _parquet(image=[cell]))

    assert item.problem is not None
    assert item.problem["errors"][0]["field"] == "image"


def test_parts_hold_what_was_put_in_them(tmp_path: Path):
    """Items come back from a part as they were, those with problems too."""
    bad = BadInput.of("image", "a picture", "null").document()
    some = [*_read(tmp_path / "file", WHOLE["zip"][0]), Item("é", problem=bad), Item(image=b"")]

    write_part(some, tmp_path / "part")

    with (tmp_path / "part").open("rb") as file:
        assert read_part(file) == some
