"""What all tests share."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Tests run side by side: a process that computes on every core makes the others wait. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from groundup.runtime.console import console

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text, vocabularies and weights kept beside the project, where they are to be had."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets, which are not at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _own_console() -> Iterator[None]:
    """A console of each test's own, as wide as in a log: its width is found once, and must not be another test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        console.cache_clear()
        yield
        console.cache_clear()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own folder."""
    return ROOT


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system of its own with the given options; needs root and the right to mount."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a small file system")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=False)


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on a free loopback port while the block runs; gives the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``serving``, past any proxy that the environment names."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return serving


@pytest.fixture
def hub(loopback: Callable, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type]:
    """A hub on this machine that holds ``files``, a fixture of the test's own module, and an empty cache for it."""
    from huggingface_hub import constants

    from fake_hub import FakeHub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("GROUNDUP_DATA", str(tmp_path / "data"))
    FakeHub.reset(files)
    with loopback(FakeHub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield FakeHub
