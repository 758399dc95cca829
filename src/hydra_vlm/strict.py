"""What a text in JSON or YAML may hold before it is used: what Python's readers take without a word is refused.

A key twice, numbers of any length, halves of surrogate pairs, thousands of brackets within brackets, YAML that grows as
its aliases are written out. NaN and Infinity are read, as Python and transformers write them: whoever reads a number
checks that it is finite. No torch.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import yaml

from hydra_vlm.errors import FileError

MOST = 10_000_000
"""Values in one text; Python takes up to 100 bytes for each."""

DEEPEST = 64
"""Brackets within brackets."""

LONGEST_NUMBER = 40
"""Digits; tokenizers say 10^30 where they mean that there is no limit."""

MOST_NODES = 20_000
"""Values of a YAML text once its aliases are written out."""


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; raises FileError that begins with `where`."""
    return parsed(StrictJson(), text, where)


def parsed(reader: "StrictJson", text: str, where: str) -> Any:
    """The same by a reader that is made once for many texts."""
    if text.count(",") + text.count("[") + text.count("{") > MOST:
        raise FileError(f"{where} holds more than {MOST:,} values, more than is read")
    value, fault = reader.read(text)
    if fault:
        raise FileError(f"{where} {fault}")
    return value


class StrictJson:
    """A JSON decoder that notes what Python's reads without a word: repeated keys, numbers of any length.

    `finite` notes NaN and infinite numbers, too.
    """

    def __init__(self, finite: bool = False) -> None:
        self.noted: list[str] = []
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._integer,
            parse_float=self._float if finite else None,
            parse_constant=self._constant if finite else None,
        )

    def read(self, text: str) -> tuple[Any, str]:
        """The value of a whole text, and what is wrong with it ("" for nothing)."""
        self.noted.clear()
        try:
            value = self.decoder.decode(text)
        except (ValueError, RecursionError) as problem:
            return None, syntax_fault(problem)
        return value, self.fault(value, text)

    def fault(self, value: Any, text: str) -> str:
        """What is wrong with the value that was just decoded from `text`; "" for nothing."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as problem:
                self.noted.append(f"is not UTF-8 ({_bytes(problem)})")
        if ("\\ud" in text or "\\uD" in text) and not _encodable(value):
            self.noted.append("holds half of a surrogate pair, which is no character")
        if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
            self.noted.append(f"is nested deeper than {DEEPEST} brackets")
        found, self.noted = "; ".join(self.noted[:3]), []
        return found

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.noted.append(f"has the key {first_twice([key for key, _ in pairs])[:40]!r} twice")
        return found

    def _integer(self, digits: str) -> int:
        if len(digits) > LONGEST_NUMBER:
            self.noted.append(f"holds a number of {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits)
        if value - value != 0:
            self.noted.append(f"holds the number {digits[:20]}, which is too large")
        return value

    def _constant(self, name: str) -> float:
        self.noted.append(f"holds {name}, which JSON does not know")
        return 0.0


def syntax_fault(problem: Exception) -> str:
    """What Python's JSON decoder says, in our words."""
    if isinstance(problem, RecursionError):
        return f"is nested deeper than {DEEPEST} brackets"
    if isinstance(problem, json.JSONDecodeError) and problem.lineno > 1:
        return f"is not valid JSON ({problem.msg}, line {problem.lineno})"
    return f"is not valid JSON ({getattr(problem, 'msg', problem)})"


def first_twice(keys: list[Any]) -> Any:
    """The first of the keys that was there before; one must be."""
    seen: set[Any] = set()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _bytes(problem: UnicodeEncodeError) -> str:
    code = ord(problem.object[problem.start])
    return f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _depth(value: Any) -> int:
    """Brackets within brackets, counted without recursion."""
    deepest, waiting = 0, [(value, 1)] if isinstance(value, dict | list) else []
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        inner = item.values() if isinstance(item, dict) else item
        waiting += [(found, depth + 1) for found in inner if isinstance(found, dict | list)]
    return deepest


_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
"""What a plain word of YAML stands for: the core of YAML 1.2. By 1.1, PyYAML's, 1e-3 is a text, no is false, 010 is 8,
1:30 is 90."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, form, first in _PLAIN:
        for character in first:
            found.setdefault(character, []).append((f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{form})\Z")))
    return found


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, in C where it was built with libyaml, with plain words as YAML 1.2 reads them."""

    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that a reader of either YAML would take for something else."""


for _first, _forms in _resolvers().items():
    for _tag, _form in _forms:
        _Dumper.add_implicit_resolver(_tag, _form, [_first])


def dump_yaml(value: Any) -> str:
    """The value as YAML that `parse_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text of one document (None for an empty one).

    Raises:
        FileError: beginning with `where`: no YAML, a key twice, too deep, too large once aliases are written out.
    """
    try:
        _require_small(text, where)
        root = yaml.compose(text, _Loader)
        if root is None:
            return None
        _check_nodes(root, where)
        return _Loader("").construct_document(root)
    except FileError:
        raise
    except yaml.YAMLError as problem:
        raise FileError(f"{where} is not valid YAML: {' '.join(str(problem).split())}") from None
    except Exception as problem:  # PyYAML stumbles over values that are not of their tag: a date of month 99
        raise FileError(f"{where} holds a value that does not read ({type(problem).__name__}: {problem})") from None


def _require_small(text: str, where: str) -> None:
    """Walk the parser's events, which build nothing: depth, and how many values there are with aliases written out."""
    sizes: dict[str, int] = {}  # of what an anchor stands for
    open_: list[tuple[str | None, int]] = []  # the collections around this place: anchor, values before it
    count = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise FileError(f"{where} uses the alias *{event.anchor} before or within what it stands for")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            count += 1
            sizes.pop(event.anchor or "", None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            sizes |= {anchor: count - before} if anchor else {}
        if len(open_) > DEEPEST:
            raise FileError(f"{where} is nested deeper than {DEEPEST} levels")
        if count > MOST_NODES:
            raise FileError(f"{where} holds more than {MOST_NODES:,} values once its aliases are written out")


def _check_nodes(root: yaml.Node, where: str) -> None:
    """Each node once: keys that stand twice in a mapping, numbers of any length."""
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        inner: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                line, key = node.start_mark.line + 1, first_twice(keys)[1][:40]
                raise FileError(f"{where} has the key {key!r} twice (in the section at line {line})")
            inner = (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            line = node.start_mark.line + 1
            raise FileError(f"{where} holds a number of {len(node.value)} digits (line {line})")
        fresh = [part for part in inner if id(part) not in seen]
        seen |= {id(part) for part in fresh}
        waiting += fresh
