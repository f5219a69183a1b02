from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import TINY
from tests.tools.tools import load_tool

tool = load_tool("visualize_data")
OPTIONS = [f"{key}={value}" for key, value in TINY.items()]


def test_the_sheets_are_pictures_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "sheets"
    assert tool.main(["--output", str(folder), "--images", "2", *OPTIONS, "SEED", "-1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [Path(line.split()[0]).name for line in said] == [
        "crops.png",
        "masks.png",
        "operations.png",
        "evaluation.png",
    ]
    for line in said:
        path, width, _, height = line.split()
        assert Image.open(path).size == (int(width), int(height))


def test_the_folder_is_that_of_the_run(tmp_path: Path) -> None:
    tool.main([*OPTIONS, "OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.TEST", "()", "--images", "1"])
    assert sorted(p.name for p in (tmp_path / "run" / "sheets").iterdir()) == [
        "crops.png",
        "masks.png",
        "operations.png",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["DATASETS.TRAIN", "folder:/no/such"], "Image folder /no/such does not exist"),
        (["INPUT.FORMAT", "RGBA"], "INPUT.FORMAT RGBA has 4 channel"),
        (["--images", "0"], "must be 1 or more, got 0"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--output", str(tmp_path / "sheets"), *OPTIONS, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sheets").exists()
