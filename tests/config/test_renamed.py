from __future__ import annotations

from pathlib import Path

import pytest

from dinoengine.config import CfgNode, ConfigError, cfg_from_text, get_cfg, key_origins
from dinoengine.config.config import flatten, unflatten
from dinoengine.config.renamed import RENAMED, REPLACED, successor

KEYS = dict(flatten(get_cfg()))


def _file(folder: Path, values: dict[str, object]) -> str:
    path = folder / "config.yaml"
    path.write_text(CfgNode(unflatten(values)).dump(), encoding="utf-8")
    return str(path)


def _read(path: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


def test_every_successor_is_a_key_and_no_old_name_is() -> None:
    assert {*RENAMED.values(), *REPLACED.values()} <= KEYS.keys()
    assert not KEYS.keys() & {*RENAMED, *REPLACED}


def test_a_file_with_a_renamed_key_gives_its_value_to_the_successor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _file(tmp_path, {"TEST.LOGREG.MAX_ITER": 77, "SEED": 3})
    cfg = _read(path)
    assert (cfg.TEST.LOGREG.MAX_LBFGS_ITERS, cfg.SEED) == (77, 3)
    assert caplog.text.count("TEST.LOGREG.MAX_ITER is now TEST.LOGREG.MAX_LBFGS_ITERS; its value 77 is taken") == 1
    assert path in caplog.text
    assert key_origins(cfg, path)["TEST.LOGREG.MAX_LBFGS_ITERS"] == path


def test_a_key_without_meaning_now_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No number of queries is a number of MiB."""
    cfg = _read(_file(tmp_path, {"TEST.KNN.CHUNK_SIZE": 1024}))
    assert cfg == get_cfg()
    assert "TEST.KNN.CHUNK_SIZE 1024 is passed over" in caplog.text
    assert "TEST.KNN.MEMORY_MIB" in caplog.text


def test_the_config_in_a_checkpoint_is_translated_too() -> None:
    old = {key: value for key, value in KEYS.items() if key not in RENAMED.values()}
    old |= {"TEST.SEGMENTATION.SCALE": (0.7, 1.5), "TEST.LOGREG.MAX_ITER": 9, "TEST.DENSE_KNN.CHUNK_SIZE": 12}
    cfg = cfg_from_text(CfgNode(unflatten(old)).dump())
    assert cfg.TEST.SEGMENTATION.RESIZE_RATIO == (0.7, 1.5)
    assert cfg.TEST.LOGREG.MAX_LBFGS_ITERS == 9
    assert cfg.TEST.DENSE_KNN.MEMORY_MIB == get_cfg().TEST.DENSE_KNN.MEMORY_MIB


def test_the_old_name_beside_the_new_one_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, {"TEST.LOGREG.MAX_ITER": 7, "TEST.LOGREG.MAX_LBFGS_ITERS": 8})
    with pytest.raises(ConfigError, match=r"which is given as well; remove TEST\.LOGREG\.MAX_ITER"):
        _read(path)


def test_a_child_with_the_new_name_wins_over_a_base_with_the_old_one(tmp_path: Path) -> None:
    base = _file(tmp_path, {"TEST.LOGREG.MAX_ITER": 7})
    child = tmp_path / "child.yaml"
    child.write_text(f"_BASE_: {base}\nTEST:\n  LOGREG:\n    MAX_LBFGS_ITERS: 8\n", encoding="utf-8")
    assert _read(str(child)).TEST.LOGREG.MAX_LBFGS_ITERS == 8


@pytest.mark.parametrize("key", [*RENAMED, *REPLACED])
def test_on_the_command_line_an_old_key_is_refused_with_its_successor(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"no key '{key}' any more; it is '{successor(key)}' now"):
        get_cfg().merge_from_list([key, "1"])
