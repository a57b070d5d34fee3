"""One process in the peer's environment: the training step of yolov5 7.0.14 as published, figures as a line of JSON.

    .venv-peer/bin/python -m benchmarks.peer_step --cfg yolov5n.yaml --imgsz 320 --batch-size 16 --threads 2

Everything that computes is the package's own: network, loss, optimizer, moving average. The calls follow its train.py,
which on the CPU works in fp32 and switches deterministic algorithms on (`--relaxed` leaves them off, to see what they
cost it). The surprise: it imports a function of another large package that installs whatever it misses; a stand-in that
does nothing takes its place, and sockets are shut, so that nothing is fetched while we measure.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measuring import (
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    TOGETHER_ON_CUDA,
    SyntheticBatch,
    measure_steps,
    step_flags,
    synthetic_batches,
)

_MAX_GRADIENT_NORM = 10.0  # as in its train.py


def main() -> None:
    parser = step_flags(__doc__)
    parser.add_argument(
        "--relaxed", action="store_true", help="leave deterministic algorithms off, unlike its train.py"
    )
    flags = parser.parse_args()
    stand_in_for_the_installer()
    shut_sockets()
    torch.set_num_threads(flags.threads)
    print(json.dumps(_figures(flags)), flush=True)


def stand_in_for_the_installer() -> None:
    names = ("ultralytics", "ultralytics.utils", "ultralytics.utils.checks")
    modules = {name: types.ModuleType(name) for name in names}
    modules["ultralytics.utils.checks"].check_requirements = lambda *_, **__: None
    sys.modules.update(modules)


def shut_sockets() -> None:
    """All but those within this machine, through which loader processes hand over batches."""
    local, connect = getattr(socket, "AF_UNIX", None), socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != local:
            raise OSError("no network while we measure")
        connect(self, address)

    socket.socket.connect = refuse


def _figures(flags: argparse.Namespace) -> dict[str, Any]:
    import yolov5  # only now, when the stand-in is there

    cuda = flags.device != "cpu"
    step = _step(flags, torch.device("cuda:0" if cuda else "cpu"))
    figures = measure_steps(
        step,
        batch_size=flags.batch_size,
        warmup=flags.warmup,
        steps=flags.steps,
        synchronize=torch.cuda.synchronize if cuda else None,
        together=TOGETHER_ON_CUDA if cuda else 1,
    )
    total = step(0).item()
    if not torch.isfinite(torch.tensor(total)):
        raise RuntimeError(f"the loss is no longer a number ({total}): these steps are no training")
    return {
        **figures,
        "precision": "fp16" if cuda else "fp32",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "yolov5": yolov5.__version__,
        **({"cuda_peak_mib": torch.cuda.max_memory_allocated() / 2**20} if cuda else {}),
    }


def _step(flags: argparse.Namespace, device: torch.device) -> Callable[[int], torch.Tensor]:
    """Its step on a number of a batch, giving the loss; every batch is an update."""
    import yolov5
    from yolov5.models.yolo import Model
    from yolov5.utils.general import init_seeds
    from yolov5.utils.loss import ComputeLoss
    from yolov5.utils.torch_utils import ModelEMA, smart_optimizer

    init_seeds(0, deterministic=not flags.relaxed)
    package = Path(yolov5.__file__).parent
    hyp = yaml.safe_load((package / "data/hyps/hyp.scratch-low.yaml").read_text(encoding="utf-8"))
    model = Model(str(package / "models" / flags.cfg), ch=3, nc=NUM_CLASSES).to(device)
    optimizer = smart_optimizer(model, "SGD", LEARNING_RATE, MOMENTUM, hyp["weight_decay"])
    average = ModelEMA(model)
    levels = model.model[-1].nl
    scales = {"box": 3 / levels, "cls": NUM_CLASSES / 80 * 3 / levels, "obj": (flags.imgsz / 640) ** 2 * 3 / levels}
    model.hyp = hyp | {name: hyp[name] * scale for name, scale in scales.items()} | {"label_smoothing": 0.0}
    compute_loss = ComputeLoss(model)
    amp = device.type == "cuda"  # its check_amp says no on a CPU
    scaler = torch.amp.GradScaler("cuda", enabled=amp)
    batches = [_as_peer_takes_it(batch) for batch in synthetic_batches(flags.imgsz, flags.batch_size)]
    if amp:
        batches = [(images.pin_memory(), targets) for images, targets in batches]
    model.train()

    def step(number: int) -> torch.Tensor:
        images, targets = batches[number % len(batches)]
        with torch.autocast("cuda", enabled=amp):
            predictions = model(images.to(device, non_blocking=True).float() / 255)
            loss, _ = compute_loss(predictions, targets.to(device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=_MAX_GRADIENT_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(model)
        return loss.detach()

    return step


def _as_peer_takes_it(batch: SyntheticBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, H, W) u8 contiguous, and (T, 6) image, class, centre, width and height as fractions."""
    images = torch.from_numpy(batch.images).permute(0, 3, 1, 2).contiguous()
    corners = torch.from_numpy(batch.boxes) / images.shape[-1]  # synthetic images are square
    centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    image_of, classes = (torch.from_numpy(column)[:, None].float() for column in (batch.image_of, batch.classes))
    return images, torch.cat((image_of, classes, centre, size), 1)


if __name__ == "__main__":
    main()
