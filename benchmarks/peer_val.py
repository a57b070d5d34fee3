"""One process in the peer's environment: val.py of yolov5 7.0.14 as published, figures as a line of JSON.

    .venv-peer/bin/python -m benchmarks.peer_val --weights peer.pt --data COPY/peer.yaml --imgsz 320 --threads 2

With `--from FILE` it writes `--weights` in place of that: our network as plain values and tensors, whose names are the
peer's, in a model of its own. `images_per_second` is of the evaluation: from its callback before the first batch, when
its loader processes already run, until it is done. `command_seconds` begin before torch is imported.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import importlib.util  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.peer_step import shut_sockets, stand_in_for_the_installer  # noqa: E402
from benchmarks.validation import figures, validation_flags  # noqa: E402


def main() -> None:
    parser = validation_flags(__doc__)
    parser.add_argument("--from", dest="source", default="", help="our weights as plain values")
    flags = parser.parse_args()
    stand_in_for_the_installer()
    shut_sockets()
    put_its_modules_first()
    print(json.dumps(_convert(flags.source, flags.weights) if flags.source else _evaluated(flags)), flush=True)


def put_its_modules_first() -> None:
    """Weights files of the package name `models.yolo`, which is to be its own, though we start in our folder."""
    ours = Path(__file__).resolve().parent.parent
    package = Path(importlib.util.find_spec("yolov5").origin).parent
    sys.path[:] = [str(package), *(path for path in sys.path if Path(path).resolve() != ours)]


def _convert(source: str, path: str) -> dict[str, Any]:
    import torch

    from models.yolo import Model

    ours = torch.load(source, map_location="cpu", weights_only=True)
    model = Model(ours["network"], ch=3, nc=len(ours["names"]))
    model.load_state_dict(ours["state"], strict=True)
    model.nc, model.names = len(ours["names"]), dict(enumerate(ours["names"]))  # as its train.py leaves it
    torch.save({"model": model.eval()}, path)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _evaluated(flags: Any) -> dict[str, Any]:
    import torch
    from yolov5 import val
    from yolov5.models import common
    from yolov5.utils import downloads
    from yolov5.utils.callbacks import Callbacks

    # It would ask a hub on the internet whether it knows a repository by the name of our file
    common.attempt_download_from_hub = downloads.attempt_download_from_hub = lambda *_, **__: None
    torch.set_num_threads(flags.threads)
    at: dict[str, float] = {}
    images, found = [], []
    callbacks = Callbacks()
    callbacks.register_action("on_val_start", callback=lambda *_: at.setdefault("start", time.perf_counter()))
    callbacks.register_action("on_val_batch_end", callback=lambda _, batch, *__: images.append(len(batch)))
    callbacks.register_action("on_val_image_end", callback=lambda *_: found.append(1))
    (_, _, ap50, ap, *_), *_ = val.run(
        data=flags.data,
        weights=flags.weights,
        imgsz=flags.imgsz,
        batch_size=flags.batch_size,
        workers=flags.workers,
        device="cpu",
        half=False,
        plots=False,
        save_json=flags.save_json,
        project=flags.out,
        name="peer",
        exist_ok=True,
        callbacks=callbacks,
    )
    end = time.perf_counter()
    told = figures(end - _START, end - at["start"], sum(images), ap=float(ap), ap50=float(ap50))
    return told | {"images_with_detections": len(found)}  # its NMS stops when its time is over, and leaves images empty


if __name__ == "__main__":
    main()
