"""Render conversations as tokens, and find the assistant's tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qatkit.data.rendering import limited
from qatkit.data.source import BadRecord
from qatkit.errors import QatkitError

Message = dict[str, Any]

_MARK = "\u2063qatkit\u2063"
"""Placeholder for an answer while its position in the rendered template is located."""
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def messages_of(record: Mapping[str, Any]) -> list[Message] | BadRecord:
    """Return the conversation of a record in any of the common layouts.

    The layouts are ``messages`` (role, content), ``conversations`` (from, value), ``prompt`` with ``completion`` or
    ``response``, and ``instruction`` with ``output`` and optionally ``input``.

    Example:
        >>> messages_of({"instruction": "Add.", "input": "1 2", "output": "3"})[0]
        {'role': 'user', 'content': 'Add.\\n\\n1 2'}
    """
    if "messages" in record:
        messages: Any = record["messages"]
    elif "conversations" in record:
        messages = _from_conversations(record["conversations"])
    elif "prompt" in record:
        messages = _turn(record, "prompt", "completion" if "completion" in record else "response")
    elif "instruction" in record:
        messages = _turn(record, "instruction", "output")
    else:
        return BadRecord(
            f"has none of the keys 'messages', 'conversations', 'prompt' and 'instruction'; its keys are "
            f"{sorted(map(str, record))}"
        )
    if isinstance(messages, BadRecord):
        return messages
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        return BadRecord('messages is not a list of {"role": ..., "content": ...}')
    if not any(turn["role"] == "assistant" for turn in messages):
        return BadRecord("has no assistant turn, so no token has a label")
    return messages


def tokenize_chat(
    tokenizer: Any, messages: list[Message], tools: Any = None
) -> tuple[list[int], list[int]] | BadRecord:
    """Tokenize a conversation, and mark the assistant's tokens (including the end of each turn) with 1.

    A template may mark the assistant's turns with ``{% generation %}``. Otherwise, a turn starts after the generation
    prompt and ends with the end-of-turn text that follows each answer, such as ``<|im_end|>``.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The conversation.
        tools: Functions that the assistant may call, as JSON schemas.

    Returns:
        Token IDs and the 0/1 assistant mask, or the reason why the record cannot be used.

    Raises:
        QatkitError: rendering the template does not terminate; see `qatkit.data.rendering`.
    """
    try:
        # if there are several templates, transformers takes the one for tools, or "default"
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=tools)):
            marked = _apply(tokenizer, messages, tools, return_dict=True, return_assistant_tokens_mask=True)
            return list(marked["input_ids"]), [int(own) for own in marked["assistant_masks"]]
        if any(turn["role"] == "assistant" and not isinstance(turn.get("content"), str) for turn in messages):
            raise BadRecord("an assistant turn has no text, and the chat template does not mark assistant turns")
        text = _render(tokenizer, messages, tools)
        spans = assistant_spans(tokenizer, messages, text, tools)
    except BadRecord as reason:
        return reason
    except QatkitError:  # the template was stopped: other records would stop it too
        raise
    except Exception as error:  # templates raise any error for messages that they do not support
        return BadRecord(f"cannot be rendered with the chat template ({' '.join(str(error).split())[:200]})")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    # as in transformers, a token belongs to the span of its first character
    trained = [int(any(start <= first < end for start, end in spans) and last > first) for first, last in offsets]
    return list(encoded["input_ids"]), trained


def teaches_end_of_turn(tokenizer: Any) -> bool:
    """Whether the loss includes an end-of-turn token after each answer, so that the model learns to stop.

    Args:
        tokenizer: A tokenizer with a chat template.
    """
    answer = "Yes."
    probe = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
    tokens = tokenize_chat(tokenizer, probe)
    if isinstance(tokens, BadRecord):  # some templates require more: nothing is known about them
        return True
    trained = tokenizer.decode([token for token, own in zip(*tokens, strict=True) if own])
    return bool(trained.rpartition(answer)[2].strip())


def assistant_spans(tokenizer: Any, messages: list[Message], text: str, tools: Any = None) -> list[tuple[int, int]]:
    """Return the start and end of each assistant turn in the rendered text, in characters.

    Raises:
        BadRecord: the turns cannot be located in the rendered text.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    closing = _after_answer(tokenizer, messages[: turns[-1] + 1], turns[-1], tools)[1].rstrip()
    spans = []
    for turn in turns:
        before, after = _after_answer(tokenizer, messages, turn, tools)
        # a conversation may begin with an answer, and transformers cannot render an empty conversation
        asked = [_render(tokenizer, messages[:turn], tools, add_generation_prompt=True)] if turn else []
        start = next((len(part) for part in (*asked, before) if text.startswith(part)), None)
        if start is None or not text.endswith(after) or start > len(text) - len(after):
            raise BadRecord(
                "the chat template renders a turn differently when more turns follow, so turns cannot be located",
                "put assistant turns into {% generation %} blocks in a template file, and set chat_template to this "
                "file",
            )
        end = len(text) - len(after)
        spans.append((start, end + len(closing) if after.startswith(closing) else end))
    return spans


def _after_answer(tokenizer: Any, messages: Sequence[Message], turn: int, tools: Any) -> tuple[str, str]:
    """Return the rendered text before and after an answer."""
    marked = [dict(message) for message in messages]
    marked[turn]["content"] = _MARK
    before, mark, after = _render(tokenizer, marked, tools).rpartition(_MARK)
    if not mark:
        raise BadRecord("the chat template omits an assistant turn")
    return before, after


def _render(tokenizer: Any, messages: Sequence[Message], tools: Any, **options: Any) -> str:
    text: str = _apply(tokenizer, list(messages), tools, tokenize=False, **options)
    return text


def _apply(tokenizer: Any, messages: list[Message], tools: Any, **options: Any) -> Any:
    def render() -> Any:
        return tokenizer.apply_chat_template(messages, tools=tools, **options)

    return limited(render, tokenizer.name_or_path)


def _from_conversations(turns: Any) -> list[Message] | BadRecord:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return BadRecord('conversations is not a list of {"from": ..., "value": ...}')
    if "role" in (turns[0] if turns else {}):
        return turns
    unknown = [turn.get("from") for turn in turns if turn.get("from") not in _ROLES]
    if unknown:
        return BadRecord(f"a turn has the unknown role {unknown[0]!r}", f"use one of {', '.join(_ROLES)}")
    return [{"role": _ROLES[turn["from"]], "content": turn.get("value")} for turn in turns]


def _turn(record: Mapping[str, Any], question: str, answer: str) -> list[Message] | BadRecord:
    asked, answered, more = record[question], record.get(answer), record.get("input")
    if isinstance(asked, list) and isinstance(answered, list):
        return [*asked, *answered]
    if not isinstance(asked, str) or not isinstance(answered, str) or not answered.strip():
        return BadRecord(f"'{question}' and '{answer}' must both be text")
    if question == "instruction" and isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    system = [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
