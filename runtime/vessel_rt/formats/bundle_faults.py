"""What may not stand in a bundle.json though each field is sound by itself: contradictions, and graphs that the pipeline cannot feed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from vessel_rt.formats.recipe import PRECISIONS, WEIGHTS
from vessel_rt.formats.schema import shown

if TYPE_CHECKING:
    from vessel_rt.formats.bundle import BundleFile, Quantization, StageSpec, TensorSpec

__all__ = ["bundle_faults"]

_Shapes: TypeAlias = "dict[str, tuple[int | str, ...]]"

_PIXELS = 2**26  # of all tiles of an image; the largest image that is read has as many
_FEATURES = ("fpn_0", "fpn_1", "image_features")
_INTEGERS = frozenset(
    {"position_ids", "write_indices", "kv_positions", "gather_positions", "next_ids", "image_index", "temporal_positions"}
)
_FLOATS = ("float32", "float16")  # of what NumPy holds
_CACHE = ("past_", "present_")  # stays on the device, so it may be what NumPy has not


def bundle_faults(bundle: BundleFile, stages: Sequence[str], cine_stages: Sequence[str]) -> Iterator[str]:
    """Each fault, in words; `stages` are those that a bundle has, `cine_stages` those that one for cines has, too."""
    tiles, sizes, prompt = bundle.tiles, bundle.language_model, bundle.prompt
    if bundle.precision not in PRECISIONS:
        yield f"precision is {shown(bundle.precision)}, not one of {', '.join(PRECISIONS)}"
    if bundle.quantization:
        yield from _quantization_faults(bundle.quantization, stages)
    if tiles.min_tiles > tiles.max_tiles:
        yield f"tiles.min_tiles is {tiles.min_tiles}, more than max_tiles, {tiles.max_tiles}"
    if tiles.max_tiles * tiles.size**2 > _PIXELS:
        yield f"tiles.max_tiles is {tiles.max_tiles}, too many of {tiles.size} x {tiles.size} pixels"
    if sizes.max_new_tokens >= sizes.capacity:
        yield f"language_model.max_new_tokens is {sizes.max_new_tokens}, its capacity {sizes.capacity}"
    for token in (prompt.image_token_id, prompt.seg_token_id, *prompt.stop_token_ids):
        if token >= sizes.vocabulary:
            yield f"prompt has a token {token}, language_model.vocabulary is {sizes.vocabulary}"
    tables = [(bundle.stages, stages, "stages")] + ([(bundle.cine.stages, cine_stages, "cine.stages")] if bundle.cine else [])
    faults = [fault for found, names, place in tables for fault in _table_faults(found, names, place)]
    yield from faults or _stage_faults(bundle)


def _table_faults(found: Mapping[str, StageSpec], names: Sequence[str], place: str) -> Iterator[str]:
    if absent := set(names) - found.keys():
        yield f"{place} lack {', '.join(sorted(absent))}"
    elif unknown := found.keys() - set(names):
        yield f"unknown stage {shown(sorted(unknown)[0])}"


def _quantization_faults(quantization: Quantization, stages: Sequence[str]) -> Iterator[str]:
    if quantization.weights not in WEIGHTS:
        yield f"quantization.weights is {shown(quantization.weights)}, not one of {', '.join(WEIGHTS)}"
    if unknown := quantization.matrices.keys() - set(stages):
        yield f"quantization.matrices has an unknown stage {shown(sorted(unknown)[0])}"


def _stage_faults(bundle: BundleFile) -> Iterator[str]:
    """Where the graphs' inputs and outputs are not those of docs/architecture.md, in the sizes of the bundle."""
    for name, (inputs, outputs) in _expected(bundle).items():
        stage = bundle.all_stages[name]
        if absent := set(stage.weights) - bundle.files.keys():
            yield f"stages.{name}: weights name {shown(sorted(absent)[0])}, which is not in files"
        for kind, specs, shapes in (("input", stage.inputs, inputs), ("output", stage.outputs, outputs)):
            yield from (f"stages.{name}: {kind} {fault}" for fault in _spec_faults(specs, shapes))


def _spec_faults(specs: Sequence[TensorSpec], shapes: _Shapes) -> Iterator[str]:
    found = {spec.name: spec for spec in specs}
    if found.keys() != shapes.keys() or len(found) != len(specs):
        odd = sorted(found.keys() ^ shapes.keys()) or [spec.name for spec in specs]
        yield f"{shown(odd[0])} is missing, unknown or there twice"
        return
    for name, shape in shapes.items():
        dtypes = ("int64",) if name in _INTEGERS else (*_FLOATS, "bfloat16") if name.startswith(_CACHE) else _FLOATS
        if found[name].shape != shape or found[name].dtype not in dtypes:
            yield f"{name} is {shown(found[name].dtype)} {shown(list(found[name].shape))}, not {' or '.join(dtypes)} {list(shape)}"


def _expected(bundle: BundleFile) -> Mapping[str, tuple[_Shapes, _Shapes]]:
    """The shapes of each stage's inputs and outputs."""
    sizes, tiles, mask = bundle.language_model, bundle.tiles, bundle.mask
    cache = ("batch", sizes.kv_heads, sizes.capacity, sizes.head_dim)
    past, present = (
        {f"{time}_{kind}.{layer}": cache for layer in range(sizes.layers) for kind in ("key", "value")} for time in ("past", "present")
    )
    encoded = {spec.name: spec.shape for spec in bundle.stages["sam2_image_encoder"].outputs}
    features: _Shapes = {name: ("images", *encoded.get(name, ())[1:4]) for name in _FEATURES}  # their sizes are SAM2's own
    positions = {"position_ids": ("batch", "sequence"), "write_indices": ("batch",), "kv_positions": ("live",)}
    side = mask.low_res_size
    prediction: _Shapes = {"low_res_logits": ("masks", side, side), "iou": ("masks",), "object_score": ("masks",)}
    stages: dict[str, tuple[_Shapes, _Shapes]] = {
        "vision_encoder": (
            {"pixel_values": ("tiles", 3, tiles.size, tiles.size)},
            {"image_embeds": ("tiles", tiles.tokens_per_tile, sizes.hidden_size)},
        ),
        "language_model": (
            {"inputs_embeds": ("batch", "sequence", sizes.hidden_size), **positions, "gather_positions": ("batch", "kept"), **past},
            {"hidden_states": ("batch", "kept", sizes.hidden_size), "next_ids": ("batch", "kept"), **present},
        ),
        "sam2_image_encoder": ({"pixel_values": ("images", 3, mask.size, mask.size)}, dict(features)),
        "sam2_mask_decoder": ({**features, "seg_states": ("masks", sizes.hidden_size), "image_index": ("masks",)}, prediction),
    }
    if bundle.cine is None:
        return stages
    channels, *size = features["image_features"][1:] or (0,)
    prediction["object_pointer"] = ("masks", channels)
    remembered = {spec.name: spec.shape for spec in bundle.cine.stages["sam2_memory_encoder"].outputs}.get("memory", ())[1:2]
    of_one: _Shapes = {name: (1, *shape[1:]) for name, shape in (features | prediction).items()}
    attended = {
        "memories": ("memories", *remembered, *size),
        "temporal_positions": ("memories",),
        "object_pointers": ("pointers", channels),
    }
    conditioned = {"conditioned_features": of_one["image_features"]}
    return stages | {
        "sam2_memory_attention": ({"image_features": of_one["image_features"], **attended}, conditioned),
        "sam2_memory_encoder": ({name: of_one[name] for name in ("image_features", "low_res_logits")}, {"memory": (1, *remembered, *size)}),
        "sam2_tracking_decoder": (
            {name: of_one[name] for name in ("fpn_0", "fpn_1")} | conditioned,
            {name: of_one[name] for name in prediction},
        ),
    }
