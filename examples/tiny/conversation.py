"""Questions and answers, and their tokens: Sa2VA's prompts (template qwen_chat, no system message) for two concepts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from data import Sample
from generator import CONCEPTS
from torch import Tensor

__all__ = ["IGNORE", "SEG", "SPECIAL_TOKENS", "Turn", "batch_of", "corpus", "image_turn", "prompt_text", "segmentation_turn"]

SEG = "[SEG]"
SPECIAL_TOKENS = (SEG, "<p>", "</p>", "<vp>", "</vp>")
"""What Sa2VA adds to InternVL3's vocabulary, in its order."""

IGNORE = -100

_QUESTIONS = (
    "Please segment {name} in this image.",
    "Can you segment the {name} in this image?",
    "Please identify and segment the {name} in this image.",
    "Could you provide a segmentation mask for the {name} in this image?",
    "Where is the {name} in this picture? Please respond with a segmentation mask.",
    "Can you highlight the {name} in this image with a segmentation mask?",
    "What is {name} in this image? Please respond with segmentation mask.",
    "What is {name} in this image? Please output segmentation mask.",
)
_QUESTION_SHARES = (0.3, *(0.1,) * 7)
_ANSWERS = (
    "It is {seg}.",
    "Sure, {seg}.",
    "Sure, it is {seg}.",
    "Sure, the segmentation result is {seg}.",
    "{seg}.",
)
_ANSWER_SHARES = (0.7, *(0.075,) * 4)
"""One answer is far likelier than the others, so that greedy decoding meets no near-tie."""

_KINDS = ("What kind of image is this?", "What does this image show?", "What is this?")
_KIND = "It is a coronary angiogram."


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question, its answer, and the concepts whose masks the answer's [SEG] tokens stand for, in order."""

    question: str
    answer: str
    concepts: tuple[int, ...] = ()


def segmentation_turn(rng: np.random.Generator, concepts: tuple[int, ...]) -> Turn:
    """Ask for the masks of one or more concepts."""
    question = _QUESTIONS[rng.choice(len(_QUESTIONS), p=_QUESTION_SHARES)]
    answer = _ANSWERS[rng.choice(len(_ANSWERS), p=_ANSWER_SHARES)]
    names = " and ".join(CONCEPTS[c] for c in concepts)
    return Turn(question.format(name=names), answer.format(seg=" and ".join([SEG] * len(concepts))), concepts)


def image_turn(rng: np.random.Generator, sample: Sample) -> Turn:
    """Ask something that the pixels answer in words."""
    kind = int(rng.integers(5))
    catheter = bool(sample.masks[1].any())
    side = "left" if sample.root[0] < 0.5 else "right"
    if kind == 0 or not all(sample.annotated):
        return Turn(str(rng.choice(_KINDS)), _KIND)
    if kind == 1:
        return Turn("Is there a catheter in this image?", "Yes, there is a catheter." if catheter else "No, there is no catheter.")
    if kind == 2:
        return Turn("On which side does the vessel tree begin?", f"On the {side}.")
    if kind == 3:
        return Turn("Is the background subtracted?", "Yes, it is subtracted." if sample.subtracted else "No, it is not subtracted.")
    with_catheter = "with" if catheter else "without"
    return Turn("Please describe this image.", f"A coronary angiogram {with_catheter} a catheter. The vessel tree begins on the {side}.")


def corpus() -> list[str]:
    """Every sentence above, to train the tokenizer on."""
    names = (*CONCEPTS, " and ".join(CONCEPTS))
    sentences = [q.format(name=name) for q in _QUESTIONS for name in names] + [a.format(seg=" and ") for a in _ANSWERS]
    rng = np.random.default_rng(0)
    blank = np.zeros((2, 1, 1), np.uint8)
    for mask in (blank, blank + 1):
        for x in (0.0, 1.0):
            turns = [image_turn(rng, Sample(blank[0], mask, (True, True), (x, 0.0), bool(mask.any()))) for _ in range(40)]
            sentences += [text for turn in turns for text in (turn.question, turn.answer)]
    return sorted(set(sentences) | {"user", "assistant", "system", _KIND, *_KINDS})


def prompt_text(question: str, image_tokens: int, images: int = 1) -> str:
    """The whole prompt, up to where the answer begins; each image has `image_tokens`."""
    shown = f"<img>{'<IMG_CONTEXT>' * image_tokens}</img>\n" * images
    return f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"


def batch_of(tokenizer: Any, turns: list[Turn], image_tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels [turns, longest], padded on the right; labels cover the answer and <|im_end|>."""
    rows = []
    for turn, count in zip(turns, image_tokens, strict=True):
        prompt = tokenizer.encode(prompt_text(turn.question, count), add_special_tokens=False)
        answer = tokenizer.encode(turn.answer + "<|im_end|>", add_special_tokens=False)
        rows.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for _, row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    return ids, mask, labels
