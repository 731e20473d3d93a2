"""The results of a batch as a file: written in parts, which are then joined.

A part's rows are what a request's answer has of each image, with its place in the batch. The same
rows are the same bytes, whenever and wherever they are written.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy_format

from service import codec

__all__ = ["FORMATS", "Format", "Row"]

Row = dict[str, Any]
Opened = Callable[[], Iterator[IO[bytes]]]
"""The parts, each of which is open until the next is asked for; any number of times."""
PIXELS, MANY = ("mean", "std", "median"), ("draws", "quantiles")
ESTIMATES = ("log_likelihood", "conditional", "difference")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""That of zip files: no part has a time of its own."""


@dataclass(frozen=True)
class Format:
    """A kind of file that results can be."""

    suffix: str
    media_type: str
    encode: Callable[[np.ndarray, str], Any]
    """Pixels, in the encoding that was asked for, as a row of this kind of file has them."""
    write: Callable[[Sequence[Row], Path], None]
    """Writes a part."""
    join: Callable[[Opened, Path], None]
    """Writes the file of all parts."""


def _write_lines(rows: Sequence[Row], path: Path) -> None:
    path.write_text("".join(_line(row) for row in rows), encoding="utf-8")


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _join_lines(parts: Opened, path: Path) -> None:
    with path.open("wb") as file:
        for part in parts():
            shutil.copyfileobj(part, file)


ESTIMATE = pa.struct(
    [
        ("value", pa.float64()),
        ("standard_error", pa.float64()),
        ("effective_sample_size", pa.float64()),
        ("pareto_k", pa.float64()),
        ("reliable", pa.bool_()),
        ("particles", pa.int64()),
        ("estimator", pa.string()),
        ("kind", pa.string()),
        ("acceptance", pa.float64()),
    ]
)
TABLE = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("seed", pa.int64()),
        ("quality", pa.string()),
        ("binarised", pa.bool_()),
        *((name, ESTIMATE) for name in ESTIMATES),
        *((name, pa.binary()) for name in PIXELS),
        *((name, pa.list_(pa.binary())) for name in MANY),
    ]
)


def _write_table(rows: Sequence[Row], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), TABLE), path)


def _join_tables(parts: Opened, path: Path) -> None:
    with pq.ParquetWriter(path, TABLE) as writer:
        for part in parts():
            writer.write_table(pq.read_table(part, schema=TABLE))


def _pixel_bytes(pixels: np.ndarray, encoding: str) -> bytes:
    """A PNG where that was asked for, and otherwise an NPY array."""
    return codec.to_png(pixels) if encoding == "png" else codec.to_npy(pixels)


def _floats(pixels: np.ndarray, _encoding: str) -> np.ndarray:
    scaled = pixels / 255 if pixels.dtype == np.uint8 else pixels
    return scaled.astype(np.float32)


def _write_arrays(rows: Sequence[Row], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **_arrays(rows))


def _arrays(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """An array of each field that the rows have."""
    arrays: dict[str, np.ndarray] = {
        "index": np.array([row["index"] for row in rows], np.int64),
        "id": np.array([row["id"] or "" for row in rows], np.str_),
        "seed": np.array([row["seed"] for row in rows], np.int64),
        "quality": np.array([row["quality"] or "" for row in rows], np.str_),
    }
    fields = rows[0] if rows else {}
    for name in (*PIXELS, *MANY):
        if fields.get(name) is not None:
            arrays[name] = np.array([row[name] for row in rows], np.float32)
    for name in ESTIMATES:
        if name in fields:
            estimates = [row[name] or {} for row in rows]
            for number in NUMBERS:
                values = [estimate.get(number) for estimate in estimates]
                arrays[f"{name}_{number}"] = np.array(values, np.float64)
            reliable = [estimate.get("reliable", False) for estimate in estimates]
            arrays[f"{name}_reliable"] = np.array(reliable, np.bool_)
    return arrays


def _join_arrays(parts: Opened, path: Path) -> None:
    """Array by array, of which one part's is in memory."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    types: dict[str, list[np.dtype]] = {}
    for part in parts():
        with np.load(part, allow_pickle=False) as arrays:
            for name, array in arrays.items():
                shapes.setdefault(name, []).append(array.shape)
                types.setdefault(name, []).append(array.dtype)
    with zipfile.ZipFile(path, "w") as out:
        for name, found in shapes.items():
            dtype = np.result_type(*types[name])
            shape = (sum(each[0] for each in found), *found[-1][1:])
            with out.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as file:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                npy_format.write_array_header_2_0(file, header)
                for part in parts():
                    with np.load(part, allow_pickle=False) as arrays:
                        if name in arrays:
                            file.write(np.ascontiguousarray(arrays[name], dtype).tobytes())


def _write_pictures(rows: Sequence[Row], path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for row in rows:
            stem = row["id"] or f"item-{row['index']}"
            for name in PIXELS:
                if row.get(name) is not None:
                    archive.writestr(zipfile.ZipInfo(f"{stem}.{name}.png", EPOCH), row[name])
            for name in MANY:
                for number, picture in enumerate(row.get(name) or ()):
                    member = zipfile.ZipInfo(f"{stem}.{name}.{number}.png", EPOCH)
                    archive.writestr(member, picture)
        told = [{k: v for k, v in row.items() if k not in (*PIXELS, *MANY)} for row in rows]
        archive.writestr(zipfile.ZipInfo(LINES, EPOCH), "".join(map(_line, told)))


def _join_pictures(parts: Opened, path: Path) -> None:
    """All pictures, and the lines of all parts as one member at the end."""
    with zipfile.ZipFile(path, "w") as out:
        for part in parts():
            with zipfile.ZipFile(part) as archive:
                for member in archive.infolist():
                    if member.filename != LINES:
                        copy = zipfile.ZipInfo(member.filename, EPOCH)
                        out.writestr(copy, archive.read(member))
        with out.open(zipfile.ZipInfo(LINES, EPOCH), "w", force_zip64=True) as file:
            for part in parts():
                with zipfile.ZipFile(part) as archive:
                    file.write(archive.read(LINES))


LINES = "results.jsonl"
NUMBERS = ("value", "standard_error", "effective_sample_size", "pareto_k")
FORMATS = {
    "jsonl": Format(".jsonl", "application/jsonl", codec.encode, _write_lines, _join_lines),
    "parquet": Format(
        ".parquet",
        "application/vnd.apache.parquet",
        _pixel_bytes,
        _write_table,
        _join_tables,
    ),
    "npz": Format(".npz", "application/octet-stream", _floats, _write_arrays, _join_arrays),
    "zip": Format(
        ".zip",
        "application/zip",
        lambda pixels, _encoding: codec.to_png(pixels),
        _write_pictures,
        _join_pictures,
    ),
}
