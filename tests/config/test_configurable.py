from __future__ import annotations

import inspect
from typing import Any

import pytest

from dinoengine.config import CfgNode, configurable, get_cfg


class Widget:
    """A widget."""

    @configurable
    def __init__(self, width: int, *, depth: int = 2, label: str = "plain") -> None:
        """Width and depth."""
        self.arguments = (width, depth, label)

    @classmethod
    def from_config(cls, cfg: CfgNode, scale: int = 1) -> dict[str, Any]:
        return {"width": cfg.SEED * scale, "depth": 9}


class OtherWidget(Widget):
    @classmethod
    def from_config(cls, cfg: CfgNode, scale: int = 1) -> dict[str, Any]:
        return {**super().from_config(cfg, scale), "label": "other"}


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.SEED = 4
    return cfg


def test_plain_arguments_do_not_touch_from_config() -> None:
    assert Widget(3).arguments == (3, 2, "plain")
    assert Widget(width=3, depth=1, label="x").arguments == (3, 1, "x")


def test_a_config_as_first_or_named_argument(cfg: CfgNode) -> None:
    assert Widget(cfg).arguments == Widget(cfg=cfg).arguments == (4, 9, "plain")


def test_explicit_arguments_beat_the_config(cfg: CfgNode) -> None:
    assert Widget(cfg, depth=1, label="x").arguments == (4, 1, "x")
    assert Widget(cfg=cfg, width=7).arguments == (7, 9, "plain")


def test_arguments_that_from_config_names_go_to_it(cfg: CfgNode) -> None:
    assert Widget(cfg, scale=10).arguments == Widget(cfg, 10).arguments == (40, 9, "plain")
    assert Widget(cfg, scale=10, depth=0).arguments == (40, 0, "plain")


def test_a_subclass_uses_its_own_from_config(cfg: CfgNode) -> None:
    widget = OtherWidget(cfg)
    assert isinstance(widget, OtherWidget)
    assert widget.arguments == (4, 9, "other")


def test_from_config_with_keyword_arguments_gets_them_all(cfg: CfgNode) -> None:
    class Open:
        @configurable
        def __init__(self, **values: Any) -> None:
            self.values = values

        @classmethod
        def from_config(cls, cfg: CfgNode, **values: Any) -> dict[str, Any]:
            return {"seed": cfg.SEED, **values}

    assert Open(cfg, a=1).values == {"seed": 4, "a": 1}


def test_wrong_arguments_are_type_errors(cfg: CfgNode) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        Widget(cfg, colour=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'width'"):
        Widget(depth=3)


def test_a_class_without_a_usable_from_config_says_so(cfg: CfgNode) -> None:
    class Missing:
        @configurable
        def __init__(self, width: int) -> None:
            self.width = width

    class Static(Missing):
        @staticmethod
        def from_config(cfg: CfgNode) -> dict[str, Any]:
            return {"width": 1}

    class Method(Missing):
        def from_config(self, cfg: CfgNode) -> dict[str, Any]:
            return {"width": 1}

    assert Missing(width=3).width == 3  # not needed without a config
    for bad in (Missing, Static, Method):
        with pytest.raises(TypeError, match=rf"{bad.__name__} needs a classmethod from_config\(cls, cfg\)"):
            bad(cfg)


def test_the_first_argument_of_from_config_is_cfg(cfg: CfgNode) -> None:
    class Named:
        @configurable
        def __init__(self, width: int) -> None:
            self.width = width

        @classmethod
        def from_config(cls, config: CfgNode) -> dict[str, Any]:
            return {"width": config.SEED}

    with pytest.raises(TypeError, match=r"first argument of .*from_config must be named cfg"):
        Named(cfg)


def test_only_init_is_decorated() -> None:
    with pytest.raises(TypeError, match="decorates __init__; got build"):

        @configurable
        def build(self: Any) -> None: ...


def test_documentation_and_signature_are_kept() -> None:
    assert Widget.__init__.__doc__ == "Width and depth."
    assert list(inspect.signature(Widget).parameters) == ["width", "depth", "label"]
    assert Widget.__init__.__annotations__["width"] == "int"
