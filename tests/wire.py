"""What the tests of the service share: tiny checkpoints, a real server, pictures of all kinds."""

import base64
import io
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from model import checkpoint
from model.checkpoint import Card, Checkpoint
from model.factor_analysis import FactorAnalysis
from model.fit import as_model
from model.latent import Architecture
from model.noise import Noise
from service.settings import Settings

# Not square, so that height and width cannot be taken for each other.
SHAPE = (1, 6, 5)
COLOUR = (3, 4, 7)
LIKE = torch.zeros((), dtype=torch.float64)
GREY = FactorAnalysis(
    loadings=0.3 * Noise(0).at("loadings").normal(30, 2, like=LIKE),
    offset=torch.full((30,), 0.5, dtype=torch.float64),
    variance=torch.full((30,), 0.04, dtype=torch.float64),
)


def write_checkpoint(
    folder: Path, name: str = "tiny", *, shape: tuple[int, int, int] = SHAPE, seed: int = 0
) -> Card:
    """A checkpoint of a tiny model with random weights."""
    architecture = Architecture(image_shape=shape, latent=4, hidden=(16,))
    card = Card(
        name=name,
        architecture=architecture,
        binarise="threshold",
        objective="miss-iwem",
        missing="mcar:0.5, drawn once",
        recipe={},
        data={"name": "noise"},
        training={"epochs": 0, "validation_bound": -1.0},
    )
    return checkpoint.write(folder / name, Checkpoint(architecture.build(Noise(seed)), card))


def write_grey_checkpoint(folder: Path, name: str) -> Card:
    """A checkpoint of factor analysis, which sees grey levels as they are."""
    card = write_checkpoint(folder, name)
    model = as_model(GREY, SHAPE)
    changed = replace(
        card, architecture=model.architecture, binarise="none", objective="factor-analysis"
    )
    return checkpoint.write(folder / name, Checkpoint(model, changed))


def settings_for(folder: Path, **changes: Any) -> Settings:
    """Settings of a service of the tiny models."""
    given: dict[str, Any] = {
        "checkpoints": folder,
        "model": "tiny",
        "device": "cpu",
        "threads": 1,
        "http_port": 0,
        "batches": "",
    }
    return Settings(**{**given, **changes})


class _Server(uvicorn.Server):
    """A server that tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        """Tells it when the socket is open."""
        await super().startup(sockets)
        self.listens.set()


@contextmanager
def serving(app: FastAPI) -> Generator[str]:
    """The address of a real server of the application, on a port of its own."""
    config = uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=5)
    server = _Server(config)

    def run() -> None:
        try:
            server.run()
        finally:
            server.listens.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert server.listens.wait(30)
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def text(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode()


def npy(array: np.ndarray, **options: Any) -> bytes:
    """An NPY file."""
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def picture(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """A picture file of a PIL image or of levels, height by width (by channels)."""
    out = io.BytesIO()
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened.save(out, kind, **options)
    return out.getvalue()


def pixels_of(encoded: Any) -> np.ndarray:
    """What an answer holds: base64 of a PNG or NPY file, or nested lists."""
    if isinstance(encoded, list):
        return np.array(encoded)
    data = base64.b64decode(encoded, validate=True)
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data), allow_pickle=False)
    return np.asarray(Image.open(io.BytesIO(data)))


def random_levels(seed: int = 0, shape: tuple[int, ...] = SHAPE[1:]) -> np.ndarray:
    """Grey levels, among them the lowest and the highest."""
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    levels.flat[:2] = 0, 255
    return levels


def random_mask(seed: int = 1, shape: tuple[int, ...] = SHAPE[1:]) -> np.ndarray:
    """True where missing, for about half of the pixels."""
    return np.random.default_rng(seed).random(shape) < 0.5


@dataclass(frozen=True)
class Kind:
    """An image as one may send it, and what it means."""

    sent: bytes | list[Any]
    pixels: np.ndarray
    """Height by width: levels, or floats."""
    missing: np.ndarray
    """By themselves, without a mask."""

    @property
    def encoded(self) -> str | list[Any]:
        """As JSON holds it."""
        return text(self.sent) if isinstance(self.sent, bytes) else self.sent


def _with_holes(levels: np.ndarray, holes: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([levels, np.where(holes, 0, 255).astype(np.uint8)], -1))


def _kinds() -> dict[str, Kind]:
    levels, holes = random_levels(), random_mask(2)
    bits = levels > 127
    floats = np.random.default_rng(3).random(SHAPE[1:])
    none = np.zeros(SHAPE[1:], bool)
    rgb = np.repeat(levels[..., None], 3, -1)
    grey = Image.fromarray(levels)
    transparent_one = grey.convert("P")
    jpeg = picture(grey, "JPEG", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6  # turned by 90 degrees
    sideways = picture(Image.fromarray(np.rot90(levels).copy()), "PNG", exif=turned)
    with_nan = np.where(holes, np.nan, floats)
    nulls = [[None if np.isnan(v) else v for v in row] for row in with_nan.tolist()]
    return {
        "grey PNG": Kind(picture(grey), levels, none),
        "grey PNG as RGB": Kind(picture(rgb), levels, none),
        "PNG with alpha": Kind(picture(_with_holes(levels, holes)), levels, holes),
        "palette PNG": Kind(picture(grey.convert("P")), levels, none),
        "palette PNG with a transparent colour": Kind(
            picture(transparent_one, transparency=255), levels, levels == 255
        ),
        "1-bit PNG": Kind(picture(Image.fromarray(bits)), bits * np.uint8(255), none),
        "black PNG": Kind(picture(levels // 255), levels // 255, none),
        "turned PNG": Kind(sideways, levels, none),
        "WebP": Kind(picture(rgb, "WEBP", lossless=True), levels, none),
        "TIFF": Kind(picture(grey, "TIFF", compression="tiff_lzw"), levels, none),
        "JPEG": Kind(jpeg, np.asarray(Image.open(io.BytesIO(jpeg))), none),
        "NPY float64": Kind(npy(floats), floats, none),
        "NPY float32": Kind(npy(floats.astype(np.float32)), floats.astype(np.float32), none),
        "NPY float16": Kind(npy(floats.astype(np.float16)), floats.astype(np.float16), none),
        "NPY in Fortran's order": Kind(npy(np.asfortranarray(floats)), floats, none),
        "NPY with NaN": Kind(npy(with_nan), with_nan, holes),
        "NPY uint8": Kind(npy(levels), levels, none),
        "NPY int16": Kind(npy(levels.astype(np.int16)), levels, none),
        "NPY bool": Kind(npy(bits), bits.astype(np.float32), none),
        "NPY int64 of 0 and 1": Kind(npy(bits.astype(np.int64)), bits.astype(np.float32), none),
        "NPY of one channel, first": Kind(npy(levels[None]), levels, none),
        "NPY of one channel, last": Kind(npy(levels[..., None]), levels, none),
        "lists": Kind(floats.tolist(), floats, none),
        "lists with null": Kind(nulls, with_nan, holes),
        "lists of booleans": Kind(bits.tolist(), bits.astype(np.float32), none),
        "lists of 0 and 1": Kind(bits.astype(int).tolist(), bits.astype(np.float64), none),
    }


KINDS = _kinds()
