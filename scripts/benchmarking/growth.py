"""How the parts of a step grow with queries, images, layers and classes, each alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .sizes import SIZES, Size
from .steps import step_parts

BASE = replace(SIZES["shapes"], batch=4, queries=100, layers=3, classes=91)
CURVES = {
    "queries": (100, 300, 900),
    "batch": (1, 4, 8, 16, 32),
    "layers": (1, 2, 3, 6),
    "classes": (3, 91, 365),
}


def growth_curves(base: Size = BASE, curves: dict = CURVES, rounds: int = 3, precision: str = "no") -> dict:
    """For each quantity its values, the median seconds of every part, and each part's exponent.

    The exponent is the slope of log seconds over log quantity between the two largest values, where the constant part
    of the cost matters least.
    """
    found = {}
    for quantity, values in curves.items():
        rows = [step_parts(replace(base, **{quantity: value}), precision, rounds) for value in values]
        parts = {part: [float(np.median([one[part] for one in row])) for row in rows] for part in rows[0][0]}
        span = np.log(values[-1] / values[-2])
        exponents = {
            part: float(np.log(seconds[-1] / seconds[-2]) / span)
            for part, seconds in parts.items()
            if min(seconds[-2:]) > 0
        }
        found[quantity] = {"values": list(values), "seconds": parts, "exponents": exponents}
    return found


def format_growth(curves: dict) -> str:
    """Markdown: one table a quantity, the parts by their share at its largest value."""
    text = []
    for quantity, curve in curves.items():
        text += ["", f"| ms, by {quantity} | " + " | ".join(map(str, curve["values"])) + " | exponent |"]
        text.append("|---" * (len(curve["values"]) + 2) + "|")
        for part, seconds in sorted(curve["seconds"].items(), key=lambda item: -item[1][-1]):
            exponent = curve["exponents"].get(part)
            cells = [f"{1e3 * value:.1f}" for value in seconds] + ["" if exponent is None else f"{exponent:.2f}"]
            text.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def draw_growth(curves: dict, path: Path) -> None:
    """One panel a quantity, both axes logarithmic."""
    figure = Figure(figsize=(4.2 * len(curves), 4.4), layout="constrained", dpi=120)
    for axes, (quantity, curve) in zip(np.ravel(figure.subplots(1, len(curves))), curves.items(), strict=True):
        for part, seconds in curve["seconds"].items():
            whole = {"color": "black", "linewidth": 2} if part == "step" else {"marker": ".", "linewidth": 1}
            axes.loglog(curve["values"], [1e3 * value for value in seconds], label=part, **whole)
        axes.set_xlabel(quantity)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, metadata={"Software": None})
