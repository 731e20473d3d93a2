"""Results: the rows of all parts in one file, in each of its kinds."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from service.results import FORMATS, Format, Row
from tests.wire import pixels_of, text

SHAPE = (1, 3, 2)
ESTIMATE = {
    "value": -3.25,
    "standard_error": 0.5,
    "effective_sample_size": 2.0,
    "pareto_k": None,
    "reliable": True,
    "particles": 64,
    "estimator": "importance",
    "kind": "a lower bound",
    "acceptance": None,
}


def _pixels(index: int, draw: int = 0) -> np.ndarray:
    return np.random.default_rng([index, draw]).integers(0, 256, SHAPE, dtype=np.uint8)


def _row(form: Format, index: int) -> Row:
    """A row as one completed image has it; every third has no name, and other names are long."""
    return {
        "index": index,
        "id": None if index % 3 == 0 else f"{'long' * index}/é{index}",
        "mean": form.encode(_pixels(index), "png"),
        "draws": [form.encode(_pixels(index, draw), "png") for draw in (1, 2)],
        "std": None,
        "median": None,
        "quantiles": None,
        "log_likelihood": {**ESTIMATE, "value": -float(index)},
        "quality": "standard",
        "seed": 2**53 - 1 - index,
        "binarised": True,
    }


def _joined(form: Format, sizes: list[int], folder: Path, indices: list[int]) -> bytes:
    """The file of rows that were written in parts of these sizes."""
    folder.mkdir()
    left = iter(indices)
    for number, size in enumerate(sizes):
        form.write([_row(form, next(left)) for _ in range(size)], folder / str(number))

    def parts() -> Iterator[IO[bytes]]:
        for number in range(len(sizes)):
            with (folder / str(number)).open("rb") as file:
                yield file

    form.join(parts, folder / "all")
    return (folder / "all").read_bytes()


def _of_lines(content: bytes) -> list[Row]:
    return [json.loads(line) for line in content.decode().splitlines()]


def _of_table(content: bytes) -> list[Row]:
    return pq.read_table(io.BytesIO(content)).to_pylist()


def _of_arrays(content: bytes) -> list[Row]:
    with closing(np.load(io.BytesIO(content), allow_pickle=False)) as arrays:
        columns = dict(arrays.items())
    rows: list[Row] = []
    for place in range(len(columns["index"])):
        row: dict[str, Any] = {name: column[place] for name, column in columns.items()}
        row["log_likelihood"] = {"value": row["log_likelihood_value"]}
        row["id"] = str(row["id"]) or None
        rows.append(row)
    return rows


def _of_pictures(content: bytes) -> list[Row]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        rows = _of_lines(archive.read("results.jsonl"))
        assert archive.testzip() is None
        for row in rows:
            stem = row["id"] or f"item-{row['index']}"
            row["mean"] = archive.read(f"{stem}.mean.png")
            row["draws"] = [archive.read(f"{stem}.draws.{draw}.png") for draw in (0, 1)]
    return rows


READ: dict[str, Callable[[bytes], list[Row]]] = {
    "jsonl": _of_lines,
    "parquet": _of_table,
    "npz": _of_arrays,
    "zip": _of_pictures,
}


def _levels(pixels: Any) -> np.ndarray:
    if isinstance(pixels, np.ndarray):
        return (pixels * 255).round()
    if isinstance(pixels, bytes):
        return pixels_of(text(pixels))
    return pixels_of(pixels)


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("sizes", [[5], [2, 0, 3], [0, 1, 1, 1, 1, 1, 0]], ids=str)
def test_a_file_has_the_rows_of_all_parts(kind: str, sizes: list[int], tmp_path: Path):
    """However the rows came, the file has all of them in order, each with what it had."""
    form = FORMATS[kind]

    rows = READ[kind](_joined(form, sizes, tmp_path / "a", [0, 1, 4, 7, 9]))

    assert [row["index"] for row in rows] == [0, 1, 4, 7, 9]
    for row in rows:
        index = row["index"]
        assert row["id"] == _row(form, index)["id"]
        assert row["seed"] == 2**53 - 1 - index
        assert row["log_likelihood"]["value"] == -index
        assert (_levels(row["mean"]).reshape(SHAPE) == _pixels(index)).all()
        for draw, pixels in enumerate(row["draws"], 1):
            assert (_levels(pixels).reshape(SHAPE) == _pixels(index, draw)).all()


@pytest.mark.parametrize("kind", READ)
def test_the_same_rows_are_the_same_bytes(kind: str, tmp_path: Path):
    """A file has nothing of when or where it was written."""
    form = FORMATS[kind]

    first, second = (_joined(form, [2, 1], tmp_path / name, [0, 1, 2]) for name in "ab")

    assert first == second


@pytest.mark.parametrize("kind", READ)
def test_no_rows_are_a_whole_file_too(kind: str, tmp_path: Path):
    """Where no item has a result, the file can still be read."""
    content = _joined(FORMATS[kind], [0, 0], tmp_path / "a", [])

    if kind == "npz":
        with closing(np.load(io.BytesIO(content), allow_pickle=False)) as arrays:
            assert len(arrays["index"]) == 0
    else:
        assert READ[kind](content) == []


def test_estimates_that_an_image_has_none_of_are_nan(tmp_path: Path):
    """Arrays of different parts fit together, whether their images came with a truth or not."""
    form = FORMATS["npz"]
    rows = [
        {"index": 0, "id": "a", "seed": 1, "quality": None, "conditional": ESTIMATE},
        {"index": 1, "id": "b", "seed": 2, "quality": None, "conditional": None},
    ]
    for row in rows:
        form.write([row], tmp_path / str(row["index"]))

    def parts() -> Iterator[IO[bytes]]:
        for number in range(2):
            with (tmp_path / str(number)).open("rb") as file:
                yield file

    form.join(parts, tmp_path / "all")

    with closing(np.load(tmp_path / "all", allow_pickle=False)) as arrays:
        assert np.isnan(arrays["conditional_value"]).tolist() == [False, True]
        assert arrays["conditional_reliable"].tolist() == [True, False]
