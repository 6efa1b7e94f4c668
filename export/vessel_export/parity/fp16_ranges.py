"""Measures which values of a bundle FP16 can hold: the peaks of every graph on real images.

Each graph runs with FP32 activations (emulate.py), so that nothing overflows, and the largest magnitude of every value that is FP16 in the
graph is recorded. The peaks of products that are added to a residual stream (`ResidualLinear`) determine their exponents (exponents.py).
Other values have no scale; if one comes too close to 65504, the bundle needs BF16. Does not know the reference.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer
from tqdm import tqdm

from vessel_export.parity.emulate import MOVES, scaled_logits, serialized, wide_options, widen
from vessel_export.parity.exponents import apply, exponents_of
from vessel_export.parity.inputs import Array, Sample, one_pass, samples_of
from vessel_export.parity.ranges_report import Product, Ranges, StageRanges, exponent_for
from vessel_rt.device.providers import onnxruntime
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.engine_sidecar import ENGINES
from vessel_rt.model.preprocess import mask_pixels, tile_pixels
from vessel_rt.model.prompt import EmbedTokens, PromptTokenizer

__all__ = ["RangesRequest", "RangesResult", "measure", "measure_and_apply"]

_FP16, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
_PEAK = "peak/"
_DEQUANTIZE = "DequantizeLinear"
_FEATURES = ("fpn_0", "fpn_1", "image_features")


@dataclasses.dataclass(frozen=True)
class RangesRequest:
    """What to measure. Without `images`, three drawn frames are used; `question` None is the bundle's; `threads` 0 uses all cores."""

    bundle: Path
    images: tuple[Path, ...] = ()
    question: str | None = None
    threads: int = 0


@dataclasses.dataclass(frozen=True)
class RangesResult:
    """The measured ranges, the stages whose graphs got new exponents, and the number of engines that were removed because of them."""

    ranges: Ranges
    changed: tuple[str, ...]
    removed_engines: int


def measure_and_apply(request: RangesRequest) -> RangesResult:
    """Measure the ranges of the bundle of `request`, and write them and the exponents into the bundle.

    Raises:
        VesselError: the bundle is damaged or not FP16, or an image cannot be read.
    """
    bundle = Bundle.load(request.bundle)
    bundle.verify_files()
    samples = samples_of(request.images)
    question = bundle.prompt.default_question if request.question is None else request.question
    with tqdm(total=len(samples) * len(bundle.stages), desc="graphs", disable=None) as bar:
        ranges = measure(bundle, samples, question, threads=request.threads, progress=bar.update)
    before = _engine_count(bundle)
    changed = apply(bundle, ranges)
    return RangesResult(ranges, changed, before - _engine_count(bundle))


def _engine_count(bundle: Bundle) -> int:
    return sum(1 for _ in bundle.folder.glob(f"{ENGINES}/*/*.json"))


def measure(
    bundle: Bundle, samples: Sequence[Sample], question: str, *, threads: int = 0, progress: Callable[[], object] = lambda: None
) -> Ranges:
    """Run `question` on every sample with FP32 activations. Calls `progress` after each graph of each sample.

    The answer is not generated: the prompt and the bundle's first answer go through the language model in one pass, and the state that
    consumes [SEG] gives a mask.

    Raises:
        VesselError: the bundle is not FP16, a prompt is too long, or a peak is not finite.
    """
    if bundle.precision != "fp16":
        raise VesselError(f"{bundle.folder}: is {bundle.precision}, which has FP32's range; ranges takes an fp16 bundle")
    observers = {name: _Observer(bundle, name, threads) for name in bundle.stages}
    with EmbedTokens(bundle) as embed_tokens:
        prompts = _Prompts(bundle, embed_tokens, question)
        for sample in samples:
            tiles = tile_pixels(sample.runtime, bundle.tiles)
            (image_embeds,) = observers["vision_encoder"].run({"pixel_values": tiles}, "image_embeds")
            progress()
            embeds, seg = prompts.with_image(sample.name, image_embeds)
            feeds = one_pass(bundle.language_model, embeds, kept=1) | {"gather_positions": np.array([[seg]])}
            (states,) = observers["language_model"].run(feeds, "hidden_states")
            progress()
            square = {"pixel_values": mask_pixels(sample.runtime, bundle.mask)}
            features = observers["sam2_image_encoder"].run(square, *_FEATURES)
            progress()
            decoder = dict(zip(_FEATURES, features, strict=True)) | {"seg_states": states[0], "image_index": np.zeros(1, np.int64)}
            observers["sam2_mask_decoder"].run(decoder)
            progress()
    return Ranges(len(samples), question, {name: observer.ranges() for name, observer in observers.items()})


class _Prompts:
    """A question and the bundle's first answer, as embeddings around an image's."""

    def __init__(self, bundle: Bundle, embed_tokens: EmbedTokens, question: str) -> None:
        before, after = PromptTokenizer(bundle).encode(question)
        tokenizer = Tokenizer.from_file(str(bundle.folder / bundle.prompt.tokenizer))
        answer = tokenizer.encode(bundle.prompt.answers[0], add_special_tokens=False).ids
        self._before, self._after = (embed_tokens.rows(ids).astype(np.float32) for ids in (before, after + answer))
        self._seg = len(before) + len(after) + answer.index(bundle.prompt.seg_token_id)
        self._capacity = bundle.language_model.capacity

    def with_image(self, name: str, image_embeds: Array) -> tuple[Array, int]:
        """FP32 embeddings [1, tokens, hidden_size], and the position of [SEG] in them."""
        image = image_embeds.reshape(-1, image_embeds.shape[-1])
        embeds = np.concatenate([self._before, image, self._after])[None]
        if embeds.shape[1] > self._capacity:
            raise VesselError(
                f"{name}: its prompt and answer have {embeds.shape[1]} tokens, the bundle's cache {self._capacity}; shorten --prompt"
            )
        return embeds, self._seg + len(image)


class _Observer:
    """One graph with FP32 activations that also returns the peaks of its values."""

    def __init__(self, bundle: Bundle, stage: str, threads: int) -> None:
        self._stage, self._file = stage, bundle.folder / bundle.stages[stage].file
        model = ir.load(self._file)
        self._probes = list(_probes(model.graph))
        widen(model, rounding=False)
        for i, probe in enumerate(self._probes):
            _add_peak(model.graph, probe.value, f"{_PEAK}{i}")
        options = wide_options(onnxruntime().SessionOptions(), bundle.folder)
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = onnxruntime().InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
        self._peaks = [0.0] * len(self._probes)

    def run(self, feeds: Mapping[str, Array], *outputs: str) -> list[Array]:
        """Run the graph, update the peaks, and return the outputs named.

        Raises:
            VesselError: a peak is not finite, even though no value is FP16.
        """
        peaks = [f"{_PEAK}{i}" for i in range(len(self._probes))]
        results: list[Array] = self._session.run([*outputs, *peaks], dict(feeds))
        for i, (probe, peak) in enumerate(zip(self._probes, results[len(outputs) :], strict=True)):
            if not math.isfinite(peak):
                raise VesselError(f"{self._file}: {probe.name} is not finite even in FP32; the checkpoint is damaged, export another")
            self._peaks[i] = max(self._peaks[i], float(peak) * probe.factor)
        return results[: len(outputs)]

    def ranges(self) -> StageRanges:
        """The peaks of all runs so far."""
        groups: dict[str, dict[str, float]] = {"fp16": {}, "fp32": {}, "input": {}, "output": {}}
        for probe, peak in zip(self._probes, self._peaks, strict=True):
            group = groups[probe.group]
            group[probe.name] = max(peak, group.get(probe.name, 0.0))
        products = {
            name: Product(peak, groups["output"][name], exponent_for(max(peak, groups["output"][name])))
            for name, peak in groups["input"].items()
        }
        return StageRanges(groups["fp16"], products, groups["fp32"])


@dataclasses.dataclass(frozen=True)
class _Probe:
    """A value whose peak is measured, and the factor that undoes its exponent in the graph."""

    group: str
    name: str
    value: ir.Value
    factor: float = 1.0


def _probes(graph: ir.Graph) -> Iterator[_Probe]:
    """The values to measure in a stage's FP16 graph. Adds nodes for attention's logits to it."""
    scaled: set[ir.Value] = set()
    for prefix, exponent in exponents_of(graph).items():
        (product,) = (node for node, _ in _matrix(graph, prefix).uses())
        (shrunk,) = (node for node, _ in graph.initializers[f"{prefix}.shrink"].uses())
        entering, leaving = product.inputs[0], product.outputs[0]
        assert entering is not None
        scaled |= {shrunk.outputs[0], entering, leaving}
        yield _Probe("input", prefix, entering, 2.0**exponent)
        yield _Probe("output", prefix, leaving, 2.0**exponent)
    for node in list(graph):
        if node.op_type == "Attention":
            name = _name(node, node.outputs[0])
            for part, value in zip(("q", "k", "v"), node.inputs[:3], strict=True):
                assert value is not None
                yield _Probe("fp16", f"{name}.{part}", value)
            yield _Probe("fp16", f"{name}.logits", scaled_logits(graph, node))
        for value in node.outputs:
            if value.dtype == _FP16 and node.op_type not in (*MOVES, _DEQUANTIZE) and value not in scaled:
                yield _Probe("fp16", _name(node, value), value)
            elif value.dtype == _FLOAT and node.op_type == "Add":
                yield _Probe("fp32", _name(node, value), value)


def _matrix(graph: ir.Graph, prefix: str) -> ir.Value:
    """The matrix of a product, after its dequantization if it is quantized."""
    weight = graph.initializers[f"{prefix}.weight"]
    (user,) = (node for node, _ in weight.uses())
    return user.outputs[0] if user.op_type == _DEQUANTIZE else weight


def _name(node: ir.Node, value: ir.Value) -> str:
    """A value's place in the model: module and operator, or in a traced graph the value's own name if no weight gives the module."""
    built = re.fullmatch(r"v_(.*?)_\d+(/padded)?", str(value.name))  # before its columns of zeros are cut off
    if built:
        return built[1]
    for source in node.inputs:
        if source is not None and source.is_initializer() and re.search(r"\.(weight|bias)$", str(source.name)):
            return f"{str(source.name).partition('.')[2].rpartition('.')[0]}.{node.op_type}"
    return str(value.name)


def _add_peak(graph: ir.Graph, value: ir.Value, name: str) -> None:
    magnitude = ir.node("Abs", [value])
    peak = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
    magnitude.outputs[0].name, peak.outputs[0].name = f"{name}/magnitude", name
    for made in (magnitude.outputs[0], peak.outputs[0]):
        made.dtype = _FLOAT
    peak.outputs[0].shape = ir.Shape([])
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, [magnitude, peak])  # right after it, while the value is in memory
    graph.outputs.append(peak.outputs[0])
