"""What `verify` and `ranges` run on: images, read or drawn, and one pass of the language model. Does not know the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.formats.bundle import LanguageModelSpec
from vessel_rt.formats.profiles import CPU_TOKENS
from vessel_rt.inputs.images import SUFFIXES, read_image
from vessel_rt.measure.frames import draw_angiogram

if TYPE_CHECKING:
    from vessel_rt.device.session import Session

__all__ = ["Sample", "drawn_samples", "one_pass", "read_samples", "run_language_model", "samples_of"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image as read by the reference (Pillow) and by the runtime (`vessel_rt.inputs.images.read_image`)."""

    name: str
    reference: Image.Image
    runtime: Image.Image


def samples_of(paths: Sequence[Path]) -> list[Sample]:
    """The images at `paths`, or without any, three drawn frames. Raises VesselError, as `read_samples`."""
    return read_samples(paths) if paths else drawn_samples()


def read_samples(paths: Sequence[Path]) -> list[Sample]:
    """The images at `paths`: files, and the sorted images in folders.

    Raises:
        VesselError: a missing path, a folder without images, or an image that cannot be read.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise VesselError(f"{path}: no images in this folder ({', '.join(SUFFIXES)}); give --images another")
        files += found
    return [_read_sample(file, f"image {number} of {len(files)}") for number, file in enumerate(files, start=1)]


def _read_sample(file: Path, name: str) -> Sample:
    """Named by its position: file names can contain patients' names, and reports are passed on."""
    try:
        runtime = read_image(file)  # first: its errors say what is wrong with the file
    except ImageError as e:
        raise VesselError(f"{name}: {e}") from e
    with Image.open(file) as image:
        return Sample(name, image.convert("RGB"), runtime)


def drawn_samples() -> list[Sample]:
    """Three drawn frames of different shapes, for use without images."""
    samples = []
    for width, height in ((512, 512), (640, 480), (300, 300)):
        image = Image.fromarray(draw_angiogram(width, height, seed=width)).convert("RGB")
        samples.append(Sample(f"drawn {width}x{height}", image, image))
    return samples


def one_pass(sizes: LanguageModelSpec, embeds: Array, kept: int) -> dict[str, Array]:
    """Inputs of language_model for one pass over `embeds` [1, tokens, hidden_size] with an empty FP32 cache; the last `kept` positions are
    returned."""
    length = embeds.shape[1]
    cache = np.zeros((1, sizes.kv_heads, sizes.capacity, sizes.head_dim), np.float32)
    return {
        "inputs_embeds": embeds,
        "position_ids": np.arange(length)[None],
        "write_indices": np.zeros(1, np.int64),
        "kv_positions": np.arange(length),
        "gather_positions": np.arange(length - kept, length)[None],
        **{f"past_{part}.{layer}": cache for layer in range(sizes.layers) for part in ("key", "value")},
    }


def run_language_model(session: Session, sizes: LanguageModelSpec, embeds: Array, kept: int) -> dict[str, Array]:
    """language_model's hidden_states and next_ids at the last `kept` positions of `embeds` [1, tokens, hidden_size], in the graph's type.

    As in the runtime on a CPU, at most CPU_TOKENS positions run at once, and the cache is written in place, so that a long prompt fits in
    memory. The kept positions are in the last pass.
    """
    length, dtype = embeds.shape[1], session.signature["past_key.0"][0]
    shape = (1, sizes.kv_heads, sizes.capacity, sizes.head_dim)
    cache = {f"{part}.{layer}": session.zeros(shape, dtype) for layer in range(sizes.layers) for part in ("key", "value")}
    starts = range(0, max(length - kept, 1), CPU_TOKENS)
    for start in starts:
        last = start == starts[-1]
        end = length if last else start + CPU_TOKENS
        found = session.run(
            {
                "inputs_embeds": np.ascontiguousarray(embeds[:, start:end]),
                "position_ids": np.arange(start, end)[None],
                "write_indices": np.array([start]),
                "kv_positions": np.arange(end),
                "gather_positions": np.arange(length - kept, length)[None] - start if last else np.zeros((1, 1), np.int64),
                **{f"past_{name}": value for name, value in cache.items()},
            },
            into={f"present_{name}": value for name, value in cache.items()},
        )
    return found
