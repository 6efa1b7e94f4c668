"""benchmarks.cpu_peers: the cost of the language model, and what is made of measured times. Nothing is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cpu_peers import Contender, Sizes, node_kinds, ratios, summary

SIZES = Sizes(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocabulary=32)


def _round(**prompts: tuple[list[float], list[float]]) -> dict[str, Any]:
    times = {name.removeprefix("t"): {"prefill": prefill, "decode": decode} for name, (prefill, decode) in prompts.items()}
    return {"version": "1", "prompts": times, "other_load": 0.01}


def test_matrices_are_those_of_the_8b_model() -> None:
    full = Sizes(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944, vocabulary=151679)
    assert full.matrices == 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert full.head == 3584 * 151679


def test_operations_of_a_prompt() -> None:
    layer = 2 * (8 * 8) + 2 * (8 * 4) + 3 * (8 * 16)  # q and o, k and v, the MLP
    pairs = 3 * 4 // 2  # causal: the third token attends to three
    assert SIZES.prefill_operations(3) == 2 * (2 * layer * 3 + 8 * 32) + 2 * pairs * 4 * 2 * 4


def test_bytes_of_a_decode_step() -> None:
    assert SIZES.decode_bytes(0, 2, 4) == 2 * (SIZES.matrices + 8 * 32)
    assert SIZES.decode_bytes(5, 2, 4) - SIZES.decode_bytes(0, 2, 4) == 2 * 5 * 2 * 4 * 4  # layers, tokens, keys and values, width, bytes


def test_ratios_are_within_a_round() -> None:
    ours = [_round(t320=([1.0, 3.0], [0.1]), t2600=([10.0], [0.2])), _round(t320=([4.0], [0.2]))]
    theirs = [_round(t320=([4.0], [0.2]), t2600=([5.0], [0.2])), _round(t320=([4.0], [0.1]))]
    assert ratios(ours, theirs) == {
        "320": {"prefill": [4.0, 1.0], "decode": [2.0, 0.5]},
        "2600": {"prefill": [0.5], "decode": [1.0]},
    }


def test_a_summary_has_the_fastest_times_and_what_they_cost() -> None:
    contender = Contender("one", "int8", 1, 4, ("python",), Path("model"))
    found = summary(contender, SIZES, [_round(t320=([3.0, 2.0], [0.1])), _round(t320=([8.0], [0.1, 0.2]))])
    assert (found["version"], found["rate"], found["other_load"]) == ("1", "int8", [0.01, 0.01])
    assert found["prompts"]["320"] == {
        "prefill_seconds": {"fastest": 2.0, "all": [3.0, 2.0, 8.0]},
        "prefill_operations": SIZES.prefill_operations(320),
        "decode_ms": {"fastest": 100.0, "median": 100.0},
        "decode_bytes": SIZES.decode_bytes(320, 1, 4),
    }


def test_a_profile_is_summed_by_matrix_and_operator() -> None:
    def node(name: str, operator: str, begin: int, microseconds: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin, "dur": microseconds, "args": {"op_name": operator}}

    events = [
        {"cat": "Session", "name": "model_run", "ts": 10, "dur": 90},
        node("layers.0/mlp/up_proj/MatMul_node_1", "MatMulNBits", 10, 500),
        node("layers.1/mlp/up_proj/MatMul_node_2", "MatMulNBits", 20, 500),
        node("layers.1/self_attn/k_proj/MatMul_node_3", "MatMul", 30, 2000),
        node("layers.1/Add_node_4", "Add", 40, 100),
        node("layers.1/Add_node_4", "Add", 100, 100),  # of the next run
    ]
    assert node_kinds(events, 10, 100) == {"k_proj": 2.0, "up_proj": 1.0, "Add": 0.1}
    assert list(node_kinds(events, 10, 100)) == ["k_proj", "up_proj", "Add"]
