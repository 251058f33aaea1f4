"""A classifier of texts: what it says, saved and opened again, with adapters, and as transformers opens it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.model import Classifier, LoraConfig, ModelConfig, Transformer, add_adapter, quantize_model
from groundup.model.weights.families import FAMILIES as FAMILIES_OF_FOLDERS
from groundup.posttraining import (
    BadRecord,
    TextClassifier,
    encode_texts,
    export_classifier,
    load_classifier,
    save_classifier,
    save_classifier_files,
)
from groundup.posttraining.classifier import open_unsorted, plain_copy
from groundup.posttraining.labelled import LabelledText
from groundup.posttraining.sequence_classification import class_for
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint import Checkpoints

CLASSES = ["ham", "spam", "Übriges"]
TEXTS = ["the cat", "the dog sat on the log and the cat sat on the mat", "x", "mat log mat", "the " * 60, "on the"]
SIZES: dict[str, Any] = dict(vocab_size=270, context_length=31, n_layer=2, n_head=3, n_embd=24, n_ff=29, init_std=0.3)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log " * 9], 270, show_progress=False)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def made(tok: Tokenizer, pooling: Any = "last", **more: Any) -> TextClassifier:
    torch.manual_seed(5)
    model = Classifier(Transformer(ModelConfig(**SIZES | more)), 3, pooling=pooling)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and scores far from what they begin as
            parameter.add_(0.2 * torch.randn_like(parameter))
    return TextClassifier(model, tok, list(CLASSES), temperature=1.7)


def by_hand(classifier: TextClassifier, text: str, temperature: float) -> Tensor:
    """The probabilities of one text by itself, from the Transformer's features."""
    end = classifier.tokenizer.end_of_text_id
    assert end is not None
    last = classifier.model.pooling == "last"
    room = classifier.context - 1 - last
    ids = [end, *classifier.tokenizer.encode(text)[:room], *([end] if last else [])]
    with torch.no_grad():
        features = classifier.model.model.eval().features(torch.tensor([ids]))[0]
        seen = features[-1] if last else features.mean(dim=0)
        return (classifier.model.score.weight @ seen / temperature).softmax(-1)


def saved(classifier: TextClassifier, folder: Path) -> TextClassifier:
    save_classifier(classifier, folder)
    return load_classifier(folder, device="cpu")


# ---- what it says


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_probabilities_are_those_of_each_text_alone(
    tok: Tokenizer, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = made(tok, pooling)
    expected = np.stack([by_hand(classifier, text, 1.7).numpy() for text in TEXTS])
    assert expected.std(axis=0).min() > 0.01
    for together in (1 << 14, 64, 1):
        monkeypatch.setattr("groundup.posttraining.classifier.POSITIONS_TOGETHER", together)
        found = classifier.probabilities(TEXTS)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-12)
    assert classifier.classify(TEXTS) == [CLASSES[row.argmax()] for row in expected]
    assert classifier.probabilities([]).shape == (0, 3)


def test_encoded_texts_say_the_same(tok: Tokenizer) -> None:
    classifier = made(tok)
    texts = [LabelledText(f"x#{n}", text, "ham") for n, text in enumerate(TEXTS)]
    encoded = encode_texts(tok, texts, CLASSES, classifier.context, pooling="last")
    assert np.array_equal(classifier.probabilities(encoded), classifier.probabilities(TEXTS))
    assert classifier.encode(TEXTS).cut == encoded.cut == 1


def test_a_shorter_context_sees_less(tok: Tokenizer) -> None:
    classifier = made(tok)
    short = replace(classifier, context_length=5)
    long = "the dog sat on the log and the cat sat on the mat"
    assert not np.allclose(short.probabilities([long]), classifier.probabilities([long]))
    np.testing.assert_allclose(short.probabilities([long])[0], by_hand(short, long, 1.7).numpy(), atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_long_text_in_pieces_has_the_mean_of_their_scores(tok: Tokenizer, pooling: Any, tmp_path: Path) -> None:
    classifier = replace(made(tok, pooling), context_length=9, split=True)
    found, encoded = classifier.probabilities(TEXTS), classifier.encode(TEXTS)
    assert encoded.owners is not None
    assert len(found) == len(TEXTS) < len(encoded)
    with torch.no_grad():
        for number in range(len(TEXTS)):
            pieces = [
                torch.from_numpy(encoded.text(int(one)))[None] for one in np.flatnonzero(encoded.owners == number)
            ]
            scores = torch.cat([classifier.model(ids, torch.tensor([ids.shape[1]])) for ids in pieces])
            expected = (scores.mean(dim=0) / 1.7).softmax(-1)
            np.testing.assert_allclose(found[number], expected.numpy(), atol=1e-6)
    cut = replace(classifier, split=False).probabilities(TEXTS)
    short = [len(tok.encode(text)) < 7 for text in TEXTS]
    assert any(short)
    np.testing.assert_allclose(found[short], cut[short], atol=1e-12)
    assert not np.allclose(found, cut)
    again = saved(classifier, tmp_path / "saved")
    assert again.split
    np.testing.assert_allclose(again.probabilities(TEXTS), found, atol=1e-6)
    about = json.loads((tmp_path / "saved" / "classifier.json").read_text())
    del about["split"]  # as what was saved before there was a choice
    (tmp_path / "saved" / "classifier.json").write_text(json.dumps(about))
    assert not load_classifier(tmp_path / "saved", device="cpu").split


def test_dropout_is_off_and_the_mode_comes_back(tok: Tokenizer) -> None:
    classifier = made(tok, dropout=0.5)
    classifier.model.train()
    one, other = classifier.probabilities(TEXTS), classifier.probabilities(TEXTS)
    assert np.array_equal(one, other)
    assert all(module.training for module in classifier.model.modules())
    classifier.model(torch.ones(1, 8, dtype=torch.int64), torch.tensor([8])).sum().backward()  # it still can be trained
    classifier.model.eval()
    classifier.probabilities(TEXTS)
    assert not any(module.training for module in classifier.model.modules())


def test_narrow_numbers_are_near(tok: Tokenizer) -> None:
    classifier = made(tok)
    narrow = replace(classifier, precision="bfloat16")
    found, expected = narrow.probabilities(TEXTS), classifier.probabilities(TEXTS)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_a_text_without_tokens(tok: Tokenizer) -> None:
    bare = Tokenizer(replace(tok.vocabulary, tokens=tok.vocabulary.tokens[:-1], special_tokens={}))
    classifier = replace(made(tok), tokenizer=bare)
    assert classifier.ring == ((), ())
    with pytest.raises(GroundupError, match=r"text 2 of 2 comes to no token"):
        classifier.probabilities(["cat", ""])
    assert made(tok).probabilities([""]).shape == (1, 3)


# ---- saved and opened again


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_saved_and_opened_again_it_says_the_same(tok: Tokenizer, tmp_path: Path, pooling: Any) -> None:
    classifier = replace(made(tok, pooling), context_length=19)
    again = saved(classifier, tmp_path / "it")
    assert np.array_equal(again.probabilities(TEXTS), classifier.probabilities(TEXTS))
    assert (again.classes, again.temperature, again.context, again.model.pooling) == (CLASSES, 1.7, 19, pooling)
    assert not again.model.training
    with pytest.raises(UsageError, match="something is in this folder already and would be lost"):
        save_classifier(classifier, tmp_path / "it")
    about = json.loads((tmp_path / "it" / "classifier.json").read_text())
    assert about["classes"] == CLASSES


def test_a_checkpoint_and_its_run(tok: Tokenizer, tmp_path: Path) -> None:
    classifier = made(tok)
    averaged = -classifier.model.score.weight.detach()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    place = checkpoints.save(
        classifier.model.model, tok, {}, {"step": 7}, best=True, trained=classifier.model,
        beside=lambda folder: save_classifier_files(folder, classifier, averaged),
    )  # fmt: skip
    checkpoints.finish()
    other = replace(classifier, model=plain_copy(classifier.model, {"score.weight": averaged}))
    for name in (place, tmp_path / "run"):
        found = load_classifier(name, device="cpu")
        assert np.array_equal(found.probabilities(TEXTS), other.probabilities(TEXTS))
    assert not np.allclose(other.probabilities(TEXTS), classifier.probabilities(TEXTS))
    assert {"classifier.json", "classifier.safetensors"} <= set(json.loads((place / "checksums.json").read_text()))
    scores = place / "classifier.safetensors"
    scores.write_bytes(scores.read_bytes()[:-1] + b"\1")
    with pytest.raises(GroundupError, match=r"classifier\.safetensors: damaged"):
        load_classifier(place)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_into_what_is_saved(tok: Tokenizer, tmp_path: Path, dora: bool) -> None:
    classifier = made(tok)
    before = classifier.probabilities(TEXTS)
    add_adapter(classifier.model, LoraConfig(rank=3, targets=("blocks.*",), dora=dora))
    with torch.no_grad():
        for name, parameter in classifier.model.named_parameters():
            if "adapters" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    names = [name for name, _ in classifier.model.named_parameters()]
    expected = classifier.probabilities(TEXTS)
    assert not np.allclose(expected, before, atol=0.01)
    again = saved(classifier, tmp_path / "it")
    np.testing.assert_allclose(again.probabilities(TEXTS), expected, atol=1e-5)
    assert not any("adapters" in name for name, _ in again.model.named_parameters())
    assert [name for name, _ in classifier.model.named_parameters()] == names  # it goes on as it was
    assert np.array_equal(classifier.probabilities(TEXTS), expected)


def test_adapters_on_a_quantized_model_too(tok: Tokenizer, tmp_path: Path) -> None:
    classifier = made(tok, tie_embeddings=False)
    quantize_model(classifier.model.model, "nf4", group=32)
    add_adapter(classifier.model, LoraConfig(rank=3, targets=("q", "v")))
    with torch.no_grad():
        for name, parameter in classifier.model.named_parameters():
            if "adapters" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    expected = classifier.probabilities(TEXTS)
    again = saved(classifier, tmp_path / "it")
    np.testing.assert_allclose(again.probabilities(TEXTS), expected, atol=1e-5)


def test_the_averaged_parameters_take_the_place_of_the_last_ones(tok: Tokenizer) -> None:
    classifier = made(tok)
    add_adapter(classifier.model, LoraConfig(rank=3, targets=("q",)))
    own = {name: torch.full_like(p, 0.1) for name, p in classifier.model.named_parameters() if "adapters" in name}
    merged = plain_copy(classifier.model, own)
    before, after = (dict(one.named_parameters()) for one in (classifier.model, merged))
    changed = before["model.blocks.1.attention.q.base.weight"] + 16 / 3 * 3 * 0.1 * 0.1  # alpha / rank times B A
    torch.testing.assert_close(after["model.blocks.1.attention.q.weight"], changed)


def test_a_folder_that_is_none(tok: Tokenizer, tmp_path: Path) -> None:
    classifier, path = made(tok), tmp_path / "it"
    save_classifier(classifier, path)
    right = json.loads((path / "classifier.json").read_text())
    wrong: list[tuple[str, Any]] = [
        ("classes", ["one"]), ("classes", [1, 2, 3]), ("pooling", "first"), ("temperature", 0), ("before", "x"),
        ("context_length", None), ("after", [-1]),
    ]  # fmt: skip
    for key, value in wrong:
        (path / "classifier.json").write_text(json.dumps(right | {key: value}))
        with pytest.raises(GroundupError, match=rf"this description of a classifier is damaged \({key}\)"):
            load_classifier(path)
    (path / "classifier.json").write_text(json.dumps(right | {"classes": ["one", "two"]}))
    with pytest.raises(GroundupError, match=r"score\.weight has shape \[3, 24\], 2 classes .* ask for \[2, 24\]"):
        load_classifier(path)
    (path / "classifier.json").write_text(json.dumps(right | {"after": [270]}))
    with pytest.raises(GroundupError, match="do not belong together"):
        load_classifier(path)
    (path / "classifier.json").unlink()
    with pytest.raises(GroundupError, match=r"cannot read description of a classifier .*classifier\.json"):
        load_classifier(path)
    (path / "classifier.safetensors").unlink()
    with pytest.raises(UsageError, match=r"this model has no class scores: it continues texts, .* --task classify\.$"):
        load_classifier(path)
    with pytest.raises(UsageError, match="no such folder"):
        load_classifier(tmp_path / "nowhere")


# ---- as transformers opens it

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(tie_embeddings=False),
    "llama, tied": dict(tie_embeddings=True, n_kv_head=1),
    "gpt2": dict(
        norm="layernorm", norm_eps=1e-5, positions="learned", feed_forward="gelu", bias=True, tie_embeddings=True,
    ),
    "qwen3": dict(qk_norm=True, tie_embeddings=False, head_dim=12),
    "gpt2, untied": dict(
        norm="layernorm", norm_eps=1e-5, positions="learned", feed_forward="gelu", bias=True, tie_embeddings=False,
    ),
}  # fmt: skip
LLAMA: dict[str, Any] = dict(qk_norm=False)


def with_pad(tok: Tokenizer) -> Tokenizer:
    return tok.with_special_tokens(["<|other|>", "<|pad|>"])


def their_scores(model: Any, ids: list[list[int]], pad: int) -> Tensor:
    """Scores of texts together, padded on the right."""
    longest = max(map(len, ids))
    rows = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        return model(rows, attention_mask=seen).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_gives_equal_scores(tok: Tokenizer, tmp_path: Path, kind: str) -> None:
    tok = with_pad(tok)
    classifier = replace(made(tok, vocab_size=283, **LLAMA | FAMILIES[kind]), temperature=1.0)
    export_classifier(classifier, tmp_path / "theirs")
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__.casefold().startswith(kind.partition(",")[0] + "for")
    assert type(model).__name__ == json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"][0]
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {name: number for number, name in enumerate(CLASSES)}
    assert (model.config.num_labels, model.config.pad_token_id) == (3, tok.special_tokens["<|pad|>"])
    encoded = classifier.encode(TEXTS)
    ids = [encoded.text(number).tolist() for number in range(len(TEXTS))]
    found = their_scores(model.eval(), ids, model.config.pad_token_id).softmax(-1).numpy()
    np.testing.assert_allclose(found, classifier.probabilities(TEXTS), atol=1e-5)
    again = load_classifier(tmp_path / "theirs", device="cpu")
    np.testing.assert_allclose(again.probabilities(TEXTS), classifier.probabilities(TEXTS), atol=1e-6)
    assert (again.classes, again.temperature, again.ring) == (CLASSES, 1.0, classifier.ring)


@pytest.mark.parametrize("family", FAMILIES_OF_FOLDERS.values(), ids=FAMILIES_OF_FOLDERS)
def test_every_family_has_a_class_of_that_name(family: Any) -> None:
    known = transformers.AutoModelForSequenceClassification._model_mapping
    config = getattr(transformers, class_for(family)).config_class
    assert config.model_type == family.model_type
    assert known[config].__name__ == class_for(family)


def test_their_tokenizer_puts_the_same_around_a_text(tok: Tokenizer, tmp_path: Path) -> None:
    classifier = replace(made(with_pad(tok), vocab_size=283), temperature=1.0)
    export_classifier(classifier, tmp_path / "theirs")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    short = [text for text in TEXTS if len(tok.encode(text)) < 29]
    encoded = classifier.encode(short)
    assert theirs(short)["input_ids"] == [encoded.text(number).tolist() for number in range(len(short))]
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "theirs"), device="cpu")
    for batch_size in (1, 3):
        found = pipe(short, top_k=None, batch_size=batch_size)
        for row, p_C in zip(found, classifier.probabilities(short), strict=True):
            said = {one["label"]: one["score"] for one in row}
            assert said == pytest.approx(dict(zip(CLASSES, p_C.tolist(), strict=True)), abs=1e-5)


def test_without_a_token_to_spare_for_padding(tok: Tokenizer, tmp_path: Path) -> None:
    """The end-of-text token ends every text and so is none; any other will do. Without it there is none at all."""
    classifier = replace(made(tok), temperature=1.0)
    export_classifier(classifier, tmp_path / "one")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "one").eval()
    assert model.config.pad_token_id == 0 != tok.end_of_text_id
    texts = [*TEXTS, bytes([*tok.token_bytes(0)] * 3).decode()]  # one that is made of the padding
    encoded = classifier.encode(texts)
    assert 0 in encoded.text(len(texts) - 1)
    found = their_scores(model, [encoded.text(number).tolist() for number in range(len(texts))], 0)
    np.testing.assert_allclose(found.softmax(-1).numpy(), classifier.probabilities(texts), atol=1e-5)
    bare = Tokenizer(replace(tok.vocabulary, tokens=tok.vocabulary.tokens[:-1], special_tokens={}))
    for vocab_size, pad in ((270, 269), (269, None)):
        export_classifier(replace(made(bare, vocab_size=vocab_size)), tmp_path / str(vocab_size))
        config = json.loads((tmp_path / str(vocab_size) / "config.json").read_text())
        assert config["pad_token_id"] == pad


def test_adapters_are_merged_into_what_is_exported(tok: Tokenizer, tmp_path: Path) -> None:
    classifier = replace(made(tok), temperature=1.0)
    add_adapter(classifier.model, LoraConfig(rank=3))
    with torch.no_grad():
        for name, parameter in classifier.model.named_parameters():
            if "adapters" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    export_classifier(classifier, tmp_path / "it")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "it").eval()
    encoded = classifier.encode(TEXTS)
    found = their_scores(model, [encoded.text(number).tolist() for number in range(len(TEXTS))], 0)
    np.testing.assert_allclose(found.softmax(-1).numpy(), classifier.probabilities(TEXTS), atol=1e-5)


def test_what_transformers_has_no_class_for(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="looks at the mean of a text, for which transformers has no class"):
        export_classifier(made(tok, "mean"), tmp_path / "it")
    with pytest.raises(UsageError, match="no class for a model of this kind"):
        export_classifier(made(tok, positions="alibi"), tmp_path / "it")
    quantized = made(tok, tie_embeddings=False)
    quantize_model(quantized.model.model, "int8")
    with pytest.raises(UsageError, match="no class for quantized weights"):
        export_classifier(quantized, tmp_path / "it")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="something is in this folder already"):
        export_classifier(made(tok), tmp_path / "full")


# ---- folders that transformers has written


def theirs(folder: Path, tok: Tokenizer, kind: str = "Llama", **values: Any) -> Any:
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=270, hidden_size=24, intermediate_size=29, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=31, initializer_range=0.3, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    ) if kind == "Llama" else dict(vocab_size=270, n_embd=24, n_layer=2, n_head=3, n_positions=31, pad_token_id=0,
                                   initializer_range=0.3, bos_token_id=None, eos_token_id=None)  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes | values)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model.save_pretrained(folder)
    tok.save(folder)
    return model


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("framed", [False, True])
def test_their_folders_are_opened(tok: Tokenizer, tmp_path: Path, kind: str, framed: bool) -> None:
    if framed:
        tok = Tokenizer(replace(tok.vocabulary, prefix=(5,), suffix=(269,)))
    names = {0: "no", 1: "yes", 2: "perhaps"}
    model = theirs(tmp_path, tok, kind, id2label=names, label2id={name: number for number, name in names.items()})
    found = load_classifier(tmp_path, device="cpu")
    assert (found.classes, found.temperature, found.context) == (["no", "yes", "perhaps"], 1.0, 31)
    texts = [text for text in TEXTS if len(tok.encode(text)) < 29]
    ids = [tok.encode(text, add_special=True) for text in texts]
    expected = torch.cat([model(torch.tensor([row])).logits for row in ids]).softmax(-1).detach().numpy()
    assert expected.std(axis=0).min() > 0.02
    np.testing.assert_allclose(found.probabilities(texts), expected, atol=1e-5)
    again = saved(found, tmp_path / "ours")  # with no more around a text than there was
    np.testing.assert_allclose(again.probabilities(texts), found.probabilities(texts), atol=1e-6)


def test_two_classes_without_names(tok: Tokenizer, tmp_path: Path) -> None:
    theirs(tmp_path, tok, num_labels=2)
    assert load_classifier(tmp_path).classes == ["LABEL_0", "LABEL_1"]


def test_their_folders_that_hold_no_classes(tok: Tokenizer, tmp_path: Path) -> None:
    theirs(tmp_path / "reward", tok, num_labels=1)
    with pytest.raises(GroundupError, match="gives a text one number, such as a reward"):
        load_classifier(tmp_path / "reward")
    theirs(tmp_path / "several", tok, num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(GroundupError, match="gives a text several labels"):
        load_classifier(tmp_path / "several")
    theirs(tmp_path / "damaged", tok, num_labels=3)
    file = tmp_path / "damaged" / "model.safetensors"
    whole = load_file(file)
    for change, message in (
        ({"score.weight": None}, r"the tensor score\.weight is missing"),
        ({"model.norm.weight": None}, r"the tensor model\.norm\.weight is missing"),
        ({"model.norm.weight": torch.ones(23)}, r"model\.norm\.weight has shape \[23\], the config asks for \[24\]"),
        ({"score.bias": torch.ones(3)}, r"its scores have a part score\.bias"),
    ):
        kept = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(GroundupError, match=message):
            load_classifier(tmp_path / "damaged")


def test_shards_of_theirs(tok: Tokenizer, tmp_path: Path) -> None:
    model: nn.Module = theirs(tmp_path, tok, num_labels=3)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="9KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = torch.tensor([tok.encode("the cat sat")])
    np.testing.assert_allclose(
        load_classifier(tmp_path, device="cpu").probabilities(["the cat sat"]),
        model(ids).logits.softmax(-1).detach().numpy(), atol=1e-5,
    )  # fmt: skip


# ---- what is to be classified


def test_texts_with_labels_and_without(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"

    def found(content: str, name: str = "x.jsonl", **more: Any) -> list[tuple[str, str, str | None]]:
        (tmp_path / name).write_text(content)
        return [tuple(one) for one in open_unsorted(str(tmp_path / name), **more)]  # type: ignore[misc]

    rows = [{"review": f"text {n}", "stars": n % 5} for n in range(1500)]
    content = "\n".join(map(json.dumps, rows))
    assert found(content) == [(f"x.jsonl#{n + 1}", f"text {n}", str(n % 5)) for n in range(1500)]
    assert len(found(content, limit=7)) == 7
    content = "\n".join(json.dumps({"review": row["review"], "id": 7}) for row in rows)
    assert found(content) == [(f"x.jsonl#{n + 1}", f"text {n}", None) for n in range(1500)]
    assert found(content, columns={"text": "review", "label": "id"})[0] == ("x.jsonl#1", "text 0", "7")
    assert found("so, one\nand two\n", "x.tsv") == [("x.tsv#1", "so, one", None), ("x.tsv#2", "and two", None)]
    assert found("one\ntwo\n", "x.tsv", columns={"text": "1"})[0] == ("x.tsv#1", "one", None)
    assert found("text,when\nhello,now\n", "x.csv") == [("x.csv#1", "hello", None)]
    assert found("") == []
    with pytest.raises(UsageError, match=r"which of its columns \(said, mood\) holds the text cannot be told"):
        found('{"said": "x", "mood": "y"}')
    with pytest.raises(UsageError, match=r"there is no field 'saidd' in it .*Did you mean said"):
        found('{"said": "x", "mood": "y"}', columns={"text": "saidd"})
    assert found('{"said": "x", "mood": "y"}', columns={"text": "said"}) == [("x.jsonl#1", "x", None)]
    bad = '{"text": "x"}\n{"text": ""}\n{"text": "y"}'
    with pytest.raises(BadRecord, match=r"x\.jsonl#2: its text .* is empty"):
        found(bad)
    skipped: list[Any] = []
    assert [text for _, text, _ in found(bad, skip=skipped.append)] == ["x", "y"]
    assert [one.name for one in skipped] == ["x.jsonl#2"]
    path.unlink()
    with pytest.raises(UsageError, match="no such file"):
        list(open_unsorted(str(path)))
