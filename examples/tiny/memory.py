"""Stage 4: SAM2's memory learns to carry the masks of some prompted frames to the other frames of a cine.

Everything else stays as it is, and so do the results on single frames. The memory begins with random weights. The clips are of generated
cines, compressed as recorded ones are, and run forwards or backwards in time; what the prompted frames contribute is what the fine-tuned
model makes of them. As all that it makes of a frame stays the same, it is computed once. The weights that are kept are a running mean
of those of the last steps, so the learning rate stays what it is, and a longer training begins as a shorter one does. Interrupted, the
stage goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from cines import cine_masks
from conversation import SEG, Turn, batch_of
from data import MASK_SIDE, compressed, mask_pixels, tile_pixels
from evaluate import Predictor
from formats import load_sam2, save_sam2
from generator import CONCEPTS, generate_cine
from learning import Progress, descend, mask_loss, optimizer_of
from model import MEMORY_PARTS, Tracker, build_sam2
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["QUICK_MEMORY", "MemorySchedule", "train_memory"]


@dataclasses.dataclass(frozen=True)
class MemorySchedule:
    """How long to learn, from cines of how many frames. There are `cines` at first and one more every `every` steps; a step takes `batch`
    clips."""

    cines: int = 8
    every: int = 6
    frames: int = 24
    steps: int = 1600
    batch: int = 3
    rate: float = 1e-3
    warm: int = 20
    checkpoint: int = 20


QUICK_MEMORY = MemorySchedule(cines=2, frames=12, steps=2)


@dataclasses.dataclass(frozen=True)
class Cine:
    """A cine to learn from.

    `targets` uint8 [frames, concepts, MASK_SIDE, MASK_SIDE]: the share (of 255) of each cell that is covered. The rest is float16:
    `fine`, `middle`, `coarse` [frames, ...] are SAM2's features, and `mask` [frames, concepts, side, side], `token`, `score` what the model
    makes of each frame alone.
    """

    targets: Tensor
    fine: Tensor
    middle: Tensor
    coarse: Tensor
    mask: Tensor
    token: Tensor
    score: Tensor

    @property
    def areas(self) -> NDArray[np.float32]:
        """The share of the frame that is vessel [frames]."""
        return np.asarray(self.targets[:, 0].float().mean(dim=(1, 2)) / 255)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The frames of a clip by their places in it: those that are prompted, and those that their masks are carried to, in order.

    A clip of `kind` best is prompted on frames that are full of contrast, and most of these clips run backwards to before the contrast;
    first begins with five frames in a row, mostly before there is any contrast, as Sa2VA does; any begins anywhere.
    """

    kind: str
    prompted: tuple[int, ...]
    carried: tuple[int, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Plan:
        kind = str(rng.choice(["best", "first", "any"], p=[0.7, 0.15, 0.15]))
        if kind == "first":
            return cls(kind, tuple(range(5)), tuple(range(5, 10)))
        others = rng.choice([-2, -1, 20, 21], int(rng.integers(0, 3)), replace=False)
        return cls(kind, tuple(sorted({0, *map(int, others)})), tuple(range(1, int(rng.integers(5, 10)))))

    def frames(self, rng: np.random.Generator, areas: NDArray[np.float32]) -> dict[int, int]:
        """The frame of a cine at each place; a clip that leaves the cine turns round at its end."""
        period = 2 * (len(areas) - 1)

        def run(places: tuple[int, ...], start: int, stride: int) -> dict[int, int]:
            turned = {place: (start + stride * (place - places[0])) % period for place in places}
            return {place: min(frame, period - frame) for place, frame in turned.items()}

        if self.kind == "first":
            start = int(rng.integers(3 if rng.random() < 0.6 else len(areas)))
            return run(self.prompted + self.carried, start, int(rng.integers(1, 3)))
        full = np.flatnonzero(areas >= 0.8 * areas.max())
        shown = full if self.kind == "best" else np.arange(len(areas))
        prompted = {place: int(rng.choice(shown)) for place in self.prompted}
        stride = int(rng.integers(1, 4))
        if rng.random() < 0.6:  # backwards, from some frame between the first contrast and the full tree
            return prompted | run(self.carried, int(rng.integers(1, full[0] + 1)), -stride)
        return prompted | run(self.carried, int(rng.integers(len(areas))), int(rng.choice([-stride, stride])))


def train_memory(folder: Path, schedule: MemorySchedule, seed: int) -> None:
    """Train MEMORY_PARTS of the SAM2 in `folder` from random weights, and write it anew: nothing else in it changes.

    While it runs, `folder`/.memory holds the cines (0.7 MiB a frame) and the last checkpoint."""
    work = folder / ".memory"
    predictor = Predictor.load(folder)
    work.mkdir(parents=True, exist_ok=True)
    sam2, yaml = predictor.masks.sam2, (folder / "sam2_tiny.yaml").read_text(encoding="utf-8")
    torch.manual_seed(seed)
    untrained = build_sam2(yaml).state_dict()
    sam2.load_state_dict({name: tensor for name, tensor in untrained.items() if name.startswith(MEMORY_PARTS)}, strict=False)
    sam2.requires_grad_(False)
    trained = {name: tensor for name, tensor in sam2.named_parameters() if name.startswith(MEMORY_PARTS)}
    for tensor in trained.values():
        tensor.requires_grad_(True)
    means = {name: tensor.detach().clone() for name, tensor in trained.items()}
    optimizer = optimizer_of(trained.values(), schedule.rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / schedule.warm, 1))
    progress, first, saved = Progress("memory", schedule.steps), 0, work / "memory.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        sam2.load_state_dict(state["weights"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        rates.load_state_dict(state["rates"])
        means, progress.history, first = state["means"], state["history"], state["step"]
    pool: list[Cine] = []
    for step in range(first, schedule.steps):
        while len(pool) < schedule.cines + step // schedule.every:
            pool.append(_cine(predictor, schedule.frames, seed, len(pool), work))
        total, values = _loss(predictor, np.random.default_rng([seed, 3, step]), pool, schedule.batch)
        descend(total, optimizer, rates)
        for name, mean in means.items():
            mean.lerp_(trained[name].detach(), min(5 / (step + 1), 1))
        progress.add(values)
        if (step + 1) % schedule.checkpoint == 0:
            state = {"step": step + 1, "weights": {name: tensor.detach() for name, tensor in trained.items()}, "means": means}
            state |= {"optimizer": optimizer.state_dict(), "rates": rates.state_dict(), "history": progress.history}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    pretrained = build_sam2(yaml)  # the predictor's has the fine-tuned mask decoder
    load_sam2(folder / "sam2_tiny.pt", pretrained)
    pretrained.load_state_dict(means, strict=False)
    save_sam2(work / "sam2_tiny.pt", pretrained)
    os.replace(work / "sam2_tiny.pt", folder / "sam2_tiny.pt")
    shutil.rmtree(work)


def _loss(predictor: Predictor, rng: np.random.Generator, pool: list[Cine], batch: int) -> tuple[Tensor, dict[str, float]]:
    """The loss of one plan on `batch` cines: of the vessels of most, of the catheter of some."""
    plan = Plan.draw(rng)
    clips = [pool[int(i)] for i in rng.integers(len(pool), size=batch)]
    frames = [plan.frames(rng, clip.areas) for clip in clips]
    concepts = (rng.random(batch) < 0.15).astype(int)

    def of(name: str, place: int) -> Tensor:
        """What the clips have of a place, for the concept of each."""
        parts = [getattr(clip, name)[frame[place]] for clip, frame in zip(clips, frames, strict=True)]
        whole = name in ("fine", "middle", "coarse")
        return torch.stack([(part if whole else part[concept]).float() for part, concept in zip(parts, concepts, strict=True)])

    tracker = Tracker(predictor.masks, length=max(*plan.prompted, *plan.carried) + 1, gated=plan.kind != "first")
    with torch.autocast("cpu", torch.bfloat16):
        for place in plan.prompted:
            tracker.remember(place, *(of(name, place) for name in ("coarse", "mask", "token", "score")))
        decoded = [tracker.propagate(place, (of("fine", place), of("middle", place), of("coarse", place))) for place in plan.carried]
    logits, iou, score = (torch.cat([getattr(d, name) for d in decoded]).float() for name in ("logits", "iou", "score"))
    targets = torch.cat([of("targets", place) for place in plan.carried]) / 255
    loss = mask_loss(logits, iou, score, targets)
    dice = loss.chosen_dice.view(len(plan.carried), batch).numpy()
    present = (targets > 0.5).flatten(1).any(dim=1)
    values = {
        "loss_mask": loss.cross_entropy.item(), "loss_dice": loss.dice.item(), "loss_iou": loss.iou.item(), "score": loss.score.item(),
        f"{plan.kind} vessel dice": _mean(dice[:, concepts == 0]), "catheter dice": _mean(dice[:, concepts == 1]),
        "absent": 1 - float(present.float().mean()), "found absent": float((score[~present] <= 0).float().mean()),
        "found present": float((score[present] > 0).float().mean()),
    }  # fmt: skip
    return loss.total, values


def _mean(values: NDArray[np.float32]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _cine(predictor: Predictor, frames: int, seed: int, index: int, work: Path) -> Cine:
    """Generate a cine, half of them as coarse as the real frames and most of them compressed with a loss, with what the model makes of it;
    or read it from `work`, where it is kept."""
    path = work / f"cine-{index:04d}.pt"
    if not path.exists():
        torch.save(_make(predictor, np.random.default_rng([seed, 5, index]), frames, f"S{index:04d}"), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    return Cine(**torch.load(path, weights_only=True, mmap=True))


def _make(predictor: Predictor, rng: np.random.Generator, frames: int, code: str) -> dict[str, Tensor]:
    """The parts of a Cine."""
    side = 300 if rng.random() < 0.5 else int(rng.integers(300, 420))
    while True:
        cine = generate_cine(rng, frames, side, side, code)
        vessel = cine_masks(cine, "vessel")
        if vessel.mean(axis=(1, 2)).max() > 0.015:
            break
    masks = np.stack([vessel, cine_masks(cine, "catheter")], axis=1)
    small = [Image.fromarray(m).convert("L").resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BOX) for frame in masks for m in frame]
    targets = torch.from_numpy(np.stack([np.asarray(m) for m in small])).view(frames, len(CONCEPTS), MASK_SIDE, MASK_SIDE)
    return {"targets": targets, **_made_of(predictor, compressed(rng, [Image.fromarray(frame.image) for frame in cine]))}


@torch.no_grad()
def _made_of(predictor: Predictor, images: list[Image.Image]) -> dict[str, Tensor]:
    """What the model makes of each frame alone, as in Cine."""
    model, tokenizer, branch = predictor.model, predictor.tokenizer, predictor.masks
    turns = [Turn(f"Please segment {name} in this image.", f"It is {SEG}.") for name in CONCEPTS]
    ids, mask, _ = batch_of(tokenizer, turns, [predictor.config.tokens_per_tile] * len(turns))
    parts: dict[str, list[Tensor]] = {name: [] for name in ("fine", "middle", "coarse", "mask", "token", "score")}
    for image in images:
        patches = model.patches(tile_pixels(image, predictor.config.image_size)).expand(len(turns), -1, -1)
        embeds = model.embed(ids, patches, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
        states = model.language_model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        prompts = predictor.fcs(states[ids == tokenizer.convert_tokens_to_ids(SEG)])
        fine, middle, coarse = branch.encode_frames(mask_pixels(image, branch.sam2.image_size)[None])
        each = [level.expand(len(turns), -1, -1, -1) for level in (fine, middle, coarse)]
        decoded = branch.decode_frames((each[0], each[1], each[2]), prompts)
        for name, part in (("fine", fine[0]), ("middle", middle[0]), ("coarse", coarse[0])):
            parts[name].append(part)
        for name in ("mask", "token", "score"):
            parts[name].append(getattr(decoded, name))
    return {name: torch.stack(values).half() for name, values in parts.items()}
