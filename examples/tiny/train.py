"""Make every file of this folder from a seed: frames, a base model, a SAM2, and a Sa2VA fine-tune of both.

    python examples/tiny/train.py --out examples/tiny --data ../shared/data

Three stages, as with the real model: SAM2 learns to segment and the vision-language model learns to answer, each on generated frames;
then Sa2VA's fine-tune joins them, with both image encoders frozen, on generated and real frames. Two CPU cores suffice.
Needs mmengine (to save the checkpoint as Sa2VA's trainer does) and pycocotools beside the exporter's dependencies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from conversation import IGNORE, SEG, Turn, batch_of, image_turn, segmentation_turn
from data import HELD_OUT, MASK_SIDE, Pool, Sample, generated_pool, mask_pixels, rasterize, read_real, tile_pixels, warp
from evaluate import evaluate
from formats import load_base, load_sam2, load_tokenizer, save_base, save_finetuned, save_sam2, write_tokenizer
from generator import CONCEPTS, generate
from model import MaskBranch, TinyConfig, VisionLanguageModel, add_lora, build_sam2, prompt_head
from PIL import Image
from torch import Tensor, nn

__all__ = ["Schedule", "main"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast each stage learns. `batch` counts images."""

    pool: int = 2400
    sam2_steps: int = 2400
    sam2_batch: int = 4
    sam2_rate: float = 1e-3
    base_steps: int = 900
    base_batch: int = 16
    base_rate: float = 1e-3
    finetune_steps: int = 1500
    finetune_batch: int = 6
    finetune_rate: float = 5e-4
    real_share: float = 0.6


QUICK = Schedule(pool=16, sam2_steps=2, base_steps=2, finetune_steps=3)

_FRAMES = ((512, 512),) * 9 + ((640, 480), (480, 640), (768, 512), (1024, 768), (512, 512))
"""Width and height of the frames that are shipped."""


# What the stages share.


def _rates(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A short warm-up, then a cosine to nothing."""
    warm = max(steps // 25, 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))
    )


def _optimizer(parameters: Iterable[Tensor], rate: float) -> torch.optim.AdamW:
    trained = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}, {"params": [p for p in trained if p.ndim <= 1]}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, rates: torch.optim.lr_scheduler.LambdaLR) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    rates.step()


class _Progress:
    """Prints running means every 50 steps."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps, self.start = stage, steps, time.time()
        self.history: list[dict[str, float]] = []

    def add(self, values: dict[str, float]) -> None:
        self.history.append(values)
        if len(self.history) % 50 == 0 or len(self.history) == self.steps:
            recent = self.history[-50:]
            means = "  ".join(f"{name} {np.mean([r[name] for r in recent if name in r]):.4f}" for name in recent[-1])
            print(f"{self.stage} {len(self.history)}/{self.steps}  {means}  {time.time() - self.start:.0f} s", flush=True)


def concept_prompts(hidden: int) -> Tensor:
    """A fixed prompt for each concept [concepts, hidden]: what stands for the language embedding until there is a language model."""
    return torch.randn(len(CONCEPTS), hidden, generator=torch.Generator().manual_seed(7))


def _pixels(grays: list[np.ndarray[Any, Any]], side: int) -> Tensor:
    return torch.stack([mask_pixels(Image.fromarray(gray), side) for gray in grays])


@dataclasses.dataclass(frozen=True)
class MaskLoss:
    """The parts of a mask loss, each a scalar, and the mean Dice of the chosen masks (no gradient)."""

    cross_entropy: Tensor
    dice: Tensor
    others: Tensor
    iou: Tensor
    score: Tensor
    chosen_dice: float


def mask_loss(logits: Tensor, iou: Tensor, score: Tensor, target: Tensor) -> MaskLoss:
    """Losses of `logits` [masks, 3, low, low] against `target` [masks, MASK_SIDE, MASK_SIDE] in 0..1.

    Cross entropy and naive Dice (eps 1) are Sa2VA's, on the mask of the highest predicted IoU. As SAM's masks are nested (whole, part,
    subpart), the second is trained on the object with a margin and the third on its core, lightly; the IoU head learns the true IoU of
    all three with the object, so that one mask leads clearly and rounding never changes the choice.
    """
    up = F.interpolate(logits, size=(MASK_SIDE, MASK_SIDE), mode="bilinear", align_corners=False)
    wide = F.max_pool2d(target[:, None], 7, 1, 3)[:, 0]
    core = -F.max_pool2d(-target[:, None], 3, 1, 1)[:, 0]
    goals = torch.stack([target, wide, core], dim=1)
    entropy = F.binary_cross_entropy_with_logits(up, goals, reduction="none").mean(dim=(2, 3))
    probability = up.sigmoid()
    naive = 1 - (2 * (probability * goals).sum(dim=(2, 3)) + 1) / (probability.sum(dim=(2, 3)) + goals.sum(dim=(2, 3)) + 1)
    chosen = iou.argmax(dim=1)
    row = torch.arange(len(logits))
    with torch.no_grad():
        hard, truth = up > 0, target[:, None] > 0.5
        both, total = (hard & truth).sum(dim=(2, 3)), hard.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
        true_iou = both / (total - both).clamp(min=1)
        present = target.flatten(1).amax(dim=1) > 0.5
    # an absent object has no IoU to learn, and no mask but the first is asked to stay empty
    iou_error = ((iou - true_iou) ** 2).mean(dim=1)[present]
    first = torch.zeros_like(chosen)
    lead = torch.where(present, chosen, first)
    # before the IoU head leads anywhere, the first mask is the one to learn
    select = torch.stack([lead, first], dim=1)
    weight = torch.tensor([0.5, 0.5])
    main_entropy = torch.where(select == 0, entropy.gather(1, select), F.binary_cross_entropy_with_logits(
        up[row, lead], target, reduction="none").mean(dim=(1, 2))[:, None])  # fmt: skip
    lead_dice = 1 - (2 * (probability[row, lead] * target).sum(dim=(1, 2)) + 1) / (
        probability[row, lead].sum(dim=(1, 2)) + target.sum(dim=(1, 2)) + 1
    )
    main_dice = torch.stack([lead_dice, naive[:, 0]], dim=1)
    dice = 2 * both[row, chosen] / total[row, chosen].clamp(min=1)
    return MaskLoss(
        (main_entropy * weight).sum(dim=1).mean(),
        (main_dice * weight).sum(dim=1).mean(),
        (3 * entropy[:, 1:] + naive[:, 1:]).mean(),
        iou_error.mean() if present.any() else iou.sum() * 0,
        F.binary_cross_entropy_with_logits(score, present.float()),
        float(dice[present].mean()) if present.any() else 1.0,
    )
