"""A picture of a model: its stack of parts as text for a terminal, and as SVG for a page. Repeated layers are folded.

The stream runs from the top down. Each row names a part, its shape and choices, and its parameters; biases and the
norms inside attention are counted with the part they belong to.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from groundup.model.config import GATED, ModelConfig
from groundup.model.parts import biases, block_parameters, count_parameters, head_norms, norm_size
from groundup.runtime.console import quantity

NORMS = {"rmsnorm": "RMS norm", "layernorm": "layer norm"}
ACTIVATIONS = {
    "swiglu": "SwiGLU", "geglu": "GeGLU", "clamped_swiglu": "clamped SwiGLU", "gelu": "GELU",
    "gelu_exact": "exact GELU", "relu": "ReLU", "relu2": "squared ReLU",
}  # fmt: skip
LONGEST_PATTERN = 16  # layers


@dataclass(frozen=True)
class Row:
    """A part.

    Args:
        kind: table, norm, attention, feed-forward, experts or head.
        name: what it is; detail: its shape and choices.
        parameters: how many it has.
        wire: what it has to do with the residual stream: it is ``on`` it, ``reads`` it, ``adds`` to it, ``both``, or
            lies ``between`` the part that reads and the one that adds.
    """

    kind: str
    name: str
    detail: str
    parameters: int
    wire: Literal["on", "reads", "adds", "both", "between"] = "on"


@dataclass(frozen=True)
class Block:
    """Rows that ``count`` layers in sequence have."""

    count: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Group:
    """Blocks that are repeated ``repeat`` times, one after the other.

    Args:
        title: what is repeated; empty around the stack.
        aside: whether it stands beside the stack, behind the logits: what predicts further tokens.
    """

    title: str
    repeat: int
    blocks: tuple[Block, ...]
    aside: bool = False


def stack(config: ModelConfig) -> list[Group]:
    """The parts of a model from token ids to logits, with repeated layers folded."""
    found = [Group("", 1, (Block(1, tuple(_input_rows(config))),))]
    rows, first = [_block_rows(config, layer) for layer in range(config.n_layer)], 1
    for repeat, blocks in fold(rows):
        length = repeat * sum(block.count for block in blocks)
        span = f"layer {first}" if length == 1 else f"layers {first} to {first + length - 1}"
        times = repeat if len(blocks) > 1 else blocks[0].count
        beside = ", attention and feed-forward side by side" if config.parallel_blocks else ""
        found.append(Group(f"{times} × ({span}{beside})", repeat, blocks))
        first += length
    found.append(Group("", 1, (Block(1, tuple(_output_rows(config))),)))
    if config.n_predict:
        number = "a further token" if config.n_predict == 1 else "further tokens, one after the other"
        found.append(
            Group(f"{config.n_predict} × for {number}", config.n_predict, (Block(1, _further_rows(config)),), True)
        )
    return found


def fold(layers: list[tuple[Row, ...]]) -> list[tuple[int, tuple[Block, ...]]]:
    """Find what is repeated: the pattern that covers most layers from each place on, the shortest such one.

    Returns:
        How often each pattern comes, and its blocks, equal neighbours as one; a run of equal layers comes once.
    """
    found: list[tuple[int, tuple[Block, ...]]] = []
    place = 0
    while place < len(layers):
        length, repeat = 1, 1
        for candidate in range(1, min(LONGEST_PATTERN, (len(layers) - place) // 2) + 1):
            times = _repeats(layers, place, candidate)
            if times > 1 and times * candidate > length * repeat:
                length, repeat = candidate, times
        blocks: list[Block] = []
        for rows in layers[place : place + length]:
            if blocks and blocks[-1].rows == rows:
                blocks[-1] = Block(blocks[-1].count + 1, rows)
            else:
                blocks.append(Block(1, rows))
        if length == 1:
            found.append((1, (Block(repeat, blocks[0].rows),)))
        else:
            found.append((repeat, tuple(blocks)))
        place += length * repeat
    return found


def _repeats(layers: list[tuple[Row, ...]], place: int, length: int) -> int:
    times, pattern = 1, layers[place : place + length]
    while layers[place + times * length : place + (times + 1) * length] == pattern:
        times += 1
    return times


# ---- what the rows say


def _input_rows(config: ModelConfig) -> list[Row]:
    counts, width = count_parameters(config), config.n_embd
    scaled = "" if config.embedding_scale is None else f", times {config.embedding_scale:.4g}"
    rows = [Row("table", "token embedding", f"{config.vocab_size:,} × {width:,}{scaled}", counts["token embedding"])]
    if config.positions == "learned":
        detail = f"{config.context_length:,} × {width:,}, learnt"
        rows.append(Row("table", "position embedding", detail, counts["position embedding"]))
    if config.positions == "sinusoidal":
        rows.append(Row("table", "position embedding", "sines and cosines, added", 0))
    return rows


def _output_rows(config: ModelConfig) -> list[Row]:
    rows = [] if config.norm_placement == "post" else [_norm_row(config, "")]
    tied = "the token embedding again" if config.tie_embeddings else f"{config.n_embd:,} → {config.vocab_size:,}"
    cap = "" if config.logit_softcap is None else f", logits capped at ±{config.logit_softcap:g}"
    return [*rows, Row("head", "output head", tied + cap, count_parameters(config)["output head"])]


def _norm_row(config: ModelConfig, of: str) -> Row:
    shape = f"{config.n_embd:,}" + (", 1 + weight" if config.norm_plus_one and config.norm == "rmsnorm" else "")
    return Row("norm", NORMS[config.norm] + of, shape, norm_size(config))


def _block_rows(config: ModelConfig, layer: int) -> tuple[Row, ...]:
    attention, inner = _attention_row(config, layer), _inner_row(config, layer)
    norm, result = (
        replace(_norm_row(config, ""), wire="reads"),
        replace(_norm_row(config, " of the result"), wire="adds"),
    )
    rows: list[Row] = []
    for row in (attention, inner):
        if config.norm_placement == "pre":
            rows += [norm, replace(row, wire="adds")]
        elif config.norm_placement == "post":
            rows += [replace(row, wire="both"), _norm_row(config, " of the sum")]
        elif config.norm_placement == "output":
            rows += [replace(row, wire="reads"), result]
        else:
            rows += [norm, replace(row, wire="between"), result]
    return tuple(rows)


def _further_rows(config: ModelConfig) -> tuple[Row, ...]:
    norm, width = _norm_row(config, ""), config.n_embd
    joined = Row("table", "join", f"stream and token, each normed, {2 * width:,} → {width:,}", 2 * width * width)
    own = Row(joined.kind, joined.name, joined.detail, joined.parameters + 2 * norm_size(config))
    return (own, *_block_rows(config, config.n_layer - 1), norm)


def _attention_row(config: ModelConfig, layer: int) -> Row:
    parts = block_parameters(config, layer)
    count = parts["attention"] + head_norms(config) + parts["sinks"] + biases(config, layer)["attention"]
    details = [*_heads(config), _position_detail(config, layer)]
    if (window := config.window(layer)) is not None:
        details.append(f"window {window:,}")
    if config.qk_norm:
        details.append("q and k normed" + (" whole" if config.qk_norm_whole else ""))
    details += ["sinks"] if config.attention_sinks else []
    details += [f"scores capped at ±{config.attention_softcap:g}"] if config.attention_softcap is not None else []
    if config.latent.kv_rank:
        name = "latent attention"
    elif config.kv_heads == config.n_head:
        name = "multi-head attention"
    else:
        name = "multi-query attention" if config.kv_heads == 1 else "grouped-query attention"
    if biases(config, layer)["attention"]:
        details.append(
            "biases" if config.qkv_bias and config.out_bias else "q k v biases" if config.qkv_bias else "bias"
        )
    return Row("attention", name, ", ".join(filter(None, details)), count)


def _heads(config: ModelConfig) -> list[str]:
    latent, heads = config.latent, "head" if config.n_head == 1 else "heads"
    if latent.kv_rank:
        queries = f"queries of {latent.q_rank:,}" if latent.q_rank else ""
        shape = f"{config.n_head} {heads} of {latent.nope_dim} + {latent.rope_dim}, values of {latent.v_dim}"
        return [shape, f"latent {latent.kv_rank}", queries]
    shape = f"{config.n_head} {heads} of {config.head_width}"
    return [shape] if config.kv_heads == config.n_head else [shape, f"{config.kv_heads} kv"]


def _position_detail(config: ModelConfig, layer: int) -> str:
    kind = config.layer_kinds[layer]
    if config.positions == "alibi":
        return "ALiBi"
    if config.positions == "none" or (config.positions == "rope" and kind == "N"):
        return "no positions"
    if config.positions != "rope":
        return ""
    local = kind == "S" and config.rope_local_theta is not None
    theta = config.rope_local_theta if local and config.rope_local_theta is not None else config.rope_theta
    scaling = config.rope_scaling
    stretched = "" if local or scaling.kind == "none" else f" {scaling.kind} × {scaling.factor:g}"
    part = "" if config.rope_fraction == 1.0 or config.latent.kv_rank else f" on {config.rotary_dim} dimensions"
    return f"RoPE θ {quantity(theta)}{stretched}{part}"


def _inner_row(config: ModelConfig, layer: int) -> Row:
    parts, of_parts, width = block_parameters(config, layer), biases(config, layer), config.n_embd
    kind, gate = ACTIVATIONS[config.feed_forward], "2 × " if config.feed_forward in GATED else ""
    if not config.expert_layers[layer]:
        detail = f"{width:,} → {gate}{config.ff_dim:,} → {width:,}" + (", biases" if config.ff_bias else "")
        return Row("feed-forward", f"{kind} feed-forward", detail, parts["feed-forward"] + of_parts["feed-forward"])
    experts = config.experts
    names = ["experts", "router", "shared experts"]
    count = sum(parts.get(name, 0) + of_parts.get(name, 0) for name in names)
    details = [
        f"{experts.active} of {experts.count} experts",
        f"{kind} {width:,} → {gate}{config.expert_dim:,} → {width:,}",
    ]
    details += [f"{experts.shared} shared"] if experts.shared else []
    details.append(f"{experts.router} router")
    details += [f"best {experts.active_groups} of {experts.groups} groups"] if experts.groups > 1 else []
    details += ["load evened by a bias"] if experts.selection_bias else []
    details += [f"capacity {experts.capacity:g}"] if experts.capacity else []
    return Row("experts", "mixture of experts", ", ".join(details), count)


def _wrapped(detail: str, width: int) -> list[str]:
    """Lines of a row's detail, broken between its choices rather than within one."""
    hard = "\u00a0"  # no place to break at
    whole = ", ".join(part.replace(" ", hard) if len(part) <= width else part for part in detail.split(", "))
    return [line.replace(hard, " ") for line in textwrap.wrap(whole, width)] or [""]


# ---- as text


def draw_text(config: ModelConfig, width: int = 80) -> str:
    """The stack in box-drawing characters, at most ``width`` columns wide (60 at least)."""
    inner = width - 4
    names, numbers = 27, 8
    room = inner - names - numbers - 2
    lines: list[str] = []

    def rule(left: str, line: str, right: str, title: str = "") -> None:
        head = f"{left}{line} {title} " if title else left
        lines.append(head + line * (width - 1 - len(head)) + right)

    rule("┌", "─", "┐", "token ids")
    groups = stack(config)
    for number, group in enumerate(groups):
        if group.aside:
            rule("└", "─", "┘", "logits")
            rule("┌", "─", "┐", group.title)
        elif number:
            rule("╞", "═", "╡", group.title)
        for block in group.blocks:
            if len(group.blocks) > 1:
                rule("├", "─", "┤", f"{block.count} of {sum(b.count for b in group.blocks)} layers")
            for row in block.rows:
                count = quantity(row.parameters) if row.parameters else ""
                for place, detail in enumerate(_wrapped(row.detail, room)):
                    name, total = (row.name, count) if place == 0 else ("", "")
                    lines.append(f"│ {name:<{names}} {detail:<{room}} {total:>{numbers}} │")
    rule("└", "─", "┘", "their logits, by the same head" if groups[-1].aside else "logits")
    return "\n".join(lines)


# ---- as SVG

FILLS = {
    "table": "#dbeafe", "norm": "#f1f5f9", "attention": "#fde68a", "feed-forward": "#bbf7d0", "experts": "#a7f3d0",
    "head": "#e9d5ff",
}  # fmt: skip
WIDTH, LEFT, STREAM_X, LINE = 820, 96, 44, 17  # pixels
DETAIL_CHARACTERS = 52


def draw_svg(config: ModelConfig, title: str) -> str:
    """The stack as one SVG document that refers to nothing outside itself.

    The line on the left is the residual stream; what attention and feed-forward make is added to it.
    """
    shapes: list[str] = []
    y = _text(shapes, LEFT, 34, title, size=19, weight=600) + 14
    y = _text(shapes, STREAM_X - 28, y + 8, "token ids", size=12) + 4
    top = y
    for group in stack(config):
        if group.aside:
            y = top = _stream_end(shapes, top, y, "logits") + 12
        begin, inner = y, list[str]()
        y = _group(inner, group, y + (30 if group.title else 8)) + 8
        if group.title:
            box = f'x="{LEFT - 16}" y="{begin + 4}" width="{WIDTH - LEFT}" height="{y - begin - 4}"'
            shapes.append(f'<rect {box} rx="10" fill="#ffffff" stroke="#94a3b8" stroke-dasharray="5 4"/>')
            _text(shapes, LEFT, begin + 23, group.title, size=13, weight=600)
            y += 6
        shapes += inner
    end = _stream_end(shapes, top, y, "logits")
    arrow = '<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end}" width="{WIDTH}" height="{end}" '
        f'font-family="system-ui, sans-serif" role="img"><title>{escape(title)}</title>'
        f'<defs>{arrow}<path d="M0 0 L8 4 L0 8 Z" fill="#475569"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{end}" fill="#ffffff"/>'
    )
    return "\n".join([head, *shapes, "</svg>"]) + "\n"


def _stream_end(shapes: list[str], top: int, y: int, words: str) -> int:
    """Draw the residual stream from ``top`` to ``y``, behind all else, and what it becomes; where that ends."""
    line = f'<path d="M{STREAM_X} {top} V{y + 4}" stroke="#475569" stroke-width="2" marker-end="url(#arrow)"/>'
    shapes.insert(0, line)
    return _text(shapes, STREAM_X - 20, y + 26, words, size=12) + 8


def _group(shapes: list[str], group: Group, y: int) -> int:
    """Draw the rows of a group from ``y`` on; where they end."""
    for block in group.blocks:
        if len(group.blocks) > 1:
            each = f"{block.count} of {sum(b.count for b in group.blocks)} layers"
            y = _text(shapes, LEFT, y + 12, each, size=12, fill="#475569") + 6
        for row in block.rows:
            y = _row(shapes, row, y) + 6
    return y


def _row(shapes: list[str], row: Row, y: int) -> int:
    lines = _wrapped(row.detail, DETAIL_CHARACTERS)
    height = 12 + LINE * len(lines)
    grey = 'stroke="#94a3b8" stroke-width="1.5"'
    if row.wire in ("adds", "between"):  # from the row above
        shapes.append(f'<path d="M{LEFT + 24} {y - 6} V{y}" {grey}/>')
    if row.wire in ("reads", "both"):
        shapes.append(f'<path d="M{STREAM_X} {y + 9} H{LEFT}" {grey}/>')
    if row.wire == "on":
        shapes.append(f'<path d="M{STREAM_X} {y + height // 2} H{LEFT}" {grey}/>')
        shapes.append(f'<circle cx="{STREAM_X}" cy="{y + height // 2}" r="5" fill="#475569"/>')
    if row.wire in ("adds", "both"):
        _plus(shapes, y + height - 10)
    box = f'x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 32}" height="{height}"'
    shapes.append(f'<rect {box} rx="6" fill="{FILLS[row.kind]}" stroke="#64748b" stroke-opacity="0.5"/>')
    _text(shapes, LEFT + 12, y + 19, row.name, size=13, weight=600)
    for place, line in enumerate(lines):
        _text(shapes, LEFT + 210, y + 19 + LINE * place, line, size=12, family="ui-monospace, monospace")
    if row.parameters:
        _text(shapes, WIDTH - 44, y + 19, quantity(row.parameters), size=13, anchor="end")
    return y + height


def _plus(shapes: list[str], y: int) -> None:
    """What comes from the right is added to the stream."""
    shapes.append(f'<path d="M{LEFT} {y} H{STREAM_X}" stroke="#94a3b8" stroke-width="1.5"/>')
    shapes.append(f'<circle cx="{STREAM_X}" cy="{y}" r="8" fill="#ffffff" stroke="#475569" stroke-width="1.5"/>')
    plus = f"M{STREAM_X - 4} {y} H{STREAM_X + 4} M{STREAM_X} {y - 4} V{y + 4}"
    shapes.append(f'<path d="{plus}" stroke="#475569" stroke-width="1.5"/>')


def _text(
    shapes: list[str], x: int, y: int, words: str, *, size: int, weight: int = 400, fill: str = "#0f172a",
    anchor: str = "start", family: str = "",
) -> int:  # fmt: skip
    font = f' font-family="{family}"' if family else ""
    place = f'x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    shapes.append(f"<text {place}{font}>{escape(words)}</text>")
    return y
