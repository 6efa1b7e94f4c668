"""What of a bundle FP16 can hold: the peaks of every graph on real images, measured in FP32, and the powers of two that they ask for.

Each graph is run with FP32 activations (emulate.py), so that nothing overflows, and the largest magnitude of every value that is FP16 in it
is taken. From the peaks of the products that go to a residual stream (`ResidualLinear`) follow their exponents, which are two scalars in
the graph's own file: weights are never touched. Other values have no such scale; for one that comes too near to 65504 there is BF16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tokenizers import Tokenizer
from tqdm import tqdm

from vessel_export.bundle.reuse import link_engines
from vessel_export.io.safetensors_writer import link_or_copy
from vessel_export.io.staging import staging
from vessel_export.parity.emulate import MOVES, scaled_logits, serialized, wide_options, widen
from vessel_export.parity.verify import Sample, drawn_samples, one_pass, read_samples
from vessel_rt.device.providers import onnxruntime
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.formats.engine_sidecar import ENGINES
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.io.checked_files import sha256_of
from vessel_rt.model.preprocess import mask_pixels, tile_pixels
from vessel_rt.model.prompt import EmbedTokens, PromptTokenizer

__all__ = [
    "LIMIT",
    "RANGES_FILE",
    "Product",
    "Ranges",
    "StageRanges",
    "add_arguments",
    "apply",
    "exponent_for",
    "measure",
    "run",
    "set_exponents",
]

RANGES_FILE = "ranges.json"
LIMIT = 65504.0  # FP16's largest number
HEADROOM = 4.0  # images other than those measured may reach further
_MOST = 10  # a larger exponent makes ordinary values subnormal: on examples/tiny it would double the rounding error (docs/numerics.md)

_FP16, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
_PEAK = "peak/"
_FEATURES = ("fpn_0", "fpn_1", "image_features")

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Product:
    """A product that goes to a residual stream: the peaks of what enters and leaves it, unscaled, and the exponent that they ask for."""

    input: float
    output: float
    exponent: int


@dataclasses.dataclass(frozen=True)
class StageRanges:
    """The peaks of one graph: of what is FP16 in it and unscaled, of the products, and, to be seen only, of sums in FP32."""

    fp16: dict[str, float]
    products: dict[str, Product]
    fp32: dict[str, float]

    @property
    def beyond(self) -> dict[str, float]:
        """What FP16 cannot be trusted to hold: a peak within HEADROOM of LIMIT that no exponent moves."""
        named = {name: max(product.input, product.output) for name, product in self.products.items() if product.exponent > _MOST}
        return named | {name: peak for name, peak in self.fp16.items() if peak > LIMIT / HEADROOM}


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What was measured, over so many images and one question; graphs by their stage's name."""

    images: int
    question: str
    stages: dict[str, StageRanges]

    def to_json(self) -> str:
        """The text of `ranges.json`."""
        return json.dumps({"limit": LIMIT, "headroom": HEADROOM, **dataclasses.asdict(self)}, indent=1) + "\n"

    def table(self, rows: int = 6) -> str:
        """As text: for each graph its products and the highest `rows` kinds of FP16 values, each with the layer of its peak."""
        lines = [("graph", "value", "peak", "of 65504", "where", "exponents")]
        for stage, ranges in self.stages.items():
            lines += [(stage, *line) for line in _product_lines(ranges.products)]
            lines += [(stage, *line, "") for i, (line, peak) in enumerate(_value_lines(ranges.fp16)) if i < rows or peak > LIMIT / HEADROOM]
            if ranges.fp32:
                where = max(ranges.fp32, key=lambda name: ranges.fp32[name])
                lines.append((stage, "sums in FP32", f"{ranges.fp32[where]:.4g}", "", where, ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _product_lines(products: Mapping[str, Product]) -> Iterator[tuple[str, str, str, str, str]]:
    for kind, names in _by_kind(products).items():
        peaks = {name: max(products[name].input, products[name].output) for name in names}
        where = max(peaks, key=lambda name: peaks[name])
        exponents = sorted({products[name].exponent for name in names})
        yield f"{kind} (scaled)", f"{peaks[where]:.4g}", f"{peaks[where] / LIMIT:.2%}", where, " ".join(map(str, exponents))


def _value_lines(values: Mapping[str, float]) -> list[tuple[tuple[str, str, str, str], float]]:
    """A line a kind and its peak, the highest first."""
    lines = []
    for kind, names in _by_kind(values).items():
        where = max(names, key=lambda name: values[name])
        peak = values[where]
        lines.append(((kind, f"{peak:.4g}", f"{peak / LIMIT:.2%}", where), peak))
    return sorted(lines, key=lambda line: line[1], reverse=True)


def _by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Grouped by what is left of a name without its first number, that of the layer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=1), []).append(name)
    return groups


def exponent_for(peak: float) -> int:
    """The smallest s >= 0 with peak / 2^s <= LIMIT / HEADROOM."""
    return max(0, math.ceil(math.log2(peak * HEADROOM / LIMIT))) if peak else 0


def measure(
    bundle: Bundle, samples: Sequence[Sample], question: str, *, threads: int = 0, progress: Callable[[], object] = lambda: None
) -> Ranges:
    """Run `question` on every sample with FP32 activations; `progress` is called after each graph of each sample.

    The answer is not generated: prompt and the bundle's likeliest answer go through the language model in one pass, and the state that
    consumes [SEG] makes a mask.

    Raises:
        VesselError: the bundle is not FP16, a sample makes too long a prompt, or a peak is not finite.
    """
    if bundle.precision != "fp16":
        raise VesselError(f"{bundle.folder}: is {bundle.precision}, whose range is FP32's: there is nothing to measure; ranges is for fp16")
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
    """A question and the likeliest answer, as embeddings around an image's."""

    def __init__(self, bundle: Bundle, embed_tokens: EmbedTokens, question: str) -> None:
        before, after = PromptTokenizer(bundle).encode(question)
        tokenizer = Tokenizer.from_file(str(bundle.folder / bundle.prompt.tokenizer))
        answer = tokenizer.encode(bundle.prompt.answers[0], add_special_tokens=False).ids
        self._before, self._after = (embed_tokens.rows(ids).astype(np.float32) for ids in (before, after + answer))
        self._seg = len(before) + len(after) + answer.index(bundle.prompt.seg_token_id)
        self._capacity = bundle.language_model.capacity

    def with_image(self, name: str, image_embeds: Array) -> tuple[Array, int]:
        """[1, tokens, hidden_size] FP32, and where [SEG] stands in them."""
        image = image_embeds.reshape(-1, image_embeds.shape[-1])
        embeds = np.concatenate([self._before, image, self._after])[None]
        if embeds.shape[1] > self._capacity:
            raise VesselError(f"{name}: its prompt and answer have {embeds.shape[1]} tokens, this bundle holds {self._capacity}")
        return embeds, self._seg + len(image)


class _Observer:
    """One graph with FP32 activations, which also returns the peaks of its values."""

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
        """The outputs by name; the peaks are kept.

        Raises:
            VesselError: a peak is not finite, though nothing was FP16.
        """
        peaks = [f"{_PEAK}{i}" for i in range(len(self._probes))]
        results: list[Array] = self._session.run([*outputs, *peaks], dict(feeds))
        for i, (probe, peak) in enumerate(zip(self._probes, results[len(outputs) :], strict=True)):
            if not math.isfinite(peak):
                raise VesselError(f"{self._file}: {probe.name} is not finite even in FP32; the checkpoint is damaged")
            self._peaks[i] = max(self._peaks[i], float(peak) * probe.factor)
        return results[: len(outputs)]

    def ranges(self) -> StageRanges:
        """What the runs so far came to."""
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
    """A value whose peak is taken, and the factor that undoes the exponent it has in the graph."""

    group: str
    name: str
    value: ir.Value
    factor: float = 1.0


def _probes(graph: ir.Graph) -> Iterator[_Probe]:
    """What is to be measured in a stage's FP16 graph; nodes for attention's logits are added to it."""
    scaled: set[ir.Value] = set()
    for prefix, exponent in exponents_of(graph).items():
        (product,) = (node for node, _ in graph.initializers[f"{prefix}.weight"].uses())
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
            if value.dtype == _FP16 and node.op_type not in MOVES and value not in scaled:
                yield _Probe("fp16", _name(node, value), value)
            elif value.dtype == _FLOAT and node.op_type == "Add":
                yield _Probe("fp32", _name(node, value), value)


def _name(node: ir.Node, value: ir.Value) -> str:
    """Where in the model a value is: the module and the operator; in a traced graph, the value's own name where no weight tells."""
    built = re.fullmatch(r"v_(.*?)_\d+", str(value.name))
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
    graph.insert_after(producer, [magnitude, peak])  # at once, while the value is still there
    graph.outputs.append(peak.outputs[0])


def exponents_of(graph: ir.Graph) -> dict[str, int]:
    """The exponent of every ResidualLinear of a graph, by its name."""
    found = {}
    for name, value in graph.initializers.items():
        if name.endswith(".shrink") and value.const_value is not None:
            found[name.removesuffix(".shrink")] = -round(math.log2(float(value.const_value.numpy())))
    return found


def set_exponents(graph: ir.Graph, exponents: Mapping[str, int]) -> None:
    """Give each ResidualLinear its exponent: both of its scalars."""
    for prefix, exponent in exponents.items():
        for name, array in (("shrink", np.array(2.0**-exponent, np.float16)), ("grow", np.array(2.0**exponent, np.float32))):
            value = graph.initializers[f"{prefix}.{name}"]
            value.const_value = ir.tensor(array, name=value.name)


def apply(bundle: Bundle, ranges: Ranges) -> tuple[str, ...]:
    """Put `ranges.json` into the bundle and the exponents into its graphs; the graphs that this changed, by their stages' names.

    The bundle is replaced by a folder of hard links to its files, but for the changed graphs, in one step. Engines that were built from
    changed graphs are left out, since they would not be loaded.

    Raises:
        OSError: the disk is full or not writable.
    """
    with staging(bundle.folder.resolve()) as folder:
        changed = tuple(name for name, measured in ranges.stages.items() if _write_graph(bundle, name, measured.products, folder))
        (folder / RANGES_FILE).write_text(ranges.to_json(), encoding="utf-8")
        written = [RANGES_FILE, *(bundle.stages[name].file for name in changed)]
        records = {name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name)) for name in written}
        for name in bundle.files.keys() - records.keys():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.folder / name, folder / name)
        files = dict(sorted((bundle.files | records).items()))
        link_engines(folder, files, [bundle])
        (folder / BUNDLE_FILE).write_text(dataclasses.replace(bundle, files=files).to_json(), encoding="utf-8")
    return changed


def _write_graph(bundle: Bundle, stage: str, products: Mapping[str, Product], folder: Path) -> bool:
    """Write the stage's graph with new exponents, unless it has them."""
    file = bundle.stages[stage].file
    model = ir.load(bundle.folder / file)
    wanted = {name: product.exponent for name, product in products.items() if product.exponent <= _MOST}
    before = exponents_of(model.graph)
    if before == before | wanted:
        return False
    set_exponents(model.graph, wanted)
    ir.save(model, folder / file)
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vessel-export ranges`; `parser`'s namespace then has `run`."""
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="DIR", help="the FP16 bundle to measure, and to put the exponents into"
    )
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="images and folders (default: three drawn frames)")
    parser.add_argument("--prompt", metavar="TEXT", help="the question (default: the bundle's)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads for one operator (default: all cores)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """`vessel-export ranges`: print the table; 0 if FP16 holds every value, 1 if it does not.

    Raises:
        VesselError: the bundle is damaged or not FP16, or an image cannot be read.
    """
    bundle = Bundle.load(arguments.bundle)
    bundle.verify_files()
    samples = read_samples(arguments.images) if arguments.images else drawn_samples()
    question = bundle.prompt.default_question if arguments.prompt is None else arguments.prompt
    with tqdm(total=len(samples) * len(bundle.stages), desc="graphs", disable=None) as bar:
        ranges = measure(bundle, samples, question, threads=arguments.threads, progress=bar.update)
    engines = sum(1 for _ in bundle.folder.glob(f"{ENGINES}/*/*.json"))
    changed = apply(bundle, ranges)
    print(ranges.table())
    print(f"{bundle.folder / RANGES_FILE}: peaks over {ranges.images} images; exponents changed in: {', '.join(changed) or 'no graph'}")
    stale = engines - sum(1 for _ in bundle.folder.glob(f"{ENGINES}/*/*.json"))
    if stale:
        print(f"{stale} engines were built from the old graphs and are gone: vessel-export build --bundle {bundle.folder}")
    beyond = {f"{stage} {name}": peak for stage, measured in ranges.stages.items() for name, peak in measured.beyond.items()}
    if beyond:
        shown = "; ".join(f"{name} {peak:.4g}" for name, peak in list(beyond.items())[:8]) + ("; ..." if len(beyond) > 8 else "")
        print(
            f"vessel-export: {bundle.folder}: FP16 ends at 65504 and cannot be trusted with {shown}; export it with --precision bf16",
            file=sys.stderr,
        )
    return 1 if beyond else 0
