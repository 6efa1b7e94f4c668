"""The kinds of input that are damaged, and what each is put through. Each raises Unacceptable where a command did what it may not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from tests.fuzz import annotations, checkpoints, dicom, images
from tests.fuzz.damage import damaged
from tests.fuzz.mutations import damaged_lines, damaged_text
from tests.support.frames import make_frame
from tests.support.paths import ROOT
from tests.support.standin import build_standin

__all__ = ["KINDS", "Unacceptable"]

TINY = ROOT / "examples" / "tiny"

Case: TypeAlias = Callable[[random.Random, Path], str]


class Unacceptable(Exception):
    """A command that neither did its work nor refused it."""


def _vessel_rt(*arguments: str | Path) -> int:
    from vessel_rt.cli import main

    return _code(main, arguments)


def _vessel_export(*arguments: str | Path) -> int:
    from vessel_export.cli import main

    return _code(main, arguments)


def _code(main: Callable[[list[str]], int], arguments: tuple[str | Path, ...]) -> int:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    if code not in (0, 1):
        raise Unacceptable(f"{arguments[0]}: exit code {code}")
    return code


def _verdict(code: int) -> str:
    return "refused" if code else "done"


class _Run:
    """A bundle whose answer is known, two good frames, and what a run makes of them."""

    def __init__(self, prepared: Path, *names: str) -> None:
        self.bundle, self.frames, self.output = prepared / "bundle", prepared / "frames", prepared / "out"
        build_standin(self.bundle)
        for seed, name in enumerate(names or ("good_a.png", "good_b.png")):
            (self.frames / name).parent.mkdir(parents=True, exist_ok=True)
            make_frame(seed=seed).save(self.frames / name)
        if self.infer(self.frames, self.output):
            raise Unacceptable("the undamaged run failed")
        self.masks = self.masks_in(self.output)

    def infer(self, inputs: Path, output: Path, *more: str | Path) -> int:
        return _vessel_rt("infer", inputs, "--bundle", self.bundle, "-o", output, "--threads", "1", "-q", *more)

    @staticmethod
    def masks_in(output: Path) -> Mapping[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((output / "masks").glob("good_*.png"))}

    def check(self, output: Path) -> None:
        """The good frames' masks are those of the undamaged run."""
        if self.masks_in(output) != self.masks:
            raise Unacceptable("the masks of good frames are not what they were")


def _pictures(mutate: Callable[[random.Random], tuple[str, bytes]], at_once: int) -> Callable[[Path], Case]:
    """Damaged images among good ones: each has its line in results.jsonl, and the good ones their masks."""

    def prepare(prepared: Path) -> Case:
        run = _Run(prepared)

        def case(rng: random.Random, folder: Path) -> str:
            inputs, output = folder / "frames", folder / "out"
            shutil.copytree(run.frames, inputs)
            names = []
            for number in range(at_once):
                name, content = mutate(rng)
                names.append(f"{number}_{name}")
                (inputs / names[-1]).write_bytes(content)
            options = rng.choice(([], ["--rescale"], ["--frames", "0:3"], ["--rescale", "--frames", ":2"]))
            code = run.infer(inputs, output, *options)
            lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
            told = {line["image"] for line in lines}
            if missing := {name for name in names if "." in name} - told:  # one without a suffix is only counted, unless it is DICOM
                raise Unacceptable(f"no line for {missing}")
            if code == 0 and not all(line["status"] == "ok" for line in lines):
                raise Unacceptable(f"exit code {code} whatever the lines say")
            run.check(output)
            return _verdict(code)

        return case

    return prepare


def _bundles(prepared: Path) -> Case:
    """One file of a bundle is damaged: only bundle.json may be another than its hash says."""
    run = _Run(prepared)

    def case(rng: random.Random, folder: Path) -> str:
        bundle = folder / "bundle"
        shutil.copytree(run.bundle, bundle)
        name = rng.choice(["bundle.json"] * 4 + [str(path.relative_to(bundle)) for path in sorted(bundle.rglob("*")) if path.is_file()])
        before = (bundle / name).read_bytes()
        content = damaged_text(rng, json.loads(before)) if name == "bundle.json" and rng.random() < 0.8 else damaged(rng, before)
        changed = before != content
        (bundle / name).write_bytes(content)
        code = _vessel_rt("infer", run.frames, "--bundle", bundle, "-o", folder / "out", "--threads", "1", "-q")
        _vessel_rt("plan", "--bundle", bundle, "--memory", "24")
        if code == 0 and changed and name != "bundle.json":
            raise Unacceptable(f"{name} was changed, and was used")
        return _verdict(code)

    return case


def _results(prepared: Path) -> Case:
    """An output folder that was edited by hand: what is right is kept or made again, and a mask that somebody changed is not lost."""
    run = _Run(prepared)

    def case(rng: random.Random, folder: Path) -> str:
        output = folder / "out"
        shutil.copytree(run.output, output)
        if rng.random() < 0.3:  # as a run leaves them that was killed
            _as_a_journal(output)
        names = sorted(path.name for path in output.iterdir() if path.suffix in (".json", ".jsonl"))
        for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2)))):
            before = (output / name).read_bytes()
            (output / name).write_bytes(damaged_lines(rng, before) if name.endswith("l") else damaged_text(rng, json.loads(before)))
        mask = output / "masks" / "good_a.png"
        edited, in_work = mask.read_bytes() + b"edited", _was_in_work(output, "good_a")
        mask.write_bytes(edited)
        command = rng.choice(("infer", "infer --overwrite", "evaluate", "report", "merge-shards"))
        if command.startswith("infer"):
            code = run.infer(run.frames, output, *command.split()[1:])
            if code == 0:
                run.check(output)
        elif command == "evaluate":
            code = _vessel_rt("evaluate", output, "--gt", run.output / "masks")
        elif command == "report":
            code = _vessel_rt("report", output)
        else:
            code = _vessel_rt("merge-shards", output, "-o", folder / "merged")
        if not in_work and edited not in [path.read_bytes() for path in output.rglob("good_a*")]:
            raise Unacceptable(f"{command}: a mask that was changed by hand is gone")
        return _verdict(code)

    return case


def _as_a_journal(output: Path) -> None:
    """Make of a finished run's results the journal of one that was cut short."""
    lines, timings = (
        [json.loads(text) for text in (output / name).read_text().splitlines()] for name in ("results.jsonl", "timings.jsonl")
    )
    entries = [{"name": line["name"], "lines": [line], "timings": [timing]} for line, timing in zip(lines, timings, strict=True)]
    planned = {"planned": [line["name"] for line in lines]}
    (output / "journal.jsonl").write_text("".join(json.dumps(value) + "\n" for value in (planned, *entries)))
    for name in ("results.jsonl", "timings.jsonl", "run.json", "report.html"):
        (output / name).unlink()


def _was_in_work(output: Path, name: str) -> bool:
    """Whether the journal has a frame planned and no whole entry of it: its files go, since nobody knows whether they are whole."""
    if not (output / "journal.jsonl").exists():
        return False
    _, *entries = (output / "journal.jsonl").read_bytes().splitlines(keepends=True) or [b""]
    return not any(entry.startswith(f'{{"name": "{name}"'.encode()) and entry.endswith(b"\n") for entry in entries)


def _annotations(prepared: Path) -> Case:
    """Annotations that check-data and evaluate read alike."""
    run = _Run(prepared, *annotations.IMAGES)

    def case(rng: random.Random, folder: Path) -> str:
        path, output = folder / "annotations.json", folder / "out"
        shutil.copytree(run.output, output)
        path.write_bytes(annotations.mutate(rng))
        _vessel_rt("check-data", path, "--images", run.frames, "--fix", folder / "fixed.json")
        if (folder / "fixed.json").exists() and _vessel_rt("check-data", folder / "fixed.json", "--images", run.frames):
            raise Unacceptable("what --fix wrote is not sound")
        return _verdict(_vessel_rt("evaluate", output, "--gt", path))

    return case


def _recipes(prepared: Path) -> Case:
    texts = [path.read_bytes() for path in sorted((ROOT / "engines").glob("*.toml"))]

    def case(rng: random.Random, folder: Path) -> str:
        from vessel_rt.errors import VesselError
        from vessel_rt.formats.recipe import load_recipe

        path = folder / "recipe.toml"
        path.write_bytes(damaged(rng, rng.choice(texts)))
        try:
            load_recipe(path)
        except VesselError as e:
            return _refused(str(e))
        return "done"

    return case


def _refused(message: str) -> str:
    """The verdict of a call that was refused."""
    if "\n" in message.strip():
        raise Unacceptable(f"an error of several lines: {message}")
    return "refused"


def _checkpoints(prepared: Path) -> Case:
    """Crafted and damaged checkpoints: looked into, and exported as far as that goes."""

    def case(rng: random.Random, folder: Path) -> str:
        name, content = checkpoints.mutate(rng)
        (folder / name).write_bytes(content)
        _vessel_export("inspect", folder / name)
        original = ("--base", TINY / "base", "--sam2", TINY / "sam2_tiny.pt", "--recipe", ROOT / "engines" / "cpu.toml")
        return _verdict(_vessel_export("export", "--no-golden", "--ckpt", folder / name, *original, "--out", folder / "bundle"))

    return case


KINDS: Mapping[str, Callable[[Path], Case]] = {
    "annotations": _annotations,
    "bundles": _bundles,
    "checkpoints": _checkpoints,
    "dicom": _pictures(dicom.mutate, 3),
    "images": _pictures(images.mutate, 6),
    "recipes": _recipes,
    "results": _results,
}
