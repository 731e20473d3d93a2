"""A step of training: the gradients of an objective, and the optimiser's move along them.

A small model's step is some hundreds of kernels, each of which a GPU has done before the processor
has launched the next. There a step is captured once as a CUDA graph, which is launched as a whole:
what differs between steps stands in buffers that are filled before it, and the generators that
the step draws from are seeded anew, so that a replay has the numbers of the launches.
"""

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.latent import LatentVariableModel
from model.masks import Incomplete
from model.noise import Noise, Reseeded, Source
from model.objectives import Climbed, Objective, ascend
from model.stack import NoisePerModel
from model.team import Team

__all__ = ["BF16_CPU", "Asked", "Stepper", "captured", "flushed", "products"]

WARMING = 3
"""Steps on another stream before one is captured: libraries set themselves up in them."""
TOLERANCE = 0.1
"""How far a captured step's move may be from that of its launches, relative to its length: sums in
another order turn the sign of next to nothing, and Adam's first step is made of signs."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a step is taken with."""

    objective: Objective
    images: Incomplete
    """Those of a stack's models one after another."""
    noises: tuple[Noise, ...]
    """One for each model."""
    alpha: float | Float[Tensor, ""]
    warmth: float | Float[Tensor, ""]
    share: float = 1.0
    """This process's part of the team's batch."""


Step = Callable[[], Climbed]
Capture = Callable[[Step, Callable[[], Iterator[torch.Generator]]], Step]
"""Makes of a step, and of what gives the generators of those that were taken, one that does the
same."""


class Stepper:
    """Takes a model's steps."""

    def __init__(
        self,
        model: LatentVariableModel,
        optimizer: torch.optim.Optimizer,
        *,
        particles: int,
        precision: str,
        team: Team | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.model, self.optimizer, self.particles = model, optimizer, particles
        self.precision, self.team = precision, team or Team()
        # a rate that is a number would stay what it was when the step was captured
        by_tensors = all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
        capturable = by_tensors and self.team.size == 1
        self.capture = captured if capturable and capture is None else capture
        self.recorded: dict[tuple[Objective, int], _Recorded] = {}

    def take(self, asked: Asked, learning_rate: float) -> Climbed:
        """One step; returns what it saw of its particles."""
        self._set(learning_rate)
        kind = (asked.objective, len(asked.images))
        if self.capture is not None and kind not in self.recorded:
            self._record(asked, learning_rate, self.capture)
        recorded = self.recorded.get(kind)
        return recorded.take(asked) if recorded else self.launch(asked, asked.noises)

    def launch(self, asked: Asked, noises: tuple[Source, ...]) -> Climbed:
        """One step, kernel by kernel, with the numbers of these sources."""
        noise, saw = NoisePerModel(noises), list[Climbed]()
        for climb in asked.objective.climbs:
            self.optimizer.zero_grad()
            with products(self.precision, _device(self.model)):
                climbed = ascend(
                    asked.objective,
                    self.model,
                    asked.images,
                    noise.at(climb),
                    particles=self.particles,
                    alpha=asked.alpha,
                    warmth=asked.warmth,
                    climb=climb,
                )
            self.team.average_gradients(self.model.parameters(), share=asked.share)
            self.optimizer.step()
            saw.append(climbed)
        return saw[0]

    def _set(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

    def _record(self, asked: Asked, learning_rate: float, capture: Capture) -> None:
        """Keeps the step captured if that moves the weights as its launches do, or captures none.

        It is captured with other numbers than it is tried with: none of them may stay in it.
        """
        try:
            with self._undone():
                self._set(learning_rate / 2)
                recorded = _Recorded(self, asked, capture)
            self._set(learning_rate)
            move = self._move(lambda: recorded.take(asked))
        except RuntimeError as error:
            self._set(learning_rate)
            self._give_up(f"A step could not be captured ({error.__context__ or error}).")
            return
        expected = self._move(lambda: self.launch(asked, asked.noises))
        off = float((move - expected).norm() / expected.norm())
        if off <= TOLERANCE:
            self.recorded[asked.objective, len(asked.images)] = recorded
        else:
            self._give_up(f"A captured step moves the weights otherwise, by {off:.0%} of its way.")

    def _give_up(self, why: str) -> None:
        self.capture = None
        warnings.warn(f"{why} Steps are launched kernel by kernel, which is slower.", stacklevel=2)

    def _move(self, step: Step) -> Tensor:
        """Where a step would bring the weights, from where they are."""
        with self._undone():
            before = nn.utils.parameters_to_vector(self.model.parameters()).detach()
            step()
            return nn.utils.parameters_to_vector(self.model.parameters()).detach() - before

    @contextmanager
    def _undone(self) -> Generator[None]:
        """Takes back what becomes of the weights and of the optimiser's moments."""
        kept = {tensor: tensor.detach().clone() for tensor in self._state()}
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor in self._state():  # moments that have begun only now go back to zero
                    tensor.copy_(kept.get(tensor, torch.zeros_like(tensor)))

    def _state(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        for moments in self.optimizer.state.values():
            yield from (moment for moment in moments.values() if isinstance(moment, Tensor))


class _Recorded:
    """A step that was captured, with the buffers from which it takes what it is asked."""

    def __init__(self, stepper: Stepper, asked: Asked, capture: Capture) -> None:
        values = asked.images.values
        self.images = Incomplete.complete(torch.zeros_like(values))
        self.alpha, self.warmth = torch.full((2,), 0.5, dtype=torch.float64, device=values.device)
        self.noises = tuple(Reseeded() for _ in asked.noises)
        buffers = replace(asked, images=self.images, alpha=self.alpha, warmth=self.warmth)
        self.again = capture(lambda: stepper.launch(buffers, self.noises), self._generators)

    def take(self, asked: Asked) -> Climbed:
        """One step; what it saw is in memory of its own."""
        self._fill(asked)
        saw = self.again()
        return Climbed(saw.bound.clone(), saw.elbo_variance.clone(), saw.q_hat_variance.clone())

    def _fill(self, asked: Asked) -> None:
        self.images.values.copy_(asked.images.values)
        self.images.observed.copy_(asked.images.observed)
        self.alpha.fill_(asked.alpha)
        self.warmth.fill_(asked.warmth)
        for kept, noise in zip(self.noises, asked.noises, strict=True):
            kept.reseed(noise)

    def _generators(self) -> Iterator[torch.Generator]:
        for kept in self.noises:
            yield from kept.generators.values()


def captured(step: Step, generators: Callable[[], Iterator[torch.Generator]]) -> Step:
    """The step as a CUDA graph, on the device of its generators."""
    step()
    device = next(generators()).device
    # The outer stream is what is current again even if the capture fails.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMING):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        for generator in generators():
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            saw = step()

    def again() -> Climbed:
        graph.replay()
        return saw

    return again


def products(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Has the networks' products in bf16, if that is the precision and the processor has them.

    What networks give, and so every log-density, is in single precision all the same.
    The casts are not kept: one that was made without gradients would be taken for those with.
    """
    here = device.type != "cpu" or BF16_CPU
    return torch.autocast(
        device.type, torch.bfloat16, precision == "medium" and here, cache_enabled=False
    )


@contextmanager
def flushed() -> Generator[None]:
    """Has numbers that are too small to be normal ones taken for zero, here and in new threads.

    The gradients of particles that hardly weigh are full of them, and a product with them may
    take a processor twenty times as long. Afterwards it is as processes begin.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _multiplies_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    slower = has.get("cpu_name", "").startswith("Intel")  # twice the time, on Sapphire Rapids
    return has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and not slower)


BF16_CPU = _multiplies_bf16()
"""Whether this processor multiplies bf16 itself, and sooner than fp32; others would be slower with
it than without. An Intel processor is so by AMX alone, and a virtual machine may lack that."""


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
