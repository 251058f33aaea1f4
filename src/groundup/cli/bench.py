"""``groundup bench decode``: how fast a model is on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from groundup.cli.arguments import call_one_of
from groundup.cli.tables import add_row, figures_table
from groundup.runtime import UsageError, progress, say
from groundup.runtime.console import byte_size


def decode(
    model: str, batch: list[int] | None = None, prompt: int | None = None, new: int | None = None,
    adapter: tuple[str, ...] = (), device: str = "auto", dtype: str = "auto", compiled: bool = True,
) -> None:  # fmt: skip
    """Measure how fast a model reads prompts and writes tokens, and how much of the memory's speed that takes.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, a GGUF file, or hf:owner/name
        batch: texts at once, one number or several: [1,8]
        prompt: tokens of each text that are read; default 128, or what a shorter context has room for
        new: tokens of each text that are written; default 64, or what a shorter context has room for
        adapter: an adapter to put on it: a folder, a run or hf:owner/name; may be given several times, for their sum
        device: auto, cpu, cuda, cuda:1, mps
        dtype: of the weights; auto leaves them as they are stored; float32, bfloat16
        compiled: on a CPU, use compiled kernels for few texts; false shows what PyTorch does without them
    """
    batches = [1, 8] if batch is None else batch
    for flag, numbers, least in (
        ("batch", batches, 1),
        ("prompt", [1 if prompt is None else prompt], 1),
        ("new", [2 if new is None else new], 2),
    ):
        if not numbers or min(numbers) < least:
            raise UsageError(f"--{flag} must be at least {least}.")
    from groundup.inference import EngineSettings, load
    from groundup.inference.speed import decode_speed, memory_bandwidth, weights_read

    lm = load(model, adapters=adapter, device=device, dtype=dtype)  # type: ignore[arg-type]
    place = lm.model.device
    context = lm.model.config.context_length
    new = min(64, max(2, (context - (prompt or context * 2 // 3)))) if new is None else new
    prompt = min(128, max(1, context - new)) if prompt is None else prompt
    settings = EngineSettings(prefix_cache=False, compiled=compiled)
    with progress("measuring", 1 + len(batches), "rounds") as bar:
        fastest = memory_bandwidth(place)
        bar.update(1)
        speeds = []
        for number, count in enumerate(batches, start=2):
            speeds.append(decode_speed(lm.model, count, prompt, new, settings))
            bar.update(number)
    weights = byte_size(weights_read(lm.model))
    say(f"{place}: {fastest / 1e9:.1f} GB/s; {weights} of weights; {prompt} tokens read, {new} written, greedily")
    table = figures_table(
        "texts", "read tokens/s", "written tokens/s", "a token's gap", "1 in 100", "GB/s", "of memory"
    )
    for one in speeds:
        add_row(
            table, one.batch, f"{one.read:,.0f}", f"{one.written:,.0f}", f"{one.step * 1e3:.2f} ms",
            f"{one.slow_step * 1e3:.2f} ms", f"{one.bandwidth / 1e9:.1f}", f"{one.bandwidth / fastest:.0%}",
        )  # fmt: skip
    say(table)


COMMANDS: dict[str, Callable[..., None]] = {"decode": decode}


def main(arguments: Sequence[str]) -> None:
    """Run the sub-command named first."""
    call_one_of(COMMANDS, "bench", arguments)
