"""``groundup chat MODEL``: talk to a model in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.cli.arguments import call, with_field
from groundup.inference.sampling import SamplingParams
from groundup.runtime import GroundupError, UsageError, say
from groundup.runtime.errors import nearest, os_errors
from groundup.runtime.files import read_json, write_atomic, write_json

if TYPE_CHECKING:
    from groundup.inference import LanguageModel

DEFAULTS = SamplingParams(max_tokens=512, temperature=0.8, top_p=0.95)
HELP = """  /help                 this list
  /set KEY VALUE        change how it answers: /set temperature 0.7; /set alone shows everything
  /system TEXT          what the model is told before all else; without a text: nothing
  /again                answer the last message once more
  /undo                 take back the last message and its answer
  /new                  forget what was said
  /save FILE            the conversation, to go on with later; /load FILE
  /export FILE          the conversation to read: .md
  /quit                 leave (so does Ctrl-D); Ctrl-C stops an answer
  A line that ends in \\ goes on in the next one."""


def chat(
    model: str,
    sampling: SamplingParams = DEFAULTS,
    system: str = "",
    template: str | None = None,
    load: Path | None = None,
    guess: bool = False,
    adapter: tuple[str, ...] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Talk to a model in the terminal. One that has no chat template continues what you write.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, or hf:owner/name
        sampling: how tokens are chosen
        system: what the model is told before all else
        template: a chat template for a model that has none, such as chatml; "none" continues the text
        load: go on with a conversation that was saved with /save
        guess: guess tokens from what was said before (prompt lookup): the same answers, sooner
        adapter: an adapter to put on it: a folder, a run or hf:owner/name; may be given several times, for their sum
        device: auto, cpu, cuda, cuda:1, mps
        dtype: of the weights; auto leaves them as they are stored; float32, bfloat16
    """
    from groundup.inference import PromptLookup
    from groundup.inference import load as load_model

    drafter = PromptLookup() if guess else None
    lm = load_model(model, adapters=adapter, device=device, dtype=dtype, drafter=drafter)  # type: ignore[arg-type]
    if template not in (None, "none"):
        lm.tokenizer = lm.tokenizer.with_chat_template(str(template))
    conversation = Conversation(lm, sampling, system, plain=template == "none")
    say(f"{model}: {lm.model.parameter_count():,} parameters, context of {lm.model.config.context_length} tokens.")
    if conversation.plain:
        say("It has no chat template: it does not answer, it continues your text. /help lists the commands.")
    else:
        say("/help lists the commands.")
    if load is not None:
        conversation.load(str(load))
    conversation.run()


class Conversation:
    """What was said so far, and how the model is asked to go on with it.

    Args:
        lm: the model.
        params: how tokens are chosen.
        system: the system prompt; empty for none.
        plain: continue the text, without a chat template.
    """

    def __init__(self, lm: LanguageModel, params: SamplingParams, system: str = "", *, plain: bool = False) -> None:
        self.lm, self.params, self.system = lm, params, system
        self.plain = plain or lm.tokenizer.chat_template is None
        self.messages: list[dict[str, str]] = []
        self.lm.engine.drive()  # Ctrl-C then never meets the engine in the middle of a step
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP), "/set": self.set, "/system": self.set_system, "/again": self.again,
            "/undo": self.undo, "/new": self.new, "/save": self.save, "/load": self.load, "/export": self.export,
        }  # fmt: skip

    def run(self) -> None:
        """Read lines until the end of input or ``/quit``."""
        while True:
            try:
                line = self._read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line.strip():
                    self.messages.append({"role": "user", "content": line})
                    self.answer()
            except GroundupError as error:  # whatever it is, the conversation goes on
                say(" ".join(str(error).split()), style="yellow")

    def _read(self) -> str:
        prompt, lines = "> " if sys.stdin.isatty() else "", list[str]()
        try:
            while (line := input(prompt if not lines else "… " if prompt else "")).endswith("\\"):
                lines.append(line[:-1])
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input: byte {error.start} is not UTF-8 text. Convert it first.") from error
        return "\n".join([*lines, line])

    # ---- commands

    def command(self, line: str) -> None:
        """Carry out a slash command; a wrong one is told and changes nothing."""
        name, _, rest = line.strip().partition(" ")
        if name not in self.commands:
            say(f"{name} is not a command.{nearest(name, self.commands)}")
            say(HELP)
            return
        self.commands[name](rest.strip())

    def set(self, text: str) -> None:
        """Change a field of the sampling parameters."""
        if not text:
            shown = asdict(self.params)
            say("\n".join(f"  {name} = {value}" for name, value in shown.items() if value not in (None, (), "")))
            return
        key, _, value = text.partition(" ")
        known = [field.name for field in fields(SamplingParams)]
        if key not in known:
            say(f"{key} cannot be set.{nearest(key, known)} Known: {', '.join(known)}.")
            return
        try:
            self.params = with_field(self.params, key, value.strip(), "/set")
        except UsageError as error:
            say(str(error))
        else:
            say(f"{key} = {getattr(self.params, key)}")

    def set_system(self, text: str) -> None:
        """Change the system prompt."""
        self.system = text
        say("(noted)" if text else "(no system prompt)")

    def new(self, _: str = "") -> None:
        """Forget what was said."""
        self.messages = []
        say("(forgotten)")

    def undo(self, _: str = "") -> None:
        """Take back the last message and its answer."""
        if not self.messages:
            say("Nothing was said yet.")
            return
        while self.messages and self.messages.pop()["role"] != "user":
            pass
        say("(taken back)")

    def again(self, _: str = "") -> None:
        """Answer the last message once more."""
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        if self.messages:
            if self.params.seed is not None:  # the same seed would say the same
                self.params = replace(self.params, seed=self.params.seed + 1)
            self.answer()
        else:
            say("Nothing was said yet.")

    def save(self, name: str) -> None:
        """Write the conversation as JSON."""
        if not name:
            raise UsageError("/save FILE: where to?")
        write_json(Path(name), {"system": self.system, "messages": self.messages})
        say(f"(saved: {name})")

    def load(self, name: str) -> None:
        """Go on with a conversation that was saved.

        Raises:
            GroundupError: it cannot be read, or is none.
        """
        if not name:
            raise UsageError("/load FILE: which?")
        found = read_json(Path(name), "conversation")
        messages: Any = found.get("messages") if isinstance(found, dict) else None
        right = isinstance(messages, list) and all(
            isinstance(one, dict) and set(one) == {"role", "content"} and all(isinstance(v, str) for v in one.values())
            for one in messages
        )
        if not right or not isinstance(found.get("system", ""), str):
            raise UsageError(f"{name}: this is no conversation that /save wrote.")
        self.system, self.messages = found.get("system", ""), messages
        say(f"(loaded: {len(self.messages)} messages)")

    def export(self, name: str) -> None:
        """Write the conversation as Markdown."""
        if not name:
            raise UsageError("/export FILE: where to?")
        parts = [f"**system**\n\n{self.system}"] if self.system else []
        parts += [f"**{one['role']}**\n\n{one['content']}" for one in self.messages]
        with os_errors(name, "cannot write"):
            write_atomic(Path(name), "\n\n".join(parts) + "\n")
        say(f"(written: {name})")

    # ---- answers

    def prompt(self) -> str | list[int]:
        """What the model reads: the conversation by its template, or as one text."""
        if self.plain:
            parts = [self.system + "\n"] if self.system else []
            parts += [one["content"] + ("\n" if one["role"] == "assistant" else "") for one in self.messages]
            return "".join(parts)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return self.lm.tokenizer.apply_chat_template([*messages, *self.messages], add_generation_prompt=True)

    def answer(self) -> None:
        """Print the model's answer as it comes; Ctrl-C ends it and keeps what was said.

        Raises:
            GroundupError: the template refuses the conversation, or the model fails; the message is taken back.
        """
        try:
            generation = self.lm.generation(self.prompt(), self.params)
        except GroundupError:
            self.messages.pop()
            raise
        request, said = generation.request, ""
        started = time.monotonic()
        try:
            for piece in self.lm.pieces(generation):
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        except GroundupError:
            self.messages.pop()
            raise
        finally:
            print()
        self.messages.append({"role": "assistant", "content": said})
        self._tell(len(request.tokens), time.monotonic() - started, request.seconds_to_first, request.cached)

    @staticmethod
    def _tell(tokens: int, seconds: float, first: float | None, cached: int) -> None:
        if not sys.stdout.isatty() or first is None or tokens < 2 or seconds <= first:
            return
        rate = (tokens - 1) / (seconds - first)
        say(
            f"({tokens} tokens, {rate:.0f} tokens/s, the first after {first:.2f} s, {cached} from the cache)",
            style="dim",
        )


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and start the conversation."""
    call(chat, "chat", arguments)
