"""Joules of a spiking network on named hardware, from its counted operations, beside the ANN of the same shape.

An estimate is a sum of published figures for single operations, and no more than that: it leaves out clocks, leakage,
control and the network between cores, unless the published figure has them in. It says on what it rests.

Sources:

- M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, Fig. 1.1.9: 45 nm, 0.9 V; 32-bit
  float addition 0.9 pJ, multiplication 3.7 pJ; whole-number multiplication of 8 bits 0.2 pJ, of 32 bits 3.1 pJ, 32-bit
  addition 0.1 pJ; 64 bits from a memory of 8 KB 10 pJ, 32 KB 20 pJ, 1 MB 100 pJ, DRAM 1.3 to 2.6 nJ.
- M. Davies et al., "Loihi: A Neuromorphic Manycore Processor with On-Chip Learning", IEEE Micro 38(1), 2018: 14 nm,
  simulated; 23.6 pJ a synaptic operation (least), 81 pJ an update of an active neuron (52 pJ of an inactive one), 1.7
  pJ a spike within its tile.
- P. A. Merolla et al., "A million spiking-neuron integrated circuit with a scalable communication network and
  interface", Science 345, 2014: 28 nm; TrueNorth, 26 pJ a synaptic event: the power of all the chip over
  its events, at 20 Hz and 128 active synapses a neuron.
- C. Frenkel et al., "A 0.086-mm2 12.7-pJ/SOP 64k-Synapse 256-Neuron Online-Learning Digital Spiking Neuromorphic
  Processor in 28-nm CMOS", IEEE TBioCAS 13(1), 2019: ODIN, 12.7 pJ a synaptic operation (least), neurons included.

With memory traffic the comparison can turn round: see E. Lemaire et al., "An Analytical Estimation of Spiking Neural
Networks Energy Efficiency", ICONIP 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from keras_dsr.analysis.operations import LayerOperations, Operations

# Largest size of a memory in bytes, and joules to read or write 64 bits of it (Horowitz 2014).
_MEMORIES = ((8 * 2**10, 10e-12), (32 * 2**10, 20e-12), (2**20, 100e-12), (float("inf"), 1.3e-9))


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What operations cost somewhere.

    Args:
        name: What it is called here.
        source: Where the figures are published.
        accumulate: Joules of an addition that a spike brings about (a SynOp).
        multiply_accumulate: Joules of a multiplication and addition; `None` for chips that have only spikes.
        update: Joules of a neuron's update at a time step, without leak.
        leaky_update: The same with leak.
        spike: Joules of a spike on its way.
        bits: Bits of a weight, of a potential and of an activation in memory; `None` for chips whose figures have
            memory in. What is published for 64 bits is scaled to these: 8 bits take an eighth.
        note: What else the figures rest on, a sentence that is printed beside them.
    """

    name: str
    source: str
    accumulate: float
    multiply_accumulate: float | None
    update: float
    leaky_update: float
    spike: float = 0.0
    bits: tuple[int, int, int] | None = None
    note: str = ""


_HOROWITZ = "Horowitz, ISSCC 2014, 45 nm, 0.9 V"

HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware("45nm-float32", _HOROWITZ, 0.9e-12, 4.6e-12, 0.9e-12, 4.6e-12, bits=(32, 32, 32)),
        # A potential has 32 bits, so what it keeps of itself is a multiplication of 32 bits.
        Hardware("45nm-int8", _HOROWITZ, 0.1e-12, 0.3e-12, 0.1e-12, 3.2e-12, bits=(8, 32, 8)),
        Hardware(
            "loihi",
            "Davies et al., IEEE Micro 2018, 14 nm, simulated",
            23.6e-12,
            None,
            81e-12,
            81e-12,
            spike=1.7e-12,
            note="23.6 pJ is the least published. Every update is charged as an active neuron's, though most neurons "
            "are inactive at most steps, which takes 52 pJ.",
        ),
        Hardware(
            "truenorth",
            "Merolla et al., Science 2014, 28 nm",
            26e-12,
            None,
            0.0,
            0.0,
            note="Neurons and all else of the chip are in that figure, which holds at the load at which it was "
            "measured: less load costs more a synaptic operation.",
        ),
        Hardware(
            "odin",
            "Frenkel et al., IEEE TBioCAS 2019, 28 nm",
            12.7e-12,
            None,
            0.0,
            0.0,
            note="Neurons are in that figure, the least published, which holds at the load at which it was measured.",
        ),
    )
}
"""Hardware by name."""


@dataclasses.dataclass(frozen=True)
class LayerEnergy:
    """Joules of a layer for a sample.

    Args:
        name: Its name.
        operations: Operations (of connections), or updates (of neurons).
        compute: Joules of these.
        memory: Joules of the memory traffic that they cause; 0 if that was not asked for, or is in `compute`.
        ann: Joules of the layer in the ANN of the same shape, in 32-bit floats; 0 for neurons.
        ann_int8: The same in whole numbers of 8 bits.
    """

    name: str
    operations: float
    compute: float
    memory: float
    ann: float
    ann_int8: float

    @property
    def joules(self) -> float:
        """Joules of the spiking network, memory included if it was asked for."""
        return self.compute + self.memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Joules of a network for a sample, and what they rest on.

    Args:
        hardware: Where the spiking network runs.
        with_memory: Whether memory traffic is counted beside operations: it was asked for.
        layers: Every layer's.
        assumptions: What the figures rest on, in sentences.
    """

    hardware: Hardware
    with_memory: bool
    layers: tuple[LayerEnergy, ...]
    assumptions: tuple[str, ...]

    @property
    def joules(self) -> float:
        """Joules of the spiking network for a sample."""
        return sum(layer.joules for layer in self.layers)

    @property
    def ann(self) -> float:
        """Joules of the ANN of the same shape in 32-bit floats, 45 nm; with memory where the spiking network's are."""
        return sum(layer.ann for layer in self.layers)

    @property
    def ann_int8(self) -> float:
        """Joules of the ANN of the same shape in whole numbers of 8 bits, 45 nm; with memory likewise."""
        return sum(layer.ann_int8 for layer in self.layers)

    def text(self) -> str:
        """The estimate as text: a table in Markdown, sums, and the assumptions."""
        lines = [
            f"| layer | operations | {self.hardware.name}, nJ | ANN, float32, nJ | ANN, int8, nJ |",
            "| --- | --- | --- | --- | --- |",
        ]
        for layer in self.layers:
            numbers = (layer.joules, layer.ann, layer.ann_int8)
            cells = " | ".join(f"{1e9 * joules:,.2f}" for joules in numbers)
            lines.append(f"| {layer.name} | {layer.operations:,.0f} | {cells} |")
        cells = " | ".join(f"{1e9 * joules:,.2f}" for joules in (self.joules, self.ann, self.ann_int8))
        lines += [f"| all | | {cells} |", "", *(f"- {sentence}" for sentence in self.assumptions)]
        return "\n".join(lines) + "\n"


def hardware_of(name: str | Hardware) -> Hardware:
    """The hardware of a name.

    Args:
        name: One of `HARDWARE`; or a `Hardware` of your own, which is given back.

    Returns:
        What operations cost there.

    Raises:
        ValueError: if there is none of that name; the error lists those that there are.
    """
    if isinstance(name, Hardware):
        return name
    if name not in HARDWARE:
        raise ValueError(f"Hardware is one of {', '.join(HARDWARE)}, or a Hardware of your own. Received {name!r}.")
    return HARDWARE[name]


def estimate(operations: Operations, hardware: str | Hardware = "45nm-float32", memory: bool = False) -> Estimate:
    """Joules of a network for a sample on some hardware, beside the ANN of the same shape at 45 nm.

    Args:
        operations: What `count_operations` counted.
        hardware: Name of `HARDWARE`, or your own.
        memory: Whether to add what reading and writing weights, potentials and activations takes, to the ANN's too.
            Beside a chip whose figures have memory in, the ANN has it in any case.

    Returns:
        Joules of each layer for a sample, and what they rest on.

    Raises:
        ValueError: if there is no such hardware, or memory is asked for where the published figures have it in.

    Example:

    >>> from keras_dsr.analysis.operations import LayerOperations, NeuronOperations
    >>> layer = LayerOperations("dense", "spikes", 1000, 2000.0, 1000, 100, 10)
    >>> counted = Operations(1, 4, (layer,), (NeuronOperations("neuron", 10, 40, 5.0, False),))
    >>> found = estimate(counted)  # 2,040 additions of 0.9 pJ against 1,000 multiplications and additions of 4.6 pJ
    >>> round(found.joules * 1e12), round(found.ann * 1e12), round(found.ann_int8 * 1e12)
    (1836, 4600, 300)
    """
    chip = hardware_of(hardware)
    if memory and chip.bits is None:
        raise ValueError(
            f"The published figures of {chip.name!r} have memory in already. Leave memory out, or take one of "
            f"{', '.join(name for name, each in HARDWARE.items() if each.bits is not None)}."
        )
    # Beside a chip's figures, which have memory in, so must be what runs elsewhere.
    all_of_it = memory or chip.bits is None
    rows = []
    for layer in operations.layers:
        # Values are nothing for a chip that has only spikes.
        place = HARDWARE["45nm-int8"] if layer.fed_by == "values" and chip.multiply_accumulate is None else chip
        compute = layer.operations * _each(layer, place)
        rows.append(
            LayerEnergy(
                name=layer.name,
                operations=layer.operations,
                compute=compute,
                memory=_of_operations(layer, place) if all_of_it and place.bits is not None else 0.0,
                ann=_of_ann(layer, HARDWARE["45nm-float32"], all_of_it),
                ann_int8=_of_ann(layer, HARDWARE["45nm-int8"], all_of_it),
            )
        )
    for neuron in operations.neurons:
        each = chip.leaky_update if neuron.leaky else chip.update
        compute = neuron.updates * each + neuron.spikes * chip.spike
        potentials = 2 * neuron.updates * _access(chip.bits[1], neuron.neurons) if memory else 0.0
        rows.append(LayerEnergy(neuron.name, float(neuron.updates), compute, potentials, 0.0, 0.0))
    return Estimate(chip, memory, tuple(rows), tuple(_assumptions(operations, chip, memory)))


def _each(layer: LayerOperations, chip: Hardware) -> float:
    """An operation: an addition of a spike's weight, or a multiplication and addition, of which pools only add."""
    return chip.accumulate if layer.fed_by == "spikes" or not layer.weights else chip.multiply_accumulate


def _of_operations(layer: LayerOperations, chip: Hardware) -> float:
    """Memory: of each operation a weight is read, and a value, and what it is added to is read and written."""
    if layer.static:  # what runs once does as the ANN does
        return _of_connections(layer, chip)
    weight, potential, activation = chip.bits
    each = 2 * _access(potential, layer.outputs)
    if layer.weights:
        each += _access(weight, layer.weights)
    if layer.fed_by == "values":
        each += _access(activation, layer.inputs)
    return layer.operations * each


def _of_connections(layer: LayerOperations, chip: Hardware) -> float:
    """Memory: of each connection a weight and an activation are read; each output is written, once it is summed up."""
    weight, _, activation = chip.bits
    each = _access(activation, layer.inputs) + (_access(weight, layer.weights) if layer.weights else 0.0)
    return layer.connections * each + layer.outputs * _access(activation, layer.outputs)


def _of_ann(layer: LayerOperations, chip: Hardware, memory: bool) -> float:
    compute = layer.connections * (chip.multiply_accumulate if layer.weights else chip.accumulate)
    return compute + (_of_connections(layer, chip) if memory else 0.0)


def _access(bits: int, count: int) -> float:
    """Joules to read or write one of `count` numbers of so many bits, in the smallest memory that holds them all.

    What is published is of 64 bits, and scaled by bits / 64.
    """
    size = bits * count / 8
    return next(joules for largest, joules in _MEMORIES if size <= largest) * bits / 64


def _assumptions(operations: Operations, chip: Hardware, memory: bool) -> Iterable[str]:
    values = [layer.name for layer in operations.layers if layer.fed_by == "values"]
    yield (
        f"For one sample, the mean of {operations.samples:,}; N = {operations.timesteps} time steps; real spikes, "
        "counted; connections into padding left out; normalization folded into weights, and average pooling into the "
        "layer behind, so that each spike in a window counts fully there. Ahead of a neuron or an addition each spike "
        "that is pooled, or that a shortcut brings, is an addition."
    )
    yield (
        f"{chip.name} ({chip.source}): {_pj(chip.accumulate)} a synaptic operation, "
        + (
            f"{_pj(chip.update)} an update of a neuron ({_pj(chip.leaky_update)} with leak)"
            if chip.update or not chip.note
            else "nothing else"
        )
        + (f", {_pj(chip.spike)} a spike." if chip.spike else ".")
        + (f" {chip.note}" if chip.note else "")
    )
    if values and chip.multiply_accumulate is not None:
        yield f"Fed by values, not spikes, at {_pj(chip.multiply_accumulate)} an operation: {', '.join(values)}."
    elif values:
        yield (
            f"{chip.name} has only spikes, so layers that are fed by values ({', '.join(values)}) run beside it, at "
            f"45nm-int8's {_pj(HARDWARE['45nm-int8'].multiply_accumulate)} an operation and with memory; they are in "
            "the sum."
        )
    if operations.uncounted:
        yield f"Not counted, as it is not known what they do: {', '.join(operations.uncounted)}."
    yield (
        f"The ANN of the same shape runs once, all {operations.macs:,} connections, zeros too, at 4.6 pJ each in "
        f"float32 and 0.3 pJ in int8 ({_HOROWITZ}); its activation functions, and pools that are folded here, cost "
        "nothing."
    )
    told = (
        "Each connection of the ANN reads a weight and an activation, its sums stay in registers, and each output is "
        "written once. Each number is in the smallest memory that holds all of its layer's: 10 pJ for 64 bits from "
        f"8 KB, 20 pJ from 32 KB, 100 pJ from 1 MB, else 1.3 nJ from DRAM, less for fewer bits in proportion "
        f"({_HOROWITZ})."
    )
    if memory:
        yield (
            "With memory: each operation of the spiking network reads a weight, and a value where it is fed by values, "
            "and reads and writes the potential that it is added to, as spikes come one by one; each update reads and "
            "writes a potential; a layer on a static input runs once, as the ANN's does. What only adds reads no "
            f"weight. {told}"
        )
    elif chip.bits is not None:
        yield "Without memory traffic, which takes many times as much as the operations."
    else:
        yield f"The published figures have memory in, so the ANN has it too. {told}"
    yield "Left out: leakage, clocks, control, the network between cores, and input and output."


def _pj(joules: float) -> str:
    return f"{joules * 1e12:g} pJ"
