"""Conversations -> text, by the checkpoint's own chat template, in a child process with limits.

Knows how the child is started and watched; what a template may do is the child's (template_child.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from services.quantizer.companions import companion_files
from services.quantizer.errors import QuantizerError
from services.quantizer.texts import TextFile

MAX_CHARS = 8 << 20
MAX_TOTAL_CHARS = 256 << 20
MEMORY_BYTES = 2 << 30
_CHILD = Path(__file__).with_name("template_child.py")
_BASE_CPU_S = 20
_CONVERSATIONS_PER_CPU_S = 500
_WALL_PER_CPU = 10  # the child may have to share its core


def render_conversations(source: Path, file: TextFile) -> list[str]:
    """The text of every conversation of `file`, in order, by the template of checkpoint `source`. Raises
    QuantizerError that names file and line.
    """
    conversations = [document for document in file.documents if document.conversation is not None]
    if not conversations:
        return []
    companions = companion_files(source)
    if "chat_template.jinja" not in companions:
        raise QuantizerError(
            f"{file.path}:{conversations[0].line}: messages need a chat template; {source} has none"
        )
    cpu_s = _BASE_CPU_S + len(conversations) // _CONVERSATIONS_PER_CPU_S
    setup = {
        "template": companions["chat_template.jinja"].decode("utf-8"),
        "constants": _constants(companions.get("tokenizer_config.json", b"{}")),
        "cpu_s": cpu_s,
        "memory_bytes": MEMORY_BYTES,
        "max_chars": MAX_CHARS,
        "max_total_chars": MAX_TOTAL_CHARS,
    }
    answers = _ask([setup, *(document.conversation for document in conversations)], cpu_s)
    texts = [answer["text"] for answer in answers if "text" in answer]
    if len(texts) < len(conversations):
        where = f"{file.path}:{conversations[len(texts)].line}"
        reason = answers[-1].get("error") if answers else None
        if reason is None:
            reason = f"was ended: more than {cpu_s} s or {MEMORY_BYTES >> 20} MiB"
        raise QuantizerError(f"{where}: the chat template {reason[:300]}")
    return texts


def _ask(lines: list[Any], cpu_s: int) -> list[dict[str, str]]:
    """The child's answers; fewer than asked for when it was ended."""
    data = b"".join(json.dumps(line).encode("ascii") + b"\n" for line in lines)
    # -I: neither the working directory nor variables decide what the child imports.
    command = [sys.executable, "-I", str(_CHILD)]
    try:
        done = subprocess.run(
            command,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_PER_CPU * cpu_s,
            check=False,
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    # A last line without its end is what a killed child had begun to say.
    return [json.loads(line) for line in output.split(b"\n")[:-1]]


def _constants(tokenizer_config: bytes) -> dict[str, str]:
    """bos_token and its like: a string, or an object that holds it."""
    found: dict[str, str] = {}
    for name, value in json.loads(tokenizer_config).items():
        if not name.endswith("_token"):
            continue
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
