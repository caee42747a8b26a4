"""Templates of chats in a tokenizer's folder."""

from __future__ import annotations

import datetime
import json

import pytest

from jaxtok.tokenizers.chat import ChatTemplate, read_template

MESSAGES = [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "Hi 'you'"}]
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
FULL = """{%- if messages[0].role == 'system' -%}
  {%- set first = messages[0].content | trim -%}
{%- endif %}
{# a remark #}
{%- for message in messages %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
    {{- '<|' ~ message['role'] ~ '|>' }}
    {% generation %}{{ message.content }}{% endgeneration %}
    {{- message | tojson(indent=2) }}
{% endfor %}
{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}{{ strftime_now('%Y') }}"""


def settings(folder, **content):
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def test_where_a_template_is(tmp_path):
    with pytest.raises(ValueError, match=r"has no chat template; put one there as chat_template\.jinja"):
        read_template(tmp_path)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    settings(tmp_path, chat_template=PLAIN, **tokens)
    expected = "<s>[system]Be <brief>.</s>[user]Hi 'you'</s>"
    assert read_template(tmp_path).text(MESSAGES) == expected
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": PLAIN}]
    assert read_template(settings(tmp_path, chat_template=named, **tokens)).text(MESSAGES) == expected
    with pytest.raises(ValueError, match="the chat templates tools; one must be named default"):
        read_template(settings(tmp_path, chat_template=named[:1]))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].content }}")
    assert read_template(tmp_path).text(MESSAGES) == "Hi 'you'", "the file comes first"


def test_as_transformers_renders():
    transformers = pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    assert transformers
    for prompt in (True, False):
        for source in (FULL, PLAIN):
            (expected,), _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=prompt)
            assert ChatTemplate(source, {}).text(MESSAGES, prompt) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{% for %}", "is damaged"),
        ("{{ messages[0].nothing.more }}", "refuses the messages"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "refuses the messages: access to attribute"),
        ("{{ messages.append(1) }}", "refuses the messages"),
    ],
)
def test_what_a_template_refuses_and_what_it_may_not_do(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}).text(MESSAGES)


def test_messages_have_a_role_and_content():
    with pytest.raises(ValueError, match="it must have role and content"):
        ChatTemplate(PLAIN, {}).text([{"role": "user"}])
    year = str(datetime.datetime.now().year)
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).text(MESSAGES) == year
