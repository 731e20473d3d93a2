"""Factor analysis of a data set, as a checkpoint that is read like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint
from model.evaluate import evaluate
from model.fit import Fit, fit
from model.likelihood import score
from model.masks import Incomplete
from model.noise import Noise
from model.stages import finish
from tests.test_model_factor_analysis import linear_model


@pytest.fixture
def archive(tmp_path: Path) -> str:
    """Grey images of a linear model's, of which a tenth of the pixels is missing."""
    images = (0.5 + 0.15 * linear_model(shape=(1, 4, 4), latent=3).sample(400, Noise(1))).clamp(
        0, 1
    )
    holes = Noise(2).uniform(*images.shape, like=images) < 0.1
    path = tmp_path / "grey.npz"
    parts = {"train": slice(300), "validation": slice(300, 350), "test": slice(350, 400)}
    arrays = {name: images[part, 0].numpy() for name, part in parts.items()}
    arrays["train_missing"] = holes[:300, 0].numpy().astype(np.uint8)
    np.savez(path, allow_pickle=False, **arrays)
    return str(path)


@pytest.mark.parametrize("isotropic", [False, True])
def test_a_fit_is_a_checkpoint_whose_answers_are_exact(
    archive: str, tmp_path: Path, *, isotropic: bool
):
    """It names what was fitted, and beats a fit of one iteration on images held out."""
    asked = Fit(data=archive, latent=3, isotropic=isotropic, iterations=60, tolerance=0.0)
    card = fit(tmp_path / "fa", asked)
    short = fit(tmp_path / "short", Fit(data=archive, latent=3, iterations=1))
    read = checkpoint.read(tmp_path / "fa")
    blank = torch.zeros(1, 1, 4, 4)
    images = Incomplete.hide(blank + 0.5, blank == 0)
    found = finish(score(read.model, images, Noise(0), particles=64)).log_likelihood

    assert card.objective == ("ppca" if isotropic else "factor-analysis")
    assert card.training["epochs"] == 60
    assert card.training["validation_bound"] > short.training["validation_bound"]
    assert (found.kind, bool(found.reliable)) == ("exact", True)
    deviation = read.model.state_dict()["likelihood.log_std"]
    assert (deviation.max() - deviation.min() < 1e-6) == isotropic


def test_the_iterations_end_where_they_bring_little(archive: str, tmp_path: Path):
    """A tolerance that no iteration reaches ends them after the first."""
    card = fit(tmp_path / "fa", Fit(data=archive, latent=3, tolerance=1e9))

    assert card.training["epochs"] == 1


def test_a_fit_is_evaluated_in_grey(archive: str, tmp_path: Path):
    """Its scores are exact log-densities, and what has no meaning is left out."""
    fit(tmp_path / "fa", Fit(data=archive, latent=3, iterations=20))
    card = evaluate(
        tmp_path / "fa", images=30, particles=64, raw_images=30, masks=["half"], source=archive
    )

    assert card.results["raw"]["estimator"] == "exact"
    assert card.results["raw"]["reliable_share"] == 1
    assert "gaps" not in card.results["diagnostics"]
    for calibration in card.results["diagnostics"]["calibration"]:
        assert "expected_calibration_error" not in calibration
        assert calibration["in_doubt"] == 0
    with pytest.raises(ValueError, match="a model with an encoder for tight"):
        evaluate(tmp_path / "fa", scores=["tight"], source=archive)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 0}, "latent of at least 1; got 0"),
        ({"iterations": 0}, "iterations of at least 1; got 0"),
        ({"tolerance": float("nan")}, "tolerance of at least 0; got nan"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, float], message: str):
    """Each error names the field, what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        Fit(**change)  # pyright: ignore[reportArgumentType]


def test_nothing_is_overwritten(archive: str, tmp_path: Path):
    """A folder that is there is refused before anything is loaded."""
    with pytest.raises(ValueError, match="a new folder"):
        fit(tmp_path, Fit(data=archive))


def test_images_without_observed_pixels_are_refused(archive: str, tmp_path: Path):
    """The error names the images and the missingness."""
    with pytest.raises(ValueError, match=r"observed under the missingness mcar:1\.0"):
        fit(tmp_path / "fa", Fit(data=archive, missing="mcar:1.0"))
