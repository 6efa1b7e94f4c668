from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from vessel_rt.device.memory_plan import OVERHEAD, Plan, make_plan, require_fit
from vessel_rt.errors import BundleError, RecipeError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.graph_files import named_files

CARD = 24 << 30  # bytes: the RTX 3090's


@pytest.fixture
def bundle(fp16_bundle: Path) -> Bundle:
    return Bundle.load(fp16_bundle)


def sizes(plan: Plan) -> dict[str, int]:
    return {item.name: item.bytes for item in plan.items}


def test_weights_are_the_files_that_the_graphs_name(bundle: Bundle) -> None:
    found = sizes(make_plan(bundle, 1, CARD))
    size = {name.removeprefix("weights/").removesuffix(".safetensors"): record.bytes for name, record in bundle.files.items()}
    assert found["weights: vision_encoder"] == size["vision_model"] + size["projector"]
    assert found["weights: language_model"] == size["language_model"]
    embed_tokens = size["embed_tokens"]
    of_frames = {file for stage in bundle.stages.values() for file in stage.weights} | {bundle.embed_tokens.file}
    total = sum(bundle.files[file].bytes for file in of_frames)
    assert sum(value for name, value in found.items() if name.startswith("weights")) == total - embed_tokens


def test_cines_come_on_top(bundle: Bundle, standin: Bundle) -> None:
    frames, cines = sizes(make_plan(bundle, 1, CARD)), sizes(make_plan(bundle, 1, CARD, cines=True))
    assert bundle.cine is not None
    channels, remembered, side = 64, 16, 32  # of examples/tiny
    assert cines["memory bank"] == 2 * (14 * remembered * side**2 + 23 * channels)  # of 8 conditioning frames, and 6 or 15 others
    assert cines["activations: sam2_memory_attention"] == 15 * bundle.cine.stages["sam2_memory_attention"].activation_bytes
    assert cines["features of the next frame"] == 2 * channels * (16 + 4 + 1) * side**2
    added = {f"{kind}: {stage}" for kind in ("weights", "activations") for stage in bundle.cine.stages}
    assert cines.keys() - frames.keys() == added | {"memory bank", "features of the next frame"}
    assert all(cines[name] == size for name, size in frames.items())
    with pytest.raises(BundleError):
        make_plan(standin, 1, CARD, cines=True)


def test_quantized_weights_say_so(int8_bundle: Path, fp32_bundle: Path) -> None:
    small, large = sizes(make_plan(Bundle.load(int8_bundle), 1, CARD)), sizes(make_plan(Bundle.load(fp32_bundle), 1, CARD))
    assert small["weights: vision_encoder, int8"] < large["weights: vision_encoder"]  # a scale for 16 rows, FP32 positions
    assert small["weights: language_model, int8"] < large["weights: language_model"] / 2  # the rotary tables stay FP32
    assert small["weights: sam2_image_encoder, int8"] < large["weights: sam2_image_encoder"]
    for name in ("weights: sam2_mask_decoder", "cache", "activations: language_model"):
        assert small[name] == large[name]


def test_the_cache_is_what_the_graph_says(bundle: Bundle) -> None:
    values = 0
    for spec in bundle.stages["language_model"].inputs:
        if spec.name.startswith("past_"):
            heads, capacity, head_dim = (int(axis) for axis in spec.shape[1:])
            values += heads * capacity * head_dim
    assert sizes(make_plan(bundle, 3, CARD))["cache"] == 3 * 2 * values


def test_activations_grow_with_the_batch_and_the_precision(bundle: Bundle, fp32_bundle: Path) -> None:
    one, two = (sizes(make_plan(bundle, batch, CARD)) for batch in (1, 2))
    double = sizes(make_plan(Bundle.load(fp32_bundle), 1, CARD))
    for stage in bundle.stages:
        name = f"activations: {stage}"
        assert two[name] == 2 * one[name]
        assert one[name] < double[name] <= 2 * one[name]


def test_the_language_models_activations_by_hand(bundle: Bundle) -> None:
    hidden, intermediate, capacity, vocabulary = 128, 320, 4096, bundle.language_model.vocabulary  # of examples/tiny
    assert (bundle.language_model.hidden_size, bundle.language_model.capacity) == (hidden, capacity)
    mlp = capacity * (4 * 2 * hidden + 2 * (hidden + 3 * intermediate))
    assert sizes(make_plan(bundle, 1, CARD))["activations: language_model"] == (
        mlp + 2 * capacity * hidden + 2 * capacity * capacity + 2 * 16 * vocabulary
    )


def test_table_and_json_have_every_item(bundle: Bundle) -> None:
    plan = make_plan(bundle, 1, CARD)
    lines = plan.table().splitlines()
    assert len(lines) == len(plan.items) + 2
    assert "assumed" in lines[-3]
    assert lines[-1].split() == ["of", "24.0", "GiB", "25.770", "GB"]
    document = json.loads(plan.to_json())
    assert document["total"] == sum(item["bytes"] for item in document["items"])
    assert document["fits"] is True


def test_what_fits_is_accepted_to_the_byte(bundle: Bundle) -> None:
    total = make_plan(bundle, 2, CARD).total
    require_fit(bundle, make_plan(bundle, 2, total))
    with pytest.raises(RecipeError, match=r"with 2 images at once.*; lower engines\.max_batch \(--batch\) to 1"):
        require_fit(bundle, make_plan(bundle, 2, total - 1))


def test_the_batch_is_lowered_no_more_than_needed(bundle: Bundle) -> None:
    memory = make_plan(bundle, 5, CARD).total
    with pytest.raises(RecipeError, match=r"\(--batch\) to 5"):
        require_fit(bundle, make_plan(bundle, 8, memory))


def test_the_capacity_is_named_when_one_image_does_not_fit(bundle: Bundle) -> None:
    memory = make_plan(bundle, 1, CARD).total - 1
    with pytest.raises(RecipeError, match=r"lower language_model\.capacity to 3840"):
        require_fit(bundle, make_plan(bundle, 1, memory))


def test_what_no_setting_mends(bundle: Bundle) -> None:
    with pytest.raises(RecipeError, match="no batch or capacity is small enough"):
        require_fit(bundle, make_plan(bundle, 2, OVERHEAD))


def test_past_24_gb(bundle: Bundle) -> None:
    """The tiny model with an 8B model's cache for a thousand images."""
    language_model = msgspec.structs.replace(bundle.language_model, layers=28, kv_heads=4, head_dim=128)
    large = msgspec.structs.replace(bundle, language_model=language_model)
    with pytest.raises(RecipeError, match=r"takes \d{3,}\.\d GB with 1000 images at once, the card has 25\.8; lower engines\.max_batch"):
        require_fit(large, make_plan(large, 1000, CARD))


def test_bundles_without_sizes(bundle: Bundle, standin: Bundle) -> None:
    """As older versions exported them: they load, but there is nothing to plan with."""
    with pytest.raises(BundleError) as e:
        make_plan(standin, 1, CARD)
    assert str(standin.folder / "bundle.json") in str(e.value)
    assert "export the bundle again" in str(e.value)


def test_a_plan_reads_no_graph_and_no_weights(bundle: Bundle, tmp_path: Path) -> None:
    moved = msgspec.structs.replace(bundle, folder=tmp_path)
    assert make_plan(moved, 1, CARD).items == make_plan(bundle, 1, CARD).items


def test_the_exporter_names_the_files_of_each_graphs_weights(bundle: Bundle) -> None:
    for stage in bundle.stages.values():
        assert set(stage.weights) == named_files(bundle.folder / stage.file)
