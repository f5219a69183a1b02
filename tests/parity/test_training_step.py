"""Several iterations of training, written out by hand from the published rules, next to the trainer's.

Only the gradient of the loss is taken from the package (its terms have oracles of their own). Schedules, group
factors, clipping, AdamW, the frozen prototypes and the moving average are computed here, parameter by parameter.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.engine import SSLTrainer

ITERS, WARMUP, FREEZE, TEMP_WARMUP = 7, 3, 4, 4
DEPTH = 2
SETTINGS = {
    "MODEL.VIT.DEPTH": DEPTH,
    "MODEL.VIT.NUM_REGISTER_TOKENS": 1,
    "MODEL.IBOT_HEAD.SEPARATE": True,
    "SOLVER.MAX_ITER": ITERS,
    "SOLVER.WARMUP_ITERS": WARMUP,
    "SOLVER.FREEZE_LAST_LAYER_ITERS": FREEZE,
    "MODEL.TEACHER.TEMP_WARMUP_ITERS": TEMP_WARMUP,
    "SOLVER.BASE_LR": 0.1,
    "SOLVER.LR_SCALING": "sqrt",
    "SOLVER.MIN_LR": 1e-3,
    "SOLVER.WEIGHT_DECAY": 0.5,
    "SOLVER.WEIGHT_DECAY_END": 2.0,
    "SOLVER.LAYER_DECAY": 0.7,
    "SOLVER.PATCH_EMBED_LR_MULT": 0.3,
    "SOLVER.BETAS": (0.8, 0.95),
    # Larger than the rounding of gradients that are 0 in theory (keys' biases), which AdamW would blow up to steps.
    "SOLVER.EPS": 1e-3,
    "SOLVER.CLIP_GRAD_NORM": 2.0,
    "MODEL.TEACHER.MOMENTUM": 0.7,
}


def _cosine(start: float, end: float, length: int) -> np.ndarray:
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(length) / length))


def _lr_factor(name: str) -> float:
    """From the name, as the published code does."""
    if "backbone" not in name:
        return 1.0
    if ".blocks." in name:
        layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
    else:
        layer = DEPTH + 1 if ".norm." in name else 0
    return 0.7 ** (DEPTH + 1 - layer) * (0.3 if "patch_embed" in name else 1.0)


def _is_decayed(name: str) -> bool:
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)


class ByHand:
    """AdamW and the moving average for one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trained = {n: p for n, p in model.named_parameters() if n.startswith("student.")}
        self.first = {n: torch.zeros_like(p) for n, p in self.trained.items()}
        self.second = {n: torch.zeros_like(p) for n, p in self.trained.items()}
        self.clipped: set[str] = set()

    def clip(self, gradients: dict[str, Tensor]) -> None:
        """Backbone and heads, each to a norm of 2."""
        for part in ("backbone", "dino_head", "ibot_head"):
            names = [n for n in gradients if n.startswith(f"student.{part}.")]
            norm = math.sqrt(sum(float(gradients[n].double().square().sum()) for n in names))
            if norm > 2.0:
                self.clipped.add(part)
                for n in names:
                    gradients[n] *= 2.0 / norm

    @torch.no_grad()
    def step(self, iteration: int, lr: float, weight_decay: float) -> None:
        gradients = {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
        assert gradients.keys() == self.trained.keys()
        self.clip(gradients)
        t = iteration + 1
        for name, p in self.trained.items():
            g, m, v = gradients[name], self.first[name], self.second[name]
            rate = 0.0 if "last_layer" in name and iteration < FREEZE else lr * _lr_factor(name)
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            decay = weight_decay if _is_decayed(name) else 0.0
            p.mul_(1 - rate * decay)
            p.sub_(rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-3))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        parameters = dict(self.model.named_parameters())
        for name, p in self.trained.items():
            teacher = parameters[name.replace("student.", "teacher.", 1)]
            teacher.copy_(momentum * teacher + (1 - momentum) * p)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_the_trainer_does_what_the_published_rules_say(tiny_cfg: CfgNode, centering: str) -> None:
    cfg = tiny_cfg
    cfg.merge_from_list([word for pair in SETTINGS.items() for word in pair])
    cfg.MODEL.LOSS.CENTERING = centering
    cfg.freeze()
    peak = 0.1 * math.sqrt(cfg.SOLVER.IMS_PER_BATCH / 1024)
    lr = np.concatenate((np.linspace(0, peak, WARMUP), _cosine(peak, 1e-3, ITERS - WARMUP)))
    weight_decay, momentum = _cosine(0.5, 2.0, ITERS), _cosine(0.7, 1.0, ITERS)
    temp = np.concatenate((np.linspace(0.04, 0.07, TEMP_WARMUP), np.full(ITERS - TEMP_WARMUP, 0.07)))

    model = SSLTrainer.build_model(cfg).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    by_hand = ByHand(model)
    batches = iter(build_train_loader(cfg))
    for i in range(ITERS):
        model.teacher_temp = float(temp[i])  # type: ignore[assignment]
        model.zero_grad()
        model(next(batches)).total().backward()
        by_hand.step(i, float(lr[i]), float(weight_decay[i]))
        by_hand.follow(float(momentum[i]))

    trainer = SSLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    for (name, mine), theirs in zip(model.state_dict().items(), trainer.bare_model.state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    # Everything was trained far enough to tell a wrong rule from rounding, and clipping took part.
    moved = {name: (p - start[name]).abs().max().item() for name, p in model.named_parameters()}
    assert min(moved.values()) > 1e-4, min(moved, key=lambda name: moved[name])
    assert by_hand.clipped
