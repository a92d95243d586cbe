"""A GPU that is not here: its memory counted and its clock advanced by every operator that runs on stand-ins.

The model, the batch and the optimizer are copied to the meta device: shapes without values, whose operators take
microseconds. What runs on them allocates what it would on the GPU, but for attention, which is sent to the kernels that
CUDA would choose. What the model makes on its way is made there too, whatever device it asks for; numbers on their own
keep their values on the CPU, as they would beside a GPU.
"""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gradkern.checkpoint._gpus import Gpu
from gradkern.checkpoint._meter import Mark
from gradkern.checkpoint._offload import Copy
from gradkern.checkpoint._roofline import operator_seconds
from gradkern.checkpoint._storages import Memory, dense_parts, rounded, storages_of, tensors_of
from gradkern.checkpoint._valueless import META, NotSimulatedError, without_values

__all__ = ["MetaCopies", "Simulation", "block_bytes"]

_MOST_HEAD_DIM = 256  # of torch's flash attention

_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


def block_bytes(*roots: object) -> int:
    """Bytes of the storages behind ``roots``, each once, in blocks of the caching allocator."""
    return sum(rounded(storage.nbytes()) for storage in storages_of(*roots, places=("cpu", "meta")).values())


class Simulation(TorchDispatchMode):
    """Counts and clocks what runs inside it, as a ``Source`` of costs.

    Args:
        gpu: Whose clock and allocator.
        shards: Processes that parameters, gradients and optimizer state are spread over, as FSDP does: gradients of a
            unit shrink to their share when its backward is over.
        compares_bits: Whether what runs has values; those on the meta device have none.
    """

    select_s = 0.0  # the host's work; a GPU that is kept busy does not wait for it

    def __init__(self, gpu: Gpu, shards: int, *, compares_bits: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu
        self.shards = shards
        self.compares_bits = compares_bits
        self._is_autocast_told = False
        self.live_bytes = 0
        self.peak_bytes = 0
        self.seconds = 0.0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._whole_gradients: list[Tensor] = []
        self._aliases: dict[Any, bool] = {}
        self._link = _SimulatedLink(self)
        self._is_paused = False

    def meter(self) -> SimulatedMeter:
        """A new meter."""
        return SimulatedMeter(self)

    def clock(self) -> float:
        """Seconds of the GPU's work so far."""
        return self.seconds

    def link(self, device: torch.device) -> _SimulatedLink:
        """The link to the host, whatever the stand-ins lie on."""
        return self._link

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither count nor clock what the block runs: it is the host's."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def enter(self, tensor: Tensor) -> None:
        """Count a tensor that was made while paused."""
        self._note_output(tensor)

    @contextmanager
    def watching(self, params: list[nn.Parameter]) -> Iterator[None]:
        """Run the block inside, and notice when gradients are made."""
        handles = [param.register_post_accumulate_grad_hook(self._note_gradient) for param in params]
        try:
            # Real tensors on a CPU have no kernels for what a GPU would run.
            with nullcontext() if self.compares_bits else _gpu_attention(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def spread_gradients(self) -> None:
        """Leave of the gradients made since the last call the share of one process."""
        for grad in self._whole_gradients:
            key = grad.untyped_storage()._cdata
            size = self._sizes.get(key, 0)
            share = rounded(-(-grad.untyped_storage().nbytes() // self.shards))
            if share < size:
                self._sizes[key] = share
                self.live_bytes -= size - share
        self._whole_gradients.clear()

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes that it counts for a tensor."""
        return sum(self._sizes.get(part.untyped_storage()._cdata, 0) for part in dense_parts(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.compares_bits:
            args, kwargs = without_values(func, args, kwargs)
            self._note_autocast()
        result = func(*args, **kwargs)
        if self._is_paused:
            return result
        aliases = self._aliases.get(func)
        if aliases is None:
            aliases = any(returned.alias_info is not None for returned in func._schema.returns)
            self._aliases[func] = aliases
        if not aliases:
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            for output in outputs:
                if isinstance(output, Tensor):
                    self._note_output(output)
            self._note_transient(func, args)
        if not aliases or func._schema.is_mutable:
            self.seconds += operator_seconds(func, args, kwargs, result, self.gpu)
        return result

    def _note_autocast(self) -> None:
        """Say so where a cast is expected that nothing does on the meta device."""
        if not self._is_autocast_told and any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
            self._is_autocast_told = True
            warnings.warn(
                "torch.autocast has no effect in a simulation, so bytes and seconds are those of the dtypes that the "
                "model has; give it the dtype that it computes in",
                stacklevel=2,
            )

    def _note_output(self, output: Tensor) -> None:
        for part in dense_parts(output):
            storage = part.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                size = rounded(storage.nbytes())
                self._sizes[key] = size
                self._references[key] = weakref.ref(storage, partial(self._note_free, key))
                self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _note_transient(self, func: Any, args: tuple[Any, ...]) -> None:
        """What a kernel allocates and frees inside itself, where it is large."""
        if getattr(func, "overloadpacket", None) is _FLASH_BACKWARD:
            # The gradient of the queries is summed up in fp32, and a number a row (mha_bwd of FlashAttention 2).
            query = args[1]
            transient = 4 * query.numel() + 4 * (query.numel() // query.shape[-1])
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + transient)

    def _note_free(self, key: int, reference: object) -> None:
        self.live_bytes -= self._sizes.pop(key)
        del self._references[key]

    def _note_gradient(self, param: Tensor) -> None:
        if self.shards > 1 and param.grad is not None:
            self._whole_gradients.append(param.grad)


class SimulatedMeter:
    """Live bytes of a simulation between marks."""

    allocator: Memory | None = None

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.marks: list[Mark] = []
        self.timeline: list[tuple[float, int]] = []

    def __enter__(self) -> SimulatedMeter:
        self._start_bytes = self._simulation.live_bytes
        self._simulation.peak_bytes = self._start_bytes
        self.mark()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.mark()

    def mark(self) -> None:
        """Close the current interval and begin the next."""
        simulation = self._simulation
        peak = simulation.peak_bytes - self._start_bytes
        simulation.spread_gradients()
        live = simulation.live_bytes - self._start_bytes
        simulation.peak_bytes = simulation.live_bytes
        self.marks.append(Mark(live, peak, simulation.seconds))

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes that it counts for a tensor."""
        return self._simulation.bytes_of(tensor)


class _SimulatedLink:
    """The link of a simulated GPU to its host."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._out_free_s = self._back_free_s = 0.0

    def carries(self, tensor: Tensor) -> bool:
        """All of them."""
        return True

    def send(self, tensor: Tensor) -> Copy:
        """Begin to copy when the link has nothing else to send."""
        with self._simulation.paused():
            there = tensor.clone()
        self._out_free_s = max(self._out_free_s, self._simulation.seconds) + self._seconds(tensor)
        return Copy(there, self._out_free_s)

    def fetch(self, tensor: Tensor) -> Copy:
        """Begin to copy back when the link has nothing else to fetch."""
        with self._simulation.paused():
            here = tensor.clone()
        self._simulation.enter(here)
        self._back_free_s = max(self._back_free_s, self._simulation.seconds) + self._seconds(tensor)
        return Copy(here, self._back_free_s)

    def wait(self, copy: Copy) -> None:
        """Let time pass until a copy is done."""
        self._simulation.seconds = max(self._simulation.seconds, copy.ready)

    def _seconds(self, tensor: Tensor) -> float:
        return tensor.untyped_storage().nbytes() / self._simulation.gpu.link_bytes_per_s


@contextmanager
def _gpu_attention() -> Iterator[None]:
    """Send attention to the kernels that torch chooses on a GPU, for what they save for backward; refuse recurrence.

    The functions themselves are replaced while the block runs: a ``TorchFunctionMode`` is off inside
    ``Tensor.backward``, where recomputation runs.
    """
    with ExitStack() as stack:
        stack.enter_context(_replaced(nn.functional, "scaled_dot_product_attention", _attention))
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            stack.enter_context(_replaced(torch._VF, name, partial(_recurrent, name)))
        masks = sys.modules.get("transformers.masking_utils")
        if hasattr(masks, "find_packed_sequence_indices"):
            # It looks at values to see that no sequences are packed, and without values takes it that some are.
            stack.enter_context(_replaced(masks, "find_packed_sequence_indices", lambda position_ids: None))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute have another value while the block runs."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention for half precision without a mask, memory-efficient attention else."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if is_half and attn_mask is None and query.shape[-1] <= _MOST_HEAD_DIM and query.dim() == 4:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return _first(flash(query, key, value, dropout_p, is_causal, False, scale=scale))
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return _first(efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale))


def _recurrent(name: str, *args: Any) -> None:
    raise NotSimulatedError(f"{name} saves a workspace whose size is not known without running it")


def _first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


class MetaCopies:
    """Copies of a model and what belongs to it, without values; a tensor that they share is copied once."""

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}
        self._originals: list[object] = []  # kept, for the memo is by identity

    def of(self, root: Any) -> Any:
        """A deep copy of ``root`` whose tensors have no values."""
        for tensor in tensors_of(root):
            self._enter(tensor)
        self._originals.append(root)
        try:
            return copy.deepcopy(root, self._memo)
        except (TypeError, AttributeError, copy.Error) as error:
            raise ValueError(
                f"a {type(root).__name__} is simulated as a deep copy, and cannot be copied ({error}); give it a "
                "__deepcopy__ or plan without gpu="
            ) from error

    def of_batch(self, batch: Any) -> Any:
        """A batch without values."""
        return tree_map_only(Tensor, self._enter, batch)

    def _enter(self, tensor: Tensor) -> Tensor:
        known = self._memo.get(id(tensor))
        if known is None:
            known = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
            if isinstance(tensor, nn.Parameter):
                known = nn.Parameter(known, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad:
                known.requires_grad_()
            self._memo[id(tensor)] = known
            self._originals.append(tensor)
        return known
