"""Plots: how much the ELBO and Q̂ vary along training, and a checkpoint's diagnostics.

They are drawn from what is on disk, the metrics of what was run and the numbers of a card.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["SUFFIX", "diagnostics", "variances"]

SUFFIX = ".metrics.jsonl"
"""What the metrics of a cell are called after its name."""
INCHES = (5.0, 4.0)
LOWEST = 0.1
WIDEST = 2.0


def variances(results: Path, path: Path) -> None:
    """Writes a PNG with a panel a row of the tables and a colour a column of it.

    The lines of a column's schedules are ever thinner. A solid line is the variance of an image's
    ELBO as an estimate from its particles, and a dashed one that of Q̂ (by the delta method).
    Where nothing was run nothing is written.
    """
    rows: dict[str, list[Path]] = defaultdict(list)
    for metrics in sorted(results.glob(f"*{SUFFIX}")):
        rows[metrics.name.split(".")[0]].append(metrics)
    if not rows:
        return
    width, height = INCHES
    figure = Figure((width * len(rows), 1.5 * height), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False, sharex=True, sharey=True)[0]
    columns = sorted({_column(cell) for cells in rows.values() for cell in cells})
    for panel, (row, cells) in zip(panels, rows.items(), strict=True):
        panel.set(title=row, xlabel="epoch", xscale="log", yscale="log")
        drawn = Counter[str]()
        for cell in cells:
            column = _column(cell)
            drawn[column] += 1
            colour = colormaps["tab20"](columns.index(column))
            _draw(panel, cell, color=colour, linewidth=WIDEST / drawn[column])
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    panels[0].set_ylabel("variance, nats² (solid: ELBO, dashed: Q̂)")
    panels[0].set_ylim(bottom=LOWEST)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _column(cell: Path) -> str:
    return cell.name.split(".")[1]


def _draw(panel: Axes, cell: Path, **style: Any) -> None:
    epochs = [json.loads(line) for line in cell.read_text().splitlines()]
    at = [epoch["epoch"] + 1 for epoch in epochs]
    name = cell.name.removesuffix(SUFFIX).split(".", 1)[1]
    panel.plot(at, [e["elbo_variance"] for e in epochs], label=name, **style)
    panel.plot(at, [e["q_hat_variance"] for e in epochs], "--", **style)


def diagnostics(found: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a panel each for calibration, ranks, latents and percentiles.

    Takes the diagnostics of a card. A dashed line is where everything would be calibrated.
    """
    width, height = INCHES
    figure = Figure((2 * width, 2 * height), layout="constrained")
    (curve, ranks), (latents, percentiles) = figure.subplots(2, 2)
    for each in found["calibration"]:
        _calibrated(curve, ranks, each)
    curve.plot([0, 1], [0, 1], "k--", linewidth=1)
    curve.set(title="Missing pixels", xlabel="predicted probability", ylabel="came true")
    ranks.set(title="Ink of the truth among 99 draws", xlabel="rank, in bins")
    ranks.set_ylabel("share of images")
    ranks.axhline(1 / len(found["calibration"][0]["rank_counts"]), color="k", linestyle="--")
    used = found["divergences"]
    latents.bar(range(len(used)), sorted(used, reverse=True))
    latents.set(title=f"{found['active_units']} active latents", xlabel="latent")
    latents.set_ylabel("KL(q ‖ p), nats")
    for name in ("as they are", "turned") if "anomaly" in found else ():
        shares = sorted(found["anomaly"][name])
        percentiles.plot(shares, [(i + 0.5) / len(shares) for i in range(len(shares))], label=name)
    percentiles.plot([0, 1], [0, 1], "k--", linewidth=1)
    percentiles.set(title="Percentiles among held-out images", xlabel="percentile")
    percentiles.set_ylabel("share of images below")
    for panel in (curve, ranks, percentiles):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _calibrated(curve: Axes, ranks: Axes, each: dict[str, Any]) -> None:
    name, counts = f"{each['mask']}, {each['of']}", each["rank_counts"]
    if "predicted" in each:
        error = each["expected_calibration_error"]
        curve.plot(each["predicted"], each["came_true"], ".-", label=f"{name}, error {error}")
    shares = [count / sum(counts) for count in counts]
    ranks.stairs(shares, label=f"{name}, p = {each['rank_p_value']}")
