"""Exports whose SAM2 graphs are traced once a session: tracing takes 11 seconds of an export's 12, whatever the model's size.

The graphs are the exporter's own, and their weights too: only a module that was traced before, with the same values, is not traced again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from vessel_export.bundle import bundle_writer
from vessel_export.graphs import sam2_image_encoder, sam2_mask_decoder, sam2_memory, torch_export
from vessel_export.graphs.assemble import Graph
from vessel_export.io.safetensors_writer import OutputTensor
from vessel_export.io.subprocess_call import SubprocessCall

_Traced = tuple[Graph, list[OutputTensor]]

_traced: dict[tuple[object, ...], _Traced] = {}


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Exports in this block trace in this process, and only what was not traced before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_writer, "subprocess_call", _here)
        patch.setattr(sam2_image_encoder, "trace", _trace)
        patch.setattr(sam2_mask_decoder, "trace", _trace)
        patch.setattr(sam2_memory, "trace", _trace)
        yield


@contextlib.contextmanager
def _here(function: Callable[..., Any]) -> Iterator[SubprocessCall[..., Any]]:
    """In the place of `subprocess_call.subprocess_call`."""
    given: dict[str, Any] = {}
    yield SubprocessCall(
        lambda *args, **kwargs: given.update(args=args, kwargs=kwargs), lambda: function(*given["args"], **given["kwargs"])
    )


def _trace(name: str, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], *more: Any, opset: int, **how: Any) -> _Traced:
    """In the place of `torch_export.trace`."""
    shapes = tuple((key, value.dtype, value.shape) for key, value in inputs.items())
    key = (name, opset, shapes, _sha256(module))
    if key not in _traced:
        _traced[key] = torch_export.trace(name, module, inputs, *more, opset=opset, **how)
    graph, weights = _traced[key]
    return dataclasses.replace(graph, model=graph.model.clone()), weights


def _sha256(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
