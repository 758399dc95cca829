"""Chat templates that do not end, or write more than they are given, are refused before the first record."""

import resource
import time
from collections.abc import Sequence
from typing import Any

import pytest

from hydra_vlm.data import template_trial
from hydra_vlm.data.readers import open_reader
from hydra_vlm.data.template_trial import bounded, require_ending
from hydra_vlm.errors import ConfigError, DataError
from tiny import byte_tokenizer

GOOD = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a text of a terabyte": "{{ 'a' * 10 ** 12 }}",
    "a list of a terabyte": "{% set x = [1] * 10 ** 11 %}{{ x | length }}",
    "doubling": "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    "{{ n.s }}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a wide format": "{{ '%0999999999999d' % 1 }}",
    "a centred word": "{{ 'a'.center(10 ** 12) }}",
    "only with many turns": "{% if messages | length > 4 %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}" + GOOD,
    "much output": "{% for a in range(90000) %}0123456789{% endfor %}" + GOOD,
}


@pytest.fixture(autouse=True)
def _shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 1)


@pytest.mark.parametrize("case", ENDLESS)
def test_templates_that_do_not_end(case: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS[case]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"chat template (does not end|takes more memory|writes).*turns") as caught:
        open_reader(tokenizer)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB: here nothing was rendered


def test_a_template_that_ends_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = GOOD
    assert open_reader(tokenizer).prompt("how are you?", False) == "user: how are you?\nassistant: "
    monkeypatch.setattr(template_trial, "_fault_in_a_fork", lambda render: pytest.fail("tried again"))
    open_reader(tokenizer)


def test_what_passes_the_trial_is_held_to_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that waits for a certain record."""

    def long(messages: Sequence[Any], ask: bool) -> str:
        return "x" * (200_000 if "now" in messages[0]["content"] else 10)

    require_ending("waits for it", long)
    render = bounded(long)
    assert render([{"role": "user", "content": "not yet"}], False) == "x" * 10
    with pytest.raises(DataError, match="writes 200,000 characters where 65,584 are allowed"):
        render([{"role": "user", "content": "now"}], False)

    def endless(messages: Sequence[Any], ask: bool) -> str:
        while True:
            pass

    monkeypatch.setattr(template_trial, "LONGEST_RENDERING", 1)
    with pytest.raises(DataError, match="does not end within 1 seconds"):
        bounded(endless)([], False)
