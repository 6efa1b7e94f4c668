"""What fewer bits do to answers and masks: examples/tiny in every type of activations and weights, against itself in FP32.

    python -m benchmarks.quantization [--angiograms DIR]

Exports examples/tiny in each type and runs every bundle on the CPU; those whose activations are FP16 or BF16 are emulated, as by
`vessel-export verify --emulate`. Rows of single stages and matrices show which of them move the masks. `--angiograms` names a
folder of frames `N.png` with masks `N_gt.png`, which are not part of this project. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tqdm import tqdm

from benchmarks.measure import publish
from benchmarks.static_int8 import calibrate, matrix_of, products_of, stored_tensors, with_static_activations
from vessel_export.bundle.bundle_writer import ExportRequest, export_bundle
from vessel_export.graphs.assemble import Graph, save_graph
from vessel_export.graphs.quantize import Form, MatrixType, quantize_graph, with_quantized
from vessel_export.graphs.sam2_image_encoder import weights_of_fine_features
from vessel_export.io.safetensors_writer import write_safetensors
from vessel_export.parity.emulate import emulate
from vessel_rt.device.deployment import Deployment, deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.ground_truth import GroundTruth, read_truth
from vessel_rt.evaluation.metrics import cldice, dice, hd95, iou
from vessel_rt.formats.bundle import STAGES, Bundle
from vessel_rt.formats.recipe import WEIGHTS, load_recipe
from vessel_rt.inputs.images import SUFFIXES, read_image
from vessel_rt.model.segmenter import Segmenter

_TINY = Path("examples/tiny")
_QUESTIONS = ("Please segment vessel in this image.", "Please segment vessel and catheter in this image.")
# A row's name; the recipe's precision and weights; whether it keeps what `cpu-int8` keeps; and whether it is emulated.
_BUNDLES = (
    ("FP32", "fp32", None, False, False),
    ("FP16, emulated", "fp16", None, False, True),
    ("BF16, emulated", "bf16", None, False, True),
    ("INT8, FP32 activations (cpu-int8)", "fp32", "int8", True, False),
    ("INT8, FP16 activations (rtx3090-int8), emulated", "fp16", "int8", True, True),
    ("INT8, FP32 activations, all matrices", "fp32", "int8", False, False),
    ("INT8, FP16 activations, all matrices, emulated", "fp16", "int8", False, True),
    ("INT4, FP32 activations, all matrices", "fp32", "int4", False, False),
    ("INT4, FP16 activations, all matrices, emulated", "fp16", "int4", False, True),
)
# W8A8: what keeps FP32 matrices and activations.
_STATIC = (
    ("nothing", ()),
    ("k_proj", ("*.k_proj.weight",)),
    ("k_proj and down_proj", ("*.k_proj.weight", "*.down_proj.weight")),
    ("the whole language model", ("layers.*", "lm_head.weight")),
)
_SHOWN = 8  # single matrices
_ENCODER = "sam2_image_encoder"

_Masks = list[npt.NDArray[np.bool_]]


@dataclasses.dataclass(frozen=True)
class _Frames:
    """Images, the questions about each, and their ground truth."""

    name: str
    paths: tuple[Path, ...]
    questions: tuple[str, ...]
    truth: GroundTruth


@dataclasses.dataclass(frozen=True)
class _Run:
    """Answers and masks by image and question."""

    answers: dict[tuple[Path, str], str]
    masks: dict[tuple[Path, str], _Masks]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--angiograms", type=Path, metavar="DIR", help="more frames: N.png, with the masks N_gt.png")
    arguments = parser.parse_args()
    try:
        sets = [_Frames("examples/tiny", _images(_TINY / "frames"), _QUESTIONS, read_truth(_TINY / "annotations.json"))]
        if arguments.angiograms:
            sets.append(_Frames("angiograms", _images(arguments.angiograms), _QUESTIONS[:1], read_truth(arguments.angiograms)))
        with tempfile.TemporaryDirectory() as folder:
            result = {"sets": {frames.name: {"images": len(frames.paths), "questions": len(frames.questions)} for frames in sets}}
            publish("quantization", result | _measured(Path(folder), sets))
    except VesselError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


def _images(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.stem.endswith("_gt")))


def _measured(folder: Path, sets: Sequence[_Frames]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    first: dict[str, _Run] = {}

    def add(name: str, deployment: Deployment, size: int | None, chosen: Sequence[_Frames]) -> None:
        print(name, file=sys.stderr)
        found = {}
        for frames in chosen:
            run = _segment(deployment, frames)
            found[frames.name] = _scores(frames, first.setdefault(frames.name, run), run)
        rows.append({"name": name, "weights_bytes": size, "sets": found})

    for name, precision, matrices, kept, emulated in _BUNDLES:
        bundle = _export(folder / str(len(rows)), precision, matrices, kept)
        size = sum(record.bytes for file, record in bundle.files.items() if file.startswith("weights/"))
        add(name, emulate(bundle) if emulated else deploy(bundle, Device("cpu")), size, sets)
    whole = rows
    rows = []
    base = Bundle.load(folder / "0")
    for weights in WEIGHTS:
        graphs = {stage: _quantized_graph(base, stage, MatrixType.named(weights)) for stage in STAGES}
        for stages in (*((stage,) for stage in STAGES), ("vision_encoder", "language_model"), STAGES):
            name = f"{weights.upper()}: {'all stages' if len(stages) == len(STAGES) else ' and '.join(stages)}"
            add(name, _with_graphs(base, {stage: graphs[stage] for stage in stages}), None, sets[:1])
        if weights == "int8":
            coarse = {_ENCODER: _quantized_graph(base, _ENCODER, MatrixType.named(weights), coarse=True)}
            add(f"INT8: {_ENCODER}, without what fpn_0 and fpn_1 depend on", _with_graphs(base, coarse), None, sets[:1])
    by_stage = rows
    rows = []
    peaks = calibrate(base, sets[0].paths, sets[0].questions)
    for name, unrounded in _STATIC:
        add(name, with_static_activations(base, base.folder / f"static-{len(rows)}", peaks, unrounded), None, sets)
    static = rows
    rows = []
    for stage, names in _matrices(base).items():
        for matrix in names:
            keep = [name for name in names if name != matrix]
            graph = _quantized_graph(base, stage, MatrixType.named("int8"), keep)
            add(f"{stage}: {matrix}", _with_graphs(base, {stage: graph}), None, sets[:1])
    rows.sort(key=lambda row: row["sets"][sets[0].name]["mean_iou"])
    return {"bundles": whole, "stages": by_stage, "static": static, "matrices": rows[:_SHOWN]}


def _with_graphs(base: Bundle, graphs: Mapping[str, Path]) -> Deployment:
    """The bundle with other graphs of some stages."""
    return Deployment(base, Device("cpu"), {name: base.folder / spec.file for name, spec in base.stages.items()} | dict(graphs))


def _matrices(base: Bundle) -> dict[str, list[str]]:
    """What an export may quantize, by stage."""
    found: dict[str, list[str]] = {}
    for stage in ("vision_encoder", "language_model", _ENCODER):
        graph = ir.load(base.folder / base.stages[stage].file).graph
        found[stage] = [matrix_of(node) for node in products_of(graph)]
    return found


def _export(out: Path, precision: str, weights: str | None, keep: bool) -> Bundle:
    kept = load_recipe("cpu-int8").keep if keep else ()
    recipe = msgspec.structs.replace(load_recipe("cpu"), precision=precision, weights=weights, keep=kept)
    (checkpoint,) = _TINY.glob("iter_*.pth")
    return export_bundle(ExportRequest(checkpoint, str(_TINY / "base"), str(_TINY / "sam2_tiny.pt"), out, recipe)).bundle


def _quantized_graph(bundle: Bundle, stage: str, kind: MatrixType, keep: Sequence[str] = (), *, coarse: bool = False) -> Path:
    """A stage's graph with its matrices quantized, in the bundle's folder: also those that an export leaves as they are."""
    form: Form = "MatMulIntegerToFloat" if (stage, kind.name) == (_ENCODER, "int8") else "MatMulNBits"
    model = ir.load(bundle.folder / bundle.stages[stage].file)
    tensors = stored_tensors(bundle, model)
    graph = Graph(stage, model, 0, 0)
    exempt = dict.fromkeys(weights_of_fine_features(graph), "") if coarse else {}
    blocks, _ = quantize_graph(graph, kind, keep, form, exempt=exempt)
    folder = bundle.folder / kind.name
    folder.mkdir(exist_ok=True)
    written = write_safetensors(folder, f"{stage}.safetensors", with_quantized(tensors, blocks, kind, form))
    return folder / save_graph(graph, folder, written.locations).file


def _segment(deployment: Deployment, frames: _Frames) -> _Run:
    run = _Run({}, {})
    with Segmenter(deployment, 2) as segmenter:
        for path in tqdm(frames.paths, desc=frames.name, disable=None, leave=False):
            image = read_image(path)
            for question in frames.questions:
                result = segmenter.segment(image, question)
                run.answers[path, question] = result.answer
                run.masks[path, question] = [mask.pixels for mask in result.masks]
    return run


def _scores(frames: _Frames, first: _Run, run: _Run) -> dict[str, Any]:
    """How many answers are those of the first run, IoU with its masks, and metrics against the ground truth."""
    overlaps = [iou(a, b) for key, masks in first.masks.items() for a, b in _paired(masks, run.masks[key])]
    drawn = list(_with_truth(frames, run))
    metrics: Mapping[str, Callable[..., float]] = {"dice": dice, "cldice": cldice, "hd95": hd95}
    means = {name: round(float(np.nanmean([metric(ours, truth) for ours, truth in drawn])), 4) for name, metric in metrics.items()}
    return {
        "answers": len(first.answers),
        "identical_answers": sum(run.answers[key] == answer for key, answer in first.answers.items()),
        "masks": len(overlaps),
        "mean_iou": round(float(np.mean(overlaps)), 4),
        "min_iou": round(min(overlaps), 4),
        **means,
    }


def _paired(masks: _Masks, others: _Masks) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """The masks of one answer; against nothing where the other answer has fewer."""
    for number, mask in enumerate(masks):
        yield mask, others[number] if number < len(others) else np.zeros_like(mask)


def _with_truth(frames: _Frames, run: _Run) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    for index, path in enumerate(frames.paths):
        for question in frames.questions:
            masks = run.masks[path, question]
            for number, concept in enumerate(frames.truth.concepts(question)):
                if not masks:
                    continue
                height, width = masks[0].shape
                line = {"name": path.stem, "index": index, "code": path.stem, "height": height, "width": width}
                truth = frames.truth.mask(line, concept)
                ours = np.any(masks, axis=0) if concept is None else masks[number] if number < len(masks) else np.zeros_like(masks[0])
                if truth is not None:
                    yield ours, truth


if __name__ == "__main__":
    raise SystemExit(main())
