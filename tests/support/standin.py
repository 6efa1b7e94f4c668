"""A bundle of four small graphs that honour docs/architecture.md and whose outcome is known beforehand.

The trained bundle tells whether the runtime is right; this one can be made to answer anything, so it tells what happens at the edges.

- Every token is a byte, but for the special ones. The language model gives each token a fixed successor (`answer` after the prompt's
  last token), whatever stands before; its one attention layer is real and small, so that hidden states depend on all that came before.
- The mask of every [SEG] is where the image is darker than mid-gray.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vessel_rt.formats.bundle import (
    BUNDLE_FILE,
    SCHEMA,
    Bundle,
    EmbeddingTable,
    LanguageModelSpec,
    MaskSpec,
    PromptSpec,
    Provenance,
    StageSpec,
    TensorSpec,
    TileSpec,
)
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.io.checked_files import sha256_of

HIDDEN, HEADS, HEAD_DIM, LAYERS, TOKENS_PER_TILE = 64, 4, 16, 2, 4
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "[SEG]")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.BFLOAT16: "bfloat16"}


def build_standin(
    folder: Path, *, answer: str = "Mask [SEG].", capacity: int = 256, max_new_tokens: int = 16, cache: int = TensorProto.FLOAT
) -> Bundle:
    """Write the bundle; `answer` may not repeat a character, unless it is meant to go round and round. `cache`: the KV cache's type."""
    (folder / "weights").mkdir(parents=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    embed_tokens = _unit_rows(np.random.default_rng(0), tokenizer.get_vocab_size(), HIDDEN)
    save_file({"embed_tokens.weight": embed_tokens}, folder / "weights" / "embed_tokens.safetensors")
    graphs = {
        "vision_encoder": _vision_encoder(),
        "language_model": _language_model(embed_tokens, _successors(tokenizer, answer), capacity, cache),
        "sam2_image_encoder": _sam2_image_encoder(),
        "sam2_mask_decoder": _sam2_mask_decoder(),
    }
    for name, graph in graphs.items():
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, folder / f"{name}.onnx")
    bundle = Bundle(
        schema=SCHEMA,
        folder=folder,
        precision="fp32",
        tiles=TileSpec(448, 1, 12, True, TOKENS_PER_TILE, _MEAN, _STD),
        mask=MaskSpec(64, 16, _MEAN, _STD),
        prompt=PromptSpec(
            tokenizer="tokenizer.json",
            prefix="<|im_start|>user\n",
            image_start="<img>",
            image_token="<IMG_CONTEXT>",
            image_end="</img>",
            suffix="<|im_end|>\n<|im_start|>assistant\n",
            default_question="Please segment vessel in this image.",
            answers=("Mask [SEG].",),
            image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
            seg_token_id=_id(tokenizer, "[SEG]"),
            stop_token_ids=(_id(tokenizer, "<|im_end|>"), _id(tokenizer, "<|endoftext|>")),
        ),
        language_model=LanguageModelSpec(LAYERS, HIDDEN, HEADS, HEAD_DIM, len(embed_tokens), capacity, max_new_tokens),
        embed_tokens=EmbeddingTable("weights/embed_tokens.safetensors", "embed_tokens.weight"),
        stages={name: StageSpec(f"{name}.onnx", _specs(graph.input), _specs(graph.output)) for name, graph in graphs.items()},
        provenance=Provenance("iter_1.pth", "0" * 64, 1, 4, 8.0, "base", "sam2.pt", "standin", (), {}),
        files={
            path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    )
    (folder / BUNDLE_FILE).write_text(bundle.to_json(), encoding="utf-8")
    return msgspec.structs.replace(bundle, sha256=sha256_of(folder / BUNDLE_FILE))


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def _id(tokenizer: Tokenizer, text: str) -> int:
    found = tokenizer.token_to_id(text)
    assert found is not None
    return found


def _successors(tokenizer: Tokenizer, answer: str) -> dict[int, int]:
    """Which token follows which: the answer's follow the prompt's last, a line break, and its own last is followed by the stop token."""
    ids = tokenizer.encode("\n" + answer + "<|im_end|>").ids
    successors: dict[int, int] = {}
    for token, successor in itertools.pairwise(ids):
        successors.setdefault(token, successor)
    return successors


def _unit_rows(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values


class _Nodes:
    """The nodes and weights of a graph under construction; calling it adds a node and names its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out

    def weight(self, values: np.ndarray | list[int]) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def graph(self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, inputs, outputs, self.weights)


def _f(name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _i(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(v.name, _DTYPES[v.type.tensor_type.elem_type], tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
        for v in values
    )


def _vision_encoder() -> onnx.GraphProto:
    op, rng = _Nodes(), np.random.default_rng(1)
    x = op("AveragePool", "pixel_values", kernel_shape=[224, 224], strides=[224, 224])
    x = op("Transpose", op("Reshape", x, op.weight([0, 3, TOKENS_PER_TILE])), perm=[0, 2, 1])
    op("MatMul", x, op.weight(_unit_rows(rng, 3, HIDDEN)), out="image_embeds")
    inputs, outputs = [_f("pixel_values", "tiles", 3, 448, 448)], [_f("image_embeds", "tiles", TOKENS_PER_TILE, HIDDEN)]
    return op.graph("vision_encoder", inputs, outputs)


def _language_model(embed_tokens: np.ndarray, successors: dict[int, int], capacity: int, cache: int) -> onnx.GraphProto:
    op, rng = _Nodes(), np.random.default_rng(2)
    shape = ("batch", HEADS, capacity, HEAD_DIM)
    inputs = [_f("inputs_embeds", "batch", "sequence", HIDDEN), _i("position_ids", "batch", "sequence"), _i("write_indices", "batch")]
    inputs += [_i("kv_positions", "live"), _i("gather_positions", "batch", "kept")]
    outputs = [_f("hidden_states", "batch", "kept", HIDDEN), _i("next_ids", "batch", "kept")]
    live = op("Shape", "kv_positions")
    mask = op("LessOrEqual", op("Unsqueeze", "kv_positions", op.weight([0, 1, 2])), op("Unsqueeze", "position_ids", op.weight([1, 3])))
    angles = np.outer(np.arange(capacity), 1e4 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)
    cos, sin = op.weight(np.cos(angles)), op.weight(np.sin(angles))
    zero, two, split = op.weight([0]), op.weight([2]), op.weight([0, 0, HEADS, HEAD_DIM])

    def heads(x: str, scale: float) -> str:
        matrix = op.weight(scale * _unit_rows(rng, HIDDEN, HIDDEN))
        return op("Transpose", op("Reshape", op("MatMul", x, matrix), split), perm=[0, 2, 1, 3])

    x = "inputs_embeds"
    for layer in range(LAYERS):
        q, k, v = heads(x, 8.0), heads(x, 8.0), heads(x, 0.2)
        q, k = (op("RotaryEmbedding", t, cos, sin, "position_ids") for t in (q, k))
        kept = []
        for part, t in (("key", k), ("value", v)):
            name = f"{part}.{layer}"
            inputs.append(_f(f"past_{name}", *shape, dtype=cache))
            outputs.append(_f(f"present_{name}", *shape, dtype=cache))
            if cache == TensorProto.FLOAT:
                written = op("TensorScatter", f"past_{name}", t, "write_indices", out=f"present_{name}", axis=2)
            else:
                written = op("TensorScatter", op("Cast", f"past_{name}", to=TensorProto.FLOAT), t, "write_indices", axis=2)
                op("Cast", written, to=cache, out=f"present_{name}")
            kept.append(op("Slice", written, zero, live, two))
        mixed = op("Transpose", op("Attention", q, *kept, mask), perm=[0, 2, 1, 3])
        x = op("Add", x, op("Reshape", mixed, op.weight([0, 0, HIDDEN])))
    op("GatherND", x, op("Unsqueeze", "gather_positions", two), batch_dims=1, out="hidden_states")
    head = np.zeros((HIDDEN, len(embed_tokens)), np.float32)
    for token, successor in successors.items():
        head[:, successor] += embed_tokens[token]
    op("ArgMax", op("MatMul", "hidden_states", op.weight(head)), axis=-1, keepdims=0, out="next_ids")
    return op.graph("language_model", inputs, outputs)


def _sam2_image_encoder() -> onnx.GraphProto:
    op = _Nodes()
    names = {"fpn_0": 4, "fpn_1": 8, "image_features": 16}
    for name, stride in names.items():
        op("AveragePool", "pixel_values", kernel_shape=[stride, stride], strides=[stride, stride], out=name)
    outputs = [_f(name, "images", 3, 64 // stride, 64 // stride) for name, stride in names.items()]
    return op.graph("sam2_image_encoder", [_f("pixel_values", "images", 3, 64, 64)], outputs)


def _sam2_mask_decoder() -> onnx.GraphProto:
    """Logits: minus the mean of the three normalized channels. IoU: of the [SEG] state, between 0 and 1."""
    op = _Nodes()
    features = [op("Gather", name, "image_index") for name in ("fpn_0", "fpn_1", "image_features")]
    op("Neg", op("ReduceMean", features[0], op.weight([1]), keepdims=0), out="low_res_logits")
    op("Sigmoid", op("ReduceMean", "seg_states", op.weight([1]), keepdims=0), out="iou")
    op("Add", op("Neg", "iou"), op.weight(np.array([3.0], np.float32)), out="object_score")
    inputs = [_f("fpn_0", "images", 3, 16, 16), _f("fpn_1", "images", 3, 8, 8), _f("image_features", "images", 3, 4, 4)]
    inputs += [_f("seg_states", "masks", HIDDEN), _i("image_index", "masks")]
    return op.graph("sam2_mask_decoder", inputs, [_f("low_res_logits", "masks", 16, 16), _f("iou", "masks"), _f("object_score", "masks")])
