from __future__ import annotations

import numpy as np

from dinoengine.data.contact_sheet import Row, Tile, contact_sheet

RED, BLUE = (250, 0, 0), (0, 0, 250)


def _tile(colour: tuple[int, int, int], rows: int = 4, columns: int = 4, **options: object) -> Tile:
    return Tile(np.full((rows, columns, 3), colour, dtype=np.uint8), **options)  # type: ignore[arg-type]


def _places(sheet: object, colour: tuple[int, int, int]) -> np.ndarray:
    """[pixels of this colour, (row, column)]."""
    return np.argwhere((np.asarray(sheet) == colour).all(axis=-1))


def test_tiles_fill_their_cells_in_order() -> None:
    sheet = contact_sheet("T", [], [Row("a", [], [_tile(RED), _tile(BLUE, rows=2)])], edge=40)
    red, blue = _places(sheet, RED), _places(sheet, BLUE)
    assert len(red) == 40 * 40
    assert len(blue) == 20 * 40, "the longer side fills the cell"
    assert red[:, 1].max() < blue[:, 1].min()
    assert red[:, 0].min() == blue[:, 0].min()


def test_rows_follow_each_other_and_may_be_empty() -> None:
    sheet = contact_sheet(
        "T", [], [Row("a", [], [_tile(RED)]), Row("off", ["why"], []), Row("b", [], [_tile(BLUE)])], edge=40
    )
    between = _places(sheet, BLUE)[:, 0].min() - _places(sheet, RED)[:, 0].max()
    assert 40 < between < 100
    told = contact_sheet("T", [], [Row("off", ["why " * 99], []), Row("b", [], [_tile(BLUE)])], edge=40)
    assert _places(told, BLUE)[:, 0].min() > 200, "a row without pictures has room for its words"


def test_long_notes_are_broken_and_move_the_tiles_down() -> None:
    rows = [Row("a", [], [_tile(RED)])]
    short, long = (contact_sheet("T", [note], rows, edge=40) for note in ("x", "word " * 60))
    assert long.width == short.width
    assert _places(long, RED)[:, 0].min() > _places(short, RED)[:, 0].min() + 50


def test_frames_are_scaled_with_the_picture() -> None:
    tile = _tile(RED, rows=10, columns=10, frames=[(BLUE, (2, 0, 3, 10))])
    sheet = contact_sheet("T", [], [Row("a", [], [tile])], edge=100)
    red, blue = _places(sheet, RED), _places(sheet, BLUE)
    top = red.min(axis=0)[0]
    assert (blue[:, 0].min() - top, blue[:, 0].max() - top) == (20, 49)
    assert np.ptp(blue[:, 1]) == 99


def test_large_pictures_shrink() -> None:
    sheet = contact_sheet("T", [], [Row("a", [], [_tile(RED, rows=300, columns=600)])], edge=50)
    assert len(_places(sheet, RED)) == 25 * 50
