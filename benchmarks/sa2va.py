"""The reference compared with Sa2VA's own inference code, on images and on a cine: answers, masks and logits.

    python -m benchmarks.sa2va --sa2va CLONE --python PYTHON [--ckpt CKPT --base DIR --sam2 FILE] [--images DIR] [--cine 30]

CLONE is a clone of github.com/bytedance/Sa2VA at 9832e1a, PYTHON that of an environment in which its code runs (its pyproject.toml; without
flash-attn it falls back to eager attention). Sa2VA's `predict_forward` runs in a process of its own, in FP32 on the CPU; the reference runs
after it. benchmarks/peers/sa2va_peer.py says what it sets in Sa2VA's code. FP32 takes 4 bytes for each parameter.
Sa2VA's inference rounds two things to BF16 whatever the model's type, and the reference does not: ImageNet's mean and standard deviation
for SAM2, and the memories of a cine. So the images run without the first and with it, the cine without the second and with it.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import interpolate
from tqdm import tqdm

from benchmarks.measure import publish
from vessel_export.parity.reference import Reference
from vessel_export.parity.reference_cine import segment_cine
from vessel_export.parity.verify_cine import drawn_cine
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.metrics import iou
from vessel_rt.inputs.images import SUFFIXES

_TINY = Path("examples/tiny")
_PEER = Path(__file__).parent / "peers" / "sa2va_peer.py"
_QUESTIONS = ("Please segment vessel in this image.", "Please segment vessel and catheter in this image.")
_MAX_NEW_TOKENS = 128
_COMMIT = "9832e1a"
_SHA256 = {  # of its files in projects/sa2va/hf/models
    "modeling_sa2va_chat.py": "0f9516272e943b57a653199be51d6a6acb3512ef96880b02db5eafb361e4c7aa",
    "sam2.py": "c891b540bf92e102895c5eac17de64c14b7ea6184ded6d2359f24e8b46593fcc",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A question about an image, or about a cine of several files."""

    files: tuple[Path, ...]
    question: str
    cine: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """`logits` float32 [masks, frames, side, side] on SAM2's square, and `masks` bool [masks, frames, height, width]."""

    answer: str
    logits: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_]

    @classmethod
    def read(cls, path: Path) -> Found:
        """As benchmarks/peers/sa2va_peer.py saves it."""
        with np.load(path) as file:
            return cls(str(file["answer"]), file["logits"], file["masks"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sa2va", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sa2va", type=Path, required=True, metavar="CLONE", help=f"a clone of Sa2VA at {_COMMIT}")
    parser.add_argument("--python", type=Path, required=True, metavar="PYTHON", help="the Python of an environment in which Sa2VA runs")
    parser.add_argument("--ckpt", type=Path, default=_TINY / "iter_1000.pth", metavar="CKPT")
    parser.add_argument("--base", type=Path, default=_TINY / "base", metavar="DIR", help="in InternVL3's original layout")
    parser.add_argument("--sam2", type=Path, default=_TINY / "sam2_tiny.pt", metavar="FILE", help="without a .yaml beside it: Hiera-L")
    parser.add_argument("--images", type=Path, default=_TINY / "frames", metavar="DIR")
    parser.add_argument("--questions", nargs="+", default=list(_QUESTIONS), metavar="TEXT")
    parser.add_argument("--cine", type=int, default=30, metavar="N", help="frames of the drawn cine (default: 30)")
    arguments = parser.parse_args()
    try:
        images = [Case((file,), text, False) for file in _images(arguments.images) for text in arguments.questions]
        with tempfile.TemporaryDirectory() as folder:
            frames = _drawn_files(Path(folder), arguments.cine)
            cines = [Case(frames, text, True) for text in arguments.questions]
            runs = [("images", images, None), ("images", images, "constants"), ("cine", cines, None), ("cine", cines, "memories")]
            outputs = [_run_sa2va(arguments, cases, Path(folder, str(i)), rounded) for i, (_, cases, rounded) in enumerate(runs)]
            reference = Reference.load(arguments.ckpt, arguments.base, arguments.sam2)  # only now: with Sa2VA's it may not fit in memory
            layers = reference.language_model.config.num_hidden_layers
            rows = [
                {"case": name, "rounded": rounded, **_compare(reference, cases, output)}
                for (name, cases, rounded), output in zip(runs, outputs, strict=True)
            ]
    except VesselError as e:
        print(e, file=sys.stderr)
        return 1
    publish(
        f"sa2va-{layers}-layers",
        {"sa2va": _commit(arguments.sa2va), "peer": _versions(arguments.python), "cine_frames": arguments.cine, "runs": rows},
    )
    return 0


def _images(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise VesselError(f"{folder}: no images in this folder; give --images another")
    return files


def _drawn_files(folder: Path, count: int) -> tuple[Path, ...]:
    """The cine of `vessel-export verify --cine`, as PNG files."""
    files = tuple(folder / f"frame_{number:03}.png" for number in range(count))
    for file, frame in zip(files, drawn_cine(count), strict=True):
        frame.save(file)
    return files


def _run_sa2va(arguments: argparse.Namespace, cases: Sequence[Case], folder: Path, rounded: str | None) -> list[Path]:
    """Run Sa2VA's code on `cases`, and return the files of what it found. Makes `folder`."""
    checkpoint, yaml = open_checkpoint(arguments.ckpt), arguments.sam2.with_suffix(".yaml")
    folder.mkdir()
    trained, request = folder / "trained.safetensors", folder / "request.json"
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, trained)
    content = {
        "sa2va": str(arguments.sa2va.resolve()),
        "base": str(arguments.base.resolve()),
        "sam2": str(arguments.sam2.resolve()),
        "sam2_yaml": str(yaml.resolve()) if yaml.exists() else None,
        "trained": str(trained),
        "lora_alpha": checkpoint.lora_alpha,
        "max_new_tokens": _MAX_NEW_TOKENS,
        "rounded": rounded,
        "cases": [{"files": [str(f.resolve()) for f in case.files], "question": case.question, "cine": case.cine} for case in cases],
        "out": str(folder),
    }
    request.write_text(json.dumps(content), encoding="utf-8")
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen([arguments.python, _PEER, request], stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        lines = (line for line in process.stdout or () if line.strip().isdecimal())  # Sa2VA's code prints, too
        for _ in tqdm(lines, desc="Sa2VA", total=len(cases), disable=None):
            pass
        if process.wait() != 0:
            errors.seek(0)
            raise VesselError(f"{arguments.python}: Sa2VA's code ended with code {process.returncode}: {errors.read()[-2000:]}")
    trained.unlink()
    return [folder / f"{number}.npz" for number in range(len(cases))]


def _compare(reference: Reference, cases: Sequence[Case], found: Sequence[Path]) -> dict[str, Any]:
    """The figures of all cases together. Masks are compared where the answers are identical."""
    answers = masks = differing = pixels = 0
    least, largest = 1.0, 0.0
    for case, file in zip(tqdm(cases, desc="reference", disable=None), found, strict=True):
        ours, theirs = _reference(reference, case), Found.read(file)
        if ours.answer != theirs.answer:  # then they may not have masks of the same objects
            continue
        answers += 1
        if ours.masks.shape != theirs.masks.shape:
            raise VesselError(f"a case has masks {theirs.masks.shape} by Sa2VA's code and {ours.masks.shape} by the reference")
        pairs = [pair for frames in zip(ours.masks, theirs.masks, strict=True) for pair in zip(*frames, strict=True)]
        masks += len(pairs)
        pixels += ours.masks.size
        differing += int((ours.masks != theirs.masks).sum())
        least = min([least, *(iou(a, b) for a, b in pairs)])
        largest = max(largest, float(np.abs(ours.logits - theirs.logits).max(initial=0)))
    return {
        "runs": len(cases),
        "identical_answers": answers,
        "masks": masks,
        "pixels": pixels,
        "differing_pixels": differing,
        "min_iou": round(least, 6),
        "max_logit_difference": float(f"{largest:.2g}"),
    }


def _reference(reference: Reference, case: Case) -> Found:
    frames = [Image.open(file).convert("RGB") for file in case.files]
    if case.cine:
        cine = segment_cine(reference, frames, case.question, max_new_tokens=_MAX_NEW_TOKENS)
        answer = reference.tokenizer.decode(cine.answer_ids, skip_special_tokens=False).strip()
        low_res, masks = cine.low_res_logits, cine.masks
    else:
        result = reference.segment(frames[0], case.question, max_new_tokens=_MAX_NEW_TOKENS)
        answer, low_res, masks = result.answer, result.prediction.low_res_logits[:, None], result.masks[:, None]
    side = reference.sam2.image_size
    logits = interpolate(low_res, size=(side, side), mode="bilinear", align_corners=False)
    return Found(answer, logits.numpy(), masks.numpy())


def _commit(clone: Path) -> str | None:
    """The commit, or None if it is another one."""
    folder = clone / "projects" / "sa2va" / "hf" / "models"
    same = all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in _SHA256.items())
    return _COMMIT if same else None


def _versions(python: Path) -> dict[str, str]:
    """Of the libraries in Sa2VA's environment."""
    program = "import json, peft, torch, transformers; print(json.dumps({m.__name__: m.__version__ for m in (peft, torch, transformers)}))"
    versions: dict[str, str] = json.loads(subprocess.run([python, "-c", program], capture_output=True, check=True, text=True).stdout)
    return versions


if __name__ == "__main__":
    raise SystemExit(main())
