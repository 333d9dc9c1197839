"""Reads clauses: Milvus' boolean expressions over the stored fields, typed, and what is wrong with them said where it is wrong.

Milvus' own parsers are of no use for that: a server with dynamic fields answers a misspelt name with silence, each kind has another
grammar, and none tells a word from a place. A top-down operator precedence parser (Pratt 1973) is written by hand here rather than
generated, since most of it is what to say and what to suggest; and it counts how deep it is, where a clause of 100,000 parentheses ends.

Differences from Milvus' grammar (internal/parser/planparserv2/Plan.g4), in favour of what people mean: `not age > 60` is
`not (age > 60)`, a flag alone is true, `a < b < c` may stand of any comparisons, keywords of any case. Bits, `**`, templates and geometry
are not known, and a number that begins with 0 is refused, which Milvus' kinds read as different ones.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from operator import add, mod, mul, sub, truediv
from typing import Final, cast, get_args

from cxr_retrieval.errors import ClauseError
from cxr_retrieval.gallery.clause import (
    And,
    Arithmetic,
    Comparator,
    Compare,
    Constant,
    Contains,
    Exists,
    Field,
    In,
    IsNull,
    Kind,
    Length,
    Like,
    Node,
    Not,
    Operand,
    Or,
    Own,
    Span,
    Value,
    Words,
    all_of,
    any_of,
    constant,
    printed,
)
from cxr_retrieval.gallery.words import NOTES, words_of

MAX_LENGTH: Final = 262_144
"""Characters of a clause: some thousands of ids."""
MAX_DEPTH: Final = 50
"""Parentheses and the like inside one another, and sums in a row."""
MAX_CONDITIONS: Final = 1000
"""Joined by and, or: Milvus' own parser takes long over more."""
MAX_TEXT: Final = 4096
"""Characters of a text to look for."""
MAX_TERMS: Final = 64
"""Words and phrases to look for at once."""
MAX_INTEGER: Final = 2**53
"""Beyond, integers are kept as the floating-point numbers that Milvus Lite compares anyway."""

_EXAMPLE: Final = "for example --where 'age > 60 and sex == \"F\"'"
_OR, _AND, _NOT, _COMPARED, _SUM, _PRODUCT, _SIGN = range(1, 8)
"""How strongly an operator binds."""
_BINDS: Final[Mapping[str, int]] = {
    "or": _OR,
    "||": _OR,
    "and": _AND,
    "&&": _AND,
    **dict.fromkeys(["==", "!=", "<", "<=", ">", ">=", "in", "not", "like", "is"], _COMPARED),
    **dict.fromkeys("+-", _SUM),
    **dict.fromkeys("*/%", _PRODUCT),
}
_COMPARATORS: Final = frozenset(get_args(Comparator))
_MEANT: Final = {
    "=": "==",
    "===": "==",
    "<>": "!=",
    "=>": ">=",
    "=<": "<=",
    "&": "and",
    "|": "or",
    "eq": "==",
    "equals": "==",
    "ne": "!=",
    "contains": "like",
    "null": "is null",
}
"""What people write that other languages have."""
_KEYWORDS: Final = frozenset({"and", "or", "not", "in", "like", "is", "null", "exists", "true", "false"})
_CONTAINS: Final = frozenset(f"{kind}_contains{how}" for kind in ("json", "array") for how in ("", "_all", "_any"))
_FUNCTIONS: Final = frozenset({"text_match", "phrase_match", "array_length", *_CONTAINS})
_FOLDED: Final[Mapping[str, Callable[[float, float], float]]] = {"+": add, "-": sub, "*": mul, "/": truediv, "%": mod}
_TOKEN: Final = re.compile(
    r"""(?P<space>\s+)
      | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<quote>["'])
      | (?P<number>0[xX][0-9a-fA-F]+(?!\w)|(?:\d|\.\d)[\w.]*(?:(?<=[eE])[+-]\d+)?)
      | (?P<name>[^\W\d]\w*)
      | (?P<sign>===?|!=|<=|>=|<>|=>|=<|&&|\|\||\*\*|[-+*/%<>=!()\[\],&|])
      | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_NUMBER: Final = re.compile(r"(?P<whole>0|[1-9]\d*|0[xX][0-9a-fA-F]+|0[bB][01]+)|(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?", re.ASCII)
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", '"': '"', "'": "'", "/": "/"}
_TERM: Final = re.compile(r'(?P<out>-?)(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"]+))|(?P<open>-?")|\s+')
_QUOTES: Final = str.maketrans("“”„«»", '"""""')
_BEFORE: Final = 60
_AFTER: Final = 40
"""Characters of a clause that are shown with a wrong word."""
_SHOWN: Final = 40
"""Characters of a wrong word that are shown."""
_SAID: Final[Mapping[Kind, str]] = {
    "number": "a number",
    "text": "text",
    "flag": "a flag",
    "id": "a pseudonym",
    "own": "one of your own columns",
}


def parse(where: str, fields: Mapping[str, Kind]) -> Node | None:
    """The tree of a clause; None of an empty one.

    Args:
        fields: Names that it may use, and what these hold.

    Raises:
        ClauseError: It cannot be read, names none of `fields`, or compares what cannot be compared.
    """
    if len(where) > MAX_LENGTH:
        raise wrong(
            "the filter is too long",
            where,
            (MAX_LENGTH, len(where)),
            expected=f"at most {MAX_LENGTH} characters",
            got=f"{len(where)}",
            next_step="ask for fewer things at once",
        )
    try:
        where.encode()
    except UnicodeEncodeError as error:
        raise wrong(
            "the filter holds half a character", where, (error.start, error.end), next_step="give whole characters of Unicode"
        ) from error
    return _Parser(where, fields).parsed()


def conditions(where: str, fields: Mapping[str, Kind]) -> tuple[str, ...]:
    """What a clause asks one by one: `and` of them is the same clause again.

    Raises:
        ClauseError: As `parse`.
    """
    node = parse(where, fields)
    if node is None:
        return ()
    parts = node.nodes if isinstance(node, And) else (node,)
    return tuple(f"({printed(part)})" if isinstance(part, Or) else printed(part) for part in parts)


def parse_text(text: str) -> Node | None:
    """The tree of what `--text` asks of clinical notes: every word, every "phrase in quotes", and none of the -words; None of an empty one.

    A word that is written in several parts, such as `follow-up`, is a phrase of them.

    Raises:
        ClauseError: It holds no word, too many, or a phrase that is not closed.
    """
    if not text.strip():
        return None
    if len(text) > MAX_TEXT:
        said = f"at most {MAX_TEXT} characters"
        raise wrong("the text to look for is too long", text, (MAX_TEXT, len(text)), expected=said, got=f"{len(text)}")
    asked: list[Node] = []
    for term in _TERM.finditer(text.translate(_QUOTES)):
        if term["open"]:
            raise wrong(
                "the text to look for holds a phrase that is not closed",
                text,
                term.span(),
                expected='a second "',
                next_step="such as --text '\"ground glass\" -tube'",
            )
        words = words_of(term["phrase"] or term["word"] or "")
        if words:
            holds = Words(Field(NOTES), words, phrase=len(words) > 1, at=term.span())
            asked.append(Not(holds, at=term.span()) if term["out"] else holds)
        if len(asked) > MAX_TERMS:
            raise wrong("the text to look for holds too many words", text, term.span(), expected=f"at most {MAX_TERMS} words and phrases")
    if not asked:
        raise wrong(
            "the text to look for holds no word", text, (0, len(text)), expected="letters or digits", next_step="such as --text 'effusion'"
        )
    return all_of(asked)


def wrong(what: str, source: str, span: Span, *, expected: str = "", got: str = "", next_step: str = "") -> ClauseError:
    """The error of a part of `source`, which is shown with that part marked."""
    error = ClauseError(what, expected=expected, got=got, next_step=next_step, shown=_marked(source, span))
    error.span = span
    return error


def _marked(source: str, span: Span) -> str:
    """The line that holds a part, or as much of it as a screen shows, and carets under that part."""
    start, end = span[0], max(span[1], span[0] + 1)
    first, last = max(0, start - _BEFORE), min(len(source), min(end, start + _AFTER) + _AFTER)
    before = ("…" if first else "") + _shown(source[first:start])
    marked, after = _shown(source[start : min(end, last)]), _shown(source[end:last]) + ("…" if last < len(source) else "")
    return f"  {before}{marked}{after}\n  {' ' * _columns(before)}{'^' * max(1, _columns(marked))}"


def _shown(text: str) -> str:
    """As it may go to a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _columns(text: str) -> int:
    """That it takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@dataclass(frozen=True)
class Token:
    """A word of a clause: a name, number, text, sign, or the quote of a text that is not closed."""

    kind: str
    text: str
    at: Span

    @property
    def word(self) -> str | None:
        """Of names and signs, as the grammar knows them; "" for the end, and None of fields and constants."""
        if self.kind == "name":
            return self.text.lower() if self.text.lower() in _KEYWORDS else None
        return self.text if self.kind in ("sign", "end") else None


def tokens(where: str) -> list[Token]:
    """The words of a clause, whether it can be read or not."""
    return [Token(cast(str, match.lastgroup), match[0], match.span()) for match in _TOKEN.finditer(where) if match.lastgroup != "space"]


class _Parser:
    """One clause, once."""

    def __init__(self, source: str, fields: Mapping[str, Kind]) -> None:
        self._source = source
        self._fields = fields
        self._tokens = tokens(source)
        self._tokens.append(Token("end", "", (len(source), len(source))))
        self._place = 0
        self._depth = 0
        self._joined = 0
        for token in self._tokens:
            if token.kind == "quote":
                raise self._wrong(
                    "the filter holds a string that is not closed",
                    (token.at[0], len(source)),
                    expected=f"a second {token.text}",
                    next_step=_EXAMPLE,
                )

    def parsed(self) -> Node | None:
        if self._next.kind == "end":
            return None
        node = self._truth(self._expression(0))
        if self._next.kind != "end":
            raise self._unexpected("and, or, or the end" if self._next.text != ")" else "the end: no parenthesis is open")
        return node

    # what stands next

    @property
    def _next(self) -> Token:
        return self._tokens[self._place]

    def _take(self) -> Token:
        token = self._tokens[self._place]
        self._place += token.kind != "end"
        return token

    def _took(self, word: str) -> bool:
        found = self._next.word == word
        self._place += found
        return found

    def _require(self, word: str, why: str = "") -> Token:
        if self._next.word != word:
            raise self._unexpected(f"{word}{why}")
        return self._take()

    # the grammar

    def _expression(self, binds: int) -> Node | Operand:
        """What stands here, up to an operator that does not bind more strongly than `binds`."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._wrong("the filter is nested too deeply", self._next.at, expected=f"at most {MAX_DEPTH} levels")
        left = self._prefix()
        in_a_row = 0
        while (power := _BINDS.get(self._next.word or "", 0)) > binds:
            in_a_row += power in (_SUM, _PRODUCT)
            if in_a_row > MAX_DEPTH:
                raise self._wrong("the filter holds too long a sum", self._next.at, expected=f"at most {MAX_DEPTH} operators in a row")
            left = self._infix(left, power)
        self._depth -= 1
        return left

    def _prefix(self) -> Node | Operand:
        token = self._take()
        match token.kind, token.word:
            case _, "(":
                inner = self._expression(0)
                self._require(")", f" for the parenthesis at character {token.at[0] + 1}")
                return inner
            case _, "not" | "!":
                node = self._truth(self._expression(_NOT))
                return Not(node, at=(token.at[0], node.at[1]))
            case _, "-":
                return self._negative(token)
            case _, "exists":
                item = self._item(self._take(), "what may exist")
                return Exists(item, at=(token.at[0], item.at[1]))
            case _, "true" | "false":
                return Value(token.word == "true", at=token.at)
            case "text", _:
                return Value(self._text(token), at=token.at)
            case "number", _:
                return Value(self._number(token), at=token.at)
            case "name", None if self._next.word == "(":
                return self._call(token)
            case "name", None:
                return self._item(token)
            case _:
                self._place -= token.kind != "end"
                raise self._unexpected("a field, a value or a parenthesis")

    def _infix(self, left: Node | Operand, power: int) -> Node | Operand:
        if power in (_OR, _AND):
            nodes = [self._truth(left)]
            while _BINDS.get(self._next.word or "") == power:
                joint = self._take()
                self._joined += 1
                if self._joined == MAX_CONDITIONS:
                    raise self._wrong("the filter holds too many conditions", joint.at, expected=f"at most {MAX_CONDITIONS}")
                nodes.append(self._truth(self._expression(power)))
            return (any_of if power == _OR else all_of)(nodes, (nodes[0].at[0], nodes[-1].at[1]))
        sign = self._take()
        operand = self._operand(left)
        if power in (_SUM, _PRODUCT):
            return self._sum(operand, sign, self._operand(self._expression(power)))
        match sign.word:
            case "in":
                return self._in(operand, negated=False)
            case "not":
                self._require("in", ", as in not in [1, 2]")
                return self._in(operand, negated=True)
            case "like":
                return self._like(operand)
            case "is":
                negated = self._took("not")
                end = self._require("null").at[1]
                item = self._asked_of(operand, sign)
                return IsNull(item, negated, at=(item.at[0], end))
            case _:
                return self._comparisons(operand, sign)

    def _comparisons(self, left: Operand, sign: Token) -> Node:
        found: list[Node] = []
        while True:
            right = self._operand(self._expression(_COMPARED))
            found.append(self._compare(left, sign, right))
            if self._next.word not in _COMPARATORS:
                return all_of(found, (found[0].at[0], found[-1].at[1]))
            left, sign = right, self._take()

    def _in(self, operand: Operand, *, negated: bool) -> Node:
        item = self._asked_of(operand, self._next)
        opened = self._next
        values = self._list(self._kind(item))
        if self._kind(item) == "id" and not all(isinstance(value, str) for value in values):
            raise self._pseudonym(item, opened)
        return In(item, values, negated, at=(item.at[0], self._tokens[self._place - 1].at[1]))

    def _list(self, kind: Kind) -> tuple[Constant, ...]:
        """Constants in brackets, all of this kind."""
        self._require("[", " and a list")
        values: list[Constant] = []
        while self._next.word != "]":
            token = self._next
            value = self._expression(_SUM)
            if not isinstance(value, Value):
                raise self._wrong(
                    "the filter has a list with more than constants in it", value.at or token.at, expected="numbers, text or flags"
                )
            if kind not in ("own", "id") and self._kind(value) != kind:
                raise self._mismatch(value, kind)
            values.append(value.value)
            if not self._took(",") and self._next.word != "]":
                raise self._unexpected(", or ]")
        self._take()
        return tuple(values)

    def _like(self, operand: Operand) -> Node:
        item = self._asked_of(operand, self._next)
        if self._kind(item) not in ("text", "own"):
            raise (
                self._pseudonym(item, self._next)
                if self._kind(item) == "id"
                else self._wrong(
                    f"the filter asks {self._named(item)} for a pattern",
                    item.at,
                    expected="a field that holds text",
                    next_step=_EXAMPLE,
                )
            )
        if self._next.kind != "text":
            raise self._unexpected('a pattern in quotes, such as "left%"')
        pattern = self._take()
        return Like(item, self._text(pattern), at=(item.at[0], pattern.at[1]))

    def _call(self, name: Token) -> Node | Operand:
        function = name.text.lower()
        if self._fields.get(name.text) == "id":
            raise self._pseudonym(Field(name.text, at=name.at), name)
        if function not in _FUNCTIONS:
            raise self._wrong(
                f"the filter calls an unknown function: {_shown(name.text[:_SHOWN])}",
                name.at,
                expected=", ".join(sorted(_FUNCTIONS)),
                next_step=_did_you_mean(function, sorted(_FUNCTIONS)) or "call one of these",
            )
        self._take()
        item = self._item(self._take(), "the field that is asked")
        if function == "array_length":
            end = self._require(")").at[1]
            return Length(self._column(item), at=(name.at[0], end))
        self._require(",")
        if function in ("text_match", "phrase_match"):
            return self._words(item, phrase=function == "phrase_match", start=name.at[0])
        column = self._column(item)
        if function.endswith("contains"):
            value = self._expression(0)
            if not isinstance(value, Value):
                raise self._wrong(f"{function} asks for more than a constant", value.at, expected="a number, text or a flag")
            values: tuple[Constant, ...] = (value.value,)
        else:
            values = self._list("own")
        end = self._require(")").at[1]
        return Contains(function, column, values, at=(name.at[0], end))

    def _words(self, item: Field | Own, *, phrase: bool, start: int) -> Node:
        if not isinstance(item, Field) or item.name != NOTES:
            raise self._wrong(
                "the filter looks for words where they are not kept one by one",
                item.at,
                expected=NOTES,
                next_step='ask other fields for a pattern: view like "AP%"',
            )
        if self._next.kind != "text":
            raise self._unexpected("words in quotes")
        token = self._take()
        words = words_of(self._text(token))
        if not words:
            raise self._wrong("the filter looks for words, and there are none", token.at, expected="letters or digits")
        if len(words) > MAX_TERMS:
            raise self._wrong("the filter looks for too many words", token.at, expected=f"at most {MAX_TERMS}")
        end = self._require(")").at[1]
        return Words(item, words, phrase and len(words) > 1, at=(start, end))

    def _item(self, token: Token, expected: str = "a field") -> Field | Own:
        """A field or, with keys behind it, what a column of the user's own holds."""
        if token.kind != "name" or token.word:
            self._place -= token.kind != "end"
            raise self._unexpected(expected)
        kind = self._fields.get(token.text)
        if kind is None:
            raise self._unknown(token)
        path: list[str | int] = []
        while kind == "own" and self._next.word == "[":
            self._take()
            key = self._take()
            value = self._text(key) if key.kind == "text" else self._number(key) if key.kind == "number" else None
            if not isinstance(value, str | int):
                self._place -= key.kind != "end"
                raise self._unexpected("the name of a column in quotes")
            path.append(value)
            self._require("]")
        at = (token.at[0], self._tokens[self._place - 1].at[1])
        if kind == "own" and not (path and isinstance(path[0], str)):
            raise self._wrong(
                f"the filter asks {token.text} as a whole",
                at,
                expected="one of your own columns",
                next_step=f'such as {token.text}["ward"]',
            )
        return Own(token.text, tuple(path), at=at) if path else Field(token.text, at=at)

    def _negative(self, sign: Token) -> Operand:
        operand = self._operand(self._expression(_SIGN))
        at = (sign.at[0], operand.at[1])
        if isinstance(operand, Value) and self._kind(operand) == "number":
            return Value(-cast(float, operand.value), at=at)
        return replace(self._sum(Value(0, at=sign.at), sign, operand), at=at)

    def _sum(self, left: Operand, sign: Token, right: Operand) -> Operand:
        for side in (left, right):
            kind = self._kind(side)
            if kind == "id":
                raise self._pseudonym(side, sign)
            if kind not in ("number", "own"):
                raise self._wrong(f"the filter reckons with {self._named(side)}", side.at, expected="a number", next_step=_EXAMPLE)
        at = (left.at[0], right.at[1])
        if not (isinstance(left, Value) and isinstance(right, Value)):
            return Arithmetic(sign.text, left, right, at=at)
        try:
            value = _FOLDED[sign.text](cast(float, left.value), cast(float, right.value))
        except (ZeroDivisionError, OverflowError):
            value = math.inf
        return Value(self._finite(value, at), at=at)

    # what may be compared with what

    def _kind(self, operand: Operand) -> Kind:
        match operand:
            case Field(name):
                return self._fields[name]
            case Own():
                return "own"
            case Value(value):
                return "flag" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
            case _:
                return "number"

    def _compare(self, left: Operand, sign: Token, right: Operand) -> Node:
        kinds = (self._kind(left), self._kind(right))
        for side, kind in zip((left, right), kinds, strict=True):
            if kind == "id" and not (side is left and sign.word in ("==", "!=") and isinstance(right, Value) and kinds[1] == "text"):
                raise self._pseudonym(side, sign)
        if isinstance(left, Value) and isinstance(right, Value):
            raise self._wrong(
                "the filter compares two constants", (left.at[0], right.at[1]), expected="a field on one side", next_step=_EXAMPLE
            )
        if "own" not in kinds and "id" not in kinds and kinds[0] != kinds[1]:
            odd, kind = (right, kinds[0]) if isinstance(right, Value) or not isinstance(left, Value) else (left, kinds[1])
            raise self._mismatch(odd, kind)
        if "flag" in kinds and sign.word not in ("==", "!="):
            raise self._wrong("the filter asks which flag is greater", sign.at, expected="== or !=, or the flag alone", next_step=_EXAMPLE)
        return Compare(cast(Comparator, sign.text), left, right, at=(left.at[0], right.at[1]))

    def _mismatch(self, operand: Operand, kind: Kind) -> ClauseError:
        hint = _EXAMPLE
        if isinstance(operand, Value) and isinstance(operand.value, str) and kind == "number" and _NUMBER.fullmatch(operand.value):
            hint = f"write {operand.value} without quotes"
        elif isinstance(operand, Value) and kind == "text":
            hint = f'write it in quotes: "{_shown(self._source[slice(*operand.at)])}"'
        elif kind == "flag":
            hint = "compare a flag with true or false, or write its name alone"
        return self._wrong(
            f"the filter compares {_SAID[kind]} with {self._named(operand)}", operand.at, expected=_SAID[kind], next_step=hint
        )

    def _truth(self, node: Node | Operand) -> Node:
        """What is true or not: a flag alone is so where it is true."""
        if isinstance(node, Field) and self._fields[node.name] == "flag":
            return Compare("==", node, Value(True), at=node.at)
        if not isinstance(node, Field | Own | Value | Arithmetic | Length):
            return node
        if isinstance(node, Field) and self._fields[node.name] == "id":
            raise self._pseudonym(node, self._next)
        if self._next.word not in ("", ")", "and", "or", "&&", "||"):
            raise self._unexpected("an operator: ==, !=, <, <=, >, >=, in, not in, like, is null")
        raise self._wrong(
            f"the filter has {self._named(node)} alone",
            node.at,
            expected="a comparison, or a flag",
            next_step=f"such as {_example_of(node, self._kind(node))}",
        )

    def _operand(self, node: Node | Operand) -> Operand:
        if isinstance(node, Field | Own | Value | Arithmetic | Length):
            return node
        raise self._wrong(
            "the filter compares a comparison", node.at, expected="a field or a value on each side", next_step="join comparisons by and, or"
        )

    def _asked_of(self, operand: Operand, sign: Token) -> Field | Own:
        if isinstance(operand, Field | Own):
            return operand
        raise self._wrong(
            f"the filter asks {self._named(operand)} for what only fields have", operand.at, expected="a field", next_step=_EXAMPLE
        )

    def _column(self, item: Field | Own) -> Own:
        if isinstance(item, Own):
            return item
        if self._kind(item) == "id":
            raise self._pseudonym(item, self._next)
        raise self._wrong(
            f"the filter takes {item.name} for a list", item.at, expected="one of your own columns", next_step='such as extra["scores"]'
        )

    def _named(self, operand: Operand) -> str:
        said = _SAID[self._kind(operand)]
        match operand:
            case Field(name):
                return f"{name}, which is {said}"
            case Value():
                return f"{_shown(self._source[slice(*operand.at)][:_SHOWN])}, which is {said}"
            case _:
                return said

    # constants

    def _text(self, token: Token) -> str:
        def unescaped(escape: re.Match[str]) -> str:
            if escape[1]:
                return chr(int(escape[1], 16))
            if escape[2] not in _ESCAPES:
                start = token.at[0] + 1 + escape.start()
                raise self._wrong(
                    "the filter holds an escape that Milvus does not know",
                    (start, start + 2),
                    expected=r"one of \" \' \\ \n \r \t \u00e4",
                    next_step=r"write a backslash itself as \\",
                )
            return _ESCAPES[escape[2]]

        text = _ESCAPE.sub(unescaped, token.text[1:-1])
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud800\udc00 is one character

    def _number(self, token: Token) -> int | float:
        found = _NUMBER.fullmatch(token.text)
        if not found:
            zeros = re.fullmatch(r"0+\d+", token.text, re.ASCII)
            raise self._wrong(
                "the filter holds a number that is none",
                token.at,
                expected="such as 60, 6.5, 1e3 or 0x1F",
                next_step="leave out the zeros before it" if zeros else "correct it, or put it in quotes if it is text",
            )
        try:
            value = int(token.text, 0) if found["whole"] else float(token.text)
        except ValueError:  # more digits than Python reads
            value = math.inf
        return self._finite(value, token.at)

    def _finite(self, value: float, at: Span) -> int | float:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._wrong("the filter holds a number that is none", at, expected="one up to 1.7e308", next_step=_EXAMPLE)
        return value if isinstance(value, int) and abs(value) <= MAX_INTEGER else number

    # what is said of what is wrong

    def _unknown(self, token: Token) -> ClauseError:
        name, former = token.text, self._tokens[max(0, self._place - 3) : max(0, self._place - 1)]
        near = _nearest(name, self._fields)
        hint = f"did you mean {near}?" if near else 'columns of your own are reached as extra["name"]'
        expected = "a field" if near else ", ".join(sorted(self._fields))
        if len(former) == 2 and former[1].word in _COMPARATORS and self._fields.get(former[0].text) == "text":
            hint = f"text stands in quotes: {constant(_shown(name))}"
        return self._wrong(
            f"the filter names an unknown field: {_shown(name[:_SHOWN])}",
            token.at,
            expected=expected,
            next_step=hint,
        )

    def _pseudonym(self, operand: Operand, sign: Token) -> ClauseError:
        name = operand.name if isinstance(operand, Field) else "a field"
        return self._wrong(
            f"the filter does with {name} what cannot be done",
            (min(operand.at[0], sign.at[0]), max(operand.at[1], sign.at[1])),
            expected=f'{name} == "…", != "…", in ["…"], not in ["…"] or is null: Milvus holds a pseudonym of it',
            next_step="name the field first, and compare it with whole ids",
        )

    def _unexpected(self, expected: str) -> ClauseError:
        token = self._next
        word = token.text.lower()
        words = ("and", "or", "in", "not in", "like", "is null", *sorted(_COMPARATORS))
        near = _MEANT.get(word) or ("" if token.word is not None else _nearest(word, words))
        return self._wrong(
            "the filter ends too early" if token.kind == "end" else "the filter has a word in the wrong place",
            token.at,
            expected=expected,
            next_step=f"did you mean {near}?" if near else _EXAMPLE,
        )

    def _wrong(self, what: str, span: Span, *, expected: str, next_step: str = _EXAMPLE) -> ClauseError:
        part = self._source[slice(*span)]
        got = _shown(part[:_SHOWN]) + ("…" if len(part) > _SHOWN else "")
        return wrong(
            what,
            self._source,
            span,
            expected=expected,
            got=f"{got} at character {span[0] + 1}" if got else "its end",
            next_step=next_step,
        )


def _nearest(word: str, known: Sequence[str] | Mapping[str, Kind]) -> str:
    """The known word that it is most like; "" if like none."""
    lower = {name.lower(): name for name in known}
    found = get_close_matches(word.lower()[:64], lower, n=1, cutoff=0.55)
    return lower[found[0]] if found else ""


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = _nearest(word, known)
    return f"did you mean {near}?" if near else ""


def _example_of(node: Operand, kind: Kind) -> str:
    name = node.name if isinstance(node, Field) else 'extra["ward"]' if isinstance(node, Own) else "age"
    return f'{name} == "…"' if kind == "text" else f"{name} > 60"
