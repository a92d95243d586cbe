"""In how many bits an optimizer keeps parameters and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._step.codecs import ParamCodec, StateCodec, param_dtypes, state_blocks, state_dtype
from gradkern.ops._step.rule import Codecs, State

__all__ = ["Precision"]

_MASTERS = (None, "fp32", "split16", "split8")
_STATES = (None, "fp32", "bf16", "int8")
_LARGEST_SEED = 2**53


@dataclass(frozen=True, slots=True)
class Precision:
    """What the user asked for.

    Attributes:
        master: Bits of 16-bit parameters beside the parameter itself: ``"fp32"`` a whole copy, ``"split16"`` the
            16 bits that bf16 lacks (exact), ``"split8"`` 8 of them, None none. Parameters of fp32 need none.
        state: ``"fp32"``, ``"bf16"`` (rounded stochastically), ``"int8"`` (8-bit floats relative to the largest of
            64); None: the dtype of the parameter, fp32 where it has a master.
        stochastic_rounding: Round bf16 parameters without a master stochastically.
        seed: Of all random bits.
    """

    master: str | None = None
    state: str | None = None
    stochastic_rounding: bool = False
    seed: int = 0

    def check(self, owner: str, states: Sequence[State]) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: An unknown name, options that exclude one another, or 8 bits of a state that does not exist.
        """
        if self.master not in _MASTERS:
            raise ValueError(f"{owner}: master is {self.master!r}, expected one of {', '.join(map(repr, _MASTERS))}")
        if self.state not in _STATES:
            raise ValueError(f"{owner}: state is {self.state!r}, expected one of {', '.join(map(repr, _STATES))}")
        if self.stochastic_rounding and self.master is not None:
            raise ValueError(
                f"{owner}: got master={self.master!r} and stochastic_rounding=True, expected one of them: a master "
                "keeps what rounding would lose; drop either"
            )
        if not 0 <= self.seed < _LARGEST_SEED:
            raise ValueError(f"{owner}: seed is {self.seed}, expected 0 <= seed < 2**53")
        if self.state is not None and not states:
            raise ValueError(
                f"{owner}: state={self.state!r}, but without momentum it keeps no state; pass state=None or a momentum"
            )

    def check_param(self, owner: str, param: torch.Tensor) -> None:
        """Refuse a parameter that the options do not fit.

        Raises:
            ValueError: A split master or stochastic rounding of an fp16 parameter.
        """
        if param.dtype != torch.float16:
            return
        if self.master in ("split16", "split8"):
            raise ValueError(
                f"{owner}: master={self.master!r} splits fp32 into bf16 and the rest, got a parameter of fp16 and "
                f"shape {tuple(param.shape)}; use master='fp32' or bf16 parameters"
            )
        if self.stochastic_rounding:
            raise ValueError(
                f"{owner}: stochastic_rounding is for bf16 parameters, got fp16 of shape {tuple(param.shape)}; use "
                "master='fp32' or bf16 parameters"
            )

    def needs_kernels(self, dtype: torch.dtype) -> bool:
        """Whether parameters of a dtype are kept in a way that torch's own update knows nothing of."""
        if dtype not in DTYPE_CODES:
            return False  # fp64 and complex are left to torch, in their own precision
        widened = self.master is not None or self.stochastic_rounding or self.state == "fp32"
        return self.state in ("bf16", "int8") or (widened and dtype != torch.float32)

    def check_kernels(self, owner: str, param: torch.Tensor, grad: torch.Tensor) -> None:
        """Refuse a parameter that only torch's own update can take, but keeps what that update knows nothing of.

        Raises:
            ValueError: The options would be ignored.
        """
        if self.needs_kernels(param.dtype):
            options = [f"master={self.master!r}"] if self.master is not None else []
            options += [f"state={self.state!r}"] if self.state is not None else []
            options += ["stochastic_rounding=True"] if self.stochastic_rounding else []
            raise ValueError(
                f"{owner}: {', '.join(options)} needs dense plain tensors and differentiable=False, got a "
                f"{type(param).__name__} of shape {tuple(param.shape)}, stride {param.stride()} with a {grad.layout} "
                f"gradient ({type(grad).__name__}); make it contiguous, or give it an optimizer without these options"
            )

    def random(self) -> bool:
        """Whether steps draw random bits, and must be numbered for it."""
        return self.stochastic_rounding or self.state in ("bf16", "int8")

    def param_codec(self, dtype: torch.dtype) -> ParamCodec:
        """How parameters of a dtype that kernels store are kept."""
        if dtype == torch.float32:
            return ParamCodec.FLOAT32
        if dtype == torch.float16:
            return ParamCodec.FLOAT16 if self.master is None else ParamCodec.FLOAT16_MASTER32
        if self.master is not None:
            return {
                "fp32": ParamCodec.BFLOAT16_MASTER32,
                "split16": ParamCodec.BFLOAT16_SPLIT16,
                "split8": ParamCodec.BFLOAT16_SPLIT8,
            }[self.master]
        return ParamCodec.BFLOAT16_STOCHASTIC if self.stochastic_rounding else ParamCodec.BFLOAT16

    def state_codec(self, param_dtype: torch.dtype) -> StateCodec:
        """How the state of such parameters is kept."""
        if self.state is not None:
            return {
                "fp32": StateCodec.FLOAT32,
                "bf16": StateCodec.BFLOAT16_STOCHASTIC,
                "int8": StateCodec.BLOCK8,
            }[self.state]
        if self.master is not None:
            return StateCodec.FLOAT32
        return StateCodec(DTYPE_CODES[param_dtype])

    def codecs(self, param: torch.Tensor, grad: torch.Tensor) -> Codecs:
        """How the operands of a step are stored."""
        return Codecs(self.param_codec(param.dtype), DTYPE_CODES[grad.dtype], self.state_codec(param.dtype))

    def new_state(self, param: torch.Tensor, states: Sequence[State], *, kernel: bool) -> dict[str, torch.Tensor]:
        """Zeroed state of a parameter, with the bits that its dtype lacks."""
        if not kernel:
            return {s.name: torch.zeros_like(param, memory_format=torch.preserve_format) for s in states}
        codec = self.state_codec(param.dtype)
        made: dict[str, torch.Tensor] = {}
        for state in states:
            made[state.name] = torch.zeros_like(
                param, dtype=state_dtype(codec), memory_format=torch.preserve_format, requires_grad=False
            )
            if codec == StateCodec.BLOCK8:
                blocks = state_blocks(param.numel())
                made[f"{state.name}_scale"] = torch.zeros(blocks, dtype=torch.uint8, device=param.device)
        remainder = param_dtypes(self.param_codec(param.dtype))[1]
        if remainder is not None:
            made["master"] = self.new_master(param, remainder)
        return made

    def new_master(self, param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The bits beside a parameter that nothing has been rounded off yet."""
        if dtype == torch.float32:
            return param.detach().to(torch.float32, memory_format=torch.preserve_format)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def follow(self, param: torch.Tensor, master: torch.Tensor, *, changed: bool) -> None:
        """Let a master follow a parameter that may have been changed from outside.

        An fp32 master tells by itself which elements have been: those that it rounds to no longer, ties to even or away
        from zero. The rest keep their bits, as where weights are clamped after every step, or swapped and back. What is
        left of a split master says nothing, and goes where a change is certain.

        Args:
            param: bf16 or fp16.
            master: fp32, or the bits that a bf16 parameter lacks; of its shape and strides, mutated.
            changed: Whether a change is certain.
        """
        if master.device != param.device or master.shape != param.shape:
            return  # sent elsewhere for the time being
        if master.dtype == torch.float32:
            now = param.detach().to(torch.float32)
            same = master.to(param.dtype) == now
            if param.dtype == torch.bfloat16:
                away = ((master.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
                same |= away == now
            master.copy_(torch.where(same, master, now))
        elif changed:
            master.zero_()

    def check_loaded(self, owner: str, param: torch.Tensor, saved: Mapping[str, Any], states: Sequence[State]) -> None:
        """Refuse saved state of another precision.

        Raises:
            ValueError: It was kept in other bits than this optimizer keeps.
        """
        if param.dtype not in DTYPE_CODES:
            return
        codec = self.state_codec(param.dtype)
        eight = codec == StateCodec.BLOCK8
        for state in states:
            value = saved.get(state.name)
            if not isinstance(value, torch.Tensor):
                continue
            if (value.dtype == torch.uint8) != eight or (self.state is not None and value.dtype != state_dtype(codec)):
                raise ValueError(
                    f"{owner}.load_state_dict: {state.name} was saved as {value.dtype}, this optimizer keeps "
                    f"{state_dtype(codec)} (state={self.state!r}); construct it with the state= of the saved one"
                )
            if eight and (value.shape != param.shape or value.stride() != param.stride()):
                raise ValueError(
                    f"{owner}.load_state_dict: {state.name} was saved for shape {tuple(value.shape)}, stride "
                    f"{value.stride()}, this parameter has shape {tuple(param.shape)}, stride {param.stride()}; blocks "
                    "of 8-bit state are cut from memory: lay the parameter out as it was"
                )
        remainder = param_dtypes(self.param_codec(param.dtype))[1]
        master = saved.get("master")
        if master is not None and master.dtype != remainder:
            raise ValueError(
                f"{owner}.load_state_dict: a master was saved as {master.dtype}, this optimizer keeps "
                f"{'none' if remainder is None else remainder} (master={self.master!r}); construct it with the master= "
                "of the saved one"
            )
