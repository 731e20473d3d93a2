"""Training: what a run leaves behind, however it ends, and what it never looks at."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoint, refit, train
from model import run as runs
from model import step as stepping
from model.data import DataError
from model.noise import Noise
from model.objectives import OBJECTIVES, P_STEPS, Climbed, Objective
from model.optimizers import OPTIMIZERS
from model.recipe import (
    FIELDS,
    Recipe,
    RecipeError,
    parser,
    read_recipe,
    shipped,
    stored_recipe,
)
from model.refinement import Refinement
from model.run import Diverged, Metrics, Run
from model.stages import Stages, finish
from model.step import BF16_CPU
from model.train import Interrupted, main

ROOT = Path(__file__).parents[1]
TINIEST = torch.tensor([1e-40])
"""Less than the least normal number of single precision."""
TINY: dict[str, Any] = {
    "missing": "patches:3",
    "particles": 3,
    "latent": 2,
    "hidden": (8,),
    "batch": 16,
    "epochs": 2,
    "learning_rate": 1e-2,
    "anneal_epochs": 1,
}


class Killed(BaseException):
    """Ends a run where it is, as kill -9 would."""


@pytest.fixture(autouse=True)
def _without_tensorboard(  # pyright: ignore[reportUnusedFunction]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The curves cost more than these runs."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def _bars(count: int, seed: int) -> np.ndarray:
    """Images of 6x6 pixels: a row and a column that are white, with some noise."""
    generator = np.random.default_rng(seed)
    images = (generator.random((count, 6, 6)) < 0.05).astype(np.uint8)
    images[np.arange(count), generator.integers(6, size=count)] = 1
    images[np.arange(count), :, generator.integers(6, size=count)] = 1
    return images * np.uint8(255)


def _data(folder: Path, name: str = "bars", **arrays: np.ndarray) -> str:
    splits = {"train": _bars(40, 0), "validation": _bars(20, 1), "test": _bars(4, 2)}
    np.savez(folder / f"{name}.npz", **(splits | arrays))  # pyright: ignore[reportArgumentType]
    return str(folder / f"{name}.npz")


@pytest.fixture
def bars(tmp_path: Path) -> str:
    """A small data set of bars."""
    return _data(tmp_path)


def _quiet() -> Console:
    return Console(file=io.StringIO())


def _train(folder: Path, data: str, *, resume: bool = False, **changes: Any) -> Path:
    """The folder of a run that has ended well."""
    recipe = read_recipe(None, **{**TINY, "data": data, **changes})
    train.train(folder, recipe, resume=resume, device="cpu", console=_quiet())
    return folder


def _state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "state.safetensors")


def _place(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "state.safetensors", "pt") as saved:
        return json.loads(saved.metadata()["place"])


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def _weights(folder: Path) -> str:
    return checkpoint.read(folder / "checkpoint").card.weights_sha256


def _best(folder: Path) -> int:
    """The epoch that the checkpoint is of, -1 without one."""
    if not (folder / "checkpoint").exists():
        return -1
    return checkpoint.read(folder / "checkpoint").card.training["best_epoch"]


def _same(left: Path, right: Path) -> bool:
    """Whether two runs ended in the same bits, best weights, moments and metrics included."""
    ours, theirs = _state(left), _state(right)
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and _weights(left) == _weights(right)
        and _metrics(left) == _metrics(right)
    )


def _all_finite(folder: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _state(folder).values())


# Stopped and gone on with.


LONG: dict[str, Any] = {"epochs": 100, "patience": 100}


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "model.train", "--out", str(folder), "--threads=1", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_epochs(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.timeout(300)  # processes to start, on a machine that may have other work
def test_killed_and_stopped_processes_end_in_the_same_bits(bars: str, tmp_path: Path) -> None:
    """Signals at whatever moment, SIGKILL too, cost nothing but the time to repeat some steps."""
    folder, words, stopped = tmp_path / "stopped", _words(bars, **LONG), ""
    for number, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        known = len(_metrics(folder)) if folder.exists() else 0
        with _start(folder, *words) as process:
            _wait_for_epochs(process, folder, known + 3)
            process.send_signal(number)
            stopped = process.communicate(timeout=60)[1]
        assert process.returncode == status, stopped
        words = ["--resume", "--device=cpu"]

    assert f"--out {folder} --threads=1 --resume" in stopped
    assert "Traceback" not in stopped
    whole = _train(tmp_path / "whole", bars, **LONG)
    assert _same(_train(folder, bars, resume=True, **LONG), whole)
    assert [line["epoch"] for line in _metrics(folder)] == list(range(100))


def _kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Kills at one of the operations on files, which has then done half of its work."""
    operations = itertools.count(1)

    def guard(owner: Any, name: str, half: Callable[..., object] | None = None) -> None:
        whole = getattr(owner, name)

        def operation(*arguments: Any, **named: Any) -> Any:
            if next(operations) != moment:
                return whole(*arguments, **named)
            if half:
                half(*arguments)
            raise Killed

        monkeypatch.setattr(owner, name, operation)

    guard(Path, "replace")
    guard(Path, "rename")
    guard(Path, "mkdir")
    for module in (runs, checkpoint):
        guard(module, "to_disk", lambda path, content: path.open("wb").write(content[:9]))
    guard(runs, "_append", lambda path, text: path.open("a").write(text[:9]))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # nobody closes a killed process's files
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_at_any_operation_on_files(optimizer: str, bars: str, tmp_path: Path) -> None:
    """Between any two operations, and half way through one, the run can be gone on with."""
    changes: dict[str, Any] = {"optimizer": optimizer}
    whole, killed = _train(tmp_path / "whole", bars, **changes), 0
    for moment in itertools.count(1):
        folder = tmp_path / f"run-{moment}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            _kill_at(monkeypatch, moment)
            try:
                _train(folder, bars, **changes)
            except Killed:
                killed += 1
            else:
                break
        recipe = read_recipe(None, **TINY, data=bars, **changes)
        Run(folder, recipe, device="cpu").begin()
        assert _best(folder) == _place(folder)["best_epoch"], moment
        assert _same(_train(folder, bars, resume=True, **changes), whole), moment
        assert not list(folder.glob(".checkpoint-*"))

    assert killed > 15


def _killed_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    steps, ascend = itertools.count(1), stepping.ascend

    def step(*arguments: Any, **settings: Any) -> Climbed:
        if next(steps) == number:
            raise Killed
        return ascend(*arguments, **settings)

    monkeypatch.setattr(stepping, "ascend", step)


def test_long_epochs_are_saved_in_their_midst(bars: str, tmp_path: Path) -> None:
    """What a kill costs is bounded by time, not by epochs."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
        _killed_in_step(monkeypatch, 6)  # of the three in each epoch
        with pytest.raises(Killed):
            _train(folder, bars)

    assert (_place(folder)["step"], _place(folder)["validated"]) == (5, 1)
    assert _same(_train(folder, bars, resume=True), _train(tmp_path / "whole", bars))


def test_stopped_while_it_validates(bars: str, tmp_path: Path) -> None:
    """A signal need not wait for the validation, which is then made again."""
    folder, validate = tmp_path / "run", Run.validate
    with pytest.MonkeyPatch.context() as monkeypatch:

        def interrupted(run: Run) -> Iterator[None]:
            signal.raise_signal(signal.SIGTERM)
            return validate(run)

        monkeypatch.setattr(Run, "validate", interrupted)
        with pytest.raises(Interrupted, match="after step 3") as stop:
            _train(folder, bars)

    assert stop.value.status == 128 + signal.SIGTERM
    assert (_place(folder)["step"], _place(folder)["validated"]) == (3, 0)
    assert _same(_train(folder, bars, resume=True), _train(tmp_path / "whole", bars))


def test_signals_are_the_callers_again_afterwards(bars: str, tmp_path: Path) -> None:
    """Training borrows the handlers of signals, the precision of products and tiny numbers."""
    before = signal.getsignal(signal.SIGINT), torch.get_float32_matmul_precision()
    _train(tmp_path / "run", bars, precision="medium")

    assert (signal.getsignal(signal.SIGINT), torch.get_float32_matmul_precision()) == before
    assert float(TINIEST * 1) > 0


def test_a_training_takes_the_tiniest_numbers_for_zero(bars: str, tmp_path: Path) -> None:
    """Products with gradients of particles that hardly weigh take no more time than others."""
    seen: list[float] = []

    class Listener(io.StringIO):
        def write(self, text: str) -> int:
            seen.append(float(TINIEST * 1))
            return len(text)

    recipe = read_recipe(None, **{**TINY, "data": bars})
    train.train(tmp_path / "run", recipe, device="cpu", console=Console(file=Listener()))

    assert set(seen) == {0.0}


def test_products_in_bf16_are_where_the_processor_has_them(bars: str, tmp_path: Path) -> None:
    """`medium` trains other weights, in fp32 too; on any other processor it changes nothing."""
    exact = _train(tmp_path / "exact", bars)
    rounded = _train(tmp_path / "rounded", bars, precision="medium")

    kept = (_state(rounded)[name].dtype for name in _state(exact))
    assert set(kept) == {tensor.dtype for tensor in _state(exact).values()}
    assert _same(exact, rounded) is not BF16_CPU


def test_validation_has_the_products_of_training(bars: str, tmp_path: Path) -> None:
    """The same weights have a bound that is rounded as training's, by next to nothing."""
    bounds: list[float] = []
    for precision in ("highest", "medium"):
        folder = tmp_path / precision
        recipe = read_recipe(None, **{**TINY, "data": bars, "precision": precision})
        run = Run(folder, recipe, device="cpu")
        run.begin()
        bounds.append(finish(run.validate()))

    exact, rounded = bounds
    assert (rounded != exact) is BF16_CPU
    assert rounded == pytest.approx(exact, rel=1e-3)


def test_two_processes_do_not_work_on_one_run(bars: str, tmp_path: Path) -> None:
    """The second is refused with a sentence, and the first goes on; afterwards the run is free."""
    folder, endless = tmp_path / "run", 10**6
    with _start(folder, *_words(bars, epochs=endless, patience=endless)) as first:
        _wait_for_epochs(first, folder, 1)
        with _start(folder, "--resume") as second:
            said = second.communicate(timeout=60)[1]
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)

    assert (first.returncode, second.returncode) == (130, 2)
    assert f"another process trains the one in {folder}" in said
    assert [line["epoch"] for line in _metrics(folder)] == list(range(len(_metrics(folder))))
    with FileLock(folder / ".lock", timeout=0):
        assert _place(folder)["validated"] == len(_metrics(folder))


def test_finished_run_is_left_as_it_is(bars: str, tmp_path: Path) -> None:
    """Going on with a run that is done changes nothing, results on the card included."""
    folder = _train(tmp_path / "run", bars)
    card = folder / "checkpoint" / "card.json"
    card.write_text(card.read_text().replace('"results": {}', '"results": {"test": 1}'))
    before = card.read_bytes(), (folder / "state.safetensors").read_bytes()
    _train(folder, bars, resume=True)

    assert (card.read_bytes(), (folder / "state.safetensors").read_bytes()) == before


def test_state_of_the_first_version_is_gone_on_with(bars: str, tmp_path: Path) -> None:
    """A state that does not say which epochs were validated was saved after they were."""
    folder, save = tmp_path / "run", runs.save
    with pytest.MonkeyPatch.context() as monkeypatch:

        def old(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
            place = json.loads(metadata["place"])
            del place["validated"]
            place["bound_sum"] = place.pop("sums")[0]
            return save(tensors, {"place": json.dumps(place)})

        monkeypatch.setattr(runs, "save", old)
        _killed_in_step(monkeypatch, 5)
        with pytest.raises(Killed):
            _train(folder, bars)

    assert _same(_train(folder, bars, resume=True), _train(tmp_path / "whole", bars))


# Slices of work, and the ledger of them.


def _ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def _slices(folder: Path) -> list[tuple[int, int]]:
    """The steps from and to which each of those who worked on a run has brought it."""
    lines = _ledger(folder)

    assert all(line.keys() >= {"device", "torch", "seconds"} for line in lines)
    assert all(line["seconds"] >= 0 for line in lines)
    return [(line["from_step"], line["to_step"]) for line in lines]


def test_minutes_that_are_over(
    bars: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They end with status 75 and a state that goes on to the bits of an undisturbed run."""
    folder = tmp_path / "run"
    words = ["--out", str(folder), "--device=cpu", "--minutes=0"]
    status = main([*_words(bars), *words])
    said = capsys.readouterr().err
    again = main([*words, "--resume"])

    assert (status, again) == (75, 75)
    assert "Stopped after step 1. Go on with: miss-iwem train" in said
    assert said.rstrip().endswith("--minutes=0 --resume")
    assert _place(folder)["step"] == 2
    assert _same(_train(folder, bars, resume=True), _train(tmp_path / "whole", bars))
    assert _slices(folder) == [(0, 1), (1, 2), (2, 6)]


def test_minutes_that_are_enough(bars: str, tmp_path: Path) -> None:
    """A run that ends within them is a run that ended."""
    folder = tmp_path / "run"

    assert main([*_words(bars), "--out", str(folder), "--minutes=60"]) == 0
    assert _same(folder, _train(tmp_path / "whole", bars))
    assert _slices(folder) == [(0, 6)]


def test_ledger_joins_what_was_interrupted(bars: str, tmp_path: Path) -> None:
    """Each slice begins where the one before was saved, after a signal, a kill and the end."""
    folder, step = tmp_path / "run", Run.step
    with pytest.MonkeyPatch.context() as monkeypatch:

        def interrupted(run: Run) -> None:
            step(run)
            if run.state.step == 2:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Run, "step", interrupted)
        with pytest.raises(Interrupted, match="after step 2"):
            _train(folder, bars)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _killed_in_step(monkeypatch, 3)  # after the epoch's end at step 3 was saved
        with pytest.raises(Killed):
            _train(folder, bars, resume=True)
    for _ in range(2):
        _train(folder, bars, resume=True)

    assert _slices(folder) == [(0, 2), (2, 3), (3, 6)]


def test_ledger_joins_where_it_was_not_written(bars: str, tmp_path: Path) -> None:
    """A kill between the state and the ledger leaves no gap in the steps."""
    folder, write = tmp_path / "run", runs._write  # pyright: ignore[reportPrivateUsage]
    with pytest.MonkeyPatch.context() as monkeypatch:

        def killed(path: Path, content: bytes) -> None:
            if path.name == "ledger.jsonl" and json.loads(content)["to_step"] > 0:
                raise Killed
            write(path, content)

        monkeypatch.setattr(runs, "_write", killed)
        with pytest.raises(Killed):
            _train(folder, bars)
    slices = _slices(_train(folder, bars, resume=True))

    assert slices[0][0] == 0
    assert slices[-1][1] == 6
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(slices))


# Seeds and settings.


def test_seed_decides_the_weights(bars: str, tmp_path: Path) -> None:
    """The same recipe gives the same weights, and another seed others."""
    first, again = _train(tmp_path / "first", bars), _train(tmp_path / "again", bars)

    assert _same(first, again)
    assert _weights(first) != _weights(_train(tmp_path / "other", bars, seed=1))


def test_every_p_step_is_one_of_its_own(bars: str, tmp_path: Path) -> None:
    """The P-step that the recipe names is the one that is taken."""
    weights = {_weights(_train(tmp_path / name, bars, p_step=name)) for name in P_STEPS}

    assert len(weights) == len(P_STEPS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns(objective: str, bars: str, tmp_path: Path) -> None:
    """A few epochs raise the bound on the observed pixels of images that were not trained on."""
    recipe = read_recipe(None, **{**TINY, "data": bars, "epochs": 12, "objective": objective})
    run = Run(tmp_path / "run", recipe, device="cpu")
    run.begin()
    before = finish(run.validate())
    learnt = [metrics for metrics in run.rest() if metrics]

    assert run.finished
    assert learnt[-1].validation_bound > before + 0.5
    assert [metrics.alpha for metrics in learnt[:2]] == [
        0.0 if OBJECTIVES[objective].annealed else 1.0,
        1.0,
    ]


def test_metrics_are_those_of_the_steps(
    bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch's bound is the mean over its steps, each of which was taken with the epoch's α."""
    bounds, alphas, ascend = list[float](), list[float](), stepping.ascend

    def step(*arguments: Any, **settings: Any) -> Climbed:
        climbed = ascend(*arguments, **settings)
        bounds.append(climbed.bound.item())
        alphas.append(settings["alpha"])
        return climbed

    monkeypatch.setattr(stepping, "ascend", step)
    lines = _metrics(_train(tmp_path / "run", bars, epochs=3, anneal_epochs=2))

    assert [line["train_bound"] for line in lines] == [
        pytest.approx(sum(bounds[3 * epoch : 3 * epoch + 3]) / 3) for epoch in range(3)
    ]
    assert alphas == [0.0] * 3 + [0.5] * 3 + [1.0] * 3
    assert [line["alpha"] for line in lines] == [0.0, 0.5, 1.0]


def test_metrics_have_the_variances_of_the_steps(
    bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the ELBO and of Q̂ are finite, positive, and the means over an epoch's steps."""
    variances, ascend = list[tuple[float, float]](), stepping.ascend

    def step(*arguments: Any, **settings: Any) -> Climbed:
        climbed = ascend(*arguments, **settings)
        variances.append((climbed.elbo_variance.item(), climbed.q_hat_variance.item()))
        return climbed

    monkeypatch.setattr(stepping, "ascend", step)
    lines = _metrics(_train(tmp_path / "run", bars))

    assert all(0 < number < math.inf for pair in variances for number in pair)
    for epoch, line in enumerate(lines):
        of_steps = np.mean(variances[3 * epoch : 3 * epoch + 3], axis=0)
        assert (line["elbo_variance"], line["q_hat_variance"]) == pytest.approx(tuple(of_steps))


REFINED = {"svi_steps": 2}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all particles on the way back": ({}, {"way_back": 1.0}),
    "fresh particles": ({}, {"p_samples": "fresh"}),
    "fresh particles, wake": ({"p_step": "wake"}, {"p_samples": "fresh"}),
    "sampled pixels": ({}, {"m_step": "sampled"}),
    "refined": ({}, REFINED),
    "refined at another rate": (REFINED, {"svi_rate": 0.2}),
    "refined through": (REFINED, {"svi_through": True}),
    "two layers": ({}, {"upper": 2, "upper_hidden": (6,)}),
    "gated": ({}, {"encoder": "gated-conv", "decoder": "gated-conv"}),
    "wider": ({}, {"proposal_variance": 1.5}),
    "decay": ({}, {"weight_decay": 0.1}),
    "objectives in sequence": ({}, {"objective": "vae:1,miss-iwem"}),
}


@pytest.mark.parametrize(("others", "option"), OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_is_one_of_its_own(
    others: dict[str, Any], option: dict[str, Any], bars: str, tmp_path: Path
) -> None:
    """What the recipe says reaches the training: the weights are others, and are finite."""
    plain = _train(tmp_path / "plain", bars, **others)
    other = _train(tmp_path / "other", bars, **others, **option)

    assert _weights(plain) != _weights(other)
    assert _all_finite(other)


def test_fresh_particles_are_two_steps_of_the_optimiser(bars: str, tmp_path: Path) -> None:
    """θ's step is taken before φ's particles are drawn, and each moves its own half alone."""
    recipe = read_recipe(None, **TINY, data=bars, p_samples="fresh")
    run = Run(tmp_path / "run", recipe, device="cpu")
    run.begin()
    seen: list[dict[str, Tensor]] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        ascend = stepping.ascend

        def step(*arguments: Any, **settings: Any) -> Climbed:
            seen.append({k: v.clone() for k, v in run.state.model.state_dict().items()})
            return ascend(*arguments, **settings)

        monkeypatch.setattr(stepping, "ascend", step)
        run.step()
    seen.append(run.state.model.state_dict())

    for (before, after), moved in zip(itertools.pairwise(seen), ("dec", "enc"), strict=True):
        assert {k[:3] for k in before if not torch.equal(before[k], after[k])} == {moved}


def test_cosine_ends_at_zero(bars: str, tmp_path: Path) -> None:
    """The learning rate falls from the recipe's to nothing."""
    run = Run(tmp_path / "run", read_recipe(None, **TINY, data=bars, schedule="cosine"))
    first = run.learning_rate
    run.state.step = run.steps

    assert first == TINY["learning_rate"]
    assert run.learning_rate == pytest.approx(0)


@pytest.mark.parametrize(("objective", "epochs"), [("miss-iwem", 6), ("miss-iwem-woa", 3)])
def test_patience_is_not_counted_while_annealing(
    objective: str, epochs: int, bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs without a better bound end the training, but none in which α was below 1."""

    def worse(run: Run) -> Iterator[None]:
        yield
        return -float(run.state.validated)

    monkeypatch.setattr(Run, "validate", worse)
    waits: dict[str, Any] = {
        "patience": 2,
        "anneal_epochs": 4,
        "epochs": 9,
        "objective": objective,
    }
    folder = _train(tmp_path / "run", bars, **waits)

    assert len(_metrics(folder)) == epochs
    assert checkpoint.read_card(folder / "checkpoint").training["best_epoch"] == 0


def test_annealing_begins_with_its_objective(bars: str, tmp_path: Path) -> None:
    """Whichever of several objectives is annealed: α counts from its first epoch."""
    several = "vae:2,miss-iwem:4,miss-iwae"
    folder = _train(tmp_path / "run", bars, objective=several, anneal_epochs=2, epochs=8)

    assert [line["alpha"] for line in _metrics(folder)] == [1, 1, 0, 0.5, 1, 1, 1, 1]


def test_patience_is_not_counted_before_the_last_objective(
    bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs without a better bound end the training, but not before all have had a turn."""

    def worse(run: Run) -> Iterator[None]:
        yield
        return -float(run.state.validated)

    monkeypatch.setattr(Run, "validate", worse)
    folder = _train(tmp_path / "run", bars, objective="vae:4,iwae", patience=2, epochs=9)

    assert len(_metrics(folder)) == 4 + 2


def test_best_epoch_is_kept(bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint has the weights of the best epoch, not of the last."""
    bounds = {0: -3.0, 1: -1.0, 2: -2.0}
    seen: dict[int, dict[str, Tensor]] = {}

    def known(run: Run) -> Iterator[None]:
        yield
        weights = run.state.model.state_dict()
        seen[run.state.validated] = {name: tensor.clone() for name, tensor in weights.items()}
        return bounds[run.state.validated]

    monkeypatch.setattr(Run, "validate", known)
    folder = _train(tmp_path / "run", bars, epochs=3)
    best = checkpoint.read(folder / "checkpoint")

    assert (best.card.training["best_epoch"], best.card.training["epochs"]) == (1, 3)
    assert all(torch.equal(seen[1][k], v) for k, v in best.model.state_dict().items())


# What cannot be learnt from.


def test_hidden_pixels_are_never_seen(tmp_path: Path) -> None:
    """Other values under the images' own masks and under those of the mechanism change no bit."""
    holes = {"train": np.random.default_rng(3).random((40, 6, 6)) < 0.3}
    holes["validation"] = holes["train"][:20]
    own = {f"{name}_missing": mask for name, mask in holes.items()}
    first = _data(tmp_path, "first", **own)
    run = Run(tmp_path / "none", read_recipe(None, **TINY, data=first), device="cpu")
    hidden = {"train": ~run.train.observed[:, 0], "validation": ~run.validation.observed[:, 0]}
    images = {"train": _bars(40, 0), "validation": _bars(20, 1)}
    other = {name: np.where(hidden[name], 255 - images[name], images[name]) for name in images}
    second = _data(tmp_path, "second", **own, **other)

    assert all((hidden[name].numpy() > holes[name]).any() for name in images)
    assert all((other[name] != images[name]).sum() > 200 for name in images)
    assert _same(_train(tmp_path / "a", first), _train(tmp_path / "b", second))


def test_observed_pixels_are_seen(tmp_path: Path) -> None:
    """The law above is not kept by ignoring the images."""
    other = _bars(40, 0)
    other[:, 0] = 255 - other[:, 0]
    runs = [
        _train(tmp_path / "a", _data(tmp_path)),
        _train(tmp_path / "b", _data(tmp_path, train=other)),
    ]

    assert _weights(runs[0]) != _weights(runs[1])


@pytest.mark.parametrize("objective", ["miss-iwem", "miss-iwae", "vae-analytic"])
def test_images_that_are_all_hole_do_no_harm(objective: str, tmp_path: Path) -> None:
    """Images of which nothing was observed are trained on without a number that is not finite."""
    missing = np.zeros((40, 6, 6), bool)
    missing[::2] = True
    folder = _train(tmp_path / "run", _data(tmp_path, train_missing=missing), objective=objective)

    assert _all_finite(folder)


@pytest.mark.parametrize("missing", ["patches:9", "mcar:1"])
def test_nothing_observed_is_refused(missing: str, bars: str, tmp_path: Path) -> None:
    """Where no image has an observed pixel there is nothing to learn, and no run begins."""
    with pytest.raises(DataError, match=r"Expected train images of bars with .* got 40 without"):
        _train(tmp_path / "run", bars, missing=missing)
    assert not (tmp_path / "run").exists()


def test_data_set_smaller_than_a_batch(tmp_path: Path) -> None:
    """A whole data set may be one short batch."""
    data = _data(tmp_path, train=_bars(5, 0), validation=_bars(1, 1))
    folder = _train(tmp_path / "run", data, batch=100)

    assert [line["step"] for line in _metrics(folder)] == [1, 2]


def test_empty_validation_split_is_refused(tmp_path: Path) -> None:
    """A run that nothing could judge does not begin."""
    data = _data(tmp_path, validation=np.zeros((0, 6, 6), np.uint8))

    with pytest.raises(DataError, match="Expected at least one image in validation; got none"):
        _train(tmp_path / "run", data)


# Numbers that are not finite.


def test_divergence_keeps_the_last_good_state(bars: str, tmp_path: Path) -> None:
    """A learning rate that is far too large ends in a sentence and a state that is finite."""
    folder = tmp_path / "run"
    with pytest.raises(
        Diverged, match=r"not a finite number after step \d+ \(epoch \d+\).*smaller"
    ):
        _train(folder, bars, learning_rate=1e30, epochs=50)

    assert _all_finite(folder)
    assert _place(folder)["step"] % 3 == 0
    assert len(_metrics(folder)) in (_place(folder)["validated"], _place(folder)["validated"] + 1)


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_signal_in_the_step_that_diverges(
    bound: float, bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to stop does not make a bad state the one that is kept, even of a good bound."""
    folder, ascend, steps = tmp_path / "run", stepping.ascend, itertools.count()

    def diverge(objective: Any, model: Any, *arguments: Any, **settings: Any) -> Climbed:
        good = ascend(objective, model, *arguments, **settings)
        if next(steps) < 4:
            return good
        next(model.parameters()).grad.fill_(float("nan"))
        signal.raise_signal(signal.SIGINT)
        return replace(good, bound=torch.tensor(bound))

    monkeypatch.setattr(stepping, "ascend", diverge)
    what = "objective" if bound != -1 else "model"
    with pytest.raises(Diverged, match=f"The {what} is not a finite number after step 5"):
        _train(folder, bars)

    assert _all_finite(folder)
    assert _place(folder)["step"] == 3


def test_validation_that_is_not_finite(
    bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that validation cannot judge is no better one."""

    def nothing(_run: Run) -> Iterator[None]:
        yield
        return float("nan")

    monkeypatch.setattr(Run, "validate", nothing)
    with pytest.raises(Diverged, match="The validation bound is not a finite number after step 3"):
        _train(tmp_path / "run", bars)
    assert _metrics(tmp_path / "run") == []


# Recipes.


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_can_be_followed(name: str) -> None:
    """Every recipe that comes with the package is one."""
    assert isinstance(read_recipe(name), Recipe)


def test_recipe_files(tmp_path: Path) -> None:
    """A TOML file is read, a change goes before it, and a change to None is none."""
    (tmp_path / "mine.toml").write_text('data = "mnist"\nbatch = 7\nhidden = [5, 6]\n')
    recipe = read_recipe(str(tmp_path / "mine.toml"), batch=8, data=None, learning_rate=1)

    assert (recipe.data, recipe.batch, recipe.architecture.hidden) == ("mnist", 8, (5, 6))
    assert isinstance(recipe.learning_rate, float)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colour": 1}, r"Expected names of data, missing, .*; got colour\."),
        ({"image_shape": [1, 2, 3]}, r"Expected names of .*; got image_shape\."),
        ({"batch": "7"}, r"Expected batch as a whole number; got '7'\."),
        ({"batch": True}, r"Expected batch as a whole number; got True\."),
        ({"batch": 1.5}, r"Expected batch as a whole number; got 1\.5\."),
        ({"redraw": 1}, r"Expected redraw as true or false; got 1\."),
        ({"data": 1}, r"Expected data as a text; got 1\."),
        ({"learning_rate": "x"}, r"Expected learning_rate as a number; got 'x'\."),
        ({"hidden": [1, "x"]}, r"Expected hidden as whole numbers; got \(1, 'x'\)\."),
        ({"hidden": 5}, r"Expected hidden as whole numbers; got 5\."),
        ({"hidden": [0]}, r"Expected hidden widths of at least 1; got \(0,\)\."),
        ({"batch": 0}, r"Expected batch of at least 1; got 0\."),
        ({"latent": 0}, r"Expected latent of at least 1; got 0\."),
        ({"anneal_epochs": -1}, r"Expected anneal_epochs of at least 0; got -1\."),
        ({"learning_rate": 0}, r"Expected a positive learning_rate; got 0\.0\."),
        ({"learning_rate": float("nan")}, r"Expected a positive learning_rate; got nan\."),
        ({"objective": "gan"}, r"Expected an objective of vae, .* the last; got 'gan'\."),
        ({"objective": "vae,iwae"}, r"Expected an objective of vae, .* last; got 'vae,iwae'\."),
        ({"objective": "vae:50"}, r"Expected .* the epochs of all but the last; got 'vae:50'\."),
        ({"objective": "vae:x,iwae"}, r"several such as vae:50,iwae .*; got 'vae:x,iwae'\."),
        ({"objective": "vae:-1,iwae"}, r"several such as vae:50,iwae .*; got 'vae:-1,iwae'\."),
        ({"objective": "vae:5,gan"}, r"Expected an objective of vae, .*; got 'vae:5,gan'\."),
        ({"objective": "vae:5,"}, r"Expected an objective of vae, .*; got 'vae:5,'\."),
        ({"objective": ""}, r"Expected an objective of vae, .*; got ''\."),
        ({"way_back": 0}, r"Expected a way_back within \(0, 1\]; got 0\.0\."),
        ({"way_back": 1.5}, r"Expected a way_back within \(0, 1\]; got 1\.5\."),
        ({"way_back": float("nan")}, r"Expected a way_back within \(0, 1\]; got nan\."),
        ({"svi_rate": 0}, r"Expected a positive svi_rate; got 0\.0\."),
        ({"svi_steps": -1}, r"Expected svi_steps of at least 0; got -1\."),
        ({"weight_decay": -1}, r"Expected a weight_decay of at least 0; got -1\.0\."),
        ({"weight_decay": float("inf")}, r"Expected a weight_decay of at least 0; got inf\."),
        ({"proposal_variance": 0}, r"Expected a positive proposal_variance; got 0\.0\."),
        ({"upper": -1}, r"Expected upper of at least 0; got -1\."),
        ({"upper_hidden": [0]}, r"Expected upper_hidden widths of at least 1; got \(0,\)\."),
        ({"p_samples": "old"}, r"Expected p_samples of shared, fresh; got 'old'\."),
        ({"m_step": "old"}, r"Expected m_step of marginal, sampled; got 'old'\."),
        ({"decoder": "rnn"}, r"Expected decoder of mlp.*; got 'rnn'\."),
        ({"encoder": "rnn"}, r"Expected encoder of mlp.*; got 'rnn'\."),
        ({"p_step": "dreg", "imputations": 2}, r"Expected one imputation .*; got 2, False\."),
        ({"objective": "vae-analytic", "upper": 2}, r"Expected one stochastic layer .* upper 2\."),
        (
            {"objective": "miss-iwae", "p_step": "dreg"},
            r"Expected p_step slides with objective miss-iwae .*; got dreg\.",
        ),
        ({"objective": "vae:9,iwae", "m_step": "sampled"}, r"Expected m_step marginal .* sampled"),
        ({"objective": "iwem", "imputations": 4}, r"Expected imputations 1 with objective iwem"),
        ({"objective": "iwem", "first_pass": True}, r"Expected first_pass False .* got True"),
        (
            {"objective": "vae:50,iwae", "epochs": 50},
            r"Expected epochs beyond the 50 that come before .* vae:50,iwae; got 50\.",
        ),
        ({"svi_rate": 0.5}, r"Expected svi_rate 0\.1 .* svi_steps 0, .*; got 0\.5"),
        ({"svi_through": True}, r"Expected svi_through False .* svi_steps 0, .*; got True"),
        ({"missing": "rain"}, r"Expected a missingness of .*; got 'rain'\."),
        ({"missing": "patches:10"}, r"Expected .* from 0 to 9; got '?10'?\."),
    ],
)
def test_recipe_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    """The error names what was expected and what came."""
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(None, **changes)


def test_objectives_one_after_another() -> None:
    """Each is maximised for its epochs, the last to the end, and by its bound all is judged."""
    recipe = read_recipe(None, objective="vae:50, miss-iwem-woa:10,iwae", p_step="dreg")

    def named(objective: Objective) -> str:
        options: dict[str, Any] = {"p_step": "slides"}
        return next(n for n, row in OBJECTIVES.items() if replace(objective, **options) == row)

    at = {epoch: named(recipe.objective_in(epoch)) for epoch in (0, 49, 50, 59, 60, 10**6)}
    assert at == {
        0: "vae",
        49: "vae",
        50: "miss-iwem-woa",
        59: "miss-iwem-woa",
        60: "iwae",
        10**6: "iwae",
    }
    assert recipe.last_objective == recipe.objective_in(60)
    assert recipe.objective_in(0).p_step == "dreg"


def test_one_objective_is_that_of_every_epoch() -> None:
    """A recipe of one objective begins and ends with it, and with the options that it names."""
    recipe = read_recipe(
        None,
        objective="miss-iwem",
        p_samples="fresh",
        m_step="sampled",
        imputations=3,
        way_back=0.5,
        svi_steps=2,
        svi_rate=0.3,
        svi_through=True,
    )
    expected = replace(
        OBJECTIVES["miss-iwem"],
        p_samples="fresh",
        m_step="sampled",
        imputations=3,
        way_back=0.5,
        svi=Refinement(steps=2, rate=0.3, through=True),
    )

    assert recipe.objective_in(0) == recipe.objective_in(1499) == recipe.last_objective == expected
    assert read_recipe(None).last_objective.svi is None


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    """An unknown name is answered with those there are, a damaged file with what is wrong."""
    (tmp_path / "bad.toml").write_text("batch = = 3")

    with pytest.raises(RecipeError, match=r"\.toml file or one of .*static-mnist-miss-iwem.*'x'"):
        read_recipe("x")
    with pytest.raises(RecipeError, match=r"Expected a recipe in .*bad\.toml; got: Invalid value"):
        read_recipe(str(tmp_path / "bad.toml"))
    with pytest.raises(RecipeError, match=r"Expected a recipe in .*none\.toml; got: .*No such"):
        read_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(RecipeError, match=r"Expected a recipe in .*bad\.toml; got: JSONDecode"):
        stored_recipe(tmp_path / "bad.toml")


def test_other_images_are_refused(bars: str, tmp_path: Path) -> None:
    """A run goes on with the images that it began with, whatever is in the file by then."""
    folder = _train(tmp_path / "run", bars)
    _data(tmp_path, train=_bars(40, 7))

    with pytest.raises(RecipeError, match=r"Expected the images .* began with, of sha256 .*bars"):
        _train(folder, bars, resume=True)


def test_other_masks_are_refused(bars: str, tmp_path: Path) -> None:
    """Those of a file belong to a run as its images do."""
    masks = np.random.default_rng(0).random((2, 40, 6, 6)) < 0.3
    np.save(tmp_path / "masks.npy", masks[0])
    missing = f"file:{tmp_path / 'masks.npy'}"
    folder = _train(tmp_path / "run", bars, missing=missing)
    _train(folder, bars, missing=missing, resume=True)
    np.save(tmp_path / "masks.npy", masks[1])

    with pytest.raises(RecipeError, match=r"Expected the images and masks .* got .*masks\.npy"):
        _train(folder, bars, missing=missing, resume=True)


def test_damaged_state_is_named(bars: str, tmp_path: Path) -> None:
    """What is no state of a run is no reason to begin anew, nor for a traceback."""
    folder = _train(tmp_path / "run", bars)
    (folder / "state.safetensors").write_bytes(b"torn")

    with pytest.raises(RecipeError, match=r"Expected the state of a run in .*state\.safetensors"):
        _train(folder, bars, resume=True)


def test_folder_that_cannot_be_made(bars: str, tmp_path: Path) -> None:
    """The error names the folder, and why."""
    with pytest.raises(RecipeError, match=r"Expected a folder for the run; got .*bars\.npz/run"):
        _train(Path(bars) / "run", bars)


def test_folder_of_another_run_is_refused(bars: str, tmp_path: Path) -> None:
    """A run is neither overwritten nor gone on with by another recipe."""
    folder = _train(tmp_path / "run", bars)
    before = (folder / "state.safetensors").read_bytes()

    with pytest.raises(RecipeError, match=r"Expected a folder without a run; got .*--resume"):
        _train(folder, bars)
    with pytest.raises(RecipeError, match=r"another recipe\. Expected batch 16; got 8\. Expected"):
        _train(folder, bars, batch=8, seed=1, resume=True)
    with pytest.raises(RecipeError, match=r"Expected a folder for the run; got the file .*bars"):
        _train(Path(bars), bars)
    assert (folder / "state.safetensors").read_bytes() == before


def test_device_that_is_not_there(bars: str, tmp_path: Path) -> None:
    """A device that this machine lacks is refused by name."""
    with pytest.raises(RecipeError, match="Expected a device of this machine; got 'abacus': "):
        Run(tmp_path / "run", read_recipe(None, **TINY, data=bars), device="abacus")


# The command line.


def _words(data: str, **more: object) -> list[str]:
    said = {**TINY, "hidden": "8", "data": data, "device": "cpu", **more}
    return [f"--{name.replace('_', '-')}={value}" for name, value in said.items()]


def test_every_name_of_a_recipe_is_a_flag() -> None:
    """Each field of a recipe and each size of an architecture can be said, and is then as said."""
    options = vars(parser().parse_args([]))
    said = parser().parse_args(["--hidden=3,4", "--no-redraw", "--learning-rate=2", "--data=x"])

    assert {f.name for f in fields(Recipe)} - {"architecture"} < FIELDS.keys() < options.keys()
    assert all(options[name] is None for name in FIELDS)
    assert isinstance(said, Namespace)
    assert (said.hidden, said.redraw, said.learning_rate, said.data) == ((3, 4), False, 2.0, "x")
    assert "Importance samples of each image in a step. Default: 50." in " ".join(
        parser().format_help().split()
    )


def test_command_trains_in_a_folder_of_its_own(
    bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --out the run is in runs/, and what is said is a line an epoch and the end."""
    monkeypatch.chdir(tmp_path)
    status = main(_words(bars))
    said = capsys.readouterr().err.splitlines()

    assert status == 0
    assert _weights(Path("runs/bars-miss-iwem")) == _weights(_train(tmp_path / "same", bars))
    assert [line.partition(":")[0] for line in said] == ["epoch 1/2", "epoch 2/2", "Done"]
    assert "steps/s" in said[0]
    assert "left" in said[0]


def test_command_goes_on_without_a_recipe(bars: str, tmp_path: Path) -> None:
    """--resume needs only the folder; other flags must agree with it."""
    folder = _train(tmp_path / "run", bars)
    (folder / "state.safetensors").unlink()

    assert main(["--resume", "--out", str(folder), "--device=cpu"]) == 0
    assert _same(folder, _train(tmp_path / "whole", bars))
    assert main(["--resume", "--out", str(folder), "--batch=3"]) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Expected a RECIPE, or --data"),
        (["nothing-like-it"], "Expected a .toml file or one of"),
        (["--data=nowhere"], "got 'nowhere'"),
        (["--data=mnist", "--missing=rain"], "got 'rain'"),
        (["--data=mnist", "--threads=0"], "Expected threads of at least 1; got 0."),
        (["--data=mnist", "--seeds=0"], "Expected seeds of at least 1; got 0."),
        (
            ["--data=mnist", "--seeds=2", "--optimizer=muon"],
            "Expected optimizer adam with several seeds at once; got muon.",
        ),
        (
            ["--data=mnist", "--seeds=2", "--encoder=gated-conv"],
            "Expected networks mlp with several seeds at once; got gated-conv.",
        ),
        (["--data=mnist", "--optimizer=sgd"], "Expected optimizer of adam, muon; got 'sgd'."),
        (["--data=mnist", "--batch=0"], "Expected batch of at least 1; got 0."),
    ],
)
def test_command_that_cannot_be_followed(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A recipe or data that cannot be are one sentence and status 2."""
    monkeypatch.chdir(tmp_path)
    status = main(words)

    assert status == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_that_diverges(
    bars: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Divergence is one sentence and status 1."""
    out = tmp_path / "run"

    assert main([*_words(bars, learning_rate=1e30, epochs=50), "--out", str(out)]) == 1
    assert f"The last good state is kept in {out}" in capsys.readouterr().err


def test_terminal_shows_a_bar_with_rate(bars: str, tmp_path: Path) -> None:
    """On a terminal a bar shows the steps and how fast they are."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    recipe = read_recipe(None, **TINY, data=bars)
    train.train(tmp_path / "run", recipe, device="cpu", console=screen)
    shown = screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]

    assert "6/6" in shown
    assert "steps/s" in shown


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard itself
def test_curves_are_those_of_the_metrics(
    bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard shows each epoch once, after a stop too."""
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    with monkeypatch.context() as killing:
        _killed_in_step(killing, 5)
        with pytest.raises(Killed):
            _train(folder, bars)
    _train(folder, bars, resume=True)
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    bounds = [(event.step, event.value) for event in events.Scalars("validation_bound")]

    assert bounds == [
        (line["step"], pytest.approx(line["validation_bound"])) for line in _metrics(folder)
    ]


# Several seeds at once.


def _seeds(folder: Path, data: str, *, resume: bool = False, **changes: Any) -> list[Path]:
    """The folders of three runs that were trained together and have ended well."""
    recipe = read_recipe(None, **{**TINY, "data": data, **changes})
    train.train_seeds(folder, recipe, 3, resume=resume, device="cpu", console=_quiet())
    return [folder / f"seed-{seed}" for seed in range(3)]


def _assert_close(one: Path, other: Path) -> None:
    for (name, weight), same in zip(_state(one).items(), _state(other).values(), strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("p_samples", ["shared", "fresh"])
def test_seeds_together_end_as_each_alone(bars: str, tmp_path: Path, p_samples: str) -> None:
    """Weights, Adam's moments, the best model and the metrics are those of lone runs."""
    together = _seeds(tmp_path / "together", bars, epochs=3, p_samples=p_samples)

    for seed, folder in enumerate(together):
        alone = _train(tmp_path / f"{seed}", bars, epochs=3, p_samples=p_samples, seed=seed)
        _assert_close(folder, alone)
        assert _place(folder)["best_epoch"] == _place(alone)["best_epoch"]
        assert [line["validation_bound"] for line in _metrics(folder)] == pytest.approx(
            [line["validation_bound"] for line in _metrics(alone)], rel=1e-4
        )


def test_seeds_that_were_stopped_go_on_together(bars: str, tmp_path: Path) -> None:
    """A stop in the middle of an epoch, and one run that is ahead, change nothing."""
    whole = _seeds(tmp_path / "whole", bars, epochs=3)
    recipe = read_recipe(None, **{**TINY, "data": bars, "epochs": 3})
    with pytest.raises(Interrupted, match="after step 1") as stop:
        train.train_seeds(tmp_path / "parts", recipe, 3, minutes=0.0, device="cpu")
    ahead = Run(tmp_path / "parts/seed-1", replace(recipe, seed=1), device="cpu")
    ahead.begin()
    ahead.step()
    ahead.save()
    parts = _seeds(tmp_path / "parts", bars, resume=True, epochs=3)

    assert stop.value.status == train.MORE_TO_DO
    for one, other in zip(parts, whole, strict=True):
        _assert_close(one, other)


def test_seeds_that_were_killed_between_their_validations(
    bars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes on with the validation that it still owes, and all metrics are there."""
    whole = _seeds(tmp_path / "whole", bars, epochs=3)
    recipe, end, ended = read_recipe(None, **{**TINY, "data": bars, "epochs": 3}), Run.end_epoch, 0

    def killed(run: Run) -> Stages[Metrics]:
        nonlocal ended
        ended += 1
        if ended == 2:
            raise Killed
        return end(run)

    with monkeypatch.context() as patched:
        patched.setattr("model.run.SAVE_EVERY", 0.0)
        patched.setattr(Run, "end_epoch", killed)
        with pytest.raises(Killed):
            train.train_seeds(tmp_path / "parts", recipe, 3, device="cpu", console=_quiet())
    parts = _seeds(tmp_path / "parts", bars, resume=True, epochs=3)

    for one, other in zip(parts, whole, strict=True):
        _assert_close(one, other)
        for line, same in zip(_metrics(one), _metrics(other), strict=True):
            assert line == pytest.approx(same, rel=1e-3)


def test_command_trains_seeds(
    bars: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--seeds makes a checkpoint for each, and says so."""
    status = main([*_words(bars, seed=4), "--out", str(tmp_path / "runs"), "--seeds=2"])

    assert status == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["seed-4", "seed-5"]
    assert capsys.readouterr().err.count("Done: ") == 2


# The polish.


def test_polished_run_is_the_best_model_with_another_encoder(bars: str, tmp_path: Path) -> None:
    """After the last epoch the encoder alone is trained on, and the card says for how long."""
    plain = checkpoint.read(_train(tmp_path / "plain", bars) / "checkpoint")
    polished = checkpoint.read(_train(tmp_path / "run", bars, polish_steps=3) / "checkpoint")
    before, after = plain.model.state_dict(), polished.model.state_dict()

    assert polished.card.training["polish_steps"] == 3
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == name.startswith("decoder")


@pytest.mark.parametrize("redraw", [False, True])
def test_polish_that_is_stopped_goes_on_from_there(
    bars: str, tmp_path: Path, *, redraw: bool
) -> None:
    """However often it is stopped no step is taken twice, and the weights are the same."""
    settings: dict[str, Any] = {"polish_steps": 3, "redraw": redraw}
    folder, climb, climbed = tmp_path / "run", refit.ascend, list[Noise]()
    with pytest.MonkeyPatch.context() as monkeypatch:

        def interrupted(
            objective: Objective, model: Any, images: Any, noise: Noise, **settings: Any
        ) -> Climbed:
            climbed.append(noise)
            signal.raise_signal(signal.SIGINT)
            return climb(objective, model, images, noise, **settings)

        monkeypatch.setattr(refit, "ascend", interrupted)
        for again in range(3):
            with pytest.raises(Interrupted, match="after step 6"):
                _train(folder, bars, **settings, resume=again > 0)
    resumed = _train(folder, bars, **settings, resume=True)

    assert len(climbed) == len(set(climbed)) == 3 * 2
    assert [line.get("polish_steps") for line in _ledger(folder)] == [1, 2, 3, 3]
    assert not (folder / "polish.safetensors").exists()
    assert _weights(resumed) == _weights(_train(tmp_path / "whole", bars, **settings))


def test_polish_that_is_killed_after_it_leaves_nothing(bars: str, tmp_path: Path) -> None:
    """Where only its file was left over, going on removes that, and the card is as it was."""
    folder = _train(tmp_path / "run", bars, polish_steps=3)
    card = (folder / "checkpoint" / "card.json").read_bytes()
    (folder / "polish.safetensors").write_bytes(b"left over")
    _train(folder, bars, polish_steps=3, resume=True)

    assert not (folder / "polish.safetensors").exists()
    assert (folder / "checkpoint" / "card.json").read_bytes() == card
