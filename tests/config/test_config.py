from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from dinoengine.config import CfgNode, ConfigError, get_cfg, key_origins
from dinoengine.config.config import BASE_KEY, flatten, unflatten


def _merged(*words: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(words)
    return cfg


def _value(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def _from_file(path: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


# ------------------------------------------------------------------------------------------------ overrides

CONVERSIONS = [
    ("SOLVER.BASE_LR", "1", 1.0),  # int -> float
    ("SOLVER.BASE_LR", "1e5", 1e5),
    ("SOLVER.BASE_LR", "1e-3", 1e-3),
    ("SOLVER.BASE_LR", "inf", math.inf),
    ("SOLVER.BASE_LR", "-0.5", -0.5),
    ("SOLVER.MAX_ITER", "300", 300),
    ("SOLVER.MAX_ITER", "1e5", 100_000),
    ("SOLVER.MAX_ITER", "20.0", 20),
    ("SEED", "-1", -1),
    ("SOLVER.AMP.ENABLED", "true", True),
    ("SOLVER.AMP.ENABLED", "True", True),
    ("CUDNN_BENCHMARK", "false", False),
    ("CUDNN_BENCHMARK", "False", False),
    ("OUTPUT_DIR", "10", "10"),
    ("OUTPUT_DIR", "007", "007"),
    ("OUTPUT_DIR", "out/a b", "out/a b"),
    ("OUTPUT_DIR", "runs/lr=1e-3,wd=0.04", "runs/lr=1e-3,wd=0.04"),
    ("MODEL.WEIGHTS", "/data/model.pth?key=teacher", "/data/model.pth?key=teacher"),
    ("MODEL.WEIGHTS", "", ""),
    ("DATASETS.TRAIN", "digits", ("digits",)),
    ("DATASETS.TRAIN", "digits:split=train", ("digits:split=train",)),
    ("DATASETS.TRAIN", "folder:/path/a=b,c", ("folder:/path/a=b,c",)),
    ("DATASETS.TRAIN", "('digits', 'folder:/x')", ("digits", "folder:/x")),
    ("DATASETS.TRAIN", "['digits']", ("digits",)),
    ("DATASETS.TRAIN", "", ()),
    ("DATASETS.TRAIN", "()", ()),
    ("INPUT.GLOBAL_CROPS.SIZE_PX", "224", (224,)),
    ("INPUT.GLOBAL_CROPS.SIZE_PX", "(224, 112)", (224, 112)),
    ("INPUT.GLOBAL_CROPS.SIZE_PX", "[224, 112]", (224, 112)),
    ("TEST.EXPECTED_RESULTS", "[['digits', 'knn/top1_k20', 90.0, 2.0]]", (("digits", "knn/top1_k20", 90.0, 2.0),)),
]


@pytest.mark.parametrize("form", ["pair", "equals"])
@pytest.mark.parametrize(("key", "word", "expected"), CONVERSIONS)
def test_a_word_becomes_the_type_of_the_key_in_both_forms(form: str, key: str, word: str, expected: Any) -> None:
    cfg = _merged(key, word) if form == "pair" else _merged(f"{key}={word}")
    assert _value(cfg, key) == expected
    assert type(_value(cfg, key)) is type(expected)


def test_both_forms_mix_and_values_may_contain_equals_signs_and_dots() -> None:
    cfg = _merged("SOLVER.MAX_ITER", "5", "OUTPUT_DIR=a=b.c", "DATASETS.TRAIN", "digits:split=train", "SEED=3")
    assert (cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR, cfg.SEED) == (5, "a=b.c", 3)
    assert cfg.DATASETS.TRAIN == ("digits:split=train",)


def test_values_that_are_no_strings_are_taken_as_they_are() -> None:
    cfg = _merged("SOLVER.BASE_LR", 1, "DATASETS.TRAIN", ["digits", "digits"], "SOLVER.AMP.ENABLED", True)
    assert cfg.SOLVER.BASE_LR == 1.0
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.DATASETS.TRAIN == ("digits", "digits")
    assert cfg.SOLVER.AMP.ENABLED is True


def test_the_later_of_two_values_wins() -> None:
    assert _merged("SEED", "1", "SEED=2").SEED == 2


def test_code_in_a_value_is_text(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    assert code == _merged("OUTPUT_DIR", code).OUTPUT_DIR
    assert not trace.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.MAX_ITER", "1.5", r"SOLVER\.MAX_ITER takes a whole number, got 1\.5 \(float\)"),
        ("SOLVER.MAX_ITER", "many", r"SOLVER\.MAX_ITER takes a whole number, got 'many' \(str\)"),
        ("SOLVER.MAX_ITER", "True", r"SOLVER\.MAX_ITER takes a whole number, got True \(bool\)"),
        ("SOLVER.MAX_ITER", "inf", r"SOLVER\.MAX_ITER takes a whole number, got 'inf' \(str\)"),
        ("SOLVER.BASE_LR", "fast", r"SOLVER\.BASE_LR takes a number, got 'fast' \(str\)"),
        ("SOLVER.BASE_LR", "True", r"SOLVER\.BASE_LR takes a number, got True \(bool\)"),
        ("SOLVER.BASE_LR", "(1, 2)", r"SOLVER\.BASE_LR takes a number, got \(1, 2\) \(tuple\)"),
        ("SOLVER.AMP.ENABLED", "1", r"SOLVER\.AMP\.ENABLED takes true or false, got 1 \(int\)"),
        ("SOLVER.AMP.ENABLED", "yes", r"SOLVER\.AMP\.ENABLED takes true or false, got 'yes' \(str\)"),
        ("INPUT.GLOBAL_CROPS.SIZE_PX", "True", r"SIZE_PX takes a list of values, got True \(bool\)"),
        ("INPUT.GLOBAL_CROPS.SIZE_PX", "None", r"SIZE_PX takes a list of values, got None \(NoneType\)"),
    ],
)
def test_a_wrong_type_names_key_value_and_expectation(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _merged(key, value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("MODEL.DEVCE", r"no key 'MODEL\.DEVCE' \(did you mean 'MODEL\.DEVICE'\?\)"),
        ("model.device", r"no key 'model\.device'"),
        ("DEVICE", r"no key 'DEVICE' \(did you mean 'MODEL\.DEVICE'\?\)"),  # right name, wrong place
        ("TRAIN.MAX_ITER", r"did you mean 'SOLVER\.MAX_ITER'\?"),
        ("MODEL", r"MODEL is a group of keys, not a key \(got 'x'\); it has MODEL\.META_ARCHITECTURE"),
        ("MODEL.DEVICE.TYPE", r"no key 'MODEL\.DEVICE\.TYPE'"),
        ("SOLVER.SCALE", r"no key 'SOLVER\.SCALE' \(did you mean 'INPUT\.\w+\.SCALE' or 'INPUT\.\w+\.SCALE'\?\)"),
        ("QQQQQQQQ", r"no key 'QQQQQQQQ'\.$"),
    ],
)
def test_an_unknown_key_names_the_closest(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _merged(key, "x")


def test_every_problem_is_reported_and_nothing_is_merged() -> None:
    cfg = get_cfg()
    with pytest.raises(ConfigError, match=r"(?s)Overrides:.*1\. .*2\. .*3\. ") as caught:
        cfg.merge_from_list(["SEED", "5", "MODEL.DEVCE", "cpu", "SOLVER.MAX_ITER", "soon", "VERSION", "9"])
    assert len(caught.value.problems) == 3
    for word in ("MODEL.DEVCE", "SOLVER.MAX_ITER", "VERSION"):
        assert sum(word in problem for problem in caught.value.problems) == 1
    assert cfg == get_cfg()


@pytest.mark.parametrize("words", [["SEED"], ["SEED", "1", "OUTPUT_DIR"]])
def test_a_key_without_value_says_how_to_write_it(words: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=rf"{words[-1]} has no value; write `{words[-1]} VALUE` or `{words[-1]}=VALUE`"
    ):
        _merged(*words)


@pytest.mark.parametrize("words", [["--resume"], ["OUTPUT_DIR", "out", "--num-gpus", "4"], ["-h"], [""], [3]])
def test_flags_and_non_keys_in_key_position_are_refused(words: list[Any]) -> None:
    with pytest.raises(ConfigError, match="expected a config key, got"):
        _merged(*words)


def test_a_flag_in_value_position_is_refused() -> None:
    with pytest.raises(ConfigError, match="--resume"):
        _merged("OUTPUT_DIR", "--resume")


@pytest.mark.parametrize("word", ["1.10", "1e5", "00", "0x10", "1_000"])
def test_a_text_key_keeps_a_numeric_word_as_it_was_written(word: str) -> None:
    assert word == _merged("OUTPUT_DIR", word).OUTPUT_DIR


def test_a_number_beyond_float_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.BASE_LR"):
        _merged("SOLVER.BASE_LR", "1" + "0" * 400)


# ------------------------------------------------------------------------------------------------ files


def test_a_file_is_merged_with_nested_and_dotted_keys(tmp_path: Path) -> None:
    cfg = _from_file(_write(tmp_path / "a.yaml", "VERSION: 1\nSOLVER:\n  AMP: {ENABLED: true}\n  MAX_ITER: 7\n"))
    assert (cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.MAX_ITER) == (True, 7)
    assert _from_file(_write(tmp_path / "b.yaml", "SOLVER.MAX_ITER: 8\n")).SOLVER.MAX_ITER == 8


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("SOLVER: {BASE_LR: 1e-5}", "SOLVER.BASE_LR", 1e-5),  # YAML 1.1 reads this as a string
        ("SOLVER: {BASE_LR: 1}", "SOLVER.BASE_LR", 1.0),
        ("SOLVER: {CLIP_GRAD_NORM: .inf}", "SOLVER.CLIP_GRAD_NORM", math.inf),
        ("DATASETS: {TRAIN: digits}", "DATASETS.TRAIN", ("digits",)),
        ("DATASETS: {TRAIN: [digits, 'folder:/x']}", "DATASETS.TRAIN", ("digits", "folder:/x")),
        ("OUTPUT_DIR: 10", "OUTPUT_DIR", "10"),
        ("OUTPUT_DIR:", "OUTPUT_DIR", ""),
        ("SOLVER: {AMP: {ENABLED: 'false'}}", "SOLVER.AMP.ENABLED", False),
    ],
)
def test_types_from_yaml(tmp_path: Path, line: str, key: str, expected: Any) -> None:
    value = _value(_from_file(_write(tmp_path / "a.yaml", line)), key)
    assert value == expected
    assert type(value) is type(expected)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert _from_file(_write(tmp_path / "a.yaml", "# nothing\n")) == get_cfg()


def test_child_over_base_relative_to_the_file_over_three_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "base" / "root.yaml", "SEED: 1\nOUTPUT_DIR: root\nSOLVER: {MAX_ITER: 1}\n")
    _write(tmp_path / "base" / "middle.yaml", f"{BASE_KEY}: root.yaml\nOUTPUT_DIR: middle\nSOLVER: {{MAX_ITER: 2}}\n")
    child = _write(tmp_path / "recipes" / "child.yaml", f"SOLVER: {{MAX_ITER: 3}}\n{BASE_KEY}: ../base/middle.yaml\n")
    monkeypatch.chdir("/")  # relative to the file, not to the working directory
    cfg = _from_file(child)
    assert (cfg.SEED, cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER) == (1, "middle", 3)


def test_several_bases_merge_left_to_right(tmp_path: Path) -> None:
    _write(tmp_path / "a.yaml", "SEED: 1\nOUTPUT_DIR: a\n")
    _write(tmp_path / "b.yaml", "SEED: 2\n")
    cfg = _from_file(_write(tmp_path / "c.yaml", f"{BASE_KEY}: [a.yaml, b.yaml]\n"))
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (2, "a")
    assert _from_file(_write(tmp_path / "d.yaml", f"{BASE_KEY}: [b.yaml, a.yaml]\n")).SEED == 1


def test_one_base_reached_twice_is_no_circle(tmp_path: Path) -> None:
    _write(tmp_path / "root.yaml", "SEED: 5\n")
    _write(tmp_path / "a.yaml", f"{BASE_KEY}: root.yaml\n")
    _write(tmp_path / "b.yaml", f"{BASE_KEY}: root.yaml\n")
    assert _from_file(_write(tmp_path / "c.yaml", f"{BASE_KEY}: [a.yaml, b.yaml]\n")).SEED == 5


def test_absolute_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    base = _write(tmp_path / "base.yaml", "SEED: 4\n")
    assert _from_file(_write(tmp_path / "x" / "a.yaml", f"{BASE_KEY}: {base}\n")).SEED == 4
    _write(tmp_path / "x" / "b.yaml", f"{BASE_KEY}: ~/base.yaml\n")
    assert _from_file("~/x/b.yaml").SEED == 4


def test_a_circle_is_shown(tmp_path: Path) -> None:
    _write(tmp_path / "a.yaml", f"{BASE_KEY}: b.yaml\n")
    start = _write(tmp_path / "b.yaml", f"{BASE_KEY}: a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: \S+b\.yaml -> \S+a\.yaml -> \S+b\.yaml"):
        _from_file(start)


def test_a_missing_base_is_named_with_the_file_that_asks_for_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.yaml", f"{BASE_KEY}: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"gone\.yaml: there is no such file \(named by _BASE_ in \S+a\.yaml\)"):
        _from_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"a\.yaml: expected a mapping of keys, got list"),
        ("SEED: [1", r"a\.yaml: not valid YAML"),
        (
            "OUTPUT_DIR: !!python/object/apply:os.getcwd []",
            r"a\.yaml: not valid YAML: could not determine a constructor",
        ),
        ("SEDE: 1", r"a\.yaml: there is no key 'SEDE' \(did you mean 'SEED'\?\)"),
        ("SEED: x", r"a\.yaml: SEED takes a whole number, got 'x'"),
        ("MODEL: cpu", r"a\.yaml: MODEL is a group of keys"),
        ("MODEL: {DEVICE: {TYPE: cpu}}", r"a\.yaml: there is no key 'MODEL\.DEVICE\.TYPE'"),
        (f"MODEL: {{{BASE_KEY}: b.yaml}}", r"a\.yaml: there is no key 'MODEL\._BASE_'"),
        ("5: 1", r"a\.yaml: there is no key '5'"),
        ("VERSION: 2", r"a\.yaml: VERSION is 2; this dinoengine reads VERSION 1"),
        ("VERSION: '1'", r"VERSION is '1'; this dinoengine reads VERSION 1"),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _from_file(_write(tmp_path / "a.yaml", text))


def test_a_missing_file_or_a_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file\."):
        _from_file(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="there is no such file"):
        _from_file(str(tmp_path))


def test_an_error_in_a_base_names_the_base(tmp_path: Path) -> None:
    _write(tmp_path / "base.yaml", "SEDE: 1\n")
    with pytest.raises(ConfigError, match=r"base\.yaml: there is no key 'SEDE'"):
        _from_file(_write(tmp_path / "a.yaml", f"{BASE_KEY}: base.yaml\n"))


def test_every_problem_of_a_file_is_reported_and_nothing_of_it_is_merged(tmp_path: Path) -> None:
    cfg = get_cfg()
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        cfg.merge_from_file(_write(tmp_path / "bad.yaml", "SEED: 5\nVERSION: 3\nSEDE: 1\nSOLVER: {MAX_ITER: x}\n"))
    assert len(caught.value.problems) == 3
    assert cfg == get_cfg()


def test_nothing_of_a_good_base_is_merged_when_the_child_is_bad(tmp_path: Path) -> None:
    _write(tmp_path / "base.yaml", "SEED: 7\n")
    cfg = get_cfg()
    with pytest.raises(ConfigError, match="SEDE"):
        cfg.merge_from_file(_write(tmp_path / "a.yaml", f"{BASE_KEY}: base.yaml\nSEDE: 3\n"))
    assert cfg == get_cfg()


@pytest.mark.parametrize("base", ["5", "[5]", "null"])
def test_a_base_that_is_no_path_is_a_config_error(tmp_path: Path, base: str) -> None:
    with pytest.raises(ConfigError, match=BASE_KEY):
        _from_file(_write(tmp_path / "a.yaml", f"{BASE_KEY}: {base}\n"))


def test_an_empty_mapping_over_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE"):
        _from_file(_write(tmp_path / "a.yaml", "MODEL: {DEVICE: {}}\n"))


def test_a_whole_number_in_scientific_notation_means_the_same_in_a_file_as_on_the_command_line(tmp_path: Path) -> None:
    assert _from_file(_write(tmp_path / "a.yaml", "SOLVER: {MAX_ITER: 1e5}\n")).SOLVER.MAX_ITER == 100_000


def test_unsafe_yaml_cannot_be_asked_for(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.yaml", "SEED: 1\n")
    with pytest.raises(ValueError, match="never loaded"):
        get_cfg().merge_from_file(path, allow_unsafe=True)


def test_merging_another_config_follows_the_same_rules() -> None:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode({"SOLVER": CfgNode({"BASE_LR": 1})}))
    assert cfg.SOLVER.BASE_LR == 1.0
    assert cfg.SOLVER.MAX_ITER == get_cfg().SOLVER.MAX_ITER
    with pytest.raises(ConfigError, match=r"no key 'SOLVER\.BASE_LRR'"):
        cfg.merge_from_other_cfg(CfgNode({"SOLVER": CfgNode({"BASE_LRR": 1})}))


# ------------------------------------------------------------------------------------- dump, clone, freeze, pickle


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["SOLVER.CLIP_GRAD_NORM", math.inf, "SOLVER.EPS", 1e-300, "SOLVER.BASE_LR", 0.1 + 0.2],
        ["DATASETS.TRAIN", ("digits:split=train", "folder:/a b/ü: #x"), "INPUT.GLOBAL_CROPS.SIZE_PX", (98, 224)],
        ["TEST.EXPECTED_RESULTS", (("digits", "knn/top1_k20", 90.0, 2.0), ("knn/top1_k10", 91, 1))],
        *(
            ["OUTPUT_DIR", CfgNode, text]
            for text in ["true", "10", "1e5", "1.5", "null", "~", "2024-01-01", "a: b", " x ", "'q'", ""]
        ),
    ],
)
def test_a_dump_loads_back_to_the_same_config(tmp_path: Path, overrides: list[Any]) -> None:
    cfg = get_cfg()
    if len(overrides) == 3 and overrides[1] is CfgNode:  # set as it is: no conversion of words
        cfg.OUTPUT_DIR = overrides[2]
    else:
        cfg.merge_from_list(overrides)
    again = _from_file(_write(tmp_path / "config.yaml", cfg.dump()))
    assert again == cfg
    assert again.dump() == cfg.dump()


def test_a_dump_is_plain_yaml_in_the_order_of_the_defaults() -> None:
    text = get_cfg().dump()
    assert "!!" not in text
    assert text.index("VERSION") < text.index("OUTPUT_DIR") < text.index("MODEL:") < text.index("LOG:")


def test_get_cfg_and_clone_give_independent_copies() -> None:
    first, second = get_cfg(), get_cfg()
    copy = first.clone()
    first.MODEL.DEVICE = "cuda"
    assert second.MODEL.DEVICE == copy.MODEL.DEVICE == get_cfg().MODEL.DEVICE == "auto"


def test_a_frozen_config_refuses_changes_at_every_depth() -> None:
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError, match="immutable"):
        cfg.SOLVER.AMP.ENABLED = True
    with pytest.raises(AttributeError, match="frozen"):
        cfg.merge_from_list(["SEED", "3"])
    assert cfg == get_cfg()
    copy = cfg.clone()
    assert copy.is_frozen()
    copy.defrost()
    copy.merge_from_list(["SEED", "3"])
    assert (copy.SEED, cfg.SEED) == (3, 0)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickling_keeps_values_types_and_the_frozen_state(protocol: int) -> None:
    cfg = _merged("DATASETS.TRAIN", "digits")
    cfg.freeze()
    again = pickle.loads(pickle.dumps(cfg, protocol))
    assert again == cfg
    assert type(again.SOLVER.AMP) is CfgNode
    with pytest.raises(AttributeError, match="immutable"):
        again.SOLVER.AMP.ENABLED = True
    again.defrost()
    again.merge_from_list(["SEED", "1"])
    assert cfg.SEED == 0


def test_key_origins_name_the_last_setter_of_each_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {BASE_LR: 1.0, EPS: 1e-3}\nTEST:\n")
    (tmp_path / "b.yaml").write_text("SOLVER: {BASE_LR: 2.0}\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 125000}\n")
    cfg = get_cfg()
    overrides = ["SEED", "7", "SOLVER.BETAS=(0.9, 0.95)"]
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    cfg.merge_from_list(overrides)
    origins = key_origins(cfg, str(tmp_path / "c.yaml"), overrides)
    expected = {
        "SEED": "command line",
        "SOLVER.EPS": str(tmp_path / "a.yaml"),
        "SOLVER.BASE_LR": str(tmp_path / "b.yaml"),
        "SOLVER.MAX_ITER": str(tmp_path / "c.yaml"),  # although it is the default's value
        "SOLVER.BETAS": "command line",
    }
    assert {key: origin for key, origin in origins.items() if origin != "default"} == expected
    assert origins.keys() == dict(flatten(cfg)).keys()


def test_key_origins_of_the_defaults_are_all_default() -> None:
    assert set(key_origins(get_cfg()).values()) == {"default"}
    with pytest.raises(ConfigError, match="there is no such file"):
        key_origins(get_cfg(), "missing.yaml")


def test_flatten_and_unflatten_are_inverse() -> None:
    nested = {"A": {"B": 1, "C": {"D": (2, 3)}}, "E": {}, "F": None}
    assert flatten(nested) == [("A.B", 1), ("A.C.D", (2, 3)), ("E", {}), ("F", None)]
    assert unflatten(dict(flatten(nested))) == nested
