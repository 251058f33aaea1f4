"""Adapters as models: found with their base, summed, merged or changed between calls."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groundup
from fake_hub import FakeHub, nobody
from groundup.inference import EngineSettings, LanguageModel, SamplingParams, find_model, read_model_config
from groundup.inference.graphs import StepGraphs
from groundup.model import Transformer, load_model, quantize_model
from groundup.model.adapter_model import absorb, save_adapter_model, stack_adapters
from groundup.model.adapters import LoraConfig, adapted_layers, add_adapter, merge
from groundup.model.quantized import QuantizedLinear, Scheme
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.files import write_checksums
from groundup.tokenizer import Tokenizer

Make = Callable[..., Path]
GREEDY: dict[str, Any] = dict(max_tokens=12, temperature=0.0)
PROMPTS = ["the cat sat on the mat", "the dog", "naïve 中文"]


def stirred(model: Transformer, seed: int, **fields: Any) -> Transformer:
    """An adapter as after training: no B is 0."""
    torch.manual_seed(seed)
    add_adapter(model, LoraConfig(**{"rank": 2, "alpha": 4.0} | fields))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora("default").B, std=0.3)
    return model.eval()


@pytest.fixture
def base(lm: LanguageModel, tmp_path: Path) -> Path:
    lm.save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """A function that saves an adapter by name."""

    def made(name: str, seed: int = 1, on: Path = base, written: str | None = None, **fields: Any) -> Path:
        model = stirred(groundup.load(on, device="cpu").model, seed, **fields)
        save_adapter_model(model, tmp_path / name, str(on) if written is None else written)
        return tmp_path / name

    return made


def load(*names: Path | str, **options: Any) -> LanguageModel:
    return groundup.load(names[0], adapters=names[1:], device="cpu", **options)


def texts(lm: LanguageModel) -> list[str]:
    return lm.generate(PROMPTS, **GREEDY)


def logits(lm: LanguageModel, ids: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return lm.model(torch.arange(31)[None] * 7 if ids is None else ids)


def fails(*names: Path | str, kind: type[GroundupError] = GroundupError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(*names, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- as MODEL


def test_an_adapter_is_its_base_with_it(make: Make, base: Path, lm: LanguageModel) -> None:
    adapter = make("style")
    expected = LanguageModel(stack_adapters(load_model(base), {"style": adapter}), lm.tokenizer)
    merged, kept = load(adapter), load(adapter, merge=False)
    assert torch.equal(logits(kept), logits(expected))
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-4)
    assert texts(merged) == texts(kept) == texts(load(base, adapter)) == texts(expected)
    assert texts(merged) != texts(lm)
    assert (merged.adapters, kept.adapters) == ([], ["style"])
    assert all(parameter.requires_grad for parameter in merged.model.parameters()), "as any model"
    name = "blocks.1.attention.q.weight"
    half = load(adapter, dtype="bfloat16").model.get_parameter(name)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), merged.model.get_parameter(name), rtol=1e-2, atol=1e-2)


def test_a_run_whose_checkpoints_are_adapters(make: Make, base: Path, tmp_path: Path) -> None:
    for step, seed in (("step-000001", 1), ("step-000002", 2)):
        shutil.move(make("made", seed), tmp_path / "run" / "checkpoints" / step)
        write_checksums(tmp_path / "run" / "checkpoints" / step)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "latest").symlink_to("step-000002")
    assert find_model(tmp_path / "run") == (folder / "step-000002").resolve()
    (folder / "best").symlink_to("step-000001")
    assert find_model(tmp_path / "run") == (folder / "step-000001").resolve()
    assert texts(load(tmp_path / "run")) == texts(load(folder / "step-000001")) != texts(load(folder / "step-000002"))
    assert load(base, tmp_path / "run", folder / "step-000002", merge=False).adapters == ["run", "run-2"]
    content = bytearray((folder / "step-000001" / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "step-000001" / "adapter_model.safetensors").write_bytes(content)
    assert "adapter_model.safetensors: damaged" in fails(tmp_path / "run")


def test_the_tokenizer_and_the_end_are_the_adapters_own_where_it_has_them(
    make: Make, base: Path, lm: LanguageModel, tmp_path: Path
) -> None:
    adapter = make("style")
    assert load(adapter).tokenizer.fingerprint == lm.tokenizer.fingerprint
    own = Tokenizer.train(["a dog and a cat " * 20], 290, show_progress=False)
    own.save(adapter)
    (adapter / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    for found in (load(adapter), load(base, adapter), load(base, make("other", 3), adapter)):
        assert found.tokenizer.fingerprint == own.fingerprint
    assert {5, 7} <= load(adapter).engine.end_of_text
    assert not {5, 7} & load(base).engine.end_of_text


def test_tokens_that_an_adapter_brings(base: Path, lm: LanguageModel, make: Make, tmp_path: Path) -> None:
    from groundup.model import resize_embeddings
    from groundup.model.token_rows import add_token_rows
    from groundup.posttraining.vocabulary import with_template

    tokenizer, new = with_template(lm.tokenizer, "chatml")

    def chatty(name: str, seed: int) -> Transformer:
        """An adapter with rows for the marks of a template."""
        model = resize_embeddings(load_model(base), tokenizer.vocab_size, lm.tokenizer.vocab_size)
        stirred(quantize_model(model, "nf4", group=32), seed)
        add_token_rows(model, "default", range(lm.tokenizer.vocab_size, tokenizer.vocab_size))
        nn.init.normal_(model.embedding.rows("default").weight, std=0.5)
        save_adapter_model(model, tmp_path / name, str(base), Scheme("nf4", 32))
        tokenizer.save(tmp_path / name)
        return model

    model = chatty("chat", 5)
    kept = load(tmp_path / "chat", merge=False)
    assert new
    assert kept.tokenizer.chat_template is not None
    assert torch.equal(logits(kept), logits(LanguageModel(model, tokenizer)))
    assert isinstance(kept.model.get_submodule("blocks.0.attention.q.base"), QuantizedLinear)
    size = read_model_config(tmp_path / "chat").vocab_size
    assert size == kept.model.config.vocab_size == tokenizer.vocab_size > read_model_config(base).vocab_size
    merged = load(tmp_path / "chat")
    torch.testing.assert_close(logits(merged), logits(kept), rtol=1e-3, atol=1e-3)
    merged.save(tmp_path / "whole")
    assert texts(load(tmp_path / "whole")) == texts(merged)
    again = load(tmp_path / "chat", requantize=True)
    assert isinstance(again.model.get_submodule("blocks.0.attention.q"), QuantizedLinear)
    lm.tokenizer.save(make("style"))
    both = load(base, tmp_path / "style", tmp_path / "chat", merge=False)
    assert both.tokenizer.fingerprint == tokenizer.fingerprint, "of the one with tokens, not of the first"
    both.use_adapters("chat")
    assert torch.equal(logits(both), logits(kept))
    ids, params = kept.prompt_ids("the cat sat on the mat " * 9), SamplingParams.of(**GREEDY)
    requests = [kept.generation(ids, params).request for _ in range(2)]
    held = []
    for one in requests:
        list(kept.engine.run([one]))
        held.append(kept.model.embedding.weight)  # made anew each time: no sign that the model has moved
    assert requests[1].cached > 0, "the cache is not lost between requests"
    # Two that bring the same tokens: each with its own rows, and with the means of both where both are used.
    other = LanguageModel(chatty("other", 6), tokenizer)
    pair = load(base, tmp_path / "chat", tmp_path / "other", merge=False)
    said = {}
    for names in (("chat",), ("other",), ("chat", "other"), ()):
        pair.use_adapters(*names)
        said[names] = texts(pair), logits(pair)
    assert torch.equal(said["chat",][1], logits(kept))
    assert torch.equal(said["other",][1], logits(other))
    assert said["chat",][0] == texts(kept)
    pair.use_adapters("chat", "other")
    rows = [pair.model.embedding.rows(name).weight for name in ("chat", "other")]
    torch.testing.assert_close(pair.model.embedding.weight[-len(new) :], sum(rows) / 2)
    assert torch.equal(pair.model.head.weight, pair.model.embedding.weight) == pair.model.config.tie_embeddings
    summed = load(base, tmp_path / "chat", tmp_path / "other")
    torch.testing.assert_close(logits(summed), said["chat", "other"][1], rtol=1e-3, atol=1e-3)
    further, _ = with_template(lm.tokenizer, "llama3")
    further.save(tmp_path / "other")
    assert "other: this adapter brings other tokens than" in fails(base, tmp_path / "chat", tmp_path / "other")


def test_an_adapter_on_an_adapter(make: Make, base: Path) -> None:
    """What the lower one adds is in the weights when the upper one has learnt (with DoRA, that makes a difference)."""
    lower = make("lower", 1)
    upper = make("upper", 2, on=lower, dora=True)
    expected = absorb(stack_adapters(load_model(base), {"lower": lower}))
    stack_adapters(expected, {"upper": upper})
    found = load(upper, merge=False)
    assert found.adapters == ["upper"]
    assert torch.equal(logits(found), logits(LanguageModel(expected, found.tokenizer)))
    assert texts(load(lower, upper)) == texts(found), "also where the lower one is MODEL"
    assert texts(load(upper)) == texts(found)
    assert load(lower, make("beside", 3), merge=False).adapters == ["lower", "beside"]
    assert "this adapter is for" in fails(base, upper)
    assert "this adapter is for" in fails(lower, upper, make("beside", 3))
    (lower / "adapter_config.json").write_text(
        (lower / "adapter_config.json").read_text().replace(str(base), str(upper))
    )
    assert "this adapter is on itself" in fails(upper)


# ---- where the base is


@pytest.mark.parametrize("written", ["../base", "models/base", "{base}", "runs/base"])
def test_where_the_base_is(
    written: str, make: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(load(make("style")))
    (tmp_path / "cwd" / "models").mkdir(parents=True)
    shutil.copytree(base, tmp_path / "cwd" / "models" / "base")
    shutil.copytree(base, tmp_path / "cwd" / "runs" / "base" / "checkpoints" / "best")
    monkeypatch.chdir(tmp_path / "cwd")
    assert texts(load(make("style", written=written.format(base=base)))) == expected
    os.chdir(tmp_path)
    if written.startswith(("models", "runs")):  # no such folder, so it may be on the hub
        monkeypatch.setenv("HF_ENDPOINT", nobody())
        message = fails(tmp_path / "style")
        assert f"the adapter's base model {written} is neither in the adapter's folder nor in this one" in message
        assert f"hf:{written}: the hub cannot be reached" in message


def test_a_base_that_is_not_there(make: Make, base: Path, tmp_path: Path) -> None:
    assert "base model /no/where is neither" in fails(make("style", written="/no/where"))
    adapter = make("style", written=str(tmp_path))
    assert f"{adapter}: its base: {tmp_path}: no model here" in fails(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "it does not say which model the adapter is for" in fails(adapter)
    assert texts(load(base, adapter)) == texts(load(make("again")))


def test_another_base(make: Make, base: Path, tiny_model: Callable, lm: LanguageModel, tmp_path: Path) -> None:
    adapter = make("style")
    shutil.copytree(base, tmp_path / "mine")
    assert f"this adapter is for {base}, the model is {tmp_path / 'mine'}. If that is the same model" in fails(
        tmp_path / "mine", adapter
    )
    (tmp_path / "link").symlink_to(base)
    assert texts(load(tmp_path / "link", adapter)) == texts(load(adapter)), "the same folder by another name"
    LanguageModel(tiny_model(lm.tokenizer.vocab_size, n_embd=20), lm.tokenizer).save(base)
    assert "self_attn.q_proj.lora_A.weight has shape [2, 16], this model's blocks.0.attention.q" in fails(adapter)
    assert "this is no adapter" in fails(base, base, kind=UsageError)
    assert "no such folder. Did you mean" in fails(base, tmp_path / "styl", kind=UsageError)
    assert "requantize = true is for merge = true" in fails(base, merge=False, requantize=True, kind=UsageError)


# ---- several


def test_the_sum_of_several_and_any_of_them(make: Make, base: Path) -> None:
    a, b = make("formal.v1", 1), make("short", 2, targets=("q", "down"), rank=3)
    both = load(base, a, b, merge=False)
    assert both.adapters == ["formal_v1", "short"], "a point would be taken for a part of a parameter's name"
    torch.testing.assert_close(logits(load(base, a, b)), logits(both), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(load(a, b)), logits(load(base, a, b)), rtol=0, atol=0)
    found = {"both": logits(both)}
    for names, alone in ((("formal_v1",), load(a, merge=False)), (("short",), load(b, merge=False)), ((), load(base))):
        both.use_adapters(*names)
        found[str(names)] = logits(both)
        assert torch.equal(logits(both), logits(alone))
        assert texts(both) == texts(alone)
    assert len({tuple(one.flatten().tolist()) for one in found.values()}) == 4
    with pytest.raises(UsageError, match=r"there is no adapter called shorter\. Did you mean short\?"):
        both.use_adapters("shorter")
    for lm in (load(base), load(a)):
        with pytest.raises(UsageError, match=r"no adapters that could be changed\. Load it with merge=False"):
            lm.use_adapters("short")


@pytest.mark.parametrize("reuse", [True, False])
def test_the_prefix_cache_serves_nobody_the_keys_of_another_adapter(make: Make, base: Path, reuse: bool) -> None:
    a, b = make("a", 1), make("b", 2)
    settings = EngineSettings(prefix_cache=reuse, block=3)
    both = load(base, a, b, merge=False, settings=settings)
    prompt = "the cat sat on the mat, and the dog sat on the cat"
    expected = {(): load(base), ("a",): load(a), ("b",): load(b), ("a", "b"): load(base, a, b)}
    answers = {names: lm.generate(prompt, **GREEDY) for names, lm in expected.items()}
    assert len(set(answers.values())) == 4
    cached = []
    for names in [("a", "b"), ("a",), ("b",), (), ("a",), ("a", "b"), ("b",)]:
        both.use_adapters(*names)
        generation = both.generation(prompt, SamplingParams(**GREEDY))
        assert "".join(both.pieces(generation)) == answers[names]
        cached.append(generation.request.cached > 0)
    assert cached == [False, False, False, False, reuse, reuse, reuse], "and one that comes back finds its own"


def test_a_request_made_before_the_change_is_computed_after_it(make: Make, base: Path) -> None:
    both = load(base, make("a", 1), make("b", 2), merge=False)
    prompt = "the cat sat on the mat, and the dog sat on the cat"
    both.use_adapters("a")
    both.generate(prompt, **GREEDY)
    waiting = both.generation(prompt, SamplingParams(**GREEDY))
    both.use_adapters("b")
    assert "".join(both.pieces(waiting)) == load(base, make("b", 2)).generate(prompt, **GREEDY)
    assert waiting.request.cached == 0


def test_no_change_while_a_text_is_continued(make: Make, base: Path) -> None:
    both = load(base, make("a", 1), make("b", 2), merge=False)
    both.use_adapters("a")
    expected, stream = both.generate("the cat", **GREEDY), both.stream("the cat", **GREEDY)
    begun = next(stream)
    with pytest.raises(UsageError, match="the weights cannot change while a text is being continued"):
        both.use_adapters("b")
    assert begun + "".join(stream) == expected
    both.use_adapters("b")
    stream = both.stream("the cat", **GREEDY)
    next(stream)
    stream.close()
    both.use_adapters("a")
    assert both.generate("the cat", **GREEDY) == expected


def test_what_was_recorded_with_other_weights_is_not_replayed(make: Make, base: Path) -> None:
    both = load(base, make("a", 1), make("b", 2), merge=False)
    both.generate("the cat", **GREEDY)
    runner = both.engine._runner
    recorded = runner.graphs = StepGraphs(both.model, runner.paged, runner.vocab_size)  # on a CUDA device it is there
    both.use_adapters("a")
    assert isinstance(runner.graphs, StepGraphs)
    assert runner.graphs is not recorded


# ---- quantized bases


def test_a_quantized_base(make: Make, base: Path, lm: LanguageModel, tmp_path: Path) -> None:
    quantize_model(lm.model, "int8")
    lm.save(tmp_path / "base-int8")
    model = stirred(load_model(tmp_path / "base-int8"), 3, targets=("q", "v"))
    save_adapter_model(model, tmp_path / "style", str(tmp_path / "base-int8"))

    def kinds(lm: LanguageModel) -> list[type]:
        layers = ["blocks.0.attention.q", "blocks.0.attention.k"]
        return [type(getattr(layer, "base", layer)) for layer in map(lm.model.get_submodule, layers)]

    kept, merged, again = (load(tmp_path / "style", **options) for options in (
        {"merge": False}, {}, {"requantize": True},
    ))  # fmt: skip
    assert kinds(kept) == kinds(again) == [QuantizedLinear] * 2
    assert kinds(merged) == [nn.Linear] * 2
    assert torch.equal(logits(kept), logits(LanguageModel(model, lm.tokenizer)))
    torch.testing.assert_close(logits(merged), logits(kept), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(again), logits(LanguageModel(merge(model, requantize=True), lm.tokenizer)))
    assert isinstance(again.generate("the cat", **GREEDY), str)


# ---- the hub


@pytest.fixture
def files(make: Make) -> dict[str, bytes]:
    folder = make("style", written="hf:ann/other")
    more = {"README.md": b"# style", "training_args.bin": b"PK", "adapter_model.bin": b"PK\x03\x04"}
    return {path.name: path.read_bytes() for path in folder.iterdir()} | more


def test_an_adapter_of_the_hub(hub: type[FakeHub], make: Make, base: Path) -> None:
    message = fails("hf:ann/tiny")
    assert "the hub knows no such repository" in message
    assert "adapter_config.json: the adapter's base model ann/other is neither" in message
    assert sorted(hub.downloads()) == ["adapter_config.json", "adapter_model.safetensors", "groundup_adapter.json"]
    assert "this adapter is for ann/other, the model is" in fails(base, "hf:ann/tiny")
    other = base.rename(base.with_name("other"))
    assert texts(load(other, "hf:ann/tiny")) == texts(load(make("mine", on=other)))
    del hub.commits["a" * 40]["adapter_model.safetensors"]
    assert "only pickled weights are in this repository (adapter_model.bin)" in fails(f"hf:ann/tiny@{'a' * 40}")


def test_a_base_of_the_hub(hub: type[FakeHub], make: Make, base: Path, lm: LanguageModel) -> None:
    hub.reset({path.name: path.read_bytes() for path in base.iterdir()})
    expected = texts(load(make("style")))
    for written in ("hf:ann/tiny", "ann/tiny", "hf:ann/tiny@v1"):
        assert texts(load(make("style", written=written))) == expected
    assert texts(load("hf:ann/tiny", make("style", written="ann/tiny"))) == expected
    assert texts(load(base, make("style", written=str(base)))) == expected
