"""The routes, over real HTTP: what is promised of every answer, and of every refusal."""

import io
import json
import math
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint, likelihood
from model.estimators import ESTIMATORS
from model.estimators import estimate as estimated
from model.masks import Incomplete
from model.noise import NoisePerImage
from model.stages import finish
from model.weights import log_mean_exp
from service import api
from service.app import create_app
from service.engine import Engine
from tests.wire import (
    COLOUR,
    GREY,
    KINDS,
    SHAPE,
    npy,
    picture,
    pixels_of,
    random_levels,
    random_mask,
    serving,
    settings_for,
    text,
    write_checkpoint,
    write_grey_checkpoint,
)

LEVELS, MASK = random_levels(), random_mask()
BITS = (LEVELS > 127) * np.uint8(255)
IMAGE, HOLES = picture(BITS), picture(MASK * np.uint8(255))
ITEM = {"image": text(IMAGE), "mask": text(HOLES)}
MAX_BODY = 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of different images, and one of grey levels."""
    path = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(path)
    write_grey_checkpoint(path, "grey")
    write_checkpoint(path, "colour", shape=COLOUR)
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Generator[httpx.Client]:
    """A client of a real server."""
    app = create_app(settings_for(folder, max_body=MAX_BODY))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as connected:
        yield connected


def _post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _impute(client: httpx.Client, *items: dict[str, Any], **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"particles": 64, "seed": 3, **options}
    return _post(client, "/v1/impute", images=list(items or [ITEM]), **given)


def _score(client: httpx.Client, *items: dict[str, Any], **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"particles": 64, "seed": 3, **options}
    return _post(client, "/v1/log-likelihood", images=list(items or [ITEM]), **given)


# Imputation


def test_json_and_multipart_give_the_same_answer(client: httpx.Client):
    """A form is another way to write the same request: the answers are the same bytes."""
    options = {"particles": 70, "draws": 2, "seed": 5, "encoding": "npy"}
    item = {"image": text(IMAGE), "mask": text(HOLES)}
    by_json = client.post(
        "/v1/impute", json={"images": [item, item], "outputs": ["mean", "draws"], **options}
    )
    files = [("image", ("a.png", IMAGE)), ("mask", ("m.png", HOLES))] * 2
    by_form = client.post(
        "/v1/impute", files=files, data={**options, "outputs": "mean, draws", "model": "tiny"}
    )

    assert by_json.status_code == 200
    assert by_form.content == by_json.content


def test_a_picture_is_given_where_a_picture_is_accepted(client: httpx.Client):
    """`Accept: image/png` has the mean as a PNG of the same size, or the draw if it is asked."""
    files, accept = {"image": IMAGE, "mask": HOLES}, {"Accept": "image/png"}
    for outputs, name in (("mean", "mean"), ("draws", "draws"), ("mean,draws,std", "mean")):
        form = {"particles": "64", "seed": "3", "outputs": outputs}
        answer = client.post("/v1/impute", files=files, data=form, headers=accept)
        expected = _impute(client)["results"][0][name]

        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-seed"] == "3"
        assert answer.headers["x-model"] == "tiny"
        assert float(answer.headers["x-log-likelihood"]) < 0
        assert text(answer.content) == (expected[0] if name == "draws" else expected)
        assert pixels_of(text(answer.content)).shape == SHAPE[1:]


def test_json_is_given_where_both_are_accepted(client: httpx.Client):
    """A client that takes either gets the whole answer."""
    accept = {"Accept": "application/json, image/png;q=0.5, */*"}
    answer = client.post("/v1/impute", json={"images": [ITEM], "particles": 1}, headers=accept)

    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("kind", KINDS)
def test_seen_pixels_come_back_untouched(client: httpx.Client, kind: str):
    """Of every kind of image, in every encoding, in the mean and in the draws, to the bit."""
    sent, hidden = KINDS[kind].pixels, KINDS[kind].missing | MASK
    levels = sent.dtype == np.uint8
    as_sent = {
        "png": sent if levels else (sent * 255).round(),
        "npy": sent,
        "list": sent / 255 if levels else sent,
    }
    item = {"image": KINDS[kind].encoded, "mask": hidden.tolist()}
    for encoding, expected in as_sent.items():
        (result,) = _impute(client, item, encoding=encoding, particles=5, draws=2)["results"]
        for encoded in (result["mean"], *result["draws"]):
            came = pixels_of(encoded)
            np.testing.assert_array_equal(came[~hidden], expected[~hidden])
            assert encoding != "npy" or came.dtype == sent.dtype
        np.testing.assert_array_equal(pixels_of(result["std"])[~hidden], 0)


def test_holes_are_filled_with_what_is_possible(client: httpx.Client):
    """Draws are binary, the mean is between them, and std² = m (1 − m) of binary pixels."""
    item = {"image": (BITS // 255).tolist(), "mask": ITEM["mask"]}
    (result,) = _impute(client, item, draws=8, encoding="list", particles=200)["results"]
    mean, std = pixels_of(result["mean"])[MASK], pixels_of(result["std"])[MASK]
    draws = np.array([pixels_of(draw)[MASK] for draw in result["draws"]])

    assert set(np.unique(draws)) == {0, 1}
    assert (draws.std(0) > 0).any()
    assert ((mean > 0) & (mean < 1)).all()
    np.testing.assert_allclose(std**2, mean * (1 - mean), atol=1e-6)


def test_holes_that_the_image_brings_need_no_mask(client: httpx.Client):
    """Alpha, null and NaN are the same holes as those of a mask."""
    expected = None
    holed = np.where(MASK, np.nan, BITS / 255)
    nulls = [[None if np.isnan(v) else v for v in row] for row in holed.tolist()]
    alpha = Image.fromarray(np.stack([BITS, ~MASK * np.uint8(255)], -1))
    for image in (text(npy(holed)), nulls, text(picture(alpha))):
        result = _impute(client, {"image": image}, encoding="png")["results"][0]
        expected = expected or _impute(client, encoding="png")["results"][0]

        assert result == expected


def test_the_same_seed_has_the_same_bytes(client: httpx.Client):
    """The whole body is the same again; another seed has other draws, and none is drawn anew."""
    body = {"images": [ITEM, ITEM], "particles": 100, "draws": 3}
    first, again, other, fresh, fresher = (
        client.post("/v1/impute", json={**body, **seed})
        for seed in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {}, {})
    )

    assert first.content == again.content
    draws = [answer.json()["results"][0]["draws"] for answer in (first, other, fresh, fresher)]
    assert len({json.dumps(d) for d in draws}) == 4
    twins = first.json()["results"]
    assert twins[0]["draws"] != twins[1]["draws"]


@pytest.mark.parametrize("path", ["/v1/impute", "/v1/log-likelihood"])
def test_the_seed_of_an_image_gives_that_image_again(client: httpx.Client, path: str):
    """Alone, with the seed that came with it, an image has the result that it had among others."""
    items = [{"image": text(picture(random_levels(s))), "mask": text(HOLES)} for s in range(4)]
    together = _post(client, path, images=items, particles=65)["results"]

    for item, result in zip(items, together, strict=True):
        alone = _post(client, path, images=[item], particles=65, seed=result["seed"])
        assert alone["results"] == [result]


def test_more_particles_begin_with_the_same_ones(client: httpx.Client, folder: Path):
    """K = 128 is K = 64 and one more of the engine's blocks."""
    model = checkpoint.read(folder / "tiny").model
    values, seen = torch.from_numpy(BITS / 255).float(), torch.from_numpy(~MASK)
    images = Incomplete.hide(values[None, None], seen[None, None])
    with torch.inference_mode():
        blocks = likelihood.blocks(model, images, NoisePerImage.of(3, [0]), particles=128)
        log_w = torch.cat([block.log_weights for block in blocks], -1).double()
    assert log_w.shape == (1, 128)

    for particles in (1, 64, 100, 128):
        expected = log_mean_exp(log_w[:, :particles]).item()
        for ask in (_impute, _score):
            estimate = ask(client, particles=particles)["results"][0]["log_likelihood"]
            assert estimate["value"] == pytest.approx(expected, abs=1e-9)
            assert estimate["particles"] == particles
            assert 0 < estimate["effective_sample_size"] <= particles * (1 + 1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_can_be_asked_for(client: httpx.Client, folder: Path, estimator: str):
    """The answer is the library's of that name; with the truth the conditional comes too."""
    model = checkpoint.read(folder / "tiny").model
    values, seen = torch.from_numpy(BITS / 255).float(), torch.from_numpy(~MASK)
    images = Incomplete.hide(values[None, None], seen[None, None])
    with torch.inference_mode():
        noise = NoisePerImage.of(3, [0])
        work = estimated(model, images, noise, estimator=estimator, particles=200)
        expected = finish(work)
    truth = {**ITEM, "truth": text(IMAGE)}
    plain, (result,) = (
        _score(client, truth, particles=200, estimator=name)["results"]
        for name in ("importance", estimator)
    )

    found = result["log_likelihood"]
    assert (found["estimator"], found["kind"]) == (estimator, expected.kind)
    assert found["value"] == pytest.approx(expected.value.item(), abs=1e-6)
    assert found["particles"] == expected.particles
    assert result["quality"] is None
    if estimator != "annealed":  # which has more particles for it
        assert result["conditional"] == plain[0]["conditional"]


@pytest.mark.parametrize("path", ["/v1/impute", "/v1/log-likelihood"])
@pytest.mark.parametrize("quality", ["fast", "standard"])
def test_a_tolerance_ends_an_answer_early(client: httpx.Client, path: str, quality: str):
    """No more particles are drawn than it takes; forms can say it too."""
    body = {"images": [ITEM], "particles": 50_000, "seed": 3, "quality": quality}
    (found,) = _post(client, path, **body, tolerance=0.05)["results"]
    form = client.post(
        path,
        files={"image": IMAGE},
        data={"particles": "50000", "seed": "3", "quality": quality, "tolerance": "0.05"},
    )
    (formed,) = form.json()["results"]

    assert found["log_likelihood"]["standard_error"] <= 0.05
    assert 0 < found["log_likelihood"]["particles"] < 50_000
    assert found["log_likelihood"]["reliable"]
    assert formed["log_likelihood"]["standard_error"] <= 0.05
    assert formed["log_likelihood"]["particles"] < 50_000


DOUBT = {"nothing is": False, "everything is": True}


@pytest.mark.parametrize("doubt", DOUBT)
@pytest.mark.parametrize("path", ["/v1/impute", "/v1/log-likelihood"])
def test_what_is_in_doubt_is_answered_in_high_quality(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, doubt: str
):
    """Without a quality the answer is that of `standard`, or where in doubt that of `high`."""
    monkeypatch.setattr(
        "model.likelihood.Estimate.doubtful",
        property(lambda found: torch.full_like(found.value, DOUBT[doubt]).bool()),
    )
    body = {"images": [ITEM, ITEM], "particles": 64, "seed": 3}
    by_itself, again = (_post(client, path, **body) for _ in range(2))
    used = "high" if DOUBT[doubt] else "standard"

    assert [result["quality"] for result in by_itself["results"]] == [used, used]
    assert by_itself == again
    assert by_itself == _post(client, path, **body, quality=used)


@pytest.mark.parametrize("quality", ["fast", "standard", "high"])
def test_the_quality_that_was_asked_for_is_used(client: httpx.Client, quality: str):
    """Both routes say the same of what was seen, and chains say how often they moved."""
    (imputed,) = _impute(client, quality=quality, particles=200)["results"]
    (scored,) = _score(client, quality=quality, particles=200)["results"]
    found = imputed["log_likelihood"]

    assert imputed["quality"] == scored["quality"] == quality
    for name in ("value", "standard_error", "effective_sample_size"):
        assert found[name] == pytest.approx(scored["log_likelihood"][name], rel=1e-6)
    assert found["estimator"] == ("annealed" if quality == "high" else "importance")
    if quality == "high":
        assert 0 < found["acceptance"] <= 1
    else:
        assert found["acceptance"] is None


def test_the_median_and_quantiles_are_those_of_the_mean(client: httpx.Client):
    """Of binary pixels they are one where the chance of zero is below their level."""
    outputs = ["mean", "median", "quantiles"]
    item = {"image": (BITS // 255).tolist(), "mask": ITEM["mask"]}
    options = {"outputs": outputs, "levels": [0.1, 0.9], "encoding": "npy"}
    (result,) = _impute(client, item, **options)["results"]
    mean = pixels_of(result["mean"])[MASK]
    images = [*result["quantiles"], result["median"]]

    assert result["draws"] is result["std"] is None
    for level, image in zip((0.1, 0.9, 0.5), images, strict=True):
        np.testing.assert_array_equal(pixels_of(image)[MASK], 1 - mean < level)
        np.testing.assert_array_equal(pixels_of(image)[~MASK], BITS[~MASK] / 255)


def test_a_form_may_ask_for_quantiles(client: httpx.Client):
    """Levels are numbers with commas between, and the answer is that of JSON."""
    options = {"particles": 70, "seed": 5, "encoding": "npy", "quality": "fast"}
    by_json = client.post(
        "/v1/impute",
        json={"images": [ITEM], "levels": [0.25, 0.75], "outputs": ["quantiles"], **options},
    )
    by_form = client.post(
        "/v1/impute",
        files={"image": IMAGE, "mask": HOLES},
        data={"levels": "0.25,0.75", "outputs": "quantiles", **options},
    )

    assert by_form.content == by_json.content
    assert len(by_json.json()["results"][0]["quantiles"]) == 2


def test_the_median_may_be_the_picture(client: httpx.Client):
    """With Accept: image/png and the median alone, that is what comes, with its quality."""
    answer = client.post(
        "/v1/impute",
        json={"images": [ITEM], "particles": 64, "seed": 3, "outputs": ["median"]},
        headers={"Accept": "image/png"},
    )
    (result,) = _impute(client, outputs=["median"])["results"]

    assert answer.headers["X-Quality"] == result["quality"]
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(answer.content))), pixels_of(result["median"])
    )


def test_with_the_truth_there_are_two_estimates_of_the_missing_pixels(client: httpx.Client):
    """A distribution over them, and the difference of two; where all is observed both are 0."""
    (whole,) = _score(client, {"image": text(IMAGE), "truth": text(IMAGE)})["results"]
    (holed,) = _score(client, {**ITEM, "truth": text(IMAGE)}, particles=500)["results"]

    assert whole["conditional"]["value"] == 0
    assert holed["difference"]["kind"] == "difference"
    off = holed["difference"]["value"] - holed["conditional"]["value"]
    errors = [holed[name]["standard_error"] for name in ("difference", "conditional")]
    assert abs(off) < 5 * math.hypot(*errors)


@pytest.mark.parametrize(("estimator", "fewest"), [("jackknife", 65), ("jackknife-2", 129)])
def test_too_few_particles_for_an_estimator(client: httpx.Client, estimator: str, fewest: int):
    """The error names the field, what was expected and what came; one more is enough."""
    few = {"particles": fewest - 1, "estimator": estimator}
    refused = client.post("/v1/log-likelihood", json={"images": [ITEM], **few})

    assert refused.status_code == 422
    assert refused.json()["errors"] == [
        {
            "field": "particles",
            "expected": f"at least {fewest} with {estimator}",
            "got": str(fewest - 1),
        }
    ]
    assert _score(client, particles=fewest, estimator=estimator)["results"]


def test_an_answer_does_not_depend_on_its_neighbours(client: httpx.Client):
    """Distinct requests at once have, byte for byte, the answers that they have alone."""
    rng = np.random.default_rng(0)

    def request(index: int) -> tuple[str, dict[str, Any]]:
        item = {
            "image": text(picture(random_levels(index))),
            "mask": random_mask(100 + index).tolist(),
        }
        body = {"images": [item], "particles": int(rng.integers(1, 700)), "seed": index}
        return ("/v1/impute", body | {"draws": 3}) if index % 3 else ("/v1/log-likelihood", body)

    requests = [request(index) for index in range(60)]
    alone = [client.post(path, json=body).content for path, body in requests]
    with ThreadPoolExecutor(30) as pool:
        together = list(pool.map(lambda r: client.post(r[0], json=r[1]).content, requests))

    assert together == alone
    assert len(set(alone)) == len(alone)


def test_grey_levels_are_cut_and_said_to_be(client: httpx.Client):
    """`binarised` says whether any seen pixel was neither 0 nor 1; the cut is above 127."""
    grey = {"image": text(picture(np.where(BITS > 0, 128, 127).astype(np.uint8))), **ITEM}
    grey["image"] = text(picture(np.where(BITS > 0, 128, 127).astype(np.uint8)))
    under = {
        "image": text(picture(np.where(MASK, 99, BITS).astype(np.uint8))),
        "mask": ITEM["mask"],
    }
    results = _score(client, ITEM, grey, under)["results"]

    assert [result["binarised"] for result in results] == [False, True, False]
    assert _impute(client, grey)["results"][0]["binarised"]
    same = [_score(client, item)["results"][0]["log_likelihood"] for item in (ITEM, grey, under)]
    assert same[0] == same[1] == same[2]


def test_only_what_was_asked_for_is_given(client: httpx.Client):
    """Outputs that were not asked for are null; no draws are an empty list."""
    for outputs in ([], ["mean"], ["draws", "std"], ["mean", "draws", "std"]):
        (result,) = _impute(client, outputs=outputs)["results"]
        assert {name for name in ("mean", "draws", "std") if result[name] is not None} == {
            *outputs
        }

    (result,) = _impute(client, draws=0)["results"]
    assert result["draws"] == []
    assert result["mean"] == _impute(client, draws=5)["results"][0]["mean"]


def test_ids_come_back_in_order(client: httpx.Client):
    """Each result has the id of its image, or null."""
    items = [{**ITEM, "id": "b"}, ITEM, {**ITEM, "id": "ä/☃"}, {**ITEM, "id": "b"}]
    for answer in (_impute(client, *items), _score(client, *items)):
        assert [result["id"] for result in answer["results"]] == ["b", None, "ä/☃", "b"]


def test_where_everything_is_missing_a_draw_is_a_sample(client: httpx.Client):
    """Nothing was seen: the log-likelihood is 0 up to rounding, its error too; all is imputed."""
    everything = {"image": text(IMAGE), "mask": np.ones(SHAPE[1:], bool).tolist()}
    (result,) = _impute(client, everything, encoding="list", particles=300)["results"]
    (score,) = _score(client, everything, particles=300)["results"]

    for estimate in (result["log_likelihood"], score["log_likelihood"]):
        assert estimate["value"] == pytest.approx(0, abs=1e-6)
        assert estimate["standard_error"] == pytest.approx(0, abs=1e-6)
        assert estimate["effective_sample_size"] == pytest.approx(300)
    assert set(np.unique(result["draws"][0])) <= {0, 1}
    assert (pixels_of(result["std"]) > 0).all()
    assert not result["binarised"]


def test_where_nothing_is_missing_the_image_comes_back(client: httpx.Client):
    """The mean and the draws are the image, and nothing is uncertain."""
    (result,) = _impute(client, {"image": text(picture(LEVELS))})["results"]

    for encoded in (result["mean"], *result["draws"]):
        np.testing.assert_array_equal(pixels_of(encoded), LEVELS)
    assert not pixels_of(result["std"]).any()


def test_colour_models_take_colour(client: httpx.Client):
    """Another model has images of its own shape, and seen pixels are untouched there too."""
    levels, hidden = random_levels(1, (4, 7, 3)), random_mask(3, (4, 7))
    item = {"image": text(picture(levels)), "mask": hidden.tolist()}
    (result,) = _impute(client, item, model="colour")["results"]

    for encoded in (result["mean"], *result["draws"]):
        np.testing.assert_array_equal(pixels_of(encoded)[~hidden], levels[~hidden])
    listed = _impute(client, item, model="colour", encoding="list")["results"][0]
    assert np.shape(listed["mean"]) == COLOUR


# Log-likelihood


def test_the_truth_is_scored_given_what_was_seen(client: httpx.Client, folder: Path):
    """With `truth` log p(missing | observed) of it comes as well, as the library estimates it."""
    item = {**ITEM, "truth": text(IMAGE)}
    (with_truth,), (without,) = (_score(client, i)["results"] for i in (item, ITEM))
    model = checkpoint.read(folder / "tiny").model
    values, seen = torch.from_numpy(BITS / 255).float(), torch.from_numpy(~MASK)
    with torch.inference_mode():
        expected = finish(
            likelihood.score(
                model,
                Incomplete.hide(values[None, None], seen[None, None]),
                NoisePerImage.of(3, [0]),
                particles=64,
                truth=values[None, None],
            )
        )

    assert without["conditional"] is None
    assert with_truth["log_likelihood"] == without["log_likelihood"]
    assert expected.conditional is not None
    assert with_truth["conditional"]["value"] == expected.conditional.value.item()
    assert with_truth["conditional"]["estimator"] == "self-normalised importance"
    assert with_truth["log_likelihood"]["value"] == expected.log_likelihood.value.item()


def test_the_truth_of_no_hole_is_certain(client: httpx.Client):
    """Where nothing is missing the conditional is 0; where everything is, it is log p(x)."""
    item = {"image": text(IMAGE), "truth": text(IMAGE)}
    everything = {**item, "mask": np.ones(SHAPE[1:], bool).tolist()}
    options = {"particles": 20_000, "quality": "standard"}
    (whole,) = _score(client, item, **options)["results"]
    (nothing,) = _score(client, everything, **options)["results"]

    assert whole["conditional"]["value"] == pytest.approx(0, abs=1e-9)
    off = nothing["conditional"]["value"] - whole["log_likelihood"]["value"]
    assert abs(off) < 5 * nothing["conditional"]["standard_error"]


def test_log_likelihood_by_multipart(client: httpx.Client):
    """A form with a truth is the same request as its JSON."""
    files = {"image": IMAGE, "mask": HOLES, "truth": IMAGE}
    answer = client.post("/v1/log-likelihood", files=files, data={"particles": "64", "seed": "3"})

    assert answer.json() == _score(client, {**ITEM, "truth": text(IMAGE)})


# Grey levels


def test_a_model_of_grey_levels_sees_them_as_they_are(client: httpx.Client):
    """Mean, deviation and quantiles are those of the closed form, and nothing is binarised."""
    item = {"image": (LEVELS / 255).tolist(), "mask": ITEM["mask"]}
    options = {"outputs": ["mean", "std", "quantiles"], "levels": [0.25], "particles": 20_000}
    (result,) = _impute(client, item, model="grey", encoding="npy", **options)["results"]
    seen = torch.from_numpy(~MASK)[None, None]
    images = Incomplete.hide(torch.from_numpy(LEVELS / 255)[None, None], seen)
    mean, covariance = GREY.conditional(images)
    exact, deviation = (
        part.reshape(SHAPE[1:]).numpy()[MASK]
        for part in (mean, covariance.diagonal(dim1=1, dim2=2).sqrt())
    )
    quartile = (exact - 0.6745 * deviation).clip(0, 1)

    assert not result["binarised"]
    assert result["log_likelihood"]["kind"] == "exact"
    assert result["log_likelihood"]["value"] == pytest.approx(
        GREY.log_likelihood(images).item(), abs=1e-3
    )
    np.testing.assert_allclose(pixels_of(result["mean"])[MASK], exact.clip(0, 1), atol=0.01)
    np.testing.assert_allclose(pixels_of(result["std"])[MASK], deviation, atol=0.01)
    found = pixels_of(result["quantiles"][0])[MASK]
    np.testing.assert_allclose(found, quartile, atol=0.1)
    assert abs((found - quartile).mean()) < 0.03


def test_completions_and_samples_of_grey_levels_are_pictures(client: httpx.Client):
    """Draws beyond black and white are cut to them, in a PNG as in floats."""
    item = {"image": text(picture(LEVELS)), "mask": ITEM["mask"]}
    (result,) = _impute(client, item, model="grey", draws=5)["results"]
    for draw in result["draws"]:
        np.testing.assert_array_equal(pixels_of(draw)[~MASK], LEVELS[~MASK])
    samples = _post(client, "/v1/samples", model="grey", count=20, seed=1, encoding="npy")
    levels = np.stack([pixels_of(sample) for sample in samples["samples"]])

    assert levels.std() > 0.1
    assert ((levels > 0) & (levels < 1)).any()


# Samples, models, health


@pytest.mark.parametrize("encoding", ["png", "npy", "list"])
def test_samples_are_as_many_as_asked_for(client: httpx.Client, encoding: str):
    """So many binary images, the same for the same seed; more begin with the same ones."""
    few, many, other = (
        _post(client, "/v1/samples", count=count, seed=seed, encoding=encoding)
        for count, seed in ((3, 1), (7, 1), (3, 2))
    )

    assert len(few["samples"]) == 3
    assert few["samples"] == many["samples"][:3]
    assert few["samples"] != other["samples"]
    top = 255 if encoding == "png" else 1
    for encoded in many["samples"]:
        assert pixels_of(encoded).shape == SHAPE[1:]
        assert set(np.unique(pixels_of(encoded))) <= {0, top}
    assert _post(client, "/v1/samples")["seed"] != _post(client, "/v1/samples")["seed"]


def test_models_are_listed_with_their_cards(client: httpx.Client, folder: Path):
    """The list has what is needed to choose, and a model's own address all that is known."""
    listed = {m["name"]: m for m in client.get("/v1/models").json()["models"]}
    card = client.get("/v1/models/colour").json()

    assert {"tiny", "colour"} <= set(listed)
    assert listed["tiny"]["default"]
    assert not listed["colour"]["default"]
    assert tuple(listed["colour"]["image_shape"]) == COLOUR
    assert card == json.loads((folder / "colour" / "card.json").read_text())


def test_a_model_that_appears_is_served_without_a_restart(client: httpx.Client, folder: Path):
    """A new folder is listed and used; one that is damaged harms nobody else."""
    assert client.get("/v1/models/late").status_code == 404
    write_checkpoint(folder, "late", seed=4)
    assert client.get("/v1/models/late").json()["name"] == "late"
    broken = folder / "broken"
    write_checkpoint(folder, "broken")
    (broken / "weights.safetensors").write_bytes(b"cut")

    names = [m["name"] for m in client.get("/v1/models").json()["models"]]
    assert names == ["colour", "grey", "late", "tiny"]
    late = _impute(client, model="late")
    assert late["model"] == "late"
    assert late["results"] != _impute(client)["results"]
    refused = client.post("/v1/impute", json={"images": [ITEM], "model": "broken"})
    assert refused.status_code == 500
    assert "sha256" in refused.json()["detail"]
    shutil.rmtree(broken)


def test_health_and_the_way_to_the_documentation(client: httpx.Client):
    """The process is alive, the engine is ready, and / leads to the documents."""
    assert client.get("/health/live").json() == {"status": "ok"}
    assert client.get("/health/ready").json() == {"status": "ok"}
    assert client.get("/", follow_redirects=True).url.path == "/docs"


def test_every_example_of_the_documentation_works(tmp_path: Path):
    """What /docs proposes to send is answered."""
    write_checkpoint(tmp_path, shape=(1, 28, 28))
    with serving(create_app(settings_for(tmp_path))) as url:
        document = httpx.get(f"{url}/openapi.json").json()
        schemas = document["components"]["schemas"]
        posted = 0
        for path, methods in document["paths"].items():
            content = methods.get("post", {}).get("requestBody", {}).get("content", {})
            reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
            for example in schemas.get(reference.rpartition("/")[2], {}).get("examples", []):
                answer = httpx.post(f"{url}{path}", json=example, timeout=30)
                assert answer.status_code == 200, answer.text
                posted += 1

    assert posted == 3


# Refusals


@dataclass(frozen=True)
class Bad:
    """A request that cannot be answered: what it is refused with, and the field that is named."""

    status: int
    field: str | None
    request: dict[str, Any] | None = None
    path: str = "/v1/impute"
    method: str = "POST"


def _body(status: int, field: str | None, **body: Any) -> Bad:
    return Bad(status, field, {"json": {"images": [ITEM], "particles": 1, **body}})


def _image(status: int, image: Any, *, path: str = "/v1/impute") -> Bad:
    return Bad(status, "images[0].image", {"json": {"images": [{"image": image}]}}, path)


def _mask(status: int, mask: Any) -> Bad:
    body = {"images": [{**ITEM, "mask": mask}]}
    return Bad(status, "images[0].mask", {"json": body})


def _raw(
    status: int, field: str | None, content: bytes, kind: str | None, path: str = "/v1/impute"
):
    headers = {} if kind is None else {"Content-Type": kind}
    return Bad(status, field, {"content": content, "headers": headers}, path)


def _form(
    status: int, field: str | None, files: Any, path: str = "/v1/impute", **data: str
) -> Bad:
    return Bad(status, field, {"files": files, "data": data}, path)


def _bomb() -> bytes:
    """A small PNG of 10000 by 10000 zero pixels of a bit."""
    return picture(Image.new("1", (10_000, 10_000)), optimize=True)


def _large_form() -> Generator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    yield from _large()


def _large() -> Generator[bytes]:
    for _ in range(30):
        yield b" " * (MAX_BODY // 20)


SIXTEEN_BIT = picture(Image.fromarray(LEVELS.astype(np.uint16) * 257))
FRAMES = [Image.fromarray(random_levels(s)).convert("RGB") for s in range(2)]
CUTS = {1: 415, 8: 415, 20: 415, 33: 415, 40: 415, 45: 422, 50: 422, 55: 422}
JSON = "application/json"
FORM = "multipart/form-data; boundary=b"
BAD: dict[str, Bad] = {
    # images
    "another size": _image(422, text(picture(LEVELS[:5]))),
    "another size, scored": _image(422, text(picture(LEVELS[:5])), path="/v1/log-likelihood"),
    "another shape of lists": _image(422, [[0.0] * 4] * 6),
    "not an image": _image(415, text(b"hello")),
    "empty text": _image(415, ""),
    **{f"PNG cut at {cut}": _image(status, text(IMAGE[:cut])) for cut, status in CUTS.items()},
    "animated WebP": _image(
        422, text(picture(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]))
    ),
    "animated PNG": _image(
        422, text(picture(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]))
    ),
    "TIFF of two pages": _image(
        422, text(picture(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]))
    ),
    "16-bit PNG": _image(422, text(SIXTEEN_BIT)),
    "CMYK": _image(422, text(picture(FRAMES[0].convert("CMYK"), "TIFF"))),
    "colour for a grey model": _image(422, text(picture(random_levels(1, (6, 5, 3))))),
    "bomb": _image(422, text(_bomb())),
    "NPY with a huge header": _image(
        422, text(npy(LEVELS).replace(b"(6, 5), }          ", b"(600000, 5000000), }"))
    ),
    "infinity": _image(422, text(npy(np.full((6, 5), np.inf)))),
    "NaN outside the mask": Bad(
        422,
        "images[0].image",
        {
            "json": {
                "images": [{"image": text(npy(np.full((6, 5), np.nan))), "mask": MASK.tolist()}]
            }
        },
    ),
    "above one": _image(422, [[1.5] * 5] * 6),
    "below zero": _image(422, [[-0.5] * 5] * 6),
    "negative integers": _image(422, text(npy(np.full((6, 5), -3)))),
    "ragged lists": _image(422, [[0.0], [0.0, 1.0]]),
    "text in lists": _image(422, [["0"] * 5] * 6),
    "a giant integer in lists": _image(422, [[10**300] * 5] * 6),
    "an integer beyond floats in lists": _image(422, [[10**400] * 5] * 6),
    "NPY of objects": _image(422, text(npy(np.array([[None]]), allow_pickle=True))),
    "NPY of structures": _image(422, text(npy(np.zeros((6, 5), "f4,f4")))),
    "not base64": _image(422, "!!!"),
    "a lone surrogate": _image(422, "\ud800"),
    "a number for an image": _image(422, 3),
    "an object for an image": _image(422, {"png": "…"}),
    "null for an image": _image(422, None),
    "a mask of another size": _mask(422, MASK[:5].tolist()),
    "a mask that is no image": _mask(415, text(b"hello")),
    "a mask of other numbers": _mask(422, [[0.5] * 5] * 6),
    "a number for a mask": _mask(422, 1),
    "a truth of another size": Bad(
        422,
        "images[0].truth",
        {"json": {"images": [{**ITEM, "truth": [[0]]}]}},
        "/v1/log-likelihood",
    ),
    "an empty truth": Bad(
        415, "images[0].truth", {"json": {"images": [{**ITEM, "truth": ""}]}}, "/v1/log-likelihood"
    ),
    "a truth with holes": Bad(
        422,
        "images[0].truth",
        {"json": {"images": [{**ITEM, "truth": [[None] * 5] * 6}]}},
        "/v1/log-likelihood",
    ),
    "the second image": Bad(
        422, "images[1].image", {"json": {"images": [ITEM, {"image": [[0]]}]}}
    ),
    # fields
    **{
        f"{name}={value!r}": _body(422, name, **{name: value})
        for name, values in {
            "particles": (0, -1, 1_000_001, 1.5, 64.0, True, "64", None, [1]),
            "draws": (-1, 101, 1.0, True, "1", None),
            "seed": (-1, 2**53, 1.5, False, "7", 10**400),
            "outputs": ("mean", {}, None),
            "encoding": ("jpeg", 3, None),
            "quality": ("best", 3, None),
            "model": (3, ["tiny"]),
            "images": ("x", {}, None, []),
        }.items()
        for value in values
    },
    "an unknown output": _body(422, "outputs[1]", outputs=["mean", "mode"]),
    "levels of nothing": _body(422, "levels", levels=[]),
    "too many levels": _body(422, "levels", levels=[0.5] * 10),
    "a level of one": _body(422, "levels[0]", levels=[1.0]),
    "a level that is no number": _body(422, "levels[1]", levels=[0.5, "x"]),
    "a tolerance of chains": _body(422, "tolerance", tolerance=0.1, quality="high"),
    "a tolerance of nothing": _body(422, "tolerance", tolerance=0),
    "a tolerance that is no number": _body(422, "tolerance", tolerance="small"),
    "a tolerance of the jackknife": Bad(
        422,
        "tolerance",
        {"json": {"images": [ITEM], "tolerance": 0.1, "estimator": "jackknife"}},
        "/v1/log-likelihood",
    ),
    "an estimator and a quality": Bad(
        422,
        "estimator",
        {"json": {"images": [ITEM], "estimator": "annealed", "quality": "high"}},
        "/v1/log-likelihood",
    ),
    "too many images": _body(422, "images", images=[{"image": ""}] * 257),
    "an image that is no object": _body(422, "images[0]", images=["x"]),
    "an image without an image": _body(422, "images[0].image", images=[{"mask": ""}]),
    "an id that is no text": _body(422, "images[0].id", images=[{**ITEM, "id": 3}]),
    "a long id": _body(422, "images[0].id", images=[{**ITEM, "id": "x" * 129}]),
    "a surrogate id": _body(422, "images[0].id", images=[{**ITEM, "id": "\ud800"}]),
    "an unknown field": _body(422, "particle", particle=3),
    "an unknown field with a surrogate": _body(422, "body", **{"\ud800": 3}),
    "an unknown field of an image": _body(422, "images[0].masks", images=[{**ITEM, "masks": ""}]),
    "a truth to impute": _body(422, "images[0].truth", images=[{**ITEM, "truth": ""}]),
    "draws to score": Bad(
        422, "draws", {"json": {"images": [ITEM], "draws": 1}}, "/v1/log-likelihood"
    ),
    "count=0": Bad(422, "count", {"json": {"count": 0}}, "/v1/samples"),
    "count=257": Bad(422, "count", {"json": {"count": 257}}, "/v1/samples"),
    "count=true": Bad(422, "count", {"json": {"count": True}}, "/v1/samples"),
    "images to sample": Bad(422, "images", {"json": {"images": []}}, "/v1/samples"),
    # models
    **{
        f"model {name!r}": _body(404, "model", model=name)
        for name in ("none", "", "../tiny", "./tiny", "tiny/", "tiny\x00", "\u202e", "x" * 9999)
    },
    "an unknown model's samples": Bad(404, "model", {"json": {"model": "x"}}, "/v1/samples"),
    "an unknown model's card": Bad(404, "model", path="/v1/models/none", method="GET"),
    "a card of another folder": Bad(404, None, path="/v1/models/..%2ftiny", method="GET"),
    # bodies
    "no body": Bad(422, "body"),
    "no body, but JSON": _raw(422, "body", b"", JSON),
    "not JSON": _raw(400, None, b"{", JSON),
    "not UTF-8": _raw(400, None, b"\xff\xfe{", JSON),
    "a list for a body": _raw(422, "body", b"[1]", JSON),
    "null for a body": _raw(422, "body", b"null", JSON),
    "text for a body": _raw(422, "body", b'"images"', JSON),
    "NaN in lists": _raw(
        422, "images[0].image", json.dumps({"images": [{"image": [[np.nan]]}]}).encode(), JSON
    ),
    "NaN for a number": _raw(
        422, "particles", json.dumps({"images": [ITEM], "particles": np.nan}).encode(), JSON
    ),
    "deep lists": _raw(
        422,
        "images[0].image",
        b'{"images": [{"image": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        JSON,
    ),
    "deep lists for images": _raw(
        422, "images[0]", b'{"images": ' + b"[" * 900 + b"]" * 900 + b"}", JSON
    ),
    "lists too deep to read": _raw(400, None, b"[" * 20_000 + b"]" * 20_000, JSON),
    "text/plain": _raw(415, "content-type", b"{}", "text/plain"),
    "no type": _raw(415, "content-type", b"{}", None),
    "a URL-encoded form": Bad(415, "content-type", {"data": {"particles": "3"}}),
    "a form to sample": _form(415, "content-type", {"image": IMAGE}, "/v1/samples"),
    "text/plain to sample": _raw(415, "content-type", b"{}", "text/plain", "/v1/samples"),
    "too large a body": _raw(413, "body", b" " * (MAX_BODY + 1), JSON),
    "too large a body in chunks": Bad(
        413, "body", {"content": _large, "headers": {"Content-Type": JSON}}
    ),
    "too large a form": _form(413, "body", {"image": b" " * MAX_BODY}),
    "too large a form in chunks": Bad(
        413, "body", {"content": _large_form, "headers": {"Content-Type": FORM}}
    ),
    # forms
    "a form without an image": _form(422, "image", {"mask": HOLES}),
    "a form with text for the image": _form(422, "image", {"image": (None, "text")}),
    "a form with text for the mask": _form(422, "mask", {"image": IMAGE, "mask": (None, "x")}),
    "a form with a file for text": _form(422, "draws", {"image": IMAGE, "draws": b"1"}),
    "a form with more masks": _form(
        422, "mask", [("image", IMAGE), ("mask", HOLES), ("mask", HOLES)]
    ),
    "a form with an unknown field": _form(422, "wings", {"image": IMAGE}, wings="2"),
    "a form with an unknown file": _form(422, "wings", {"image": IMAGE, "wings": b"2"}),
    "a form with images": _form(422, "images", {"image": IMAGE}, images="[]"),
    "a form with text for a number": _form(422, "particles", {"image": IMAGE}, particles="many"),
    "a form with text for levels": _form(422, "levels", {"image": IMAGE}, levels="0.5;0.9"),
    "a form with a fraction": _form(422, "particles", {"image": IMAGE}, particles="1.5"),
    "a form with a number out of range": _form(422, "draws", {"image": IMAGE}, draws="-1"),
    "a form with a file that is no image": _form(415, "images[0].image", {"image": b"hello"}),
    "a form with an empty file": _form(415, "images[0].image", {"image": b""}),
    "a form without a boundary": _raw(400, None, b"--b--", "multipart/form-data"),
    "a form that is not one": _raw(400, None, b"hello", FORM),
    "a form cut short": _raw(
        422, "image", b'--b\r\nContent-Disposition: form-data; name="image"', FORM
    ),
    "a form of too many fields": _form(400, None, [("image", IMAGE), *[("x", (None, "1"))] * 65]),
    # addresses
    "an unknown address": Bad(404, None, path="/v2/impute"),
    "GET where POST belongs": Bad(405, None, method="GET"),
    "DELETE of a model": Bad(405, None, path="/v1/models/tiny", method="DELETE"),
    # work
    "one picture of several images": Bad(
        406, "images", {"json": {"images": [ITEM] * 2}, "headers": {"Accept": "image/png"}}
    ),
    "too much work": _body(413, "particles", images=[ITEM] * 3, particles=1_000_000),
}


def _is_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert set(document) == {"type", "title", "status", "detail", "errors"}
    assert document["type"].startswith("urn:miss-iwem:problem:")
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    for error in document["errors"]:
        assert set(error) == {"field", "expected", "got"}
        assert all(error.values())
        assert len(str(error)) < 500
    return document


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_with_a_problem_document(client: httpx.Client, name: str):
    """Never a fault of the server: each has its status, and names the field that was wrong."""
    bad = BAD[name]
    given = {k: v() if isinstance(v, Callable) else v for k, v in (bad.request or {}).items()}
    if "json" in given:  # httpx itself refuses NaN and surrogates
        given["content"] = json.dumps(given.pop("json")).encode()
        given["headers"] = {"Content-Type": JSON, **given.get("headers", {})}
    document = _is_problem(client.request(bad.method, bad.path, **given), bad.status)

    fields = [error["field"] for error in document["errors"]]
    assert bad.field in fields if bad.field else not fields
    assert client.get("/health/ready").status_code == 200


def test_a_wrong_method_says_which_are_right(client: httpx.Client):
    """405 has Allow."""
    assert client.get("/v1/impute").headers["allow"] == "POST"


def test_nothing_that_was_sent_is_trusted(client: httpx.Client):
    """A chunk of a PNG that unpacks to much more than the pixels is no picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    words = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(2**24)))
    bomb = IMAGE[:33] + words + IMAGE[33:]
    assert len(bomb) < MAX_BODY / 2
    answer = client.post("/v1/impute", json={"images": [{"image": text(bomb)}]})

    _is_problem(answer, 415)


# Load


def _until(reached: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it is so before the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if reached():
            return True
    return False


@pytest.mark.parametrize("kind", ["json", "form"])
def test_the_work_of_a_client_that_left_is_dropped(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """When a client closes its connection, what it asked for no longer fills the queue.

    Until then others are refused, and the service is ready all the same.
    """
    engines: list[Engine] = []

    def recorded(*arguments: Any, **options: Any) -> Engine:
        engines.append(Engine(*arguments, **options))
        return engines[-1]

    monkeypatch.setattr("service.app.Engine", recorded)
    with serving(create_app(settings_for(folder, max_request=10**9, max_waiting=1))) as url:
        form: dict[str, Any] = {
            "files": [("image", IMAGE)] * 100,
            "data": {"particles": "1000000"},
        }
        body: dict[str, Any] = {"json": {"images": [ITEM] * 100, "particles": 1_000_000}}
        address = f"{url}/v1/impute"
        huge = httpx.Request("POST", address, **(form if kind == "form" else body))
        content = huge.read()
        head = "".join(f"{name}: {value}\r\n" for name, value in huge.headers.items())
        with socket.create_connection((huge.url.host, huge.url.port or 80)) as connection:
            connection.sendall(f"POST /v1/impute HTTP/1.1\r\n{head}\r\n".encode() + content)
            assert _until(lambda: engines[0].waiting > 0)
            small = {"images": [ITEM], "particles": 1}
            refused = httpx.post(address, json=small)
            again = httpx.post(address, json=small)
            unread = httpx.post(address, content=b"no JSON")
            assert httpx.get(address).status_code == 405
            assert httpx.get(f"{url}/health/ready").status_code == 200
            assert engines[0].waiting > 0

        for answer in (refused, again, unread):
            _is_problem(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
        assert _until(lambda: engines[0].waiting == 0)
        assert httpx.post(address, json=small).status_code == 200


def test_a_request_says_how_long_its_answer_is_of_use(client: httpx.Client):
    """Past X-Timeout-Ms it is 504, and the service has a limit of its own."""
    body = {"images": [ITEM], "particles": 500_000, "quality": "standard"}
    late = client.post("/v1/impute", json=body, headers={"X-Timeout-Ms": "30"})
    _is_problem(late, 504)
    assert late.json()["type"].endswith(":deadline")
    small = {"images": [ITEM], "particles": 1}
    assert client.post("/v1/impute", json=small, headers={"X-Timeout-Ms": "60000"}).is_success


def test_the_time_of_a_request_begins_before_its_pictures_are_read(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    """What reading them took is not there for the work."""
    read, limit = api.read, 1.0

    def slow(*arguments: Any, **options: Any) -> Any:
        threading.Event().wait(limit)
        return read(*arguments, **options)

    monkeypatch.setattr(api, "read", slow)
    body = {"images": [ITEM], "particles": 1}

    late = client.post("/v1/impute", json=body, headers={"X-Timeout-Ms": f"{1000 * limit:.0f}"})

    _is_problem(late, 504)


def test_the_service_has_a_limit_of_time_of_its_own(folder: Path):
    """Which a request cannot raise."""
    with serving(create_app(settings_for(folder, timeout=0.03))) as url:
        late = httpx.post(
            f"{url}/v1/impute",
            json={"images": [ITEM], "particles": 500_000, "quality": "standard"},
            headers={"X-Timeout-Ms": "60000"},
            timeout=60,
        )

    _is_problem(late, 504)


@pytest.mark.parametrize(
    "wrong",
    [
        {"outputs": [0] * 1000},
        {"outputs": ["mean"] * 6},
        {f"field {number}": 0 for number in range(1000)},
    ],
)
def test_of_much_that_is_wrong_some_is_told(client: httpx.Client, wrong: dict[str, Any]):
    """The answer does not grow with what was sent."""
    answer = client.post("/v1/impute", json={"images": [ITEM], **wrong})

    _is_problem(answer, 422)
    assert 1 <= len(answer.json()["errors"]) <= 20


@pytest.mark.parametrize("sent", ["0", "-5", "1.5", "soon", "", "9" * 400])
def test_a_time_that_is_none_is_refused(client: httpx.Client, sent: str):
    """The header is named."""
    answer = client.post("/v1/impute", json={"images": [ITEM]}, headers={"X-Timeout-Ms": sent})

    _is_problem(answer, 422)
    assert "X-Timeout-Ms" in answer.json()["errors"][0]["field"]


@pytest.mark.parametrize("path", ["impute", "log-likelihood", "samples"])
def test_an_answer_says_what_its_time_went_into(client: httpx.Client, path: str):
    """Milliseconds by part, in the header that browsers show."""
    body = {"count": 2} if path == "samples" else {"images": [ITEM], "particles": 64}
    told = client.post(f"/v1/{path}", json=body).headers["server-timing"]
    parts = dict(part.split(";dur=") for part in told.split(", "))

    assert (
        set(parts)
        == {
            "impute": {"decode", "queue", "compute", "encode"},
            "log-likelihood": {"decode", "queue", "compute"},
            "samples": {"queue", "compute", "encode"},
        }[path]
    )
    assert all(float(milliseconds) >= 0 for milliseconds in parts.values())
    assert float(parts["compute"]) > 0
