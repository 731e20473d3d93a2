"""The store: files that are there as a whole or not at all, in a folder and in a bucket."""

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from fsspec.implementations.local import LocalFileSystem

from service.store import Store


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty one of each kind."""
    if request.param == "folder":
        return Store(str(tmp_path / "store"))
    return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def _write(store: Store, name: str, content: bytes) -> None:
    with store.writing(name) as path:
        path.write_bytes(content)


def _read(store: Store, name: str) -> bytes:
    with store.open(name) as file:
        return file.read()


def test_what_was_written_can_be_read(store: Store):
    """A file has what was written last, a size, and is among the names of its folder."""
    _write(store, "a/b/c", b"first")
    _write(store, "a/b/c", b"second")
    _write(store, "a/d", b"third")

    assert _read(store, "a/b/c") == b"second"
    assert store.size("a/b/c") == 6
    assert store.size() == 11
    assert store.names("a") == ["b", "d"]
    assert store.exists("a/b/c")


def test_what_goes_while_it_is_measured_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Others write and remove there too, a database's journal among it."""
    store = Store(str(tmp_path))
    _write(store, "a", b"first")
    _write(store, "b", b"second")
    info = LocalFileSystem.info

    def gone(self: LocalFileSystem, path: Any, **options: Any) -> dict[str, Any]:
        if str(getattr(path, "path", path)).endswith("/b"):
            raise FileNotFoundError(path)
        return info(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "info", gone)

    assert store.size() == 5


def test_what_is_not_there_is_empty(store: Store):
    """Of a name that nothing has there is nothing, and to remove it is no fault."""
    store.remove("nothing")

    assert not store.exists("nothing")
    assert store.names("nothing") == []
    assert store.size("nothing") == 0
    with pytest.raises(FileNotFoundError):
        store.open("nothing").read()


def test_what_failed_leaves_nothing(store: Store):
    """A file that was not written to its end is not there, and the one before it is."""
    _write(store, "a", b"before")

    def fail() -> None:
        with store.writing("a") as path:
            path.write_bytes(b"half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()

    assert _read(store, "a") == b"before"
    assert store.size() == len(b"before")


def test_all_below_a_name_is_removed(store: Store):
    """A folder goes with all in it, and what is beside it stays."""
    for name in ("a/b/c", "a/d", "ab"):
        _write(store, name, b"x")

    store.remove("a")

    assert store.names() == [name for name in store.names() if name in ("ab", ".begun")]
    assert not store.exists("a/d")
    assert store.exists("ab")


def test_folders_are_written_as_a_whole(store: Store):
    """A folder comes with its files; one that is there already is as good."""
    for content in (b"first", b"second"):
        with store.writing("a/model") as folder:
            folder.mkdir()
            (folder / "weights").write_bytes(content)

    with store.here("a/model") as path:
        assert [file.name for file in path.iterdir()] == ["weights"]
        assert path.name == "model"


def test_files_can_be_had_here(store: Store):
    """A file is a path on this machine for as long as it is wanted."""
    _write(store, "a/b", b"content")

    with store.here("a/b") as path:
        assert path.read_bytes() == b"content"


def test_a_bucket_signs_addresses(bucket: str):
    """Whoever has the address can read the file, without a key."""
    store = Store(f"{bucket}/signed")
    _write(store, "a", b"content")

    assert store.folder is None
    assert httpx.get(store.signed("a", seconds=60)).content == b"content"


def test_what_was_begun_long_ago_is_removed(tmp_path: Path):
    """What a process left that was killed goes, and what is being written does not."""
    store = Store(str(tmp_path))

    with store.begun() as old, store.begun() as new:
        old.mkdir()
        (old / "weights").write_bytes(b"x")
        new.write_bytes(b"x")
        os.utime(old, (0, 0))
        store.forget_begun(hours=24)

        assert (old.exists(), new.exists()) == (False, True)
