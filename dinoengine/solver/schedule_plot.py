"""A picture of the schedules of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dinoengine.utils.file_writing import atomic_write


def plot_schedules(columns: Mapping[str, Sequence[float]], path: str, title: str, marks: Mapping[str, int]) -> None:
    """Write a PNG: learning rates in one panel, every other schedule in a panel of its own, over the iterations.

    Args:
        columns: from ``schedule_values``, densely sampled.
        path: a file ending in .png; replaced when the picture is complete.
        title: above the panels.
        marks: text -> iteration, drawn as vertical lines in the panel of the learning rates.

    Raises:
        ValueError: for another ending, or without matplotlib.
    """
    if not path.lower().endswith(".png"):
        raise ValueError(f"The picture is a PNG, so its name must end in .png; got {path!r}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("Plotting needs matplotlib: pip install 'dinoengine[plot]'.") from None
    rates = [name for name in columns if name.endswith("lr")]
    others = [name for name in columns if name not in ("iteration", *rates)]
    rows = -(-(1 + len(others)) // 2)
    figure = Figure(
        figsize=(11, 3.4 * rows), layout="constrained"
    )  # a Figure of its own: pyplot would look for a display
    panels = figure.subplots(rows, 2, squeeze=False).flatten().tolist()
    for name in rates:
        style = {"linewidth": 1.8} if name == "lr" else {"linewidth": 1.2, "linestyle": "--"}
        panels[0].plot(columns["iteration"], columns[name], label=name, **style)
    panels[0].set_ylabel("learning rate before layer factors")
    panels[0].set_ylim(0, 1.3 * max(max(columns[name]) for name in rates) or 1)  # room for the marks above the curve
    for number, (text, iteration) in enumerate(marks.items()):
        panels[0].axvline(iteration, color="0.55", linewidth=0.8, linestyle=":", zorder=0)
        place = {"xy": (iteration, 0.94 - 0.07 * number), "xycoords": panels[0].get_xaxis_transform()}
        side, align = (4, "left") if 2 * iteration <= columns["iteration"][-1] else (-4, "right")  # inside the panel
        offset = {"xytext": (side, 0), "textcoords": "offset points", "ha": align}
        panels[0].annotate(f"{text} {iteration:,}", **place, **offset, fontsize=9)
    panels[0].legend(loc="upper right", frameon=False)
    for panel, name in zip(panels[1:], others, strict=False):
        panel.plot(columns["iteration"], columns[name], linewidth=1.8)
        panel.set_ylabel(name.replace("_", " ").replace("temp", "temperature"))
    for panel in panels[len(others) + 1 :]:
        panel.set_visible(False)
    for panel in panels:
        panel.set_xlabel("iteration")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.ticklabel_format(axis="y", useOffset=False, style="plain")
        panel.grid(alpha=0.25)
        panel.margins(x=0.01)
    figure.suptitle(title)
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
