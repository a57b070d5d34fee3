"""One process: how fast a device multiplies matrices and moves memory, as a line of JSON.

By hand: `python -m benchmarks.rates --threads 2`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from utils.runtime import choose_runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small matrices, a moment each: only to see that it runs")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    runtime = choose_runtime(device=flags.device, amp="off", workers=0)
    if flags.quick:
        probe = _Probe(runtime.device, seconds=0.02, side=256, images=1, copy_mib=4)
    elif runtime.device.type == "cpu":
        probe = _Probe(runtime.device, seconds=1.0, side=2048, images=8, copy_mib=512)
    else:
        probe = _Probe(runtime.device, seconds=1.0, side=8192, images=64, copy_mib=2048)
    print(json.dumps(probe.rates() | {"device": runtime.description, "cuda": torch.cuda.is_available()}), flush=True)


@dataclass(frozen=True)
class _Probe:
    """What is measured, and for how long each."""

    device: torch.device
    seconds: float
    side: int  # of square matrices
    images: int  # in the convolution's batch
    copy_mib: int

    @torch.no_grad()
    def rates(self) -> dict[str, Any]:
        """fp32 is as torch comes: on CUDA without TF32."""
        precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if self.device.type != "cpu":
            precisions["fp16"] = torch.float16
        return {
            "gflop_per_second": {
                name: {"matrices": self.matrices(dtype), "convolution": self.convolution(dtype)}
                for name, dtype in precisions.items()
            },
            "copy_gb_per_second": self.copy(),
            "threads": torch.get_num_threads(),
        }

    def matrices(self, dtype: torch.dtype) -> float:
        left, right = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        return 2e-9 * self.side**3 / self._best_seconds(lambda: torch.mm(left, right, out=out))

    def convolution(self, dtype: torch.dtype) -> float:
        """Of 3 x 3 and 256 channels, channels last, as in the middle of a network."""
        layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False)
        layer = layer.to(self.device, dtype, memory_format=torch.channels_last)
        maps = torch.randn(self.images, 256, 40, 40, device=self.device)
        maps = maps.to(dtype, memory_format=torch.channels_last)
        return 2e-9 * self.images * 40**2 * layer.weight.numel() / self._best_seconds(lambda: layer(maps))

    def copy(self) -> float:
        """1e9 bytes read and written per second."""
        source = torch.ones(self.copy_mib * 2**20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2e-9 * source.numel() / self._best_seconds(lambda: target.copy_(source))

    def _best_seconds(self, work: Callable[[], object]) -> float:
        """The least time of one call, of ten or of as many as `seconds` hold."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        work()
        wait()
        times, end = [], time.perf_counter() + self.seconds
        while len(times) < 10 or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - start)
        return min(times)


if __name__ == "__main__":
    main()
