"""What is done to an ONNX graph between its conversion and its file: layout, loops, spikes set aside.

ONNX computes convolutions channels first, TensorFlow channels last, and the converter leaves Transpose nodes around
what it does not know to be element by element, such as comparisons. `sink_transposes` moves them on until they cancel.
`scan_neurons` makes of the converter's loops over time such that every runtime takes.

What only makes spikes readable, (batch, time, ...) with channels last, would cost time in every run, as runtimes
compute nodes that nothing needs, too. So `set_aside` takes these nodes out of the graph and keeps them in the file's
metadata, where `with_spikes` finds them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

SPIKES = "spikes/"
"""What the names of tensors with spikes begin with."""

LOOP = "neurons_over_time"
"""What the names of loops over time steps begin with."""

_TRACE = "keras_dsr.trace"
# Operators that do the same to each element, or to pairs of them.
_ELEMENTWISE = {
    "Add",
    "Cast",
    "Div",
    "Greater",
    "GreaterOrEqual",
    "Identity",
    "Less",
    "Max",
    "Min",
    "Mul",
    "Relu",
    "Round",
    "Sub",
}


def metadata_of(model: Any) -> dict[str, str]:
    """What an ONNX ModelProto has in its metadata."""
    return {entry.key: entry.value for entry in model.metadata_props}


def set_aside(model: Any, layers: Sequence[str]) -> None:
    """Takes the outputs `spikes/LAYER` from a model's graph, and nodes that only they need into its metadata.

    Args:
        model: An ONNX ModelProto, changed in place.
        layers: Names of the neuron layers; they go into the metadata too.
    """
    import onnx

    graph, spikes = model.graph, {f"{SPIKES}{layer}" for layer in layers}
    kept = [each for each in graph.output if each.name not in spikes]
    used = _needed(graph.node, [each.name for each in kept])
    aside = _needed(graph.node, spikes) - used
    trace = onnx.GraphProto()
    trace.output.extend(each for each in graph.output if each.name in spikes)
    trace.node.extend(node for index, node in enumerate(graph.node) if index in aside)
    wanted = _inputs(trace.node)
    trace.initializer.extend(x for x in graph.initializer if x.name in wanted)
    replace(graph.output, kept)
    replace(graph.node, [node for index, node in enumerate(graph.node) if index in used])
    keep_used_initializers(graph)
    there = {x.name for x in graph.initializer}
    replace(trace.initializer, [x for x in trace.initializer if x.name not in there])
    model.metadata_props.add(key="keras_dsr.neurons", value=json.dumps(list(layers)))
    model.metadata_props.add(key=_TRACE, value=base64.b64encode(trace.SerializeToString()).decode("ascii"))


def with_spikes(model: Any) -> Any:
    """A copy of a model with `spikes/LAYER` of each neuron layer as outputs, (batch, time, ...).

    In the form "step" they are (batch, ...).

    Args:
        model: An ONNX ModelProto that `keras_dsr.export.export_onnx` wrote.

    Raises:
        ValueError: if it is not such a model.
    """
    import onnx

    trace = metadata_of(model).get(_TRACE)
    if trace is None:
        raise ValueError(
            f"The ONNX model does not say in its metadata ({_TRACE}) how its spikes are made: it was not written by "
            "keras_dsr.export."
        )
    trace = onnx.GraphProto.FromString(base64.b64decode(trace))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.node.extend(trace.node)
    copy.graph.initializer.extend(trace.initializer)
    copy.graph.output.extend(trace.output)
    return copy


def scan_neurons(model: Any) -> None:
    """Makes Scan nodes of the loops over time that neurons are converted to.

    A Loop takes the current of its step from the whole by a counter, and carries along the counter and a condition; a
    Scan is handed the current, and its body is the neuron alone.

    Args:
        model: An ONNX ModelProto, changed in place.
    """
    from onnx import helper

    graph = model.graph
    nodes = []
    loops = {node.name for node in graph.node if node.op_type == "Loop" and LOOP in node.name}
    kinds = _kinds(model) if loops else {}
    for node in graph.node:
        if node.name not in loops:
            nodes.append(node)
            continue
        body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
        carried = [each.name for each in body.input][2:]
        after = [each.name for each in body.output][1:]
        within = {name for each in body.node for name in each.output} | {*carried, *(x.name for x in body.initializer)}
        # What is gathered from a tensor outside is the current of the step.
        sources = [each for each in body.node if each.op_type == "Gather" and each.input[0] not in within]
        inner = [each for each in body.node if each.op_type != "Gather" or each.input[0] in within]
        wanted = set(after[len(carried) :])
        states: list[int] = []
        while True:
            used = _needed(inner, wanted)
            found = _inputs(each for index, each in enumerate(inner) if index in used) | wanted
            new = [index for index, name in enumerate(carried) if name in found and index not in states]
            if not new:
                break
            states += new
            wanted |= {after[index] for index in new}
        states.sort()
        types = {each.name: each.type for each in (*body.input, *body.output, *body.value_info)}
        types |= {each.output[0]: helper.make_tensor_type_proto(kinds[each.input[0]], None) for each in sources}
        outputs = [*(after[index] for index in states), *after[len(carried) :]]
        inputs = [*(carried[index] for index in states), *(each.output[0] for each in sources)]
        scan = helper.make_graph(
            [each for index, each in enumerate(inner) if index in used],
            body.name,
            [helper.make_value_info(name, types[name]) for name in inputs],
            [helper.make_value_info(name, types[name]) for name in outputs],
            [x for x in body.initializer if x.name in found],
        )
        nodes.append(
            helper.make_node(
                "Scan",
                [*(node.input[2 + index] for index in states), *(each.input[0] for each in sources)],
                [*(node.output[index] for index in states), *node.output[len(carried) :]],
                name=node.name,
                body=scan,
                num_scan_inputs=len(sources),
            )
        )
    replace(graph.node, nodes)
    replace(graph.node, alive(list(graph.node), [each.name for each in graph.output]))
    keep_used_initializers(graph)


def _kinds(model: Any) -> dict[str, int]:
    """The type of the elements of each tensor, as ONNX numbers types: the converter does not say it."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {
        **{each.name: each.type.tensor_type.elem_type for each in values},
        **{each.name: each.data_type for each in graph.initializer},
    }


def sink_transposes(model: Any) -> None:
    """Moves Transpose nodes behind what is element by element, and removes pairs that cancel."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    fixed = {each.name for each in graph.output} | captured(graph)
    nodes = list(graph.node)
    number = 0
    changed = True
    while changed:
        changed = False
        perms = {node.output[0]: (_perm(node), node.input[0]) for node in nodes if node.op_type == "Transpose"}
        result: list[Any] = []
        renamed: dict[str, str] = {}

        def source_of(name: str, perms: Any = perms, renamed: Any = renamed) -> str:
            source = perms[name][1]
            return renamed.get(source, source)

        for node in nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            perm = _common_perm(node, perms, constants)
            if perm is None or any(name in fixed for name in node.output):
                result.append(node)
                continue
            changed = True
            if node.op_type == "Transpose":
                # Undoes the one before it, or makes one with it.
                source = source_of(node.input[0])
                both = [perms[node.input[0]][0][axis] for axis in perm]
                if both == sorted(both):
                    renamed[node.output[0]] = source
                    continue
                result.append(helper.make_node("Transpose", [source], list(node.output), name=node.name, perm=both))
                continue
            for index, name in enumerate(node.input):
                if name in perms:
                    node.input[index] = source_of(name)
                elif node.op_type in _ELEMENTWISE and constants[name].size > 1:
                    number += 1
                    node.input[index] = f"{name}__moved_{number}"
                    value = constants[name].reshape((1,) * (len(perm) - constants[name].ndim) + constants[name].shape)
                    constants[node.input[index]] = np.ascontiguousarray(value.transpose(np.argsort(perm)))
                    graph.initializer.append(numpy_helper.from_array(constants[node.input[index]], node.input[index]))
            if node.op_type in ("Concat", "Split"):
                next(each for each in node.attribute if each.name == "axis").i = perm[_axis(node)]
            result.append(node)
            for index, name in enumerate(node.output):
                number += 1
                moved = f"{name}__moved_{number}"
                node.output[index] = moved
                result.append(helper.make_node("Transpose", [moved], [name], name=f"sunk_{number}", perm=perm))
        nodes = result
        replace(graph.node, alive(nodes, fixed))
        nodes = list(graph.node)
    del graph.value_info[:]
    keep_used_initializers(graph)


def _common_perm(
    node: Any, perms: dict[str, tuple[list[int], str]], constants: dict[str, np.ndarray]
) -> list[int] | None:
    """The permutation that all inputs of a node have gone through, if it may as well come after the node."""
    if node.op_type == "Transpose":
        return _perm(node) if node.input[0] in perms else None
    if node.op_type in ("Concat", "Split"):
        names = node.input[:1] if node.op_type == "Split" else node.input
        if _axis(node) < 0:
            return None
    elif node.op_type in _ELEMENTWISE:
        names = [name for name in node.input if name not in constants]
    else:
        return None
    found = [perms[name][0] for name in names if name in perms]
    if not found or len(found) != len(names) or any(each != found[0] for each in found):
        return None
    if any(constants[name].ndim > len(found[0]) for name in node.input if name in constants):
        return None
    return found[0]


def _axis(node: Any) -> int:
    return next((each.i for each in node.attribute if each.name == "axis"), -1)


def _perm(node: Any) -> list[int]:
    return list(next(each.ints for each in node.attribute if each.name == "perm"))


def alive(nodes: Sequence[Any], outputs: Iterable[str]) -> list[Any]:
    """Those nodes, in an order in which they can run, that the outputs need."""
    used = _needed(nodes, outputs)
    return [node for index, node in enumerate(nodes) if index in used]


def _needed(nodes: Sequence[Any], outputs: Iterable[str]) -> set[int]:
    """The places of the nodes that the outputs need."""
    wanted = set(outputs)
    found = set()
    for index in reversed(range(len(nodes))):  # they stand in an order in which they can run
        if wanted.intersection(nodes[index].output):
            found.add(index)
            wanted |= _inputs([nodes[index]])
    return found


def _inputs(nodes: Iterable[Any]) -> set[str]:
    """All that nodes take, the graphs within them included."""
    found = set()
    for node in nodes:
        found.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _inputs(attribute.g.node)
                found.update(each.name for each in attribute.g.output)
    return found


def captured(graph: Any) -> set[str]:
    """What graphs within nodes may take from the graph around them."""
    found = set()
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _inputs(attribute.g.node) | {each.name for each in attribute.g.output}
    return found


def keep_used_initializers(graph: Any) -> None:
    """Removes the constants of a graph that nothing takes."""
    wanted = _inputs(graph.node) | {each.name for each in graph.output}
    replace(graph.initializer, [x for x in graph.initializer if x.name in wanted])


def replace(repeated: Any, values: Sequence[Any]) -> None:
    """Other values in a repeated field, which may be some of its own."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del repeated[:]
    repeated.extend(copies)
