"""``groundup export MODEL --to hf|gguf|int8|int4|nf4|adapter``: a model for other tools, or in fewer bits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.cli.arguments import call
from groundup.cli.tables import add_row, figures_table
from groundup.runtime import UsageError, say
from groundup.runtime.console import byte_size
from groundup.runtime.errors import nearest

if TYPE_CHECKING:
    from rich.table import Table

    from groundup.data import Source
    from groundup.evaluation import Divergence
    from groundup.inference import LanguageModel
    from groundup.model import Transformer

WAYS = ("hf", "gguf", "int8", "int4", "nf4", "adapter")
LONGEST_CONTEXT = 1024  # tokens of a window in which the two models are compared


def export(
    model: str, to: str = "hf", out: str | None = None, data: str | None = None, kind: str = "f16", group: int = 64,
    zero_point: bool | None = None, double: bool = False, head: bool | None = None, tokens: int = 8192,
    adapter: tuple[str, ...] = (), device: str = "auto",
) -> None:  # fmt: skip
    """Write a model for other tools, as a folder or for llama.cpp, or quantized, with what that costs in quality.

    Adapters are merged into it; or one is written by itself.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, a model of llama2.c, or hf:owner/name
        to: hf for a folder that other tools open, gguf for a file of llama.cpp; int8, int4 or nf4 for fewer bits per
            weight, which groundup opens; adapter for the adapter of MODEL alone, as PEFT opens it
        out: the new folder or file; default the model's name with -hf, -int8, .gguf, … behind it, in this folder
        data: text to measure the loss of quality on: a file, a folder, stdlib, a named source, or hf:owner/name
        kind: gguf: how matrices are written: f32, f16, q8_0 or q4_0
        group: int4, nf4: weights that share a scale: 32, 64 or 128; fewer are more exact and take more room
        zero_point: int4: a zero point per group, which lets the codes reach just as far as the weights do; default true
        double: nf4: the scales in eight bits too
        head: int8, int4, nf4: the head too, where it is not the embedding as well, in int8; default true, of nf4 false
        tokens: measure on at most so many tokens of --data
        adapter: an adapter to put on it: a folder, a run or hf:owner/name; may be given several times, for their sum
        device: auto, cpu, cuda, cuda:1, mps
    """
    if to not in WAYS:
        raise UsageError(f"--to {to} is not one of {', '.join(WAYS)}.{nearest(to, WAYS)}")
    if tokens < 1:
        raise UsageError(f"--tokens {tokens}: at least one is needed.")
    if to in ("hf", "gguf", "adapter"):
        _refuse_options(
            to, group=group != 64, zero_point=bool(zero_point), double=double, head=bool(head),
            data=data is not None and to != "gguf",
        )  # fmt: skip
    from groundup.data import open_source
    from groundup.inference import load
    from groundup.model.weights.gguf import save_gguf

    text = None if data is None else open_source(data)
    target = _target(model, to, kind, out)
    if to == "adapter":
        say(_adapter_alone(model, adapter, target))
        return
    if _is_classifier(model):
        say(_classifier(model, to, adapter, target, device))
        return
    lm = load(model, adapters=adapter, device=device)
    _must_be_plain(model, lm.model)
    kept = ""
    if to not in ("hf", "gguf"):
        scheme = {"group": group, "zero_point": to == "int4" if zero_point is None else zero_point, "double": double}
        kept = _quantize(lm.model, to, scheme, to != "nf4" if head is None else head)
    if to == "gguf":
        save_gguf(lm.model, lm.tokenizer, target, kind)  # type: ignore[arg-type]
    else:
        lm.save(target)
    del lm
    original, changed = _read(model, device, adapter), _read(str(target), device)
    loss = None if text is None else _loss(original.lm, changed.lm, text, tokens)
    say(_table(original, changed, to, loss))
    for line in _remarks(to, kept, loss, target):
        say(line)


def _target(model: str, to: str, kind: str, out: str | None) -> Path:
    """Where it is written."""
    from groundup.inference import find_model

    source = find_model(model).resolve()
    target = Path(_short_name(model) + (f"-{kind}.gguf" if to == "gguf" else f"-{to}") if out is None else out)
    if target.resolve() in (source, source.parent):
        raise UsageError(f"--out {target} is where the model itself lies. Choose a new folder.")
    return target


def _is_classifier(model: str) -> bool:
    from groundup.inference import find_model
    from groundup.posttraining.classifier import ABOUT

    return (find_model(model) / ABOUT).is_file()


def _classifier(model: str, to: str, further: Sequence[str], target: Path, device: str) -> str:
    """Write a classifier for transformers; what was written, in words."""
    from groundup.posttraining import export_classifier, load_classifier

    if to != "hf" or further:
        raise UsageError(f"{model}: a classifier, whose scores only --to hf writes, without --adapter.")
    found = load_classifier(model, device=device)
    export_classifier(found, target)
    names = ", ".join(found.classes[:4]) + (" …" if len(found.classes) > 4 else "")
    return (
        f"{target}: {len(found.classes)} classes ({names}). transformers opens it, with "
        "AutoModelForSequenceClassification, and so does groundup classify."
    )


def _must_be_plain(name: str, model: Transformer) -> None:
    from groundup.model.weights.quantized_folder import Quantization

    if (found := Quantization.of(model)) is not None:
        raise UsageError(f"{name}: quantized already ({found.scheme.kind}). Export the model that it was made from.")


def _adapter_alone(model: str, further: Sequence[str], target: Path) -> str:
    """Write the folder of an adapter without what a run keeps beside it; what was written, in words."""
    from groundup.inference import find_model
    from groundup.inference.adapters import find_parts
    from groundup.model.adapter_model import AdapterNote, copy_adapter, describe_adapter, is_adapter
    from groundup.runtime import atomic_folder
    from groundup.runtime.files import verify_folder
    from groundup.tokenizer import Tokenizer

    source = find_model(model)
    if further:
        raise UsageError("--to adapter writes the adapter of MODEL as it is: leave --adapter out.")
    if not is_adapter(source):
        raise UsageError(f"{model}: a whole model, not an adapter. --to adapter is for a run that trained one.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: is here already and would be lost. Choose a new folder with --out.")
    verify_folder(source)
    with atomic_folder(target) as place:
        copy_adapter(source, place)
        if (tokenizer := find_parts(model).tokenizer) == source:
            Tokenizer.load(tokenizer).save(place)
    lines, note = [describe_adapter(target)], AdapterNote.read(target)
    if note.tokens and note.vocab_size is not None:
        lines.append(f"It brings tokens; for PEFT give its base as many: resize_token_embeddings({note.vocab_size}).")
    return "\n".join([*lines, f"written: {target}"])


def _short_name(model: str) -> str:
    """What a model is called, without where it lies."""
    if model.startswith("hf:"):
        return model.partition("@")[0].rpartition("/")[2]
    return Path(model).resolve().name.removesuffix(".bin").removesuffix(".gguf")


def _refuse_options(to: str, **given: bool) -> None:
    wrong = next((name for name, value in given.items() if value), None)
    if wrong is not None:
        raise UsageError(f"--{wrong.replace('_', '-')} is for quantized models; --to {to} leaves weights as they are.")


def _quantize(model: Transformer, to: str, scheme: dict[str, Any], head: bool) -> str:
    """Quantize in place; what was left as it was, in words."""
    from groundup.model.quantized import nbytes, quantize_model

    tied = model.config.tie_embeddings
    quantize_model(model, to, **scheme)  # type: ignore[arg-type]
    if head and not tied:
        quantize_model(model, "int8", skip=["embedding"])  # nothing else is left
    left = sum(parameter.nbytes for parameter in model.parameters())
    names = ["the head, which is the embedding too"] if tied else [] if head else ["the head"]
    kept = ", ".join([*names, "embeddings and norms"])
    return f"Left as they were: {kept}: {byte_size(left)} of {byte_size(nbytes(model))}."


@dataclass(frozen=True)
class _Folder:
    """A model as it was read, its bytes on the disk, and how long reading took in seconds."""

    lm: LanguageModel
    nbytes: int
    seconds: float


def _read(name: str, device: str, adapters: Sequence[str] = ()) -> _Folder:
    from groundup.inference import load
    from groundup.inference.adapters import find_parts

    started = time.perf_counter()
    lm = load(name, adapters=adapters, device=device)
    seconds = time.perf_counter() - started
    return _Folder(lm, sum(file.stat().st_size for file in find_parts(name, adapters).weights), seconds)


def _loss(original: LanguageModel, changed: LanguageModel, text: Source, most: int) -> Divergence:
    """Both models on the beginning of some text, whose documents follow each other."""
    import numpy as np

    from groundup.evaluation import bytes_per_token, divergence

    tokenizer, ids = original.tokenizer, list[int]()
    start = original.prompt_ids("the")[: -len(tokenizer.encode("the"))]  # what stands before every document
    for document in text:
        ids += [*(start if ids else []), *tokenizer.encode(document.text)]
        if len(ids) >= most:
            break
    context = min(original.model.config.context_length, LONGEST_CONTEXT)
    start_id = start[-1] if start else (ids or [0])[0]
    return divergence(
        original.model, changed.model, np.array(ids[:most]), bytes_per_token(tokenizer), context, start_id=start_id
    )


def _table(original: _Folder, changed: _Folder, to: str, loss: Divergence | None) -> Table:
    columns = ["weights on disk", "read in"]
    cells: list[list[Any]] = [[byte_size(f.nbytes), f"{f.seconds:.2f} s"] for f in (original, changed)]
    if loss is not None:
        columns += ["perplexity", "bits per byte", "KL per token", "same first choice"]
        cells[0] += [f"{loss.perplexity:.3f}", f"{loss.bits_per_byte:.4f}", "", ""]
        cells[1] += [f"{loss.changed_perplexity:.3f}", f"{loss.changed_bits_per_byte:.4f}"]
        cells[1] += [f"{loss.kl:.5f}", f"{loss.agreement:.1%}"]
    table = figures_table("model", *columns)
    for name, row in zip(("original", to), cells, strict=True):
        add_row(table, name, *row)
    return table


def _remarks(to: str, kept: str, loss: Divergence | None, target: Path) -> list[str]:
    lines = [kept] if kept else []
    if loss is not None:
        context = f"measured on {loss.n_tokens:,} tokens ({byte_size(loss.n_bytes)})"
        lines.append(f"KL(original || {to}) in nats, 99% of tokens below {loss.kl_99:.4f}; {context}.")
    elif to != "hf":
        lines.append("What it costs in quality was not measured: give a text with --data.")
    return [*lines, f"written: {target}"]


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and export."""
    call(export, "export", arguments)
