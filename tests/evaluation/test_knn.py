from __future__ import annotations

import logging
import math
import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dinoengine.config import get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import (
    Features,
    KNNEvaluator,
    KNNSettings,
    build_evaluator,
    inference_on_dataset,
    knn_accuracy,
    knn_scores,
)
from dinoengine.evaluation.knn import few_shot_rows
from dinoengine.structures import BackboneOutput
from dinoengine.utils import logger as logger_module
from tests.evaluation.fakes import identity_features, make_loader


def _random_features(seed: int, rows: int, dim: int, labels: list[int]) -> Features:
    """Rows in clusters that overlap, so that neither 0 nor 100 percent is right."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(random.Random(seed).choices(labels, k=rows))
    centres = torch.randn(max(labels) - min(labels) + 1, dim, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(rows, dim, generator=generator)
    scale = torch.rand(rows, 1, generator=generator) * 5 + 0.1  # rows of all lengths: cosine must not care
    return Features((centres[chosen - min(labels)] + 1.2 * noise) * scale, chosen)


def _accuracy(bank: Features, queries: Features, ks: list[int], **settings: Any) -> dict[str, float]:
    return knn_accuracy(bank, queries, KNNSettings(ks, **settings))


def _slow_accuracy(bank: Features, queries: Features, ks: list[int], temperature: float) -> dict[str, float]:
    """The protocol in loops over float64 numbers."""
    assert bank.labels is not None
    assert queries.labels is not None
    unit = [[row / math.hypot(*r) for row in r] for r in bank.features.double().tolist()]
    hits: dict[str, int] = defaultdict(int)
    for query, label in zip(queries.features.double().tolist(), queries.labels.tolist(), strict=True):
        length = math.hypot(*query)
        similarities = [sum(a * b for a, b in zip(query, row, strict=True)) / length for row in unit]
        nearest = sorted(range(len(unit)), key=lambda i: -similarities[i])[: max(ks)]
        total = sum(math.exp(similarities[i] / temperature) for i in nearest)
        for k in ks:
            votes: dict[int, float] = defaultdict(float)
            for i in nearest[:k]:
                votes[int(bank.labels[i])] += math.exp(similarities[i] / temperature) / total
            ranking = sorted(votes, key=lambda c: -votes[c])
            hits[f"top1_k{k}"] += label == ranking[0]
            hits[f"top5_k{k}"] += label in ranking[:5]
    return {name: 100.0 * count / len(queries) for name, count in hits.items()}


@pytest.fixture
def warnings_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger_module, "_counts", Counter())  # warnings that are given once are given again
    logger = logging.getLogger("dinoengine.evaluation.knn")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, logger.name)
    return caplog


# --- scores ------------------------------------------------------------------------------------------------------

# One query along the first axis; its similarities to the bank are 0.9 (class 1), 1.0 (class 0) and 0.8 (class 1).
BANK = torch.tensor([[0.9, math.sqrt(0.19)], [1.0, 0.0], [0.8, -0.6]])
QUERY = torch.tensor([[1.0, 0.0]])
CLASSES = torch.tensor([1, 0, 1])


def _scores(num_classes: int, ks: list[int], temperature: float) -> dict[int, Tensor]:
    similarity = QUERY @ BANK.T
    order = similarity.argsort(dim=1, descending=True)[:, : max(ks)]
    return {k: knn_scores(similarity.gather(1, order), CLASSES[order], num_classes, k, temperature) for k in ks}


def test_scores_by_hand() -> None:
    scores = _scores(2, [1, 2, 3], temperature=0.1)
    total = math.e**10 + math.e**9 + math.e**8
    first, second, third = (math.e**power / total for power in (10, 9, 8))  # 0.665, 0.245, 0.090
    expected = {1: [first, 0.0], 2: [first, second], 3: [first, second + third]}
    for k, values in expected.items():
        torch.testing.assert_close(scores[k], torch.tensor([values]), rtol=1e-5, atol=1e-7)


def test_temperature_decides_between_one_near_and_two_farther_neighbours() -> None:
    winners = [int(_scores(2, [3], t)[3].argmax()) for t in (0.1, 1.0)]
    assert winners == [0, 1]


def test_weights_are_normalised_over_the_largest_k_and_then_cut() -> None:
    alone = _scores(2, [1], 0.1)[1]
    beside = _scores(2, [1, 3], 0.1)[1]
    assert alone.tolist() == [[1.0, 0.0]]
    assert beside[0, 0].item() == pytest.approx(0.6652, abs=1e-4)
    assert _scores(2, [3], 0.1)[3].sum().item() == pytest.approx(1.0, abs=1e-6)


def test_a_very_low_temperature_is_the_nearest_neighbour_and_stays_finite() -> None:
    scores = _scores(2, [3], 1e-6)[3]
    assert scores.tolist() == [[1.0, 0.0]]


def test_scores_of_classes_that_no_neighbour_has_are_zero() -> None:
    assert _scores(5, [3], 0.1)[3][0, 2:].tolist() == [0.0, 0.0, 0.0]


# --- accuracy against other implementations ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("labels", [[0, 1, 2], list(range(9)), [-7, 3, 4, 5, 6, 7, 40]])
def test_accuracy_equals_the_slow_loop(seed: int, labels: list[int]) -> None:
    bank, queries = (_random_features(seed + add, rows, 4, labels) for add, rows in ((0, 47), (100, 31)))
    ks = [5, 10, 47]
    expected = _slow_accuracy(bank, queries, ks, 0.07)
    if len(labels) <= 5:
        expected = {name: value for name, value in expected.items() if name.startswith("top1")}
        assert _accuracy(bank, queries, ks, memory_mib=1) == pytest.approx(expected)
        return
    actual = _accuracy(bank, queries, ks, memory_mib=1)
    assert actual.keys() == expected.keys()
    for k in ks:
        assert actual[f"top1_k{k}"] == pytest.approx(expected[f"top1_k{k}"])
    # The loop ranks classes with a vote only; the two agree where every neighbourhood has five classes or more.
    assert actual["top5_k47"] == pytest.approx(expected["top5_k47"])
    assert 0 < actual["top1_k10"] < actual["top5_k47"] <= 100


@pytest.mark.parametrize("k", [1, 3, 20])
def test_accuracy_equals_scikit_learn(k: int) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, queries = (_random_features(seed, rows, 6, [2, 3, 11]) for seed, rows in ((0, 200), (1, 101)))
    assert bank.labels is not None
    assert queries.labels is not None

    def weights(distances: np.ndarray) -> np.ndarray:  # of the cosine distance 1 - similarity
        return np.exp((1.0 - distances) / 0.07)

    classifier = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    classifier.fit(bank.features.double().numpy(), bank.labels.numpy())
    expected = 100.0 * classifier.score(queries.features.double().numpy(), queries.labels.numpy())
    assert 40 < expected < 100
    assert _accuracy(bank, queries, [k])[f"top1_k{k}"] == pytest.approx(expected)


# --- invariances -------------------------------------------------------------------------------------------------


def _pair(labels: list[int] | None = None) -> tuple[Features, Features]:
    labels = list(range(8)) if labels is None else labels
    return _random_features(3, 80, 5, labels), _random_features(4, 53, 5, labels)


def test_lengths_of_rows_do_not_matter() -> None:
    bank, queries = _pair()
    longer = Features(bank.features * torch.linspace(0.01, 100, 80)[:, None], bank.labels)
    assert _accuracy(longer, queries, [10]) == _accuracy(bank, queries, [10])


def test_the_order_of_bank_and_queries_does_not_matter() -> None:
    def shuffled(features: Features) -> Features:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        assert features.labels is not None
        return Features(features.features[order], features.labels[order])

    bank, queries = _pair()
    expected = _accuracy(bank, queries, [1, 10, 20])
    assert _accuracy(shuffled(bank), shuffled(queries), [1, 10, 20]) == expected


def test_the_names_of_classes_do_not_matter() -> None:
    bank, queries = _pair()
    assert bank.labels is not None
    assert queries.labels is not None
    names = torch.tensor([500, -1, 7, 0, -(2**40), 3, 2**40, 9])
    renamed = (Features(bank.features, names[bank.labels]), Features(queries.features, names[queries.labels]))
    for metric, value in _accuracy(*renamed, [10, 20]).items():
        if metric.startswith("top1"):
            assert value == _accuracy(bank, queries, [10, 20])[metric]


def test_a_k_does_not_depend_on_the_other_ks() -> None:
    bank, queries = _pair()
    together = _accuracy(bank, queries, [40, 1, 10, 10])
    for k in (1, 10, 40):
        assert _accuracy(bank, queries, [k])[f"top1_k{k}"] == together[f"top1_k{k}"]
    assert list(together) == [f"top{top}_k{k}" for k in (40, 1, 10) for top in (1, 5)]


def test_the_bank_on_itself_is_perfect_at_k_1() -> None:
    bank, _ = _pair()
    assert _accuracy(bank, bank, [1])["top1_k1"] == 100.0


def test_the_same_input_gives_the_same_output_with_ties() -> None:
    rows = torch.ones(40, 3)  # every neighbour as near as every other
    bank, queries = Features(rows, torch.arange(40) % 8), Features(rows[:9], torch.arange(9) % 8)
    first = _accuracy(bank, queries, [1, 10])
    assert all(_accuracy(bank, queries, [1, 10]) == first for _ in range(5))


# --- edges -------------------------------------------------------------------------------------------------------


def test_k_above_the_bank_is_cut_and_said(warnings_logged: pytest.LogCaptureFixture) -> None:
    bank, queries = _random_features(0, 23, 3, [0, 1]), _random_features(1, 10, 3, [0, 1])
    all_of_them = _accuracy(bank, queries, [10, 23])
    expected = {
        "top1_k10": all_of_them["top1_k10"],
        **dict.fromkeys(("top1_k100", "top1_k200"), all_of_them["top1_k23"]),
    }
    assert _accuracy(bank, queries, [10, 100, 200]) == expected
    assert warnings_logged.messages == ["k-NN: the training set has 23 images; for larger k all of them vote."]


def test_k_equal_to_the_bank_is_no_warning(warnings_logged: pytest.LogCaptureFixture) -> None:
    bank = _random_features(0, 23, 3, [0, 1])
    _accuracy(bank, bank, [23])
    assert warnings_logged.messages == []


def test_one_class_is_always_right() -> None:
    bank, queries = _random_features(0, 9, 3, [4]), _random_features(1, 5, 3, [4])
    assert _accuracy(bank, queries, [1, 5]) == {"top1_k1": 100.0, "top1_k5": 100.0}


def test_one_image_in_the_bank_and_one_query() -> None:
    bank = Features(torch.tensor([[1.0, 2.0]]), torch.tensor([7]))
    assert _accuracy(bank, Features(torch.tensor([[-1.0, 0.0]]), torch.tensor([7])), [10]) == {"top1_k10": 100.0}
    assert _accuracy(bank, Features(torch.tensor([[1.0, 2.0]]), torch.tensor([8])), [10]) == {"top1_k10": 0.0}


def test_a_class_that_the_bank_does_not_have_counts_as_wrong() -> None:
    bank = Features(torch.eye(3), torch.tensor([0, 1, 2]))
    queries = Features(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 9, -1]))
    assert _accuracy(bank, queries, [1]) == {"top1_k1": 50.0}


@pytest.mark.parametrize("num_classes, metrics", [(5, {"top1_k6"}), (6, {"top1_k6", "top5_k6"})])
def test_top_5_is_reported_for_more_than_five_classes(num_classes: int, metrics: set[str]) -> None:
    bank = Features(torch.eye(6), torch.arange(6) % num_classes)
    assert _accuracy(bank, bank, [6]).keys() == metrics


def test_top_5_by_hand() -> None:
    # Six classes at angles 0, 10, ... 50 degrees; a query at 0 ranks them 0, 1, 2, 3, 4, 5.
    angles = torch.deg2rad(torch.arange(6) * 10.0)
    bank = Features(torch.stack((angles.cos(), angles.sin()), dim=1), torch.arange(6))
    queries = Features(torch.tensor([[1.0, 0.0]]).expand(6, 2).contiguous(), torch.arange(6))
    assert _accuracy(bank, queries, [6]) == pytest.approx({"top1_k6": 100 / 6, "top5_k6": 500 / 6})


def test_a_row_of_zeros_is_no_division_by_zero() -> None:
    bank = Features(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    queries = Features(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]))
    assert _accuracy(bank, queries, [1])["top1_k1"] in (50.0, 100.0)  # the second query is equally far from both
    assert _accuracy(bank, Features(queries.features[:1], queries.labels[:1]), [1]) == {"top1_k1": 100.0}  # type: ignore[index]


def test_a_class_without_a_vote_is_not_among_the_top_5() -> None:
    bank = Features(torch.eye(6), torch.arange(6))
    labels = torch.arange(6).roll(1)  # every query lies on another class than its own
    assert _accuracy(bank, Features(torch.eye(6), labels), [1])["top5_k1"] == 0.0


# --- memory ------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return output


def test_memory_is_bounded_by_its_key_over_bank_and_queries() -> None:
    num_bank, num_queries, num_classes = 3000, 2500, 400
    bank = _random_features(0, num_bank, 4, list(range(num_classes)))
    queries = _random_features(1, num_queries, 4, list(range(num_classes)))
    with LargestTensor() as largest:
        found = _accuracy(bank, queries, [5, 20], memory_mib=1)
    # Of 4 bytes each; neither queries x bank (7.5 million) nor queries x classes (1 million) nor bank x classes.
    assert largest.numel <= 2**20 / 4
    assert found == _accuracy(bank, queries, [5, 20])


# --- few-shot ----------------------------------------------------------------------------------------------------


def test_few_shot_is_the_mean_over_tries_on_parts_of_the_bank() -> None:
    bank, queries = _random_features(3, 200, 5, list(range(8))), _random_features(4, 53, 5, list(range(8)))
    assert bank.labels is not None
    found = _accuracy(bank, queries, [1, 5, 20], num_per_class=[4, 5], num_tries=3)
    expected: dict[str, list[float]] = defaultdict(list)
    for seed in range(
        3
    ):  # the protocol: the number of the try is the seed, classes in order, the first of a permutation
        for n, ks in ((4, [1, 4]), (5, [1, 5])):
            torch.manual_seed(seed)
            rows = [torch.where(bank.labels == c)[0] for c in range(8)]
            chosen = torch.cat([r[torch.randperm(len(r))[:n]] for r in rows])
            part = Features(bank.features[chosen], bank.labels[chosen])
            for name, value in _slow_accuracy(part, queries, ks, 0.07).items():
                expected[f"{name}_n{n}"].append(value)
    whole = _accuracy(bank, queries, [1, 5, 20])
    assert found.keys() == whole.keys() | expected.keys() | {f"{name}_std" for name in expected}
    assert {name: found[name] for name in whole} == whole
    for name, values in expected.items():
        if name.startswith("top1"):
            assert found[name] == pytest.approx(np.mean(values))
            assert found[f"{name}_std"] == pytest.approx(np.std(values))
    assert found["top1_k1_n4_std"] > 0


def test_one_try_has_no_spread_and_classes_with_fewer_images_are_said(
    warnings_logged: pytest.LogCaptureFixture,
) -> None:
    bank = Features(torch.eye(5), torch.tensor([7, 7, 7, -2, 7]))
    rows = next(few_shot_rows(torch.tensor([7, 7, 7, -2, 7]), 2, 1))
    assert sorted(bank.labels[rows].tolist()) == [-2, 7, 7]  # type: ignore[index]
    found = _accuracy(bank, bank, [1], num_per_class=[3])
    assert found.keys() == {"top1_k1", "top1_k1_n3", "top1_k3_n3"}
    assert warnings_logged.messages[-1] == (
        "k-NN: 1 of 2 classes have fewer than 3 training images (1 to 1), and all of those are taken: results called _n3 "
        "are of 4 training images, not 6."
    )


# --- the type of similarities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_round_similarities_and_no_more(dtype: str) -> None:
    bank, queries = _random_features(3, 300, 5, list(range(8))), _random_features(4, 200, 5, list(range(8)))
    exact, rounded = (_accuracy(bank, queries, [10], similarity_dtype=d)["top1_k10"] for d in ("float32", dtype))
    assert rounded == pytest.approx(exact, abs=3)


# --- the evaluator -----------------------------------------------------------------------------------------------


def test_evaluator_equals_the_function_on_the_model_features() -> None:
    bank, queries = _pair()
    evaluator = KNNEvaluator(make_loader(bank.features, bank.labels, 9), ks=[5, 10], temperature=0.2)
    loader = make_loader(queries.features, queries.labels, 4, order=list(reversed(range(53))))
    results = inference_on_dataset(identity_features(5).train(), loader, evaluator)
    assert results == {"knn": _accuracy(bank, queries, [5, 10], temperature=0.2)}
    assert results["knn"] != _accuracy(bank, queries, [5, 10], temperature=50.0)


class _PlacedPatches(nn.Module):
    """Images [B, 1, 1, 2] -> two patch tokens, and a CLS token that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> BackboneOutput:
        tokens = F.one_hot(images.flatten(1).long(), 3).float()
        return BackboneOutput(torch.ones(len(images), 3), tokens[:, :0], tokens, (1, 2))


@pytest.mark.parametrize(("feature", "top1"), [("cls", 50.0), ("mean_patch", 50.0), ("patch", 100.0)])
def test_only_patch_tokens_side_by_side_tell_left_from_right(feature: str, top1: float) -> None:
    loader = make_loader(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).view(2, 1, 1, 2), torch.arange(2))
    evaluator = KNNEvaluator(loader, ks=[1], feature=feature)
    assert inference_on_dataset(_PlacedPatches(), loader, evaluator) == {"knn": {"top1_k1": top1}}


def test_missing_labels_say_which_data_and_what_to_give() -> None:
    rows, labels = torch.eye(3), torch.arange(3)
    labelled, bare = make_loader(rows, labels), make_loader(rows, None)
    with pytest.raises(ValueError, match=r"needs labels, and its training set has none"):
        inference_on_dataset(identity_features(3), labelled, KNNEvaluator(bare))
    with pytest.raises(ValueError, match=r"the test set has none. Give labelled datasets.*one sub-folder per class"):
        inference_on_dataset(identity_features(3), bare, KNNEvaluator(labelled))


def test_broken_features_are_an_error_of_the_side_that_has_them() -> None:
    rows, labels = torch.eye(3), torch.arange(3)
    broken = rows.clone()
    broken[1] = math.nan
    for bank, queries in ((broken, rows), (rows, broken)):
        evaluator = KNNEvaluator(make_loader(bank, labels), ks=[1])
        with pytest.raises(ValueError, match=r"features of 1 of 3 images are not finite, e.g. images number \[1\]"):
            inference_on_dataset(identity_features(3), make_loader(queries, labels), evaluator)


def test_broken_features_of_a_dataset_are_named_as_the_dataset_names_them() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS=0", "INPUT.TEST.RESIZE_PX=0", "INPUT.TEST.CROP_SIZE_PX=8"])
    cfg.merge_from_list(["DATASETS.TRAIN=synthetic:num_images=9:num_classes=3:size=8", "TEST.IMS_PER_BATCH=4"])
    dataset = "synthetic:num_images=3:num_classes=3:size=8:seed=1"
    model = identity_features(3 * 8 * 8)
    evaluator = build_evaluator(cfg, dataset)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    with pytest.raises(
        ValueError, match=r"of 9 images are not finite, e.g. synthetic:seed=0\[0\], synthetic:seed=0\[1\]"
    ):
        inference_on_dataset(model, build_test_loader(cfg, dataset), evaluator)


def test_the_protocol_has_what_changes_results() -> None:
    rows = make_loader(torch.eye(3), torch.arange(3))
    evaluator = KNNEvaluator(rows, ks=[1], num_per_class=[1], num_tries=2, similarity_dtype="bfloat16", memory_mib=9)
    assert inference_on_dataset(identity_features(3), rows, evaluator)["knn"]["top1_k1_n1_std"] == 0
    assert evaluator.protocol() == {
        "knn": {
            "k": [1],
            "temperature": 0.07,
            "num_per_class": [1],
            "num_tries": 2,
            "similarity_dtype": "bfloat16",
            "num_train_images": 3,
        }
    }
    assert not {"num_tries", "feature"} & set(KNNEvaluator(rows).protocol()["knn"])
    assert KNNEvaluator(rows, feature="patch").protocol()["knn"]["feature"] == "patch"


def test_a_query_may_be_anything_that_normalises() -> None:
    bank, queries = _pair()
    tiny = Features(queries.features * 1e-6, queries.labels)
    torch.testing.assert_close(F.normalize(tiny.features, dim=1), F.normalize(queries.features, dim=1))
    assert _accuracy(bank, tiny, [10])["top1_k10"] == _accuracy(bank, queries, [10])["top1_k10"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": ()}, "ks is empty"),
        ({"ks": (5, 0)}, r"ks must be 1 or more, got \(5, 0\)"),
        ({"num_per_class": (0,)}, "num_per_class must be 1 or more"),
        ({"num_tries": 0}, "num_tries must be 1 or more, got 0"),
        ({"memory_mib": 0}, "memory_mib must be 1 or more"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"feature": "register"}, "feature must be one of cls, mean_patch, patch, got 'register'"),
        ({"similarity_dtype": "float64"}, "must be one of float32, float16, bfloat16, got 'float64'"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KNNEvaluator(make_loader(torch.eye(3), torch.arange(3)), **changes)
