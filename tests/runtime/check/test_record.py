"""The verdict of a check, and what becomes of errors."""

from __future__ import annotations

import pytest

from vessel_rt.check.record import Record
from vessel_rt.check.schema import GRADES, CheckFile, CheckLine
from vessel_rt.errors import BundleError


@pytest.fixture
def saved() -> list[CheckFile]:
    return []


@pytest.fixture
def record(saved: list[CheckFile]) -> Record:
    return Record(lambda text: text.replace("secret", "***"), lambda line: None, saved.append)


def test_every_line_is_saved_before_the_next(record: Record, saved: list[CheckFile]) -> None:
    record.passed("machine", "software", "fine")
    record.skipped("machine", "gpu", "none")
    assert [len(file.lines) for file in saved] == [1, 2]
    assert {(file.finished, file.passed) for file in saved} == {(False, False)}
    assert saved[-1].verdict == "NOT FINISHED: the last check was machine: gpu"


def test_a_pass_tells_what_was_skipped(record: Record) -> None:
    record.passed("machine", "software", "fine")
    record.skipped("parity", "goldens", "there are none")
    found = record.file(finished=True)
    assert (found.verdict, found.passed) == ("PASS: 1 passed, skipped: goldens", True)


def test_a_failure_names_the_first_and_counts_the_others(record: Record) -> None:
    record.device = "cuda:0"
    record.failed("parity", "vision_encoder", "off")
    record.failed("parity", "masks", "off")
    found = record.file(finished=True)
    assert (found.verdict, found.passed) == ("FAIL: parity: vision_encoder on cuda:0; 1 more failed; 0 passed", False)


def test_an_error_is_a_line_in_one_line_and_redacted(record: Record) -> None:
    with record.attempt("bundle", "files"):
        raise BundleError("secret:\n  two lines")
    [line] = record.file(finished=True).lines
    assert line == CheckLine("bundle", "files", None, "fail", "", "***: two lines")


def test_grades_that_were_not_reached_are_skipped_for_each_device(record: Record) -> None:
    record.passed("machine", "software", "fine")
    record.device = "cuda:0"
    record.failed("bundle", "target", "no engine")
    record.complete()
    record.device = "cuda:1"
    record.passed("loading", "vision_encoder", "fine")
    record.complete()
    lines = record.file(finished=True).lines
    of_first, of_second = ([line for line in lines if line.device == device] for device in ("cuda:0", "cuda:1"))
    assert [line.grade for line in of_first] == list(GRADES[1:])
    assert {line.reason for line in of_first[1:]} == {"not checked, since bundle: target failed"}
    assert [line.grade for line in of_second] == ["loading", "bundle", "providers", *GRADES[4:]]
    assert {line.reason for line in of_second[1:]} == {"not checked"}
