"""What one contender of the decoding benchmark does in a process of its own; see decode.py.

    python benchmarks/decode_jobs.py    jobs as lines of JSON on standard input, for each a line on standard output

All decode greedily with the same weights, in the precision that is asked for, on as many threads.
"""

# B batch   V vocabulary

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import transformers
from attention_jobs import Job, serve

from groundup.inference import Engine, EngineSettings, Request, SamplingParams
from groundup.inference.speed import memory_bandwidth, time_decoding, weights_read
from groundup.model import load_model
from groundup.model.parts import cache_bytes

GREEDY = SamplingParams(temperature=0.0, ignore_end=True, max_tokens=1)
GGUF = {"float32": "f32", "16-bit": "f16", "8-bit": "q8_0", "4-bit": "q4_0"}


def prompts_of(job: Job) -> list[list[int]]:
    """Token ids, the same for all contenders."""
    rng = np.random.default_rng(7)
    lengths = job.get("lengths") or [job["prompt"]] * job["batch"]
    return [rng.integers(1, job["vocab_size"], length).tolist() for length in lengths]


# ---- ours


def our_model(job: Job) -> Any:
    """The model in the precision of the job; what is quantized computes the rest in bfloat16."""
    place = Path(job["folder"]) / {"8-bit": "int8", "4-bit": "int4"}.get(job["way"], "hf")
    return load_model(place, dtype=torch.float32 if job["way"] == "float32" else torch.bfloat16)


def wanted(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_end=True, max_tokens=count)


def our_decoding(job: Job) -> Job:
    """Seconds to read the prompts, and of each step after that."""
    engine = Engine(our_model(job), settings=EngineSettings(prefix_cache=False))
    for new in (8, job["new"]):  # the first time compiles, and touches memory
        requests = [Request(prompt, wanted(new), live=False) for prompt in prompts_of(job)]
        ends = time_decoding(engine, requests)
    produced = sum(len(request.tokens) - 1 for request in requests)
    decode = (ends[-1] - ends[0]) / produced if produced else 0.0
    found = {"read": ends[0], "decode": decode, "tokens": [request.tokens for request in requests]}
    if not produced:
        return found
    length = job["prompt"] + job["new"] // 2
    kept = cache_bytes(engine.model.config, job["batch"], length, engine.model.embedding.weight.element_size())
    step_bytes = weights_read(engine.model) + kept
    return found | {"step_bytes": step_bytes, "memory": memory_bandwidth(torch.device("cpu"))}


def our_crowd(job: Job) -> Job:
    """Many requests of unequal lengths; the share of the cache that was held for nothing."""
    engine = Engine(our_model(job), settings=EngineSettings(prefix_cache=False))
    for small in (True, False):
        requests = [
            Request(prompt, wanted(2 if small else new), live=False)
            for prompt, new in zip(prompts_of(job), job["news"], strict=True)
        ]
        waste = []
        started = time.perf_counter()
        for request in requests:
            engine.add(request)
        while engine.busy:
            engine.step()
            texts = engine.scheduler.running
            held = sum(group.pool.held for group in engine.paged.groups) * engine.paged.size
            used = sum(text.length for text in texts) * len(engine.paged.groups)
            if held:
                waste.append(1 - min(1.0, used / held))
    return {"seconds": time.perf_counter() - started, "waste": median(waste)}


def our_gaps(job: Job) -> Job:
    """Seconds between the tokens of streams, before and while a long prompt is read."""
    engine = Engine(our_model(job), settings=EngineSettings(prefix_cache=False))
    streams = [Request(prompt, wanted(100_000)) for prompt in prompts_of(job)]
    for stream in streams:
        engine.add(stream)
    long = Request(prompts_of({"lengths": [job["long"]], "vocab_size": job["vocab_size"]})[0], wanted(1))
    gaps: dict[str, list[float]] = {"usual": [], "reading": []}
    last = time.perf_counter()
    for step in range(100_000):
        engine.step()
        now = time.perf_counter()
        if step >= 20:
            gaps["usual" if step < 300 else "reading"].append(now - last)
        last = now
        if step == 299:
            engine.add(long)
        if long.finish is not None:
            break
    for _ in range(60):  # the texts are longer now: what does a token take them by themselves?
        engine.step()
        now = time.perf_counter()
        gaps.setdefault("after", []).append(now - last)
        last = now
    usual, reading, after = gaps["usual"], gaps["reading"], gaps["after"]
    p99 = quantiles(reading, n=100)[98]
    return {"usual": median(usual), "usual_p99": quantiles(usual, n=100)[98], "after": median(after), "p99": p99,
            "median": median(reading), "ratio": p99 / median(usual), "read": sum(reading),
            "longer": len(reading)}  # fmt: skip


# ---- theirs


def their_model(job: Job) -> Any:
    dtype = torch.float32 if job["way"] == "float32" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(Path(job["folder"]) / "hf", dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def their_decoding(job: Job) -> Job:
    """The time of one new token is that of reading; the others are what more tokens add."""
    model, ids_BT = their_model(job), torch.tensor(prompts_of(job))
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids_BT), "pad_token_id": 0}
    model.generate(ids_BT, max_new_tokens=2, **options)
    started = time.perf_counter()
    model.generate(ids_BT, max_new_tokens=1, **options)
    read = time.perf_counter()
    found = model.generate(ids_BT, max_new_tokens=job["new"], **options)
    both = time.perf_counter() - read
    produced = len(ids_BT) * (job["new"] - 1)
    decode = (both - (read - started)) / produced if produced else 0.0
    return {"read": read - started, "decode": decode, "tokens": found[:, ids_BT.shape[1] :].tolist()}


@torch.inference_mode()
def their_crowd(job: Job) -> Job:
    """The same requests, padded to one batch."""
    model, prompts = their_model(job), prompts_of(job)
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "attention_mask": mask_BT, "pad_token_id": 0}
    model.generate(ids_BT, max_new_tokens=2, **options)
    started = time.perf_counter()
    model.generate(ids_BT, max_new_tokens=max(job["news"]), **options)
    return {"seconds": time.perf_counter() - started}


def their_continuous(job: Job) -> Job:
    """The same requests through what ``generate_batch`` stands on, which takes a limit for each."""
    model, prompts, seconds = their_model(job), prompts_of(job), 0.0
    config = transformers.GenerationConfig(
        max_new_tokens=max(job["news"]), do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    for news in ([2] * len(prompts), job["news"]):
        manager = model.init_continuous_batching(generation_config=config)
        manager.start()
        started, done = time.perf_counter(), 0
        for prompt, new in zip(prompts, news, strict=True):
            manager.add_request(prompt, max_new_tokens=new)
        while done < len(prompts):
            result = manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                done += 1
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped")
        seconds = time.perf_counter() - started
        manager.stop(block=True)
    return {"seconds": seconds}


def llama_decoding(job: Job) -> Job:
    """Through the functions of llama.h: its Python class decodes one text at a time."""
    import ctypes

    import llama_cpp as ll

    ll.llama_log_set(_QUIET(ll), ctypes.c_void_p(0))
    ll.llama_backend_init()
    path = Path(job["folder"]) / f"{GGUF[job['way']]}.gguf"
    model = ll.llama_model_load_from_file(os.fsencode(path), ll.llama_model_default_params())
    prompts, params = prompts_of(job), ll.llama_context_default_params()
    B, most = len(prompts), max(len(prompts[0]), len(prompts))
    params.n_ctx = B * (job["prompt"] + job["new"] + 64)
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = B
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    if hasattr(params, "kv_unified"):
        params.kv_unified = True
    context = ll.llama_init_from_model(model, params)
    memory = ll.llama_get_memory(context)
    V = job["vocab_size"]
    batch = ll.llama_batch_init(max(most, 512), 0, 1)

    def compute(rows: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Tokens, their places and sequences; the likeliest next token after those that ask for it."""
        batch.n_tokens = len(rows)
        for n, (token, place, sequence, asks) in enumerate(rows):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, place, 1, asks
            batch.seq_id[n][0] = sequence
        if ll.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        asked = [n for n, row in enumerate(rows) if row[3]]
        return np.array([np.ctypeslib.as_array(ll.llama_get_logits_ith(context, n), (V,))[:V].argmax() for n in asked])

    for new in (8, job["new"]):
        ll.llama_memory_clear(memory, True)
        started = time.perf_counter()
        last = []
        for sequence, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), 512):
                piece = prompt[begin : begin + 512]
                end = begin + len(piece)
                rows = [(t, begin + n, sequence, begin + n == len(prompt) - 1) for n, t in enumerate(piece)]
                found = compute(rows)
            last.append(int(found[0]))
        read = time.perf_counter()
        texts = [[token] for token in last]
        for step in range(new - 1):
            rows = [(text[-1], len(prompts[n]) + step, n, True) for n, text in enumerate(texts)]
            for text, token in zip(texts, compute(rows), strict=True):
                text.append(int(token))
        done = time.perf_counter()
    del end
    produced = B * (job["new"] - 1)
    return {"read": read - started, "decode": (done - read) / produced if produced else 0.0, "tokens": texts}


def _QUIET(ll: Any) -> Any:  # noqa: N802  a callback that must outlive the call
    global _quiet
    _quiet = ll.llama_log_callback(lambda level, text, data: None)
    return _quiet


_quiet: Any = None

CONTENDERS = {
    "decode": {"groundup": our_decoding, "transformers": their_decoding, "llama.cpp": llama_decoding},
    "crowd": {"groundup": our_crowd, "transformers": their_crowd, "transformers, continuous": their_continuous},
    "gaps": {"groundup": our_gaps},
}


def run(job: Job) -> Job:
    """One contender at one kind of work."""
    torch.set_num_threads(job["threads"])
    return CONTENDERS[job["kind_of_work"]][job["contender"]](job)


def main() -> None:
    """Take jobs until there are no more."""
    import importlib

    importlib.import_module("transformers.models.llama.modeling_llama")
    gc.collect()
    gc.freeze()
    serve({"work": run})


if __name__ == "__main__":
    main()
