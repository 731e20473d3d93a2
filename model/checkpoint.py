"""Checkpoints: a folder with `weights.safetensors` and the whole truth about them in `card.json`.

No pickle is ever read. The card names the architecture that the weights belong to and their
SHA-256, which is verified on load.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from model.latent import Architecture, LatentVariableModel
from model.likelihood import score
from model.masks import Incomplete
from model.noise import Noise, NoisePerImage
from model.stages import finish

__all__ = [
    "CARD",
    "FORMAT_VERSION",
    "WEIGHTS",
    "Card",
    "Checkpoint",
    "CheckpointError",
    "device_name",
    "provenance",
    "read",
    "read_card",
    "rewrite_card",
    "to_disk",
    "write",
]

FORMAT_VERSION = 1
WEIGHTS, CARD = "weights.safetensors", "card.json"


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or one whose parts do not belong together."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about a checkpoint."""

    name: str
    architecture: Architecture
    binarise: str
    """How grey levels become the pixels of training: threshold (above 127 is one), bernoulli
    (one by chance), or none (they stay as they are, from 0 to 1)."""
    objective: str
    missing: str
    """Which pixels the training images lacked, and whether that was drawn once or each epoch."""
    recipe: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    """Epochs, seconds, device, library versions, commit, validation bound."""
    results: dict[str, Any] = field(default_factory=dict)
    """Test results by name, each with its estimator, particles and standard error."""
    weights_sha256: str = ""
    self_test: float | None = None
    """What these weights give as log p(x_o) of a pattern, in nats; who reads them finds it again.
    None in cards of before there was one."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A model with its card."""

    model: LatentVariableModel
    card: Card


def write(folder: Path, checkpoint: Checkpoint) -> Card:
    """Replaces the folder as a whole by this checkpoint; returns the card with the hash."""
    weights = save({k: v.contiguous() for k, v in checkpoint.model.state_dict().items()})
    card = replace(
        checkpoint.card,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        self_test=_self_test(checkpoint.model),
    )
    fresh = _beside(folder)
    fresh.mkdir(parents=True)
    to_disk(fresh / WEIGHTS, weights)
    to_disk(fresh / CARD, _to_json(card))
    if folder.exists():
        old = _beside(folder)
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)
    return card


def rewrite_card(folder: Path, card: Card) -> None:
    """Puts another card, of the same weights, in the place of the one that is there."""
    fresh = _beside(folder)
    to_disk(fresh, _to_json(card))
    fresh.replace(folder / CARD)


def read_card(folder: Path) -> Card:
    """The card of a checkpoint, without its weights.

    Raises:
        CheckpointError: There is no card, or it is not one of this format.
    """
    try:
        raw = json.loads((folder / CARD).read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Expected a checkpoint in {folder.name}; got {error}.") from error
    known = {f.name for f in fields(Card)}
    got: dict[str, Any] = raw if isinstance(raw, dict) else {}
    if not known - {"self_test"} <= set(got) <= known or got["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"Expected a card of format {FORMAT_VERSION} with the fields {sorted(known)} "
            f"in {folder.name}; got format {got.get('format_version')} with {sorted(got)}."
        )
    values: dict[str, Any] = {**got, "architecture": _architecture(got["architecture"])}
    return Card(**values)


def read(folder: Path, *, device: str = "cpu") -> Checkpoint:
    """The model that a folder holds, on a device, ready for inference.

    Raises:
        CheckpointError: The folder is no checkpoint, or the weights are not the card's, or this
            machine gets something else out of them.
    """
    card = read_card(folder)
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"Expected {WEIGHTS} in {folder.name}; got {error}.") from error
    got = hashlib.sha256(weights).hexdigest()
    if got != card.weights_sha256:
        raise CheckpointError(
            f"Expected weights with sha256 {card.weights_sha256} in {folder.name}; got {got}."
        )
    try:
        model = card.architecture.build(Noise(0))
        model.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"Expected weights of the architecture in {folder.name}'s card; got {error}"
        ) from error
    model.to(device).frozen()
    if card.self_test is not None:
        found = _self_test(model)
        if not math.isclose(found, card.self_test, rel_tol=SAME, abs_tol=SAME):
            raise CheckpointError(
                f"Expected {card.self_test} nats in the self-test of {folder.name}; got {found}."
            )
    return Checkpoint(model, card)


SAME = 1e-3
"""Of a number that two machines compute in single precision."""


@torch.no_grad()
def _self_test(model: LatentVariableModel) -> float:
    """Log p(x_o) of stripes whose right half is missing, by 64 particles of q(z | (x_o, 0))."""
    values = torch.zeros(1, *model.architecture.image_shape, device=model.device)
    values[..., ::3] = 1
    observed = torch.zeros_like(values, dtype=torch.bool)
    observed[..., : (values.shape[-1] + 1) // 2] = True
    stripes = Incomplete.hide(values, observed)
    scores = finish(
        score(model, stripes, NoisePerImage.of(0, [0]), particles=64, proposal="zero-filled")
    )
    return scores.log_likelihood.value.item()


def to_disk(path: Path, data: bytes) -> None:
    """Writes a file, and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def provenance(device: torch.device) -> dict[str, Any]:
    """What a training was done with: device, commit of this program, and libraries' versions."""
    return {
        "device": device_name(device),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def device_name(device: torch.device) -> str:
    """What a card and a ledger call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    source = Path(__file__).parent
    asked = subprocess.run(
        [git, "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def _architecture(raw: Any) -> Architecture:
    try:
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return Architecture(**lists)
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"Expected an architecture of this version; got {error}.") from error


def _to_json(card: Card) -> bytes:
    text = json.dumps(asdict(card), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number")


def _beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
