"""Time to a loss: nanoGPT's own CPU example, and this package's recipe for the same text.

    python benchmarks/time_to_loss.py                 three rounds, some ten minutes on two quiet cores
    python benchmarks/time_to_loss.py --data-dir D    the text is D/pretrain/tinyshakespeare.txt
    python benchmarks/time_to_loss.py --quick         50 steps of each: does it run? Nothing is kept
    python benchmarks/render.py                       write docs/benchmarks.md from the kept results

The example is rebuilt by hand (peers/shakespeare.py): 4 layers of 4 heads, 128 wide, context 64, 12 sequences a step,
2,000 steps on characters. It ends near 1.886 nats per character of the held-out tenth. Ours is ``groundup pretrain
recipes/shakespeare-cpu.yaml``, the real command. Both are whole processes, in turn. The time to a loss runs from the
command until the model that has it lies on the disk, with imports, tokenizing, trials and evaluations in it; that of
the whole command, which in our case goes on to score all of the held-out text beside gzip and a 6-gram and to write a
report, is given too. What each ends with is then measured in the same way, on all of the held-out text: windows of the
model's own context that do not overlap. Ends in one JSON line, kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attention_bench import machine, rounded, say
from peers.gpt import GPT, GPTConfig
from safetensors.torch import load_file

import groundup
from groundup.config import build, read_recipe
from groundup.data import PreparedData, prepare
from groundup.evaluation import Score, bits_per_byte, model_scorer
from groundup.training import PretrainRecipe

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "time_to_loss.json"
RECIPE = ROOT / "recipes" / "shakespeare-cpu.yaml"
TARGET, BAR = 1.886, 0.25
STEPS, QUICK_STEPS = 2000, 50


def held_out(text: Path, folder: Path) -> None:
    """Write train.txt and val.txt: the split that our recipe makes, so that both learn and are asked the same."""
    given = read_recipe(RECIPE, PretrainRecipe)
    corpus = build(PretrainRecipe, {key: value for key, value in given.values.items() if key.startswith("corpus.")})
    prepared = prepare(str(text), folder / "split", algorithm="characters", corpus=corpus.corpus)
    for part in ("train", "val"):
        (folder / f"{part}.txt").write_bytes(prepared.text_bytes(part))


def timed(command: list[str], log: Path) -> float:
    """Wall-clock seconds of a command; what it says goes to a file, shown where it fails."""
    started = time.perf_counter()
    with log.open("w") as file:
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - started


def by_hand(folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """One run of the plain GPT."""
    out, began = folder / f"by hand {seed}", time.time()
    script = ROOT / "benchmarks" / "peers" / "shakespeare.py"
    texts = [str(folder / "train.txt"), str(folder / "val.txt")]
    command = [sys.executable, str(script), *texts, str(out), "--steps", str(steps), "--seed", str(seed)]
    seconds = timed(command, folder / "by hand.log")
    log = json.loads((out / "log.json").read_text())["log"]
    return {
        "seconds": seconds,
        "saved_seconds": (out / "model.safetensors").stat().st_mtime - began,
        "loss": their_loss(out, folder / "val.txt"),
        "own_estimates": [[row["step"], row["val"]] for row in log],
    }


def ours_by_command(folder: Path, text: Path, steps: int | None, seed: int) -> dict[str, Any]:
    """One run of our recipe by our command."""
    run, began = folder / f"groundup {seed}", time.time()
    command = [sys.executable, "-m", "groundup", "pretrain", str(RECIPE), "--data", str(text), "--out", str(run)]
    command += ["--seed", str(seed)] + (["--max-steps", str(steps)] if steps else [])
    seconds = timed(command, folder / "groundup.log")
    saved = max(file.stat().st_mtime for file in (run / "checkpoints").rglob("model.safetensors"))
    if (folder / "val.txt").read_bytes() != held_out_bytes(run):
        raise SystemExit("benchmarks/time_to_loss.py: the run held out another text than the split that was made here.")
    return {"seconds": seconds, "saved_seconds": saved - began, "loss": our_loss(run, folder / "val.txt")}


def held_out_bytes(run: Path) -> bytes:
    """The text that a run of ours never saw."""
    return PreparedData.open(run / "data").text_bytes("val")


# ---- the loss, measured alike


def nats_per_character(score: Score, ids: list[int], context: int, first: int, text: str) -> float:
    """The mean loss of a text in windows of ``context`` tokens that do not overlap, per character.

    Args:
        score: inputs and targets B T to nats B T.
        ids: of the text.
        first: the token that its first one is predicted from.
    """
    lengths = np.ones(max(ids) + 1, np.int64)  # of tokens in bytes, which the loss does not hang on
    found = bits_per_byte(
        score, np.array(ids), lengths, context, start_id=first, stride=context, batch_size=64, show_progress=False
    )
    return found.loss * len(ids) / len(text)


def their_loss(folder: Path, text: Path) -> float:
    """Of the plain GPT's saved weights."""
    notes = json.loads((folder / "log.json").read_text())
    model = GPT(GPTConfig(**notes["config"])).eval()
    missing, unknown = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert (missing, unknown) == (["head.weight"], [])  # the table of tokens, again

    @torch.no_grad()
    def score(inputs_BT: Any, targets_BT: Any) -> Any:
        logits_BTV, _ = model(torch.from_numpy(inputs_BT))
        losses = F.cross_entropy(logits_BTV.flatten(0, 1), torch.from_numpy(targets_BT).flatten(), reduction="none")
        return losses.view(targets_BT.shape).numpy()

    numbers = {character: number for number, character in enumerate(notes["characters"])}
    words = text.read_text(encoding="utf-8")
    ids = [numbers[character] for character in words]
    return nats_per_character(score, ids, notes["config"]["block_size"], numbers["\n"], words)


def our_loss(run: Path, text: Path) -> float:
    """Of the run's model, as ``groundup generate`` takes it."""
    lm = groundup.load(run)
    words = text.read_text(encoding="utf-8")
    first = lm.tokenizer.encode("\n")[0]
    score = model_scorer(lm.model, "cpu")
    return nats_per_character(score, lm.tokenizer.encode(words), lm.model.config.context_length, first, words)


def ratio_of(rounds: list[dict[str, Any]], key: str) -> dict[str, float]:
    """What part of the other's time ours takes: the median over rounds, the lowest, the highest."""
    ratios = [one["groundup"][key] / one["by hand"][key] for one in rounds]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data", help="where the text lies")
    parser.add_argument("--rounds", type=int, default=3, help="how often each runs")
    parser.add_argument("--quick", action="store_true", help="50 steps of each, one round; nothing is kept")
    parser.add_argument("--out", type=Path, help="write the result there instead of where it is kept")
    arguments = parser.parse_args()
    text = arguments.data_dir.resolve() / "pretrain" / "tinyshakespeare.txt"
    if not text.is_file():
        raise SystemExit(f"{text} is not there. Give --data-dir, or save the text there: groundup data get shakespeare")
    steps, rounds = STEPS, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        held_out(text, folder)
        for number in range(1 if arguments.quick else arguments.rounds):
            theirs = by_hand(folder, QUICK_STEPS if arguments.quick else steps, 1337 + number)
            ours = ours_by_command(folder, text, QUICK_STEPS if arguments.quick else None, 1337 + number)
            rounds.append({"by hand": theirs, "groundup": ours})
            for name, one in rounds[-1].items():
                say(f"  {name:<10} {one['seconds']:6.1f} s (saved {one['saved_seconds']:6.1f})  loss {one['loss']:.4f}")
    ratio, whole = (ratio_of(rounds, key) for key in ("saved_seconds", "seconds"))
    reached = all(one["groundup"]["loss"] <= TARGET for one in rounds)
    result = rounded({
        "benchmark": "time_to_loss", "date": datetime.now(UTC).strftime("%Y-%m-%d"), "quick": arguments.quick,
        "load_before": os.getloadavg()[0], "steps": steps, "target": TARGET, "bar": BAR, "rounds": rounds,
        "ratio": ratio, "whole_ratio": whole,
        "reached": reached, "met": reached and ratio["median"] <= BAR, "machine": machine("cpu"),
    })  # fmt: skip
    if arguments.out or not arguments.quick:
        (arguments.out or RESULT).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    import render
    from train_page import time_to_loss

    say("\n".join(time_to_loss(result)))
    if not (arguments.quick or arguments.out):
        render.write_page()


if __name__ == "__main__":
    main()
