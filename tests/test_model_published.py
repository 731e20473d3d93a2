"""The data sets of the literature: their names, public files, hashes and downloads."""

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
from scipy.io import savemat

from model.data import Dataset, Images, load
from model.published import DATASETS, DataError, Download, data_folder, fetch

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
    # Not the contents: those of gzip say the second, and each test process collects in its own.
    ids=[
        "short line",
        "not binary",
        "not gzip",
        "no header",
        "no images",
        "not MATLAB's",
        "no images of MATLAB's",
        "no tar",
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

    assert data_folder() == Path(expected)


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
