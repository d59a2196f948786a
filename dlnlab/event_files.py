"""TensorBoard's files: written in order, cut back by a resume; and the summaries that its pages are made of."""

import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.custom_scalar.metadata import create_summary_metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from dlnlab.kernels.caching import cached_njit


class EventFile:
    """A TensorBoard event file that is written in order and can be cut back to an earlier length.

    Args:
        folder: Where it lies, made if need be: a run of TensorBoard's.
        length: Cut a file that is there back to so many bytes; None leaves it as it is.
    """

    def __init__(self, folder: Path, length: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "events.out.tfevents.0.dlnlab"
        if length is not None and self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(min(length, self.path.stat().st_size))
        if not self.path.exists() or self.path.stat().st_size == 0:
            self._append([Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()])

    def _append(self, events: list[bytes]) -> None:
        with open(self.path, "ab") as file:
            file.writelines(map(_record, events))

    def add(self, moments: Iterable[tuple[int, bytes]]) -> None:
        """Append one event for each (step, serialised summary)."""
        now = time.time()
        # The summary is put behind the rest as field 5; to build every event as a message would take most of the time.
        self._append([Event(wall_time=now, step=step).SerializeToString() + b"\x2a" + _varint(len(summary)) + summary
                      for step, summary in moments])  # fmt: skip

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size


def _record(content: bytes) -> bytes:
    """Length, its checksum, the content, its checksum: how TensorBoard frames an event."""
    length = struct.pack("<Q", len(content))
    return b"".join((length, _checksum(length), content, _checksum(content)))


def _varint(number: int) -> bytes:
    """A whole number as protocol buffers write it: seven bits a byte, the lowest first."""
    digits = [number >> shift & 0x7F for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])


def _checksum(content: bytes) -> bytes:
    crc = int(_crc32c(np.frombuffer(content, np.uint8), _TABLE)) & 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)  # masked, as the format asks


def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _crc_table()


@cached_njit()
def _crc32c(content, table):
    """Checksum of bytes (n,); TensorBoard's own is a loop in Python, most of the time that writing scalars would take."""
    crc = np.uint32(0xFFFFFFFF)
    for byte in content:
        crc = table[(crc ^ byte) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return ~crc


class _LateWriter(SummaryWriter):
    """Makes its file with the first thing that is written."""

    _made = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made = True

    def _get_file_writer(self) -> Any:
        return super()._get_file_writer() if self._made else None  # a constructor needs none yet


class RunLogger(TensorBoardLogger):
    """Lightning's logger for what a module logs itself; leaves no file where nothing is logged.

    Args:
        directory: The run directory.
        purge_step: Later steps of an earlier part of the run are not shown.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        parent = directory.parent
        super().__init__(parent.parent, parent.name, directory.name, default_hp_metric=False, purge_step=purge_step)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer, which Lightning asks for whether or not it will write."""
        if self._experiment is None:
            self._experiment = _LateWriter(self.log_dir, **self._kwargs)
        return self._experiment

    def save(self) -> None:
        """Write out what was logged; the hyperparameters stand in the run's config.yaml."""
        self.experiment.flush()


# Summaries ------------------------------------------------------------------------------------------------------------


def scalars(tags: list[str], numbers: np.ndarray) -> np.ndarray:
    """Scalars under their tags, float32.

    Args:
        tags: V of them.
        numbers: (..., V).

    Returns:
        Serialised summaries, bytes (..., L).
    """
    parts = []
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
        numbers = numbers.astype("<f4")
    for tag, column in zip(tags, np.moveaxis(numbers, -1, 0), strict=True):
        # Summaries one after the other are one summary, and a scalar's number is its last four bytes.
        start = Summary(value=[Summary.Value(tag=tag, simple_value=1)]).SerializeToString()[:-4]
        parts += [
            np.broadcast_to(np.frombuffer(start, np.uint8), (*column.shape, len(start))),
            np.ascontiguousarray(column)[..., None].view(np.uint8),
        ]
    return np.concatenate(parts, -1)


def images(pictures: dict[str, Path]) -> bytes:
    """PNG files under their tags."""
    return Summary(
        value=[
            Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=path.read_bytes()))
            for tag, path in pictures.items()
        ]
    ).SerializeToString()


def listings(contents: dict[str, str], language: str) -> bytes:
    """Texts under their tags, shown letter by letter."""
    summary = Summary()
    for tag, content in contents.items():
        summary.MergeFrom(text_pb(tag, f"```{language}\n{content}\n```"))
    return summary.SerializeToString()


def layout(tags: list[str], banded: bool) -> bytes:
    """One chart for each tag on the page of custom scalars, in categories by the first part of the tags.

    Args:
        tags: Tags of scalars.
        banded: Draw a band from `<tag>/p10` to `<tag>/p90` around those that are no counts of members.
    """
    page = layout_pb2.Layout()
    titles = dict.fromkeys(tag.split("/")[0] for tag in tags)
    categories = {title: page.category.add(title=title) for title in titles}
    for tag in reversed(tags):  # the page shows a category's charts last first
        title = tag.split("/")[0]
        chart = categories[title].chart.add(title=tag)
        if banded and title != "members":
            chart.margin.series.add(value=tag, lower=f"{tag}/p10", upper=f"{tag}/p90")
        else:
            chart.multiline.tag.append(f"^{tag}$")
    tensor = make_tensor_proto(page.SerializeToString())
    return Summary(
        value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, tensor=tensor, metadata=layout_metadata())]
    ).SerializeToString()


def experiment(axes: dict[str, list[Any]], metrics: list[str]) -> bytes:
    """The columns of the HParams page.

    Args:
        axes: The hyperparameters with all their values.
        metrics: Tags of scalars, whose last values are shown.
    """
    found = api_pb2.Experiment(time_created_secs=time.time())
    for name, values in axes.items():
        info = found.hparam_infos.add(name=name, differs=len(values) > 1)
        if any(isinstance(value, str) for value in values):
            info.type = api_pb2.DATA_TYPE_STRING
            info.domain_discrete.extend(map(str, values))
        else:
            info.type = api_pb2.DATA_TYPE_FLOAT64
            info.domain_interval.min_value, info.domain_interval.max_value = min(values), max(values)
    for tag in metrics:
        found.metric_infos.add(name=api_pb2.MetricName(tag=tag))
    return _hparams(hparams_metadata.EXPERIMENT_TAG, experiment=found)


def session(values: dict[str, Any]) -> bytes:
    """A row of the HParams page: the hyperparameters of the run in whose file it stands, as numbers or texts."""
    found = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, str):
            found.hparams[name].string_value = value
        else:
            found.hparams[name].number_value = value
    return _hparams(hparams_metadata.SESSION_START_INFO_TAG, session_start_info=found)


def _hparams(tag: str, **content: Any) -> bytes:
    metadata = hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(
        value=[Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)]
    ).SerializeToString()
