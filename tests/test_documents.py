"""Documents that can be wrong are tests."""

import re
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import checkpoint
from model.checkpoint import Card
from model.masks import FORMS, MECHANISMS
from model.objectives import OBJECTIVES, P_STEPS
from model.recipe import Recipe, read_recipe
from model.tables import page
from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs/api.md").read_text()
MODEL = (ROOT / "docs/model.md").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PROXY = (ROOT / "haproxy.cfg").read_text()
CARDS = [checkpoint.read_card(path.parent) for path in ROOT.glob("checkpoints/*/card.json")]
(SHIPPED,) = [card for card in CARDS if card.name == Settings.model_fields["model"].default]


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    """A version is released with its changes written down."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    top = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert top is not None
    assert top[1] == version


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    """docs/api.md lists each environment variable."""
    assert f"`MISS_IWEM_{name.upper()}`" in API


def test_every_route_is_documented() -> None:
    """docs/api.md lists each route of the application."""
    paths = create_app(Settings.model_validate({})).openapi()["paths"]

    assert [path for path in paths if path not in API] == []


@pytest.mark.parametrize("name", ["Dockerfile", "docker-compose.yml", "haproxy.cfg"])
def test_containers_are_told_what_there_is(name: str) -> None:
    """Every variable of ours that a container file names is a setting."""
    named = set(re.findall(r"MISS_IWEM_(\w+)", (ROOT / name).read_text()))

    assert named
    assert named - {field.upper() for field in Settings.model_fields} == set()


def test_one_container_starts_unless_more_are_asked_for() -> None:
    """`docker compose up` starts the API alone; a profile has the others."""
    assert [name for name, each in COMPOSE.items() if "profiles" not in each] == ["api"]


def test_containers_of_ours_may_do_little() -> None:
    """No container of ours writes to its root, has capabilities or grows without end."""
    ours = [each for each in COMPOSE.values() if each["image"].startswith("miss-iwem:")]

    assert len(ours) == 3
    for each in ours:
        assert each["read_only"]
        assert each["cap_drop"] == ["ALL"]
        assert each["security_opt"] == ["no-new-privileges:true"]
        assert {"mem_limit", "pids_limit", "logging"} <= set(each)


def test_who_stops_or_waits_for_a_service_waits_long_enough() -> None:
    """Containers are given the drain, and the proxy gives a request all of its time."""
    settings = Settings.model_validate({})

    ours = [each for each in COMPOSE.values() if "build" in each]
    graces = [float(each["stop_grace_period"].rstrip("s")) for each in ours]
    waits = [float(seconds) for seconds in re.findall(r"timeout (?:client|server) (\d+)s", PROXY)]
    assert min(graces) > settings.drain
    assert len(waits) == 2
    assert min(waits) > settings.timeout


@pytest.mark.parametrize("name", [*OBJECTIVES, *P_STEPS])
def test_every_objective_is_documented(name: str) -> None:
    """docs/model.md names each objective and each P-step."""
    assert f"`{name}`" in MODEL or name == "slides"


def test_every_mechanism_can_be_asked_for_by_the_text_of_its_error() -> None:
    """The message that lists the mechanisms lists all of them."""
    assert {form.partition(":")[0].partition("[")[0].partition(" ")[0] for form in FORMS} == set(
        MECHANISMS
    )


def test_files_that_the_readme_names_are_there() -> None:
    """Links and paths of the README lead somewhere."""
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"@(docs/[\w.]+)", README)

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def predictive_row(result: dict[str, Any]) -> str:
    """A row of the README's table."""
    return (
        f"| `{result['mask']}` | {result['proposal']} | {result['missing_pixels']:.0f} "
        f"| {-result['mean']:.1f} ± {result['standard_error']:.1f} "
        f"| {-result['nats_per_missing_pixel']:.3f} |"
    )


@pytest.mark.parametrize(
    "row", [predictive_row(result) for result in SHIPPED.results["predictive"]]
)
def test_the_readme_gives_the_numbers_of_the_card(row: str) -> None:
    """The README's table of predictive scores is the card's."""
    assert row in README


def test_the_readme_gives_the_likelihood_of_the_card() -> None:
    """The README's raw test log-likelihood is the card's."""
    raw = SHIPPED.results["raw"]

    assert f"**{raw['mean']:.2f} ± {raw['standard_error']:.2f} nats**" in README
    assert f"K = {raw['particles']}" in README


def test_the_readme_gives_the_calibration_of_the_card() -> None:
    """The README's calibration errors and coverage are the card's, rounded."""
    three, six, own = SHIPPED.results["diagnostics"]["calibration"]

    assert f"**{three['expected_calibration_error']:.3f}** with 3 patches" in README
    assert f"**{six['expected_calibration_error']:.3f}** with 6" in README
    assert f"**{100 * three['coverage']:.1f}%** have" in README
    assert f"χ² over the ranks: p = {three['rank_p_value']:.0e}" in README
    assert f"even (p = {own['rank_p_value']}), and {100 * own['coverage']:.1f}% lie" in README


def test_the_readme_gives_the_calibration_of_the_other_card() -> None:
    """What the README says of the checkpoint with even ranks is its card's."""
    (card,) = [card for card in CARDS if card.name == "dynamic-mnist-warm-dreg"]
    three, six, own = card.results["diagnostics"]["calibration"]

    assert f"`checkpoints/{card.name}`" in README
    assert f": {100 * three['coverage']:.1f}% lie within the central 90% there" in README
    assert f"there (p = {three['rank_p_value']}; " in README
    assert f"uneven (p = {six['rank_p_value']:.0e})" in README
    assert f"error is {three['expected_calibration_error']}; " in README
    assert f"images {100 * own['coverage']:.1f}% do (p = {own['rank_p_value']}; " in README
    found, predicted = card.results["raw"]["mean"], card.results["predictive"][0]["mean"]
    assert f"log p(x) is −{-found:.2f} by" in README
    assert f"missing {-predicted:.1f} nats" in README


def test_the_readme_gives_the_numbers_of_the_best_model() -> None:
    """What the README says of the checkpoint of two stochastic layers is its card's."""
    (card,) = [card for card in CARDS if card.architecture.upper]
    three, six, _ = card.results["diagnostics"]["calibration"]
    raw = card.results["raw"]["mean"]
    nats = {
        (each["mask"], each["proposal"]): f"{-each['mean']:.1f}"
        for each in card.results["predictive"]
    }
    patches, half = [nats[f"patches:{n}", "laplace"] for n in (3, 6)], nats["mcar:0.5", "laplace"]

    assert raw == max(each.results["raw"]["mean"] for each in CARDS)
    assert f"is −{-raw:.2f} by `raw`, {raw - SHIPPED.results['raw']['mean']:.1f} nats" in README
    assert f": {patches[0]} nats with 3 patches missing, {patches[1]} with 6, and {half}" in README
    errors = [each["expected_calibration_error"] for each in (three, six)]
    assert f"error is {errors[0]} with 3 patches missing and {errors[1]} with 6" in README
    assert f"with {100 * three['coverage']:.1f}% of the images within" in README


def checkpoint_row(card: Card) -> str:
    """A row of the table of checkpoints."""
    raw = card.results["raw"]
    return (
        f"| `{card.name}` | {card.objective} | {card.data['name']} | {card.missing} "
        f"| {card.training['epochs']} | {card.training['validation_bound']:.2f} "
        f"| {raw['mean']:.2f} ± {raw['standard_error']:.2f} |"
    )


def test_the_table_of_checkpoints_is_that_of_their_cards() -> None:
    """checkpoints/README.md has a row for each checkpoint, with the card's numbers."""
    table = (ROOT / "checkpoints/README.md").read_text().splitlines()
    assert sorted(map(checkpoint_row, CARDS)) == sorted(
        line for line in table if line.startswith("| `")
    )


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_shipped_recipe_is_that_of_the_card(card: Card) -> None:
    """`miss-iwem train NAME` follows the recipe that the card of this name records.

    A name that is younger than the card has its default.
    """
    assert stored(card) == asdict(read_recipe(card.name))


def stored(card: Card) -> dict[str, Any]:
    """All that a card's recipe says, and what it could not know."""
    return {**asdict(Recipe()), **card.recipe, "architecture": asdict(card.architecture)}


def test_the_page_of_results_is_that_of_its_cards() -> None:
    """docs/results.md is what `miss-iwem reproduce` makes of docs/results/."""
    assert (ROOT / "docs/results.md").read_text() == page(ROOT / "docs/results")
