"""The verify step, which compares every exported file to the stage from which it was exported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatkit.common.digests import changed_file, file_digests
from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.exporting import with_companions
from qatkit.export.verification import Verification, check_python, verify
from qatkit.pipeline.card import CARD, write_cards
from qatkit.pipeline.export import VERDICT, first_batch, held_out_data, write_exports
from qatkit.run.exports import Exported, exports_of, interpreter_of
from qatkit.run.folder import Run
from qatkit.run.lock import locked
from qatkit.tasks import declared_task

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

SCHEMA = 3
"""Version of ``verification.json``."""


@dataclass(frozen=True)
class _Verified(Verification):
    """The content of ``verification.json``."""

    digests: dict[str, str]


def verify_run(run: Run, only: str | None = None, python: Path | None = None) -> dict[str, Verification]:
    """Reload every exported file from disk, and compare it to the trained model on the test split.

    Args:
        run: A run with exported files.
        only: The name of the only format to verify. By default, all formats of the run are verified.
        python: The interpreter of an environment with the runtime, for formats that need one; see `verify`. The default
            is that of the recipe.

    Returns:
        One verification per file, by name. Each is also written to
        ``export/STAGE/FORMAT/verification.json`` with the digests of the compared files, and into the model card
        ``README.md`` beside it.

    Raises:
        QatkitError: a stage has not been exported, no format uses the interpreter, a package of a format is missing, or
            a file would be written outside the run's folder.
    """
    run.check_writes()
    run.check_recipe()
    exports = exports_of(run, only)
    check_python([exported.format for exported in exports], python, "--python")
    for exported in exports:
        exported.format.check_packages()
    return _verify(run, exports, held_out_data(run), python)


def _verify(
    run: Run, exports: Sequence[Exported], data: LightningDataModule, python: Path | None = None
) -> dict[str, Verification]:
    """Verify exports, and write their model cards."""
    found = {exported.name: _verify_file(run, exported, data, python) for exported in exports}
    checks = {name: asdict(each) for name, each in found.items()}
    for exported in exports_of(run):  # those with which the cards compare
        if exported.name not in checks and is_verified(run, exported):
            checks[exported.name] = read_verification(run, exported)
    write_cards(run, exports, checks)
    return found


def export_and_verify(run: Run) -> dict[str, Verification]:
    """Export and verify every stage in the comparison in each format of the run.

    Exports of a shared stage that another run of the sweep has verified are left as they are.

    Returns:
        One verification per file, by name.

    Raises:
        QatkitError: for the same reasons as in `export_run` and `verify_run`.
    """
    run.check_writes()
    run.check_recipe()
    exports = exports_of(run)
    checked: dict[str, Verification] = {}

    def missing() -> list[Exported]:
        return [each for each in exports if not (run.is_shared(each.stage) and is_verified(run, each))]

    with ExitStack() as locks:
        for stage in sorted({each.stage for each in missing()}):  # in the same order in every process
            if run.is_shared(stage):
                locks.enter_context(locked(run.folder(stage), wait=True))
        if written := missing():  # another process may have written some of them meanwhile
            data = held_out_data(run)
            write_exports(run, written, data)
            checked = _verify(run, written, data)
    return {
        each.name: checked[each.name] if each.name in checked else Verification(**read_verification(run, each))
        for each in exports
    }


def is_verified(run: Run, exported: Exported) -> bool:
    """Whether an export has been verified and has not changed since."""
    try:
        read_verification(run, exported)
    except QatkitError:
        return False
    return True


def _verify_file(run: Run, exported: Exported, data: LightningDataModule, python: Path | None) -> Verification:
    path, row = exported.path, exported.format
    if not path.exists():
        raise QatkitError("there is no such file or folder", key=str(path), advice=f"run `qatkit export {run.out}`")
    if (changed := _changed_export(run, exported)) is not None:
        problem = f"{changed}: the file changed after it was verified; it is verified again"
        warnings.warn(problem, QatkitWarning, stacklevel=2)
    digests = export_digests(run, exported)
    model, tokenizer = run.load_model(exported.stage).eval(), getattr(data, "tokenizer", None)
    task, own = declared_task(data), (python or interpreter_of(run.recipe, row)) if row.environment else None
    verification = verify(model, path, data.test_dataloader(), row.name, task=task, python=own)
    verification = with_companions(verification, row, model, path, tokenizer, first_batch(data))
    content = asdict(verification) | {"digests": digests}
    write_signed(exported.folder / VERDICT, content, SCHEMA, partial(json.dumps, indent=1))
    return verification


def _changed_export(run: Run, exported: Exported) -> Path | None:
    """The first file that differs from the one that was verified last; None if there is none."""
    try:
        content = read_signed(exported.folder / VERDICT, _Verified, SCHEMA, "")
    except QatkitError:  # a corrupt record is replaced
        return None
    return None if content is None else changed_file(content["digests"], run.recorded_from(exported.stage))


def read_verification(run: Run, exported: Exported) -> dict[str, Any]:
    """Read the verification of an export.

    Raises:
        QatkitError: the file has not been verified, its record is corrupt, or one of the compared files has changed
            since.
    """
    verify_again = f"`qatkit verify {run.out}`"
    path = exported.folder / VERDICT
    content = read_signed(path, _Verified, SCHEMA, f"run {verify_again}")
    if content is None:
        raise QatkitError(f"'{exported.name}' has not been verified", advice=f"run {verify_again}")
    digests = content.pop("digests")
    if (changed := changed_file(digests, run.recorded_from(exported.stage))) is not None:
        raise QatkitError(
            "the file has changed since verification",
            key=str(changed),
            advice=f"run `qatkit export {run.out}`, then {verify_again}",
        )
    return content


def export_digests(run: Run, exported: Exported) -> dict[str, str]:
    """Return the digests of an export and of the stage's weights, by path in the run folder."""
    files = [path for path in exported.folder.rglob("*") if path.is_file() and path.name not in (VERDICT, CARD)]
    stage = run.folder(exported.stage)
    files += [*stage.glob("*.safetensors"), *stage.glob("model/*.safetensors")]
    return file_digests(files, run.recorded_from(exported.stage))
