"""Networks: functions that return a `keras.Model` built from public layers.

- `preact_resnet`: the paper's networks for images, depth 18 to 110
- `vgg`: the paper's network for event cameras (11), and a small one (5)
- `small_cnn`: a small network for small images
- `with_timesteps`: the same model with another number of time steps; 0 makes an ANN of it
- `calibrate_thresholds`, `calibrate_normalization`: thresholds from that ANN's activations and statistics from spikes,
  before it goes on with spikes
"""

from keras_dsr.models.calibration import calibrate_normalization, calibrate_thresholds
from keras_dsr.models.preact_resnet import preact_resnet
from keras_dsr.models.small_cnn import small_cnn
from keras_dsr.models.timesteps import with_timesteps
from keras_dsr.models.vgg import vgg

__all__ = ["calibrate_normalization", "calibrate_thresholds", "preact_resnet", "small_cnn", "vgg", "with_timesteps"]
