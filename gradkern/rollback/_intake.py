"""From captured factors to compressed records: the sink of the capturing layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern.errors import LedgerError
from gradkern.ops._registry import backend_for
from gradkern.rollback._autocast import in_full_precision
from gradkern.rollback._curvature import measure_bends
from gradkern.rollback._fidelity import Comparison
from gradkern.rollback._ownership import OwnedLayer, Ownership
from gradkern.rollback._packing import Block, Shape, packing_of, unpack
from gradkern.rollback._records import EmbeddingRecord, MatrixRecord, Record, VectorRecord
from gradkern.rollback._reduce import reduce_matrix, reduce_vector
from gradkern.rollback._shadows import Shadows
from gradkern.rollback._to_host import to_host

__all__ = ["Intake", "Visits"]


@dataclass(slots=True)
class Visits:
    """What backward passes left since the last optimizer step.

    Attributes:
        ids: The sample ids of each micro-batch.
        states: Of each, the state of torch's generator before it; empty where those are not kept.
        blocks: Records that are packed; a record's ``visit`` counts from the first row of ``ids``.
        records: ``(stream, record)``, likewise.
        comparisons: ``(stream, comparison)`` for the samples that are compared exactly.
        bends: Numbers of visits, and what :func:`~gradkern.rollback._curvature.measure_bends` found for them.
    """

    ids: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    records: list[tuple[int, Record]] = field(default_factory=list)
    comparisons: list[tuple[int, Comparison]] = field(default_factory=list)
    bends: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    blocks: list[Block] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of visits."""
        return sum(len(ids) for ids in self.ids)

    def to_host(self) -> Visits:
        """The same with all records in host memory, for which a device is waited for once."""
        tables = [record.tensors() for _, record in self.records]
        tensors = [*(block.content for block in self.blocks), *(each for _, each in self.bends)]
        tensors += [tensor for table in tables for tensor in table.values()]
        copies = iter(to_host(*tensors))
        blocks = [block._replace(content=next(copies)) for block in self.blocks]
        bends = [(numbers, next(copies)) for numbers, _ in self.bends]
        records = [
            (stream, type(record)(**{name: next(copies) for name in table}))
            for (stream, record), table in zip(self.records, tables, strict=True)
        ]
        return replace(self, blocks=blocks, bends=bends, records=records)

    def nbytes(self) -> int:
        """Bytes of all records."""
        packed = sum(block.content.nbytes for block in self.blocks)
        exact = sum(comparison.nbytes() for _, comparison in self.comparisons)
        return packed + sum(record.nbytes() for _, record in self.records) + exact


@dataclass(slots=True)
class _Matrix:
    """What a layer handed over of a matrix."""

    layer: OwnedLayer
    shape: Shape
    rows: Tensor
    columns: Tensor


class _Sum(NamedTuple):
    """A parameter's gradient that waits to be added to the shadows.

    Attributes:
        parameter: Its index.
        gradient: May share its memory with the parameter's ``grad`` by then.
        is_transposed: Whether it is that of the parameter's transpose.
        version: Of the gradient, which no one may change meanwhile.
    """

    parameter: int
    gradient: Tensor
    is_transposed: bool
    version: int


# Bytes of factors, and of gradients, that may wait for the end of a backward pass. Small layers are reduced faster
# together; large ones should not be kept.
_MOST_WAITING = 1 << 18


class Intake:
    """Splits what layers hand over into samples, adds it to the shadows and compresses it.

    Args:
        ownership: What is recorded.
        shadows: Receives the exact sums.
        rank: Most rows kept of a matrix's factors per sample.
        is_declared: See :func:`~gradkern.rollback._curvature.measure_bends`.

    Attributes:
        paused: See :class:`gradkern.rollback._sink.Sink`.
        scale: Of the loss, see :func:`~gradkern.rollback._curvature.measure_bends`.
    """

    def __init__(self, ownership: Ownership, shadows: Shadows, rank: int, *, is_declared: bool = False) -> None:
        self._streams = ownership.layout.streams
        self._parameters = ownership.parameters
        self._names = [info.name for info in ownership.layout.parameters]
        self._shadows = shadows
        self._starts: dict[int, Tensor] = {}
        for index, stream in enumerate(self._streams):
            if stream.kind != "vector":
                parameter = ownership.parameters[stream.parameter]
                # A private generator: recording must not move the run's random numbers.
                generator = torch.Generator().manual_seed(index)
                rows, columns = parameter.flatten(1).shape
                start = torch.randn(min(rank, rows, columns), columns, generator=generator)
                self._starts[index] = start.to(parameter.device)
        self.paused = False
        self._is_declared = is_declared
        self.scale: float | None = None
        self._ids: Tensor | None = None
        self._samples = 0
        self._state: Tensor | None = None
        self._numbers: Tensor | None = None
        self._compare = False
        self._visits = Visits()
        self._waiting: list[_Matrix] = []
        self._waiting_bytes = 0
        self._sums: list[_Sum] = []
        self._sums_bytes = 0
        # Of micro-batches as large as the last one.
        self._shapes: dict[tuple[int, torch.Size, torch.Size, int], Shape] = {}
        self._task = -1  # the backward pass whose end reduces what waits
        self._is_on_host = all(parameter.device.type == "cpu" for parameter in ownership.parameters)
        self._device = ownership.parameters[0].device if ownership.parameters else torch.device("cpu")

    @property
    def active(self) -> bool:
        """True between :meth:`begin` and :meth:`end`."""
        return self._ids is not None

    @property
    def waiting_visits(self) -> int:
        """How many visits wait for a step."""
        return self._visits.count

    def begin(self, ids: Tensor, compare: bool, state: Tensor | None) -> None:
        """Attribute what follows to ``ids``.

        Args:
            ids: Shape ``(B,)``.
            compare: Whether to measure the first sample's compression exactly.
            state: Of torch's generator, to keep.
        """
        if len(ids) != self._samples:
            self._samples = len(ids)
            self._shapes.clear()
        self._ids, self._numbers, self._compare, self._state = ids, None, compare, state

    def end(self) -> None:
        """Attribute nothing any more."""
        try:
            self._reduce_waiting()  # what a backward pass left that did not end
        finally:
            self._forget_waiting()
            self._ids = None

    def drop(self) -> None:
        """Forget everything since the last call of :meth:`take`, and what waits."""
        self._forget_waiting()
        self._visits, self._numbers = Visits(), None

    def _forget_waiting(self) -> None:
        self._waiting, self._waiting_bytes = [], 0
        self._sums, self._sums_bytes = [], 0
        self._task = -1

    def take(self) -> Visits:
        """Hand over everything since the last call, in host memory."""
        if self.active:
            self._reduce_waiting()  # a step inside the batch, or after a backward pass that did not end
        visits, self._visits, self._numbers = self._visits, Visits(), None
        return visits if self._is_on_host else visits.to_host()

    def nbytes(self) -> int:
        """Bytes held now."""
        return self._visits.nbytes() + sum(start.nbytes for start in self._starts.values())

    def expand_shared(self, layer: OwnedLayer, output: Tensor, ids: Tensor) -> Tensor:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if self._ids is None:
            if layer.shared_input:
                raise LedgerError(
                    f"record: embedding {layer.name!r} is in shared_inputs, so its forward must run inside "
                    f"'with recorder.batch(ids)': only there is the number of samples known"
                )
            return output
        samples = len(self._ids)
        if layer.shared_input or (ids.dim() > 1 and ids.shape[0] == 1 and samples > 1):
            # One copy per sample, or the sum over samples would be all that backward ever sees.
            own = output.squeeze(0) if ids.dim() > 1 and ids.shape[0] == 1 else output
            return own.expand(samples, *own.shape)
        self._require_unambiguous(layer, ids, samples)
        return output

    def take_matrix(
        self,
        layer: OwnedLayer,
        rows: Tensor,
        columns: Tensor,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None = None,
        is_transposed: bool = False,
    ) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if layer.weight is None:
            if bias_grad is not None:
                self.take_bias(layer, rows, bias_grad)
            return
        self._visit_numbers(layer)
        if weight_grad is not None:
            self._add_later(layer.weight, weight_grad, is_transposed)
        bias_stream = -1
        if bias_grad is not None and layer.bias is not None:
            bias_stream = layer.bias
            self._add_later(bias_stream, bias_grad)
        key = (layer.weight, rows.shape, columns.shape, bias_stream)
        shape = self._shapes.get(key)
        if shape is None:
            self._shapes[key] = shape = Shape(
                stream=layer.weight,
                bias_stream=bias_stream,
                tokens=self._tokens(layer, rows),
                rank=len(self._starts[layer.weight]),
                height=rows.shape[-1],
                width=columns.shape[-1],
            )
        self._await_end()
        self._waiting.append(_Matrix(layer, shape, rows, columns))
        self._waiting_bytes += rows.nbytes + columns.nbytes
        if self._waiting_bytes > _MOST_WAITING:
            self._reduce_all()

    def _add_later(self, stream: int, gradient: Tensor, is_transposed: bool = False) -> None:
        """Add a gradient to the shadows with those that wait."""
        self._await_end()
        number = self._streams[stream].parameter
        self._sums.append(_Sum(number, gradient, is_transposed, gradient._version))
        self._sums_bytes += gradient.nbytes
        parameter: Any = self._parameters[number]
        # Hooks may change it.
        if self._sums_bytes > _MOST_WAITING or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            self._add_sums()

    def _await_end(self) -> None:
        """Have the end of this backward pass reduce what waits."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            # Another backward pass, perhaps inside one (reentrant checkpointing), which may add to what waits of that.
            self._add_sums()
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce_waiting)

    def _add_sums(self) -> None:
        sums, self._sums, self._sums_bytes = self._sums, [], 0
        for each in sums:
            if each.gradient._version != each.version:
                name = self._names[each.parameter]
                raise LedgerError(
                    f"record: a gradient of {name!r} was changed in place before backward had ended, so what "
                    f"samples gave is not known any more; let hooks return a new tensor, and clip by the "
                    f"optimizer's max_norm="
                )
        self._shadows.add_gradients(
            [(each.parameter, each.gradient.t() if each.is_transposed else each.gradient) for each in sums]
        )

    def _add_matrix(self, visit: Tensor, matrix: _Matrix) -> None:
        """By torch, record by record."""
        layer, shape = matrix.layer, matrix.shape
        rows, columns = self._per_sample(layer, matrix.rows), self._per_sample(layer, matrix.columns)
        record = MatrixRecord(visit, *reduce_matrix(rows, columns, self._starts[shape.stream]))
        self._visits.records.append((shape.stream, record))
        if self._compare:
            self._visits.comparisons.append((shape.stream, Comparison.of(record, rows, columns)))
        if shape.bias_stream >= 0:
            self._add_vector(shape.bias_stream, VectorRecord(visit, *reduce_vector(rows)), rows)

    def _reduce_waiting(self) -> None:
        """At the end of a backward pass."""
        self._task = -1
        self._reduce_all()

    @torch.no_grad()
    def _reduce_all(self) -> None:
        """Reduce all matrices that wait, and add the gradients."""
        self._waiting_bytes = 0
        self._add_sums()
        if not self._waiting:
            return
        matrices, self._waiting = self._waiting, []
        visit = self._visit_numbers(matrices[0].layer)
        with in_full_precision(self._device):
            if backend_for("record", self._device) != "reference":
                self._add_block(visit, matrices)
                return
            for matrix in matrices:
                self._add_matrix(visit, matrix)

    def _add_block(self, visit: Tensor, matrices: Sequence[_Matrix]) -> None:
        """In one native call, or in the launches of one."""
        packing = packing_of(len(visit), tuple(matrix.shape for matrix in matrices))
        content = torch.empty(packing.nbytes, dtype=torch.uint8, device=self._device)
        rows = [matrix.rows.contiguous() for matrix in matrices]
        columns = [matrix.columns.contiguous() for matrix in matrices]
        starts = [self._starts[matrix.shape.stream] for matrix in matrices]
        if backend_for("record", self._device) == "triton":
            from gradkern.ops._record.reduce.triton import record_matrices  # Triton may not be installed

            record_matrices(rows, columns, starts, packing.offsets, packing.samples, content)
        else:
            torch.ops.gradkern._record_matrices_(rows, columns, starts, packing.offsets, packing.samples, content)
        block = Block(packing, visit, content)
        self._visits.blocks.append(block)
        if self._compare:
            self._compare_block(block, matrices)

    def _compare_block(self, block: Block, matrices: Sequence[_Matrix]) -> None:
        records = iter(unpack([block]))
        for matrix in matrices:
            rows, columns = self._per_sample(matrix.layer, matrix.rows), self._per_sample(matrix.layer, matrix.columns)
            stream, record = next(records)
            self._visits.comparisons.append((stream, Comparison.of(record, rows, columns)))
            if matrix.shape.bias_stream >= 0:
                stream, record = next(records)
                self._visits.comparisons.append((stream, Comparison.of(record, rows)))

    def take_logits(self, layer: OwnedLayer, logits: Tensor, grad: Tensor) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        is_guessed = layer.weight is None and layer.bias is None and not self._is_declared
        if is_guessed and self._tokens_of(len(self._require_ids(layer)), logits) is None:
            return  # a frozen layer that nobody named, and whose rows are no samples', has no logits
        logits, grad = self._per_sample(layer, logits), self._per_sample(layer, grad)
        bends, self.scale = measure_bends(logits, grad, scale=self.scale, is_declared=self._is_declared)
        self._visits.bends.append((self._visit_numbers(layer), bends))

    def take_gradient(self, layer: OwnedLayer, gradient: Tensor, *, of_weight: bool) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        stream = layer.weight if of_weight else layer.bias
        if stream is not None:
            self._require_ids(layer)
            self._add_later(stream, gradient)

    def take_bias(self, layer: OwnedLayer, grad: Tensor, bias_grad: Tensor | None) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if layer.bias is None:
            return
        # Not the sum over samples: an attention key's bias has a gradient of zero up to rounding, which Adam scales to
        # full steps; only the same rounding leads to the same parameter.
        rows = self._per_sample(layer, grad)
        if bias_grad is not None:
            self._add_later(layer.bias, bias_grad)
        self._add_vector(layer.bias, VectorRecord(self._visit_numbers(layer), *reduce_vector(rows)), rows)

    def take_vectors(self, layer: OwnedLayer, grads: Tensor, weight_grad: Tensor | None) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if layer.weight is None:
            return
        rows = self._per_sample(layer, grads.flatten(1))
        if weight_grad is not None:
            self._add_later(layer.weight, weight_grad)
        self._add_vector(layer.weight, VectorRecord(self._visit_numbers(layer), *reduce_vector(rows)), rows)

    def take_norm(
        self, layer: OwnedLayer, normalised: Tensor, grad: Tensor, weight_grad: Tensor | None, bias_grad: Tensor | None
    ) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        grad, normalised = self._per_sample(layer, grad.float()), self._per_sample(layer, normalised.float())
        for stream, factors, total in ((layer.weight, normalised, weight_grad), (layer.bias, None, bias_grad)):
            if stream is not None and total is not None:
                self._add_later(stream, total)
                record = VectorRecord(self._visit_numbers(layer), *reduce_vector(grad, factors))
                self._add_vector(stream, record, grad, factors)

    def take_embedding(self, layer: OwnedLayer, ids: Tensor, grad: Tensor) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if layer.weight is None:
            return
        ids, grad = self._per_sample_rows(layer, ids, grad)
        self._add_sums()  # of a tied weight, in the order in which they came
        self._shadows.add_gradient_rows(
            self._streams[layer.weight].parameter, ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        )
        index, merged = _merge_equal(ids, grad)
        with in_full_precision(self._device):
            reduced = reduce_matrix(None, merged, self._starts[layer.weight])
        record = EmbeddingRecord(self._visit_numbers(layer), index.to(torch.int32, copy=True), *reduced)
        self._visits.records.append((layer.weight, record))
        if self._compare:
            self._visits.comparisons.append((layer.weight, Comparison.of(record, merged)))

    def _add_vector(self, stream: int, record: VectorRecord, rows: Tensor, factors: Tensor | None = None) -> None:
        self._visits.records.append((stream, record))
        if self._compare:
            exact = rows if factors is None else rows[:1] * factors[:1]
            self._visits.comparisons.append((stream, Comparison.of(record, exact)))

    def _visit_numbers(self, layer: OwnedLayer) -> Tensor:
        """The numbers of the current micro-batch's rows among the visits since the last step."""
        ids = self._require_ids(layer)
        if self._numbers is None:
            first = self._visits.count
            self._visits.ids.append(ids)
            if self._state is not None:
                self._visits.states.append(self._state)
            self._numbers = torch.arange(first, first + len(ids), dtype=torch.int32)
        return self._numbers

    def _per_sample(self, layer: OwnedLayer, tensor: Tensor) -> Tensor:
        """View ``(B, ..., N)`` or sample-major ``(B * T, N)`` as ``(B, T, N)``."""
        tokens = self._tokens(layer, tensor)
        return tensor.reshape(-1, tokens, tensor.shape[-1])

    def _tokens(self, layer: OwnedLayer, tensor: Tensor) -> int:
        """How many rows every sample has, of ``(B, ..., N)`` or sample-major ``(B * T, N)``."""
        samples = len(self._require_ids(layer))
        tokens = self._tokens_of(samples, tensor)
        if tokens is not None:
            return tokens
        raise LedgerError(
            f"record: layer {layer.name!r} saw rows of shape {tuple(tensor.shape[:-1])} for {samples} sample ids; "
            f"expected the first dimension to be the {samples} samples, or one dimension of a multiple of "
            f"{samples} rows, sample by sample. Pass recorder.batch one id per row of the micro-batch, or "
            f"exclude the layer with unowned={[f'{layer.name}.*']!r}"
        )

    @staticmethod
    def _tokens_of(samples: int, tensor: Tensor) -> int | None:
        leading = tensor.shape[:-1]
        if len(leading) == 1 and leading[0] > 0 and leading[0] % samples == 0:
            return leading[0] // samples
        return leading[1:].numel() if len(leading) > 1 and leading[0] == samples else None

    def _per_sample_rows(self, layer: OwnedLayer, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """View an embedding's ids and gradient as ``(B, T)`` and ``(B, T, columns)``."""
        samples = len(self._require_ids(layer))
        if grad.shape[:-1] != ids.shape:
            shared = ids.reshape(1, -1).expand(samples, -1)
            return shared, grad.reshape(samples, -1, grad.shape[-1])
        self._require_unambiguous(layer, ids, samples)
        if ids.dim() > 0 and ids.shape[0] == samples:
            return ids.reshape(samples, -1), grad.reshape(samples, -1, grad.shape[-1])
        raise LedgerError(
            f"record: embedding {layer.name!r} looked up ids of shape {tuple(ids.shape)} for {samples} "
            f"sample ids; expected the first dimension to be the {samples} samples. If these ids are shared "
            f"by all samples (positions), pass shared_inputs={[layer.name]!r} and run forward inside recorder.batch"
        )

    def _require_unambiguous(self, layer: OwnedLayer, ids: Tensor, samples: int) -> None:
        """As many ids as samples, in one dimension: labels, or positions? A wrong guess would go unnoticed."""
        if ids.dim() == 1 and len(ids) == samples > 1:
            raise ValueError(
                f"record: embedding {layer.name!r} looked up {samples} ids in one dimension for {samples} "
                f"samples: one id per sample, or positions shared by all samples? If shared, pass "
                f"shared_inputs={[layer.name]!r}; if one per sample, look up ids[:, None] and squeeze(1) the output"
            )

    def _require_ids(self, layer: OwnedLayer) -> Tensor:
        if self._ids is None:
            raise LedgerError(
                f"record: a gradient reached layer {layer.name!r} outside 'with recorder.batch(ids)', so it belongs "
                f"to no sample; call backward inside it, and run other uses of the model's gradients, forward and "
                f"backward, inside 'with recorder.paused()'. Clear the gradients (zero_grad) and call "
                f"recorder.discard() before going on"
            )
        return self._ids


def _merge_equal(ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the gradients of equal ids within each sample.

    Args:
        ids: Shape ``(B, T)``.
        grad: Shape ``(B, T, columns)``.

    Returns:
        ``(index, merged)`` of shapes ``(B, U)`` and ``(B, U, columns)``, with ``U`` the largest number of
        different ids in a sample; samples with fewer have index 0 and zeros there.
    """
    if ids.shape[1] == 1 or bool((ids[:, 1:] > ids[:, :-1]).all()):
        return ids, grad  # as positions are
    ordered, order = ids.sort(dim=1)
    is_new = torch.ones_like(ordered)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot_in_order = is_new.cumsum(dim=1) - 1
    slots = torch.empty_like(order).scatter_(1, order, slot_in_order)
    width = int(slots.max()) + 1
    index = ids.new_zeros(ids.shape[0], width).scatter_(1, slots, ids)
    merged = grad.new_zeros(ids.shape[0], width, grad.shape[-1])
    return index, merged.scatter_add_(1, slots.unsqueeze(-1).expand_as(grad), grad)
