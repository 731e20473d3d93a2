"""The tables: what a cell trains, how slices add up to results, and the page made of them."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from model import checkpoint
from model.checkpoint import Card, Checkpoint
from model.latent import Architecture
from model.noise import Noise
from model.recipe import FIELDS, parser, read_recipe, shipped
from model.reproduce import reproduce
from model.tables import COLUMNS, SCHEDULES, TABLES, Cell, cells, page
from model.train import MORE_TO_DO

CELLS = [c for table in TABLES for schedule in SCHEDULES for c in cells(table, schedule=schedule)]
CELL = Cell("missing", "patches-6", "miss-iwem", "short", 0)
SMALL = Architecture(image_shape=(1, 2, 2), latent=2, hidden=(3,))
SCORE = {
    "mean": -95.125,
    "standard_error": 0.25,
    "median_effective_sample_size": 7.0,
    "particles": 5000,
}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_cell_is_a_recipe_that_can_be_followed(cell: Cell) -> None:
    """A row is a recipe that is shipped, whose objective its column says."""
    assert cell.row in shipped()
    assert cell.recipe.objective == TABLES[cell.table].columns[cell.column]["objective"]
    assert cell.recipe.redraw == ("redraw" in cell.row)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_words_of_a_cell_are_its_recipe(cell: Cell) -> None:
    """What the command line reads of a cell is what the cell is of."""
    said = vars(parser().parse_args(cell.words))
    changes = {name: value for name, value in said.items() if name in FIELDS}

    assert read_recipe(said["recipe"], **changes) == cell.recipe


def test_one_name_is_one_training() -> None:
    """Cells of different tables that share a name, and so a folder, train the same."""
    recipes = {(cell.name, cell.recipe) for cell in CELLS}

    assert len(recipes) == len({cell.name for cell in CELLS})


def test_the_slides_schedule_is_the_slides_protocol() -> None:
    """Their recipes have the 1500 epochs, 50 particles, batches and steps of the slides."""
    recipe = replace(CELL, schedule="slides").recipe

    assert (recipe.epochs, recipe.particles, recipe.batch) == (1500, 50, 100)
    assert (recipe.learning_rate, recipe.patience, recipe.anneal_epochs) == (3e-4, 50, 100)
    assert recipe.missing == "patches:6"


def test_cells_are_chosen_by_words_of_their_names() -> None:
    """`only` keeps the cells that have one of the words; seeds repeat them."""
    chosen = cells("missing", seeds=2, only=["patches-6.miss-iwae"])

    assert [c.name for c in chosen] == [
        "patches-6.miss-iwae.short.0",
        "patches-6.miss-iwae.short.1",
    ]


class Machine:
    """Does what `miss-iwem` would be asked to do: so many slices, then a checkpoint."""

    def __init__(self, folder: Path, *, slices: int = 2, scoring: int = 0) -> None:
        self.folder, self.slices, self.scoring = folder, slices, scoring
        self.calls: list[str] = []

    def __call__(self, words: Sequence[str]) -> int:
        """Keeps the command's name, and returns its exit status."""
        self.calls.append(words[0])
        if words[0] == "evaluate":
            return self._evaluate(Path(words[1]))
        self.slices -= 1
        if self.slices > 0:
            (out,) = [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
            Path(out).mkdir(parents=True, exist_ok=True)
            return MORE_TO_DO
        card = Card(
            name="seed",
            architecture=SMALL,
            binarise="threshold",
            objective="miss-iwem",
            missing="patches:6",
            recipe={k: v for k, v in asdict(CELL.recipe).items() if k != "architecture"},
            data={"name": "static-mnist"},
            training={"epochs": 60, "best_epoch": 58, "seconds": 99, "device": "CPU"},
        )
        metrics = {"epoch": 0, "elbo_variance": 2.5, "q_hat_variance": 1.5}
        (self.folder / CELL.name).mkdir(exist_ok=True)
        (self.folder / CELL.name / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        checkpoint.write(
            self.folder / CELL.name / "checkpoint", Checkpoint(SMALL.build(Noise(0)), card)
        )
        return 0

    def _evaluate(self, folder: Path) -> int:
        if self.scoring == 0:
            read = checkpoint.read(folder)
            card = replace(read.card, results={"raw": SCORE, "tight": SCORE})
            checkpoint.write(folder, replace(read, card=card))
        return self.scoring


def _reproduced(folder: Path, call: Callable[[Sequence[str]], int], minutes: float = 1.0) -> bool:
    return reproduce(
        [CELL],
        call,
        runs=folder,
        docs=folder / "docs",
        minutes=minutes,
        jobs=1,
        threads=1,
        console=Console(file=io.StringIO()),
    )


def test_a_cell_is_trained_in_slices_and_then_scored(tmp_path: Path) -> None:
    """Slices follow each other until there is no more to do; a second call does nothing."""
    machine = Machine(tmp_path, slices=3)

    assert _reproduced(tmp_path, machine)
    assert machine.calls == ["train", "train", "train", "evaluate"]
    assert _reproduced(tmp_path, machine)
    assert len(machine.calls) == 4
    card = json.loads((tmp_path / f"docs/results/{CELL.name}.json").read_text())
    assert card["results"]["tight"] == SCORE
    metrics = (tmp_path / f"docs/results/{CELL.name}.metrics.jsonl").read_text()
    assert metrics == (tmp_path / CELL.name / "metrics.jsonl").read_text()
    with Image.open(tmp_path / "docs/variances.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("machine", [{"slices": 1, "scoring": 1}, {"slices": 10**9}])
def test_what_is_not_done_is_no_result(tmp_path: Path, machine: dict[str, int]) -> None:
    """Neither a cell whose scoring failed nor one whose time is over is written down as done."""
    minutes = 1.0 if "scoring" in machine else 0.0

    assert not _reproduced(tmp_path, Machine(tmp_path, **machine), minutes)
    assert list((tmp_path / "docs/results").iterdir()) == []
    assert "| `patches-6` | miss-iwem | not run |" in (tmp_path / "docs/results.md").read_text()


def test_a_training_that_fails_is_not_tried_for_ever(tmp_path: Path) -> None:
    """A status that is not "more to do" ends the work on the cell."""
    calls: list[str] = []

    def fail(words: Sequence[str]) -> int:
        calls.append(words[0])
        return 1

    assert not _reproduced(tmp_path, fail)
    assert calls == ["train"]


def test_the_page_has_a_line_for_every_cell(tmp_path: Path) -> None:
    """A cell that was run has its numbers, its spread over seeds and the slides' number."""
    machine = Machine(tmp_path, slices=1)
    _reproduced(tmp_path, machine)
    results = tmp_path / "docs/results"
    other = json.loads((results / f"{CELL.name}.json").read_text())
    other["results"]["raw"] = {**SCORE, "mean": -97.125}
    (results / f"{CELL.name[:-1]}1.json").write_text(json.dumps(other))
    lines = page(results).splitlines()

    expected = sum(len(t.rows) * len(t.columns) for t in TABLES.values())
    cells = [line for line in lines if line.count("|") == len(COLUMNS) + 1]
    assert sum(line.startswith("| `") for line in cells) == expected
    (line,) = [line for line in lines if line.startswith("| `patches-6` | miss-iwem |")]
    assert line == (
        "| `patches-6` | miss-iwem | -96.12 ± 0.25 | -95.12 ± 0.25 | -95.18 | 7.0, 7.0 | 5000 "
        "| 2 | 1.41 | 50 | adam, 0.001 | 60, 59 | 99 | CPU |"
    )


def test_the_page_compares_a_rows_best_with_the_slides_best(tmp_path: Path) -> None:
    """Of several columns and schedules the highest `raw` stands beside the slides' highest."""
    _reproduced(tmp_path, Machine(tmp_path, slices=1))
    results = tmp_path / "docs/results"
    card = json.loads((results / f"{CELL.name}.json").read_text())
    for column, schedule, mean in (("warm-dreg", "long", -94.0), ("miss-iwae", "long", -99.0)):
        card["results"]["raw"] = {**SCORE, "mean": mean}
        name = replace(CELL, column=column, schedule=schedule).name
        (results / f"{name}.json").write_text(json.dumps(card))

    assert "| `patches-6` | -94.00 ± 0.25 | warm-dreg, long | -95.18 | +1.18 |" in page(results)
    assert page(results).count("| `patches-3` |") == len(TABLES["missing"].columns)


def test_the_page_says_with_which_steps_a_cell_was_trained(tmp_path: Path) -> None:
    """The optimiser, its rate, and the decay of the weights where there is one."""
    _reproduced(tmp_path, Machine(tmp_path, slices=1))
    results = tmp_path / "docs/results"
    card = json.loads((results / f"{CELL.name}.json").read_text())
    card["recipe"] |= replace(CELL, schedule="muon-decay").changes
    (results / f"{CELL.name}.json").write_text(json.dumps(card))

    assert "| muon, 0.002, 0.1 |" in page(results)
