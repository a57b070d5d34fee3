"""What TensorBoard can show, as values of events: scalars, pictures, texts, histograms, curves, hyperparameters.

tensorboard is imported where it is used; torch is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams.api_pb2 import HParamInfo
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

_QUALITY = 90  # of JPEG
_BUCKETS = 40  # of a histogram
_EVERY = 3  # of the 1000 confidences of curves: 334 that lie as evenly


def scalar(tag: str, value: float) -> Summary.Value:
    return _value(tag, simple_value=value)


def picture(tag: str, pixels: np.ndarray) -> Summary.Value:
    """Pixels (H, W, 3) u8 RGB."""
    import cv2
    from tensorboard.compat.proto.summary_pb2 import Summary

    _, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    height, width, _ = pixels.shape
    shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.tobytes())
    return _value(tag, image=shown)


def histogram(tag: str, values: np.ndarray) -> Summary.Value:
    """Of the values that are finite numbers."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    values = values[np.isfinite(values)].ravel().astype(np.float64)  # buckets of close values need the digits
    counts, edges = np.histogram(values, _BUCKETS)
    told = HistogramProto(num=len(values), sum=values.sum(), sum_squares=np.square(values).sum())
    if len(values):
        told.min, told.max = values.min(), values.max()
    told.bucket_limit.extend(edges[1:])
    told.bucket.extend(counts)
    return _value(tag, histo=told)


def text(tag: str, markdown: str) -> Summary.Value:
    """Shown as it renders, tables included."""
    from tensorboard.plugins.text import metadata

    return _tensor_value(tag, metadata.create_summary_metadata(display_name=tag, description=""), [markdown.encode()])


# ---- curves ---------------------------------------------------------------------------------------------------------


def pr_curve(
    tag: str, *, precision: np.ndarray, recall: np.ndarray, hits: np.ndarray, claims: np.ndarray, labels: int
) -> Summary.Value:
    """Precision over recall at 1000 confidences, evenly from 0 to 1, and the counts that are shown beside them."""
    from tensorboard.plugins.pr_curve import metadata

    at = slice(None, None, _EVERY)
    nothing = np.zeros_like(hits)  # that is no object and was not found: boxes have no count of that
    rows = np.stack([hits, claims - hits, nothing, labels - hits, np.nan_to_num(precision), recall])[:, at]
    about = metadata.create_summary_metadata(display_name=tag, description="", num_thresholds=rows.shape[1])
    return _tensor_value(tag, about, rows.astype(np.float32))


def charts(layout: Mapping[str, Mapping[str, Sequence[str]]]) -> Summary.Value:
    """The tab Custom Scalars: sections of charts by title, each of the scalars of these tags."""
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    sections = [
        layout_pb2.Category(
            title=section,
            chart=[
                layout_pb2.Chart(
                    title=title,
                    multiline=layout_pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}$" for tag in tags]),
                )
                for title, tags in charts.items()
            ],
        )
        for section, charts in layout.items()
    ]
    content = layout_pb2.Layout(category=sections).SerializeToString()
    return _tensor_value(metadata.CONFIG_SUMMARY_TAG, metadata.create_summary_metadata(), [content])


# ---- hyperparameters ------------------------------------------------------------------------------------------------


def experiment(hparams: Sequence[HParamInfo], metrics: Sequence[str]) -> Summary.Value:
    """The columns of the tab HParams; metrics are tags of scalars."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    infos = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
    columns = api_pb2.Experiment(hparam_infos=hparams, metric_infos=infos)
    return _hparams_value(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=columns))


def session_start(values: Mapping[str, float | bool | str], seconds: float) -> Summary.Value:
    """A row of the tab HParams."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    begun = plugin_data_pb2.SessionStartInfo(start_time_secs=seconds)
    for name, value in values.items():
        if isinstance(value, bool):
            begun.hparams[name].bool_value = value
        elif isinstance(value, str):
            begun.hparams[name].string_value = value
        else:
            begun.hparams[name].number_value = value
    data = plugin_data_pb2.HParamsPluginData(session_start_info=begun)
    return _hparams_value(metadata.SESSION_START_INFO_TAG, data)


def session_end(seconds: float, *, success: bool) -> Summary.Value:
    """The status of that row."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
    ended = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=seconds)
    return _hparams_value(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=ended))


def is_number(value: object) -> bool:
    """Whether it is one that a column can be sorted by."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _hparams_value(tag: str, data: HParamsPluginData) -> Summary.Value:
    from tensorboard.plugins.hparams import metadata

    return _value(tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)


# ---- messages -------------------------------------------------------------------------------------------------------


def _tensor_value(tag: str, about: SummaryMetadata, content: np.ndarray | list[bytes]) -> Summary.Value:
    """An array of float32, or texts."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

    if isinstance(content, list):
        return _value(tag, metadata=about, tensor=TensorProto(dtype=DT_STRING, string_val=content))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in content.shape])
    tensor = TensorProto(dtype=DT_FLOAT, tensor_shape=shape, tensor_content=content.astype("<f4").tobytes())
    return _value(tag, metadata=about, tensor=tensor)


def _value(tag: str, **content: Any) -> Summary.Value:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, **content)
