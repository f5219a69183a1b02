from __future__ import annotations

import pytest

from dinoengine.utils.registry import Registry, UnknownNameError, suggest


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("SHAPE")

    @registry.register()
    class Circle: ...

    @registry.register("box")
    class Square: ...

    registry.register("dot", len)
    return registry


def test_names_come_from_the_class_or_are_given(shapes: Registry) -> None:
    assert shapes.names() == ["Circle", "box", "dot"]
    assert shapes.get("Circle").__name__ == "Circle"
    assert shapes.get("box").__name__ == "Square"
    assert shapes.get("dot") is len


def test_registering_returns_the_object_so_that_it_works_as_a_decorator() -> None:
    registry = Registry("X")

    def build() -> int:
        return 3

    assert registry.register(build) is build
    assert registry.register(name="other")(build) is build
    assert registry.register("third", build) is build
    assert [registry.get(name) is build for name in ("build", "other", "third")] == [True, True, True]


def test_a_taken_name_is_refused_and_keeps_its_object(shapes: Registry) -> None:
    with pytest.raises(
        ValueError, match=r"'dot' is already registered in the SHAPE registry .*len.*Registered: Circle, box, dot"
    ):
        shapes.register("dot", max)
    with pytest.raises(ValueError, match="'dot' is already registered"):
        shapes.register("dot", len)  # also for the same object: a module imported twice is a mistake
    assert shapes.get("dot") is len


def test_an_unknown_name_lists_what_exists_and_names_the_closest(shapes: Registry) -> None:
    with pytest.raises(
        KeyError,
        match=r"No 'Cirle' in the SHAPE registry \(did you mean 'Circle'\?\)\. Registered: Circle, box, dot\.$",
    ):
        shapes.get("Cirle")
    with pytest.raises(UnknownNameError, match=r"^No 'zzz' in the SHAPE registry\. Registered: Circle"):
        shapes.get("zzz")
    with pytest.raises(UnknownNameError, match="Registered: nothing"):
        Registry("EMPTY").get("a")


def test_the_message_prints_without_quotes_and_escapes(shapes: Registry) -> None:
    with pytest.raises(KeyError, match="zzz") as caught:
        shapes.get("zzz")
    assert str(caught.value).startswith("No 'zzz' in")  # a plain KeyError would print its repr


def test_membership_and_iteration(shapes: Registry) -> None:
    assert "box" in shapes
    assert "Square" not in shapes
    assert {name for name, _ in shapes} == {"Circle", "box", "dot"}


def test_registries_do_not_share_names(shapes: Registry) -> None:
    assert "box" not in Registry("SHAPE")


@pytest.mark.parametrize(
    ("word", "expected"),
    [("adamw", " (did you mean 'AdamW'?)"), ("AdmW", " (did you mean 'AdamW'?)"), ("xyz", ""), ("", "")],
)
def test_suggest_only_when_close(word: str, expected: str) -> None:
    assert suggest(word, ["AdamW", "SGD"]) == expected


def test_suggest_without_candidates() -> None:
    assert suggest("a", []) == ""
