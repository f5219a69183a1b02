#!/usr/bin/env python
"""A picture of accuracies over time: of runs, from their metrics.json, and of others, from given points.

    python benchmarks/accuracy_curves.py --out docs/images/fashion_mnist.png --images-per-iter 128 \
        --runs "cpu.yaml, three seeds=output/s0,output/s1,output/s2" --runs "cpu_long.yaml=output/long" \
        --points "lightly's DINO=0:68.9,500:71.6" --level "raw pixels=86.05"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dinoengine.utils.console import run_tool

Curve = list[tuple[float, float]]


def curve_of_run(folder: str, metric: str) -> Curve:
    """(iterations done, value) of each evaluation of a run, in order.

    Raises:
        ValueError: if there is none.
    """
    rows = [json.loads(line) for line in (Path(folder) / "metrics.json").read_text(encoding="utf-8").splitlines()]
    found = {row["iteration"]: row[metric] for row in rows if row.get(metric) is not None}
    if not found:
        raise ValueError(f"{folder}/metrics.json has no {metric!r}.")
    last = max(row["iteration"] for row in rows)
    # The final evaluation stands at MAX_ITER, the others at the last iteration that was done; that at the start at 0.
    return [(i if i in (0, last) else i + 1, value) for i, value in sorted(found.items())]


def parse_points(text: str) -> Curve:
    return [(float(x), float(y)) for x, _, y in (point.partition(":") for point in text.split(","))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the picture, .png or .svg")
    parser.add_argument("--metric", default="knn/top1_k20")
    parser.add_argument("--images-per-iter", type=int, required=True, help="SOLVER.IMS_PER_BATCH of the runs")
    parser.add_argument(
        "--runs", action="append", default=[], metavar="NAME=DIR[,DIR...]", help="OUTPUT_DIRs; may repeat"
    )
    parser.add_argument("--points", action="append", default=[], metavar="NAME=ITER:VALUE[,...]")
    parser.add_argument("--level", action="append", default=[], metavar="NAME=VALUE", help="a horizontal line")
    args = parser.parse_args(argv)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    axes: Any = figure.add_subplot()
    for number, (name, _, folders) in enumerate(text.partition("=") for text in args.runs):
        for seed, folder in enumerate(folders.split(",")):
            _draw(axes, args, curve_of_run(folder, args.metric), name if seed == 0 else None, f"C{number}", "-")
    for number, (name, _, points) in enumerate((text.rpartition("=") for text in args.points), len(args.runs)):
        _draw(axes, args, parse_points(points), name, f"C{number}", "--")
    for name, _, value in (text.partition("=") for text in args.level):
        axes.axhline(float(value), color="0.4", linewidth=1)
        axes.annotate(
            name, (0, float(value)), (4, 3), ("axes fraction", "data"), "offset points", ha="left", color="0.3"
        )
    axes.set_xlabel("training images seen, thousands")
    axes.set_ylabel("top-1, %")
    axes.margins(y=0.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(args.out)
    return 0


def _draw(axes: Any, args: argparse.Namespace, curve: Curve, name: str | None, colour: str, style: str) -> None:
    x = [iterations * args.images_per_iter / 1000 for iterations, _ in curve]
    axes.plot(x, [y for _, y in curve], style, color=colour, marker=".", label=name, linewidth=1.3)


if __name__ == "__main__":
    run_tool(main)
