"""Conversations: the tokens that are learned are those that transformers says the assistant wrote."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkit import QatkitError
from qatkit.common.labels import IGNORED
from qatkit.data import Source, chat
from qatkit.data.chat_template import messages_of, tokenize_chat
from qatkit.data.source import BadRecord
from qatkit.data.tokenizers import load_tokenizer
from qatkit.errors import QatkitWarning
from tests.data.corpus import save_tokenizer, write_lines

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + message['content'] | trim + ' <|endoftext|>' }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
# as Qwen3 does it: the last answer has an empty thought before it, which earlier ones have not
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": " How many red boxes? "},
    {"role": "assistant", "content": "Ada counts the red boxes: 3."},
    {"role": "user", "content": "And the keys?"},
    {"role": "assistant", "content": "Grace moves the small keys."},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qatkit"


def learned(tokenizer: Any, messages: Any) -> tuple[list[int], list[int]]:
    found = tokenize_chat(tokenizer, messages)
    assert not isinstance(found, BadRecord), found
    return found


@pytest.mark.parametrize("talk", [TALK, TALK[:2], [{"role": "system", "content": "Be short."}, *TALK]], ids=len)
@pytest.mark.parametrize("template", [CHATML, LLAMA_2, THINKING], ids=["chatml", "llama_2", "thinking"])
def test_the_learned_tokens_are_those_of_transformers_with_and_without_marks_in_the_template(
    template: str, talk: list[dict[str, str]], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", template))
    expected = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    assert learned(tokenizer, talk) == (expected["input_ids"], expected["assistant_masks"])
    # with a template that does not say which turns are the assistant's, they are found in what it writes
    tokenizer.chat_template = re.sub(r"\{% (end)?generation %\}", "", template)
    assert learned(tokenizer, talk) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize("talk", [TALK[1:], TALK[1:2]], ids=len)
def test_a_conversation_that_the_assistant_begins_is_learned_without_marks_too(
    talk: list[dict[str, str]], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", CHATML))
    expected = learned(tokenizer, talk)
    tokenizer.chat_template = re.sub(r"\{% (end)?generation %\}", "", CHATML)
    assert learned(tokenizer, talk) == expected


def test_of_several_templates_the_one_that_transformers_takes_says_what_is_learned(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", CHATML))
    expected = learned(tokenizer, TALK)
    tokenizer.chat_template = {"default": CHATML, "tool_use": LLAMA_2}
    assert learned(tokenizer, TALK) == expected


def test_a_batch_learns_the_answers_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML)
    records = [{"instruction": "Say it.", "input": str(n), "output": f"It is {n}."} for n in range(60)]
    file = write_lines(tmp_path / "chat.jsonl", records)
    data = chat(Source(str(file), val_fraction=0.2, test_fraction=0.2), tokenizer, context=200, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[1] % 8 == 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        said = data.tokenizer.decode(labels[labels != IGNORED])
        number = re.findall(r"\d+", said)[0]
        assert said == f"It is {number}.<|im_end|>"
        whole = f"<|im_start|>user\nSay it.\n\n{number}<|im_end|>\n<|im_start|>assistant\nIt is {number}.<|im_end|>\n"
        assert data.tokenizer.decode(ids[mask.bool()]) == whole
        assert torch.equal(labels[~mask.bool()], torch.full_like(labels[~mask.bool()], IGNORED))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": TALK[:1]}, "has no assistant turn, so no token has a label"),
        (
            {"text": "a"},
            r"has none of the keys 'messages', 'conversations', 'prompt' and 'instruction'; its keys are \['text'\]",
        ),
        ({"messages": "hello"}, r"messages is not a list of"),
        ({"prompt": "a", "completion": None}, "'prompt' and 'completion' must both be text"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "a turn has the unknown role 'robot'; use one of human, gpt",
        ),
        ({"messages": [TALK[0], {"role": "assistant", "content": "a" * 500}]}, r"has \d+ tokens, but context is 100"),
        ({"messages": [TALK[0], {"role": "assistant"}]}, "an assistant turn has no text"),
    ],
)
def test_a_record_that_teaches_nothing_or_does_not_fit_is_named_by_its_line(
    record: Any, reason: str, tmp_path: Path
) -> None:
    template = re.sub(r"\{% (end)?generation %\}", "", CHATML)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template)
    good = [{"messages": [TALK[0], {"role": "assistant", "content": f"{n}."}]} for n in range(60)]
    file = str(write_lines(tmp_path / "chat.jsonl", [*good, record]))
    shares = {"val_fraction": 0.2, "test_fraction": 0.2}
    with pytest.raises(QatkitError, match=rf"chat\.jsonl:61: .*{reason}"):
        chat(Source(file, **shares), tokenizer, context=100).prepare_data()
    with pytest.warns(QatkitWarning, match=r"skipped 1 of 61 records; first: .*chat\.jsonl:61"):
        chat(Source(file, **shares, skip_bad=True), tokenizer, context=100).prepare_data()


def test_all_labels_masked_after_truncation_is_an_error(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML)
    file = write_lines(tmp_path / "chat.jsonl", [{"messages": TALK}])
    source = Source(str(file), str(file), str(file))
    with pytest.raises(QatkitError, match=r"chat\.jsonl:1: has no assistant token with a label"):
        chat(source, tokenizer, context=8, truncate=True).prepare_data()
    chat(source, tokenizer, context=150, truncate=True).prepare_data()


def test_a_tokenizer_without_a_chat_template_is_named_and_a_file_may_give_one(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = str(write_lines(tmp_path / "chat.jsonl", [{"messages": TALK}]))
    with pytest.raises(QatkitError, match=r"tokenizer: '.*' has no chat template; set chat_template: FILE\.jinja"):
        chat(Source(file, file, file), tokenizer).prepare_data()
    (tmp_path / "chatml.jinja").write_text(CHATML)
    data = chat(Source(file, file, file), tokenizer, chat_template=str(tmp_path / "chatml.jinja"), batch_size=1)
    assert (next(iter(data.train_dataloader()))["labels"] != IGNORED).any()
    assert data.tokenizer.chat_template == CHATML


def test_the_usual_shapes_of_conversations_are_one() -> None:
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for record in (
        {"messages": [asked, answered]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "response": "b"},
        {"prompt": [asked], "completion": [answered]},
        {"instruction": "a", "input": "", "output": "b"},
    ):
        assert messages_of(record) == [asked, answered]


@pytest.mark.parametrize("marked", [True, False])
def test_a_template_that_ends_no_turn_is_mentioned(marked: bool, tmp_path: Path) -> None:
    endless = CHATML.replace("message['content'] + '<|im_end|>'", "message['content']")
    template = endless if marked else re.sub(r"\{% (end)?generation %\}", "", endless)
    talks = [[*TALK, {"role": "user", "content": str(number)}] for number in range(60)]
    records = write_lines(tmp_path / "chat.jsonl", [{"messages": talk} for talk in talks])
    source = Source(str(records), val_fraction=0.2, test_fraction=0.2)
    data = chat(source, save_tokenizer(tmp_path / "endless", template))
    with pytest.warns(QatkitWarning, match=r"^tokenizer: the template puts no end-of-turn token after an answer"):
        data.prepare_data()
    chat(source, save_tokenizer(tmp_path / "ending", CHATML)).prepare_data()  # our warnings are errors


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "filters": "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "marked": "{% for a in range(99999) %}{% for b in range(99999) %}{% generation %}{% endgeneration %}"
    "{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=list(ENDLESS))
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_template_that_never_ends_is_stopped_and_the_tokenizer_named(
    template: str, skip_bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qatkit.data.rendering.MOST_STEPS", 50_000)
    tokenizer = save_tokenizer(tmp_path / "endless", template)
    file = str(write_lines(tmp_path / "chat.jsonl", [{"messages": TALK}]))
    data = chat(Source(file, file, file, skip_bad=skip_bad), tokenizer)
    with pytest.raises(QatkitError) as stopped:
        data.prepare_data()
    assert str(stopped.value) == (
        f"chat_template: the template of tokenizer '{tokenizer}' was stopped after 50000 steps for one conversation, "
        "because it probably never ends; set chat_template to a file whose template terminates, or fix the "
        "tokenizer's template"
    )


def test_a_template_is_stopped_in_a_thread_too_and_a_tracer_of_python_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qatkit.data.rendering.MOST_STEPS", 50_000)
    endless = load_tokenizer(save_tokenizer(tmp_path / "endless", ENDLESS["loops"]))
    fine = load_tokenizer(save_tokenizer(tmp_path / "fine", CHATML))
    with ThreadPoolExecutor(1) as pool, pytest.raises(QatkitError, match="was stopped after 50000 steps"):
        pool.submit(tokenize_chat, endless, TALK).result()

    def tracer(frame: Any, event: str, argument: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        learned(fine, TALK)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_a_conversation_of_thousands_of_turns_is_rendered(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", CHATML))
    ids, trained = learned(tokenizer, TALK * 1000)
    assert sum(trained) == 1000 * sum(learned(tokenizer, TALK)[1])
    assert len(ids) > 1000
