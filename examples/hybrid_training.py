"""Hybrid training: the representation network first, an ANN of one pass a step, then a few epochs with spikes.

python examples/hybrid_training.py
"""

import keras

from keras_dsr.data.images import digits
from keras_dsr.layers import IFSpike
from keras_dsr.models import small_cnn, with_timesteps

data = digits()
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
train = (data.train.images, data.train.labels)
held_out = (data.validation.images, data.validation.labels)

ann = small_cnn(neuron=IFSpike(threshold=2.0), timesteps=0)
ann.compile("adam", loss, metrics=["accuracy"])
ann.fit(*train, epochs=10, verbose=2, validation_data=held_out)

snn = with_timesteps(ann, 4)  # the same weights, now with 4 time steps of spikes
snn.compile("adam", loss, metrics=["accuracy"])
print("before it has seen a spike:", snn.evaluate(*held_out, verbose=0, return_dict=True))
snn.fit(*train, epochs=3, verbose=2, validation_data=held_out)
print("test:", snn.evaluate(data.test.images, data.test.labels, verbose=0, return_dict=True))
