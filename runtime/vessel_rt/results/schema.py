"""The files of an output folder: their types, and a check for each. Does not read or write them.

People edit these files, and other versions write them. A value that passes its check has every field that readers use, of its type and
within its bounds, and names no file outside its folder. Unknown fields are allowed. Messages name fields, never their values, which may be
names of patients.
"""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from msgspec import Meta

from vessel_rt.formats.schema import decode
from vessel_rt.inputs.images import MAX_SIDE

__all__ = [
    "CINES",
    "MASKS",
    "OVERLAYS",
    "PREVIEWS",
    "SCHEMA",
    "CineRecord",
    "ComparedMask",
    "EvaluationFile",
    "JournalEntry",
    "MaskRecord",
    "Planned",
    "ResultLine",
    "Rle",
    "RunCounts",
    "RunFile",
    "ScoreRecord",
    "SeriesRecord",
    "TimingLine",
    "check_entry",
    "check_evaluation",
    "check_planned",
    "check_result",
    "check_run",
    "check_timing",
    "is_result_file",
]

SCHEMA = 1
MASKS, OVERLAYS, PREVIEWS, CINES = "masks", "overlays", "previews", "cines"

_MOST = 2**53  # beyond, JSON's numbers are not the same everywhere
_Schema = Annotated[int, Meta(ge=1, le=SCHEMA)]
_Count = Annotated[int, Meta(ge=0, lt=_MOST)]
_Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
_Number = Annotated[float, Meta(gt=-_MOST, lt=_MOST)]


class Rle(TypedDict):
    """A run-length-encoded mask in COCO's format.

    Attributes:
        size: height and width, in pixels.
        counts: the compressed run lengths.
    """

    size: Annotated[list[_Side], Meta(min_length=2, max_length=2)]
    counts: str


class MaskRecord(TypedDict):
    """A mask in a line of results.jsonl.

    Attributes:
        file: the PNG file, relative to the output folder.
        iou: the IoU that SAM2 predicts, rounded.
        object_score: a logit, rounded; above 0, SAM2 predicts that the object is present.
        area: the number of pixels in the mask.
        box: x0, y0, x1, y1 in pixels, the right and lower ends excluded; null for an empty mask.
        rle: the mask, run-length encoded.
    """

    file: str
    iou: _Number
    object_score: _Number
    area: _Count
    box: Annotated[list[_Count], Meta(min_length=4, max_length=4)] | None
    rle: Rle


class SeriesRecord(TypedDict):
    """The place of a frame in a series of numbered files.

    Attributes:
        name: the name of the cine's output files, without suffix.
        code: the study code of the cine.
        number: the number in the name of the frame's file.
    """

    name: str
    code: str
    number: _Count


class ResultLine(TypedDict):
    """A line of results.jsonl: one frame and one question.

    Attributes:
        schema: the version of this format; 1 if absent.
        index: the position of the frame among the inputs, from 0.
        image: the input's file name, or its study code with `--pseudonymize`.
        frame: the number of the frame in a multi-frame file, from 0; otherwise null.
        name: the name of the frame's output files, without suffix.
        code: the study code.
        question: the question.
        status: `ok` or `error`.
        error: the error message if the status is `error`; otherwise null.
        width: the width of the image in pixels; null after an error.
        height: the height of the image in pixels; null after an error.
        answer: the answer of the model; null after an error.
        masks: one mask for each [SEG] in the answer.
        files: the SHA-256 of each output file of the frame, by its path in the output folder.
        input: the SHA-256 of the input file; null after an error.
        settings: a hash of everything that determines the results: version, bundle, kind of device, questions, options.
        series: the series that the frame is of, with `--series`; otherwise null. Absent without `--propagate`.
        propagated_from: the numbers of the frames from which the masks were tracked; null if the model was asked about this frame. Absent
            without `--propagate`.
        time_ms: the time from the first frame of the file to this one, in milliseconds; null if the file does not say. Absent without
            `--propagate`.
    """

    schema: NotRequired[_Schema]
    index: _Count
    image: str
    frame: _Count | None
    name: str
    code: str
    question: str
    status: Literal["ok", "error"]
    error: str | None
    width: _Side | None
    height: _Side | None
    answer: str | None
    masks: list[MaskRecord]
    files: dict[str, str]
    input: str | None
    settings: str
    series: NotRequired[SeriesRecord | None]
    propagated_from: NotRequired[list[_Count] | None]
    time_ms: NotRequired[_Number | None]


class TimingLine(TypedDict):
    """A line of timings.jsonl, for the results.jsonl line with the same number. Fields are null if the times were lost.

    Attributes:
        schema: the version of this format; 1 if absent.
        index: as in results.jsonl.
        code: as in results.jsonl.
        question: as in results.jsonl.
        drafted: the number of tokens in the draft.
        accepted: the number of draft tokens that were accepted.
        decode_steps: the number of runs of language_model after the first.
        batch: the number of images that ran together.
        ms: the time of each step, in milliseconds.
    """

    schema: NotRequired[_Schema]
    index: _Count
    code: str
    question: str
    drafted: _Count | None
    accepted: _Count | None
    decode_steps: _Count | None
    batch: _Count | None
    ms: dict[str, _Number]


class Planned(TypedDict):
    """The first line of journal.jsonl.

    Attributes:
        schema: the version of this format; 1 if absent.
        planned: the names of all frames of the run.
    """

    schema: NotRequired[_Schema]
    planned: list[str]


class JournalEntry(TypedDict):
    """Any other line of journal.jsonl: a finished frame.

    Attributes:
        name: the frame's name.
        lines: the frame's lines of results.jsonl.
        timings: the frame's lines of timings.jsonl.
    """

    name: str
    lines: Annotated[list[ResultLine], Meta(min_length=1)]
    timings: list[TimingLine]


class RunBundle(TypedDict):
    """The bundle of a run.

    Attributes:
        name: the name of the bundle's folder.
        sha256: the SHA-256 of bundle.json.
        precision: `fp32`, `fp16` or `bf16`.
        weights: the type of the matrices: the precision, `int8` or `int4`.
        checkpoint: the file name of the checkpoint.
    """

    name: str
    sha256: NotRequired[str]
    precision: str
    weights: NotRequired[str]
    checkpoint: str


class RunOptions(TypedDict):
    """The options of a run, without names of inputs and folders. run.json also has the other options, named as on the command line.

    Attributes:
        num_shards: the number of shards that the inputs were split into.
        shard_id: the shard of this run, from 0.
        show_names: whether the report and messages show file names.
        key: a code that identifies the key of the study codes.
    """

    num_shards: _Count
    shard_id: _Count
    show_names: bool
    key: str


class RunCounts(TypedDict):
    """The counts of a run.

    Attributes:
        in_all_shards: frames of all shards together.
        images: frames that this run or an earlier one processed.
        ok: frames that have results.
        failed: frames that failed.
        kept: frames whose results come from an earlier run.
        answers: answers; a frame has one for each question.
        with_decode_steps: answers that needed decode steps.
        masks: masks.
        without_mask: answers without a mask.
    """

    in_all_shards: _Count
    images: _Count
    ok: NotRequired[_Count]
    failed: NotRequired[_Count]
    kept: NotRequired[_Count]
    answers: NotRequired[_Count]
    with_decode_steps: NotRequired[_Count]
    masks: NotRequired[_Count]
    without_mask: NotRequired[_Count]


class RunFile(TypedDict):
    """run.json, written at the end of a run.

    Attributes:
        schema: the version of this format; 1 if absent.
        versions: the versions of vessel-rt and its libraries.
        bundle: the bundle.
        device: the devices of the run.
        options: the options of the run.
        counts: the numbers of frames, answers and masks.
        started: when the run began, in ISO 8601.
        seconds: the time of `load` and `images`, in seconds.
        images_per_second: frames that this run processed, divided by the time of `images`.
        peak_memory_bytes: the peak resident memory; null if the system does not report it.
        batch: the number of `streams`, and the batch size `at_first` and at `least` (smaller if memory ran out).
        skipped: the number of input files that were not used, by input and kind.
        shards: data from run.json of each merged shard.
    """

    schema: NotRequired[_Schema]
    versions: dict[str, str]
    bundle: RunBundle
    device: str
    options: RunOptions
    counts: RunCounts
    started: str
    seconds: dict[str, _Number]
    images_per_second: _Number
    peak_memory_bytes: _Count | None
    batch: NotRequired[Any]
    skipped: NotRequired[Any]
    shards: NotRequired[Any]


class ComparedMask(TypedDict):
    """A mask and its ground truth, in evaluation.json. Each metric is an additional field: a number, or null if it is not defined.

    Attributes:
        index: the index of the frame, as in results.jsonl.
        question: as in results.jsonl.
        concept: the concept, such as `vessel`.
        mask: the number of the mask in the answer, from 0; null for the union of all masks.
        predicted_area: the area of the predicted mask, in pixels.
        true_area: the area of the ground truth, in pixels.
        truth_rle: the ground truth, run-length encoded.
    """

    index: _Count
    question: str
    concept: str
    mask: _Count | None
    predicted_area: _Count
    true_area: _Count
    truth_rle: Rle


class ScoreRecord(TypedDict):
    """The means of one question and concept, in evaluation.json. The keys of tables are metrics.

    Attributes:
        question: as in results.jsonl.
        concept: the concept, such as `vessel`.
        images: the number of images.
        mean: the mean over the images.
        ci95: the ends of the 95 % confidence interval of the mean; null if there is none.
        left_out: the number of images for which the metric is not defined.
    """

    question: str
    concept: str
    images: _Count
    mean: dict[str, _Number | None]
    ci95: dict[str, Annotated[list[_Number | None], Meta(min_length=2, max_length=2)] | None]
    left_out: dict[str, _Count]


class CineRecord(TypedDict):
    """The scores of an object of a cine, in evaluation.json: of one concept, asked for by one question.

    Attributes:
        code: the study code of the cine.
        question: as in results.jsonl.
        concept: the concept, such as `vessel`.
        frames: the number of frames.
        j: the mean IoU.
        f: the mean F-measure of the boundaries.
        jf: the mean of `j` and `f`.
        stability: the mean IoU of the masks of consecutive frames; null if they are all empty.
        true_stability: the same of the ground truth.
        warped_stability: the same with masks moved by optical flow; null without `--flow`.
        true_warped_stability: the same of the ground truth.
    """

    code: str
    question: str
    concept: str
    frames: _Count
    j: _Number
    f: _Number
    jf: _Number
    stability: _Number | None
    true_stability: _Number | None
    warped_stability: NotRequired[_Number | None]
    true_warped_stability: NotRequired[_Number | None]


class EvaluationFile(TypedDict):
    """evaluation.json.

    Attributes:
        schema: the version of this format; 1 if absent.
        truth: `annotations` or `a folder of masks`; with `--show-names`, the name of the file or folder.
        metrics: the metrics, in the order of the tables.
        images: the compared masks.
        summary: the means.
        cines: the scores of cines; absent in files from older versions.
        failed: the number of images without an answer.
        without_truth: the number of images without ground truth.
    """

    schema: NotRequired[_Schema]
    truth: str
    metrics: list[str]
    images: list[ComparedMask]
    summary: list[ScoreRecord]
    cines: NotRequired[list[CineRecord]]
    failed: _Count
    without_truth: _Count


def is_result_file(name: str) -> bool:
    """Whether a line may list a file of this name: one right inside one of the folders of results."""
    folder, _, file = name.partition("/")
    return folder in (MASKS, OVERLAYS, PREVIEWS) and _is_component(file)


def check_result(value: Any) -> ResultLine:
    """A line of results.jsonl. Raises ValueError, which names the field."""
    _require(value, ResultLine)
    _check_line(value)
    return cast(ResultLine, value)


def _check_line(line: ResultLine) -> None:
    """What the types of a line do not tell."""
    _require_name(line["name"], "name")
    if series := line.get("series"):
        _require_name(series["name"], "series.name")
    if not all(map(is_result_file, line["files"])):
        raise ValueError("files: lists a file outside the folders of results")
    for number, mask in enumerate(line["masks"]):
        if not mask["file"].startswith(f"{MASKS}/") or mask["file"] not in line["files"]:
            raise ValueError(f"masks[{number}].file: not among 'files'")
    if line["status"] == "ok" and None in (line["width"], line["height"], line["input"], line["answer"]):
        raise ValueError("a frame that is done lacks 'width', 'height', 'input' or 'answer'")
    if (line["status"] == "ok") != (line["error"] is None):
        raise ValueError("'status' and 'error' do not agree")


def check_timing(value: Any) -> TimingLine:
    """A line of timings.jsonl. Raises ValueError, which names the field."""
    _require(value, TimingLine)
    return cast(TimingLine, value)


def check_planned(value: Any) -> Planned:
    """The first line of the journal. Raises ValueError, which names the field."""
    _require(value, Planned)
    for name in value["planned"]:
        _require_name(name, "planned")
    return cast(Planned, value)


def check_entry(value: Any) -> JournalEntry:
    """Any other line of the journal. Raises ValueError, which names the field."""
    _require(value, JournalEntry)
    if len(value["lines"]) != len(value["timings"]):
        raise ValueError("'lines' and 'timings' do not agree")
    for line in value["lines"]:
        _check_line(line)
        if line["name"] != value["name"]:
            raise ValueError("'name' is not that of its lines")
    return cast(JournalEntry, value)


def check_run(value: Any) -> RunFile:
    """run.json. Raises ValueError, which names the field."""
    _require(value, RunFile)
    return cast(RunFile, value)


def check_evaluation(value: Any) -> EvaluationFile:
    """evaluation.json. Raises ValueError, which names the field."""
    _require(value, EvaluationFile)
    metrics = value["metrics"]
    for number, image in enumerate(value["images"]):
        if not all(_is_metric(image.get(metric, "missing")) for metric in metrics):
            raise ValueError(f"images[{number}]: a metric is missing or not a number")
    for number, score in enumerate(value["summary"]):
        if not all(score[of].keys() >= set(metrics) for of in ("mean", "ci95", "left_out")):
            raise ValueError(f"summary[{number}]: a metric is missing")
    return cast(EvaluationFile, value)


def _is_metric(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < _MOST)


def _require(value: Any, kind: type) -> None:
    decode(value, kind, SCHEMA)  # what it returns lacks the unknown fields, so the value itself is used


def _require_name(name: str, where: str) -> None:
    if not _is_component(name):
        raise ValueError(f"{where}: not the name of a file")


def _is_component(name: str) -> bool:
    """Whether `name` can only be the name of a file in its folder. On POSIX a backslash is a letter like others."""
    try:
        return name not in ("", "..") and PurePath(name).name == name and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half of a pair of UTF-16, which is no letter
        return False
