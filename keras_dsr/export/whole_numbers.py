"""ONNX graphs in which convolutions of spikes are computed in whole numbers.

The converter writes a network of whole numbers (`keras_dsr.export.integer`) in float32, all of whose sums are exact.
`compute_in_integers` rewrites it for the units that processors have for whole numbers:

- a Conv of spikes, with what makes 8 bits of its sums, becomes a QLinearConv of uint8 spikes and int8 weights;
- what neurons do in each step is done to the part of a tensor that is the step's, before its 8 bits become floats;
- spikes that go past a convolution are multiplied by what is left of the operations on them.

None of this changes a number. Processors without VNNI add up pairs of products in 16 bits: those of spikes, which are 0
or 1, or means over few places, and weights stay below them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_dsr.export.passes import alive, captured, keep_used_initializers, replace

INTEGER_CONVOLUTIONS = "integer_convolutions"
"""In a file's metadata, behind `keras_dsr.`: how many convolutions are computed in whole numbers."""

_ZERO_POINT = 128
_PER_ELEMENT = {"Add", "Cast", "Max", "Min", "Mul", "Round", "Sub"}
# Each number of the output is one of the input, or 0.
_MOVES = {"Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def compute_in_integers(model: Any) -> int:
    """Rewrites a graph as this module says.

    Args:
        model: An ONNX ModelProto, changed in place. Its loops, if it has some, stay as they are, with what is behind
            them.

    Returns:
        How many convolutions are computed in whole numbers now.
    """
    graph = _Graph(model)
    number = 0
    for node in list(graph.nodes):
        number += node.op_type == "Conv" and graph.quantize(node)
    if number:
        graph.shorten_spikes()
        graph.split_early()
        graph.shorten_spikes()
        graph.write()
    return number


@dataclasses.dataclass(frozen=True)
class _Spikes:
    """A tensor of spikes, or of means over places of them: whole numbers from 0 to 127, in units.

    Args:
        unit: What 1 is worth.
        fired: The bool tensor that they are made of; `None` if they are means.
        most: The largest, in units.
    """

    unit: float
    fired: str | None
    most: float


class _Graph:
    """A graph whose nodes may be added in any order."""

    def __init__(self, model: Any) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self.model = model
        self.helper, self.numpy_helper, self.types = helper, numpy_helper, TensorProto
        self.nodes = list(model.graph.node)
        self.constants = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
        self.outputs = [each.name for each in model.graph.output]
        self.fixed = {*self.outputs, *captured(model.graph)}
        self._bytes: dict[str, str] = {}
        self._number = 0
        self._index()

    def _index(self) -> None:
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)

    def add(
        self, kind: str, inputs: Iterable[str], output: str | None = None, outputs: int = 1, **settings: Any
    ) -> Any:
        """A new node's output, or outputs if there are more."""
        self._number += 1
        name = f"whole_numbers_{self._number}"
        names = [output] if output else [f"{name}_{i}" for i in range(outputs)] if outputs > 1 else [name]
        node = self.helper.make_node(kind, list(inputs), names, name=name, **settings)
        self.nodes.append(node)
        for each in names:
            self.producers[each] = node
        for each in dict.fromkeys(node.input):
            self.users.setdefault(each, []).append(node)
        return names if outputs > 1 else names[0]

    def constant(self, value: Any) -> str:
        """The name of a new initializer."""
        self._number += 1
        name = f"whole_numbers_{self._number}"
        self.constants[name] = np.asarray(value)
        self.model.graph.initializer.append(self.numpy_helper.from_array(self.constants[name], name))
        return name

    def remove(self, node: Any) -> None:
        self.nodes = [each for each in self.nodes if each is not node]
        for name in dict.fromkeys(node.input):
            self.users[name] = [each for each in self.users[name] if each is not node]

    def write(self) -> None:
        """Puts the nodes into the graph, each behind those that it needs."""
        there = set(self.constants) | {each.name for each in self.model.graph.input} | {""}
        waiting, placed = list(self.nodes), []
        while waiting:
            ready = [node for node in waiting if _outer_inputs(node) <= there]
            if not ready:
                raise RuntimeError("The graph of whole numbers has a circle.")
            placed += ready
            there |= {name for node in ready for name in node.output}
            taken = {id(node) for node in ready}
            waiting = [node for node in waiting if id(node) not in taken]
        graph = self.model.graph
        replace(graph.node, alive(placed, self.outputs))
        del graph.value_info[:]
        keep_used_initializers(graph)

    def quantize(self, convolution: Any) -> bool:
        """Puts a QLinearConv in the place of a convolution and of what makes 8 bits of it, if that is what it is."""
        weights = self.constants.get(convolution.input[1])
        chain = self._requantized(convolution.output[0])
        spikes = self.spikes(convolution.input[0])
        if weights is None or chain is None or spikes is None:
            return False
        scale, last = chain
        bias = self.constants.get(convolution.input[2]) if len(convolution.input) > 2 else np.zeros(len(weights))
        if bias is None or (scale := _by_channel(scale, weights)) is None:
            return False
        whole = weights.astype("float64") * spikes.unit
        if not (_are_whole(whole, 127) and _are_whole(bias, 2**23) and (scale > 0).all()):
            return False
        one, zero = self.constant(np.float32(1)), self.constant(np.uint8(0))
        middle = self.constant(np.uint8(_ZERO_POINT))
        settings = {each.name: self.helper.get_attribute_value(each) for each in convolution.attribute}
        made = self.add(
            "QLinearConv",
            [
                self.bytes_of(convolution.input[0], spikes),
                one,
                zero,
                self.constant(whole.astype("int8")),
                self.constant(scale),
                self.constant(np.int8(0)),
                one,
                middle,
                self.constant(bias.astype("int32")),
            ],
            **settings,
        )
        floats = self.add("Cast", [made], to=self.types.FLOAT)
        self.remove(last)
        self.add("Sub", [floats, self.constant(np.float32(_ZERO_POINT))], last.output[0])
        return True

    def _requantized(self, name: str) -> tuple[np.ndarray, Any] | None:
        """The scale of the operations that make 8 bits of a tensor, and the last of these nodes."""
        found = []
        for kind, accepts in (
            ("Max", lambda x: x.max() < -(2.0**30)),
            ("Mul", lambda x: True),
            ("Min", lambda x: (x == 127).all()),
            ("Max", lambda x: (x == -128).all()),
        ):
            step = self._only_user(name, kind)
            constant = None if step is None or len(step.input) != 2 else self._constant_of(step)
            if constant is None or not accepts(constant):
                return None
            found.append(constant)
            name = step.output[0]
        last = self._only_user(name, "Round")
        return None if last is None else (found[1], last)

    def _only_user(self, name: str, kind: str) -> Any:
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and users[0].op_type == kind and name not in self.fixed else None

    def _constant_of(self, node: Any) -> np.ndarray | None:
        """The constant that a node takes, if it is of float32; networks of whole numbers have no others."""
        found = next((self.constants[name] for name in node.input if name in self.constants), None)
        return found if found is not None and found.dtype == np.float32 else None

    def spikes(self, name: str) -> _Spikes | None:
        """What spikes a float tensor is made of; `None` if of something else."""
        node = self.producers.get(name)
        if node is None:
            return None
        source = node.input[0]
        if node.op_type == "Cast":
            before = self.producers.get(source)
            binary = before is not None and before.op_type in ("Greater", "GreaterOrEqual", "Less")
            return _Spikes(1.0, source, 1.0) if binary else None
        if node.op_type in ("Mul", "Add"):
            constant = self._constant_of(node)
            source = next((each for each in node.input if each not in self.constants), None)
            found = None if source is None or constant is None or constant.size != 1 else self.spikes(source)
            number = None if found is None else float(constant.reshape(-1)[0])
            if node.op_type == "Add":
                return found if number == 0 else None
            return dataclasses.replace(found, unit=found.unit * number) if found and number > 0 else None
        if node.op_type == "Concat":
            parts = [self.spikes(each) for each in node.input]
            same = all(each is not None and each.unit == parts[0].unit for each in parts)
            return dataclasses.replace(parts[0], fired=None, most=max(each.most for each in parts)) if same else None
        if node.op_type == "AveragePool":
            settings = {each.name: self.helper.get_attribute_value(each) for each in node.attribute}
            places = int(np.prod(settings["kernel_shape"]))
            padded = any(settings.get("pads", ())) or settings.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
            uneven = padded or settings.get("ceil_mode", 0) or places & (places - 1)
            found = None if uneven else self.spikes(source)
            if found is None or found.most * places > 127 or math.frexp(found.unit)[0] != 0.5:
                return None
            return _Spikes(found.unit / places, None, found.most * places)
        if node.op_type in _MOVES:
            if node.op_type == "Pad" and not self._pads_zeros(node):
                return None
            found = self.spikes(source)
            return None if found is None else dataclasses.replace(found, fired=None)
        return None

    def _pads_zeros(self, node: Any) -> bool:
        settings = {each.name: self.helper.get_attribute_value(each) for each in node.attribute}
        if len(node.input) > 3 and node.input[3]:  # of some axes only
            return False
        value = self.constants.get(node.input[2], np.ones(1)) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        return settings.get("mode", b"constant") == b"constant" and not value.any()

    def bytes_of(self, name: str, spikes: _Spikes) -> str:
        """The same tensor in units, as uint8."""
        if name in self._bytes:
            return self._bytes[name]
        node = self.producers[name]
        byte = self.types.UINT8
        if node.op_type == "Cast":
            made = self.add("Cast", [node.input[0]], to=byte)
        elif node.op_type in ("Mul", "Add"):
            source = next(each for each in node.input if each not in self.constants)
            made = self.bytes_of(source, self.spikes(source))
        elif node.op_type == "AveragePool":
            units = self.add("Mul", [name, self.constant(np.float32(1 / spikes.unit))])
            made = self.add("Cast", [units], to=byte)
        else:
            sources = node.input if node.op_type == "Concat" else node.input[:1]
            inputs = [self.bytes_of(each, self.spikes(each)) for each in sources]
            if node.op_type == "Pad":
                inputs += [node.input[1], *([self.constant(np.uint8(0))] if len(node.input) > 2 else [])]
            elif node.op_type != "Concat":
                inputs += list(node.input[1:])
            settings = {each.name: self.helper.get_attribute_value(each) for each in node.attribute}
            made = self.add(node.op_type, inputs, **settings)
        self._bytes[name] = made
        return made

    def shorten_spikes(self) -> None:
        """One multiplication for what makes 8 bits of spikes that go past a convolution."""
        for first in list(self.nodes):
            if first.op_type != "Max" or first.input[0] in self.constants:
                continue
            source = first.input[0]
            spikes = self.spikes(source)
            if spikes is None or spikes.fired is None or (constant := self._constant_of(first)) is None:
                continue
            if constant.max() >= -(2.0**30) or (chain := self._requantized_from(first)) is None:
                continue
            scale, last = chain
            # As the operations compute it; of no spike they make 0.
            worth = np.rint(np.clip(np.float32(spikes.unit) * scale, -128, 127)).astype("float32")
            floats = self.add("Cast", [spikes.fired], to=self.types.FLOAT)
            self.remove(last)
            self.add("Mul", [floats, self.constant(worth)], last.output[0])

    def _requantized_from(self, first: Any) -> tuple[np.ndarray, Any] | None:
        """As `_requantized`, from the first of its nodes."""
        name = f"{first.output[0]}__before"
        self.users[name] = [first]
        found = self._requantized(name)
        del self.users[name]
        return found

    def split_early(self) -> None:
        """Splits into time steps ahead of what is done to each element: what is split last is 8 bits, or not at all."""
        changed = True
        while changed:
            changed = False
            for split in [node for node in self.nodes if node.op_type == "Split"]:
                axis = next((each.i for each in split.attribute if each.name == "axis"), 0)
                source = split.input[0]
                node = self.producers.get(source)
                if axis != 0 or node is None or source in self.fixed or self.fixed.intersection(split.output):
                    continue
                if node.op_type == "Concat" and len(node.input) == len(split.output) and self._joins_steps(node):
                    self.remove(split)
                    for part, output in zip(node.input, split.output, strict=True):
                        self._rename(output, part)
                    changed = True
                elif node.op_type in _PER_ELEMENT and len(self.users[source]) == 1 and self._splittable(node):
                    self._split_inputs(node, split)
                    changed = True

    def _joins_steps(self, node: Any) -> bool:
        """Whether parts are the spikes of one neuron layer in each step, which are of one size."""
        by_batch = all(each.name != "axis" or each.i == 0 for each in node.attribute)
        return by_batch and all(self.spikes(part) is not None for part in node.input)

    def _splittable(self, node: Any) -> bool:
        """Whether all that is not constant has the batch as its first axis, as constants with another would not."""
        return all(
            name not in self.constants
            or self.constants[name].ndim == 0
            or self.constants[name].shape[0] == 1
            or self.constants[name].ndim == 1
            for name in node.input
        )

    def _split_inputs(self, node: Any, split: Any) -> None:
        count = len(split.output)
        settings = {each.name: self.helper.get_attribute_value(each) for each in split.attribute}
        sizes = list(split.input[1:])
        self.remove(split)
        self.remove(node)
        parts = {
            name: self.add("Split", [name, *sizes], outputs=count, **settings)
            for name in dict.fromkeys(node.input)
            if name not in self.constants
        }
        own = {each.name: self.helper.get_attribute_value(each) for each in node.attribute}
        for index, output in enumerate(split.output):
            self.add(
                node.op_type, [parts[name][index] if name in parts else name for name in node.input], output, **own
            )

    def _rename(self, old: str, new: str) -> None:
        """Has all that takes one tensor take another."""
        for node in self.users.pop(old, []):
            node.input[:] = [new if name == old else name for name in node.input]
            self.users.setdefault(new, []).append(node)


def _by_channel(constant: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
    """What a convolution's output is multiplied with, (channels,); `None` if not by its channels, the second axis."""
    shape = (1,) * (weights.ndim - constant.ndim) + constant.shape
    if len(shape) != weights.ndim or any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    if shape[1] not in (1, len(weights)):
        return None
    return np.broadcast_to(constant.reshape(-1), len(weights)).astype("float32")


def _are_whole(values: np.ndarray, most: float) -> bool:
    return bool((np.abs(values) <= most).all() and (values == np.rint(values)).all())


def _outer_inputs(node: Any) -> set[str]:
    """What a node takes of the graph around it, graphs within it included."""
    found = set(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = {name for each in attribute.g.node for name in each.output}
            inner |= {each.name for each in attribute.g.input} | {each.name for each in attribute.g.initializer}
            for each in attribute.g.node:
                found |= _outer_inputs(each) - inner
            found |= {each.name for each in attribute.g.output} - inner
    return found
