"""`vessel-rt plan`: an estimate of the GPU memory that a bundle takes, item by item, before a GPU is available.

It uses bundle.json alone; no graph and no weights are read. With b bytes for a value of the bundle's precision:

- weights: the files of a stage's weights. An engine built from them has about the same size: "Total Weights Memory" of TensorRT-RTX 1.7.1
  is 0.1 to 0.5 % above the files.
- cache: a key and a value per layer, [batch, kv_heads, capacity, head_dim].
- activations: the exporter's estimate of each stage (vessel_export.graphs.activations) times the tiles, tokens, images or masks of the
  workload's max shapes. For the language model also the mask, b * batch * capacity^2, and the logits, b * batch * MOST_KEPT * vocabulary.
  The stages' activations are added up, since ONNX Runtime's arenas do not return memory while a session lives.
- cines: the weights and activations of the stages that track objects, for one object and frame at a time, and the memories and object
  pointers that they attend to at most. And the features of the next frame, which is encoded meanwhile.
- overhead: CUDA's context, the libraries' code and workspaces. OVERHEAD is an assumption; it has not been measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right

import msgspec

from vessel_rt.errors import RecipeError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import Workload, stage_profile

__all__ = ["BYTES", "OVERHEAD", "Item", "Plan", "make_plan", "require_fit"]

OVERHEAD = 768 << 20  # bytes
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_STEP = 256  # tokens; the step of the search for a capacity that fits
_GB = 1e9
# The input whose first axis counts a stage's tiles, images or masks.
_UNITS = {
    "vision_encoder": "pixel_values",
    "sam2_image_encoder": "pixel_values",
    "sam2_mask_decoder": "image_index",
    "sam2_memory_attention": "memories",
    "sam2_memory_encoder": "image_features",
    "sam2_tracking_decoder": "conditioned_features",
}


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that takes memory, and its size in bytes."""

    name: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory that `bundle` takes with `batch` images at once, item by item, and the card's `memory`; all in bytes.

    `cines`: whether it can track objects, too.
    """

    bundle: str
    batch: int
    capacity: int
    memory: int
    items: tuple[Item, ...]
    cines: bool = False

    @property
    def total(self) -> int:
        """The sum of all items."""
        return sum(item.bytes for item in self.items)

    @property
    def fits(self) -> bool:
        """Whether the card has enough memory."""
        return self.total <= self.memory

    def table(self) -> str:
        """A line for each item, in GB (10^9 bytes), then the total and the card."""
        rows = [(item.name, item.bytes) for item in self.items]
        rows += [("total", self.total), (f"of {self.memory / 2**30:.1f} GiB", self.memory)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {size / _GB:7.3f} GB" for name, size in rows)

    def to_json(self) -> str:
        """The plan for programs, in bytes."""
        return json.dumps({**dataclasses.asdict(self), "total": self.total, "fits": self.fits}, indent=1)


def make_plan(bundle: Bundle, batch: int, memory: int, *, cines: bool = False) -> Plan:
    """Estimate what `bundle` takes with `batch` images at once, for a card of `memory` bytes; with `cines`, also to track objects.

    Raises:
        BundleError: an older version exported the bundle, without the sizes that a plan needs, or without the stages of cines.
    """
    sizes, stages, b = bundle.language_model, bundle.sized_stages(), BYTES[bundle.precision]
    quantized = bundle.quantization.matrices if bundle.quantization else {}
    items = [Item(f"weights: {name}" + (f", {bundle.weights}" if name in quantized else ""), bundle.weight_bytes(name)) for name in stages]
    items.append(Item("cache", b * 2 * sizes.layers * batch * sizes.kv_heads * sizes.capacity * sizes.head_dim))
    items += [Item(f"activations: {name}", _activations(bundle, name, batch, b)) for name in stages]
    if cines:
        items += _of_cines(bundle, b)
    items.append(Item("overhead (assumed)", OVERHEAD))
    return Plan(str(bundle.folder), batch, sizes.capacity, memory, tuple(items), cines)


def _of_cines(bundle: Bundle, b: int) -> list[Item]:
    stages = bundle.require_cine().stages
    shapes = stage_profile(bundle, stages["sam2_memory_attention"], Workload()).max
    bank = b * sum(math.prod(shapes[name]) for name in ("memories", "object_pointers"))
    items = [Item(f"weights: {name}", bundle.weight_bytes(name)) for name in stages]
    items += [Item(f"activations: {name}", _activations(bundle, name, 1, b)) for name in stages]
    features = sum(math.prod(spec.fixed) for spec in bundle.stages["sam2_image_encoder"].outputs)
    return [*items, Item("memory bank", bank), Item("features of the next frame", b * features)]


def _activations(bundle: Bundle, name: str, batch: int, b: int) -> int:
    stage = bundle.all_stages[name]
    shapes, one = stage_profile(bundle, stage, Workload(max_batch=batch)).max, stage.activation_bytes
    if name != "language_model":
        return (shapes[_UNITS[name]][0] + (name == "sam2_memory_attention")) * one  # its frame counts as one more memory
    tokens, kept = math.prod(shapes["position_ids"]), math.prod(shapes["gather_positions"])
    return tokens * one + b * (tokens * bundle.language_model.capacity + kept * bundle.language_model.vocabulary)


def require_fit(bundle: Bundle, plan: Plan) -> None:
    """Raise a RecipeError that names the setting to lower if `plan`, made for `bundle`, does not fit."""
    if plan.fits:
        return
    raise RecipeError(
        f"{bundle.folder}: takes {plan.total / _GB:.1f} GB with {plan.batch} images at once, the card has {plan.memory / _GB:.1f}; "
        + _fix(bundle, plan)
    )


def _fix(bundle: Bundle, plan: Plan) -> str:
    """What to lower: the batch, if a smaller one fits; else the capacity, as long as it holds the tiles of one image and an answer."""
    batch = bisect_right(range(1, plan.batch), plan.memory, key=lambda batch: make_plan(bundle, batch, plan.memory, cines=plan.cines).total)
    if batch:  # the largest that fits
        return f"lower engines.max_batch (--batch) to {batch}"
    sizes = bundle.language_model
    needed = bundle.tiles.most * bundle.tiles.tokens_per_tile + sizes.max_new_tokens
    for capacity in range(sizes.capacity - _STEP, needed, -_STEP):
        smaller = msgspec.structs.replace(bundle, language_model=msgspec.structs.replace(sizes, capacity=capacity))
        if make_plan(smaller, 1, plan.memory, cines=plan.cines).fits:
            return f"lower language_model.capacity to {capacity} and the batch to 1, and export it again"
    return "no batch or capacity is small enough; export it in a smaller precision, or use a larger card"
