"""How a command is found, how its flags are told, and how every mistake ends: one line and an exit code."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import groundup
from groundup.cli import arguments as cli_arguments
from groundup.cli import main as main_module
from groundup.cli.main import COMMANDS, main
from groundup.config import recipe as config_recipe
from groundup.runtime import UsageError

SCRIPT = Path(sys.executable).with_name("groundup")
PROGRAM = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "groundup"]
EVERY = [
    [name, *sub]
    for name, (module, _) in COMMANDS.items()
    for sub in ([[key] for key in getattr(import_module(f"groundup.cli.{module}"), "COMMANDS", {})] or [[]])
]


def shell(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    source = str(Path(groundup.__file__).resolve().parent.parent)
    options = {"stdout": subprocess.PIPE} | options
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=120, **options)


# ---- help


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(words: list[str], run: Callable[..., Any]) -> None:
    said = run(*words)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("usage: groundup COMMAND")
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in said.out
        assert text in said.out


def test_no_command_is_a_mistake_that_shows_the_help(run: Callable[..., Any]) -> None:
    assert run().code == run("--debug").code == 2
    assert run().out == run("--help").out


def test_the_version(run: Callable[..., Any]) -> None:
    assert run("--version").out == run("-V").out == f"groundup {groundup.__version__}\n"


def test_help_answers_in_under_three_tenths_of_a_second() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = shell([*PROGRAM, "--help"])
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: groundup")
    assert min(seconds) < 0.3


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'rich', 'jsonargparse', 'yaml', 'matplotlib'}"
    code = f"import sys; from groundup.cli.main import main; main(['--help']); print({heavy} & set(sys.modules))"
    assert shell([sys.executable, "-c", code]).stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_flag_of_every_command_has_a_help(
    words: list[str], monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    """The parser is caught on its way, and walked."""
    caught: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        caught.append(parser)
        raise SystemExit(0)

    monkeypatch.setattr(cli_arguments, "parse_flags", catch)
    monkeypatch.setattr(config_recipe, "parse_flags", catch)
    assert run(*words, "--help").code == 0
    monkeypatch.undo()
    (parser,) = caught
    assert parser.description
    shown = run(*words, "--help")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    assert text.startswith(f"usage: groundup {' '.join(words)}")
    for action in parser._actions:
        if action.metavar == "CONFIG" or action.dest == "help":
            continue
        assert action.help, f"{action.dest} has no help"
        assert action.help is not argparse.SUPPRESS
        assert action.help.split("(")[0].strip(), f"{action.dest} has no help of its own"
        if action.option_strings:
            assert action.option_strings[-1].rstrip("+").replace("_", "-") in text, action.dest
        assert " ".join(action.help.split("%")[0].split()) in text, action.dest


@pytest.mark.parametrize("name", ["data", "tokenizer"])
def test_a_group_of_commands_lists_them(name: str, run: Callable[..., Any]) -> None:
    listed = run(name, "--help")
    assert listed.code == 0
    for words in EVERY:
        assert words[0] != name or f"  {words[1]} " in listed.out
    assert run(name).code == 2
    assert run(name).out == listed.out


# ---- mistakes

MISTAKES = [
    (["pretrian"], 2, "pretrian is not a command. Did you mean pretrain? See groundup --help."),
    (["--verbose"], 2, "--verbose is not a command. See groundup --help."),
    (["zzz", "--help"], 2, "zzz is not a command."),
    (["tokenizer", "tran"], 2, "groundup tokenizer tran: no such command. Did you mean train?"),
    (["data", "zzz"], 2, "groundup data zzz: no such command. Known: list, get, prepare, inspect, export, import."),
    (["tokenizer", "train"], 2, "tokenizer train: the following arguments are required: data. See --help."),
    (["tokenizer", "encode"], 2, "tokenizer encode: the following arguments are required: tokenizer."),
    (["data", "prepare"], 2, "data prepare: the following arguments are required: data."),
    (["data", "get"], 2, "data get: the following arguments are required: name."),
    (["explain"], 2, "explain: the following arguments are required: model."),
    (["report"], 2, "report: the following arguments are required: run."),
    (["chat"], 2, "chat: the following arguments are required: model."),
    (["generate"], 2, "generate"),
    (["data", "list", "x"], 2, "data list: unrecognized arguments: x."),
    (["report", "a", "b"], 2, "report: unrecognized arguments: b."),
    (["generate", "model", "prompt", "more"], 2, "generate: unrecognized arguments: more."),
    (["pretrain", "demo", "more"], 2, "pretrain: unrecognized arguments: more."),
    (["demo", "text.txt"], 2, "Use --data text.txt"),
    (["demo", "--n-layr", "3"], 2, "is not a known flag. Did you mean model.n_layer?"),
    (["chat", "m", "--temprature", "3"], 2, "is not a known flag. Did you mean temperature?"),
    (["explain", "tiny", "-x"], 2, "explain: unrecognized arguments: -x."),
    (["demo", "--n-layer", "two"], 2, "demo: model.n_layer = 'two' should be a whole number."),
    (["demo", "--n-layer"], 2, "demo: --model.n_layer needs a value: a whole number."),
    (["demo", "--vocab-size", "300"], 2, "--vocab_size could mean tokenizer.vocab_size or model.vocab_size."),
    (["explain", "tiny", "--context", "long"], 2, "explain: context = 'long' should be a whole number or null."),
    (["explain", "tiny", "--context", "0"], 2, "model.context_length = 0 must be at least 1."),
    (["explain", "tiny", "--micro-batch", "0"], 2, "micro_batch = 0 must be at least 1."),
    (["generate", "m", "--top-p", "all"], 2, "generate: top_p = 'all' should be a number."),
    (["generate", "m", "x", "--temperature", ".inf"], 2, "generate: temperature = inf should be a number"),
    (["data", "prepare", "x", "--dedup=perhaps"], 2, "data prepare: dedup = 'perhaps' should be true or false."),
    (["pretrain", "shakespear"], 2, "shakespear: no such recipe. Did you mean shakespeare?"),
    (["pretrain", "."], 2, ".: this is a folder, a recipe is a YAML file."),
    (["pretrain", "mine.yaml"], 2, "mine.yaml: model.n_head = 7 does not divide model.n_embd = 384. Heads"),
    (["pretrain", "latin.yaml"], 2, "latin.yaml: a recipe is UTF-8 text; byte 8 is not."),
    (["explain", "gpt2-124"], 2, "gpt2-124: no preset, recipe or folder of that name. Did you mean gpt2-124m?"),
    (["explain", "mine.yaml"], 2, "mine.yaml: model.n_head = 7 does not divide"),
    (["explain", "a" * 300], 1, "the name is too long. Choose a shorter path."),
    (["data", "get", "shakespear"], 2, "shakespear: not a named source. Did you mean shakespeare?"),
    (["data", "prepare", "nowhere.txt"], 1, "nowhere.txt: no such file or folder."),
    (["data", "inspect", "nowhere"], 1, "nowhere: no prepared corpus"),
    (["tokenizer", "train", "nowhere.txt"], 1, "nowhere.txt: no such file or folder."),
    (["tokenizer", "encode", "nowhere", "text"], 1, "nowhere: no such file or folder. A tokenizer is a file,"),
    (["tokenizer", "decode", "nowhere", "12 x"], 2, "x is not a token id"),
    (["tokenizer", "inspect", "nowhere", ""], 1, "nowhere: no such file or folder."),
    (["tokenizer", "encode", "cl100k_bas", "x"], 1, "no such file or folder. Did you mean cl100k_base?"),
    (["report", "nowhere"], 2, "nowhere: no such run folder."),
    (["generate", "nowhere", "x"], 2, "nowhere: no such folder."),
    (["chat", "nowhere"], 2, "nowhere: no such folder."),
    (["demo", "--device", "abacus", "--data", "mine.yaml"], 2, "device = abacus is not a device."),
    (["doctor", "--out"], 2, "doctor: --out needs a value: text."),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "message"), MISTAKES, ids=[" ".join(words)[:40] for words, *_ in MISTAKES])
def test_a_mistake_is_one_line(
    words: list[str], code: int, message: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model:\n  n_head: 7\n  n_embd: 384\n")
    (tmp_path / "latin.yaml").write_bytes(b"out: caf\xe9\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = run(*words)
    assert said.code == code
    assert message in said.line
    assert len(said.line) < 700
    assert said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "a mistake writes nothing"


def test_debug_shows_the_traceback() -> None:
    for words in (["explain", "nope", "--debug"], ["--debug", "explain", "nope"]):
        with pytest.raises(UsageError, match="nope: no preset"):
            main(words)
    done = shell([sys.executable, "-m", "groundup", "explain", "nope", "--debug"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("groundup.runtime.errors.UsageError: nope: no preset")


def test_debug_after_two_dashes_is_a_word(run: Callable[..., Any]) -> None:
    assert "unrecognized arguments: -- --debug" in run("data", "list", "--", "--debug").line


# ---- other ends


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped."),
        (MemoryError(), 1, "not enough memory."),
        (OSError(28, "No space left on device", "runs/x"), 1, "runs/x: no space left on the disk."),
        (OSError(5, "Input/output error"), 1, "cannot write the output: the disk reported an error."),
    ],
)
def test_what_is_no_mistake_of_the_command_is_one_line_too(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(_name: str) -> None:
        print("done so far")
        raise error

    monkeypatch.setattr(main_module, "import_module", raising)
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.err.strip().startswith(f"groundup: {said}")
    assert captured.out == "done so far\n"
    with pytest.raises(type(error)):
        main(["doctor", "--debug"])


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(_name: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "import_module", raising)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize(
    "words", [["--help"], ["data", "list"], ["pretrain", "--help"], ["explain", "tiny"]], ids=" ".join
)
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = shell([sys.executable, "-m", "groundup", *words], stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["explain", "tiny"]], ids=" ".join)
def test_an_output_that_is_full_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = shell([sys.executable, "-m", "groundup", *words], stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("groundup: cannot write the output: no space left on the disk.")
    assert done.stderr.count("\n") == 1


def test_a_character_the_terminal_lacks_is_no_error() -> None:
    code = (
        "import sys; from groundup.cli.main import main; sys.exit(main(['demo', '--data', 'grün', '--print-config']))"
    )
    done = shell(["env", "PYTHONIOENCODING=ascii", sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("data: gr\\xfcn\n")


def test_python_m_groundup_is_the_same_program() -> None:
    done = shell([sys.executable, "-m", "groundup", "pretrian"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("groundup: pretrian is not a command.")


def test_the_wheel_names_the_program(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["groundup"].split(":")
    assert getattr(import_module(module), function) is main
    assert project["version"] == groundup.__version__
    if SCRIPT.exists():
        assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: object) -> int:
        raise error

    monkeypatch.setattr(main_module, "_run", fail)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith("groundup: not enough memory.")


def test_a_defect_of_ours_still_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: object) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(main_module, "_run", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["doctor"])
