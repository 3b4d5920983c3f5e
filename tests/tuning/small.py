"""A search of small trials, and a training that takes no time."""

from __future__ import annotations

import dataclasses
import json

from keras_dsr import recipes, training
from keras_dsr.tuning import space as spaces
from keras_dsr.tuning import trials
from keras_dsr.tuning.search import Search

TINY = dataclasses.replace(
    recipes.get("digits"), widths=(4,), timesteps=2, epochs=4, batch_size=16, train_examples=40, dropout=0.0
)


def search(recipe=TINY, space=("threshold=0.5:8:log", "alpha"), **settings):
    return Search(recipe=recipe, space=spaces.parse(recipe, space), **{"trials": 6, **settings})


class Killed(BaseException):
    """What ends a process in these tests."""


class MadeUp:
    """A training that takes no time: the accuracy is highest at alpha = 0.5, and grows from epoch to epoch."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.trained = []
        self.before_epoch = lambda recipe, epoch: None
        self.accuracy = lambda recipe: 1 - abs(recipe.alpha - 0.5)
        monkeypatch.setattr(training, "fit", self.fit)
        monkeypatch.setattr(trials, "_rows", self.rows)
        monkeypatch.setattr(trials, "_forget", lambda: None)
        monkeypatch.setattr(trials, "_loaded", lambda recipe, data_dir: None)

    def rows(self, path):
        file = path / "rows.json"
        return json.loads(file.read_text()) if file.is_file() else []

    def fit(self, recipe, folder, *, loaded, callbacks, verbose):
        folder.mkdir(parents=True, exist_ok=True)
        self.calls.append(folder.name)
        rows = self.rows(folder)
        for epoch in range(len(rows), recipe.epochs):
            for callback in callbacks:
                callback.on_epoch_begin(epoch)
            self.before_epoch(recipe, epoch)
            self.trained.append((folder.name, epoch))
            accuracy = self.accuracy(recipe) * (epoch + 1) / recipe.epochs
            rows.append({"stage": "spiking", "val_accuracy": accuracy, "seconds": 0.5})
            (folder / "rows.json").write_text(json.dumps(rows))
            for callback in callbacks:
                callback.on_epoch_end(epoch, {"val_accuracy": accuracy})
        return training.Fitted(rows[-1]["val_accuracy"], recipe.epochs, {"one": 0.1, "two": 0.3}, {"one": 1.0}, 2.0)
