from __future__ import annotations

import contextlib
import io
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from dinoengine.utils.events import EventStorage, get_event_storage, has_event_storage


def _stored(storage: EventStorage) -> list[tuple[str, float, int]]:
    return storage.updates_since(0)[0]


# ------------------------------------------------------------------------------------------------ the ambient storage


def test_outside_of_a_storage_the_error_says_what_to_do() -> None:
    assert not has_event_storage()
    with pytest.raises(RuntimeError, match=r"No EventStorage is open: .*with EventStorage\(0\)"):
        get_event_storage()


def test_the_innermost_storage_is_the_ambient_one() -> None:
    with EventStorage(0) as outer:
        assert get_event_storage() is outer
        with EventStorage(5) as inner:
            assert get_event_storage() is inner
            get_event_storage().put_scalar("discarded", 1.0)
        assert get_event_storage() is outer
        assert has_event_storage()
        assert _stored(outer) == []
    assert not has_event_storage()


def test_an_exception_closes_the_storage() -> None:
    with pytest.raises(ValueError, match="boom"), EventStorage(0):
        raise ValueError("boom")
    assert not has_event_storage()


# ------------------------------------------------------------------------------------------------ scalars


def test_a_value_belongs_to_the_current_iteration_unless_another_is_given() -> None:
    storage = EventStorage(7)
    storage.put_scalar("a", 1)
    storage.iter = 8
    storage.put_scalar("a", 2)
    storage.put_scalar("a", 3, cur_iter=7)  # a value that arrives late
    assert _stored(storage) == [("a", 1.0, 7), ("a", 2.0, 8), ("a", 3.0, 7)]
    assert storage.history("a").values() == [(1.0, 7), (2.0, 8), (3.0, 7)]


@pytest.mark.parametrize("value", [2, np.float32(2), np.float64(2), torch.tensor(2), torch.tensor([2.0])])
def test_values_become_plain_floats(value: Any) -> None:
    storage = EventStorage()
    storage.put_scalar("a", value)
    (entry,) = _stored(storage)
    assert entry == ("a", 2.0, 0)
    assert type(entry[1]) is float
    assert type(storage.latest()["a"][0]) is float


def test_put_scalars_passes_everything_on_for_any_name() -> None:
    storage = EventStorage()
    storage.put_scalars({"knn/top1_k20": 1, "x y": 2}, smoothing_hint=False, cur_iter=9, role="eval")
    assert storage.latest() == {"knn/top1_k20": (1.0, 9), "x y": (2.0, 9)}
    assert storage.latest_with_smoothing_hint(20) == storage.latest()
    assert storage.names("eval") == ["knn/top1_k20", "x y"]


def test_names_by_role_in_the_order_of_first_appearance() -> None:
    storage = EventStorage()
    for name, role in [("b", "loss"), ("m", "metric"), ("a", "loss"), ("n", ""), ("b", "loss")]:
        storage.put_scalar(name, 0.0, role=role)
    assert storage.names("loss") == ["b", "a"]
    assert storage.names("") == ["n"]
    assert storage.names("schedule") == []
    assert storage.role("m") == "metric"


@pytest.mark.parametrize("second", [{"role": "metric"}, {"smoothing_hint": False, "role": "loss"}, {}])
def test_a_name_keeps_its_role_and_hint(second: dict[str, Any]) -> None:
    storage = EventStorage()
    storage.put_scalar("a", 1.0, role="loss")
    with pytest.raises(
        ValueError, match=r"'a' was put with role='loss', smoothing_hint=True before; got .* Use another name"
    ):
        storage.put_scalar("a", 2.0, **second)
    assert _stored(storage) == [("a", 1.0, 0)]
    storage.put_scalar("a", 3.0, role="loss")
    assert storage.latest()["a"] == (3.0, 0)


def test_an_unknown_role_is_refused() -> None:
    storage = EventStorage()
    with pytest.raises(ValueError, match=r"role must be one of .*'schedule'.*; got 'losses' for 'a'"):
        storage.put_scalar("a", 1.0, role="losses")
    storage.put_scalar("a", 1.0, role="loss")  # the refused role left no trace


def test_a_value_that_is_no_number_leaves_no_trace() -> None:
    storage = EventStorage()
    with pytest.raises(ValueError, match="could not convert"):
        storage.put_scalar("a", "abc", role="loss")  # type: ignore[arg-type]
    assert storage.names("loss") == []


def test_an_unknown_name_lists_the_known_ones() -> None:
    storage = EventStorage()
    storage.put_scalars({"b": 1, "a": 2})
    with pytest.raises(KeyError, match="No scalar 'c' in the storage; there are: a, b"):
        storage.history("c")


def test_name_scopes_nest_and_survive_exceptions() -> None:
    storage = EventStorage()
    with storage.name_scope("eval"):
        storage.put_scalar("a", 1)
        with contextlib.suppress(ZeroDivisionError), storage.name_scope("digits/"):
            storage.put_scalar("a", 2)
            storage.put_scalar("never", 1 / 0)
        storage.put_scalar("b", 3)
        storage.put_image("image", np.zeros((1, 1), np.uint8))
        storage.put_histogram("histogram", torch.zeros(1))
    storage.put_scalar("a", 4)
    assert [name for name, _, _ in _stored(storage)] == ["eval/a", "eval/digits/a", "eval/b", "a"]
    assert storage.images_since(0)[0].name == "eval/image"
    assert storage.histograms_since(0)[0].name == "eval/histogram"


# ------------------------------------------------------------------------------------------------ smoothing


def test_samples_in_a_window_count_iterations_not_values() -> None:
    storage = EventStorage()
    for i in range(100):
        storage.iter = i
        for period in (1, 2, 5):
            if (i + 1) % period == 0:
                storage.put_scalar(f"every_{period}", i)
    assert [storage.count_samples(f"every_{period}", 10) for period in (1, 2, 5)] == [10, 5, 2]
    assert [storage.smoothed(f"every_{period}", 10) for period in (1, 2, 5)] == [94.5, 95.0, 96.5]


@pytest.mark.parametrize("window", [1, 2, 7, 20])
def test_smoothing_is_the_median_of_the_last_iterations(window: int) -> None:
    generator = np.random.default_rng(window)
    storage = EventStorage()
    put: list[tuple[float, int]] = []
    for i in range(200):
        storage.iter = i
        if generator.random() < 0.6:
            put.append((float(generator.normal()), i))
            storage.put_scalar("a", put[-1][0])
            storage.put_scalar("raw", put[-1][0], smoothing_hint=False)
            expected = statistics.median(v for v, iteration in put if iteration > put[-1][1] - window)
            assert storage.smoothed("a", window) == pytest.approx(expected)
            latest = storage.latest_with_smoothing_hint(window)
            assert latest["a"] == (pytest.approx(expected), put[-1][1])
            assert latest["raw"] == put[-1]


def test_one_outlier_does_not_show_in_the_median_and_nan_does() -> None:
    storage = EventStorage()
    for i in range(5):
        storage.put_scalar("a", 1e9 if i == 2 else 1.0, cur_iter=i)
        storage.put_scalar("b", math.nan if i == 2 else 1.0, cur_iter=i)
    assert storage.smoothed("a") == 1.0
    assert math.isnan(storage.smoothed("b"))


# ------------------------------------------------------------------------------------------------ bounded memory


def test_memory_does_not_grow_with_the_run() -> None:
    storage = EventStorage()
    for i in range(70_000):
        storage.put_scalar("a", i, cur_iter=i)
    assert len(storage.history("a").values()) == 1024
    assert storage.history("a").values()[-1] == (69_999.0, 69_999)
    assert len(_stored(storage)) == 2**16
    for i in range(100):
        storage.iter = i
        storage.put_image("image", np.full((2, 2), i, np.uint8))
        storage.put_histogram("histogram", torch.tensor([float(i)]))
    assert [image.iteration for image in storage.images_since(0)] == list(range(36, 100))
    assert [histogram.iteration for histogram in storage.histograms_since(0)] == list(range(36, 100))


# ------------------------------------------------------------------------------------------------ readers


def test_every_reader_sees_each_value_once_whatever_its_period() -> None:
    storage = EventStorage()
    readers: dict[int, tuple[int, list[Any]]] = {period: (0, []) for period in (1, 3, 7)}
    for i in range(50):
        storage.iter = i
        storage.put_scalar("a", i)
        if i % 4 == 0:
            storage.put_scalar("late", i, cur_iter=max(0, i - 5))
            storage.put_image("image", np.zeros((1, 1), np.uint8))
        for period, (sequence, seen) in readers.items():
            if (i + 1) % period == 0 or i == 49:
                updates, next_sequence = storage.updates_since(sequence)
                seen += updates
                seen += [(image.name, image.sequence) for image in storage.images_since(sequence)]
                readers[period] = (next_sequence, seen)
    expected = _stored(storage) + [(image.name, image.sequence) for image in storage.images_since(0)]
    for sequence, seen in readers.values():
        assert sorted(map(str, seen)) == sorted(map(str, expected))
        assert storage.updates_since(sequence)[0] == []
        assert storage.images_since(sequence) == []


# ------------------------------------------------------------------------------------------------ images, histograms


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_images_keep_pixels_and_iteration(shape: tuple[int, ...], kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    storage = EventStorage(6)
    storage.put_image("crops", torch.from_numpy(pixels) if kind == "torch" else pixels)
    (image,) = storage.images_since(0)
    assert (image.name, image.iteration) == ("crops", 6)
    np.testing.assert_array_equal(image.image, pixels)


@pytest.mark.parametrize(
    ("image", "given"),
    [
        (np.zeros((4, 5, 3), np.float32), r"float32 \[4, 5, 3\]"),
        (np.zeros(5, np.uint8), r"uint8 \[5\]"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), r"uint8 \[1, 3, 4, 5\]"),
    ],
)
def test_other_images_are_refused(image: Any, given: str) -> None:
    with pytest.raises(ValueError, match=rf"takes uint8 \[H, W, C\] or \[H, W\]; got {given}"):
        EventStorage().put_image("a", image)


def test_an_image_is_kept_as_it_was_when_it_was_put() -> None:
    storage, buffer = EventStorage(), np.zeros((2, 2), np.uint8)
    storage.put_image("a", buffer)
    buffer[:] = 9
    assert storage.images_since(0)[0].image.max() == 0


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_histograms_count_every_element_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    storage = EventStorage(3)
    storage.put_histogram("gradient", values, bins=10)
    (histogram,) = storage.histograms_since(0)
    assert (histogram.name, histogram.iteration) == ("gradient", 3)
    assert histogram.counts.sum() == values.numel()
    assert len(histogram.edges) == len(histogram.counts) + 1 == 11
    for low, high, count in zip(histogram.edges[:-2], histogram.edges[1:-1], histogram.counts[:-1], strict=True):
        assert count == sum(low <= v < high for v in values.float().flatten().tolist())


def test_histograms_take_parameters_and_empty_tensors() -> None:
    storage = EventStorage()
    storage.put_histogram("parameter", torch.nn.Parameter(torch.ones(3)))
    storage.put_histogram("empty", torch.zeros(0, 4))
    assert [histogram.counts.sum() for histogram in storage.histograms_since(0)] == [3, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_histogram_of_non_finite_values_does_not_end_the_run(bad: float) -> None:
    storage = EventStorage()
    storage.put_histogram("gradient", torch.tensor([1.0, bad, 2.0]))
    assert storage.histograms_since(0)[0].counts.sum() == 2


# ------------------------------------------------------------------------------------------------ state


def _filled() -> EventStorage:
    storage = EventStorage()
    for i in range(1100):
        storage.put_scalar("total_loss", math.sin(i), cur_iter=i, role="loss")
        storage.put_scalar("lr", i, cur_iter=i, smoothing_hint=False, role="schedule")
    storage.put_scalar("odd", math.nan, cur_iter=5)
    return storage


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_state_passes_weights_only_and_restores_medians_roles_and_hints() -> None:
    before, after = _filled(), EventStorage(1100)
    after.load_state_dict(_through_a_file(before.state_dict()))
    assert {name: str(entry) for name, entry in after.latest().items()} == {
        name: str(entry) for name, entry in before.latest().items()
    }
    for window in (1, 20, 1000):
        assert after.history("total_loss").median(window) == before.history("total_loss").median(window)
        assert str(after.latest_with_smoothing_hint(window)) == str(before.latest_with_smoothing_hint(window))
    assert (after.names("loss"), after.names("schedule"), after.names("")) == (["total_loss"], ["lr"], ["odd"])
    with pytest.raises(ValueError, match="'lr' was put with role='schedule', smoothing_hint=False"):
        after.put_scalar("lr", 1.0)


def test_restored_values_can_be_told_from_new_ones() -> None:
    storage = EventStorage(1100)
    storage.load_state_dict(_filled().state_dict())
    restored = _stored(storage)
    assert len(restored) == 1024 + 1024 + 1  # a writer may not have had them before the run ended
    assert {iteration for name, _, iteration in restored if name == "lr"} == set(range(76, 1100))
    storage.put_scalar("total_loss", 2.0, role="loss")
    assert storage.updates_since(storage.restored_sequence)[0] == [("total_loss", 2.0, 1100)]
    assert len(storage.history("total_loss").values()) == 1024
    assert storage.count_samples("total_loss", 20) == 20


def test_the_state_is_a_copy() -> None:
    storage = _filled()
    state = storage.state_dict()
    storage.put_scalar("total_loss", 5.0, cur_iter=1100, role="loss")
    assert state["total_loss"]["values"][-1][1] == 1099
