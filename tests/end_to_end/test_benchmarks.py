"""The benchmarks of speed and scale run from end to end with sizes too small to say anything, and judge rightly."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return _load("gpu")


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return _load("scaling")


@pytest.mark.slow
def test_all_rows_of_the_gpu_benchmark_run_on_the_cpu(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    gpu.main(["--tiny", "--row-seconds", "60"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads(printed[-1])
    assert len(rows) == len(list(gpu.tasks(gpu.TINY)))
    assert {row["status"] for row in rows if row["how"] not in gpu.VARIANTS} == {"ok"}
    assert all(row["status"] == "ok" or row["status"].startswith("not available: ") for row in rows)
    for row in rows:
        assert ("images_per_second" in row) == (row["status"] == "ok")
        if "tflops" in row:
            assert row["share_of_matrix_rate"] == pytest.approx(row["tflops"] / row["matrix_tflops"])
    assert sum(line.startswith("| ") for line in printed) == len(rows) + 2


def test_a_row_that_fails_or_takes_too_long_costs_no_other(gpu: ModuleType) -> None:
    def fill() -> None:
        raise torch.OutOfMemoryError("no room")

    def fail() -> None:
        raise ValueError("not here\nat all")

    def status(work: object, seconds: float = 20) -> str:
        return str(gpu.run(gpu.Task("what", "how", work), seconds)["status"])

    assert status(fill) == "out of memory"
    assert status(fail) == "failed: ValueError: not here"
    assert status(lambda: os._exit(9)) == "failed: the process ended with code 9"
    assert status(lambda: time.sleep(60), 0.2) == "stopped after 0 s"
    assert status(lambda: {"seconds": 1.0}) == "ok"


def test_rows_behind_the_time_limit_say_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--tiny", "--minutes", "0"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["status"] for row in rows} == {"not reached in the time given"}


def test_a_key_of_another_version_is_not_available(gpu: ModuleType) -> None:
    row = gpu.time_steps(gpu.TINY, "ViT-micro/8", "NO_SUCH", 1)
    assert row == {"status": "not available: no key NO_SUCH of MODEL"}


def test_a_choice_that_the_config_refuses_is_not_available(gpu: ModuleType) -> None:
    row = gpu.time_steps(gpu.TINY, "ViT-micro/8", "DEVICE", "tpu")
    assert row["status"].startswith("not available: ")
    assert "tpu" in row["status"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_full_benchmark_says_what_runs(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "no GPU is visible to torch; --tiny runs on the CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_of_the_scaling_benchmark_runs(scaling: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--tiny"])
    printed = capsys.readouterr().out
    for name, (_, counted, _, sizes) in scaling.PARTS.items():
        assert f"\n{name}\n\n| {counted} | " in printed
        assert all(f"\n| {size:,} | " in printed for size in sizes)


def test_knees_are_where_a_cost_grows_faster_than_the_size(scaling: ModuleType) -> None:
    sizes = [10, 100, 1000]
    line = [{"a ms": 3.0 * n, "b ms": 50.0} for n in sizes]
    assert list(scaling.knees(sizes, line)) == []
    late = [{"a ms": 10.0}, {"a ms": 100.0}, {"a ms": 10_000.0}]
    assert list(scaling.knees(sizes, late)) == ["a ms: grows as n^2.0 from 100 to 1,000"]
    noise = [{"a ms": 0.001}, {"a ms": 0.1}, {"a ms": 1.5}]
    assert list(scaling.knees(sizes, noise)) == []
