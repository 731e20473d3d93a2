"""Recipes: how a checkpoint is made, as a TOML file, as flags of the command line, as JSON.

A field is written once, in `Recipe` or in `Architecture`: the names that a file may use, the
flags, their types and their help are read from there. Values are checked where a recipe is made,
so that one that cannot be followed fails before anything is loaded.
"""

import ast
import inspect
import json
import math
import tomllib
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, get_origin

from model.latent import Architecture
from model.masks import MechanismError, mechanism
from model.networks import DECODERS, ENCODERS
from model.objectives import M_STEPS, OBJECTIVES, P_SAMPLES, P_STEPS, Objective
from model.optimizers import OPTIMIZERS
from model.refinement import Refinement

__all__ = [
    "FIELDS",
    "Recipe",
    "RecipeError",
    "differences",
    "parser",
    "read_recipe",
    "shipped",
    "stored_recipe",
    "to_json",
]


class RecipeError(ValueError):
    """A recipe that cannot be followed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a checkpoint is made; the defaults are the protocol of the slides."""

    data: str = "static-mnist"
    """A data set's name, a .npz file or a folder of PNG images."""
    missing: str = "none"
    """Which pixels the training images lack, such as none, patches:3 or file:MASKS.npy."""
    redraw: bool = False
    """Whether each image's mask is drawn anew every epoch rather than once."""
    binarise: str = "threshold"
    """threshold: above 127 is one; bernoulli: drawn anew in every batch from the grey level."""
    objective: str = "miss-iwem"
    """What is maximised; or one after another, such as vae:50,iwae (vae for 50 epochs)."""
    p_step: str = "slides"
    """What the encoder climbs in the objectives of separate steps."""
    p_samples: str = "shared"
    """Whether that step has the decoder's particles, or draws fresh ones after its step."""
    m_step: str = "marginal"
    """Whether the decoder's step leaves out missing pixels, or has them sampled."""
    particles: int = 50
    """Importance samples of each image in a step."""
    way_back: float = 0.15
    """The share of the particles, drawn by their weights, through which gradients flow."""
    imputations: int = 1
    """Fillings of each image's holes that the encoder sees in an objective of two passes."""
    first_pass: bool = False
    """Whether the proposal of the zero-filled image is one more component of theirs."""
    svi_steps: int = 0
    """Gradient steps on each image's own proposal before the particles are drawn."""
    svi_rate: float = 0.1
    """Length of those steps, along the natural gradient."""
    svi_through: bool = False
    """Whether gradients flow back through those steps."""
    architecture: Architecture = field(default_factory=Architecture)
    batch: int = 100
    """Images in a step."""
    epochs: int = 1500
    """Passes over the training images, at most."""
    optimizer: str = "adam"
    """adam; or muon for the matrices between a network's layers, and adam for the others."""
    learning_rate: float = 3e-4
    """Of Adam; Muon moves as far by it."""
    weight_decay: float = 0.0
    """Decoupled from the optimiser's moments, as in AdamW."""
    schedule: str = "constant"
    """Of the learning rate: constant, or cosine: down to zero at the last epoch."""
    anneal_epochs: int = 100
    """Epochs in which an annealed objective, once it begins, moves from the ELBO to its own."""
    warm_up_epochs: int = 0
    """Epochs in which the cost of the latents, log q(z) − log p(z), grows from nothing to all."""
    patience: int = 50
    """Epochs without a better validation bound, after the last objective's annealing and the
    warm-up, that end the training."""
    polish_steps: int = 0
    """Steps in which the best model's encoder learns from its completions, at the end."""
    precision: str = "highest"
    """Of matrix products: highest (fp32), high (TF32) or medium (bf16 in the
    networks, where the processor has it, and fp32 log-densities)."""
    seed: int = 0
    """The same recipe with the same seed gives the same weights."""

    def __post_init__(self) -> None:
        flat = _flat(self)
        for name, known in CHOICES.items():
            if flat[name] not in known:
                raise RecipeError(f"Expected {name} of {', '.join(known)}; got {flat[name]!r}.")
        for name, least in LEAST.items():
            if flat[name] < least:
                raise RecipeError(f"Expected {name} of at least {least}; got {flat[name]}.")
        _sequence(self.objective)
        self._check_values()
        try:
            mechanism(self.missing)
        except MechanismError as error:
            raise RecipeError(str(error)) from error

    def objective_in(self, epoch: int) -> Objective:
        """What is maximised in an epoch, with the options that go with it."""
        named = next(name for until, name in _sequence(self.objective) if epoch < until)
        return self._with_options(named)

    def begun(self, epoch: int) -> int:
        """The epoch in which what is maximised in this one began."""
        ends = [until for until, _ in _sequence(self.objective)]
        return max((int(until) for until in ends if until <= epoch), default=0)

    @property
    def last_objective(self) -> Objective:
        """What is maximised in the end, by whose bound the model is judged throughout."""
        return self._with_options(_sequence(self.objective)[-1][1])

    def _with_options(self, name: str) -> Objective:
        svi = Refinement(steps=self.svi_steps, rate=self.svi_rate, through=self.svi_through)
        return replace(
            OBJECTIVES[name],
            p_step=self.p_step,
            p_samples=self.p_samples,
            m_step=self.m_step,
            imputations=self.imputations,
            first_pass=self.first_pass,
            svi=svi if self.svi_steps else None,
            way_back=self.way_back,
        )

    def _check_values(self) -> None:
        for name in ("hidden", "upper_hidden"):
            widths = getattr(self.architecture, name)
            if not all(width >= 1 for width in widths):
                raise RecipeError(f"Expected {name} widths of at least 1; got {widths}.")
        for name in ("learning_rate", "svi_rate", "proposal_variance"):
            value = _flat(self)[name]
            if not 0 < value < math.inf:
                raise RecipeError(f"Expected a positive {name}; got {value}.")
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"Expected a weight_decay of at least 0; got {self.weight_decay}.")
        if not 0 < self.way_back <= 1:
            raise RecipeError(f"Expected a way_back within (0, 1]; got {self.way_back}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        objectives = [OBJECTIVES[name] for _, name in _sequence(self.objective)]
        steps = any(objective.steps for objective in objectives)
        two_pass = any(objective.two_pass for objective in objectives)
        heeded = {
            "p_step": steps,
            "m_step": steps,
            "imputations": two_pass,
            "first_pass": two_pass,
            "svi_rate": self.svi_steps > 0,
            "svi_through": self.svi_steps > 0,
        }
        if self.begun(self.epochs) >= self.epochs:
            raise RecipeError(
                f"Expected epochs beyond the {self.begun(self.epochs)} that come before the last "
                f"objective of {self.objective}; got {self.epochs}."
            )
        for name, heed in heeded.items():
            idle = getattr(Recipe, name)
            if not heed and getattr(self, name) != idle:
                raise RecipeError(
                    f"Expected {name} {idle} with objective {self.objective} and svi_steps "
                    f"{self.svi_steps}, which do not heed it; got {getattr(self, name)}."
                )
        if "vae-analytic" in self.objective and self.architecture.upper:
            raise RecipeError(
                "Expected one stochastic layer with vae-analytic, whose divergence has no closed "
                f"form with two; got upper {self.architecture.upper}."
            )
        if self.p_step == "dreg" and self.imputations + self.first_pass > 1:
            raise RecipeError(
                "Expected one imputation and no first_pass with p_step dreg, whose gradient "
                f"needs independent particles; got {self.imputations}, {self.first_pass}."
            )


CHOICES: Mapping[str, Collection[str]] = {
    "binarise": ("threshold", "bernoulli"),
    "p_step": P_STEPS,
    "p_samples": P_SAMPLES,
    "m_step": M_STEPS,
    "optimizer": OPTIMIZERS,
    "schedule": ("constant", "cosine"),
    "precision": ("highest", "high", "medium"),
    "encoder": ENCODERS,
    "decoder": DECODERS,
    "likelihood": ("bernoulli",),  # pixels of densities are fitted by EM in closed form alone
}
LEAST = {
    "particles": 1,
    "imputations": 1,
    "svi_steps": 0,
    "polish_steps": 0,
    "latent": 1,
    "upper": 0,
    "batch": 1,
    "epochs": 1,
    "anneal_epochs": 0,
    "warm_up_epochs": 0,
    "patience": 1,
}
KINDS: Mapping[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple[int, ...]: "whole numbers",
}
METAVARS: Mapping[Any, str] = {str: "TEXT", int: "N", float: "X"}
SIZES: Mapping[str, Any] = {
    f.name: f.type for f in fields(Architecture) if f.name != "image_shape"
}
"""What a recipe says of the networks; the images' shape is that of the data."""
FIELDS: Mapping[str, Any] = {
    f.name: f.type for f in fields(Recipe) if f.name != "architecture"
} | dict(SIZES)
"""The type of every name that a recipe may use."""


def read_recipe(source: str | None, **changes: Any) -> Recipe:
    """The recipe of a TOML file, or one that comes with the package, with some values changed.

    A change to None is none.

    Raises:
        RecipeError: No such recipe, an unknown name in it, or a value that cannot be.
    """
    return _recipe((_from_toml(source) if source else {}) | _given(changes))


def stored_recipe(path: Path, **changes: Any) -> Recipe:
    """The recipe that `to_json` wrote, with some values changed.

    Raises:
        RecipeError: The file is damaged, or of another version.
    """
    try:
        raw = json.loads(path.read_text())
        flat = {**raw, **raw["architecture"]}
        del flat["architecture"], flat["image_shape"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"Expected a recipe in {path}; got: {error!r}") from error
    return _recipe(flat | _given(changes))


def to_json(recipe: Recipe) -> str:
    """The recipe as JSON."""
    return json.dumps(asdict(recipe), indent=2) + "\n"


def differences(expected: Recipe, got: Recipe) -> str:
    """What one recipe says and another does not, in sentences; nothing where they agree."""
    left, right = _flat(expected), _flat(got)
    changed = [name for name in FIELDS if left[name] != right[name]]
    return " ".join(f"Expected {name} {left[name]}; got {right[name]}." for name in changed)


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    files = (resources.files("model") / "recipes").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def parser() -> ArgumentParser:
    """The options of a training; a name of a recipe that is not given is None."""
    options = ArgumentParser(
        "miss-iwem train",
        description="Train a model on images, of which pixels may be missing.",
        allow_abbrev=False,
    )
    add = options.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help=f"A .toml file, or {', '.join(shipped())}.")
    add("--out", type=Path, metavar="DIR", help="The run's folder. Default: runs/ and its name.")
    add("--resume", action="store_true", help="Go on with the run in the folder, if there is one.")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N. Default: auto.")
    add("--threads", type=int, metavar="N", help="Threads of the CPU.")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="X",
        help="Stop after so many; with status 75 if there is more to do. Default: never.",
    )
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="Train with so many seeds at once, in folders of their own. Default: 1.",
    )
    group = options.add_argument_group("recipe", "These go before what RECIPE says of them.")
    defaults, docs = _flat(Recipe()), _docs(Recipe) | _docs(Architecture)
    for name, kind in FIELDS.items():
        flag, about = (
            f"--{name.replace('_', '-')}",
            _help(name, docs.get(name, ""), defaults[name]),
        )
        if kind is bool:
            group.add_argument(flag, action=BooleanOptionalAction, help=about)
        else:
            read = kind if kind in METAVARS else _whole_numbers
            group.add_argument(flag, type=read, help=about, metavar=METAVARS.get(kind, "N,N"))
    return options


def _recipe(raw: Mapping[str, Any]) -> Recipe:
    if unknown := sorted(raw.keys() - FIELDS.keys()):
        raise RecipeError(f"Expected names of {', '.join(FIELDS)}; got {', '.join(unknown)}.")
    typed = {name: _typed(name, value) for name, value in raw.items()}
    sizes = {name: typed.pop(name) for name in SIZES if name in typed}
    return Recipe(architecture=Architecture(**sizes), **typed)


def _sequence(objectives: str) -> list[tuple[float, str]]:
    """Objectives one after another, each with the epoch before which it ends."""
    sequence, until = list[tuple[float, str]](), 0.0
    parts = [part.strip().partition(":") for part in objectives.split(",")]
    for index, (name, _, epochs) in enumerate(parts, start=1):
        last = index == len(parts)
        if name not in OBJECTIVES or last != (not epochs) or not (last or epochs.isdecimal()):
            raise RecipeError(
                f"Expected an objective of {', '.join(OBJECTIVES)}, or several such as "
                f"vae:50,iwae with the epochs of all but the last; got {objectives!r}."
            )
        until += math.inf if last else int(epochs)
        sequence.append((until, name))
    return sequence


def _typed(name: str, value: Any) -> Any:
    kind: Any = FIELDS[name]
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    whole = not isinstance(value, tuple) or all(type(part) is int for part in value)
    if type(value) is not (get_origin(kind) or kind) or not whole:
        raise RecipeError(f"Expected {name} as {KINDS[kind]}; got {value!r}.")
    return value


def _from_toml(source: str) -> dict[str, Any]:
    path = Path(source)
    try:
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text())
        if source in shipped():
            return tomllib.loads(
                (resources.files("model") / "recipes" / f"{source}.toml").read_text()
            )
    except (OSError, ValueError) as error:
        raise RecipeError(f"Expected a recipe in {source}; got: {error}") from error
    raise RecipeError(f"Expected a .toml file or one of {', '.join(shipped())}; got {source!r}.")


def _given(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


def _flat(recipe: Recipe) -> dict[str, Any]:
    return {
        name: getattr(recipe.architecture if name in SIZES else recipe, name) for name in FIELDS
    }


def _docs(owner: type) -> dict[str, str]:
    """The sentence below each field of a class, where its source is at hand."""
    try:
        (definition,) = ast.parse(inspect.getsource(owner)).body
    except OSError:
        return {}
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    return {
        above.target.id: str(below.value.value)
        for above, below in pairwise(body)
        if isinstance(above, ast.AnnAssign)
        and isinstance(above.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _help(name: str, doc: str, default: Any) -> str:
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    known = f"One of {', '.join(CHOICES[name])}." if name in CHOICES and ":" not in doc else ""
    return " ".join(filter(None, (doc, known, f"Default: {shown}."))).replace("%", "%%")
