"""What moves the weights along their gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.latent import LatentVariableModel

__all__ = ["OPTIMIZERS", "give_moments", "moments", "optimizer"]

OPTIMIZERS = ("adam", "muon")


class _MuonAndAdam(torch.optim.Optimizer):
    """Muon for some matrices, and Adam for all else.

    Muon moves a matrix by its momentum with all singular values made one (Jordan et al., "Muon:
    an optimizer for hidden layers in neural networks", 2024), here as far as Adam would by the
    same rate (Liu et al., "Muon is scalable for LLM training", 2025).
    What it keeps is that of its two, so it goes on by `give_moments`, not by `load_state_dict`.
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
        super().__init__([*muon.param_groups, *rest.param_groups], {})
        self.parts = (muon, rest)
        for part in self.parts:
            part.state = self.state

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closures here
        """Both take theirs."""
        for part in self.parts:
            part.step()


def optimizer(
    model: LatentVariableModel, *, learning_rate: float, weight_decay: float, name: str = "adam"
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
    return _MuonAndAdam(matrices, adam, learning_rate=learning_rate, weight_decay=weight_decay)


def _between_layers(model: LatentVariableModel) -> list[Tensor]:
    """The weights of dense layers but those that see pixels and those that give them."""
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


def _parameters(of: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in of.param_groups:
        yield from group["params"]
