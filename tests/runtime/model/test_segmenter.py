from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from PIL import Image

from tests.support.frames import make_frame
from tests.support.standin import LAYERS, build_standin
from tests.support.standin_gpu import StandinGpu, cuda_failure, out_of_memory
from vessel_rt.device.deployment import deploy, deploy_on
from vessel_rt.device.providers import Device
from vessel_rt.device.session import Session
from vessel_rt.errors import DeviceError, GraphError, ImageError, OutOfMemory, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.preprocess import mask_pixels
from vessel_rt.model.result import Result
from vessel_rt.model.segmenter import Segmenter

CPU, GPU = Device("cpu"), Device("cuda")
STICKY = "CUDA failure 700: an illegal memory access was encountered"


def mask_by_torch(bundle: Bundle, image: Image.Image) -> np.ndarray:
    """What the stand-in's graphs amount to: where the image, averaged over 4x4 pixels of its square, is darker than mid-gray."""
    square = torch.from_numpy(mask_pixels(image, bundle.mask))
    low_res = -torch.nn.functional.avg_pool2d(square, 4).mean(dim=1, keepdim=True)
    twice = torch.nn.functional.interpolate(low_res, size=(64, 64), mode="bilinear", align_corners=False)
    logits = torch.nn.functional.interpolate(twice, size=(image.height, image.width), mode="bilinear", align_corners=False)
    return (logits[0, 0].sigmoid() > 0.5).numpy()


@pytest.mark.parametrize("size", [(96, 64), (512, 512), (1000, 333)], ids=str)
def test_the_whole_pipeline(standin: Bundle, size: tuple[int, int]) -> None:
    image = make_frame(*size)
    with Segmenter(deploy(standin, CPU), threads=1) as segmenter:
        result = segmenter.segment(image, standin.prompt.default_question)
    assert result.answer == "Mask [SEG]."
    assert (result.drafted, result.accepted, result.decode_steps, result.images) == (7, 7, 0, 1)
    [mask] = result.masks
    assert mask.pixels.dtype == np.bool_
    np.testing.assert_array_equal(mask.pixels, mask_by_torch(standin, image))
    assert 0 < mask.iou < 1
    assert mask.object_score == pytest.approx(3 - mask.iou, abs=1e-6)
    assert list(result.ms) == ["tiles", "square", "vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder", "upsample"]


def test_every_seg_gives_a_mask_in_order(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "bundle", answer="[SEG],[SEG]", max_new_tokens=5)
    with Segmenter(deploy(bundle, CPU), threads=1) as segmenter:
        result = segmenter.segment(make_frame(), "All of them?")
    assert result.answer == "[SEG],[SEG],[SEG]"
    assert len(result.masks) == 3
    assert len({mask.iou for mask in result.masks}) == 3  # their states differ, by what stands before them


def test_an_answer_without_seg_is_a_result_without_masks(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "bundle", answer="None.")
    with Segmenter(deploy(bundle, CPU), threads=1) as segmenter:
        result = segmenter.segment(make_frame(), "Where?")
    assert (result.answer, result.masks) == ("None.", ())
    assert "sam2_image_encoder" not in result.ms


def test_a_prompt_that_does_not_fit(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "bundle", capacity=80, max_new_tokens=16)
    with Segmenter(deploy(bundle, CPU), threads=1) as segmenter:
        assert segmenter.segment(make_frame(448, 448), "Where?").masks
        with pytest.raises(ImageError, match="its prompt has 68 tokens, but this bundle takes 64"):
            segmenter.segment(make_frame(1344, 1344), "Where?")


def test_questions_are_checked(standin: Bundle) -> None:
    with Segmenter(deploy(standin, CPU), threads=1) as segmenter:
        segmenter.prepare_question("Where?")
        with pytest.raises(VesselError, match="empty"):
            segmenter.prepare_question("")


def test_the_trained_model(fp32_bundle: Path, tiny_frames: list[Path]) -> None:
    """The exporter's own graphs: an answer in the training's form, and a mask that is neither nothing nor everything."""
    bundle = Bundle.load(fp32_bundle)
    with Segmenter(deploy(bundle, CPU), threads=1) as segmenter:
        for path in tiny_frames[:3]:
            with Image.open(path) as image:
                result = segmenter.segment(image.convert("RGB"), bundle.prompt.default_question)
            assert result.answer in bundle.prompt.answers
            [mask] = result.masks
            assert 0.005 < mask.pixels.mean() < 0.5


def test_the_draft_is_what_the_model_says_of_a_gray_image(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "bundle", answer="Dark [SEG]!")  # none of the answers in the bundle
    with Segmenter(deploy(bundle, CPU), threads=1) as segmenter:
        results = [segmenter.segment(make_frame(seed=seed), question) for seed in range(2) for question in ("Where?", "And where?")]
    assert {(result.answer, result.accepted, result.decode_steps) for result in results} == {("Dark [SEG]!", 7, 0)}


def test_without_a_mask_on_the_gray_image_the_bundles_answer_stays_the_draft(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "bundle", answer="None.")
    with Segmenter(deploy(bundle, CPU), threads=1) as segmenter:
        result = segmenter.segment(make_frame(), "Where?")
    assert (result.answer, result.drafted, result.accepted) == ("None.", 7, 0)


def same(one: Result, other: Result) -> None:
    assert (one.question, one.token_ids) == (other.question, other.token_ids)
    for ours, theirs in zip(one.masks, other.masks, strict=True):
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        assert ours.iou == pytest.approx(theirs.iou, abs=1e-5)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("answer", ["Mask [SEG].", "None.", "[SEG],[SEG]"])
def test_a_batch_equals_single_images_and_questions(tmp_path: Path, answer: str, beside: bool) -> None:
    """Images of 1, 3 and 10 tiles, three questions: nine answers, each its own; with drafts and without; SAM2's encoder as on a GPU."""
    bundle = build_standin(tmp_path / "bundle", answer=answer, max_new_tokens=9)
    images = [make_frame(512, 512), make_frame(900, 448), make_frame(1344, 1344)]
    questions = ["Where?", "Please segment vessel in this image.", "All of them?"]
    with Segmenter(deploy(bundle, CPU), threads=1, draft=False) as plain:
        single = [[plain.segment(image, question) for question in questions] for image in images]
    with Segmenter(deploy(bundle, CPU), threads=1) as segmenter, ThreadPoolExecutor(1) as thread:
        segmenter._thread = thread if beside else None
        pixels = [segmenter.prepare(image) for image in images]
        for of_one, of_image, answers in zip(single, pixels, segmenter.run(pixels, questions), strict=True):
            for one, answer_ in zip(of_one, answers, strict=True):
                result = segmenter.finish(of_image, answer_)
                same(one, result)
                assert (result.images, one.drafted) == (3, 0)


def test_what_fails_beside_the_language_model_is_raised(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutOfMemory("sam2_image_encoder fails: out of memory")

    with Segmenter(deploy(standin, CPU), threads=1) as segmenter, ThreadPoolExecutor(1) as thread:
        segmenter._thread = thread
        pixels = segmenter.prepare(make_frame())
        monkeypatch.setattr(segmenter, "_encode", full)
        with pytest.raises(OutOfMemory):
            segmenter.run([pixels, pixels], ["Where?"])
        with pytest.raises(DeviceError, match="out of memory"):  # for a gray image, too
            segmenter.run([pixels], ["Where?"])


class FailingSession:
    """Stands in for `Session.run` of a device that fails with ONNX Runtime's error `text` where `fails` of the call's feeds says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[Mapping[str, Any]], bool], text: str = STICKY) -> None:
        run = Session.run

        def run_or_fail(session: Session, feeds: Mapping[str, Any], **more: Any) -> dict[str, Any]:
            with session._faults():
                if fails(feeds):
                    raise Fail(text)
            return run(session, feeds, **more)

        monkeypatch.setattr(Session, "run", run_or_fail)


@pytest.mark.parametrize("stage_input", ["tiles", "inputs_embeds", "seg_states"])
def test_a_device_that_fails_on_a_gray_image_too_is_faulty(standin: Bundle, monkeypatch: pytest.MonkeyPatch, stage_input: str) -> None:
    with Segmenter(deploy(standin, CPU), threads=1) as segmenter:
        pixels = segmenter.prepare(make_frame())
        segmenter.run([pixels], ["Where?"])
        FailingSession(monkeypatch, lambda feeds: stage_input in feeds or (stage_input == "tiles" and "pixel_values" in feeds))
        for batch in ([pixels], [pixels, pixels]):
            with pytest.raises(DeviceError, match="CUDA failure 700"):
                segmenter.run(batch, ["Where?"])


@pytest.mark.parametrize(("text", "error"), [(STICKY, ImageError), ("Failed to allocate memory", OutOfMemory)])
def test_an_image_that_alone_fails_is_at_fault(
    standin: Bundle, monkeypatch: pytest.MonkeyPatch, text: str, error: type[ImageError]
) -> None:
    with Segmenter(deploy(standin, CPU), threads=1) as segmenter:
        small, large = (segmenter.prepare(make_frame(*size)) for size in ((448, 448), (1344, 1344)))
        FailingSession(monkeypatch, lambda feeds: "pixel_values" in feeds and len(feeds["pixel_values"]) > 3, text)
        with pytest.raises(error, match="vision_encoder fails on cpu") as caught:
            segmenter.run([large], ["Where?"])
        assert type(caught.value) is error
        segmenter.run([small], ["Where?"])


def test_a_gray_image_that_the_model_cannot_take_says_nothing_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Segmenter(deploy(build_standin(tmp_path / "bundle", capacity=80), CPU), threads=1) as segmenter:
        pixels = segmenter.prepare(make_frame())
        calls = itertools.count()
        FailingSession(monkeypatch, lambda feeds: "pixel_values" in feeds and next(calls) == 0)
        monkeypatch.setattr(segmenter, "_draft", lambda question: ())
        with pytest.raises(ImageError, match="CUDA failure 700"):
            segmenter.run([pixels], ["x" * 60])


@pytest.mark.parametrize("text", [STICKY, "CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR"])
def test_a_plain_runtime_error_of_cuda_is_a_graphs_and_any_other_a_bug(standin: Bundle, text: str) -> None:
    with Session(standin.folder / "sam2_image_encoder.onnx", CPU, 1) as session:
        with pytest.raises(GraphError, match="sam2_image_encoder fails on cpu"), session._faults():
            raise RuntimeError(text)
        with pytest.raises(RuntimeError, match="bound output"), session._faults():
            raise RuntimeError("no such bound output")


CACHE = {f"{when}_{part}.{layer}" for when in ("past", "present") for layer in range(LAYERS) for part in ("key", "value")}


def test_on_a_gpu_only_inputs_and_answers_are_copied(standin: Bundle, gpu: StandinGpu) -> None:
    """The cache and SAM2's features stay on the device, whatever the number of steps; a cache is made once for batches of a size."""
    with Segmenter(deploy_on(standin, GPU, batch=2), threads=1, draft=False) as segmenter:
        pixels = [segmenter.prepare(make_frame(size, 448)) for size in (448, 900)]
        for batch in (pixels[:1], pixels, pixels[1:], pixels[:1]):
            segmenter.run(batch, ["Where?"])
    assert len(gpu.of("language_model")) == 4 * 8  # a prompt and seven tokens
    for run in gpu.of("language_model"):
        rows, tokens, hidden = run.shapes["inputs_embeds"]
        assert not CACHE & (run.to_device.keys() | run.to_host.keys())
        assert run.to_device["inputs_embeds"] == 4 * rows * tokens * hidden
        assert sum(run.to_device.values()) <= 4 * rows * tokens * hidden + 8 * (rows * (tokens + 2) + run.shapes["kv_positions"][0])
        assert run.to_host == {"hidden_states": 4 * rows * hidden, "next_ids": 8 * rows}
    assert len(gpu.copied_in) == 3 * 2 * LAYERS  # for one row, for two, and for one again
    assert len(gpu.of("sam2_image_encoder")) == len(gpu.of("sam2_mask_decoder")) == 4
    for run in gpu.of("sam2_image_encoder"):
        assert (run.to_device.keys(), run.to_host) == ({"pixel_values"}, {})
    for run in gpu.of("sam2_mask_decoder"):
        assert run.to_device.keys() == {"seg_states", "image_index"}
        assert run.to_host.keys() == {"low_res_logits", "iou", "object_score"}


def test_on_a_gpu_sam2_runs_in_a_thread_and_the_answer_is_the_cpus(standin: Bundle, gpu: StandinGpu) -> None:
    image, question = make_frame(900, 448), standin.prompt.default_question
    with Segmenter(deploy_on(standin, GPU, batch=1), threads=1) as segmenter:
        ours = segmenter.segment(image, question)
    threads = {run.graph: run.thread for run in gpu.runs}
    assert threads.pop("sam2_image_encoder").startswith("sam2_image_encoder")
    assert set(threads.values()) == {"MainThread"}
    with Segmenter(deploy(standin, CPU), threads=1) as segmenter:
        same(ours, segmenter.segment(image, question))


def test_on_a_gpu_an_error_waits_for_sam2s_thread(standin: Bundle, gpu: StandinGpu) -> None:
    began, failed = threading.Event(), threading.Event()

    def fails(graph: str, shapes: Any) -> Exception | None:
        if graph == "sam2_image_encoder":
            began.set()
            assert failed.wait(60)
        elif graph == "language_model" and began.wait(60) and not failed.is_set():
            failed.set()
            return cuda_failure(700, "an illegal memory access was encountered")
        return None

    with Segmenter(deploy_on(standin, GPU, batch=1), threads=1, draft=False) as segmenter:
        gpu.fails = fails
        with pytest.raises(ImageError) as e:
            segmenter.run([segmenter.prepare(make_frame())], ["Where?"])
        assert gpu.of("sam2_image_encoder")  # it was running, and has ended
    assert str(e.value) == "language_model fails on cuda:0: CUDA error 700, an illegal memory access was encountered"


@pytest.mark.parametrize("fault", [False, True])
def test_nothing_stays_on_a_gpu_and_nothing_runs_after_the_end(standin: Bundle, gpu: StandinGpu, fault: bool) -> None:
    with Segmenter(deploy_on(standin, GPU, batch=1), threads=1) as segmenter:
        pixels = segmenter.prepare(make_frame())
        segmenter.run([pixels], ["Where?"])
        if fault:
            gpu.fails = lambda graph, shapes: out_of_memory() if graph == "sam2_mask_decoder" else None
            with pytest.raises(DeviceError, match="on a gray image: sam2_mask_decoder fails on cuda:0: Failed to allocate memory"):
                segmenter.run([pixels], ["Where?"])
        assert len(gpu.sessions) == 4
    runs = len(gpu.runs)
    with pytest.raises((OSError, RuntimeError)):  # its files are closed, and its thread has ended
        segmenter.run([pixels], ["Where?"])
    del segmenter
    gc.collect()
    assert (len(gpu.sessions), len(gpu.values), len(gpu.runs)) == (0, 0, runs)


def test_a_graph_that_a_gpu_has_no_room_for_leaves_no_other_loaded(standin: Bundle, gpu: StandinGpu) -> None:
    gpu.load_fault = out_of_memory()
    with pytest.raises(VesselError, match=r"\.onnx: cuda:0 has no memory for this graph: .*vessel-rt plan"):
        Segmenter(deploy_on(standin, GPU, batch=1), threads=1)
    gc.collect()
    assert not gpu.sessions
