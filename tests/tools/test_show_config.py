"""tools/show_config.py: what it prints is the config, and the tensors of its loaders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dinoengine.config import CfgNode, get_cfg
from dinoengine.config.config import flatten
from tests.tools.tools import ROOT, load_tool

show_config = load_tool("show_config")
RECIPE = str(ROOT / "configs" / "dinov2" / "vitg14.yaml")


@pytest.fixture
def tiny_file(tiny_cfg: CfgNode, tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return str(path)


def test_the_output_is_the_merged_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_config.main(["--config-file", RECIPE, "SOLVER.MAX_ITER", "10", "SEED=3"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    shown, expected = get_cfg(), get_cfg()
    shown.merge_from_file(str(tmp_path / "shown.yaml"))
    expected.merge_from_file(RECIPE)
    expected.merge_from_list(["SOLVER.MAX_ITER", 10, "SEED", 3])
    assert shown == expected


def test_changed_shows_only_differences_and_their_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    show_config.main(["--changed", "--config-file", RECIPE, "SOLVER.MAX_ITER=10", "SOLVER.BASE_LR", "4e-3"])
    out = capsys.readouterr().out
    assert re.search(r"^    SIZE: giant +# configs/dinov2/vitg14\.yaml$", out, re.MULTILINE)
    assert re.search(r"^    PATCH_SIZE_PX: 14 +# configs/dinov2/vitl14\.yaml$", out, re.MULTILINE)
    assert re.search(r"^  NUM_WORKERS: 10 +# configs/dinov2/vitl16_short\.yaml$", out, re.MULTILINE)
    assert re.search(r"^  MAX_ITER: 10 +# command line$", out, re.MULTILINE)
    assert "BASE_LR" not in out  # back at its default
    assert "# default" not in out
    defaults = get_cfg()
    changed = get_cfg()
    changed.merge_from_file(RECIPE)
    changed.merge_from_list(["SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 4e-3])
    expected = [a for a, b in zip(flatten(changed), flatten(defaults), strict=True) if a != b]
    assert len([line for line in out.splitlines() if "#" in line]) == len(expected)


def test_inputs_are_the_crops_wherever_they_are_made(tiny_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for backend in ("reference", "device"):
        show_config.main(["--config-file", tiny_file, "--inputs", "INPUT.AUGMENTATION_BACKEND", backend])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert re.search(r"global_crops +\(8, 3, ", shown[0])


def test_inputs_are_those_of_one_process(tiny_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["SOLVER.IMS_PER_BATCH", "8", "INPUT.GLOBAL_CROPS.SIZE_PX", "(8, 12)", "SEED", "-1"]
    show_config.main(["--config-file", tiny_file, "--inputs", "--num-gpus", "2", *overrides])
    out = capsys.readouterr().out
    assert "process 1 of 2: 4 of the 8 images" in out
    for row in (
        r"global_crops +\(8, 3, 8, 12\) +uint8",
        r"local_crops +\(8, 3, 4, 4\) +uint8",
        r"masks +\(8, 6\) +bool",
        r"positions +\(4,\) +int64",
        r"images +\(9, 3, 8, 8\) +uint8",
        r"labels +\(9,\) +int64",
    ):
        assert re.search(row, out), (row, out)


def test_inputs_follow_the_reference_world_size_as_training_does(
    tiny_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.REFERENCE_WORLD_SIZE", "1", "DATASETS.TEST", "()"]
    show_config.main(["--config-file", tiny_file, "--inputs", "--num-gpus", "3", *overrides])
    out = capsys.readouterr().out
    assert "process 1 of 3: 4 of the 12 images" in out
    assert re.search(r"positions +\(4,\) +int64", out)


def test_inputs_without_a_test_dataset_say_so(tiny_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_config.main(["--config-file", tiny_file, "--inputs", "DATASETS.TEST", "()"])
    assert "DATASETS.TEST is empty" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_a_missing_folder_is_named_with_a_way_out(
    tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        show_config.main(["--config-file", tiny_file, "--inputs", key, f"folder:{tmp_path}/missing"])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert f"{tmp_path}/missing does not exist" in printed.err
    assert "DATASETS.TRAIN synthetic:" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config-file", "missing.yaml"], "there is no such file"),
        (["SOLVER.MAX_ITR", "3"], "did you mean 'SOLVER.MAX_ITER'"),
        (["--inputs", "--num-gpus", "0"], "--num-gpus must be 1 or more"),
        (["--inputs", "--num-gpus", "3", "DATASETS.TRAIN", "synthetic"], "not divisible by 3"),
    ],
)
def test_mistakes_end_with_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        show_config.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
