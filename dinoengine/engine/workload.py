"""What one training step of a config computes and keeps: floating-point operations and bytes, from shapes alone.

Letters as in ``dinoengine/structures.py``; T is the number of tokens of a crop (CLS, registers, patches). A product of
[m, k] and [k, n] counts 2 m k n operations; norms, GELU, softmax and the optimizer are not counted. ``engine.probe``
compares both figures with a step that is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dinoengine.config import CfgNode
from dinoengine.modeling.backbone.vit import VisionTransformer
from dinoengine.modeling.heads.dino_head import DINOHead
from dinoengine.modeling.layers.block import Block
from dinoengine.modeling.layers.layer_scale import LayerScale
from dinoengine.modeling.layers.mlp import SwiGLU
from dinoengine.modeling.meta_arch.dinov2 import DINOv2


@dataclass(frozen=True)
class Crops:
    """Crops of one size that go through the backbone together: their number, the patches and the pixel values of each."""

    num: int
    patches: int
    values: int


@dataclass(frozen=True)
class Workload:
    """A micro-batch of one process.

    Attributes:
        images: B.
        global_crops, local_crops: the second with ``num`` 0 where there are none.
        masked: masked patches M, the mean over batches.
        amp: whether products are computed in 16 bits; SOLVER.AMP.PRECISION auto is taken for yes.
        micro_batches: how many of them a process runs in a step.
    """

    images: int
    global_crops: Crops
    local_crops: Crops
    masked: float
    amp: bool
    micro_batches: int

    @classmethod
    def of(cls, cfg: CfgNode, world_size: int) -> Workload:
        micro_batches = cfg.SOLVER.NUM_MICRO_BATCHES
        images = cfg.SOLVER.IMS_PER_BATCH // (world_size * micro_batches)
        channels, patch = len(cfg.MODEL.PIXEL_MEAN), cfg.MODEL.VIT.PATCH_SIZE_PX

        def crops(size: tuple[int, ...], num: int) -> Crops:
            return Crops(num, (size[0] // patch) * (size[-1] // patch), channels * size[0] * size[-1])

        views = crops(cfg.INPUT.GLOBAL_CROPS.SIZE_PX, 2 * images)
        use_locals = cfg.MODEL.LOSS.DINO_WEIGHT > 0
        local = crops(cfg.INPUT.LOCAL_CROPS.SIZE_PX, cfg.INPUT.LOCAL_CROPS.NUM * images * use_locals)
        share = cfg.INPUT.MASK.CROP_SHARE * sum(cfg.INPUT.MASK.RATIO) / 2
        masked = views.num * views.patches * share if cfg.MODEL.LOSS.IBOT_WEIGHT else 0.0
        amp = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION != "fp32"
        return cls(images, views, local, masked, amp, micro_batches)


def step_flops(model: DINOv2, work: Workload) -> float:
    """Operations of a step per image: the teacher forward, the student forward and backward (twice the forward). What
    activation checkpointing computes again is apart: ``recomputed_flops``."""
    views = work.global_crops
    total = 0.0
    for side, crops in ((model.teacher, [views]), (model.student, [views, work.local_crops])):
        is_student = side is model.student
        backbone = _backbone(side)
        for group in crops:
            embedding, blocks = _backbone_flops(backbone, group, work, drops=is_student)
            # Pixels need no gradient: the backward pass of the patch embedding is one product, not two.
            total += (1 + is_student) * embedding + (1 + 2 * is_student) * blocks
        for head, rows in _head_rows(model, side, sum(group.num for group in crops), work.masked):
            total += (1 + 2 * is_student) * rows * 2 * _weights_of_head(head)
    return total / work.images


def recomputed_flops(model: DINOv2, work: Workload) -> float:
    """Operations per image of the blocks that MODEL.ACTIVATION_CHECKPOINTING "full" computes again; no product is computed
    again in the other modes."""
    backbone = _backbone(model.student)
    if backbone.execution.activation_checkpointing != "full":
        return 0.0
    groups = (work.global_crops, work.local_crops)
    return sum(_backbone_flops(backbone, group, work, drops=True)[1] for group in groups) / work.images


def activation_bytes(model: DINOv2, work: Workload) -> dict[str, float]:
    """Bytes that the forward pass keeps for the backward pass, by place, without weights and the input.

    "weights in 16 bits" are the copies that autocast makes of the student's products; sharded parameters are gathered in 16
    bits and need none, and blocks that are computed again make them again.
    """
    size = 2 if work.amp else 4
    backbone = _backbone(model.student)
    width = backbone.embed_dim
    mode = backbone.execution.activation_checkpointing
    per_backbone = sum(_bytes_of_block(backbone, i, work, mode) for i in range(backbone.num_layers))
    for crops in (work.global_crops, work.local_crops):
        per_backbone += crops.num * crops.values * size  # normalised pixels, for the patch embedding
        per_backbone += _num_picked(crops, work) * width * 4  # input of the final norm
    # KoLeo and the metrics look at CLS tokens, which are a view of the picked tokens of the global crops.
    per_backbone += (work.global_crops.num + work.masked) * width * 4

    heads, losses = 0.0, 0.0
    for head, rows in _head_rows(model, model.student, work.global_crops.num + work.local_crops.num, work.masked):
        linears = [m for m in head.mlp if isinstance(m, nn.Linear)]
        hidden = sum(linear.out_features for linear in linears[:-1])
        prototypes, bottleneck = head.last_layer.weight_v.shape
        # Inputs of the linear layers and of GELU; the bottleneck before and after it is normalised.
        heads += rows * size * (width + 2 * hidden + bottleneck) + rows * 4 * bottleneck
        heads += size * prototypes * bottleneck  # the prototypes after weight normalisation
        losses += rows * prototypes * 4  # log-probabilities
    # Targets of all micro-batches are made at once, and those of the last one wait longest.
    teacher_rows = _head_rows(model, model.teacher, work.global_crops.num, work.masked)
    losses += work.micro_batches * sum(rows * head.last_layer.weight_v.shape[0] * 4 for head, rows in teacher_rows)
    if model.dino_weight:
        dino_head = model.student["dino_head"]
        assert isinstance(dino_head, DINOHead)
        prototypes = dino_head.last_layer.weight_v.shape[0]
        # Targets of the pairs: of the other view for each global crop, of both views for local crops.
        losses += (work.global_crops.num + bool(work.local_crops.num) * work.images) * prototypes * 4
    copies = 2 * _patch_weights(backbone)
    if mode == "none":
        copies += 2 * sum(_weights_of_block(b) for b in _blocks(backbone))
    return {"backbone": per_backbone, "heads": heads, "losses": losses, "weights in 16 bits": copies * work.amp}


def workspace_bytes(model: DINOv2, work: Workload) -> float:
    """What a step needs for a moment beside ``activation_bytes``: gradients of the widest logits and of their logarithm, or
    later what one block computes again (MODEL.ACTIVATION_CHECKPOINTING)."""
    rows = _head_rows(model, model.student, work.global_crops.num + work.local_crops.num, work.masked)
    logits = 2 * max((r * head.last_layer.weight_v.shape[0] * 4 for head, r in rows), default=0.0)
    backbone = _backbone(model.student)
    mode = backbone.execution.activation_checkpointing
    if mode == "none":
        return logits
    again = [
        _bytes_of_block(backbone, i, work, "none") - _bytes_of_block(backbone, i, work, mode)
        for i in range(backbone.num_layers)
    ]
    return max(logits, *again)


def require_known_parts(model: nn.Module) -> DINOv2:
    """
    Raises:
        ValueError: if the shapes of a part are not known here.
    """
    if not isinstance(model, DINOv2):
        raise ValueError(f"A plan is made of self-distillation (DINOv2), not of {type(model).__name__}.")
    for name, part in model.student.items():
        if not isinstance(part, (VisionTransformer, DINOHead)):
            raise ValueError(
                f"The {name} is a {type(part).__name__}; a plan knows what VisionTransformer and DINOHead compute. Time a "
                "few steps of it instead (benchmarks/train_step.py)."
            )
    return model


def _backbone(side: nn.ModuleDict) -> VisionTransformer:
    backbone = side["backbone"]
    assert isinstance(backbone, VisionTransformer)
    return backbone


def _blocks(backbone: VisionTransformer) -> Iterator[Block]:
    for block in backbone.blocks:
        assert isinstance(block, Block)
        yield block


def _num_tokens(backbone: VisionTransformer, patches: int) -> int:
    return 1 + backbone.num_register_tokens + patches


def _kept_share(block: Block, num_crops: int) -> float:
    """Share of the crops that go through a residual branch (``draw_kept``)."""
    return max(int(num_crops * (1.0 - block.drop_path_rate)), 1) / num_crops if num_crops else 0.0


def _weights_of_block(block: Block) -> int:
    return sum(m.in_features * m.out_features for m in block.modules() if isinstance(m, nn.Linear))


def _patch_weights(backbone: VisionTransformer) -> int:
    return backbone.patch_embed.proj.weight.numel()


def _weights_of_head(head: DINOHead) -> int:
    linears = sum(m.in_features * m.out_features for m in head.mlp if isinstance(m, nn.Linear))
    return linears + head.last_layer.weight_v.numel()


def _backbone_flops(backbone: VisionTransformer, crops: Crops, work: Workload, *, drops: bool) -> tuple[float, float]:
    """Forward operations of crops: of the patch embedding, of the blocks with their attention.

    What comes behind the attention of the last block sees the tokens that are needed alone
    (``VisionTransformer.pick_tokens``).

    Args:
        drops: whether stochastic depth leaves samples out.
    """
    tokens, width = _num_tokens(backbone, crops.patches), backbone.embed_dim
    total = 0.0
    for index, block in enumerate(_blocks(backbone)):
        attended = crops.num * (_kept_share(block, crops.num) if drops else 1.0)
        behind = _num_picked(crops, work) if index == backbone.num_layers - 1 else attended * tokens
        total += attended * (2 * tokens * block.attn.qkv.weight.numel() + 4 * tokens**2 * width)
        total += behind * 2 * _weights_behind_attention(block)
    return crops.num * 2 * crops.patches * _patch_weights(backbone), total


def _weights_behind_attention(block: Block) -> int:
    return _weights_of_block(block) - block.attn.qkv.weight.numel()


def _num_picked(crops: Crops, work: Workload) -> float:
    """Tokens that the heads need: CLS, and the masked patches of global crops."""
    return crops.num + (work.masked if crops is work.global_crops else 0)


def _bytes_of_block(backbone: VisionTransformer, index: int, work: Workload, mode: str) -> float:
    """Kept of a block and all crops with MODEL.ACTIVATION_CHECKPOINTING ``mode``.

    What is computed again starts from the block's input; "selective" keeps the results of products and attention as well.
    """
    block, width, size = backbone.blocks[index], backbone.embed_dim, 2 if work.amp else 4
    assert isinstance(block, Block)
    is_last = index == backbone.num_layers - 1
    total = 0.0
    for crops in (work.global_crops, work.local_crops):
        tokens = crops.num * _num_tokens(backbone, crops.patches)
        attended = tokens * _kept_share(block, crops.num)
        behind = _num_picked(crops, work) if is_last else attended  # rows of the output layer and the feed-forward
        if mode == "none":
            total += attended * _bytes_of_attention(block, width, size)
            total += behind * _bytes_behind_attention(block, width, size)
            if is_last:
                total += behind * size * width  # the picked rows of what attention gives
            continue
        total += tokens * 4 * width
        if mode == "selective":
            first_layer = block.mlp.w12 if isinstance(block.mlp, SwiGLU) else block.mlp.fc1
            total += attended * (size * 4 * width + 4 * block.attn.num_heads)  # q, k, v, the result, its logarithms
            total += behind * size * (2 * width + first_layer.out_features)
    return total


def _bytes_of_norm(width: int, size: int) -> int:
    """Input of the fp32 residual stream, mean and deviation; the output, which a product needs."""
    return 4 * width + 8 + size * width


def _bytes_of_attention(block: Block, width: int, size: int) -> int:
    """Kept for each token that goes through: norm; q, k, v, the result; the logarithm of each softmax's sum."""
    return _bytes_of_norm(width, size) + size * 4 * width + 4 * block.attn.num_heads


def _bytes_behind_attention(block: Block, width: int, size: int) -> int:
    """Kept for each token behind the attention of a block: LayerScale, norm, feed-forward."""
    num_scaled = sum(isinstance(scale, LayerScale) for scale in (block.ls1, block.ls2))
    hidden = block.mlp.w3.in_features if isinstance(block.mlp, SwiGLU) else block.mlp.fc2.in_features
    ffn = (4 if isinstance(block.mlp, SwiGLU) else 2) * hidden  # gate, value, SiLU, product; or before and after GELU
    return _bytes_of_norm(width, size) + size * (ffn + num_scaled * width)


def _head_rows(model: DINOv2, side: nn.ModuleDict, num_crops: int, masked: float) -> list[tuple[DINOHead, float]]:
    """Each head of one side and the tokens it sees: the CLS token of each crop, the masked patches."""
    rows: dict[str, float] = {}
    if model.dino_weight:
        rows["dino_head"] = num_crops
    if model.ibot_weight:
        rows[model.patch_head] = rows.get(model.patch_head, 0) + masked
    return [(side[name], number) for name, number in rows.items()]  # type: ignore[misc]
