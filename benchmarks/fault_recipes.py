"""Mutated recipes for `faults.py`: each is refused with one message that names a key, or is valid and runs.

Started as a script with a folder, it validates every ``NUMBER.yaml`` of it in a forked process and writes how that
ended to ``NUMBER.json``.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_runs import Ended, do, excerpt, warm

SECONDS = 60
"""Limit of one validation."""
MEMORY = 24 * 2**30
"""Limit of the address space of one validation, in bytes."""
ODD: tuple[Any, ...] = (
    None, True, False, "", "x", " ", -1, 0, 1, 2, 3, 7, 0.5, -0.1, 1e-30, 1e308, 10**30, float("nan"), float("inf"), [],
    {}, [1], [None], {"a": 1}, {"factory": "os:system"}, "2:4", "1e-3", "${seed}", "${nope}", "${oc.env:HOME}", "../..",
    "qatkit.models:nothing", "*", "[", "ä\u2028", "null", "a" * 5000, [[[]]], 3.0, "auto",
)  # fmt: skip
TEXTS = (
    "\t", "\ufeff", "\r\n", "\0", "---\n", "...\n", "%YAML 9.9\n", "&a ", "*a ", "!!python/object:os.system ", "!!int ",
    "<<: ", "? ", "| ", "> ", "- ", ": ", "{", "}", "[", "]", "'", '"', "#", "@", "`", "\\", "\u0085", "\x1b[2J",
)  # fmt: skip


@dataclass(frozen=True)
class Mutated:
    """A changed recipe, and the names that its refusal may mention."""

    recipe: str
    text: str
    names: tuple[str, ...]


def mutations(bases: dict[str, dict[str, Any]], count: int, seed: int) -> list[Mutated]:
    """Change recipes at one to three random places.

    Args:
        bases: Recipes as plain dictionaries, by name.
        count: How many.
        seed: Makes them reproducible.
    """
    from qatkit.recipe.strict_yaml import dump_yaml

    chance = random.Random(seed)
    turns = [name for name in bases for _ in range(3 if name.startswith("vision/") else 1)]
    found = []
    for index in range(count):
        # models of text take longer to build
        name = turns[index % len(turns)]
        recipe, names = copy.deepcopy(bases[name]), list[str]()
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            names += _mutate(recipe, chance)
        text = dump_yaml(recipe)
        if chance.random() < 0.15:
            text = _mutate_text(text, chance)
            names.append(".yaml")  # the error names the line
        found.append(Mutated(name, text, tuple(names)))
    return found


def _places(value: Any) -> Iterator[tuple[Any, Any, tuple[str, ...]]]:
    """Every container with one of its keys, and the path to it."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield value, key, (str(key),)
        for owner, inner, path in _places(part):
            yield owner, inner, (str(key), *path)


def _mutate(recipe: dict[str, Any], chance: random.Random) -> tuple[str, ...]:
    """Change one place in the recipe, and return the keys on the way to it."""
    places = list(_places(recipe))
    if not places:
        return ()
    owner, key, path = chance.choice(places)
    other, other_key, other_path = chance.choice(places)
    kind = chance.choice(("odd", "odd", "odd", "delete", "rename", "unknown", "swap", "copy", "nest", "order"))
    if kind == "odd":
        owner[key] = copy.deepcopy(chance.choice(ODD))
    elif kind == "delete":
        del owner[key]
    elif kind in ("rename", "unknown") and isinstance(owner, dict):
        new = chance.choice((f"{key}s", f"{key}"[:-1], f"{key}".upper(), "x", "", "a.b", "0", "null", "ü" * 300))
        owner[new] = owner.pop(key) if kind == "rename" else copy.deepcopy(chance.choice(ODD))
        path = (*path, new)
    elif kind in ("swap", "copy"):
        value, theirs = copy.deepcopy(owner[key]), copy.deepcopy(other[other_key])
        owner[key], path = theirs, (*path, *other_path)
        if kind == "swap" and not set(path) & set(other_path):
            other[other_key] = value
    elif kind == "nest":
        for _ in range(chance.choice((1, 3, 40))):
            owner[key] = {"a": owner[key]} if chance.random() < 0.5 else [owner[key]]
    elif kind == "order" and isinstance(owner[key], dict):
        owner[key] = dict(reversed(owner[key].items()))
        path = (*path, *map(str, owner[key]))
    return path


def _mutate_text(text: str, chance: random.Random) -> str:
    place = chance.randrange(len(text))
    kind = chance.choice(("insert", "insert", "cut", "line twice", "indent"))
    if kind == "insert":
        return text[:place] + chance.choice(TEXTS) + text[place:]
    if kind == "cut":
        return text[:place]
    lines = text.splitlines(keepends=True)
    line = chance.randrange(len(lines))
    lines[line] = lines[line] * 2 if kind == "line twice" else chance.choice((" ", "   ")) + lines[line]
    return "".join(lines)


def validate(recipes: Sequence[Mutated], folder: Path, workers: int) -> list[Ended]:
    """Validate recipes in several processes at a time."""
    folders = [folder / f"part_{worker}" for worker in range(workers)]
    for part in folders:
        part.mkdir(parents=True)
    for index, mutated in enumerate(recipes):
        (folders[index % workers] / f"{index}.yaml").write_text(mutated.text, encoding="utf-8", errors="surrogatepass")
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda part: subprocess.run([warm.python(), __file__, str(part)], check=True), folders))
    found = [json.loads((folders[index % workers] / f"{index}.json").read_text()) for index in range(len(recipes))]
    return [Ended(**each) for each in found]


def wrong_with(ended: Ended, mutated: Mutated) -> str | None:
    """What is wrong with how a validation ended; None if the recipe is valid or refused as it should be."""
    if ended.code == 0:
        return None
    if ended.code != 2 or "Traceback" in ended.said:
        return excerpt(ended)
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if len(errors) != 1:
        return f"{len(errors)} messages: {excerpt(ended)}"
    message = ended.said[ended.said.index("error: ") :]
    if len(message) > 2000:
        return f"a message of {len(message)} characters: {message[:200]}"
    parts = {part for name in mutated.names for part in re.split(r"[^\w]+", name) if part}
    if not any(part in message for part in parts) and not re.match(r"error: [^:]+: ", message):
        return f"it names no key: {message[:300]}"
    return None


def try_valid(mutated: Mutated, folder: Path) -> str:
    """Run a valid recipe: ran, refused, refused in training, or what is wrong."""
    folder.mkdir(parents=True)
    (folder / "mutated.yaml").write_text(mutated.text)
    command = ["run", "mutated.yaml", "trainer.accelerator=cpu", "--quiet", "--out", "run"]
    ended = do(folder, *command, within=180.0)
    if ended.hung:
        return f"it runs for more than {ended.seconds:.0f} s"
    if ended.code == 0:
        return "ran"
    if ended.code != 2 or "Traceback" in ended.said or "error: " not in ended.said:
        return excerpt(ended)
    trained = any((folder / "run").glob("stages/*/logs/attempt_0/metrics.csv"))
    return "refused in training" if trained else "refused"


def main(folder: Path) -> None:
    """Validate every recipe of the folder."""
    from qatkit.cli.main import main as command

    for path in sorted(folder.glob("*.yaml")):
        said, began = path.with_suffix(".said"), time.monotonic()
        if (process := os.fork()) == 0:
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            stream = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.argv = ["qatkit", "validate", str(path)]
            code = 1
            try:
                command()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        seconds, hung = time.monotonic() - began, code == -signal.SIGALRM
        ended = {"code": code, "said": said.read_text(errors="replace"), "seconds": seconds, "hung": hung}
        path.with_suffix(".json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
