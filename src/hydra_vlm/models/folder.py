"""A model's folder before anything of it is handed to transformers: files are files, settings read, sizes can be.

transformers opens what it finds under a name, so a pipe in the place of a file would hold it up for ever, and it builds
what a configuration says. What cannot be read or built is said here, with the file.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra_vlm.errors import ConfigError, FileError
from hydra_vlm.models.sizes import require_images_possible, require_possible
from hydra_vlm.reading import TOKENIZER, file_fault, read_object, read_text

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SETTINGS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)
VOCABULARIES = ("tokenizer.json", "added_tokens.json", "vocab.json")
PLAIN = ("chat_template.jinja", "merges.txt", "vocab.txt")

TEMPLATES = "additional_chat_templates"
"""A folder of others, which transformers reads as well."""

LONGEST_TEMPLATE = 2**20
"""Bytes of a chat template."""

GROWTH = 64
"""Times that a tokenizer's normaliser may lengthen a text."""

WIDEST_PADDING = 2**20

MOST_ADDED, MOST_MARKS = 2**15, 2**10
"""Tokens beside the vocabulary, which takes seconds to match, and marks that are put around every text."""


def require_readable(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder whose files can be read and whose sizes can be; the tokenizer's are not read yet.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    try:
        require_files(folder)
        config = read_object(folder / CONFIG)
        found = {name: read_object(folder / name) for name in (*PROCESSORS, *SETTINGS) if (folder / name).is_file()}
        if (folder / "chat_template.jinja").is_file():
            read_text(folder / "chat_template.jinja", LONGEST_TEMPLATE)
    except FileError as problem:
        raise ConfigError(f"{problem}: put the model's own file in its place") from None
    require_possible(config, folder / CONFIG)
    for name in PROCESSORS:
        require_images_possible(found.get(name, {}), folder / name)
    return config


def require_files(folder: Path) -> None:
    """Raises FileError where a pipe, a device or a socket lies in a folder, or anything but a file by a file's name."""
    known = {CONFIG, *PROCESSORS, *SETTINGS, *VOCABULARIES, *PLAIN}
    for path in (*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")):
        fault = file_fault(path)
        harmless = fault.endswith(("is a folder, not a file", "not exist"))
        if fault and (path.name in known or path.parent != folder or not harmless):
            raise FileError(f"{path} {fault}")


def require_tokenizer_possible(folder: Path) -> None:
    """Check a tokenizer's files before they are loaded: size, depth, padding, normalisers that make texts grow.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    try:
        found = {name: read_object(folder / name, TOKENIZER) for name in VOCABULARIES if (folder / name).is_file()}
        for name in PLAIN:
            if (folder / name).is_file():
                read_text(folder / name, TOKENIZER)
    except FileError as problem:
        raise ConfigError(f"{problem}: put the model's own file in its place") from None
    where, tokenizer = folder / "tokenizer.json", found.get("tokenizer.json", {})
    growth = 1.0
    for rule in _rules(tokenizer.get("normalizer")):
        growth *= max(1.0, _growth(rule))
    if growth > GROWTH:
        raise ConfigError(
            f"{where} makes texts up to {growth:.3g} times longer as it normalises them: it is no tokenizer"
        )
    marks = tokenizer.get("post_processor")
    for what, part, most in (
        ("added_tokens", tokenizer.get("added_tokens"), MOST_ADDED),
        ("single in its post_processor", marks.get("single") if isinstance(marks, Mapping) else None, MOST_MARKS),
    ):
        if isinstance(part, list) and len(part) > most:
            raise ConfigError(f"{where} lists {len(part):,} {what}, and {most:,} are read: it is no tokenizer's")
    padding = tokenizer.get("padding") or {}
    strategy = padding.get("strategy") if isinstance(padding, Mapping) else None
    wide = strategy.get("Fixed", 0) if isinstance(strategy, Mapping) else 0
    multiple = padding.get("pad_to_multiple_of") if isinstance(padding, Mapping) else 0
    if any(isinstance(number, int) and number > WIDEST_PADDING for number in (wide, multiple)):
        raise ConfigError(f"{where} pads every text to {max(wide, multiple or 0):,} tokens: take its `padding` out")


def _rules(part: Any) -> Iterator[Mapping[str, Any]]:
    """A normaliser, or those of a sequence of them."""
    if isinstance(part, Mapping):
        yield part
        for inner in part.get("normalizers") or []:
            yield from _rules(inner)


def _growth(rule: Mapping[str, Any]) -> float:
    """How many times longer a rule may make a text of a character or more."""
    content = str(rule.get("content", ""))
    if rule.get("type") == "Replace":
        pattern = rule.get("pattern")
        old = pattern.get("String") if isinstance(pattern, Mapping) else None  # else a regular expression
        return len(content) / max(1, len(old) if isinstance(old, str) else 1)
    return 1.0
