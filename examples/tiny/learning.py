"""What every stage of training shares: the optimizer, its rates, what is printed, and the loss of masks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import MASK_SIDE
from torch import Tensor, nn

__all__ = ["MaskLoss", "Progress", "descend", "mask_loss", "optimizer_of", "rates_of"]


def rates_of(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A short warm-up, then a cosine to nothing."""
    warm = max(steps // 25, 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))
    )


def optimizer_of(parameters: Iterable[Tensor], rate: float) -> torch.optim.AdamW:
    trained = [p for p in parameters if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999))


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rates: torch.optim.lr_scheduler.LambdaLR) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    rates.step()


class Progress:
    """Prints running means every 50 steps."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps, self.start = stage, steps, time.time()
        self.history: list[dict[str, float]] = []

    def add(self, values: dict[str, float]) -> None:
        self.history.append(values)
        if len(self.history) % 50 == 0 or len(self.history) == self.steps:
            recent = self.history[-50:]
            names = dict.fromkeys(name for values in recent for name in values)
            means = "  ".join(f"{name} {np.nanmean([r.get(name, np.nan) for r in recent]):.4f}" for name in names)
            print(f"{self.stage} {len(self.history)}/{self.steps}  {means}  {time.time() - self.start:.0f} s", flush=True)


@dataclasses.dataclass(frozen=True)
class MaskLoss:
    """The parts of a mask loss, each a scalar, and the Dice [masks] of the chosen masks, nan where the object is absent."""

    cross_entropy: Tensor
    dice: Tensor
    others: Tensor
    iou: Tensor
    score: Tensor
    chosen_dice: Tensor

    @property
    def total(self) -> Tensor:
        """Sa2VA's weights for its two losses; small ones for what it leaves as pretrained."""
        return 3.0 * self.cross_entropy + 1.0 * self.dice + 0.1 * self.others + 0.5 * self.iou + 0.5 * self.score


def mask_loss(logits: Tensor, iou: Tensor, score: Tensor, target: Tensor) -> MaskLoss:
    """Losses of `logits` [masks, 3, low, low] against `target` [masks, MASK_SIDE, MASK_SIDE] in 0..1.

    As SAM's three masks are nested (whole, part, subpart), the first learns the object, the second the object with a margin and the third
    its core, these two lightly. The IoU head learns the true IoU of all three with the object: so the first leads clearly, is the one
    that inference takes, and rounding never changes the choice. An absent object has neither Dice nor IoU to learn: its Dice would
    reward a model that sees nothing anywhere.
    """
    up = F.interpolate(logits, size=(MASK_SIDE, MASK_SIDE), mode="bilinear", align_corners=False)
    wide = F.max_pool2d(target[:, None], 7, 1, 3)[:, 0]
    core = -F.max_pool2d(-target[:, None], 3, 1, 1)[:, 0]
    goals = torch.stack([target, wide, core], dim=1)
    entropy = F.binary_cross_entropy_with_logits(up, goals, reduction="none").mean(dim=(2, 3))
    probability = up.sigmoid()
    naive = 1 - (2 * (probability * goals).sum(dim=(2, 3)) + 1) / (probability.sum(dim=(2, 3)) + goals.sum(dim=(2, 3)) + 1)
    with torch.no_grad():
        hard, truth = up > 0, target[:, None] > 0.5
        both, total = (hard & truth).sum(dim=(2, 3)), hard.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
        true_iou = both / (total - both).clamp(min=1)
        present = truth.flatten(1).any(dim=1)
        share = present / present.sum().clamp(min=1)
        chosen = iou.argmax(dim=1, keepdim=True)
        dice = torch.where(present, (2 * both / total.clamp(min=1)).gather(1, chosen)[:, 0], torch.nan)
    return MaskLoss(
        cross_entropy=entropy[:, 0].mean(),
        dice=(naive[:, 0] * share).sum(),
        others=(3 * entropy.mean(dim=0) + (naive * share[:, None]).sum(dim=0))[1:].mean(),
        iou=((iou - true_iou) ** 2 * share[:, None]).sum() / 3,
        score=F.binary_cross_entropy_with_logits(score, present.float()),
        chosen_dice=dice,
    )
