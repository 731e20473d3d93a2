"""The items of a batch: the images that a file holds, read one after the other.

A file is what its first bytes say. Its items are never all in memory, and nothing of it is ever
written under a name of its own. Of each item the bytes are kept as they are in the file (an array
as NPY): they are decoded when it is worked on, so that a bad one fails alone.
"""

import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy_format

from service.errors import BadInput, Problem, TooLarge, UnknownFormat

__all__ = ["KINDS", "MAX_ITEM", "Item", "read_items", "read_part", "write_part"]

MAX_ITEM = 32 * 2**20
"""Bytes of an image, a mask or a truth."""
MAX_NAME, MAX_DETAILS = 128, 2**20
DETAILS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
"""What a tar has before a member to say more of it."""
KINDS = ".npz, .npy, .zip, .parquet or WebDataset .tar"
PARTS = ("image", "mask", "truth")
PLURALS = {"images": "image", "masks": "mask", "truths": "truth", "ids": "id", "custom_id": "id"}
SKIPPED = {"json", "txt", "cls"}
"""What WebDatasets have beside pictures."""
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    tarfile.TarError,
    gzip.BadGzipFile,
    OSError,
    RuntimeError,  # of an archive with a password, or compressed in a way that is not known
)


@dataclass(frozen=True)
class Item:
    """One image of a file, as its bytes, or why there is none."""

    name: str | None = None
    image: bytes | None = None
    mask: bytes | None = None
    truth: bytes | None = None
    problem: dict[str, Any] | None = None
    """The problem document of an item that cannot be worked on."""


def read_items(path: Path) -> Iterator[Item]:
    """The items of a file, in its order; the last says so where the file is damaged from there.

    Raises:
        UnknownFormat: The file is of none of the formats.
        BadInput: Not one item can be read, or what it holds fits no images.
    """
    count, names = 0, set[int]()
    try:
        with path.open("rb") as file:
            beginning = file.read(512)
        for item in _reader(beginning, path)(path):
            yield _named(item, names)
            count += 1
    except (*DAMAGED, ValueError) as error:
        damage = BadInput.of("body", "a whole file", f"one that is damaged ({error})")
        if not count:
            raise damage from error
        yield Item(problem=damage.document())
        return
    if not count:
        raise BadInput.of("body", "at least one item", "none")


def _named(item: Item, names: set[int]) -> Item:
    """The item, if its name can be that of a file and is no other's, or else what is wrong."""
    name = item.name
    if name is None:
        return item
    name = name.removeprefix("./")
    if len(name) > MAX_NAME:
        problem = BadInput.of("id", f"at most {MAX_NAME} characters", f"{len(name)}")
    elif not _is_path(name):
        problem = BadInput.of("id", "a name without .. and a leading /", ascii(name))
    elif hash(name) in names:
        problem = BadInput.of("id", "a name of its own", f"that of an item before, {name!r}")
    else:
        names.add(hash(name))
        return replace(item, name=name)
    return Item(name[:MAX_NAME], problem=problem.document())


def _is_path(name: str) -> bool:
    inside = not name.startswith("/") and ".." not in name.split("/") and "\\" not in name
    return inside and bool(name) and name.isprintable()


def _reader(beginning: bytes, path: Path) -> Callable[[Path], Iterator[Item]]:
    if beginning.startswith(b"PAR1"):
        return _parquet
    if beginning.startswith(npy_format.MAGIC_PREFIX):
        return _npy
    if beginning.startswith((b"PK\3\4", b"PK\5\6")):
        with zipfile.ZipFile(path) as archive:
            arrays = all(name.endswith(".npy") and "/" not in name for name in archive.namelist())
        return _npz if arrays and beginning.startswith(b"PK\3\4") else _zip
    if beginning.startswith(b"\x1f\x8b") or beginning[257:262] == b"ustar":
        return _tar
    got = f"a file that begins with {beginning[:8]!r}" if beginning else "nothing"
    raise UnknownFormat.of("body", KINDS, got)


def _npy(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        yield from (Item(image=_as_npy(image)) for image in _Rows("images", file))


def _npz(path: Path) -> Iterator[Item]:
    """An archive of arrays: `images`, and of each as many `masks`, `truths` and `ids`."""
    with zipfile.ZipFile(path) as archive, ExitStack() as stack:
        columns: dict[str, _Rows] = {}
        for member in archive.namelist():
            if (column := _column(member.removesuffix(".npy"))) is None:
                raise BadInput.of("body", "arrays named images, masks, truths and ids", member)
            columns[column] = _Rows(member, stack.enter_context(archive.open(member)))
        if "image" not in columns:
            raise BadInput.of("body", "an array named images", ", ".join(archive.namelist()))
        lengths = {rows.length for rows in columns.values()}
        if len(lengths) > 1:
            raise BadInput.of("body", "as many rows in every array", f"{sorted(lengths)}")
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            name = row.pop("id", None)
            parts: dict[str, Any] = {part: _as_npy(value) for part, value in row.items()}
            yield Item(name=None if name is None else _text(name[()]), **parts)


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _column(name: str) -> str | None:
    column = PLURALS.get(name, name)
    return column if column in (*PARTS, "id") else None


class _Rows:
    """An array's rows, of which one is read at a time."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        version = npy_format.read_magic(file)
        header: Any = (
            npy_format.read_array_header_1_0
            if version == (1, 0)
            else npy_format.read_array_header_2_0
        )
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise BadInput.of("body", "arrays without objects", f"{name} of {dtype}")
        if not shape or fortran:
            raise BadInput.of("body", "rows in C order", f"{name} of shape {shape}")
        self.length: int = shape[0]
        self._shape, self._dtype, self._file = shape[1:], dtype, file
        self._bytes = dtype.itemsize * int(np.prod(self._shape, dtype=object))
        if not 0 < self._bytes <= MAX_ITEM:
            raise BadInput.of("body", f"1 to {MAX_ITEM} bytes a row", f"{name} of shape {shape}")

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(self.length):
            data = self._file.read(self._bytes)
            if len(data) < self._bytes:
                raise EOFError("it ends before its last row")
            yield np.frombuffer(data, self._dtype).reshape(self._shape)


def _as_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _zip(path: Path) -> Iterator[Item]:
    """Pictures: NAME.png with NAME.mask.png and NAME.truth.png beside it, of any formats."""
    with zipfile.ZipFile(path) as archive:
        groups: dict[str, dict[str, zipfile.ZipInfo]] = {}
        for member in archive.infolist():
            if not member.is_dir() and not _hidden(member.filename):
                stem, part = _part_of(member.filename)
                groups.setdefault(stem, {})[part] = member
        for stem, members in groups.items():
            yield _gathered(stem, members, lambda member: _inflated(archive, member))


def _hidden(name: str) -> bool:
    parts = (part for part in name.split("/") if part not in (".", ".."))
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _part_of(name: str) -> tuple[str, str]:
    """The item that a picture belongs to, and what it is there."""
    stem = name.rpartition(".")[0] or name
    for part in ("mask", "truth"):
        if stem.endswith(f".{part}"):
            return stem.removesuffix(f".{part}"), part
    return stem, "image"


def _inflated(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as file:
        return _limited(member.filename, file)


def _limited(name: str, file: IO[bytes]) -> bytes:
    """The bytes, as many as are told or not: a header may say less than comes."""
    data = file.read(MAX_ITEM + 1)
    if len(data) > MAX_ITEM:
        raise TooLarge.of(name[:MAX_NAME], f"at most {MAX_ITEM} bytes", "more")
    return data


def _gathered(stem: str, members: dict[str, Any], content: Callable[[Any], bytes]) -> Item:
    item = Item(name=stem)
    try:
        if "image" not in members:
            raise BadInput.of("image", "an image beside its mask or truth", "nothing")
        return replace(item, **{part: content(member) for part, member in members.items()})
    except Problem as problem:
        return replace(item, problem=problem.document())
    except DAMAGED as error:
        damage = BadInput.of(
            "image", "a file that can be read", f"{type(error).__name__}: {error}"
        )
        return replace(item, problem=damage.document())


def _tar(path: Path) -> Iterator[Item]:
    """A WebDataset: what has the same name before its first dot is one item."""
    with tarfile.open(path, "r|*", tarinfo=_Member) as archive:
        stem, members = "", cast("dict[str, bytes | Problem]", {})
        while (member := archive.next()) is not None:
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (all, in the end)
            if not member.isfile() or _hidden(member.name):
                continue
            next_stem, part = _key(member.name)
            if next_stem != stem and members:
                yield _gathered(stem, members, _told)
                members = {}
            stem = next_stem
            if part is not None:
                members[part] = _content(member, archive)
        if members:
            yield _gathered(stem, members, _told)


class _Member(tarfile.TarInfo):
    """A member whose name and other details are not longer than such things are."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """What Python's comments say is to be overridden; it reads such details as a whole."""
        if self.type in DETAILS and self.size > MAX_DETAILS:
            raise tarfile.ReadError(f"{self.size} bytes of details of one member")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]


def _key(name: str) -> tuple[str, str | None]:
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    first = kind.lower().split(".")[0]
    part = None if kind.lower() in SKIPPED else first if first in ("mask", "truth") else "image"
    return folder + slash + stem, part


def _content(member: tarfile.TarInfo, archive: tarfile.TarFile) -> bytes | Problem:
    file = archive.extractfile(member)
    if file is None:
        return BadInput.of("image", "a file", "a link")
    try:
        content = _limited(member.name, file)
    except Problem as problem:
        return problem
    if len(content) < member.size:
        raise EOFError("it ends in the middle of a file")
    return content


def _told(content: bytes | Problem) -> bytes:
    if isinstance(content, Problem):
        raise content
    return content


def _parquet(path: Path) -> Iterator[Item]:
    """Columns `image`, and `mask`, `truth` and `id` where there are any: bytes, or lists."""
    with pq.ParquetFile(path) as file:
        names = {name: _column(name) for name in file.schema_arrow.names}
        if "image" not in names.values():
            found = ", ".join(names) or "none"
            raise BadInput.of("body", "a column named image", found[:200])
        wanted = [name for name, column in names.items() if column]
        # one row at a time: a few bytes may be a dictionary's one large value, many times over
        for batch in file.iter_batches(batch_size=1, columns=wanted):
            for row in batch.to_pylist():
                yield _row({cast("str", names[name]): value for name, value in row.items()})


def _row(row: dict[str, Any]) -> Item:
    name = row.pop("id", None)
    item = Item(name=None if name is None else _text(name))
    try:
        if row.get("image") is None:
            raise BadInput.of("image", "a picture", "null")
        parts = {part: _cell(part, value) for part, value in row.items() if value is not None}
        return replace(item, **parts)
    except Problem as problem:
        return replace(item, problem=problem.document())


def _cell(part: str, value: Any) -> bytes:
    """Bytes as they are, those of the column type for pictures that others write, or lists."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, list):
        try:
            array = np.array(value)
            value = _as_npy(array if array.dtype.kind in "biuf" else array.astype(np.float64))
        except (TypeError, ValueError) as error:
            raise BadInput.of(part, "rows of equally many numbers", "other lists") from error
    if not isinstance(value, bytes):
        raise BadInput.of(part, "bytes or lists of numbers", type(value).__name__)
    return _limited(part, io.BytesIO(value))


PART = pa.schema(
    [("name", pa.string()), *((part, pa.binary()) for part in PARTS), ("problem", pa.string())]
)


def write_part(items: Sequence[Item], path: Path) -> None:
    """A file of our own with some of the items."""
    rows = [{**vars(item), "problem": item.problem and json.dumps(item.problem)} for item in items]
    pq.write_table(pa.Table.from_pylist(rows, PART), path, compression="zstd")


def read_part(file: IO[bytes]) -> list[Item]:
    """The items of such a file."""
    rows: list[dict[str, Any]] = pq.read_table(file, schema=PART).to_pylist()
    return [
        Item(**{**row, "problem": row["problem"] and json.loads(row["problem"])}) for row in rows
    ]
