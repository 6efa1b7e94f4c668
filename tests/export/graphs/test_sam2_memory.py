"""sam2_memory_attention at the real model's width, against sam2's own module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from vessel_export.bundle.bundle_writer import ExportRequest
from vessel_export.graphs.assemble import save_graph
from vessel_export.graphs.sam2_memory import Sam2MemoryAttention, trace_sam2_memory_attention
from vessel_export.io.safetensors_writer import write_safetensors
from vessel_export.sources.base_model import open_sam2

MEMORIES, POINTERS = 11, 20  # of Sa2VA's inference late in a cine: 45,136 keys
TOLERANCE = 3e-6  # relative to the largest value: some four times what was seen, the rounding of long sums in another order


@pytest.fixture(scope="module")
def sam2(full_width_cines: ExportRequest) -> Any:
    return open_sam2(full_width_cines.sam2).build()


@pytest.fixture(scope="module")
def feeds(sam2: Any) -> dict[str, torch.Tensor]:
    random, side, channels = torch.manual_seed(0), sam2.sam_image_embedding_size, sam2.sam_prompt_embed_dim
    return {
        "image_features": torch.randn(1, channels, side, side, generator=random),
        "memories": torch.randn(MEMORIES, sam2.mem_dim, side, side, generator=random),
        "temporal_positions": torch.tensor([6] * 5 + [5, 4, 3, 2, 1, 0]),
        "object_pointers": torch.randn(POINTERS, channels, generator=random),
    }


@pytest.fixture(scope="module")
def expected(sam2: Any, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    """What sam2's MemoryAttention makes of them, called as SAM2Base calls it: [1, C, H, W]."""
    features, memories, side = feeds["image_features"], feeds["memories"], sam2.sam_image_embedding_size
    with torch.inference_mode():
        own = sam2.image_encoder.neck.position_encoding(features)
        spatial = sam2.memory_encoder.position_encoding(memories[:1])
        positions = [spatial.flatten(2).permute(2, 0, 1) + sam2.maskmem_tpos_enc[place] for place in feeds["temporal_positions"]]
        pointers = feeds["object_pointers"].reshape(-1, 1, sam2.mem_dim)
        keys = [memory[None].flatten(2).permute(2, 0, 1) for memory in memories]
        found: torch.Tensor = sam2.memory_attention(
            curr=features.flatten(2).permute(2, 0, 1) - sam2.no_mem_embed,
            curr_pos=own.flatten(2).permute(2, 0, 1),
            memory=torch.cat([*keys, pointers]),
            memory_pos=torch.cat([*positions, torch.zeros_like(pointers)]),
            num_obj_ptr_tokens=len(pointers),
        )
    return found.permute(1, 2, 0).reshape(1, -1, side, side)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.full_width
def test_the_graph_for_cpus(sam2: Any, feeds: dict[str, torch.Tensor], expected: torch.Tensor, tmp_path: Path) -> None:
    graph, weights = trace_sam2_memory_attention(sam2, torch.float32, opset=23)
    save_graph(graph, tmp_path, write_safetensors(tmp_path, "weights.safetensors", weights).locations)
    session = ort.InferenceSession(tmp_path / f"{graph.name}.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    assert np.isfinite(found).all()
    assert _difference(torch.from_numpy(found), expected) <= TOLERANCE


@pytest.mark.full_width
def test_what_the_graph_for_gpus_is_traced_from(sam2: Any, feeds: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    with torch.inference_mode():
        found = Sam2MemoryAttention(sam2, for_cpu=False)(*feeds.values())
    assert _difference(found, expected) <= TOLERANCE
