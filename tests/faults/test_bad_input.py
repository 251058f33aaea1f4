"""Each mistake of a person ends in one line that names the thing and the mend, and loses nothing that was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from groundup.cli.main import main

QUICK = [
    "--max-steps=4", "--depth=1", "--n-embd=16", "--n-head=2", "--context-length=16", "--batch-tokens=64",
    "--micro-batch=2",
    "--precision=float32", "--attention=explicit", "--device=cpu", "--sample.max-tokens=3",
]  # fmt: skip
TEXT = "\n".join(f"Sentence number {n} says that {n * 7919 % 1000} is not {n * 31 % 97}." for n in range(400))


def demo(*flags: str) -> int:
    return main(["demo", *QUICK, *flags])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on standard error, warnings aside."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("groundup: ") and "warning" not in line]
    assert len(lines) == 1, errors
    assert len(lines[0]) < 400, lines[0]
    return lines[0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.txt"
    path.touch()
    return path


def binary(folder: Path) -> Path:
    path = folder / "picture.txt"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)) * 20)
    return path


def latin1(folder: Path) -> Path:
    path = folder / "umlaut.txt"
    path.write_bytes(("Grün " * 900).encode("latin-1"))
    return path


def textless(folder: Path) -> Path:
    path = folder / "pictures"
    path.mkdir()
    (path / "a.bin").write_bytes(bytes(3000))
    return path


def tiny(folder: Path) -> Path:
    path = folder / "tiny.txt"
    path.write_text("Too little.")
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "nowhere.txt", ["nowhere.txt", "no such file or folder"]),
        (empty, ["empty.txt", "empty"]),
        (binary, ["picture.txt", "binary"]),
        (latin1, ["umlaut.txt", "UTF-8", "iconv"]),
        (textless, ["pictures", "text"]),
        (tiny, ["2"]),
    ],
    ids=["missing", "empty", "binary", "mis-encoded", "no text", "too little"],
)
def test_a_text_that_cannot_be_used(
    make: Callable[[Path], Path], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(f"--data={make(tmp_path)}", f"--out={tmp_path / 'run'}") == 1
    line = one_line(capsys)
    assert [part for part in expected if part not in line] == []
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("modle:\n  n_layer: 2\n", ["unknown key modle.n_layer", "Did you mean model.n_layer?"]),
        ("learning_rat: 3\n", ["unknown key learning_rat", "Did you mean optim.learning_rate?"]),
        ("model:\n  n_layer: two\n", ["model.n_layer = 'two' should be a whole number"]),
        ("precision: float8\n", ["precision = 'float8' should be one of auto, float32, tf32, bfloat16, float16"]),
        (
            "model:\n  n_embd: 384\n  n_head: 7\n",
            ["model.n_head = 7 does not divide model.n_embd = 384", "Heads that would"],
        ),
        ("model: [1, 2\n", ["not valid YAML", "line"]),
        ("- a\n- b\n", ["a mapping of keys to values"]),
    ],
)
def test_a_recipe_that_cannot_be_used(
    recipe: str, expected: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe)
    assert main(["pretrain", str(path), f"--data={text}", f"--out={tmp_path / 'run'}"]) == 2
    line = one_line(capsys)
    assert str(path) in line
    assert [part for part in expected if part not in line] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--n-layers", "2"], ["--n_layers is not a known flag", "Did you mean model.n_layer?"]),
        (["--minutes", "soon"], ["minutes = 'soon' should be a number"]),
        (["--minutes", "-1"], ["minutes = -1"]),
        (["--budget", "5 apples"], ["5 apples", "2e15flops"]),
        (["--minutes", "1", "--budget", "5m"], ["minutes and budget"]),
        (["--device", "gpu9"], ["gpu9", "auto"]),
        (["--depth", "0"], ["depth = 0"]),
        (["--model.vocab-size", "99"], ["model.vocab_size = 99 is smaller than the tokenizer's"]),
        (["--micro-batch", "3", "--batch-tokens", "64"], ["batch_tokens = 64 is not a multiple"]),
        (["mytext.txt"], ["--data mytext.txt"]),
    ],
)
def test_a_flag_that_cannot_be_used(
    flags: list[str], expected: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, rest = (flags[:1], flags[1:]) if not flags[0].startswith("--") else ([], flags)
    quick = [flag for flag in QUICK if not any(flag.split("=")[0] == given for given in rest)]
    if "--budget" in rest or "--minutes" in rest:
        quick.remove("--max-steps=4")
    if "--depth" in rest:
        quick = [flag for flag in quick if not flag.startswith(("--n-embd", "--n-head"))]
    code = main(["demo", *first, *quick, f"--data={text}", f"--out={tmp_path / 'run'}", *rest])
    assert code in (1, 2)
    line = one_line(capsys)
    assert [part for part in expected if part not in line] == []


def test_offline_a_hub_corpus_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert demo("--data=hf:nobody/nothing", f"--out={tmp_path / 'run'}") == 1
    line = one_line(capsys)
    assert "hf:nobody/nothing" in line
    assert "network" in line or "offline" in line.lower()


@pytest.fixture
def trained(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "run"
    assert demo(f"--data={text}", f"--out={out}", "--save-every=2") == 0
    capsys.readouterr()
    return out


def test_a_damaged_checkpoint_is_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (trained / "checkpoints" / "best").resolve() / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 4])):
        weights.write_bytes(damaged)
        assert main(["generate", str(trained), "Sentence", "--max-tokens=3"]) == 1
        line = one_line(capsys)
        assert "model.safetensors" in line
        assert "damaged" in line
    weights.write_bytes(whole)
    assert main(["generate", str(trained), "Sentence", "--max-tokens=3"]) == 0


def test_resuming_passes_over_a_damaged_checkpoint(
    trained: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = (trained / "checkpoints" / "latest").resolve() / "training_state" / "state.json"
    newest.write_bytes(newest.read_bytes()[:20])
    (trained / "evaluation.json").unlink()
    assert demo(f"--data={text}", f"--out={trained}", "--save-every=2") == 0
    captured = capsys.readouterr()
    assert "step 2" in captured.out
    assert "state.json" in captured.err.replace("\n", "")


@pytest.mark.parametrize("command", ["generate", "chat", "explain", "report"])
def test_a_model_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty"):
        words = [command, str(place), *(["Hello"] if command == "generate" else [])]
        assert main(words) in (1, 2)
        assert str(place) in one_line(capsys)


def test_a_full_disk_ends_in_one_line_and_loses_nothing(
    small_disk: Callable[[str], Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up between two checkpoints of a run."""
    disk = small_disk("size=2m")
    out = disk / "run"
    assert demo(f"--data={text}", f"--out={out}", "--save-every=2") == 0
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 8192)))
    capsys.readouterr()
    assert demo(f"--data={text}", f"--out={out}", "--save-every=2", "--max-steps=40") == 1
    line = one_line(capsys)
    assert "no space left on the disk" in line
    assert str(disk) in line
    assert {path: path.read_bytes() for path in before} == before

    (disk / "ballast").unlink()
    assert demo(f"--data={text}", f"--out={out}", "--save-every=2", "--max-steps=40") == 0


def test_a_disk_too_small_from_the_start(
    small_disk: Callable[[str], Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=24k")
    assert demo(f"--data={text}", f"--out={disk / 'run'}") == 1
    assert "no space left on the disk" in one_line(capsys)


def test_a_folder_that_may_not_be_written(
    small_disk: Callable[[str], Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=64k,ro")
    assert demo(f"--data={text}", f"--out={disk / 'run'}") == 1
    line = one_line(capsys)
    assert "read-only" in line
    assert str(disk) in line


def test_an_out_that_is_a_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(f"--data={text}", f"--out={text}/run") == 1
    assert "a part of this path is a file" in one_line(capsys)


@pytest.mark.parametrize("size", [2_100, 5_000, 20_000])
def test_a_small_text_gets_a_smaller_plan_and_a_warning(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.txt"
    path.write_text(TEXT[:size])
    assert main(["demo", f"--data={path}", f"--out={tmp_path / 'run'}", "--minutes=0.05", "--device=cpu"]) == 0
    captured = capsys.readouterr()
    assert "warning" in captured.err
    assert (tmp_path / "run" / "report.html").exists()
