"""The models of a folder: those that can be trusted, as the folder now is."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointError
from model.networks import MlpDecoder
from service.errors import Failed, UnknownModel
from service.models import Models
from tests.wire import write_checkpoint


def _models(folder: Path, **options: Any) -> Models:
    """Those of a folder whose default is tiny, after the start."""
    models = Models(folder, device="cpu", **options)
    models.start("tiny")
    return models


def _damage(folder: Path) -> None:
    """Another card, of no known format, takes the place of the one that is there."""
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").unlink()
    (folder / "card.json").write_text(json.dumps({**card, "format_version": 99}))


def test_a_folder_without_the_default_is_refused(tmp_path: Path):
    """Nobody who names no model could be served; the error names those that there are."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"default model tiny in .*; got"):
            _models(folder)
    write_checkpoint(tmp_path, "other")
    with pytest.raises(CheckpointError, match="one of other"):
        _models(tmp_path)


def test_a_default_that_is_damaged_is_refused(tmp_path: Path):
    """Weights that are not the card's are never served."""
    write_checkpoint(tmp_path)
    (tmp_path / "tiny" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="sha256"):
        _models(tmp_path)


def test_another_model_that_is_damaged_does_not_keep_the_rest_from_being_served(tmp_path: Path):
    """It is left out of the list; who asks for it is told what is wrong."""
    write_checkpoint(tmp_path)
    write_checkpoint(tmp_path, "broken")
    _damage(tmp_path / "broken")
    models = _models(tmp_path)

    assert list(models.cards()) == ["tiny"]
    with pytest.raises(Failed, match="format 99"):
        models.get("broken")


@pytest.mark.parametrize(
    "name", ["none", "", ".", "..", "../tiny", "tiny/../tiny", "tiny/", "/tiny", "\0", "a" * 5000]
)
def test_a_name_is_no_path(tmp_path: Path, name: str):
    """Only the names of folders are models."""
    write_checkpoint(tmp_path)
    with pytest.raises(UnknownModel, match="one of tiny"):
        _models(tmp_path).get(name)


def test_hidden_folders_are_no_models(tmp_path: Path):
    """A checkpoint that is being written is not seen before it is whole."""
    write_checkpoint(tmp_path)
    write_checkpoint(tmp_path, ".tiny-fresh")
    models = _models(tmp_path)

    assert list(models.cards()) == ["tiny"]
    with pytest.raises(UnknownModel):
        models.get(".tiny-fresh")


def test_a_model_appears_and_goes_with_its_folder(tmp_path: Path):
    """Without a restart; what somebody still works with is not taken from them."""
    write_checkpoint(tmp_path)
    models = _models(tmp_path)
    write_checkpoint(tmp_path, "late", seed=1)
    late = models.get("late")
    assert list(models.cards()) == ["late", "tiny"]
    shutil.rmtree(tmp_path / "late")

    assert list(models.cards()) == ["tiny"]
    with pytest.raises(UnknownModel):
        models.get("late")
    assert late.network.decode(torch.zeros(1, 4)).shape == (1, 1, 6, 5)


def test_a_model_that_is_replaced_is_read_again(tmp_path: Path):
    """Who had the old one keeps it."""
    write_checkpoint(tmp_path)
    models = _models(tmp_path)
    old = models.get("tiny")
    card = write_checkpoint(tmp_path, seed=1)
    new = models.get("tiny")

    assert new.card.weights_sha256 == card.weights_sha256 != old.card.weights_sha256
    assert models.cards()["tiny"] == card
    assert models.get("tiny") is new


def test_a_model_whose_card_comes_before_its_weights_is_read_when_it_is_whole(tmp_path: Path):
    """As `cp -r` may copy it: what was refused half way is tried again when there is more."""
    write_checkpoint(tmp_path)
    models = _models(tmp_path)
    late, whole = tmp_path / "late", tmp_path / "tiny"
    late.mkdir()
    for name in ("card.json", "weights.safetensors"):
        assert "late" not in models.cards()
        shutil.copy(whole / name, late / name)

    assert models.get("late").card == models.get("tiny").card
    assert "late" in models.cards()


def _weights(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"none")
    (folder / "card.json").touch()


def _other_results(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "self_test": card["self_test"] - 1}))


@pytest.mark.parametrize("damage", [_damage, _weights, _other_results])
def test_in_place_of_a_bad_replacement_the_old_model_is_served(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    """What was good stays until there is something good; the log says once what is wrong."""
    write_checkpoint(tmp_path)
    models = _models(tmp_path)
    old = models.get("tiny")
    damage(tmp_path / "tiny")

    assert all(models.get("tiny") is old for _ in range(3))
    assert models.cards() == {"tiny": old.card}
    assert len([record for record in caplog.records if "refused" in record.message]) == 1
    card = write_checkpoint(tmp_path, seed=2)
    assert models.get("tiny").card == card


def test_a_folder_that_cannot_be_read_for_a_while_keeps_its_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A share that hiccups is not one whose models were removed."""
    write_checkpoint(tmp_path)
    models = _models(tmp_path)
    model, stat = models.get("tiny"), Path.stat

    def failing(path: Path, **options: Any) -> os.stat_result:
        if path.name == "card.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", failing)

    assert models.get("tiny") is models.at_hand("tiny") is model


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No more is kept than may be, and what is wanted now even where it is more than that."""
    for name in ("tiny", "second", "third"):
        write_checkpoint(tmp_path, name)
    models = Models(tmp_path, device="cpu", memory=2 * Models(tmp_path).get("tiny").bytes)
    names = _count_reads(monkeypatch)
    for name in ("tiny", "second", "tiny", "third", "tiny", "third", "second"):
        models.get(name)

    assert names == ["tiny", "second", "third", "second"]
    assert list(models.cards()) == ["second", "third", "tiny"]
    assert names == ["tiny", "second", "third", "second"]
    small = Models(tmp_path, device="cpu", memory=1)
    assert small.get("tiny").name == "tiny"
    assert small.get("second").name == "second"


def test_a_model_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However many ask for a new one at the same time."""
    write_checkpoint(tmp_path)
    models = _models(tmp_path)
    write_checkpoint(tmp_path, "late")
    names = _count_reads(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(models.get, ["late"] * 16))

    assert names == ["late"]
    assert {model.card.name for model in found} == {"late"}


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    read = checkpoint.read

    def counted(folder: Path, **options: Any) -> checkpoint.Checkpoint:
        names.append(folder.name)
        return read(folder, **options)

    monkeypatch.setattr("model.checkpoint.read", counted)
    return names


def test_whether_images_have_the_same_bits_together_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where a processor's products depend on the rows beside, images are worked on alone."""
    write_checkpoint(tmp_path)
    assert _models(tmp_path).get("tiny").together
    forward = MlpDecoder.forward

    def otherwise(self: MlpDecoder, latents: Tensor) -> Tensor:
        return forward(self, latents) * (1 + 1e-6 * len(latents))

    monkeypatch.setattr(MlpDecoder, "forward", otherwise)
    assert not _models(tmp_path).get("tiny").together
