"""A function in a process beside this one."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys

import pytest

from vessel_export.io.subprocess_call import beside
from vessel_rt.errors import VesselError


def test_the_result_comes_back() -> None:
    with beside(math.hypot) as other:
        other.call(3, 4)
        assert other.result() == 5


def test_an_error_comes_back_with_its_traceback() -> None:
    with beside(math.sqrt) as other:
        other.call(-1)
        with pytest.raises(ValueError, match="math domain error") as caught:
            other.result()
    assert "_answer" in caught.value.__notes__[0]


def test_a_process_that_dies_is_reported() -> None:
    with beside(os._exit) as other:
        other.call(9)
        with pytest.raises(VesselError, match="ended with code 9"):
            other.result()


def test_a_block_that_fails_ends_the_process_before_it_is_asked() -> None:
    with pytest.raises(RuntimeError, match="first"), beside(math.sqrt):
        raise RuntimeError("first")


@pytest.mark.parametrize("sent", [b"", pickle.dumps(math.sqrt)[:-3], pickle.dumps(math.sqrt), pickle.dumps(math.sqrt) + b"\x80\x05\x95"])
def test_a_process_whose_parent_is_gone_ends_without_a_word(sent: bytes) -> None:
    """Before it sent the function, within it, before the arguments, within those."""
    worker = [sys.executable, "-c", "from vessel_export.io.subprocess_call import _answer; _answer()"]
    done = subprocess.run(worker, input=sent, capture_output=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_process_that_dies_within_its_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vessel_export.io.subprocess_call._ANSWER", "import os; os.write(1, b'\\x80\\x05\\x95'); os._exit(9)")
    with beside(math.sqrt) as other:
        other.call(4)
        with pytest.raises(VesselError, match="ended with code 9"):
            other.result()


def test_an_eoferror_of_the_function_is_its_error() -> None:
    with beside(pickle.loads) as other:
        other.call(b"")
        with pytest.raises(EOFError, match="Ran out of input"):
            other.result()
