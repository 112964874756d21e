"""The two forms of a prompt in OpenAI's requests: `prompt` and `messages`. Types only; knows no tokenizer."""

from __future__ import annotations

from typing import Any

from services.gateway.http.errors import bad_request
from weft.limits import DEFAULT_LIMITS
from weft.v1 import gateway_service_pb2 as pb


def prompts_of(value: Any, max_prompts: int = DEFAULT_LIMITS.max_prompts) -> list[str | list[int]]:
    """The prompts of a body: a string or a list of token ids, or a list of such. Raises HttpError."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise bad_request("prompt", "must be a string, token ids, or a list of these", code="invalid_type")
    prompts = [value] if type(value[0]) is int else value
    if len(prompts) > max_prompts:
        raise bad_request("prompt", f"must have at most {max_prompts} prompts", code="invalid_value")
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
            raise bad_request("prompt", "must hold strings or lists of token ids", code="invalid_type")
        if not all(0 <= i < 2**32 for i in prompt):
            raise bad_request("prompt", "a token id is out of range", code="invalid_value")
    return prompts


def add_messages(chat: pb.ChatPrompt, messages: Any, max_messages: int = DEFAULT_LIMITS.max_messages) -> None:
    """Fill `chat` from the `messages` of a body. Raises HttpError."""
    if not isinstance(messages, list):
        raise bad_request("messages", "must be a list", code="invalid_type")
    if len(messages) > max_messages:
        raise bad_request("messages", f"must have at most {max_messages} entries")
    chat.SetInParent()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise bad_request(where, "must be an object", code="invalid_type")
        for name, value in message.items():
            if name not in ("role", "content") and value is not None and value != []:
                raise bad_request(f"{where}.{name[:64]}", "is not supported", code="unsupported_parameter")
        role = message.get("role")
        if not isinstance(role, str):
            raise bad_request(f"{where}.role", "must be a string", code="invalid_type")
        chat.messages.add(role=role, content=_content(message.get("content"), f"{where}.content"))


def _content(content: Any, where: str) -> str:
    """A string, or parts of type text; this server sees no images and opens no address."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_request(where, "must be a string or a list of text parts", code="invalid_type")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise bad_request(
                f"{where}[{index}]", "only parts of type text are supported", code="unsupported_value"
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise bad_request(f"{where}[{index}]", "must have a text and nothing else", code="invalid_value")
        texts.append(part["text"])
    return "".join(texts)
