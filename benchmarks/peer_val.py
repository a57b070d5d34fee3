"""One process in the peer's environment: val.py of yolov5 7.0.14 as published, figures as a line of JSON.

    .venv-peer/bin/python -m benchmarks.peer_val --weights peer.pt --data COPY/peer.yaml --imgsz 320 --threads 2

With `--from FILE` it writes `--weights` in place of that: our network as plain values and tensors, whose names are the
peer's, in a model of its own. `images_per_second` is of the evaluation: from its callback before the first batch, when
its loader processes already run, until it is done. `command_seconds` begin before torch is imported.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import json  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.peer_step import shut_sockets, stand_in_for_the_installer  # noqa: E402
from benchmarks.validation import figures, validation_flags  # noqa: E402


def main() -> None:
    parser = validation_flags(__doc__)
    parser.add_argument("--from", dest="source", default="", help="our weights as plain values")
    flags = parser.parse_args()
    stand_in_for_the_installer()
    shut_sockets()
    print(json.dumps(_convert(flags.source, flags.weights) if flags.source else _evaluated(flags)), flush=True)


def _convert(source: str, path: str) -> dict[str, Any]:
    import torch
    import yolov5  # noqa: F401  puts its modules where they find each other
    from yolov5.models.yolo import Model

    ours = torch.load(source, map_location="cpu", weights_only=True)
    model = Model(ours["network"], ch=3, nc=len(ours["names"]))
    model.load_state_dict(ours["state"], strict=True)
    model.names = dict(enumerate(ours["names"]))
    torch.save({"model": model.eval()}, path)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _evaluated(flags: Any) -> dict[str, Any]:
    import torch
    import yolov5  # noqa: F401
    from yolov5 import val
    from yolov5.utils.callbacks import Callbacks

    torch.set_num_threads(flags.threads)
    at: dict[str, float] = {}
    images = []
    callbacks = Callbacks()
    callbacks.register_action("on_val_start", callback=lambda *_: at.setdefault("start", time.perf_counter()))
    callbacks.register_action("on_val_image_end", callback=lambda *_: images.append(1))
    (_, _, ap50, ap, *_), _, _ = val.run(
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
    return figures(end - _START, end - at["start"], len(images), ap=float(ap), ap50=float(ap50))


if __name__ == "__main__":
    main()
