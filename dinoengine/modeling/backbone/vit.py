"""The vision transformer of DINOv2 (arXiv:2304.07193), with optional registers (arXiv:2309.16588).

Parameter names and shapes are those of the published weight files. Shapes: see ``dinoengine/structures.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinoengine.config import CfgNode, configurable
from dinoengine.modeling.backbone.backbone import Backbone
from dinoengine.modeling.backbone.build import BACKBONE_REGISTRY
from dinoengine.modeling.layers.attention_kernels import choose_kernel
from dinoengine.modeling.layers.block import LAYER_NORM_EPS, Block, BlockPlan
from dinoengine.modeling.layers.checkpointing import run_checkpointed
from dinoengine.modeling.layers.compilation import compile_modules
from dinoengine.modeling.layers.mlp import FFN_LAYERS
from dinoengine.modeling.layers.patch_embed import PatchEmbed
from dinoengine.modeling.layers.position import interpolate_position_table
from dinoengine.structures import BackboneOutput, ParamFacts, PickedTokens


class ViTSize(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int


class Execution(NamedTuple):
    """How blocks are run; changes nothing but rounding, time and memory.

    Attributes:
        attention: MODEL.ATTENTION, see ``choose_kernel``.
        activation_checkpointing: MODEL.ACTIVATION_CHECKPOINTING, see ``run_checkpointed``.
        compile_blocks: MODEL.COMPILE.
    """

    attention: str = "auto"
    activation_checkpointing: str = "none"
    compile_blocks: bool = False


VIT_SIZES = {
    "micro": ViTSize(64, 4, 2),
    "tiny": ViTSize(192, 12, 3),
    "small": ViTSize(384, 12, 6),
    "base": ViTSize(768, 12, 12),
    "large": ViTSize(1024, 24, 16),
    "giant": ViTSize(1536, 40, 24),
}


@BACKBONE_REGISTRY.register()
class VisionTransformer(Backbone):
    """Tokens are [CLS, registers, patches]; registers carry no position."""

    @configurable
    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_register_tokens: int = 0,
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        layer_scale_init: float = 1e-5,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = True,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        execution: Execution | None = None,
    ) -> None:
        """
        Args:
            img_size: (rows, columns) in pixels that the position table is made for.
            patch_size: edge of a patch in pixels.
            ffn: "mlp" or "swiglu".
            layer_scale_init: 0 builds no LayerScale.
            drop_path_rate: share of samples that skip a residual branch; the same in every block if
                ``drop_path_uniform``, else rising linearly from 0.
            interpolate_antialias, interpolate_offset: see ``interpolate_position_table``.
            execution: how the blocks are run; None: the defaults.

        Raises:
            ValueError: for an unknown ``ffn``, an ``img_size`` that is no multiple of the patch, or without a compiler.
        """
        super().__init__()
        if ffn not in FFN_LAYERS:
            raise ValueError(f"ffn must be one of {', '.join(FFN_LAYERS)}; got {ffn!r}.")
        if img_size[0] % patch_size or img_size[1] % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}.")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_layers = depth
        self.num_heads = num_heads
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.execution = execution or Execution()
        self.table_grid = (img_size[0] // patch_size, img_size[1] // patch_size)

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.table_grid[0] * self.table_grid[1], embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                ffn=ffn,
                ffn_ratio=ffn_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                layer_scale_init=layer_scale_init,
                drop_path_rate=drop_path_rate if drop_path_uniform else drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.reset_parameters()
        if self.execution.compile_blocks:
            compile_modules(self.blocks)

    @classmethod
    def from_config(cls, cfg: CfgNode, *, drop_path_rate: float | None = None) -> dict[str, Any]:
        """Arguments from MODEL.VIT; ``drop_path_rate`` replaces the configured one (the teacher's is 0)."""
        vit = cfg.MODEL.VIT
        size = VIT_SIZES[vit.SIZE]
        pixels = vit.POS_EMBED_SIZE_PX if vit.POS_EMBED_SIZE_PX != (0,) else cfg.INPUT.GLOBAL_CROPS.SIZE_PX
        return {
            "img_size": (pixels[0], pixels[-1]),
            "patch_size": vit.PATCH_SIZE_PX,
            "in_chans": len(cfg.MODEL.PIXEL_MEAN),
            "embed_dim": vit.EMBED_DIM or size.embed_dim,
            "depth": vit.DEPTH or size.depth,
            "num_heads": vit.NUM_HEADS or size.num_heads,
            "num_register_tokens": vit.NUM_REGISTER_TOKENS,
            "ffn": vit.FFN,
            "ffn_ratio": vit.FFN_RATIO,
            "qkv_bias": vit.QKV_BIAS,
            "proj_bias": vit.PROJ_BIAS,
            "ffn_bias": vit.FFN_BIAS,
            "layer_scale_init": vit.LAYER_SCALE_INIT,
            "drop_path_rate": vit.DROP_PATH_RATE if drop_path_rate is None else drop_path_rate,
            "drop_path_uniform": vit.DROP_PATH_UNIFORM,
            "interpolate_antialias": vit.INTERPOLATE_ANTIALIAS,
            "interpolate_offset": vit.INTERPOLATE_OFFSET,
            "execution": Execution(cfg.MODEL.ATTENTION, cfg.MODEL.ACTIVATION_CHECKPOINTING, cfg.MODEL.COMPILE),
        }

    def reset_parameters(self) -> None:
        """All initial weights in one place; the patch convolution and LayerScale keep those of their own classes."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> BackboneOutput:
        """[B, C, H, W] float32 -> tokens after the final norm; H and W any multiples of the patch size."""
        return self.forward_views([images], [masks])[0]

    def forward_views(self, images: list[Tensor], masks: list[Tensor | None]) -> list[BackboneOutput]:
        tokens, grids = self._embed_views(images, masks)
        for block, plan in zip(self.blocks, self._plans(tokens), strict=True):
            tokens = self._run(block, tokens, plan)
        return [self._output(self.norm(t), grid) for t, grid in zip(tokens, grids, strict=True)]

    def pick_tokens(
        self, images: list[Tensor], masks: list[Tensor | None], patches: list[Tensor | None]
    ) -> list[PickedTokens]:
        """As ``Backbone.pick_tokens``; the last block and the final norm run on the tokens asked for."""
        tokens, _ = self._embed_views(images, masks)
        plans = self._plans(tokens)
        for block, plan in zip(self.blocks[:-1], plans[:-1], strict=True):
            tokens = self._run(block, tokens, plan)
        first_patch = 1 + self.num_register_tokens
        picked = []
        for t, rows in zip(tokens, patches, strict=True):
            wanted = torch.arange(0, t.shape[0] * t.shape[1], t.shape[1], device=t.device)  # the CLS tokens
            if rows is not None:
                num_patches = t.shape[1] - first_patch
                places = rows // num_patches * t.shape[1] + first_patch + rows % num_patches
                wanted = torch.cat((wanted, places))
            picked.append(wanted)
        outputs = [self.norm(t) for t in self._run(self.blocks[-1], tokens, plans[-1], picked)]
        return [PickedTokens(out[: len(t)], out[len(t) :]) for out, t in zip(outputs, tokens, strict=True)]

    def get_intermediate_layers(
        self, images: Tensor, layers: int | Sequence[int] = 1, norm: bool = True
    ) -> list[BackboneOutput]:
        """Outputs of the last n blocks, or of the blocks with these indices, in order of depth.

        Args:
            layers: a number n >= 1, or block indices from 0.
            norm: apply the final norm to each, as the linear evaluation does.

        Raises:
            ValueError: if a block does not exist.
        """
        wanted = list(range(self.num_layers - layers, self.num_layers)) if isinstance(layers, int) else sorted(layers)
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.num_layers:
            raise ValueError(f"This backbone has blocks 0..{self.num_layers - 1}; got layers={layers}.")
        tokens, (grid,) = self._embed_views([images], [None])
        outputs = []
        for i, (block, plan) in enumerate(zip(self.blocks, self._plans(tokens), strict=True)):
            tokens = self._run(block, tokens, plan)
            if i in wanted:
                outputs.append(self._output(self.norm(tokens[0]) if norm else tokens[0], grid))
        return outputs

    def _plans(self, groups: list[Tensor]) -> list[BlockPlan]:
        """Of every block; all of stochastic depth is drawn, group after group, as if each had a forward of its own."""
        device, width = groups[0].device, self.embed_dim // self.num_heads
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else self.cls_token.dtype
        # A teacher or an evaluation has crops of one size, which need no packing, and may have another dtype.
        kernel = choose_kernel(self.execution.attention, device, dtype, width) if self.training else "sdpa"
        draws = [[block.draw(g.shape[0], device) for block in self.blocks] for g in groups]  # type: ignore[operator]
        shapes = tuple((g.shape[0], g.shape[1]) for g in groups)
        return [Block.plan(shapes, of_block, device, kernel) for of_block in zip(*draws, strict=True)]

    def _run(
        self, block: nn.Module, groups: list[Tensor], plan: BlockPlan, picked: list[Tensor] | None = None
    ) -> list[Tensor]:
        if self.training and torch.is_grad_enabled():
            return run_checkpointed(self.execution.activation_checkpointing, block, groups, plan, picked)
        return block(groups, plan, picked)

    def _embed_views(
        self, images: list[Tensor], masks: list[Tensor | None]
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        embedded = [self._embed(x, mask) for x, mask in zip(images, masks, strict=True)]
        return [tokens for tokens, _ in embedded], [grid for _, grid in embedded]

    def _embed(self, images: Tensor, masks: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        patches = self.patch_embed(images)  # [B, N, D]
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype).unsqueeze(0), patches)
        table = interpolate_position_table(
            self.pos_embed,
            self.table_grid,
            grid,
            antialias=self.interpolate_antialias,
            offset=self.interpolate_offset,
        )
        batch = images.shape[0]
        # fp32 from here on, also under autocast: see Block.
        parts = [self.cls_token.expand(batch, -1, -1) + table[:, :1], patches + table[:, 1:]]
        if self.num_register_tokens:
            parts.insert(1, self.register_tokens.expand(batch, -1, -1))
        return torch.cat(parts, dim=1), grid

    def _output(self, tokens: Tensor, grid: tuple[int, int]) -> BackboneOutput:
        first_patch = 1 + self.num_register_tokens
        return BackboneOutput(
            cls_token=tokens[:, 0],
            register_tokens=tokens[:, 1:first_patch],
            patch_tokens=tokens[:, first_patch:],
            grid=grid,
        )

    def disable_masking(self) -> None:
        self.mask_token.requires_grad_(False)

    def param_facts(self, name: str) -> ParamFacts:
        """Embeddings are layer 0, block i is layer i + 1, the final norm is layer depth + 1.

        Biases, norms and LayerScale are not decayed; tokens and the position table are (as published).
        """
        parts = name.split(".")
        if parts[0] == "blocks":
            layer_id = int(parts[1]) + 1
        elif parts[0] == "norm":
            layer_id = self.num_layers + 1
        else:
            layer_id = 0
        is_norm = any(part.startswith("norm") for part in parts)
        return ParamFacts(
            layer_id=layer_id,
            num_layers=self.num_layers,
            weight_decay=not (parts[-1] in ("bias", "gamma") or is_norm),
            role="patch_embed" if parts[0] == "patch_embed" else "",
        )
