"""KerasTuner: a hypermodel for any of its tuners, and the chief and the workers of a search.

What KerasTuner 1.4 leaves to its users is done here: its oracles write their files in place, so that a kill can leave
half a file (here they appear whole or not at all); a trial that was drawn as the process died would never be run; and a
search ends with an error, and with a lock held, after a few failures in a row (here it goes on, and what draws settings
learns of a failed trial as of one with the lowest accuracy so far).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner
from keras_tuner.engine.base_tuner import BaseTuner

from keras_dsr import runs, training
from keras_dsr.data.parts import DataSet
from keras_dsr.recipes import Recipe, dtype_policy
from keras_dsr.tuning import space as spaces
from keras_dsr.tuning.search import HYPERBAND_FACTOR, OURS, Search, heard_of, read_trials, split_address
from keras_dsr.tuning.space import Choice, Parameter
from keras_dsr.tuning.trials import run_trial

OBJECTIVE = "val_accuracy"
# States of trials whose accuracies are those of trained networks.
LEARNT_FROM = ("finished", "stopped")


def declare(hp: keras_tuner.HyperParameters, space: Sequence[Parameter]) -> dict[str, Any]:
    """Makes a search space known to KerasTuner, and gives the values that it has at the moment.

    Args:
        hp: KerasTuner's hyperparameters, which get those of the space that they do not have yet.
        space: What is varied.

    Returns:
        The recipe's settings by name, in its own units, as `keras_dsr.tuning.space.apply` takes them.
    """
    values = {}
    for parameter in space:
        if isinstance(parameter, Choice):
            values[parameter.name] = parameter.of(hp.Choice(parameter.name, parameter.labels))
        elif spaces.is_whole(parameter.name):
            low, high = int(parameter.low), int(parameter.high)
            # On a logarithmic scale KerasTuner gives high + 1 for the very end of its unit interval.
            values[parameter.name] = min(hp.Int(parameter.name, low, high, sampling=parameter.scale), high)
        else:
            values[parameter.name] = hp.Float(parameter.name, parameter.low, parameter.high, sampling=parameter.scale)
    return values


class DSRHyperModel(keras_tuner.HyperModel):
    """A recipe with some of its settings left open, for KerasTuner's own tuners.

    Training examples, batches, augmentation, precision, optimizer and schedule are the recipe's; validation examples
    are those that it sets aside. The test part is not touched. Which epoch counts is KerasTuner's affair: the best,
    whatever the recipe's `selection`.

    Args:
        recipe: The recipe; one stage of training, so without `hybrid_epochs`.
        space: What is left open, see `keras_dsr.tuning.parse`; `None` for threshold and alpha.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        name: As in `keras_tuner.HyperModel`.

    Raises:
        ValueError: if the recipe has hybrid training or no validation examples, or the space does not pass
            `keras_dsr.tuning.check`.
        FileNotFoundError: if the data set is not there.

    Example:

    >>> import keras_tuner
    >>> from keras_dsr import recipes, tuning
    >>> model = tuning.DSRHyperModel(recipes.get("digits"))
    >>> hp = keras_tuner.HyperParameters()
    >>> model.recipe_of(hp).threshold
    0.5
    >>> sorted(each.name for each in hp.space)
    ['alpha', 'threshold']

    `keras_tuner.RandomSearch(model, "val_accuracy", max_trials=20).search()` needs no data beside.
    """

    def __init__(
        self,
        recipe: Recipe,
        space: Sequence[Parameter] | None = None,
        *,
        data_dir: Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if recipe.hybrid_epochs:
            raise ValueError(
                f"A hypermodel is trained in one stage. Received hybrid_epochs={recipe.hybrid_epochs!r}; set it to 0, "
                "or search with keras-dsr tune, which trains all stages."
            )
        self.recipe = recipe
        self.space = spaces.default_space(recipe) if space is None else tuple(space)
        spaces.check(recipe, self.space)
        self.data_dir = data_dir
        self._loaded = self._load(recipe)
        training.require_validation(recipe, self._loaded)

    def _load(self, recipe: Recipe) -> DataSet:
        return training.load(recipe, data_dir=self.data_dir)

    def recipe_of(self, hp: keras_tuner.HyperParameters) -> Recipe:
        """The recipe with the values of these hyperparameters.

        Raises:
            ValueError: if they are those of no recipe.
        """
        return spaces.apply(self.recipe, declare(hp, self.space))

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The compiled network with the values of these hyperparameters, in the recipe's precision.

        Raises:
            ValueError: if there is no such network.
        """
        recipe = self.recipe_of(hp)
        keras.utils.set_random_seed(recipe.seed)
        shape = self._loaded.input_shape
        if len(shape) == 4:  # event frames, time first
            shape = (recipe.timesteps, *shape[1:])
        with dtype_policy(recipe.precision):
            model = recipe.build(self._loaded.classes, shape)
        training.compile_model(model, recipe, self._loaded.steps(recipe.batch_size) * recipe.epochs)
        model.optimizer.build(model.trainable_variables)  # where weights are loaded next, its own are too
        return model

    def fit(
        self,
        hp: keras_tuner.HyperParameters,
        model: keras.Model,
        *,
        epochs: int | None = None,
        initial_epoch: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int | str = "auto",
    ) -> keras.callbacks.History:
        """Trains the network.

        Args:
            hp: The hyperparameters that it was built with.
            model: The network.
            epochs: Number of the epoch to end with, `None` for the recipe's; the schedule of the learning rate is that
                of all the recipe's epochs.
            initial_epoch: Number of epochs that its weights were trained before.
            callbacks: As in `keras.Model.fit`.
            verbose: As in `keras.Model.fit`.

        Returns:
            The history.

        Raises:
            keras_tuner.errors.FailedTrialError: if a loss, weight or threshold becomes NaN or infinite; KerasTuner
                records the trial as failed.
        """
        recipe = self.recipe_of(hp)
        loaded = self._loaded
        if recipe.timesteps != self.recipe.timesteps and len(loaded.input_shape) == 4:
            loaded = self._load(recipe)
        model.optimizer.iterations.assign(initial_epoch * loaded.steps(recipe.batch_size))
        try:
            return training.fit_epochs(
                model,
                recipe,
                loaded,
                epochs=recipe.epochs if epochs is None else epochs,
                first_epoch=initial_epoch,
                seed=recipe.seed,
                callbacks=callbacks,
                verbose=verbose,
            )
        except ValueError as error:  # which KerasTuner would train once more
            raise keras_tuner.errors.FailedTrialError(str(error)) from error


class _Durable(keras_tuner.Oracle):
    """An oracle whose files outlive a kill at any moment; see the module's docstring."""

    def save(self) -> None:
        runs.write(Path(self._get_oracle_fname()), json.dumps(self.get_state()))

    def _save_trial(self, trial: Any) -> None:
        runs.write(Path(self._get_trial_dir(trial.trial_id)) / "trial.json", json.dumps(trial.get_state()))

    def reload(self) -> None:
        super().reload()
        # KerasTuner hands on all trials that were being trained. Workers of this machine begin anew with the chief, and
        # may be fewer than before; those of others keep what they are at, unless they have been silent.
        folder = Path(self._directory)
        given_out = json.loads(Path(self._get_oracle_fname()).read_text())["ongoing_trials"]
        running = [name for name, trial in self.trials.items() if trial.status == "RUNNING"]
        self.ongoing_trials = {
            worker: self.trials[name]
            for worker, name in given_out.items()
            if name in running and not OURS.fullmatch(worker) and heard_of(folder, worker)
        }
        kept = {trial.trial_id for trial in self.ongoing_trials.values()}
        waiting = dict.fromkeys((*self._retry_queue, *running))  # some were drawn, but not given out, as the chief died
        self._retry_queue = [name for name in waiting if name not in kept]


class _Random(_Durable, keras_tuner.oracles.RandomSearchOracle):
    pass


class _Bayesian(_Durable, keras_tuner.oracles.BayesianOptimizationOracle):
    """Draws at random where the Gaussian process draws what there was already, of which it would learn nothing."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        drawn = super().populate_space(trial_id)
        if drawn["values"] is not None and self._duplicate(drawn["values"]):
            return self._random_populate_space()
        return drawn


class _Hyperband(_Durable, keras_tuner.oracles.HyperbandOracle):
    """Begins no bracket with the trials that those begun before need to come to their end."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        before = self._current_bracket, self._current_iteration, list(self._brackets), self._seed_state
        drawn = super().populate_space(trial_id)
        begun = (self._current_bracket, self._current_iteration) != before[:2]
        if begun and self.ongoing_trials and self.max_trials - len(self.trials) <= self._missing(self._brackets[:-1]):
            self._current_bracket, self._current_iteration, self._brackets, self._seed_state = before
            return {"status": "IDLE"}
        return drawn

    def _missing(self, brackets: list[dict[str, Any]]) -> int:
        """How many trials are yet to be begun in these brackets."""
        return sum(
            self._get_size(bracket["bracket_num"], place) - len(each)
            for bracket in brackets
            for place, each in enumerate(bracket["rounds"])
        )

    def set_state(self, state: dict[str, Any]) -> None:
        own = self.hyperband_iterations
        super().set_state(state)
        self.hyperband_iterations = own  # a search may go on with more trials


def oracle(search: Search) -> keras_tuner.Oracle:
    """The oracle of a search: what draws the settings of its trials.

    Args:
        search: The search, with a tuner of KerasTuner.

    References: Snoek et al., "Practical Bayesian Optimization of Machine Learning Algorithms", NeurIPS 2012, for
    "bayesian"; Li et al., "Hyperband", JMLR 2018, for "hyperband". Their factors are KerasTuner's defaults.
    """
    hp = keras_tuner.HyperParameters()
    declare(hp, search.space)
    common = {
        "objective": keras_tuner.Objective(OBJECTIVE, "max"),
        "hyperparameters": hp,
        "allow_new_entries": False,
        "seed": search.seed + 1,  # 0 would be none
        "max_consecutive_failed_trials": search.trials + 1,
    }
    if search.tuner == "hyperband":
        # As many of its rounds as the trials are enough for.
        made = _Hyperband(
            max_epochs=search.recipe.epochs,
            factor=HYPERBAND_FACTOR,
            hyperband_iterations=search.trials,
            **common,
        )
        made.max_trials = search.trials
        return made
    kind = {"random": _Random, "bayesian": _Bayesian}[search.tuner]
    return kind(max_trials=search.trials, **common)


class _SearchTuner(BaseTuner):
    """Runs the trials of a search; in the chief, gives them out."""

    def __init__(self, search: Search, folder: Path, data_dir: Path | None) -> None:
        self._search = search
        self._folder = folder
        self._data_dir = data_dir
        self._idle = False
        super().__init__(oracle(search), directory=str(folder), project_name="engine")

    def save(self) -> None:
        # A worker has nothing to keep, and would not start again from half a file.
        if isinstance(self.oracle, keras_tuner.Oracle):
            self.oracle.save()
            runs.write(Path(self._get_tuner_fname()), json.dumps(self.get_state()))

    def pre_create_trial(self) -> None:
        # An oracle that waits for other trials says so at once, and would be asked again at once.
        if self._idle:
            time.sleep(0.5)
        self._idle = True

    def on_trial_begin(self, trial: Any) -> None:
        self._idle = False

    def run_trial(self, trial: Any) -> dict[str, float]:
        values = trial.hyperparameters.values
        settings = declare(trial.hyperparameters, self._search.space)
        parent = values.get("tuner/trial_id")
        try:
            done = run_trial(
                self._search,
                self._folder,
                int(trial.trial_id),
                settings,
                worker=self.tuner_id,
                data_dir=self._data_dir,
                until=values.get("tuner/epochs"),
                parent=int(parent) if parent else None,
            )
        except (OSError, ImportError) as error:
            raise keras_tuner.errors.FatalError(f"{type(error).__name__}: {error}") from error
        accuracy = done.validation_accuracy
        if done.state == "failed":
            # KerasTuner leaves failed trials out of what it learns from, and would draw their neighbours next.
            known = [each.validation_accuracy for each in read_trials(self._folder) if each.state in LEARNT_FROM]
            accuracy = min((each for each in known if each is not None), default=0.0)
        return {OBJECTIVE: accuracy}


def serve(search: Search, folder: Path, worker: str, address: str, data_dir: Path | None = None) -> None:
    """Is the chief of a search, or one of its workers, until there are no more trials.

    Args:
        search: The search.
        folder: Its folder.
        worker: "chief", or the name of the worker.
        address: HOST:PORT at which the chief listens.
        data_dir: Where the data set is, see `keras_dsr.data.load`.

    Raises:
        ValueError: if the worker's name would make KerasTuner take it for the chief.
        OSError: in the chief, if the port is taken.
    """
    if worker != "chief" and "chief" in worker:
        raise ValueError(f"KerasTuner takes for the chief whoever has chief in its name. Received {worker!r}.")
    if worker == "chief":
        check_free(*split_address(address))
    host, _, port = address.rpartition(":")  # of an IPv6 address with its brackets
    # KerasTuner's own way to say so.
    os.environ |= {"KERASTUNER_TUNER_ID": worker, "KERASTUNER_ORACLE_IP": host, "KERASTUNER_ORACLE_PORT": port}
    try:
        _SearchTuner(search, folder, data_dir).search()
    except keras_tuner.errors.FatalError as error:
        raise error.__cause__ from error


def check_free(host: str, port: int) -> None:
    """Makes sure that nobody listens at a port; gRPC would share it without a word.

    Args:
        host: Name or address of this machine, of an IPv6 address without brackets.
        port: The port.

    Raises:
        OSError: if somebody does, or the host is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"The chief cannot listen at {host}:{port}: {error.strerror}. Choose another port, or leave the "
                "address out for workers of this machine alone."
            ) from error
