"""Checkpoints: what is written is what is read, and nothing else is read."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from model import checkpoint
from model.checkpoint import FORMAT_VERSION, Card, Checkpoint, CheckpointError, read, read_card
from model.latent import Architecture, LatentVariableModel
from model.noise import Noise

ARCHITECTURE = Architecture(image_shape=(1, 3, 4), latent=2, hidden=(5, 6))


def _card(**changes: Any) -> Card:
    card = Card(
        name="tiny",
        architecture=ARCHITECTURE,
        binarise="threshold",
        objective="miss-iwem",
        missing="patches:3, drawn once",
        recipe={"particles": 5, "learning_rate": 3e-4},
        data={"name": "Größe: π"},
        training={"epochs": 2},
        results={"raw": {"value": -1.5, "particles": 5000}},
    )
    return replace(card, **changes)


def _model(seed: int = 0, architecture: Architecture = ARCHITECTURE) -> LatentVariableModel:
    return architecture.build(Noise(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint on disk."""
    checkpoint.write(tmp_path / "tiny", Checkpoint(_model(), _card()))
    return tmp_path / "tiny"


def _change(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    (folder / "card.json").write_text(json.dumps({**card, **changes}))


def _put(folder: Path, weights: bytes) -> None:
    """Other weights, with the hash that belongs to them."""
    (folder / "weights.safetensors").write_bytes(weights)
    _change(folder, weights_sha256=hashlib.sha256(weights).hexdigest())


def test_what_was_written_is_read(folder: Path):
    """The same weights, the same outputs to the bit, and the same card with the weights' hash."""
    found, model = read(folder), _model()
    x = Noise(0).uniform(4, 1, 3, 4, like=torch.zeros(()))
    z = Noise(1).normal(4, 2, like=torch.zeros(()))

    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert found.card == read_card(folder)
    assert found.card.self_test is not None
    assert replace(found.card, self_test=None) == _card(weights_sha256=digest)
    assert torch.equal(found.model.decoder(z), model.decoder(z))
    assert torch.equal(found.model.encoder(x)[0], model.encoder(x)[0])
    assert torch.equal(found.model.encoder(x)[1], model.encoder(x)[1])


def test_a_model_that_is_read_is_ready_for_inference(folder: Path):
    """It is in evaluation mode and asks for no gradient."""
    model = read(folder).model

    assert isinstance(model, nn.Module)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_writing_returns_the_card_that_is_read(tmp_path: Path):
    """The hash in it is the file's, whatever the card said before."""
    written = checkpoint.write(
        tmp_path / "a" / "b", Checkpoint(_model(), _card(weights_sha256="of other weights"))
    )

    assert written == read_card(tmp_path / "a" / "b")


def test_writing_replaces_the_folder_whole(folder: Path):
    """Nothing of an older checkpoint, nor of the writing, is left."""
    (folder / "leftover").touch()
    other = Architecture(image_shape=(1, 3, 4), latent=3, hidden=(4,))
    checkpoint.write(folder, Checkpoint(_model(1, other), _card(architecture=other, name="new")))

    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "weights.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]
    assert read(folder).card.name == "new"
    assert read(folder).model.architecture == other


def test_a_failed_writing_leaves_the_old_checkpoint(folder: Path):
    """What is not yet whole never takes the place of what is."""
    before = read_card(folder)
    with pytest.raises(TypeError):
        checkpoint.write(folder, Checkpoint(_model(1), _card(training={"device": object()})))

    assert read_card(folder) == before
    read(folder)


def test_tampered_weights_are_refused(folder: Path):
    """A changed byte changes the hash: the error names the expected one and the found one."""
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    expected, got = read_card(folder).weights_sha256, hashlib.sha256(weights).hexdigest()

    with pytest.raises(CheckpointError, match=f"Expected .*{expected} in tiny; got {got}"):
        read(folder)


@pytest.mark.parametrize("name", ["card.json", "weights.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str):
    """Half a checkpoint is none."""
    (folder / name).unlink()

    with pytest.raises(CheckpointError, match=f"Expected .* in tiny; got .*{name}"):
        read(folder)


def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path: Path):
    """The error says where a checkpoint was expected."""
    with pytest.raises(CheckpointError, match="Expected a checkpoint in nowhere; got"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "5", "null", '"card"', "{}", "\xff"])
def test_a_card_that_is_none_is_refused(folder: Path, text: str):
    """Neither broken JSON nor other JSON nor other bytes pass for a card."""
    (folder / "card.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(CheckpointError, match=r"Expected a c.* in tiny; got"):
        read_card(folder)


def test_a_card_with_what_is_no_number_is_refused(folder: Path):
    """JSON has no NaN: a card with one could not be sent to anybody."""
    text = (folder / "card.json").read_text().replace('"results": {', '"results": {"raw": NaN,')
    (folder / "card.json").write_text(text.replace("NaN,}", "NaN}"))

    with pytest.raises(CheckpointError, match="in tiny; got NaN, which is no number"):
        read_card(folder)


def test_an_unknown_field_is_refused(folder: Path):
    """A card of another version is not half understood."""
    _change(folder, licence="ours")

    with pytest.raises(CheckpointError, match=r"Expected a card .* got .*'licence'"):
        read_card(folder)


def test_another_format_is_refused(folder: Path):
    """The error names the version of the format that is read and the one that came."""
    _change(folder, format_version=99)

    with pytest.raises(
        CheckpointError, match=rf"card of format {FORMAT_VERSION} .*got format 99 "
    ):
        read_card(folder)


ARCHITECTURES = {
    "unknown size": {"widths": [3]},
    "unknown network": {"encoder": "transformer"},
    "other latents": {"latent": 7},
    "other layers": {"hidden": [5]},
    "not an object": None,
}


@pytest.mark.parametrize("change", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_another_architecture_is_refused(folder: Path, change: dict[str, Any] | None):
    """Weights never enter a network that they were not made for."""
    raw = json.loads((folder / "card.json").read_text(encoding="utf-8"))["architecture"]
    _change(folder, architecture=None if change is None else {**raw, **change})

    with pytest.raises(CheckpointError, match=r"(?s)Expected .*; got"):
        read(folder)


def test_weights_that_give_something_else_are_refused(folder: Path):
    """They fit, and their hash is right, but this is not the model that was written."""
    raw = json.loads((folder / "card.json").read_text(encoding="utf-8"))["architecture"]
    _change(folder, architecture={**raw, "proposal_variance": 9.0})

    with pytest.raises(CheckpointError, match=r"Expected .* nats in the self-test of tiny; got"):
        read(folder)


def test_a_card_of_before_there_was_a_self_test_is_read(folder: Path):
    """Its weights are known by their hash alone."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    del card["self_test"]
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")

    assert read(folder).card.self_test is None


def test_a_missing_tensor_is_refused(folder: Path):
    """All of the weights, or none."""
    state = dict(_model().state_dict())
    state.pop("decoder.layers.0.bias")
    _put(folder, save(state))

    with pytest.raises(CheckpointError, match=r"(?s)Expected weights .*decoder\.layers\.0\.bias"):
        read(folder)


def test_a_pickle_is_never_read(folder: Path):
    """What torch.save writes is refused even under the right name and hash."""
    torch.save(_model().state_dict(), folder / "pickle")
    _put(folder, (folder / "pickle").read_bytes())

    with pytest.raises(CheckpointError, match=r"Expected weights .* in tiny's card; got"):
        read(folder)
