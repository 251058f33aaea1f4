"""What benchmarks of models share: processes that run jobs, rounds in turn, comparing outputs, naming the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from groundup.runtime.environment import cpu_name, git_commit, memory_bytes, usable_cores

JOBS = Path(__file__).with_name("attention_jobs.py")
Rounds = dict[str, list[dict[str, Any]]]


class Worker:
    """A process that runs jobs one after the other, each in a fork of its own; see ``serve`` in attention_jobs.py.

    Args:
        variables: set in its environment.
        jobs: the script that takes the jobs.
    """

    def __init__(self, variables: dict[str, str], jobs: Path = JOBS) -> None:
        self.jobs = jobs
        self.process = subprocess.Popen(
            [sys.executable, str(jobs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the job says; ``{"failed": why}`` where it could not be run."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"benchmarks/{self.jobs.name} ended before it answered; its last words are above.")
        return json.loads(answer)

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Bench:
    """What all measurements share.

    Args:
        folder: where weights and outputs lie meanwhile.
        arguments: those of the command line.
        jobs: the script that takes the jobs.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace, jobs: Path = JOBS) -> None:
        self.folder, self.device, self.dtype = folder, arguments.device, arguments.dtype
        self.rounds, self.limit = arguments.rounds or (1 if arguments.quick else 3), arguments.memory_limit * 2**30
        self.seconds = 0.02 if arguments.quick else 0.3
        self.failures: list[str] = []
        self.timer = Worker({"PYTHONWARNINGS": "ignore"}, jobs)
        goes_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed
        self.scale = Worker({"PYTHONWARNINGS": "ignore"} | goes_back, jobs)

    def run(self, measure: str, job: dict[str, Any]) -> dict[str, Any] | None:
        """One job; None where the contender failed, which is noted and said."""
        worker = self.scale if measure == "memory" else self.timer
        more = {"measure": measure, "device": self.device, "dtype": self.dtype, "seconds": self.seconds}
        answer = worker.ask(job | more)
        failed = answer.get("failed")
        for phase, why in (failed or {}).items() if isinstance(failed, dict) else [("", failed)] if failed else []:
            where = " ".join(str(job[key]) for key in ("kind", "length", "tokens") if key in job)
            failure = f"{job['contender']}, {job['job']} {where} {phase}".rstrip() + f": {why}"
            if failure not in self.failures:
                self.failures.append(failure)
                say(f"  FAILED {failure}")
        return None if isinstance(failed, str) else answer

    def rounds_of(self, contenders: Sequence[str], job: dict[str, Any], **more: Any) -> Rounds:
        """Each contender once a round, in turn; one that fails is left out. The first round writes its output.

        Args:
            more: parts of the job that hang on the contender, by its name.
        """
        found: Rounds = {name: [] for name in contenders}
        for number in range(self.rounds):
            for name in list(found):
                wanted = job | {key: of[name] for key, of in more.items()} | {"contender": name}
                if number == 0:
                    wanted["output"] = str(self.output(name))
                    self.output(name).unlink(missing_ok=True)
                result = self.run("time", wanted)
                if result is None:
                    del found[name]
                else:
                    found[name].append(result)
        return found

    def output(self, contender: str) -> Path:
        """Where a contender's output lies."""
        return self.folder / f"{contender}.npz"

    def differences(self, contenders: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        """How far outputs are from those of the first reference there is, at most: by contender and phase."""
        outputs = {}
        for name in contenders:
            if self.output(name).exists():
                with np.load(self.output(name)) as arrays:
                    outputs[name] = {phase: arrays[phase] for phase in arrays.files}
        reference = next((name for name in references if name in outputs), None)
        if reference is None:
            return {}
        against = outputs.pop(reference)
        return {
            "from": reference,
            "largest": {
                name: {phase: float(np.abs(mine[phase] - against[phase]).max()) for phase in mine}
                for name, mine in outputs.items()
            },
        }

    def close(self) -> None:
        """End the processes."""
        self.timer.close()
        self.scale.close()


def say(line: str) -> None:
    """Tell a person what is going on; standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, Any]:
    """Where it was measured, and with what."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None,
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("groundup", "torch", "transformers", "numpy")},
        "commit": git_commit(),
    }


def rounded(value: Any) -> Any:
    """The same with five digits to each number: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(of) for key, of in value.items()}
    return [rounded(of) for of in value] if isinstance(value, list) else value


class Kept:
    """Cases that have been measured, a line of JSON each in a file, if there is to be one: an interrupted run goes on.

    Args:
        path: the file; what stands in it has been measured.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.cases = [json.loads(line) for line in path.read_text().splitlines()] if path and path.is_file() else []

    def has(self, **named: Any) -> bool:
        """Whether there is a case of these."""
        return any(all(case[key] == value for key, value in named.items()) for case in self.cases)

    def add(self, case: dict[str, Any]) -> None:
        """One more."""
        self.cases.append(case)
        if self._path:
            with open(self._path, "a") as file:
                file.write(json.dumps(case) + "\n")
