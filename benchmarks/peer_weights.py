"""One process in the peer's environment: weights that yolov5 7.0.14 makes, and what it detects with them.

    .venv-peer/bin/python -m benchmarks.peer_weights --train COPY/peer.yaml --imgsz 128 --out FOLDER
    .venv-peer/bin/python -m benchmarks.peer_weights --build NETWORK.yaml --seed 0 --weights made.pt
    .venv-peer/bin/python -m benchmarks.peer_weights --weights best.pt --images images.pt --out found.pt

`--train` is its train.py for two epochs of yolov5n; `--build` writes an untrained network with batch norms that do
something, as a file of weights in fp16; the last line writes its raw predictions on a tensor of images, and what its
NMS leaves of them, in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

from benchmarks.peer_step import shut_sockets, stand_in_for_the_installer
from benchmarks.peer_val import put_its_modules_first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", metavar="DATA", default="")
    parser.add_argument("--build", metavar="YAML", default="")
    parser.add_argument("--weights", metavar="PT", default="")
    parser.add_argument("--images", metavar="PT", default="")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--unfused", action="store_true", help="batch norms apart, as the file has them")
    parser.add_argument("--out", metavar="PATH", default="")
    flags = parser.parse_args()
    stand_in_for_the_installer()
    shut_sockets()
    put_its_modules_first()
    from yolov5.utils import downloads

    # It would ask a hub on the internet whether it knows a repository by the name of our file
    downloads.attempt_download_from_hub = lambda *_, **__: None
    downloads.attempt_download = lambda path, *_, **__: path
    task = _train if flags.train else _build if flags.build else _found
    print(json.dumps(task(flags)), flush=True)


def _train(flags: argparse.Namespace) -> dict[str, Any]:
    uploads = types.ModuleType("yolov5.utils.roboflow")  # wants a client of a service that we do not use
    uploads.RoboflowConnector = None
    sys.modules[uploads.__name__] = uploads
    from yolov5 import train

    train.run(
        data=flags.train,
        weights=flags.weights,
        cfg="yolov5n.yaml",
        epochs=flags.epochs,
        batch_size=16,
        imgsz=flags.imgsz,
        workers=0,
        device="cpu",
        noplots=True,
        save_period=1,
        project=flags.out,
        name="run",
        exist_ok=True,
    )
    return {"weights": sorted(str(path) for path in Path(flags.out).rglob("*.pt"))}


def _build(flags: argparse.Namespace) -> dict[str, Any]:
    import torch

    from models.yolo import Model

    torch.manual_seed(0)
    model = Model(flags.build, ch=3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.8, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.data.uniform_(low, high)
    for conv in model.model[-1].m:
        conv.bias.data.uniform_(-3, 0)  # so that there is something to find
    model.names = [f"class {number}" for number in range(model.yaml["nc"])]  # a list, as files of v5 have it
    torch.save({"epoch": -1, "model": model.half(), "ema": None, "optimizer": None}, flags.weights)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _found(flags: argparse.Namespace) -> dict[str, Any]:
    import torch
    from models.experimental import attempt_load
    from utils.general import non_max_suppression

    images = torch.load(flags.images, weights_only=True)
    model = attempt_load(flags.weights, device=torch.device("cpu"), fuse=not flags.unfused)
    with torch.no_grad():
        raw = model(images)[0]  # (B, P, 5 + C): centre, size, objectness, classes
    found = non_max_suppression(raw.clone(), conf_thres=0.25, iou_thres=0.45, multi_label=True, max_det=1000)
    torch.save({"raw": raw, "found": found, "names": dict(model.names)}, flags.out)
    return {"images": len(images), "rows": raw.shape[1], "found": sum(map(len, found)), "torch": torch.__version__}


if __name__ == "__main__":
    main()
