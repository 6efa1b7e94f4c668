"""A random model of the real size in the real formats, written without loading it into memory.

    DIR/base/                 InternVL3-8B in its original layout: config.json, tokenizer, four .safetensors shards in bf16 and their index
    DIR/sam2_hiera_large.pt   SAM2 Hiera-L in FP32
    DIR/iter_12192.pth        the fine-tune, in bf16 and mmengine's format

Values are uniform over 256 levels, from a stream of NumPy's SFC64 for each block of rows. The model's seed, the tensor's name and the
block's number seed the stream, so that the same seed gives the same bytes and any rows of any tensor can be computed again alone. Scales
are those of a trained model: unit activations after every norm, branches that together grow the residual streams by half at every depth,
LoRA deltas of a quarter of their weights. `lm_head` contains the embedding shifted by one row, so that the next token is as certain as
after training: greedy decoding counts the ids upwards, except that the prompt's last token gives [SEG] and [SEG] gives <|im_end|>, an
answer with one mask.

`_plants` describes what `outliers` adds. Knows the tensors' names and sizes. Does not know file formats (`file_formats`) and what the model
computes.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from benchmarks.synth.file_formats import (
    ANSWER_END,
    FIRST_TOKEN,
    PROMPT_END,
    base_config,
    mapped,
    sam2_shapes,
    save_checkpoint,
    save_sam2,
    token_id,
    write_tokenizer,
)
from vessel_export.io.files import staging
from vessel_export.io.safetensors_writer import OutputTensor, file_size, write_safetensors
from vessel_export.sources.base_config import LanguageConfig, VisionConfig
from vessel_export.sources.names import (
    LORA_PREFIX,
    MASK_DECODER_PREFIX,
    NEW_TOKENS,
    PROJECTOR_PREFIX,
    PROMPT_HEAD_PREFIX,
    SAM2_PREFIX,
    lora_pair,
    saved_module,
)
from vessel_rt.errors import VesselError

__all__ = [
    "LAYERS", "SynthError", "SynthModel", "base_tensors", "checkpoint_tensors", "full_size", "lora_targets", "sam2_tensors", "write_base",
    "write_sam2",
    "write_synth",
]  # fmt: skip

LAYERS = 28
_BLOCK = 1 << 21  # values of one block of rows

_LAYER = "language_model.model.layers."
_VISION_LAYER = "vision_model.encoder.layers."

# Targets of `_plants`; FP16 ends at 65504.
_SWIGLU_PEAK, _RESIDUAL_PEAK = 1e5, 2e5
_QK_BIAS = 300.0  # in Q and in K: their product is 9e4
_VISION_BRANCH_PEAK, _VISION_RESIDUAL_PEAK = 1e5, 3e3
_TRIGGER = 256.0  # among ordinary values of about 1, so that it alone determines a norm's scale


class SynthError(VesselError):
    """A random model that cannot be written with these options."""


@dataclasses.dataclass(frozen=True)
class SynthModel:
    """The model to write. `sam2_config` is the text of a sam2 .yaml, None for the package's SAM2 Hiera-L."""

    vision: VisionConfig
    language: LanguageConfig
    sam2_config: str | None
    lora_rank: int
    lora_alpha: int
    shards: int
    seed: int
    outliers: bool

    @property
    def vocabulary(self) -> int:
        """Rows of the fine-tune's embedding and head."""
        return self.language.vocabulary + len(NEW_TOKENS)

    @property
    def sam2_file(self) -> str:
        """Meta's file name, for which the sam2 package has a configuration, or another one, with its .yaml next to it."""
        return "sam2_hiera_large.pt" if self.sam2_config is None else "sam2_hiera_short.pt"


def full_size(layers: int = LAYERS, *, seed: int = 0, outliers: bool = True) -> SynthModel:
    """InternVL3-8B and SAM2 Hiera-L with Sa2VA's LoRA. Fewer than 28 `layers` reduce the depth and leave all widths.

    InternViT then has the same number of layers (at most its 24), and SAM2's trunk 8 blocks instead of 48.

    Raises:
        SynthError: `layers` is not from 1 to 28, or `seed` is negative.
    """
    if not 1 <= layers <= LAYERS:
        raise SynthError(f"--layers {layers}: must be from 1 to {LAYERS}, the depth of InternVL3-8B")
    if seed < 0:
        raise SynthError(f"--seed {seed}: must not be negative")
    return SynthModel(
        vision=VisionConfig(
            layers=min(layers, 24), hidden_size=1024, heads=16, intermediate_size=4096, image_size=448, patch_size=14, norm_eps=1e-6,
            downsample=2,
        ),
        language=LanguageConfig(
            layers=layers, hidden_size=3584, heads=28, kv_heads=4, head_dim=128, intermediate_size=18944, vocabulary=151_674,
            rope_theta=1e6, norm_eps=1e-6, max_positions=32768,
        ),
        sam2_config=None if layers == LAYERS else _short_sam2(),
        lora_rank=64,
        lora_alpha=128,
        shards=4,
        seed=seed,
        outliers=outliers,
    )  # fmt: skip


def write_synth(out: Path, model: SynthModel) -> int:
    """Write `model` to the folder `out`, which appears under its name when it is complete; returns the size of its files in bytes.

    Raises:
        SynthError: `out` exists and is not an empty folder, or the disk does not have enough space.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SynthError(f"{out}: exists and is not an empty folder; choose another --out")
    base, sam2, checkpoint = base_tensors(model), sam2_tensors(model), checkpoint_tensors(model)
    sizes = [file_size(tensors) for tensors in (base, sam2, checkpoint)]
    with staging(out) as folder, tqdm(total=sum(sizes), desc=out.name, unit="B", unit_scale=True, disable=None) as bar:
        need = sum(sizes) + max(sizes[1:])  # a .pt and a .pth are made from a scratch file
        free = shutil.disk_usage(folder).free
        if free < need:
            raise SynthError(f"{out.parent}: {free / 1e9:.1f} GB free, this takes {need / 1e9:.1f}; choose another --out or fewer --layers")
        write_base(folder / "base", model, bar.update)
        write_sam2(folder / model.sam2_file, model, bar.update)
        with mapped(folder, checkpoint, bar.update) as state:
            save_checkpoint(folder / "iter_12192.pth", state, rank=model.lora_rank, alpha=model.lora_alpha)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_base(folder: Path, model: SynthModel, progress: Callable[[int], object] = lambda _: None) -> None:
    """Write an InternVL3 folder in the original layout, bf16, in `model.shards` files of about the same size."""
    folder.mkdir(parents=True)
    tensors, count = base_tensors(model), model.shards
    total = sum(tensor.bytes for tensor in tensors)
    shards: dict[str, list[OutputTensor]] = {}
    position = 0
    for tensor in tensors:
        number = position * count // total + 1
        file = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        shards.setdefault(file, []).append(tensor)
        position += tensor.bytes
    for file, shard in shards.items():
        write_safetensors(folder, file, shard, progress=progress)
    if count > 1:
        weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(base_config(model.vision, model.language), indent=2), encoding="utf-8")
    write_tokenizer(folder, model.language.vocabulary)


def write_sam2(path: Path, model: SynthModel, progress: Callable[[int], object] = lambda _: None) -> None:
    """Write a SAM2 .pt in FP32, with its configuration next to it unless the sam2 package has it."""
    with mapped(path.parent, sam2_tensors(model), progress) as state:
        save_sam2(path, state)
    if model.sam2_config is not None:
        path.with_suffix(".yaml").write_text(model.sam2_config, encoding="utf-8")


def base_tensors(model: SynthModel) -> list[OutputTensor]:
    """All tensors of InternVL3, with their names in the original layout."""
    v, c, draw = model.vision, model.language, _Draw.of(model)
    tensors = [
        draw("vision_model.embeddings.class_embedding", (1, 1, v.hidden_size), 0.5),
        draw("vision_model.embeddings.position_embedding", (1, 1 + (v.image_size // v.patch_size) ** 2, v.hidden_size), 0.5),
        *draw.linear("vision_model.embeddings.patch_embedding", (v.hidden_size, 3, v.patch_size, v.patch_size)),
    ]
    for i in range(v.layers):
        tensors += _vision_layer(draw, f"{_VISION_LAYER}{i}.", v)
    tensors.append(draw("language_model.model.embed_tokens.weight", (c.vocabulary, c.hidden_size), 1.0))
    for i in range(c.layers):
        root = f"{_LAYER}{i}."
        for name, (shape, std) in lora_targets(c).items():
            tensors.append(draw(f"{root}{name}.weight", shape, std))
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = lora_targets(c)[f"self_attn.{name}"][0][0]
            tensors.append(draw(f"{root}self_attn.{name}.bias", (rows,), 0.5))
        tensors += [draw(f"{root}{name}.weight", (c.hidden_size,), 0.1, 1.0) for name in ("input_layernorm", "post_attention_layernorm")]
    tensors.append(draw("language_model.model.norm.weight", (c.hidden_size,), 0.1, 1.0))
    tensors.append(draw("language_model.lm_head.weight", (c.vocabulary, c.hidden_size), 2 * c.hidden_size**-0.5))
    return tensors + _projector(draw, "mlp1.", model)


def checkpoint_tensors(model: SynthModel) -> list[OutputTensor]:
    """All tensors that Sa2VA's fine-tuning saves, bf16, with their names in `state_dict`."""
    c, draw, rank = model.language, _Draw.of(model), model.lora_rank
    tensors = [_embedding(draw, model), _tied_head(draw, model)]
    for i in range(c.layers):
        for name, ((rows, columns), std) in lora_targets(c).items():
            a, b = lora_pair(f"model.layers.{i}.{name}")
            tensors.append(draw(a, (rank, columns), columns**-0.5))
            # alpha / r * B @ A has a quarter of the weight's own scale
            tensors.append(draw(b, (rows, rank), 0.25 * std * (columns * rank) ** 0.5 / model.lora_alpha))
    tensors += _projector(draw, PROJECTOR_PREFIX, model)
    shapes = sam2_shapes(_sam2_text(model))
    narrow = shapes["sam_mask_decoder.iou_token.weight"][1]
    tensors += draw.linear(PROMPT_HEAD_PREFIX + "0", (c.hidden_size, c.hidden_size), gain=2**0.5)
    tensors += draw.linear(
        PROMPT_HEAD_PREFIX + "2", (narrow, c.hidden_size), gain=4
    )  # large enough among SAM2's tokens for masks to depend on it
    decoder = {SAM2_PREFIX + name: shape for name, shape in shapes.items() if (SAM2_PREFIX + name).startswith(MASK_DECODER_PREFIX)}
    return tensors + [_sam2_tensor(draw, name, shape, torch.bfloat16) for name, shape in decoder.items()]


def sam2_tensors(model: SynthModel) -> list[OutputTensor]:
    """All tensors of SAM2's state dict, FP32."""
    draw = _Draw.of(model)
    return [_sam2_tensor(draw, name, shape, torch.float32) for name, shape in sam2_shapes(_sam2_text(model)).items()]


def lora_targets(c: LanguageConfig) -> dict[str, tuple[tuple[int, int], float]]:
    """The seven matrices of a layer that LoRA adapts: name -> ((out, in), standard deviation)."""
    queries, keys, hidden, inner = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.hidden_size, c.intermediate_size
    branch = (2 * c.layers) ** -0.5
    return {
        "self_attn.q_proj": ((queries, hidden), 1.4 * hidden**-0.5),  # logits of standard deviation 2: attention is peaked
        "self_attn.k_proj": ((keys, hidden), 1.4 * hidden**-0.5),
        "self_attn.v_proj": ((keys, hidden), hidden**-0.5),
        "self_attn.o_proj": ((hidden, queries), branch * queries**-0.5),
        "mlp.gate_proj": ((inner, hidden), hidden**-0.5),
        "mlp.up_proj": ((inner, hidden), hidden**-0.5),
        "mlp.down_proj": ((hidden, inner), 1.7 * branch * inner**-0.5),  # silu(g) * u has a standard deviation of 0.6
    }


@dataclasses.dataclass(frozen=True)
class _Set:
    """Set a row, a column or an element of a tensor, as [first axis, rest], to `value`. None stands for all rows or columns."""

    row: int | None
    column: int | None
    value: float


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Random tensors of one seed, by name, with outliers planted in them."""

    seed: int
    plants: Mapping[str, Sequence[_Set]]

    @classmethod
    def of(cls, model: SynthModel) -> _Draw:
        return cls(model.seed, _plants(model) if model.outliers else {})

    def __call__(
        self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0, dtype: torch.dtype = torch.bfloat16
    ) -> OutputTensor:
        """Uniform values with this mean and standard deviation."""

        def pieces() -> Iterator[torch.Tensor]:
            rows = max(1, _BLOCK * shape[0] // math.prod(shape))
            for block, start in enumerate(range(0, shape[0], rows)):
                piece = self._block(name, block, (min(rows, shape[0] - start), *shape[1:]), std, mean, dtype)
                for plant in self.plants.get(name, ()):
                    _apply(plant, piece, start)
                yield piece

        return OutputTensor(name, shape, dtype, pieces)

    def linear(self, name: str, shape: tuple[int, ...], *, gain: float = 1.0) -> list[OutputTensor]:
        """A matrix or a convolution [out, in, ...] that scales its input by `gain`, and a small bias."""
        return [self(f"{name}.weight", shape, gain * math.prod(shape[1:]) ** -0.5), self(f"{name}.bias", shape[:1], 0.1)]

    def norm(self, name: str, size: int) -> list[OutputTensor]:
        return [self(f"{name}.weight", (size,), 0.1, 1.0), self(f"{name}.bias", (size,), 0.1)]

    def _block(self, name: str, block: int, shape: tuple[int, ...], std: float, mean: float, dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        stream = np.random.SFC64(np.random.SeedSequence([self.seed, block, *name.encode()]))
        levels = stream.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.int8)[:count]
        step = std / math.sqrt((256**2 - 1) / 12)
        values = torch.from_numpy(levels).to(torch.float32).add_(0.5).mul_(step).add_(mean)  # levels -127.5, -126.5 .. 127.5
        return values.to(dtype).reshape(shape)


def _apply(plant: _Set, piece: torch.Tensor, start: int) -> None:
    rows = slice(None) if plant.row is None else slice(max(0, plant.row - start), max(0, plant.row - start + 1))
    columns = slice(None) if plant.column is None else slice(plant.column, plant.column + 1)
    piece.view(len(piece), -1)[rows, columns] = plant.value


def _vision_layer(draw: _Draw, root: str, v: VisionConfig) -> list[OutputTensor]:
    hidden, inner, branch = v.hidden_size, v.intermediate_size, (2 * v.layers) ** -0.5
    return [
        *draw.norm(root + "norm1", hidden),
        *draw.linear(root + "attn.qkv", (3 * hidden, hidden)),
        *draw.linear(root + "attn.proj", (hidden, hidden)),
        draw(root + "ls1", (hidden,), 0.2 * branch, branch),
        *draw.norm(root + "norm2", hidden),
        *draw.linear(root + "mlp.fc1", (inner, hidden)),
        *draw.linear(root + "mlp.fc2", (hidden, inner), gain=1.7),
        draw(root + "ls2", (hidden,), 0.2 * branch, branch),
    ]


def _projector(draw: _Draw, root: str, model: SynthModel) -> list[OutputTensor]:
    """mlp1: image tokens with the scale of text embeddings."""
    wide, hidden = model.vision.hidden_size * model.vision.downsample**2, model.language.hidden_size
    return [
        *draw.norm(root + "0", wide),
        *draw.linear(root + "1", (hidden, wide)),
        *draw.linear(root + "3", (hidden, hidden), gain=1.7),  # gelu of a unit variable has a standard deviation of 0.6
    ]


def _embedding(draw: _Draw, model: SynthModel) -> OutputTensor:
    return draw(saved_module("model.embed_tokens"), (model.vocabulary, model.language.hidden_size), 1.0)


def _tied_head(draw: _Draw, model: SynthModel) -> OutputTensor:
    """lm_head: noise (logits of standard deviation 2), and in each row the embedding of the token before it (a logit of about 20)."""
    embedding = _embedding(_Draw(draw.seed, {}), model)  # without outliers
    noise = draw(saved_module("lm_head"), embedding.shape, 2 * embedding.shape[1] ** -0.5)
    seg = model.language.vocabulary
    prompt_end, answer_end = (token_id(token, model.language.vocabulary) for token in (PROMPT_END, ANSWER_END))
    # The rows after these tokens would follow them as well. They get the tokens that [SEG] and <|im_end|> followed.
    follows = {seg: prompt_end, prompt_end + 1: seg - 1, answer_end: seg, seg + 1: answer_end - 1}

    def pieces() -> Iterator[torch.Tensor]:
        wanted = _rows_of(embedding, set(follows.values()))
        start = 0
        for rows, before in zip(noise.pieces(), embedding.pieces(), strict=True):
            before = before.roll(1, 0)  # the first row of a block gets its last
            for row, token in follows.items():
                if start <= row < start + len(rows):
                    before[row - start] = wanted[token]
            yield rows + before * (24 / embedding.shape[1])
            start += len(rows)

    return OutputTensor(noise.name, noise.shape, noise.dtype, pieces)


def _rows_of(tensor: OutputTensor, rows: set[int]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    start = 0
    for piece in tensor.pieces():
        found |= {row: piece[row - start].clone() for row in rows if start <= row < start + len(piece)}
        start += len(piece)
    return found


def _sam2_text(model: SynthModel) -> str:
    return _hiera_large() if model.sam2_config is None else model.sam2_config


def _hiera_large() -> str:
    return importlib.resources.files("sam2").joinpath("configs", "sam2", "sam2_hiera_l.yaml").read_text(encoding="utf-8")


def _short_sam2() -> str:
    """SAM2 Hiera-L's configuration with the fewest blocks that have all shapes of weights, windows and global attention."""
    config = OmegaConf.create(_hiera_large())
    config.model.image_encoder.trunk.update({"stages": [1, 2, 3, 2], "global_att_blocks": [5]})
    return OmegaConf.to_yaml(config)


def _sam2_tensor(draw: _Draw, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> OutputTensor:
    """Norms near one, small biases, embeddings of about one, and matrices and convolutions that preserve the scale."""
    if name.endswith("iou_prediction_head.layers.2.bias"):
        return draw(name, shape, 1.0, 0.0, dtype)  # rounding must not decide which mask is best
    if len(shape) == 1:
        return draw(name, shape, 0.1, 1.0 if name.endswith(".weight") else 0.0, dtype)
    if re.search(r"(embed|embed_window|embeddings\.\d|enc|matrix|ptr|token|tokens)(\.weight)?$", name):
        return draw(name, shape, 1.0, 0.0, dtype)
    summed = shape[0] if "output_upscaling" in name else math.prod(shape[1:])  # transposed convolutions, [in, out, 2, 2]
    return draw(name, shape, summed**-0.5, 0.0, dtype)


def _plants(model: SynthModel) -> dict[str, list[_Set]]:
    """Activations beyond FP16's 65504 of the kinds in trained models of this family, by the tensors that produce them.

    - The first language layer's MLP: <|im_start|>'s embedding is large in one channel that is zero for all other tokens; one neuron's
      gate and up rows read that channel alone, so that its SwiGLU product is about 1e5 at this token and exactly zero elsewhere;
      down_proj writes it to one channel of the residual stream, about 2e5, where it stays to the end (a massive activation:
      Sun et al. 2024, arXiv:2402.17762, find them at first and delimiting tokens). The head reads that channel for one token, since
      the norm leaves nothing else of <|im_start|>.
    - Every language layer's attention, in the first key head and the query heads that read it: biases of Q and K on the rotary pair of
      the lowest frequency, whose rows of weights are zero. Q K^T is then 9e4 before scaling, and the same for all keys to
      cos(1e-6 * distance): softmax barely feels it.
    - The first vision layer's MLP: one neuron fires for the class token alone; fc2 makes 1e5 of it in one channel, and the layer scale
      leaves a residual peak of 3e3.

    LoRA's B is zero in planted rows, and A in planted columns, so that merged weights are planted too.
    """
    c, v = model.language, model.vision
    trigger, massive, neuron = c.hidden_size // 3, c.hidden_size // 2, c.intermediate_size // 2
    normed = _TRIGGER / math.sqrt((_TRIGGER**2 + c.hidden_size) / c.hidden_size)
    im_start = token_id(FIRST_TOKEN, c.vocabulary)
    plants: dict[str, list[_Set]] = {}
    for embedding in ("language_model.model.", LORA_PREFIX + "model."):
        plants[embedding + "embed_tokens.weight"] = [_Set(None, trigger, 0), _Set(im_start, trigger, _TRIGGER)]
    for projector in ("mlp1.", PROJECTOR_PREFIX):
        plants |= {f"{projector}3.{part}": [_Set(trigger, None, 0)] for part in ("weight", "bias")}
    first = f"{_LAYER}0."
    plants[first + "post_attention_layernorm.weight"] = [_Set(trigger, None, 1)]
    plants[first + "self_attn.o_proj.weight"] = [_Set(trigger, None, 0)]
    plants |= _lora_plant(0, "self_attn.o_proj", "B", [_Set(trigger, None, 0)])
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        plants[f"{first}{name}.weight"] = [_Set(neuron, None, 0), _Set(neuron, trigger, math.sqrt(_SWIGLU_PEAK) / normed)]
        plants |= _lora_plant(0, name, "B", [_Set(neuron, None, 0)])
    plants[first + "mlp.down_proj.weight"] = [_Set(None, neuron, 0), _Set(massive, neuron, _RESIDUAL_PEAK / _SWIGLU_PEAK)]
    plants |= _lora_plant(0, "mlp.down_proj", "A", [_Set(None, neuron, 0)])
    plants[saved_module("lm_head")] = [_Set(c.vocabulary + 1, massive, 0.5)]
    for i in range(c.layers):
        for name, heads in (("self_attn.q_proj", c.heads // c.kv_heads), ("self_attn.k_proj", 1)):
            real = [head * c.head_dim + c.head_dim // 2 - 1 for head in range(heads)]
            imaginary = [row + c.head_dim // 2 for row in real]
            zeros = [_Set(row, None, 0) for row in (*real, *imaginary)]
            plants[f"{_LAYER}{i}.{name}.weight"] = zeros
            plants[f"{_LAYER}{i}.{name}.bias"] = [*zeros, *(_Set(row, None, _QK_BIAS) for row in real)]
            plants |= _lora_plant(i, name, "B", zeros)
    return plants | _vision_plants(v)


def _lora_plant(layer: int, name: str, letter: str, sets: list[_Set]) -> dict[str, list[_Set]]:
    a, b = lora_pair(f"model.layers.{layer}.{name}")
    return {{"A": a, "B": b}[letter]: sets}


def _vision_plants(v: VisionConfig) -> dict[str, list[_Set]]:
    trigger, massive, neuron = v.hidden_size // 3, v.hidden_size // 2, v.intermediate_size // 2
    first = f"{_VISION_LAYER}0."
    normed = _TRIGGER / math.sqrt((_TRIGGER**2 + v.hidden_size) / v.hidden_size)
    threshold = 0.6 * normed  # a patch's channel, of about one, is far below it
    fires = math.sqrt(_VISION_BRANCH_PEAK)
    slope = fires / (normed - threshold)
    return {
        "vision_model.embeddings.class_embedding": [_Set(None, trigger, _TRIGGER)],
        first + "norm2.weight": [_Set(trigger, None, 1)],
        first + "norm2.bias": [_Set(trigger, None, 0)],
        first + "mlp.fc1.weight": [_Set(neuron, None, 0), _Set(neuron, trigger, slope)],
        first + "mlp.fc1.bias": [_Set(neuron, None, -slope * threshold)],
        first + "mlp.fc2.weight": [_Set(None, neuron, 0), _Set(massive, neuron, _VISION_BRANCH_PEAK / fires)],
        first + "ls2": [_Set(massive, None, _VISION_RESIDUAL_PEAK / _VISION_BRANCH_PEAK)],
    }
