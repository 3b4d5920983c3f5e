"""Hybrid training: the representation network first, an ANN of one pass a step, then a few epochs with spikes.

    python examples/hybrid_training.py

`keras-dsr train RECIPE --set hybrid_epochs=10` does the same for any recipe.
"""

import keras
import numpy as np

from keras_dsr import data
from keras_dsr.layers import IFSpike
from keras_dsr.models import calibrate_thresholds, small_cnn, with_timesteps

digits = data.load("digits")
train = np.asarray(digits.standardize(digits.train.x)), digits.train.labels
held_out = digits.batches(digits.validation, 144)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

ann = small_cnn(neuron=IFSpike(threshold=6.0), timesteps=0)
ann.compile("adam", loss, metrics=["accuracy"])
ann.fit(*train, epochs=10, verbose=2, validation_data=held_out)

# A spike is worth V_th / N: no threshold should be above what its layer ever receives.
for name, (before, after) in calibrate_thresholds(ann, digits.batches(digits.train, 128), percentile=99.5).items():
    print(f"threshold of {name}: {before:.2f} -> {after:.2f}")

snn = with_timesteps(ann, 4)  # the same weights, now with 4 time steps of spikes
snn.compile("adam", loss, metrics=["accuracy"])
print("before it has trained with spikes:", snn.evaluate(held_out, verbose=0, return_dict=True))
snn.fit(*train, epochs=3, verbose=2, validation_data=held_out)
print("test:", snn.evaluate(digits.batches(digits.test, 120), verbose=0, return_dict=True))
