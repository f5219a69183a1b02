"""tools/benchmark_loader.py: the table and the verdict for a real config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.data.pictures import picture
from tests.tools.tools import load_tool

benchmark_loader = load_tool("benchmark_loader")
WORDS = ["--images", "2", "--batches", "1", "MODEL.DEVICE=cpu", "DATALOADER.NUM_WORKERS=0", "SOLVER.IMS_PER_BATCH=2",
         "INPUT.LOCAL_CROPS.NUM=1", "MODEL.LOSS.KOLEO_WEIGHT=0"]  # fmt: skip


def test_table_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    words = [*WORDS, f"DATASETS.TRAIN=folder:{tmp_path}"]
    assert benchmark_loader.main([*words, "--images-per-second", "0.001"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(read|decode|augment|collate|transfer) ", out, re.MULTILINE) == [
        "read",
        "decode",
        "augment",
        "collate",
    ]
    assert re.search(r"The loader as a whole: \d+ images/s", out)
    assert "Fast enough" in out


@pytest.mark.parametrize("words", [["--images", "0"], ["--images-per-second", "-1"], ["DATASETS.TRAIN=folder:/none"]])
def test_wrong_words_end_with_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark_loader.main([*WORDS, *words])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
