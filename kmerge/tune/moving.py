"""What moves in a training: which layers, at which rate, and low-rank adapters in place of whole kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kmerge.data import generator
from kmerge.errors import PlanError


@dataclass(frozen=True, eq=False)
class Parts:
    """Layers with weights of a live model, in its order: the trunk that all heads share, and the rest."""

    trunk: tuple[Any, ...]
    heads: tuple[Any, ...]


def parts_of(model: Any, roles: Mapping[str, str] | None = None) -> Parts:
    """Which layers are the trunk.

    Args:
        model: live and functional.
        roles: "shared" or "private" per layer, as a merge recorded them; without it, the trunk is what every output
            depends on, and in a model with one output all but its last layer with weights.
    """
    layers = [layer for layer in model.layers if layer.weights]
    if roles and all(layer.name in roles for layer in layers):
        trunk = [layer for layer in layers if roles[layer.name] == "shared"]
    else:
        reached = [_reached(tensor) for tensor in model.outputs]
        trunk = [layer for layer in layers if all(id(layer) in found for found in reached)]
    if len(trunk) == len(layers):
        trunk = trunk[:-1]
    shared = {id(layer) for layer in trunk}
    return Parts(tuple(trunk), tuple(layer for layer in layers if id(layer) not in shared))


def _reached(tensor: Any) -> set[int]:
    """The operations that a tensor is made by."""
    found: set[int] = set()
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        history = waiting.pop()._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        if id(node) not in seen:
            seen.add(id(node))
            found.add(id(history.operation))
            waiting += node.input_tensors
    return found


def check_train(train: str | None) -> tuple[str, int]:
    """ "all", "heads" or "last:K", and K.

    Raises:
        PlanError: if it is none of these.
    """
    if train is None or train in ("all", "heads"):
        return train or "", 0
    word, colon, number = str(train).partition(":")
    if word == "last" and colon and number.isdigit() and int(number) > 0:
        return word, int(number)
    raise PlanError(f"--train is '{train}': expected all, heads, or last:K, such as last:2 for the last two layers.")


def set_moving(
    model: Any, parts: Parts, train: str | None, adapters: int | None, fixed: bool, seed: int = 0
) -> tuple[str, ...]:
    """Freeze what is not to move, in a copy of the model; before it is compiled.

    Args:
        model: live.
        parts: its trunk and heads.
        train: "all", "heads", "last:K" (heads and the last K layers of the trunk); None: what its layers say.
        adapters: rank of adapters that move in place of the heads' kernels.
        fixed: keep the statistics of every BatchNormalization.
        seed: of the adapters.

    Returns:
        Notes for people.
    """
    word, count = check_train(train)
    notes = []
    if word:
        moved = [*parts.heads, *({"all": parts.trunk, "heads": ()}.get(word, parts.trunk[-count:] if count else ()))]
        if count > len(parts.trunk):
            notes.append(f"the trunk has {len(parts.trunk)} layers with weights, and all of them move")
        ids = {id(layer) for layer in moved}
        for layer in (*parts.trunk, *parts.heads):
            layer.trainable = id(layer) in ids
    if adapters:
        adapted = [layer for layer in parts.heads if _adapt(layer, adapters, seed)]
        if not adapted:
            notes.append("no head has a layer that takes adapters, so its weights move as they are")
    if fixed:
        for layer in model._flatten_layers():
            if type(layer).__name__ == "BatchNormalization" and layer.trainable:
                keep_statistics(layer)
    return tuple(notes)


def keep_statistics(layer: Any) -> None:
    """BatchNormalization in inference mode, whose scale and offset move all the same."""
    moving = [variable for variable in (layer.gamma, layer.beta) if variable is not None]
    layer.trainable = False
    for variable in moving:
        variable.trainable = True


def _adapt(layer: Any, rank: int, seed: int) -> bool:
    """Give a layer low-rank adapters, whose bias moves as before."""
    if not hasattr(layer, "enable_lora") or not layer.built or not layer.trainable:
        return False
    import keras

    own = int(generator(seed, f"adapter/{layer.path}").integers(2**31))
    layer.enable_lora(rank, a_initializer=keras.initializers.HeUniform(own))
    return True


def merged_kernels(model: Any) -> dict[int, Any]:
    """Kernels with their adapters added, by the identity of the variable."""
    from keras import ops

    found = {}
    for layer in model._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            name = "embeddings" if hasattr(layer, "_embeddings") else "kernel"
            found[id(getattr(layer, f"_{name}"))] = ops.convert_to_numpy(getattr(layer, name))
    return found


def is_adapter(variable: Any) -> bool:
    return "lora_" in variable.path.rpartition("/")[2]


class Plain:
    """The model as users know it, and how it gets the weights of the copy that is trained."""

    def __init__(self, model: Any, trained: Any) -> None:
        self.model, self._trained = model, trained

    def carry(self) -> None:
        """Copy the weights, adapters merged into their kernels."""
        from keras import ops

        merged = merged_kernels(self._trained)
        theirs = [variable for variable in self._trained.variables if not is_adapter(variable)]
        for mine, other in zip(self.model.variables, theirs, strict=True):
            value = merged.get(id(other))
            mine.assign(ops.convert_to_numpy(other) if value is None else value)


def rates(parts: Parts, variables: Sequence[Any], trunk_rate: float, decay: float) -> list[float]:
    """By what the learning rate of each variable is multiplied.

    Args:
        parts: trunk and heads.
        variables: that move; told apart by what they are, for those of nested models may have one path.
        trunk_rate: for the trunk.
        decay: once more for each layer further from the heads.
    """
    found: dict[int, float] = {}
    factor = trunk_rate
    for layer in reversed(parts.trunk):
        found |= {id(variable): factor for variable in layer.variables}
        factor *= decay
    return [found.get(id(variable), 1.0) for variable in variables]


def scaled_optimizer(optimizer: Any, variables: Sequence[Any], factors: Sequence[float]) -> Any:
    """The optimizer with a factor on the rate of each variable: another object of the same settings."""
    if all(factor == 1 for factor in factors):
        return optimizer
    import keras

    kind: Any = type(optimizer)

    def update_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> Any:
        factor = factors[self._get_variable_index(variable)]
        return kind.update_step(self, gradient, variable, learning_rate * factor)

    def one_by_one(self: Any, gradients: Any, variables: Any, learning_rate: Any) -> None:
        for gradient, variable in zip(gradients, variables, strict=True):
            update_step(self, gradient, variable, learning_rate)

    steps: dict[str, Any] = {"update_step": update_step}
    if keras.backend.backend() == "torch":  # where all variables are updated at once, at one rate
        steps["_backend_update_step"] = one_by_one
    scaled: Any = type(f"Scaled{kind.__name__}", (kind,), steps)
    made = scaled.from_config(optimizer.get_config())
    made.build(list(variables))
    return made
