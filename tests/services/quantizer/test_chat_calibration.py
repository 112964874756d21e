"""Conversations through the checkpoint's template, in a child that cannot harm the run."""

import json
import shutil
from pathlib import Path

import pytest

from services.quantizer import chat
from services.quantizer.chat import render_conversations
from services.quantizer.errors import QuantizerError
from services.quantizer.texts import read_files

DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.fixture
def render(tmp_path):
    """render(template, *conversations, **tokenizer_config) -> texts."""

    def attempt(template, *conversations, **settings):
        source = tmp_path / "source"
        source.mkdir(exist_ok=True)
        shutil.copy(DEMO / "tokenizer.json", source)
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None:
            (source / "chat_template.jinja").write_text(template)
        path = tmp_path / "talk.jsonl"
        path.write_text("".join(json.dumps(c) + "\n" for c in conversations))
        return render_conversations(source, read_files([path])[0])

    return attempt


def say(*contents):
    return {"messages": [{"role": "user", "content": content} for content in contents]}


def test_the_demo_models_own_template():
    path = DEMO.parent / "none.jsonl"
    talk = {"messages": [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Ho"}]}
    from services.quantizer.texts import JSON_LINES, Document, TextFile

    texts = render_conversations(DEMO, TextFile(path, JSON_LINES, (Document(1, None, talk),)))
    assert texts == ["<|bos|><|user|>Hi\n<|end|><|assistant|>Ho<|end|>"]


def test_constants_tools_and_functions(render):
    template = (
        "{{ bos_token }}{{ eos_token }}|{{ tools | tojson }}|{{ strftime_now('%d %b %Y') }}|"
        "{% generation %}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}"
        "{% endfor %}{% endgeneration %}"
    )
    (text,) = render(
        template,
        {**say("<é>", "no"), "tools": [{"name": "<"}]},
        bos_token="<s>",
        eos_token={"content": "</s>"},
    )
    assert text == '<s></s>|[{"name": "<"}]|26 Jul 2024|<é>'


FAILING = {
    "refuses": (
        "{{ raise_exception('only one message') }}",
        "the chat template refuses it: only one message",
    ),
    "a wrong template": ("{% for %}", "fails: TemplateSyntaxError"),
    "reaches for Python": ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
    "adds a text and a number": ("{{ messages[0].content + 1 }}", "fails: TypeError"),
    "writes without end": (
        "{% for i in range(90000) %}{{ messages[0].content * 999 }}{% endfor %}",
        "more than",
    ),
    "takes all memory": ("{{ (messages[0].content * 9999) * 9999999 }}", "too much memory"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_template_names_the_line(render, tmp_path, case):
    template, reason = FAILING[case]
    only_second = "{% if messages[0].content == 'bad' %}" + template + "{% endif %}"
    with pytest.raises(QuantizerError) as caught:
        render(only_second if case != "a wrong template" else template, say("fine"), say("bad"))
    line = 1 if case == "a wrong template" else 2
    assert str(caught.value).startswith(f"{tmp_path}/talk.jsonl:{line}: the chat template ")
    assert reason in str(caught.value)


def test_a_template_that_does_not_end_is_ended(render, monkeypatch):
    monkeypatch.setattr(chat, "_BASE_CPU_S", 1)
    nested = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(QuantizerError, match=r"talk\.jsonl:1: the chat template was ended: more than 1 s"):
        render(nested, say("x"))


def test_a_checkpoint_without_a_template_is_refused(render):
    with pytest.raises(QuantizerError, match=r"talk\.jsonl:1: messages need a chat template"):
        render(None, say("x"))
