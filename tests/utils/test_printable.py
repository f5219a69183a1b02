from __future__ import annotations

import ast

import pytest

from dinoengine.utils.printable import printable, printable_lines

HOSTILE = "\x1b[2J\x07a\nb\r\t\x00\x7f\x9b31m\u202ecod.exe\u2028\udcff"


def test_no_control_character_is_left_and_the_text_can_be_had_back() -> None:
    shown = printable(HOSTILE)
    assert shown == r"\x1b[2J\x07a\nb\r\t\x00\x7f\x9b31m\u202ecod.exe\u2028\udcff"
    assert ast.literal_eval(f"'{shown}'") == HOSTILE
    shown.encode("utf-8")


@pytest.mark.parametrize(
    "name", ["/data/a b/Æther-日本　語.png", r"C:\x1b", "नमस्ते", "\U0001f469\u200d\U0001f4bb.jpg", ""]
)
def test_what_is_harmless_stays(name: str) -> None:
    assert printable(name) == name


def test_lines_of_a_message_stay_lines() -> None:
    assert printable_lines("1 of 2:\n\ta\x1bb\r\n\nend\n") == "1 of 2:\n\ta\\x1bb\\r\n\nend\n"
