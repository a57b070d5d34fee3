"""One process in the peer's environment: CPU time that yolov5 7.0.14 takes to make a training sample.

    .venv-peer/bin/python -m benchmarks.peer_loading --data COPY/bccd.yaml --imgsz 640 --cache ram

Its LoadImagesAndLabels as published, a mosaic and the default augmentation for each sample, on one core, without the
collating that follows. The surprise: it writes a cache beside the labels, so it wants a copy of the data set.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import torch

from benchmarks.measuring import AUGMENTATION, cpu_milliseconds, loading_flags
from benchmarks.peer_step import shut_sockets, stand_in_for_the_installer


def main() -> None:
    flags = loading_flags(__doc__).parse_args()
    stand_in_for_the_installer()
    shut_sockets()
    torch.set_num_threads(1)
    import yolov5  # only now, when the stand-in is there
    from yolov5.utils.dataloaders import LoadImagesAndLabels

    cv2.setNumThreads(0)  # as its own loader processes do
    data = LoadImagesAndLabels(
        str(Path(flags.data).parent / "images" / "train"),
        flags.imgsz,
        16,
        augment=True,
        hyp=AUGMENTATION,
        cache_images="ram" if flags.cache == "ram" else False,
    )
    figures = cpu_milliseconds(lambda number: data[number % len(data)], flags.samples)
    print(json.dumps({**figures, "yolov5": yolov5.__version__, "opencv": cv2.__version__}), flush=True)


if __name__ == "__main__":
    main()
