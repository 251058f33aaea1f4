"""``groundup chat MODEL``: talk to a model in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundup.cli.arguments import call
from groundup.runtime import UsageError, say

if TYPE_CHECKING:
    from groundup.inference import LanguageModel

HELP = """  /help                 this list
  /set KEY VALUE        max_tokens, temperature, top_p or top_k
  /new                  forget what was said
  /quit                 leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: str,
    max_tokens: int = 120,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int | None = None,
    device: str = "auto",
) -> None:
    """Talk to a model in the terminal. It continues what you write, as a pretrained model does.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, or hf:owner/name
        max_tokens: most tokens in one answer
        temperature: 0 takes the likeliest token every time
        top_k: sample among the k likeliest tokens only
        top_p: sample among the likeliest tokens that together have this probability
        seed: the same seed and the same words give the same answers
        device: auto, cpu, cuda, cuda:1, mps
    """
    from groundup.inference import load

    lm = load(model, device=device)
    say(f"{model}: {lm.model.parameter_count():,} parameters, context of {lm.model.config.context_length} tokens.")
    say("It does not answer, it continues your text: chat templates are not read yet. /help lists the commands.")
    settings: dict[str, int | float | None] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    Conversation(lm, settings).run()


class Conversation:
    """One conversation: the text so far, and how the model is asked to go on with it."""

    def __init__(self, lm: LanguageModel, settings: dict[str, int | float | None]) -> None:
        self.lm, self.settings = lm, settings
        self.text = ""

    def run(self) -> None:
        """Read lines until the end of input or ``/quit``."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except UnicodeDecodeError as error:
                raise UsageError(f"standard input: byte {error.start} is not UTF-8 text. Convert it first.") from error
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line.startswith("/"):
                if line.strip() in ("/quit", "/exit"):
                    return
                self.command(line.split())
            elif line.strip():
                self.answer(line)

    def command(self, words: list[str]) -> None:
        """Carry out a slash command; a wrong one is told and changes nothing."""
        if words[0] == "/new":
            self.text = ""
            say("(forgotten)")
        elif words[0] == "/set" and len(words) == 3:
            self._set(words[1], words[2])
        else:
            if words[0] not in ("/help", "/set"):
                say(f"{words[0]} is not a command.")
            say(HELP)

    def _set(self, key: str, value: str) -> None:
        from groundup.inference import SamplingParams

        kinds = {"max_tokens": int, "temperature": float, "top_p": float, "top_k": int}
        if key not in kinds:
            say(f"{key} cannot be set. Known: {', '.join(kinds)}.")
            return
        try:
            parsed = kinds[key](value)
            SamplingParams(**{key: parsed})
        except ValueError:
            say(f"{key} = {value} should be a number.")
        except UsageError as error:
            say(str(error))
        else:
            self.settings[key] = parsed
            say(f"{key} = {parsed}")

    def answer(self, line: str) -> None:
        """Print the model's continuation as it comes; Ctrl-C ends it and keeps what was said."""
        self.text += line
        seed = self.settings["seed"]
        pieces = self.lm.stream(
            self.text,
            max_tokens=int(self.settings["max_tokens"] or 1),
            temperature=float(self.settings["temperature"] or 0.0),
            top_k=None if self.settings["top_k"] is None else int(self.settings["top_k"]),
            top_p=float(self.settings["top_p"] or 1.0),
            seed=None if seed is None else int(seed),
        )
        started, said = time.monotonic(), ""
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        self.text += said + "\n"
        seconds = time.monotonic() - started
        tokens = len(self.lm.tokenizer.encode(said))
        print()
        if sys.stdout.isatty() and seconds > 0:
            say(f"({tokens} tokens, {tokens / seconds:.0f} tokens/s)", style="dim")


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and start the conversation."""
    call(chat, "chat", arguments)
