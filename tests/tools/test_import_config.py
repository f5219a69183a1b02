"""tools/import_config.py writes a whole file or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoengine.config import get_cfg, validate
from tests.tools.tools import load_tool

import_config = load_tool("import_config")


@pytest.fixture
def meta(tmp_path: Path) -> str:
    path = tmp_path / "meta.yaml"
    path.write_text("optim: {epochs: 200, lr: 0.0}\nstudent: {block_chunks: 4}\n")
    return str(path)


def test_it_writes_a_config_that_runs_and_names_what_it_dropped(
    meta: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.yaml"
    assert import_config.main([meta, str(out), "--num-gpus", "8"]) == 0
    cfg = get_cfg()
    cfg.merge_from_file(str(out))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (512, 250000)
    assert validate(cfg, 8) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:-1]] == ["optim.lr", "student.block_chunks", "train.dataset_path"]
    assert lines[-1] == f"Wrote {out}: batch 512 on 8 GPU(s), 250,000 iterations."


def test_a_file_is_overwritten_only_when_asked(meta: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.yaml"
    out.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        import_config.main([meta, str(out), "--num-gpus", "8"])
    assert ended.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert import_config.main([meta, str(out), "--num-gpus", "8", "--overwrite"]) == 0
    assert "MAX_ITER: 250000" in out.read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give the number of GPUs"),
        (["--num-gpus", "0"], "give the number of GPUs"),
    ],
)
def test_an_error_leaves_no_file(
    meta: str, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        import_config.main([meta, str(tmp_path / "out.yaml"), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["meta.yaml"]


def test_a_missing_source_or_folder_is_named(meta: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        import_config.main([str(tmp_path / "none.yaml"), str(tmp_path / "out.yaml"), "--num-gpus", "1"])
    assert "none.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        import_config.main([meta, str(tmp_path / "no" / "out.yaml"), "--num-gpus", "1"])
    assert "make it first" in capsys.readouterr().err
