"""Evaluation: the card is filled with what was measured, and pictures show it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model import checkpoint
from model.checkpoint import Card, Checkpoint
from model.curves import diagnostics
from model.data import DataError
from model.evaluate import evaluate, examples, picture
from model.latent import Architecture, LatentVariableModel
from model.likelihood import score
from model.noise import Noise, NoisePerImage
from model.refit import tightened
from model.stages import finish


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with random weights, whose data set is an archive of 6x6 images."""
    generator = np.random.default_rng(0)
    splits = {name: generator.random((40, 6, 6)) < 0.4 for name in ("train", "validation", "test")}
    arrays: dict[str, Any] = {name: split.astype(np.uint8) for name, split in splits.items()}
    np.savez(tmp_path / "tiny.npz", **arrays)
    architecture = Architecture(image_shape=(1, 6, 6), latent=2, hidden=(8,))
    card = Card(
        name="tiny",
        architecture=architecture,
        binarise="threshold",
        objective="miss-iwem",
        missing="patches:3, drawn once",
        recipe={},
        data={"name": str(tmp_path / "tiny.npz")},
        training={},
    )
    checkpoint.write(tmp_path / "tiny", Checkpoint(architecture.build(Noise(0)), card))
    return tmp_path / "tiny"


def test_results_go_into_the_card_with_what_they_were_measured_with(folder: Path) -> None:
    """Every result names its estimator, particles, proposal, images and standard error."""
    evaluate(
        folder,
        scores=["raw", "predictive"],
        images=12,
        particles=70,
        raw_images=11,
        raw_particles=130,
        masks=("half",),
    )

    results = checkpoint.read(folder).card.results
    (served, own) = results["predictive"]
    assert (results["raw"]["images"], results["raw"]["particles"]) == (11, 130)
    assert (served["mask"], served["missing_pixels"], served["proposal"]) == (
        "half",
        18.0,
        "laplace",
    )
    assert own["proposal"] == "own"
    for result in (results["raw"], served, own):
        assert result["standard_error"] > 0
        assert result["estimator"]
        assert result["seed"] == 0


def test_a_tight_score_is_of_an_encoder_of_its_own(folder: Path) -> None:
    """Which says so, with the steps that it was refitted for; the model stays as it was."""
    before = checkpoint.read_card(folder).weights_sha256
    found = evaluate(
        folder, scores=["raw", "tight"], raw_images=30, raw_particles=64, masks=("half",)
    )

    assert found.results["tight"]["images"] == found.results["raw"]["images"] == 30
    assert found.results["tight"]["refit_steps"] > 0
    assert found.results["tight"]["mean"] != found.results["raw"]["mean"]
    assert found.weights_sha256 == before


def test_the_same_evaluation_gives_the_same_numbers(folder: Path) -> None:
    """An evaluation is determined by its seed; the weights are left as they were."""
    before = checkpoint.read_card(folder).weights_sha256

    def again() -> Card:
        return evaluate(
            folder, images=5, particles=64, raw_images=5, raw_particles=64, masks=("mcar:0.5",)
        )

    first, second = again(), again()

    assert json.dumps(first.results) == json.dumps(second.results)
    assert second.weights_sha256 == before


def test_diagnostics_go_into_the_card_and_can_be_drawn(folder: Path, tmp_path: Path) -> None:
    """Every count is of all images, and the plot is made of the card alone."""
    masks = ("half", "mcar:0.5", "patches:3")
    evaluate(folder, scores=["diagnostics"], images=30, particles=64, masks=masks)
    found = checkpoint.read_card(folder).results["diagnostics"]
    diagnostics(found, tmp_path / "plot.png")

    assert [(each["mask"], each["of"]) for each in found["calibration"]] == [
        ("half", "test images"),
        ("mcar:0.5", "test images"),
        ("half", "its own samples"),
    ]
    for each in found["calibration"]:
        assert sum(each["rank_counts"]) == 30
        assert 0 <= each["expected_calibration_error"] <= 1
        assert 0 <= each["rank_p_value"] <= 1
    assert len(found["divergences"]) == found["latents"] == 2
    assert len(found["anomaly"]["turned"]) == found["anomaly"]["held_out"] == 20
    assert found["gaps"]["approximation_standard_error"] > 0
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 500


@pytest.mark.parametrize(("objective", "own"), [("miss-iwem", "own"), ("iwem", "zero-filled")])
def test_what_test_images_lack_is_never_looked_at(
    folder: Path, tmp_path: Path, objective: str, own: str
) -> None:
    """All scores are of pixels that were observed: here of a column, and that is white.

    The encoder sees the others as in its training: filled by the model, or as zeros.
    """
    checkpoint.rewrite_card(folder, replace(checkpoint.read_card(folder), objective=objective))
    with np.load(tmp_path / "tiny.npz") as stored:
        splits = dict(stored)
    holes = np.ones_like(splits["test"])
    holes[:, :, 0] = 0
    arrays = splits | {"test": np.ones_like(holes), "test_missing": holes}
    np.savez(tmp_path / "tiny.npz", **arrays)  # pyright: ignore[reportArgumentType]
    card = evaluate(
        folder,
        scores=["raw", "tight", "predictive", "diagnostics"],
        images=8,
        particles=64,
        raw_images=8,
        raw_particles=64,
        masks=("mcar:1", "mcar:0.5"),
    )
    found, model = card.results, checkpoint.read(folder).model
    images = examples(card, 0)[:8]
    steps = found["tight"]["refit_steps"]
    refitted = finish(tightened(model, images, Noise(0).at("tight"), steps=steps))

    def expected(model: LatentVariableModel, proposal: str) -> float:
        noise = NoisePerImage.of(0, range(8))
        stages = score(model, images, noise, particles=64, proposal=proposal)
        return finish(stages).log_likelihood.value.mean().item()

    assert images.observed.sum() == images.values.sum() == 8 * 6
    assert found["raw"]["what"].startswith("test log p(x_o) of incomplete images")
    assert found["raw"]["mean"] == pytest.approx(expected(model, own), abs=1e-3)
    assert found["tight"]["mean"] == pytest.approx(expected(refitted, "zero-filled"), abs=1e-3)
    assert found["predictive"][0]["missing_pixels"] == 6
    hidden, *_ = found["diagnostics"]["calibration"]
    assert sum(hidden["pixels"]) == 8 * 6
    assert hidden["rank_counts"][-1] == 8  # all draws have less ink in the column, or as much
    assert "anomaly" not in found["diagnostics"]
    diagnostics(found["diagnostics"], tmp_path / "plot.png")


def test_a_picture_of_one_test_image(folder: Path, tmp_path: Path) -> None:
    """It is enough for a picture, and the folder of that is made."""
    one = np.ones((1, 6, 6), np.uint8)
    np.savez(tmp_path / "one.npz", train=one, validation=one, test=one)
    path = tmp_path / "pictures" / "one.png"
    picture(folder, path, images=1, particles=64, source=str(tmp_path / "one.npz"))

    assert path.exists()


def test_a_picture_shows_what_is_not_known(folder: Path, tmp_path: Path) -> None:
    """In the truth's row it is grey, as in the row of what was seen."""
    with np.load(tmp_path / "tiny.npz") as stored:
        splits = dict(stored)
    arrays = splits | {"test_missing": np.ones_like(splits["test"])}
    np.savez(tmp_path / "tiny.npz", **arrays)  # pyright: ignore[reportArgumentType]
    picture(folder, tmp_path / "picture.png", missing="none", images=2, draws=1, particles=64)

    with Image.open(tmp_path / "picture.png") as image:
        truth = np.asarray(image)[1:13, 1:13]
    assert (truth == 128).all()


def test_images_that_cannot_be_scored_are_refused(folder: Path, tmp_path: Path) -> None:
    """A single one, images of another size, and other than those of the training."""
    one, other = np.ones((1, 6, 6), np.uint8), np.ones((30, 4, 6), np.uint8)
    np.savez(tmp_path / "one.npz", train=one, validation=one, test=one)
    np.savez(tmp_path / "other.npz", train=other)

    with pytest.raises(DataError, match=r"Expected 2 test images or more; got 1\."):
        evaluate(folder, source=str(tmp_path / "one.npz"))
    with pytest.raises(DataError, match=r"shape \(1, 6, 6\), .* got \(1, 4, 6\)"):
        evaluate(folder, source=str(tmp_path / "other.npz"))
    card = checkpoint.read_card(folder)
    checkpoint.rewrite_card(folder, replace(card, data={**card.data, "sha256": "of the training"}))
    with pytest.raises(DataError, match=r"trained on, of sha256 of the training, .*got others .*"):
        evaluate(folder)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"images": 1}, "Expected images of at least 2; got 1"),
        ({"raw_images": 0}, "Expected raw_images of at least 2; got 0"),
        ({"particles": 0}, "Expected particles of at least 1; got 0"),
        ({"raw_particles": -1}, "Expected raw_particles of at least 1; got -1"),
        ({"scores": ["raw", "best"]}, "Expected scores of .*; got best"),
        (
            {"scores": ["predictive"], "masks": ["none"]},
            "Expected masks that hide some pixels; got none",
        ),
    ],
)
def test_too_little_is_refused(folder: Path, asked: dict[str, Any], sentence: str) -> None:
    """What cannot be measured is said by its name, and the card stays as it was."""
    with pytest.raises(ValueError, match=sentence):
        evaluate(folder, **asked)

    assert checkpoint.read_card(folder).results == {}


def test_two_images_can_be_scored(folder: Path) -> None:
    """The fewest of which there is a standard error: every number of the card is one."""
    evaluate(folder, images=2, raw_images=2, particles=64, raw_particles=64, masks=("half",))

    assert json.loads((folder / "card.json").read_text(), parse_constant=pytest.fail)["results"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"images": 41}, "Expected images of at most 40; got 41"),
        ({"images": 0}, "Expected images of at least 1; got 0"),
        ({"draws": 0}, "Expected draws of at least 1; got 0"),
    ],
)
def test_picture_of_more_than_there_is(
    folder: Path, tmp_path: Path, asked: dict[str, Any], sentence: str
) -> None:
    """Neither more images than the test has, nor none."""
    with pytest.raises(ValueError, match=sentence):
        picture(folder, tmp_path / "picture.png", **asked)


@pytest.mark.parametrize("ambiguous", [False, True])
def test_a_picture_has_a_column_an_image_and_a_row_a_part(
    folder: Path, tmp_path: Path, *, ambiguous: bool
) -> None:
    """Truth, seen, mean and draws are rows; images are columns."""
    path = tmp_path / "picture.png"
    picture(folder, path, missing="half", images=3, draws=2, ambiguous=ambiguous, particles=64)

    with Image.open(path) as image:
        assert image.width < image.height
