"""The reference compared with Sa2VA's own inference code, on images and on a cine: answers, masks and logits.

    python -m benchmarks.sa2va --sa2va CLONE --python PYTHON [--ckpt CKPT --base DIR --sam2 FILE] [--images DIR] [--cine 30]

CLONE is a clone of github.com/bytedance/Sa2VA, PYTHON that of an environment in which its code runs (its pyproject.toml; flash-attn is not
needed). Sa2VA's `predict_forward` runs in a process of its own, in FP32 on the CPU, and the reference after it: 4 bytes for each parameter,
and the base model's largest file. benchmarks/peers/sa2va_peer.py says what it sets in Sa2VA's code.
Sa2VA's inference rounds two things to BF16, whatever the model's type, and the reference does not: ImageNet's mean and standard deviation
for SAM2 (`constants`), and the memories of a cine. Images and cine run without this and with it. The last line is JSON.
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
from vessel_export.parity.inputs import read_samples
from vessel_export.parity.reference import Reference
from vessel_export.parity.reference_cine import segment_cine
from vessel_export.parity.verify_cine import drawn_cine
from vessel_export.sources.base_config import read_json
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_export.sources.sam2_files import find_sam2_yaml, read_sam2_config
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.metrics import iou

_TINY = Path("examples/tiny")
_PEER = Path(__file__).parent / "peers" / "sa2va_peer.py"
_QUESTIONS = ("Please segment vessel in this image.", "Please segment vessel and catheter in this image.")
_MAX_NEW_TOKENS = 128
_LEAST_FRAMES = 6  # of a cine: Sa2VA prompts five, and tracks the others
_ROUNDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "images": ((), ("constants",)),
    "cine": ((), ("memories",), ("constants", "memories")),
}
_COMMIT = "9832e1a"
_SHA256 = "f31e1fdf4b0fde025c831552ccaabd1225984488cc2deab80098c203b678273f"
_SOURCES = ("configuration_intern_vit", "configuration_sa2va_chat", "modeling_intern_vit", "modeling_sa2va_chat", "sam2", "templates")
_LIBRARIES = ("torch", "transformers", "peft", "torchvision", "timm")


@dataclasses.dataclass(frozen=True)
class Case:
    """A question about an image, or about a cine of several files. `kind` is `images` or `cine`."""

    kind: str
    files: tuple[Path, ...]
    question: str


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


@dataclasses.dataclass
class Figures:
    """What was compared, and how it differs. Masks are compared where the answers are identical and as many masks were made.

    `other_counts`: identical answers with other numbers of masks. Sa2VA makes none of a [SEG] that ends the token budget.
    """

    runs: int = 0
    identical_answers: int = 0
    other_counts: int = 0
    masks: int = 0
    pixels: int = 0
    differing_pixels: int = 0
    min_iou: float = 1.0
    max_logit_difference: float = 0.0

    def add(self, ours: Found, theirs: Found) -> None:
        """Compare one answer. Raises VesselError for logits that are not finite."""
        self.runs += 1
        if ours.answer != theirs.answer:  # then the masks may be of other objects
            return
        self.identical_answers += 1
        if len(ours.masks) != len(theirs.masks):
            self.other_counts += 1
            return
        if not (np.isfinite(ours.logits).all() and np.isfinite(theirs.logits).all()):
            raise VesselError("logits that are not finite: nothing can be compared with them")
        for a, b in zip(ours.masks, theirs.masks, strict=True):
            self.masks += len(a)
            self.pixels += a.size
            self.differing_pixels += int((a != b).sum())
            self.min_iou = min(self.min_iou, *(iou(*pair) for pair in zip(a, b, strict=True)))
        if len(ours.masks):
            self.max_logit_difference = max(self.max_logit_difference, float(np.abs(ours.logits - theirs.logits).max()))

    def row(self) -> dict[str, Any]:
        """Raises VesselError if there was no mask to compare."""
        if not self.masks:
            raise VesselError("no mask was compared: no answer has a [SEG], or all of Sa2VA's answers differ; check --questions and --ckpt")
        rounded = {"min_iou": round(self.min_iou, 6), "max_logit_difference": float(f"{self.max_logit_difference:.2g}")}
        return dataclasses.asdict(self) | rounded


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sa2va", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sa2va", type=Path, required=True, metavar="CLONE", help=f"a clone of Sa2VA; the documented figures: {_COMMIT}")
    parser.add_argument("--python", type=Path, required=True, metavar="PYTHON", help="the Python of an environment in which Sa2VA runs")
    parser.add_argument("--ckpt", type=Path, default=_TINY / "iter_1000.pth", metavar="CKPT")
    parser.add_argument("--base", type=Path, default=_TINY / "base", metavar="DIR", help="in InternVL3's original layout")
    parser.add_argument("--sam2", type=Path, default=_TINY / "sam2_tiny.pt", metavar="FILE")
    parser.add_argument("--lora-alpha", type=float, metavar="A", help="in place of the checkpoint's")
    parser.add_argument("--images", type=Path, default=_TINY / "frames", metavar="DIR")
    parser.add_argument("--questions", nargs="+", default=list(_QUESTIONS), metavar="TEXT")
    parser.add_argument(
        "--cine", type=int, default=30, metavar="N", help=f"frames of the drawn cine, at least {_LEAST_FRAMES} (default: 30)"
    )
    parser.add_argument("--name", default="tiny", help="of the result, results/sa2va-NAME.json (default: tiny)")
    arguments = parser.parse_args()
    if arguments.cine < _LEAST_FRAMES:
        parser.error(f"--cine {arguments.cine}: a cine of fewer than {_LEAST_FRAMES} frames is not tracked")
    try:
        commit, versions = _commit(arguments.sa2va), _versions(arguments.python)
        with tempfile.TemporaryDirectory() as folder:
            images = _saved([sample.reference for sample in read_samples([arguments.images])], Path(folder), "image")
            frames = _saved(drawn_cine(arguments.cine), Path(folder), "frame")
            cases = [Case("images", (file,), text) for file in images for text in arguments.questions]
            cases += [Case("cine", frames, text) for text in arguments.questions]
            files = _run_sa2va(arguments, cases, Path(folder))
            # only now: with Sa2VA's model it may not fit in memory
            reference = Reference.load(arguments.ckpt, arguments.base, arguments.sam2, lora_alpha=arguments.lora_alpha)
            rows = _compare(reference, cases, files)
    except VesselError as e:
        print(e, file=sys.stderr)
        return 1
    result = {
        "sa2va": commit,
        "peer": versions,
        "layers": reference.language_model.config.num_hidden_layers,
        "images": len(images),
        "questions": arguments.questions,
        "cine_frames": arguments.cine,
        "runs": rows,
    }
    publish(f"sa2va-{arguments.name}", result)
    return 0


def _commit(clone: Path) -> str | None:
    """The commit, if its files are those of _COMMIT."""
    folder, digest = clone / "projects" / "sa2va" / "hf" / "models", hashlib.sha256()
    try:
        for name in _SOURCES:
            digest.update((folder / f"{name}.py").read_bytes())
    except OSError as e:
        raise VesselError(f"{clone}: not a clone of Sa2VA with {e.filename}: {e.strerror}; give --sa2va another") from e
    if digest.hexdigest() == _SHA256:
        return _COMMIT
    print(f"{clone}: other files than those of {_COMMIT}; the comparison is with these", file=sys.stderr)
    return None


def _versions(python: Path) -> dict[str, str]:
    """Of the libraries in Sa2VA's environment; those of files without metadata are left out."""
    program = (
        "import json, importlib.metadata as m; found = {d.metadata['Name']: d.version for d in m.distributions()}; print(json.dumps(found))"
    )
    try:
        output = subprocess.run([python, "-c", program], capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise VesselError(f"{python}: cannot be run: {e}; give --python that of Sa2VA's environment") from e
    versions: dict[str, str] = json.loads(output)
    return {name: versions[name] for name in _LIBRARIES if name in versions}


def _saved(images: Sequence[Image.Image], folder: Path, name: str) -> tuple[Path, ...]:
    """The images as PNG files, for both sides to read."""
    files = tuple(folder / f"{name}_{number:03}.png" for number in range(len(images)))
    for file, image in zip(files, images, strict=True):
        image.save(file)
    return files


def _run_sa2va(arguments: argparse.Namespace, cases: Sequence[Case], folder: Path) -> dict[tuple[Case, tuple[str, ...]], Path]:
    """Run Sa2VA's code on `cases`, and return the files in `folder` of what it found, by case and what was rounded."""
    trained, request = folder / "trained.safetensors", folder / "request.json"
    runs = [(case, rounded) for case in cases for rounded in _ROUNDED[case.kind]]
    content = _request(arguments, trained) | {
        "cases": [
            {"files": [str(f.resolve()) for f in case.files], "question": case.question, "cine": case.kind == "cine", "rounded": rounded}
            for case, rounded in runs
        ],
        "out": str(folder),
    }
    request.write_text(json.dumps(content), encoding="utf-8")
    command = [arguments.python, _PEER, request]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        lines = (line for line in process.stdout or () if line.strip().isdecimal())  # Sa2VA's code prints, too
        for _ in tqdm(lines, desc="Sa2VA", total=len(runs), disable=None):
            pass
    trained.unlink()
    if process.returncode:
        killed = f"was killed (signal {-process.returncode}); if it ran out of memory, use a larger machine"
        told = killed if process.returncode < 0 else f"ended with code {process.returncode}; its message is above"
        raise VesselError(f"{arguments.python}: Sa2VA's code {told}")
    return {run: folder / f"{number}.npz" for number, run in enumerate(runs)}


def _request(arguments: argparse.Namespace, trained: Path) -> dict[str, Any]:
    """The model, as the peer needs it. Writes the checkpoint's tensors to `trained`.

    Raises:
        VesselError: an input that cannot be read or that Sa2VA's code does not take.
    """
    checkpoint, config = open_checkpoint(arguments.ckpt), arguments.base / "config.json"
    alpha = checkpoint.lora_alpha if arguments.lora_alpha is None else arguments.lora_alpha
    if alpha is None:
        raise VesselError(f"{arguments.ckpt}: does not record LoRA's alpha; give it with --lora-alpha")
    if read_json(config).get("model_type") != "internvl_chat":
        raise VesselError(
            f"{config}: not InternVL3's original layout (model_type internvl_chat), which Sa2VA's code reads; give --base that"
        )
    yaml = find_sam2_yaml(arguments.sam2)
    hiera_l = yaml.name == "sam2_hiera_l.yaml" and yaml.parent != arguments.sam2.parent  # what Sa2VA's own constructor builds
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, trained)
    return {
        "sa2va": str(arguments.sa2va.resolve()),
        "base": str(arguments.base.resolve()),
        "sam2": str(arguments.sam2.resolve()),
        "sam2_config": None if hiera_l else read_sam2_config(yaml),
        "trained": str(trained),
        "lora_alpha": alpha,
        "lora_rank": checkpoint.lora_rank,
        "max_new_tokens": _MAX_NEW_TOKENS,
    }


def _compare(reference: Reference, cases: Sequence[Case], files: dict[tuple[Case, tuple[str, ...]], Path]) -> list[dict[str, Any]]:
    """A row of figures for each kind of case and what was rounded."""
    figures = {(kind, rounded): Figures() for kind, ways in _ROUNDED.items() for rounded in ways}
    for case in tqdm(cases, desc="reference", disable=None):
        ours = _reference(reference, case)
        for rounded in _ROUNDED[case.kind]:
            figures[case.kind, rounded].add(ours, Found.read(files[case, rounded]))
    return [{"case": kind, "rounded": rounded, **found.row()} for (kind, rounded), found in figures.items()]


def _reference(reference: Reference, case: Case) -> Found:
    frames = [Image.open(file).convert("RGB") for file in case.files]
    if case.kind == "cine":
        cine = segment_cine(reference, frames, case.question, max_new_tokens=_MAX_NEW_TOKENS)
        answer, low_res, masks = cine.answer, cine.low_res_logits, cine.masks
    else:
        result = reference.segment(frames[0], case.question, max_new_tokens=_MAX_NEW_TOKENS)
        answer, low_res, masks = result.answer, result.prediction.low_res_logits[:, None], result.masks[:, None]
    side = reference.sam2.image_size
    logits = interpolate(low_res, size=(side, side), mode="bilinear", align_corners=False)
    return Found(answer, logits.numpy(), masks.numpy())


if __name__ == "__main__":
    raise SystemExit(main())
