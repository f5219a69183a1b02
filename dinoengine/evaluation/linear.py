"""The linear probe of DINOv2 (arXiv:2304.07193, section 7.1): a grid of linear heads on the frozen backbone."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory
from dinoengine.evaluation.classification import tops_of
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.features import FeatureCollector, dataset_of
from dinoengine.evaluation.label_sets import match_label_sets, training_strings
from dinoengine.evaluation.linear_heads import HeadGrid, LinearHeads, learning_rate
from dinoengine.evaluation.linear_settings import LinearSettings
from dinoengine.evaluation.linear_training import (
    FeatureBatch,
    FeatureStream,
    ProbeCheckpoint,
    cached_stream,
    collect_features,
    feature_batches,
    train_heads,
)
from dinoengine.evaluation.records import FOLDER, dataset_in_file_name, index_sha256, preprocessing, weights_sha256
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.file_writing import write_json

logger = logging.getLogger(__name__)

HEADS_FILE = "linear_heads-"


@dataclass(frozen=True)
class ProbeSets:
    """The images of a linear probe. Heads count classes as the training set does.

    Attributes:
        train_batches: iteration -> the training batches from there on, endless: ImageBatch of this rank's part, augmented;
            not asked for with ``LinearSettings.cached``.
        train_crops: a loader of this rank's part of the training set, evaluation crops.
        test_crops: the same of the test set.
        test_classes: by label of the test set: the class of the heads, -1 for none.
        val_crops, val_classes: the same of the validation set; None: the test set serves as validation.
        preprocessing: of all crops; JSON-serialisable. A probe goes on from a checkpoint with the same one only.
    """

    train_batches: Callable[[int], Iterable[ImageBatch]]
    train_crops: Any
    test_crops: Any
    test_classes: Sequence[int]
    val_crops: Any = None
    val_classes: Sequence[int] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


class LinearEvaluator(DatasetEvaluator):
    """``{"linear": {"top1": percent, "top5": percent}}`` of the head that is best on the validation set.

    With a validation set of its own that head's result there is ``val_top1``. Without one the best of all heads on the
    test set is taken, as for the published figures, and the protocol says so. Top-5 with more than five classes. What
    each head reached goes to ``eval/linear_heads-*.json``.
    """

    def __init__(
        self, sets: ProbeSets, settings: LinearSettings, *, dataset: str, output_dir: str, keep_checkpoint: bool = False
    ) -> None:
        """
        Args:
            dataset: the test set, for the name of the file of heads.
            output_dir: for that file and for checkpoints.
            keep_checkpoint: leave the trained heads to the next test set with the same training set.
        """
        self.sets = sets
        self.settings = settings
        self.dataset = dataset
        self.output_dir = output_dir
        self.keep_checkpoint = keep_checkpoint
        self._ranks = FeatureCollector(dataset_of(sets.test_crops))
        self._val_ranks: Tensor | None = None

    @torch.inference_mode()
    def prepare(self, model: nn.Module) -> None:
        """Train the heads, and see what they reach on the validation set."""
        self.settings = replace(self.settings, grid=_possible(self.settings.grid, model))
        self._model, self._weights = model, weights_sha256(model)
        self._heads = self._new_heads()
        self._checkpoint = ProbeCheckpoint(self.output_dir, self._identity())
        val_ranks = self._val_ranks_source()

        def log_best(iteration: int) -> None:
            top1 = _percent_within(val_ranks(), 1)
            logger.info("Linear probe: after %d iterations the best head has %.2f %% top-1.", iteration, max(top1))

        train_heads(
            self._heads,
            self._stream_source(),
            num_iters=self.settings.num_iters,
            batch_size=self.settings.ims_per_batch,
            dataset=dataset_of(self.sets.train_crops),
            checkpoint=self._checkpoint,
            checkpoint_period=self.settings.checkpoint_period,
            save_at_end=self.keep_checkpoint,
            validate=log_best,
            val_period=self.settings.val_period,
        )
        self._val_ranks = None if self.sets.val_crops is None else val_ranks()

    def _new_heads(self) -> LinearHeads:
        grid, images = self.settings.grid, self.sets.train_crops.dataset
        device = next(self._model.parameters()).device
        width = grid.features(self._model, images[0].image[None].to(device)).shape[1]
        return LinearHeads(
            grid,
            width // grid.width_in_tokens,
            len(images.dataset.class_names),
            seed=self.settings.seed,
            device=device,
        )

    def _stream_source(self) -> Callable[[int], FeatureStream]:
        """Iteration -> the training batches from there on."""
        model, settings, sets = self._model, self.settings, self.sets
        grid = settings.grid
        if not settings.cached:
            return lambda start_iter: feature_batches(model, grid, sets.train_batches(start_iter))

        def cached(start_iter: int) -> FeatureStream:
            cache = collect_features(feature_batches(model, grid, sets.train_crops), dataset_of(sets.train_crops))
            device = next(model.parameters()).device
            return cached_stream(cache, device, settings.ims_per_batch, settings.seed, start_iter)

        return cached

    def _val_ranks_source(self) -> Callable[[], Tensor]:
        """Gives [images, heads] as the heads are now: how many classes each puts before the right one of an image."""
        crops, class_of = self.sets.val_crops, self.sets.val_classes
        if crops is None:
            crops, class_of = self.sets.test_crops, self.sets.test_classes
        kept: list[FeatureBatch] = []

        def ranks() -> Tensor:
            batches: Iterable[FeatureBatch] = kept or feature_batches(self._model, self.settings.grid, crops)
            if self.settings.cached and not kept:  # then the backbone sees no image twice
                kept.extend(batches)
                batches = kept
            collector = FeatureCollector(dataset_of(crops))
            for features, labels, indices in batches:
                classes = torch.tensor(class_of, device=labels.device)[labels]
                collector.add(self._heads.ranks(features, classes), None, indices)
            return collector.finish().features

        return ranks

    def reset(self) -> None:
        self._ranks = FeatureCollector(dataset_of(self.sets.test_crops))

    @torch.inference_mode()
    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        """Ask all heads; for more than the last block the backbone sees the batch once more."""
        assert batch.labels is not None, "match_label_sets saw labels"
        grid = self.settings.grid
        features = grid.features_of([output]) if grid.max_blocks == 1 else grid.features(self._model, batch.images)
        classes = torch.tensor(self.sets.test_classes, device=features.device)[batch.labels]
        self._ranks.add(self._heads.ranks(features, classes), None, batch.indices)

    def evaluate(self) -> Results:
        ranks = self._ranks.finish().features  # [images, heads], every image once, of all processes
        num_classes = self._heads.num_classes
        tops = {f"top{top}": _percent_within(ranks, top) for top in tops_of(num_classes)}
        if self._val_ranks is not None:
            tops["val_top1"] = _percent_within(self._val_ranks, 1)
        chosen = tops["top1"] if self._val_ranks is None else tops["val_top1"]
        best = chosen.index(max(chosen))  # of equal ones the first in the grid
        rows = self._table(tops)
        diverged = sum(row["diverged"] for row in rows)
        logger.info(
            "Linear probe: of %d heads%s the best on the %s is %s with %.2f %% top-1.",
            len(rows),
            f" ({diverged} diverged)" if diverged else "",
            self.protocol()["linear"]["selected_on"],
            rows[best]["head"],
            chosen[best],
        )
        if rows[best]["base_lr"] in (min(self.settings.grid.base_lrs), max(self.settings.grid.base_lrs)):
            logger.warning(
                "Linear probe: its base LR %g is at an end of TEST.LINEAR.BASE_LRS; with others, or a longer training, "
                "there may be a better head.",
                rows[best]["base_lr"],
            )
        logger.info("Linear probe: all heads are in %s", comm.on_main_process(lambda: self._save(rows, best)))
        if not self.keep_checkpoint:
            self._checkpoint.remove()
        return {"linear": {name: values[best] for name, values in tops.items()}}

    def _table(self, tops: dict[str, list[float]]) -> list[dict[str, Any]]:
        grid = self.settings.grid
        diverged = self._heads.diverged()
        return [
            {
                "head": name,
                "num_last_blocks": seen.num_blocks,
                "mean_patch": seen.mean_patch,
                "base_lr": base_lr,
                "lr": learning_rate(base_lr, self.settings.ims_per_batch),
                "diverged": diverged[number],
                **{metric: values[number] for metric, values in tops.items()},
            }
            for number, (name, (seen, base_lr)) in enumerate(zip(grid.names, grid.heads, strict=True))
        ]

    def _save(self, rows: list[dict[str, Any]], best: int) -> str:
        content = {
            "dataset": self.dataset,
            "weights": self._weights,
            "best": rows[best]["head"],
            "protocol": self.protocol()["linear"],
            "heads": rows,
        }
        os.makedirs(os.path.join(self.output_dir, FOLDER), exist_ok=True)
        name = (
            f"{HEADS_FILE}{self._weights[:8]}-{dataset_in_file_name(self.dataset)}-{self._checkpoint.digest[:4]}.json"
        )
        path = os.path.join(self.output_dir, FOLDER, name)
        write_json(path, content)
        return path

    def protocol(self) -> dict[str, Any]:
        has_val = self.sets.val_crops is not None
        return {
            "linear": {
                **self._training(),
                "selected_on": "validation set" if has_val else "test set",
                "num_val_images": len(self.sets.val_crops.dataset) if has_val else 0,
            }
        }

    def _training(self) -> dict[str, Any]:
        """The settings that the heads depend on."""
        return {"num_train_images": len(self.sets.train_crops.dataset), **self.settings.protocol()}

    def _identity(self) -> dict[str, Any]:
        """All that the trained heads depend on."""
        train_set = self.sets.train_crops.dataset.dataset
        return {
            "weights": self._weights,
            "train_index_sha256": index_sha256(train_set),
            "classes": train_set.class_names,
            "preprocessing": dict(self.sets.preprocessing),
            "training": self._training(),
        }


def _possible(grid: HeadGrid, model: nn.Module) -> HeadGrid:
    """The part of a grid that a model has blocks for; what is left out is said.

    Raises:
        ValueError: if nothing is left.
    """
    backbone: Any = getattr(model, "backbone", model)
    most = backbone.num_layers if hasattr(backbone, "get_intermediate_layers") else 1
    possible = tuple(n for n in grid.num_last_blocks if n <= most)
    if possible == grid.num_last_blocks:
        return grid
    has = f"{type(backbone).__name__} gives the tokens of its last {most} block(s)"
    if not possible:
        raise ValueError(f"TEST.LINEAR.NUM_LAST_BLOCKS is {grid.num_last_blocks}, and {has} only.")
    logger.warning(
        "Linear probe: %s, so of TEST.LINEAR.NUM_LAST_BLOCKS %s only %s is used.", has, grid.num_last_blocks, possible
    )
    return replace(grid, num_last_blocks=possible)


def _percent_within(ranks: Tensor, top: int) -> list[float]:
    """[images, heads] -> per head the share of images whose class is among the first ``top``, in percent."""
    return [100.0 * count / len(ranks) for count in (ranks < top).sum(dim=0).tolist()]


@EVALUATOR_REGISTRY.register("linear")
def build_linear_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.LINEAR; trained on TEST.LINEAR.TRAIN, or the training set of TEST.TRAIN_PER_TEST or DATASETS.TRAIN.

    Raises:
        ValueError: if a dataset has no labels, sets share no class, or the batch cannot be divided over the processes.
    """
    linear = cfg.TEST.LINEAR
    world_size = comm.get_world_size()
    if linear.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"TEST.LINEAR.IMS_PER_BATCH {linear.IMS_PER_BATCH} is global and must be divisible by the {world_size} "
            "processes."
        )
    sets = match_label_sets(cfg, "linear", linear.TRAIN, dataset, make_loader)
    val_crops, val_classes = None, []
    if linear.VAL:
        val_crops = make_loader(cfg, linear.VAL)
        val_classes = match_label_sets(
            cfg, "linear", sets.train_strings, linear.VAL, make_loader, "validation set"
        ).train_class_of
    settings = LinearSettings.from_config(cfg, len(sets.train_loader.dataset))
    train_cfg = _training_cfg(cfg, settings, sets.train_strings, len(sets.train_labels))
    tests = list(cfg.DATASETS.TEST)
    later = tests[tests.index(dataset) + 1 :] if dataset in tests else []
    return LinearEvaluator(
        ProbeSets(
            train_batches=functools.partial(build_train_loader, train_cfg),
            train_crops=sets.train_loader,
            test_crops=make_loader(cfg, dataset),
            test_classes=sets.train_class_of,
            val_crops=val_crops,
            val_classes=val_classes,
            preprocessing=preprocessing(cfg),
        ),
        settings,
        dataset=dataset,
        output_dir=cfg.OUTPUT_DIR,
        keep_checkpoint=any(
            training_strings(cfg, linear.TRAIN, test) == sets.train_strings
            and make_loader(cfg, test).dataset.dataset.has_labels  # else it is left out (build_evaluator)
            for test in later
        ),
    )


def _training_cfg(cfg: CfgNode, settings: LinearSettings, train: tuple[str, ...], num_classes: int) -> CfgNode:
    """The config of a classifier whose training loader is that of the probe: one random crop, perhaps flipped."""
    own = cfg.clone()
    own.defrost()
    own.SEED = settings.seed
    own.DATASETS.TRAIN = train
    own.MODEL.CLASSIFIER.NUM_CLASSES = num_classes
    own.INPUT.AUGMENTATION = "SingleCrop"
    own.INPUT.AUGMENTATION_BACKEND = "reference"  # a training may choose another; a measurement stays the same
    own.INPUT.GLOBAL_CROPS.SIZE_PX = settings.crop_size_px
    own.INPUT.GLOBAL_CROPS.SCALE = settings.crop_scale
    own.INPUT.HFLIP_PROB = settings.hflip_prob
    own.SOLVER.IMS_PER_BATCH = settings.ims_per_batch
    return own
