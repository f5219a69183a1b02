#!/usr/bin/env python
"""Make an image classifier of a backbone, with the config that trains it; or take the head of one out again.

IN is a file of any layout that tools/convert_checkpoint.py reads (of a training checkpoint the teacher is taken). OUT.pth
gets the backbone and a linear head, OUT.yaml beside it the config: linear evaluation, or full fine-tuning. It runs as
written. At the end the classifier's logits are compared with the head on features of the source's backbone.

  a classifier of the folders of a dataset, on a frozen backbone, and its training:
    python tools/convert_to_classifier.py --train folder:/data/train --test folder:/data/val \\
        output/run/model_final.pth cls.pth
    python tools/train_net.py --config-file cls.yaml
  full fine-tuning, the head on the CLS tokens of 4 blocks and the mean patch token, with keys of the config changed:
    python tools/convert_to_classifier.py --num-classes 10 --last-blocks 4 --mean-patch --mode finetune \\
        dinov2_vits14_pretrain.pth cls.pth SOLVER.MAX_ITER 2000 SOLVER.IMS_PER_BATCH 256
  a published head on its backbone, and its accuracy on ImageNet's validation images:
    python tools/convert_to_classifier.py --linear-head dinov2_vits14_linear_head.pth --test folder:/data/val \\
        dinov2_vits14_pretrain.pth cls.pth
    python tools/train_net.py --config-file cls.yaml --eval-only
  the head of a trained classifier in Meta's layout:
    python tools/convert_to_classifier.py --export-head cls/model_final.pth linear_head.pth
"""

from __future__ import annotations

import argparse

from dinoengine.checkpoint.arguments import (
    reading_arguments,
    reading_options,
    writing_arguments,
    writing_options,
)
from dinoengine.checkpoint.classifier import convert_to_classifier
from dinoengine.checkpoint.classifier_config import RECIPES
from dinoengine.checkpoint.linear_head import export_linear_head
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[reading_arguments(), writing_arguments()],
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: those of --train or --linear-head")
    parser.add_argument(
        "--last-blocks", type=int, choices=(1, 4), help="blocks whose CLS tokens the head sees (default: 1)"
    )
    parser.add_argument(
        "--mean-patch",
        action="store_true",
        default=None,
        help="the head also sees the mean patch token of the last block",
    )
    parser.add_argument(
        "--linear-head", default="", metavar="FILE", help="a head of Meta's; its width says what it sees"
    )
    parser.add_argument("--mode", choices=list(RECIPES), default="linear", help="of the config (default: linear)")
    parser.add_argument(
        "--train", action="append", default=[], metavar="DATASET", help="labelled, e.g. folder:/data/train"
    )
    parser.add_argument(
        "--test", action="append", default=[], metavar="DATASET", help="labelled, e.g. folder:/data/val"
    )
    parser.add_argument("--export-head", action="store_true", help="write the head of the classifier IN to OUT instead")
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT.pth")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="further keys for the config")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logger()
    with exit_on_user_error():
        if args.export_head:
            # Whatever else is in IN stays there: nothing has to be allowed.
            export_linear_head(args.input, args.output, **reading_options(args), overwrite=args.overwrite)
            return 0
        convert_to_classifier(
            args.input,
            args.output,
            num_classes=args.num_classes,
            last_blocks=args.last_blocks,
            mean_patch=args.mean_patch,
            linear_head=args.linear_head,
            mode=args.mode,
            train=args.train,
            test=args.test,
            overrides=args.opts,
            **reading_options(args),
            **writing_options(args),
        )
    return 0


if __name__ == "__main__":
    run_tool(main)
