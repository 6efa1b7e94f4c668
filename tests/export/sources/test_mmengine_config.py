"""mmengine's configuration texts: read as data, however they are meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vessel_export.sources.mmengine_config import UNKNOWN, find, find_all, read_config


def test_a_config_is_read_and_never_run(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    config = read_config(
        f"import os\nlr = 4e-5\nrun = os.system('touch {flag}')\n"
        "model = dict(type=A.B, opt=dict(lr=lr, betas=(0.9, -1), n=open('x')), **other)\nmodel['x'] = 1\nd = {'a': [1], b: 2}\n"
    )
    assert config == {
        "lr": 4e-5,
        "run": UNKNOWN,
        "model": {"type": UNKNOWN, "opt": {"lr": 4e-5, "betas": [0.9, -1], "n": UNKNOWN}},
        "d": {"a": [1]},
    }
    assert find(config, "betas") == [0.9, -1]
    assert find(config, "weight_decay") == UNKNOWN
    assert read_config("not python at all (") == {}
    assert not flag.exists()


def test_all_values_of_a_key_are_found() -> None:
    assert find_all(read_config("a = dict(x=1, y=[dict(x=2e2)])\nx = -3"), "x") == [-3, 1, 200.0]


DOUBLING = "a0 = [1, 1]\n" + "".join(f"a{i + 1} = [a{i}, a{i}]\n" for i in range(100))
CHAIN = "a0 = [1]\n" + "".join(f"a{i + 1} = [a{i}]\n" for i in range(5000))
LONG_TEXT = f"a = '{'x' * 10_000}'\nb = [" + "a, " * 10_000 + "]"


@pytest.mark.parametrize(
    "text",
    [
        DOUBLING, CHAIN, LONG_TEXT, "a = " + "[" * 199 + "]" * 199, "a = " + "-" * 100_000 + "1", "a = 1" + "+1" * 100_000,
        "a = " + "b." * 100_000 + "c", "a = \0", "a = " + "9" * 5000, "#" * (1 << 21),
    ],
)  # fmt: skip
def test_texts_that_would_take_for_ever_mean_nothing(text: str) -> None:
    assert read_config(text) == {} or set(read_config(text).values()) == {UNKNOWN}


def test_what_is_read_can_be_shown() -> None:
    """Numbers beyond what is printed, keys that JSON lacks, and characters that move a terminal's cursor."""
    config = read_config(
        "a = 0x" + "f" * 10_000 + "\nb = {b'x': 1, 5: 2, 'y': 3}\nc = '\\x1b[2J'\nd = 1j\ne = b'x'\nf = ...\ng = '\\ud800'"
    )
    assert config == {"a": UNKNOWN, "b": {"y": 3}} | dict.fromkeys("cdefg", UNKNOWN)
    assert json.dumps(config)
