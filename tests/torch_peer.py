"""Runs a network of `benchmarks/torch_networks.py`, in an interpreter that has PyTorch: what test_torch_peer.py starts.

PYTHON tests/torch_peer.py FOLDER       # reads FOLDER/asked.npz, writes FOLDER/answered.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
import torch_networks


def main(folder: Path) -> None:
    """Answers with spikes in inference; logits and gradients of the loss in training; and the parameter count."""
    torch.set_num_threads(1)
    with np.load(folder / "asked.npz") as asked:
        settings = json.loads(str(asked["settings"]))
        weights = {name.removeprefix("weights/"): asked[name] for name in asked.files if name.startswith("weights/")}
        x, y = torch.from_numpy(asked["x"]), torch.from_numpy(asked["y"])
    network = torch_networks.build(**settings)
    torch_networks.load(network, weights)
    names = torch_networks.keras_names(network)
    # (batch, height, width, channels) to PyTorch's order, in the layout that the benchmark finds the fastest.
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    network = network.to(memory_format=torch.channels_last)
    answers = {"parameters": np.array(torch_networks.parameters(network))}

    def keep(name):
        def hook(module, inputs, output):
            steps = output.detach().unflatten(0, (module.timesteps, -1)).transpose(0, 1)
            answers[f"spikes/{name}"] = (steps.movedim(2, -1) if steps.dim() == 5 else steps).numpy()

        return hook

    hooks = [
        module.register_forward_hook(keep(name.replace(".", "_")))
        for name, module in network.named_modules()
        if isinstance(module, torch_networks.DSRNeuron)
    ]
    with torch.inference_mode():
        network.eval()(x)
    for hook in hooks:
        hook.remove()

    logits = network.train()(x)
    torch.nn.functional.cross_entropy(logits, y).backward()
    answers["logits"] = logits.detach().numpy()
    for own, parameter in network.named_parameters():
        answers[f"gradients/{names[own]}"] = torch_networks.to_keras(parameter.grad, names[own]).numpy()
    np.savez(folder / "answered.npz", **answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
