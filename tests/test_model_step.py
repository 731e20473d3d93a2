"""Steps that are captured against steps that are launched, and what a step asks of its device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.latent import Architecture, LatentVariableModel
from model.masks import Incomplete
from model.noise import Noise, Reseeded, Source
from model.objectives import OBJECTIVES, P_STEPS, Climbed, Objective, ascend, bound
from model.optimizers import optimizer
from model.refinement import Refinement
from model.stack import stacked
from model.step import Asked, Step, Stepper
from tests.conftest import small_model, some_incomplete

MISS = OBJECTIVES["miss-iwem"]
ROWS: dict[str, Objective] = {
    **OBJECTIVES,
    **{name: replace(MISS, p_step=name) for name in P_STEPS},
    "three imputations and zeros": replace(MISS, imputations=3, first_pass=True),
    "fresh": replace(MISS, p_samples="fresh"),
    "sampled": replace(MISS, m_step="sampled"),
    "refined": replace(MISS, svi=Refinement(steps=2)),
    "refined through": replace(MISS, svi=Refinement(steps=2, through=True)),
}
every_objective = pytest.mark.parametrize("objective", ROWS.values(), ids=ROWS.keys())
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")


def _model(models: int = 1, *, upper: int = 0) -> LatentVariableModel:
    several = [small_model(seed=seed, upper=upper).float() for seed in range(models)]
    return several[0] if models == 1 else stacked(several)


def _stepper(
    model: LatentVariableModel,
    capture: Callable[..., Step] | None,
    *,
    kind: type[Stepper] = Stepper,
) -> Stepper:
    adam = optimizer(model, learning_rate=1e-2, weight_decay=0.0)
    return kind(model, adam, particles=5, precision="highest", capture=capture)


def _asked(objective: Objective, step: int, *, models: int = 1) -> Asked:
    """A step unlike its neighbours in all that may differ; each third has a smaller batch."""
    images = some_incomplete(models * (2 if step % 3 == 2 else 4), seed=step)
    return Asked(
        objective=objective,
        images=Incomplete(images.values.float(), images.observed),
        noises=tuple(Noise(model).at("step", step) for model in range(models)),
        alpha=0.1 + step / 10,
        warmth=0.2 + step / 10,
    )


def _held(step: Step, generators: Callable[[], Iterator[Generator]]) -> Step:
    """Does what a graph does, with launches: the generators are those that a first step made."""
    step()
    known = list(generators())

    def again() -> Climbed:
        saw = step()
        assert all(one is other for one, other in zip(known, generators(), strict=True))
        return saw

    return again


@pytest.mark.parametrize(("models", "upper"), [(1, 0), (1, 3), (2, 0)])
@every_objective
def test_captured_steps_are_those_that_are_launched(objective: Objective, models: int, upper: int):
    """From buffers and generators that stay the weights become the same, to the bit."""
    if upper and objective is OBJECTIVES["vae-analytic"]:
        pytest.skip("two stochastic layers have no divergence in closed form")
    weights: list[dict[str, Tensor]] = []
    seen: list[list[Tensor]] = []
    for capture in (None, _held):
        stepper = _stepper(_model(models, upper=upper), capture)
        saw = [
            stepper.take(_asked(objective, step, models=models), learning_rate=1e-2 / (1 + step))
            for step in range(5)
        ]
        weights.append(stepper.model.state_dict())
        seen.append([one.bound for one in saw])
        assert len(stepper.recorded) == (0 if capture is None else 2)  # one a size of a batch

    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


def _twice(step: Step, _generators: object) -> Step:
    def again() -> Climbed:
        step()
        return step()

    return again


def _impossible(step: Step, _generators: object) -> Step:
    step()
    raise RuntimeError("operation not permitted when stream is capturing")


class Frozen(Stepper):
    """Captures what it was asked at first, instead of the buffers."""

    def launch(self, asked: Asked, noises: tuple[Source, ...]) -> Climbed:
        """A step with the numbers of the first one that was captured."""
        if any(isinstance(noise, Reseeded) for noise in noises):
            self.first = getattr(self, "first", replace(asked, images=asked.images.copy()))
            asked = self.first
        return super().launch(asked, noises)


@pytest.mark.parametrize(
    ("kind", "capture", "sentence"),
    [
        (Stepper, _twice, r"A captured step moves the weights otherwise, by \d+% of its way\."),
        (Frozen, _held, r"A captured step moves the weights otherwise, by \d+% of its way\."),
        (Stepper, _impossible, r"A step could not be captured \(operation not permitted"),
    ],
)
def test_a_capture_that_is_not_the_step_is_not_used(
    kind: type[Stepper], capture: Callable[..., Step], sentence: str
):
    """Training says so once, and goes on as if nothing had been captured."""
    plain, other = _stepper(_model(), None), _stepper(_model(), capture, kind=kind)
    plain.take(_asked(MISS, 0), 1e-2)
    with pytest.warns(UserWarning, match=sentence) as warnings:
        other.take(_asked(MISS, 0), 1e-2)
    for stepper in (plain, other):  # where a warning would be an error
        for step in (1, 2):
            stepper.take(_asked(MISS, step), 1e-2)

    assert len(warnings) == 1
    assert "Steps are launched kernel by kernel, which is slower." in str(warnings[0].message)
    torch.testing.assert_close(other.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)


@dataclass(frozen=True)
class Nowhere:
    """Noise on a device that has no numbers, and so no generators."""

    def at(self, *_path: int | str) -> "Nowhere":
        """The same."""
        return self

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """Shape alone."""
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Shape alone."""
        return self.normal(*shape, like=like)


class OnlyThere(TorchDispatchMode):
    """Refuses every tensor that is not where numbers do not exist."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What the operation gives, whose tensors are looked at like those that it takes."""
        given = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, given)):
            assert not isinstance(leaf, Tensor) or leaf.is_meta, func
        return given


NETWORKS = {
    "one layer": Architecture(image_shape=(1, 28, 28)),
    "two layers": Architecture(image_shape=(1, 28, 28), upper=8),
    "gated convolutions": Architecture(encoder="gated-conv", decoder="gated-conv"),
    "Gaussian pixels": Architecture(image_shape=(3, 8, 8), likelihood="gaussian"),
}


@pytest.mark.parametrize("architecture", NETWORKS.values(), ids=NETWORKS.keys())
@every_objective
def test_a_step_reads_nothing_back(objective: Objective, architecture: Architecture):
    """Nor has it a tensor elsewhere: it can be done where numbers do not exist.

    So no step waits for a GPU, which is what a graph asks of it.
    """
    if architecture.upper and objective is OBJECTIVES["vae-analytic"]:
        pytest.skip("two stochastic layers have no divergence in closed form")
    model = architecture.build(Noise(0)).to("meta")
    values = torch.empty(4, *architecture.image_shape, device="meta")
    images = Incomplete.hide(values, values > 0)
    half = torch.empty((), dtype=torch.float64, device="meta")
    for climb in objective.climbs:
        with OnlyThere():
            ascend(
                objective,
                model,
                images,
                Nowhere(),
                particles=3,
                alpha=half,
                warmth=half,
                climb=climb,
            )
        assert any(parameter.grad is not None for parameter in model.parameters())
    with OnlyThere():
        found = bound(objective, model, images, Nowhere(), particles=3)

    assert found.is_meta


@needs_gpu
@pytest.mark.parametrize("models", [1, 2])
@every_objective
def test_a_graph_moves_the_weights_as_launches_do(objective: Objective, models: int):
    """On a GPU, but for sums that are taken in another order."""
    ends: list[dict[str, Tensor]] = []
    for launched in (True, False):
        stepper = _stepper(_model(models).cuda(), None)
        stepper.capture = None if launched else stepper.capture
        for step in range(5):
            asked = _asked(objective, step, models=models)
            images = Incomplete(asked.images.values.cuda(), asked.images.observed.cuda())
            stepper.take(replace(asked, images=images), learning_rate=1e-2 / (1 + step))
        ends.append(stepper.model.state_dict())
        assert len(stepper.recorded) == (0 if launched else 2)

    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)
