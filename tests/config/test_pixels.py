from __future__ import annotations

import pytest

from dinoengine.config import ConfigError, get_cfg, validate
from dinoengine.config.config import flatten
from dinoengine.config.pixels import NUM_CHANNELS, PIXEL_KEYS, assumed_format
from dinoengine.config.resume_rules import REFUSED, rule_of
from dinoengine.config.validate import _CHOICES


def test_the_keys_exist_and_no_run_goes_on_with_others() -> None:
    assert set(PIXEL_KEYS) <= set(dict(flatten(get_cfg())))
    assert {rule_of(key).kind for key in PIXEL_KEYS} == {REFUSED}


def test_every_format_but_channels_has_a_number_of_channels() -> None:
    assert {*NUM_CHANNELS, "channels"} == set(_CHOICES["INPUT.FORMAT"])


@pytest.mark.parametrize(
    "channels, image_format, value_range", [(1, "L", ()), (3, "RGB", ()), (4, "channels", (0, 255))]
)
def test_what_is_assumed_is_valid_with_as_many_statistics(
    channels: int, image_format: str, value_range: tuple[int, ...]
) -> None:
    assumed = assumed_format(channels)
    assert assumed == {"INPUT.FORMAT": image_format, "INPUT.VALUE_RANGE": value_range}
    cfg = get_cfg()
    cfg.merge_from_list([word for pair in assumed.items() for word in pair])
    cfg.merge_from_list(["MODEL.PIXEL_MEAN", (0.5,) * channels, "MODEL.PIXEL_STD", (0.5,) * channels])
    cfg.DATASETS.TRAIN = ("synthetic",)
    validate(cfg)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["INPUT.FORMAT", "RGBA"], r"INPUT.FORMAT RGBA has 4 channel\(s\), but MODEL.PIXEL_MEAN has 3"),
        (["INPUT.FORMAT", "channels"], r"INPUT.FORMAT channels needs INPUT.VALUE_RANGE \(low, high\).*\(0, 65535\)"),
        (["INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", (5, 5)], r"needs INPUT.VALUE_RANGE.*got \(5, 5\)"),
        (["INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", (0, float("inf"))], "needs INPUT.VALUE_RANGE"),
        (["INPUT.VALUE_RANGE", (0, 65535)], r"INPUT.VALUE_RANGE \(0, 65535\) is for INPUT.FORMAT channels; RGB has 8"),
        (
            ["INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", (0, 1), "MODEL.PIXEL_STD", (0.5, 0.5)],
            r"INPUT.FORMAT channels has 3 channel\(s\), but MODEL.PIXEL_MEAN has 3 values and MODEL.PIXEL_STD 2",
        ),
    ],
)
def test_what_does_not_go_together(overrides: list[object], message: str) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", "synthetic", *overrides])
    with pytest.raises(ConfigError, match=message):
        validate(cfg)
