"""What the PyTorch reference made of a few generated frames and a cine: `golden.json` and `golden.npz` of a bundle, and sketches of arrays.

The exporter writes them, so that a bundle can be checked where there is neither PyTorch nor the checkpoint. bundle.json has the hashes of
both files (`Bundle.golden`); nothing but a check reads them. NumPy only. Does not know how the outputs are computed.

    golden = Golden.load(bundle)                    # None if the bundle has none
    for case in golden.cases:
        frame = golden.frames[case.frame]           # uint8 [height, width], gray: Image.fromarray(frame).convert("RGB")
        ...                                         # run the bundle on the frame and case.question; compare with case.token_ids
        error = golden.sketch(image_embeds).error(case.sketches["image_embeds"])
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle, GoldenFiles
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.schema import Items, NewerSchemaError, Sha256, Table, Text, decode, parse_json, to_json
from vessel_rt.io.files import read_regular, replacing

__all__ = [
    "CINE_SKETCHED",
    "GOLDEN_ARRAYS",
    "GOLDEN_FILE",
    "GOLDEN_SCHEMA",
    "MOST_GOLDEN_BYTES",
    "SKETCHED",
    "Golden",
    "GoldenCase",
    "GoldenCaseRecord",
    "GoldenCine",
    "GoldenCineRecord",
    "GoldenFile",
    "GoldenFrame",
    "GoldenReference",
    "GoldenShift",
    "Sketch",
    "SketchSpec",
    "make_sketch",
    "shifted",
]

GOLDEN_FILE, GOLDEN_ARRAYS = "golden.json", "golden.npz"
GOLDEN_SCHEMA = 2  # 2 added `cine`
MOST_GOLDEN_BYTES = 8_000_000  # of both files together
SKETCHED: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("image_embeds",),
    "language_model": ("prompt_state", "seg_states"),
    "sam2_image_encoder": ("fpn_0", "fpn_1", "image_features"),
    "sam2_mask_decoder": ("low_res_logits",),
}
"""The outputs of each stage that have a sketch, in the order of the pipeline.

Shapes are those of docs/architecture.md, for one image: `image_embeds` [tiles, tokens, hidden]; `fpn_0`, `fpn_1` and `image_features`
[1, ...]; `low_res_logits` [masks, side, side]. Of language_model's hidden_states, `prompt_state` [hidden] is at the prompt's last token (it
gives the answer's first token), and `seg_states` [masks, hidden] are those that the mask decoder takes.
"""
CINE_SKETCHED = {
    "sam2_memory_encoder": "memory",
    "sam2_memory_attention": "conditioned_features",
    "sam2_tracking_decoder": "low_res_logits",
}
"""The output of each stage of cines that has a sketch, of the first object: its `memory` [1, ...] of the first frame, and the
`conditioned_features` [1, ...] and `low_res_logits` [side, side] of the first frame that it is tracked to. Later
frames have the errors of those before."""
_OF_FRAMES = frozenset((*SKETCHED["vision_encoder"], *SKETCHED["sam2_image_encoder"]))  # the question does not change them

_MOST_UNPACKED = 64 << 20  # bytes of all arrays
_AT_ONCE = 1 << 20  # values sketched at a time: a multiple of four

_Side = Annotated[int, Meta(ge=1, le=4096)]
_Few = Annotated[int, Meta(ge=0, le=256)]
_Shift = Annotated[int, Meta(ge=-256, le=256)]


class GoldenFrame(Struct, frozen=True, forbid_unknown_fields=True):
    """A generated frame.

    Attributes:
        width: its width, in pixels.
        height: its height, in pixels.
        tiles: the number of tiles that it is cut into, the thumbnail included.
    """

    width: _Side
    height: _Side
    tiles: _Side


class GoldenCaseRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A question about a frame, and the reference's answer.

    Attributes:
        frame: the frame, by its position in `frames`.
        question: the question.
        answer: the text of the answer, with special tokens, without the stop token.
        token_ids: the ids of the answer, without the stop token.
        masks: the number of masks: one for each [SEG] of the answer.
    """

    frame: _Few
    question: Text
    answer: Text
    token_ids: Items[Annotated[int, Meta(ge=0, le=2**20)]]
    masks: _Few


class GoldenShift(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a frame of a cine lies.

    Attributes:
        x: how far it is moved to the right, in pixels.
        y: how far it is moved down, in pixels.
    """

    x: _Shift
    y: _Shift


class GoldenCineRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A cine, a question about it, and the reference's answer, on the video path of Sa2VA's inference.

    Attributes:
        frame: the frame that moves, by its position in `frames`.
        shifts: where it lies at each time; what comes into view has the values of its edge.
        question: the question.
        answer: the text of the answer, with special tokens, without the stop token.
        token_ids: the ids of the answer, without the stop token.
        masks: the number of objects: one for each [SEG] of the answer.
    """

    frame: _Few
    shifts: Items[GoldenShift]
    question: Text
    answer: Text
    token_ids: Items[Annotated[int, Meta(ge=0, le=2**20)]]
    masks: Annotated[int, Meta(ge=1, le=256)]


class GoldenReference(Struct, frozen=True, forbid_unknown_fields=True):
    """What computed the outputs.

    Attributes:
        precision: the type in which it computed: `fp32`.
        streamed: whether its layers were read one at a time. The numbers are the same as if they were loaded at once.
        checkpoint_sha256: the SHA-256 of the checkpoint.
        versions: the versions of vessel-rt and of the libraries.
    """

    precision: Text
    streamed: bool
    checkpoint_sha256: Sha256
    versions: Table[Text, Text]


class SketchSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """How arrays are sketched (docs/numerics.md).

    Attributes:
        buckets: the number of sums in a sketch.
        seed: the seed of NumPy's PCG64, whose raw numbers give each value its bucket and its sign.
    """

    buckets: Annotated[int, Meta(ge=1, le=2**12)] = 256
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0


class GoldenFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`golden.json`: what golden.npz has, and which reference made it.

    Attributes:
        schema: the version of this format.
        reference: what computed the outputs.
        sketches: how outputs are sketched.
        frames: the frames.
        cases: the questions about them, and the answers.
        cine: the cine; null if the bundle has no graphs for cines, if the reference found no object in it, or if an older version recorded
            the goldens.
    """

    schema: Annotated[int, Meta(ge=1, le=GOLDEN_SCHEMA)] = GOLDEN_SCHEMA
    reference: GoldenReference
    sketches: SketchSpec
    frames: Items[GoldenFrame]
    cases: Items[GoldenCaseRecord]
    cine: GoldenCineRecord | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """A count sketch of an array: `sums` float32 [buckets], and the array's L2 norm.

    The difference of two sketches is the sketch of the difference, and the squared length of a sketch is an unbiased estimate of the
    squared norm, with a relative standard deviation of at most sqrt(2 / buckets): 9 % for 256 buckets, or 4.4 % of the norm.
    """

    sums: npt.NDArray[np.float32]
    norm: float

    def error(self, reference: Sketch) -> float:
        """An estimate of |array - reference| / |reference| (L2 norms), for arrays of one shape.

        NaN if either has NaN or infinity; 0 or infinity if the reference is zero or empty.
        """
        distance = float(np.linalg.norm(self.sums.astype(np.float64) - reference.sums))
        if reference.norm == 0 and not math.isnan(distance):
            return math.inf if distance else 0.0
        return distance / reference.norm if math.isfinite(reference.norm) and math.isfinite(self.norm) else math.nan


def make_sketch(array: npt.NDArray[Any], spec: SketchSpec) -> Sketch:
    """The sketch of an array's values, in C order; its shape does not matter. Takes about 20 ns and no memory for each value."""
    flat = array.reshape(-1)
    sums, squares, stream = np.zeros(spec.buckets), 0.0, np.random.PCG64(spec.seed)
    for start in range(0, len(flat), _AT_ONCE):
        values = flat[start : start + _AT_ONCE].astype(np.float64)
        # PCG64's raw numbers are the same in every version of NumPy. Each gives four values a sign (1 bit) and a bucket (15 bits).
        drawn = np.asarray(stream.random_raw(-(-len(values) // 4))).astype("<u8").view("<u2")[: len(values)]
        squares += float(values @ values)
        signed = np.where(drawn & 1, values, -values)
        sums += np.bincount((drawn >> 1) % spec.buckets, signed, spec.buckets)
    return Sketch(sums.astype(np.float32), math.sqrt(squares))


def shifted(frame: npt.NDArray[np.uint8], shift: GoldenShift) -> npt.NDArray[np.uint8]:
    """A frame of the cine: uint8 [height, width], `frame` where `shift` puts it."""
    height, width = frame.shape
    rows, columns = np.arange(height) - shift.y, np.arange(width) - shift.x
    return frame[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)]


@dataclasses.dataclass(frozen=True, eq=False)
class GoldenCase:
    """A question about a frame, and what the reference computed.

    `low_res_logits` float32 [masks, side, side] were stored as float16; `iou` and `object_score` are float32 [masks].
    `sketches` has one for each output in SKETCHED; without masks, those of `seg_states` and `low_res_logits` are of empty arrays.
    """

    frame: int
    question: str
    answer: str
    token_ids: tuple[int, ...]
    low_res_logits: npt.NDArray[np.float32]
    iou: npt.NDArray[np.float32]
    object_score: npt.NDArray[np.float32]
    sketches: Mapping[str, Sketch]


@dataclasses.dataclass(frozen=True, eq=False)
class GoldenCine:
    """The cine of golden.json, and what the reference computed: `low_res_logits` float32 [masks, frames, side, side] were stored as
    float16; `sketches` has one for each output in CINE_SKETCHED."""

    record: GoldenCineRecord
    low_res_logits: npt.NDArray[np.float32]
    sketches: Mapping[str, Sketch]


@dataclasses.dataclass(frozen=True, eq=False)
class Golden:
    """The goldens of a bundle: golden.json, the frames (uint8 [height, width], gray), the cases in the order of golden.json, and what was
    computed of its cine, if it has one."""

    file: GoldenFile
    frames: tuple[npt.NDArray[np.uint8], ...]
    cases: tuple[GoldenCase, ...]
    cine: GoldenCine | None = None

    @classmethod
    def load(cls, bundle: Bundle) -> Golden | None:
        """The goldens of `bundle`; None if it has none.

        Raises:
            BundleError: a file is missing or was changed, is not what its format says, or belongs to another checkpoint's bundle.
        """
        if bundle.golden is None:
            return None
        remedy = "record it again with `vessel-export verify --record`"
        path = bundle.folder / GOLDEN_FILE
        try:
            document = _read(bundle, GOLDEN_FILE, bundle.golden.file.sha256)
            path = bundle.folder / GOLDEN_ARRAYS
            packed = _read(bundle, GOLDEN_ARRAYS, bundle.golden.arrays.sha256)
            path = bundle.folder / GOLDEN_FILE
            file = decode(parse_json(document), GoldenFile, GOLDEN_SCHEMA)
            if file.reference.checkpoint_sha256 != bundle.provenance.checkpoint_sha256:
                raise ValueError("is of another checkpoint")
            asked = (*file.cases, *((file.cine,) if file.cine else ()))
            if any(each.frame >= len(file.frames) for each in asked) or not file.cases:
                raise ValueError("has no cases, or a case without a frame")
            path = bundle.folder / GOLDEN_ARRAYS
            return cls._from(file, _unpacked(packed), bundle.mask.low_res_size)
        except OSError as e:
            raise BundleError(f"{path}: cannot be read ({e.strerror}); {remedy}") from e
        except NewerSchemaError as e:
            raise BundleError(f"{path}: {e}") from e
        except ValueError as e:
            raise BundleError(f"{path}: {e}; {remedy}") from e

    @classmethod
    def _from(cls, file: GoldenFile, arrays: Mapping[str, npt.NDArray[Any]], side: int) -> Golden:
        def take(name: str, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
            found = arrays.get(name)
            if found is None or found.shape != shape or found.dtype != dtype:
                raise ValueError(f"{name} is missing, or not {np.dtype(dtype)} {list(shape)}")
            return found

        def sketch(name: str) -> Sketch:
            return Sketch(take(f"{name}.sketch", np.float32, file.sketches.buckets), float(take(f"{name}.norm", np.float64)))

        cases = tuple(
            GoldenCase(
                case.frame,
                case.question,
                case.answer,
                case.token_ids,
                take(f"case_{i}.low_res_logits", np.float16, case.masks, side, side).astype(np.float32),
                take(f"case_{i}.iou", np.float32, case.masks),
                take(f"case_{i}.object_score", np.float32, case.masks),
                {name: sketch(place) for name, place in _places(i, case.frame)},
            )
            for i, case in enumerate(file.cases)
        )
        frames = tuple(take(f"frame_{i}", np.uint8, frame.height, frame.width) for i, frame in enumerate(file.frames))
        cine = None
        if file.cine:
            logits = take("cine.low_res_logits", np.float16, file.cine.masks, len(file.cine.shifts), side, side)
            sketches = {name: sketch(f"cine.{name}") for name in CINE_SKETCHED.values()}
            cine = GoldenCine(file.cine, logits.astype(np.float32), sketches)
        return cls(file, frames, cases, cine)

    def sketch(self, array: npt.NDArray[Any]) -> Sketch:
        """The sketch of an output, to be compared with one of `cases`."""
        return make_sketch(array, self.file.sketches)

    def to_files(self) -> dict[str, bytes]:
        """The content of golden.json and golden.npz, by file name. The same goldens give the same bytes.

        Raises:
            ValueError: they have more than MOST_GOLDEN_BYTES.
        """
        arrays: dict[str, npt.NDArray[Any]] = {f"frame_{i}": frame for i, frame in enumerate(self.frames)}
        for i, case in enumerate(self.cases):
            arrays[f"case_{i}.low_res_logits"] = case.low_res_logits.astype(np.float16)
            arrays[f"case_{i}.iou"], arrays[f"case_{i}.object_score"] = case.iou, case.object_score
            for name, place in _places(i, case.frame):
                arrays[f"{place}.sketch"], arrays[f"{place}.norm"] = case.sketches[name].sums, np.array(case.sketches[name].norm)
        if self.cine:
            arrays["cine.low_res_logits"] = self.cine.low_res_logits.astype(np.float16)
            for name, one in self.cine.sketches.items():
                arrays[f"cine.{name}.sketch"], arrays[f"cine.{name}.norm"] = one.sums, np.array(one.norm)
        files = {GOLDEN_FILE: to_json(self.file).encode(), GOLDEN_ARRAYS: _packed(arrays)}
        if (size := sum(map(len, files.values()))) > MOST_GOLDEN_BYTES:
            raise ValueError(f"the goldens have {size} bytes, more than {MOST_GOLDEN_BYTES}")
        return files

    def save(self, bundle: Bundle) -> Bundle:
        """Write both files into the folder of `bundle`, then a bundle.json that names them; returns the bundle as it is now.

        Each file is replaced in one step, bundle.json last. If that fails in between, the bundle runs as before, and `load` says that its
        goldens were changed.

        Raises:
            ValueError: as `to_files`.
            OSError: a file cannot be written.
        """
        records = {}
        for name, content in self.to_files().items():
            with replacing(bundle.folder / name, sync=True) as path:
                path.write_bytes(content)
            records[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
        golden = GoldenFiles(file=records[GOLDEN_FILE], arrays=records[GOLDEN_ARRAYS])
        with replacing(bundle.folder / BUNDLE_FILE, sync=True) as path:
            path.write_text(msgspec.structs.replace(bundle, golden=golden).to_json(), encoding="utf-8")
        return Bundle.load(bundle.folder)


def _places(case: int, frame: int) -> Iterator[tuple[str, str]]:
    """Each sketched output of a case, and the beginning of its names in golden.npz: what depends on the frame alone is there once."""
    for outputs in SKETCHED.values():
        for name in outputs:
            yield name, f"frame_{frame}.{name}" if name in _OF_FRAMES else f"case_{case}.{name}"


def _read(bundle: Bundle, name: str, sha256: str) -> bytes:
    content = read_regular(bundle.folder / name, MOST_GOLDEN_BYTES)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("was changed (its SHA-256 differs from that in bundle.json)")
    return content


def _unpacked(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a .npz. ValueError if it is none, or if they are larger than any goldens."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MOST_UNPACKED:
                raise ValueError("its arrays are too large")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        MemoryError,
        NotImplementedError,
        OSError,
        RuntimeError,
        OverflowError,
        zlib.error,
    ) as e:
        raise ValueError("is not an archive of arrays") from e


def _packed(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """A compressed .npz without times, which np.savez_compressed would write."""
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue(), zipfile.ZIP_DEFLATED)
    return result.getvalue()
