"""The trials of a sweep as a study of Optuna, for its dashboard and its analyses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qatkit.common.packages import check_packages
from qatkit.trials.grid import value_text
from qatkit.trials.results import objectives
from qatkit.trials.sweep import Trial

STUDY = "sweep"


def check_optuna() -> None:
    """Raise an error if Optuna is not installed.

    Raises:
        QatkitError: Optuna is not installed.
    """
    check_packages("`qatkit sweep`", ["optuna"], "search")


class Journal:
    """A study in a journal file, to which each trial is added when it has ended.

    Args:
        path: The journal, ``trials.log``. The caller holds the lock of its folder.
        trials: All trials.
    """

    def __init__(self, path: Path, trials: Sequence[Trial]) -> None:
        import optuna
        from optuna.distributions import CategoricalDistribution
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # of a killed process
        self._storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
        choices: dict[str, dict[str, None]] = {}
        for trial in trials:
            for key, value in trial.values.items():
                choices.setdefault(key, {})[value_text(value)] = None
        self._distributions = {key: CategoricalDistribution(list(texts)) for key, texts in choices.items()}
        self._study: Any = None

    def completed(self, trial: Trial) -> None:
        """Add a finished trial with its objectives, unless it has been added before.

        Optuna accepts no NaN, so a trial whose metric is NaN is added as a failed one.
        """
        from optuna import create_study
        from optuna.study import StudyDirection
        from optuna.trial import TrialState

        results = objectives(trial)
        if self._study is None:
            directions = [
                StudyDirection.MAXIMIZE if higher else StudyDirection.MINIMIZE for _, higher in results.values()
            ]
            self._study = create_study(
                storage=self._storage, study_name=STUDY, directions=directions, load_if_exists=True
            )
            self._study.set_user_attr("objectives", list(results))
        if undefined := [name for name, (value, _) in results.items() if math.isnan(value)]:
            self.failed(trial, f"the test {undefined[0]} is NaN")
        else:
            self._add(trial, {}, state=TrialState.COMPLETE, values=[value for value, _ in results.values()])

    def failed(self, trial: Trial, message: str) -> None:
        """Add a trial that failed, unless it has been added with the same message before.

        Without any finished trial, there is no study to add it to.
        """
        from optuna.trial import TrialState

        if self._study is not None:
            self._add(trial, {"error": message}, state=TrialState.FAIL)

    def _add(self, trial: Trial, attributes: dict[str, Any], **fields: Any) -> None:
        from optuna.distributions import BaseDistribution
        from optuna.trial import create_trial

        before = self._study.get_trials(deepcopy=False, states=[fields["state"]])
        attributes |= {"configuration": trial.number}
        if any(attributes.items() <= each.user_attrs.items() for each in before):
            return
        params = {key: value_text(value) for key, value in trial.values.items()}
        distributions: dict[str, BaseDistribution] = {key: self._distributions[key] for key in params}
        self._study.add_trial(create_trial(params=params, distributions=distributions, user_attrs=attributes, **fields))
