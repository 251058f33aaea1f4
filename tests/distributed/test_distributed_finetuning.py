"""Fine-tuning on several processes: the losses of one, whole models and adapters; one process measures and reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from small_finetuning import QUIET, some_questions, write_base, write_jsonl
from small_runs import finish, losses

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "words",
    [
        ["--parallel=ddp"],
        ["--parallel=fsdp"],
        ["--adapter.method=lora", "--adapter.base=nf4"],
        ["--task=classify", "--learning-curve=[]"],
    ],
    ids=["ddp", "fsdp", "qlora", "classes"],
)
def test_two_processes_learn_what_one_does(tmp_path: Path, words: list[str]) -> None:
    questions = some_questions(67)
    (tmp_path / "base").mkdir()
    base, data = write_base(tmp_path / "base", questions), write_jsonl(tmp_path / "data.jsonl", questions)
    keys = QUIET | {"init_from": base, "data": data, "max_steps": 6, "batch_size": 4, "micro_batch": 2}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]
    found = []
    for processes in (1, 2):
        out = tmp_path / f"of-{processes}"
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] * (processes > 1)
        done = finish([sys.executable, "-m", *launch, "groundup", "finetune", *flags, *words, f"--out={out}"])
        assert done.stdout.count("Report: ") == 1
        assert (out / "evaluation.json").is_file()
        found.append(losses(out))
    one, two = found
    assert len(one) == len(two) == 6
    assert [step for step, _ in one] == [step for step, _ in two]
    for (_, expected), (_, loss) in zip(one, two, strict=True):
        assert loss == pytest.approx(expected, abs=2e-5)
