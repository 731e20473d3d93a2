"""The models of a folder: read when they are asked for, and again when they have changed.

A model is a folder with a card, and whatever appears there is served from then on. A card that
is not the one that was read is that of another checkpoint: it is read, verified and tried, and
if it fails in any of these, the one before is served on. What was read longest ago in use makes
room where all together would take more memory than they may.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import CARD, WEIGHTS, Card, Checkpoint, CheckpointError
from model.imputation import impute
from model.latent import LatentVariableModel
from model.likelihood import BLOCK, score
from model.masks import Incomplete, mechanism
from model.noise import Noise, NoisePerImage
from model.stages import finish
from service.errors import Failed, UnknownModel

__all__ = ["Card", "CheckpointError", "Model", "Models"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model that can be used, as long as anybody holds it."""

    name: str
    card: Card
    network: LatentVariableModel
    together: bool
    """Whether images have the same bits together as alone."""

    def write(self, folder: Path) -> None:
        """Makes a checkpoint of it, for who needs this very one later."""
        checkpoint.write(folder, Checkpoint(self.network, self.card))

    @property
    def bytes(self) -> int:
        """The memory of its weights."""
        return sum(weight.nbytes for weight in self.network.state_dict().values())


Version = tuple[tuple[int, int, int] | None, ...]
"""Of a card's file and its weights': what tells them from others that took their place."""


class Models:
    """Every model of a folder by its name, for any number of threads."""

    def __init__(self, folder: Path, *, device: str = "auto", memory: int = 2**31) -> None:
        self._folder = folder
        self._device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self._memory = memory
        self._read: OrderedDict[str, tuple[Version, Model]] = OrderedDict()
        self._verified: dict[str, tuple[Version, Card]] = {}
        self._refused: dict[str, tuple[Version, CheckpointError]] = {}
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def start(self, default: str) -> None:
        """Reads the models, of which requests that do not name one mean the default.

        Raises:
            CheckpointError: It is not there, or cannot be trusted.
        """
        self.cards()
        try:
            self.get(default)
        except (UnknownModel, Failed) as error:
            raise CheckpointError(
                f"Expected the default model {default} in {self._folder}; got: {error}"
            ) from error

    def at_hand(self, name: str) -> Model | None:
        """A model that has been read and is as its folder now is; None where there is none."""
        version = self._version(name)
        return None if version is None else self._known(name, version)

    def get(self, name: str) -> Model:
        """A model as its folder now is, or as it last could be trusted.

        Raises:
            UnknownModel: There is no such model.
            Failed: It cannot be trusted, and never could.
        """
        if (version := self._version(name)) is None:
            known = ", ".join(self._names())
            raise UnknownModel.of("model", f"one of {known}", repr(name[:80]))
        if (model := self._known(name, version)) is not None:
            return model
        with self._reading:  # one at a time, while those that are known are given out
            return self._known(name, version) or self._fresh(name, version)

    def cards(self) -> dict[str, Card]:
        """The card of every model that can be used; one that has been read is not read again."""
        found: dict[str, Card] = {}
        for name in self._names():
            version, card = self._verified.get(name, (None, None))
            if card is None or version != self._version(name):
                try:
                    card = self.get(name).card
                except (Failed, UnknownModel):
                    continue  # the log says why
            found[name] = card
        return found

    def _known(self, name: str, version: Version) -> Model | None:
        with self._lock:
            known, model = self._read.get(name, (None, None))
            if version != known:
                return None
            self._read.move_to_end(name)
            return model

    def _fresh(self, name: str, version: Version) -> Model:
        _, before = self._read.get(name, (None, None))
        try:
            model = self._try(name, version)
        except CheckpointError as error:
            if before is None:
                raise Failed(str(error)) from error
            return before
        with self._lock:
            self._verified[name] = version, model.card
            self._read[name] = version, model
            self._read.move_to_end(name)
            self._make_room(name)
        return model

    def _try(self, name: str, version: Version) -> Model:
        """Reads a model, unless this very version has been refused before."""
        refused, error = self._refused.get(name, (None, None))
        if error is not None and refused == version:
            raise error
        try:
            read = checkpoint.read(self._folder / name, device=self._device)
        except CheckpointError as error:
            self._refused[name] = version, error
            log.warning("A checkpoint was refused: %s", error)
            raise
        _warm(read.model)
        return Model(name, read.card, read.model, _dense(read) and _alike(read.model))

    def _make_room(self, name: str) -> None:
        """Forgets what was used longest ago; the model that is wanted now always stays."""
        sizes = {each: model.bytes for each, (_, model) in self._read.items()}
        for each in list(self._read):
            if sum(sizes.values()) <= self._memory or each == name:
                return
            del self._read[each], sizes[each]

    def _names(self) -> list[str]:
        return sorted(card.parent.name for card in self._folder.glob(f"[!.]*/{CARD}"))

    def _version(self, name: str) -> Version | None:
        """None where there is no such folder: a name is no path, and with a dot it is not done.

        Where the folder cannot be read for a while, a model is what it last was.
        """
        if name.startswith(".") or Path(name).parts != (name,):
            return None
        try:
            card, weights = (_stamp(self._folder / name / file) for file in (CARD, WEIGHTS))
        except OSError:
            known, _ = self._read.get(name, (None, None))
            return known
        return card and (card, weights)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        at = file.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return at.st_mtime_ns, at.st_ino, at.st_size


def _warm(network: LatentVariableModel) -> None:
    """Scores a blank image: what PyTorch loads at its first use shall not wait for a request."""
    values = torch.zeros(1, *network.architecture.image_shape, device=network.device)
    blank = Incomplete.hide(values, torch.zeros_like(values, dtype=torch.bool))
    with torch.inference_mode():
        finish(score(network, blank, NoisePerImage.of(0, [0]), particles=1))


def _dense(read: Checkpoint) -> bool:
    """Whether all is products and functions of MKL's, which mostly treat a row like any other."""
    parts, cpu = read.card.architecture, read.model.device.type == "cpu"
    return cpu and torch.backends.mkl.is_available() and parts.encoder == parts.decoder == "mlp"


def _alike(network: LatentVariableModel) -> bool:
    """Whether some images with holes have the same bits together as alone, on this processor."""
    with torch.inference_mode():
        shape, generator = network.architecture.image_shape, Noise(0).at("mask").generator()
        seen = mechanism("mcar:0.5")(TRIED, shape, generator)
        images = Incomplete.hide(network.sample(TRIED, Noise(0)), seen)
        together = _completed(network, images, range(TRIED))
        alone = [_completed(network, images[i : i + 1], [i]) for i in range(TRIED)]
    return all(
        torch.equal(whole, torch.cat(parts))
        for whole, *parts in zip(together, *alone, strict=True)
    )


def _completed(
    network: LatentVariableModel, images: Incomplete, index: Sequence[int]
) -> list[Tensor]:
    noise = NoisePerImage.of(0, index)
    done = finish(impute(network, images, noise, particles=2 * BLOCK))
    return [done.mean, done.std, done.draws, done.log_likelihood.value]


TRIED = 5
"""Images: their rows are no multiple of those that a processor takes at once."""
