"""Load transformers tokenizers from a folder or the hub, fingerprint them, and compare them to a model's own."""

from __future__ import annotations

import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from qatkit.errors import QatkitError
from qatkit.hub import cannot_load, holds_tokenizer, locate

PROBE = "The 3 quick foxes (of 27) don't jump over\n\tlazy_dogs[0] = naïve 狐!"
"""A text that different tokenizers tend to split differently."""


@lru_cache(maxsize=4)
def load_tokenizer(name: str, chat_template: str | None = None) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: A tokenizer folder, or the name of a model on the hub.
        chat_template: A file with a Jinja template that replaces the tokenizer's own.

    Raises:
        QatkitError: there is no tokenizer, the hub does not provide it, or the template cannot be read.
    """
    source, offline = locate(name, "tokenizer", "a tokenizer", "tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        # without this, transformers would ask on the terminal whether to run the code of a repository
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    except Exception as error:  # the library passes on errors of its dependencies
        raise cannot_load(error, "tokenizer", name, "use a folder or a model with a tokenizer") from error
    if not tokenizer.is_fast:
        raise QatkitError(f"'{name}' has no tokenizer.json", key="tokenizer", advice="use a model that has this file")
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise QatkitError(
                f"'{chat_template}' cannot be read ({error})", key="chat_template", advice="use a readable UTF-8 file"
            ) from error
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """Hash all files of a saved tokenizer."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def end_of_text(tokenizer: Any, name: str) -> int:
    """Return the ID of the end-of-text token.

    Raises:
        QatkitError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise QatkitError(
            f"'{name}' has no end-of-text token to separate documents", key="tokenizer", advice="use another tokenizer"
        )
    return int(tokenizer.eos_token_id)


def padding_id(tokenizer: Any) -> int:
    """Return the ID of the padding token or else of the end-of-text token, which attention mask and labels exclude."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raise an error if a pretrained model's tokenizer splits text differently from the data's tokenizer.

    Args:
        model: A transformers model, or any other module.
        tokenizer: The tokenizer of the data, or None.

    Raises:
        QatkitError: the model's tokenizer and the data's tokenizer produce different tokens.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if not hasattr(tokenizer, "convert_tokens_to_ids"):  # none, or not of transformers
        return
    try:
        own = load_tokenizer(name) if name and holds_tokenizer(name) else None
    except QatkitError:
        own = None  # there is nothing to compare with
    if own is None:
        return
    theirs, ours = (each(PROBE, add_special_tokens=False)["input_ids"] for each in (own, tokenizer))
    if theirs != ours:
        raise QatkitError(
            f"this tokenizer splits text differently ({ours[:5]}) from the tokenizer of the model '{name}' "
            f"({theirs[:5]}), so the pretrained weights would not match",
            key="data.args.tokenizer",
            advice=f"set tokenizer: {name}",
        )
