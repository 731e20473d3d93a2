"""Runs that differ in their seeds, trained in lockstep as one stack of models."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from model.masks import Incomplete
from model.objectives import Climbed, ascend
from model.run import Run, optimizer, products
from model.stack import NoisePerModel, stacked

__all__ = ["Together"]


class Together:
    """Some runs of one recipe, at the same step, for the rest of an epoch."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, lead = runs, runs[0]
        self.model = stacked([run.state.model for run in runs])
        self.optimizer = optimizer(lead.recipe, self.model)
        for whole, parts in self._parameters():
            moments = [run.state.optimizer.state[p] for run, p in zip(runs, parts, strict=True)]
            if moments[0]:
                self.optimizer.state[whole] = _stacked(moments)

    def rest(self) -> Iterator[None]:
        """The steps that the epoch has left; the runs know of them after `scatter`."""
        while not self.runs[0].validating:
            self.step()
            yield

    def step(self) -> None:
        """One step of every run."""
        lead = self.runs[0]
        objective = lead.recipe.objective_in(lead.epoch)
        asked = [run.ask() for run in self.runs]
        images = Incomplete(
            torch.cat([images.values for images, _, _ in asked]),
            torch.cat([images.observed for images, _, _ in asked]),
        )
        self.optimizer.param_groups[0]["lr"] = lead.learning_rate
        for climb in objective.climbs:
            self.optimizer.zero_grad()
            noise = NoisePerModel(tuple(noise.at(climb) for _, noise, _ in asked))
            with products(lead.recipe.precision, lead.device):
                climbed = ascend(
                    objective, self.model, images, noise, **lead.settings, climb=climb
                )
            self.optimizer.step()
            if climb != "encoder":
                self._tell(climbed)
        for run in self.runs:
            run.stepped()

    @torch.no_grad()
    def scatter(self) -> None:
        """Gives every run its own weights and moments."""
        for whole, parts in self._parameters():
            moments = self.optimizer.state[whole]
            for index, (run, part) in enumerate(zip(self.runs, parts, strict=True)):
                part.copy_(whole[index])
                run.state.optimizer.state[part] = {
                    name: (value if name == "step" else value[index]).clone()
                    for name, value in moments.items()
                }

    def _tell(self, climbed: Climbed) -> None:
        columns = (climbed.bound, climbed.elbo_variance, climbed.q_hat_variance)
        for run, numbers in zip(self.runs, torch.stack(columns, 1), strict=True):
            run.unseen.append(Climbed(*numbers))

    def _parameters(self) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Each parameter of the stack with those of the runs that it is made of."""
        owners = [dict(run.state.model.named_parameters()) for run in self.runs]
        for name, whole in self.model.named_parameters():
            yield whole, [owner[name] for owner in owners]


def _stacked(moments: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: value.clone() if name == "step" else torch.stack([m[name] for m in moments])
        for name, value in moments[0].items()
    }
