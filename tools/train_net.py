#!/usr/bin/env python
"""Train or evaluate from a config; ``--help`` shows examples."""

from __future__ import annotations

import argparse
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.engine import (
    SSLTrainer,
    default_argument_parser,
    default_setup,
    exit_on_user_error,
    launch,
    load_config,
    load_weights_for_evaluation,
)


def main(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """One process of a run."""
    with exit_on_user_error():
        cfg = default_setup(cfg, args)
        if args.eval_only:
            model = SSLTrainer.build_model(cfg)
            load_weights_for_evaluation(cfg, model, resume=args.resume)
            results = SSLTrainer.test(cfg, model)
            SSLTrainer.report(cfg, results, save=False)
            SSLTrainer.check_expected_results(cfg, results)
            return results
        trainer = SSLTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with exit_on_user_error():
        cfg = load_config(args)
    launch(
        main,
        args.num_gpus,
        args.num_machines,
        args.machine_rank,
        args.dist_url,
        args=(cfg, args),
        device=cfg.MODEL.DEVICE,
    )
