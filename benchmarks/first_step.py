"""`train.py` with its flags, but it says when the first optimizer step is done, and stops there as at Ctrl-C."""

from __future__ import annotations

import sys

import train

SIGN = "benchmarks: first optimizer step"


def main() -> int:
    from torch.optim.optimizer import register_optimizer_step_post_hook  # `start` reads SIGN and needs no torch

    register_optimizer_step_post_hook(_say_and_stop)
    return train.main()


def _say_and_stop(*_: object) -> None:
    print(f"\n{SIGN}", flush=True)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
