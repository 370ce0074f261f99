"""The figures that a module draws, for tests that look into them."""

import pytest
from matplotlib.figure import Figure


def record_figures(monkeypatch: pytest.MonkeyPatch, module) -> list[Figure]:
    """A list that every figure of the module joins when it is made."""
    figures = []

    class RecordedFigure(Figure):
        def __init__(self, **options):
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr(module, "Figure", RecordedFigure)
    return figures
