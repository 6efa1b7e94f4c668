"""Which CUDA kernels of ONNX Runtime the graphs of bundles need, and whether it has them: on a stub device (stub_cuda.py), without a GPU.

    pip install --target ort-gpu --no-deps onnxruntime-gpu==1.28.0
    PYTHONPATH=ort-gpu python -m benchmarks.cuda_kernels engines/*

Every graph is loaded on `cuda` twice with the runtime's own options. Without optimization, each of its nodes is given to a kernel of the
CUDA provider or to the CPU; there may only be arithmetic of shapes: vectors of integers. With optimization, fused nodes need kernels, too.
Then each stage runs with one image and with two, and the language model as for a prompt and for one token. The cache must not be copied,
and no scores of an Attention may be written to memory, at the widths of the full model. MatMulNBits, to which DequantizeLinear and MatMul
are fused, is tried at the full width, too.

The result is saved as cuda-kernels.json; tests compare it with the graphs that the exporter writes. It fails with a list of what is wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from benchmarks.stub_cuda import StubCuda, provider_library
from vessel_rt.device.providers import Device, onnxruntime, open_device
from vessel_rt.device.session import Session
from vessel_rt.errors import first_line
from vessel_rt.formats.bundle import Bundle, TensorSpec

__all__ = ["RESULT", "Node", "nodes_of"]

RESULT = Path(__file__).parent / "results" / "cuda-kernels.json"

_CUDA = Device("cuda")

# Attention of the full model: query heads, key heads, their width, queries, keys, and whether there is a mask.
_ATTENTIONS = {
    "vision_encoder, a tile": (16, 16, 64, 1025, 1025, False),
    "language_model, a prompt of 13 tiles": (28, 4, 128, 3396, 3400, True),
    "language_model, the same, keys not a multiple of 4": (28, 4, 128, 3396, 3397, True),  # the runtime rounds them up
    "language_model, one token": (28, 4, 128, 1, 3408, True),
    "sam2_image_encoder, a window": (2, 2, 72, 64, 64, False),
    "sam2_image_encoder, the whole image": (8, 8, 72, 4096, 4096, False),
    "sam2_memory_attention, 11 memories and 20 pointers": (1, 1, 256, 4096, 45136, False),
}
# How Attention is computed, by a part of its kernel's name.
_WAYS = {"flash_fwd": "flash", "attention_kernel_batched_impl": "memory-efficient", "UnfusedSoftmaxKernel": "scores in memory"}
_FUSED = ("flash", "memory-efficient")
_MATRIX = (3584, 18944)  # of the full model's MLPs: its largest, except the head
_Kind: TypeAlias = tuple[int, list[int]]  # an element's type, and a shape
_TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@dataclasses.dataclass(frozen=True)
class Node:
    """One node of a graph. `kernel` names the kernel that it needs: operator, version, types of the inputs."""

    name: str
    kernel: str
    on_host: bool  # all inputs and outputs are vectors of integers, or scalars: it may be computed on the CPU


def nodes_of(path: Path) -> list[Node]:
    """The nodes of the graph at `path`. Its weights are not read."""
    model = onnx.load(path, load_external_data=False)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
    kinds = {name: (kind.elem_type, len(kind.shape.dim) if kind.HasField("shape") else None) for name, kind in values.items()}
    kinds |= {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        version = 1 if node.domain else onnx.defs.get_schema(node.op_type, opsets[""]).since_version
        types = [onnx.TensorProto.DataType.Name(kinds[name][0]).lower() if name else "-" for name in node.input]
        edges = [kinds[name] for name in (*node.input, *node.output) if name]
        small = all(kind == onnx.TensorProto.INT64 and rank is not None and rank <= 1 for kind, rank in edges)
        small = small or node.op_type == "Shape"  # it reads no values
        found.append(Node(node.name, f"{node.domain + '.' if node.domain else ''}{node.op_type}-{version}({', '.join(types)})", small))
    return found


class _Observed(Session):
    """A session that shows where its nodes run, and its graph after optimization."""

    def __init__(self, path: Path, *, optimize: bool) -> None:
        self._optimize = optimize
        super().__init__(path, _CUDA, 1)

    def _load(self, path: Path, options: Any, providers: Any) -> Any:
        if not self._optimize:
            options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
            return super()._load(path, options, providers)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            session = super()._load(path, options, providers)
            self.operators = collections.Counter(
                ".".join(filter(None, (node.domain, node.op_type)))
                for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
            )
        return session

    def provider_of(self) -> dict[str, str]:
        """The provider of each node, by the node's name."""
        return {node.name: part.ep_name for part in self._session.get_provider_graph_assignment_info() for node in part.get_nodes()}


def _kernels(path: Path) -> tuple[set[str], set[str], list[str]]:
    """The kernels that the graph's nodes have on the device, those that run on the host, and what is wrong."""
    nodes = nodes_of(path)
    with _Observed(path, optimize=False) as session:
        providers = session.provider_of()
    device, host, wrong = set(), set(), []
    for node in nodes:
        if providers.get(node.name) == "CUDAExecutionProvider":
            device.add(node.kernel)
        elif node.on_host:
            host.add(node.kernel)
        else:
            wrong.append(f"{path.parent.name}/{path.name}: {node.name}, {node.kernel}, runs on {providers.get(node.name)}")
    return device, host, wrong


def _fused(path: Path) -> tuple[set[str], list[str]]:
    """The operators that optimization adds to the graph, and what is wrong."""
    before = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    with _Observed(path, optimize=True) as session:
        added = {name for name in session.operators if name.rpartition(".")[2] not in before}
    copies = added & {"MemcpyToHost", "MemcpyFromHost"}
    return added - copies, [f"{path.parent.name}/{path.name}: values are copied between operators"] if copies else []


def _run(bundle: Bundle, stub: StubCuda) -> Iterator[tuple[str, int, int]]:
    """Run every stage: what ran, and the bytes that were copied to the device and to the host, which were not its inputs and outputs."""
    for name, stage in bundle.all_stages.items():
        with Session(bundle.folder / stage.file, _CUDA, 1) as session:
            runs = {
                f"{images} images": {"tiles": images, "images": images, "masks": images, "memories": images, "pointers": images}
                for images in (1, 2)
            }
            if name == "language_model":
                runs = {
                    f"{what}, {batch} rows": {"batch": batch, "sequence": tokens, "kept": min(tokens, 16), "live": 320}
                    for batch, (what, tokens) in itertools.product((1, 2), (("a prompt", 300), ("a token", 1)))
                }
            for what, axes in runs.items():
                shapes = {spec.name: [int(axes.get(str(axis), axis)) for axis in spec.shape] for spec in stage.inputs}
                past = {spec.name for spec in stage.inputs if spec.name.startswith("past_")}
                feeds = {
                    spec.name: session.zeros(shapes[spec.name], spec.dtype)
                    if spec.name in past
                    else np.zeros(shapes[spec.name], _numpy(spec))
                    for spec in stage.inputs
                }
                into = {key.replace("past", "present"): value for key, value in feeds.items() if key in past}
                session.run(feeds, into=into)  # the first run also copies constants
                stub.reset()
                outputs = session.run(feeds, into=into)
                given = sum(value.nbytes for value in feeds.values() if isinstance(value, np.ndarray))
                to_device, to_host = stub.copied()
                yield f"{name}: {what}", to_device - given, to_host - sum(value.nbytes for value in outputs.values())


def _numpy(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(np.float32 if spec.dtype == "bfloat16" else spec.dtype)


def _one_node(stub: StubCuda, operator: str, inputs: Mapping[str, _Kind], output: _Kind, **attributes: Any) -> tuple[list[str], int]:
    """The kernels that a graph of one node launches, and the largest piece of memory that it takes, in bytes."""
    domain = attributes.pop("domain", "")
    node = onnx.helper.make_node(operator, list(inputs), ["y"], domain=domain, **attributes)
    edges = [onnx.helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    graph = onnx.helper.make_graph([node], operator, edges, [onnx.helper.make_tensor_value_info("y", *output)])
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    ort = onnxruntime()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    for name, (dtype, dims) in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_shape_and_type(dims, dtype, "cuda", 0))
    binding.bind_output("y", "cuda")
    stub.reset()
    session.run_with_iobinding(binding)
    return stub.launched(), stub.largest()


def _attention(stub: StubCuda, kind: int, shape: tuple[int, int, int, int, int, bool]) -> tuple[str, int]:
    """How an Attention is computed, and the largest piece of memory that it takes, in bytes."""
    heads, key_heads, width, queries, keys, masked = shape
    inputs = {"q": (kind, [1, heads, queries, width]), "k": (kind, [1, key_heads, keys, width]), "v": (kind, [1, key_heads, keys, width])}
    if masked:
        inputs["mask"] = onnx.TensorProto.BOOL, [1, 1, queries, keys]
    kernels, largest = _one_node(stub, "Attention", inputs, inputs["q"], scale=width**-0.5)
    ways = [way for part, way in _WAYS.items() if any(part in kernel for kernel in kernels)]
    return " and ".join(ways) or "unknown", largest


def _quantized(stub: StubCuda, bits: int, rows: int) -> tuple[bool, int]:
    """Whether an FP16 MatMulNBits widens its whole matrix first, and the largest piece of memory that it takes, in bytes."""
    fp16, (size, columns), block = onnx.TensorProto.FLOAT16, _MATRIX, 128
    inputs = {
        "x": (fp16, [rows, size]),
        "w": (onnx.TensorProto.UINT8, [columns, size // block, block * bits // 8]),
        "scale": (fp16, [columns * size // block]),
    }
    settings = {"K": size, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4, "domain": "com.microsoft"}
    kernels, largest = _one_node(stub, "MatMulNBits", inputs, (fp16, [rows, columns]), **settings)
    return any("Dequantize" in kernel for kernel in kernels), largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="bundles of all precisions and types of weights")
    parser.add_argument("--out", type=Path, default=RESULT, help="where to save the result")
    arguments = parser.parse_args()
    stub = StubCuda(provider_library())
    open_device(_CUDA)
    wrong: list[str] = []
    kernels: set[str] = set()
    host: set[str] = set()
    fused: set[str] = set()
    copies: dict[str, Mapping[str, tuple[int, int]]] = {}
    for folder in arguments.bundles:
        bundle = Bundle.load(folder)
        for stage in bundle.all_stages.values():
            path = folder / stage.file
            try:
                found = _kernels(path)
                more = _fused(path)
            except Exception as e:  # what does not load is a result
                wrong.append(f"{folder.name}/{stage.file}: {first_line(e)}")
                continue
            kernels, host, fused = kernels | found[0], host | found[1], fused | more[0]
            wrong += found[2] + more[1]
        try:
            copies[folder.name] = {what: (to_device, to_host) for what, to_device, to_host in _run(bundle, stub)}
        except Exception as e:
            wrong.append(f"{folder.name}: {first_line(e)}")
    attention: dict[str, dict[str, tuple[str, int]]] = collections.defaultdict(dict)
    for (what, shape), (name, kind) in itertools.product(_ATTENTIONS.items(), _TYPES.items()):
        try:
            way, largest = attention[what][name] = _attention(stub, kind, shape)
        except Exception as e:
            wrong.append(f"Attention, {what}, {name}: {first_line(e)}")
            continue
        keys, masked = shape[4:]
        if name != "fp32" and way not in _FUSED and (keys % 8 == 0 or not masked):
            wrong.append(f"Attention, {what}, {name}: {way}, {largest} bytes")
    result = {
        "onnxruntime_gpu": onnxruntime().__version__, "cuda": stub.cuda, "bundles": [folder.name for folder in arguments.bundles],
        "kernels": sorted(kernels), "on_the_host": sorted(host), "fused": sorted(fused), "wrong": wrong,
        "copied_besides_inputs_and_outputs": copies, "attention": attention,
        "matmulnbits": {f"int{bits}, {rows} rows": _quantized(stub, bits, rows) for bits in (8, 4) for rows in (1, 16, 3400)},
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(wrong) or f"all {len(kernels)} kernels are there")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
