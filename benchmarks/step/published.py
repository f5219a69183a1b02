"""The published DINOv2 training step on one device, in plain torch: what ``train_step.py`` compares with.

Written from the paper (arXiv:2304.07193) and the facts of the released code, with that code's habits kept where they cost
time: attention as two products and a softmax, one forward per crop size, stochastic depth by advanced indexing, the patch
head on a buffer padded to the largest number of masked patches, one log-softmax per pair of views, an average of
parameters by two passes, and every loss read back in every step. What needs CUDA there (packed attention, fp16 shards,
fused cross entropy) has no counterpart on a CPU. Shapes: see ``dinoengine/structures.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STUDENT_TEMP, TEACHER_TEMP, MOMENTUM, CLIP_NORM = 0.1, 0.07, 0.99, 3.0


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), 1e-5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch, gamma in ((self.norm1, self.attn, self.gamma1), (self.norm2, self.mlp, self.gamma2)):
            if not (self.training and self.drop_rate > 0):
                x = x + branch(norm(x)) * gamma
                continue
            batch = x.shape[0]
            kept = torch.randperm(batch, device=x.device)[: max(int(batch * (1 - self.drop_rate)), 1)]
            residual = branch(norm(x[kept])) * gamma
            flat = torch.index_add(x.flatten(1), 0, kept, residual.flatten(1), alpha=batch / len(kept))
            x = flat.view_as(x)
        return x


class Backbone(nn.Module):
    def __init__(self, dim: int, depth: int, num_heads: int, patch: int, size: int, drop_rate: float) -> None:
        super().__init__()
        self.grid = size // patch
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.grid**2, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, drop_rate) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.unsqueeze(0), x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self._positions(math.isqrt(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _positions(self, grid: int) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        scale = (grid + 0.1) / self.grid
        table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat((self.pos_embed[:, :1], table), dim=1)


class Head(nn.Module):
    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256))
        )
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(256, num_prototypes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PublishedStep(nn.Module):
    """Call it with a batch for one whole step: teacher, student, losses, backward, clip, AdamW, teacher update."""

    def __init__(
        self, *, dim: int, depth: int, num_heads: int, patch: int, size: int, drop_rate: float, num_prototypes: int
    ) -> None:
        super().__init__()

        def parts(rate: float) -> nn.ModuleDict:
            backbone = Backbone(dim, depth, num_heads, patch, size, rate)
            return nn.ModuleDict({"backbone": backbone, "head": Head(dim, num_prototypes)})

        self.student, self.teacher = parts(drop_rate), parts(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        trained = list(self.student.parameters())
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.04},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, foreach=True)

    def forward(self, globals_: Tensor, locals_: Tensor, masks: Tensor, upper_bound: int) -> dict[str, float]:
        """
        Args:
            globals_: [2B, 3, H, W] float32, normalised, view-major.
            locals_: [L*B, 3, h, w], crop-major.
            masks: [2B, N] bool.
            upper_bound: rows of the padded buffer of masked patches.

        Returns:
            The losses, weighted.
        """
        self.optimizer.zero_grad(set_to_none=True)
        indices = masks.flatten().nonzero().flatten()
        weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
        cls_targets, patch_targets = self._targets(globals_, indices, upper_bound)
        terms = self._losses(globals_, locals_, masks, indices, weights, upper_bound, cls_targets, patch_targets)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP_NORM)
        self.optimizer.step()
        self._update_teacher()
        return {name: term.item() for name, term in terms.items()}

    @torch.no_grad()
    def _targets(self, globals_: Tensor, indices: Tensor, upper_bound: int) -> tuple[list[Tensor], Tensor]:
        tokens = self.teacher["backbone"](globals_)
        first, second = tokens[:, 0].chunk(2)
        cls_tokens = torch.cat((second, first))  # so that a student's view meets the teacher's other one
        buffer = tokens.new_zeros(upper_bound + len(cls_tokens), tokens.shape[-1])
        buffer[: len(cls_tokens)] = cls_tokens
        torch.index_select(tokens[:, 1:].flatten(0, 1), 0, indices, out=buffer[len(cls_tokens) :][: len(indices)])
        logits = self.teacher["head"](buffer)
        cls_logits, patch_logits = logits[: len(cls_tokens)], logits[len(cls_tokens) :][: len(indices)]
        return list(sinkhorn_knopp(cls_logits).chunk(2)), sinkhorn_knopp(patch_logits)

    def _losses(
        self,
        globals_: Tensor,
        locals_: Tensor,
        masks: Tensor,
        indices: Tensor,
        weights: Tensor,
        upper_bound: int,
        cls_targets: list[Tensor],
        patch_targets: Tensor,
    ) -> dict[str, Tensor]:
        global_tokens = self.student["backbone"](globals_, masks)
        local_cls = self.student["backbone"](locals_)[:, 0]
        global_cls = global_tokens[:, 0]
        buffer = global_tokens.new_zeros(upper_bound, global_tokens.shape[-1])
        buffer[: len(indices)].copy_(global_tokens[:, 1:].flatten(0, 1).index_select(0, indices))
        logits = self.student["head"](torch.cat((local_cls, global_cls, buffer)))
        local_logits, global_logits, patch_logits = logits.split([len(local_cls), len(global_cls), upper_bound])
        num_images = len(globals_) // 2
        num_locals = len(locals_) // num_images
        num_pairs = 2 + 2 * num_locals
        patch_logits = patch_logits[: len(indices)]
        across_patches = torch.sum(patch_targets * F.log_softmax(patch_logits / STUDENT_TEMP, dim=-1), dim=-1)
        return {
            "local": dino_loss(list(local_logits.chunk(num_locals)), cls_targets) / num_pairs,
            "global": dino_loss([global_logits], [torch.cat(cls_targets)]) * 2 / num_pairs,
            "koleo": 0.1 * sum(koleo_loss(cls) for cls in global_cls.chunk(2)),
            "ibot": -(across_patches * weights).sum() / len(masks),
        }

    @torch.no_grad()
    def _update_teacher(self) -> None:
        student, teacher = list(self.student.parameters()), list(self.teacher.parameters())
        torch._foreach_mul_(teacher, MOMENTUM)
        torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)


def sinkhorn_knopp(logits: Tensor) -> Tensor:
    """Three rounds over [M, K], on the transposed matrix."""
    q = torch.exp(logits.float() / TEACHER_TEMP).t()
    num_prototypes, num_rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= num_rows
    q *= num_rows
    return q.t()


def dino_loss(student_logits: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Sum over the pairs of views of the mean cross entropy."""
    total = student_logits[0].new_zeros(())
    for logits in student_logits:
        log_probs = F.log_softmax(logits / STUDENT_TEMP, dim=-1)
        for target in targets:
            total = total - torch.sum(target * log_probs, dim=-1).mean()
    return total


def koleo_loss(features: Tensor) -> Tensor:
    x = F.normalize(features, eps=1e-8, p=2, dim=-1)
    products = x @ x.t()
    products.view(-1)[:: len(x) + 1].fill_(-1)
    nearest = products.argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest], 2, eps=1e-8) + 1e-8).mean()
