"""Several processes that train one model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model.recipe import RecipeError, read_recipe
from model.run import Run
from model.team import Team

ROOT = Path(__file__).parents[1]
MEAN = """
import sys, torch
from torch import nn
from model.team import Team
team = Team.joined()
weight, untouched = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
weight.grad = torch.tensor([1.0, 2.0, 3.0]) * (1 + team.rank)
team.average_gradients([weight, untouched], share=[0.25, 0.75][team.rank])
assert weight.grad.tolist() == [1.75, 3.5, 5.25], weight.grad
assert untouched.grad is None
assert team.total(torch.tensor([1.0 + team.rank])).item() == 3
assert team.any(team.rank == 1, False) == [True, False]
assert team.part(torch.arange(5)).tolist() == [[0, 2, 4], [1, 3]][team.rank]
assert team.leads == (team.rank == 0)
team.wait()
Team.disband()
"""


def _together(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs two processes of one team on this machine."""
    place = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *place, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_gradients_are_averaged_by_the_share_of_the_images(tmp_path: Path) -> None:
    """Over two processes: means of gradients, sums, votes, and parts of a batch."""
    script = tmp_path / "mean.py"
    script.write_text(MEAN)
    done = _together(str(script))

    assert done.returncode == 0, done.stderr


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    """Images of 6x6 pixels with a bar in one of six places."""
    path, generator = tmp_path / "bars.npz", np.random.default_rng(0)
    images = {name: np.zeros((n, 6, 6), np.uint8) for name, n in (("train", 40), ("test", 8))}
    for part in images.values():
        part[np.arange(len(part)), generator.integers(6, size=len(part))] = 1
    np.savez(path, train=images["train"], validation=images["test"], test=images["test"])
    return path


def test_two_processes_that_are_stopped_go_on_to_the_same_weights(
    bars: Path, tmp_path: Path
) -> None:
    """A run of a team is left and resumed as one of a process is; one of them alone speaks."""
    words = ["-m", "model.train", f"--data={bars}", "--device=cpu", "--batch=16", "--hidden=8"]
    words += ["--latent=2", "--epochs=3", "--particles=3", "--missing=patches:3"]
    whole = _together(*words, f"--out={tmp_path / 'whole'}")
    stopped = _together(*words, f"--out={tmp_path / 'parts'}", "--minutes=0")
    resumed = _together(*words, f"--out={tmp_path / 'parts'}", "--resume")

    assert whole.returncode == resumed.returncode == 0, whole.stderr + resumed.stderr
    assert "Stopped after step 1." in stopped.stderr
    assert whole.stderr.count("Done: ") == 1
    weights = [
        load_file(tmp_path / run / "checkpoint/weights.safetensors") for run in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_team_of_one_leaves_gradients_alone() -> None:
    """A process alone averages nothing and asks nobody."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 2.0])
    team = Team()
    team.average_gradients([weight], share=0.5)

    assert weight.grad.tolist() == [1.0, 2.0]
    assert team.any(True, False) == [True, False]  # noqa: FBT003


def test_a_batch_is_never_smaller_than_the_team(bars: Path, tmp_path: Path) -> None:
    """Where a process would get no image of some batch, the sizes are named."""
    recipe = read_recipe(None, data=str(bars), batch=13)
    with pytest.raises(RecipeError, match="an image for each of 2 processes; got one of 1"):
        Run(tmp_path / "run", recipe, device="cpu", team=Team(rank=0, size=2))
