"""Trains the plain PyTorch DSR for a budget of CPU seconds: what `accuracy` starts, in the peers' interpreter."""

from __future__ import annotations

import argparse
import json

from measure import use_cores


def measure(task: dict) -> dict:
    """Trains in this process; the task is that of `accuracy.measure`."""
    cores = use_cores(task["cores"])
    import budget
    import torch
    import torch_networks
    from torch.nn import functional

    torch.set_num_threads(cores)
    torch_networks.flush_denormals()
    data, weights = budget.load(task["data"]), budget.load(task["weights"])
    x_held_out, y_held_out = budget.standardized(data["x_held_out"], data), data["y_held_out"]
    clock = budget.Clock()  # as in `accuracy`: building the network counts
    examples = budget.batches(data, task["batch"], task["seed"])
    layout = torch.channels_last if "channels_last" in task["form"] else torch.contiguous_format
    network = torch_networks.build(
        task["network"], "dsr", task["timesteps"], tuple(data["x"].shape[1:]), widths=tuple(task["widths"])
    )
    torch_networks.load(network, weights)
    network.to(memory_format=layout)
    bounded = torch_networks.thresholds(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=task["weight_decay"])

    def tensor(x):
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def step(x, y, learning_rate):
        network.train()
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(network(tensor(x)), torch.from_numpy(y).long()).backward()
        optimizer.step()
        with torch.no_grad():
            for threshold in bounded:
                threshold.clamp_(min=torch_networks.LOWER_BOUND)

    def accuracy():
        network.eval()
        right = 0
        with torch.inference_mode():
            for start in range(0, len(x_held_out), 250):
                chosen = network(tensor(x_held_out[start : start + 250])).argmax(dim=1).numpy()
                right += int((chosen == y_held_out[start : start + 250]).sum())
        return right / len(x_held_out)

    rate, every = task["learning_rate"], task["every"]
    rows = budget.train(step, accuracy, examples, clock, task["budget"], every, rate, "spikes")
    return {"rows": rows, "cores": cores}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True)
    print(json.dumps(measure(json.loads(parser.parse_args().task))))
