"""Documents on their way through preparation: in memory while they are few, else on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile

from groundup.data.document import Document
from groundup.data.prepared import document_line, document_of

IN_MEMORY = 64_000_000  # bytes


class Spool:
    """Takes documents, and gives them back in the same order as often as asked, one reader at a time.

    Args:
        folder: where the file lies, nameless, once :data:`IN_MEMORY` does not hold them: as large as the text, and gone
            with the process.
    """

    def __init__(self, folder: Path) -> None:
        self._file = SpooledTemporaryFile(IN_MEMORY, mode="w+b", dir=str(folder))  # noqa: SIM115  # closed by close()

    def add(self, document: Document) -> None:
        """Append one."""
        self._file.write(document_line(document))

    def __iter__(self) -> Iterator[Document]:
        """From the first on."""
        self._file.seek(0)
        for line in self._file:
            yield document_of(line)

    def close(self) -> None:
        """Forget them."""
        self._file.close()
