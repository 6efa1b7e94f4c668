"""Stage 4: SAM2's memory learns to carry the masks of some prompted frames to the other frames of a cine.

Everything else stays as it is, and so do the results on single frames. The clips are of generated cines and run forwards or backwards in
time; what the prompted frames contribute is what the fine-tuned model makes of them. As all that it makes of a frame stays the same, it is
computed once. Interrupted, the stage goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from cines import cine_masks
from conversation import SEG, Turn, batch_of
from data import MASK_SIDE, mask_pixels, tile_pixels
from evaluate import Predictor
from formats import load_sam2, save_sam2
from generator import CONCEPTS, generate_cine
from learning import Progress, descend, mask_loss, optimizer_of, rates_of
from model import MEMORY_PARTS, Tracker, build_sam2
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["QUICK_MEMORY", "MemorySchedule", "train_memory"]


@dataclasses.dataclass(frozen=True)
class MemorySchedule:
    """How many cines there are to learn from and how long; a step takes `batch` clips."""

    cines: int = 72
    frames: int = 20
    steps: int = 200
    batch: int = 2
    rate: float = 1e-3
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

    A clip of `kind` best begins at a frame that is full of contrast; first begins with five frames in a row, mostly before there is any
    contrast, as Sa2VA does; any begins anywhere.
    """

    kind: str
    prompted: tuple[int, ...]
    carried: tuple[int, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Plan:
        kind = str(rng.choice(["best", "first", "any"], p=[0.55, 0.2, 0.25]))
        if kind == "first":
            return cls(kind, tuple(range(5)), tuple(range(5, 9)))
        others = rng.choice([-3, -2, -1, 1, 2, 3], int(rng.integers(0, 3)), replace=False)
        prompted = tuple(sorted({0, *map(int, others)}))
        return cls(kind, prompted, tuple([place for place in range(1, 11) if place not in prompted][: int(rng.integers(4, 8))]))

    def frames(self, rng: np.random.Generator, areas: NDArray[np.float32]) -> dict[int, int]:
        """The frame of a cine at each place; a clip that leaves the cine turns round at its end."""
        start = int(rng.integers(len(areas)))
        if self.kind == "best":
            start = int(rng.choice(np.flatnonzero(areas >= 0.9 * areas.max())))
        elif self.kind == "first" and rng.random() < 0.6:
            start = int(rng.integers(3))
        stride = int(rng.integers(1, 3 if self.kind == "first" else 4))
        if self.kind != "first" and rng.random() < 0.5:
            stride = -stride
        period = 2 * (len(areas) - 1)
        turned = {place: (start + stride * place) % period for place in (*self.prompted, *self.carried)}
        return {place: min(frame, period - frame) for place, frame in turned.items()}


def train_memory(folder: Path, schedule: MemorySchedule, seed: int, processes: int) -> None:
    """Train MEMORY_PARTS of the SAM2 in `folder`, and write it anew: nothing else in it changes.

    While it runs, `folder`/.memory holds the cines (0.8 MiB a frame) and the last checkpoint."""
    work = folder / ".memory"
    predictor = Predictor.load(folder)
    work.mkdir(parents=True, exist_ok=True)
    pool = _pool(folder, schedule, seed, work, processes)
    sam2 = predictor.masks.sam2
    sam2.requires_grad_(False)
    trained = {name: tensor for name, tensor in sam2.named_parameters() if name.startswith(MEMORY_PARTS)}
    for tensor in trained.values():
        tensor.requires_grad_(True)
    optimizer = optimizer_of(trained.values(), schedule.rate)
    rates = rates_of(optimizer, schedule.steps)
    progress, first, saved = Progress("memory", schedule.steps), 0, work / "memory.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        sam2.load_state_dict(state["weights"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        rates.load_state_dict(state["rates"])
        progress.history, first = state["history"], state["step"]
    for step in range(first, schedule.steps):
        total, values = _loss(predictor, np.random.default_rng([seed, 3, step]), pool, schedule.batch)
        descend(total, optimizer, rates)
        progress.add(values)
        if (step + 1) % schedule.checkpoint == 0:
            state = {"step": step + 1, "weights": {name: tensor.detach() for name, tensor in trained.items()}}
            state |= {"optimizer": optimizer.state_dict(), "rates": rates.state_dict(), "history": progress.history}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    pretrained = build_sam2((folder / "sam2_tiny.yaml").read_text(encoding="utf-8"))  # the predictor's has the fine-tuned mask decoder
    load_sam2(folder / "sam2_tiny.pt", pretrained)
    pretrained.load_state_dict(trained, strict=False)
    save_sam2(work / "sam2_tiny.pt", pretrained)
    os.replace(work / "sam2_tiny.pt", folder / "sam2_tiny.pt")
    shutil.rmtree(work)


def _loss(predictor: Predictor, rng: np.random.Generator, pool: list[Cine], batch: int) -> tuple[Tensor, dict[str, float]]:
    """The loss of one plan on `batch` cines: their vessels and, in some steps, the catheter of one of them."""
    plan = Plan.draw(rng)
    clips = [pool[int(i)] for i in rng.integers(len(pool), size=batch)]
    frames = [plan.frames(rng, clip.areas) for clip in clips]
    objects = [(c, 0) for c in range(batch)] + [(int(rng.integers(batch)), 1)] * bool(rng.random() < 0.4)

    def of(name: str, place: int) -> Tensor:
        """What the clips have of a place, for each object."""
        parts = [getattr(clips[c], name)[frames[c][place]] for c, _ in objects]
        whole = name in ("fine", "middle", "coarse")
        return torch.stack([part if whole else part[concept] for part, (_, concept) in zip(parts, objects, strict=True)]).float()

    tracker = Tracker(predictor.masks, length=max(*plan.prompted, *plan.carried) + 1)
    for place in plan.prompted:
        tracker.remember(place, *(of(name, place) for name in ("coarse", "mask", "token", "score")))
    decoded = [tracker.propagate(place, (of("fine", place), of("middle", place), of("coarse", place))) for place in plan.carried]
    logits, iou, score = (torch.cat([getattr(d, name) for d in decoded]) for name in ("logits", "iou", "score"))
    loss = mask_loss(logits, iou, score, torch.cat([of("targets", place) for place in plan.carried]) / 255)
    dice = loss.chosen_dice.view(len(plan.carried), len(objects))
    values = {
        "loss_mask": loss.cross_entropy.item(), "loss_dice": loss.dice.item(), "loss_iou": loss.iou.item(), "score": loss.score.item(),
        f"{plan.kind} vessel dice": float(dice[:, :batch].nanmean()), "catheter dice": float(dice[:, batch:].nanmean()),
    }  # fmt: skip
    return loss.total + 0.15 * loss.score, values  # whether there is an object matters more here than on a single frame


def _pool(folder: Path, schedule: MemorySchedule, seed: int, work: Path, processes: int) -> list[Cine]:
    """The generated cines, from `work` as far as they are there already."""
    tasks = [(seed, index, schedule.frames, folder, work / f"cine-{index:04d}.pt") for index in range(schedule.cines)]
    missing = [task for task in tasks if not task[-1].exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as workers:
            for _ in workers.imap_unordered(_make, missing):
                pass
    return [Cine(**torch.load(path, weights_only=True, mmap=True)) for *_, path in tasks]


def _make(task: tuple[int, int, int, Path, Path]) -> None:
    """Generate a cine, half of them as coarse as the real frames, and write it with what the model in `folder` makes of it."""
    seed, index, frames, folder, path = task
    rng = np.random.default_rng([seed, 5, index])
    side = 300 if rng.random() < 0.5 else int(rng.integers(300, 420))
    while True:
        cine = generate_cine(rng, frames, side, side, f"S{index:04d}")
        vessel = cine_masks(cine, "vessel")
        if vessel.mean(axis=(1, 2)).max() > 0.015:
            break
    masks = np.stack([vessel, cine_masks(cine, "catheter")], axis=1)
    small = [Image.fromarray(m).convert("L").resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BOX) for frame in masks for m in frame]
    targets = torch.from_numpy(np.stack([np.asarray(m) for m in small])).view(frames, len(CONCEPTS), MASK_SIDE, MASK_SIDE)
    made = {"targets": targets, **_made_of(_predictor(folder), [Image.fromarray(frame.image) for frame in cine])}
    torch.save(made, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


_loaded: dict[Path, Predictor] = {}


def _predictor(folder: Path) -> Predictor:
    """The model, loaded once a process."""
    if folder not in _loaded:
        _loaded[folder] = Predictor.load(folder)
    return _loaded[folder]


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
