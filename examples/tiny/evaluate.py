"""Score the files of this folder: everything is read back from disk, decoded greedily, and compared with the annotations.

python examples/tiny/evaluate.py [--folder examples/tiny] [--data DATA]
python examples/tiny/evaluate.py [--folder examples/tiny] --cines 8
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cines import cine_masks, clear_cine, read_cine
from conversation import SEG, prompt_text
from data import HELD_OUT, mask_pixels, rasterize, tile_pixels
from formats import load_base, load_finetuned, load_sam2, load_tokenizer
from generator import CONCEPTS
from model import Features, MaskBranch, TinyConfig, Tracker, VisionLanguageModel, add_lora, build_sam2, prompt_head
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

__all__ = ["Predictor", "evaluate", "evaluate_cines", "main"]

Masks = NDArray[np.bool_]

_NEW_TOKENS = 32
_SHOWN = 5  # frames of a cine that Sa2VA's language model sees, and that it prompts


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The fine-tuned model as it is on disk, in float32."""

    tokenizer: Any
    model: VisionLanguageModel
    fcs: nn.Module
    masks: MaskBranch
    config: TinyConfig

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Read `base/`, `sam2_tiny.*` and the newest `iter_*.pth` of `folder`."""
        config = TinyConfig()
        tokenizer = load_tokenizer(folder / "base", finetuned=True)
        model = load_base(folder / "base", config)
        add_lora(model, config, len(tokenizer))
        sam2 = build_sam2((folder / "sam2_tiny.yaml").read_text(encoding="utf-8"))
        load_sam2(folder / "sam2_tiny.pt", sam2)
        fcs = prompt_head(config.hidden, sam2.hidden_dim)
        newest = max(folder.glob("iter_*.pth"), key=lambda path: int(path.stem.removeprefix("iter_")))
        load_finetuned(newest, model, fcs, sam2)
        return cls(tokenizer, model.eval(), fcs.eval(), MaskBranch(sam2).eval(), config)

    def answer(self, image: Image.Image, question: str) -> tuple[str, Tensor]:
        """The greedy answer and the states [masks, hidden] that consume its [SEG] tokens."""
        return self._answer(tile_pixels(image, self.config.image_size), 1, question)

    def answer_cine(self, frames: list[Image.Image], question: str) -> tuple[str, Tensor]:
        """As `answer`, for frames shown together, one tile each."""
        tiles = torch.cat([tile_pixels(frame, self.config.image_size, most=1) for frame in frames])
        return self._answer(tiles, len(frames), question)

    @torch.no_grad()
    def _answer(self, tiles: Tensor, images: int, question: str) -> tuple[str, Tensor]:
        tokenizer, language_model = self.tokenizer, self.model.language_model
        patches = self.model.patches(tiles)
        count = len(tiles) // images * self.config.tokens_per_tile
        ids = torch.tensor([tokenizer.encode(prompt_text(question, count, images), add_special_tokens=False)])
        embeds = self.model.embed(ids, patches, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
        seg, stop = tokenizer.convert_tokens_to_ids(SEG), tokenizer.convert_tokens_to_ids("<|im_end|>")
        new: list[int] = []
        states, cache = [], None
        while len(new) < _NEW_TOKENS:
            output = language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, output_hidden_states=True)
            if new and new[-1] == seg:
                states.append(output.hidden_states[-1][0, -1])
            token = int(output.logits[0, -1].argmax())
            if token == stop:
                break
            new.append(token)
            cache = output.past_key_values
            embeds = language_model.get_input_embeddings()(torch.tensor([[token]]))
        return tokenizer.decode(new), torch.stack(states) if states else torch.zeros(0, self.config.hidden)

    @torch.no_grad()
    def segment(self, image: Image.Image, question: str) -> tuple[str, list[NDArray[np.bool_]]]:
        """The answer and a mask [height, width] for each of its [SEG] tokens."""
        text, states = self.answer(image, question)
        if not len(states):
            return text, []
        side = self.masks.sam2.image_size
        features = self.masks.encode(mask_pixels(image, side)[None])
        logits, iou, _ = self.masks.decode(features, self.fcs(states), torch.zeros(len(states), dtype=torch.long))
        best = logits[torch.arange(len(states)), iou.argmax(dim=1)][:, None]
        return text, list(self._masks(best, image))

    def _masks(self, logits: Tensor, image: Image.Image) -> Masks:
        """The masks [masks, height, width] on an image of low-res logits [masks, 1, side, side]."""
        side = self.masks.sam2.image_size
        best = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)
        best = F.interpolate(best, size=(image.height, image.width), mode="bilinear", align_corners=False)
        found: Masks = (best[:, 0].sigmoid() > 0.5).numpy()
        return found

    @torch.no_grad()
    def features(self, image: Image.Image) -> Features:
        """SAM2's features of a frame, for `carry`."""
        return self.masks.encode_frames(mask_pixels(image, self.masks.sam2.image_size)[None])

    @torch.no_grad()
    def carry(self, frames: list[Image.Image], features: list[Features], prompts: dict[int, Tensor], gated: bool) -> Masks:
        """The masks [frames, height, width] of one object, prompted on some frames by `prompts` [1, d_model] and carried to the others:
        forwards from the first prompted frame, then backwards from it. If `gated`, the object score empties a carried mask."""
        forwards = Tracker(self.masks, len(frames), gated)
        found = {}
        for place, prompt in sorted(prompts.items()):
            decoded = self.masks.decode_frames(features[place], prompt)
            forwards.remember(place, features[place][2], decoded.mask, decoded.token, decoded.score)
            found[place] = decoded.mask
        first = min(prompts)
        for place in range(first + 1, len(frames)):
            if place not in prompts:
                found[place] = forwards.mask(forwards.propagate(place, features[place]))
        backwards = dataclasses.replace(forwards, propagated={})
        for place in reversed(range(first)):
            found[place] = backwards.mask(backwards.propagate(place, features[place], backwards=True))
        return np.concatenate([self._masks(found[place][:, None], frame) for place, frame in enumerate(frames)])


@torch.no_grad()
def evaluate_cines(predictor: Predictor, cines: dict[str, tuple[list[Image.Image], Masks]], question: str) -> dict[str, Any]:
    """How well `question` finds the true masks of cines (frames, and masks [frames, height, width]), in four ways: every frame alone; the
    first five frames prompted and carried forwards, as in Sa2VA; and the one or three frames whose masks are the largest, each prompted
    by its own answer, carried both ways and gated.

    `dice` is the mean over the frames that have the object, `volume_dice` that of a whole cine, `false_area` the mean share of the frame
    that is found in the others, and `steadiness` the mean IoU of consecutive masks; `truth` has that of the true masks.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, (frames, truth) in cines.items():
        features = [predictor.features(frame) for frame in frames]
        prompts = [predictor.fcs(predictor.answer(frame, question)[1][:1]) for frame in frames]
        alone = np.stack(
            [predictor.carry([frame], [f], {0: p}, gated=False)[0] for frame, f, p in zip(frames, features, prompts, strict=True)]
        )
        largest = [int(place) for place in np.argsort(-alone.sum(axis=(1, 2)), kind="stable")]
        shown = predictor.fcs(predictor.answer_cine(frames[:_SHOWN], question)[1][:1])
        first = dict.fromkeys(range(_SHOWN), shown)
        ways = {
            "alone": alone,
            "first five": predictor.carry(frames, features, first, gated=False),
            "best": predictor.carry(frames, features, {place: prompts[place] for place in largest[:1]}, gated=True),
            "best three": predictor.carry(frames, features, {place: prompts[place] for place in largest[:3]}, gated=True),
            "truth": truth,
        }
        scores[name] = {way: _cine_scores(found, truth) for way, found in ways.items()}
    means = {
        way: {key: round(float(np.nanmean([score[way][key] for score in scores.values()])), 4) for key in score}
        for way, score in next(iter(scores.values())).items()
    }
    each = {name: {way: round(values["dice"], 3) for way, values in score.items()} for name, score in scores.items()}
    return {"mean": means, "dice of each": each}


def _cine_scores(found: Masks, truth: Masks) -> dict[str, float]:
    present = truth.any(axis=(1, 2))
    both, either = (found[1:] & found[:-1]).sum(axis=(1, 2)), (found[1:] | found[:-1]).sum(axis=(1, 2))
    return {
        "dice": float(np.mean([dice(f, t) for f, t in zip(found[present], truth[present], strict=True)])),
        "volume_dice": dice(found, truth),
        "false_area": float(found[~present].mean()) if not present.all() else float("nan"),
        "steadiness": float(np.mean(both[either > 0] / either[either > 0])),
    }


def generated_cines(seed: int, count: int) -> dict[str, tuple[list[Image.Image], Masks]]:
    """Cines that no training sees, and their vessel masks."""
    cines = {}
    for index in range(count):
        drawn = clear_cine(np.random.default_rng([seed, 4, index]), 24, 384, 384, f"S{201 + index:04d}")
        cines[f"S{201 + index:04d}"] = ([Image.fromarray(frame.image).convert("RGB") for frame in drawn], cine_masks(drawn, "vessel"))
    return cines


def dice(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|); 1 if both are empty."""
    total = int(prediction.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2 * int((prediction & truth).sum()) / total


def evaluate(folder: Path, data: Path | None) -> dict[str, object]:
    """Mean Dice by concept on `folder/frames` and, where `data` is given, on the held-out real frames; and how answers look."""
    predictor = Predictor.load(folder)
    scores: dict[str, list[float]] = {"frames_vessel": [], "frames_catheter": [], "frames_both": []}
    answers: dict[str, int] = {}

    def score(key: str, image: Image.Image, concepts: list[str], truths: list[NDArray[np.bool_]]) -> None:
        text, masks = predictor.segment(image, f"Please segment {' and '.join(concepts)} in this image.")
        answers[text] = answers.get(text, 0) + 1
        masks += [np.zeros_like(truths[0])] * (len(truths) - len(masks))
        scores.setdefault(key, []).extend(dice(m, t) for m, t in zip(masks, truths, strict=False))

    for entry in json.loads((folder / "annotations.json").read_text(encoding="utf-8")):
        image = Image.open(folder / "frames" / entry["image"])
        truths = {t: rasterize(m, image.height, image.width) > 0 for t, m in zip(entry["text"], entry["mask"], strict=True)}
        for concept, truth in truths.items():
            score(f"frames_{concept}", image, [concept], [truth])
        if len(truths) == len(CONCEPTS):
            score("frames_both", image, list(CONCEPTS), [truths[c] for c in CONCEPTS])
    for number in HELD_OUT if data else ():
        real = data / "angiograms"  # type: ignore[operator]
        image = Image.open(real / f"{number}.png")
        score("real_vessel", image, ["vessel"], [np.asarray(Image.open(real / f"{number}_gt.png").convert("L")) > 127])
    means = {key: round(float(np.mean(values)), 4) for key, values in scores.items() if values}
    each = {key: [round(v, 3) for v in values] for key, values in scores.items()}
    return {**means, "answers": answers, "each": each}


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the small model as it is on disk.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where base/, sam2_tiny.* and iter_*.pth lie")
    parser.add_argument("--data", type=Path, help="folder that holds angiograms/ (real frames)")
    parser.add_argument("--cines", type=int, metavar="N", help="score vessels in cines/ and in N generated cines instead of single frames")
    arguments = parser.parse_args()
    if arguments.cines is None:
        print(json.dumps(evaluate(arguments.folder, arguments.data)))
        return
    predictor, question = Predictor.load(arguments.folder), "Please segment vessel in this image."
    shipped = {path.stem: read_cine(path) for path in sorted((arguments.folder / "cines").glob("*.dcm"))}
    sets = {
        "cines/": {name: (frames, masks["vessel"]) for name, (frames, masks) in shipped.items()},
        "generated": generated_cines(0, arguments.cines),
    }
    for name, cines in sets.items():
        print(json.dumps({name: evaluate_cines(predictor, cines, question)} if cines else {}), flush=True)


if __name__ == "__main__":
    main()
