"""What a smaller cache costs: one small model with each kind of attention, trained on equal tokens, several seeds.

    python benchmarks/attention_study.py                  five minutes a run: two hours on two quiet cores
    python benchmarks/attention_study.py --minutes 30 --seeds 3          longer, more often
    python benchmarks/attention_study.py --quick          a tiny model and a few steps, a few minutes: does it run?
    python benchmarks/render.py                           write docs/benchmarks.md from the kept results

Every run is the real `groundup pretrain`, in a process of its own, with one key or two changed. All of them make the
same number of steps: those that MHA makes in ``--minutes``, found by a trial of a few steps and kept in the study's
folder. Runs with one seed have the same text held out, the same order and the same batch. What has finished is not run
again: the same command goes on where it stopped. Ends in one JSON line, kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attention_bench import machine, rounded, say

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "attention_study.json"
SHARED = ROOT.parent / "shared" / "data"
SHAPE: dict[str, Any] = dict(n_layer=4, n_head=16, n_embd=128, context_length=256)  # about 1.3M parameters
TINY: dict[str, Any] = dict(n_layer=2, n_head=16, n_embd=64, context_length=64)
VOCABULARY, BATCH = 4096, 8192
TRIAL_STEPS = 6
Keys = dict[str, Any]


def variants(shape: dict[str, Any]) -> dict[str, Keys]:
    """The kinds of attention by name: recipe keys over the model's."""
    head = shape["n_embd"] // shape["n_head"]
    window = shape["context_length"] // 4
    found: dict[str, Keys] = {"MHA": {}}
    found |= {f"GQA {groups}": {"model.n_kv_head": groups} for groups in (8, 4, 2)}
    found["MQA"] = {"model.n_kv_head": 1}
    for times in (2, 4, 8):  # DeepSeek-V2's latent is 4 heads wide, its rotary key half of one
        found[f"MLA {times * head}"] = {
            "model.latent.kv_rank": times * head,
            "model.latent.rope_dim": head // 4 * 2,
            "model.latent.nope_dim": head,
            "model.latent.v_dim": head,
        }
    for name, pattern in (("window", "S"), ("window, every other", "SF"), ("window, three of four", "SSSF")):
        found[name] = {"model.layer_pattern": pattern, "model.sliding_window": window}
    return found


class Study:
    """The runs of a study and the folder they lie in.

    Args:
        arguments: those of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        quick = arguments.quick
        self.folder: Path = arguments.folder
        self.shape = TINY if quick else SHAPE
        self.vocabulary, self.batch = (512, 256) if quick else (VOCABULARY, BATCH)
        self.data = str(arguments.data or arguments.data_dir / "pretrain")
        self.device, self.minutes, self.steps = arguments.device, arguments.minutes, arguments.max_steps
        self.seeds = [1337 + number for number in range(arguments.seeds)]
        self.failures: list[str] = []

    def keys(self, variant: Keys, seed: int, steps: int) -> Keys:
        """Every key of a run that is not left to its default."""
        context = self.shape["context_length"]
        return {
            "data": self.data,
            "seed": seed,
            "device": self.device,
            "max_steps": steps,
            "batch_tokens": self.batch,
            "micro_batch": max(1, min(self.batch, 4096) // context),
            "tokenizer.vocab_size": self.vocabulary,
            "corpus.max_val_bytes": 200_000,
            "eval_tokens": 1_000_000,  # all that is held out
            "sample.max_tokens": 16,
            **{f"model.{name}": value for name, value in self.shape.items()},
            "model.qk_norm": False,  # which latent attention does not have
            "model.dropout": 0.0,
            # By hand: what follows from the number of parameters would differ between the variants.
            "optim.learning_rate": 3e-3,
            "optim.warmup_steps": max(1, min(100, steps // 20)),
            "save_every": steps,
            "precision": "bfloat16",
            "attention": "explicit",  # the fastest here at this length
            **variant,
        }

    def pretrain(self, out: Path, variant: Keys, seed: int, steps: int) -> dict[str, Any] | None:
        """Run, or go on with, or only read one run; None where it failed, which is noted and said."""
        if (found := read_run(out, steps)) is not None:
            return found
        log = out.with_suffix(".log")
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.keys(variant, seed, steps).items()]
        with open(log, "w") as said:
            done = subprocess.run(
                [sys.executable, "-m", "groundup", "pretrain", *flags, f"--out={out}"],
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        found = read_run(out, steps)
        if done.returncode or found is None:
            last = (log.read_text().strip().splitlines() or ["no message"])[-1]
            self.failures.append(f"{out.name}: {last}")
            say(f"  FAILED {out.name}: {last}")
            return None
        return found

    def settled_steps(self) -> int:
        """How many steps every run makes: as asked for, or what MHA makes in the minutes; the same after a stop."""
        kept = self.folder / "study.json"
        wanted = {"shape": self.shape, "data": self.data, "minutes": self.minutes, "max_steps": self.steps,
                  "device": self.device}  # fmt: skip
        if kept.is_file():
            before = json.loads(kept.read_text())
            if before["wanted"] != wanted:
                raise SystemExit(f"{self.folder}: holds a study with other settings. Give another --folder.")
            return before["steps"]
        steps = self.steps or self._steps_in_minutes()
        kept.write_text(json.dumps({"wanted": wanted, "steps": steps}, indent=1) + "\n")
        return steps

    def _steps_in_minutes(self) -> int:
        trial = self.folder / "trial"
        if self.pretrain(trial, {}, self.seeds[0], TRIAL_STEPS) is None:
            raise SystemExit(f"The trial run failed; what it said is in {trial.with_suffix('.log')}.")
        rows = [row for row in metrics(trial) if row["kind"] == "train"]
        if len(rows) > 1:  # the first step pays for what is made once
            seconds = (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"])
        else:
            seconds = rows[-1]["seconds"] / rows[-1]["step"]
        steps = max(TRIAL_STEPS, round(60 * self.minutes / seconds))
        say(f"  {steps:,} steps of {self.batch:,} tokens: what MHA makes in {self.minutes:g} minutes")
        return steps

    def run(self) -> dict[str, Any]:
        """Every variant with every seed, in turn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = self.settled_steps()
        found: dict[str, dict[str, Any]] = {}
        kinds = variants(self.shape)
        for name, variant in kinds.items():
            found[name] = costs(self.shape, self.vocabulary, variant) | {"bits_per_byte": {}, "loss": {}, "seconds": {}}
        for seed in self.seeds:
            first: Path | None = None
            for name, variant in kinds.items():
                out = self.folder / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
                if first is not None and not (out / "data").exists():  # the same text and seed: prepared once
                    shutil.copytree(first / "data", out / "data")
                row = self.pretrain(out, variant, seed, steps)
                if row is None:
                    continue
                first = first or out
                for key in ("bits_per_byte", "loss", "seconds"):
                    found[name][key][str(seed)] = row[key]
                say(f"  seed {seed}  {name:<22} {row['bits_per_byte']:.4f} bits/byte  {row['seconds']:7.1f} s")
        return {"steps": steps, "tokens": steps * self.batch, "variants": found}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_run(run: Path, steps: int) -> dict[str, Any] | None:
    """What a run came to on all held-out text after its last step; None where it has not made it."""
    if not (run / "metrics.jsonl").is_file():
        return None
    rows = [row for row in metrics(run) if row["kind"] == "eval" and row["step"] == steps]
    return rows[-1] if rows else None


def costs(shape: dict[str, Any], vocabulary: int, variant: Keys) -> dict[str, Any]:
    """Parameters and cache bytes per token of a variant, counted on the model and measured on its cache in bfloat16."""
    import torch

    from groundup.model import KVCache, ModelConfig, Transformer

    fields = shape | {"vocab_size": vocabulary, "qk_norm": False}
    config = ModelConfig.from_dict(fields | {name.removeprefix("model."): value for name, value in variant.items()})
    with torch.device("meta"):
        model = Transformer(config)
    cache = KVCache(config, 1, config.context_length, dtype=torch.bfloat16)
    attention = sum(p.numel() for name, p in model.named_parameters() if ".attention." in name)
    return {
        "parameters": model.parameter_count(),
        "attention_parameters": attention,
        "cache_bytes_per_token": cache.nbytes / config.context_length,
    }


def main() -> None:
    """Train, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=SHARED, help="the shared data, with pretrain/ in it")
    parser.add_argument("--data", help="another text instead: whatever groundup pretrain takes")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "attention-study", help="where the runs lie")
    parser.add_argument("--seeds", type=int, default=2, help="how many (2)")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of the MHA run (5)")
    parser.add_argument("--max-steps", type=int, help="steps of every run, instead of minutes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps, one seed; nothing is kept")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plot there, as PNG")
    parser.add_argument("--out", type=Path, help="write the result there instead of where it is kept")
    arguments = parser.parse_args()
    if not arguments.data and not (arguments.data_dir / "pretrain").is_dir():
        parser.error(
            f"{arguments.data_dir}: no pretrain folder there. Give one with --data-dir, or a text with --data."
        )
    if arguments.quick:
        arguments.seeds, arguments.max_steps = 1, arguments.max_steps or 12
        arguments.folder = arguments.folder.with_name(arguments.folder.name + "-quick")
    study = Study(arguments)
    result = rounded(
        {
            "benchmark": "attention_study",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "quick": arguments.quick,
            "minutes": arguments.minutes,
            "seeds": study.seeds,
            "shape": ", ".join(f"{name} {value}" for name, value in study.shape.items()),
            "context_length": study.shape["context_length"],
            **study.run(),
            "failures": study.failures,
            "machine": machine(arguments.device),
        }
    )
    if arguments.out or not arguments.quick:  # before anything is drawn of it
        (arguments.out or RESULT).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    import attention_page
    import render

    say("\n".join(attention_page.study(result)))
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        attention_page.study_plots(result, arguments.plots)
    if not (arguments.quick or arguments.out):
        render.write_page()


if __name__ == "__main__":
    main()
