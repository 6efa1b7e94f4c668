"""`vessel-rt devices` and `plan`: where a bundle can run, and how much memory it takes there. Neither runs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vessel_rt.cli.arguments import MAX_BATCH, add_json, add_propagate, find_bundle, gibibytes, up_to
from vessel_rt.errors import VesselError

__all__ = ["add_devices_commands"]


def add_devices_commands(commands: Any) -> None:
    devices = commands.add_parser("devices", help="list every kind of device: usable here, or what is missing")
    devices.add_argument("--bundle", type=Path, metavar="DIR", help="also check whether this bundle runs there: its engines, for rtx")
    add_json(devices)
    devices.set_defaults(run=_devices, only_prints=True)

    plan = commands.add_parser("plan", help="estimate the memory that a bundle takes; fails if it does not fit, and says what to lower")
    plan.add_argument("--bundle", type=Path, metavar="DIR", help="what to plan for (default: as for infer)")
    plan.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="the memory of a GPU, or of this machine for runs on its CPU")
    plan.add_argument("--streams", type=up_to(MAX_BATCH), metavar="N", help="on a CPU: images at the same time (default: 1)")
    plan.add_argument("--recipe", metavar="NAME|TOML", help="plan for the engines.max_batch and engines.memory_gib of this recipe")
    plan.add_argument("--batch", type=up_to(MAX_BATCH), metavar="N", help="images at once (default: the recipe's, else 1)")
    add_propagate(plan, "also plan to track objects through cines, as infer does (on a GPU: for either way)")
    plan.add_argument(
        "--memory",
        type=gibibytes,
        metavar="GIB",
        help="the memory there is (default: the recipe's, else that of the GPU here; on a CPU: what is free here)",
    )
    add_json(plan)
    plan.set_defaults(run=_plan, only_prints=True, usage_error=plan.error)


def _devices(arguments: argparse.Namespace) -> int:
    from vessel_rt.device.device_report import devices_json, devices_table, list_devices
    from vessel_rt.formats.bundle import Bundle

    bundle = Bundle.load(arguments.bundle) if arguments.bundle else None
    reports = list_devices(bundle)
    if bundle and not arguments.json:
        print(f"{bundle.folder}: {bundle.precision}, with {bundle.weights} weights")
    print(devices_json(reports) if arguments.json else devices_table(reports))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from vessel_rt.device.cuda_driver import list_gpus
    from vessel_rt.device.host_memory import make_host_plan, require_host_fit
    from vessel_rt.device.memory_plan import make_plan, require_fit
    from vessel_rt.formats.profiles import workload_of
    from vessel_rt.formats.recipe import load_recipe

    for name in ("recipe", "batch") if arguments.device == "cpu" else ("streams",):
        if getattr(arguments, name):
            arguments.usage_error(f"--{name} is not for --device {arguments.device}")
    if arguments.streams and arguments.propagate:
        arguments.usage_error("--streams is not for --propagate: one frame of a cine is tracked at a time")
    bundle, recipe = find_bundle(arguments.bundle), load_recipe(arguments.recipe) if arguments.recipe else None
    if arguments.device == "cpu":
        plan = make_host_plan(bundle, arguments.streams or 1, memory=arguments.memory, propagate=arguments.propagate)
        print(plan.to_json() if arguments.json else plan.table())
        require_host_fit(bundle, plan)
        return 0
    batch = workload_of(bundle, recipe).max_batch if recipe else 1
    memory = arguments.memory or (int(recipe.engines.memory_gib * 2**30) if recipe and recipe.engines else None)
    if memory is None:
        try:
            memory = list_gpus()[0].memory
        except VesselError as e:
            raise VesselError(f"for which card? give --memory or --recipe ({e})") from e
    plan = make_plan(bundle, arguments.batch or batch, memory, cines=bool(arguments.propagate))
    print(plan.to_json() if arguments.json else plan.table())
    require_fit(bundle, plan)
    return 0
