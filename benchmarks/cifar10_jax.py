"""A recipe on CIFAR-10, on JAX alone: for machines with a GPU and without TensorFlow.

    KERAS_BACKEND=jax python benchmarks/cifar10_jax.py --npz cifar10.npz --recipe cifar10-if-n5
    KERAS_BACKEND=jax python benchmarks/cifar10_jax.py --npz cifar10.npz --recipe cifar10-if --minutes 8

The recipes are those of `keras_dsr.recipes`, hybrid training included; data is a .npz file with x_train, y_train,
x_test and y_test, uint8. Images lie on the device and are cropped, flipped and cut out there; an epoch is one XLA
program, so that a small network is not held up by Python. Images set aside for validation choose the epoch of the last
stage; the test images are looked at once, in float32. Called again, it goes on from its last checkpoint. What came out
is in the folder: result.json, result.md, weights.npz.

Learning rates are those of the recipe but for one thing: the cosine begins with the warm-up, not after it. With
`--minutes` it falls with the time that is gone, so that a stage ends as long as told, two epochs at least; compiling,
checkpoints and calibration are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
import sklearn.model_selection
from jax import numpy as jnp
from measure import machine, markdown

from keras_dsr import checkpoints, models, recipes
from keras_dsr.analysis import firing
from keras_dsr.files import replacing
from keras_dsr.optimizers import SGD
from keras_dsr.recipes import Plan, Recipe

MEAN = 255 * np.array([0.4914, 0.4822, 0.4465], "float32")
STD = 255 * np.array([0.2023, 0.1994, 0.2010], "float32")
CHANGES = ("crop", "flip", "cutout")
CALIBRATION_IMAGES = 2048
EVALUATION_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Images:
    """Images on the device, uint8, and their labels."""

    x: jax.Array
    y: jax.Array

    def batches(self, size: int, number: int) -> Iterator[np.ndarray]:
        """The first `number` of them, as networks take them, so many at a time."""
        for begin in range(0, min(number, len(self.x)), size):
            yield np.asarray(standardized(self.x[begin : begin + size]))


def standardized(x: jax.Array) -> jax.Array:
    """Images as networks take them."""
    return (x.astype("float32") - MEAN) / STD


def changed(x: jax.Array, key: jax.Array, recipe: Recipe) -> jax.Array:
    """A batch of standardized images, each changed at random in its own way.

    Args:
        x: The images.
        key: Decides what happens.
        recipe: Its augmentation, of `CHANGES`, padding and cutout.
    """
    keys = jax.random.split(key, 3)
    size, height, width, channels = x.shape
    if "crop" in recipe.augmentation:
        # Black, as the library pads images before it standardizes them.
        wide = [(0, 0), (recipe.padding, recipe.padding), (recipe.padding, recipe.padding), (0, 0)]
        padded = jnp.pad(x + MEAN / STD, wide) - MEAN / STD
        offsets = jax.random.randint(keys[0], (size, 2), 0, 2 * recipe.padding + 1)
        x = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (height, width, channels)))(
            padded, offsets
        )
    if "flip" in recipe.augmentation:
        x = jnp.where(jax.random.bernoulli(keys[1], shape=(size, 1, 1, 1)), x[:, :, ::-1], x)
    if "cutout" in recipe.augmentation:
        begin = jax.random.randint(keys[2], (size, 2), 0, jnp.array([height, width])) - recipe.cutout // 2
        places = jnp.arange(height), jnp.arange(width)
        inside = [(p >= b[:, None]) & (p < b[:, None] + recipe.cutout) for p, b in zip(places, begin.T, strict=True)]
        x = jnp.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], 0.0, x)
    return x


def epoch_program(model: keras.Model, recipe: Recipe) -> Callable:
    """A compiled model's training over all images once, in an order and with changes that a key decides.

    Args:
        model: The model.
        recipe: Batch size and augmentation.

    Returns:
        A jitted function of (weights, state, slots), images, labels, a key and the learning rate of each update, to
        the former after the epoch, the mean loss and the part of the images that was right.
    """

    def objective(weights, state, x, y):
        logits, state, losses = model.stateless_call(weights, state, x, training=True, return_losses=True)
        logits = logits.astype("float32")
        loss = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True).mean()
        return loss + sum(losses), (state, (logits.argmax(-1) == y).mean())

    rate = next(i for i, v in enumerate(model.optimizer.variables) if v is model.optimizer.learning_rate)

    def update(images, held, drawn):
        weights, state, slots = held
        chosen, key, learning_rate = drawn
        slots = [learning_rate if number == rate else slot for number, slot in enumerate(slots)]
        x = changed(standardized(images.x[chosen]), key, recipe)
        (loss, (state, right)), gradients = jax.value_and_grad(objective, has_aux=True)(
            weights, state, x, images.y[chosen]
        )
        weights, slots = model.optimizer.stateless_apply(slots, gradients, weights)
        return (weights, state, list(slots)), (loss, right)

    @jax.jit
    def epoch(held, x, y, key, rates):
        steps = len(rates)
        order = jax.random.permutation(jax.random.fold_in(key, 0), len(x))[: steps * recipe.batch_size]
        drawn = order.reshape(steps, -1), jax.random.split(jax.random.fold_in(key, 1), steps), rates
        held, (loss, right) = jax.lax.scan(lambda held, drawn: update(Images(x, y), held, drawn), held, drawn)
        return held, loss.mean(), right.mean()

    return epoch


def accuracy_program(model: keras.Model) -> Callable:
    """A function of weights, state and images, to the part of them that a model gets right."""

    @jax.jit
    def accuracy(weights, state, x, y):
        def count(total, batch):
            logits, _ = model.stateless_call(weights, state, standardized(batch[0]), training=False)
            return total + (logits.argmax(-1) == batch[1]).sum(), None

        # What fills the last batch has a label that no output stands for.
        more = -len(x) % EVALUATION_BATCH
        x_full, y_full = jnp.pad(x, [(0, more), *[(0, 0)] * 3]), jnp.pad(y, (0, more), constant_values=-1)
        shaped = [part.reshape(-1, EVALUATION_BATCH, *part.shape[1:]) for part in (x_full, y_full)]
        return jax.lax.scan(count, 0, shaped)[0] / len(x)

    return lambda weights, state, images: float(accuracy(weights, state, images.x, images.y))


def variables_of(model: keras.Model) -> list[list[Any]]:
    """Weights, state and slots of a compiled model."""
    return [model.trainable_variables, model.non_trainable_variables, model.optimizer.variables]


def compile_model(model: keras.Model, recipe: Recipe, weight_decay: float) -> None:
    """Gives a model the recipe's SGD; its learning rate is set ahead of each update."""
    model.compile(SGD(recipe.learning_rate, recipe.momentum, coupled_weight_decay=weight_decay))
    model.optimizer.build(model.trainable_variables)


def learning_rates(largest: float, warmup: int, done: int, steps: int, begin: float, end: float) -> np.ndarray:
    """Of the updates of an epoch: a rise over the first updates of a stage, and a cosine.

    Args:
        largest: The largest.
        warmup: Number of updates of the rise.
        done: Number of updates that came before.
        steps: Updates of the epoch.
        begin: Which part of the stage is over, before the epoch.
        end: And after it.

    Returns:
        A rate for each update.
    """
    progress = np.linspace(begin, end, steps, endpoint=False)
    rise = np.minimum((done + np.arange(steps)) / warmup, 1.0) if warmup else 1.0
    return (largest * rise * (1 + np.cos(np.pi * progress)) / 2).astype("float32")


def prepared(model: keras.Model, recipe: Recipe, plan: Plan, train: Images) -> list[np.ndarray]:
    """Weights of one stage's model, made ready for the stage that follows.

    Args:
        model: The model; its thresholds may change.
        recipe: The recipe.
        plan: The stage that follows.
        train: Images to calibrate on.
    """
    examples = list(train.batches(128, CALIBRATION_IMAGES))
    if plan.number == 1:  # later, thresholds are those that weights were trained with
        models.calibrate_thresholds(model, examples, recipe.hybrid_percentile)
    if not plan.timesteps:
        return model.get_weights()
    with recipes.dtype_policy(recipe.precision):
        spiking = recipe.build(10, (32, 32, 3))
    spiking.set_weights(model.get_weights())
    models.calibrate_normalization(spiking, examples)
    return spiking.get_weights()


def train_stage(
    model: keras.Model,
    recipe: Recipe,
    plan: Plan,
    train: Images,
    validation: Images,
    *,
    seconds: float | None,
    rows: list[dict[str, Any]],
    seed: int,
    before: Callable[[dict[str, float]], None],
    after: Callable[[dict[str, Any], bool, Callable[[], None]], None],
) -> None:
    """Trains a compiled model; its variables are up to date at the end.

    Args:
        model: The model.
        recipe: The recipe.
        plan: The stage.
        train: Images to train on.
        validation: Images to evaluate on, after each epoch.
        seconds: How long, if not for the stage's epochs; it ends with the epoch whose end is next to it, after two at
            least.
        rows: Of the epochs that came before.
        seed: Of order and changes.
        before: Called once, with the validation accuracy so far and the seconds that compiling took.
        after: Called after each epoch with what came out, whether it was the last, and a function that brings the
            model's variables up to date, if all are finite: nothing else is kept.

    Raises:
        ValueError: if a loss or a weight is not finite.
    """
    variables = variables_of(model)
    held = tuple([v.value for v in each] for each in variables)
    steps = len(train.x) // recipe.batch_size
    # How many epochs there will be is not known where it goes by seconds.
    warmup = min(recipe.warmup_steps, steps if seconds else steps * plan.epochs // 5)
    key = jax.random.key(seed)
    began = time.perf_counter()
    flat = learning_rates(plan.learning_rate, warmup, 0, steps, 0.0, 0.0)
    epoch_of = epoch_program(model, recipe).lower(held, train.x, train.y, key, flat).compile()
    accuracy_of = accuracy_program(model)
    start = accuracy_of(held[0], held[1], validation)
    before({"start": start, "compile_s": time.perf_counter() - began})

    def bring() -> None:
        for each, values in zip(variables, held, strict=True):
            for variable, value in zip(each, values, strict=True):
                variable.assign(value)
        for variable in model.weights:
            if not np.isfinite(np.asarray(variable.value)).all():
                raise ValueError(f"{variable.path} is not finite after epoch {done}. Lower the learning rate.")

    done, passed, progress = len(rows), sum(row["seconds"] for row in rows), rows[-1]["progress"] if rows else 0.0
    last = False
    while not last:
        started = time.perf_counter()
        left = plan.epochs - done
        if seconds is not None:  # the first epoch tells how many there will be
            left = max(round((seconds - passed) * done / passed), 1) if done else 10**6
        last = left == 1
        end = 1.0 if last else progress + (1 - progress) / left
        rates = learning_rates(plan.learning_rate, warmup, done * steps, steps, progress, end)
        held, loss, right = epoch_of(held, train.x, train.y, jax.random.fold_in(key, done), rates)
        row = {"epoch": done + 1, "accuracy": float(right), "loss": float(loss), "progress": end}
        row["val_accuracy"] = accuracy_of(held[0], held[1], validation)
        row["seconds"] = time.perf_counter() - started
        if not np.isfinite(row["loss"]):
            raise ValueError(f"The loss of epoch {done + 1} is {row['loss']}. Lower the learning rate.")
        done, passed, progress = done + 1, passed + row["seconds"], end
        after(row, last, bring)
    bring()


def load(path: Path, recipe: Recipe) -> tuple[Images, Images, Images]:
    """Training, validation and test images.

    Args:
        path: The .npz file.
        recipe: How many of its training images are for validation (5,000 if it does not say), and how many are used.

    Raises:
        ValueError: if there are too few.
    """
    with np.load(path) as arrays:
        x, y, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    y, y_test = y.ravel().astype("int32"), y_test.ravel().astype("int32")
    validation = 5000 if recipe.validation is None else int(recipe.validation)
    most = len(x) - validation
    number = most if recipe.train_examples is None else recipe.train_examples
    if not (validation >= 1 and recipe.batch_size <= number <= most):
        raise ValueError(
            f"Of the {len(x)} training images one or more are for validation, and a batch or more for training. "
            f"Received validation={validation}, train_examples={recipe.train_examples}, "
            f"batch_size={recipe.batch_size}."
        )
    rest, held_out = sklearn.model_selection.train_test_split(
        np.arange(len(x)), test_size=validation, stratify=y, random_state=0
    )
    if number < most:
        rest, _ = sklearn.model_selection.train_test_split(rest, train_size=number, stratify=y[rest], random_state=0)
    return tuple(
        Images(jnp.asarray(x), jnp.asarray(y))
        for x, y in ((x[rest], y[rest]), (x[held_out], y[held_out]), (x_test, y_test))
    )


def check(recipe: Recipe, minutes: Sequence[float] | None, keep: int) -> None:
    """Whether it can be trained here.

    Raises:
        ValueError: if it cannot.
    """
    optimizers = sorted({plan.optimizer for plan in recipe.plans()})
    if recipe.data != "cifar10" or optimizers != ["sgd"] or recipe.size or not recipe.timesteps:
        raise ValueError(
            "A recipe with time steps, on CIFAR-10 in its own size, that trains with SGD, is needed. Received "
            f"{recipe.name!r} with data={recipe.data!r}, size={recipe.size}, timesteps={recipe.timesteps}, and the "
            f"optimizers {optimizers}."
        )
    if unknown := set(recipe.augmentation) - set(CHANGES):
        raise ValueError(f"Of augmentations there are {CHANGES} here. Received {sorted(unknown)}.")
    if minutes is not None and (len(minutes) != len(recipe.plans()) or min(minutes) <= 0):
        names = [plan.name for plan in recipe.plans()]
        raise ValueError(f"minutes is a number above 0 for each of the stages {names}. Received {minutes}.")
    if keep < 1:
        raise ValueError(f"Checkpoints are 1 epoch apart or more. Received {keep}.")


def train_recipe(
    recipe: Recipe,
    folder: Path,
    images: tuple[Images, Images, Images],
    *,
    minutes: Sequence[float] | None = None,
    keep: int = 10,
) -> dict[str, Any]:
    """Trains all stages of a recipe, evaluates once, and fills the folder.

    Args:
        recipe: The recipe.
        folder: Where to; goes on from what is there, and leaves a finished run as it is.
        images: For training, validation and test.
        minutes: How long each stage trains, if not for its epochs; a number for each.
        keep: Epochs from one checkpoint to the next.

    Returns:
        What is in result.json.

    Raises:
        ValueError: if the recipe cannot be trained here, the folder has a run with other settings or images, or a loss
            or a weight is not finite.
    """
    check(recipe, minutes, keep)
    train, validation, test = images
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, finished = folder / "checkpoint.npz", folder / "result.json"
    labels = hashlib.sha256(b"".join(np.asarray(part.y).tobytes() for part in images)).hexdigest()
    about = {"recipe": json.loads(recipe.to_json()), "minutes": minutes and list(minutes), "labels": labels}
    state = {"rows": [], "stage": -1, "stages": {}, "best": -1.0, "best_weights": [], **about}
    if checkpoint.is_file():
        state = checkpoints.progress(checkpoint)
        if any(state.get(name) != value for name, value in about.items()):
            raise ValueError(f"{folder} has a run with other settings or images; name another folder.")
    if finished.is_file():
        return json.loads(finished.read_text())

    model, weights = None, None
    for plan in recipe.plans():
        if plan.number < state["stage"]:
            continue
        if model is not None:
            weights = prepared(model, recipe, plan, train)
        seed = recipe.seed + 7919 * plan.number
        keras.utils.set_random_seed(seed)
        with recipes.dtype_policy(recipe.precision):
            model = recipe.build(10, (32, 32, 3), plan.timesteps, plan.representation_steps)
        compile_model(model, recipe, plan.weight_decay)
        rows = [row for row in state["rows"] if row["stage"] == plan.name]
        if plan.number == state["stage"]:
            checkpoints.restore(checkpoint, model)
        elif weights is not None:
            model.set_weights(weights)

        def before(begun, plan=plan):
            begun = state["stages"].setdefault(plan.name, begun)
            print(f"{plan.name}: {json.dumps(begun)}", flush=True)

        def after(row, last, bring, model=model, plan=plan):
            state["rows"].append({"stage": plan.name, **row})
            state["stage"] = plan.number
            best = plan.last and (recipe.selection == "last" or row["val_accuracy"] >= state["best"])
            ends = last or row["epoch"] % keep == 0
            if best or ends:
                bring()
            if best:
                state.update(best=row["val_accuracy"], best_weights=model.get_weights())
            if ends:
                checkpoints.save(checkpoint, model, state)
            print(json.dumps(state["rows"][-1]), flush=True)

        if plan.epochs and not (rows and rows[-1]["progress"] == 1.0):
            train_stage(
                model,
                recipe,
                plan,
                train,
                validation,
                seconds=minutes and 60 * minutes[plan.number],
                rows=rows,
                seed=seed,
                before=before,
                after=after,
            )

    weights = state["best_weights"] or model.get_weights()
    with recipes.dtype_policy("float32"):
        result = recipe.build(10, (32, 32, 3))
    result.set_weights(weights)
    values = [[v.value for v in each] for each in (result.trainable_variables, result.non_trainable_variables)]
    with jax.default_matmul_precision("highest"):
        accuracy_of = accuracy_program(result)
        accuracies = [accuracy_of(*values, part) for part in (validation, test)]
    outcome = {name: value for name, value in state.items() if name not in ("best_weights", "stage")}
    outcome |= {"best": accuracies[0] if state["best"] < 0 else state["best"], "test_accuracy": accuracies[1]}
    outcome |= {"test_images": len(test.x), "device": jax.devices()[0].device_kind, "machine": machine()}
    outcome["thresholds"] = firing.thresholds(result)
    with replacing(folder / "weights.npz") as beside:
        np.savez(beside, **{f"{number:03d}": weight for number, weight in enumerate(weights)})
    with replacing(folder / "result.md") as beside:
        beside.write_text(table(outcome))
    with replacing(finished) as beside:
        beside.write_text(json.dumps(outcome, indent=2) + "\n")
    return outcome


def table(outcome: dict[str, Any]) -> str:
    """The Markdown of a result."""
    host, recipe = outcome["machine"], outcome["recipe"]
    rows = []
    for name in dict.fromkeys(row["stage"] for row in outcome["rows"]):
        own = [row for row in outcome["rows"] if row["stage"] == name]
        seconds, begun = sum(row["seconds"] for row in own), outcome["stages"].get(name, {})
        best = max(row["val_accuracy"] for row in own)
        figures = [begun.get("start"), own[-1]["val_accuracy"], best, own[-1]["accuracy"]]
        rows.append([name, len(own), f"{seconds:.0f}", *(None if f is None else f"{f:.2%}" for f in figures)])
    header = ["stage", "epochs", "seconds", "validation, before", "last epoch", "best epoch", "training, last epoch"]
    lines = [
        f"{recipe['network']}, depth {recipe['depth']}, {recipe['neuron'].upper()}, N = {recipe['timesteps']}, on "
        f"{outcome['device']}, {host['date']}: {outcome['test_accuracy']:.2%} of {outcome['test_images']:,} test "
        f"images. One run of `{host['command']}`.",
        "",
        *markdown(header, rows),
    ]
    if outcome["minutes"]:
        lines += ["", f"Epochs are as many as there was time for (minutes a stage: {outcome['minutes']})."]
    return "\n".join([*lines, ""])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--npz", type=Path, required=True, help="the images")
    made.add_argument("--recipe", default="cifar10-if-n5", help="a recipe on CIFAR-10")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    made.add_argument("--folder", type=Path, default=Path("runs/cifar10-jax"), help="where to, and go on from")
    made.add_argument("--minutes", type=float, nargs="+", help="of each stage, in place of its epochs")
    made.add_argument("--keep", type=int, default=10, metavar="EPOCHS", help="epochs between checkpoints")
    return made


def main() -> None:
    """Trains, or goes on, and evaluates once at the end."""
    options = parser().parse_args()
    try:
        recipe = recipes.get(options.recipe).with_settings(recipes.parse_settings(options.set))
        check(recipe, options.minutes, options.keep)
        images = load(options.npz, recipe)
        outcome = train_recipe(recipe, options.folder, images, minutes=options.minutes, keep=options.keep)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(table(outcome))


if __name__ == "__main__":
    main()
