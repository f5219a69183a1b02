"""Pictures in rows and columns with titles, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BACKGROUND, _TEXT, _FAINT, _FRAME = (250, 250, 248), (28, 32, 40), (105, 110, 120), (205, 207, 212)
_MARGIN, _GAP, _LABEL_WIDTH = 24, 12, 190
_TITLE_PX, _TEXT_PX, _CAPTION_PX = 24, 14, 12
_LINE = 1.4  # height of a line of text over its size
# Average width of a letter over its size, of the font that comes with Pillow.
_LETTER = 0.5


@dataclass(frozen=True)
class Tile:
    """A picture [H, W, 3] uint8, a line below it, and frames in it: a colour and (top, left, height, width) in pixels."""

    pixels: np.ndarray
    caption: str = ""
    frames: Sequence[tuple[tuple[int, int, int], tuple[int, int, int, int]]] = ()


@dataclass(frozen=True)
class Row:
    """What stands at the left of some tiles, a title and fainter lines, and the tiles."""

    title: str
    lines: Sequence[str]
    tiles: Sequence[Tile]


def contact_sheet(
    title: str, notes: Sequence[str], rows: Sequence[Row], columns: Sequence[str] = (), edge: int = 168
) -> Any:
    """
    Args:
        notes: lines below the title; a long one is broken.
        columns: titles of the columns, from the left.
        edge: of a cell in pixels. Pictures fill it with their longer side; pixels of small ones stay sharp squares.

    Returns:
        A ``PIL.Image``.
    """
    from PIL import Image, ImageDraw

    num_columns = max((len(row.tiles) for row in rows), default=1)
    width = 2 * _MARGIN + _LABEL_WIDTH + num_columns * (edge + _GAP)
    lines = [part for note in notes for part in textwrap.wrap(note, int((width - 2 * _MARGIN) / (_LETTER * _TEXT_PX)))]
    top = _MARGIN + round(_LINE * (_TITLE_PX + len(lines) * _TEXT_PX)) + _GAP
    head = round(_LINE * _TEXT_PX) if columns else 0
    heights = [_row_height(row, edge) for row in rows]
    sheet = Image.new("RGB", (width, top + head + sum(heights) + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill=_TEXT, font=_font(_TITLE_PX))
    for i, line in enumerate(lines):
        at = _MARGIN + round(_LINE * (_TITLE_PX + i * _TEXT_PX))
        draw.text((_MARGIN, at), line, fill=_FAINT, font=_font(_TEXT_PX))
    left = _MARGIN + _LABEL_WIDTH
    for i, name in enumerate(columns):
        draw.text((left + i * (edge + _GAP), top), name, fill=_TEXT, font=_font(_TEXT_PX))
    for number, row in enumerate(rows):
        y = top + head + sum(heights[:number])
        _draw_label(draw, row, y)
        for i, tile in enumerate(row.tiles):
            x = left + i * (edge + _GAP)
            picture = _fitted(tile, edge)
            sheet.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_FRAME)
            draw.text((x, y + picture.height + 2), tile.caption, fill=_FAINT, font=_font(_CAPTION_PX))
    return sheet


def _row_height(row: Row, edge: int) -> int:
    """In pixels, with the gap below; a row without pictures is as high as what is said of it."""
    label = round(_LINE * (_TEXT_PX + len(_label_lines(row)) * _CAPTION_PX))
    tiles = edge + round(_LINE * _CAPTION_PX) if row.tiles else 0
    return max(label, tiles) + _GAP


def _label_lines(row: Row) -> list[str]:
    letters = int((_LABEL_WIDTH - _GAP) / (_LETTER * _CAPTION_PX))
    return [part for line in row.lines for part in textwrap.wrap(line, letters)]


def _draw_label(draw: Any, row: Row, y: int) -> None:
    draw.text((_MARGIN, y), row.title, fill=_TEXT, font=_font(_TEXT_PX))
    text = "\n".join(_label_lines(row))
    draw.multiline_text((_MARGIN, y + round(_LINE * _TEXT_PX)), text, fill=_FAINT, font=_font(_CAPTION_PX))


def _fitted(tile: Tile, edge: int) -> Any:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(tile.pixels)
    factor = edge / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    picture = picture.resize(size, Image.Resampling.NEAREST if factor > 2 else Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for colour, (top, left, height, width) in tile.frames:
        corners = (left, top, left + width, top + height)
        x0, y0, x1, y1 = (round(corner * factor) for corner in corners)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
    return picture


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
