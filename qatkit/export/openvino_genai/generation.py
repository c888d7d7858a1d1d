"""Generate text from a folder with openvino-genai."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread

from qatkit.errors import QatkitError
from qatkit.export.openvino_genai.read_back import pipeline


def generate(path: Path, prompt: str, tokens: int, python: Path | None) -> Iterator[str]:
    """Generate with openvino-genai; `python` is not used."""
    pieces: Queue[str | None] = Queue()
    failed: list[Exception] = []

    def put(piece: str) -> bool:
        pieces.put(piece)
        return False  # do not stop

    def run() -> None:
        try:
            made = pipeline(path)
            config = made.get_generation_config()
            config.max_new_tokens, config.do_sample, config.apply_chat_template = tokens, False, False
            made.generate(prompt, config, put)
        except Exception as error:  # raised again in the caller's thread
            failed.append(error)
        pieces.put(None)

    thread = Thread(target=run, daemon=True)
    thread.start()
    while (piece := pieces.get()) is not None:
        yield piece
    thread.join()
    if failed:
        raise QatkitError(f"openvino-genai failed: {failed[0]}", key=str(path), advice="use a shorter prompt")
