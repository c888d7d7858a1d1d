"""Damage to the files of a finished run, for `faults.py`: every command that reads one names it, or is unaffected."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fault_runs import Ended, contents, differing, do, excerpt, run_arguments

_DAMAGED = "still damaged"
COMMANDS = ("run", "verify", "report", "export")


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _other_digit(content: bytes, chance: random.Random) -> bytes:
    """Another digit at the place of one: text stays well-formed."""
    places = [index for index, byte in enumerate(content) if byte in b"0123456789"]
    if not places:
        return _flipped(content, chance)
    place = chance.choice(places)
    other = (int(content[place : place + 1]) + chance.randrange(1, 10)) % 10
    return content[:place] + str(other).encode() + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "a flipped bit": _flipped,
    "another digit": _other_digit,
    "truncated": lambda content, chance: content[: chance.randrange(1, max(len(content), 2))],
    "deleted": lambda content, chance: None,
    "empty": lambda content, chance: b"",
    "null": lambda content, chance: b"null",
    "a list": lambda content, chance: b"[1]",
}


@dataclass(frozen=True)
class Damage:
    """A change to one file."""

    kind: str
    file: str
    """Its path in the run folder."""
    content: bytes | None
    """The new content; None deletes the file."""


def damages_of(run: Path, count: int, seed: int) -> list[Damage]:
    """Damages of every file in turn, until there are `count`."""
    chance = random.Random(seed)
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    kinds = {path: chance.sample(list(DAMAGES), len(DAMAGES)) for path in files}
    found: list[Damage] = []
    for turn in range(len(DAMAGES)):
        for path in files:
            before, kind = path.read_bytes(), kinds[path][turn]
            after = DAMAGES[kind](before, chance) if before else b"null"
            if after != before:
                found.append(Damage(kind, path.relative_to(run).as_posix(), after))
    return found[:count]


class Damaged:
    """A finished run and what each command leaves of it.

    Args:
        folder: The folder in which the run was made.
        recipe: Its recipe.
    """

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder = folder
        self.arguments = run_arguments(folder, recipe)
        self.expected: dict[str, dict[str, str]] = {}

    def measure(self, folder: Path) -> None:
        """Run every command on an undamaged copy."""
        for command in COMMANDS:
            ended, self.expected[command] = self._do(command, folder / command)
            if ended.code:
                raise SystemExit(f"{command}, undamaged: {excerpt(ended)}")
            shutil.rmtree(folder / command)

    def outcomes(self, damage: Damage, folder: Path) -> dict[str, str]:
        """The outcome of every command: found, harmless, or a description of what is wrong."""
        found = {}
        for command in COMMANDS:
            found[command] = self._outcome(command, damage, folder / command)
            shutil.rmtree(folder / command)
        return found

    def _outcome(self, command: str, damage: Damage, folder: Path) -> str:
        ended, after = self._do(command, folder, damage)
        if "Traceback" in ended.said or ended.code not in (0, 1, 2):
            return f"traceback: {excerpt(ended)}"
        if ended.code or f"{damage.file} is missing" in ended.said or f"{damage.file}: the file changed" in ended.said:
            # a verification that fails, or lacks a file, names the stage
            by_stage = ended.code == 1 or damage.content is None
            names = [damage.file, Path(damage.file).name, *(Path(damage.file).parts[1:2] if by_stage else ())]
            return "found" if any(name in ended.said for name in names) else f"unclear: {excerpt(ended)}"
        expected = self.expected[command]
        if after.get(damage.file) == _DAMAGED:  # the command does not write this file
            expected = {key: value for key, value in expected.items() if key.partition(":")[0] != damage.file}
            del after[damage.file]
        wrong = differing(after, expected)
        if damage.file == "recipe.yaml":  # the report holds a copy of its text
            wrong = [name for name in wrong if name != "report.json:.recipe"]
        return f"silent: {', '.join(wrong[:4])}" if wrong else "harmless"

    def _do(self, command: str, folder: Path, damage: Damage | None = None) -> tuple[Ended, dict[str, str]]:
        """Run a command on a copy, and return how it ended and what the copy holds; a file that is still damaged is
        only named."""
        shutil.copytree(self.folder, folder)
        path = folder / "run" / damage.file if damage is not None else folder / "none"
        if damage is not None:
            path.unlink()
            if damage.content is not None:
                path.write_bytes(damage.content)
        ended = do(folder, *(self.arguments if command == "run" else [command, "run"]))
        left = path.read_bytes() if path.is_file() else None
        if damage is None or left != damage.content:
            return ended, contents(folder / "run")
        path.unlink(missing_ok=True)
        return ended, contents(folder / "run") | {damage.file: _DAMAGED}


def try_damages(damaged: Damaged, damages: Sequence[Damage], folder: Path, workers: int) -> list[dict[str, str]]:
    """Try all damages, several at a time."""
    damaged.measure(folder / "undamaged")
    with ThreadPoolExecutor(workers) as pool:
        tried = pool.map(lambda pair: damaged.outcomes(pair[1], folder / f"damage_{pair[0]}"), enumerate(damages))
        return list(tried)
