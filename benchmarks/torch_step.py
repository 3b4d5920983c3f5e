"""A training step or an inference in PyTorch, measured in this process: what `steps` starts, in the peers' interpreter.

PYTHON benchmarks/torch_step.py --task '{"network": "resnet18", "kind": "dsr", "mode": "train", "timesteps": 5,
    "batch": 8, "shape": [32, 32, 3], "repeats": 3}'
"""

from __future__ import annotations

import argparse
import json
import math
import time

from measure import timed, use_cores

CLASSES = 10


def measure(task: dict) -> dict:
    """Measures one network.

    Args:
        task: "network", "kind", "timesteps", "shape" and "widths" as in `torch_networks.build`; "mode" ("train" or
            "inference"), "batch", "repeats", "warmup"; "calls", how many are timed together, to divide by; "cores" that
            it may use; "form", the words "channels_last" and "compile", or neither; "device" and "precision"
            ("float32", "tf32", "bfloat16").

    Raises:
        RuntimeError: if what the network gives is not finite: the time of that tells nothing.
    """
    cores = use_cores(task.get("cores"))
    import torch
    import torch_networks
    from torch.nn import functional

    torch.set_num_threads(cores)
    torch_networks.flush_denormals()
    torch.manual_seed(0)
    device, precision = task.get("device", "cpu"), task.get("precision", "float32")
    form = task.get("form", "")
    layout = torch.channels_last if "channels_last" in form else torch.contiguous_format
    if device == "cuda":
        for part in (torch.backends.cuda.matmul, torch.backends.cudnn):
            part.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = True  # it tries algorithms, in the calls that are not timed

    timesteps, batch, shape = task["timesteps"], task["batch"], tuple(task["shape"])
    started = time.perf_counter()
    widths = tuple(task.get("widths", ()))
    network = torch_networks.build(task["network"], task["kind"], timesteps, shape, CLASSES, widths=widths)
    network.train(task["mode"] == "train").to(device=device, memory_format=layout)
    resets = task["kind"].startswith("sj-")
    if resets:
        from spikingjelly.activation_based import functional as spiking
    steps = timesteps if task["network"].startswith("vgg") and task["kind"] != "ann" else 1  # of frames
    x = torch.rand((steps * batch, shape[2], *shape[:2]), generator=torch.Generator().manual_seed(0))
    x = x.to(device=device, memory_format=layout)
    y = torch.arange(batch, device=device) % CLASSES
    run = torch.compile(network) if "compile" in form else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    bounded = torch_networks.thresholds(network)

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = run(x)
        if resets:
            spiking.reset_net(network)  # membrane potentials outlive a call
        return outputs

    def train():
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(forward().float(), y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for threshold in bounded:
                threshold.clamp_(min=torch_networks.LOWER_BOUND)
        return loss

    def one():
        if task["mode"] == "train":
            return train()
        with torch.inference_mode():
            return forward().sum()

    calls = task.get("calls", 1)

    def call():
        for _ in range(calls - 1):
            one()
        value = one().item()  # waits for all of them
        if not math.isfinite(value):
            raise RuntimeError(f"The loss, or the sum of the logits, is finite. Received {value}.")

    result = {"build_s": time.perf_counter() - started, **timed(call, task["repeats"], task.get("warmup", 2))}
    result |= {name: result[name] / calls for name in ("wall_s", "cpu_s")}
    if device == "cuda":
        result["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        result["device"] = torch.cuda.get_device_name()
    return {**result, "parameters": torch_networks.parameters(network), "cores": cores}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    print(json.dumps(measure(json.loads(parser.parse_args().task))))
