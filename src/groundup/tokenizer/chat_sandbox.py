"""Where a chat template runs: it sees only data, for a bounded time, and every character keeps its origin.

A chat template is a program that comes with somebody's model and handles text from strangers. Three things are
guarded here:

    The machine       Jinja's immutable sandbox: a template reads what it is given and reaches nothing else.
    Time and memory   Every loop turn, call, filter and joined text is charged to a :class:`Render`, which ends the
                      template when the account is empty. Operations that make much of little ("a" * 10**9) are
                      charged before they run.
    The special       A character that came in with a message is followed by ``MARK``, wherever the template takes
    tokens            it. What a template writes itself bears no mark, so after rendering, a special token's name is
                      a special token only where no character of it is marked.

To a template a marked text is the text without its marks (:class:`Marked`): comparing, searching, splitting and
trimming see the plain characters, so that a template does with marks what it does without. The marks are characters
of the string itself, so what copies characters (joining, formatting, adding) carries them along unasked.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property, wraps
from typing import Any

from jinja2 import Template, TemplateSyntaxError, Undefined, nodes, pass_context, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Noncharacters: Unicode keeps them for use inside a program, and they are in nobody's vocabulary.
MARK = "\ufdd0"  # follows every character that came in with a message
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # around what the assistant is to produce
HIDDEN = re.compile(f"[{MARK}{OPEN}{CLOSE}]")

MAX_TEMPLATE = 1 << 18  # characters of a template; the longest in use have some 20,000
MAX_CHARACTERS = 1 << 28  # characters that one rendering may make in all, intermediate texts included
MAX_SECONDS = 10.0  # of this thread's processor time, for one rendering
MAX_WIDTH = 10_000  # for numbers that say how wide or how often: center(n), indent(n), batch(n), "%99d"
MAX_BITS = 4096  # of a whole number

GENERATION = "mark_generation"


class TooMuchError(Exception):
    """The template makes too much text, or does not come to an end."""


class RefusedError(TemplateError):
    """The template called ``raise_exception``."""


@dataclass
class Render:
    """One run of a template: what it may still use, and whether texts are marked."""

    marking: bool
    now: datetime
    characters_left: int = field(default_factory=lambda: MAX_CHARACTERS)
    deadline: float = field(default_factory=lambda: time.thread_time() + MAX_SECONDS)

    def charge(self, characters: int = 0) -> None:
        """Take ``characters`` off the account, and look at the clock."""
        self.characters_left -= characters
        if self.characters_left < 0:
            raise TooMuchError(f"it makes more than {MAX_CHARACTERS:,} characters of text")
        if time.thread_time() > self.deadline:
            raise TooMuchError(f"it does not come to an end in {MAX_SECONDS:g} seconds")


# The templates of two threads run in the same environment, each with its own account.
_RENDER: ContextVar[Render] = ContextVar("render")


def size(text: str) -> int:
    """The characters of a text, for the account: about as many with marks as without."""
    return str.__len__(text) // 2 if isinstance(text, Marked) else len(text)


def charge(characters: int = 0) -> None:
    """Charge the rendering that runs here."""
    _RENDER.get().charge(characters)


# ---- marked text


def mark(text: str) -> str:
    """``text``, which has no hidden characters, as text that came in with a message."""
    if not text:
        return ""
    marked = Marked(MARK.join(text) + MARK)
    marked.plain = text
    return marked


def unmarked(text: str) -> str:
    """The text without its marks, as an ordinary string."""
    if isinstance(text, Marked):
        return text.plain
    return text.replace(MARK, "").replace(OPEN, "").replace(CLOSE, "")


def raw(text: str) -> str:
    """The text with its marks, as an ordinary string."""
    return str.__str__(text)


def wrapped(text: str) -> str:
    """``text`` as :class:`Marked` where it holds hidden characters; other strings as they are."""
    hidden = type(text) is str and (MARK in text or OPEN in text or CLOSE in text)
    return Marked(text) if hidden else text


class Marked(str):
    """A text of which some characters are marked. It behaves like the text without the marks.

    The string itself, which C code sees, has the marks in it. Parts cut out keep the marks of their characters. What
    no longer corresponds to the original character by character is marked as a whole.
    """

    @cached_property
    def plain(self) -> str:
        """The text without the marks."""
        return unmarked(raw(self))

    @cached_property
    def _offsets(self) -> Iterable[int]:
        """Where each plain character begins in the string with marks; one more for the end."""
        text = raw(self)
        if len(text) == 2 * len(self.plain) and text.count(MARK) == len(self.plain):
            return range(0, len(text) + 1, 2)
        return [place for place, character in enumerate(text) if not HIDDEN.match(character)] + [len(text)]

    def _part(self, start: int, end: int) -> str:
        """Plain characters ``start`` to ``end``, with their marks."""
        if start >= end:
            return ""
        offsets: Any = self._offsets
        return wrapped(raw(self)[offsets[start] if start else 0 : offsets[end]])

    def _parts(self, pieces: Iterable[tuple[int, int]]) -> list[str]:
        return [self._part(start, end) for start, end in pieces]

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        # What prints a list or a dictionary with marked texts in it prints marks.
        return raw(mark(repr(self.plain)))

    def __hash__(self) -> int:
        return hash(self.plain)

    def __eq__(self, other: object) -> bool:
        return self.plain == _plain(other)

    def __ne__(self, other: object) -> bool:
        return self.plain != _plain(other)

    def __lt__(self, other: str) -> bool:
        return self.plain < unmarked(other)

    def __le__(self, other: str) -> bool:
        return self.plain <= unmarked(other)

    def __gt__(self, other: str) -> bool:
        return self.plain > unmarked(other)

    def __ge__(self, other: str) -> bool:
        return self.plain >= unmarked(other)

    def __len__(self) -> int:
        return len(self.plain)

    def __contains__(self, part: object) -> bool:
        return _plain(part) in self.plain

    def __getitem__(self, key: Any) -> str:
        if not isinstance(key, slice):
            place = range(len(self.plain))[key]
            return self._part(place, place + 1)
        places = range(*key.indices(len(self.plain)))
        if places.step == 1:
            return self._part(places.start, places.stop)
        return wrapped("".join(raw(self._part(place, place + 1)) for place in places))

    def __iter__(self) -> Iterator[str]:
        return (self._part(place, place + 1) for place in range(len(self.plain)))

    def __format__(self, form: str) -> str:
        return raw(mark(format(self.plain, form))) if form else raw(self)

    def __int__(self) -> int:
        return int(self.plain)

    def __float__(self) -> float:
        return float(self.plain)

    # ---- what cuts a part out

    def lstrip(self, chars: Any = None) -> str:
        """The text without leading ``chars``."""
        return self._part(len(self.plain) - len(self.plain.lstrip(_plain(chars))), len(self.plain))

    def rstrip(self, chars: Any = None) -> str:
        """The text without trailing ``chars``."""
        return self._part(0, len(self.plain.rstrip(_plain(chars))))

    def strip(self, chars: Any = None) -> str:
        """The text without ``chars`` at either end."""
        start = len(self.plain) - len(self.plain.lstrip(_plain(chars)))
        return self._part(start, len(self.plain.rstrip(_plain(chars))))

    def removeprefix(self, prefix: str, /) -> str:
        """The text without ``prefix`` where it begins with it."""
        return self._part(len(self.plain) - len(self.plain.removeprefix(unmarked(prefix))), len(self.plain))

    def removesuffix(self, suffix: str, /) -> str:
        """The text without ``suffix`` where it ends with it."""
        return self._part(0, len(self.plain.removesuffix(unmarked(suffix))))

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        """The parts between separators."""
        return self._found(self.plain.split(_plain(sep), maxsplit))

    def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        """The parts between separators, the last ones first to be split off."""
        return self._found(self.plain.rsplit(_plain(sep), maxsplit))

    def _found(self, pieces: list[str]) -> list[str]:
        """The pieces of a split, which stand in the text in this order."""
        spans, place = [], 0
        for piece in pieces:
            # After a separator a piece begins at once; after white space, at its first character, which is none.
            start = self.plain.index(piece, place) if piece else place
            spans.append((start, start + len(piece)))
            place = start + len(piece)
        return self._parts(spans)

    def splitlines(self, keepends: Any = False) -> list[str]:
        """The lines."""
        spans, place = [], 0
        for bare, whole in zip(self.plain.splitlines(), self.plain.splitlines(keepends=True), strict=True):
            spans.append((place, place + len(whole if keepends else bare)))
            place += len(whole)
        return self._parts(spans)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """What stands before ``sep``, ``sep``, and what stands after it."""
        return self._three(self.plain.partition(unmarked(sep)))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """What stands before the last ``sep``, ``sep``, and what stands after it."""
        return self._three(self.plain.rpartition(unmarked(sep)))

    def _three(self, pieces: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(pieces[0]), len(pieces[0]) + len(pieces[1])
        return self._part(0, first), self._part(first, second), self._part(second, len(self.plain))

    def replace(self, old: Any, new: Any, count: Any = -1) -> str:
        """The text with ``new`` instead of ``old``; the marks of ``new`` are its own."""
        old = unmarked(old)
        # Text between the occurrences, then all of it joined by the new text.
        pieces = ["", *self, ""] if not old else self.plain.split(old, count)
        if not old:
            times = len(pieces) - 1 if count < 0 else min(count, len(pieces) - 1)
            head, tail = pieces[: times + 1], pieces[times + 1 :]
            return wrapped(raw(new).join(map(raw, head)) + "".join(map(raw, tail)))
        spans, place = [], 0
        for piece in pieces:
            spans.append((place, place + len(piece)))
            place += len(piece) + len(old)
        return wrapped(raw(new).join(map(raw, self._parts(spans))))

    # ---- what changes characters

    def _changed(self, text: str) -> str:
        """``text`` is made of this one: each character has the mark of the one it comes from."""
        if len(text) != len(self.plain):
            return mark(text)
        old = iter(text)
        return Marked("".join(c if HIDDEN.match(c) else next(old) for c in raw(self)))

    def upper(self) -> str:
        """In upper case."""
        return self._changed(self.plain.upper())

    def lower(self) -> str:
        """In lower case."""
        return self._changed(self.plain.lower())

    def capitalize(self) -> str:
        """The first character in upper case, the others in lower case."""
        return self._changed(self.plain.capitalize())

    def title(self) -> str:
        """Each word with its first character in upper case."""
        return self._changed(self.plain.title())

    def swapcase(self) -> str:
        """Upper case in lower, lower case in upper."""
        return self._changed(self.plain.swapcase())

    def casefold(self) -> str:
        """For comparing without regard to case."""
        return self._changed(self.plain.casefold())


def _plain(value: Any) -> Any:
    """A value without marks, however deep they are."""
    if isinstance(value, str):
        return unmarked(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _asking(name: str) -> Callable[..., Any]:
    """A method that answers a question about the plain text."""

    def method(self: Marked, *args: Any) -> Any:
        return getattr(self.plain, name)(*map(_plain, args))

    method.__name__ = name
    return method


def _remaking(name: str) -> Callable[..., str]:
    """A method whose result has other characters than the text: it is marked as a whole."""

    def method(self: Marked, *args: Any) -> str:
        return mark(getattr(self.plain, name)(*map(_plain, args)))

    method.__name__ = name
    return method


for _name in (
    *("find", "rfind", "index", "rindex", "count", "startswith", "endswith"),
    *(name for name in dir(str) if name.startswith("is")),
):
    setattr(Marked, _name, _asking(_name))
for _name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
    setattr(Marked, _name, _remaking(_name))


# ---- the environment


class _Code(CodeGenerator):
    """Compiled templates that look at the clock in every block and join with the environment's own join."""

    def enter_frame(self, frame: Frame) -> None:
        super().enter_frame(frame)
        self.writeline("environment.tick()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (Jinja's own name)
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: what lies between is for the assistant to produce."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of :meth:`mark_generation` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method(GENERATION), [], [], body).set_lineno(line)

    def mark_generation(self, caller: Macro) -> str:
        """The body, between ``OPEN`` and ``CLOSE`` where texts are marked."""
        body = caller()
        return wrapped(f"{OPEN}{raw(body)}{CLOSE}") if _RENDER.get().marking else body


class Environment(ImmutableSandboxedEnvironment):
    """What transformers gives chat templates, with every step accounted for."""

    code_generator_class = _Code
    # An operator that is listed here is not computed while compiling, where nobody keeps account.
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=_printed,
        )
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        # Of no use in a chat, and with results or running times that nobody can answer for.
        for name in ("urlize", "wordwrap", "pprint", "random"):
            del self.filters[name]
        for name in ("int", "float", "wordcount", "title", "truncate", "indent", "center", "striptags", "urlencode"):
            self.filters[name] = _on_plain_text(self.filters[name])
        self.filters |= {
            "tojson": _tojson,
            "replace": _replace,
            "format": _format,
            "join": _checked_join(self.filters["join"]),
            "sum": _sum,
            "indent": _checked_indent(self.filters["indent"]),
        }
        self.filters |= {name: _accounted(name, function) for name, function in self.filters.items()}

    @staticmethod
    def tick() -> None:
        """Called at the beginning of every block that runs."""
        charge()

    @staticmethod
    def concat(pieces: Iterable[Any]) -> str:
        """Join what a template prints."""
        joined = []
        for piece in pieces:
            text = piece if isinstance(piece, str) else _text(piece)
            charge(size(text))
            joined.append(text)
        return wrapped("".join(joined))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator of the template, charged before it runs."""
        charge(_growth(operator, left, right))
        return _result(self.binop_table[operator](left, right))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in the template, charged before it runs."""
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = obj.__name__
            if type(owner) is str and any(isinstance(arg, Marked) for arg in args) and name != "join":
                obj = getattr(Marked(owner), name)  # which searches for the plain text of the arguments
            args = _charge_method(owner, name, args)
        charge()
        return _result(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in the sandbox, without the ways from text to bytes and tables, on which nobody keeps account."""
        if isinstance(obj, str) and attr in ("encode", "translate", "maketrans", "format_map", "plain"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, sandboxed and charged."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        owner = str(value.__self__)

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_widths(owner)
            if re.search(r":[^{}]*\{", owner):
                raise SecurityError("a width inside a format must be a plain number")
            charge(owner.count("{") * _longest((*args, *kwargs.values())) + len(owner))
            return inner(*args, **kwargs)

        return checked


@cache
def environment() -> Environment:
    """The one environment of this process."""
    return Environment()


@pass_context
def _printed(_: Context, value: Any) -> str:
    """What ``{{ value }}`` prints. Taking the context keeps Jinja from printing constants while compiling."""
    return value if isinstance(value, str) else _text(value)


def _text(value: Any) -> str:
    """A value that is no text, as text: data, and never part of a special token."""
    if isinstance(value, Undefined):
        if value._undefined_exception is SecurityError:  # which by itself would print nothing
            value._fail_with_undefined_error()
        return str(value)
    text = unmarked(str(value))
    return mark(text) if _RENDER.get().marking else text


def _result(value: Any) -> Any:
    """The result of an operation, charged; marks that C code carried along are recognised."""
    if isinstance(value, str):
        charge(size(value))
        return wrapped(value)
    if isinstance(value, list | tuple):
        charge(8 * len(value))
    elif isinstance(value, int):
        _check_bits(value.bit_length())
    return value


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TooMuchError(f"it computes a number of more than {MAX_BITS} bits")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise TooMuchError(f"it asks for a width or a count of {value}; the most is {MAX_WIDTH}")


def _check_widths(form: str) -> None:
    """Refuse a format such as ``"%99999999d"``."""
    _check_numbers(int(digits) for digits in re.findall(r"\d{5,4000}", form))


def _longest(values: Iterable[Any]) -> int:
    """The characters of the longest of the values when they are printed, roughly."""
    return max((len(value) if isinstance(value, str) else len(str(value)) for value in values), default=0)


def _growth(operator: str, left: Any, right: Any) -> int:
    """How many characters an operator will make, for those that can make much of little."""
    if operator == "*":
        for much, times in ((left, right), (right, left)):
            if isinstance(much, Sized) and isinstance(times, int):
                return 8 * len(much) * max(0, times)
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        _check_bits(bits * abs(right) if operator == "**" else bits + right.bit_length())
    if operator == "%" and isinstance(left, str):
        _check_widths(left)
        values = right if isinstance(right, tuple) else tuple(right.values()) if isinstance(right, dict) else (right,)
        if "*" in left:
            _check_numbers(values)
        return left.count("%") * _longest(values)
    return 0


def _charge_method(owner: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Charge a method of a text for what it will make; returns the arguments to call it with."""
    if name in ("center", "ljust", "rjust", "zfill"):
        _check_numbers(args)
    elif name == "expandtabs":
        _check_numbers(args)
        charge(owner.count("\t") * MAX_WIDTH)
    elif name == "replace" and len(args) >= 2:
        charge(_replacements(owner, args[0]) * len(args[1]))
    elif name == "join" and len(args) == 1:
        items = list(args[0])
        charge(sum(map(len, items)) + len(owner) * len(items))
        return (items,)
    return args


def _replacements(text: str, old: Any) -> int:
    return text.count(old) if isinstance(old, str) else 0


# ---- functions and filters


def _raise_exception(message: Any) -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    _check_widths(unmarked(form))
    return _RENDER.get().now.strftime(unmarked(form))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON, without Jinja's escapes for HTML. All of it counts as text of the messages."""
    _check_numbers([indent])
    text = json.dumps(
        _plain(value), ensure_ascii=ensure_ascii, indent=_plain(indent), separators=separators, sort_keys=sort_keys
    )
    return mark(text) if _RENDER.get().marking else text


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = (part if isinstance(part, str) else _text(part) for part in (text, old, new))
    charge(_replacements(text, old) * len(new))
    if isinstance(old, Marked):
        text = Marked(text)
    return text.replace(old, new, -1 if count is None else count)


def _checked_join(join: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's filter, charged before it joins."""

    @wraps(join)
    def filter_(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        items = list(value)
        charge((len(d) if isinstance(d, str) else 0) * len(items))
        charge(sum(len(item) for item in items if isinstance(item, str)))
        return join(context, items, d, attribute)

    return filter_


def _checked_indent(indent: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's filter, charged before it indents."""

    @wraps(indent)
    def filter_(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        charge((s.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
        return indent(s, width, first, blank)

    return filter_


@pass_environment
def _sum(environment: Environment, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's filter; lists, which it can sum too, are charged one by one."""
    total = start
    for item in iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable):
        total = _result(total + item)
    return total


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    values: Any = kwargs or args
    charge(_growth("%", value, values))
    return value % values


def _on_plain_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that computes with the characters of a text: it is given the plain ones, and its text is marked."""

    @wraps(function)
    def filter_(*args: Any, **kwargs: Any) -> Any:
        result = function(*map(_unmarked_text, args), **{name: _unmarked_text(arg) for name, arg in kwargs.items()})
        some_marked = any(isinstance(arg, Marked) for arg in (*args, *kwargs.values()))
        return mark(result) if some_marked and isinstance(result, str) else result

    return filter_


def _unmarked_text(value: Any) -> Any:
    return value.plain if isinstance(value, Marked) else value


def _accounted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for what it is given and what it makes."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # such a filter is given the environment or so before
    counts = name in ("center", "indent", "batch", "slice", "round")

    @wraps(function)
    def filter_(*args: Any, **kwargs: Any) -> Any:
        if counts:
            _check_numbers([*args[first + 1 :], *kwargs.values()])
        charge(len(args[first]) if isinstance(args[first], Sized) else 0)
        return _result(function(*args, **kwargs))

    return filter_


# ---- running a template


def compile_template(source: str) -> Template:
    """Compile a template.

    Raises:
        TemplateSyntaxError: it is no Jinja, or names a filter that there is not.
    """
    try:
        return environment().from_string(source)
    except TemplateSyntaxError:
        raise
    except (SyntaxError, RecursionError, MemoryError, OverflowError, ValueError) as error:
        raise TemplateSyntaxError(f"too deep or too large ({type(error).__name__})", 1) from error


def has_generation(tree: nodes.Template) -> bool:
    """Whether a parsed template says with ``{% generation %}`` what the assistant is to produce."""
    return any(node.name == GENERATION for node in tree.find_all(nodes.ExtensionAttribute))


def run(template: Template, variables: Mapping[str, Any], render: Render) -> str:
    """Render a template: the text, with its marks where ``render.marking``.

    Raises:
        RefusedError: the template called ``raise_exception``.
        TooMuchError: it needs more time or memory than it may have.
        Exception: whatever goes wrong in it.
    """
    token = _RENDER.set(render)
    try:
        return raw(template.render(variables))
    finally:
        _RENDER.reset(token)
