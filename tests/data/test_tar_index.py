from __future__ import annotations

import logging
import tarfile
from pathlib import Path

import pytest

from dinoengine.data.tar_index import expand_braces, read_member, tar_members


def _tar(path: Path, mode: str = "w") -> Path:
    for name, content in (("a.jpg", b"x" * 700), ("b.txt", b"")):
        (path.parent / name).write_bytes(content)
    with tarfile.open(path, mode) as tar:
        for name in ("a.jpg", "b.txt"):
            tar.add(path.parent / name, arcname=f"d/{name}")
    return path


def test_members_are_where_the_index_says(tmp_path: Path) -> None:
    path = str(_tar(tmp_path / "s.tar"))
    members = list(tar_members(path))
    assert [(m.name, m.size) for m in members] == [("d/a.jpg", 700), ("d/b.txt", 0)]
    assert read_member(path, members[0].offset, 700) == b"x" * 700
    with pytest.raises(OSError, match="was changed after it was indexed"):
        read_member(path, 10**6, 5)


@pytest.mark.parametrize("length", [512 + 100, 300, 0])
def test_a_tar_that_ends_early_is_named(tmp_path: Path, length: int) -> None:
    path = _tar(tmp_path / "s.tar")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"s\.tar (ends early, within d/a\.jpg|is no tar)"):
        list(tar_members(str(path)))


def test_a_tar_cut_between_members_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _tar(tmp_path / "s.tar")
    first = next(tar_members(str(path)))
    path.write_bytes(path.read_bytes()[: first.offset + 1024])
    with caplog.at_level(logging.WARNING):
        assert [m.name for m in tar_members(str(path))] == ["d/a.jpg"]
    assert "has no end mark" in caplog.text


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unpack a compressed one \(gunzip\)"):
        list(tar_members(str(_tar(tmp_path / "s.tar", "w:gz"))))


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize(
    "pattern, message", [("a{0", "not closed"), ("{5..1}", "is no range"), ("{a..c}", "is no range")]
)
def test_wrong_braces(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_braces(pattern)


@pytest.mark.parametrize(
    "pattern", ["s-{1..99999999999}.tar", "{1..2000}-{1..2000}.tar", "{1..1000}{1..1000}{a,b}.tar"]
)
def test_a_brace_that_stands_for_too_many_is_refused_before_they_are_made(pattern: str) -> None:
    with pytest.raises(ValueError, match="shards or more, and 1,000,000 are the most"):
        expand_braces(pattern)
