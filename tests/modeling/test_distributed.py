"""Losses and targets over 2 and 4 processes are those of one process on the whole batch."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.config import get_cfg
from dinoengine.engine import launch
from dinoengine.modeling import build_model
from dinoengine.modeling.losses import Centering, SinkhornKnopp, koleo_loss
from dinoengine.structures import SSLBatch
from dinoengine.utils import comm
from tests.conftest import TINY

pytestmark = pytest.mark.slow

IMAGES = 8
# Rows of each rank; the second has none.
ROWS = {1: [7], 2: [7, 0], 4: [3, 0, 2, 2]}
METHODS = {
    "centering": [],
    "sinkhorn, group over ranks": ["MODEL.LOSS.CENTERING", "sinkhorn_knopp", "MODEL.LOSS.KOLEO_GROUP_SIZE", 4],
    "separate head, group in rank": ["MODEL.IBOT_HEAD.SEPARATE", True, "MODEL.LOSS.KOLEO_GROUP_SIZE", 2],
}


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mine(rows: Tensor) -> Tensor:
    return rows.chunk(comm.get_world_size())[comm.get_rank()]


def _targets() -> dict[str, Tensor]:
    rows = ROWS[comm.get_world_size()]
    logits = _random(7, 5, seed=0).float().split(rows)[comm.get_rank()]
    centering = Centering(5)
    centering.update(logits)
    probs = SinkhornKnopp(3)(logits, 0.5)
    return {"sinkhorn": torch.cat(comm.all_gather(probs)), "center": centering.center}


def _koleo(group: int) -> dict[str, Tensor]:
    features = _mine(_random(IMAGES, 3, seed=1)).requires_grad_()
    loss = koleo_loss(features, group) / comm.get_world_size()  # as DDP averages over ranks
    loss.backward()
    assert features.grad is not None
    return {
        "value": torch.stack(comm.all_gather(loss.detach())).sum(),
        "gradient": torch.cat(comm.all_gather(features.grad)),
    }


def _method(opts: list[Any]) -> dict[str, Tensor]:
    cfg = get_cfg()
    cfg.merge_from_list([word for key, value in TINY.items() for word in (key, str(value))])
    cfg.merge_from_list(opts)
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    pixels = torch.Generator().manual_seed(2)

    def crops(views: int, size: int) -> Tensor:
        whole = torch.randint(0, 256, (views, IMAGES, 3, size, size), generator=pixels, dtype=torch.uint8)
        return torch.stack([_mine(view) for view in whole]).flatten(0, 1)

    masks = torch.rand(2, IMAGES, 4, generator=pixels) < 0.4
    batch = SSLBatch(
        crops(2, 8),
        crops(2, 4),
        torch.stack([_mine(m) for m in masks]).flatten(0, 1),
        _mine(torch.arange(IMAGES)),
        2,
        2,
    )
    loss = model(batch).total() / comm.get_world_size()
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {
        "value": torch.stack(comm.all_gather(loss.detach())).sum(),
        "gradient": comm.all_reduce_sum(flat),
        "centers": torch.cat(
            [b.flatten() for name, b in model.named_buffers() if "center" in name] or [torch.zeros(0)]
        ),
    }


def _everything() -> dict[str, dict[str, Tensor]]:
    return {
        "targets": _targets(),
        **{f"koleo {group}": _koleo(group) for group in (0, 2, 4)},
        **{name: _method(opts) for name, opts in METHODS.items()},
    }


def _work(folder: str) -> None:
    torch.set_num_threads(1)
    torch.save(_everything(), os.path.join(folder, f"{comm.get_rank()}.pt"))


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    launch(_work, request.param, args=(folder,), device="cpu")
    return [torch.load(os.path.join(folder, f"{r}.pt"), weights_only=True) for r in range(request.param)]


@pytest.mark.parametrize("what", ["targets", "koleo 0", "koleo 2", "koleo 4", *METHODS])
def test_many_processes_compute_what_one_does(ranks: list[dict[str, Any]], what: str) -> None:
    expected = _everything()[what]
    for rank in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(rank[what][name], value, rtol=1e-4, atol=1e-5, msg=f"{what}: {name}")
