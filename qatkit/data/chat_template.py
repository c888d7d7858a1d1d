"""Conversations as tokens, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qatkit.data.source import BadRecord

Message = dict[str, Any]

_MARK = "\u2063qatkit\u2063"
"""Stands for an answer while its place in a template is looked for."""
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def messages_of(record: Mapping[str, Any]) -> list[Message] | BadRecord:
    """The conversation of a record, in whichever of the usual shapes it is.

    ``messages`` (role and content), ``conversations`` (from and value), ``prompt`` with ``completion`` or ``response``,
    or ``instruction`` with ``output`` and perhaps ``input``.

    Example:
        >>> messages_of({"instruction": "Add.", "input": "1 2", "output": "3"})[0]
        {'role': 'user', 'content': 'Add.\\n\\n1 2'}
    """
    if "messages" in record:
        found = record["messages"]
    elif "conversations" in record:
        found = _from_conversations(record["conversations"])
    elif "prompt" in record:
        found = _turn(record, "prompt", "completion" if "completion" in record else "response")
    elif "instruction" in record:
        found = _turn(record, "instruction", "output")
    else:
        return BadRecord(
            f"has no 'messages', 'conversations', 'prompt' or 'instruction' but {sorted(map(str, record))}"
        )
    if isinstance(found, BadRecord):
        return found
    if not isinstance(found, list) or not all(isinstance(turn, dict) and "role" in turn for turn in found):
        return BadRecord('its messages are no list of {"role": ..., "content": ...}')
    if not any(turn["role"] == "assistant" for turn in found):
        return BadRecord("has no turn of the assistant, so there is nothing to learn")
    return found


def tokenize_chat(
    tokenizer: Any, messages: list[Message], tools: Any = None
) -> tuple[list[int], list[int]] | BadRecord:
    """Tokens of a conversation, and 1 for each that the assistant wrote, the end of its turn among them.

    A template that marks the assistant's turns with ``{% generation %}`` decides that itself. In another, a turn begins
    where the template asks for an answer, and ends with what follows every answer, such as ``<|im_end|>``.

    Args:
        tokenizer: With a chat template.
        messages: The conversation.
        tools: Functions the assistant may call, as JSON schemas.
    """
    try:
        # of several templates, transformers takes the one that is for tools, or "default"
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template(tools=tools)):
            marked = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(marked["input_ids"]), [int(own) for own in marked["assistant_masks"]]
        if any(turn["role"] == "assistant" and not isinstance(turn.get("content"), str) for turn in messages):
            raise BadRecord("a turn of the assistant has no text, and the chat template does not mark its turns")
        text = _render(tokenizer, messages, tools)
        spans = assistant_spans(tokenizer, messages, text, tools)
    except BadRecord as reason:
        return reason
    except Exception as error:  # a template may do anything, and refuse what it does not know
        return BadRecord(f"does not go into the chat template ({' '.join(str(error).split())[:200]})")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    # as transformers does it: a token belongs to the span that holds its first character
    trained = [int(any(start <= first < end for start, end in spans) and last > first) for first, last in offsets]
    return list(encoded["input_ids"]), trained


def assistant_spans(tokenizer: Any, messages: list[Message], text: str, tools: Any = None) -> list[tuple[int, int]]:
    """Where in the whole text the assistant's turns begin and end, in characters.

    Raises:
        BadRecord: the template does not say.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    closing = _after_answer(tokenizer, messages[: turns[-1] + 1], turns[-1], tools)[1].rstrip()
    spans = []
    for turn in turns:
        before, after = _after_answer(tokenizer, messages, turn, tools)
        # a conversation may begin with an answer, and transformers renders no empty one
        asked = [_render(tokenizer, messages[:turn], tools, add_generation_prompt=True)] if turn else []
        start = next((len(part) for part in (*asked, before) if text.startswith(part)), None)
        if start is None or not text.endswith(after) or start > len(text) - len(after):
            raise BadRecord(
                "the chat template writes its turns otherwise when others follow, so they cannot be told apart; mark "
                "them in it with {% generation %}, and name its file in chat_template"
            )
        end = len(text) - len(after)
        spans.append((start, end + len(closing) if after.startswith(closing) else end))
    return spans


def _after_answer(tokenizer: Any, messages: Sequence[Message], turn: int, tools: Any) -> tuple[str, str]:
    """What a template writes before and after the text of an answer."""
    marked = [dict(message) for message in messages]
    marked[turn]["content"] = _MARK
    before, mark, after = _render(tokenizer, marked, tools).rpartition(_MARK)
    if not mark:
        raise BadRecord("the chat template leaves a turn of the assistant out")
    return before, after


def _render(tokenizer: Any, messages: Sequence[Message], tools: Any, **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)
    return text


def _from_conversations(turns: Any) -> list[Message] | BadRecord:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return BadRecord('its conversations are no list of {"from": ..., "value": ...}')
    if "role" in (turns[0] if turns else {}):
        return turns
    unknown = [turn.get("from") for turn in turns if turn.get("from") not in _ROLES]
    if unknown:
        return BadRecord(f"a turn is from {unknown[0]!r}; write one of {', '.join(_ROLES)}")
    return [{"role": _ROLES[turn["from"]], "content": turn.get("value")} for turn in turns]


def _turn(record: Mapping[str, Any], question: str, answer: str) -> list[Message] | BadRecord:
    asked, answered, more = record[question], record.get(answer), record.get("input")
    if isinstance(asked, list) and isinstance(answered, list):
        return [*asked, *answered]
    if not isinstance(asked, str) or not isinstance(answered, str) or not answered.strip():
        return BadRecord(f"'{question}' and '{answer}' are not both text")
    if question == "instruction" and isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    system = [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
