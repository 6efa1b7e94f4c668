"""Peak rates of GPUs by their data sheets, and the least time of a run there. Does not know what runs.

Operations are those of FP16 (the same as BF16) tensor cores without sparsity, with FP32 sums: half the rate of FP16 sums on a GeForce.
"""

from __future__ import annotations

import dataclasses

from vessel_rt.formats.stage_cost import Cost

__all__ = ["DATA_SHEETS", "Rates", "known_rates"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """A machine's peak rates: floating-point operations per second, and bytes per second (reads and writes together)."""

    flops: float
    bytes: float

    def floor_ms(self, cost: Cost, *, of_flops: float = 1, of_bytes: float = 1) -> float:
        """The minimum milliseconds for `cost`, at these shares of the two rates."""
        return 1e3 * max(cost.flops / (of_flops * self.flops), cost.bytes / (of_bytes * self.bytes))

    def used(self, cost: Cost, ms: float) -> tuple[float, float]:
        """The shares of the two rates that a run of `ms` milliseconds reaches: MFU and MBU."""
        return cost.flops / (ms / 1e3) / self.flops, cost.bytes / (ms / 1e3) / self.bytes


DATA_SHEETS = {
    # appendix A: https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    "RTX 3090": Rates(71e12, 936e9),
    # appendix A: https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf
    "RTX 4090": Rates(165.2e12, 1008e9),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf
    "A100 SXM 80GB": Rates(312e12, 2039e9),
    # https://www.nvidia.com/en-us/data-center/h100/ gives 1979 with sparsity, which doubles it
    "H100 SXM": Rates(1979e12 / 2, 3.35e12),
}

_NAMES = {  # CUDA's names of these cards
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
}


def known_rates(name: str) -> Rates | None:
    """The rates of the GPU that CUDA calls `name`; None if they are not in DATA_SHEETS."""
    return DATA_SHEETS[_NAMES[name]] if name in _NAMES else None
