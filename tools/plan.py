#!/usr/bin/env python
"""What a run will take, before it is started; ``--help`` shows examples."""

from __future__ import annotations

from dinoengine.config import read_cfg
from dinoengine.config.arguments import config_parser
from dinoengine.engine import exit_on_user_error
from dinoengine.engine.plan import make_plan, render
from dinoengine.utils.console import run_tool

_DESCRIPTION = """
Print parameters, operations per image, memory of a GPU by parts and traffic per step for DDP and FSDP, images seen,
passes over the data, disk for checkpoints and, with --images-per-second or --probe, hours. No GPU is needed.

--probe N runs N steps of one process's share on this machine, takes its speed for the hours, and prints the estimates of
kept activations and operations beside what was measured. It needs the memory of such a step.
"""

_EPILOG = """
Overrides are PATH.KEY VALUE or PATH.KEY=VALUE. Examples:

  the published short recipe on its 32 GPUs, at the published speed:
    %(prog)s --config-file configs/dinov2/vitl16_short.yaml --num-gpus 32 --images-per-second 92.6 --dataset-size 1281167
  does ViT-g/14 fit into 80 GiB on 64 GPUs, in bf16?
    %(prog)s --config-file configs/dinov2/vitg14.yaml --num-gpus 64 --gpu-memory 80 SOLVER.AMP.PRECISION bf16
  how good are the estimates? On this machine, small:
    %(prog)s --config-file configs/folder_vits16.yaml --num-gpus 1 --probe 2 SOLVER.IMS_PER_BATCH 8 \\
        MODEL.LOSS.KOLEO_GROUP_SIZE 8 DATASETS.TRAIN synthetic
"""


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(_DESCRIPTION, _EPILOG)
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs of the run (default: 1)")
    parser.add_argument("--dataset-size", type=int, metavar="N", help="images, where the data is not at hand")
    parser.add_argument("--images-per-second", type=float, metavar="X", help="of one GPU, for the hours")
    parser.add_argument("--probe", type=int, metavar="N", help="run N steps here, for hours and a check")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU: warn if it is too little")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        for flag in ("dataset_size", "images_per_second", "probe", "gpu_memory"):
            given = getattr(args, flag)
            if given is not None and not 0 < given < float("inf"):
                raise ValueError(f"--{flag.replace('_', '-')} must be above 0 (or left out), got {given}.")
        cfg = read_cfg(args.config_file, args.opts)
        plan = make_plan(cfg, args.num_gpus, args.dataset_size or 0)
        speed = args.images_per_second or 0.0
        if args.probe:
            from dinoengine.engine.probe import run_probe  # torch's counters take a second to import

            share = cfg.SOLVER.IMS_PER_BATCH // args.num_gpus
            print(
                f"Probing {args.probe} + 2 steps of {share} made-up images here (DATASETS.TRAIN is not read); with a large "
                "model on a CPU this takes minutes.",
                flush=True,
            )
            probe = run_probe(cfg, args.num_gpus, args.probe)
            speed = speed or probe.images_per_second
            print(f"probe ({probe.setting}): {probe.images_per_second:.2f} images/s")
            print("\n".join(f"  {comparison}" for comparison in probe.comparisons), end="\n\n")
        print(render(plan, images_per_second=speed, gpu_memory_gib=args.gpu_memory or 0.0))
    return 0


if __name__ == "__main__":
    run_tool(main)
