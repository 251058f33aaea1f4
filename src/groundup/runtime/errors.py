"""How a person's mistake is told: one line that says what, where, and how to mend it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GroundupError(Exception):
    """Something a person can mend. The command line prints the message as one line and exits with ``exit_code``."""

    exit_code = 1


class UsageError(GroundupError):
    """The command, flag or recipe itself is wrong: exit code 2."""

    exit_code = 2


def nearest(word: str, known: Iterable[str]) -> str:
    """A `` Did you mean …?`` suffix naming the known word nearest to ``word``, or an empty string.

    Dotted keys are compared whole and by their last part, so ``n_layers`` finds ``model.n_layer``.
    """
    from difflib import SequenceMatcher

    def likeness(name: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, name, word).ratio()
        leaf, word_leaf = name.rsplit(".", 1)[-1], word.rsplit(".", 1)[-1]
        return max(whole, SequenceMatcher(None, leaf, word_leaf).ratio() if word_leaf else 0.0), whole

    best = max(known, key=likeness, default="")
    return f" Did you mean {best}?" if best and likeness(best)[0] >= 0.6 else ""


_MENDS = {
    errno.ENOSPC: "no space left on the disk. Free some or choose another --out, then run the same command again",
    errno.EDQUOT: "the disk quota is used up. Free some or choose another --out, then run the same command again",
    errno.EACCES: "no permission. Choose a folder you may write to, or change the permissions",
    errno.EPERM: "not permitted. Choose a folder you may write to, or change the permissions",
    errno.EROFS: "the file system is read-only. Choose another folder",
    errno.ENOENT: "no such file or folder. Check the path",
    errno.ENOTDIR: "a part of this path is a file, not a folder. Choose another path",
    errno.EISDIR: "this is a folder, a file was expected",
    errno.EEXIST: "something of that name is there already. Choose another path",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter path",
    errno.EFBIG: "the file would grow past the limit set for it (ulimit -f). Raise the limit or choose another folder",
    errno.EIO: "the disk reported an error. Check the disk",
    errno.EMFILE: "too many open files. Raise the limit (ulimit -n)",
}


@contextmanager
def os_errors(path: str | os.PathLike[str], doing: str = "cannot use") -> Iterator[None]:
    """Turn an ``OSError`` of the block into one :class:`GroundupError` line that names ``path`` and the mend.

    Args:
        path: what was being read or written; the error's own file name is preferred when it has one.
        doing: the verb phrase of the message, such as ``"cannot write"``.
    """
    try:
        yield
    except OSError as error:
        where = _known_name(error.filename if isinstance(error.filename, str) else os.fspath(path))
        raise GroundupError(f"{doing} {where}: {mend(error)}.") from error


def mend(error: OSError) -> str:
    """What is wrong and what to do about it, for an error of the operating system."""
    return _MENDS.get(error.errno or 0, error.strerror or str(error))


def _known_name(path: str) -> str:
    """The path a person knows: without the temporary name that a writer gave it until it is whole (see files.py)."""
    return re.sub(r"(^|/)\.([^/]+)\.[0-9a-f]{8}\.(?:part|old)(?=/|$)", r"\1\2", path)
