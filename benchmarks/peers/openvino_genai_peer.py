"""OpenVINO GenAI: Qwen2 of random weights as OpenVINO IR, and its times. Run by benchmarks.cpu_peers.

The IR has the form that optimum-intel writes and that OpenVINO's CPU plugin fuses: a cache in variables that `beam_idx` reorders, and keys
and values repeated for grouped-query attention. Weights have 8 bits and a scale for each row, or 4 bits and a scale for each 128 columns,
without zero points (NNCF's INT8_SYM and INT4_SYM).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op import util

_GROUP = 128  # columns that share a scale of 4-bit weights
_STEP = 4096  # bytes
_SPREAD = 0.02  # the standard deviation of weights


def make(folder: Path, sizes: dict[str, Any], bits: int, base: Path) -> None:
    """Write the model, and the tokenizer of the folder `base` that LLMPipeline wants to have."""
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    folder.mkdir(parents=True)
    builder = _Builder(sizes, bits)  # holds the constants' memory
    ov.save_model(builder.model(), folder / "openvino_model.xml", compress_to_fp16=False)
    converted = convert_tokenizer(AutoTokenizer.from_pretrained(base), with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), converted, strict=True):
        ov.save_model(part, folder / f"openvino_{name}.xml")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))


class _Builder:
    def __init__(self, sizes: dict[str, Any], bits: int) -> None:
        self.sizes, self.bits = sizes, bits
        largest = max(sizes["vocabulary"], sizes["intermediate"]) * sizes["hidden"] * bits // 8
        # Each matrix starts at another place of this array, so that no two are equal and stored once. Halves of bytes are from -7 to 7.
        values = np.random.default_rng(0).integers(-127, 128, largest + _STEP * 16 * sizes["layers"], dtype=np.int8)
        self._random = values if bits == 8 else ((values % 15 - 7) & 15 | (values // 17 << 4)).astype(np.uint8)
        self._start = 0

    def model(self) -> ov.Model:
        s = self.sizes
        inputs = {
            "input_ids": op.parameter([-1, -1], ov.Type.i64),
            "attention_mask": op.parameter([-1, -1], ov.Type.i64),
            "position_ids": op.parameter([-1, -1], ov.Type.i64),
            "beam_idx": op.parameter([-1], ov.Type.i32),
        }
        for name, node in inputs.items():
            node.set_friendly_name(name)
            node.output(0).set_names({name})
        ids, mask, positions, beam = inputs.values()
        x = op.gather(self._matrix(s["vocabulary"], s["hidden"]), op.convert(ids, "i32"), 0)
        batch = op.gather(op.shape_of(ids), [0], 0)
        live = op.gather(op.shape_of(mask), 1, 0)
        kept = op.less_equal(op.unsqueeze(op.range(0, live, 1, "i64"), [0, 1, 2]), op.unsqueeze(positions, [1, 3]))
        angles = op.matmul(
            op.convert(op.unsqueeze(positions, 2), "f32"),
            (s["rope_theta"] ** (-np.arange(0, s["head_dim"], 2, dtype=np.float32) / s["head_dim"]))[None, None],
            False,
            False,
        )
        angles = op.unsqueeze(op.concat([angles, angles], -1), 1)
        rotary = op.cos(angles), op.sin(angles)
        sinks: list[Any] = []
        for layer in range(s["layers"]):
            x = self._layer(x, layer, rotary, kept, batch, beam, sinks)
        logits = op.result(op.matmul(self._norm(x), self._matrix(s["vocabulary"], s["hidden"]), False, True))
        logits.output(0).set_names({"logits"})
        return ov.Model([logits], sinks, [ids, mask, positions, beam], "qwen2")

    def _layer(self, x: Any, layer: int, rotary: Any, kept: Any, batch: Any, beam: Any, sinks: list[Any]) -> Any:
        s, name = self.sizes, f"model.layers.{layer}"
        normed = self._norm(x)
        q = self._rotated(self._heads(self._linear(normed, s["heads"] * s["head_dim"], bias=True), s["heads"]), rotary)
        k = self._rotated(self._heads(self._linear(normed, s["kv_heads"] * s["head_dim"], bias=True), s["kv_heads"]), rotary)
        v = self._heads(self._linear(normed, s["kv_heads"] * s["head_dim"], bias=True), s["kv_heads"])
        k, v = (
            self._repeated(self._cached(part, f"past_key_values.{layer}.{key}", batch, beam, sinks))
            for key, part in (("key", k), ("value", v))
        )
        mixed = op.scaled_dot_product_attention(q, k, v, kept)
        mixed.set_friendly_name(f"{name}.self_attn.sdpa")
        mixed = op.reshape(op.transpose(mixed, [0, 2, 1, 3]), [0, 0, s["heads"] * s["head_dim"]], True)
        x = op.add(x, self._linear(mixed, s["hidden"]))
        normed = self._norm(x)
        gated = op.multiply(op.swish(self._linear(normed, s["intermediate"])), self._linear(normed, s["intermediate"]))
        return op.add(x, self._linear(gated, s["hidden"]))

    def _norm(self, x: Any) -> Any:
        mean = op.reduce_mean(op.power(x, np.float32(2)), [-1], True)
        scaled = op.multiply(x, op.divide(np.float32(1), op.sqrt(op.add(mean, np.float32(self.sizes["norm_eps"])))))
        return op.multiply(np.ones((1, 1, self.sizes["hidden"]), np.float32), scaled)

    def _linear(self, x: Any, width: int, *, bias: bool = False) -> Any:
        rows = x.get_output_partial_shape(0)[-1].get_length()
        y = op.matmul(x, self._matrix(width, rows), False, True)
        return op.add(y, np.zeros((1, 1, width), np.float32)) if bias else y

    def _matrix(self, rows: int, columns: int) -> Any:
        """f32 [rows, columns], of compressed weights."""
        size = rows * columns * self.bits // 8
        self._start += _STEP
        part = self._random[self._start : self._start + size]
        if self.bits == 8:
            stored = _constant(part.reshape(rows, columns), ov.Type.i8, [rows, columns])
            scale = np.full((rows, 1), _SPREAD / 73, np.float16)
            return op.convert(op.multiply(op.convert(stored, "f16"), scale), "f32")
        groups = [rows, columns // _GROUP, _GROUP]
        stored = _constant(part, ov.Type.i4, groups)
        scale = np.full((rows, columns // _GROUP, 1), _SPREAD / 4.3, np.float16)
        return op.convert(op.reshape(op.multiply(op.convert(stored, "f16"), scale), [rows, columns], False), "f32")

    def _heads(self, x: Any, heads: int) -> Any:
        return op.transpose(op.reshape(x, [0, 0, heads, self.sizes["head_dim"]], True), [0, 2, 1, 3])

    def _rotated(self, x: Any, rotary: Any) -> Any:
        half, end = self.sizes["head_dim"] // 2, np.iinfo(np.int64).max
        first, second = op.slice(x, [0], [half], [1], [3]), op.slice(x, [half], [end], [1], [3])
        turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
        return op.add(op.multiply(x, rotary[0]), op.multiply(turned, rotary[1]))

    def _cached(self, new: Any, name: str, batch: Any, beam: Any, sinks: list[Any]) -> Any:
        s = self.sizes
        shape = ov.PartialShape([-1, s["kv_heads"], -1, s["head_dim"]])
        info = util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, f"{name}present"
        variable = util.Variable(info)
        empty = op.broadcast(np.float32(0), op.concat([batch, np.array([s["kv_heads"], 0, s["head_dim"]], np.int64)], 0))
        past = op.gather(op.read_value(empty, variable), beam, 0)
        cache = op.concat([past, new], 2)
        sinks.append(op.assign(cache, variable))
        return cache

    def _repeated(self, x: Any) -> Any:
        """[batch, kv_heads, live, head_dim] -> [batch, heads, live, head_dim]."""
        s = self.sizes
        times = s["heads"] // s["kv_heads"]
        shape = op.concat(
            [
                op.gather(op.shape_of(x), [0, 1], 0),
                np.array([times], np.int64),
                op.gather(op.shape_of(x), [2, 3], 0),
            ],
            0,
        )
        return op.reshape(op.broadcast(op.unsqueeze(x, 2), shape, "BIDIRECTIONAL"), [0, s["heads"], -1, s["head_dim"]], True)


def _constant(values: np.ndarray, kind: ov.Type, shape: list[int]) -> Any:
    """A constant that shares the memory of `values`."""
    return ov.op.Constant(ov.Tensor(values, ov.Shape(shape), kind), True)


def measure(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Seconds of loading, prefill and decode steps, from the pipeline's own counters."""
    import openvino_genai as genai

    began = time.perf_counter()
    options = {"INFERENCE_NUM_THREADS": plan["threads"], "PERFORMANCE_HINT": "LATENCY", **plan.get("options", {})}
    pipeline = genai.LLMPipeline(folder, "CPU", **options)
    loaded = time.perf_counter() - began
    config = genai.GenerationConfig(max_new_tokens=plan["steps"] + 1, ignore_eos=True, do_sample=False)
    rng = np.random.default_rng(0)
    times: dict[str, Any] = {}
    for tokens, runs in plan["prompts"]:
        prefill, decode = [], []
        for _ in range(runs):
            ids = rng.integers(0, plan["vocabulary"], (1, tokens), dtype=np.int64)
            inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
            found = pipeline.generate(inputs, config).perf_metrics
            prefill.append(found.get_ttft().mean / 1e3)
            decode += [duration / 1e6 for duration in found.raw_metrics.m_durations][-plan["steps"] :]
        times[str(tokens)] = {"prefill": prefill, "decode": decode}
    return {"version": genai.__version__, "load_seconds": loaded, "prompts": times}


def main() -> None:
    request = json.loads(sys.argv[1])
    if request["do"] == "make":
        make(Path(request["to"]), request["sizes"], request["bits"], Path(request["base"]))
    else:
        print(json.dumps(measure(Path(request["model"]), request)))


if __name__ == "__main__":
    main()
