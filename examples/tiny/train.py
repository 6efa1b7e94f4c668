"""Make every file of this folder from a seed: frames, a base model, a SAM2, and a Sa2VA fine-tune of both.

    python examples/tiny/train.py --out examples/tiny --data DATA

Four stages: SAM2 learns to segment and the vision-language model learns to answer, each on generated frames; then Sa2VA's fine-tune
joins them, with both image encoders frozen, on generated and real frames. At the end, SAM2's memory learns on generated cines.
Two CPU cores suffice.
Needs mmengine (to save the checkpoint as Sa2VA's trainer does) and pycocotools beside the exporter's dependencies.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cines import write_cines
from conversation import IGNORE, SEG, Turn, batch_of, image_turn, segmentation_turn
from data import HELD_OUT, Pool, Sample, cine_pool, generated_pool, mask_pixels, rasterize, read_real, simplified, tile_pixels, warp
from evaluate import evaluate
from formats import load_base, load_sam2, load_tokenizer, save_base, save_finetuned, save_sam2, write_tokenizer
from generator import CONCEPTS, generate
from learning import Progress, descend, mask_loss, optimizer_of, rates_of
from memory import QUICK_MEMORY, MemorySchedule, train_memory
from model import MaskBranch, TinyConfig, VisionLanguageModel, add_lora, build_sam2, prompt_head
from PIL import Image
from torch import Tensor, nn

__all__ = ["Schedule", "main"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast each stage learns. `batch` counts images."""

    pool: int = 2000
    cines: int = 200
    sam2_steps: int = 1600
    sam2_batch: int = 4
    sam2_rate: float = 1.5e-3
    refine_steps: tuple[int, ...] = (2000, 1200)
    refine_rate: float = 1e-3
    base_steps: int = 600
    base_batch: int = 16
    base_rate: float = 1e-3
    prompt_steps: int = 900
    prompt_batch: int = 16
    prompt_rate: float = 1e-3
    finetune_steps: int = 1000
    finetune_batch: int = 6
    finetune_rate: float = 5e-4
    real_share: float = 0.5


QUICK = Schedule(pool=16, cines=2, sam2_steps=2, refine_steps=(1, 1), base_steps=2, prompt_steps=2, finetune_steps=3)

_FRAMES = ((512, 512),) * 9 + ((640, 480), (480, 640), (768, 512), (1024, 768), (512, 512))
"""Width and height of the frames that are shipped."""


# What the stages share.


@dataclasses.dataclass(frozen=True)
class Setup:
    """What every stage needs: sizes, lengths, where randomness comes from, and the frames: generated ones, those of generated cines, and
    real ones (none if there are no data)."""

    config: TinyConfig
    schedule: Schedule
    rng: np.random.Generator
    pool: Pool
    cines: Pool
    real: Pool

    def pick(self, pool: Pool, count: int) -> list[Sample]:
        """`count` samples, drawn with replacement."""
        return [pool[int(i)] for i in self.rng.integers(len(pool), size=count)]

    def mixed(self, count: int) -> list[Sample]:
        """`count` samples of all kinds: `real_share` of them real, the others half and half."""
        real = int((self.rng.random(count) < self.schedule.real_share).sum()) if self.real else 0
        cines = int((self.rng.random(count - real) < 0.5).sum())
        return self.pick(self.real, real) + self.pick(self.cines, cines) + self.pick(self.pool, count - real - cines)


def concept_prompts(hidden: int) -> Tensor:
    """A fixed prompt for each concept [concepts, hidden]: what stands for the language embedding until there is a language model."""
    return torch.randn(len(CONCEPTS), hidden, generator=torch.Generator().manual_seed(7))


def _pixels(grays: list[np.ndarray[Any, Any]], side: int) -> Tensor:
    return torch.stack([mask_pixels(Image.fromarray(gray), side) for gray in grays])


# Stage 1: SAM2.


class _Guide(nn.Module):
    """A throw-away head that reads both concepts straight from SAM2's features: it tells the encoder early what matters."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(hidden, len(CONCEPTS), 1) for _ in range(3))

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Logits [images * concepts, side, side] at the finest of the three strides."""
        size = features[0].shape[-2:]
        maps = [head(level) for head, level in zip(self.heads, features, strict=True)]
        total = sum(F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps)
        return torch.as_tensor(total).flatten(0, 1)


def _plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of `logits` [masks, side, side] with `target` [masks, larger, larger], and Dice where there is an object."""
    target = F.interpolate(target[:, None], size=logits.shape[-2:], mode="area")[:, 0]
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum(dim=(1, 2)) + 1
    dice = 1 - overlap / (probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2)) + 1)
    present = target.flatten(1).any(dim=1)
    return 3 * F.binary_cross_entropy_with_logits(logits, target) + (dice * present).sum() / present.sum().clamp(min=1)


def train_sam2(setup: Setup, yaml: str) -> Any:
    """SAM2 from random weights on generated frames, along the very path of inference, with fixed prompts for the concepts."""
    schedule, rng = setup.schedule, setup.rng
    sam2 = build_sam2(yaml)
    branch = MaskBranch(sam2)
    concepts = concept_prompts(sam2.hidden_dim)
    guide = _Guide(sam2.hidden_dim)
    optimizer = optimizer_of([*sam2.parameters(), *guide.parameters()], schedule.sam2_rate)
    rates = rates_of(optimizer, schedule.sam2_steps)
    progress = Progress("sam2", schedule.sam2_steps)
    for _ in range(schedule.sam2_steps):
        picked = setup.pick(setup.pool, schedule.sam2_batch)
        warped = [warp(rng, sample, turn=20.0, zoom=1.3) for sample in picked]
        features = branch.encode(_pixels([gray for gray, _ in warped], sam2.image_size))
        target = torch.from_numpy(np.concatenate([masks for _, masks in warped]))
        image = torch.arange(len(picked)).repeat_interleave(len(CONCEPTS))
        prompts = concepts.repeat(len(picked), 1)
        loss = mask_loss(*branch.decode(features, prompts + 0.1 * torch.randn_like(prompts), image), target)
        descend(loss.total + _plain_loss(guide(features), target), optimizer, rates)
        found = {f"{name} dice": float(loss.chosen_dice[c :: len(CONCEPTS)].nanmean()) for c, name in enumerate(CONCEPTS)}
        progress.add({"loss_mask": loss.cross_entropy.item(), "loss_dice": loss.dice.item(), "loss_iou": loss.iou.item(), **found})
    return sam2


def refine_sam2(setup: Setup, sam2: Any) -> None:
    """`sam2` goes on to learn from the real frames too, and from frames of cines, of which some have no vessels; in rounds, each of which
    warms up and ends with small steps."""
    sam2.to(memory_format=torch.channels_last)
    for steps in setup.schedule.refine_steps:
        _refine(setup, sam2, steps)
    sam2.to(memory_format=torch.contiguous_format)


def _refine(setup: Setup, sam2: Any, steps: int) -> None:
    schedule, rng = setup.schedule, setup.rng
    branch = MaskBranch(sam2)
    concepts = concept_prompts(sam2.hidden_dim)
    optimizer = optimizer_of(sam2.parameters(), schedule.refine_rate)
    rates = rates_of(optimizer, steps)
    progress = Progress("refine", steps)
    for _ in range(steps):
        picked = setup.mixed(schedule.sam2_batch)
        warped = [warp(rng, sample, turn=45.0, zoom=1.4, stretch=1.2) for sample in picked]
        features = branch.encode(_pixels([gray for gray, _ in warped], sam2.image_size).to(memory_format=torch.channels_last))
        wanted = [(i, c) for i, sample in enumerate(picked) for c, known in enumerate(sample.annotated) if known]
        image, concept = torch.tensor(wanted).unbind(dim=1)
        target = torch.from_numpy(np.stack([warped[i][1][c] for i, c in wanted]))
        prompts = concepts[concept] + 0.1 * torch.randn(len(wanted), sam2.hidden_dim)
        logits, iou, score = branch.decode(features, prompts, image)
        loss = mask_loss(logits, iou, score, target)
        descend(loss.total, optimizer, rates)
        found = {f"{name} dice": float(loss.chosen_dice[concept == c].nanmean()) for c, name in enumerate(CONCEPTS)}
        real = torch.tensor([not all(picked[i].annotated) for i, _ in wanted])
        found |= {"real dice": float(loss.chosen_dice[real].nanmean()), "loss_score": loss.score.item()}
        absent = score[(~(target > 0.5).flatten(1).any(dim=1)) & (concept == 0)]
        found |= {"no vessel found": float((absent <= 0).float().mean())}
        progress.add({"loss_mask": loss.cross_entropy.item(), "loss_dice": loss.dice.item(), "loss_iou": loss.iou.item(), **found})


# Stage 2: the vision-language model.


def _tile_batch(grays: list[np.ndarray[Any, Any]], side: int) -> Tensor:
    return torch.cat([tile_pixels(Image.fromarray(gray), side) for gray in grays])


def _answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def train_base(setup: Setup, tokenizer: Any) -> VisionLanguageModel:
    """Vision model, projector and language model from random weights on questions about generated frames."""
    config, schedule = setup.config, setup.schedule
    model = VisionLanguageModel(config, len(tokenizer))
    image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    optimizer = optimizer_of(model.parameters(), schedule.base_rate)
    rates = rates_of(optimizer, schedule.base_steps)
    progress = Progress("base", schedule.base_steps)
    for _ in range(schedule.base_steps):
        picked = setup.pick(setup.pool, schedule.base_batch)
        turns = [image_turn(setup.rng, sample) for sample in picked]
        ids, mask, labels = batch_of(tokenizer, turns, [config.tokens_per_tile] * len(turns))
        patches = model.patches(_tile_batch([sample.gray for sample in picked], config.image_size))
        embeds = model.embed(ids, patches, image_token)
        loss = _answer_loss(model.language_model(inputs_embeds=embeds, attention_mask=mask).logits, labels)
        descend(loss, optimizer, rates)
        progress.add({"llm_loss": loss.item()})
    return model


# Stage 3: Sa2VA's fine-tune.


def _turn(rng: np.random.Generator, sample: Sample) -> Turn:
    """Mostly one mask, sometimes both in either order, now and then words alone; only what the sample's annotators looked for."""
    draw = rng.random()
    if draw < 0.12:
        return image_turn(rng, sample)
    if not all(sample.annotated) or draw < 0.4:
        return segmentation_turn(rng, (0,))
    return segmentation_turn(rng, (1,) if draw < 0.7 else (0, 1) if draw < 0.85 else (1, 0))


def learn_prompts(setup: Setup, tokenizer: Any, model: VisionLanguageModel, fcs: nn.Module) -> None:
    """Let the states of [SEG] become the prompts that SAM2 knows, one for each concept, in the order of the question. Without this, the
    decoder would learn from prompts that say too little, and find vessels where a catheter is asked for."""
    config, schedule, rng = setup.config, setup.schedule, setup.rng
    image_token, seg = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tokenizer.convert_tokens_to_ids(SEG)
    concepts = concept_prompts(fcs[-1].out_features)
    optimizer = optimizer_of([*model.parameters(), *fcs.parameters()], schedule.prompt_rate)
    rates = rates_of(optimizer, schedule.prompt_steps)
    progress = Progress("prompts", schedule.prompt_steps)
    for _ in range(schedule.prompt_steps):
        picked = setup.pick(setup.pool, schedule.prompt_batch)
        turns = [_turn(rng, sample) for sample in picked]
        ids, mask, labels = batch_of(tokenizer, turns, [config.tokens_per_tile] * len(turns))
        with torch.no_grad():
            patches = model.patches(_tile_batch([sample.gray for sample in picked], config.image_size))
        embeds = model.embed(ids, patches, image_token)
        output = model.language_model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        answer = _answer_loss(output.logits, labels)
        wanted = [c for turn in turns for c in turn.concepts]
        nearness = _far(fcs(output.hidden_states[-1][ids == seg]), concepts[wanted])
        descend(answer + nearness, optimizer, rates)
        progress.add({"llm_loss": answer.item(), "nearness": nearness.item()})


def _far(prompts: Tensor, concepts: Tensor) -> Tensor:
    """How much farther than it may be each prompt [masks, d_model] is from its concept: near enough to be told apart from the other."""
    return F.relu((prompts - concepts).square().mean(dim=1) - 0.1).mean()


def _shown(rng: np.random.Generator, gray: np.ndarray[Any, Any], several_tiles: bool) -> Image.Image:
    """The image as the language model gets it; stretched to another aspect where several tiles are wanted."""
    image = Image.fromarray(gray)
    return image.resize(((640, 480), (480, 640), (768, 512), (1024, 768))[rng.integers(4)]) if several_tiles else image


def finetune(setup: Setup, tokenizer: Any, model: VisionLanguageModel, sam2: Any) -> tuple[nn.Module, list[dict[str, float]]]:
    """Join the two: `model` gets LoRA, `sam2` a language prompt. Returns text_hidden_fcs and the losses of every step."""
    config, schedule, rng = setup.config, setup.schedule, setup.rng
    model.requires_grad_(False)
    sam2.requires_grad_(False)
    add_lora(model, config, len(tokenizer))
    model.mlp1.requires_grad_(True)
    sam2.sam_mask_decoder.requires_grad_(True)
    fcs = prompt_head(config.hidden, sam2.hidden_dim)
    learn_prompts(setup, tokenizer, model, fcs)
    branch = MaskBranch(sam2)
    optimizer = optimizer_of([*model.parameters(), *fcs.parameters(), *sam2.parameters()], schedule.finetune_rate)
    rates = rates_of(optimizer, schedule.finetune_steps)
    progress = Progress("finetune", schedule.finetune_steps)
    image_token, seg = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tokenizer.convert_tokens_to_ids(SEG)
    concepts = concept_prompts(sam2.hidden_dim)
    for step in range(schedule.finetune_steps):
        several_tiles = step % 12 == 11
        count = 2 if several_tiles else schedule.finetune_batch
        picked = setup.mixed(count)
        warped = [warp(rng, sample, turn=25.0, zoom=1.3) for sample in picked]
        turns = [_turn(rng, sample) for sample in picked]
        with torch.no_grad():
            tiles = [tile_pixels(_shown(rng, gray, several_tiles), config.image_size) for gray, _ in warped]
            patches = model.patches(torch.cat(tiles))
            features = branch.encode(_pixels([gray for gray, _ in warped], sam2.image_size))
        ids, mask, labels = batch_of(tokenizer, turns, [len(t) * config.tokens_per_tile for t in tiles])
        embeds = model.embed(ids, patches, image_token)
        output = model.language_model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        answer = _answer_loss(output.logits, labels)
        wanted = [(i, c) for i, turn in enumerate(turns) for c in turn.concepts]
        total, values = answer, {"llm_loss": answer.item()}
        if wanted:
            prompts = fcs(output.hidden_states[-1][ids == seg])
            target = torch.from_numpy(np.stack([warped[i][1][c] for i, c in wanted]))
            loss = mask_loss(*branch.decode(features, prompts, torch.tensor([i for i, _ in wanted])), target)
            total = total + loss.total + _far(prompts, concepts[[c for _, c in wanted]])
            values |= {"loss_mask": loss.cross_entropy.item(), "loss_dice": loss.dice.item(), "loss_iou": loss.iou.item()}
        descend(total, optimizer, rates)
        progress.add(values)
    return fcs, progress.history


# Files.


def write_frames(folder: Path, seed: int) -> None:
    """frames/ and annotations.json: clear frames that no training sees (their seeds are their own), in Sa2VA's finetune format."""
    frames = folder / "frames"
    frames.mkdir(parents=True)
    entries = []
    for index, (width, height) in enumerate(_FRAMES):
        rng = np.random.default_rng([seed, 1, index])
        while True:
            frame = generate(rng, height, width)
            mask = rasterize(frame.polygons["vessel"], height, width) > 0
            gray = frame.image.astype(np.float32)
            if mask.mean() > 0.025 and gray[~mask].std() > 8 and np.median(gray) - gray[mask].mean() > 20:
                break
        view, number, code = int(rng.integers(1, 10)), int(rng.integers(20, 90)), index + 1
        name = f"S{code:04d}({code:010d})_{view}-{index % 3 + 1}_1_{code:08d}_frame_{number:06d}.jpg"
        Image.fromarray(frame.image).save(frames / name, quality=85)
        present = [c for c in CONCEPTS if frame.polygons[c]]
        entries.append(
            {"image": name, "mask": [[simplified(p, height, width) for p in frame.polygons[c]] for c in present], "text": present}
        )
    text = "[\n" + ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries) + "\n]\n"
    (folder / "annotations.json").write_text(text, encoding="utf-8")


def publish(made: Path, out: Path) -> None:
    """Move what was made into `out`, one rename each, and drop older fine-tunes."""
    out.mkdir(parents=True, exist_ok=True)
    older = set(out.glob("iter_*.pth")) - {out / item.name for item in made.iterdir()}
    for item in made.iterdir():
        target = out / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    for checkpoint in older:
        checkpoint.unlink()
    made.rmdir()


def make(out: Path, data: Path | None, schedule: Schedule, seed: int, reuse_base: bool) -> None:
    """Stages 1 to 3, with all files. With `reuse_base` only stage 3: the rest is taken from `out`."""
    start = time.time()
    config = TinyConfig()
    torch.manual_seed(seed)
    made = out / ".making"
    shutil.rmtree(made, ignore_errors=True)
    (made / "base").mkdir(parents=True)
    yaml = (Path(__file__).parent / "sam2_tiny.yaml").read_text(encoding="utf-8")

    write_frames(made, seed)
    write_cines(made, seed)
    print(f"frames and cines written  {time.time() - start:.0f} s", flush=True)
    pool = generated_pool(seed, schedule.pool, 512, os.cpu_count() or 1)
    cines = cine_pool(seed, schedule.cines, 512, os.cpu_count() or 1)
    print(f"{len(pool)} generated frames, {len(cines)} of generated cines  {time.time() - start:.0f} s", flush=True)
    frames = read_real(data / "angiograms", 512) if data else {}
    real = [sample for number, sample in frames.items() if number not in HELD_OUT]
    setup = Setup(config, schedule, np.random.default_rng(seed), pool, cines, real)
    if reuse_base:
        shutil.rmtree(made / "base")
        shutil.copytree(out / "base", made / "base")
        shutil.copy(out / "sam2_tiny.pt", made)
    else:
        sam2 = train_sam2(setup, yaml)
        refine_sam2(setup, sam2)
        save_sam2(made / "sam2_tiny.pt", sam2)
        write_tokenizer(made / "base", merges=320)
        tokenizer = load_tokenizer(made / "base", finetuned=False)
        save_base(made / "base", train_base(setup, tokenizer), config, tokenizer)
    (made / "sam2_tiny.yaml").write_text(yaml, encoding="utf-8")

    sam2, model = build_sam2(yaml), load_base(made / "base", config)
    load_sam2(made / "sam2_tiny.pt", sam2)
    tokenizer = load_tokenizer(made / "base", finetuned=True)
    fcs, losses = finetune(setup, tokenizer, model, sam2)
    save_finetuned(made / f"iter_{len(losses)}.pth", model, fcs, sam2, config, losses, seed)
    publish(made, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the small model's files from a seed.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to (files of the same names are replaced)")
    parser.add_argument("--data", type=Path, help="folder that holds angiograms/ (real frames); without it only generated frames are used")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: right formats, useless weights")
    parser.add_argument("--seed", type=int, default=0)
    reuse = parser.add_mutually_exclusive_group()
    reuse.add_argument("--reuse-base", action="store_true", help="skip stages 1 and 2: take base/ and sam2_tiny.pt from --out")
    reuse.add_argument("--memory-only", action="store_true", help="only stage 4, on the files in --out; goes on where it was interrupted")
    arguments = parser.parse_args()
    start = time.time()
    if not arguments.memory_only:
        importlib.import_module("mmengine.runner")  # which saves the checkpoint: if it is not installed, say so now
        make(arguments.out, arguments.data, QUICK if arguments.quick else Schedule(), arguments.seed, arguments.reuse_base)
    train_memory(arguments.out, QUICK_MEMORY if arguments.quick else MemorySchedule(), arguments.seed)
    print(json.dumps({"seconds": round(time.time() - start), **evaluate(arguments.out, arguments.data)}))


if __name__ == "__main__":
    main()
