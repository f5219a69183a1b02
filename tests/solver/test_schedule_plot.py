from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from dinoengine.config import get_cfg
from dinoengine.solver.report import schedule_values
from dinoengine.solver.schedule_plot import plot_schedules

matplotlib_figure = pytest.importorskip("matplotlib.figure")
COLUMNS = schedule_values(get_cfg(), nn.Linear(1, 1), range(0, 125000, 2500))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    made: list[Any] = []

    class Noting(matplotlib_figure.Figure):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(matplotlib_figure, "Figure", Noting)
    return made


def test_each_schedule_is_drawn_once_with_its_values_and_labelled_axes(tmp_path: Path, figures: list[Any]) -> None:
    path = tmp_path / "s.png"
    plot_schedules(COLUMNS, str(path), "title", {"warm-up ends": 12500})
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= 1000
    (figure,) = figures
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in panels] == [
        "learning rate before layer factors",
        "weight decay",
        "teacher momentum",
        "teacher temperature",
    ]
    assert all(axes.get_xlabel() == "iteration" for axes in panels)
    drawn = [panels[0].lines[0], panels[0].lines[1], *(axes.lines[0] for axes in panels[1:])]
    names = ["lr", "last_layer_lr", "weight_decay", "teacher_momentum", "teacher_temp"]
    for line, name in zip(drawn, names, strict=True):
        assert list(line.get_ydata()) == COLUMNS[name]
        assert list(line.get_xdata()) == COLUMNS["iteration"]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["lr", "last_layer_lr"]
    assert panels[0].texts[0].get_text() == "warm-up ends 12,500"


def test_a_schedule_of_your_own_gets_a_panel_and_an_empty_one_is_hidden(tmp_path: Path, figures: list[Any]) -> None:
    columns = {"iteration": [0, 1], "lr": [0.0, 0.0], "teacher_temp": [1.0, 1.0], "dropout": [0.1, 0.2]}
    plot_schedules(columns, str(tmp_path / "s.png"), "title", {})
    visible = [axes.get_ylabel() for axes in figures[0].axes if axes.get_visible()]
    assert visible == ["learning rate before layer factors", "teacher temperature", "dropout"]


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png; got 's\.pdf'"):
        plot_schedules(COLUMNS, "s.pdf", "title", {})


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'dinoengine\[plot\]'"):
        plot_schedules(COLUMNS, str(tmp_path / "s.png"), "title", {})
    assert list(tmp_path.iterdir()) == []
