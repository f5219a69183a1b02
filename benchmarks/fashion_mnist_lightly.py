#!/usr/bin/env python
"""lightly's DINO (PyPI package ``lightly``) on Fashion-MNIST, for comparison with configs/fashion_mnist/cpu.yaml.

The same network, images, crop sizes, batch and optimizer as the recipe; loss, head, EMA, schedules and augmentation are
lightly's, as its DINO example combines them. k-NN of the teacher's CLS token by dinoengine's own evaluator, so that only
the training differs.

    pip install lightly timm
    python benchmarks/fashion_mnist_lightly.py --iterations 4000
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinoengine.config import read_cfg
from dinoengine.data import FashionMNIST, build_test_loader
from dinoengine.evaluation import KNNEvaluator, inference_on_dataset
from dinoengine.structures import BackboneOutput


class TwoViews(Dataset[list[Tensor]]):
    """Fashion-MNIST under lightly's DINOTransform."""

    def __init__(self, own_crops: bool, size: int) -> None:
        from lightly.transforms.dino_transform import DINOTransform

        self.images = FashionMNIST("train")
        # Colour operations do nothing useful on grey pictures; "own crops" switches off what the recipe does not use.
        extra = {"cj_prob": 0.0, "gaussian_blur": (0.0, 0.0, 0.0), "solarization_prob": 0.0} if own_crops else {}
        self.transform = DINOTransform(
            global_crop_size=size,
            n_local_views=0,
            random_gray_scale=0.0,
            normalize={"mean": [0.286] * 3, "std": [0.353] * 3},
            **extra,
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        views: list[Tensor] = self.transform(self.images.load(index).convert("RGB"))
        return [view[:1] for view in views]


class Teacher(nn.Module):
    """uint8 evaluation crops -> CLS token."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> BackboneOutput:
        tokens = self.vit.forward_features((images.float() / 255 - 0.286) / 0.353)
        return BackboneOutput(tokens[:, 0], tokens[:, :0], tokens[:, 1:], (4, 4))


def evaluate(vit: VisionTransformer, config_file: str) -> float:
    cfg = read_cfg(config_file)
    evaluator = KNNEvaluator(build_test_loader(cfg, cfg.DATASETS.TRAIN), ks=(20,))
    results = inference_on_dataset(Teacher(vit), build_test_loader(cfg, cfg.DATASETS.TEST), evaluator)
    top1: float = results["knn"]["top1_k20"]
    return top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", default="configs/fashion_mnist/cpu.yaml", help="the recipe it is compared with"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=40.0,
        help="CPU time of training, of all threads; evaluations and the loader's process are not counted",
    )
    parser.add_argument(
        "--iterations", type=int, default=4000, help="length of the schedules; the run ends at the first limit"
    )
    parser.add_argument("--eval-period", type=int, default=1000, help="iterations")
    parser.add_argument("--own-crops", action="store_true", help="without lightly's blur, jitter and solarisation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.scheduler import cosine_schedule

    torch.manual_seed(args.seed)
    cfg = read_cfg(args.config_file)
    vit, head = cfg.MODEL.VIT, cfg.MODEL.DINO_HEAD
    size = cfg.INPUT.GLOBAL_CROPS.SIZE_PX[0]
    student = VisionTransformer(
        img_size=size,
        in_chans=1,
        patch_size=vit.PATCH_SIZE_PX,
        embed_dim=vit.EMBED_DIM,
        depth=vit.DEPTH,
        num_heads=vit.NUM_HEADS,
        num_classes=0,
        global_pool="token",
    )
    sizes = (vit.EMBED_DIM, head.HIDDEN_DIM, head.BOTTLENECK_DIM, head.NUM_PROTOTYPES)
    student_head, teacher_head = DINOProjectionHead(*sizes, freeze_last_layer=1), DINOProjectionHead(*sizes)
    teacher = copy.deepcopy(student)
    teacher_head.load_state_dict(student_head.state_dict())
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_head)
    criterion = DINOLoss(output_dim=head.NUM_PROTOTYPES, warmup_teacher_temp_epochs=5)
    parameters = [*student.parameters(), *student_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    loader = DataLoader(
        TwoViews(args.own_crops, size), batch_size=cfg.SOLVER.IMS_PER_BATCH, shuffle=True, drop_last=True, num_workers=1
    )
    print(f"seed {args.seed} iteration 0 k-NN {evaluate(teacher, args.config_file):.2f}", flush=True)
    seconds, iteration, epoch, num_images = 0.0, 0, 0, 0
    while iteration < args.iterations and seconds < 60 * args.minutes:
        for views in loader:
            start = time.process_time()
            momentum = cosine_schedule(iteration, args.iterations, 0.996, 1.0)
            update_momentum(student, teacher, m=momentum)
            update_momentum(student_head, teacher_head, m=momentum)
            rate = min(1.0, (iteration + 1) / cfg.SOLVER.WARMUP_ITERS)
            rate *= 0.5 * (1 + math.cos(math.pi * iteration / args.iterations))
            optimizer.param_groups[0]["lr"] = cfg.SOLVER.BASE_LR * rate
            with torch.no_grad():
                targets = [teacher_head(teacher(view)) for view in views]
            loss = criterion(targets, [student_head(student(view)) for view in views], epoch=epoch)
            loss.backward()
            student_head.cancel_last_layer_gradients(current_epoch=epoch)
            nn.utils.clip_grad_norm_(parameters, 3.0)
            optimizer.step()
            optimizer.zero_grad()
            iteration += 1
            num_images += len(views[0])
            seconds += time.process_time() - start
            is_last = iteration == args.iterations or seconds >= 60 * args.minutes
            if is_last or iteration % args.eval_period == 0:
                top1 = evaluate(teacher, args.config_file)
                print(
                    f"seed {args.seed} iteration {iteration} images {num_images} CPU seconds {seconds:.0f} "
                    f"loss {loss.item():.3f} k-NN {top1:.2f}",
                    flush=True,
                )
            if is_last:
                break
        epoch += 1


if __name__ == "__main__":
    main()
