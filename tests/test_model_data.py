"""Where images come from: names, public files, archives and folders that users have."""

import gzip
import hashlib
import io
import os
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from model import data
from model.data import DATASETS, DataError, Dataset, Download, Images, fetch, load, save_picture

REAL = Path(os.environ.get("MISS_IWEM_DATA", "/nowhere"))


# Small data sets, each as our archive and as the public files.


@dataclass
class Sample:
    """One small data set in both of its forms."""

    archive: dict[str, np.ndarray]
    files: dict[str, bytes]


def _images(seed: int, *shape: int, top: int = 255) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top + 1, shape, dtype=np.uint8)


def _amat(rows: np.ndarray) -> bytes:
    return b"".join(" ".join(map(str, row)).encode() + b"\n" for row in rows.tolist())


def _idx(array: np.ndarray) -> bytes:
    header = struct.pack(">4I", 0x803, *array.shape)
    return gzip.compress(header + array.tobytes(), compresslevel=1)


def _mat(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    savemat(file, arrays, do_compression=True)
    return file.getvalue()


def _columns_first(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 1).reshape(len(array), -1)


def _batches(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, array in arrays.items():
            planes = array.transpose(0, 3, 1, 2).reshape(len(array), -1)
            records = np.concatenate([np.full((len(array), 1), 7, np.uint8), planes], axis=1)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = records.nbytes
            tar.addfile(member, io.BytesIO(records.tobytes()))
    return file.getvalue()


def _static_mnist() -> Sample:
    parts = {
        name: _images(i, 3 + i, 784, top=1) for i, name in enumerate(("train", "valid", "test"))
    }
    return Sample(parts, {f"binarized_mnist_{name}.amat": _amat(a) for name, a in parts.items()})


def _mnist() -> Sample:
    train, test = _images(1, 30, 28, 28), _images(2, 5, 28, 28)
    return Sample(
        {"train_images": train, "test_images": test},
        {"train-images-idx3-ubyte.gz": _idx(train), "t10k-images-idx3-ubyte.gz": _idx(test)},
    )


def _omniglot() -> Sample:
    train, test = _images(3, 12, 28, 28), _images(4, 5, 28, 28)
    split = np.array([0] * 12 + [1] * 5 + [2], np.uint8)
    archive = {"images": np.concatenate([train, test, train[:1]]), "split_24345_8070": split}
    flat = {"data": _columns_first(train).T / 255, "testdata": _columns_first(test).T / 255}
    return Sample(archive, {"chardata.mat": _mat(**flat)})


def _silhouettes() -> Sample:
    parts = {name: _images(i, 4, 28, 28, top=1) for i, name in enumerate(("train", "val", "test"))}
    flat = {f"{name}_data": _columns_first(array) for name, array in parts.items()}
    return Sample(
        {f"{name}_images": array for name, array in parts.items()},
        {"caltech101_silhouettes_28_split1.mat": _mat(**flat)},
    )


def _cifar10() -> Sample:
    train, test = _images(5, 20, 32, 32, 3), _images(6, 4, 32, 32, 3)
    named = {f"data_batch_{i + 1}": train[4 * i : 4 * i + 4] for i in range(5)}
    return Sample(
        {"train_images": train, "test_images": test},
        {"cifar-10-binary.tar.gz": _batches(test_batch=test, **named)},
    )


SAMPLES: dict[str, Callable[[], Sample]] = {
    "static-mnist": _static_mnist,
    "mnist": _mnist,
    "omniglot": _omniglot,
    "caltech101-silhouettes": _silhouettes,
    "fashion-mnist": _mnist,
    "cifar10": _cifar10,
}
HELD_OUT = {"mnist": 3, "fashion-mnist": 3, "omniglot": 2}


def _use_small(monkeypatch: pytest.MonkeyPatch, name: str) -> Sample:
    """The sample, with the hashes and the size of the validation split in the table its own."""
    sample, entry = SAMPLES[name](), DATASETS[name]
    downloads = tuple(
        Download(url=d.url, sha256=hashlib.sha256(sample.files[d.file]).hexdigest())
        for d in entry.downloads
    )
    small = replace(entry, downloads=downloads, held_out=HELD_OUT.get(name, entry.held_out))
    monkeypatch.setitem(DATASETS, name, small)
    return sample


def _write_files(sample: Sample, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in sample.files.items():
        (folder / name).write_bytes(content)
    return folder


def _splits(dataset: Dataset) -> tuple[Images, Images, Images]:
    return dataset.train, dataset.validation, dataset.test


def _same(left: Images, right: Images) -> bool:
    return torch.equal(left.pixels, right.pixels)


# A server on this machine.


@dataclass
class Server:
    """What a test's server has, and what it was asked for."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    cut: set[str] = field(default_factory=set[str])
    asked: list[str] = field(default_factory=list[str])
    tells_sizes: bool = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local mirror."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            mirror.asked.append(name)
            if name not in mirror.files:
                self.send_error(404)
                return
            content = mirror.files[name]
            self.send_response(200)
            if mirror.tells_sizes:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name in mirror.cut else content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        mirror = Server(url=f"http://127.0.0.1:{http.server_port}/somewhere/")
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield mirror
        http.shutdown()
        thread.join()


# Names.


@pytest.mark.parametrize("name", SAMPLES)
def test_public_files_and_archive_hold_the_same_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from the public files is what is read from the archive of the same images."""
    sample = _use_small(monkeypatch, name)
    _write_files(sample, tmp_path / "public" / name)
    (tmp_path / "ours").mkdir()
    np.savez(tmp_path / "ours" / DATASETS[name].archive, **sample.archive)  # pyright: ignore[reportArgumentType]
    public = load(name, folder=tmp_path / "public")
    ours = load(name, folder=tmp_path / "ours")

    assert _same(public.test, ours.test)
    assert public.binary == ours.binary == (name in {"static-mnist", "caltech101-silhouettes"})
    assert [len(part) for part in _splits(public)] == [len(part) for part in _splits(ours)]
    if name != "cifar10":  # whose public files are split in their own order, as they are complete
        assert all(map(_same, _splits(public), _splits(ours)))
        assert public.sha256 == ours.sha256
    assert all(file in public.source for file in sample.files)
    assert DATASETS[name].archive in ours.source


def test_every_name_has_a_sample() -> None:
    """No data set is left out of the test above."""
    assert SAMPLES.keys() == DATASETS.keys()


def test_mnist_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last training images validate, and none is in two splits."""
    sample = _use_small(monkeypatch, "mnist")
    _write_files(sample, tmp_path / "mnist")
    mnist = load("mnist", folder=tmp_path)
    train = torch.from_numpy(sample.archive["train_images"])[:, None]

    assert torch.equal(mnist.train.pixels, train[:-3])
    assert torch.equal(mnist.validation.pixels, train[-3:])


def test_public_cifar_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the public batches the first nine tenths train and the last tenth validates."""
    sample = _use_small(monkeypatch, "cifar10")
    _write_files(sample, tmp_path / "cifar10")
    cifar = load("cifar10", folder=tmp_path)
    train = torch.from_numpy(sample.archive["train_images"]).permute(0, 3, 1, 2)

    assert torch.equal(cifar.train.pixels, train[:18])
    assert torch.equal(cifar.validation.pixels, train[18:])


def test_silhouettes_have_the_object_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published zeros, which are the object, become 255."""
    sample = _use_small(monkeypatch, "caltech101-silhouettes")
    _write_files(sample, tmp_path / "caltech101-silhouettes")
    train = load("caltech101-silhouettes", folder=tmp_path).train.pixels[:, 0]

    assert torch.equal(train == 255, torch.from_numpy(sample.archive["train_images"] == 0))


def test_both_omniglots_say_which_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can take one preparation of OMNIGLOT for the other."""
    sample = _use_small(monkeypatch, "omniglot")
    _write_files(sample, tmp_path / "omniglot")
    burda = load("omniglot", folder=tmp_path).source
    np.savez(tmp_path / "omniglot28.npz", **sample.archive)  # pyright: ignore[reportArgumentType]
    lake = load("omniglot", folder=tmp_path).source

    assert "Burda et al. 2016" in burda
    assert "not comparable" in lake


def test_absent_data_say_where_they_were_sought(tmp_path: Path) -> None:
    """The error names the places and the command that brings the data."""
    with pytest.raises(DataError) as error:
        load("mnist", folder=tmp_path)

    assert str(tmp_path / "mnist.npz") in str(error.value)
    assert f"train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte.gz in {tmp_path}" in str(
        error.value
    )
    assert str(error.value).endswith("Run: miss-iwem data fetch mnist")


@pytest.mark.parametrize("use", [load, fetch])
def test_unknown_name_lists_the_names(use: Callable[[str], object]) -> None:
    """A misspelt name is answered with those that there are."""
    with pytest.raises(DataError, match=r"static-mnist, mnist, omniglot.*got 'minst'"):
        use("minst")


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("static-mnist", "binarized_mnist_train.amat", b"0 1 0\n"),
        ("static-mnist", "binarized_mnist_train.amat", b"0 1 2 3 " * 196),
        ("mnist", "train-images-idx3-ubyte.gz", b"not gzip"),
        ("mnist", "train-images-idx3-ubyte.gz", gzip.compress(b"short")),
        ("mnist", "train-images-idx3-ubyte.gz", gzip.compress(struct.pack(">4I", 0x803, 9, 9, 9))),
        ("omniglot", "chardata.mat", b"nothing of MATLAB's"),
        ("omniglot", "chardata.mat", _mat(another=np.ones((2, 2)))),
        ("cifar10", "cifar-10-binary.tar.gz", gzip.compress(b"no tar")),
    ],
)
def test_broken_public_file_is_named(
    name: str, file: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public file that cannot be read is refused by its name."""
    _write_files(_use_small(monkeypatch, name), tmp_path / name)
    (tmp_path / name / file).write_bytes(content)

    with pytest.raises(DataError, match=file):
        load(name, folder=tmp_path)


def test_matlab_files_need_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scipy, which only training asks for, the error says what is not there."""
    _write_files(_use_small(monkeypatch, "omniglot"), tmp_path / "omniglot")
    monkeypatch.setitem(sys.modules, "scipy.io", None)

    with pytest.raises(DataError, match=r"Expected chardata.mat as a .mat file; got: .*scipy"):
        load("omniglot", folder=tmp_path)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MISS_IWEM_DATA": "/chosen", "XDG_CACHE_HOME": "/cache"}, "/chosen"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/miss-iwem/data"),
        ({"HOME": "/home/ada"}, "/home/ada/.cache/miss-iwem/data"),
    ],
)
def test_data_folder(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chosen folder comes first, then the user's cache."""
    for name in ("MISS_IWEM_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert data.data_folder() == Path(expected)


# Downloads.


@pytest.mark.parametrize("name", SAMPLES)
def test_fetched_files_load(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `fetch` brings, under the names it says, is what `load` reads."""
    sample = _use_small(monkeypatch, name)
    server.files = sample.files
    paths = fetch(name, folder=tmp_path, mirror=server.url)

    assert {path.name: path.read_bytes() for path in paths} == sample.files
    assert sorted((tmp_path / name).iterdir()) == sorted(paths)
    assert load(name, folder=tmp_path).name == name


@pytest.mark.parametrize("sized", [True, False])
def test_progress_is_told(
    *, sized: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's bytes are counted up to its total, where the server says so."""
    server.tells_sizes = sized
    server.files = _use_small(monkeypatch, "mnist").files
    told: list[tuple[str, int, int | None]] = []
    fetch("mnist", folder=tmp_path, mirror=server.url, progress=lambda *news: told.append(news))

    assert told == [
        (name, len(body), len(body) if sized else None) for name, body in server.files.items()
    ]


def test_wrong_hash_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another content than expected is named with both hashes, and nothing of it stays."""
    server.files = {**_use_small(monkeypatch, "omniglot").files, "chardata.mat": b"other"}
    expected = DATASETS["omniglot"].downloads[0].sha256
    got = hashlib.sha256(b"other").hexdigest()

    with pytest.raises(DataError) as error:
        fetch("omniglot", folder=tmp_path, mirror=server.url)
    assert str(error.value) == f"Expected chardata.mat with sha256 {expected}; got {got}."
    assert list((tmp_path / "omniglot").iterdir()) == []


def test_truncated_download_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that ends early leaves nothing behind; the next attempt succeeds."""
    server.files, server.cut = _use_small(monkeypatch, "omniglot").files, {"chardata.mat"}
    size = len(server.files["chardata.mat"])

    with pytest.raises(DataError, match=rf"Expected {size} bytes .* got {size // 2}\."):
        fetch("omniglot", folder=tmp_path, mirror=server.url)
    assert list((tmp_path / "omniglot").iterdir()) == []

    server.cut = set()
    (path,) = fetch("omniglot", folder=tmp_path, mirror=server.url)
    assert path.read_bytes() == server.files["chardata.mat"]


def test_interrupted_download_can_be_repeated(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two files, `fetch` keeps the whole one and later brings only the other."""
    server.files = _use_small(monkeypatch, "mnist").files

    def stop(file: str, _received: int, _total: int | None) -> None:
        if file.startswith("t10k"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("mnist", folder=tmp_path, mirror=server.url, progress=stop)
    assert [path.name for path in (tmp_path / "mnist").iterdir()] == ["train-images-idx3-ubyte.gz"]

    fetch("mnist", folder=tmp_path, mirror=server.url)
    assert server.asked.count("train-images-idx3-ubyte.gz") == 1
    assert len(load("mnist", folder=tmp_path).test) == 5


def test_right_file_is_kept_and_wrong_one_replaced(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is not yet there and right is downloaded."""
    sample = _use_small(monkeypatch, "mnist")
    server.files = sample.files
    home = _write_files(sample, tmp_path / "mnist")
    (home / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    fetch("mnist", folder=tmp_path, mirror=server.url)

    assert server.asked == ["t10k-images-idx3-ubyte.gz"]
    assert {path.name: path.read_bytes() for path in home.iterdir()} == sample.files


def test_absent_file_names_the_address(server: Server, tmp_path: Path) -> None:
    """A mirror without the file is an error that says where it was sought."""
    with pytest.raises(DataError, match=r"chardata.mat from http://127.*chardata.mat; got: .*404"):
        fetch("omniglot", folder=tmp_path, mirror=server.url)


def test_address_that_is_none_is_refused(tmp_path: Path) -> None:
    """A mirror that is no address is an error of the data, not of the program."""
    with pytest.raises(DataError, match=r"from nowhere/chardata\.mat"):
        fetch("omniglot", folder=tmp_path, mirror="nowhere")


def test_unknown_hash_is_pinned_at_first_use(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a known sha256 the first download's is kept, and a later other one refused."""
    entry = replace(DATASETS["omniglot"], downloads=(Download(url="https://x.invalid/some.mat"),))
    monkeypatch.setitem(DATASETS, "omniglot", entry)
    server.files = {"some.mat": b"first"}
    (path,) = fetch("omniglot", folder=tmp_path, mirror=server.url)
    first = hashlib.sha256(b"first").hexdigest()
    pin = path.with_name("some.mat.sha256")

    assert pin.read_text() == f"{first}  some.mat\n"

    path.unlink()
    server.files = {"some.mat": b"second"}
    with pytest.raises(DataError, match=rf"{first} \(of its first download, in some.mat.sha256\)"):
        fetch("omniglot", folder=tmp_path, mirror=server.url)
    assert list(path.parent.iterdir()) == [pin]


def test_git_blob_identifies_a_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may be known by the id that git gives to its content."""
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"  # of "hello\n", as git hash-object says
    entry = replace(
        DATASETS["omniglot"],
        downloads=(Download(url="https://x.invalid/hello", git_blob=blob),),
    )
    monkeypatch.setitem(DATASETS, "omniglot", entry)
    server.files = {"hello": b"goodbye\n"}
    with pytest.raises(DataError, match=f"Expected hello with git blob id {blob}; got "):
        fetch("omniglot", folder=tmp_path, mirror=server.url)

    server.files = {"hello": b"hello\n"}
    (path,) = fetch("omniglot", folder=tmp_path, mirror=server.url)
    assert path.read_bytes() == b"hello\n"


@pytest.mark.parametrize("name", DATASETS)
def test_every_download_can_be_identified(name: str) -> None:
    """No public file of the table is accepted without a look at its content."""
    for download in DATASETS[name].downloads:
        assert download.url.startswith("https://")
        assert (download.sha256 and len(download.sha256) == 64) or download.git_blob


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


def test_picture_is_a_grid_with_separators(tmp_path: Path) -> None:
    """Each image is enlarged and framed by lines of one pixel; values are clamped to 0..1."""
    rows = torch.tensor([[[[0.0, 2.0]], [[1.0, -1.0]]]])
    save_picture(tmp_path / "grid.png", rows, upscale=2)
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image)

    line = [128] * 11
    row = [128, 0, 0, 255, 255, 128, 255, 255, 0, 0, 128]
    assert grid.tolist() == [line, row, row, line]


# The real ones.

COUNTS = {
    "static-mnist": (50_000, 10_000, 10_000),
    "mnist": (50_000, 10_000, 10_000),
    "omniglot": (23_000, 1_345, 8_070),
    "caltech101-silhouettes": (4_100, 2_264, 2_307),
    "fashion-mnist": (50_000, 10_000, 10_000),
    "cifar10": (13_500, 1_500, 10_000),
}


def _real(name: str) -> Dataset:
    if not (REAL / DATASETS[name].archive).is_file():
        pytest.skip(f"MISS_IWEM_DATA has no {DATASETS[name].archive}")
    return load(name, folder=REAL)


@pytest.mark.parametrize("name", COUNTS)
def test_real_sizes(name: str) -> None:
    """The real data sets have the sizes that the literature reports."""
    dataset = _real(name)

    assert tuple(len(part) for part in _splits(dataset)) == COUNTS[name]
    assert dataset.binary == (name in {"static-mnist", "caltech101-silhouettes"})
    assert all(part.observed is None for part in _splits(dataset))


def test_real_static_mnist_is_the_published_one() -> None:
    """Written as text, the archive is the published files byte for byte."""
    downloads = DATASETS["static-mnist"].downloads
    for part, download in zip(_splits(_real("static-mnist")), downloads, strict=True):
        text = np.full((len(part), 2 * 784), ord(" "), np.uint8)
        text[:, ::2] = part.pixels.flatten(1).numpy() // 255 + ord("0")
        text[:, -1] = ord("\n")
        assert hashlib.sha256(text.data).hexdigest() == download.sha256
