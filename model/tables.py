"""The tables of Kim, Hwang and Kim (2020): what each cell trains, and what came of it.

A row is a recipe of `model/recipes`, a column changes its objective, and a schedule says for how
long. What a cell gave is its checkpoint's card, kept as JSON, from which the page of results is
written.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.recipe import Recipe, read_recipe

__all__ = ["COLUMNS", "SCHEDULES", "TABLES", "Cell", "Table", "cells", "page"]


@dataclass(frozen=True)
class Table:
    """Rows with the slides' numbers, and columns with what they change in a row's recipe."""

    title: str
    rows: Mapping[str, Sequence[float | None]]
    """A number for each column, in nats; None where the slides have none."""
    columns: Mapping[str, Mapping[str, Any]]
    notes: Mapping[str, str] = field(default_factory=dict)


WARM_DREG = {"objective": "iwem-woa", "p_step": "dreg", "warm_up_epochs": 15}
"""Q̂ from the first step on, latents that cost less at first, and a P-step of less noise."""
TWO_LAYERS = {**WARM_DREG, "upper": 20}
"""The same with a second stochastic layer of half as many latents."""
POLISH = {"polish_steps": 3000}

TABLES: dict[str, Table] = {
    "complete": Table(
        title="Complete training images",
        rows={
            "static-mnist-mlp": (-88.21, -87.68, -87.11, -87.00, None, None),
            "dynamic-mnist-mlp": (-85.31, -84.30, -84.16, -84.10, None, None),
            "omniglot-mlp": (-108.46, -106.80, -106.38, -106.50, None, None),
            "caltech101-mlp": (-119.67, -118.06, -116.54, -116.92, None, None),
            "static-mnist-cnn": (-84.63, -83.54, -83.77, -83.32, None, None),
            "dynamic-mnist-cnn": (-84.08, -81.56, -81.28, -81.07, None, None),
            "omniglot-cnn": (-101.63, -100.27, -100.39, -100.15, None, None),
            "caltech101-cnn": (-109.24, -106.94, -106.05, -106.19, None, None),
        },
        columns={
            "vae": {"objective": "vae"},
            "iwae": {"objective": "iwae"},
            "iwem-woa": {"objective": "iwem-woa"},
            "iwem": {"objective": "iwem"},
            "warm-dreg": WARM_DREG,
            "two-layers": TWO_LAYERS,
        },
        notes={
            "omniglot-mlp": "drawn from the strokes, not the slides' copy of OMNIGLOT",
            "omniglot-cnn": "drawn from the strokes, not the slides' copy of OMNIGLOT",
        },
    ),
    "missing": Table(
        title="Training images that lack patches, static MNIST",
        rows={
            f"patches-{n}{protocol}": (*numbers, None, None)
            for protocol in ("", "-redraw")
            for n, numbers in {
                6: (-102.26, -97.66, -95.18),
                3: (-90.29, -89.79, -89.71),
                4: (-92.07, -90.97, -90.76),
                5: (-95.54, -93.33, -92.23),
            }.items()
        },
        columns={
            "miss-iwae": {"objective": "miss-iwae"},
            "miss-iwem-woa": {"objective": "miss-iwem-woa"},
            "miss-iwem": {"objective": "miss-iwem"},
            "warm-dreg": {**WARM_DREG, **POLISH},
            "two-layers": {**TWO_LAYERS, **POLISH},
        },
    ),
    "findings": Table(
        title="What carries the gain: one change at a time",
        rows={"patches-6": (None,) * 6},
        columns={
            "iwem": {"objective": "iwem"},
            "iwem-woa": {"objective": "iwem-woa"},
            "dreg": {"objective": "iwem-woa", "p_step": "dreg"},
            "two-pass-warm": {"objective": "miss-iwem-woa", "warm_up_epochs": 15},
            "two-pass-warm-dreg": {**WARM_DREG, "objective": "miss-iwem-woa"},
            "mixture-warm-wake": {
                **WARM_DREG,
                "objective": "miss-iwem-woa",
                "p_step": "wake",
                "imputations": 4,
                "first_pass": True,
            },
        },
    ),
}

REDUCED = {
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "anneal_epochs": 10,
    "precision": "medium",
}
BRISK = {**REDUCED, "epochs": 60, "patience": 60, "learning_rate": 2e-3}
MUON = {**BRISK, "optimizer": "muon"}
TWICE, DECAY = {"epochs": 120, "patience": 120}, {"weight_decay": 0.1}
SCHEDULES: dict[str, dict[str, Any]] = {
    "slides": {},
    "short": {**REDUCED, "epochs": 60, "patience": 60},
    "long": {**REDUCED, "epochs": 240, "patience": 240},
    "lean": {**REDUCED, "epochs": 480, "patience": 480, "particles": 10, "way_back": 0.5},
    "brisk": BRISK,
    "muon": MUON,
    "muon-long": {**MUON, **TWICE},
    "muon-decay": {**MUON, **DECAY},
    "muon-decay-long": {**MUON, **TWICE, **DECAY},
}
"""How long, and with which steps: `slides` is the protocol of the slides, `short` a reduced one
that two processor cores finish in less than an hour a cell, `long` one of four times the epochs,
`lean` one of eight times the epochs with a fifth of the particles; `brisk` is `short` with steps
of twice the size, `muon` is `brisk` with another optimiser, of which `-decay` lets the weights
decay and `-long` has twice the epochs."""
STRETCHED: dict[str, dict[str, Any]] = {
    name: {"warm_up_epochs": 30, "polish_steps": 12_000}
    for name in ("muon-long", "muon-decay-long")
}
"""What becomes longer with a schedule, of columns that have it."""


@dataclass(frozen=True)
class Cell:
    """One training of a table."""

    table: str
    row: str
    column: str
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        """It as one word, which is the name of its folder and of its result."""
        return f"{self.row}.{self.column}.{self.schedule}.{self.seed}"

    @property
    def changes(self) -> dict[str, Any]:
        """What is changed in the row's recipe."""
        column = TABLES[self.table].columns[self.column]
        stretched = STRETCHED.get(self.schedule, {})
        longer = {name: value for name, value in stretched.items() if name in column}
        return {**SCHEDULES[self.schedule], **column, **longer, "seed": self.seed}

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        return read_recipe(self.row, **self.changes)

    @property
    def words(self) -> list[str]:
        """What is trained, as words of `miss-iwem train`."""
        return [self.row, *(_word(name.replace("_", "-"), v) for name, v in self.changes.items())]


def _word(name: str, value: Any) -> str:
    """A value as an option; one that is true or false is a flag."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def cells(
    table: str, *, schedule: str = "short", seeds: int = 1, only: Sequence[str] = ()
) -> Iterator[Cell]:
    """A table's cells in the order of its rows, of those whose names contain one of the words."""
    for seed in range(seeds):
        for row in TABLES[table].rows:
            for column in TABLES[table].columns:
                cell = Cell(table, row, column, schedule, seed)
                if not only or any(word in cell.name for word in only):
                    yield cell


def page(folder: Path) -> str:
    """The page of results, made from the cards in a folder."""
    cards = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = [INTRODUCTION, *_bests(cards), ""]
    for command, table in TABLES.items():
        parts += [f"## {table.title}\n", f"`miss-iwem reproduce {command}`\n", HEAD]
        for row, numbers in table.rows.items():
            for column, number in zip(table.columns, numbers, strict=True):
                name, note = f"{row}.{column}", table.notes.get(row, "")
                runs = [
                    [card for stem, card in cards.items() if stem.startswith(f"{name}.{s}.")]
                    for s in SCHEDULES
                ]
                for ours in filter(None, runs) if any(runs) else [[]]:
                    parts.append(_line(row, column, number, note, ours))
        parts.append("")
    return "\n".join(parts)


def _bests(cards: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """The best of each row that was run beside the slides' best of it."""
    yield BESTS
    for table in TABLES.values():
        for row, numbers in table.rows.items():
            slides = [number for number in numbers if number is not None]
            ours = [
                (card["results"]["raw"], name.split("."))
                for name, card in cards.items()
                if name.startswith(f"{row}.") and name.split(".")[1] in table.columns
            ]
            if slides and ours:
                raw, (_, column, schedule, _) = max(ours, key=lambda run: run[0]["mean"])
                yield (
                    f"| `{row}` | {_score([raw])} | {column}, {schedule} | {max(slides):.2f} "
                    f"| {raw['mean'] - max(slides):+.2f} |"
                )


BESTS = """## The best of each row that was run

By `raw`; of our columns the best at any schedule and seed, of the slides' the best as well.

| row | ours | objective, schedule | slides | above it by |
| --- | --- | --- | --- | --- |"""
INTRODUCTION = """# The tables of the slides, reproduced

Test log p(x) of complete images in nats, the mean over the test set; higher is better.
`raw` is by the model's own encoder, as in the slides; `tight` by an encoder that was refitted on
the test images while the decoder stayed as it was, which tells a loose bound from a bad model.
± is the standard error over images; ESS is the median effective sample size; the rate is the
optimiser's first, which falls along a cosine unless the schedule is the slides', and the decay
that of the weights where there is one.
A cell's `.metrics.jsonl` has its epochs, and `variances.png` shows how much an image's ELBO and Q̂
vary along them.
The slides' numbers are those of Kim, Hwang and Kim (2020); the order of their columns IWEM and
IWEM-woa for complete images is uncertain.
`warm-dreg` is a column of our own: IWEM without annealing, with the DReG P-step and a
warm-up of the latents' cost; on images with holes these are filled with zeros, and afterwards
the encoder is polished on the model's completions. `two-layers` is the same with a second
stochastic layer, of 20 latents above the 40. What the columns of the last table change,
and what is to be learned from them, is in [the findings](findings.md).

A cell alone is `miss-iwem reproduce missing --only patches-6.miss-iwae`. That command writes this
page from the cards in `docs/results/`; do not edit it.
"""
COLUMNS = (
    "row",
    "objective",
    "raw",
    "tight",
    "slides",
    "ESS raw, tight",
    "K test",
    "seeds",
    "spread",
    "K train",
    "optimiser, rate, decay",
    "epochs, best",
    "seconds",
    "device",
)
"""What the page says of a cell."""
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def _line(
    row: str, column: str, number: float | None, note: str, cards: Sequence[dict[str, Any]]
) -> str:
    slides = "" if number is None else f"{number:.2f}"
    name = f"`{row}`{f' ({note})' if note else ''}"
    if not cards:
        return f"| {name} | {column} | not run | | {slides} | | | | | | | | | |"
    first, training = cards[0], [card["training"] for card in cards]
    raw, tight = ([card["results"][score] for card in cards] for score in ("raw", "tight"))
    epochs = ", ".join(_distinct(f"{t['epochs']}, {t['best_epoch'] + 1}" for t in training))
    columns = (
        name,
        column,
        _score(raw),
        _score(tight),
        slides,
        f"{raw[0]['median_effective_sample_size']}, {tight[0]['median_effective_sample_size']}",
        str(raw[0]["particles"]),
        str(len(cards)),
        f"{statistics.stdev(r['mean'] for r in raw):.2f}" if len(cards) > 1 else "",
        str(first["recipe"]["particles"]),
        _steps(first["recipe"]),
        epochs,
        str(round(statistics.mean(t["seconds"] for t in training))),
        ", ".join(_distinct(t["device"] for t in training)),
    )
    return f"| {' | '.join(columns)} |"


def _steps(recipe: dict[str, Any]) -> str:
    steps = f"{recipe.get('optimizer', 'adam')}, {recipe['learning_rate']:g}"
    decay = recipe["weight_decay"]
    return f"{steps}, {decay:g}" if decay else steps


def _score(results: Sequence[dict[str, Any]]) -> str:
    mean = statistics.mean(r["mean"] for r in results)
    error = statistics.mean(r["standard_error"] for r in results)
    return f"{mean:.2f} ± {error:.2f}"


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
