"""A function in a child process."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys

import pytest

from vessel_export.io.subprocess_call import subprocess_call
from vessel_rt.errors import VesselError


def test_the_result_comes_back() -> None:
    with subprocess_call(math.hypot) as call:
        call.start(3, 4)
        assert call.result() == 5


def test_an_error_comes_back_with_its_traceback() -> None:
    with subprocess_call(math.sqrt) as call:
        call.start(-1)
        with pytest.raises(ValueError, match="math domain error") as caught:
            call.result()
    assert "_run_child" in caught.value.__notes__[0]


def test_a_process_that_dies_is_reported() -> None:
    with subprocess_call(os._exit) as call:
        call.start(9)
        with pytest.raises(VesselError, match="ended with code 9"):
            call.result()


def test_a_block_that_fails_ends_the_process_before_it_is_asked() -> None:
    with pytest.raises(RuntimeError, match="first"), subprocess_call(math.sqrt):
        raise RuntimeError("first")


@pytest.mark.parametrize("sent", [b"", pickle.dumps(math.sqrt)[:-3], pickle.dumps(math.sqrt), pickle.dumps(math.sqrt) + b"\x80\x05\x95"])
def test_a_process_whose_parent_is_gone_ends_without_a_word(sent: bytes) -> None:
    """Before it sent the function, within it, before the arguments, within those."""
    worker = [sys.executable, "-c", "from vessel_export.io.subprocess_call import _run_child; _run_child()"]
    done = subprocess.run(worker, input=sent, capture_output=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_process_that_dies_within_its_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vessel_export.io.subprocess_call._CHILD", "import os; os.write(1, b'\\x80\\x05\\x95'); os._exit(9)")
    with subprocess_call(math.sqrt) as call:
        call.start(4)
        with pytest.raises(VesselError, match="ended with code 9"):
            call.result()


def test_an_eoferror_of_the_function_is_its_error() -> None:
    with subprocess_call(pickle.loads) as call:
        call.start(b"")
        with pytest.raises(EOFError, match="Ran out of input"):
            call.result()
