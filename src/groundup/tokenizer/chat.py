"""Chat templates: a conversation as the text, and the token ids, that a model was trained on.

A template is the Jinja program that Hugging Face's ``apply_chat_template`` runs, with the same functions, filters and
variables, so templates of other people's models work here as they are. What is added:

    Nobody can speak for the system   The text of a message never becomes a special token, whatever it spells, alone or
                                      together with what stands beside it. See chat_sandbox.py.
    What to learn from                :meth:`ChatTemplate.encode_with_mask` says which tokens the assistant is to
                                      produce, for supervised fine-tuning.
    Nothing is silently different     A role that templates do not know, an image, a template that runs for ever: one
                                      line that says so.

Token boundaries: the text is cut where the assistant's begins and where it ends (where the template says so with
``{% generation %}``; for a mask, always), and the parts are encoded apart. That is what generation does: it sees the
ids of the prompt, encoded as a whole, and appends its own. So the ids of a prompt are a prefix of the ids of the
conversation that came of it, and no token lies half in the prompt and half in the answer. Encoding the whole text at
once differs from this only where a token would span such an edge.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, Protocol

from groundup.runtime.errors import GroundupError, UsageError, nearest
from groundup.tokenizer.chat_presets import PRESETS

ROLES = frozenset(
    ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "environment", "observation")
)
"""The roles a message can have. A template may write a role into a special token ("<|" + role + "|>"), so a role is
never free text."""

MAX_INPUT = 1 << 24  # characters of a conversation, tools and variables included
MAX_DEPTH = 64  # lists in dictionaries in lists …
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message carries its reasoning

Message = Mapping[str, Any]


class ChatTokenizer(Protocol):
    """What a chat template needs of a tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Names and ids of the special tokens."""

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Token ids of a text, in which names of special tokens are ordinary text.

        ``continued``: the text goes on from another, so that no space is to be put before it.
        """


@dataclass(frozen=True)
class _Piece:
    """A part of a rendered conversation that is encoded by itself."""

    text: str
    special: bool
    continued: bool
    """Whether it goes on from other text, and not from a special token or nothing."""
    turn: int | None
    """Which of the assistant's texts it is a part of, counted from 0; None outside them."""


class ChatTemplate:
    """A conversation's form.

    Args:
        source: the template, in Jinja.
        variables: names that the template may use, such as ``bos_token`` and ``eos_token``. Like the template's own
            text, and unlike that of messages, they may become special tokens.
        special_tokens: the special tokens that the template cannot do without. A tokenizer that lacks one is refused;
            without this check its name would be encoded as ordinary text. By default those among ``variables`` whose
            name ends in ``_token`` and that the template uses.
        roles: the roles that messages may have.

    Raises:
        GroundupError: the template is too long or does not compile.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str] | None = None,
        special_tokens: Sequence[str] | None = None,
        roles: Collection[str] = ROLES,
    ) -> None:
        self.source = source
        self.variables = dict(variables or {})
        self.roles = frozenset(roles)
        self._program, self.has_generation, used = _compiled(source)
        if special_tokens is None:
            names = [name for name in self.variables if name.endswith("_token") and name in used]
            special_tokens = [self.variables[name] for name in names if self.variables[name]]
        self.special_tokens = tuple(dict.fromkeys(special_tokens))

    def __repr__(self) -> str:
        return f"<ChatTemplate: {len(self.source)} characters, special tokens {', '.join(self.special_tokens) or '?'}>"

    @classmethod
    def preset(cls, name: str) -> ChatTemplate:
        """The template of that name: one of ``CHAT_TEMPLATES``.

        Raises:
            UsageError: there is none.
        """
        if name not in CHAT_TEMPLATES:
            known = ", ".join(CHAT_TEMPLATES)
            raise UsageError(f"unknown chat template '{name}'. Known: {known}.{nearest(name, CHAT_TEMPLATES)}")
        return CHAT_TEMPLATES[name]

    # ---- as text

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation. To get token ids use :meth:`encode`: in a text nothing tells a special token
        from a message that spells its name.

        Args:
            messages: dictionaries with ``role`` and ``content``, and what else the template knows (``tool_calls``,
                ``name``, ``reasoning_content`` …). Content is a text or a list of text parts, which are joined.
            tools: the JSON schemas of the functions the model may call.
            add_generation_prompt: end with the beginning of the assistant's next message.
            continue_final_message: end in the middle of the last message, for the model to go on with it.
            variables: further variables of the template, such as ``documents`` or ``enable_thinking``.

        Raises:
            GroundupError: a message is not as it must be, or the template refuses, fails, or does not end.
        """
        chat = _Conversation.of(self, messages, tools, variables)
        if continue_final_message:
            return chat.restored(self._prefilled(chat, add_generation_prompt))
        return chat.restored(self._run(chat, marking=False, add_generation_prompt=add_generation_prompt))

    def _run(
        self,
        chat: _Conversation,
        marking: bool,
        add_generation_prompt: bool = False,
        count: int | None = None,
    ) -> str:
        """Render the first ``count`` messages, or all; with the marks of chat_sandbox.py where ``marking``."""
        from jinja2.exceptions import SecurityError, UndefinedError

        from groundup.tokenizer import chat_sandbox

        given = {**self.variables, "documents": None, **chat.inputs(marking, count)}
        render = chat_sandbox.Render(marking, chat.now)
        try:
            return chat_sandbox.run(self._program, {**given, "add_generation_prompt": add_generation_prompt}, render)
        except chat_sandbox.RefusedError as error:
            raise GroundupError(f"the chat template refuses these messages: {_one_line(error)}") from error
        except chat_sandbox.TooMuchError as error:
            raise GroundupError(f"the chat template was stopped{_line(error)}: {_one_line(error)}.") from error
        except SecurityError as error:
            raise GroundupError(
                f"the chat template reaches for what no template may have{_line(error)}: {_one_line(error)}"
            ) from error
        except Exception as error:
            hint = " Does every message have the fields that it uses?" if isinstance(error, UndefinedError) else ""
            raise GroundupError(
                f"the chat template fails{_line(error)}: {_one_line(error).rstrip('.')} ({type(error).__name__}).{hint}"
            ) from error

    def _marked(self, chat: _Conversation, add_generation_prompt: bool) -> str:
        """The rendered text with its marks, held against the text without them."""
        from groundup.tokenizer import chat_sandbox

        text = self._run(chat, marking=False, add_generation_prompt=add_generation_prompt)
        marked = self._run(chat, marking=True, add_generation_prompt=add_generation_prompt)
        again = chat_sandbox.unmarked(marked)
        if again != text:
            same = _common(again, text)
            raise GroundupError(
                f"the chat template transforms text so that it cannot be told which of it came in with messages (at "
                f"{text[max(0, same - 20) : same + 20]!a}): special tokens would not be safe. Let it write message "
                "text with trim, split, replace, +, ~ and tojson."
            )
        return marked

    def _prefilled(self, chat: _Conversation, add_generation_prompt: bool) -> str:
        """The rendered text up to the last character of the last message's content, with its marks."""
        from groundup.tokenizer.chat_sandbox import CLOSE, MARK, OPEN

        content = chat.messages[-1].get("content")
        if add_generation_prompt or not isinstance(content, str) or not content.strip():
            raise UsageError(
                "continue_final_message needs a last message with content to go on with, and no add_generation_prompt."
            )
        marked = self._marked(chat, add_generation_prompt=False)
        marked = marked[: marked.rfind(MARK) + 1]
        if not chat.restored(marked).rstrip().endswith(content.rstrip()):
            raise GroundupError(
                "continue_final_message: the chat template does not end with the content of the last message."
            )
        return marked + CLOSE * (marked.count(OPEN) - marked.count(CLOSE))

    # ---- as token ids

    def encode(
        self,
        tokenizer: ChatTokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation. Only what the template itself writes becomes special tokens.

        Args:
            tokenizer: whose ids; it has the special tokens that the template needs.
            messages, tools, add_generation_prompt, continue_final_message, variables: as for :meth:`render`.

        Raises:
            GroundupError: as for :meth:`render`; or the tokenizer lacks a special token.
        """
        self.check_tokens(tokenizer)
        chat = _Conversation.of(self, messages, tools, variables)
        if continue_final_message:
            marked = self._prefilled(chat, add_generation_prompt)
        else:
            marked = self._marked(chat, add_generation_prompt)
        return [number for piece in _pieces(marked, chat, tokenizer) for number in _ids(piece, tokenizer)]

    def encode_with_mask(
        self,
        tokenizer: ChatTokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        turns: Literal["all", "last"] = "all",
        **variables: Any,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and which of them the assistant is to produce.

        That is what stands between ``{% generation %}`` and ``{% endgeneration %}``. In a template without, it is what
        an assistant message adds to the conversation before it with the generation prompt, up to and including the
        first special token after its text; where none follows, up to the template's white space.

        Args:
            tokenizer, messages, tools, variables: as for :meth:`encode`.
            turns: every message of the assistant, or only the last.

        Returns:
            The ids, and a list as long with 1 for the assistant's tokens and 0 for the others.

        Raises:
            GroundupError: as for :meth:`encode`; or the assistant says nothing; or the template has no
                ``{% generation %}`` and writes the beginning of a conversation differently when it goes on.
        """
        if turns not in ("all", "last"):
            raise UsageError(f"turns = '{turns}' is unknown. Known: all, last.{nearest(str(turns), ('all', 'last'))}")
        self.check_tokens(tokenizer)
        chat = _Conversation.of(self, messages, tools, variables)
        marked = self._marked(chat, add_generation_prompt=False)
        if not self.has_generation:
            marked = self._with_generation(marked, chat, tokenizer)
        pieces = list(_pieces(marked, chat, tokenizer))
        last = max((piece.turn for piece in pieces if piece.turn is not None), default=None)
        if last is None:
            raise GroundupError("there is nothing to learn from: the chat template writes no text of the assistant.")
        ids: list[int] = []
        mask: list[int] = []
        for piece in pieces:
            numbers = _ids(piece, tokenizer)
            wanted = piece.turn is not None and (turns == "all" or piece.turn == last)
            ids += numbers
            mask += [int(wanted)] * len(numbers)
        return ids, mask

    def end_of_turn(self, tokenizer: ChatTokenizer) -> int | None:
        """The special token with which the assistant ends what it says; None where the template writes none."""
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, mask = self.encode_with_mask(tokenizer, said)
        except GroundupError:  # a template for other conversations, or one that lacks its tokens
            return None
        last = max((token for token, wanted in enumerate(mask) if wanted), default=None)
        return ids[last] if last is not None and ids[last] in tokenizer.special_tokens.values() else None

    def _with_generation(self, marked: str, chat: _Conversation, tokenizer: ChatTokenizer) -> str:
        """Put the marks of ``{% generation %}`` into the text of a template that has none."""
        from groundup.tokenizer.chat_sandbox import CLOSE, MARK, OPEN

        special = _special_pattern(tokenizer)
        longest = max(map(len, tokenizer.special_tokens), default=0)
        done, place = [], 0
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._run(chat, True, add_generation_prompt=True, count=number)
            upto = self._run(chat, True, count=number + 1)
            start = len(prompt)
            text_ends = max(upto.rfind(MARK) + 1, start)
            # What a template writes only where a conversation ends is not the assistant's.
            stays = text_ends + _common(upto[text_ends:], marked[text_ends:])
            for text in (upto, marked):
                for found in special.finditer(text, text_ends, stays + longest):
                    if found.start() < stays < found.end():  # two special tokens that begin alike
                        stays = found.start()
            ends = special.search(upto, text_ends, stays)
            end = ends.end() if ends else max(text_ends, len(upto[:stays].rstrip()))
            if not (_begins(upto, prompt) and _begins(marked, upto[:end])):
                raise GroundupError(
                    f"the assistant's tokens in messages[{number}] cannot be told apart: the chat template does not "
                    "write the messages before it, with the generation prompt, as the beginning of the whole "
                    "conversation. Put {% generation %} and {% endgeneration %} around the assistant's text in the "
                    "template."
                )
            done += [marked[place:start], OPEN, marked[start:end], CLOSE]
            place = end
        return "".join([*done, marked[place:]])

    def check_tokens(self, tokenizer: ChatTokenizer) -> None:
        """See that a tokenizer has the special tokens that the template cannot do without.

        Raises:
            GroundupError: it lacks one.
        """
        missing = [name for name in self.special_tokens if name not in tokenizer.special_tokens]
        if missing:
            raise GroundupError(
                f"the chat template needs special tokens that this tokenizer lacks: {', '.join(missing)}. Train it "
                f"with special_tokens={tuple(self.special_tokens)!r} among them, or choose another template."
            )


@dataclass(frozen=True)
class _Conversation:
    """What a template is given: checked, plain data."""

    messages: list[dict[str, Any]]
    others: dict[str, Any]
    now: datetime
    """One time for all renderings of a conversation, so that they agree."""
    hide: Mapping[int, int]
    """Substitutes for characters that stand for marks, where the input itself has such."""

    @classmethod
    def of(
        cls,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> _Conversation:
        """Check what the caller gave."""
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise GroundupError("messages must be a list of dictionaries: [{'role': 'user', 'content': 'Hello'}].")
        if not messages:
            raise GroundupError("there are no messages. Give at least one: [{'role': 'user', 'content': 'Hello'}].")
        if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
            raise GroundupError("tools must be a list of JSON schemas of functions.")
        checked = [_message(message, f"messages[{n}]", template.roles) for n, message in enumerate(messages)]
        others = {name: _data(value, name) for name, value in {"tools": tools, **variables}.items()}
        characters = [text for value in (checked, others) for text in _texts(value)]
        if (total := sum(map(len, characters))) > MAX_INPUT:
            raise GroundupError(f"the conversation has {total:,} characters; a chat template takes {MAX_INPUT:,}.")
        return cls(checked, others, datetime.now(), _substitutes(characters))

    def inputs(self, marking: bool, count: int | None) -> dict[str, Any]:
        """The template's variables, of which ``messages`` are the first ``count``."""
        from groundup.tokenizer.chat_sandbox import mark

        if not marking and not self.hide:
            return {**self.others, "messages": self.messages[:count]}

        def prepared(value: Any) -> Any:
            if isinstance(value, str):
                value = value.translate(self.hide)
                return mark(value) if marking else value
            if isinstance(value, dict):
                return {prepared(key): prepared(item) for key, item in value.items()}
            return [prepared(item) for item in value] if isinstance(value, list) else value

        others = {name: prepared(value) for name, value in self.others.items()}
        # The role is one of a known set, so a template may build a special token of it.
        messages = [prepared(message) | {"role": message["role"]} for message in self.messages[:count]]
        return {**others, "messages": messages}

    def restored(self, text: str) -> str:
        """A rendered text without its marks."""
        from groundup.tokenizer.chat_sandbox import unmarked

        back = {substitute: character for character, substitute in self.hide.items()}
        return unmarked(text).translate(back) if back else unmarked(text)


def _message(message: Any, where: str, roles: frozenset[str]) -> dict[str, Any]:
    """A message as plain data, with its role checked and its content a text."""
    if not isinstance(message, Mapping):
        raise GroundupError(f"{where} is {type(message).__name__}, not a dictionary with 'role' and 'content'.")
    # A field without a value is a field that is not there: so do transformers, and templates count on it.
    fields = {name: value for name, value in _data(message, where).items() if value is not None}
    role = fields.get("role")
    if not isinstance(role, str):
        raise GroundupError(f"{where} has no role. It needs one, such as 'user' or 'assistant'.")
    if role not in roles:
        known = ", ".join(sorted(roles))
        raise GroundupError(f"{where}: unknown role {role[:40]!r}. Known: {known}.{nearest(role[:40], roles)}")
    if isinstance(fields.get("content"), list):
        fields["content"] = "".join(_text_part(part, where) for part in fields["content"])
    if "content" not in fields and not fields.get("tool_calls"):
        raise GroundupError(f"{where} has no content. A message without text has content ''.")
    if not isinstance(fields.get("content", ""), str):
        raise GroundupError(f"{where}.content is {type(fields['content']).__name__}; it must be text.")
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    if reasoning is not None:  # templates read it under one of these two names
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def _text_part(part: Any, where: str) -> str:
    """The text of one part of a content that is a list."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise GroundupError(
            f"{where}.content has a part of type {kind!r}. Only text can be encoded: {{'type': 'text', 'text': '…'}}."
        )
    return part["text"]


def _data(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of ``value`` in plain types. Objects stay outside: a template could call their methods."""
    if depth > MAX_DEPTH:
        raise GroundupError(f"{where} is nested more than {MAX_DEPTH} deep.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_data(key, where, depth + 1): _data(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_data(item, where, depth + 1) for item in value]
    raise GroundupError(
        f"{where} holds {type(value).__name__}; a chat template takes text, numbers, lists and dictionaries."
    )


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _substitutes(texts: Sequence[str]) -> dict[int, int]:
    """For the characters that serve as marks, where a text has them: characters that no text has."""
    from groundup.tokenizer.chat_sandbox import CLOSE, HIDDEN, MARK, OPEN

    if not any(map(HIDDEN.search, texts)):
        return {}
    used = set().union(*map(set, texts))
    free = (point for point in range(0xF0000, 0x110000) if chr(point) not in used)
    return {ord(character): next(free) for character in (MARK, OPEN, CLOSE)}


def _special_pattern(tokenizer: ChatTokenizer) -> re.Pattern[str]:
    """Finds special tokens that the template wrote, the longest first: no character of them is marked."""
    from groundup.tokenizer.chat_sandbox import MARK

    names = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, names))})(?!{MARK})" if names else "(?!)")


def _pieces(marked: str, chat: _Conversation, tokenizer: ChatTokenizer) -> Iterator[_Piece]:
    """Cut a rendered text at its special tokens and at the edges of the assistant's texts."""
    from groundup.tokenizer.chat_sandbox import CLOSE, OPEN

    cuts = re.compile(f"({_special_pattern(tokenizer).pattern}|[{OPEN}{CLOSE}])")
    depth, turn, after_text = 0, -1, False
    for number, text in enumerate(cuts.split(marked)):
        if text == OPEN:
            depth += 1
            turn += depth == 1
        elif text == CLOSE:
            depth -= 1
        elif text:
            special = number % 2 == 1
            yield _Piece(chat.restored(text), special, after_text, turn if depth else None)
            after_text = not special


def _ids(piece: _Piece, tokenizer: ChatTokenizer) -> list[int]:
    if piece.special:
        return [tokenizer.special_tokens[piece.text]]
    return tokenizer.encode(piece.text, continued=piece.continued)


def _begins(text: str, beginning: str) -> bool:
    """Whether a marked text begins with another, and its last character has the same mark in both."""
    from groundup.tokenizer.chat_sandbox import MARK

    return text.startswith(beginning) and not text.startswith(MARK, len(beginning))


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[Any, bool, frozenset[str]]:
    """A template ready to run, whether it has ``{% generation %}``, and the variables it asks for."""
    from jinja2 import TemplateSyntaxError, meta

    from groundup.tokenizer import chat_sandbox

    if not isinstance(source, str) or len(source) > chat_sandbox.MAX_TEMPLATE:
        raise GroundupError(f"the chat template is too long: the most is {chat_sandbox.MAX_TEMPLATE:,} characters.")
    if chat_sandbox.HIDDEN.search(source):
        raise GroundupError("the chat template has noncharacters (U+FDD0 to U+FDD2) in it. Remove them.")
    try:
        program = chat_sandbox.compile_template(source)
        tree = chat_sandbox.environment().parse(source)
    except TemplateSyntaxError as error:
        message = _one_line(error.message or error).rstrip(".")
        raise GroundupError(f"the chat template does not compile: line {error.lineno}: {message}.") from error
    return program, chat_sandbox.has_generation(tree), frozenset(meta.find_undeclared_variables(tree))


def _one_line(error: object) -> str:
    """An error's message, in one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "…"


def _line(error: BaseException) -> str:
    """Where in the template an error arose: `` in line 3``, or nothing."""
    traceback, line = error.__traceback__, 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f" in line {line}" if line else ""


class _Presets(Mapping[str, ChatTemplate]):
    """Templates by name, each compiled when it is first asked for."""

    def __getitem__(self, name: str) -> ChatTemplate:
        preset = PRESETS[name]
        return ChatTemplate(preset.source, preset.variables, preset.special_tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(PRESETS)

    def __len__(self) -> int:
        return len(PRESETS)


CHAT_TEMPLATES: Mapping[str, ChatTemplate] = _Presets()
"""The forms of chat that everybody knows: chatml, llama2, llama3, alpaca, vicuna. The ``special_tokens`` of each are
those a tokenizer must be trained with to use it."""
