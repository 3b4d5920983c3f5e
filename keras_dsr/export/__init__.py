"""Export: SavedModels for TensorFlow Serving, ONNX files, and whether they give what Keras gives.

- `keras_dsr.export.functions`: what is exported of a model, `Network`: whole runs, single steps, traces of spikes
- `keras_dsr.export.saved_model`: `export_saved_model`, versions for TensorFlow Serving
- `keras_dsr.export.tf_serving`: warm-up requests, and the files that TensorFlow Serving is started with
- `keras_dsr.export.card`: the card of an exported model
- `keras_dsr.export.verification`: `verify`, exported forms against Keras, spike by spike
- `keras_dsr.export.report`: what it finds, to print and to keep; `report_of`, what an export was verified by
- `keras_dsr.export.c_api`: `Session`, a SavedModel in the C++ session that TensorFlow Serving runs
- `keras_dsr.export.runtimes`: `OnnxRuntime` and `OpenVino`
- `keras_dsr.export.tensors`: what signatures and files say of their inputs
- `keras_dsr.export.onnx`: `export_onnx`, ONNX files in three forms
- `keras_dsr.export.exact`: `exact_copy`, networks whose sums are exact, in whatever order
- `keras_dsr.export.integer`: `integer_copy`, networks of whole numbers, with weights and currents of 8 bits
- `keras_dsr.export.folding`, `keras_dsr.export.weights`, `keras_dsr.export.passes`: what makes them fast and small

Export runs on TensorFlow. Packages that it needs beside are installed by `pip install 'keras-dsr[export]'`; OpenVINO,
which `verify` uses where it is installed, by `pip install 'keras-dsr[openvino]'`.
"""

from keras_dsr.export.c_api import Session
from keras_dsr.export.exact import Grid, exact_copy, largest_sums
from keras_dsr.export.functions import FORMS, SIGNATURES, Network, Preprocessing
from keras_dsr.export.integer import integer_copy
from keras_dsr.export.onnx import export_onnx
from keras_dsr.export.report import Report, Row, VerificationError, report_of
from keras_dsr.export.runtimes import OnnxRuntime, OpenVino
from keras_dsr.export.saved_model import export_saved_model
from keras_dsr.export.verification import verify
from keras_dsr.export.weights import quantized_copy

__all__ = [
    "FORMS",
    "SIGNATURES",
    "Grid",
    "Network",
    "OnnxRuntime",
    "OpenVino",
    "Preprocessing",
    "Report",
    "Row",
    "Session",
    "VerificationError",
    "exact_copy",
    "export_onnx",
    "export_saved_model",
    "integer_copy",
    "largest_sums",
    "quantized_copy",
    "report_of",
    "verify",
]
