"""Sidecars as `vessel-export build` writes them, beside files that no GPU will see: the checks before loading need no engine."""

from __future__ import annotations

import hashlib
from pathlib import Path

from onnx import TensorProto, helper

from vessel_rt.formats.bundle import STAGES, Bundle
from vessel_rt.formats.engine_sidecar import SCHEMA, Engine, Target
from vessel_rt.formats.file_record import FileRecord

TARGET = Target("rtx", "sm86", "1.7.1")


def wrapper(engine: str) -> bytes:
    """An ONNX graph that names the file of an engine, as builders write it."""
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context=engine)
    graph = helper.make_graph([node], "engine", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


def write_engines(bundle: Bundle, target: Target = TARGET) -> Path:
    """Write all stages' files to the bundle's folder for `target`, and return it."""
    folder = target.folder(bundle)
    folder.mkdir(parents=True)
    for stage in STAGES:
        contents = {f"{stage}.onnx": wrapper(f"{stage}_0.engine"), f"{stage}_0.engine": f"engine of {stage}".encode()}
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o644)
        engine = Engine(
            schema=SCHEMA,
            stage=stage,
            builder=target.builder,
            architecture=target.architecture,
            gpu="NVIDIA GeForce RTX 3090",
            precision=bundle.precision,
            files={name: FileRecord(len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()},
            sources={bundle.stages[stage].file: bundle.files[bundle.stages[stage].file].sha256},
            profile={},
            versions={target.builder: target.version, "onnxruntime": "1.31.1", "driver": None},
        )
        (folder / f"{stage}.json").write_text(engine.to_json())
        (folder / f"{stage}.json").chmod(0o644)
    folder.chmod(0o755)
    return folder
