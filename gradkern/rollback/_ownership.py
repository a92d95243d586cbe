"""Decides which layers' gradients can be told apart per sample, and refuses to record when some cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase

import torch
from torch import nn

from gradkern.rollback._layout import Layout, ParameterInfo, Stream, describe_parameters

__all__ = ["LayerKind", "OwnedLayer", "Ownership", "claim"]


class LayerKind(Enum):
    """The layers whose per-sample gradients can be captured."""

    LINEAR = "Linear"
    CONV1D = "Conv1D"
    EMBEDDING = "Embedding"
    LAYER_NORM = "LayerNorm"
    RMS_NORM = "RMSNorm"
    GROUP_NORM = "GroupNorm"
    CONVOLUTION = "Conv1d, Conv2d or Conv3d"
    ATTENTION = "MultiheadAttention"


@dataclass(frozen=True, slots=True)
class OwnedLayer:
    """A layer to be captured.

    Attributes:
        name: In ``model.named_modules()``.
        module: The layer.
        kind: How to capture it.
        weight: Index of the weight's stream, or None when the weight is not recorded.
        bias: Index of the bias's stream, or None.
        shared_input: True for an embedding whose ids are the same for all samples.
        is_output: True for the Linear whose outputs are taken to be the logits.
        parts: The projections of an attention, as Linear layers; ``module`` then is the one that has the weight.
        parameter_name: Name of the weight in ``module``.
        is_time_first: True for a layer of a Transformer of torch without ``batch_first``.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    weight: int | None
    bias: int | None
    shared_input: bool
    is_output: bool = False
    parts: tuple[OwnedLayer, ...] = ()
    parameter_name: str = "weight"
    is_time_first: bool = False


@dataclass(frozen=True, slots=True)
class Ownership:
    """What will be recorded.

    Attributes:
        layout: The same as plain data.
        parameters: The trained parameters, as in ``layout.parameters``.
        layers: The layers to be captured.
    """

    layout: Layout
    parameters: tuple[nn.Parameter, ...]
    layers: tuple[OwnedLayer, ...]


def claim(
    model: nn.Module,
    trained: Iterable[torch.Tensor],
    unowned: Sequence[str],
    shared_inputs: Sequence[str],
    output: str | None = None,
) -> Ownership:
    """Work out which parameters are recorded, and through which layers.

    Args:
        model: The model.
        trained: The optimizer's parameters; others are left alone.
        unowned: Patterns of parameter names to leave out.
        shared_inputs: Patterns of names of embeddings whose ids are shared by all samples.
        output: Name of the Linear whose outputs are logits, trained or not; None takes the last one.

    Raises:
        ValueError: Nothing to record; a parameter that no captured layer holds and ``unowned`` does not name;
            a pattern that matches nothing; an embedding or a layer in a state that cannot be captured.
        TypeError: A trained parameter is not fp32.
    """
    trained_ids = {id(parameter) for parameter in trained}
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in trained_ids
    }
    if not parameters:
        raise ValueError(
            "record: the optimizer trains none of the model's parameters; build the optimizer from "
            "model.parameters() of the same model"
        )
    _require_fp32(parameters)
    left_out = _matching(parameters, unowned, "unowned", "parameter")
    indices = {id(parameter): index for index, parameter in enumerate(parameters.values())}
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers: list[OwnedLayer] = []
    streams: list[Stream] = []
    owned: set[str] = set()

    def stream(layer: str, parameter: torch.Tensor | None, kind: str) -> int | None:
        name = names.get(id(parameter))
        if name is None or name in left_out:
            return None
        owned.add(name)
        streams.append(Stream(layer, indices[id(parameter)], kind))
        return len(streams) - 1

    candidates = [(name, module, kind) for name, module in model.named_modules() if (kind := _kind(module)) is not None]
    # An attention reads the weight of its last layer by itself.
    read = {id(module.out_proj) for _, module, kind in candidates if kind is LayerKind.ATTENTION}
    time_first = _time_first(model)
    embeddings = {name: module for name, module, kind in candidates if kind is LayerKind.EMBEDDING}
    shared = _matching(embeddings, shared_inputs, "shared_inputs", "embedding")
    for name, module, kind in candidates:
        if id(module) in read:
            continue
        if kind is LayerKind.ATTENTION:
            parts = []
            for part, owner, weight_name, bias_name in _projections(module):
                full = f"{name}.{part}".removeprefix(".")
                weight = stream(full, owner._parameters.get(weight_name), "matrix")
                bias = stream(full, owner._parameters.get(bias_name), "vector")
                if weight is not None or bias is not None:
                    parts.append(
                        OwnedLayer(full, owner, LayerKind.LINEAR, weight, bias, False, parameter_name=weight_name)
                    )
            if parts:
                _require_capturable(name, module)
                layers.append(OwnedLayer(name, module, kind, None, None, False, parts=tuple(parts)))
            continue
        weight = stream(name, module._parameters.get("weight"), _weight_stream(module, kind))
        bias = stream(name, module._parameters.get("bias"), "vector")
        if weight is None and bias is None:
            continue
        _require_capturable(name, module)
        is_time_first = id(module) in time_first
        layers.append(OwnedLayer(name, module, kind, weight, bias, name in shared, is_time_first=is_time_first))
    unclaimed = [name for name in parameters if name not in owned and name not in left_out]
    if unclaimed:
        raise ValueError(
            f"record: no per-sample gradient can be captured for {_listed(unclaimed)}; captured are the "
            f"parameters of Linear, Conv1d to Conv3d, Embedding, LayerNorm, RMSNorm, GroupNorm, MultiheadAttention "
            f"(without add_bias_kv) and transformers' Conv1D. Pass unowned={unclaimed!r} (patterns allowed) to record "
            f"the rest; the influence that runs through these is then not counted"
        )
    linear = {name: module for name, module, kind in candidates if kind is LayerKind.LINEAR}
    _mark_output(layers, linear, time_first, output)
    layout = Layout(
        model=describe_parameters(model),
        parameters=tuple(
            ParameterInfo(name, tuple(parameter.shape), name in owned) for name, parameter in parameters.items()
        ),
        streams=tuple(streams),
    )
    return Ownership(layout, tuple(parameters.values()), tuple(layers))


def _projections(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, str]]:
    """Of an attention: a name, the module that has the weight, and names of weight and bias in it."""
    for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
        if module._parameters.get(f"{part}_weight") is not None:
            # One bias for all of them.
            yield part, module, f"{part}_weight", "in_proj_bias"
    yield "out_proj", module.out_proj, "weight", "bias"  # type: ignore[misc]


def _time_first(model: nn.Module) -> set[int]:
    """Modules, by id, that torch's Transformers give inputs whose first dimension is time."""
    found: set[int] = set()
    for module in model.modules():
        is_stack = isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder))
        block = next(iter(module.layers), None) if is_stack else module  # type: ignore[arg-type]
        is_block = isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if is_block and not block.self_attn.batch_first:  # type: ignore[union-attr]
            found |= {id(child) for child in module.children()}
    return found


def _weight_stream(module: nn.Module, kind: LayerKind) -> str:
    """The form in which a weight's gradients are kept."""
    if kind is LayerKind.EMBEDDING:
        return "embedding"
    if kind in (LayerKind.LINEAR, LayerKind.CONV1D):
        return "matrix"
    # In groups the weight is one small matrix for each of them: no rank to reduce.
    return "matrix" if kind is LayerKind.CONVOLUTION and module.groups == 1 else "vector"


def _mark_output(
    layers: list[OwnedLayer], linear: dict[str, nn.Module], time_first: set[int], output: str | None
) -> None:
    """Say of one layer, in place, that it gives the logits; one that is not trained is added.

    Raises:
        ValueError: ``output`` names none of the model's Linear layers.
    """
    if output is not None and output not in linear:
        raise ValueError(f"record: output must name a Linear layer, got {output!r}; there are {_listed(linear)}")
    name = next(reversed(linear), None) if output is None else output
    if name is None:
        return
    for at, layer in enumerate(layers):
        if layer.name == name:
            layers[at] = replace(layer, is_output=True)
            return
    _require_capturable(name, linear[name])
    is_time_first = id(linear[name]) in time_first
    layers.append(
        OwnedLayer(name, linear[name], LayerKind.LINEAR, None, None, False, is_output=True, is_time_first=is_time_first)
    )


def _kind(module: nn.Module) -> LayerKind | None:
    """How a layer is captured; subclasses are not: their forward, or who reads their weight, may differ."""
    layer_type = type(module)
    if layer_type is nn.Linear:
        return LayerKind.LINEAR
    if layer_type is nn.Embedding:
        return LayerKind.EMBEDDING
    if layer_type is nn.LayerNorm:
        return LayerKind.LAYER_NORM
    if layer_type is nn.RMSNorm:
        return LayerKind.RMS_NORM
    if layer_type is nn.GroupNorm:
        return LayerKind.GROUP_NORM
    if layer_type is nn.MultiheadAttention:
        return LayerKind.ATTENTION
    if layer_type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return LayerKind.CONVOLUTION
    # Recognised by name, so that transformers need not be installed.
    if layer_type.__name__ == "Conv1D" and layer_type.__module__ == "transformers.pytorch_utils":
        return LayerKind.CONV1D
    if layer_type.__module__.startswith("transformers.") and _is_plain_rms_norm(module):
        return LayerKind.RMS_NORM
    return None


def _is_plain_rms_norm(module: nn.Module) -> bool:
    """Whether a module is one of the many copies of Llama's norm in transformers: by what it computes."""
    weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return False
    probe = torch.linspace(-2.0, 3.0, 2 * len(weight), dtype=weight.dtype, device=weight.device).reshape(2, -1)
    with torch.no_grad():
        found = type(module).forward(module, probe)
        return torch.equal(found, weight * nn.functional.rms_norm(probe, weight.shape, None, eps))


def _require_fp32(parameters: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise TypeError(
                f"record: parameter {name!r} has dtype {parameter.dtype}, expected torch.float32; train the "
                f"model in fp32 (model.float()), or freeze the parameter"
            )


def _require_capturable(name: str, module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise ValueError(
            f"record: layer {name!r} already has a forward of its own on the instance (another recorder, or "
            f"a wrapper); close or remove that first, and apply it again inside record()"
        )
    if isinstance(module, nn.Embedding):
        for option, got, wanted in (
            ("sparse", module.sparse, False),
            ("max_norm", module.max_norm, None),
            ("scale_grad_by_freq", module.scale_grad_by_freq, False),
        ):
            if got != wanted:
                raise ValueError(
                    f"record: embedding {name!r} has {option}={got}, which cannot be split per sample; set "
                    f"{option}={wanted}, or pass unowned={[f'{name}.weight']!r}"
                )


def _matching(names: Mapping[str, object], patterns: Sequence[str], argument: str, what: str) -> set[str]:
    """The names that match any pattern; a pattern that matches nothing is a mistake."""
    if isinstance(patterns, str):
        raise TypeError(f"record: {argument} must be a list of patterns, got the string {patterns!r}")
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"record: {argument} pattern {pattern!r} matches no {what}; there are {_listed(names)}")
        found |= matches
    return found


def _listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    everything = list(names)
    shown = ", ".join(repr(name) for name in everything[:8])
    return shown if len(everything) <= 8 else f"{shown} and {len(everything) - 8} more"
