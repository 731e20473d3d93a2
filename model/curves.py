"""How much the ELBO and Q̂ vary along training, drawn from the metrics of what was run."""

import json
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["SUFFIX", "variances"]

SUFFIX = ".metrics.jsonl"
"""What the metrics of a cell are called after its name."""
INCHES = (5.0, 4.0)
LOWEST = 0.1


def variances(results: Path, path: Path) -> None:
    """Writes a PNG with a panel a row of the tables and a colour an objective.

    A solid line is the variance of an image's ELBO as an estimate from its particles, and a
    dashed one that of Q̂ (by the delta method). Where nothing was run nothing is written.
    """
    rows: dict[str, list[Path]] = defaultdict(list)
    for metrics in sorted(results.glob(f"*{SUFFIX}")):
        rows[metrics.name.split(".")[0]].append(metrics)
    if not rows:
        return
    width, height = INCHES
    figure = Figure((width * len(rows), height), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for panel, (row, cells) in zip(panels, rows.items(), strict=True):
        panel.set(title=row, xlabel="epoch", yscale="log")
        for index, cell in enumerate(cells):
            _draw(panel, cell, f"C{index}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    panels[0].set_ylabel("variance, nats² (solid: ELBO, dashed: Q̂)")
    panels[0].set_ylim(bottom=LOWEST)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw(panel: Axes, cell: Path, colour: str) -> None:
    epochs = [json.loads(line) for line in cell.read_text().splitlines()]
    at = [epoch["epoch"] + 1 for epoch in epochs]
    name = cell.name.removesuffix(SUFFIX).split(".", 1)[1]
    panel.plot(at, [e["elbo_variance"] for e in epochs], colour, label=name)
    panel.plot(at, [e["q_hat_variance"] for e in epochs], f"{colour}--")
