"""A run's measurements as TensorBoard shows them: ``tensorboard --logdir RUN/tensorboard``.

Written with tensorboardX's records and messages, which need protobuf and little else; TensorBoard itself is only needed
to look at them. tensorboardX's own writer is not used: it hands events to a thread through a queue of limited length,
and when that thread dies of a full disk, whoever logs next waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groundup.report.jsonl import Row
from groundup.report.metrics import is_number
from groundup.report.samples import sample_section
from groundup.report.tracking import numbers
from groundup.runtime import os_errors

VERSION = "brain.Event:2"  # from this version on TensorBoard heeds the marks of a session's start


class TensorBoard:
    """Event files in ``folder``, one for each sitting of the run; every row is in its file when ``log`` returns.

    Args:
        folder: where they lie; other sittings' files stay.
        config: the resolved recipe, shown under Text.
        step: where the run resumes: events of earlier sittings after it are marked as void.

    Raises:
        GroundupError: the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from tensorboardX.record_writer import RecordWriter

        with os_errors(folder, "cannot write"):
            folder.mkdir(parents=True, exist_ok=True)
            resumed = any(folder.glob("*.tfevents.*"))
            # TensorBoard reads the files in the order of their names. It is usual to put the host's name there; a run
            # folder may be handed on, so the second of the clock has to do, and a number where two share it.
            started, number = int(time.time()), 0
            while (path := folder / f"events.out.tfevents.{started:010d}.{number:03d}").exists():
                number += 1
            self._file = RecordWriter(str(path))
        self._step = step
        self._add(file_version=VERSION)
        if resumed:
            self.rewind(step)
        self._add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in config.items()), step)

    def log(self, row: Row) -> None:
        """The numbers of a row as points of the curves ``kind/key``."""
        from tensorboardX.proto.summary_pb2 import Summary

        step = row.get("step")
        self._step = int(step) if is_number(step) else self._step
        kind = row.get("kind", "train")
        points = [Summary.Value(tag=f"{kind}/{key}", simple_value=value) for key, value in numbers(row).items()]
        self._add(step=self._step, summary=Summary(value=points))

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """The samples of a step as one text."""
        self._add_text("samples", "\n".join(map(sample_section, rows)), step)

    def rewind(self, step: int) -> None:
        """Mark what stands after ``step``, in this file and in those before it, as void."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        """Close the file. Closing twice does no harm."""
        self._file.close()

    def _add_text(self, tag: str, text: str, step: int) -> None:
        from tensorboardX.summary import text as text_summary

        self._add(step=step, summary=text_summary(tag, text.encode("utf-8", "replace").decode()))

    def _add(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()
