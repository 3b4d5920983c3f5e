"""From training to serving: export, proof, a server, and clients that ask for a whole answer or step by step.

    pip install 'keras-dsr[export,serve]'
    python examples/export_and_serve.py

`keras-dsr export RUN` and `keras-dsr serve savedmodels/NAME` do the same for any run; files are left in ./savedmodels.
"""

from pathlib import Path

import keras
import numpy as np
from rich.console import Console

from keras_dsr import data, models
from keras_dsr.export import Preprocessing, export_onnx, export_saved_model, verify
from keras_dsr.layers import IFSpike
from keras_dsr.serving import Client, Server, Settings

digits = data.load("digits")
model = models.small_cnn(widths=(16, 32), neuron=IFSpike(threshold=2.0), timesteps=8)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
model.fit(np.asarray(digits.standardize(digits.train.x)), digits.train.labels, epochs=5, verbose=2)

# Clients send images as they are stored, bytes; the exported network standardises them itself.
preprocessing = Preprocessing(digits.mean, digits.std)
images, labels = digits.test.x, digits.test.labels
folder = Path("savedmodels/digits-example")
version = export_saved_model(model, folder, preprocessing=preprocessing, examples=images[:64])
onnx = export_onnx(model, folder / f"{version.name}.onnx", preprocessing=preprocessing, examples=images[:64])

# Both exports were compared with the network before they got their names. Here is the comparison again, on all images.
report = verify(model, images, saved_model=version, onnx=[onnx], preprocessing=preprocessing)
Console().print(report.table())

with Server({"digits": folder}, Settings(grpc_port=0, rest_port=0)) as server:
    with Client(server.grpc_address, "digits") as client:
        answer = client.predict(images)
        print(f"over gRPC {np.mean(answer['class'] == labels):.1%} of {len(images)} test images right")

        stream = client.stream(batch_size=len(images))
        for step in range(1, 9):
            so_far = stream.step(images)
            print(f"after {step} time steps {np.mean(so_far['class'] == labels):.1%}")
        print("the last step gives the whole answer:", np.array_equal(so_far["logits"], answer["logits"]))

    with Client(server.rest_address, "digits", transport="rest") as client:
        print("over REST:", client.predict(images[:3])["class"], "labels:", labels[:3])
