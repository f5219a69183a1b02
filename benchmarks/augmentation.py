#!/usr/bin/env python
"""Images per second and core of the training augmentation, from JPEG file to uint8 crops, and where the time goes.

    python benchmarks/augmentation.py                        # 500 x 375 photographs, 2 x 224 + 8 x 96
    python benchmarks/augmentation.py --size 2000 1500 INPUT.LOCAL_CROPS.NUM 6

Beside each other, in turns on the same files: the published pipeline, written with the classes of torchvision (its end,
ToTensor and Normalize, included: what it is trained with), INPUT.AUGMENTATION_BACKEND reference and fast, fast with
INPUT.REDUCED_DECODE, and what a worker does for the backend device: decode, and draw. How long the device then takes for
the crops of all files together is measured on a GPU if there is one, else on the CPU, where it is of no use. The files are
random cut-outs of the two photographs that scikit-learn ships. Time is CPU time of one thread: other work on the machine
disturbs it less than the clock. The parts are differences between runs with more and more operations; --no-parts leaves
them out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import DecodedBatch, MultiCrop
from dinoengine.data.collate import CropSample, SSLCollate
from dinoengine.data.decode import read_image
from dinoengine.data.decoded_batch import made_crops
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.data.reduced_decode import asking
from dinoengine.utils.env import collect_env_info

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Operations are switched on one by one; what each adds to the time is its part.
ALL_OFF = [
    *("INPUT.COLOR_JITTER.PROB", 0.0, "INPUT.GRAYSCALE_PROB", 0.0),
    *("INPUT.BLUR.PROBS", (0.0, 0.0, 0.0), "INPUT.SOLARIZE.PROBS", (0.0, 0.0, 0.0)),
]
PARTS = {"decode": 0, "crop, resize, flip, to tensor": 0, "colour jitter": 2, "grey": 4, "blur": 6, "solarize": 8}

Pipeline = Callable[[str, int], object]


def write_photographs(folder: Path, num_files: int, size: tuple[int, int]) -> list[str]:
    """JPEGs (quality 90) of ``size`` (width, height): cut-outs of at least half the edge of two photographs."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    paths = []
    for i in range(num_files):
        photograph = photographs[i % len(photographs)]
        share = rng.uniform(0.5, 1.0) * min(photograph.width / size[0], photograph.height / size[1])
        width, height = share * size[0], share * size[1]
        left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
        image = photograph.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        paths.append(str(folder / f"{i:03d}.jpg"))
        image.save(paths[-1], quality=90)
    return paths


def published_pipeline(cfg: CfgNode) -> Pipeline:
    """What DINOv2 trains with: its transforms, on an image decoded by Pillow; blur probabilities are the effective ones."""
    inp, jitter = cfg.INPUT, cfg.INPUT.COLOR_JITTER

    def view(crops: CfgNode, which: int) -> T.Compose:
        size = (crops.SIZE_PX[0], crops.SIZE_PX[-1])
        colour = T.ColorJitter(jitter.BRIGHTNESS, jitter.CONTRAST, jitter.SATURATION, jitter.HUE)
        blur = T.GaussianBlur(inp.BLUR.KERNEL_SIZE_PX, inp.BLUR.SIGMA_PX)
        return T.Compose(
            [
                T.RandomResizedCrop(size, crops.SCALE, inp.CROP_RATIO, InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(inp.HFLIP_PROB),
                T.RandomApply([colour], jitter.PROB),
                T.RandomGrayscale(inp.GRAYSCALE_PROB),
                T.RandomApply([blur], inp.BLUR.PROBS[which]),
                T.RandomSolarize(inp.SOLARIZE.THRESHOLD, inp.SOLARIZE.PROBS[which]),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    views = [view(inp.GLOBAL_CROPS, 0), view(inp.GLOBAL_CROPS, 1), *[view(inp.LOCAL_CROPS, 2)] * inp.LOCAL_CROPS.NUM]

    def run(path: str, position: int) -> object:
        torch.manual_seed(position)
        image = Image.open(path).convert("RGB")
        return [transform(image) for transform in views]

    return run


def our_pipeline(cfg: CfgNode, backend: str, overrides: list[object]) -> Pipeline:
    own = cfg.clone()
    own.merge_from_list([*overrides, "INPUT.AUGMENTATION_BACKEND", backend])
    augmentation = MultiCrop(own)

    def run(path: str, position: int) -> object:
        with asking(lambda size: augmentation.reduction(size, position_rng(0, position, CROPS))):
            image = read_image(path)
        return augmentation(image, position_rng(0, position, CROPS))

    return run


def worker_pipeline(cfg: CfgNode) -> Pipeline:
    """What a worker does with INPUT.AUGMENTATION_BACKEND device: file -> one image's share of a batch."""
    decode = our_pipeline(cfg, "device", [])

    def run(path: str, position: int) -> DecodedBatch:
        return decoded_batch([decode(path, position)])

    return run


def decoded_batch(crops: list[Any]) -> DecodedBatch:
    """Of the (global crops, local crops) of some images."""
    batch = SSLCollate(None)([CropSample(i, i, *views) for i, views in enumerate(crops)])
    assert isinstance(batch, DecodedBatch)
    return batch


def device_seconds(cfg: CfgNode, paths: list[str], turns: int) -> tuple[torch.device, float]:
    """The device, and the median of its seconds per image for the crops of all files, made together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decode = our_pipeline(cfg, "device", [])
    batch = decoded_batch([decode(path, position) for position, path in enumerate(paths)]).copied_to(device)

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for _ in range(turns + 1):
        start = clock()
        batch.with_crops()
        seconds.append(clock() - start)
    return device, statistics.median(seconds[1:]) / len(paths)


def cpu_seconds(pipeline: Pipeline, paths: list[str], first_position: int) -> float:
    """CPU time per image."""
    start = time.process_time()
    for i, path in enumerate(paths):
        pipeline(path, first_position + i)
    return (time.process_time() - start) / len(paths)


def in_turns(pipelines: dict[str, Pipeline], paths: list[str], turns: int) -> dict[str, list[float]]:
    """CPU seconds per image in each turn; in each, all pipelines have the same files and positions."""
    for pipeline in pipelines.values():
        cpu_seconds(pipeline, paths[:4], 0)
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(turns):
        for name, pipeline in pipelines.items():
            seconds[name].append(cpu_seconds(pipeline, paths, turn * len(paths)))
    return seconds


def parts(cfg: CfgNode, backend: str) -> dict[str, Pipeline]:
    """Pipelines with more and more operations. The probabilities drawn are those of ``cfg``, once they are on."""
    on = [key_value for key in ALL_OFF[::2] for key_value in (key, _value(cfg, str(key)))]
    pipelines: dict[str, Pipeline] = {}
    for name, num_on in PARTS.items():
        overrides = [*ALL_OFF, *on[:num_on]]
        pipelines[name] = our_pipeline(cfg, backend, overrides)
    pipelines["decode"] = lambda path, position: read_image(path)
    return pipelines


def _value(cfg: CfgNode, key: str) -> object:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def crop_difference(pipelines: list[Pipeline], paths: list[str]) -> float:
    """Mean absolute difference of the crops of two pipelines, in levels of 0..255."""
    differences = []
    for position, path in enumerate(paths):
        views_of = (pipeline(path, position) for pipeline in pipelines)
        crops = [made_crops([*views[0], *views[1]]) for views in views_of]  # type: ignore[index]
        differences += [(a.int() - b.int()).abs().float().mean().item() for a, b in zip(*crops, strict=True)]
    return statistics.fmean(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"), help="of the JPEGs")
    parser.add_argument("--images", type=int, default=24, help="files, each once per turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--no-parts", action="store_true", help="do not measure where the time goes")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    cfg = get_cfg()
    cfg.merge_from_list(args.opts)
    print(collect_env_info())
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), args.images, tuple(args.size))
        kilobytes = statistics.fmean(Path(path).stat().st_size for path in paths) / 1000
        print(
            f"{args.images} JPEGs of {args.size[0]} x {args.size[1]}, {kilobytes:.0f} kB on average; {args.turns} turns"
        )
        pipelines = {"published": published_pipeline(cfg)}
        pipelines |= {backend: our_pipeline(cfg, backend, []) for backend in ("reference", "fast")}
        pipelines["reduced"] = our_pipeline(cfg, "fast", ["INPUT.REDUCED_DECODE", True])
        pipelines["device: workers"] = worker_pipeline(cfg)
        seconds = in_turns(pipelines, paths, args.turns)
        for name, times in seconds.items():
            ratios = [base / own for base, own in zip(seconds["published"], times, strict=True)]
            print(
                f"{name:15s} {1 / statistics.median(times):7.1f} images/s per core, {statistics.median(ratios):.2f} times "
                f"the published one ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        for backend in () if args.no_parts else ("reference", "fast"):
            totals = in_turns(parts(cfg, backend), paths, args.turns)
            before = 0.0
            print(f"{backend}: CPU ms per image of each part")
            for name, times in totals.items():
                now = min(times)
                print(f"  {name:30s} {1000 * (now - before):6.2f}")
                before = now
        device, each = device_seconds(cfg, paths, args.turns)
        print(f"device: {1000 * each:.2f} ms per image on {device.type} for the crops of {len(paths)} images together")
        pipelines["device"] = our_pipeline(cfg, "device", [])
        for one, other in (("reference", "fast"), ("fast", "reduced"), ("reference", "device")):
            difference = crop_difference([pipelines[one], pipelines[other]], paths)
            print(f"crops of {one} and {other} differ by {difference:.3f} of 255 on average")


if __name__ == "__main__":
    main()
