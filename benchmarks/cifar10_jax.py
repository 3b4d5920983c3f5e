"""A recipe on CIFAR-10, on JAX alone: for machines with a GPU and without TensorFlow.

    KERAS_BACKEND=jax python benchmarks/cifar10_jax.py --npz cifar10.npz --recipe cifar10-if-n5
    KERAS_BACKEND=jax python benchmarks/cifar10_jax.py --npz cifar10.npz --recipe cifar10-if --minutes 8

The recipes are those of `keras_dsr.recipes`, hybrid training included; data is a .npz file with x_train, y_train,
x_test and y_test, uint8. Images lie on the device and are cropped, flipped and cut out there; an epoch is one XLA
program, so that a small network is not held up by Python. Images set aside for validation choose the epoch of the last
stage; the test images are looked at once, in float32. Called again, it goes on from its last
checkpoint. Where a machine is lent by the minute, `--minutes` says how long each stage trains, compiling apart: its
learning rate then falls along the cosine with the time that is gone, and not with the epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
import sklearn.model_selection
from jax import numpy as jnp

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
        for begin in range(0, min(number, len(self.x)), size):
            yield np.asarray(standardized(self.x[begin : begin + size]))


def standardized(x: jax.Array) -> jax.Array:
    """Images as networks take them."""
    return (x.astype("float32") - MEAN) / STD


def changed(x: jax.Array, key: jax.Array, recipe: Recipe) -> jax.Array:
    """A batch of standardized images, each changed at random in its own way, as the recipe's augmentation says."""
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


def cross_entropy(logits: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over a batch."""
    return keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True).mean()


def epoch_program(model: keras.Model, recipe: Recipe, loss_of: Callable = cross_entropy) -> Callable:
    """A compiled model's training over all images once, in an order and with changes that a key decides.

    Args:
        model: The model.
        recipe: Batch size and augmentation.
        loss_of: Loss from logits, inputs and labels.

    Returns:
        A jitted function of (weights, state, slots), images, labels, a key and the learning rate of each update, to
        the former after the epoch, the mean loss and the part of the images that was right.
    """

    def objective(weights, state, x, y):
        logits, state, losses = model.stateless_call(weights, state, x, training=True, return_losses=True)
        logits = logits.astype("float32")
        return loss_of(logits, x, y) + sum(losses), (state, (logits.argmax(-1) == y).mean())

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

        size = math.gcd(len(x), EVALUATION_BATCH)
        shaped = [part.reshape(-1, size, *part.shape[1:]) for part in (x, y)]
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
    """
    progress = np.linspace(begin, end, steps, endpoint=False)
    rise = np.minimum((done + np.arange(steps)) / max(warmup, 1), 1.0) if warmup else 1.0
    return (largest * rise * (1 + np.cos(np.pi * progress)) / 2).astype("float32")


def prepared(model: keras.Model, recipe: Recipe, plan: Plan, train: Images) -> list[np.ndarray]:
    """Weights of one stage's model, made ready for the stage that follows."""
    examples = list(train.batches(128, CALIBRATION_IMAGES))
    if plan.number == 1:  # later, thresholds are those that weights were trained with
        models.calibrate_thresholds(model, examples, recipe.hybrid_percentile)
    if not plan.timesteps:
        return model.get_weights()
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
    seconds: float | None = None,
    rows: list[dict[str, Any]],
    seed: int = 0,
    loss_of: Callable = cross_entropy,
    after: Callable[[dict[str, Any], bool, Callable[[], None]], None],
) -> None:
    """Trains a compiled model; its variables are up to date at the end.

    Args:
        model: The model.
        recipe: The recipe.
        plan: The stage.
        train: Images to train on.
        validation: Images to evaluate on, after each epoch.
        seconds: How long, if not for the stage's epochs.
        rows: Of the epochs that came before.
        seed: Of order and changes.
        loss_of: Loss from logits, inputs and labels.
        after: Called after each epoch with what came out, whether it was the last, and a function that brings the
            model's variables up to date.

    Raises:
        ValueError: if the loss is not finite.
    """
    variables = variables_of(model)
    held = tuple([v.value for v in each] for each in variables)
    steps = len(train.x) // recipe.batch_size
    warmup = min(recipe.warmup_steps, steps * plan.epochs // 5)
    key = jax.random.key(seed)
    began = time.perf_counter()
    flat = learning_rates(plan.learning_rate, warmup, 0, steps, 0.0, 0.0)
    epoch_of = epoch_program(model, recipe, loss_of).lower(held, train.x, train.y, key, flat).compile()
    accuracy_of = accuracy_program(model)
    start = accuracy_of(held[0], held[1], validation)
    print(f"{plan.name}: from {start:.2%}, compiled in {time.perf_counter() - began:.0f} s", flush=True)

    def bring() -> None:
        for each, values in zip(variables, held, strict=True):
            for variable, value in zip(each, values, strict=True):
                variable.assign(value)

    done, passed, progress = len(rows), sum(row["seconds"] for row in rows), rows[-1]["progress"] if rows else 0.0
    last = not plan.epochs
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


def load(path: Path, validation: int = 5000, examples: int | None = None) -> tuple[Images, Images, Images]:
    """Training, validation and test images."""
    with np.load(path) as arrays:
        x, y, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    y, y_test = y.ravel().astype("int32"), y_test.ravel().astype("int32")
    rest, held_out = sklearn.model_selection.train_test_split(
        np.arange(len(x)), test_size=validation, stratify=y, random_state=0
    )
    rest = rest[:examples]
    return tuple(
        Images(jnp.asarray(x), jnp.asarray(y))
        for x, y in ((x[rest], y[rest]), (x[held_out], y[held_out]), (x_test, y_test))
    )


def train_recipe(
    recipe: Recipe,
    folder: Path,
    images: tuple[Images, Images, Images],
    *,
    minutes: list[float] | None = None,
    keep: int = 10,
) -> dict[str, Any]:
    """Trains all stages of a recipe, evaluates once, and fills the folder.

    Args:
        recipe: The recipe.
        folder: Where to; goes on from what is there.
        images: For training, validation and test.
        minutes: How long each stage trains, if not for its epochs.
        keep: Epochs from one checkpoint to the next.
    """
    train, validation, test = images
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.npz"
    about = {"recipe": json.loads(recipe.to_json()), "minutes": minutes}
    state = {"rows": [], "stage": -1, "best": -1.0, "best_weights": [], **about}
    if checkpoint.is_file():
        state = checkpoints.progress(checkpoint)
        if any(state[name] != value for name, value in about.items()):
            raise SystemExit(f"{folder} has a run with other settings; name another --folder.")

    model, weights = None, None
    for plan in recipe.plans():
        if plan.number < state["stage"]:
            continue
        if model is not None:
            weights = prepared(model, recipe, plan, train)
        seed = recipe.seed + 7919 * plan.number
        keras.utils.set_random_seed(seed)
        keras.config.set_dtype_policy(recipe.precision)
        model = recipe.build(10, (32, 32, 3), plan.timesteps, plan.representation_steps)
        compile_model(model, recipe, plan.weight_decay)
        rows = [row for row in state["rows"] if row["stage"] == plan.name]
        if plan.number == state["stage"]:
            checkpoints.restore(checkpoint, model)
        elif weights is not None:
            model.set_weights(weights)

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

        if not (rows and rows[-1]["progress"] == 1.0):
            train_stage(
                model,
                recipe,
                plan,
                train,
                validation,
                seconds=minutes and 60 * minutes[plan.number],
                rows=rows,
                seed=seed,
                after=after,
            )

    keras.config.set_dtype_policy("float32")
    jax.config.update("jax_default_matmul_precision", "highest")
    result = recipe.build(10, (32, 32, 3))
    result.set_weights(state["best_weights"])
    values = [[v.value for v in each] for each in (result.trainable_variables, result.non_trainable_variables)]
    accuracy = accuracy_program(result)(*values, test)
    outcome = {name: value for name, value in state.items() if name != "best_weights"}
    outcome |= {"test_accuracy": accuracy, "device": jax.devices()[0].device_kind}
    outcome["seconds"] = sum(row["seconds"] for row in state["rows"])
    outcome["thresholds"] = firing.thresholds(result)
    with replacing(folder / "weights.npz") as beside:
        np.savez(beside, **{f"{number:03d}": weight for number, weight in enumerate(state["best_weights"])})
    with replacing(folder / "result.json") as beside:
        beside.write_text(json.dumps(outcome, indent=2) + "\n")
    return outcome


def main() -> None:
    """Trains, or goes on, and evaluates once at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", type=Path, required=True, help="the images")
    parser.add_argument("--recipe", default="cifar10-if-n5", help="a recipe on CIFAR-10")
    parser.add_argument("--validation", type=int, default=5000, help="images set aside to choose the epoch by")
    parser.add_argument("--examples", type=int, help="fewer training images, to try it out")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--folder", type=Path, default=Path("runs/cifar10-jax"))
    parser.add_argument("--minutes", type=float, nargs="+", help="of each stage, in place of its epochs")
    parser.add_argument("--keep", type=int, default=10, metavar="EPOCHS", help="epochs between checkpoints")
    options = parser.parse_args()
    recipe = recipes.get(options.recipe).with_settings(recipes.parse_settings(options.set))
    if recipe.data != "cifar10" or {recipe.optimizer, recipe.hybrid_optimizer} != {"sgd"}:
        raise SystemExit(f"A recipe on CIFAR-10 that trains with SGD is needed. Received {recipe.name!r}.")
    if unknown := set(recipe.augmentation) - set(CHANGES):
        raise SystemExit(f"Of augmentations there are {CHANGES} here. Received {sorted(unknown)}.")
    if options.minutes and len(options.minutes) != len(recipe.plans()):
        raise SystemExit(f"{recipe.name} has {len(recipe.plans())} stages. Received --minutes {options.minutes}.")
    images = load(options.npz, options.validation, options.examples)
    outcome = train_recipe(recipe, options.folder, images, minutes=options.minutes, keep=options.keep)
    print(
        f"{recipe.name}: test accuracy {outcome['test_accuracy']:.2%}, validation accuracy {outcome['best']:.2%}, "
        f"{outcome['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
