"""The time of each step and of a whole image, the first run against later ones, and the images per second by batch size."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec
from PIL import Image

from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.record import Record
from vessel_rt.check.schema import BatchSpeed, StepTime
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.device.rates import Rates, known_rates
from vessel_rt.errors import OutOfMemory
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.stage_cost import Cost, stage_cost
from vessel_rt.measure.frames import frame_of, tiles_of
from vessel_rt.measure.timing import TOTAL, medians, repeated, timed_batch
from vessel_rt.model.prompt import PromptTokenizer
from vessel_rt.model.result import Result
from vessel_rt.model.segmenter import Segmenter

__all__ = ["MEASURED_TILES", "check_speed", "first_run"]

MEASURED_TILES = (1, 10)
_BATCHES = (1, 2, 4)


def first_run(record: Record, segmenter: Segmenter, bundle: Bundle) -> float | None:
    """Milliseconds of the first image after loading, with the rehearsal of the question's draft; None if it fails. Makes a line."""
    with record.attempt("loading", "first image"):
        began = time.perf_counter()
        segmenter.segment(frame_of(1, bundle.tiles), bundle.prompt.default_question)
        seconds = time.perf_counter() - began
        record.passed("loading", "first image", f"{seconds:.2f} s")
        return seconds * 1e3
    return None


def check_speed(record: Record, segmenter: Segmenter, deployment: LoadedDeployment, first_ms: float) -> None:
    """The lines of `speed`."""
    bundle, device = deployment.bundle, str(deployment.device)
    question = bundle.prompt.default_question
    for tiles in MEASURED_TILES:
        image = frame_of(tiles, bundle.tiles)
        found = tiles_of(image.size, bundle.tiles)
        name = _named(found)
        with record.attempt("speed", name):
            runs = _runs(segmenter, [image], question)
            rows = [StepTime(device, found, step, len(runs), *ms) for step, ms in medians([times for times, _ in runs]).items()]
            if rates := _rates(deployment):
                rows = _with_floors(rows, rates, _costs(bundle, found, runs[-1][1][0]))
            record.times += rows
            total = next(row for row in rows if row.step == TOTAL)
            of_floor = f", floor {total.floor_ms:.1f} ms" if total.floor_ms else ""
            first = f", the first after loading {first_ms:.0f} ms" if tiles == 1 else ""
            record.passed("speed", name, f"p50 {total.p50_ms:.1f} ms, p90 {total.p90_ms:.1f} ms of {total.runs} runs{of_floor}{first}")
    if deployment.device.kind == "cpu":
        record.skipped("speed", "batches", "a CPU gains nothing from several images at once (docs/performance.md)")
        return
    for tiles in MEASURED_TILES:
        with record.attempt("speed", f"batches, {_named(tiles)}"):
            _sweep(record, segmenter, deployment, tiles)


def _runs(segmenter: Segmenter, images: Sequence[Image.Image], question: str) -> list[tuple[dict[str, float], list[Result]]]:
    return repeated(lambda _: timed_batch(segmenter, images, question))


def _rates(deployment: LoadedDeployment) -> Rates | None:
    """The card's rates, if they are known. They are those of FP16 and BF16."""
    if deployment.device.kind == "cpu" or deployment.bundle.precision == "fp32":
        return None
    return known_rates(list_gpus()[deployment.device.index].name)


def _costs(bundle: Bundle, tiles: int, result: Result) -> dict[str, Cost]:
    """The work of each stage for one image with this result; empty if the bundle does not tell."""
    before, after = PromptTokenizer(bundle).encode(result.question)
    prompt = len(before) + tiles * bundle.tiles.tokens_per_tile + len(after)
    drafted, masks = prompt + result.drafted, max(1, len(result.masks))
    runs: list[tuple[str, dict[str, int]]] = [
        ("vision_encoder", {"tiles": tiles}),
        ("language_model", {"batch": 1, "sequence": drafted, "live": drafted, "kept": 1 + result.drafted}),
        *(("language_model", {"batch": 1, "sequence": 1, "live": prompt + i, "kept": 1}) for i in range(1, 1 + result.decode_steps)),
        ("sam2_image_encoder", {"images": 1}),
        ("sam2_mask_decoder", {"images": 1, "masks": masks}),
    ]
    found: dict[str, Cost] = {}
    for stage, sizes in runs:
        cost = stage_cost(bundle, stage, sizes)
        if cost is None:
            return {}
        found[stage] = found.get(stage, Cost(0, 0)) + cost
    return found


def _with_floors(rows: Sequence[StepTime], rates: Rates, costs: Mapping[str, Cost]) -> list[StepTime]:
    """The rows with the floor of each stage, of which the total's is the sum, and the shares of the rates that the medians reach."""
    if not costs:
        return list(rows)
    floors = {stage: rates.floor_ms(cost) for stage, cost in costs.items()}
    floors[TOTAL] = sum(floors.values())
    found = []
    for row in rows:
        mfu, mbu = rates.used(costs[row.step], row.p50_ms) if row.step in costs and row.p50_ms else (None, None)
        found.append(msgspec.structs.replace(row, floor_ms=_short(floors.get(row.step)), mfu=_short(mfu), mbu=_short(mbu)))
    return found


def _short(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def _sweep(record: Record, segmenter: Segmenter, deployment: LoadedDeployment, tiles: int) -> None:
    """Images per second at batch sizes up to the deployment's own, as far as there is memory."""
    bundle, question = deployment.bundle, deployment.bundle.prompt.default_question
    image = frame_of(tiles, bundle.tiles)
    found = tiles_of(image.size, bundle.tiles)
    ran: list[BatchSpeed] = []
    short = ""
    for batch in sorted({*(batch for batch in _BATCHES if batch < deployment.batch), deployment.batch}):
        try:
            runs = _runs(segmenter, [image] * batch, question)
        except OutOfMemory as e:
            short = f"{batch} images at once: {e}"
            break
        ran.append(BatchSpeed(str(deployment.device), found, batch, round(1e3 / medians([times for times, _ in runs])[TOTAL][0], 3)))
    record.batches += ran
    told = ", ".join(f"{each.batch}: {each.images_per_second:.2f}" for each in ran)
    record.judged("speed", f"batches, {_named(found)}", f"images per second, by images at once: {told}", short or None)


def _named(tiles: int) -> str:
    return f"{tiles} tile{'s' * (tiles > 1)}"
