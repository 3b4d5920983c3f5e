"""A server to try exported models with, and a client for it and for TensorFlow Serving.

The server speaks TensorFlow Serving's own API, for development: whatever works with it works with the stock
`tensorflow/serving` image. It serves any SavedModel.

- `keras_dsr.serving.server`: `Server`, its `Settings`, and `run`
- `keras_dsr.serving.client`: `Client`, and `Stream`, which keeps a network's state between time steps
- `keras_dsr.serving.manager`: versions: found, loaded, warmed up, switched, unloaded
- `keras_dsr.serving.predict`: a request from name to outputs, the same for gRPC and REST
- `keras_dsr.serving.batching`: requests that run together
- `keras_dsr.serving.saved_model`: one version: its signatures and what they take
- `keras_dsr.serving.grpc_api`, `keras_dsr.serving.rest_api`: the protocols
- `keras_dsr.serving.errors`: `ServingError` and the status codes

It needs `pip install 'keras-dsr[serve]'`.
"""

from keras_dsr.serving.client import Client, Stream
from keras_dsr.serving.errors import Code, ServingError
from keras_dsr.serving.server import Server, Settings, model_folders, run

__all__ = ["Client", "Code", "Server", "ServingError", "Settings", "Stream", "model_folders", "run"]
