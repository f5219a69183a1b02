"""Every config key under SOLVER, once: the optimizer and its schedules, steps, checkpoints, precision."""

from __future__ import annotations

from dinoengine.config.config import CfgNode as CN

_C = CN()

_C.SOLVER = CN()
# A name in OPTIMIZER_REGISTRY: "AdamW" or "SGD". Changes results.
_C.SOLVER.OPTIMIZER = "AdamW"
# Images per optimizer step over all processes and micro-batches. Changes results.
_C.SOLVER.IMS_PER_BATCH = 2048
# Each process runs its share of a step in this many parts, to fit memory. Teacher targets and centres are of the
# whole batch, so it does not change results (beyond the draws of stochastic depth).
_C.SOLVER.NUM_MICRO_BATCHES = 1
# Number of optimizer steps. Changes results.
_C.SOLVER.MAX_ITER = 125000

# Learning rate before scaling. Changes results.
_C.SOLVER.BASE_LR = 4e-3
# Peak LR = BASE_LR * f(IMS_PER_BATCH / REFERENCE_BATCH_SIZE), f = square root ("sqrt"), identity ("linear") or 1
# ("none"). Changes results.
_C.SOLVER.LR_SCALING = "sqrt"
_C.SOLVER.REFERENCE_BATCH_SIZE = 1024
# LR at the end of the cosine; absolute, not scaled with the batch. Changes results.
_C.SOLVER.MIN_LR = 1e-6
# Iterations of linear warm-up from exactly 0. Changes results.
_C.SOLVER.WARMUP_ITERS = 12500
# Iterations in which the prototypes (last layer of each head) have LR 0. Changes results.
_C.SOLVER.FREEZE_LAST_LAYER_ITERS = 1250
# Continued pretraining from a backbone alone: iterations in which the backbone has LR 0 while new heads learn, and
# after them iterations in which its LR rises linearly to that of the schedule. 0: none. Change results.
_C.SOLVER.BACKBONE_FREEZE_ITERS = 0
_C.SOLVER.BACKBONE_RAMP_ITERS = 0
# LR factor per layer towards the input, 0 < d <= 1 (1: none). Changes results.
_C.SOLVER.LAYER_DECAY = 0.9
# Further LR factor of the patch embedding. Changes results.
_C.SOLVER.PATCH_EMBED_LR_MULT = 0.2
# Weight decay at iteration 0 and at the end, cosine in between. Changes results.
_C.SOLVER.WEIGHT_DECAY = 0.04
_C.SOLVER.WEIGHT_DECAY_END = 0.4
# AdamW's betas and epsilon. Change results.
_C.SOLVER.BETAS = (0.9, 0.999)
_C.SOLVER.EPS = 1e-8
# SGD's momentum, 0 <= m < 1. Changes results.
_C.SOLVER.MOMENTUM = 0.9
# Largest L2 norm of the gradient of each sub-module (backbone, each head); 0 disables. Changes results.
_C.SOLVER.CLIP_GRAD_NORM = 3.0
# Optimizer steps with a non-finite loss or gradient that are skipped before the run stops; the weights are never
# touched by such a step. 0 stops at the first. Does not change results of healthy runs.
_C.SOLVER.NON_FINITE_MAX_SKIPS = 0

# detectron2's rule for moving a recipe to another number of processes: if > 0 and different from the actual world
# size, batch and iteration counts (and BASE_LR where LR_SCALING is "none") are scaled. 0: the global batch stays
# what it says. Changes results.
_C.SOLVER.REFERENCE_WORLD_SIZE = 0

# Iterations between checkpoints; 0: only the final one. Does not change results.
_C.SOLVER.CHECKPOINT_PERIOD = 3750
# Save also when this many minutes have passed since the last save; rank 0 looks at its clock every LOG.PERIOD iterations.
# 0: never. Does not change results.
_C.SOLVER.CHECKPOINT_MINUTES = 0.0
# Periodic checkpoints kept, oldest deleted first, also across resumes; 0 keeps all. model_final is never deleted. With 1
# there is none to fall back on if the last one is damaged. Does not change results.
_C.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0
# Checkpoints in which a multiple of this number of iterations is done are kept beside those; a multiple of
# CHECKPOINT_PERIOD. 0: none. Does not change results.
_C.SOLVER.CHECKPOINT_KEEP_EVERY = 0
# When a checkpoint cannot be written (disk full): "stop" ends the run with exit code 2, "continue" logs an error and tries
# again at the next one; model_final must be written in any case. Those before it are never touched. Does not change
# results.
_C.SOLVER.CHECKPOINT_ON_ERROR = "stop"
# Write periodic checkpoints in a thread while training goes on. Needs CPU memory for one copy of the checkpoint; the next
# save waits for the one before it. Does not change results.
_C.SOLVER.CHECKPOINT_IN_BACKGROUND = False

_C.SOLVER.AMP = CN()
# Mixed precision: matrix products in PRECISION, weights, residual stream and losses in fp32. Changes results to
# rounding.
_C.SOLVER.AMP.ENABLED = False
# "bf16" (CPU and CUDA), "fp16" (CUDA, with a gradient scaler), "fp32" (as if not ENABLED), or "auto": bf16 or fp32,
# whichever multiplies matrices faster on this device, measured at the start; config.yaml and checkpoints hold what was
# chosen, and a run that is resumed or forked keeps it. Changes results to rounding.
_C.SOLVER.AMP.PRECISION = "bf16"


def get_cfg() -> CN:
    """A fresh copy of these defaults."""
    return _C.clone()
