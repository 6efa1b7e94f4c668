"""The floor beside the times that were measured. tests/runtime/check/test_check.py runs the whole."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.support.fake_gpu import install_gpu
from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.schema import StepTime
from vessel_rt.check.speed import _costs, _rates, _with_floors
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.device.rates import DATA_SHEETS, Rates
from vessel_rt.formats.bundle import STAGES, Bundle
from vessel_rt.formats.stage_cost import stage_cost
from vessel_rt.measure.frames import frame_of
from vessel_rt.model.segmenter import Segmenter


def test_each_stage_has_the_floor_of_its_runs_and_the_total_their_sum(fp32_bundle: Path) -> None:
    bundle = Bundle.load(fp32_bundle)
    with Segmenter(deploy(bundle, Device("cpu")), 1, draft=False) as segmenter:
        result = segmenter.segment(frame_of(1, bundle.tiles), bundle.prompt.default_question)
    assert result.decode_steps > 0
    costs = _costs(bundle, 1, result)
    assert costs.keys() == set(STAGES)
    assert costs["vision_encoder"] == stage_cost(bundle, "vision_encoder", {"tiles": 1})
    assert costs["language_model"].bytes > (1 + result.decode_steps) * bundle.weight_bytes("language_model")
    rates = Rates(flops=1e12, bytes=1e11)
    rows = [StepTime("cuda:0", 1, step, 3, 100.0, 110.0) for step in ("square", *STAGES, "total")]
    square, *stages, total = _with_floors(rows, rates, costs)
    assert (square.floor_ms, square.mfu) == (None, None)
    for row in stages:
        assert row.floor_ms == pytest.approx(rates.floor_ms(costs[row.step]), rel=1e-3)
        assert (row.mfu, row.mbu) == pytest.approx(rates.used(costs[row.step], 100.0), rel=1e-3)
    assert total.floor_ms == pytest.approx(sum(row.floor_ms or 0 for row in stages), rel=1e-3)
    assert total.mfu is None


def test_without_counts_there_is_no_floor(fp32_bundle: Path) -> None:
    bundle = Bundle.load(fp32_bundle)
    older = {name: msgspec.structs.replace(stage, flops=0) for name, stage in bundle.stages.items()}
    bundle = msgspec.structs.replace(bundle, stages=older)
    with Segmenter(deploy(bundle, Device("cpu")), 1) as segmenter:
        result = segmenter.segment(frame_of(1, bundle.tiles), bundle.prompt.default_question)
    assert _costs(bundle, 1, result) == {}
    rows = [StepTime("cuda:0", 1, "total", 3, 100.0, 110.0)]
    assert _with_floors(rows, Rates(1e12, 1e11), {}) == rows


def test_rates_are_those_of_fp16_on_a_card_that_is_known(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    for precision, kind, rates in (("fp16", "cuda", DATA_SHEETS["RTX 3090"]), ("fp32", "cuda", None), ("fp16", "cpu", None)):
        deployment = deploy(standin, Device("cpu"))
        bundle = msgspec.structs.replace(standin, precision=precision)
        own = {"bundle": bundle, "device": Device(kind), "graphs": deployment.graphs}
        assert _rates(LoadedDeployment(**own)) == rates
