"""Chat templates in their children: what published templates need works, what would eat the machine is
stopped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from services.gateway.text.chat_template import (
    ChatTemplate,
    ConversationRefused,
    TemplateBusy,
    TemplateError,
    TemplateLimits,
)

ROOT = Path(__file__).resolve().parents[4]
FAST = TemplateLimits(cpu_s=0.3, wall_s=5.0)


@asynccontextmanager
async def started(
    source: str, limits: TemplateLimits = FAST, **constants: str
) -> AsyncIterator[ChatTemplate]:
    template = ChatTemplate(source, constants, limits=limits)
    await template.start()
    try:
        yield template
    finally:
        await template.close()


async def test_a_usual_template_renders() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}"
        "<{{ m.role }}>{{ m.content | trim }}{% endfor %}\n"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "user", "content": " hi \u2028é😀\n"}, {"role": "x", "content": "no"}]
    async with started(source, bos_token="<s>") as template:
        assert await template.render(messages) == "<s><user>hi \u2028é😀<assistant>"
        assert await template.render(messages, add_generation_prompt=False) == "<s><user>hi \u2028é😀"
        assert template.num_killed == 0


async def test_what_published_templates_use_beyond_jinja() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}<e>"
        "{% endgeneration %}{% else %}{{ m | tojson(separators=(',', ':'), sort_keys=True) }}{% endif %}"
        "{% endfor %}{{ messages[0] | tojson(ensure_ascii=True) }}"
    )
    messages = [{"role": "user", "content": "é<"}, {"role": "assistant", "content": "yes"}]
    async with started(source) as template:
        assert await template.render(messages) == (
            '{"content":"é<","role":"user"}<a>yes<e>{"role": "user", "content": "\\u00e9<"}'
        )


async def test_the_template_may_refuse_a_conversation() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    async with started(source) as template:
        with pytest.raises(ConversationRefused, match="roles must alternate"):
            await template.render([])
        assert template.num_killed == 0


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__')).x }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ messages.append(1) }}",
        "{{ range(10**9)|list }}",
        "{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}",
    ],
)
async def test_what_a_template_may_not_do(source: str) -> None:
    async with started(source) as template:
        with pytest.raises(ConversationRefused):
            await template.render([{"role": "user", "content": "hi"}])
        assert template.num_killed == 0


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 10**12 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 10 ** (messages|length * 10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'|center(10**9) }}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{{ lipsum(n=10**7)|length }}",
    ],
)
async def test_bombs_end_and_the_pool_comes_back(source: str) -> None:
    bomb = "{% if messages %}" + source + "{% else %}fine{% endif %}"
    async with started(bomb) as template:
        begin = time.monotonic()
        with pytest.raises(TemplateError, match="template"):
            await template.render([{"role": "user", "content": "hi"}])
        assert time.monotonic() - begin < 4.0
        assert await template.render([]) == "fine"
        async with asyncio.timeout(10):
            while template._idle.qsize() < 2:  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0.02)
        assert await template.render([]) == "fine"
        assert template.num_killed == 1


async def test_a_template_that_does_not_compile_is_refused_at_the_start() -> None:
    with pytest.raises(TemplateError, match="invalid"):
        async with started("{% for %}"):
            pass


async def test_a_template_that_never_compiles_is_refused_at_the_start() -> None:
    with pytest.raises(TemplateError, match="start"):
        async with started("{{ 10 ** 10**9 }}{{ 9 ** (9 ** 9) }}"):
            pass


async def test_a_killed_child_is_an_error_and_is_replaced() -> None:
    async with started("{{ messages|length }}") as template:
        for pid in template.pids:
            os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(TemplateError):
                await template.render([])
        assert await template.render([]) == "0"


async def test_close_leaves_no_child() -> None:
    async with started("x") as template:
        pids = template.pids
        assert len(pids) == 2
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


PARENT = """
import asyncio
from services.gateway.text.chat_template import ChatTemplate

async def main():
    loop = "{% for a in range(99999) %}"
    template = ChatTemplate(loop + loop + "{% endfor %}{% endfor %}", {})
    await template.start()
    print(*template.pids, flush=True)
    await template.render([])

asyncio.run(main())
"""


def test_children_die_with_their_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


async def test_when_every_child_is_busy_the_next_is_told_so() -> None:
    loop = "{% for a in range(99999) %}"
    limits = TemplateLimits(cpu_s=1.0, wall_s=10.0, queue_s=0.1)
    async with started(loop + loop + "{% endfor %}{% endfor %}", limits) as template:
        renders = [asyncio.create_task(template.render([])) for _ in range(3)]
        with pytest.raises(TemplateBusy):
            await renders[2]
        for render in renders[:2]:
            with pytest.raises(TemplateError):
                await render
