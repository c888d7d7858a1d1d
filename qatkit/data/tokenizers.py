"""A tokenizer of transformers, from a folder or the hub, and all that decides what it makes of a text."""

from __future__ import annotations

import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from qatkit.errors import QatkitError
from qatkit.hub import explain, holds_tokenizer, locate

PROBE = "The 3 quick foxes (of 27) don't jump over\n\tlazy_dogs[0] = naïve 狐!"
"""A text that tokenizers cut differently."""


@lru_cache(maxsize=4)
def load_tokenizer(name: str, chat_template: str | None = None) -> Any:
    """The tokenizer of a model.

    Args:
        name: A folder that holds it, or the name of a model on the hub.
        chat_template: A file with a Jinja template that takes the place of the tokenizer's own.

    Raises:
        QatkitError: the folder holds none, the hub does not give it, or the template cannot be read.
    """
    source, offline = locate(name, "tokenizer", "a tokenizer", "tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        # asked about code of its own, transformers would wait for an answer on the terminal
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    except Exception as error:  # the library raises what its parts raise
        raise QatkitError(f"{explain(error, 'tokenizer', name)}; write a folder or a name that holds one") from error
    if not tokenizer.is_fast:
        raise QatkitError(f"tokenizer: '{name}' has no tokenizer.json; write one that has, as nearly all models do")
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise QatkitError(f"chat_template: '{chat_template}' cannot be read ({error}); write a file") from error
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything that a saved tokenizer consists of."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def end_of_text(tokenizer: Any, name: str) -> int:
    """The token that stands after every document.

    Raises:
        QatkitError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise QatkitError(f"tokenizer: '{name}' has no end of text to set documents apart; write another")
    return int(tokenizer.eos_token_id)


def padding_id(tokenizer: Any) -> int:
    """What fills up a row of a batch: the padding token, or the end of text, which attention and labels leave out."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raise where a pretrained model has a tokenizer of its own, by which a text would be other numbers.

    Args:
        model: Of transformers, or any other.
        tokenizer: That of the data, if they have one.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if not hasattr(tokenizer, "convert_tokens_to_ids"):  # none, or one of the user's own
        return
    try:
        own = load_tokenizer(name) if name and holds_tokenizer(name) else None
    except QatkitError:
        own = None  # what the data say is all that there is
    if own is None:
        return
    theirs, ours = (found(PROBE, add_special_tokens=False)["input_ids"] for found in (own, tokenizer))
    if theirs != ours:
        raise QatkitError(
            f"data.args.tokenizer: the model '{name}' has a tokenizer that makes other numbers of a text ({theirs[:5]} "
            f"and not {ours[:5]}), so what it has learned would be lost; write tokenizer: {name}"
        )
