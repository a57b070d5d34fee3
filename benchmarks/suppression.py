"""What NMS costs beside the network, image by image, as lines of JSON: yolov5n with 80 classes, nothing trained.

    python -m benchmarks.suppression [--imgsz 640] [--images 8] [--threads N]

Once with the predictions of the fresh network, once with random logits, of which every anchor passes confidence 0.001,
and once with all boxes in one place, so that nothing survives to end the search. In ms, the least of some rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from models.yolo import DetectionModel, decode, read_network
from utils.evaluate.nms import NmsRules, non_max_suppression, prepare_nms
from utils.evaluate.predict import for_evaluation
from utils.machine import usable_cores
from utils.runtime import choose_runtime

_ROUNDS = 5
_Result = TypeVar("_Result")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--images", type=int, default=8, help="of a batch")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: as many as there are cores")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    runtime = choose_runtime(device="cpu", amp="off", workers=0)
    network = for_evaluation(DetectionModel(read_network("yolov5n.yaml")), runtime)
    prepare_nms(runtime.device)
    pixels = torch.randint(0, 256, (flags.images, flags.imgsz, flags.imgsz, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    network_s, fresh = _least_seconds(lambda: network(runtime.network_input(pixels)))
    random = [torch.randn_like(level) for level in fresh]
    together = decode(random, network.head)
    together[..., :4] = torch.tensor([100.0, 100.0, 200.0, 200.0])
    cases = {
        "fresh": decode(fresh, network.head),
        "every anchor passes": decode(random, network.head),
        "all in one place": together,
    }
    decode_s, _ = _least_seconds(lambda: decode(fresh, network.head))
    for case, predictions in cases.items():
        nms_s, suppressed = _least_seconds(lambda predictions=predictions: non_max_suppression(predictions, NmsRules()))
        seconds = {"network": network_s, "decoding": decode_s, "nms": nms_s}
        figures = {f"{part}_ms": round(1000 * spent / flags.images, 2) for part, spent in seconds.items()}
        print(json.dumps({"case": case, "imgsz": flags.imgsz, **figures, "images_cut": int(suppressed.cut.sum())}))


def _least_seconds(work: Callable[[], _Result]) -> tuple[float, _Result]:
    """Of some rounds, and the result."""
    least = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        result = work()
        least = min(least, time.perf_counter() - start)
    return least, result


if __name__ == "__main__":
    main()
