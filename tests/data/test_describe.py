from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import TensorRow, build_test_loader, build_train_loader, describe_batch
from dinoengine.data.describe import _MEANINGS


def _rows(batch) -> dict[str, TensorRow]:
    return {row.name: row for row in describe_batch(batch)}


def test_rows_are_those_of_a_real_training_batch(tiny_cfg: CfgNode) -> None:
    rows = _rows(next(iter(build_train_loader(tiny_cfg))))
    # 4 images, 2 global views of 8 x 8 and 2 local ones of 4 x 4, patches of 4 x 4
    assert [(r.name, r.shape, r.dtype) for r in rows.values()] == [
        ("global_crops", "(8, 3, 8, 8)", "uint8"),
        ("local_crops", "(8, 3, 4, 4)", "uint8"),
        ("masks", "(8, 4)", "bool"),
        ("positions", "(4,)", "int64"),
    ]


def test_rows_of_an_evaluation_batch(tiny_cfg: CfgNode) -> None:
    rows = describe_batch(next(iter(build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST))))
    assert [(r.name, r.shape, r.dtype) for r in rows] == [
        ("images", "(9, 3, 8, 8)", "uint8"),
        ("labels", "(9,)", "int64"),
        ("indices", "(9,)", "int64"),
        ("masks", "none", "none"),
    ]
    assert rows[-1].meaning == "the dataset has no masks"


def test_what_a_config_leaves_out_is_shown_with_the_reason(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["INPUT.LOCAL_CROPS.NUM", 0, "MODEL.LOSS.IBOT_WEIGHT", 0])
    rows = _rows(next(iter(build_train_loader(tiny_cfg))))
    assert rows["local_crops"] == TensorRow("local_crops", "none", "none", "INPUT.LOCAL_CROPS.NUM is 0")
    assert rows["masks"] == TensorRow("masks", "none", "none", "MODEL.LOSS.IBOT_WEIGHT is 0")


@pytest.mark.parametrize("batch_type", list(_MEANINGS), ids=lambda t: t.__name__)
def test_every_tensor_of_a_batch_has_a_meaning(batch_type: type) -> None:
    hints = get_type_hints(batch_type)
    tensors = {f.name for f in fields(batch_type) if hints[f.name] in (Tensor, Tensor | None)}
    assert tensors == _MEANINGS[batch_type].keys()
