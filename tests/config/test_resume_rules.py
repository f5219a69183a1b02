"""What a changed key means to a resumed run, against what the comments and the trainings of this suite say of it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.config.config import flatten
from dinoengine.config.resume_rules import (
    DEFINED,
    FREE,
    REFUSED,
    RULES,
    Change,
    changes_table,
    config_changes,
    defined_rules_table,
    require_resumable,
    rule_of,
    values_of_text,
)
from tests.test_architecture_effects import CHANGES_TRAINING, LEAVES_TRAINING_ALONE
from tests.tools.test_generate_config_docs import docs

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = [key for key, _ in flatten(get_cfg())]
# They decide what a run starts from, and are not read again.
OF_THE_START = {"MODEL.WEIGHTS", "MODEL.WEIGHTS_STRICT", "MODEL.WEIGHTS_WITH_OPTIMIZER"}


def test_every_key_is_under_exactly_one_rule() -> None:
    for key in KEYS:
        matching = [rule.pattern for rule in RULES if fnmatchcase(key, rule.pattern)]
        assert len(matching) == 1, (key, matching)


def test_every_rule_is_of_a_key_and_gives_a_reason() -> None:
    for rule in RULES:
        assert any(fnmatchcase(key, rule.pattern) for key in KEYS), rule.pattern
        assert rule.kind in (FREE, DEFINED, REFUSED)
        assert len(rule.meaning) > 8


def test_what_changes_a_training_is_never_free_and_what_leaves_it_alone_always_is() -> None:
    """The tables that tests/test_architecture_effects.py checks by training."""
    assert [key for key in CHANGES_TRAINING if rule_of(key).kind == FREE] == []
    assert [key for key in LEAVES_TRAINING_ALONE if rule_of(key).kind != FREE] == []


def test_the_comments_of_the_keys_say_the_same() -> None:
    for entry in docs.read_entries():
        for key in {key for key, _ in entry.keys} - OF_THE_START:
            if re.search(r"\b[Dd]oes not change results\.", entry.comment):
                assert rule_of(key).kind == FREE, key
            if re.search(r"\bChanges? results( at other sizes| to rounding)?\.", entry.comment):
                assert rule_of(key).kind != FREE, key


def test_the_documented_table_is_that_of_the_rules() -> None:
    assert defined_rules_table() in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_changes_name_nested_keys_and_know_lists_from_tuples_by_their_entries(tiny_cfg: CfgNode) -> None:
    other = tiny_cfg.clone()
    assert config_changes(values_of_text(tiny_cfg.dump(), "x"), other) == []
    other.MODEL.VIT.DEPTH = 3
    other.SOLVER.BETAS = (0.9, 0.95)
    assert [tuple(change) for change in config_changes(tiny_cfg, other)] == [
        ("MODEL.VIT.DEPTH", 1, 3),
        ("SOLVER.BETAS", (0.9, 0.999), (0.9, 0.95)),
    ]


def test_keys_of_your_own_and_of_other_versions(tiny_cfg: CfgNode) -> None:
    old = values_of_text(tiny_cfg.dump(), "x")
    mine = tiny_cfg.clone()
    mine.MINE = CfgNode({"A": 1})
    (change,) = config_changes(old, mine, get_cfg())
    assert (change.key, repr(change.before), change.now, change.rule.kind) == ("MINE.A", "(not set)", 1, REFUSED)
    assert config_changes(values_of_text(mine.dump(), "x"), mine) == []
    (change,) = config_changes(mine, tiny_cfg)
    assert (change.key, change.before, repr(change.now)) == ("MINE.A", 1, "(not set)")
    del old["SOLVER"]["CLIP_GRAD_NORM"]  # a version that did not have it did what its default does
    assert config_changes(old, tiny_cfg, get_cfg()) == []
    tiny_cfg.SOLVER.CLIP_GRAD_NORM = 1.0
    assert [tuple(c) for c in config_changes(old, tiny_cfg, get_cfg())] == [("SOLVER.CLIP_GRAD_NORM", 3.0, 1.0)]


def test_a_refusal_names_every_change_why_and_the_way_to_fork() -> None:
    changes = [Change("SOLVER.IMS_PER_BATCH", 4, 8), Change("SOLVER.BASE_LR", 1.0, 2.0), Change("SEED", 0, 1)]
    with pytest.raises(ConfigError, match="(?s)go on from run/m.pth.*--fork-from run OUTPUT_DIR <another") as error:
        require_resumable(changes, "run/m.pth", "run")
    assert [text.split(" (")[0] for text in error.value.problems] == [
        "SOLVER.IMS_PER_BATCH was 4, is now 8",
        "SEED was 0, is now 1",
    ]
    require_resumable(changes[1:2], "run/m.pth", "run")


def test_the_table_has_a_row_for_each_change_and_cuts_long_values() -> None:
    table = changes_table([Change("SOLVER.MAX_ITER", 10, 20), Change("DATASETS.TEST", (), ("x" * 99,))])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0] == ["key", "before", "now", "what it means"]
    assert rows[2][:3] == ["SOLVER.MAX_ITER", "10", "20"]
    assert "functions of the iteration over the new length" in rows[2][3]
    assert rows[3][:2] == ["DATASETS.TEST", "[]"]
    assert rows[3][2].endswith("xx ...")


@pytest.mark.parametrize("text", ["a: [", "- 1"])
def test_a_text_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the file: (not valid YAML|holds a list)"):
        values_of_text(text, "the file")
