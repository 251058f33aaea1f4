"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text, vocabularies and weights kept beside the project, where they are to be had."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets, which are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own folder."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tests run side by side; each process computing on every core would only make them wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
