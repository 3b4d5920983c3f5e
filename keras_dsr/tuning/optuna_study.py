"""Optuna: the workers of a search, which share a study in a journal file.

Trials are counted by their records (`keras_dsr.tuning.search.claim_trial`), which one worker alone can take; Optuna
draws the settings and stops what is worse than the median of the trials before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keras_dsr.tuning import space as spaces
from keras_dsr.tuning.search import Search, Trial, claim_trial, read_trial
from keras_dsr.tuning.space import Choice
from keras_dsr.tuning.trials import run_trial

_STUDY = "search"
# Of a trial in Optuna's study: which of the search's it is.
_NUMBER = "number"


def work(search: Search, folder: Path, worker: str, data_dir: Path | None = None) -> None:
    """Is one of the workers of a search, until there are no more trials.

    Args:
        search: The search.
        folder: Its folder.
        worker: The worker's name; one that died is to come back under the same.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
    """
    import optuna

    storage = _storage(folder)
    # A trial is compared with others only after a third of its epochs; earlier, learning rates are still rising.
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=search.recipe.epochs // 3)
    study = optuna.create_study(
        study_name=_STUDY, storage=storage, direction="maximize", load_if_exists=True, pruner=pruner
    )
    _settle(study, folder, worker)
    while (claimed := claim_trial(folder, worker, search.trials)) is not None:
        # Of each trial its own: workers, and one that came back, would draw the same otherwise.
        study.sampler = optuna.samplers.TPESampler(seed=search.seed + claimed.number, constant_liar=True)
        drawn = _resumed(study, storage, claimed) or study.ask()
        drawn.set_user_attr(_NUMBER, claimed.number)

        def report(epoch: int, accuracy: float, drawn: Any = drawn) -> bool:
            drawn.report(accuracy, epoch)
            return drawn.should_prune()

        settings = {parameter.name: _suggest(drawn, parameter) for parameter in search.space}
        done = run_trial(search, folder, claimed.number, settings, worker=worker, data_dir=data_dir, report=report)
        _tell(study, drawn.number, done)


def _tell(study: Any, number: int, done: Trial) -> None:
    import optuna

    if done.state == "finished":
        study.tell(number, done.validation_accuracy)
    else:
        states = {"stopped": optuna.trial.TrialState.PRUNED, "failed": optuna.trial.TrialState.FAIL}
        study.tell(number, state=states[done.state])


def _settle(study: Any, folder: Path, worker: str | None) -> None:
    """Tells the study of the trial that a worker, or with `None` any, recorded last, if it died in between."""
    for known in _running(study):
        trial = read_trial(folder, known.user_attrs.get(_NUMBER, -1))
        if trial is not None and worker in (None, trial.worker) and trial.ended:
            _tell(study, known.number, trial)


def _running(study: Any) -> list[Any]:
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))


def mend(folder: Path) -> None:
    """Brings the journal in order after processes that were killed: no worker may be at work.

    What was half written is taken away, and the study told of trials that ended, whoever trained them: their workers
    may not come back.
    """
    journal = _journal(folder)
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if journal.is_file():
        text = journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with journal.open("r+b") as file:
                file.truncate(len(whole))
        if whole:
            import optuna

            storage = _storage(folder)
            if any(each.study_name == _STUDY for each in storage.get_all_studies()):
                _settle(optuna.load_study(study_name=_STUDY, storage=storage), folder, None)


def _journal(folder: Path) -> Path:
    return folder / "engine" / "optuna.log"


def _storage(folder: Path) -> Any:
    import optuna

    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(_journal(folder))))


def _resumed(study: Any, storage: Any, claimed: Trial) -> Any | None:
    """The study's trial that a worker was at when it died, as it stands; `None` if it was at none."""
    import optuna

    for known in _running(study):
        if known.user_attrs.get(_NUMBER) == claimed.number:
            study_id = storage.get_study_id_from_name(study.study_name)
            return optuna.trial.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, known.number))
    return None


def _suggest(drawn: Any, parameter: spaces.Parameter) -> Any:
    if isinstance(parameter, Choice):
        return parameter.of(drawn.suggest_categorical(parameter.name, parameter.labels))
    log = parameter.scale == "log"
    if spaces.is_whole(parameter.name):
        return drawn.suggest_int(parameter.name, int(parameter.low), int(parameter.high), log=log)
    return drawn.suggest_float(parameter.name, parameter.low, parameter.high, log=log)
