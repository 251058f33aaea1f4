"""``groundup tokenizer train|encode|decode|inspect|import|bench``: text to token ids and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from groundup.cli.arguments import call_one_of, read_stdin, second_as_flag
from groundup.cli.tables import left_out
from groundup.cli.tokenizer_bench import bench
from groundup.cli.tokenizer_inspect import inspect
from groundup.runtime import UsageError, say

if TYPE_CHECKING:
    from groundup.data import Source


def train(
    data: str,
    out: str = "tokenizer",
    vocab_size: int | None = None,
    algorithm: Literal["bpe", "bytes", "characters", "words"] = "bpe",
    pattern: str = "gpt4",
    special_tokens: str = "<|endoftext|>",
    normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None,
    min_frequency: int | None = None,
    threads: int | None = None,
    limit: int | None = None,
) -> None:
    """Train a tokenizer on text of any size and save it as a folder that Hugging Face tokenizers opens.

    Args:
        data: a file, a folder, stdlib, a named source, or hf:owner/name
        out: the folder to write
        vocab_size: size of the vocabulary; when not given derived from the size of the text, or all words or characters
        algorithm: byte-pair encoding, or one of the small tokenizers
        pattern: how text is cut before merging: gpt2, gpt4, o200k or a regular expression
        special_tokens: names of the special tokens, separated by commas
        normalization: a Unicode normal form that text is brought to first; decoding gives that form back
        min_frequency: rarer pairs are not merged (2 when not given), rarer words and characters unknown (1)
        threads: at most so many threads; all cores when not given
        limit: read at most this many documents
    """
    from groundup.data import open_source
    from groundup.tokenizer import Tokenizer

    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} must be at least 1.")
    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    source = open_source(data, limit=limit)
    read = _Counted(source)
    tok = Tokenizer.train(
        read,
        vocab_size or (_derived_vocab_size(source) if algorithm == "bpe" else None),
        algorithm=algorithm,
        pattern=pattern,
        special_tokens=[name for name in special_tokens.split(",") if name],
        normalization=normalization,
        min_frequency=min_frequency,
        **options,
    )
    tok.save(out)
    say(f"{out}: {tok.vocab_size:,} tokens from {read.documents:,} documents{left_out(source)}")


class _Counted:
    """The texts of a source, one at a time, and how many there were."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.documents = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._source:
            self.documents += 1
            yield document.text


def _derived_vocab_size(source: Source) -> int:
    """The vocabulary for so much text: the source is read once more, but not past where more text changes nothing."""
    from groundup.data import suggest_vocab_size

    most, size = suggest_vocab_size(1 << 60), 0
    for document in source:
        size += len(document.text.encode("utf-8", "replace"))
        if suggest_vocab_size(size) == most:
            break
    return suggest_vocab_size(size)


def encode(tokenizer: str, text: str = "-", allow_special: bool = False) -> None:
    """Print the token ids of a text, separated by spaces.

    Args:
        tokenizer: a folder, a tokenizer.json, a .tiktoken file, or any other vocabulary that import reads
        text: the text; - reads standard input
        allow_special: let special tokens in the text stand for themselves instead of being plain text
    """
    from groundup.tokenizer import Tokenizer

    content = read_stdin() if text == "-" else text
    print(*Tokenizer.load(tokenizer).encode(content, allow_special="all" if allow_special else ()))


def decode(tokenizer: str, ids: str = "-") -> None:
    """Print the text of token ids.

    Args:
        tokenizer: a folder, a tokenizer.json, a .tiktoken file, or any other vocabulary that import reads
        ids: the ids, separated by spaces or commas; - reads standard input
    """
    from groundup.tokenizer import Tokenizer

    words = (read_stdin() if ids == "-" else ids).replace(",", " ").split()
    wrong = next((word for word in words if not word.isdecimal() or len(word) > 18), None)
    if wrong is not None:
        raise UsageError(f"{wrong[:20]} is not a token id: ids are whole numbers, separated by spaces.")
    print(Tokenizer.load(tokenizer).decode([int(word) for word in words]))


def import_(source: str, out: str = "tokenizer", pattern: str | None = None) -> None:
    """Read a vocabulary in any known form and save it as a folder that Hugging Face tokenizers opens.

    Args:
        source: a .tiktoken file, a tokenizer.json, a folder with GPT-2's encoder.json and vocab.bpe, a SentencePiece
            .model, a .gguf file, or hf:owner/name
        out: the folder to write
        pattern: how text is cut, where the file does not say: gpt2, gpt4, o200k or a regular expression
    """
    from groundup.tokenizer import Tokenizer

    tok = Tokenizer.load(source, pattern=pattern)
    tok.save(out)
    special = len(tok.special_tokens)
    say(f"{out}: {tok.vocab_size:,} tokens from {source}, {special:,} of them special")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "encode": encode,
    "decode": decode,
    "inspect": inspect,
    "import": import_,
    "bench": bench,
}


def main(arguments: Sequence[str]) -> None:
    """Run the sub-command named first."""
    words = list(arguments)
    if words and words[0] in ("encode", "decode", "inspect"):
        words[1:] = second_as_flag(words[1:], "--ids" if words[0] == "decode" else "--text")
    call_one_of(COMMANDS, "tokenizer", words)
