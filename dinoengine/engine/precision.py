"""SOLVER.AMP.PRECISION "auto": measured, once in the life of a run."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dinoengine.config import CfgNode, validate
from dinoengine.solver import scale_config_to_world_size
from dinoengine.utils import comm

logger = logging.getLogger(__name__)

# Type of the products of a step; None: no autocast.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rows and width of a product that takes longer than its start: a CPU without bf16 instructions needs a second for it.
_SIZES = {"cpu": (512, 512), "cuda": (8192, 1024)}
_TURNS = 3


def resolve_precision(
    cfg: CfgNode,
    earlier: Callable[[], list[dict[str, Any]]],
    measure: Callable[[str], dict[str, float]] | None = None,
) -> CfgNode:
    """``cfg`` with SOLVER.AMP.PRECISION "auto" replaced by "bf16" or "fp32", the same on all processes.

    What a run was started with it keeps: a checkpoint goes on in the precision it was made in, on whatever machine.

    Args:
        earlier: gives the saved configs of the run that is resumed or forked, as nested values; the first that says
            wins.
        measure: seconds of a product by precision, for a device; None: ``time_products``.

    Raises:
        ConfigError: if the run was started in a precision that is not possible with this config (fp16, which needs CUDA
            and no MODEL.PARALLEL fsdp).
    """
    if not cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.AMP.PRECISION != "auto":
        return cfg
    saved = [config.get("SOLVER", {}).get("AMP", {}) for config in comm.on_main_process(earlier)]
    used = (amp.get("PRECISION") for amp in saved if amp.get("ENABLED"))
    chosen = next((value for value in used if value in ("bf16", "fp32", "fp16")), None)
    is_inherited = chosen is not None
    if is_inherited:
        logger.info("SOLVER.AMP.PRECISION auto: %s, as the run was started with.", chosen)
    else:
        seconds = comm.on_main_process(lambda: (measure or time_products)(cfg.MODEL.DEVICE))
        chosen = min(seconds, key=lambda name: seconds[name])
        timed = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
        rows, width = _SIZES[cfg.MODEL.DEVICE]
        logger.info(
            "SOLVER.AMP.PRECISION auto: %s on %s, by a [%d, %d] x [%d, %d] product (%s). Resumed runs keep it.",
            *(chosen, cfg.MODEL.DEVICE, rows, width, width, 4 * width, timed),
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.AMP.PRECISION = chosen
    if is_inherited:  # what was checked before was "auto", of which only bf16 and fp32 can come here
        validate(scale_config_to_world_size(cfg, comm.get_world_size()), comm.get_world_size())
    cfg.freeze()
    return cfg


def time_products(device: str) -> dict[str, float]:
    """Median seconds of a matrix product on ``device`` in "fp32" and "bf16", in turns, under the settings of torch.

    The fp32 product is what the run would do: with TF32 where FLOAT32_PRECISION allows it. Weights are cast in every turn,
    as autocast does.
    """
    generator = torch.Generator().manual_seed(0)  # apart from the run's random numbers
    rows, width = _SIZES[device]
    x = torch.randn(rows, width, generator=generator).to(device)
    weight = torch.randn(4 * width, width, generator=generator).to(device)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(_TURNS + 1):
        for name, times in seconds.items():
            _wait(device)
            start = time.perf_counter()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=name == "bf16", cache_enabled=False):
                torch.nn.functional.linear(x, weight)
            _wait(device)
            times.append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
