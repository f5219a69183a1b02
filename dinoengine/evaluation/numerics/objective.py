"""The terms of the objective as a model returns them, against loops that follow the formulas of the published training.

Letters as in ``dinoengine/structures.py``. The loops are slow and written for reading; sizes are tiny.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dinoengine.config import CfgNode, get_cfg
from dinoengine.evaluation.numerics.quantity import Quantity, largest
from dinoengine.modeling import DINOHead, DINOv2, build_model
from dinoengine.modeling.losses import Centering, SinkhornKnopp, dino_loss, ibot_loss, koleo_loss, mask_weights
from dinoengine.solver import CosineSchedule
from dinoengine.structures import SSLBatch

IMAGES, LOCAL_VIEWS = 3, 8
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
ROUNDING = 1e-5  # of fp32 losses of size 1 to 10
LOOP = "plain loop"


def tiny_config() -> CfgNode:
    """The default method on a model of a few thousand parameters."""
    cfg = get_cfg()
    sizes = ["SIZE=micro", "DEPTH=1", "EMBED_DIM=16", "PATCH_SIZE_PX=4", "LAYER_SCALE_INIT=0.1", "DROP_PATH_RATE=0.0"]
    head = ["NUM_PROTOTYPES=16", "HIDDEN_DIM=16", "BOTTLENECK_DIM=8"]
    cfg.merge_from_list([f"MODEL.VIT.{word}" for word in sizes] + [f"MODEL.DINO_HEAD.{word}" for word in head])
    cfg.merge_from_list(["INPUT.GLOBAL_CROPS.SIZE_PX=8", "INPUT.LOCAL_CROPS.SIZE_PX=4"])
    return cfg


def tiny_model() -> DINOv2:
    """With weights that differ between student and teacher, and centres that are not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(tiny_config()).train()
        assert isinstance(model, DINOv2)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    model.teacher_temp = TEACHER_TEMP
    return model


def tiny_batch() -> SSLBatch:
    """Half of the global crops masked, with 1, 2 and 3 of 4 patches."""
    generator = torch.Generator().manual_seed(1)

    def pixels(crops: int, edge: int) -> Tensor:
        return torch.randint(0, 256, (crops, 3, edge, edge), generator=generator, dtype=torch.uint8)

    masks = torch.stack([torch.arange(4) < (crop // 2 + 1) * (crop % 2) for crop in range(2 * IMAGES)])
    return SSLBatch(
        global_crops=pixels(2 * IMAGES, 8),
        local_crops=pixels(LOCAL_VIEWS * IMAGES, 4),
        masks=masks,
        positions=torch.arange(IMAGES),
        num_local_views=LOCAL_VIEWS,
    )


def cross_entropy(student_logits: Tensor, target: Tensor) -> float:
    """One pair of rows [K], in float64."""
    z = student_logits.double() / STUDENT_TEMP
    return float(-(target.double() * (z - z.logsumexp(0))).sum())


def check_loss_weights() -> Iterator[Quantity]:
    """What every pair, masked crop and view weighs in the terms of one forward pass, measured from the terms."""
    model, batch = tiny_model(), tiny_batch()
    assert batch.masks is not None
    with torch.no_grad():
        seen = model.teacher["backbone"](model.pixel_norm(batch.global_crops))
        hidden = model.student["backbone"](model.pixel_norm(batch.global_crops), batch.masks)
        local = model.student["backbone"](model.pixel_norm(batch.local_crops))
        head, teacher_head = model.student["dino_head"], model.teacher["dino_head"]
        centres = {"cls": model.dino_targets.center.clone(), "patch": model.ibot_targets.center.clone()}  # type: ignore[union-attr, operator]
        targets = ((teacher_head(seen.cls_token) - centres["cls"]) / TEACHER_TEMP).softmax(-1).view(2, IMAGES, -1)
        global_logits = head(hidden.cls_token).view(2, IMAGES, -1)
        local_logits = head(local.cls_token).view(LOCAL_VIEWS, IMAGES, -1)
        patch_targets = ((teacher_head(seen.patch_tokens) - centres["patch"]) / TEACHER_TEMP).softmax(-1)
        patch_logits = head(hidden.patch_tokens)
        values = {term.name: term.value.item() * term.weight for term in model(batch).terms}

    across = sum(
        cross_entropy(global_logits[s, b], targets[1 - s, b]) / IMAGES for s in range(2) for b in range(IMAGES)
    )
    to_local = sum(
        cross_entropy(local_logits[s, b], targets[t, b]) / IMAGES
        for s in range(LOCAL_VIEWS)
        for t in range(2)
        for b in range(IMAGES)
    )
    per_crop = []
    for crop, mask in enumerate(batch.masks):
        masked = mask.nonzero().flatten().tolist()
        if masked:
            pairs = [cross_entropy(patch_logits[crop, n], patch_targets[crop, n]) for n in masked]
            per_crop.append(sum(pairs) / len(pairs))
    spread = [_slow_koleo(view) for view in hidden.cls_token.chunk(2)]
    pair = f"published code, 1 / (2 + 2 * {LOCAL_VIEWS})"
    rows = [
        ("weight of a pair of global views", pair, 1 / 18, values["dino_global"] / across),
        ("weight of a local and a global view", pair, 1 / 18, values["dino_local"] / to_local),
        (
            "weight of the mean masked crop, half of the crops masked",
            "published code: sum / (2 B)",
            0.5,
            values["ibot"] / (sum(per_crop) / len(per_crop)),
        ),
        (
            "weight of KoLeo's mean over both global views",
            "published code: 0.1 for each view",
            0.2,
            values["koleo"] / (sum(spread) / 2),
        ),
    ]
    yield from (Quantity(*row, ROUNDING) for row in rows)


def check_first_losses() -> Iterator[Quantity]:
    """DINO terms of a start with 65,536 prototypes: all CLS tokens alike, so targets are uniform."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        head = DINOHead(64, num_prototypes=65536)
        logits = head(torch.randn(1, 64)).expand(LOCAL_VIEWS, 1, -1)
    uniform = torch.full((2, 1, 65536), 1 / 65536)
    pairs = 2 + 2 * LOCAL_VIEWS
    local = dino_loss(logits, uniform, STUDENT_TEMP, skip_same_view=False).item() / pairs
    across = dino_loss(logits[:2], uniform, STUDENT_TEMP, skip_same_view=True).item() / pairs
    source = "published log, 65,536 prototypes"
    yield Quantity("first local DINO loss, (16/18) * 11.285", source, 10.03, local, 0.02)
    yield Quantity("first global DINO loss, (2/18) * 11.285", source, 1.254, across, 0.003)


def check_targets() -> Iterator[Quantity]:
    """Sinkhorn-Knopp and centring."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    difference = (SinkhornKnopp(3)(logits, 0.5) - _slow_sinkhorn(logits, 0.5, 3)).abs().max().item()
    yield Quantity("Sinkhorn-Knopp, 3 rounds, difference", LOOP, 0.0, difference, 1e-12)
    shifted = (SinkhornKnopp(3)(logits + 1e3, 0.5) - SinkhornKnopp(3)(logits, 0.5)).abs().max().item()
    yield Quantity("Sinkhorn-Knopp, logits + 1000, difference", "exact in theory", 0.0, shifted, 1e-10)

    centering, centre = Centering(5), torch.zeros(5, dtype=torch.float64)
    differences = []
    for _ in range(4):
        batch = torch.randn(7, 5, generator=generator)
        expected = ((batch.double() - centre) / 0.07).softmax(-1)  # the centre of the batches before
        differences.append((centering(batch, 0.07) - expected).abs().max().item())
        centering.update(batch)
        centre = 0.9 * centre + 0.1 * batch.double().mean(0)
    source = "softmax((z - c) / T), c = 0.9 c + 0.1 mean"
    yield Quantity("centring over 4 batches, difference", source, 0.0, largest(differences), 1e-6)


def _slow_sinkhorn(logits: Tensor, temp: float, rounds: int) -> Tensor:
    q = [[math.exp(float(z) / temp) for z in row] for row in logits]
    rows, prototypes = len(q), len(q[0])
    for _ in range(rounds):
        sums = [sum(q[b][k] for b in range(rows)) for k in range(prototypes)]
        q = [[q[b][k] / sums[k] / prototypes for k in range(prototypes)] for b in range(rows)]
        q = [[value / sum(row) / rows for value in row] for row in q]
    return torch.tensor(q, dtype=torch.float64) * rows


def check_koleo_and_ibot() -> Iterator[Quantity]:
    """The two losses that look at single rows, on random ones."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(8, 4, generator=generator)
    difference = koleo_loss(features).item() - _slow_koleo(features)
    yield Quantity("KoLeo, difference", "brute force over all pairs", 0.0, difference, ROUNDING)

    masks = torch.rand(6, 9, generator=generator) < 0.4
    masks[::2] = False
    logits = torch.randn(int(masks.sum()), 5, generator=generator)
    probs = torch.randn(len(logits), 5, generator=generator).softmax(-1)
    expected, row = 0.0, 0
    for crop in masks:
        count = int(crop.sum())
        pairs = [cross_entropy(logits[row + i], probs[row + i]) for i in range(count)]
        expected += sum(pairs) / max(count, 1) / len(masks)
        row += count
    got = ibot_loss(logits, probs, mask_weights(masks), len(masks), STUDENT_TEMP).item()
    yield Quantity("iBOT, difference", f"{LOOP} over crops and patches", 0.0, got - expected, ROUNDING)


def _slow_koleo(features: Tensor) -> float:
    points = [row / row.norm() for row in features.double()]
    total = 0.0
    for i, point in enumerate(points):
        total -= math.log(min(float((point - other).norm()) for j, other in enumerate(points) if j != i) + 1e-8)
    return total / len(points)


def check_teacher() -> Iterator[Quantity]:
    """The moving average under the published momentum schedule, for every parameter of the teacher."""
    model = tiny_model()
    momentum = CosineSchedule(0.992, 1.0, 10)
    names = [name for name, _ in model.student.named_parameters()]
    student, teacher = dict(model.student.named_parameters()), dict(model.teacher.named_parameters())
    expected = {name: teacher[name].double() for name in names}
    generator = torch.Generator().manual_seed(4)
    for iteration in range(10):
        with torch.no_grad():
            for p in student.values():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        model.update_teacher(momentum(iteration))
        m = 1.0 - 0.008 * 0.5 * (1 + math.cos(math.pi * iteration / 10))
        expected = {name: m * expected[name] + (1 - m) * student[name].detach().double() for name in names}
    difference = largest((teacher[name] - expected[name]).abs().max().item() for name in names)
    yield Quantity(
        "EMA teacher over 10 steps, difference", "m t + (1 - m) s, m from 0.992 to 1", 0.0, difference, ROUNDING
    )
