"""Writes the tables of docs/performance.md, quantization.md, cines.md and numerics.md, and the plots, from benchmarks/results/*.json.

    python -m benchmarks.report [--check]

The text around them is written by hand. A table is between `<!-- NAME -->` and `<!-- /NAME -->`; the names are the keys of _TABLES. Plots
go to docs/plots/*.svg. `--check` writes nothing and fails if a table does not match the results.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

DOCUMENTS = (Path("docs/performance.md"), Path("docs/quantization.md"), Path("docs/cines.md"), Path("docs/numerics.md"))
_PLOTS = Path("docs/plots")
_STEPS = ("tiles", "square", "vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder", "upsample", "end to end")
_RUNS = ("vision_encoder", "prefill", "decode", "draft", "sam2_image_encoder", "sam2_mask_decoder")
_SA2VA = {"sa2va-tiny": "examples/tiny", "sa2va-full-width": "full width"}
_CINES = {"cines-fp32-3-layers": "tiny, FP32", "cines-int8-28-layers": "28 layers, INT8"}
_CINE_STEPS = (
    "tiles", "square", "vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder", "sam2_memory_attention",
    "sam2_tracking_decoder", "sam2_memory_encoder", "upsample",
)  # fmt: skip
_CINE_FRAMES = {"a tracked frame": "tracked", "a frame by itself, 1 tile": "alone"}
_GREY, _COLOURS = (
    "#888888",
    ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"),
)  # distinguishable for colour-blind readers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the document differs from the results")
    arguments = parser.parse_args()
    before = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    after = {document: filled(text) for document, text in before.items()}
    if arguments.check:
        for document, text in after.items():
            same = text == before[document]
            print(f"{document}: {'matches the results' if same else 'differs from the results; run python -m benchmarks.report'}")
        return int(after != before)
    for document, text in after.items():
        document.write_text(text, encoding="utf-8")
    _draw()
    print(f"{', '.join(map(str, DOCUMENTS))}, {_PLOTS}/*.svg")
    return 0


def filled(document: str) -> str:
    """`document` with new tables; KeyError for an unknown table."""
    return re.sub(
        r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->",
        lambda found: f"<!-- {found[1]} -->\n{_TABLES[found[1]]()}\n<!-- /{found[1]} -->",
        document,
        flags=re.DOTALL,
    )


@functools.cache
def _result(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such result; run python -m benchmarks.{name.partition('-')[0]}") from None


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _contenders() -> str:
    rows = []
    for side, found in _result("latency")["sides"].items():
        for name, values in found["contenders"].items():
            first, speed = values["first_mask_seconds"], values["images_per_second"]
            rows.append([f"{side}x{side}", name, _middle(speed), _middle(first)])
    return _table(["frames", "contender", "images per second", "seconds from start to the first mask"], rows)


def _middle(values: Sequence[float], digits: int = 2) -> str:
    ordered = sorted(values)
    middle, least, most = (f"{value:.{digits}f}" for value in (ordered[len(ordered) // 2], ordered[0], ordered[-1]))
    return f"{middle} ({least} to {most})" if len(ordered) > 1 else middle


def _ratios() -> str:
    rows = []
    for side, found in _result("latency")["sides"].items():
        for name, ratio in found["ratios"].items():
            cells = [f"{ratio[key]['median']} ({ratio[key]['min']} to {ratio[key]['max']})" for key in ("images_per_second", "first_mask")]
            rows.append([f"{side}x{side}", name, *cells])
    return _table(["frames", "ratio", "images per second", "time to the first mask"], rows)


def _stages() -> str:
    stages = _result("latency")["stages"]
    head = ["step", *(f"{tiles} tile{'s' * (tiles != '1')}: p50, p90" for tiles in stages)]
    return _table(head, [[step, *(_percentiles(of_tiles[step]) for of_tiles in stages.values())] for step in _STEPS])


def _percentiles(values: dict[str, float]) -> str:
    return f"{values['p50']:.1f}, {values['p90']:.1f}"


def _batches() -> str:
    sides = _result("latency")["sides"]
    batches = list(next(iter(sides.values()))["ms_per_image_by_batch"])
    rows = [[f"{side}x{side}", *found["ms_per_image_by_batch"].values()] for side, found in sides.items()]
    return _table(["frames", *(f"batch {batch}" for batch in batches)], rows)


def _verified() -> str:
    rows = [
        [
            f"{side}x{side}",
            f"{found['without_decode_steps']:.0%}",
            found["min_mask_iou_with_reference"],
            f"{found['outside_graphs']:.1%}",
        ]
        for side, found in _result("latency")["sides"].items()
    ]
    return _table(["frames", "answers without a decode step", "minimum mask IoU with the reference", "wall time outside the graphs"], rows)


def _memory() -> str:
    found = _result("memory")
    ours, theirs = found["runtime_mib"], found["reference_mib"]
    ratios = found["peak_reference_over_runtime"]
    rows = [[phase.replace("_", " "), ours[phase]["peak"], theirs[phase]["peak"], ratios[phase]] for phase in ours]
    return _table(["up to", "runtime, MiB", "reference, MiB", "reference over runtime"], rows)


def _scaling() -> str:
    found = _result("scaling")
    rows = [(name, row) for name in ("by_size", "by_threads", "by_batch") for row in found[name]]
    cells = [
        [row["images"], row["threads"] or "all", row["streams"], row["batch"], row["images_per_second"], row["peak_resident_mib"]]
        for _, row in rows
    ]
    unique = list(dict.fromkeys(map(tuple, cells)))
    return _table(["images", "threads", "streams", "batch", "images per second", "peak memory, MiB"], unique)


def _flat() -> str:
    found = _result("scaling")
    time, memory, growth = found["time_ratio"], found["memory_ratio"], found["resident_growth"]
    rows = [
        ["milliseconds per image", f"{time['images'][0]} over {time['images'][1]} images", time["measured"], ""],
        ["peak memory", f"{memory['images'][0]} over {memory['images'][1]} images", memory["measured"], memory["bound"]],
        ["resident memory", f"last over second quarter of {growth['images']} images", growth["measured"], growth["bound"]],
    ]
    return _table(["", "", "ratio", "bound"], rows)


def _resume() -> str:
    found = _result("resume")
    rows = [
        ["frames, in two processes", found["images"]],
        [
            "kills, and frames done after the first and the last",
            f"{found['kills']}, {found['done_after_each'][0]} and {found['done_after_each'][-1]}",
        ],
        [
            "syncs to the disk without kills, and their share of the run's time (bound: 2 %)",
            f"{found['syncs']}, {found['syncs_share_of_time']:.2%}",
        ],
        ["report.html", f"{found['report_bytes'] / 1e6:.1f} MB"],
        ["files compared, without those with times", found["files_compared"]],
        ["files that differ", found["files_that_differ"]],
    ]
    return _table(["", ""], rows)


def _infer() -> str:
    found = _result("infer-cpu-int8-28-layers")["sides"]
    steps = [step for step in _STEPS if any(step in run["seconds_by_step"] for run in found.values())]
    rows = [
        ["loading", *(run["seconds_of_loading"] for run in found.values())],
        *([step, *(run["seconds_by_step"].get(step, "") for run in found.values())] for step in steps),
        ["a frame", *(run["seconds_per_frame"] for run in found.values())],
        ["streams", *(run["streams"] for run in found.values())],
        ["peak anonymous memory, GiB", *(run["peak_anonymous_gib"] for run in found.values())],
    ]
    return _table(["seconds", *(f"frames of {name}" for name in found)], rows)


def _host_memory() -> str:
    rows = [[form, *found.values()] for form, found in _result("host-memory-6-layers")["forms"].items()]
    return _table(["GiB", "weights", "planned", "measured", "planned over measured"], rows)


def _peer_parts() -> dict[str, Any]:
    """The parts of benchmarks.cpu_peers that compare language models."""
    return {name: part for name, part in _result("cpu_peers")["parts"].items() if "contenders" in part}


def _peer_rates() -> dict[str, float]:
    """The machine's best rates: those of the part that other load disturbed least."""
    parts = _peer_parts().values()
    return {rate: max(part["rates"][rate] for part in parts) for rate in ("bytes", "int8", "MatMulNBits", "bf16", "fp32")}


def _peers() -> str:
    rates, rows = _peer_rates(), []
    for part in _peer_parts().values():
        for name, found in part["contenders"].items():
            row = [name, f"{found['weight_bytes'] / 1e9:.1f}"]
            for tokens in ("320", "2600"):
                if tokens not in found["prompts"]:
                    row += ["", ""]
                    continue
                run = found["prompts"][tokens]
                seconds, ms = run["prefill_seconds"]["fastest"], run["decode_ms"]["fastest"]
                row += [f"{seconds:.1f} ({run['prefill_operations'] / seconds / rates[found['rate']]:.0%})"]
                row += [f"{ms:.0f} ({run['decode_bytes'] / ms * 1e3 / rates['bytes']:.0%})"]
            rows.append(row)
    head = (what.format(tokens) for tokens in ("320", "2,600") for what in ("prefill of {}, s", "decode after {}, ms"))
    return _table(["language model", "matrices, GB", *head], rows)


def _peer_ratios() -> str:
    """The peer's fastest times over ours."""
    rows = []
    for part in _peer_parts().values():
        (ours, our), (theirs, their) = part["contenders"].items()
        row = [f"{ours} over {theirs}"]
        for times in ("prefill_seconds", "decode_ms"):
            for tokens in ("320", "2600"):
                pair = [found["prompts"].get(tokens, {}).get(times, {}).get("fastest") for found in (our, their)]
                row.append(f"{pair[1] / pair[0]:.2f}" if all(pair) else "")
        rows.append(row)
    return _table(["ratio", "prefill of 320", "prefill of 2,600", "decode after 320", "decode after 2,600"], rows)


def _peer_floor() -> str:
    names = {
        "bytes": "bytes read",
        "int8": "int8 products, torch",
        "MatMulNBits": "int8 products, MatMulNBits of ONNX Runtime",
        "bf16": "BF16 products, torch",
        "fp32": "FP32 products, torch",
    }
    return _table(["", "10^9 per second"], [[names[rate], f"{value / 1e9:,.0f}"] for rate, value in _peer_rates().items()])


def _peer_profile() -> str:
    """The kinds of nodes that take 1 % of the time or more of a run."""
    runs = {name: times for name, times in _result("cpu_peers")["parts"]["profile"].items() if name != "other_load"}
    wholes = {name: sum(times.values()) for name, times in runs.items()}
    kinds = [kind for kind in next(iter(runs.values())) if any(times[kind] >= wholes[name] / 100 for name, times in runs.items())]
    rows = [[kind, *(f"{times[kind]:.1f}" for times in runs.values())] for kind in kinds]
    rest = [f"{wholes[name] - sum(times[kind] for kind in kinds):.1f}" for name, times in runs.items()]
    return _table(["ms by matrix or operator", *runs], [*rows, ["all others", *rest]])


def _peer_frame() -> str:
    found = _result("cpu_peers")["parts"]["frame"]
    ours, theirs = found["seconds_by_step"].values()
    rows = [[step, ours.get(step, ""), theirs.get(step, "")] for step in _STEPS if step in ours or step in theirs]
    return _table(["seconds", *found["seconds_by_step"]], [*rows, ["a frame", *found["seconds_per_frame"].values()]])


def _accuracy() -> str:
    rows = [
        [run["bundle"], run["device"], "on" if run["draft"] else "off", f"{run['mean_dice']:.4f}", f"{run['min_mask_iou']:.4f}"]
        for run in _result("accuracy")["runs"]
    ]
    return _table(["bundle", "device", "drafts", "mean Dice", "minimum mask IoU with the first"], rows)


def _floor() -> str:
    found = _result("floor-28-layers")
    rows = []
    for tiles, stages in found["stages"].items():
        for run in _RUNS:
            cost = stages[run]
            floors = (f"{cost['floor_ms'][gpu]:.3g}" for gpu, rates in found["rates"].items() if not rates["measured"])
            rows.append([tiles, run, f"{cost['flops'] / 1e9:.0f}", f"{cost['bytes'] / 1e9:.2f}", *floors])
    gpus = [gpu for gpu, rates in found["rates"].items() if not rates["measured"]]
    return _table(["tiles", "run", "GFLOP", "GB", *(f"{gpu}, ms" for gpu in gpus)], rows)


def _cine_floor() -> str:
    found = _result("floor-28-layers")
    cine, gpus = found["cine"], [gpu for gpu, rates in found["rates"].items() if not rates["measured"]]
    rows = [
        [run, f"{cost['flops'] / 1e9:.0f}", f"{cost['bytes'] / 1e9:.2f}", *(f"{cost['floor_ms'][gpu]:.3g}" for gpu in gpus)]
        for run, cost in cine["stages"].items()
    ]
    rows += [[name, "", "", *(f"{cine['frame_ms'][gpu][key]:.3g}" for gpu in gpus)] for name, key in _CINE_FRAMES.items()]
    rows.append(["ratio", "", "", *(f"{cine['ratio'][gpu]:.2f}" for gpu in gpus)])
    return _table(["run", "GFLOP", "GB", *(f"{gpu}, ms" for gpu in gpus)], rows)


def _cine_ways() -> str:
    rows = []
    for name, weights in _CINES.items():
        found = _result(name)
        for way in found["rounds"][0]:
            runs = [each[way] for each in found["rounds"]]
            ratios = found["ratios"].get(way, [])
            rows.append(
                [
                    weights,
                    way,
                    f"{runs[0]['asked']} of {runs[0]['frames']}",
                    runs[0].get("most_memories", ""),
                    _middle([run["frames_per_second"] for run in runs], 3),
                    _middle([run["processor_seconds"] / run["frames"] for run in runs]),
                    *(_middle([ratio[key] for ratio in ratios]) if ratios else "" for key in ("measured", "processor", "long")),
                    f"{max(run['other_load'] for run in runs):.0%}",
                ]
            )
    head = ["bundle", "way", "frames asked about", "memories, at most", "frames per second", "processor seconds per frame"]
    return _table([*head, "ratio", "ratio of processor time", "long cines", "other load, at most"], rows)


def _cine_steps() -> str:
    """Medians over rounds of the mean milliseconds of a step."""
    columns = {
        f"{weights}, {way}: {kind}": [each[way]["ms"][kind] for each in _result(name)["rounds"]]
        for name, weights in _CINES.items()
        for way, run in _result(name)["rounds"][0].items()
        for kind in run["ms"]
        if kind != "tracked"
    }
    rows = []
    for step in _CINE_STEPS:
        cells = [statistics.median(each[step] for each in means) if step in means[0] else None for means in columns.values()]
        rows.append([step, *("" if cell is None else f"{cell:,.0f}" if cell >= 100 else f"{cell:.1f}" for cell in cells)])
    return _table(["ms", *columns], rows)


def _projection() -> str:
    cases = _result("floor-28-layers")["projection"]["cases"]
    return _table(
        ["assumption", *(f"{tiles} tile{'s' * (tiles != '1')}, ms" for tiles in cases[0]["ms"])],
        [[case["assumption"], *case["ms"].values()] for case in cases],
    )


def _utilisation() -> str:
    found = _result("floor-3-layers")
    rows = [
        [tiles, run, values["ms"], f"{found['stages'][tiles][run]['floor_ms']['cpu']:.2f}", f"{values['mfu']:.1%}", f"{values['mbu']:.1%}"]
        for tiles, runs in found["used"].items()
        for run, values in runs.items()
    ]
    return _table(["tiles", "run", "ms", "floor, ms", "MFU", "MBU"], rows)


def _export() -> str:
    found = _result("export")
    rows = [
        ["peak anonymous memory, all processes", f"{found['peak_anonymous_gib']} GiB", "4 GiB"],
        [f"wall time over copying the result ({found['seconds']} s, {found['copy_seconds']} s)", found["time_over_copy"], 3],
        [f"bytes written over the bundle's ({found['bundle_bytes'] / 1e9:.1f} GB)", found["bytes_written_over_bundle"], 1.1],
    ]
    return _table(["", "measured", "bound"], rows)


def _export_peer() -> str:
    found = _result("export")
    rows = [
        ["peft and torch.onnx", peer["layers"], peer["seconds"], f"{peer['peak_anonymous_gib']} GiB", f"{peer['bytes'] / 1e9:.1f} GB"]
        for peer in found["peer"]
    ]
    ours = [found["layers"], found["seconds"], f"{found['peak_anonymous_gib']} GiB", f"{found['bundle_bytes'] / 1e9:.1f} GB"]
    return _table(["", "layers", "seconds", "peak memory", "output"], [*rows, ["vessel-export, whole pipeline", *ours]])


def _build(name: str) -> str:
    rows = [
        [
            stage["stage"],
            stage["partitions"],
            stage["seconds"],
            f"{stage['peak_anonymous_gib']} GiB",
            f"{stage['engine_bytes'] / 1e9:.2f} GB",
        ]
        for stage in _result(name)["stages"]
    ]
    return _table(["stage", "engines", "seconds", "peak memory", "size"], rows)


def _quantization(name: str) -> str:
    head = ["activations and weights", "bytes", "answers identical", "mean IoU", "least IoU", "Dice", "clDice", "HD95"]
    rows = [[row["name"], f"{row['weights_bytes']:,}", *_scores(row["sets"][name])] for row in _result("quantization")["bundles"]]
    return _table(head, rows)


def _quantized_stages() -> str:
    head = ["quantized", "answers identical", "mean IoU", "least IoU", "Dice", "clDice", "HD95"]
    return _table(head, [[row["name"], *_scores(row["sets"]["examples/tiny"])] for row in _result("quantization")["stages"]])


def _quantized_matrices() -> str:
    scores = [(row["name"], row["sets"]["examples/tiny"]) for row in _result("quantization")["matrices"]]
    return _table(["quantized", "mean IoU", "least IoU"], [[name, f"{s['mean_iou']:.4f}", f"{s['min_iou']:.4f}"] for name, s in scores])


def _quantized_activations() -> str:
    rows = []
    for row in _result("quantization")["static"]:
        tiny, angiograms = (row["sets"][name] for name in ("examples/tiny", "angiograms"))
        answers = sum(found["identical_answers"] for found in (tiny, angiograms)), sum(found["answers"] for found in (tiny, angiograms))
        numbers = [f"{found[key]:.4f}" for found in (tiny, angiograms) for key in ("mean_iou", "min_iou")]
        rows.append([row["name"], f"{answers[0]} of {answers[1]}", *numbers])
    return _table(["in FP32", "answers identical", "mean IoU", "least IoU", "angiograms: mean IoU", "least IoU"], rows)


def _stage_errors() -> str:
    rows = _result("stage_errors")["rows"]
    quantities = [(stage, quantity) for stage, found in rows[0]["errors"].items() for quantity in found]
    cells = [[f"{stage}: {quantity}", *(_error(row["errors"][stage], quantity) for row in rows)] for stage, quantity in quantities]
    return _table(["", *(row["name"] for row in rows)], cells)


def _error(found: dict[str, float], quantity: str) -> str:
    value = found[quantity]
    return f"{value:.0%}" if "identical" in quantity else f"{value:.1e}"


def _scores(found: dict[str, Any]) -> list[str]:
    numbers = (f"{found[key]:.4f}" for key in ("mean_iou", "min_iou", "dice", "cldice"))
    return [f"{found['identical_answers']} of {found['answers']}", *numbers, f"{found['hd95']:.2f}"]


def _sa2va() -> str:
    head = ("", "runs", "identical answers", "masks", "differing pixels, all masks", "minimum IoU", "max difference of logits")
    rows = []
    for name, model in _SA2VA.items():
        result = _result(name)
        shown = {"images": "images", "cine": f"cine of {result['cine_frames']} frames"}
        for run in result["runs"]:
            case = f"{model}, {shown[run['case']]}" + (f", {' and '.join(run['rounded'])} in BF16" if run["rounded"] else "")
            differing = f"{run['differing_pixels']:,} of {run['pixels']:,}"
            figures = (run["runs"], run["identical_answers"], run["masks"], differing, run["min_iou"], f"{run['max_logit_difference']:.2g}")
            rows.append((case, *figures))
    return _table(head, rows)


_TABLES: dict[str, Callable[[], str]] = {
    "sa2va": _sa2va,
    "contenders": _contenders,
    "ratios": _ratios,
    "stages": _stages,
    "batches": _batches,
    "verified": _verified,
    "memory": _memory,
    "scaling": _scaling,
    "flat": _flat,
    "infer": _infer,
    "host-memory": _host_memory,
    "peers": _peers,
    "peer-ratios": _peer_ratios,
    "peer-floor": _peer_floor,
    "peer-profile": _peer_profile,
    "peer-frame": _peer_frame,
    "resume": _resume,
    "accuracy": _accuracy,
    "floor": _floor,
    "cine-floor": _cine_floor,
    "cines": _cine_ways,
    "cine-steps": _cine_steps,
    "projection": _projection,
    "utilisation": _utilisation,
    "export": _export,
    "export-peer": _export_peer,
    "build": functools.partial(_build, "build-sm86-28-layers"),
    "build-int8": functools.partial(_build, "build-sm86-int8-28-layers"),
    "quantization-tiny": functools.partial(_quantization, "examples/tiny"),
    "quantization-angiograms": functools.partial(_quantization, "angiograms"),
    "quantization-stages": _quantized_stages,
    "quantization-activations": _quantized_activations,
    "quantization-matrices": _quantized_matrices,
    "stage-errors": _stage_errors,
}


def _draw() -> None:
    """Write the plots. The same results give the same files."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {"svg.hashsalt": "vessel-rt", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    _PLOTS.mkdir(exist_ok=True)
    for name, draw in (("roofline", _draw_roofline), ("latency", _draw_latency), ("scaling", _draw_scaling)):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.2), layout="constrained")
        draw(figure.subplots())
        figure.savefig(_PLOTS / f"{name}.svg", metadata={"Date": None})


def _draw_roofline(axes: Any) -> None:
    """The full-size runs against the data sheets' roofs."""
    found = _result("floor-28-layers")
    intensities = [10**x for x in (0, 1, 2, 3, 4, 5)]
    for (gpu, rates), colour in zip(((g, r) for g, r in found["rates"].items() if not r["measured"]), _COLOURS, strict=False):
        corner = rates["tflops"] * 1e12 / (rates["gb_per_s"] * 1e9)
        xs = sorted([*intensities, corner])
        axes.loglog(xs, [min(rates["tflops"], x * rates["gb_per_s"] / 1e3) for x in xs], color=colour, label=gpu)
    for run in (run for run in _RUNS if run != "draft"):  # it would cover prefill
        cost = found["stages"]["10"][run]
        axes.axvline(cost["flops"] / cost["bytes"], color=_GREY, linewidth=0.5)
        axes.text(cost["flops"] / cost["bytes"], 1.2, f" {run}", rotation=90, fontsize=7, color=_GREY, va="bottom")
    axes.set(xlabel="FLOP per byte (10 tiles, FP16)", ylabel="TFLOP/s", title="InternVL3-8B and SAM2 Hiera-L under the data sheets' roofs")
    axes.legend(fontsize=7, loc="lower right")


def _draw_latency(axes: Any) -> None:
    """The time of each step of one image, by number of tiles."""
    stages = _result("latency")["stages"]
    for row, values in enumerate(stages.values()):
        left = 0.0
        for step, colour in zip(_STEPS[:-1], _COLOURS, strict=True):
            axes.barh(row, values[step]["p50"], left=left, color=colour, label=step if row == 0 else None)
            left += values[step]["p50"]
    axes.set_yticks(range(len(stages)), [f"{tiles} tile{'s' * (tiles != '1')}" for tiles in stages])
    axes.set(xlabel="ms of one image, p50 (tiny model, CPU)", title="Latency by step")
    axes.legend(fontsize=7, ncols=2)


def _draw_scaling(axes: Any) -> None:
    """Time per image and memory by the size of the folder."""
    rows = sorted(_result("scaling")["by_size"], key=lambda row: int(row["images"]))
    sizes = [row["images"] for row in rows]
    axes.semilogx(sizes, [row["ms_per_image"] for row in rows], "o-", color=_COLOURS[0], label="ms per image")
    axes.semilogx(sizes, [row["peak_resident_mib"] for row in rows], "s-", color=_COLOURS[1], label="peak memory, MiB")
    axes.set(xlabel="images in the folder", ylim=(0, None), title="Time per image does not grow with the folder")
    axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main())
