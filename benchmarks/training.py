"""How fast a step of training and an evaluation are, as ratios measured side by side.

    python benchmarks/training.py [--device cuda] [--threads 2] [--precision highest]

A step is compared with the time of its matrix products alone (forward, and back to the weights
and to the inputs, for every particle), with that of the products that it really does (only some
particles are sent back), and with a straightforward implementation: a copy of the image for each
particle, a pass through the decoder for each of the two steps, torch's own functions; and with
one whose networks have their products in bf16, of Adam and of Muon.
An evaluation is compared with its forward products. The sides take turns, and medians are given.
On a GPU the steps are CUDA graphs, as training's are there, and the straightforward ones are not.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from model.evaluate import in_chunks
from model.latent import CACHED_ROWS, Architecture, LatentVariableModel
from model.likelihood import BLOCK, Scores, score
from model.masks import Incomplete, mechanism
from model.noise import Noise, NoisePerImage
from model.objectives import OBJECTIVES, Objective
from model.optimizers import optimizer
from model.stack import stacked
from model.stages import finish
from model.step import Asked, Stepper

BATCH = 100
SHAPE = (1, 28, 28)
WARMING, STACK, SCORED = 3, 8, 256


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--precision", default="highest", help="of fp32 matrix products")
    options.add_argument("--particles", type=int, default=50)
    options.add_argument("--rounds", type=int, default=21)
    said = options.parse_args()
    torch.set_num_threads(said.threads)
    torch.set_float32_matmul_precision(said.precision)
    device = torch.device(said.device)
    show = Console()
    images = _images(device)
    for name in ("miss-iwem", "miss-iwae"):
        objective = OBJECTIVES[name]
        step = _step(objective, images, said.particles)
        sides = {
            "step": step,
            "products": _products(BATCH * said.particles, device, back=1.0),
            "products done": _products(BATCH * said.particles, device, back=objective.way_back),
            "straightforward": _straightforward(images, said.particles),
            "step in bf16": _step(objective, images, said.particles, precision="medium"),
            "that by Muon": _step(
                objective, images, said.particles, precision="medium", name="muon"
            ),
        }
        times = _interleaved(sides, said.rounds, device)
        _print(show, f"{name}, K = {said.particles}, batch {BATCH}", times, "step")
        show.print(f"1500 epochs of 500 such steps: {1500 * 500 * times['step'] / 60:.0f} minutes")
    _print(
        show,
        f"{STACK} models at once",
        _interleaved(_stacks(images, said.particles), said.rounds, device),
        "step of one",
    )
    sides = {
        "evaluation": _evaluation(device, particles=5000),
        "products": _forward_products(SCORED * BLOCK * math.ceil(5000 / BLOCK), device),
    }
    times = _interleaved(sides, max(5, said.rounds // 4), device)
    _print(show, f"log p(x) of {SCORED} images, K = 5000", times, "evaluation")
    show.print(f"{said.precision} precision, {device}, {torch.get_num_threads()} threads")


def _images(device: torch.device, count: int = BATCH) -> Incomplete:
    generator = Noise(0).generator()
    values = torch.rand(count, *SHAPE, generator=generator).round()
    observed = mechanism("patches:6")(count, SHAPE, generator)
    return Incomplete.hide(values.to(device), observed.to(device))


def _model(device: torch.device) -> LatentVariableModel:
    return Architecture().build(Noise(0)).to(device)


def _adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), 1e-4, fused=True)


def _step(
    objective: Objective,
    images: Incomplete,
    particles: int,
    *,
    precision: str = "highest",
    name: str = "adam",
) -> Callable[[], object]:
    model = _model(images.values.device).compiled()
    return _steps(objective, model, images, particles, precision=precision, name=name)


def _steps(
    objective: Objective,
    model: LatentVariableModel,
    images: Incomplete,
    particles: int,
    *,
    precision: str = "highest",
    name: str = "adam",
) -> Callable[[], object]:
    """Steps as training takes them, each with noise of its own for each model."""
    by = optimizer(model, learning_rate=1e-4, weight_decay=0.0, name=name)
    stepper = Stepper(model, by, particles=particles, precision=precision)
    models, steps = math.prod(model.stack), itertools.count()

    def step() -> None:
        index = next(steps)
        noises = tuple(Noise(seed).at(index) for seed in range(models))
        stepper.take(
            Asked(objective=objective, images=images, noises=noises, alpha=1.0, warmth=1.0), 1e-4
        )

    return step


def _stacks(images: Incomplete, particles: int) -> dict[str, Callable[[], object]]:
    """A step of one model, and one of a stack of them with a batch for each."""
    device, objective = images.values.device, OBJECTIVES["miss-iwem"]
    models = [Architecture().build(Noise(seed)).to(device) for seed in range(STACK)]
    joined = Incomplete(
        images.values.repeat(STACK, 1, 1, 1), images.observed.repeat(STACK, 1, 1, 1)
    )
    stack = _steps(objective, stacked(models).compiled(), joined, particles)
    return {"step of one": _step(objective, images, particles), f"step of {STACK}": stack}


def _straightforward(images: Incomplete, particles: int) -> Callable[[], object]:
    """IWEM's two steps as one would write them down, on images with holes filled with zeros."""
    model = _model(images.values.device)
    decoders, encoders = _adam(model.decoder), _adam(model.encoder)
    x = images.values.flatten(1).repeat_interleave(particles, 0)
    seen = images.observed.flatten(1).float().repeat_interleave(particles, 0)
    normal = torch.distributions.Normal

    def weighed() -> tuple[Tensor, Tensor]:
        mean, log_std = model.encoder(x.unflatten(-1, SHAPE))
        q = normal(mean, log_std.exp())
        z = q.rsample()
        logits = model.decoder(z).flatten(1)
        bce = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
        log_p = -(bce * seen).sum(-1) + normal(0, 1).log_prob(z).sum(-1)
        log_q = q.log_prob(z).sum(-1)
        return log_p.unflatten(0, (-1, particles)), log_q.unflatten(0, (-1, particles))

    def step() -> None:
        log_p, log_q = weighed()
        w = (log_p - log_q).softmax(-1).detach()
        decoders.zero_grad()
        (-(w * log_p).sum(-1).mean()).backward()
        decoders.step()
        log_p, log_q = weighed()
        encoders.zero_grad()
        (-(log_p.abs().log() + log_p - log_q).logsumexp(-1).mean()).backward()
        encoders.step()

    return step


def _products(rows: int, device: torch.device, *, back: float) -> Callable[[], object]:
    """The decoder's products for these rows, of which a share is decoded again and sent back."""
    weights = [torch.randn(o, i, device=device) for i, o in ((40, 300), (300, 300), (300, 784))]
    some = rows if back == 1 else math.ceil(back * rows)
    inputs = [torch.randn(rows, w.shape[1], device=device) for w in weights]
    slopes = [torch.randn(some, w.shape[0], device=device) for w in weights]

    def products() -> None:
        for w, x, slope in zip(weights, inputs, slopes, strict=True):
            _ = x @ w.T
            if back < 1:
                _ = x[:some] @ w.T
            _ = slope @ w
            _ = slope.T @ x[:some]

    return products


def _forward_products(rows: int, device: torch.device) -> Callable[[], object]:
    weights = [torch.randn(o, i, device=device) for i, o in ((40, 300), (300, 300), (300, 784))]
    inputs = [torch.randn(CACHED_ROWS, w.shape[1], device=device) for w in weights]

    def products() -> None:
        for _ in range(rows // CACHED_ROWS):
            for w, x in zip(weights, inputs, strict=True):
                _ = x @ w.T

    return products


def _evaluation(device: torch.device, *, particles: int) -> Callable[[], object]:
    model = _model(device).compiled().frozen()
    images = Incomplete.complete(_images(device, SCORED).values)

    def work(index: Tensor) -> Scores:
        noise = NoisePerImage.of(0, index.tolist())
        return finish(score(model, images[index], noise, particles=particles, proposal="own"))

    return lambda: list(in_chunks(work, SCORED, "", Console(quiet=True)))


def _interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """The median seconds of each side, which take turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + WARMING):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= WARMING:  # the first ones compile and warm the caches
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _print(show: Console, title: str, times: Mapping[str, float], ours: str) -> None:
    table = Table("", "milliseconds", f"of that of the {ours}", title=title, title_justify="left")
    for name, seconds in times.items():
        table.add_row(name, f"{1000 * seconds:.1f}", f"{seconds / times[ours]:.2f}")
    show.print(table)


if __name__ == "__main__":
    main()
