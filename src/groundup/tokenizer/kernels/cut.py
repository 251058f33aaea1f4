"""Cutting text into chunks: the patterns of pretokenize.py, compiled.

    classify    Look at every character once and write down what it is: for each class (letters, numbers, white
                space, ...) a bitmap with one bit per byte of text.
    end_...     Where the chunk that begins here ends, by the alternatives of a pattern in their order. A word is a
                run of one bits, so finding its end is counting zeros, and all alphabets are alike.
    mark_...    The same for 64 bytes at once, as far as a few neighbours tell.
    cut         Classify, mark, ask end_... where marking leaves doubt, and list the ends of all chunks.

`machine.py` explains why everything is an address.
"""

from __future__ import annotations

from groundup.tokenizer.kernels.machine import (
    ALL,
    ONE,
    ZERO,
    bytes_between,
    inner,
    load8,
    load32,
    load64,
    store32,
    store64,
    u64,
    zeros_above,
    zeros_before,
)
from groundup.tokenizer.unicode_classes import LETTER, LOWER, NUMBER, SPACE, UPPER

# ---- classes of characters

LETTERS, NUMBERS, SPACES, OTHERS, UPPERS, LOWERS, BLANKS, STARTS, DOUBTS = range(9)  # bitmaps, in this order
BITMAPS = 9


@inner
def where(found, bit):
    """All ones when a class has this bit, else all zeros."""
    return ALL if found & bit else ZERO


@inner
def classify(text, size, maps, stride, classes):
    """Write seven bitmaps of a text: one bit per byte, all bytes of a character alike.

    LETTERS, NUMBERS and SPACES are what ``\\p{L}``, ``\\p{N}`` and ``\\s`` match, OTHERS the rest. UPPERS and LOWERS
    are the two classes of GPT-4o's words; letters without case and marks are in both. BLANKS are SPACES without
    ``\r`` and ``\n``.

    Args:
        text: address of UTF-8 text, followed by 64 zero bytes.
        size: its bytes.
        maps: address of the bitmaps; bitmap number k begins at ``maps + k * stride``.
        classes: address of a byte of class bits for every code point.
    """
    over, over_class = 0, 0  # how far the last character reaches into the next block
    for block in range(0, size, 64):
        here = text + block
        uppers = bytes_between(here, 0, 65, 26)
        lowers = bytes_between(here, 0, 97, 26)
        letters = uppers | lowers
        numbers = bytes_between(here, 0, 48, 10)
        spaces = bytes_between(here, 0, 9, 5) | bytes_between(here, 0, 32, 1)
        firsts = bytes_between(here, 0, 0xC0, 64)  # the first bytes of characters that are not ASCII
        if over > 0:
            bits = (ONE << u64(over)) - ONE
            letters |= bits & where(over_class, LETTER)
            numbers |= bits & where(over_class, NUMBER)
            spaces |= bits & where(over_class, SPACE)
            uppers |= bits & where(over_class, UPPER)
            lowers |= bits & where(over_class, LOWER)
            over = 0
        while firsts != ZERO:
            place = zeros_before(firsts)
            firsts &= firsts - ONE
            raw = load32(here + place)
            if raw & 0xE0 == 0xC0:
                length = 2
                point = (raw & 0x1F) << 6 | raw >> 8 & 0x3F
            elif raw & 0xF0 == 0xE0:
                length = 3
                point = (raw & 0x0F) << 12 | (raw >> 8 & 0x3F) << 6 | raw >> 16 & 0x3F
            else:
                length = 4
                point = (raw & 0x07) << 18 | (raw >> 8 & 0x3F) << 12 | (raw >> 16 & 0x3F) << 6 | raw >> 24 & 0x3F
            found = load8(classes + point)
            bits = ((ONE << u64(length)) - ONE) << u64(place)
            letters |= bits & where(found, LETTER)
            numbers |= bits & where(found, NUMBER)
            spaces |= bits & where(found, SPACE)
            uppers |= bits & where(found, UPPER)
            lowers |= bits & where(found, LOWER)
            over, over_class = place + length - 64, found
        others = ~(letters | numbers | spaces)
        if size - block < 64:
            others &= (ONE << u64(size - block)) - ONE
        out = maps + (block >> 3)
        store64(out, letters)
        store64(out + stride, numbers)
        store64(out + 2 * stride, spaces)
        store64(out + 3 * stride, others)
        store64(out + 4 * stride, uppers)
        store64(out + 5 * stride, lowers)
        store64(out + 6 * stride, spaces & ~(bytes_between(here, 0, 10, 1) | bytes_between(here, 0, 13, 1)))
    # What looks at the next block finds nothing behind the last one.
    out = maps + ((size + 63) >> 6 << 3)
    for kind in range(7):
        store64(out + kind * stride, ZERO)


@inner
def window_at(bitmap, place):
    """The bits from ``place`` on, at least 57 of them, the first one lowest."""
    return load64(bitmap + (place >> 3)) >> u64(place & 7)


@inner
def run_length(bitmap, place):
    """How many one bits follow each other from ``place`` on."""
    start = place
    while True:
        valid = 64 - (place & 7)
        ones = zeros_before(~window_at(bitmap, place))
        place += ones
        if ones < valid:
            return place - start


@inner
def has(bitmap, place):
    """The bit at a place, 0 or 1."""
    return load8(bitmap + (place >> 3)) >> (place & 7) & 1


@inner
def next_character(text, place):
    """Where the character after this one begins."""
    first = load8(text + place)
    return place + 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)


# ---- where the chunk that begins here ends: the patterns of pretokenize.py, written out


@inner
def contraction(text, place, any_case):
    """Bytes of 's, 't, 'm, 'd, 're, 've or 'll at this apostrophe; 0 when there is none."""
    second, third = load8(text + place + 1), load8(text + place + 2)
    if any_case:
        if second == 0xC5 and third == 0xBF:
            return 3  # U+017F, the long s, is an s when case is ignored
        second, third = second | 0x20, third | 0x20
    if second == 115 or second == 116 or second == 109 or second == 100:
        return 2
    if (third == 101 and (second == 114 or second == 118)) or (third == 108 and second == 108):
        return 3
    return 0


@inner
def end_of_spaces(text, size, spaces, place, newlines, all_at_end):
    """End of ``\\s*[\r\n]+|\\s+(?!\\S)|\\s+`` at a white space character.

    Without ``newlines`` the first alternative is missing; with ``all_at_end``, white space at the end of the
    text is one chunk whatever it is.
    """
    end = place + run_length(spaces, place)
    if newlines and not (all_at_end and end == size):
        for last in range(end - 1, place - 1, -1):
            byte = load8(text + last)
            if byte == 10 or byte == 13:
                return last + 1
    if end == size:
        return end
    last = end - 1
    while load8(text + last) & 0xC0 == 0x80:
        last -= 1
    return last if last > place else end


@inner
def end_of_numbers(text, numbers, place, most):
    r"""End of ``\p{N}{1,most}`` at a number."""
    for _ in range(most):
        if has(numbers, place):
            place = next_character(text, place)
    return place


@inner
def end_of_others(text, others, place, slash):
    """End of ``?[^\\s\\p{L}\\p{N}]+[\r\n]*`` (after a space; ``[\r\n/]*`` with ``slash``) at one or the other."""
    place += load8(text + place) == 32
    place += run_length(others, place)
    byte = load8(text + place)
    while byte == 10 or byte == 13 or (slash and byte == 47):
        place += 1
        byte = load8(text + place)
    return place


@inner
def end_gpt2(text, size, maps, stride, place):
    """Where the chunk that begins here ends, by GPT-2's pattern."""
    letters, numbers, spaces, others = maps, maps + stride, maps + 2 * stride, maps + 3 * stride
    first = load8(text + place)
    body = place + (first == 32)
    if has(letters, body):
        return body + run_length(letters, body)
    if has(numbers, body):
        return body + run_length(numbers, body)
    if first == 39:
        length = contraction(text, place, False)
        if length:
            return place + length
    if has(others, body):
        return body + run_length(others, body)
    return end_of_spaces(text, size, spaces, place, 0, 0)


@inner
def end_cl100k(text, size, maps, stride, digits, all_at_end, place):
    """Where the chunk that begins here ends, by GPT-4's pattern or a variant of it (see :class:`Shape`)."""
    letters, numbers, spaces, others = maps, maps + stride, maps + 2 * stride, maps + 3 * stride
    first = load8(text + place)
    if has(letters, place):
        return place + run_length(letters, place)
    if has(numbers, place):
        return end_of_numbers(text, numbers, place, digits)
    if first == 39:
        length = contraction(text, place, True)
        if length:
            return place + length
    body = next_character(text, place)
    if has(letters, body) and first != 10 and first != 13:
        return body + run_length(letters, body)
    if has(others, place + (first == 32)):
        return end_of_others(text, others, place, False)
    return end_of_spaces(text, size, spaces, place, 1, all_at_end)


@inner
def end_of_cased_word(uppers, lowers, place):
    """End of ``[upper]*[lower]+``, 0 when there is none."""
    middle = place + run_length(uppers, place)
    end = middle + run_length(lowers, middle)
    if end > middle:
        return end
    # The first class has taken everything; it gives back up to the last character that is in both.
    while end > place and not has(lowers, end - 1):
        end -= 1
    return end if end > place else 0


@inner
def end_o200k(text, size, maps, stride, place):
    """Where the chunk that begins here ends, by GPT-4o's pattern."""
    letters, numbers, spaces, others = maps, maps + stride, maps + 2 * stride, maps + 3 * stride
    uppers, lowers = maps + 4 * stride, maps + 5 * stride
    first = load8(text + place)
    if has(numbers, place):
        return end_of_numbers(text, numbers, place, 3)
    end = 0
    if has(letters, place):
        end = end_of_cased_word(uppers, lowers, place)
        if not end:
            end = place + run_length(uppers, place)
    elif first != 10 and first != 13:
        body = next_character(text, place)
        end = end_of_cased_word(uppers, lowers, body)
        if not end and has(lowers, place):  # a mark can be a word by itself
            end = end_of_cased_word(uppers, lowers, place)
        if not end and has(uppers, body):
            end = body + run_length(uppers, body)
    if end:
        return end + contraction(text, end, True) if load8(text + end) == 39 else end
    if has(others, place + (first == 32)):
        return end_of_others(text, others, place, True)
    return end_of_spaces(text, size, spaces, place, 1, 0)


# ---- cutting text into chunks, sixty-four bytes at a time

# Asking every chunk for its end takes a chain of dependent steps and a mispredicted branch now and then. But where
# chunks begin depends on the classes of a few neighbours, with few exceptions, so it can be computed
# for 64 bytes at once. The mark_... functions do that, and mark as doubtful the places where bits alone do not
# tell; there, settle asks end_....

GPT2, CL100K, O200K = range(3)


@inner
def before(bits, last, by):
    """The bits of the places ``by`` before these; ``last`` are those of the block before."""
    return bits << u64(by) | last >> u64(64 - by)


@inner
def after(bitmap, bits, by):
    """The bits of the places ``by`` after these, which were read at ``bitmap``."""
    return bits >> u64(by) | load64(bitmap + 8) << u64(64 - by)


@inner
def mark_gpt2(text, size, maps, stride):
    """Write STARTS and DOUBTS for GPT-2's pattern."""
    l0 = n0 = s0 = o0 = sp0 = ZERO
    for block in range(0, size, 64):
        here, at = text + block, maps + (block >> 3)
        letters, numbers = load64(at), load64(at + stride)
        spaces, others = load64(at + 2 * stride), load64(at + 3 * stride)
        space = bytes_between(here, 0, 32, 1)
        alone = ~before(space, sp0, 1)
        sign = others & ~before(others, o0, 1) & alone
        last = spaces & ~after(at + 2 * stride, spaces, 1)  # of its run: it does not stay with the others
        store64(
            at + STARTS * stride,
            (letters & ~before(letters, l0, 1) | numbers & ~before(numbers, n0, 1)) & alone
            | sign
            | spaces & ~before(spaces, s0, 1)
            | last,
        )
        store64(
            at + DOUBTS * stride,
            sign & bytes_between(here, 0, 39, 1) & after(at, letters, 1) | last & bytes_between(here, 0, 128, 128),
        )
        l0, n0, s0, o0, sp0 = letters, numbers, spaces, others, space


@inner
def mark_spaces(at, stride, s0, b0, spaces, blanks, signs_before):
    """Where chunks of white space begin, and which of these places are doubtful.

    A run of white space is cut after its last newline and before its last character. Newlines after a sign
    belong to the sign.
    """
    newlines = spaces & ~blanks
    line_begins = blanks & before(spaces & ~blanks, s0 & ~b0, 1)
    last = blanks & ~after(at + 2 * stride, spaces, 1)
    starts = spaces & ~before(spaces, s0, 1) & ~(newlines & signs_before) | line_begins | last
    doubts = ZERO
    if line_begins != ZERO:
        # Adding lets a carry run through the blanks to the place after them: no newline may follow there.
        landed = blanks + line_begins
        if landed < blanks or landed & newlines != ZERO:
            doubts = line_begins
    return starts, doubts, last


@inner
def mark_numbers(at, n0, numbers, digits):
    """Where numbers begin, and the digits from the one after ``digits`` on, which are doubtful."""
    doubts = numbers & before(numbers, n0, 1)
    if digits > 1:
        doubts &= before(numbers, n0, 2) & before(numbers, n0, 3)
    return numbers & ~before(numbers, n0, 1), doubts


@inner
def mark_cl100k(text, size, maps, stride, digits):
    """Write STARTS and DOUBTS for GPT-4's pattern."""
    l0 = n0 = s0 = o0 = b0 = sp0 = h0 = ZERO
    for block in range(0, size, 64):
        here, at = text + block, maps + (block >> 3)
        letters, numbers = load64(at), load64(at + stride)
        spaces, others, blanks = load64(at + 2 * stride), load64(at + 3 * stride), load64(at + BLANKS * stride)
        space, high = bytes_between(here, 0, 32, 1), bytes_between(here, 0, 128, 128)
        after_sign, after_space = before(others, o0, 1), before(space, sp0, 1)
        # A word takes the blank before it, or the sign, if that is one alone and has no space before itself.
        word = letters & ~before(letters, l0, 1)
        taken = before(blanks, b0, 1) | after_sign & ~before(others, o0, 2) & ~before(space, sp0, 2)
        sign = others & ~after_sign & ~after_space
        number, doubts = mark_numbers(at + stride, n0, numbers, digits)
        white, white_doubts, last = mark_spaces(at, stride, s0, b0, spaces, blanks, after_sign)
        doubts |= white_doubts | last & high | word & after_sign & before(high, h0, 1)
        doubts |= sign & bytes_between(here, 0, 39, 1) & after(at, letters, 1)
        store64(at + STARTS * stride, word & ~taken | sign | number | white)
        store64(at + DOUBTS * stride, doubts)
        l0, n0, s0, o0, b0, sp0, h0 = letters, numbers, spaces, others, blanks, space, high


@inner
def mark_o200k(text, size, maps, stride):
    """Write STARTS and DOUBTS for GPT-4o's pattern, whose words also end where a capital follows a small letter."""
    l0 = n0 = s0 = o0 = b0 = sp0 = h0 = up0 = lo0 = ZERO
    for block in range(0, size, 64):
        here, at = text + block, maps + (block >> 3)
        uppers, lowers = load64(at + UPPERS * stride), load64(at + LOWERS * stride)
        letters, numbers = load64(at) | lowers, load64(at + stride)  # with marks, which are in words
        spaces, blanks = load64(at + 2 * stride), load64(at + BLANKS * stride)
        others = load64(at + 3 * stride) & ~lowers
        marks = load64(at + 3 * stride) & lowers
        space, high = bytes_between(here, 0, 32, 1), bytes_between(here, 0, 128, 128)
        after_letter, after_sign, after_space = before(letters, l0, 1), before(others, o0, 1), before(space, sp0, 1)
        word = letters & ~after_letter
        taken = before(blanks, b0, 1) | after_sign & ~before(others, o0, 2) & ~before(space, sp0, 2)
        capital = uppers & ~lowers
        hump = capital & before(lowers & ~uppers, lo0 & ~up0, 1)
        sign = others & ~after_sign & ~after_space
        number, doubts = mark_numbers(at + stride, n0, numbers, 3)
        white, white_doubts, last = mark_spaces(at, stride, s0, b0, spaces, blanks, after_sign)
        doubts |= white_doubts | last & high | word & after_sign & before(high, h0, 1)
        doubts |= after_letter & bytes_between(here, 0, 39, 1)
        doubts |= capital & before(lowers & uppers, lo0 & up0, 1)
        doubts |= marks & after_sign
        doubts |= bytes_between(here, 0, 47, 1) & before(spaces & ~blanks, s0 & ~b0, 1)
        store64(at + STARTS * stride, word & ~taken | hump | sign | number | white)
        store64(at + DOUBTS * stride, doubts)
        l0, n0, s0, o0, b0, sp0, h0 = letters, numbers, spaces, others, blanks, space, high
        up0, lo0 = uppers, lowers


@inner
def start_before(starts, place):
    """The last start before a place that is not the first."""
    at = starts + ((place - 1) >> 6 << 3)
    bits = load64(at) << u64(63 - (place - 1 & 63))
    if bits != ZERO:
        return place - 1 - zeros_above(bits)
    place = (place - 1) >> 6 << 6
    while True:
        at -= 8
        bits = load64(at)
        if bits != ZERO:
            return place - 1 - zeros_above(bits)
        place -= 64


@inner
def settle(text, size, maps, stride, pattern, digits, all_at_end):
    """Decide the doubtful places one after another."""
    starts, doubts, others = maps + STARTS * stride, maps + DOUBTS * stride, maps + OTHERS * stride
    # White space at the end of the text follows a rule of its own.
    place = size - 1
    while place >= 0 and has(maps + SPACES * stride, place):
        at = doubts + (place >> 6 << 3)
        store64(at, load64(at) | ONE << u64(place & 63))
        place -= 1
    settled = 0
    for block in range(0, size, 64):
        left = load64(doubts + (block >> 3))
        while left != ZERO:
            place = block + zeros_before(left)
            left &= left - ONE
            if place < settled:
                continue
            start = start_before(starts, place) if place > 0 else 0
            # What follows a slash that ended a chunk is judged by itself, not by the slash.
            while start <= place or (pattern == O200K and has(others, start) and load8(text + start - 1) == 47):
                if pattern == GPT2:
                    end = end_gpt2(text, size, maps, stride, start)
                elif pattern == CL100K:
                    end = end_cl100k(text, size, maps, stride, digits, all_at_end, start)
                else:
                    end = end_o200k(text, size, maps, stride, start)
                for other in range(start + 1, end):
                    at = starts + (other >> 6 << 3)
                    store64(at, load64(at) & ~(ONE << u64(other & 63)))
                if end < size:
                    at = starts + (end >> 6 << 3)
                    store64(at, load64(at) | ONE << u64(end & 63))
                start = end
            settled = start


@inner
def cut(text, size, maps, stride, classes, pattern, digits, all_at_end, ends):
    """Cut a text into chunks.

    Args:
        text, size, maps, stride, classes: as in :func:`classify`; the text is not empty, and there is room for
            ``BITMAPS`` bitmaps.
        pattern: GPT2, CL100K or O200K.
        digits, all_at_end: CL100K's variants: how many digits are a chunk (3 or 1), and
            :func:`end_of_spaces`.
        ends: address for the end of each chunk, 32 bits each; the 4 bytes before are overwritten.

    Returns:
        How many chunks there are.
    """
    classify(text, size, maps, stride, classes)
    if pattern == GPT2:
        mark_gpt2(text, size, maps, stride)
    elif pattern == CL100K:
        mark_cl100k(text, size, maps, stride, digits)
    else:
        mark_o200k(text, size, maps, stride)
    settle(text, size, maps, stride, pattern, digits, all_at_end)
    out = ends - 4  # the first chunk begins where no other ends
    for block in range(0, size, 64):
        bits = load64(maps + STARTS * stride + (block >> 3))
        while bits != ZERO:
            store32(out, block + zeros_before(bits))
            bits &= bits - ONE
            out += 4
    store32(out, size)
    return ((out - ends) >> 2) + 1
