from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dinoengine.config import ConfigError, get_cfg
from dinoengine.data.dataset_string import arguments_for, converted, parse


def folder(root: str, number: int = 1, share: float = 0.5, flag: bool = False, text: str = "") -> None: ...


def open_ended(dataset: str, root: str = "", **options: Any) -> None: ...


@pytest.mark.parametrize(
    "text, expected",
    [
        ('folder:"/my: path"', {"root": "/my: path"}),
        ('folder:"/a:number=2"', {"root": "/a:number=2"}),  # without quotes it would be a key
        ('folder:"/a:number=2":number=3', {"root": "/a:number=2", "number": 3}),
        ('folder:root="/a:b=c":number=3', {"root": "/a:b=c", "number": 3}),
        ('folder:number=3:root="/a:b"', {"root": "/a:b", "number": 3}),
        (r'folder:"/a \"b\" c"', {"root": '/a "b" c'}),
        (r'folder:"C:\photos\new"', {"root": r"C:\photos\new"}),  # only \" and \\ are escapes
        (r'folder:"C:\\photos\\"', {"root": "C:\\photos\\"}),
        ("folder:/my photos/日本 é", {"root": "/my photos/日本 é"}),
        ('folder:/a "b" c', {"root": '/a "b" c'}),  # a quote inside is a character
        ("folder:root=http://h:80/a:number=3", {"root": "http://h:80/a", "number": 3}),
        ("folder:number=3:root=s3://b", {"root": "s3://b", "number": 3}),
        ("folder:root=http://h:80:text=t", {"root": "http://h:80", "text": "t"}),
        ("folder:http://h:80/a=b:c:number=3", {"root": "http://h:80/a=b:c", "number": 3}),
        ('folder:text="":root=/a', {"root": "/a", "text": ""}),
        ('{"name": "folder", "root": "/my: path=x\\n", "number": 3, "share": 1, "flag": true}',
         {"root": "/my: path=x\n", "number": 3, "share": 1.0, "flag": True}),
        ('{"name": "folder", "root": "/a", "number": "3"}', {"root": "/a", "number": 3}),
    ],
)  # fmt: skip
def test_values_with_any_character(text: str, expected: dict[str, Any]) -> None:
    assert arguments_for(text, folder) == expected


@given(st.text(min_size=1, max_size=30))
@example('":number=2')
@example("\\")
@settings(max_examples=100, deadline=None)
def test_every_path_has_a_quoted_and_a_json_form(path: str) -> None:
    quoted = path.replace("\\", "\\\\").replace('"', '\\"')
    assert arguments_for(f'folder:"{quoted}":number=7', folder) == {"root": path, "number": 7}
    assert arguments_for(json.dumps({"name": "folder", "root": path}), folder) == {"root": path}


@given(st.text(alphabet='ab:="\\{}/ ', max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_text_is_understood_or_refused_with_the_grammar(rest: str) -> None:
    problem = "Grammar: name["
    try:
        assert isinstance(arguments_for(f"folder:{rest}", folder)["root"], str)
    except ValueError as error:
        problem = str(error)
    assert "Grammar: name[" in problem


@pytest.mark.parametrize(
    "text, message",
    [
        ('folder:"/a', r"the quote of '\"/a' is not closed.*Grammar: name\["),
        ('folder:"/a"b', r"'b' follows a closing quote; expected ':'\. Grammar"),
        ('folder:"/a":numbr=2', r"'numbr=2' is not understood \(did you mean 'number'\?\)\. Its keys: root, number"),
        ('folder:/a:"b"', r"not understood"),
        ('{"name": "folder", "roots": "/a"}', r"'roots' is not understood \(did you mean 'root'\?\)"),
        ('{"name": "folder", "root": "/a", "number": 1.5}', r"number must be int, got 1\.5\. Grammar"),
        ('{"name": "folder", "root": "/a", "number": true}', "number must be int, got True"),
        ('{"name": "folder", "root": 3}', "root must be str, got 3"),
        ('{"name": "folder", "root": null}', "root must be str, got None"),
        ('{"root": "/a"}', r'needs "name", a text'),
        ('{"name": 3}', r'needs "name", a text'),
        ("folder:", r"needs root\. Grammar"),
        ("folder:root=", r"needs root\. Grammar"),
        ('folder:""', r"needs root\. Grammar"),
        ("folder:root=:number=2", r"needs root\. Grammar"),
        ('{"name": "folder", "root": ""}', r"needs root\. Grammar"),
        ('{"name": "folder"', "begins as JSON and is none: .*Grammar"),
    ],
)
def test_what_is_wrong_is_shown(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments_for(text, folder)


def test_a_builder_with_options_of_any_name_gets_them_as_text() -> None:
    got = arguments_for("open:CIFAR10:root=/r:train=True:x=1", open_ended)
    assert got == {"dataset": "CIFAR10", "root": "/r", "train": "True", "x": "1"}
    assert arguments_for('{"name": "open", "dataset": "A", "train": true}', open_ended)["train"] is True


def test_the_name_ends_at_the_first_colon() -> None:
    assert parse("digits").name == "digits"
    assert parse("digits:split=test").name == "digits"
    assert parse('{"name": "my photos"}').name == "my photos"


def test_a_type_that_may_be_missing() -> None:
    assert converted("t", "k", "3", int | None) == 3


@pytest.mark.parametrize("text", ['{"name": "folder", "root": "/a: b"}', 'folder:"/a: b"'])
def test_a_config_takes_both_forms(text: str, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", text])
    assert list(cfg.DATASETS.TRAIN) == [text]
    path = tmp_path / "config.yaml"
    path.write_text(
        "DATASETS:\n  TRAIN:\n    - {name: folder, root: '/a: b'}\n    - 'folder:\"/a: b\"'\n", encoding="utf-8"
    )
    cfg.merge_from_file(str(path))
    assert [arguments_for(entry, folder) for entry in cfg.DATASETS.TRAIN] == [{"root": "/a: b"}] * 2


def test_a_mapping_is_no_number() -> None:
    with pytest.raises(ConfigError, match="SEED"):
        get_cfg().merge_from_list(["SEED", "{'a': 1}"])
