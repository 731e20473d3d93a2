"""Runs that differ in their seeds, trained in lockstep as one stack of models."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.masks import Incomplete
from model.objectives import Climbed
from model.run import Run
from model.stack import stacked

__all__ = ["Together"]


class Together:
    """Some runs of one recipe, at the same step, for the rest of an epoch."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, lead = runs, runs[0]
        self.model = stacked([run.state.model for run in runs])
        self.optimizer = lead.optimizer(self.model)
        self.stepper = lead.stepping(self.model, self.optimizer)
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
        lead, asked = self.runs[0], [run.ask() for run in self.runs]
        images = Incomplete(
            torch.cat([one.images.values for one in asked]),
            torch.cat([one.images.observed for one in asked]),
        )
        noises = tuple(noise for one in asked for noise in one.noises)
        saw = self.stepper.take(
            replace(asked[0], images=images, noises=noises), lead.learning_rate
        )
        columns = torch.stack((saw.bound, saw.elbo_variance, saw.q_hat_variance), 1)
        for run, numbers in zip(self.runs, columns, strict=True):
            run.stepped(Climbed(*numbers))

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
