"""The networks of `keras_dsr.models` in plain PyTorch, for the libraries that they are compared with.

Four kinds of the same network, layer for layer and parameter for parameter:

- "dsr": IF neurons that train by differentiation on spike representation, with a gradient at every time step. Written
  for these benchmarks from the paper's equations.
- "sj-bptt": SpikingJelly's `IFNode`, reset by subtraction, backpropagation through time with its default threshold and
  surrogate.
- "sj-dsr": SpikingJelly's `DSRIFNode`.
- "ann": ReLU, and no time steps.

Between layers, time and batch are folded into one axis, time first: (time * batch, channels, ...), as SpikingJelly's
layers in multi-step mode fold them. What comes before the first neuron sees the image once, as in `keras_dsr`.
Parameters have the names that the Keras networks have: `stage1_block1.conv1.weight` is `stage1_block1_conv1/kernel`.

Reference: Meng et al., CVPR 2022, Eqs. 4, 15 to 17, 19, 20 and 31.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

KINDS = ("dsr", "sj-bptt", "sj-dsr", "ann")
# Initial thresholds. The paper's, for its neurons; what `IFNode` has by default, for backpropagation through time: its
# surrogate is about as wide as that, and ends the gradients of potentials that are far from a threshold of 6.
THRESHOLDS = {"dsr": 6.0, "sj-dsr": 6.0, "sj-bptt": 1.0}
# As in `keras_dsr.models`, which an interpreter with PyTorch need not have.
STAGES = {
    18: ((2, 2, 2, 2), (64, 128, 256, 512)),
    **{6 * blocks + 2: ((blocks,) * 3, (16, 32, 64)) for blocks in (3, 5, 7, 9, 18)},
}
GROUPS = {11: ((64,), (128,), (256, 256), (512, 512), (512, 512))}
ALPHA, LOWER_BOUND = 0.5, 0.01


def flush_denormals() -> None:
    """Lets the processor take numbers below float32's normal range for 0, as TensorFlow does.

    Such numbers take it many times as long, and vanishing gradients are full of them. Threads get this from the one
    that starts them: call it ahead of all work.
    """
    torch.set_flush_denormal(True)


def _steps(like: Tensor, timesteps: int) -> Tensor:
    """Room for (time, *like.shape), each step laid out in memory as `like` is: channels last stay last, uncopied."""
    if like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        batch, channels, height, width = like.shape
        return like.new_empty((timesteps, batch, height, width, channels)).permute(0, 1, 4, 2, 3)
    return like.new_empty((timesteps, *like.shape))


def simulate(current: Tensor, threshold: Tensor, alpha: float, timesteps: int, static: bool) -> Tensor:
    """IF neurons: currents (time, batch, ...), or (batch, ...) where they are the same at every step, to spikes."""
    first = current if static else current[0]
    potential = torch.zeros_like(first, dtype=torch.float32)  # in half precision, too
    outputs = _steps(first, timesteps)
    for n in range(timesteps):
        potential += current if static else current[n]  # Eq. 4
        torch.mul(threshold, potential >= alpha * threshold, out=outputs[n])  # Eq. 20
        potential -= outputs[n]
    return outputs


class _Fire(torch.autograd.Function):
    """Simulates IF neurons; differentiates the clamp that their representation follows."""

    @staticmethod
    def forward(ctx, current: Tensor, threshold: Tensor, alpha: float, timesteps: int, static: bool) -> Tensor:
        outputs = simulate(current, threshold, alpha, timesteps, static)
        ctx.save_for_backward(current if static else current.mean(dim=0), threshold)
        ctx.timesteps, ctx.static = timesteps, static
        return outputs

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        representation, threshold = ctx.saved_tensors
        cotangent = cotangent.sum(dim=0)
        # Eqs. 15 to 17 and 19: the clamp's gradient, spread evenly over the steps that the mean was taken of.
        gradient = cotangent * ((representation >= 0) & (representation <= threshold))
        to_threshold = (cotangent * (representation > threshold)).sum().to(threshold.dtype)
        if not ctx.static:
            gradient = _steps(gradient, ctx.timesteps).copy_(gradient / ctx.timesteps)
        return gradient, to_threshold, None, None, None


class DSRNeuron(nn.Module):
    """IF neurons with one trainable threshold, differentiated at every time step.

    Args:
        timesteps: Number N of time steps.
        threshold: Initial V_th.
    """

    def __init__(self, timesteps: int, threshold: float) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x: Tensor, static: bool = False) -> Tensor:
        """Currents (time * batch, ...), or static ones (batch, ...), to spikes (time * batch, ...)."""
        current = x if static else x.unflatten(0, (self.timesteps, -1))
        # Without gradients nobody asks for the mean current: it is not computed.
        fire = _Fire.apply if torch.is_grad_enabled() else simulate
        return fire(current, self.threshold, ALPHA, self.timesteps, static).flatten(0, 1)


class SpikingJellyNeuron(nn.Module):
    """A neuron of SpikingJelly in multi-step mode, which runs all steps in one call.

    Args:
        kind: "sj-bptt" or "sj-dsr".
        timesteps: Number N of time steps.
        threshold: Initial V_th.
    """

    def __init__(self, kind: str, timesteps: int, threshold: float) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        self.timesteps = timesteps
        if kind == "sj-bptt":
            self.node = neuron.IFNode(threshold, v_reset=None, surrogate_function=surrogate.ATan(), step_mode="m")
        else:
            self.node = neuron.DSRIFNode(T=timesteps, v_threshold=threshold, alpha=ALPHA, step_mode="m")

    def forward(self, x: Tensor, static: bool = False) -> Tensor:
        """Currents (time * batch, ...), or static ones (batch, ...), to spikes (time * batch, ...)."""
        current = x.expand(self.timesteps, *x.shape) if static else x.unflatten(0, (self.timesteps, -1))
        return self.node(current).flatten(0, 1)


class _Activation(nn.Module):
    def forward(self, x: Tensor, static: bool = False) -> Tensor:
        return functional.relu(x)


class _Kind:
    """Makes the neurons of a network, and puts its time steps in and out."""

    def __init__(self, kind: str, timesteps: int | None) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is one of {KINDS}. Received kind={kind!r}.")
        self.kind, self.timesteps = kind, timesteps

    def neuron(self) -> nn.Module:
        if self.kind == "ann":
            return _Activation()
        if self.kind == "dsr":
            return DSRNeuron(self.timesteps, THRESHOLDS[self.kind])
        return SpikingJellyNeuron(self.kind, self.timesteps, THRESHOLDS[self.kind])

    def represent(self, x: Tensor) -> Tensor:
        return x if self.kind == "ann" else x.unflatten(0, (self.timesteps, -1)).mean(dim=0)


class _Block(nn.Module):
    def __init__(self, make: _Kind, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.neuron1 = nn.BatchNorm2d(channels), make.neuron()
        self.shortcut = nn.Conv2d(channels, width, 1, stride) if stride != 1 or channels != width else None
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1)
        self.bn2, self.neuron2 = nn.BatchNorm2d(width), make.neuron()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, static: bool) -> Tensor:
        x = self.neuron1(self.bn1(x), static)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(self.neuron2(self.bn2(self.conv1(x)))) + shortcut


class PreActResNet(nn.Module):
    """`keras_dsr.models.preact_resnet`, from images (batch, channels, height, width)."""

    def __init__(self, depth: int, make: _Kind, classes: int, channels: int) -> None:
        super().__init__()
        self.make = make
        blocks, widths = STAGES[depth]
        self.stem_conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.blocks = []
        channels = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            for number in range(1, count + 1):
                block = _Block(make, channels, width, stride=2 if stage > 1 and number == 1 else 1)
                self.add_module(f"stage{stage}_block{number}", block)
                self.blocks.append(block)
                channels = width
        self.final_bn, self.final_neuron, self.pool_neuron = nn.BatchNorm2d(channels), make.neuron(), make.neuron()
        self.head_dense, self.head_bn = nn.Linear(channels, classes), nn.BatchNorm1d(classes)
        self.head_neuron = make.neuron()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_conv(x)
        for index, block in enumerate(self.blocks):
            x = block(x, static=index == 0)
        x = self.final_neuron(self.final_bn(x))
        x = self.pool_neuron(x.mean(dim=(2, 3)))
        return self.make.represent(self.head_neuron(self.head_bn(self.head_dense(x))))


class VGG(nn.Module):
    """`keras_dsr.models.vgg`, from frames (time * batch, polarities, height, width), or one image of that kind."""

    def __init__(self, depth: int, make: _Kind, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.make = make
        height, width, channels = shape
        self.order = []
        for group, widths in enumerate(GROUPS[depth], start=1):
            for index, width_ in enumerate(widths, start=1):
                for name, layer in (
                    ("conv", nn.Conv2d(channels, width_, 3, padding=1)),
                    ("bn", nn.BatchNorm2d(width_)),
                    ("neuron", make.neuron()),
                ):
                    self.add_module(f"group{group}_{index}_{name}", layer)
                    self.order.append(layer)
                channels = width_
            self.order.append(nn.AvgPool2d(2))
            height, width = height // 2, width // 2
        self.head_dense = nn.Linear(height * width * channels, classes)
        self.head_bn, self.head_neuron = nn.BatchNorm1d(classes), make.neuron()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        x = x.permute(0, 2, 3, 1).flatten(1)  # Keras' order, so that its weights fit
        return self.make.represent(self.head_neuron(self.head_bn(self.head_dense(x))))


class SmallCNN(nn.Module):
    """`keras_dsr.models.small_cnn`, from images (batch, channels, height, width)."""

    def __init__(self, widths: tuple[int, ...], make: _Kind, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.make, self.count = make, len(widths)
        height, width, channels = shape
        for index, width_ in enumerate(widths, start=1):
            self.add_module(f"conv{index}", nn.Conv2d(channels, width_, 3, padding=1, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(width_))
            self.add_module(f"neuron{index}", make.neuron())
            if index > 1:
                height, width = height // 2, width // 2
            channels = width_
        self.head_dense = nn.Linear(height * width * channels, classes)
        self.head_bn, self.head_neuron = nn.BatchNorm1d(classes), make.neuron()

    def forward(self, x: Tensor) -> Tensor:
        for index in range(1, self.count + 1):
            if index > 1:
                x = functional.avg_pool2d(x, 2)
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
            x = getattr(self, f"neuron{index}")(x, static=index == 1)
        x = x.permute(0, 2, 3, 1).flatten(1)
        return self.make.represent(self.head_neuron(self.head_bn(self.head_dense(x))))


def build(
    network: str,
    kind: str,
    timesteps: int | None,
    shape: tuple[int, int, int],
    classes: int = 10,
    widths: tuple[int, ...] = (),
) -> nn.Module:
    """A network by its name.

    Args:
        network: "resnet18", "resnet20" and so on, "vgg11", or "small_cnn".
        kind: One of `KINDS`.
        timesteps: Number N of time steps; nothing for "ann".
        shape: Height, width and channels of an image, or of a frame.
        classes: Number of classes.
        widths: Channels of the convolutions of "small_cnn".

    Raises:
        ValueError: if there is no such network or kind.
    """
    make = _Kind(kind, timesteps)
    if network == "small_cnn":
        return SmallCNN(widths, make, classes, shape)
    if network.startswith("resnet") and int(network[6:]) in STAGES:
        return PreActResNet(int(network[6:]), make, classes, shape[2])
    if network.startswith("vgg") and int(network[3:]) in GROUPS:
        return VGG(int(network[3:]), make, classes, shape)
    raise ValueError(f"network is resnetDEPTH, vggDEPTH or small_cnn. Received network={network!r}.")


def thresholds(network: nn.Module) -> list[nn.Parameter]:
    """The trainable thresholds of a network."""
    return [parameter for name, parameter in network.named_parameters() if "threshold" in name]


def parameters(network: nn.Module) -> int:
    """How many trainable numbers a network has, thresholds left out: not every kind trains them."""
    return sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in thresholds(network))


def keras_names(network: nn.Module) -> dict[str, str]:
    """For each tensor of a "dsr" or "ann" network, its Keras name: "stage1_block1_conv1/kernel"."""
    names = {}
    for owner, module in network.named_modules():
        layer = owner.replace(".", "_")
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            kinds = {"weight": "kernel", "bias": "bias"}
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        else:
            kinds = {"threshold": "threshold"} if isinstance(module, DSRNeuron) else {}
        names |= {f"{owner}.{k}": f"{layer}/{v}" for k, v in kinds.items() if getattr(module, k, None) is not None}
    return names


def to_keras(tensor: Tensor, name: str) -> Tensor:
    """A weight, or its gradient, with its axes in Keras' order."""
    if not name.endswith("/kernel"):
        return tensor
    return tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor.T


def load(network: nn.Module, weights: dict[str, object]) -> None:
    """Gives a network the weights of its Keras counterpart, NumPy arrays by Keras name.

    Raises:
        KeyError: if one is missing.
        ValueError: if one is left over, or has another shape.
    """
    names = keras_names(network)
    left = set(weights) - set(names.values())
    if left:
        raise ValueError(f"The network has nothing of the names {sorted(left)}.")
    state = network.state_dict()
    with torch.no_grad():
        for own, name in names.items():
            value = torch.from_numpy(weights[name].copy())
            if name.endswith("/kernel"):
                value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T
            if value.shape != state[own].shape:
                raise ValueError(f"{name} has shape {tuple(state[own].shape)}. Received {tuple(value.shape)}.")
            state[own].copy_(value)
