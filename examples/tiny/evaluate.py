"""Score the files of this folder: everything is read back from disk, decoded greedily, and compared with the annotations.

python examples/tiny/evaluate.py [--folder examples/tiny] [--data DATA]
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
from conversation import SEG, prompt_text
from data import HELD_OUT, mask_pixels, rasterize, tile_pixels
from formats import load_base, load_finetuned, load_sam2, load_tokenizer
from generator import CONCEPTS
from model import MaskBranch, TinyConfig, VisionLanguageModel, add_lora, build_sam2, prompt_head
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

__all__ = ["Predictor", "evaluate", "main"]

_NEW_TOKENS = 32


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

    @torch.no_grad()
    def answer(self, image: Image.Image, question: str) -> tuple[str, Tensor]:
        """The greedy answer and the states [masks, hidden] that consume its [SEG] tokens."""
        tokenizer, language_model = self.tokenizer, self.model.language_model
        patches = self.model.patches(tile_pixels(image, self.config.image_size))
        count = patches.shape[0] * self.config.tokens_per_tile
        ids = torch.tensor([tokenizer.encode(prompt_text(question, count), add_special_tokens=False)])
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
        best = F.interpolate(best, size=(side, side), mode="bilinear", align_corners=False)
        best = F.interpolate(best, size=(image.height, image.width), mode="bilinear", align_corners=False)
        return text, [mask.numpy() for mask in best[:, 0].sigmoid() > 0.5]


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
    arguments = parser.parse_args()
    print(json.dumps(evaluate(arguments.folder, arguments.data)))


if __name__ == "__main__":
    main()
