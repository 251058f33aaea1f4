"""What a checkpoint costs the training that it saves: GPT-2 of 124M parameters with AdamW's state, on this machine.

    python benchmarks/checkpoint.py                    three rounds
    python benchmarks/checkpoint.py --rounds 1         one

Beside us ``torch.save`` of the same tensors and the asynchronous save of ``torch.distributed.checkpoint``, each time in
a fresh process, one after the other. Two things are asked of each: how long a training step that follows the save is
held up, when that step computes as usual and when it wants to change the weights at once; and how much memory is taken
meanwhile. Ours also flushes to the disk, notes checksums and reads all of it back. Ends in one JSON line, kept in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "checkpoint.json"
METHODS = ("groundup", "torch.save", "dcp.async_save")
SEQUENCES, LENGTH = 1, 512  # of the step that follows a save


@dataclass
class Saver:
    """One way to save: what begins it, what is called before weights change, and what waits for its end."""

    begin: Callable[[int], None]
    settle: Callable[[], None]
    finish: Callable[[], None]


def memory(field: str) -> int:
    """Bytes that Linux counts for this process: ``VmRSS`` now, ``VmHWM`` at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def saver(method: str, folder: Path, model: Any, optimizer: Any) -> Saver:
    """The method as a :class:`Saver`."""
    import torch

    from groundup.training.checkpoint import Checkpoints, optimizer_tensors

    if method == "groundup":
        from groundup.tokenizer import Tokenizer

        tokenizer = Tokenizer.train(["the cat sat on the mat " * 9], 262, show_progress=False)
        checkpoints = Checkpoints(folder)
        optimizers = {"adamw": optimizer}
        return Saver(
            lambda step: void(checkpoints.save(model, tokenizer, optimizers, {"step": step}, best=False)),
            checkpoints.settle,
            checkpoints.finish,
        )
    everything = dict(model.state_dict()) | optimizer_tensors(model, {"adamw": optimizer})
    if method == "torch.save":
        return Saver(lambda step: torch.save(everything, folder / f"{step}.pt"), void, void)
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    waiting: list[Any] = []
    return Saver(
        lambda step: waiting.append(dcp.async_save(everything, checkpoint_id=str(folder / str(step)))),
        void,
        lambda: void(waiting.pop().result()),
    )


def void(_: Any = None) -> None:
    """Nothing."""


def job(method: str) -> dict[str, Any]:
    """One process: a save that a step follows, and one that the update of the weights follows at once."""
    import torch

    from groundup.model import ModelConfig, Transformer

    torch.manual_seed(1)
    model = Transformer(ModelConfig.preset("gpt2-124m"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def gradients(sequences: int, length: int) -> None:
        ids = torch.randint(0, model.config.vocab_size, (sequences, length + 1))
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    gradients(1, 16)
    optimizer.step()
    gradients(SEQUENCES, LENGTH)  # warm
    clock = time.perf_counter
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as place:
        it = saver(method, Path(place), model, optimizer)
        found: dict[str, Any] = {"method": method}
        # The first save of a process also builds what later ones reuse.
        for step, name in ((1, "first"), (2, "with_step"), (3, "at_once")):
            Path("/proc/self/clear_refs").write_text("5")
            before, started = memory("VmRSS"), clock()
            it.begin(step)
            begun = clock()
            if name == "with_step":
                gradients(SEQUENCES, LENGTH)
                found["step_seconds"] = round(clock() - begun, 3)
            stepped = clock()
            it.settle()
            blocked = begun - started + clock() - stepped
            optimizer.step()
            it.finish()
            found[name] = {"blocked_seconds": round(blocked, 3), "seconds": round(clock() - started, 3)}
            if name != "with_step":  # whose activations would be counted
                found[name]["extra_bytes"] = memory("VmHWM") - before
    found["weights_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    return found


def measure(rounds: int) -> dict[str, Any]:
    """Every method in every round, in turn; medians and all values."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for number in range(rounds):
        for method in METHODS if number % 2 == 0 else reversed(METHODS):
            command = [sys.executable, __file__, "--job", method]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[method].append(json.loads(done.stdout.splitlines()[-1]))
            print(found[method][-1], file=sys.stderr)
    from groundup.runtime.environment import describe_environment

    environment = describe_environment()
    weights = found[METHODS[0]][0]["weights_bytes"]
    rows = []
    for method, runs in found.items():
        row: dict[str, Any] = {"method": method}
        for case in ("first", "with_step", "at_once"):
            for key in runs[0][case]:
                values = [run[case][key] for run in runs]
                values = [round(value / weights, 3) for value in values] if key == "extra_bytes" else values
                name = f"{case}_{'extra_weights' if key == 'extra_bytes' else key}"
                row[name], row[f"{name}_all"] = round(median(values), 3), values
        row["step_seconds"] = round(median(run["step_seconds"] for run in runs), 3)
        rows.append(row)
    return {
        "benchmark": "checkpoint",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "model": "gpt2-124m, float32, AdamW",
        "weights_bytes": weights,
        "step": f"forward and backward pass of {SEQUENCES} x {LENGTH} tokens",
        "machine": {key: environment[key] for key in ("cpu", "cores", "memory_bytes", "python", "packages", "commit")},
        "rows": rows,
    }


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(job(arguments.job)))
        return
    result = measure(arguments.rounds)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
