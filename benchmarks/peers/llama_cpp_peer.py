"""llama.cpp: Qwen2 of random weights as a GGUF file (Q8_0 or Q4_0), and its times. Run by benchmarks.cpu_peers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 32  # columns that share a scale, which is stored in two bytes before them
_SPREAD = 0.02  # the standard deviation of weights
_UBATCH = 512  # tokens at once, llama.cpp's default


def make(path: Path, sizes: dict[str, Any], bits: int) -> None:
    """Write the model. It has no vocabulary: only token ids are used."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0 if bits == 8 else gguf.GGMLQuantizationType.Q4_0
    rows = max(sizes["vocabulary"], sizes["intermediate"])
    blocks = np.random.default_rng(0).integers(0, 256, (rows * sizes["hidden"] // _BLOCK, 2 + _BLOCK * bits // 8), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(_SPREAD / (74 if bits == 8 else 4.6)).tobytes(), np.uint8)

    def matrix(name: str, rows: int, columns: int) -> None:
        stored = blocks[: rows * columns // _BLOCK].reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    hidden, wide = sizes["hidden"], sizes["intermediate"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_rope_freq_base(sizes["rope_theta"])
    writer.add_layer_norm_rms_eps(sizes["norm_eps"])
    writer.add_vocab_size(sizes["vocabulary"])
    writer.add_tokenizer_model("no_vocab")
    matrix("token_embd", sizes["vocabulary"], hidden)
    matrix("output", sizes["vocabulary"], hidden)
    vector("output_norm.weight", hidden, 1)
    for layer in range(sizes["layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            vector(f"blk.{layer}.{norm}.weight", hidden, 1)
        for part, heads in (("q", sizes["heads"]), ("k", sizes["kv_heads"]), ("v", sizes["kv_heads"])):
            matrix(f"blk.{layer}.attn_{part}", heads * sizes["head_dim"], hidden)
            vector(f"blk.{layer}.attn_{part}.bias", heads * sizes["head_dim"], 0)
        matrix(f"blk.{layer}.attn_output", hidden, sizes["heads"] * sizes["head_dim"])
        matrix(f"blk.{layer}.ffn_gate", wide, hidden)
        matrix(f"blk.{layer}.ffn_up", wide, hidden)
        matrix(f"blk.{layer}.ffn_down", hidden, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Seconds of loading, prefill (up to the first token's logits) and decode steps."""
    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    began = time.perf_counter()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_ubatch, options.n_batch = plan["capacity"], _UBATCH, plan["capacity"]
    options.n_threads = options.n_threads_batch = plan["threads"]
    context = llama.llama_init_from_model(model, options)
    loaded = time.perf_counter() - began
    rng = np.random.default_rng(0)

    def run(tokens: int, start: int) -> float:
        batch = llama.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for i in range(tokens):
            batch.token[i], batch.pos[i] = int(rng.integers(0, plan["vocabulary"])), start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == tokens - 1
        began = time.perf_counter()
        failed = llama.llama_decode(context, batch)
        llama.llama_synchronize(context)
        seconds = time.perf_counter() - began
        llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returns {failed}")
        return seconds

    times: dict[str, Any] = {}
    for tokens, runs in plan["prompts"]:
        prefill, decode = [], []
        for _ in range(runs):
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            prefill.append(run(tokens, 0))
            decode += [run(1, tokens + step) for step in range(plan["steps"])]
        times[str(tokens)] = {"prefill": prefill, "decode": decode}
    return {"version": llama.__version__, "build": llama.llama_print_system_info().decode(), "load_seconds": loaded, "prompts": times}


def main() -> None:
    request = json.loads(sys.argv[1])
    if request["do"] == "make":
        make(Path(request["to"]), request["sizes"], request["bits"])
    else:
        print(json.dumps(measure(Path(request["model"]), request)))


if __name__ == "__main__":
    main()
