"""Chat templates render as in transformers, and a hostile one is stopped in time and memory."""

# Templates are easier to read unbroken.
# ruff: noqa: E501

import json
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models

from lmopt.errors import TemplateError, UnsupportedOptionError
from lmopt.tokenizer import Tokenizer, TokenizerSettings
from lmopt.tokenizer.budget import DEADLINE_S

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
STATE = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2})).to_str()
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = [
    {"role": "system", "content": "You are  <b>kind</b> & 'terse'."},
    {"role": "user", "content": '漢字 👩‍👩‍👧 "quoted"\n\n  text\t'},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5]}}}],
    },
    {"role": "tool", "content": '{"ok": true}', "name": "f"},
    {"role": "assistant", "reasoning": "because", "content": "Yes.  "},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": np.zeros(2)}]},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
]

REAL = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content']|string) + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{- bos_token }}{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | string | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}",
    "namespaces": "{%- set ns = namespace(n=0, last='') -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- if m.role == 'user' and m.content is string -%}{%- set ns.last = m.content -%}{%- continue -%}{%- endif -%}{{ loop.index ~ '/' ~ loop.length ~ ':' ~ m.role ~ (', ' if not loop.last else '.') }}{%- endfor -%}\n{{ ns.n }}{{ ns.last.split('\n')[-1] | trim }}",
    "tools": "{% if tools is not none %}{{ tools | tojson }}\n{{ tools|tojson(indent=4) }}{% endif %}{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c.function.arguments|tojson }}{{ c.function.arguments.items()|list }}{% endfor %}{% endif %}{% endfor %}",
    "macros": "{% macro show(m, sep=': ') -%}{{ m.role ~ sep }}{{ caller() if caller else '' }}{{ m['content']|string|upper }}{%- endmacro %}{% for m in messages %}{{ show(m) }}\n{% endfor %}{% call show(messages[0], sep='=') %}!{% endcall %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content or m.reasoning_content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.thinking|default('-') }}{{ m.reasoning_content|default('-') }}{% endfor %}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|length }} {{ (messages|first).role|capitalize }} {{ 'x'|indent(2) }} {{ 'a b'|title }} {{ [3,1,2]|sort }} {{ {'b': 1, 'a': 2}|dictsort }} {{ 'a<b'|e }} {{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 10 }} {{ '%s-%03d' % ('a', 7) }} {{ '{:>5}'.format('z') }} {{ 'abc'[::-1] }} {{ ('a', 1) }} {{ 1 < 2 < 3 }} {{ 'a' in 'abc' and 1 not in [2] }} {{ none }}{{ missing }}{{ missing is defined }} {{ range(3)|list }} {{ 'A'.center(5) }} {{ [1] + [2] }} {{ 3 * 'ab' }} {{ ['x'] * 2 }} {{ 'a,b'.split(',') }} {{ dict(a=1).get('a') }} {{ 1.5|round|int }} {{ '-'.join(['a', 'b']) }}",
    "escapes": "{% autoescape true %}{{ '<' ~ ('>'|safe) ~ messages[0].content }}{% endautoescape %}{{ '<' ~ ('>'|safe) }}{% set block %}{{ '<' }}x{% endset %}{{ block ~ '&' }}{% filter upper %}a{{ 'b' }}{% endfilter %}",
    "lines": "{% if true %}\n  a\n{% endif %}\n{# note #}\n   {%- set x = 1 %}\r\n\r\nend\n\n",
    "objects": "{% for m in messages %}{% if m.content is iterable and m.content is not string %}{% for part in m.content %}{{ part.type }}{{ part.image }}{% endfor %}{% endif %}{% endfor %}{{ score + 1 }}{{ flag }}{{ pair }}",
}


def pair(template: object) -> tuple[Tokenizer, transformers.PreTrainedTokenizerFast]:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(STATE), **SPECIAL)
    theirs.chat_template = template
    named = template if isinstance(template, dict) else {"default": template}
    return Tokenizer(STATE, TokenizerSettings(special_tokens=SPECIAL, chat_templates=named)), theirs


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("name", REAL)
def test_renders_as_transformers_does(name: str, tools: list | None, prompt: bool) -> None:
    ours, theirs = pair(REAL[name])
    extra = {"score": np.float32(1.5), "flag": np.bool_(False), "pair": (1, "a")}
    expected = theirs.apply_chat_template(
        CHAT, tools=tools, add_generation_prompt=prompt, tokenize=False, **extra
    )
    assert ours.apply_chat_template(CHAT, prompt, tools=tools, **extra) == expected


def test_named_templates(tmp_path: Path) -> None:
    named = {"default": "D{{ messages|length }}", "tool_use": "T{{ tools|length }}", "rag": "R"}
    ours, theirs = pair(named)
    for options in ({}, {"tools": TOOLS}, {"chat_template": "rag"}, {"chat_template": "{{ bos_token }}x"}):
        assert ours.apply_chat_template(HELLO, **options) == theirs.apply_chat_template(
            HELLO, tokenize=False, **options
        )
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.settings.chat_templates == named
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == named
    assert again.chat_template == named["default"]


@pytest.mark.parametrize("as_file", [True, False])
def test_templates_are_found_in_either_place(tmp_path: Path, as_file: bool) -> None:
    source = "{{ bos_token }}\r\n{{ messages[0].content }}\r\n"
    (tmp_path / "tokenizer.json").write_text(STATE)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    if as_file:
        (tmp_path / "chat_template.jinja").write_bytes(source.encode())
        config["chat_template"] = "the file wins"
    else:
        config["chat_template"] = [
            {"name": "default", "template": source},
            {"name": "other", "template": "o"},
        ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.apply_chat_template(HELLO) == theirs.apply_chat_template(HELLO, tokenize=False)


def test_the_time_of_day_is_known() -> None:
    ours, _ = pair("{{ strftime_now('%Y') }}")
    assert ours.apply_chat_template(HELLO) == time.strftime("%Y")


def test_a_long_conversation_fits_the_budget() -> None:
    accumulating = "{% set ns = namespace(text='', seen=[]) %}{% for m in messages %}{% set ns.text = ns.text + m.content %}{% set ns.seen = ns.seen + [m] %}{% endfor %}{{ ns.text }}{{ messages|tojson|length }}{{ ns.seen|length }}"
    chat = [{"role": "user", "content": f"{turn} " * 200} for turn in range(100)]
    ours, theirs = pair(accumulating)
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)


# Refusals ---------------------------------------------------------------------------------------


def test_no_template() -> None:
    with pytest.raises(TemplateError, match="no default chat template"):
        Tokenizer(STATE).apply_chat_template(HELLO)
    ours, _ = pair({"a": "x", "b": "y"})
    with pytest.raises(TemplateError, match="a, b"):
        ours.apply_chat_template(HELLO)


@pytest.mark.parametrize("messages", [[], "Hello", {"role": "user"}, ["Hello"], [None], None])
def test_messages_must_be_messages(messages: object) -> None:
    ours, _ = pair("{{ messages }}")
    with pytest.raises(TemplateError):
        ours.apply_chat_template(messages)  # type: ignore[arg-type]


def test_options_that_lmopt_lacks_are_not_swallowed() -> None:
    ours, _ = pair("x")
    with pytest.raises(UnsupportedOptionError, match="continue_final_message"):
        ours.apply_chat_template(HELLO, continue_final_message=True)


def test_a_template_may_refuse_a_conversation() -> None:
    ours, _ = pair("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="roles must alternate"):
        ours.apply_chat_template(HELLO)


GROW = "{% set ns = namespace(x=A, y=B) %}{% for i in range(60) %}{% set ns.x = X %}{% set ns.y = Y %}{% endfor %}"


def dag(use: str, kind: str = "[]") -> str:
    left, right = kind
    one = f"{left}1,{right}"
    grown = GROW.replace("A", one).replace("B", one)
    for name in "xy":
        grown = grown.replace(name.upper(), f"{left}ns.{name}, ns.{name}{right}")
    return grown + use


COSTLY = {
    "text times number": "{{ 'a' * 1000000000 }}",
    "list times number": "{{ ([0] * 1000000000)|length }}",
    "doubling by ~": GROW.replace("A", "'aa'")
    .replace("B", "1")
    .replace("X", "ns.x ~ ns.x")
    .replace("Y", "1"),
    "doubling by +": GROW.replace("A", "'aa'")
    .replace("B", "1")
    .replace("X", "ns.x + ns.x")
    .replace("Y", "1"),
    "doubling lists": GROW.replace("A", "[1]")
    .replace("B", "1")
    .replace("X", "ns.x + ns.x")
    .replace("Y", "1"),
    "squaring": GROW.replace("A", "7").replace("B", "1").replace("X", "ns.x * ns.x").replace("Y", "1"),
    "power": "{{ 9 ** (9 ** 9) }}",
    "negative power": "{{ 9 ** -(9 ** 9) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops without calls": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% set k = i %}{% endfor %}{% endfor %}",
    "range": "{{ range(1000000000)|list|length }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "binary recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "output": "{% set x = 'a' * 100000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "set block": "{% set x = 'a' * 100000 %}{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}{{ y|length }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "center method": "{{ 'a'.center(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(10000) }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join method": "{{ ''.join(['a' * 10000] * 100000) }}",
    "join filter": "{{ (['a' * 10000] * 100000)|join }}",
    "join lazily": "{{ (['a' * 10000] * 100000)|select|join }}",
    "join separator": "{{ ('a' * 100000)|join('b' * 100000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 100000}) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format star": "{{ '%*d' % (1000000000, 1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format repeats": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "json indent": "{{ [1]|tojson(indent=1000000000) }}",
    "json separators": "{{ ([1] * 100000)|tojson(separators=('a' * 100000, ':')) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "wordwrap": "{{ ('a ' * 100000)|wordwrap(1, true, 'x' * 100000) }}",
    "urlize": "{{ ('a.com ' * 100000)|urlize(target='b' * 100000) }}",
    "sum of lists": "{{ ([['a'] * 1000] * 10000)|sum(start=[])|length }}",
    "split": "{{ ('a ' * 4000000).split()|length }}",
    "shared text": dag("{{ ns.x }}"),
    "shared json": dag("{{ ns.x|tojson }}"),
    "shared ~": dag("{{ ns.x ~ '' }}"),
    "shared %": dag("{{ '%s' % ns.x }}"),
    "shared ==": dag("{{ ns.x == ns.y }}"),
    "shared in": dag("{{ ns.x in [ns.y] }}"),
    "shared test": dag("{{ [ns.x]|select('equalto', ns.y)|list|length }}"),
    "shared index": dag("{{ [ns.x].index(ns.y) }}"),
    "shared key": dag("{{ {ns.x: 1}|length }}", "()"),
    "shared lookup": dag("{{ {1: 2}[ns.x] }}", "()"),
    "shared unique": dag("{{ [ns.x, ns.y]|unique|list|length }}", "()"),
    "deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "long source": "{{ 1 }}" * 100_000,
    "lipsum": "{{ lipsum(1000000)|length }}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template_is_stopped_and_the_next_renders(name: str) -> None:
    ours, _ = pair("{{ messages[0].content }}")
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(TemplateError):
            ours.apply_chat_template(HELLO, chat_template=COSTLY[name])
        spent, peak = time.thread_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Twice the promise, since tracing memory slows Python down; what must not happen takes minutes.
    assert spent < 2 * DEADLINE_S
    assert peak < 64 * 1024 * 1024
    assert ours.apply_chat_template(HELLO) == "Hello"


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ (1).__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__closure__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ dict.__call__.__globals__ }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | selectattr('__class__') | list | first | attr('__class__') }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{{ (messages|map('string')).gi_frame }}",
    "{{ environment.compile('1') }}",
    "{{ open('/etc/passwd').read() }}",
    "{% do messages.append(1) %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    ours, _ = pair("{{ messages[0].content }}")
    messages = [dict(HELLO[0])]
    try:
        text = ours.apply_chat_template(messages, chat_template=source)
    except TemplateError:
        text = ""
    # Undefined attributes write nothing; what must never show is anything of the interpreter.
    assert not any(word in text for word in ("class", "object", "module", "function", "root:", "globals"))
    assert messages == HELLO
    assert ours.apply_chat_template(HELLO) == "Hello"


def test_methods_of_callers_objects_are_out_of_reach() -> None:
    class Document:
        def __init__(self) -> None:
            self.deleted = False

        def delete(self) -> None:
            self.deleted = True

    document = Document()
    ours, _ = pair("{{ messages[0].content.delete() }}{{ thing.delete() }}")
    with pytest.raises(TemplateError):
        ours.apply_chat_template([{"role": "user", "content": document}], thing=document)
    assert not document.deleted


def test_threads_have_budgets_of_their_own() -> None:
    ours, _ = pair("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = [{"role": "user", "content": "word " * 50}] * 50

    def work(turn: int) -> bool:
        if turn % 4 == 0:
            with pytest.raises(TemplateError):
                ours.apply_chat_template(HELLO, chat_template=COSTLY["text times number"])
        return ours.apply_chat_template(chat) == "word " * 2500

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(64)))


def test_a_debugger_or_coverage_tool_keeps_its_trace_function() -> None:
    ours, _ = pair("{{ messages[0].content }}")

    def own(frame: object, event: str, argument: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(own)
    try:
        ours.apply_chat_template(HELLO)
        after_success = sys.gettrace()
        with pytest.raises(TemplateError):
            ours.apply_chat_template(HELLO, chat_template=COSTLY["binary recursion"])
        after_failure = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after_success is own
    assert after_failure is own
