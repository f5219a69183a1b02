"""The page that a check of a dataset ends in: one HTML file that needs nothing else, pictures included."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from dinoengine.data.dataset_check import NOT_IN_A_GROUP, Duplicates, Inspected, Leaks
from dinoengine.data.dataset_findings import BLANK, HUGE, TINY, Finding
from dinoengine.data.decode import to_format
from dinoengine.data.inspection import SHOWN_CHANNELS, picture_of
from dinoengine.utils.printable import printable, printable_lines

_THUMBNAIL_PX = 112
_MOST_GROUPS = 6
_MOST_PER_GROUP = 4
_NUM_EXAMPLES = 5
_NUM_BINS = 24

_STYLE = """
:root { color-scheme: light dark; --text: #222; --quiet: #666; --line: #ddd; --box: #f4f4f4; --page: #fff; --bar: #4a7ab0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --quiet: #999; --line: #3a3a3a; --box: #262626; --page: #181818; --bar: #6b9bd1; }
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em; }
body { color: var(--text); background: var(--page); }
h1 { font-size: 1.5em; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 2em 0 .5em; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } td, th { padding: .3em 1em .3em 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr + tr td { border-top: 1px solid var(--line); }
.findings { width: 100%; } .findings td:last-child { width: 45%; padding-right: 0; }
.tag { font-size: .75em; border: 1px solid var(--quiet); border-radius: .4em; padding: 0 .4em; white-space: nowrap; }
pre { background: var(--box); padding: .7em; white-space: pre-wrap; overflow-wrap: anywhere; }
small { display: block; color: var(--quiet); overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1em 2em; } figure { margin: 0; }
figcaption { color: var(--quiet); font-size: .85em; }
.group { display: flex; flex-wrap: wrap; align-items: flex-end; gap: .6em 1.2em; margin: .6em 0 1.2em; }
.group figure { width: 150px; } .group figcaption { overflow-wrap: anywhere; font-size: .75em; min-height: 4.5em; }
svg text { font: 11px sans-serif; fill: var(--quiet); } svg rect { fill: var(--bar); }
@media (max-width: 40em) {
  .charts { grid-template-columns: 1fr; }
  .findings tr { display: grid; grid-template-columns: 4em 1fr; border-top: 1px solid var(--line); }
  .findings tr:first-child { display: none; } .findings td { border: 0 !important; }
  .findings td:nth-child(2) { text-align: left; } .findings td:nth-child(n+3) { grid-column: 2; width: auto; }
}
"""


NOT_SHOWN = (
    f"Images of other than {' or '.join(map(str, SHOWN_CHANNELS))} channels have no perceptual hash: near duplicates and "
    "near leaks were not looked for, and none is shown."
)


class Page(NamedTuple):
    """What the page shows besides the findings.

    Attributes:
        title: the dataset string.
        other: that of the dataset it was compared with; empty without one.
        speed: lines about decoding and the loader.
        quarantined: names of the findings that are in the quarantine list.
    """

    title: str
    other: str
    speed: Sequence[str]
    quarantined: Collection[str]


def render_page(
    page: Page,
    inspected: Inspected,
    found: Sequence[Finding],
    duplicates: Duplicates,
    leaks: Leaks | None,
    other: Inspected | None,
) -> str:
    """The page as HTML in ASCII."""
    num_images = len(inspected.rows)
    parts = [
        f"<h1>{_text(page.title)}</h1>",
        f"<p>{num_images:,} images, of which {inspected.num_good:,} can be read."
        + (f" Compared with {_text(page.other)}." if page.other else "")
        + "</p>",
        "<h2>Findings</h2>",
        _findings_table(page, inspected, found),
    ]
    if not (duplicates.is_complete and (leaks is None or leaks.is_complete)):
        parts.append("<p>So many images look alike that not every pair of them was compared.</p>")
    if not is_shown(inspected):
        parts.append(f"<p>{_text(NOT_SHOWN)}</p>")
    parts += ["<h2>For the config</h2>", f"<pre>{_lines(pixel_statistics(inspected))}</pre>"]
    parts += ["<h2>Speed</h2>", f"<pre>{_lines(chr(10).join(page.speed))}</pre>", "<h2>Sizes</h2>"]
    parts += [_charts(inspected), "<h2>Kinds</h2>", _kinds_table(inspected)]
    parts += _pictures(inspected, found, duplicates, leaks, other)
    body = "\n".join(parts)
    page_text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(page.title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
    return page_text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def is_shown(inspected: Inspected) -> bool:
    """Whether its images can be looked at: pictures, or arrays of SHOWN_CHANNELS."""
    return inspected.channels is None or inspected.channels.count in SHOWN_CHANNELS


def pixel_statistics(inspected: Inspected) -> str:
    """MODEL.PIXEL_MEAN and MODEL.PIXEL_STD as lines of a config; for grey images of one channel as well."""
    if not inspected.num_good:
        return "no image can be read"

    def line(values: np.ndarray) -> str:
        return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"

    lines = [
        "MODEL:",
        f"  PIXEL_MEAN: {line(inspected.mean)}",
        f"  PIXEL_STD: {line(inspected.std)}",
    ]
    if set(inspected.num_of_mode()) <= {"L", "1", "I;16", "I;16B"}:
        lines += [
            "",
            "all images are grey; with INPUT.FORMAT L:",
            f"  PIXEL_MEAN: {line(inspected.mean[:1])}",
            f"  PIXEL_STD: {line(inspected.std[:1])}",
        ]
    return "\n".join(lines)


def _findings_table(page: Page, inspected: Inspected, found: Sequence[Finding]) -> str:
    rows = ['<tr><th class="n">images</th><th></th><th>what</th><th>the first of them</th></tr>']
    for finding in found:
        count = len(finding.indices)
        names = "".join(f"<small>{_example(inspected, i)}</small>" for i in finding.indices[:_NUM_EXAMPLES].tolist())
        listed = ' <span class="tag">in quarantine.txt</span>' if count and finding.name in page.quarantined else ""
        share = f"{count / len(inspected.rows):.2%}" if count else ""
        rows.append(
            f'<tr><td class="n">{count:,}</td><td class="n">{share}</td><td><b>{finding.name}</b>{listed} '
            f"{_text(finding.meaning)}</td><td>{names}</td></tr>"
        )
    return f'<table class="findings">{"".join(rows)}</table>'


def _example(inspected: Inspected, index: int) -> str:
    name, cause = _text(inspected.dataset.describe(index)), inspected.causes.get(index)
    return name if cause is None else f"{name}: <i>{_text(cause)}</i>"


def _kinds_table(inspected: Inspected) -> str:
    kinds = [(f"mode {mode}", count) for mode, count in inspected.num_of_mode().items()]
    kinds += [(f"bad: {kind}", count) for kind, count in inspected.kinds().most_common()]
    rows = "".join(f'<tr><td>{_text(name)}</td><td class="n">{count:,}</td></tr>' for name, count in kinds)
    if inspected.channels is not None:
        low, high = inspected.channels.value_range
        return f"<table>{rows}</table><p>Statistics are of (stored - {low:g}) / ({high:g} - {low:g}), cut to 0..1.</p>"
    return (
        f"<table>{rows}</table><p>Every mode is converted to INPUT.FORMAT; dinoengine/data/decode.py says how "
        "(transparency is laid on black, 16 bits become 8).</p>"
    )


def _charts(inspected: Inspected) -> str:
    good = inspected.rows[inspected.is_good]
    if not len(good):
        return ""
    width, height = good["width"].astype(float), good["height"].astype(float)
    charts = [
        _histogram(np.minimum(width, height), "shorter side, pixels"),
        _histogram(width / height, "width / height"),
        _histogram(width * height / 1e6, "megapixels"),
    ]
    if good["num_bytes"].any():
        charts.append(_histogram(np.maximum(1, good["num_bytes"]) / 1e3, "file size, kB"))
    return f'<div class="charts">{"".join(charts)}</div>'


def _histogram(values: np.ndarray, title: str) -> str:
    """Of positive values, on a logarithmic scale."""
    counts, edges = np.histogram(np.log(values), bins=_NUM_BINS)
    wide, high = 440, 120
    bar = wide / _NUM_BINS
    bars = "".join(
        f'<rect x="{i * bar:.1f}" y="{high - high * n / counts.max():.1f}" width="{bar - 1:.1f}" '
        f'height="{high * n / counts.max():.1f}"><title>{n:,}</title></rect>'
        for i, n in enumerate(counts.tolist())
    )
    ticks = ""
    for place in (0, _NUM_BINS // 2, _NUM_BINS):
        anchor = {0: "start", _NUM_BINS: "end"}.get(place, "middle")
        ticks += f'<text x="{place * bar:.1f}" y="{high + 14}" text-anchor="{anchor}">{np.exp(edges[place]):.3g}</text>'
    note = f"{title} (median {np.median(values):.4g}, {values.min():.4g} to {values.max():.4g}; logarithmic scale)"
    return f'<figure><svg viewBox="0 0 {wide} {high + 18}">{bars}{ticks}</svg><figcaption>{note}</figcaption></figure>'


def _pictures(
    inspected: Inspected, found: Sequence[Finding], duplicates: Duplicates, leaks: Leaks | None, other: Inspected | None
) -> list[str]:
    """Some images of each finding that eyes can judge."""
    if not is_shown(inspected):
        return []
    parts: list[str] = []
    if leaks is not None and other is not None:
        for title, pairs in (("Leaks", leaks.exact), ("Near leaks", leaks.near)):
            groups = [[(inspected, i), (other, j)] for i, j in list(pairs.items())[:_MOST_GROUPS]]
            parts += _section(f"{title}: here, and in the other dataset", groups)
    parts += _section("Exact duplicates", _members(inspected, duplicates.exact_group))
    parts += _section("Near duplicates", _members(inspected, _without_exact_copies(duplicates)))
    for finding in found:
        if finding.name in (BLANK, TINY, HUGE) and len(finding.indices):
            some = finding.indices[:_MOST_PER_GROUP].tolist()
            parts += _section(finding.name.capitalize(), [[(inspected, i) for i in some]])
    return parts


def _without_exact_copies(duplicates: Duplicates) -> np.ndarray:
    """``near_group`` without the groups whose members are all copies of one image."""
    members = np.flatnonzero(duplicates.near_group != NOT_IN_A_GROUP)
    near, exact = duplicates.near_group[members], duplicates.exact_group[members]
    lowest = np.full(near.max(initial=0) + 1, exact.max(initial=0))
    highest = np.full_like(lowest, NOT_IN_A_GROUP)
    np.minimum.at(lowest, near, exact)
    np.maximum.at(highest, near, exact)
    is_one_image = (lowest == highest) & (lowest != NOT_IN_A_GROUP)
    groups = duplicates.near_group.copy()
    groups[members[is_one_image[near]]] = NOT_IN_A_GROUP
    return groups


def _members(inspected: Inspected, groups: np.ndarray) -> list[list[tuple[Inspected, int]]]:
    numbers, first = np.unique(groups, return_index=True)
    shown = [
        number for _, number in sorted(zip(first.tolist(), numbers.tolist(), strict=True)) if number != NOT_IN_A_GROUP
    ]
    return [
        [(inspected, i) for i in np.flatnonzero(groups == number)[:_MOST_PER_GROUP].tolist()]
        for number in shown[:_MOST_GROUPS]
    ]


def _section(title: str, groups: list[list[tuple[Inspected, int]]]) -> list[str]:
    if not groups:
        return []
    pictures = ["".join(_figure(inspected, index) for inspected, index in group) for group in groups]
    return [f"<h2>{_text(title)}</h2>", *(f'<div class="group">{some}</div>' for some in pictures)]


def _figure(inspected: Inspected, index: int) -> str:
    image = inspected.dataset.load(index)
    image = to_format(image, "RGB") if inspected.channels is None else picture_of(image, inspected.channels)
    size = f"{image.width} x {image.height}"
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    name = _text(inspected.dataset.describe(index))
    return (
        f'<figure><img src="data:image/jpeg;base64,{source}" alt=""><figcaption>{name} ({size})</figcaption></figure>'
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _lines(text: str) -> str:
    return escape(printable_lines(text))
