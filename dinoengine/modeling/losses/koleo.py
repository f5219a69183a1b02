"""The KoLeo regulariser: spread the features of different images apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoengine.modeling.losses.precision import at_least_fp32
from dinoengine.utils import comm

EPS = 1e-8


def koleo_loss(features: Tensor, group_size: int = 0, *, rows: list[Tensor] | None = None) -> Tensor:
    """Kozachenko-Leonenko differential entropy estimate (arXiv:1806.03198, section 4), on the unit sphere.

    x = features / |features|
    loss = mean over i of  -log(|x_i - x_n(i)| + 1e-8),  n(i) = the nearest other image of i's group

    The choice of the neighbour has no gradient; the distance has one through both points.

    Args:
        features: [B, D] of this rank, any float dtype; computed in fp32 at least.
        group_size: images compared with each other: consecutive ones of the global batch (ranks in order). 0: all.
        rows: gets what each image adds, [B] without gradient: the loss is their mean. Nothing where a group has one image.

    Returns:
        Scalar: the mean over this rank's images; the mean of the ranks' values is the loss of the global batch. 0 when
        a group has one image (the published code compares it with itself, giving a constant: 14.9 at D = 1024).

    Raises:
        ValueError: if the group size does not divide the global batch.
    """
    with torch.autocast(features.device.type, enabled=False):  # a bf16 product would pick other neighbours
        x = F.normalize(at_least_fp32(features), dim=-1, eps=EPS)
        num_local, first = x.shape[0], 0
        group_size = group_size or num_local * comm.get_world_size()
        if num_local % group_size:  # a group reaches over ranks
            x = comm.all_gather_with_grad(x)
            first = comm.get_rank() * num_local
        if x.shape[0] % group_size:
            raise ValueError(
                f"MODEL.LOSS.KOLEO_GROUP_SIZE {group_size} does not divide the {x.shape[0]} images of the batch."
            )
        if group_size == 1:
            return x.sum() * 0.0
        groups = x.reshape(-1, group_size, x.shape[-1])
        with torch.no_grad():
            # Distances around the mean: early in training all points are close together, and a product of the points
            # themselves (1 - tiny), in TF32 as on CUDA, could not tell the neighbours apart.
            centred = groups - groups.mean(1, keepdim=True)
            squares = centred.square().sum(-1)
            score = 2 * centred @ centred.transpose(1, 2) - squares.unsqueeze(1)  # [groups, group, group]
            score.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # nearest: the largest 2 x.y - |y|^2
            nearest = score.argmax(-1, keepdim=True).expand_as(groups)
        distance = torch.linalg.vector_norm(groups - groups.gather(1, nearest), dim=-1).flatten()
        per_image = -(distance[first : first + num_local] + EPS).log()
        if rows is not None:
            rows.append(per_image.detach())
        return per_image.mean()
