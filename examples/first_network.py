"""A spiking network of your own, trained with `model.fit` on scikit-learn's handwritten digits.

python examples/first_network.py
"""

import keras
import numpy as np

from keras_dsr import data, layers
from keras_dsr.analysis.firing import firing_rates

digits = data.load("digits")

image = keras.Input(digits.input_shape)
x = keras.layers.Conv2D(32, 3, padding="same")(image)  # the image is static: a stock layer, run once
x = keras.layers.BatchNormalization()(x)
x = layers.IFSpike(threshold=2.0, timesteps=8)(x)  # from here on, 8 time steps of spikes
x = layers.Synapse(keras.layers.Conv2D(64, 3, strides=2, padding="same"))(x)
x = layers.BatchNormalization()(x)
x = layers.IFSpike(threshold=2.0)(x)
x = layers.Synapse(keras.layers.Flatten())(x)
x = layers.Synapse(keras.layers.Dense(digits.classes))(x)
logits = layers.SpikeRep()(x)  # what the spikes stand for
model = keras.Model(image, logits)

model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
model.fit(
    np.asarray(digits.standardize(digits.train.x)),
    digits.train.labels,
    validation_data=digits.batches(digits.validation, 144),
    epochs=10,
    verbose=2,
)
test = digits.batches(digits.test, 120)
_, accuracy = model.evaluate(test, verbose=0)
print(f"test accuracy {accuracy:.1%}; firing rates {firing_rates(model, test)}")
