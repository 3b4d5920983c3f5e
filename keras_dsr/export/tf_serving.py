"""What TensorFlow Serving wants beside a SavedModel: warm-up requests, and the files that it is started with.

A folder of models, `savedmodels/`, has one folder a model with its versions by number in it, and beside them:

- `models.config`: the models that are served; `serve` adds those that are missing to it;
- `batching.config`, `monitoring.config` and `docker-compose.yml`, written if they are not there, yours to change.

`docker compose up` in that folder serves all its models.

Reference: https://www.tensorflow.org/tfx/serving/serving_config, https://www.tensorflow.org/tfx/serving/saved_model_warmup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_dsr.files import replacing

WARM_UP = "assets.extra/tf_serving_warmup_requests"
"""Where in a version the warm-up requests are."""

_FILES = {
    "batching.config": """\
# Requests that arrive within the timeout run as one batch. Raise max_batch_size where many clients call at once.
max_batch_size { value: 32 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 1000 }
""",
    "monitoring.config": """\
# What Prometheus reads, on the REST port.
prometheus_config {
  enable: true
  path: "/monitoring/prometheus/metrics"
}
""",
    "docker-compose.yml": """\
# All models of this folder in TensorFlow Serving: docker compose up
# gRPC on port 8500, REST on 8501: http://localhost:8501/v1/models/NAME
services:
  serving:
    image: tensorflow/serving:${TF_SERVING_VERSION:-latest}
    ports:
      - "8500:8500"
      - "8501:8501"
    volumes:
      - .:/models:ro
    command:
      - --model_config_file=/models/models.config
      - --model_config_file_poll_wait_seconds=30
      - --enable_batching=true
      - --batching_parameters_file=/models/batching.config
      - --monitoring_config_file=/models/monitoring.config
    restart: unless-stopped
""",
}


def versions(base: Path) -> list[int]:
    """The numbers that are taken in a model's folder, in order."""
    if not base.is_dir():
        return []
    return sorted(int(entry.name) for entry in base.iterdir() if entry.name.isascii() and entry.name.isdecimal())


def write_warm_up(version: Path, model: str, requests: Iterable[tuple[str, Mapping[str, np.ndarray]]]) -> None:
    """Writes what the server runs of a version before it answers requests with it.

    Args:
        version: The version's folder.
        model: The model's name.
        requests: Signatures and their inputs by name.

    Raises:
        ImportError: if tensorflow-serving-api is not installed.
    """
    try:
        from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
    except ImportError as error:
        raise _needs_extra(error) from error
    path = version / WARM_UP
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, tensors in requests:
            log = PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = model
            request.model_spec.signature_name = signature
            for name, value in tensors.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())


def check_config(folder: Path) -> None:
    """Raises a ValueError if a folder has a models.config that `serve` cannot add to."""
    _read(folder / "models.config")


def serve(folder: Path) -> None:
    """Makes a folder of models one that TensorFlow Serving is started in.

    Args:
        folder: Has a folder for each model.

    Raises:
        ValueError: if its models.config is damaged, or loads models in some other way than by a list.
        ImportError: if tensorflow-serving-api is not installed.
    """
    for name, text in _FILES.items():
        path = folder / name
        if not path.exists():
            with replacing(path) as beside:
                beside.write_text(text, encoding="utf-8")
    # Another process may export another model meanwhile, and either may write last: whoever does looks again.
    while _add_models(folder):
        pass


def _add_models(folder: Path) -> bool:
    """Adds the models that models.config does not have; gives whether there were any."""
    from google.protobuf import text_format

    path = folder / "models.config"
    config = _read(path)
    known = {entry.name for entry in config.model_config_list.config}
    found = sorted(base.name for base in folder.iterdir() if not base.name.startswith(".") and _is_model(base))
    missing = [name for name in found if name not in known]
    if not missing:
        return False
    for name in missing:
        config.model_config_list.config.add(name=name, base_path=f"/models/{name}", model_platform="tensorflow")
    with replacing(path) as beside:
        beside.write_text(text_format.MessageToString(config), encoding="utf-8")
    return True


def _is_model(base: Path) -> bool:
    """Whether a folder has a version of a SavedModel; a number alone may name anything."""
    return any((base / str(number) / "saved_model.pb").is_file() for number in versions(base))


def _read(path: Path) -> Any:
    try:
        from google.protobuf import text_format
        from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig
    except ImportError as error:
        raise _needs_extra(error) from error
    config = ModelServerConfig()
    if path.is_file():
        try:
            text_format.Parse(path.read_text(encoding="utf-8"), config)
        except text_format.ParseError as error:
            raise ValueError(
                f"{path} is not a configuration that TensorFlow Serving reads ({error}). Correct it, or move it away: "
                "the export writes another."
            ) from error
        if config.WhichOneof("config") == "custom_model_config":
            raise ValueError(f"{path} has no model_config_list, to which the export adds models. Move it away.")
    return config


def _needs_extra(error: ImportError) -> ImportError:
    return ImportError(
        "Exporting for TensorFlow Serving needs the package tensorflow-serving-api. Install it with: "
        f"pip install 'keras-dsr[export]' ({error})."
    )
