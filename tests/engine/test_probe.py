"""Steps that are run to check a plan."""

from __future__ import annotations

import pytest

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.engine.probe import Comparison, measure_flops, run_probe
from dinoengine.engine.workload import require_known_parts
from dinoengine.modeling import build_model
from dinoengine.modeling.backbone import Execution


def test_a_probe_runs_the_share_of_one_process(tiny_cfg: CfgNode) -> None:
    tiny_cfg.INPUT.AUGMENTATION_BACKEND = "device"  # whose batches have no crops as yet
    tiny_cfg.freeze()
    probe = run_probe(tiny_cfg, 2, 1)
    assert probe.setting.startswith("2 images, fp32, cpu")
    assert probe.images_per_second > 0
    kept, flops = probe.comparisons
    assert 0.5 < kept.estimated / kept.measured < 1.5  # so small that indices and norms count
    assert 0.9 < flops.estimated / flops.measured < 1.1


def test_a_probe_takes_nothing_from_the_images_of_the_run(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["DATASETS.QUARANTINE", ("/no/such/list.txt",), "DATALOADER.SAMPLER", "weighted"])
    tiny_cfg.merge_from_list(["DATALOADER.SAMPLE_WEIGHTS", "/no/such/file.npy", "SOLVER.AMP.ENABLED", True])
    tiny_cfg.merge_from_list(["SOLVER.AMP.PRECISION", "auto"])
    tiny_cfg.freeze()
    assert run_probe(tiny_cfg, 1, 1).images_per_second > 0


def test_a_probe_has_one_process_whatever_the_run_was_scaled_for(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(
        ["SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "auto"]
    )
    tiny_cfg.freeze()
    assert run_probe(tiny_cfg, 4, 1).images_per_second > 0


def test_operations_are_counted_without_the_kernel_of_the_run(tiny_cfg: CfgNode) -> None:
    """Kernels of packed attention have no plain products to count, and refuse to run where only those are allowed."""
    model = require_known_parts(build_model(tiny_cfg))
    batch = next(iter(build_train_loader(tiny_cfg)))
    expected = measure_flops(model, batch)
    student = model.student["backbone"]
    student.execution = Execution(attention="varlen")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="varlen does not work on cpu"):
        model(batch)
    assert measure_flops(model, batch) == expected
    assert student.execution == Execution(attention="varlen")


def test_a_comparison_says_by_how_much_it_is_off() -> None:
    text = str(Comparison("kept", "MiB", 110.0, 100.0))
    assert text == "kept: estimated 110.00 MiB, measured 100.00 (+10.0%)"
