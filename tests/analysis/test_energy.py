"""Joules by hand, from the published figures; what they rest on is said."""

from __future__ import annotations

import dataclasses

import pytest

from keras_dsr.analysis import energy
from keras_dsr.analysis.operations import LayerOperations, NeuronOperations, Operations

STEM = LayerOperations("stem", "values", 500, 500.0, 50, 20, 100, static=True)
DENSE = LayerOperations("dense", "spikes", 1000, 700.0, 1000, 100, 10)
IF = NeuronOperations("first", 100, 400, 60.0, False)
LIF = NeuronOperations("second", 10, 40, 5.0, True)
COUNTED = Operations(8, 4, (STEM, DENSE), (IF, LIF))


def test_joules_by_hand():
    found = energy.estimate(COUNTED)
    assert found.joules == pytest.approx((500 * 4.6 + 700 * 0.9 + 400 * 0.9 + 40 * 4.6) * 1e-12)
    assert found.ann == pytest.approx(1500 * 4.6e-12)
    assert found.ann_int8 == pytest.approx(1500 * 0.3e-12)
    assert [layer.name for layer in found.layers] == ["stem", "dense", "first", "second"]
    assert all(layer.memory == 0 for layer in found.layers)
    eight = energy.estimate(COUNTED, "45nm-int8")
    assert eight.joules == pytest.approx((500 * 0.3 + 700 * 0.1 + 400 * 0.1 + 40 * (3.1 + 0.1)) * 1e-12)
    # Beside a chip, what values do is done in int8, with memory: weights, activations, and outputs once.
    stem = 500 * (0.3 + 1.25 + 1.25) + 100 * 1.25
    loihi = energy.estimate(COUNTED, "loihi")
    assert loihi.joules == pytest.approx((stem + 700 * 23.6 + 440 * 81 + 65 * 1.7) * 1e-12)
    assert energy.estimate(COUNTED, "truenorth").joules == pytest.approx((stem + 700 * 26) * 1e-12)
    assert energy.estimate(COUNTED, "odin").joules == pytest.approx((stem + 700 * 12.7) * 1e-12)


@pytest.mark.parametrize("chip", ["loihi", "truenorth", "odin"])
def test_the_ann_beside_a_chip_has_memory_in_as_the_chip_has(chip):
    found, other = energy.estimate(COUNTED, chip), energy.estimate(COUNTED, memory=True)
    assert (found.ann, found.ann_int8) == (other.ann, other.ann_int8)
    assert found.ann > energy.estimate(COUNTED).ann
    assert not found.with_memory


def test_memory_by_hand():
    # All in 8 KB (10 pJ for 64 bits, 5 pJ for 32) in float32.
    found = energy.estimate(COUNTED, memory=True)
    memory = {layer.name: layer.memory for layer in found.layers}
    assert memory == {
        # Once, as the ANN does: a weight and an activation each, and each output.
        "stem": pytest.approx((500 * (5 + 5) + 100 * 5) * 1e-12),
        "dense": pytest.approx(700 * 15e-12),
        "first": pytest.approx(800 * 5e-12),
        "second": pytest.approx(80 * 5e-12),
    }
    assert found.ann == pytest.approx((1500 * (4.6 + 5 + 5) + 110 * 5) * 1e-12)
    assert found.ann_int8 == pytest.approx((1500 * (0.3 + 1.25 + 1.25) + 110 * 1.25) * 1e-12)
    assert found.layers[0].joules == pytest.approx(found.layers[0].ann), "a static stem is the ANN's"
    # 3,000 weights of 32 bits take 12,000 bytes: the next memory; 8 bits, 3,000: the first.
    large = dataclasses.replace(COUNTED, layers=(dataclasses.replace(DENSE, weights=3000),))
    assert energy.estimate(large, memory=True).layers[0].memory == pytest.approx(700 * (10 + 2 * 5) * 1e-12)
    assert energy.estimate(large, "45nm-int8", True).layers[0].memory == pytest.approx(700 * (1.25 + 10) * 1e-12)
    for weights, each in ((2**18, 50), (2**18 + 1, 650)):  # 1 MB, and one more
        huge = dataclasses.replace(COUNTED, layers=(dataclasses.replace(DENSE, weights=weights),))
        assert energy.estimate(huge, memory=True).layers[0].memory == pytest.approx(700 * (each + 10) * 1e-12)


def test_memory_of_values_and_of_what_only_adds():
    frames = dataclasses.replace(STEM, static=False)
    pool = LayerOperations("pool", "spikes", 100, 60.0, 0, 100, 25)
    found = energy.estimate(dataclasses.replace(COUNTED, layers=(frames, pool), neurons=()), memory=True)
    assert found.layers[0].memory == pytest.approx(500 * (5 + 5 + 2 * 5) * 1e-12)
    # No weight is read, nor multiplied with: by neither network.
    assert found.layers[1].joules == pytest.approx(60 * (0.9 + 2 * 5) * 1e-12)
    assert found.layers[1].ann == pytest.approx((100 * (0.9 + 5) + 25 * 5) * 1e-12)


def test_assumptions_are_in_the_text():
    text = energy.estimate(COUNTED, memory=True).text()
    assert "| all | | " in text
    for said in (
        "mean of 8",
        "N = 4",
        "Horowitz, ISSCC 2014",
        "0.9 pJ a synaptic operation",
        "values",
        "stem",
        "1,500",
    ):
        assert said in text
    assert "With memory" in text
    assert "many times as much" in energy.estimate(COUNTED).text()
    loihi = energy.estimate(dataclasses.replace(COUNTED, uncounted=("own",)), "loihi").text()
    for said in ("Davies", "23.6 pJ", "81 pJ", "run beside it", "Not counted", "own", "have memory in", "52 pJ"):
        assert said in loihi
    assert "registers" in loihi
    for chip in ("truenorth", "odin"):
        assert "at the load at which it was measured" in energy.estimate(COUNTED, chip).text()
    mine = energy.Hardware("mine", "measured", 1e-12, 2e-12, 0.0, 0.0)
    assert "0 pJ an update of a neuron" in energy.estimate(COUNTED, mine).text()


def test_unknown_hardware_is_refused_with_a_list():
    with pytest.raises(ValueError, match=r"one of 45nm-float32, 45nm-int8, loihi, truenorth, odin.*Received 'tpu'"):
        energy.estimate(COUNTED, "tpu")
    with pytest.raises(ValueError, match=r"'loihi' have memory in already.*45nm-float32, 45nm-int8"):
        energy.estimate(COUNTED, "loihi", memory=True)


def test_hardware_of_your_own():
    mine = energy.Hardware("mine", "measured", 1e-12, 2e-12, 3e-12, 4e-12)
    assert energy.estimate(COUNTED, mine).joules == pytest.approx((1000 + 700 + 1200 + 160) * 1e-12)


def test_every_figure_has_a_source():
    for name, hardware in energy.HARDWARE.items():
        assert hardware.name == name
        assert hardware.source.split(",")[0].split()[0] in energy.__doc__
