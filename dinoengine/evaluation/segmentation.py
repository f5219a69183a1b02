"""Linear segmentation probe on frozen patch tokens (DINOv2, arXiv:2304.07193, section 7.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinoengine.config import CfgNode
from dinoengine.data import build_mask_train_loader
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory
from dinoengine.evaluation.confusion import ConfusionMatrix, log_iou_per_class, segmentation_scores
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.mask_sets import MaskSets, match_mask_sets
from dinoengine.evaluation.segmentation_head import ProbeSchedule, SegmentationHead, train_segmentation_head
from dinoengine.modeling.meta_arch.feature_model import FeatureModel
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm


def last_patch_tokens(model: nn.Module, images: Tensor, num_blocks: int) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens of the last blocks side by side, each after the final norm, oldest first.

    Returns:
        [B, N, num_blocks * D], and the grid of the N patches.

    Raises:
        ValueError: if the model shows its last block only, or has not that many.
    """
    if num_blocks == 1:
        output: BackboneOutput = model(images)
        return output.patch_tokens, output.grid
    if not isinstance(model, FeatureModel):
        raise ValueError(
            f"The model gives the tokens of its last block only; set TEST.SEGMENTATION.NUM_LAST_BLOCKS 1, not {num_blocks}."
        )
    outputs = model.forward_last_blocks(images, num_blocks)
    return torch.cat([output.patch_tokens for output in outputs], dim=2), outputs[-1].grid


class SegmentationEvaluator(DatasetEvaluator):
    """``{"segmentation": {"miou": percent, "pixel_accuracy": percent}}``; IoU per class goes to the log."""

    def __init__(
        self,
        sets: MaskSets,
        train_batches: Any,
        schedule: ProbeSchedule,
        num_last_blocks: int,
        protocol: dict[str, Any],
    ) -> None:
        """
        Args:
            train_batches: endless iterable of ImageBatch with masks in the classes of the training set.
            num_last_blocks: blocks whose patch tokens the head sees.
            protocol: settings that results depend on.
        """
        self.sets = sets
        self.train_batches = train_batches
        self.schedule = schedule
        self.num_last_blocks = num_last_blocks
        self._protocol = protocol
        self._model: nn.Module | None = None
        self._head: SegmentationHead | None = None
        self._confusion = ConfusionMatrix(sets.num_classes, sets.test_set)

    def prepare(self, model: nn.Module) -> None:
        """Train the head."""
        self._model = model
        # Tensors made in inference mode, where this is called, could not be used in a backward pass.
        with torch.inference_mode(False), torch.enable_grad():
            self._head = train_segmentation_head(
                (self._relabelled(batch) for batch in self.train_batches),
                lambda images: last_patch_tokens(model, images, self.num_last_blocks),
                self.sets.num_classes,
                self.schedule,
                next(model.parameters()).device,
                self.sets.train_set,
            )

    def _relabelled(self, batch: ImageBatch) -> ImageBatch:
        assert batch.masks is not None
        batch.masks = self.sets.relabelled(batch.masks)
        return batch

    def reset(self) -> None:
        self._confusion = ConfusionMatrix(self.sets.num_classes, self.sets.test_set)

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        assert self._head is not None, "prepare() comes before process()"
        assert self._model is not None
        assert batch.masks is not None
        tokens, grid = output.patch_tokens, output.grid
        if self.num_last_blocks > 1:
            tokens, grid = last_patch_tokens(self._model, batch.images, self.num_last_blocks)
        self._confusion.add(self._head(tokens, grid), batch.masks, batch.indices)

    def evaluate(self) -> Results:
        counts = self._confusion.finish()
        self._head = self._model = None  # of the weights as they were; the next call has others
        log_iou_per_class(counts, self.sets.class_names, "Linear segmentation probe")
        return {"segmentation": segmentation_scores(counts)}

    def protocol(self) -> dict[str, Any]:
        return {"segmentation": self._protocol}


@EVALUATOR_REGISTRY.register("segmentation")
def build_segmentation_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.SEGMENTATION; the head is trained on TEST.SEGMENTATION.TRAIN, or DATASETS.TRAIN if that is empty.

    Raises:
        ValueError: if either dataset has no masks, they share no class, or the processes cannot share a batch.
    """
    probe = cfg.TEST.SEGMENTATION
    if probe.IMS_PER_BATCH % comm.get_world_size():
        raise ValueError(
            f"TEST.SEGMENTATION.IMS_PER_BATCH {probe.IMS_PER_BATCH} is global and must be divisible by the "
            f"{comm.get_world_size()} processes."
        )
    sets = match_mask_sets(cfg, "segmentation", probe.TRAIN, dataset, make_loader)
    batches = build_mask_train_loader(
        cfg,
        sets.train_set,
        batch_size=probe.IMS_PER_BATCH,
        resize_ratio=probe.RESIZE_RATIO,
        hflip_prob=probe.HFLIP_PROB,
        seed=probe.SEED,
    )
    schedule = ProbeSchedule(probe.ITERS, probe.WARMUP_ITERS, probe.BASE_LR, probe.WEIGHT_DECAY, probe.SEED)
    protocol = {
        "num_last_blocks": probe.NUM_LAST_BLOCKS,
        "ims_per_batch": probe.IMS_PER_BATCH,
        "resize_ratio": list(probe.RESIZE_RATIO),
        "hflip_prob": probe.HFLIP_PROB,
        **vars(schedule),
        "num_train_images": len(sets.train_set),
    }
    return SegmentationEvaluator(sets, batches, schedule, probe.NUM_LAST_BLOCKS, protocol)
