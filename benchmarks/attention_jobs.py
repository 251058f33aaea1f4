"""What one contender of the attention benchmark does in a process of its own.

    python benchmarks/attention_jobs.py     jobs as lines of JSON on standard input, for each a line on standard output

This process imports the libraries and computes nothing. Each job runs in a fork of it: it begins with the same memory
as all others, leaves nothing behind, and may be killed for want of memory without taking the benchmark along.
"""

# B batch   T positions   E embedding   M tokens

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from attention_kinds import PIECE
from torch import Tensor, nn

from groundup.model import KVCache, Transformer, language_model_loss, load_model
from groundup.model.experts import MixtureOfExperts
from groundup.model.latent_attention import LatentAttention

TOKENS = 16  # decoded one after the other; their median time counts
COMPARED = 32  # last positions whose output is kept for comparing
Job = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A model of one layer, ours or theirs, behind the same three calls.

    Args:
        module: the model.
        forward: ids B T to what stands above the last norm, B T E.
        cache: makes an empty cache for so many positions.
        cached: the same as ``forward`` for ids that follow what the cache holds.
        cache_bytes: what a cache holds.
        absorbed: latent attention that makes no keys and values: only with a cache.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    cache: Callable[[int], Any]
    cached: Callable[[Tensor, Any], Tensor]
    cache_bytes: Callable[[Any], int]
    absorbed: bool = False


def contender_of(job: Job) -> Contender:
    """The job's model, with the weights that all contenders have."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    package, _, way = job["contender"].partition(", ")
    if package == "transformers":
        return their_model(Path(job["folder"]), way, device, dtype)
    model = load_model(Path(job["folder"]), device=device, dtype=dtype)
    return our_model(model, way, device, dtype)


def our_model(model: Transformer, way: str, device: torch.device, dtype: torch.dtype) -> Contender:
    """This package's model with one backend; latent attention in the form that ``way`` names."""
    backend, _, form = way.partition(", ")
    assert backend in ("explicit", "sdpa", "flex")
    model.backend = backend  # type: ignore[assignment]
    if form:
        for module in model.modules():
            if isinstance(module, LatentAttention):
                fixed = MethodType(lambda self, queries: form == "absorbed", module)
                module._absorbing_pays = fixed  # type: ignore[method-assign]
    return Contender(
        model,
        model.features,
        lambda length: KVCache(model.config, 1, length, device=device, dtype=dtype),
        model.features,
        lambda cache: cache.nbytes,
        absorbed=form == "absorbed",
    )


def their_model(folder: Path, way: str, device: torch.device, dtype: torch.dtype) -> Contender:
    """transformers' model of the same folder."""
    name = {"flex": "flex_attention"}.get(way, way)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation=name, dtype=dtype).to(device)

    def nbytes(cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    return Contender(
        model,
        lambda ids: model(ids, use_cache=False).last_hidden_state,
        lambda length: transformers.DynamicCache(config=model.config),
        lambda ids, cache: model(ids, past_key_values=cache, use_cache=True).last_hidden_state,
        nbytes,
    )


# ---- one layer of attention


def attention_job(job: Job) -> Job:
    """Seconds, or peak bytes, of the phases of one contender at one length; the output goes to a file."""
    it, length = contender_of(job), job["length"]
    generator = torch.Generator().manual_seed(7)
    ids_BT = torch.randint(job["vocab_size"], (1, length + TOKENS), generator=generator).to(job["device"])
    measure = peak_of_phase if job["measure"] == "memory" else partial(time_of_phase, job["seconds"])
    result: Job = {"threads": torch.get_num_threads(), "failed": {}}
    for phase in job["phases"]:
        try:
            result[phase] = measure(it, phase, ids_BT)
        except Exception as error:  # a backend that lacks this phase still has the others
            result["failed"][phase] = reason(error)
    if "output" in job:
        with torch.inference_mode():
            cache = filled(it, ids_BT[:, :length], length)
            result["cache_bytes_per_token"] = it.cache_bytes(cache) / length
            out_BTE = forward_pass(it, ids_BT)[:, -COMPARED:]
            next_BTE = torch.cat(decoded(it, ids_BT)[1], dim=1)
        np.savez(job["output"], forward=as_array(out_BTE), decoding=as_array(next_BTE))
    return result


def time_of_phase(seconds: float, it: Contender, phase: str, ids_BT: Tensor) -> float:
    """Seconds of one pass over the context, or of one token after it."""
    if phase == "decoding":
        return median(decoded(it, ids_BT)[0])
    return time_of(partial(PASSES[phase], it, ids_BT), ids_BT.device, seconds)


def peak_of_phase(it: Contender, phase: str, ids_BT: Tensor) -> int | None:
    """Bytes held at once; in decoding, those of the cache are among them, those of filling it are not."""
    device, few = ids_BT.device, ids_BT[:, : 8 + TOKENS]
    if phase != "decoding":
        PASSES[phase](it, few)  # what is loaded at first use is not attention's memory; the gradients are
        it.module.zero_grad(set_to_none=True)
        return peak_of(partial(PASSES[phase], it, ids_BT), device)
    decoded(it, few)
    before = forget_peak(device)
    with torch.inference_mode():
        cache = filled(it, ids_BT[:, :-TOKENS], ids_BT.shape[1])
        again = forget_peak(device)
        for token_B1 in ids_BT[:, -TOKENS:].split(1, dim=1):
            it.cached(token_B1, cache)
    return None if before is None or again is None else peak(device) - before


def forward_pass(it: Contender, ids_BT: Tensor) -> Tensor:
    """Ids of the context in, features out; with nothing kept for a backward pass."""
    it.module.eval()
    ids_BT = ids_BT[:, :-TOKENS]
    with torch.inference_mode():
        return it.cached(ids_BT, it.cache(ids_BT.shape[1])) if it.absorbed else it.forward(ids_BT)


def training_pass(it: Contender, ids_BT: Tensor) -> Tensor:
    """The same, and the gradients of all weights."""
    it.module.train()
    it.module.zero_grad(set_to_none=True)
    out_BTE = it.forward(ids_BT[:, :-TOKENS])
    out_BTE.float().square().mean().backward()
    return out_BTE.detach()


PASSES = {"forward": forward_pass, "training": training_pass}


def decoded(it: Contender, ids_BT: Tensor) -> tuple[list[float], list[Tensor]]:
    """One token at a time after a context that is in the cache: seconds and features of each, B 1 E."""
    it.module.eval()
    times, found = [], []
    with torch.inference_mode():
        cache = filled(it, ids_BT[:, :-TOKENS], ids_BT.shape[1])
        for token_B1 in ids_BT[:, -TOKENS:].split(1, dim=1):
            settle(ids_BT.device)
            started = time.perf_counter()
            found.append(it.cached(token_B1, cache))
            settle(ids_BT.device)
            times.append(time.perf_counter() - started)
    return times, found


def filled(it: Contender, ids_BT: Tensor, capacity: int) -> Any:
    """A cache that holds these ids."""
    cache = it.cache(capacity)
    for piece_BT in ids_BT.split(PIECE, dim=1):
        it.cached(piece_BT, cache)
    return cache


def as_array(x: Tensor) -> Any:
    return x.float().cpu().numpy()


def reason(error: BaseException) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


# ---- whole models


def gpt2_job(job: Job) -> Job:
    """Seconds of forward and backward pass of GPT-2 with next-token loss, and the loss itself."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    generator = torch.Generator().manual_seed(11)
    ids_BT = torch.randint(50_257, (job["batch"], job["length"] + 1), generator=generator).to(device)
    inputs_BT, targets_BT = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()
    package, _, way = job["contender"].partition(", ")
    model: Any
    if package == "transformers":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["folder"], attn_implementation=way, dtype=dtype
        ).to(device)
    else:
        model = load_model(Path(job["folder"]), device=device, dtype=dtype)
    model.train()

    def loss_of() -> Tensor:
        if package == "groundup" and way == "its own loss":
            return language_model_loss(model.features(inputs_BT), model.head.weight, targets_BT)
        logits_BTV = model(inputs_BT, use_cache=False).logits if package == "transformers" else model(inputs_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        return loss.detach()

    if job["measure"] == "memory":
        step()
        model.zero_grad(set_to_none=True)
        return {"training": peak_of(step, device)}
    seconds = time_of(step, device, job["seconds"])
    norm = torch.stack([parameter.grad.float().norm() for parameter in model.parameters()]).norm()
    return {"training": seconds, "loss": step().item(), "gradient_norm": norm.item()}


def experts_job(job: Job) -> Job:
    """Seconds of the forward pass of one mixture of experts; its output goes to a file."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    package, _, way = job["contender"].partition(", ")
    if package == "transformers":
        chosen = {} if way == "default" else {"experts_implementation": way}
        whole: Any = transformers.AutoModel.from_pretrained(job["folder"], dtype=dtype, **chosen).to(device)
        layer, used = whole.layers[0].mlp, whole.config._experts_implementation
    else:
        model = load_model(Path(job["folder"]), device=device, dtype=dtype).eval()
        layer, used = next(module for module in model.modules() if isinstance(module, MixtureOfExperts)), ""
    generator = torch.Generator().manual_seed(5)
    x_BTE = torch.randn(1, job["tokens"], job["n_embd"], generator=generator).to(device, dtype)
    layer.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            return layer(x_BTE)

    seconds = time_of(run, device, job["seconds"])
    if "output" in job:
        np.savez(job["output"], forward=as_array(run()))
    return {"forward": seconds, "implementation": used}


# ---- seconds and bytes


def settle(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_of(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median seconds of a call, repeated for so long, after one that pays for what is made once."""
    run()
    times: list[float] = []
    began = time.perf_counter()
    while not times or (time.perf_counter() - began < seconds and len(times) < 200):
        settle(device)
        started = time.perf_counter()
        run()
        settle(device)
        times.append(time.perf_counter() - started)
    return median(times)


def peak_of(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a call holds at once, beyond what was there before; None where that cannot be told."""
    before = forget_peak(device)
    run()
    return None if before is None else peak(device) - before


def forget_peak(device: torch.device) -> int | None:
    """Measure the peak from now on; returns the bytes that are held now, or None where the system keeps the peak."""
    if device.type == "cuda":
        settle(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
        before = status("VmRSS")
        return before if status("VmHWM") < before + (4 << 20) else None
    except OSError:
        return None


def peak(device: torch.device) -> int:
    """The most bytes held at once since then."""
    settle(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def status(field: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ---- taking jobs

JOBS = {"attention": attention_job, "gpt2": gpt2_job, "experts": experts_job}


def in_a_fork(job: Job, jobs: Mapping[str, Callable[[Job], Job]]) -> Job:
    """Run a job in a fork of this process and return what it says, or ``{"failed": why}``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = jobs[job["job"]](job)
        except BaseException as error:
            answer = {"failed": reason(error)}
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)  # without the cleaning up of what the parent still uses
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, state = os.waitpid(child, 0)
    return json.loads(said) if said else {"failed": f"the process ended by signal {os.WTERMSIG(state)}"}


def import_what_jobs_need() -> None:
    """Once, here: what a fork imports, the next one imports again."""
    importlib.import_module("torch.nn.attention.flex_attention")
    for name in ("llama", "mistral", "mixtral", "deepseek_v3", "gpt_oss", "gemma2", "gpt2"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def serve(jobs: Mapping[str, Callable[[Job], Job]]) -> None:
    """Take jobs as lines of JSON, by name, until there are no more; answer each with a line."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(in_a_fork(json.loads(line), jobs)), file=out, flush=True)


def main() -> None:
    """Take jobs."""
    import_what_jobs_need()
    serve(JOBS)


if __name__ == "__main__":
    main()
