"""Types that the files with measurements share: the machine, and the bundle that was measured. Does not know how they are found."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from vessel_rt.formats.schema import Items, Table, Text

__all__ = ["BundleFacts", "Bytes", "Count", "MachineFacts", "MachineGpu", "Measured"]

Bytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31)]
Measured = Annotated[float, Meta(ge=0, le=1e15)]


class MachineGpu(Struct, frozen=True):
    """A GPU of the machine.

    Attributes:
        name: the name.
        architecture: the compute capability, as in `sm86`.
        memory_bytes: the total memory.
    """

    name: Text
    architecture: Text
    memory_bytes: Bytes


class MachineFacts(Struct, frozen=True):
    """The machine.

    Attributes:
        system: the operating system and the processor's architecture.
        cpu: the processor's name; null if the system does not tell.
        cores: the cores that the process may use.
        features: instruction sets that speed up matrix products.
        memory_bytes: the host's memory; null if the system does not tell.
        gpus: NVIDIA's GPUs, in CUDA's order.
        driver: the version of NVIDIA's driver; null if there is none, or nvidia-ml-py is not installed.
        versions: the versions of vessel-rt, Python, ONNX Runtime and its libraries.
    """

    system: Text
    cpu: Text | None
    cores: Count
    features: Items[Text]
    memory_bytes: Bytes | None
    gpus: Items[MachineGpu]
    driver: Text | None
    versions: Table[Text, Text]


class BundleFacts(Struct, frozen=True):
    """A bundle that was measured.

    Attributes:
        sha256: the hash of bundle.json, which has the hashes of all other files.
        precision: `fp32`, `fp16` or `bf16`.
        weights: the type of the matrices.
        checkpoint: the file name of the checkpoint.
        layers: the number of the language model's layers.
    """

    sha256: Text
    precision: Text
    weights: Text
    checkpoint: Text
    layers: Count
