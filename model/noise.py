r"""Randomness that does not depend on the order of the work.

Every draw comes from a generator of its own, whose seed is a hash of what the draw is for,

$$ \text{seed} = \mathrm{BLAKE2b}_{64}(s, p_1, p_2, \dots), $$

never $s + i$: streams of neighbouring seeds would overlap.
So the same request with the same seed gives the same bytes alone or among others,
$2K$ particles begin with the $K$ particles of a smaller request,
and training that was interrupted goes on as if it had not been.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

__all__ = ["MAX_SEED", "Noise", "NoisePerImage", "Reseeded", "Source", "image_seed"]

MAX_SEED = 2**53 - 1
"""The largest integer that every reader of JSON keeps."""


def image_seed(seed: int, index: int) -> int:
    """The seed of one image of a request: alone, with this seed, it gets the same answer.

    The first image's is the request's.
    """
    return seed if index == 0 else _hashed(seed, "image", index) & MAX_SEED


@runtime_checkable
class Source(Protocol):
    """Gives random numbers for a batch of images; what a draw is for decides what it gets."""

    def at(self, *path: int | str) -> "Source":
        """The source for one part of the work, independent of every other part's."""
        ...

    def normal(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """Independent N(0, 1) numbers of the dtype and on the device of `like`."""
        ...

    def uniform(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """Independent numbers from [0, 1) of the dtype and on the device of `like`."""
        ...


class OneGenerator(ABC):
    """A source for a whole batch, whose numbers are drawn on the device where they are used."""

    @abstractmethod
    def generator(self, device: torch.device | str = "cpu") -> Generator:
        """What the numbers come from."""

    def normal(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """N(0, 1) numbers from one generator."""
        generator = self.generator(like.device)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    def uniform(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """Uniform numbers from one generator."""
        generator = self.generator(like.device)
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Noise(OneGenerator):
    """The source of a seed and a path."""

    seed: int
    path: tuple[int | str, ...] = ()

    def at(self, *path: int | str) -> "Noise":
        """The source for one part of the work."""
        return Noise(self.seed, self.path + path)

    def generator(self, device: torch.device | str = "cpu") -> Generator:
        """A fresh generator; the same seed and path give the same one."""
        return self.reseed(Generator(device))

    def reseed(self, generator: Generator) -> Generator:
        """The generator, which gives from now on what a fresh one would."""
        return generator.manual_seed(_hashed(self.seed, *self.path))


@dataclass(frozen=True)
class NoisePerImage:
    """A source of each image's own, so that no image's numbers depend on its neighbours.

    The numbers are drawn on the CPU in single precision: they are the same on every device.
    """

    noises: tuple[Noise, ...]

    @classmethod
    def of(cls, seed: int, images: Sequence[int]) -> "NoisePerImage":
        """The sources of the images with these indices in a request of this seed."""
        return cls(tuple(Noise(image_seed(seed, image)) for image in images))

    def at(self, *path: int | str) -> "NoisePerImage":
        """The sources for one part of the work."""
        return NoisePerImage(tuple(noise.at(*path) for noise in self.noises))

    def normal(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """N(0, 1) numbers, image by image."""
        return self._drawn(torch.randn, shape).to(like)

    def uniform(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """Uniform numbers, image by image."""
        return self._drawn(torch.rand, shape).to(like)

    def _drawn(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        own = Generator()
        return torch.stack([draw(shape[1:], generator=n.reseed(own)) for n in self.noises])


@dataclass(frozen=True)
class Reseeded(OneGenerator):
    """A source that keeps its generators, so that what drew from them can draw again, reseeded.

    There is one for each part of the work, which may draw once.
    """

    generators: dict[tuple[int | str, ...], Generator] = field(default_factory=dict)
    path: tuple[int | str, ...] = ()

    def at(self, *path: int | str) -> "Reseeded":
        """The source for one part of the work."""
        return Reseeded(self.generators, self.path + path)

    def reseed(self, noise: Noise) -> None:
        """Has all that were drawn from give the numbers of this source."""
        for path, generator in self.generators.items():
            noise.at(*path).reseed(generator)

    def generator(self, device: torch.device | str = "cpu") -> Generator:
        """The part's generator, which is made when it is first drawn from."""
        if self.path not in self.generators:
            self.generators[self.path] = Generator(device)
        return self.generators[self.path]


def _hashed(*path: int | str) -> int:
    key = "/".join(map(str, path)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
