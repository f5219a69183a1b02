"""Every config key but those under TEST, once: meaning, unit, allowed values, and whether it changes results.

The defaults are the published DINOv2 "short" recipe (ViT-L/16, ImageNet-1k, 32 GPUs; arXiv:2304.07193 and the
released training configuration). "Iterations" are optimizer steps; batch sizes are global, over all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from dinoengine.config import evaluation_defaults, solver_defaults
from dinoengine.config.config import CfgNode as CN
from dinoengine.config.config import ConfigError

_C = CN()

# Version of this key layout. Files of another version are refused with the reason.
_C.VERSION = 1

# Where checkpoints, logs, metrics and config.yaml go. Does not change results.
_C.OUTPUT_DIR = "output"

# Seed of everything random: initial weights, sample order, crops, masks, stochastic depth. >= 0 makes the run
# reproducible; -1 draws one, logs it and writes it into OUTPUT_DIR/config.yaml. Changes results.
_C.SEED = 0

# Ask torch for deterministic kernels (slower on CUDA). Does not change the mathematics.
_C.DETERMINISTIC = False

# Let cuDNN measure convolution kernels at start (CUDA, fixed crop sizes). Does not change the mathematics.
_C.CUDNN_BENCHMARK = True

# torch.set_float32_matmul_precision: "highest", "high" (TF32 on CUDA) or "medium". Changes results to rounding.
_C.FLOAT32_PRECISION = "high"

# ----------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------
_C.MODEL = CN()

# A name in META_ARCH_REGISTRY. Changes results.
_C.MODEL.META_ARCHITECTURE = "DINOv2"

# "auto" (CUDA when a GPU is visible and --num-gpus is not 0, else CPU), "cpu" or "cuda".
_C.MODEL.DEVICE = "auto"

# Path of a checkpoint whose weights start the run (iteration 0). Empty: from scratch. With --resume and a
# checkpoint in OUTPUT_DIR that one wins and this key is not used. Changes results.
_C.MODEL.WEIGHTS = ""

# True: every parameter must be in MODEL.WEIGHTS with its shape and nothing may be left over. False: load what
# fits, list the rest, and stop only when nothing fits.
_C.MODEL.WEIGHTS_STRICT = True

# Also take the optimizer's moments from MODEL.WEIGHTS, which must then be a full dinoengine checkpoint; schedules and
# iteration start anew. Changes results.
_C.MODEL.WEIGHTS_WITH_OPTIMIZER = False

# Per-channel mean and standard deviation of the pixels, in units of 0..1 (ImageNet's here). Their length is the
# number of input channels. They are kept in checkpoints, and an evaluation with others is refused. Changes results.
_C.MODEL.PIXEL_MEAN = (0.485, 0.456, 0.406)
_C.MODEL.PIXEL_STD = (0.229, 0.224, 0.225)

_C.MODEL.BACKBONE = CN()
# A name in BACKBONE_REGISTRY. Changes results.
_C.MODEL.BACKBONE.NAME = "VisionTransformer"

# Attention of VisionTransformer. "sdpa": torch's own, one crop size after the other; "varlen" (torch, 16 bit) and
# "xformers": global and local crops of the student in one pass, CUDA only. "auto": on CUDA the first of varlen and xformers
# that works for the precision and the width of the heads, which is tried once; else sdpa. The teacher and evaluations have
# crops of one size and use sdpa. Changes results to rounding.
_C.MODEL.ATTENTION = "auto"
# What VisionTransformer computes again in the backward pass: "none", "selective" (norms, GELU and sums, but no matrix
# product and no attention) or "full" (whole blocks). Less memory, more time; does not change results.
_C.MODEL.ACTIVATION_CHECKPOINTING = "none"
# torch.compile of each block of VisionTransformer: the first steps wait for the compiler, a C++ compiler must be there.
# Changes results to rounding.
_C.MODEL.COMPILE = False

_C.MODEL.VIT = CN()
# Row of the size table: "micro" (64 wide, 4 deep, 2 heads), "tiny" (192/12/3), "small" (384/12/6),
# "base" (768/12/12), "large" (1024/24/16) or "giant" (1536/40/24). Changes results.
_C.MODEL.VIT.SIZE = "large"
# Override single entries of the size table; 0 keeps the table's value. Change results.
_C.MODEL.VIT.EMBED_DIM = 0
_C.MODEL.VIT.DEPTH = 0
_C.MODEL.VIT.NUM_HEADS = 0
# Patch edge in pixels; every crop size must be a multiple of it. Changes results.
_C.MODEL.VIT.PATCH_SIZE_PX = 16
# Image size (rows, columns; one number for a square) that the position table is made for; 0 = the global crop
# size. Other sizes interpolate it. Changes results.
_C.MODEL.VIT.POS_EMBED_SIZE_PX = (0,)
# Register tokens (arXiv:2309.16588) between CLS and patches; 0 or more. Changes results.
_C.MODEL.VIT.NUM_REGISTER_TOKENS = 0
# "mlp" (GELU) or "swiglu". Changes results.
_C.MODEL.VIT.FFN = "mlp"
# Hidden width of the MLP over the model width; SwiGLU uses 2/3 of it, rounded up to a multiple of 8.
_C.MODEL.VIT.FFN_RATIO = 4.0
# Biases of the qkv, attention-output and FFN layers. Change results.
_C.MODEL.VIT.QKV_BIAS = True
_C.MODEL.VIT.PROJ_BIAS = True
_C.MODEL.VIT.FFN_BIAS = True
# Initial LayerScale factor; 0 builds no LayerScale. Changes results.
_C.MODEL.VIT.LAYER_SCALE_INIT = 1e-5
# Stochastic depth: share of the samples that skip a residual branch, 0 <= rate < 1. Changes results.
_C.MODEL.VIT.DROP_PATH_RATE = 0.3
# True: the same rate in every block; False: rising linearly from 0 to the rate. Changes results.
_C.MODEL.VIT.DROP_PATH_UNIFORM = True
# How the position table is interpolated: antialiasing, and the offset added to the target grid (published
# weights: False and 0.1 without registers, True and 0.0 with four). Change results at other sizes.
_C.MODEL.VIT.INTERPOLATE_ANTIALIAS = False
_C.MODEL.VIT.INTERPOLATE_OFFSET = 0.1

_C.MODEL.DINO_HEAD = CN()
# A name in HEAD_REGISTRY. Changes results.
_C.MODEL.DINO_HEAD.NAME = "DINOHead"
# Prototypes K, width of the hidden layers, width of the bottleneck, number of layers before the prototypes (>= 1).
# Change results.
_C.MODEL.DINO_HEAD.NUM_PROTOTYPES = 65536
_C.MODEL.DINO_HEAD.HIDDEN_DIM = 2048
_C.MODEL.DINO_HEAD.BOTTLENECK_DIM = 256
_C.MODEL.DINO_HEAD.NUM_LAYERS = 3

_C.MODEL.IBOT_HEAD = CN()
# True: patches have a head of their own, with the sizes below; False: patches and CLS share MODEL.DINO_HEAD, and
# the sizes below are not used. Changes results.
_C.MODEL.IBOT_HEAD.SEPARATE = False
_C.MODEL.IBOT_HEAD.NUM_PROTOTYPES = 65536
_C.MODEL.IBOT_HEAD.HIDDEN_DIM = 2048
_C.MODEL.IBOT_HEAD.BOTTLENECK_DIM = 256
_C.MODEL.IBOT_HEAD.NUM_LAYERS = 3

_C.MODEL.TEACHER = CN()
# EMA momentum at iteration 0 and at the end, cosine in between; 0..1. Changes results.
_C.MODEL.TEACHER.MOMENTUM = 0.992
_C.MODEL.TEACHER.MOMENTUM_END = 1.0
# Teacher softmax temperature: linear from WARMUP_TEMP to TEMP over TEMP_WARMUP_ITERS, then constant. Not
# stretched with MAX_ITER. Changes results.
_C.MODEL.TEACHER.WARMUP_TEMP = 0.04
_C.MODEL.TEACHER.TEMP = 0.07
_C.MODEL.TEACHER.TEMP_WARMUP_ITERS = 37500

_C.MODEL.LOSS = CN()
# Teacher targets: "centering" (softmax of centred logits) or "sinkhorn_knopp". Changes results.
_C.MODEL.LOSS.CENTERING = "centering"
# EMA momentum of the centres, 0..1 (only with "centering"). Changes results.
_C.MODEL.LOSS.CENTER_MOMENTUM = 0.9
# Normalisation rounds (only with "sinkhorn_knopp"), >= 1. Changes results.
_C.MODEL.LOSS.SINKHORN_ITERS = 3
# Student softmax temperature, > 0. Changes results.
_C.MODEL.LOSS.STUDENT_TEMP = 0.1
# Weights of the terms; 0 switches a term off. Change results.
_C.MODEL.LOSS.DINO_WEIGHT = 1.0
_C.MODEL.LOSS.IBOT_WEIGHT = 1.0
_C.MODEL.LOSS.KOLEO_WEIGHT = 0.1
# Images among which KoLeo looks for the nearest neighbour; 0 = the global batch. The published code uses the
# batch of one GPU. Must divide IMS_PER_BATCH; with NUM_MICRO_BATCHES > 1 the images of one micro-batch of one process (0 is
# then refused): a group over several processes would consist of the parts that run at the same time, other images than in
# one process. Changes results.
_C.MODEL.LOSS.KOLEO_GROUP_SIZE = 0

# An image classifier: one linear layer on a backbone, trained with labels.
_C.MODEL.CLASSIFIER = CN()
# Number of classes, as many as DATASETS.TRAIN has, with MODEL.META_ARCHITECTURE ImageClassifier and INPUT.AUGMENTATION
# SingleCrop. 0: no classifier but pretraining, without labels. Changes results.
_C.MODEL.CLASSIFIER.NUM_CLASSES = 0
# The head sees the CLS tokens of this many last blocks, each after the final norm, oldest first: 1 or 4, the two that are
# published. Changes results.
_C.MODEL.CLASSIFIER.NUM_LAST_BLOCKS = 1
# Whether it also sees the mean patch token of the last block. Changes results.
_C.MODEL.CLASSIFIER.MEAN_PATCH = False
# True: linear evaluation, the backbone stays as it is, in eval mode. False: full fine-tuning. Changes results.
_C.MODEL.CLASSIFIER.FREEZE_BACKBONE = True
# Share of the target's probability that is spread over all classes, 0..1. Changes results.
_C.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
# Mixup: an image and its neighbour in the batch of a process are added with weights lambda and 1 - lambda, lambda from
# Beta(alpha, alpha), labels alike; alpha 0 or more, 0: off. Changes results.
_C.MODEL.CLASSIFIER.MIXUP_ALPHA = 0.0
# CutMix: a box that covers 1 - lambda of the image is taken from the neighbour; alpha 0 or more, 0: off. With both, each
# batch gets one of the two at random. Changes results.
_C.MODEL.CLASSIFIER.CUTMIX_ALPHA = 0.0

# How several processes share a run. "ddp": each has the whole model, gradients are averaged. "fsdp": parameters,
# gradients and moments are split among the processes and gathered block by block (docs/scaling.md), for models that do
# not fit. A single process has the whole model. Changes results to rounding.
_C.MODEL.PARALLEL = "ddp"

_C.MODEL.DDP = CN()
# Let DistributedDataParallel look for parameters without gradient (slower; for models of your own).
_C.MODEL.DDP.FIND_UNUSED_PARAMETERS = False
# Send gradients as fp16 between processes. Changes results to rounding.
_C.MODEL.DDP.FP16_COMPRESSION = False

_C.MODEL.FSDP = CN()
# Neighbouring processes that split one copy of the model, 2 or more; must divide their number, and each such group has a
# copy: weights are gathered within a group, between groups gradients alone are exchanged. The GPUs of a machine, where the
# network between machines is slow and the model fits. 0 = all processes. Changes results to rounding.
_C.MODEL.FSDP.GROUP_SIZE = 0

# ----------------------------------------------------------------------------------------------------------------
# Input: from image to crops and masks
# ----------------------------------------------------------------------------------------------------------------
_C.INPUT = CN()
# What becomes of an image: "RGB" (3 channels), "L" (grey, 1), "RGBA" (4; colours as stored, and how opaque they are), each
# with 8 bits by Pillow; or "channels": all channels of a file with all their bits (.npy, .tiff, 16 bit .png ...), as many
# as MODEL.PIXEL_MEAN has values. See docs/data.md. Changes results.
_C.INPUT.FORMAT = "RGB"
# With FORMAT "channels", where it must be set: the stored values (low, high) that become 0 and 1; linear between them, cut
# beyond. (0, 65535) for 16 bits, (0, 4095) for a camera of 12 bits in files of 16, (0, 255) for 8. (): with the other
# formats, whose 0..255 become 0..1. Changes results.
_C.INPUT.VALUE_RANGE = ()
# A name in AUGMENTATION_REGISTRY: "MultiCrop" for pretraining, "SingleCrop" (one global crop and the flip, nothing else)
# for a classifier. Changes results.
_C.INPUT.AUGMENTATION = "MultiCrop"
# What makes the crops; their parameters are drawn before, the same for all. "reference": torchvision on Pillow images,
# operation for operation the published pipeline. "fast": torch and OpenCV (pip install 'dinoengine[fast]') on uint8, in
# about a sixth of the time; pixels differ by rounding, by about 1 of 255 on average after a hue change. "device": workers
# only decode, and the device of the training makes the crops of a batch together, for few cores beside a fast GPU; a few
# pixels in a thousand differ by a level (docs/data.md, docs/numerics.md). Not with FORMAT "channels". Changes results.
_C.INPUT.AUGMENTATION_BACKEND = "reference"
# With AUGMENTATION_BACKEND "fast" or "device": decode a JPEG at 1/2, 1/4 or 1/8 of its size if every crop is reduced by at
# least that much anyhow. For photographs of 1 to 12 megapixels 1.6 to 6 times as fast with "fast"; images of less than
# twice the largest crop are decoded whole. Crops differ by about 1 of 255 on average (docs/numerics.md). Changes results.
_C.INPUT.REDUCED_DECODE = False
# Width over height of the cropped region, drawn log-uniformly. Changes results.
_C.INPUT.CROP_RATIO = (3.0 / 4.0, 4.0 / 3.0)

# Crop size in pixels (rows, columns; one number for a square) and share of the image area. Change results.
_C.INPUT.GLOBAL_CROPS = CN()
_C.INPUT.GLOBAL_CROPS.SIZE_PX = (224,)
_C.INPUT.GLOBAL_CROPS.SCALE = (0.32, 1.0)
_C.INPUT.LOCAL_CROPS = CN()
# Local crops per image, 0 or more. Changes results.
_C.INPUT.LOCAL_CROPS.NUM = 8
_C.INPUT.LOCAL_CROPS.SIZE_PX = (96,)
_C.INPUT.LOCAL_CROPS.SCALE = (0.05, 0.32)

# Probability of a horizontal flip, 0..1. Changes results.
_C.INPUT.HFLIP_PROB = 0.5

# Colour jitter: probability, then the strength of each operation as in torchvision's ColorJitter. Saturation and
# hue need colours: with INPUT.FORMAT "L" and "channels" they are left out. Change results.
_C.INPUT.COLOR_JITTER = CN()
_C.INPUT.COLOR_JITTER.PROB = 0.8
_C.INPUT.COLOR_JITTER.BRIGHTNESS = 0.4
_C.INPUT.COLOR_JITTER.CONTRAST = 0.4
_C.INPUT.COLOR_JITTER.SATURATION = 0.2
_C.INPUT.COLOR_JITTER.HUE = 0.1

# Probability of turning a crop grey, 0..1; left out with INPUT.FORMAT "L" and "channels". Changes results.
_C.INPUT.GRAYSCALE_PROB = 0.2

# Probabilities for (global view 1, global view 2, local views). For blur these are the *effective* ones: the
# published code declares (1.0, 0.1, 0.5) but applies (0.0, 0.9, 0.5), and all released models were trained so
# (dinov2 PR #411). Change results.
_C.INPUT.BLUR = CN()
_C.INPUT.BLUR.PROBS = (0.0, 0.9, 0.5)
_C.INPUT.BLUR.KERNEL_SIZE_PX = 9
_C.INPUT.BLUR.SIGMA_PX = (0.1, 2.0)
_C.INPUT.SOLARIZE = CN()
_C.INPUT.SOLARIZE.PROBS = (0.0, 0.2, 0.0)
# Pixels at or above this value (0..255; with INPUT.FORMAT "channels" 255 is the end of VALUE_RANGE) are inverted. Changes
# results.
_C.INPUT.SOLARIZE.THRESHOLD = 128

# Block masking of the student's global crops for the iBOT loss (not used when IBOT_WEIGHT is 0).
_C.INPUT.MASK = CN()
# Share of the global crops of a batch that are masked: exactly int(2 * IMS_PER_BATCH * share). Changes results.
_C.INPUT.MASK.CROP_SHARE = 0.5
# Smallest and largest masked share of a masked crop's patches; stratified over the batch. Changes results.
_C.INPUT.MASK.RATIO = (0.1, 0.5)
# Smallest block in patches, and smallest height over width of a block (largest is its inverse). Change results.
_C.INPUT.MASK.MIN_BLOCK_PATCHES = 4
_C.INPUT.MASK.MIN_ASPECT = 0.3

# Evaluation: the shorter side is resized to this (0: no resize), then the centre is cropped (rows, columns; one
# number for a square). Change evaluation results.
_C.INPUT.TEST = CN()
_C.INPUT.TEST.RESIZE_PX = 256
_C.INPUT.TEST.CROP_SIZE_PX = (224,)

# ----------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------
_C.DATASETS = CN()
# Dataset strings, e.g. ("folder:/path/to/images",), ("digits:split=train",), ("synthetic:num_images=1000",).
# Several entries are concatenated. Labels are used for a classifier only. Changes results.
_C.DATASETS.TRAIN = ()
# How often a position of the stream takes an image of each entry of TRAIN: positive numbers, one per entry, in any unit.
# Every entry is gone through again and again in an order of its own. (): entries are one set, each image once per pass.
# Changes results.
_C.DATASETS.TRAIN_WEIGHTS = ()
# Lists of images of TRAIN that are left out: text files with a name per line, as tools/check_dataset.py writes them. An
# image is left out if its name (a file's absolute path) is in one of them, character for character. The log says how many
# are, and how many names no image has. Changes results.
_C.DATASETS.QUARANTINE = ()
# Labelled datasets to evaluate on.
_C.DATASETS.TEST = ()

_C.DATALOADER = CN()
# How often each image of DATASETS.TRAIN comes. "uniform": once per pass (of each entry, with TRAIN_WEIGHTS).
# "class_balanced": every class equally often, its images in turn; needs labels. "weighted": by SAMPLE_WEIGHTS. The last two
# need TRAIN_WEIGHTS (). Changes results.
_C.DATALOADER.SAMPLER = "uniform"
# With SAMPLER "weighted": a .npy file with a number >= 0, in any unit, for each image in the order of the dataset. In each
# pass of as many positions as there are images, an image comes its share of them, rounded down or up. Changes results.
_C.DATALOADER.SAMPLE_WEIGHTS = ""
# Worker processes per training process; 0 loads in the main process. Does not change results.
_C.DATALOADER.NUM_WORKERS = 4
# Batches each worker prepares ahead, >= 1. Does not change results.
_C.DATALOADER.PREFETCH_FACTOR = 2
# Images with more pixels (width x height) are refused before they are decoded, 1 to 178956970, which is Pillow's own bound:
# a file of some kilobytes may ask for gigabytes of memory. An image that cannot be used is replaced in training and an
# error in an evaluation. Changes results.
_C.DATALOADER.MAX_IMAGE_PIXELS = 178956970
# Largest share of the images seen so far that may be unusable in training, 0..1. Each is replaced by the image of another
# position of the stream, the same in every run, and written to OUTPUT_DIR/bad_images.txt. Above the share, and from the
# tenth such image on, the run ends with an error; 0: the first one ends it. Does not change results.
_C.DATALOADER.MAX_BAD_IMAGE_SHARE = 0.01
# Seconds to wait for a batch of training before the workers count as hung and are started anew; 0: wait for ever. Needs
# NUM_WORKERS > 0. Longer than the slowest batch, the first of a run included. Does not change results.
_C.DATALOADER.TIMEOUT_SECONDS = 0

# ----------------------------------------------------------------------------------------------------------------
# Collapse guard
# ----------------------------------------------------------------------------------------------------------------
_C.COLLAPSE_GUARD = CN()
# What happens when features or targets have collapsed (docs/evaluation.md says how it is seen): "off", "warn" (say so
# and go on), "stop" (checkpoint, exit code 2) or "rollback" (last_checkpoint becomes the last healthy one, exit code 2).
# Changes results only by ending the run.
_C.COLLAPSE_GUARD.ACTION = "warn"
# Iterations at the start in which nothing counts, as untrained features look collapsed; -1: SOLVER.WARMUP_ITERS plus a
# tenth of SOLVER.MAX_ITER.
_C.COLLAPSE_GUARD.GRACE_ITERS = -1
# Readings in a row that must show it: one reading each LOG.PERIOD iterations, of evaluations one each.
_C.COLLAPSE_GUARD.PATIENCE = 5

# ----------------------------------------------------------------------------------------------------------------
# Logging
# ----------------------------------------------------------------------------------------------------------------
_C.LOG = CN()
# Iterations between lines of the console, metrics.json and TensorBoard, 1..1000. Does not change results.
_C.LOG.PERIOD = 20
# Write TensorBoard events into OUTPUT_DIR.
_C.LOG.TENSORBOARD = True
# Show a progress bar under the log when standard output is a terminal.
_C.LOG.PROGRESS_BAR = True
# Record a profiler trace into OUTPUT_DIR/profile for iterations START..END-1 of the run; off when END is 0.
_C.LOG.PROFILE_START_ITER = 0
_C.LOG.PROFILE_END_ITER = 0

_C.update(solver_defaults.get_cfg())  # the keys under SOLVER
_C.update(evaluation_defaults.get_cfg())  # the keys under TEST


def get_cfg() -> CN:
    """A fresh copy of the defaults, to merge a file and overrides into."""
    return _C.clone()


def read_cfg(config_file: str = "", opts: Sequence[Any] = ()) -> CN:
    """The defaults, then a YAML file, then ``KEY VALUE`` or ``KEY=VALUE`` overrides; not frozen."""
    cfg = get_cfg()
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts))
    return cfg


def cfg_from_text(text: str) -> CN:
    """The whole config that ``dump()`` wrote as ``text``.

    Raises:
        ConfigError: if it is no YAML of keys, or one of another version.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("Config", [f"not valid YAML: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError("Config", [f"holds a {type(values).__name__}; expected keys with values."])
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CN(values))
    return cfg
