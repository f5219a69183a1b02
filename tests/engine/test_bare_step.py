"""The step that is timed is the step of a run."""

from __future__ import annotations

import torch

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.engine import HookBase, SSLTrainer
from dinoengine.engine.bare_step import BareStep


class _KeepWeights(HookBase):
    def after_train(self) -> None:
        self.weights = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}  # type: ignore[attr-defined]


def test_two_steps_are_those_of_a_run_on_the_same_batch(tiny_cfg: CfgNode) -> None:
    """But for the schedules, which are made constant here."""
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.MIN_LR", 0.01, "SOLVER.BASE_LR", 0.01, "SEED", 0])
    tiny_cfg.merge_from_list(
        ["SOLVER.LR_SCALING", "none", "SOLVER.WARMUP_ITERS", 0, "SOLVER.FREEZE_LAST_LAYER_ITERS", 0]
    )
    tiny_cfg.merge_from_list(
        ["SOLVER.WEIGHT_DECAY_END", tiny_cfg.SOLVER.WEIGHT_DECAY, "MODEL.TEACHER.MOMENTUM_END", 0.9]
    )
    tiny_cfg.merge_from_list(
        ["MODEL.TEACHER.MOMENTUM", 0.9, "MODEL.TEACHER.TEMP_WARMUP_ITERS", 0, "DATASETS.TEST", "()"]
    )
    batch = next(iter(build_train_loader(tiny_cfg)))

    run = SSLTrainer(tiny_cfg)
    run.resume_or_load(resume=False)
    run.data_loader = [batch, batch]  # type: ignore[assignment]
    keep = _KeepWeights()
    run.register_hooks([keep])
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()

    step = BareStep(tiny_cfg, batch)
    step.model.load_state_dict(start)
    step()
    step()
    assert step.trainer.iter == 2
    weights = step.model.state_dict()
    assert not torch.equal(weights["teacher.backbone.cls_token"], start["teacher.backbone.cls_token"])
    for name, value in keep.weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7, msg=name)
