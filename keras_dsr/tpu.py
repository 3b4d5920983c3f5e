"""Whether training runs on TPUs, found out on a machine that has none.

`check` compiles the training step of each stage of a recipe ahead of time for the TPUs of a topology, with the
compiler that TPUs run (the package libtpu, which needs no TPU for this), as data-parallel training on JAX would compile
it. What it finds: tensors without a fixed shape; operations that the compiler refuses; the collectives by which
replicas exchange statistics and gradients, and whether any stands in a loop, as those over time steps are; time and
memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from jax.extend import core

from keras_dsr import training
from keras_dsr.files import replacing
from keras_dsr.recipes import Recipe

TOPOLOGY = "v5e:2x2"
# What data sets that have to be downloaded look like, so that a check does without them.
_SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {
    "cifar10": (10, (32, 32, 3)),
    "cifar100": (100, (32, 32, 3)),
    "imagenet2012": (1000, (224, 224, 3)),
    "imagenet": (1000, (224, 224, 3)),
}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between replicas in a compiled step.

    Args:
        kind: "all-reduce", "all-gather", ...
        shapes: What it exchanges, as XLA writes shapes.
        in_loop: Whether it stands in the body of a loop, and so runs once for each turn.
        source: The operation that it comes from, as JAX names it; several may be joined.
    """

    kind: str
    shapes: str
    in_loop: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Readiness:
    """What a compilation for TPUs came to.

    Args:
        name: What was compiled.
        topology: Name of the topology, such as "v5e:2x2".
        replicas: Number of TPU cores, over which a batch is spread.
        batch_size: Examples in a global batch.
        dynamic: What has no fixed shape, each in a line.
        refused: Operations that do not compile, each in a line with the compiler's reason.
        error: Why the step as a whole does not compile; `None` if it does.
        collectives: Exchanges between replicas.
        compile_s: Seconds of compilation.
        memory_mb: Memory that a core needs, for weights, the batch and what is computed, in MB.
    """

    name: str
    topology: str
    replicas: int
    batch_size: int
    dynamic: tuple[str, ...]
    refused: tuple[str, ...]
    error: str | None
    collectives: tuple[Collective, ...]
    compile_s: float
    memory_mb: float | None

    @property
    def ready(self) -> bool:
        """Whether all shapes are fixed, the step compiles, and no collective stands in a loop.

        With `loop="unrolled"` there is no loop to see: then a collective for each time step shows in their number.
        """
        return not self.dynamic and self.error is None and not any(each.in_loop for each in self.collectives)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many collectives of each kind there are."""
        kinds = [each.kind for each in self.collectives]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def lines(self) -> list[str]:
        """The findings in words."""
        head = f"{self.name}: batch {self.batch_size} on {self.replicas} cores of {self.topology}: "
        told = [head + ("ready" if self.ready else "not ready")]
        told += [f"  no fixed shape: {each}" for each in self.dynamic]
        if self.error is not None:
            return [*told, f"  not compiled: {self.error}", *(f"  refused: {each}" for each in self.refused)]
        told.append(f"  compiled in {self.compile_s:.1f} s, {self.memory_mb:.0f} MB a core")
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "none"
        looped = sum(each.in_loop for each in self.collectives)
        return [*told, f"  collectives a step: {kinds}; within loops over time steps: {looped}"]


def check(
    recipe: Recipe,
    *,
    topology: str = TOPOLOGY,
    classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    data_dir: Path | None = None,
) -> Iterator[Readiness]:
    """Compiles the training step of each stage of a recipe for TPUs, and says what came of it.

    Args:
        recipe: The recipe.
        topology: TPUs as `jax.experimental.topologies` names them: generation and shape, such as "v5e:2x2" for 4 cores.
        classes: Number of classes; `None` for the data set's.
        input_shape: Shape of one input; `None` for the data set's. CIFAR and ImageNet need not be at hand.
        data_dir: Where other data sets are, see `keras_dsr.data.load`.

    Returns:
        One finding a stage; each is compiled as it is asked for.

    Raises:
        ValueError: if Keras does not run on JAX, there is no such topology, or the batch cannot be spread evenly.
        ImportError: if libtpu is not installed.
        FileNotFoundError: if the data set is needed and not there.
    """
    found = None
    if (classes is None) != (input_shape is None):
        raise ValueError(
            f"Classes and input shape are given together. Received classes={classes!r}, input_shape={input_shape!r}."
        )
    mesh = _mesh(topology)
    if classes is None or input_shape is None:
        if recipe.data in _SHAPES:
            classes, input_shape = _SHAPES[recipe.data]
        else:
            found = training.load(recipe, data_dir=data_dir)
            classes, input_shape = found.classes, found.input_shape
    dynamic = []
    if found is not None:
        spec = found.training_batches(recipe.batch_size, seed=0).element_spec
        dynamic = [f"training batches, {each}" for each in spec if None in tuple(each.shape)]
    _check_batch_size(recipe.batch_size, topology, mesh)
    return (
        _check(model, f"{recipe.name}, {stage} stage", recipe.batch_size, topology, mesh, dynamic)
        for stage, model in training.stages(recipe, classes, input_shape)
    )


def check_model(model: keras.Model, batch_size: int, *, topology: str = TOPOLOGY) -> Readiness:
    """Compiles the training step of a model for TPUs, and says what came of it.

    Args:
        model: A compiled functional model with one input and integer labels.
        batch_size: Examples in a global batch.
        topology: As in `check`.

    Returns:
        What came of it.

    Raises:
        ValueError: as `check` does.
        ImportError: as `check` does.
    """
    mesh = _mesh(topology)
    _check_batch_size(batch_size, topology, mesh)
    return _check(model, model.name, batch_size, topology, mesh, [])


def write(path: Path, findings: list[Readiness]) -> None:
    """Writes findings as JSON.

    Args:
        path: The file; it is replaced as a whole.
        findings: Of `check` or `check_model`.
    """
    rows = [{**dataclasses.asdict(each), "ready": each.ready} for each in findings]
    with replacing(path) as beside:
        beside.write_text(json.dumps(rows, indent=2) + "\n")


def _mesh(topology: str) -> jax.sharding.Mesh:
    if keras.backend.backend() != "jax":
        raise ValueError(
            "The training step is compiled for TPUs by JAX. Set KERAS_BACKEND=jax. "
            f"Received the Keras backend {keras.backend.backend()!r}."
        )
    try:
        import libtpu  # noqa: F401 - JAX's own error would not name it
    except ImportError as error:
        raise ImportError(
            "Compiling for TPUs needs their compiler, which runs without one: pip install 'keras-dsr[tpu]'."
        ) from error
    # Nothing asks a server of Google's what this machine is, and several processes may compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of several classes, by version
        raise ValueError(f"There is no TPU topology {topology!r}, such as {TOPOLOGY!r}: {error}") from error
    return jax.sharding.Mesh(np.asarray(devices).reshape(-1), ("batch",))


def _check_batch_size(batch_size: int, topology: str, mesh: jax.sharding.Mesh) -> None:
    replicas = mesh.devices.size
    if batch_size % replicas:
        raise ValueError(
            f"A batch is spread evenly over the {replicas} cores of {topology}. Received batch_size={batch_size!r}."
        )


def _check(
    model: keras.Model, name: str, batch_size: int, topology: str, mesh: jax.sharding.Mesh, dynamic: list[str]
) -> Readiness:
    replicas = mesh.devices.size
    dynamic = dynamic + [
        f"output of layer {layer.name!r}, {tuple(tensor.shape)}"
        for layer in model.layers
        for tensor in keras.tree.flatten(layer.output)
        if None in tuple(tensor.shape)[1:]
    ]
    if dynamic:
        why = "shapes are not fixed"
        return Readiness(name, topology, replicas, batch_size, tuple(dynamic), (), why, (), 0.0, None)
    shape = (batch_size, *model.input_shape[1:])
    # Metrics have no variables before they have seen something of a batch's shape.
    model._symbolic_build(data_batch=(np.zeros((1, *shape[1:]), "float32"), np.zeros(1, "int32")))
    model.optimizer.build(model.trainable_variables)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    kinds = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([_like(v.value.shape, v.value.dtype, everywhere) for v in variables] for variables in kinds)
    batch = (_like(shape, "float32", spread), _like((batch_size,), "int32", spread))
    step = jax.jit(
        lambda state, data: model.train_step(state, data),
        donate_argnums=0,
        out_shardings=(None, jax.tree.map(lambda _: everywhere, state)),
    )
    started = time.perf_counter()
    try:
        traced = step.trace(state, batch)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # whatever JAX or the compiler has to say is a finding
        try:
            refused = _refused(jax.make_jaxpr(model.train_step)(state, batch), mesh)
        except Exception:  # it cannot even be traced: there are no operations to try
            refused = []
        return Readiness(name, topology, replicas, batch_size, (), tuple(refused), _short(error), (), 0.0, None)
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    needed -= memory.alias_size_in_bytes
    collectives = tuple(collectives_of(compiled.as_text()))
    return Readiness(name, topology, replicas, batch_size, (), (), None, collectives, seconds, needed / 2**20)


def _like(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _short(error: Exception) -> str:
    """The first lines of what a compiler says."""
    return " ".join(str(error).split())[:300]


def _refused(jaxpr: core.ClosedJaxpr, mesh: jax.sharding.Mesh) -> list[str]:
    """The operations of a step that do not compile by themselves, each kind once."""
    one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    found, seen = [], set()
    for equation in _operations(jaxpr.jaxpr):
        avals = [variable.aval for variable in equation.invars]
        kind = (equation.primitive.name, *(str(getattr(aval, "dtype", aval)) for aval in avals))
        if kind in seen or not all(isinstance(aval, jax.core.ShapedArray) for aval in avals):
            continue
        seen.add(kind)

        def run(*operands: Any, equation: core.JaxprEqn = equation) -> Any:
            return equation.primitive.bind(*operands, **equation.params)

        try:
            operands = [_like(aval.shape, aval.dtype, one) for aval in avals]
            jax.jit(run).trace(*operands).lower(lowering_platforms=("tpu",)).compile()
        except Exception as error:  # as above
            shapes = ", ".join(aval.str_short() for aval in avals)
            found.append(f"{equation.primitive.name}({shapes}): {_short(error)}")
    return found


def _operations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The operations of a program that have no program within, those of programs within included."""
    for equation in jaxpr.eqns:
        within = [
            each.jaxpr if isinstance(each, core.ClosedJaxpr) else each
            for value in equation.params.values()
            for each in (value if isinstance(value, (tuple, list)) else (value,))
            if isinstance(each, (core.ClosedJaxpr, core.Jaxpr))
        ]
        for each in within:
            yield from _operations(each)
        if not within:
            yield equation


def collectives_of(text: str) -> list[Collective]:
    """The collectives of a compiled program, from its text as XLA writes it.

    Args:
        text: The optimised HLO module, `jax.stages.Compiled.as_text()`.

    Returns:
        Each collective of the text, in its order.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(header[1], [])
        elif line.startswith("  "):
            lines.append(line)

    def called(lines: list[str]) -> set[str]:
        groups = re.findall(
            r"(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation|"
            r"false_computation)=(\{[^}]*\}|%?[\w.-]+)",
            "\n".join(lines),
        )
        return {name for group in groups for name in re.findall(r"[\w.-]+", group)} & computations.keys()

    waiting = {
        name
        for lines in computations.values()
        for line in lines
        if re.search(r" while\(", line)
        for name in re.findall(r"(?:body|condition)=%?([\w.-]+)", line)
    }
    looped: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in looped and name in computations:
            looped.add(name)
            waiting |= called(computations[name])
    pattern = re.compile(rf" = (.+?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
    found = []
    for name, lines in computations.items():
        for line in lines:
            if match := pattern.search(line):
                source = re.search(r'op_name="([^"]*)"', line)
                shapes = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", match[1])
                found.append(Collective(match[2], shapes, name in looped, source[1] if source else ""))
    return found
