"""What bundle.json says of a stage's work, against what is counted in its graph."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from vessel_export.graphs.costs import counted_cost
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.stage_cost import Cost, stage_cost


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [
        ("vision_encoder", {"tiles": 10}),
        ("language_model", {"batch": 2, "sequence": 320, "live": 320, "kept": 9}),
        ("language_model", {"batch": 1, "sequence": 1, "live": 320, "kept": 1}),
        ("sam2_image_encoder", {"images": 3}),
        ("sam2_mask_decoder", {"images": 1, "masks": 1}),
        ("sam2_memory_attention", {"memories": 1, "pointers": 1}),
        ("sam2_memory_attention", {"memories": 9, "pointers": 18}),
        ("sam2_memory_encoder", {}),
        ("sam2_tracking_decoder", {}),
    ],
)
@pytest.mark.parametrize("bundle", ["fp32_bundle", "fp16_bundle"])
def test_it_is_what_the_graph_says(request: pytest.FixtureRequest, bundle: str, stage: str, sizes: dict[str, int]) -> None:
    loaded = Bundle.load(request.getfixturevalue(bundle))
    cost, counted = stage_cost(loaded, stage, sizes), counted_cost(loaded, stage, sizes)
    assert cost is not None
    assert cost.flops == counted.flops
    assert cost.bytes == pytest.approx(counted.bytes, rel=0.02)  # headers of files, and constants of graphs


def test_quantized_matrices_do_the_same_work(fp32_bundle: Path, int8_bundle: Path) -> None:
    whole, quantized = (Bundle.load(path) for path in (fp32_bundle, int8_bundle))
    for stage in whole.stages:
        assert whole.stages[stage].flops == quantized.stages[stage].flops > 0


def test_bundles_of_older_versions_do_not_tell(fp32_bundle: Path) -> None:
    bundle = Bundle.load(fp32_bundle)
    older = {name: msgspec.structs.replace(stage, flops=0) for name, stage in bundle.stages.items()}
    assert stage_cost(msgspec.structs.replace(bundle, stages=older), "vision_encoder", {"tiles": 1}) is None
    cine = msgspec.structs.replace(bundle.require_cine(), memory_flops=0)
    assert stage_cost(msgspec.structs.replace(bundle, cine=cine), "sam2_memory_attention", {"memories": 2, "pointers": 1}) is None


def test_costs_add_up() -> None:
    assert Cost(1, 20) + Cost(300, 4000) == Cost(301, 4020)
