"""Where the files of batches are: a folder here, one that machines share, or a bucket.

A file is there as a whole or not at all, whatever happens while it is written; who writes it again
writes the same.
"""

import os
import shutil
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

try:
    from botocore.exceptions import BotoCoreError as Unreachable  # a bucket's, and no OSError
except ImportError:  # buckets are an option
    Unreachable = ConnectionError

__all__ = ["Store", "Unreachable"]


class Store:
    """Files by their names, at an address of fsspec's."""

    def __init__(self, address: str) -> None:
        found: tuple[Any, str] = fsspec.url_to_fs(
            address,
            use_listings_cache=False,  # others write there too
        )
        self._files, root = found
        self.folder = Path(root) if isinstance(self._files, LocalFileSystem) else None
        """Where the files are, if that is on this machine."""
        self._root = root
        self._files.makedirs(root, exist_ok=True)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self._files.exists(self.address(name)))

    def size(self, name: str = "") -> int:
        """Bytes of a file, or of all below a name."""
        found: dict[str, dict[str, Any]] = self._files.find(self.address(name), detail=True)
        return sum(
            int(file["size"]) for file in found.values()
        )  # as listed: some may go meanwhile

    def names(self, name: str = "") -> list[str]:
        """What there is below a name, one level deep."""
        if not self.exists(name):
            return []
        paths: list[str] = self._files.ls(self.address(name), detail=False)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def open(self, name: str) -> IO[bytes]:
        """A file, to be read."""
        return cast("IO[bytes]", self._files.open(self.address(name), "rb"))

    def remove(self, name: str) -> None:
        """Removes a file, or all below a name, if there are any."""
        if self.exists(name):
            self._files.rm(self.address(name), recursive=True)

    def signed(self, name: str, *, seconds: int) -> str:
        """An address at which a file in a bucket may be read for so long."""
        return str(self._files.sign(self.address(name), expiration=seconds))

    @contextmanager
    def here(self, name: str) -> Generator[Path]:
        """A file or a folder with its files as it is on this machine, for as long as this."""
        if self.folder is not None:
            yield self.folder / name
            return
        with TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            self._files.get(self.address(name), str(path), recursive=True)
            yield path

    @contextmanager
    def begun(self) -> Generator[Path]:
        """A path at which a file or a folder can be made; what is not placed then, is not kept."""
        if self.folder is None:
            with TemporaryDirectory() as folder:
                yield Path(folder) / "begun"
            return
        path = self.folder / BEGUN / uuid.uuid4().hex
        path.parent.mkdir(exist_ok=True)
        try:
            yield path
        finally:
            _discard(path)

    def forget_begun(self, *, hours: float) -> None:
        """Removes what was begun so long ago that whoever did was killed."""
        begun = (self.folder / BEGUN).glob("*") if self.folder else ()
        for path in begun:
            if path.stat().st_mtime < time.time() - 3600 * hours:
                _discard(path)

    def place(self, path: Path, name: str) -> None:
        """Gives what was begun its name; a folder that is there already is as good."""
        if self.folder is None:
            for file in path.iterdir() if path.is_dir() else ():
                self._files.put_file(str(file), self.address(f"{name}/{file.name}"))
            if path.is_file():
                self._files.put_file(str(path), self.address(name))
            return
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in [path] if path.is_file() else path.iterdir():
            _sync(file)
        try:
            path.replace(target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(target.parent)

    @contextmanager
    def writing(self, name: str) -> Generator[Path]:
        """A path at which a file, or a folder, is made; at the end it has its name."""
        with self.begun() as path:
            yield path
            self.place(path, name)

    def address(self, name: str) -> str:
        """What fsspec calls it."""
        return f"{self._root}/{name}" if name else self._root


def _discard(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


BEGUN = ".begun"
"""What is not there yet."""
