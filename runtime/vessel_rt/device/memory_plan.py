"""`vessel-rt plan`: the GPU memory that a bundle takes, part by part, before a GPU is there to tell.

It is reckoned from bundle.json and the headers of the weights' files, without ONNX and without a GPU. With b bytes a value of the bundle's
precision:

- weights: the files that a stage's graph names; an engine built of it is about as large.
- cache: a key and a value a layer, [batch, kv_heads, capacity, head_dim].
- activations: the largest sum of tensors that are alive at one time in a run of the workload's greatest shapes. Attention is counted as
  fused, its scores never written.
    - language_model, of T = batch * capacity tokens: in the MLP, the FP32 residual stream before and after a sum, the normed input, and
      gate, up and product: T * (8 * hidden + b * (hidden + 3 * intermediate)). All along, inputs_embeds, b * T * hidden, and the mask,
      b * T * capacity; at the end the logits, b * batch * MOST_KEPT * vocabulary.
    - vision_encoder, of T = tiles * positions: T * (8 * hidden + b * (hidden + 2 * intermediate)), and its pixels.
    - sam2_image_encoder, of T = images * (side / 4)^2: its first stage, of C channels, is its largest: residual, normed input, Q, K and V
      of padded windows, twice the MLP's 4 C: b * T * 17 * C. Its pixels, and its outputs, which are kept until the masks are made.
    - sam2_mask_decoder, a mask: b * 17 maps of image_features' size: 8 for the transformer's keys, values and their sums, 3 and 6 for what
      is upscaled to two and four times its side, with a fourth and an eighth of its channels.
- overhead: CUDA's context, the libraries' code and workspaces. OVERHEAD is an assumption; it has not been measured on a GPU.

The stages' activations are added up, since ONNX Runtime's arenas keep what a session has taken.

Checked against what TensorRT-RTX 1.7.1 reports when it compiles InternVL3-8B's FP16 graphs for sm86 ("Total Activation Memory", to which
inputs and outputs come): for one image, in the order of the stages, 273, 618, 281 and 88 MB, where 370, 680, 371 and 143 are reckoned here.
"Total Weights Memory" is 0.1 to 0.5 % above the files.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from pathlib import Path

from safetensors import safe_open

from vessel_rt.errors import BundleError, RecipeError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.graph_files import named_files
from vessel_rt.formats.profiles import Shapes, Workload, stage_profile

__all__ = ["OVERHEAD", "Part", "Plan", "make_plan", "require_fit"]

OVERHEAD = 768 << 20  # bytes
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_STEP = 256  # tokens by which a smaller capacity is sought
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Part:
    """What takes memory, and how much, in bytes."""

    name: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory that `bundle` takes with `batch` images at once, part by part, against `memory`; all in bytes."""

    bundle: str
    batch: int
    capacity: int
    memory: int
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the card has that much."""
        return self.total <= self.memory

    def table(self) -> str:
        """A line a part, in GB (10^9 bytes), then the sum and the card."""
        rows = [(part.name, part.bytes) for part in self.parts]
        rows += [("total", self.total), (f"of {self.memory / 2**30:.1f} GiB", self.memory)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {size / _GB:7.3f} GB" for name, size in rows)

    def to_json(self) -> str:
        """The same for programs, in bytes."""
        return json.dumps({**dataclasses.asdict(self), "total": self.total, "fits": self.fits}, indent=1)


def make_plan(bundle: Bundle, batch: int, memory: int) -> Plan:
    """Reckon what `bundle` takes with `batch` images at once, for a card of `memory` bytes.

    Raises:
        BundleError: its graphs or weights cannot be read, or are not such as the exporter writes.
    """
    sizes, b = bundle.language_model, _BYTES[bundle.precision]
    weights = {name: _weights(bundle, stage.file) for name, stage in bundle.stages.items()}
    parts = [Part(f"weights: {name}", sum(bundle.files[file].bytes for file in files)) for name, files in weights.items()]
    parts.append(Part("cache", b * 2 * sizes.layers * batch * sizes.kv_heads * sizes.capacity * sizes.head_dim))
    for name, files in weights.items():
        greatest = stage_profile(bundle, bundle.stages[name], Workload(max_batch=batch)).greatest
        shapes = {tensor: shape for file in files for tensor, shape in _header(bundle.folder / file).items()}
        try:
            parts.append(Part(f"activations: {name}", _ACTIVATIONS[name](bundle, b, greatest, shapes)))
        except StopIteration:
            raise BundleError(f"{bundle.folder}: the weights of {name} are not named as the exporter names them; export it again") from None
    parts.append(Part("overhead (assumed)", OVERHEAD))
    return Plan(str(bundle.folder), batch, sizes.capacity, memory, tuple(parts))


def require_fit(bundle: Bundle, plan: Plan) -> None:
    """Raise the RecipeError that names the setting to lower, if `plan`, made of `bundle`, does not fit."""
    if plan.fits:
        return
    raise RecipeError(
        f"{bundle.folder}: takes {plan.total / _GB:.1f} GB with {plan.batch} images at once, the card has {plan.memory / _GB:.1f}; "
        + _mend(bundle, plan)
    )


def _mend(bundle: Bundle, plan: Plan) -> str:
    """What to lower: the batch, if a smaller one fits; else the capacity, if what is left holds the tiles of one image and an answer."""
    batch = bisect_right(range(1, plan.batch), plan.memory, key=lambda batch: make_plan(bundle, batch, plan.memory).total)
    if batch:  # so many, from 1 on, fit
        return f"lower engines.max_batch (--batch) to {batch}"
    sizes = bundle.language_model
    least = bundle.tiles.most * bundle.tiles.tokens_per_tile + sizes.max_new_tokens
    for capacity in range(sizes.capacity - _STEP, least, -_STEP):
        smaller = dataclasses.replace(bundle, language_model=dataclasses.replace(sizes, capacity=capacity))
        if make_plan(smaller, 1, plan.memory).fits:
            return f"lower language_model.capacity to {capacity} and the batch to 1, and export it again"
    return "no batch or capacity is small enough: export it in a smaller precision, or take a larger card"


def _weights(bundle: Bundle, graph: str) -> list[str]:
    """The weights' files that `graph` names."""
    try:
        return [name for name in sorted(named_files(bundle.folder / graph)) if name in bundle.files]
    except (OSError, ValueError) as e:
        said = e.strerror if isinstance(e, OSError) else e
        raise BundleError(f"{bundle.folder / graph}: cannot be read ({said}); copy or export the bundle again") from e


def _header(path: Path) -> Shapes:
    """The shape of each tensor of a .safetensors file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as e:  # OSError, SafetensorError
        raise BundleError(f"{path}: not a .safetensors file ({e}); copy or export the bundle again") from e


def _shape(shapes: Shapes, end: str) -> tuple[int, ...]:
    """The shape of the tensor whose name ends so; StopIteration if there is none."""
    return next(shape for name, shape in shapes.items() if name.endswith(end))


def _language_model(bundle: Bundle, b: int, greatest: Shapes, shapes: Shapes) -> int:
    hidden, intermediate = _shape(shapes, "layers.0.mlp.gate_proj.weight")
    tokens = math.prod(greatest["position_ids"])
    logits = b * math.prod(greatest["gather_positions"]) * bundle.language_model.vocabulary
    throughout = b * tokens * (hidden + bundle.language_model.capacity)
    return tokens * (8 * hidden + b * (hidden + 3 * intermediate)) + throughout + logits


def _vision_encoder(bundle: Bundle, b: int, greatest: Shapes, shapes: Shapes) -> int:
    hidden, intermediate = _shape(shapes, "layers.0.mlp.fc1.weight")
    tokens = greatest["pixel_values"][0] * _shape(shapes, "position_embedding")[1]
    return tokens * (8 * hidden + b * (hidden + 2 * intermediate)) + b * math.prod(greatest["pixel_values"])


def _sam2_image_encoder(bundle: Bundle, b: int, greatest: Shapes, shapes: Shapes) -> int:
    images, _, height, width = greatest["pixel_values"]
    channels = _shape(shapes, "patch_embed.proj.weight")[0]
    outputs = sum(math.prod(size for size in spec.shape if isinstance(size, int)) for spec in bundle.stages["sam2_image_encoder"].outputs)
    return b * (images * (height // 4) * (width // 4) * 17 * channels + math.prod(greatest["pixel_values"]) + images * outputs)


def _sam2_mask_decoder(bundle: Bundle, b: int, greatest: Shapes, shapes: Shapes) -> int:
    return b * 17 * greatest["image_index"][0] * math.prod(greatest["image_features"][1:])


_ACTIVATIONS = {
    "vision_encoder": _vision_encoder,
    "language_model": _language_model,
    "sam2_image_encoder": _sam2_image_encoder,
    "sam2_mask_decoder": _sam2_mask_decoder,
}
