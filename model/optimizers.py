"""What moves the weights along their gradients."""

from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn

from model.latent import LatentVariableModel

__all__ = ["OPTIMIZERS", "MuonAndAdam", "give_moments", "moments", "optimizer"]

OPTIMIZERS = ("adam", "muon")


class MuonAndAdam(torch.optim.Optimizer):
    """Muon for some matrices, and Adam for all else.

    Muon moves a matrix by its momentum with all singular values made one (Jordan et al., "Muon:
    an optimizer for hidden layers in neural networks", 2024), here as far as Adam would by the
    same rate (Liu et al., "Muon is scalable for LLM training", 2025).
    """

    def __init__(
        self,
        matrices: list[Tensor],
        rest: torch.optim.AdamW,
        *,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        muon = torch.optim.Muon(
            matrices,
            learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.muon, self.rest = muon, rest
        super().__init__([*muon.param_groups, *rest.param_groups], {})
        self.muon.state = self.rest.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Both take a step; a closure is none that is known here."""
        assert closure is None
        self.muon.step()
        self.rest.step()
        return None


def optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, name: str = "adam"
) -> torch.optim.Optimizer:
    """What moves a model's weights, by its name; on a GPU Adam's step can be captured.

    With `muon` it is that for the matrices between the layers of a model's networks, which know
    no pixels, and Adam for the others.
    """
    matrices = _between_layers(model) if name == "muon" else []
    known = {id(matrix) for matrix in matrices}
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in known],
        torch.tensor(learning_rate, device=device) if on_gpu else learning_rate,
        weight_decay=weight_decay,
        fused=True,
        capturable=on_gpu,
    )
    if not matrices:
        return adam
    return MuonAndAdam(matrices, adam, learning_rate=learning_rate, weight_decay=weight_decay)


def _between_layers(model: nn.Module) -> list[Tensor]:
    """The weights of dense layers but those that see pixels and those that give them."""
    assert isinstance(model, LatentVariableModel)
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    *_, last = (p for p in model.decoder.parameters() if p.ndim > 1)
    ends = {id(next(model.encoder.parameters())), id(last)}
    return [matrix for matrix in matrices if id(matrix) not in ends]


def moments(of: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser keeps of each of its parameters, by the number of the parameter."""
    numbered = enumerate(_parameters(of))
    return {f"{i}.{k}": v for i, p in numbered for k, v in of.state.get(p, {}).items()}


def give_moments(to: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Has it go on with what `moments` gave."""
    parameters = list(_parameters(to))
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        to.state[parameters[int(index)]][key] = value


def _parameters(of: torch.optim.Optimizer) -> Iterator[Any]:
    for group in of.param_groups:
        yield from group["params"]
