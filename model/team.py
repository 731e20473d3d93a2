"""Several processes that train one model, each on its part of every batch.

`torchrun --standalone --nproc-per-node 2 -m model.train …` starts them; every one holds the whole
model, and their gradients are averaged, weighted by how many images each had. A process alone is
a team of one, which costs nothing.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["Team"]

PATIENCE = timedelta(days=7)
"""How long a process waits for another: one alone polishes, for as long as a recipe says."""


@dataclass(frozen=True)
class Team:
    """A process's place among those that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> "Team":
        """The team that `torchrun` has started, or a team of one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not torch.distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if _cuda() else "gloo"
            torch.distributed.init_process_group(backend, timeout=PATIENCE)
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @staticmethod
    def disband() -> None:
        """Ends what joining began: its threads would outlive the process, which aborts it."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether it is this process that writes files and speaks."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """This process's own device."""
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if self.size > 1 and _cuda() else "auto"

    def part(self, index: Int[Tensor, " images"]) -> Int[Tensor, " part"]:
        """This process's share of a batch."""
        return index[self.rank :: self.size]

    def average_gradients(self, parameters: Iterable[nn.Parameter], *, share: float) -> None:
        """Replaces gradients by their mean over the team, in which this process has a share."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = share * torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        sizes = [g.numel() for g in gradients]
        for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def total(self, numbers: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum over the team."""
        if self.size > 1:
            torch.distributed.all_reduce(numbers)
        return numbers

    def any(self, *said: bool) -> list[bool]:
        """For each question, whether somebody in the team says yes."""
        if self.size == 1:
            return list(said)
        votes = torch.tensor([float(answer) for answer in said])
        return [vote > 0 for vote in self.total(votes).tolist()]

    def wait(self) -> None:
        """Goes on once everybody is here."""
        if self.size > 1:
            torch.distributed.barrier()


def _cuda() -> bool:
    return torch.cuda.is_available()
