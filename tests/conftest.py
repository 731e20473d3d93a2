"""The smallest models of the family, their integrals over z by quadrature, and a bucket."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from model.latent import Architecture, LatentVariableModel
from model.masks import Incomplete
from model.noise import Noise

# The same examples at every run: a failure is never luck.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("fixed")

# To compile takes seconds, and whoever wants it says so.
torch.compiler.set_stance("force_eager")
# Where the tensors are this small, threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of a bucket on a server that speaks S3."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415  (it takes seconds)

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        assert httpx.put(f"http://{host}:{port}/some-bucket").status_code == 200
        yield "s3://some-bucket"
        server.stop()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a tiny model."""
    from tests.wire import write_checkpoint  # noqa: PLC0415  (it imports the service)

    write_checkpoint(tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three items, and nobody waits long for anybody."""
    from service import batches, client, worker  # noqa: PLC0415  (they take a second)

    monkeypatch.setattr(worker, "POLLING", 0.02)
    monkeypatch.setattr(batches, "MOST_ITEMS", 3)
    monkeypatch.setattr(client, "PAUSE", 0.001)


def small_model(
    *,
    image_shape: tuple[int, int, int] = (1, 3, 3),
    latent: int = 2,
    upper: int = 0,
    gain: float = 2.0,
    seed: int = 0,
) -> LatentVariableModel:
    """A model in float64 whose pixels depend on z far more than in a fresh network."""
    architecture = Architecture(
        image_shape=image_shape, latent=latent, upper=upper, hidden=(8,), upper_hidden=(6,)
    )
    return made_of(architecture, gain=gain, seed=seed)


def made_of(
    architecture: Architecture, *, gain: float = 2.0, seed: int = 0
) -> LatentVariableModel:
    """Such a model of any parts."""
    noise = Noise(seed)
    model = architecture.build(noise).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise.at(name).normal(*parameter.shape, like=parameter))
        for parameter in model.decoder.parameters():
            parameter.mul_(gain)
    return model


def fixed_model(
    *,
    image_shape: tuple[int, int, int] = (1, 3, 3),
    latent: int = 2,
    gain: float = 2.0,
    seed: int = 0,
) -> LatentVariableModel:
    """A small model that is not to be trained."""
    model = small_model(image_shape=image_shape, latent=latent, gain=gain, seed=seed)
    return model.requires_grad_(requires_grad=False)


def every_image(height: int = 3, width: int = 3) -> Tensor:
    """All binary images of a size."""
    pixels = torch.tensor(list(product([0.0, 1.0], repeat=height * width)), dtype=torch.float64)
    return pixels.reshape(-1, 1, height, width)


def some_incomplete(count: int = 6, *, seed: int = 1, latent: int = 2) -> Incomplete:
    """Images of a small model's with about half of the pixels hidden at random."""
    values = fixed_model(latent=latent).sample(count, Noise(seed))
    seen = Noise(seed).at("mask").uniform(*values.shape, like=values) < 0.5
    return Incomplete.hide(values, seen)


def copies(images: Incomplete, count: int) -> Incomplete:
    """Each image so many times in a row."""
    return Incomplete(
        images.values.repeat_interleave(count, 0), images.observed.repeat_interleave(count, 0)
    )


@dataclass(frozen=True)
class Quadrature:
    """Integrals over z by the trapezium rule, which for these smooth integrands is exact."""

    model: LatentVariableModel
    latents: Tensor
    log_mass: Tensor

    @classmethod
    def of(cls, model: LatentVariableModel, *, step: float = 0.125) -> "Quadrature":
        """The rule on a grid that reaches to eight standard deviations of the prior."""
        latent = model.architecture.latent
        axis = torch.arange(-8, 8 + step, step, dtype=torch.float64)
        latents = torch.cartesian_prod(*[axis] * latent).reshape(-1, latent)
        prior = torch.distributions.Normal(torch.zeros_like(latents), 1.0)
        return cls(model, latents, prior.log_prob(latents).sum(-1) + latent * math.log(step))

    @property
    def logits(self) -> Tensor:
        """The pixels' logits at every point."""
        return self.model.decoder(self.latents).flatten(1)

    def log_joint(self, images: Incomplete) -> Tensor:
        """The logarithm of p(x_o, z) times each point's share of space."""
        seen = images.observed.flatten(1).double()
        on, off = images.values.flatten(1) * seen, (1 - images.values.flatten(1)) * seen
        logits = self.logits
        log_on, log_off = logits.sigmoid().log(), (-logits).sigmoid().log()
        return self.log_mass + on @ log_on.T + off @ log_off.T

    def log_likelihood(self, images: Incomplete) -> Tensor:
        """The logarithm of p(x_o)."""
        return self.log_joint(images).logsumexp(-1)

    def posterior(self, images: Incomplete) -> Tensor:
        """Each point's probability given x_o."""
        return self.log_joint(images).softmax(-1)

    def posterior_mean(self, images: Incomplete) -> Tensor:
        """E[x | x_o] of every pixel as if it were not seen."""
        mean = self.posterior(images) @ self.logits.sigmoid()
        return mean.reshape(images.values.shape)


def standard_errors(sample: Tensor, expected: Tensor | float) -> Tensor:
    """How many of its standard errors a mean over the first axis is off."""
    error = sample.std(0) / math.sqrt(len(sample))
    return (sample.mean(0) - expected) / error
