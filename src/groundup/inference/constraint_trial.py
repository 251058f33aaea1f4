"""Compiles one untrusted schema, expression or grammar in a process of its own, where it can do no harm.

The library bounds most of its own work, but not all: intersections of long expressions, and divisors of long numbers,
take minutes, and a chain of twenty thousand definitions overflows the stack and ends the process. So what was never
compiled before is compiled here first, over a vocabulary of single bytes, with less time, memory and stack than the
process that will use it has. What fails here is refused there; what passes takes about as long again there.

``python -m groundup.inference.constraint_trial`` reads one JSON object from standard input and writes another. It is
started by constraints.py, and imports nothing heavy.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from typing import Any

SECONDS = 1.0  # of computing; the signal that then comes ends the process, whatever it is doing
LONGEST = 3.0  # seconds by the clock, on a machine that is busy with other things
TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, LONGEST))
MEMORY = 1 << 30  # bytes of address space
STACK = 1 << 20  # bytes; a thread that serves a request has eight times as much

ANSWER_ENDS = '\n%llguidance {"no_forcing": true}\n'
"""Ends every grammar: a mask then holds all tokens that may follow, not only the one that the library would choose for
text that is certain. It stands at the end so that the lines of an error message are those of what was given."""

SPACE_BETWEEN = r"[ \t\r\n]{1,40}"
"""White space between the parts of JSON, where a schema does not say otherwise: enough for an indented line, and not
so much that a model could write it forever."""


def parser_limits() -> Any:
    """What the library itself may use, here and wherever a constraint is used."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=500_000,  # about 0.3 s
        step_lexer_fuel=200_000,  # about 15 ms for each token
        step_max_items=50_000,
        max_lexer_states=50_000,  # about 2 kB each
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def grammar_of(kind: str, text: str) -> str:
    """The library's grammar of a ``json_schema``, a ``regex`` or a ``grammar`` (Lark's, or EBNF with ``::=``).

    Raises:
        ValueError, RecursionError: it is none.
    """
    from llguidance import LLMatcher, grammar_from

    if kind == "json_schema":
        schema: Any = json.loads(text)
        if not isinstance(schema, (dict, bool)):
            raise ValueError("a schema is an object, or true or false")
        if isinstance(schema, dict):
            options = schema.get("x-guidance", {})
            if isinstance(options, dict) and "whitespace_flexible" not in options:
                schema["x-guidance"] = {"whitespace_pattern": SPACE_BETWEEN, **options}
        lark = f"start: %json {json.dumps(schema)}"
    elif kind == "regex":
        lark = json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
    else:
        lark = grammar_from("grammar", text) if "::=" in text else text
    return json.dumps({"grammars": [{"lark_grammar": lark + ANSWER_ENDS}]})


def vocabulary(tokens: list[bytes], special: list[int]) -> Any:
    """The library's view of a vocabulary; the last token ends an answer.

    Args:
        tokens: the bytes of each by id.
        special: the ids of those that no text becomes; the last is among them.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Tokens(tokens, special)))


class _Tokens:
    """The attributes that the library looks for."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = len(tokens) - 1, None

    def __call__(self, text: Any) -> list[int]:
        raise NotImplementedError  # only asked for text that is certain, which no grammar of ours forces


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    from llguidance import LLMatcher

    try:
        grammar = grammar_of(request["kind"], request["text"])
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    names = [name.encode() for name in request["names"]]
    tokens = [*(bytes([byte]) for byte in range(256)), *names, b"<|end of answer|>"]
    matcher = LLMatcher(
        vocabulary(tokens, list(range(256, len(tokens)))), grammar, log_level=0, limits=parser_limits()
    )  # fmt: skip
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first step builds most of the lexer, and finds what nothing satisfies
    return {"error": matcher.get_error()} if matcher.is_error() else {"grammar": grammar}


def _answer() -> None:
    json.dump(_compile(json.load(sys.stdin)), sys.stdout)


def main() -> None:
    """Answer one request."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, timer, seconds in TIMERS:
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(timer, seconds)
    threading.stack_size(STACK)
    worker = threading.Thread(target=_answer)
    worker.start()
    worker.join()


if __name__ == "__main__":
    main()
