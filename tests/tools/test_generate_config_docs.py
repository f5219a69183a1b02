"""docs/config.md is what defaults.py says."""

import importlib.util
from pathlib import Path

import pytest

from dinoengine.config import CfgNode, get_cfg

ROOT = Path(__file__).resolve().parent.parent.parent
SPEC = importlib.util.spec_from_file_location("generate_config_docs", ROOT / "tools" / "generate_config_docs.py")
assert SPEC is not None
assert SPEC.loader is not None
docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs)


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    found = []
    for name, value in node.items():
        found += _keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [f"{prefix}{name}"]
    return found


def test_the_reference_is_up_to_date() -> None:
    text = docs.render(docs.read_entries())
    assert docs.TARGET.read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_key_is_documented_once() -> None:
    entries = docs.read_entries()
    assert sorted(key for entry in entries for key, _ in entry.keys) == sorted(_keys(get_cfg()))
    assert all(len(entry.comment) > 15 for entry in entries)


def test_one_comment_covers_the_keys_below_it_also_across_a_group() -> None:
    source = "_C = CN()\n# Two sizes.\n_C.G = CN()\n_C.G.A = 1\n_C.G.B = (2,)\n\n# ---\n# Heading\n# ---\n# Other | one.\n_C.C = 'x'\n"
    first, second = docs.parse_defaults(source)
    assert first.keys == [("G.A", "1"), ("G.B", "(2,)")]
    assert first.comment == "Two sizes."
    assert second == docs.Entry([("C", "'x'")], "Other | one.")
    assert "| `C` | `'x'` | Other &#124; one. |" in docs.render([second])


def test_a_key_without_comment_is_refused() -> None:
    with pytest.raises(AssertionError, match="has no comment"):
        docs.parse_defaults("_C.A = 1\n")
