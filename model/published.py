"""The data sets of the literature: where they are published, and how their files are read.

A data set is found as one `.npz` archive or as its public files, which `fetch` brings;
none is fetched whose hash is not the one expected, and no reader can execute what a file holds.
"""

import gzip
import hashlib
import importlib
import math
import os
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8

__all__ = [
    "DATASETS",
    "Arrays",
    "DataError",
    "Download",
    "Found",
    "Published",
    "data_folder",
    "fetch",
    "find",
    "reading",
    "stored_in",
]

Arrays = Mapping[str, np.ndarray]
Progress = Callable[[str, int, int | None], None]
"""Told a file's name, the bytes that have come and, where the server says so, their total."""

IDX_BYTES_IN_3_AXES = 0x803
BLOCK = 1 << 20


class DataError(ValueError):
    """Data that are absent, unreadable, or not what they should be."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """A public file and what identifies it.

    Without a `sha256` the first download is trusted and its hash kept beside it;
    `git_blob` is the file's id in the git repository that publishes it.
    """

    url: str
    sha256: str | None = None
    git_blob: str | None = None

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set of the literature, as one `.npz` archive or as its public files.

    `unpack` and `read` give the splits' arrays; `held_out` training images become the validation
    split where those have none: the last ones, of a seeded shuffle if `shuffled`.
    """

    archive: str
    unpack: Callable[[Arrays], Arrays]
    downloads: tuple[Download, ...]
    read: Callable[[Path], Arrays]
    held_out: int | None = None
    shuffled: bool = True
    archive_note: str = ""
    files_note: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The splits' arrays of a data set that is here, and the files that they were read from."""

    arrays: Arrays
    source: str


def data_folder() -> Path:
    """Where data sets are kept: `$MISS_IWEM_DATA`, or a folder in the user's cache."""
    if chosen := os.environ.get("MISS_IWEM_DATA"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "miss-iwem" / "data"


def find(name: str, *, folder: Path) -> Found:
    """The data set of this name, from its archive in the folder or from its public files.

    Raises:
        DataError: Neither is there, or they cannot be read.
    """
    entry = DATASETS[name]
    archive, home = folder / entry.archive, folder / name
    files = [download.file for download in entry.downloads]
    if archive.is_file():
        with stored_in(archive) as stored:
            return Found(arrays=entry.unpack(stored), source=entry.archive + entry.archive_note)
    if all((home / file).is_file() for file in files):
        return Found(arrays=entry.read(home), source=", ".join(files) + entry.files_note)
    raise DataError(
        f"Expected {archive}, or {', '.join(files)} in {home}; got neither. "
        f"Run: miss-iwem data fetch {name}"
    )


def fetch(
    name: str,
    *,
    folder: Path | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """The public files of a data set, downloaded where they are not yet there and right.

    A file appears under its name whole and checked, or not at all.

    `mirror` is an address that has all the files, instead of their public homes.

    Raises:
        DataError: There is no such data set, or a file did not come as expected.
    """
    if name not in DATASETS:
        raise DataError(f"Expected one of {', '.join(DATASETS)}; got {name!r}.")
    home = (folder or data_folder()) / name
    home.mkdir(parents=True, exist_ok=True)
    return [
        _obtain(download, home / download.file, mirror, progress or _silent)
        for download in DATASETS[name].downloads
    ]


# From files to arrays.


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turns whatever a parser raises into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a damaged file can make its parser raise nearly anything
        raise DataError(f"Expected {path.name} as a {path.suffix} file; got: {error}") from error


@contextmanager
def stored_in(path: Path) -> Generator[Arrays]:
    """The arrays of a `.npz` file, read one by one; a pickle among them is refused."""
    with reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        yield stored


def _each(reader: Callable[[Path], np.ndarray], **files: str) -> Callable[[Path], Arrays]:
    return lambda folder: {split: reader(folder / file) for split, file in files.items()}


def _renamed(**names: str) -> Callable[[Arrays], Arrays]:
    return lambda stored: {split: stored[name] for split, name in names.items()}


def _omniglot(folder: Path) -> Arrays:
    columns = _mat(folder / "chardata.mat", "data", "testdata")
    return {"train": _upright(columns["data"].T), "test": _upright(columns["testdata"].T)}


def _omniglot_archive(stored: Arrays) -> Arrays:
    images, part = stored["images"], stored["split_24345_8070"]
    return {"train": images[part == 0], "test": images[part == 1]}


def _silhouettes(folder: Path) -> Arrays:
    names = {f"{stem}_images": f"{stem}_data" for stem in ("train", "val", "test")}
    stored = _mat(folder / "caltech101_silhouettes_28_split1.mat", *names.values())
    return _objects({image: _upright(stored[name]) for image, name in names.items()})


def _objects(stored: Arrays) -> Arrays:
    """The silhouettes with the object as 1, as the likelihood literature has them."""
    stems = {"train": "train", "validation": "val", "test": "test"}
    return {split: 1 - stored[f"{stem}_images"] for split, stem in stems.items()}


def _cifar10(folder: Path) -> Arrays:
    path = folder / "cifar-10-binary.tar.gz"
    with reading(path), tarfile.open(path, "r:gz") as tar:
        batches = {
            Path(member.name).stem: np.frombuffer(content.read(), np.uint8).reshape(-1, 1 + 3072)
            for member in tar
            if member.name.endswith(".bin") and (content := tar.extractfile(member))
        }
        test = batches.pop("test_batch")
        train = np.concatenate([batches[name] for name in sorted(batches)])
    held_out = len(train) // 10
    parts = {"train": train[:-held_out], "validation": train[-held_out:], "test": test}
    return {split: part[:, 1:].reshape(-1, 3, 32, 32) for split, part in parts.items()}


def _amat(path: Path) -> UInt8[np.ndarray, "count area"]:
    with reading(path):
        digits = path.read_bytes().translate(None, b" \r\n")
    if set(digits) - set(b"01") or len(digits) % 784:
        raise DataError(f"Expected rows of 784 digits 0 or 1 in {path.name}; got another text.")
    return np.frombuffer(digits, np.uint8).reshape(-1, 784) - np.uint8(ord("0"))


def _idx(path: Path) -> UInt8[np.ndarray, "count height width"]:
    with reading(path):
        content = gzip.decompress(path.read_bytes())
        magic, *shape = np.frombuffer(content, ">u4", count=4).tolist()
    if magic != IDX_BYTES_IN_3_AXES or len(content) != 16 + math.prod(shape):
        raise DataError(f"Expected {path.name} as IDX images; got another content.")
    return np.frombuffer(content, np.uint8, offset=16).reshape(shape)


def _mat(path: Path, *names: str) -> Arrays:
    with reading(path):  # scipy is needed by nothing else here, and may be absent
        stored = importlib.import_module("scipy.io").loadmat(path, variable_names=names)
        return {name: stored[name] for name in names}


def _upright(
    rows: Shaped[np.ndarray, "count 784"],
) -> Shaped[np.ndarray, "count 28 28"]:
    """The images of MATLAB's rows, in which the vertical place runs fastest."""
    return rows.reshape(-1, 28, 28).transpose(0, 2, 1)


# From the network to files.


def _obtain(download: Download, path: Path, mirror: str | None, progress: Progress) -> Path:
    pin = path.with_name(f"{path.name}.sha256")
    if not path.is_file() or _complaint(download, path, pin):
        url = f"{mirror.rstrip('/')}/{download.file}" if mirror else download.url
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as temporary:
            part = Path(temporary) / path.name
            _stream(url, part, progress)
            if complaint := _complaint(download, part, pin):
                raise DataError(complaint)
            part.replace(path)
    if download.sha256 is None:
        pin.write_text(f"{_sha256(path)}  {path.name}\n")
    return path


def _complaint(download: Download, path: Path, pin: Path) -> str | None:
    """What is wrong with the file, if anything."""
    pinned = pin.read_text().partition(" ")[0] if pin.is_file() else None
    if download.git_blob and (got := _git_blob(path)) != download.git_blob:
        return f"Expected {download.file} with git blob id {download.git_blob}; got {got}."
    expected = download.sha256 or pinned
    if expected and (got := _sha256(path)) != expected:
        origin = "" if download.sha256 else f" (of its first download, in {pin.name})"
        return f"Expected {download.file} with sha256 {expected}{origin}; got {got}."
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob(path: Path) -> str:
    """The id that git gives to a file of this content."""
    header = f"blob {path.stat().st_size}\0".encode()
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.sha1(header, usedforsecurity=False)
        ).hexdigest()


def _stream(url: str, part: Path, progress: Progress) -> None:
    received, total = 0, None
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "miss-iwem"})
        with urllib.request.urlopen(request, timeout=60) as response, part.open("wb") as file:
            if length := response.headers.get("Content-Length"):
                total = int(length)
            while block := response.read(BLOCK):
                file.write(block)
                received += len(block)
                progress(part.name, received, total)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(f"Expected {part.name} from {url}; got: {error}") from error
    if total is not None and received != total:
        raise DataError(f"Expected {total} bytes of {part.name} from {url}; got {received}.")


def _silent(_file: str, _received: int, _total: int | None) -> None:
    """Tells nobody."""


def _mnist_like(archive: str, home: str, *, train: str, test: str) -> Published:
    """MNIST, or a data set that is published in its files."""
    files = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
    return Published(
        archive=archive,
        unpack=_renamed(train="train_images", test="test_images"),
        downloads=(
            Download(url=home + files["train"], sha256=train),
            Download(url=home + files["test"], sha256=test),
        ),
        read=_each(_idx, **files),
        held_out=10_000,
        shuffled=False,
    )


LAROCHELLE = "https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
DATASETS: dict[str, Published] = {
    "static-mnist": Published(
        archive="static_binarized_mnist.npz",
        unpack=_renamed(train="train", validation="valid", test="test"),
        downloads=(
            Download(
                url=LAROCHELLE + "binarized_mnist_train.amat",
                sha256="ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            ),
            Download(
                url=LAROCHELLE + "binarized_mnist_valid.amat",
                sha256="1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
            ),
            Download(
                url=LAROCHELLE + "binarized_mnist_test.amat",
                sha256="e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
            ),
        ),
        read=_each(
            _amat,
            train="binarized_mnist_train.amat",
            validation="binarized_mnist_valid.amat",
            test="binarized_mnist_test.amat",
        ),
    ),
    "mnist": _mnist_like(
        "mnist.npz",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        train="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        test="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "omniglot": Published(
        archive="omniglot28.npz",
        unpack=_omniglot_archive,
        downloads=(
            Download(
                url="https://raw.githubusercontent.com/yburda/iwae/"
                "78a6075484bd7dd6f47a4bb9880d2295bc7a5220/datasets/OMNIGLOT/chardata.mat",
                git_blob="016a3536ffe5e1d38e42563a18d7a78bfaf643ec",
            ),
        ),
        read=_omniglot,
        held_out=1_345,
        archive_note=" (Lake's strokes in 28x28, not comparable with Burda's chardata.mat)",
        files_note=" (as Burda et al. 2016 prepared it, rounded to 8 bits)",
    ),
    "caltech101-silhouettes": Published(
        archive="caltech101_silhouettes28.npz",
        unpack=_objects,
        downloads=(
            Download(
                url="https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat",
                sha256="eb6735e8d84b1850fabc5590124aab1755e90c9fd28123585324398405e1e42a",
            ),
        ),
        read=_silhouettes,
    ),
    "fashion-mnist": _mnist_like(
        "fashion_mnist.npz",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        train="3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        test="346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    "cifar10": Published(
        archive="cifar10_subset.npz",
        unpack=_renamed(train="train_images", test="test_images"),
        downloads=(
            Download(
                url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        read=_cifar10,
        archive_note=" (1,500 of the 5,000 training images of each class)",
    ),
}
"""The data sets of the literature.

The hashes of static MNIST were published by others and agree with the archive's images, written
as text; that of the silhouettes was computed from a copy of the file, whose images agree too.
Those of MNIST, Fashion-MNIST and CIFAR-10 are as several others have published them.
We know no sha256 of Burda's OMNIGLOT, but his repository fixes the file by its id in git.
"""
