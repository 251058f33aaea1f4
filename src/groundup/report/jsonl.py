"""Files of one JSON object a line, which grow while a run goes on and stay readable whatever stops it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from groundup.runtime import os_errors, warn, write_atomic

Row = dict[str, Any]


def encode_row(row: Row) -> bytes:
    """One line of JSON.

    JSON knows no NaN and no infinity: such a value becomes null, and its key is listed under ``nonfinite``.
    NumPy and torch scalars are taken as the Python numbers they hold.
    """
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    nonfinite = [key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    if nonfinite:
        plain |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
    # backslashreplace: half a character (a lone surrogate) is written as the JSON escape of itself.
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _decode_row(line: bytes) -> Row | None:
    """The row of a line; None where it is not a whole JSON object."""
    try:
        row = json.loads(line)
    except (UnicodeDecodeError, ValueError):
        return None
    return row if isinstance(row, dict) else None


class JsonlWriter:
    """Appends rows to a file; each is on its way to the disk, whole, when ``write`` returns.

    A last line that an earlier crash cut short is removed first, so that the next row starts a line of its
    own. Use it as a context manager, or ``close`` it.

    Raises:
        GroundupError: the file cannot be written. The rows already in it stay whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with os_errors(self.path, "cannot write"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _mend_last_line(self.path)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (kept open over many writes)

    def write(self, row: Row) -> None:
        """Append one row."""
        line = encode_row(row)
        with os_errors(self.path, "cannot write"):
            whole = os.fstat(self._file.fileno()).st_size
            try:
                rest = memoryview(line)
                while rest:  # a nearly full disk takes a part of the line first, and then refuses
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(whole)
                raise

    def close(self) -> None:
        """Close the file. Closing twice does no harm."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _mend_last_line(path: Path) -> None:
    """End the last line with a line break where it is whole but for that, and remove it where it is cut."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return
        start = content.rfind(b"\n") + 1
        if _decode_row(content[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def read_jsonl(path: str | os.PathLike[str], what: str = "file") -> list[Row]:
    """The rows of a file.

    A last line cut short by a crash is left out in silence: it was never finished. Other lines that are not
    JSON objects are left out with a warning.

    Args:
        what: what the file is to a person, for the messages.

    Raises:
        GroundupError: the file is missing or cannot be read.
    """
    path = Path(path)
    with os_errors(path, f"cannot read {what}"):
        lines = path.read_bytes().split(b"\n")
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        row = _decode_row(line) if line.strip() else None
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        warn(f"{path}: {len(damaged)} damaged line{'s' * (len(damaged) > 1)} left out of this {what} ({shown}).")
    return rows


def truncate_jsonl(path: str | os.PathLike[str], step: int, what: str = "file") -> None:
    """Drop, atomically, the rows that were written after ``step``: a run resumed there writes them again.

    Rows without a ``step`` are kept. A file that does not exist is left so.

    Raises:
        GroundupError: the file cannot be read or written; it is then as it was.
    """
    path = Path(path)
    if not path.exists():
        return
    rows = read_jsonl(path, what)
    kept = [row for row in rows if not isinstance(row.get("step"), int | float) or row["step"] <= step]
    if len(kept) < len(rows):
        write_atomic(path, b"".join(map(encode_row, kept)))
