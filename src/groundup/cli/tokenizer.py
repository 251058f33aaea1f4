"""``groundup tokenizer train|encode|decode|inspect``: text to token ids and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from groundup.cli.arguments import call_one_of, read_stdin, second_as_flag
from groundup.runtime import UsageError, say


def train(
    data: str,
    out: str = "tokenizer",
    vocab_size: int | None = None,
    pattern: str = "gpt4",
    min_frequency: int = 2,
    limit: int | None = None,
) -> None:
    """Train a byte-pair encoding on a text and save it as a folder that Hugging Face tokenizers opens.

    Args:
        data: a file, a folder, stdlib, a named source, or hf:owner/name
        out: the folder to write
        vocab_size: size of the vocabulary; derived from the size of the text when not given
        pattern: how text is cut before merging: gpt2, gpt4, o200k or a regular expression
        min_frequency: pairs seen less often are not merged
        limit: read at most this many documents
    """
    from groundup.data import open_source, suggest_vocab_size
    from groundup.tokenizer import Tokenizer

    texts = [document.text for document in open_source(data, limit=limit)]
    size = vocab_size or suggest_vocab_size(sum(len(text.encode("utf-8", "replace")) for text in texts))
    tok = Tokenizer.train(texts, size, pattern=pattern, min_frequency=min_frequency)
    tok.save(out)
    say(f"{out}: {tok.vocab_size:,} tokens from {len(texts):,} documents")


def encode(tokenizer: str, text: str = "-", allow_special: bool = False) -> None:
    """Print the token ids of a text, separated by spaces.

    Args:
        tokenizer: a folder or a tokenizer.json
        text: the text; - reads standard input
        allow_special: let special tokens in the text stand for themselves instead of being plain text
    """
    from groundup.tokenizer import Tokenizer

    content = read_stdin() if text == "-" else text
    print(*Tokenizer.load(tokenizer).encode(content, allow_special="all" if allow_special else ()))


def decode(tokenizer: str, ids: str = "-") -> None:
    """Print the text of token ids.

    Args:
        tokenizer: a folder or a tokenizer.json
        ids: the ids, separated by spaces or commas; - reads standard input
    """
    from groundup.tokenizer import Tokenizer

    words = (read_stdin() if ids == "-" else ids).replace(",", " ").split()
    wrong = next((word for word in words if not word.isdecimal() or len(word) > 18), None)
    if wrong is not None:
        raise UsageError(f"{wrong[:20]} is not a token id: ids are whole numbers, separated by spaces.")
    print(Tokenizer.load(tokenizer).decode([int(word) for word in words]))


def inspect(tokenizer: str, text: str = "-") -> None:
    """Show how a tokenizer cuts a text, and how far it compresses it.

    Args:
        tokenizer: a folder or a tokenizer.json
        text: the text; - reads standard input
    """
    from rich.text import Text

    from groundup.tokenizer import Tokenizer, compression

    tok = Tokenizer.load(tokenizer)
    content = read_stdin() if text == "-" else text
    if not content:
        raise UsageError("groundup tokenizer inspect needs a text.")
    colours = ("on blue", "on dark_green", "on dark_magenta", "on dark_cyan", "on grey37")
    shown = Text()
    for position, token in enumerate(tok.encode(content)):
        shown.append(
            tok.token_bytes(token).decode("utf-8", "replace"),
            style=f"white {colours[position % len(colours)]}",
        )
        shown.append("" if sys.stdout.isatty() else "|")
    say(shown)
    found = compression(tok, content)
    say(f"{found['tokens']:,.0f} tokens, {found['bytes']:,.0f} bytes, {found['bytes_per_token']:.2f} bytes per token")


COMMANDS: dict[str, Callable[..., None]] = {"train": train, "encode": encode, "decode": decode, "inspect": inspect}


def main(arguments: Sequence[str]) -> None:
    """Run the sub-command named first."""
    words = list(arguments)
    if words and words[0] != "train":
        words[1:] = second_as_flag(words[1:], "--ids" if words[0] == "decode" else "--text")
    call_one_of(COMMANDS, "tokenizer", words)
