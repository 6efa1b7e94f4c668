"""The full-size model on a CPU beside llama.cpp, OpenVINO GenAI and PyTorch.

    python -m benchmarks.cpu_peers --model DIR --peers DIR [--parts PART ...] [--rounds 2]

benchmarks.synth writes the model. The bundles cpu-int8 and cpu-int4 are exported next to it unless they are there. The peers have
environments of their own, PEERS/llama-cpp and PEERS/openvino. The part of one that is absent is left out, and the result says why. To make
them:

    python -m venv PEERS/llama-cpp
    CMAKE_ARGS=-DGGML_NATIVE=ON PEERS/llama-cpp/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf    # compiles for minutes
    python -m venv PEERS/openvino
    PEERS/openvino/bin/pip install openvino-genai 'transformers<5'    # transformers converts the tokenizer

Each part compares this project with one peer. They take turns, each in a process of its own with as many threads as the machine has cores:

- llama.cpp-int8, llama.cpp-int4, openvino-int8, openvino-int4: the language model as `vessel-rt infer` runs it, and a peer's model of the
  same sizes with random weights of as many bits, which is in PEERS/models while the part is measured (8 GB). The prompts have 320 and 2,600
  tokens. The longer one is run in the first round only. A process first runs one short prompt that does not count.
- pytorch: the same with 8 bits and PyTorch in BF16, which runs in this environment: transformers' Qwen2 with sdpa, the base model's weights
  without LoRA.
- frame: a frame of 512x512 pixels from pixels to mask, by `vessel-rt infer` with 8 bits and by PyTorch in BF16, which generates as many
  tokens. PyTorch's stages are loaded one after the other.

- profile: our language model with 8 bits, without a peer: ONNX Runtime's time for each kind of matrix and of operator.

A part of language models begins with the machine's rates: bytes read from memory, and operations of matrix products.
The fastest of several times counts, because other load slows most of them; `other_load` is the share of the processors that other
processes used during each run. The result of a part replaces the part's earlier one in results/cpu_peers.json. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from benchmarks.infer import measure_frames
from benchmarks.measure import RESULTS, machine, others_seconds, publish
from vessel_rt.formats.bundle import Bundle

if TYPE_CHECKING:
    from vessel_rt.device.session import Session

_BIN = Path(sys.executable).parent
_PROGRAMS = Path(__file__).parent / "peers"
_SHORT, _LONG = 320, 2600  # tokens of a prompt with one tile, and with ten
_STEPS = 8  # decode steps after each prompt
_CAPACITY = 4096
_SIDE = 512
_QUESTION = "Please segment vessel in this image."
_RUNS = 5  # of a rate; the fastest counts
_PARTS = ("llama.cpp-int8", "llama.cpp-int4", "openvino-int8", "openvino-int4", "pytorch", "frame", "profile")
_RECIPE = Path("engines/cpu-int8.toml")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The language model's shape. Matrices: those that every token is multiplied by, and the head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    @property
    def matrices(self) -> int:
        """Numbers in the layers' matrices."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    def prefill_operations(self, tokens: int) -> int:
        """Of a prompt and the logits of its last token: a multiplication and an addition for each term. Causal attention."""
        attention = 4 * self.layers * self.heads * self.head_dim * tokens * (tokens + 1) // 2
        return 2 * (self.matrices * tokens + self.head) + attention

    def decode_bytes(self, tokens: int, weight_bytes: float, cache_bytes: int) -> float:
        """Read by a step after `tokens` tokens: all matrices, of `weight_bytes` a number, and keys and values of `cache_bytes`."""
        return (self.matrices + self.head) * weight_bytes + 2 * self.layers * self.kv_heads * self.head_dim * tokens * cache_bytes


@dataclasses.dataclass(frozen=True)
class Contender:
    """What `command` runs with `model`. Bytes are those of a number: of the matrices, with its part of the scales, and of the cache."""

    name: str
    rate: str  # the type of its products' factors
    weight_bytes: float
    cache_bytes: int
    command: Sequence[str]
    model: Path
    bits: int | None = None  # of the model that is made for a peer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model written by `python -m benchmarks.synth`")
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR", help="the peers' environments, and room for their models")
    parser.add_argument("--bundles", type=Path, metavar="DIR", help="the folder of cpu-int8 and cpu-int4 (default: the model's parent)")
    parser.add_argument("--frames", type=Path, default=Path("examples/tiny/frames"), metavar="DIR", help="the frames that are resized")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="how often the contenders take turns (default: 2)")
    parser.add_argument("--worker", choices=tuple(_WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_WORKERS[arguments.worker](arguments, json.loads(arguments.request))))
        return 0
    arguments.bundles = arguments.bundles or arguments.model.parent
    path = RESULTS / "cpu_peers.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = earlier.get("parts", {}) if earlier.get("machine") == machine() else {}
    for part in arguments.parts:
        measure: Callable[[argparse.Namespace], dict[str, Any]] = functools.partial(_language_part, part=part)
        parts[part] = {"frame": _frame_part, "profile": _profile_part}.get(part, measure)(arguments)
        print(json.dumps({part: parts[part]}), file=sys.stderr)
        publish("cpu_peers", {"parts": {name: parts[name] for name in _PARTS if name in parts}})
    return 0


def _language_part(arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    """Measure the language model of this project and of a peer in turn."""
    bundle = Bundle.load(_bundle(arguments, "int4" if part.endswith("int4") else "int8"))
    sizes = _sizes(bundle, arguments.model)
    ours, theirs = _contenders(arguments, part, bundle, sizes)
    if not Path(theirs.command[0]).exists():
        return {"absent": f"there is no {Path(theirs.command[0]).relative_to(arguments.peers)} in the peers' folder"}
    rates = _call(_ours(arguments, "rates"), {})
    rounds: dict[str, list[dict[str, Any]]] = {ours.name: [], theirs.name: []}
    plan = {"do": "time", "threads": os.cpu_count(), "capacity": _CAPACITY, "vocabulary": sizes.vocabulary - 100, "steps": _STEPS}
    try:
        if theirs.bits:
            _make(theirs, sizes, arguments.model / "base")
        for number in range(arguments.rounds):
            prompts = [(_SHORT, 4), *([(_LONG, 1)] if number == 0 else [])]
            for contender in (ours, theirs):
                found = _call(contender.command, {**plan, "prompts": prompts, "model": str(contender.model)})
                found["prompts"][str(_SHORT)]["prefill"].pop(0)  # arenas grow, files are read
                rounds[contender.name].append(found)
                print(f"round {number + 1}, {contender.name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    finally:
        if theirs.bits:
            _remove(theirs.model)
    return {
        "rates": rates,
        "contenders": {contender.name: summary(contender, sizes, rounds[contender.name]) for contender in (ours, theirs)},
        "ratios": ratios(rounds[ours.name], rounds[theirs.name]),
    }


def _make(contender: Contender, sizes: Sizes, base: Path) -> None:
    """Write the peer's model, whole or not at all."""
    contender.model.parent.mkdir(exist_ok=True)
    _remove(contender.model)
    partial = contender.model.with_name(f".{contender.model.name}.partial")
    _remove(partial)
    _call(
        contender.command,
        {"do": "make", "to": str(partial), "sizes": dataclasses.asdict(sizes), "bits": contender.bits, "base": str(base.resolve())},
    )
    partial.rename(contender.model)


def _remove(model: Path) -> None:
    if model.is_dir():
        shutil.rmtree(model)
    else:
        model.unlink(missing_ok=True)


def _frame_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a frame from pixels to mask."""
    request = {"bundle": str(_bundle(arguments, "int8")), "frames": str(arguments.frames.resolve())}
    ours, theirs = [], []
    for number in range(arguments.rounds):
        ours.append(_call(_ours(arguments, "our-frame"), request))
        steps = round(ours[-1]["generated_tokens"])
        theirs.append(_call(_ours(arguments, "torch-frame"), {**request, "steps": steps, "threads": os.cpu_count()}))
        print(f"frame, round {number + 1}: {ours[-1]}, {theirs[-1]}", file=sys.stderr, flush=True)
    return {
        "tokens": theirs[0]["tokens"],
        "generated_tokens": ours[0]["generated_tokens"],
        "seconds_by_step": {
            "vessel-rt INT8": {step: _median(run["seconds_by_step"][step] for run in ours) for step in ours[0]["seconds_by_step"]},
            "PyTorch BF16": {step: _median(run["seconds_by_step"][step] for run in theirs) for step in theirs[0]["seconds_by_step"]},
        },
        "seconds_per_frame": {
            "vessel-rt INT8": _median(run["seconds_per_frame"] for run in ours),
            "PyTorch BF16": _median(run["seconds_per_frame"] for run in theirs),
        },
        "other_load": [[our["other_load"], their["other_load"]] for our, their in zip(ours, theirs, strict=True)],
        "ratio": [round(their["seconds_per_frame"] / our["seconds_per_frame"], 2) for our, their in zip(ours, theirs, strict=True)],
    }


def _profile_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each kind of node, of a prefill and of a decode step."""
    bundle = _bundle(arguments, "int8")
    sizes = _sizes(Bundle.load(bundle), arguments.model)
    request = {
        "threads": os.cpu_count(),
        "vocabulary": sizes.vocabulary - 100,
        "steps": _STEPS,
        "prompts": [(_SHORT, 2)],
        "model": str(bundle),
    }
    return _call(_ours(arguments, "profile"), request)


def _ours(arguments: argparse.Namespace, worker: str) -> Sequence[str]:
    """The command of a worker in this environment."""
    return (
        sys.executable,
        "-m",
        "benchmarks.cpu_peers",
        "--model",
        str(arguments.model),
        "--peers",
        str(arguments.peers),
        "--worker",
        worker,
    )


def _contenders(arguments: argparse.Namespace, part: str, bundle: Bundle, sizes: Sizes) -> tuple[Contender, Contender]:
    """Ours and the peer of a part."""
    stored = sum(record.bytes for name, record in bundle.files.items() if Path(name).name == "language_model.safetensors")
    bits = 4 if part.endswith("int4") else 8
    ours = Contender(f"vessel-rt INT{bits}", "int8", stored / (sizes.matrices + sizes.head), 4, _ours(arguments, "ours"), bundle.folder)
    if part == "pytorch":
        return ours, Contender("PyTorch BF16", "bf16", 2, 2, _ours(arguments, "torch"), arguments.model)
    if part.startswith("llama.cpp"):
        name, environment, program, of_scales, cache_bytes = f"llama.cpp Q{bits}_0", "llama-cpp", "llama_cpp_peer.py", 2 / 32, 2
    else:
        name, environment, program, cache_bytes = f"OpenVINO GenAI INT{bits}", "openvino", "openvino_genai_peer.py", 1
        of_scales = 0 if bits == 8 else 2 / 128
    command = str(arguments.peers / environment / "bin/python"), "-P", str(_PROGRAMS / program)
    return ours, Contender(name, "int8", bits / 8 + of_scales, cache_bytes, command, arguments.peers / "models" / part, bits)


def summary(contender: Contender, sizes: Sizes, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By prompt: seconds of prefill and its operations, milliseconds of a decode step and the bytes that it reads."""
    found: dict[str, Any] = {key: value for key, value in rounds[0].items() if key not in ("prompts", "other_load")}
    found |= {"rate": contender.rate, "weight_bytes": round((sizes.matrices + sizes.head) * contender.weight_bytes)}
    found |= {"other_load": [run["other_load"] for run in rounds], "prompts": {}}
    for tokens in rounds[0]["prompts"]:
        prefill, decode = _all(rounds, tokens, "prefill"), _all(rounds, tokens, "decode")
        found["prompts"][tokens] = {
            "prefill_seconds": {"fastest": round(min(prefill), 2), "all": [round(seconds, 2) for seconds in prefill]},
            "prefill_operations": sizes.prefill_operations(int(tokens)),
            "decode_ms": {"fastest": round(min(decode) * 1e3, 1), "median": round(statistics.median(decode) * 1e3, 1)},
            "decode_bytes": round(sizes.decode_bytes(int(tokens), contender.weight_bytes, contender.cache_bytes)),
        }
    return found


def ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """By prompt, for prefill and decode: the peer's fastest time over ours, of each round that ran the prompt. Above 1 we are faster."""
    found: dict[str, dict[str, list[float]]] = {}
    for our, their in zip(ours, theirs, strict=True):
        for tokens, times in our["prompts"].items():
            for what, seconds in times.items():
                ratio = min(their["prompts"][tokens][what]) / min(seconds)
                found.setdefault(tokens, {}).setdefault(what, []).append(round(ratio, 2))
    return found


def _all(rounds: Sequence[Mapping[str, Any]], tokens: str, what: str) -> list[float]:
    return [seconds for found in rounds if tokens in found["prompts"] for seconds in found["prompts"][tokens][what]]


def _median(seconds: Iterable[float]) -> float:
    return round(statistics.median(seconds), 2)


def _sizes(bundle: Bundle, model: Path) -> Sizes:
    text = json.loads((model / "base/config.json").read_text(encoding="utf-8"))["llm_config"]
    found = bundle.language_model
    return Sizes(
        layers=found.layers,
        hidden=found.hidden_size,
        heads=text["num_attention_heads"],
        kv_heads=found.kv_heads,
        head_dim=found.head_dim,
        intermediate=text["intermediate_size"],
        vocabulary=found.vocabulary,
        rope_theta=text["rope_theta"],
        norm_eps=text["rms_norm_eps"],
    )


def _bundle(arguments: argparse.Namespace, weights: str) -> Path:
    """The bundle with `weights`, exported unless it is there."""
    folder: Path = (arguments.bundles / f"cpu-{weights}").resolve()
    if folder.exists():
        return folder
    [checkpoint], [sam2] = arguments.model.glob("iter_*.pth"), arguments.model.glob("sam2_*.pt")
    sources = ["--ckpt", checkpoint, "--base", arguments.model / "base", "--sam2", sam2]
    with tempfile.TemporaryDirectory() as work:
        recipe = Path(work) / f"cpu-{weights}.toml"
        recipe.write_text(_RECIPE.read_text(encoding="utf-8").replace('weights = "int8"', f'weights = "{weights}"'), encoding="utf-8")
        subprocess.run([_BIN / "vessel-export", "export", *sources, "--recipe", recipe, "--out", folder], check=True, stdout=sys.stderr)
    return folder


def _call(command: Sequence[str], request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a program with a request, and return what its last line says; {} if it says nothing.

    `other_load` is added: the share of the machine's processor time that other processes used meanwhile, from 0 to 1.
    """
    argument = [json.dumps(request)]
    began, busy = time.perf_counter(), others_seconds()
    done = subprocess.run([*command, *(["--request", *argument] if "-m" in command else argument)], stdout=subprocess.PIPE, check=True)
    load = (others_seconds() - busy) / (time.perf_counter() - began) / (os.cpu_count() or 1)
    lines = done.stdout.decode().strip().splitlines()
    return {**json.loads(lines[-1]), "other_load": round(max(load, 0), 3)} if lines else {}


# The workers: each is a process of its own.


def _rates(arguments: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, float]:
    """Bytes read per second, and operations per second of products in torch, by the type of their factors, and in ONNX Runtime."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    a, b = torch.randn(2048, 4096), torch.randn(4096, 4096)
    small, large = (torch.randint(-127, 127, x.shape, dtype=torch.int8) for x in (a, b))
    half_a, half_b = a.bfloat16(), b.bfloat16()
    operations = 2 * a.numel() * b.shape[1]
    return {
        "bytes": _read_rate(),
        "fp32": operations / _fastest(lambda: torch.mm(a, b)),
        "bf16": operations / _fastest(lambda: torch.mm(half_a, half_b)),
        "int8": operations / _fastest(lambda: torch._int_mm(small, large)),
        "MatMulNBits": _matmul_nbits_rate(),
    }


def _read_rate() -> float:
    """Bytes per second read by all cores, from more memory than caches hold."""
    threads = os.cpu_count() or 1
    parts = [np.ones((1 << 30) // 4 // threads, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return (1 << 30) / _fastest(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))


def _matmul_nbits_rate() -> float:
    """Operations per second of ONNX Runtime's product with a matrix of 8 bits, of 512 rows as in a prompt."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from vessel_rt.device.providers import onnxruntime

    rows, columns, tokens, block = 3584, 18944, 512, 128
    values = np.random.default_rng(0).integers(0, 256, (columns, rows // block, block), dtype=np.uint8)
    scales = np.full(columns * rows // block, 1e-3, np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=rows, N=columns, bits=8, block_size=block, accuracy_level=4
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, columns])],
        [numpy_helper.from_array(values, "w"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((tokens, rows), dtype=np.float32)
    return 2 * rows * columns * tokens / _fastest(lambda: session.run(None, {"x": x}))


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    seconds = []
    for _ in range(_RUNS + 1):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _our_language_model(arguments: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, Any]:
    """Prefill and decode steps as `vessel-rt infer` runs them, without a draft."""
    from vessel_rt.device.deployment import Deployment
    from vessel_rt.device.providers import Device

    bundle = Bundle.load(Path(request["model"]))
    graphs = {name: bundle.folder / stage.file for name, stage in bundle.stages.items()}
    began = time.perf_counter()
    with Deployment(bundle, Device("cpu"), graphs).session("language_model", request["threads"]) as session:
        loaded = time.perf_counter() - began
        return {"load_seconds": loaded, "prompts": _our_times(bundle, session, request)}


def _our_times(bundle: Bundle, session: Session, request: Mapping[str, Any]) -> dict[str, Any]:
    from vessel_rt.formats.profiles import CPU_TOKENS
    from vessel_rt.model.decoding import LanguageModel
    from vessel_rt.model.prompt import EmbedTokens

    steps, rng = request["steps"], np.random.default_rng(0)
    endless = msgspec.structs.replace(
        bundle,
        prompt=msgspec.structs.replace(bundle.prompt, stop_token_ids=()),
        language_model=msgspec.structs.replace(bundle.language_model, max_new_tokens=steps + 1),
    )
    watched = _Watched(session)
    with EmbedTokens(bundle) as table:
        model = LanguageModel(watched, endless, table, CPU_TOKENS)  # type: ignore[arg-type]

        def run(tokens: int) -> tuple[list[float], list[float]]:
            prompt = table.rows(rng.integers(0, request["vocabulary"], tokens).tolist())
            watched.ended.clear()
            began = time.perf_counter()
            model.generate([prompt])
            ends = watched.ended[-steps - 1 :]
            return [ends[0] - began], np.diff(ends).tolist()

        return _repeated(request["prompts"], run)


def _profile(arguments: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, Any]:
    from vessel_rt.device.providers import Device
    from vessel_rt.device.session import Session

    class Profiled(Session):
        def _load(self, path: Path, options: Any, providers: Any) -> Any:
            options.enable_profiling, options.profile_file_prefix = True, f"{work}/profile"
            return super()._load(path, options, providers)

    bundle = Bundle.load(Path(request["model"]))
    with (
        tempfile.TemporaryDirectory() as work,
        Profiled(bundle.folder / bundle.stages["language_model"].file, Device("cpu"), request["threads"]) as session,
    ):
        _our_times(bundle, session, {**request, "prompts": [(_SHORT, 2), (_LONG, 1)]})
        events = json.loads(Path(session._session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event.get("name") == "model_run"]
    kinds = [node_kinds(events, run["ts"], run["ts"] + run["dur"]) for run in runs]
    steps = request["steps"]
    second, third = kinds[1 + steps : 2 * (1 + steps)], kinds[-steps:]  # a short prompt is one run; the long one has several

    def middle(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {kind: round(statistics.median(one[kind] for one in found), 2) for kind in found[0]}

    return {
        f"prefill of {_SHORT}": {kind: round(ms, 1) for kind, ms in second[0].items()},
        f"decode after {_SHORT}": middle(second[1:]),
        f"decode after {_LONG}": middle(third),
    }


def node_kinds(events: Sequence[Mapping[str, Any]], begin: int, end: int) -> dict[str, float]:
    """Milliseconds of the nodes of ONNX Runtime's profile between two times, by matrix or else by operator, the longest first."""
    found: dict[str, float] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and begin <= event["ts"] < end:
            operator = event["args"]["op_name"]
            kind = re.sub(r".*?(\w+)/MatMul_.*", r"\1", name) if operator.startswith("MatMul") else operator
            found[kind] = found.get(kind, 0) + event["dur"] / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class _Watched:
    """A session that notes when each run ends."""

    def __init__(self, session: Session) -> None:
        self._session, self.zeros = session, session.zeros
        self.ended: list[float] = []

    def run(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = self._session.run(*args, **kwargs)
        self.ended.append(time.perf_counter())
        return outputs


def _repeated(prompts: Sequence[tuple[int, int]], run: Callable[[int], tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Seconds of prefill and decode steps, by tokens of the prompt."""
    times = {}
    for tokens, runs in prompts:
        found = [run(tokens) for _ in range(runs)]
        times[str(tokens)] = {"prefill": [s for one, _ in found for s in one], "decode": [s for _, one in found for s in one]}
    return times


def _torch_language_model(arguments: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, Any]:
    """As Sa2VA runs it: transformers' Qwen2 in BF16, one token at a time, with logits of the last position."""
    import torch
    from transformers import DynamicCache, Qwen2ForCausalLM

    from vessel_export.parity.reference_modules import open_internvl3

    torch.set_num_threads(request["threads"])
    began = time.perf_counter()
    base = open_internvl3(Path(request["model"]) / "base")
    qwen2: Any = Qwen2ForCausalLM
    model = qwen2.from_pretrained(
        None, config=base.text_config, state_dict=dict(base.language), dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    del base
    loaded = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def run(tokens: int) -> tuple[list[float], list[float]]:
        ids = torch.randint(0, request["vocabulary"], (1, tokens), generator=generator)
        cache, ends = DynamicCache(), [time.perf_counter()]
        embeds = model.get_input_embeddings()(ids)
        for _ in range(request["steps"] + 1):
            logits = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            embeds = model.get_input_embeddings()(logits.argmax(-1))
            ends.append(time.perf_counter())
        return [ends[1] - ends[0]], np.diff(ends[1:]).tolist()

    return {"load_seconds": loaded, "prompts": _repeated(request["prompts"], run)}


def _our_frame(arguments: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, Any]:
    found = measure_frames(Path(request["bundle"]), Path(request["frames"]), _SIDE, ["--streams", "1"])
    if found is None:
        raise SystemExit("vessel-rt infer failed")
    return found


def _torch_frame(arguments: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each stage of Sa2VA in BF16, the second of two runs. A stage is freed before the next one is loaded."""
    import torch
    from PIL import Image

    from vessel_export.parity import reference_modules as modules
    from vessel_export.parity.reference import Reference
    from vessel_export.parity.reference_pixels import tile_image, to_pixel_values
    from vessel_export.sources.checkpoint import open_checkpoint

    torch.set_num_threads(request["threads"])
    [checkpoint], [sam2] = arguments.model.glob("iter_*.pth"), arguments.model.glob("sam2_*.pt")
    trained, base = open_checkpoint(checkpoint), modules.open_internvl3(arguments.model / "base")
    seconds: dict[str, float] = {}

    def ready(module: Any) -> Any:
        return module.eval().requires_grad_(False).bfloat16()

    def stage(**parts: Any) -> Reference:
        empty = dict.fromkeys(("tokenizer", "vision_model", "projector", "language_model", "text_hidden_fcs", "sam2"))
        size, ratio = base.vision_config.image_size[0], base.downsample_ratio
        return Reference(
            **{**empty, **parts}, tile_size=size, downsample_ratio=ratio, device=torch.device("cpu"), dtype=torch.bfloat16, streamed=False
        )

    def timed(name: str, run: Callable[[], Any]) -> Any:
        run()
        began = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - began
        return result

    with Image.open(sorted(Path(request["frames"]).iterdir())[0]) as file:
        image = file.convert("RGB").resize((_SIDE, _SIDE))
    tiles = timed("tiles", lambda: to_pixel_values(tile_image(image, base.vision_config.image_size[0])).bfloat16())

    def encoded() -> Any:
        vision = stage(vision_model=ready(modules.load_vision_model(base)), projector=ready(modules.load_projector(base, trained)))
        return timed("vision_encoder", lambda: vision.encode_tiles(tiles))

    embeds = encoded()
    tokenizer = modules.load_tokenizer(base)
    prompt = len(stage(tokenizer=tokenizer).prompt_ids(_QUESTION, embeds.shape[0] * embeds.shape[1]))
    plan = {"model": str(arguments.model), "threads": request["threads"], "steps": request["steps"], "vocabulary": len(tokenizer) - 100}
    found = _torch_language_model(arguments, {**plan, "prompts": [[prompt, 2]]})["prompts"][str(prompt)]
    seconds["language_model"] = found["prefill"][1] + sum(found["decode"][request["steps"] :])
    mask_model = modules.load_sam2(sam2, trained)
    text = modules.load_text_hidden_fcs(base.text_config.hidden_size, mask_model.hidden_dim, trained)
    ready(mask_model).sam_prompt_encoder.float()  # as in Reference.load
    masks = stage(sam2=mask_model, text_hidden_fcs=ready(text))
    side = mask_model.image_size
    pixels = timed("square", lambda: to_pixel_values([image.resize((side, side))]).bfloat16())
    features = timed("sam2_image_encoder", lambda: masks.encode_sam2(pixels))
    states = torch.randn(1, base.text_config.hidden_size).bfloat16()
    prediction = timed("sam2_mask_decoder", lambda: masks.decode_masks(features, states))
    timed("upsample", lambda: masks.upsample(prediction.low_res_logits, height=_SIDE, width=_SIDE))
    return {"tokens": prompt, "seconds_by_step": seconds, "seconds_per_frame": sum(seconds.values())}


_WORKERS: dict[str, Callable[[argparse.Namespace, Mapping[str, Any]], dict[str, Any]]] = {
    "rates": _rates,
    "ours": _our_language_model,
    "profile": _profile,
    "torch": _torch_language_model,
    "our-frame": _our_frame,
    "torch-frame": _torch_frame,
}


if __name__ == "__main__":
    sys.exit(main())
