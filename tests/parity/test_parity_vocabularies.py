"""Published vocabularies make the ids that their own libraries make: tiktoken's and Hugging Face's, on real text."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.tokenizer import Tokenizer
from groundup.tokenizer.alphabet import to_characters

tiktoken = pytest.importorskip("tiktoken")
tokenizers = pytest.importorskip("tokenizers")

NAMES = ("r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony")
# What Python, the regex library, Rust's and Oniguruma's all know.
characters = st.characters(exclude_categories=["Cs", "Cn"])
SNIPPETS = (
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|endofprompt|>",
    "it's",
    "'LL",
    "\r\n",
    "  ",
    "\u00a0",
    "x\u0301",
    "中文",
)
texts = st.lists(st.text(characters, max_size=12) | st.sampled_from(SNIPPETS), max_size=8).map("".join)


@pytest.fixture(scope="module")
def samples(shared_data: Path) -> list[str]:
    """Half a megabyte of each kind of text: books, code, wikis, many languages and scripts, emoji."""
    found = []
    for file in sorted((shared_data / "pretrain").rglob("*")):
        if file.suffix in (".txt", ".json", ".jsonl"):
            found.append(file.read_text(encoding="utf-8")[:250_000])
        elif file.name.endswith(".jsonl.gz"):
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                texts = [json.loads(line)["text"] for line in lines]
            step = max(1, len(texts) // 200)
            found += [text[:2500] for text in texts[::step]]
    assert len(found) > 1000
    return found


def ranks_of(file: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@pytest.fixture(scope="module")
def openai(shared_data: Path) -> Callable[[str], tuple[Tokenizer, Any]]:
    """A vocabulary by name, ours and tiktoken's; both from the files that lie here."""
    import tiktoken_ext.openai_public as published

    folder = shared_data / "tokenizers"
    opened: dict[str, tuple[Tokenizer, Any]] = {}

    def get(name: str) -> tuple[Tokenizer, Any]:
        if name in opened:
            return opened[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(published, "load_tiktoken_bpe", lambda url, **_: ranks_of(folder / url.rsplit("/", 1)[1]))
            theirs = tiktoken.Encoding(**getattr(published, name)())
        file = folder / f"{name}.tiktoken"
        if not file.exists():  # one file under two names
            patch.setenv("GROUNDUP_DATA", str(folder.parent))
            ours = Tokenizer.load(name)
            patch.undo()
        else:
            ours = Tokenizer.load(file)
        opened[name] = ours, theirs
        return opened[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_a_published_vocabulary_is_tiktokens(
    openai: Callable[[str], tuple[Tokenizer, Any]], name: str, samples: list[str]
) -> None:
    ours, theirs = openai(name)
    assert ours.vocab_size == theirs.n_vocab
    assert ours.special_tokens.items() <= theirs._special_tokens.items()
    assert set(ours.special_tokens.values()) == set(theirs._special_tokens.values())
    assert ours.end_of_text_id == theirs.eot_token
    few = samples if name.endswith("_base") else samples[::10]
    expected = theirs.encode_ordinary_batch(few)
    assert ours.encode_batch(few) == expected
    ids, offsets = ours.encode_array(few)
    assert ids.tolist() == [number for numbers in expected for number in numbers]
    assert offsets[-1] == len(ids)
    for text, numbers in zip(few[::50], expected[::50], strict=True):
        assert ours.decode(numbers) == theirs.decode(numbers) == text
    special_ids = set(ours.special_tokens.values())
    for number in [*range(0, ours.vocab_size, 997), *special_ids]:
        assert ours.token_bytes(number) == theirs.decode_single_token_bytes(number)


@pytest.mark.parametrize("name", NAMES)
def test_any_text_and_any_special_tokens(openai: Callable[[str], tuple[Tokenizer, Any]], name: str) -> None:
    ours, theirs = openai(name)

    @settings(max_examples=150, deadline=None)
    @given(texts, st.integers(0, 3))
    def check(text: str, how_many: int) -> None:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.encode(text, allow_special="all") == theirs.encode(text, allowed_special="all")
        some = set(list(ours.special_tokens)[:how_many])
        ids = theirs.encode(text, allowed_special=some, disallowed_special=())
        assert ours.encode(text, allow_special=some) == ids
        with_offsets, offsets = ours.encode_with_offsets(text, allow_special=some)
        assert with_offsets == ids
        # tiktoken says where each token's first character is: that of the next whole one inside a character.
        for (start, end), number in zip(offsets, ids, strict=True):
            assert theirs.decode_single_token_bytes(number) in text[start:end].encode()

    check()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 100_255), max_size=12))
def test_any_ids_are_decoded_as_tiktoken_does(openai: Callable[[str], tuple[Tokenizer, Any]], ids: list[int]) -> None:
    ours, theirs = openai("cl100k_base")
    assert ours.decode(ids) == theirs.decode(ids) == "".join(ours.decode_stream(ids))
    assert ours.decode_bytes(ids) == theirs.decode_bytes(ids)


def test_the_ids_that_openai_had_written_down(
    openai: Callable[[str], tuple[Tokenizer, Any]], shared_data: Path
) -> None:
    file = shared_data / "tokenizers" / "expected" / "openai_TestPlans.txt"
    if not file.exists():
        pytest.skip(f"needs {file}")
    blocks = re.findall(
        r"^EncodingName: (\w+)\nSample: (.*?)\nEncoded: \[(.*?)\]$", file.read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(blocks) > 300
    for name, sample, encoded in blocks:
        ours, _ = openai(name)
        assert ours.encode(sample) == [int(number) for number in encoded.split(",") if number.strip()]


# Text, and its ids by GPT-2 and by Llama 2, as the tests of llama.cpp (MIT) have them, made with transformers.
WRITTEN_DOWN: list[tuple[str, list[int], list[int]]] = [
    ("ied 4 ½ months", [798, 604, 25208, 1933], [474, 287, 29871, 29946, 29871, 30226, 7378]),
    ("Führer", [37, 9116, 71, 11751], [383, 4000, 261]),
    ("", [], []),
    (" ", [220], [259]),
    ("   ", [220, 220, 220], [268]),
    ("\n\n\n", [628, 198], [29871, 13, 13, 13]),
    ("\t\n", [197, 198], [29871, 12, 13]),
    (" Hello, world!", [18435, 11, 995, 0], [29871, 15043, 29892, 3186, 29991]),
    (
        " this is 🦙.cpp",
        [428, 318, 12520, 99, 247, 13, 20322],
        [29871, 445, 338, 29871, 243, 162, 169, 156, 29889, 8223],
    ),
    (
        "w048 7tuijk dsdfhu",
        [86, 47202, 767, 28047, 45961, 288, 82, 7568, 13415],
        [281, 29900, 29946, 29947, 29871, 29955, 9161, 13535, 18031, 2176, 6905],
    ),
    (
        "нещо на Български",
        [
            *(22177, 16843, 141, 231, 15166, 12466, 121, 16142, 12466, 239, 141, 232, 30143, 140, 111),
            *(16142, 21169, 21727, 31583, 18849),
        ],
        [1538, 4851, 665, 1386, 29713, 1305],
    ),
    ("    Hello\n    Hello", [220, 220, 220, 18435, 198, 220, 220, 220, 18435], [268, 15043, 13, 1678, 15043]),
    ("\n =", [198, 796], [29871, 13, 353]),
    ("' era", [6, 6980], [525, 3152]),
    ("3333333", [24840, 20370], [29871, *[29941] * 7]),
]


@pytest.mark.parametrize("which", [0, 1])
def test_the_ids_that_llama_cpp_has_written_down(shared_data: Path, which: int) -> None:
    folder = shared_data / "tokenizers"
    sources = (
        (folder / "gpt2", folder / "gguf" / "ggml-vocab-gpt-2.gguf"),
        (folder / "llama2" / "tokenizer.model", folder / "gguf" / "ggml-vocab-llama-spm.gguf"),
    )
    for source in sources[which]:
        tok = Tokenizer.load(source)
        for text, *ids in WRITTEN_DOWN:
            assert tok.encode(text) == ids[which]
            assert tok.decode(ids[which]) == text


# ---- Hugging Face


def opened(folder: Path, content: dict[str, Any]) -> tuple[Tokenizer, Any]:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.load(file), tokenizers.Tokenizer.from_file(str(file))


def byte_level(**settings: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **settings}


def added(number: int, content: str, special: bool, normalized: bool = False) -> dict[str, Any]:
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": number, "content": content, "special": special, "normalized": normalized, **rules}


def merges_of(tok: Tokenizer) -> list[list[str]]:
    return [[to_characters(tok.token_bytes(left)), to_characters(tok.token_bytes(right))] for left, right in tok.merges]


@pytest.fixture(scope="module")
def gpt_neox(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """EleutherAI's tokenizer.json, put together from the ranks of its vocabulary."""
    file = shared_data / "tokenizers" / "gpt-neox-20b.tiktoken"
    ranks = ranks_of(file)
    names = {"<|endoftext|>": 0, "<|padding|>": 1}
    spaces = {token.decode(): rank for token, rank in ranks.items() if rank >= 50254}
    assert set("".join(spaces)) == {" "}
    all_spaces = {" " * (24 - n): 50254 + n for n in range(23)}
    assert spaces.items() <= all_spaces.items()
    plain = Tokenizer.load(file, pattern="gpt2", special_tokens=names)
    vocab = {to_characters(token): rank for token, rank in ranks.items() if 1 < rank < 50254}
    # Of runs of spaces that are ordinary tokens as well, the file of ranks knows only the id of the added one. Text
    # never becomes the other.
    merges = [[left, right] for left, right in merges_of(plain) if {left, right, left + right} <= vocab.keys()]
    left_out = set(range(50254)) - set(ranks.values())
    assert len(merges) > 50_000 - 500
    content = {
        "version": "1.0",
        "added_tokens": [
            *(added(number, name, True) for name, number in names.items()),
            *(added(number, text, False, normalized=True) for text, number in all_spaces.items()),
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level(),
        "post_processor": byte_level(),
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "vocab": {**vocab, **names, **{f"Ġunused{number}": number for number in left_out}},
            "merges": merges,
        },
    }
    return opened(tmp_path_factory.mktemp("neox"), content)


@pytest.fixture(scope="module")
def llama3(
    openai: Callable[[str], tuple[Tokenizer, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    """A tokenizer.json of Llama 3's make over cl100k, of which its vocabulary is an extension."""
    source, _ = openai("cl100k_base")
    begin = {"id": "<|begin_of_text|>", "type_id": 0}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": begin}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin["id"]: {"id": begin["id"], "ids": [100256], "tokens": [begin["id"]]}},
    }
    split = {"type": "Split", "pattern": {"Regex": source.pattern}, "behavior": "Isolated", "invert": False}
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    content = {
        "version": "1.0",
        "added_tokens": [added(100256 + number, name, True) for number, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]},
        "post_processor": {"type": "Sequence", "processors": [byte_level(), template]},
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {to_characters(source.token_bytes(number)): number for number in range(100256)},
            "merges": merges_of(source),
        },
    }
    return opened(tmp_path_factory.mktemp("llama3"), content)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama3"])
def test_an_imported_vocabulary_is_hugging_faces(
    request: pytest.FixtureRequest, kind: str, samples: list[str], tmp_path: Path
) -> None:
    ours, theirs = request.getfixturevalue(kind)
    few = samples[::4]
    assert ours.encode_batch(few) == [found.ids for found in theirs.encode_batch(few, add_special_tokens=False)]
    assert ours.encode("a text", add_special=True) == theirs.encode("a text").ids
    ours.save(tmp_path)
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in few[::40]:
        assert again.encode(text).ids == ours.encode(text, add_special=True)

    @settings(max_examples=150, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special="all") == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)

    check()


def test_what_came_from_tiktoken_opens_in_transformers(
    openai: Callable[[str], tuple[Tokenizer, Any]], tmp_path: Path, samples: list[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    ours, _ = openai("cl100k_base")
    ours.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in samples[::60]:
        assert peer(text)["input_ids"] == ours.encode(text)
    marked = "a<|endoftext|>b<|fim_prefix|>"
    assert peer(marked)["input_ids"] == ours.encode(marked, allow_special="all")
    assert peer.eos_token_id == ours.end_of_text_id
