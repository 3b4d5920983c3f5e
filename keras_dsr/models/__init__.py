"""Networks: functions that return a `keras.Model` built from public layers.

- `preact_resnet`: the paper's networks for images, depth 18 to 110
- `vgg`: the paper's network for event cameras
- `small_cnn`: a small network for small images
- `with_timesteps`: the same model with another number of time steps; 0 makes an ANN of it
"""

from keras_dsr.models.preact_resnet import preact_resnet
from keras_dsr.models.small_cnn import small_cnn
from keras_dsr.models.timesteps import with_timesteps
from keras_dsr.models.vgg import vgg

__all__ = ["preact_resnet", "small_cnn", "vgg", "with_timesteps"]
