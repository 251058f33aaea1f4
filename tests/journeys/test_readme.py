"""The README's own commands, run in the order a newcomer would type them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.journey, pytest.mark.slow]


def commands(page: Path) -> list[str]:
    """Every line after a ``$`` prompt inside the page's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def shortened(command: str) -> str:
    """The same command with seconds instead of minutes of training, where it trains."""
    if re.search(r"groundup (demo|pretrain)\b", command):
        return re.sub(r"--(minutes|budget) \S+", "", command) + " --minutes 0.1"
    return command


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        stdin=subprocess.DEVNULL,
    )


def test_every_command_of_the_readme_works_in_its_order(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "recipes", tmp_path / "recipes")
    typed = [command for command in commands(root / "README.md") if not command.startswith(("git ", "cd ", "make "))]
    assert len(typed) >= 8, "the README shows too few commands for a newcomer"
    for command in typed:
        done = shell(shortened(command), tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, command
        assert done.stdout.strip(), f"{command} says nothing"


def test_make_demo_takes_a_text_and_ends_with_what_to_try_next(root: Path, tmp_path: Path) -> None:
    if not (root / ".venv" / ".core").exists():
        pytest.skip("needs the environment that `make setup` makes in .venv/")
    text = tmp_path / "my text.txt"
    text.write_text(
        "\n".join(f"Line {number} of a text that somebody wrote down, and then some more." for number in range(900))
    )
    out = tmp_path / "my run"
    words = ["make", "--no-print-directory", "demo", f"DATA={text}", f"OUT={out}", "MINUTES=0.1"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert lines[-2:] == [f"groundup chat '{out}'", f"groundup report '{out}'"]
    assert (out / "report.html").stat().st_size > 20_000


def test_the_makefile_names_the_package_that_is_missing(root: Path, tmp_path: Path) -> None:
    without = subprocess.run(
        ["make", "setup", "PYTHON=no-such-python3", f"VENV={tmp_path / 'v'}"], cwd=root, capture_output=True, text=True
    )
    assert without.returncode != 0
    assert "apt-get install python3" in without.stdout
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *version_info*) exit 0;; esac\nexit 0\n')
    fake.chmod(0o755)
    no_venv = subprocess.run(
        ["make", "setup", f"PYTHON={fake}", f"VENV={tmp_path / 'v'}"], cwd=root, capture_output=True, text=True
    )
    assert no_venv.returncode != 0
    assert "apt-get install python3-venv" in no_venv.stdout


def test_the_readme_says_what_is_there(root: Path) -> None:
    """Every command of the program is in the README, and every command the README's table calls done exists."""
    from groundup.cli.main import COMMANDS

    page = (root / "README.md").read_text()
    assert [name for name in COMMANDS if f"groundup {name}" not in page] == []
    mentioned = set(re.findall(r"`groundup ([a-z]+)", page))
    assert mentioned <= set(COMMANDS)
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (root / link).exists(), f"the README links to {link}, which is not there"
