"""What the student sees: masks and blur, counted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dinoengine.config import get_cfg
from dinoengine.data import BlockMasking, MaskPlan, MultiCrop
from dinoengine.data.decoded_batch import made_crops
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.evaluation.numerics.quantity import Quantity

# Images of a batch -> what the published code pads the masked patches to, for 196 patches
PADDED_TO = {64: 3771, 8: 507, 1: 98}
# Crop size and patch size -> patches of the largest masked block
LARGEST_BLOCK = {(224, 16): 98, (224, 14): 128}
# Kind of view -> probability of blur as the published code applies it (declared: 1.0, 0.1, 0.5)
BLUR = {"global view 1": 0.0, "global view 2": 0.9, "local views": 0.5}
BLUR_DRAWS = 1000


def check_masks() -> Iterator[Quantity]:
    """Share of masked patches and crops, and the bounds of their number."""
    plan = MaskPlan(BlockMasking((14, 14)), batch_size=64, seed=0)
    counts = np.stack([plan.counts(index) for index in range(100)])  # [batches, views, images]
    share = float(counts.mean()) / 196
    yield Quantity("share of masked patches of all global crops", "published code, measured", 0.1485, share, 5e-4)
    masked_crops = set((counts > 0).sum(axis=(1, 2)).tolist())
    got = masked_crops.pop() if len(masked_crops) == 1 else -1
    yield Quantity("masked crops of 128", "published code: int(2 B * 0.5), in every batch", 64, got)
    drawn = plan.masks(list(range(64))).sum(axis=1).reshape(2, 64)
    wrong = int((drawn != plan.counts(0)).sum())
    yield Quantity("crops with another number of masked patches than planned", "exact by construction", 0, wrong)
    for images, bound in PADDED_TO.items():
        plan = MaskPlan(BlockMasking((14, 14)), batch_size=images, seed=0)
        above = sum(int(plan.counts(index).sum()) > bound for index in range(100))
        yield Quantity(f"batches of {images} images with more than {bound} masked patches", "published bound", 0, above)
    for (pixels, patch), largest in LARGEST_BLOCK.items():
        got = BlockMasking((pixels // patch, pixels // patch)).max_block_patches
        yield Quantity(f"largest masked block, {pixels} px in patches of {patch}", "published code", largest, got)


def check_blur() -> Iterator[Quantity]:
    """How often the default augmentation blurs each kind of view, with everything else switched off."""
    from PIL import Image

    cfg = get_cfg()
    whole = ["GLOBAL_CROPS.SIZE_PX=12", "LOCAL_CROPS.SIZE_PX=12", "LOCAL_CROPS.NUM=1", "CROP_RATIO=(1.0, 1.0)"]
    whole += ["GLOBAL_CROPS.SCALE=(1.0, 1.0)", "LOCAL_CROPS.SCALE=(1.0, 1.0)", "SOLARIZE.PROBS=(0.0, 0.0, 0.0)"]
    off = [f"{name}=0.0" for name in ("HFLIP_PROB", "COLOR_JITTER.PROB", "GRAYSCALE_PROB")]
    # A blur of 0.1 pixels would leave the image as it is.
    cfg.merge_from_list([f"INPUT.{word}" for word in [*whole, *off, "BLUR.SIGMA_PX=(1.0, 2.0)"]])
    augmentation = MultiCrop(cfg)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image, plain = Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)
    changed = np.zeros(3)
    for position in range(BLUR_DRAWS):
        global_crops, local_crops = augmentation(image, position_rng(0, position, CROPS))
        changed += [not torch.equal(crop, plain) for crop in made_crops([*global_crops, *local_crops])]
    for (view, expected), count in zip(BLUR.items(), changed, strict=True):
        tolerance = 4.5 * (expected * (1 - expected) / BLUR_DRAWS) ** 0.5  # standard errors; 0 is exact
        source = "published code as applied"
        yield Quantity(f"blurred share, {view}", source, expected, float(count) / BLUR_DRAWS, tolerance)
