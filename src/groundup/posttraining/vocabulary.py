"""The special tokens of a chat template for a tokenizer that lacks them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from groundup.tokenizer import CHAT_TEMPLATES, Tokenizer
from groundup.tokenizer.formats import named_tokens

_MARK = re.compile(r"<\|[^\s|<>{}'\"]{1,64}\|>")


def with_template(
    tokenizer: Tokenizer, template: str, special_tokens: Sequence[str] = ()
) -> tuple[Tokenizer, list[str]]:
    """A tokenizer with a chat template, and with the special tokens that the template writes.

    Of a known template it is told which they are; its names for the beginning and the end of a text give way to the
    tokenizer's own. Of Jinja source they are what is spelt out in it as ``<|name|>``; others must be given.

    Args:
        tokenizer: any.
        template: chatml, hermes, llama2, llama3, alpaca or vicuna; or Jinja source.
        special_tokens: further names.

    Returns:
        The tokenizer, and the names that were added to it, in the order of their ids, which follow its own. A model
        needs rows for them: :func:`groundup.model.resize_embeddings`.

    Raises:
        UsageError: no template has that name, or a name is that of an ordinary token.
        GroundupError: the template does not compile.
    """
    own = named_tokens(tokenizer.vocabulary)
    begin, end = own.get("bos_token"), own.get("eos_token")
    if template in CHAT_TEMPLATES:
        preset = CHAT_TEMPLATES[template]
        published = {preset.variables.get("bos_token"): begin, preset.variables.get("eos_token"): end}
        names = [published.get(name) or name for name in preset.special_tokens]
    else:
        names = _MARK.findall(template)
    missing = [name for name in dict.fromkeys([*names, *special_tokens]) if name not in tokenizer.special_tokens]
    grown = tokenizer.with_special_tokens(missing).with_chat_template(template, begin, end)
    return grown, missing
