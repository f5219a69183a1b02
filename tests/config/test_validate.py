from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest

from dinoengine.config import CfgNode, ConfigError, get_cfg, validate
from tests.config.test_defaults import _leaves


def _cfg(*overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", "digits", *overrides])
    return cfg


def _set(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """Set a key past the conversion of types."""
    *groups, leaf = key.split(".")
    node = cfg
    for group in groups:
        node = node[group]
    node[leaf] = value
    return cfg


def _problems_of(cfg: CfgNode, world_size: int = 1, training: bool = True) -> list[str]:
    try:
        validate(cfg, world_size, training)
    except ConfigError as error:
        return error.problems
    return []


def _problems(*overrides: Any, world_size: int = 1, training: bool = True) -> list[str]:
    return _problems_of(_cfg(*overrides), world_size, training)


# ------------------------------------------------------------------------------------------------ ranges

# Keys that any value is right for (INTERPOLATE_OFFSET), or that have their own check (VERSION, on merging).
FREE = {"VERSION", "MODEL.VIT.INTERPOLATE_OFFSET"}
NUMBERS = [key for key, value in _leaves(get_cfg()) if type(value) in (int, float) and key not in FREE]


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_range(key: str) -> None:
    cfg = _set(_cfg(), key, -(10**9))
    with pytest.raises(ConfigError, match=rf"{key} must be") as caught:
        validate(cfg)
    assert sum(problem.startswith(f"{key} must be") for problem in caught.value.problems) == 1


@pytest.mark.parametrize("key", [key for key, value in _leaves(get_cfg()) if type(value) is float and key not in FREE])
def test_nan_is_never_in_range(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} must be .* got nan"):
        validate(_set(_cfg(), key, math.nan))


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("SEED", [-1, 0, 2**31], [-2]),
        ("INPUT.HFLIP_PROB", [0, 1], [-0.001, 1.001]),
        ("INPUT.GRAYSCALE_PROB", [0, 1], [1.001]),
        ("INPUT.COLOR_JITTER.HUE", [0, 0.5], [0.51]),
        ("INPUT.MASK.MIN_ASPECT", [1, 0.01], [0, 1.01]),
        ("INPUT.SOLARIZE.THRESHOLD", [0, 256], [257]),
        ("INPUT.BLUR.KERNEL_SIZE_PX", [1, 23], [0, 8]),
        ("MODEL.VIT.DROP_PATH_RATE", [0, 0.99], [1, -0.1]),
        ("MODEL.TEACHER.MOMENTUM", [0, 1], [1.001]),
        ("MODEL.LOSS.STUDENT_TEMP", [1e-9], [0]),
        ("MODEL.TEACHER.TEMP", [1e-9], [0]),
        ("MODEL.LOSS.SINKHORN_ITERS", [1], [0]),
        ("MODEL.LOSS.CENTER_MOMENTUM", [0, 1], [1.1]),
        ("SOLVER.LAYER_DECAY", [1, 0.01], [0, 1.01]),
        ("SOLVER.MAX_ITER", [1], [0]),
        ("SOLVER.CHECKPOINT_PERIOD", [0], [-1]),
        ("SOLVER.CHECKPOINT_MINUTES", [0.0, 0.5], [-0.1]),
        ("SOLVER.CHECKPOINT_KEEP_EVERY", [0, 3750], [-1]),
        ("SOLVER.CHECKPOINT_ON_ERROR", ["stop", "continue"], ["ignore"]),
        ("LOG.PERIOD", [1], [0]),
        ("DATALOADER.PREFETCH_FACTOR", [1], [0]),
        ("MODEL.DINO_HEAD.NUM_LAYERS", [1], [0]),
    ],
)
def test_the_ends_of_ranges(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert _problems(key, value) == []
    for value in bad:
        (problem,) = _problems(key, value)
        assert problem.startswith(f"{key} must be")
        assert f"{value}"[:5] in problem


@pytest.mark.parametrize("key", ["SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY", "MODEL.LOSS.DINO_WEIGHT"])
def test_infinity_is_no_usable_value(key: str) -> None:
    assert _problems(key, math.inf) != []


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("INPUT.GLOBAL_CROPS.SCALE", [(0.1, 0.1), (0.5, 1)], [(0.5, 0.2), (-0.1, 1), (0.2, 1.1), (0.5,), (0, 0.5, 1)]),
        ("INPUT.LOCAL_CROPS.SCALE", [(0.1, 0.2)], [(0.2, 0.1)]),
        ("INPUT.MASK.RATIO", [(0.0, 1.0), (0.3, 0.3)], [(0.5, 0.1), (0.1, 1.5), (0.1,)]),
        ("INPUT.CROP_RATIO", [(1, 1), (0.5, 2)], [(0, 1), (2, 0.5), (1,)]),
        ("INPUT.BLUR.SIGMA_PX", [(0.1, 0.1)], [(0, 1), (2, 1)]),
        ("INPUT.BLUR.PROBS", [(0, 0.5, 1)], [(0, 1), (0.5,), (0, 0, 1.1), (0, -0.1, 0)]),
        ("INPUT.SOLARIZE.PROBS", [(0, 0, 0)], [(0, 0)]),
        ("SOLVER.BETAS", [(0, 0)], [(0.9,), (0.9, 1.0), (0.9, 0.99, 0.999)]),
        ("TEST.KNN.K", [(1,), (5, 3)], [(), (0,), (1.5,), (10, -1)]),
        ("TEST.LINEAR.BASE_LRS", [(1,), (0.1, 1e-5)], [(), (0.0, 0.1), (0.1, 0.1), ("a",)]),
        ("TEST.LINEAR.NUM_LAST_BLOCKS", [(1,), (4, 1, 2)], [(), (0,), (1, 1), (1.5,), (True,)]),
        ("TEST.LINEAR.MEAN_PATCH", [(True,), (True, False)], [(), (1,), (True, True)]),
        ("TEST.LINEAR.CROP_SCALE", [(1, 1), (0, 0.5)], [(0.5, 0.2), (0.5, 1.1), (0.5,)]),
        ("TEST.LOGREG.C_LOG10_RANGE", [(0, 0), (-2, 3.5)], [(1, 0), (0,), (0, 400), (-400, 0)]),
        ("MODEL.PIXEL_STD", [(1, 1, 1)], [(0, 1, 1), (1, -1, 1)]),
        ("INPUT.GLOBAL_CROPS.SIZE_PX", [(32,), (32, 48)], [(), (0,), (-16,), (16, 16, 16), (16.5,)]),
        ("TEST.BASELINES", [("pixels", "untrained"), ()], [("pixel",)]),
    ],
)
def test_lists_have_their_length_order_and_range(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert _problems(key, value) == []
    for value in bad:
        problems = _problems(key, value)
        assert any(problem.startswith(key) for problem in problems), f"{value}: {problems}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.MASK.RATIO", ()),
        ("INPUT.MASK.RATIO", ("a", "b")),
        ("MODEL.PIXEL_STD", ("a", "b", "c")),
        ("INPUT.GLOBAL_CROPS.SCALE", ("a", "b")),
        ("INPUT.BLUR.PROBS", ("a", "b", "c")),
        ("SOLVER.BETAS", ("a", "b")),
    ],
)
def test_lists_of_the_wrong_kind_are_reported_too(key: str, value: Any) -> None:
    try:
        problems = _problems(key, value)
    except (IndexError, TypeError) as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    assert any(key in problem for problem in problems)


def test_a_dataset_that_is_no_text_is_reported() -> None:
    assert any("DATASETS.TRAIN" in problem for problem in _problems("DATASETS.TRAIN", "2012"))


# ------------------------------------------------------------------------------------------------ choices


@pytest.mark.parametrize(
    ("key", "choices", "typo", "meant"),
    [
        ("FLOAT32_PRECISION", ["highest", "high", "medium"], "hihg", "high"),
        ("MODEL.DEVICE", ["auto", "cpu", "cuda"], "cdua", "cuda"),
        ("MODEL.VIT.SIZE", ["micro", "tiny", "small", "base", "large", "giant"], "lrge", "large"),
        ("MODEL.VIT.FFN", ["mlp", "swiglu"], "swigelu", "swiglu"),
        ("MODEL.LOSS.CENTERING", ["centering", "sinkhorn_knopp"], "sinkhorn", "sinkhorn_knopp"),
        ("INPUT.FORMAT", ["RGB"], "RBG", "RGB"),
        ("SOLVER.LR_SCALING", ["sqrt", "linear", "none"], "lineer", "linear"),
        ("SOLVER.AMP.PRECISION", ["auto", "bf16", "fp16", "fp32"], "bf61", "bf16"),
    ],
)
def test_choices_are_closed_and_a_typo_names_the_closest(key: str, choices: list[str], typo: str, meant: str) -> None:
    for choice in choices:
        assert _problems(key, choice) == []
    (problem,) = _problems(key, typo)
    assert problem.startswith(f"{key} must be one of {', '.join(choices)}")
    assert f"got {typo!r} (did you mean {meant!r}?)" in problem


# ------------------------------------------------------------------------------------------------ images and crops


def test_channels_of_format_mean_and_std_agree() -> None:
    assert _problems("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", 0.5, "MODEL.PIXEL_STD", 0.5) == []
    (problem,) = _problems("INPUT.FORMAT", "L")
    assert "INPUT.FORMAT L has 1 channel(s), but MODEL.PIXEL_MEAN has 3 values and MODEL.PIXEL_STD 3" in problem
    (problem,) = _problems("MODEL.PIXEL_STD", (0.5,))
    assert "RGB has 3 channel(s)" in problem
    assert "MODEL.PIXEL_STD 1" in problem


@pytest.mark.parametrize(
    ("patch", "size", "nearest"),
    [
        (16, (100,), "(96,) or (112,)"),
        (16, (224, 100), "(224, 96) or (224, 112)"),
        (14, (224, 225), "(224, 224) or (224, 238)"),
    ],
)
def test_a_crop_off_the_patch_grid_is_told_the_nearest_sizes(patch: int, size: tuple[int, ...], nearest: str) -> None:
    overrides = [
        "MODEL.VIT.PATCH_SIZE_PX",
        patch,
        "INPUT.LOCAL_CROPS.SIZE_PX",
        7 * patch,
        "INPUT.TEST.CROP_SIZE_PX",
        patch,
    ]
    (problem,) = _problems(*overrides, "INPUT.GLOBAL_CROPS.SIZE_PX", size)
    assert problem == (
        f"INPUT.GLOBAL_CROPS.SIZE_PX {size} is not a multiple of MODEL.VIT.PATCH_SIZE_PX {patch}; "
        f"the nearest are {nearest}."
    )


def test_a_crop_smaller_than_a_patch_is_told_one_size_once() -> None:
    (problem,) = _problems("INPUT.GLOBAL_CROPS.SIZE_PX", 5)
    assert problem.count("(16,)") == 1


@pytest.mark.parametrize("key", ["INPUT.LOCAL_CROPS.SIZE_PX", "INPUT.TEST.CROP_SIZE_PX", "MODEL.VIT.POS_EMBED_SIZE_PX"])
def test_the_other_sizes_are_on_the_grid_too(key: str) -> None:
    (problem,) = _problems(key, 100)
    assert problem.startswith(f"{key} (100,) is not a multiple")


def test_sizes_that_are_not_used_are_not_checked() -> None:
    assert _problems("INPUT.LOCAL_CROPS.NUM", 0, "INPUT.LOCAL_CROPS.SIZE_PX", 100) == []
    assert _problems("MODEL.VIT.POS_EMBED_SIZE_PX", 0) == []  # the global crop size


def test_width_and_heads() -> None:
    assert _problems("MODEL.VIT.EMBED_DIM", 96, "MODEL.VIT.NUM_HEADS", 3) == []
    (problem,) = _problems("MODEL.VIT.EMBED_DIM", 100, "MODEL.VIT.NUM_HEADS", 3)
    assert problem == "MODEL.VIT.EMBED_DIM 100 is not divisible by MODEL.VIT.NUM_HEADS 3."


# ------------------------------------------------------------------------------------------------ losses and batch


def _weights(dino: float, ibot: float, koleo: float) -> list[Any]:
    names = ("DINO_WEIGHT", "IBOT_WEIGHT", "KOLEO_WEIGHT")
    return [x for name, w in zip(names, (dino, ibot, koleo), strict=True) for x in (f"MODEL.LOSS.{name}", w)]


@pytest.mark.parametrize("weights", [w for w in itertools.product((0.0, 1.0), repeat=3) if any(w)])
def test_every_loss_can_be_switched_off_but_not_all(weights: tuple[float, float, float]) -> None:
    assert _problems(*_weights(*weights)) == []


def test_nothing_to_optimise_is_a_problem_of_training_only() -> None:
    (problem,) = _problems(*_weights(0, 0, 0))
    assert "DINO_WEIGHT, IBOT_WEIGHT and KOLEO_WEIGHT are all 0" in problem
    assert _problems(*_weights(0, 0, 0), "DATASETS.TEST", ("digits",), training=False) == []


@pytest.mark.parametrize("masking", [("INPUT.MASK.CROP_SHARE", 0), ("INPUT.MASK.RATIO", (0.0, 0.0))])
def test_ibot_without_masks_is_a_contradiction(masking: tuple[str, Any]) -> None:
    (problem,) = _problems(*masking)
    assert "MODEL.LOSS.IBOT_WEIGHT > 0 needs masked patches" in problem
    assert _problems(*masking, "MODEL.LOSS.IBOT_WEIGHT", 0) == []


def _groups_stay_whole(batch: int, world: int, parts: int, group: int) -> bool:
    """Does every KoLeo group of the whole batch come together in some micro-batch of the run?

    Slow: lays out the images as the sampler deals them (rank r has consecutive images, micro-batches are consecutive
    parts of those), gathers each micro-batch over the ranks, cuts it into groups, and compares with the groups of the
    whole batch on one process.
    """
    if batch % (world * parts):
        return False
    group = group or batch
    share = batch // world
    size = share // parts
    expected = {tuple(range(start, start + group)) for start in range(0, batch, group)}
    found = set()
    for part in range(parts):
        images = [rank * share + part * size + i for rank in range(world) for i in range(size)]
        found |= {tuple(images[start : start + group]) for start in range(0, len(images), group)}
    return found == expected and batch % group == 0


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_batch_micro_batches_and_koleo_groups_against_a_simulation(world: int) -> None:
    cfg = _cfg()
    for batch, parts, group in itertools.product((1, 2, 6, 8, 12, 24), (1, 2, 3), (0, 1, 2, 3, 4, 6, 8, 12)):
        _set(cfg, "SOLVER.IMS_PER_BATCH", batch)
        _set(cfg, "SOLVER.NUM_MICRO_BATCHES", parts)
        _set(cfg, "MODEL.LOSS.KOLEO_GROUP_SIZE", group)
        problems = _problems_of(cfg, world)
        assert all("IMS_PER_BATCH" in p or "KOLEO_GROUP_SIZE" in p for p in problems)
        assert (not problems) == (group != 1 and _groups_stay_whole(batch, world, parts, group)), (
            batch,
            world,
            parts,
            group,
        )


def test_a_batch_that_does_not_divide_is_told_the_nearest() -> None:
    (problem,) = _problems("SOLVER.IMS_PER_BATCH", 10, world_size=4)
    assert (
        "10 (global) is not divisible by 4 process(es) x SOLVER.NUM_MICRO_BATCHES 1; the nearest possible: 8 or 12"
        in problem
    )
    (problem,) = _problems("SOLVER.IMS_PER_BATCH", 20, "SOLVER.NUM_MICRO_BATCHES", 3, world_size=2)
    assert "the nearest possible: 18 or 24" in problem


def test_mixing_needs_a_second_image_in_every_process() -> None:
    classifier = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.CLASSIFIER.NUM_CLASSES", 2]
    classifier += ["INPUT.AUGMENTATION", "SingleCrop", "SOLVER.IMS_PER_BATCH", 4]
    (problem,) = _problems(*classifier, "MODEL.CLASSIFIER.CUTMIX_ALPHA", 1.0, world_size=4)
    assert "SOLVER.IMS_PER_BATCH 4 gives each of 4 a single one" in problem
    assert _problems(*classifier, "MODEL.CLASSIFIER.CUTMIX_ALPHA", 1.0, world_size=2) == []
    assert _problems(*classifier, world_size=4) == []


def test_a_batch_smaller_than_the_world_is_told_one_size_once() -> None:
    (problem,) = _problems("SOLVER.IMS_PER_BATCH", 3, world_size=4)
    assert "4 and 4" not in problem


def test_koleo_over_the_whole_batch_cannot_be_done_in_parts() -> None:
    (problem,) = _problems("SOLVER.NUM_MICRO_BATCHES", 2, "SOLVER.IMS_PER_BATCH", 8, world_size=2)
    assert "set KOLEO_GROUP_SIZE to a divisor of 2" in problem
    assert _problems("SOLVER.NUM_MICRO_BATCHES", 2, "SOLVER.IMS_PER_BATCH", 8, "MODEL.LOSS.KOLEO_WEIGHT", 0) == []


def test_the_group_size_is_not_checked_when_koleo_is_off() -> None:
    assert _problems("MODEL.LOSS.KOLEO_WEIGHT", 0, "MODEL.LOSS.KOLEO_GROUP_SIZE", 7) == []


def test_koleo_groups_of_one_image_are_pointed_out() -> None:
    cfg = _cfg("MODEL.LOSS.KOLEO_GROUP_SIZE", 1)
    words = _problems_of(cfg) or validate(cfg)
    assert any("KOLEO_GROUP_SIZE" in text for text in words)


def test_fp16_on_cpu_is_a_contradiction() -> None:
    overrides = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16", "MODEL.DEVICE", "cpu"]
    assert any("SOLVER.AMP.PRECISION" in problem for problem in _problems(*overrides))


@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
def test_packed_attention_needs_cuda(kernel: str) -> None:
    assert any(
        f"MODEL.ATTENTION {kernel} needs CUDA" in p for p in _problems("MODEL.ATTENTION", kernel, "MODEL.DEVICE", "cpu")
    )
    assert _problems("MODEL.ATTENTION", kernel, "MODEL.DEVICE", "cuda") == []


def test_compiled_blocks_are_not_checkpointed_selectively() -> None:
    both = ["MODEL.COMPILE", True, "MODEL.ACTIVATION_CHECKPOINTING"]
    assert any("none or full, not selective" in problem for problem in _problems(*both, "selective"))
    assert _problems(*both, "full") == []


def test_only_an_assumed_bf16_on_cpu_is_warned_of() -> None:
    amp = ["SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu", "SOLVER.AMP.PRECISION"]
    assert any("most CPUs are slower in bf16" in text for text in validate(_cfg(*amp, "bf16")))
    assert not any("bf16" in text for text in validate(_cfg(*amp, "auto")))


def test_bf16_on_cpu_and_unused_fp16_are_fine() -> None:
    assert _problems("SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu") == []
    assert _problems("SOLVER.AMP.PRECISION", "fp16", "MODEL.DEVICE", "cpu") == []


# ------------------------------------------------------------------------------------------------ datasets, evaluation


def test_training_needs_data_and_evaluation_alone_does_not() -> None:
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN is empty"):
        validate(get_cfg())
    (problem,) = _problems_of(get_cfg(), training=False)
    assert "nothing to evaluate on" in problem
    assert validate(_set(get_cfg(), "DATASETS.TEST", ("digits",)), training=False) == []
    with pytest.raises(ConfigError, match=r"INPUT\.TEST\.CROP_SIZE_PX"):
        validate(_set(get_cfg(), "INPUT.TEST.CROP_SIZE_PX", (100,)), training=False)


def test_evaluation_needs_a_dataset() -> None:
    (problem,) = _problems("TEST.EVAL_PERIOD", 5)
    assert "TEST.EVAL_PERIOD > 0 needs a dataset in DATASETS.TEST; without one set TEST.EVAL_PERIOD 0" in problem
    (problem,) = _problems("TEST.EXPECTED_RESULTS", (("knn", "top1_k20", 90.0, 1.0),))
    assert "TEST.EXPECTED_RESULTS needs" in problem
    assert _problems("TEST.EVAL_PERIOD", 5, "DATASETS.TEST", "digits") == []


@pytest.mark.parametrize(
    "rows", [("knn", "top1_k20", 78.0, 2.0), (("knn", "top1_k20", 78.0),), (("knn", "top1_k20", "78", 2.0),)]
)
def test_expected_results_of_another_form_are_found_before_training(rows: Any) -> None:
    problems = _problems("TEST.EXPECTED_RESULTS", rows, "DATASETS.TEST", ("digits",))
    assert all("lists rows (task, metric, value, tolerance)" in problem for problem in problems)
    assert problems


@pytest.mark.parametrize(
    ("datasets", "row", "message"),
    [
        (("digits",), ("digits", "knn", "top1", 78.0, 2.0), "there is one dataset.*leave 'digits' out"),
        (("digits", "folder:/a"), ("knn", "top1", 78.0, 2.0), "each row begins with one of DATASETS.TEST.*folder:/a"),
        (("digits", "folder:/a"), ("folder:/b", "knn", "top1", 78.0, 2.0), "begins with one of DATASETS.TEST"),
        (("digits",), ("knn", "top1", 78.0, -2.0), "tolerance.*is 0 or more"),
    ],
)
def test_expected_results_that_no_run_could_have_are_found_before_training(
    datasets: tuple[str, ...], row: Any, message: str
) -> None:
    (problem,) = _problems("TEST.EXPECTED_RESULTS", (row,), "DATASETS.TEST", datasets)
    assert re.search(message, problem)
    right = ("knn", "top1", 78.0, 0.0) if len(datasets) == 1 else (datasets[1], "knn", "top1", 78.0, 0.0)
    assert _problems("TEST.EXPECTED_RESULTS", (right,), "DATASETS.TEST", datasets) == []


def test_less_than_one_masked_crop_is_a_contradiction() -> None:
    (problem,) = _problems("INPUT.MASK.CROP_SHARE", 0.02, "SOLVER.IMS_PER_BATCH", 16)
    assert "of the 32 global crops of a batch is less than one" in problem
    assert _problems("INPUT.MASK.CROP_SHARE", 0.04, "SOLVER.IMS_PER_BATCH", 16) == []


def test_the_best_metric_needs_periodic_evaluation() -> None:
    best = ["TEST.BEST_METRIC", "knn/top1_k20"]
    assert any("TEST.BEST_METRIC 'knn/top1_k20' needs" in p for p in _problems(*best))
    assert any("TEST.BEST_METRIC" in p for p in _problems(*best, "DATASETS.TEST", "digits"))
    assert _problems(*best, "DATASETS.TEST", "digits", "TEST.EVAL_PERIOD", 5) == []
    (problem,) = _problems("TEST.EARLY_STOPPING_PATIENCE", 3)
    assert "TEST.EARLY_STOPPING_PATIENCE needs the metric" in problem


@pytest.mark.parametrize("ranks", [(0, 10), (4, 5), (4,), (1.0, 9), (10, 4)])
def test_the_ranks_that_alpha_is_fitted_to_are_at_least_three(ranks: tuple[float, ...]) -> None:
    (problem,) = _problems("TEST.LABEL_FREE.ALPHA_RANKS", str(ranks))
    assert "TEST.LABEL_FREE.ALPHA_RANKS must be (first, last)" in problem


def test_a_rollback_needs_checkpoints_that_reach_back_far_enough() -> None:
    rollback = ["COLLAPSE_GUARD.ACTION", "rollback"]
    (problem,) = _problems(*rollback, "SOLVER.CHECKPOINT_PERIOD", 0)
    assert "rollback needs checkpoints to go back to" in problem
    cfg = get_cfg()
    cfg.merge_from_list([*rollback, "DATASETS.TRAIN", "x", "LOG.PERIOD", 20, "COLLAPSE_GUARD.PATIENCE", 4])
    cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 50, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2])
    (warning,) = validate(cfg)
    assert "up to 100 iterations to notice" in warning
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 3
    assert validate(cfg) == []


@pytest.mark.parametrize(
    ("period", "keep_every", "fine"), [(50, 100, True), (50, 50, True), (50, 75, False), (0, 50, False)]
)
def test_checkpoints_to_be_kept_are_written(period: int, keep_every: int, fine: bool) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", "x", "SOLVER.CHECKPOINT_PERIOD", period])
    cfg.SOLVER.CHECKPOINT_KEEP_EVERY = keep_every
    found = validate(cfg)
    assert (
        found == []
        if fine
        else f"KEEP_EVERY {keep_every} is no multiple of SOLVER.CHECKPOINT_PERIOD {period}" in found[0]
    )


@pytest.mark.parametrize(("epochs", "iters", "fine"), [(10, 0, True), (0, 5, True), (10, 5, False), (0, 0, False)])
def test_a_linear_probe_is_as_long_as_one_key_says(epochs: float, iters: int, fine: bool) -> None:
    found = _problems("TEST.LINEAR.EPOCHS", epochs, "TEST.LINEAR.ITERS", iters)
    message = (
        f"TEST.LINEAR: one of EPOCHS and ITERS says how long to train and the other is 0; got {epochs} and {iters}."
    )
    assert found == ([] if fine else [message])


def test_training_sets_of_single_test_sets_are_paired_with_them() -> None:
    both = ["DATASETS.TEST", ("digits:split=test", "synthetic")]
    assert _problems(*both, "TEST.TRAIN_PER_TEST", ("digits", "synthetic:seed=1")) == []
    (problem,) = _problems(*both, "TEST.TRAIN_PER_TEST", ("digits",))
    assert problem.endswith("in the same order, none of them twice; there are 1 and 2 (2 different).")
    (problem,) = _problems("DATASETS.TEST", ("digits",) * 2, "TEST.TRAIN_PER_TEST", ("digits", "synthetic"))
    assert problem.endswith("there are 2 and 2 (1 different).")
    (problem,) = _problems(*both, "TEST.TRAIN_PER_TEST", ("digits", "synthetic"), "TEST.LOGREG.VAL", ("digits",))
    assert problem.startswith("TEST.LOGREG.VAL ('digits',) is for all test sets")


# ------------------------------------------------------------------------------------------------ all at once, warnings


def test_every_problem_is_listed_with_a_number() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)cannot be run:\n  1\. .*\n  2\. .*\n  3\. .*\n  4\. .*\n  5\. "
    ) as caught:
        validate(
            _cfg(
                *("SOLVER.MAX_ITER", 0, "MODEL.VIT.SIZE", "huge", "INPUT.GLOBAL_CROPS.SIZE_PX", 100),
                *("SOLVER.IMS_PER_BATCH", 3, "TEST.EVAL_PERIOD", 1),
            ),
            world_size=2,
        )
    assert len(caught.value.problems) == 5
    assert isinstance(caught.value, ValueError)


def test_validation_changes_nothing() -> None:
    cfg = _cfg()
    cfg.freeze()
    assert validate(cfg) == []
    assert cfg == _cfg()


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["SOLVER.MAX_ITER", 12500], "SOLVER.WARMUP_ITERS 12500 >= SOLVER.MAX_ITER 12500"),
        (
            ["SOLVER.MAX_ITER", 12500, "SOLVER.WARMUP_ITERS", 0, "SOLVER.FREEZE_LAST_LAYER_ITERS", 12500],
            "FREEZE_LAST_LAYER_ITERS",
        ),
        (["MODEL.TEACHER.MOMENTUM", 0.999, "MODEL.TEACHER.MOMENTUM_END", 0.99], "MODEL.TEACHER.MOMENTUM is above"),
        (["SOLVER.IMS_PER_BATCH", 1], "KoLeo needs at least two images"),
        (["SOLVER.MAX_ITER", 30000], "MODEL.TEACHER.TEMP_WARMUP_ITERS"),
    ],
)
def test_settings_that_can_hardly_be_meant_are_warnings(overrides: list[Any], word: str) -> None:
    warnings = validate(_cfg(*overrides))
    assert len([w for w in warnings if word in w]) == 1
    assert validate(_cfg(*overrides, "DATASETS.TEST", ("digits",)), training=False) == []


def test_moments_need_a_checkpoint() -> None:
    (problem,) = _problems("MODEL.WEIGHTS_WITH_OPTIMIZER", True)
    assert "needs a checkpoint in MODEL.WEIGHTS" in problem
    assert _problems("MODEL.WEIGHTS_WITH_OPTIMIZER", True, "MODEL.WEIGHTS", "x.pth") == []


# ------------------------------------------------------------------------------------------------ classifiers

CLASSIFIER = (
    "MODEL.CLASSIFIER.NUM_CLASSES=3",
    "MODEL.META_ARCHITECTURE=ImageClassifier",
    "INPUT.AUGMENTATION=SingleCrop",
)


def test_a_classifier_is_not_asked_about_pretraining() -> None:
    unused = ["INPUT.LOCAL_CROPS.SIZE_PX=95", "MODEL.LOSS.DINO_WEIGHT=0", "MODEL.LOSS.IBOT_WEIGHT=0"]
    unused += ["MODEL.LOSS.KOLEO_WEIGHT=0", "INPUT.BLUR.KERNEL_SIZE_PX=999", "SOLVER.MAX_ITER=20000"]
    assert len(_problems(*unused)) == 3
    assert validate(_cfg(*CLASSIFIER, *unused)) == []  # no warning about the teacher either
    assert validate(_cfg(*CLASSIFIER, "SOLVER.NUM_MICRO_BATCHES=2")) == []  # KoLeo would need a group
    assert _problems(*CLASSIFIER, "SOLVER.IMS_PER_BATCH=3", world_size=2) == [
        "SOLVER.IMS_PER_BATCH 3 (global) is not divisible by 2 process(es) x SOLVER.NUM_MICRO_BATCHES 1; the nearest "
        "possible: 2 or 4."
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("MODEL.CLASSIFIER.NUM_CLASSES=0", "ImageClassifier needs MODEL.CLASSIFIER.NUM_CLASSES of at least 1"),
        (
            "MODEL.META_ARCHITECTURE=DINOv2",
            "NUM_CLASSES 3 asks for a classifier, but MODEL.META_ARCHITECTURE is DINOv2",
        ),
        ("INPUT.AUGMENTATION=MultiCrop", "INPUT.AUGMENTATION is MultiCrop; set SingleCrop"),
        ("TEST.BASELINES=('pixels',)", "baselines of k-NN in pretraining"),
        ("TEST.PRECISE_BN.ENABLED=True", "TEST.PRECISE_BN is for pretraining"),
        ("MODEL.CLASSIFIER.NUM_LAST_BLOCKS=3", "NUM_LAST_BLOCKS must be one of 1, 4; got '3'"),
    ],
)
def test_keys_that_contradict_a_classifier(override: str, message: str) -> None:
    (problem,) = _problems(*CLASSIFIER, override)
    assert message in problem
