"""Each graph on ONNX Runtime against torch, and the graph's own promises: cache, padding, batches, operators.

Tolerances are relative to the largest expected value. FP32: 1e-5, some ten times what two summation orders differ by here.
FP16: 1e-2 for the language model and 5e-3 for the rest, some five times the rounding seen (11-bit significands through two layers).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from vessel_export.bundle.bundle_writer import ExportRequest
from vessel_export.parity.reference import Reference
from vessel_rt.formats.bundle import Bundle

TOLERANCE = {"fp32": {"language_model": 1e-5, "other": 1e-5}, "fp16": {"language_model": 1e-2, "other": 5e-3}}

# TensorRT's parser takes all of these (onnx-tensorrt, docs/operators.md), with the limits named in docs/architecture.md.
OPERATORS = {
    "Add", "ArgMax", "Attention", "Cast", "Concat", "Conv", "ConvTranspose", "Div", "Expand", "Gather", "GatherElements",
    "GatherND", "Gelu", "Gemm", "Greater", "LayerNormalization", "LessOrEqual", "MatMul", "Max", "Mul", "Pow", "RMSNormalization",
    "ReduceMean", "Relu", "Reshape", "Resize", "RotaryEmbedding", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "TensorScatter", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(small: ExportRequest) -> Reference:
    return Reference.load(small.checkpoint, Path(small.base), Path(small.sam2))


class Stage:
    """One graph of a bundle on the CPU."""

    def __init__(self, folder: Path, name: str) -> None:
        self.bundle = Bundle.load(folder)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        self.float = np.float32 if self.bundle.precision == "fp32" else np.float16
        self.tolerance = TOLERANCE[self.bundle.precision]["language_model" if name == "language_model" else "other"]

    def __call__(self, **feeds: Any) -> dict[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        arrays = {name: np.asarray(value, self.float if np.asarray(value).dtype.kind == "f" else np.int64) for name, value in feeds.items()}
        return dict(zip(names, self.session.run(names, arrays), strict=True))

    def agrees(self, ours: np.ndarray, theirs: Any) -> None:
        theirs = np.asarray(theirs, np.float32)
        assert ours.shape == theirs.shape
        assert np.abs(ours.astype(np.float32) - theirs).max() <= self.tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("tiles", [1, 3, 13])
def test_vision_encoder(small_bundle: Path, reference: Reference, tiles: int) -> None:
    stage = Stage(small_bundle, "vision_encoder")
    side = stage.bundle.tiles.size
    pixels = torch.randn(tiles, 3, side, side, generator=torch.manual_seed(tiles))
    with torch.no_grad():
        expected = reference.encode_tiles(pixels)
    stage.agrees(stage(pixel_values=pixels)["image_embeds"], expected)


def test_sam2_image_encoder(small_bundle: Path, reference: Reference) -> None:
    stage = Stage(small_bundle, "sam2_image_encoder")
    side = stage.bundle.mask.size
    images = torch.randn(3, 3, side, side, generator=torch.manual_seed(0))
    outputs = stage(pixel_values=images)
    for i, image in enumerate(images):
        with torch.no_grad():
            expected = reference.encode_sam2(image[None])
        for name in ("fpn_0", "fpn_1", "image_features"):
            stage.agrees(outputs[name][i : i + 1], getattr(expected, name))


def test_sam2_mask_decoder(small_bundle: Path, reference: Reference) -> None:
    """Masks of several images in one call, in any order, as `image_index` says."""
    stage = Stage(small_bundle, "sam2_mask_decoder")
    side, hidden = stage.bundle.mask.size, stage.bundle.language_model.hidden_size
    states = torch.randn(4, hidden, generator=torch.manual_seed(1))
    index = [1, 0, 1, 0]
    with torch.no_grad():
        features = [reference.encode_sam2(torch.randn(1, 3, side, side, generator=torch.manual_seed(i))) for i in range(2)]
        feeds = {name: torch.cat([getattr(f, name) for f in features]) for name in ("fpn_0", "fpn_1", "image_features")}
        outputs = stage(**feeds, seg_states=states, image_index=index)
        for i, image in enumerate(index):
            expected = reference.decode_masks(features[image], states[i : i + 1])
            for name in ("low_res_logits", "iou", "object_score"):
                assert outputs[name].dtype == np.float32
                stage.agrees(outputs[name][i : i + 1], getattr(expected, name))


class LanguageModel(Stage):
    """The language model with its cache, and the sequences to run it on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "language_model")
        self.sizes = self.bundle.language_model

    def empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        shape = (batch, self.sizes.kv_heads, self.sizes.capacity, self.sizes.head_dim)
        # Not zeros: what lies beyond a row's positions must never matter.
        return {f"past_{part}.{i}": np.full(shape, 7, self.float) for i in range(self.sizes.layers) for part in ("key", "value")}

    def step(self, cache: dict[str, np.ndarray], embeds: Any, start: list[int], live: int, kept: Any) -> tuple[np.ndarray, np.ndarray]:
        """Run tokens [batch, n, hidden] that start at `start`; `cache` is updated."""
        positions = np.asarray(start)[:, None] + np.arange(embeds.shape[1])
        outputs = self(
            inputs_embeds=embeds, position_ids=positions, write_indices=start, kv_positions=np.arange(live), gather_positions=kept, **cache
        )
        cache.update({name.replace("present", "past"): value for name, value in outputs.items() if name.startswith("present")})
        return outputs["hidden_states"], outputs["next_ids"]


def _embeds(reference: Reference, length: int, seed: int) -> torch.Tensor:
    hidden = reference.language_model.config.hidden_size
    return torch.randn(1, length, hidden, generator=torch.manual_seed(seed))


def _expected(reference: Reference, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final-norm states [n, hidden] and arg-max ids [n]."""
    with torch.no_grad():
        hidden, logits = reference.run_language_model(embeds)[:2]
    hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[-1]
    return hidden.reshape(-1, hidden.shape[-1]), logits.reshape(-1, logits.shape[-1]).argmax(-1)


def test_language_model_one_pass(small_bundle: Path, reference: Reference) -> None:
    model, embeds = LanguageModel(small_bundle), _embeds(reference, 37, 0)
    hidden, ids = model.step(model.empty_cache(1), embeds, [0], 37, [np.arange(37)])
    expected, _ = _expected(reference, embeds)
    model.agrees(hidden[0], expected)
    with torch.no_grad():  # FP16 may turn near-ties: ids are compared with the head of our own states
        head = reference.language_model.get_output_embeddings().weight.to(torch.float32)
        logits = torch.from_numpy(hidden[0].astype(np.float32)) @ head.T
    chosen, best = logits.gather(1, torch.from_numpy(ids[0])[:, None])[:, 0], logits.max(-1).values
    assert float((best - chosen).max()) <= model.tolerance * float(best.abs().max())


def test_language_model_steps_equal_one_pass(small_bundle: Path, reference: Reference) -> None:
    """Prefill of 20, then one by one, then three at once: the same states as one pass over all."""
    model, embeds = LanguageModel(small_bundle), _embeds(reference, 29, 1)
    whole, ids = model.step(model.empty_cache(1), embeds, [0], 29, [np.arange(29)])
    cache, position, parts, tokens = model.empty_cache(1), 0, [], []
    for length in (20, 1, 1, 1, 3, 3):
        piece = embeds[:, position : position + length]
        hidden, following = model.step(cache, piece, [position], position + length, [np.arange(length)])
        parts.append(hidden[0])
        tokens.append(following[0])
        position += length
    model.agrees(np.concatenate(parts), whole[0].astype(np.float32))
    assert np.array_equal(np.concatenate(tokens), ids[0])


def test_language_model_padded_batch_equals_single_rows(small_bundle: Path, reference: Reference) -> None:
    """Rows of 9, 21 and 14 tokens padded on the right, then two tokens more for each, at its own place."""
    model, lengths = LanguageModel(small_bundle), [9, 21, 14]
    rows = [_embeds(reference, length + 2, 10 + length) for length in lengths]
    width = max(lengths)
    batch = torch.full((3, width, rows[0].shape[-1]), 3.0)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        batch[i, :length] = row[0, :length]
    cache = model.empty_cache(3)
    first, _ = model.step(cache, batch, [0, 0, 0], width, np.array(lengths)[:, None] - 1)
    more = torch.stack([row[0, length:] for row, length in zip(rows, lengths, strict=True)])
    second, _ = model.step(cache, more, lengths, width + 2, [[0, 1]] * 3)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        expected, _ = _expected(reference, row)
        model.agrees(first[i], expected[length - 1 : length])
        model.agrees(second[i], expected[length:])


def test_graphs_are_what_both_runtimes_take(small_bundle: Path) -> None:
    for name, stage in Bundle.load(small_bundle).all_stages.items():
        model = onnx.load(small_bundle / stage.file, load_external_data=False)
        onnx.checker.check_model(str(small_bundle / stage.file), full_check=True)
        assert [(entry.domain, entry.version <= 24) for entry in model.opset_import] == [("", True)]
        assert {node.op_type for node in model.graph.node} <= OPERATORS, name
        assert all(node.domain == "" for node in model.graph.node)
        for node in model.graph.node:
            if node.op_type == "Attention":  # TensorRT: one output, no past, mask or is_causal, not both
                assert (len(node.output), len(node.input) <= 4) == (1, True)
                attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
                assert all(value == 0 for key, value in attributes.items() if key != "scale"), name
        for initializer in model.graph.initializer:
            assert len(initializer.raw_data) < 1 << 12, f"{name} holds {initializer.name} itself"


def test_outputs_are_as_described(small_bundle: Path) -> None:
    """bundle.json's dtypes and shapes are those that ONNX Runtime infers."""
    for name, stage in Bundle.load(small_bundle).all_stages.items():
        session = Stage(small_bundle, name).session
        for described, actual in zip((*stage.inputs, *stage.outputs), (*session.get_inputs(), *session.get_outputs()), strict=True):
            assert described.name == actual.name
            assert list(described.shape) == list(actual.shape), name
            assert {"float32": "tensor(float)", "float16": "tensor(float16)", "int64": "tensor(int64)"}[described.dtype] == actual.type
