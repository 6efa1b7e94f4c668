from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.formats.golden import (
    CINE_SKETCHED,
    GOLDEN_ARRAYS,
    GOLDEN_FILE,
    GOLDEN_SCHEMA,
    SKETCHED,
    Golden,
    GoldenCase,
    GoldenCaseRecord,
    GoldenCine,
    GoldenCineRecord,
    GoldenFile,
    GoldenFrame,
    GoldenReference,
    GoldenShift,
    SketchSpec,
    make_sketch,
    shifted,
)
from vessel_rt.formats.schema import to_json

SPEC = SketchSpec(buckets=256, seed=7)


def _golden(bundle: Bundle, masks: int = 2) -> Golden:
    random = np.random.default_rng(0)
    side = bundle.mask.low_res_size
    logits = random.normal(size=(masks, side, side)).astype(np.float16).astype(np.float32)
    sketches = {name: make_sketch(random.normal(size=100), SPEC) for outputs in SKETCHED.values() for name in outputs}
    record = GoldenCaseRecord(frame=0, question="Where?", answer="[SEG][SEG]", token_ids=(3, 3), masks=masks)
    scores = np.arange(masks, dtype=np.float32)
    reference = GoldenReference("fp32", False, bundle.provenance.checkpoint_sha256, {"torch": "2.13.0"})
    return Golden(
        GoldenFile(reference=reference, sketches=SPEC, frames=(GoldenFrame(40, 30, 1),), cases=(record, record)),
        (random.integers(0, 256, (30, 40), np.uint8),),
        (GoldenCase(0, record.question, record.answer, record.token_ids, logits, scores, -scores, sketches),) * 2,
    )


def _with_cine(golden: Golden) -> Golden:
    """The goldens with a cine of two frames."""
    random = np.random.default_rng(1)
    record = GoldenCineRecord(0, (GoldenShift(0, 0), GoldenShift(3, -2)), "Where?", "[SEG][SEG]", (3, 3), masks=2)
    logits = np.stack([case.low_res_logits for case in golden.cases], axis=1)
    sketches = {name: make_sketch(random.normal(size=100), SPEC) for name in CINE_SKETCHED.values()}
    return dataclasses.replace(golden, file=msgspec.structs.replace(golden.file, cine=record), cine=GoldenCine(record, logits, sketches))


@pytest.fixture
def copy(standin: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(standin.folder, tmp_path / "bundle")
    return Bundle.load(tmp_path / "bundle")


def test_a_bundle_without_goldens(standin: Bundle) -> None:
    assert Golden.load(standin) is None


def test_reads_what_was_written(copy: Bundle) -> None:
    written = _golden(copy)
    bundle = written.save(copy)
    read = Golden.load(bundle)
    assert read is not None
    assert read.file == written.file
    np.testing.assert_array_equal(read.frames, written.frames)
    for ours, theirs in zip(read.cases, written.cases, strict=True):
        for field in dataclasses.fields(GoldenCase):
            if field.name != "sketches":
                np.testing.assert_equal(getattr(ours, field.name), getattr(theirs, field.name))
        assert ours.low_res_logits.dtype == np.float32
        assert {name: sketch.norm for name, sketch in ours.sketches.items()} == {name: s.norm for name, s in theirs.sketches.items()}
        assert all(ours.sketches[name].error(theirs.sketches[name]) == 0 for name in theirs.sketches)
    assert bundle.files == copy.files
    bundle.verify_files()
    assert sorted(path.name for path in bundle.folder.iterdir()) == sorted(
        [*(path.name for path in copy.folder.iterdir() if "golden" not in path.name), GOLDEN_FILE, GOLDEN_ARRAYS]
    )


def test_the_same_goldens_give_the_same_bytes(copy: Bundle) -> None:
    files = _golden(copy).to_files()
    assert files == _golden(copy).to_files()
    again = Golden.load(_golden(copy).save(copy))
    assert again is not None
    assert again.to_files() == files


def test_a_case_without_masks(copy: Bundle) -> None:
    read = Golden.load(_golden(copy, masks=0).save(copy))
    assert read is not None
    assert read.cases[0].low_res_logits.shape == (0, copy.mask.low_res_size, copy.mask.low_res_size)
    empty = read.sketch(np.empty((0, 3), np.float32))
    assert empty.error(empty) == 0
    assert read.sketch(np.ones(3)).error(empty) == math.inf


def test_a_cine(copy: Bundle) -> None:
    written = _with_cine(_golden(copy))
    read = Golden.load(written.save(copy))
    assert read is not None
    assert read.file == written.file
    assert read.cine is not None
    assert written.cine is not None
    np.testing.assert_array_equal(read.cine.low_res_logits, written.cine.low_res_logits)
    assert read.cine.sketches.keys() == written.cine.sketches.keys()
    assert all(read.cine.sketches[name].error(sketch) == 0 for name, sketch in written.cine.sketches.items())
    assert read.to_files() == written.to_files()


def test_goldens_of_an_older_version_have_no_cine(copy: Bundle) -> None:
    golden = _golden(copy)
    document = json.loads(golden.to_files()[GOLDEN_FILE])
    del document["cine"]
    file = json.dumps(document | {"schema": 1}).encode()
    with pytest.MonkeyPatch.context() as patch:
        good = golden.to_files()
        patch.setattr(Golden, "to_files", lambda _: good | {GOLDEN_FILE: file})
        bundle = golden.save(copy)
    read = Golden.load(bundle)
    assert read is not None
    assert (read.cine, read.file.cine, read.file.schema) == (None, None, 1)


def test_a_frame_of_a_cine_that_is_not_there(copy: Bundle) -> None:
    golden = _with_cine(_golden(copy))
    assert golden.file.cine
    cine = msgspec.structs.replace(golden.file.cine, frame=1)
    assert "a case without a frame" in _refused(copy, golden, file=to_json(msgspec.structs.replace(golden.file, cine=cine)).encode())


def test_a_shifted_frame() -> None:
    frame = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(shifted(frame, GoldenShift(1, 0)), [[0, 0, 1, 2], [4, 4, 5, 6], [8, 8, 9, 10]])
    np.testing.assert_array_equal(shifted(frame, GoldenShift(0, -2)), [[8, 9, 10, 11]] * 3)
    np.testing.assert_array_equal(shifted(frame, GoldenShift(100, 100)), np.zeros((3, 4)))


def test_goldens_are_not_needed_to_run(copy: Bundle) -> None:
    bundle = _golden(copy).save(copy)
    (bundle.folder / GOLDEN_ARRAYS).unlink()
    bundle.verify_files()
    with pytest.raises(BundleError, match=rf"{GOLDEN_ARRAYS}: cannot be read"):
        Golden.load(bundle)


@pytest.mark.parametrize("name", [GOLDEN_FILE, GOLDEN_ARRAYS])
def test_a_changed_file(copy: Bundle, name: str) -> None:
    bundle = _golden(copy).save(copy)
    path = bundle.folder / name
    path.write_bytes(path.read_bytes().replace(b"frame", b"fram3"))
    with pytest.raises(BundleError, match=f"{name}: was changed"):
        Golden.load(bundle)


def _refused(bundle: Bundle, golden: Golden, **files: bytes) -> str:
    """The error for goldens with other files, whose hashes are right."""
    made = {GOLDEN_FILE: files.get("file"), GOLDEN_ARRAYS: files.get("arrays")}
    with pytest.MonkeyPatch.context() as patch:
        good = golden.to_files()
        patch.setattr(Golden, "to_files", lambda _: good | {name: content for name, content in made.items() if content is not None})
        bundle = golden.save(bundle)
    with pytest.raises(BundleError) as caught:
        Golden.load(bundle)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_goldens_of_another_checkpoint(copy: Bundle) -> None:
    golden = _golden(copy)
    reference = msgspec.structs.replace(golden.file.reference, checkpoint_sha256="f" * 64)
    file = msgspec.structs.replace(golden.file, reference=reference)
    assert "another checkpoint" in _refused(copy, golden, file=to_json(file).encode())


def test_a_newer_schema(copy: Bundle) -> None:
    golden = _golden(copy)
    document = json.loads(golden.to_files()[GOLDEN_FILE]) | {"schema": GOLDEN_SCHEMA + 1}
    assert "upgrade vessel-rt" in _refused(copy, golden, file=json.dumps(document).encode())


def _npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an archive"),
        (b"PK\x05\x06" + bytes(18), "frame_0|case_0"),
        (_npz(frame_0=np.zeros(65 << 20, np.uint8)), "too large"),
        (_npz(**{"case_0.low_res_logits": np.zeros(3, np.float16)}), "case_0.low_res_logits"),
        (_npz(frame_0=np.array([{}], object)), "llow_pickle"),
    ],
)
def test_other_arrays(copy: Bundle, content: bytes, said: str) -> None:
    message = _refused(copy, _golden(copy), arrays=content)
    assert any(part in message for part in said.split("|")), message


def test_goldens_that_are_too_large_are_not_written(copy: Bundle) -> None:
    golden = dataclasses.replace(_golden(copy), frames=(np.random.default_rng(0).integers(0, 256, (3000, 3000), np.uint8),))
    before = (copy.folder / BUNDLE_FILE).read_bytes()
    with pytest.raises(ValueError, match="8000000"):
        golden.save(copy)
    assert (copy.folder / BUNDLE_FILE).read_bytes() == before
    assert not (copy.folder / GOLDEN_FILE).exists()


def test_a_sketch_is_the_same_everywhere() -> None:
    """Its numbers are in bundles that other versions read."""
    np.testing.assert_array_equal(make_sketch(np.arange(10.0), SketchSpec(8, 3)).sums, [0, 2, 10, -8, 0, 0, 12, 11])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_sketch_estimates_the_error(dtype: type) -> None:
    random = np.random.default_rng(1)
    estimates = []
    for seed in range(50):
        reference = random.normal(size=(3, 1000)).astype(dtype)
        other = (reference + random.normal(size=reference.shape) / 50).astype(dtype)
        error = np.linalg.norm((other - reference).astype(float)) / np.linalg.norm(reference.astype(float))
        spec = SketchSpec(256, seed)
        estimates.append(make_sketch(other, spec).error(make_sketch(reference, spec)) / error)
    assert abs(np.mean(estimates) - 1) < 0.03
    assert np.max(np.abs(np.array(estimates) - 1)) < 0.2  # over four standard deviations


def test_a_sketch_of_many_values_in_any_layout() -> None:
    values = np.random.default_rng(0).normal(size=(1500, 1501)).astype(np.float32)
    whole = make_sketch(values, SPEC)
    assert whole.norm == pytest.approx(np.linalg.norm(values.astype(float)))
    assert make_sketch(np.asfortranarray(values), SPEC).error(whole) == 0
    changed = values.copy()
    changed[-1, -1] += 1
    assert make_sketch(changed, SPEC).error(whole) == pytest.approx(1 / whole.norm, rel=1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    good, bad = make_sketch(np.ones(5), SPEC), make_sketch(np.array([1, 1, value, 1, 1]), SPEC)
    assert math.isnan(bad.error(good))
    assert math.isnan(good.error(bad))
