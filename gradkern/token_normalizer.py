"""The mean over all tokens of an update, not the mean of the means of its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["TokenNormalizer"]


class TokenNormalizer:
    """Makes micro-batches of unequal length, in any number of processes, equal one large batch.

    Averaging each micro-batch over its own tokens and then averaging the averages weights a token of a short
    micro-batch more than one of a long micro-batch. What is right is the sum of all losses over the number of all
    tokens. Tokens are those that the loss counts, ``(labels != -100).sum()``; causal models of ``transformers`` shift
    their labels, there it is ``(labels[:, 1:] != -100).sum()``.

    *Where the tokens of an update are counted before its first backward*, divide each summed loss by
    :meth:`denominator`; no object is needed, and the gradients between backward and step are the final ones.

    *Where they are not*, make a normalizer for the optimizer and let :meth:`loss` pass every micro-batch. Gradients
    then are sums over tokens until ``optimizer.step()``, which divides by the total: for gradkern's optimizers and
    torch's fused ones by way of ``optimizer.grad_scale``, without a pass of its own, for any other in place. Works
    under ``torch.amp.GradScaler``, which multiplies its scale on top.

    Args:
        optimizer: Divides at its ``step()``. With several, one normalizer each, and the loss passes all of them.
        group: Processes that average their gradients, as DDP and FSDP do; by default all, if ``torch.distributed`` is
            initialised.

    Example:
        >>> import torch, gradkern as gk
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = gk.AdamW(model.parameters(), max_norm=1.0)
        >>> normalizer = gk.TokenNormalizer(opt)
        >>> for tokens in (3, 5):
        ...     normalizer.loss(model(torch.ones(tokens, 4)).sum(), tokens).backward()
        >>> opt.step()  # the gradient of the mean over 8 tokens

    Note:
        Sums overflow fp16 early: there use :meth:`denominator`. Clipping by hand needs :meth:`rescale_` before it;
        ``max_norm=`` of gradkern's optimizers does not. Nothing synchronises with a GPU.

    Numerics:
        Counts are added as integers; the denominator is rounded once to fp32, so it is exact up to 2^24 tokens if the
        number of processes is a power of two. If it is itself a power of two, nothing is rounded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, group: ProcessGroup | None = None) -> None:
        self._optimizer = optimizer
        self._group = group
        self._outer_scale: Tensor | None = None
        self._lent = False
        self._tokens: int | Tensor = 0
        self._rescaled = False
        self._backward = -1
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @staticmethod
    def denominator(tokens: int | Tensor, *, group: ProcessGroup | None = None) -> Tensor:
        """What every summed loss of an update is divided by: its tokens, averaged over processes.

        Averaged, because gradients are: ``mean over processes of (sum / denominator)`` is the sum of all losses over
        all tokens. Models of ``transformers`` take it as ``num_items_in_batch=``.

        Args:
            tokens: Tokens of this process, of all micro-batches of the update. With NCCL a tensor on the GPU.
            group: As of the class. A collective: every process of it must call.

        Returns:
            0-dim fp32, on the device of ``tokens``; 1 if there is no token anywhere.
        """
        total = torch.as_tensor(tokens, dtype=torch.int64).detach().clone().reshape(())
        processes = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total, group=group)
            processes = torch.distributed.get_world_size(group)
        return torch.where(total > 0, total.float() / processes, 1.0)

    def loss(self, loss: Tensor, tokens: int | Tensor, *, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
        """The loss to call ``backward()`` on; its tokens count once that runs.

        Args:
            loss: Of one micro-batch, one element.
            tokens: What ``loss`` is the sum or the mean over.
            reduction: What ``loss`` is: a ``"sum"``, or a ``"mean"``, which is multiplied by ``tokens``. A mean over
                no tokens is NaN and stays it.

        Returns:
            The sum.

        Raises:
            ValueError: ``tokens`` is negative or has more than one element, or ``reduction`` is unknown.
            RuntimeError: From ``backward()``, before anything is modified: :meth:`rescale_` has divided the gradients
                that those of this loss would be added to.
        """
        if reduction not in ("sum", "mean"):
            raise ValueError(f"TokenNormalizer.loss: reduction must be 'sum' or 'mean', got {reduction!r}")
        if isinstance(tokens, Tensor) and tokens.numel() != 1:
            raise ValueError(
                f"TokenNormalizer.loss: tokens has shape {tuple(tokens.shape)}, expected one number; count them, e.g. "
                "(labels != -100).sum()"
            )
        if not isinstance(tokens, Tensor) and tokens < 0:
            raise ValueError(f"TokenNormalizer.loss: tokens must be at least 0, got {tokens}")
        total = loss if reduction == "sum" else loss * tokens
        if total.requires_grad:
            total.register_hook(lambda _: self._count(tokens))
        return total

    def rescale_(self) -> None:
        """Divide the gradients in place now, for those who clip or look at them before ``step()``.

        A collective, as :meth:`denominator`. ``step()`` then divides no more.
        """
        scale = self.denominator(self._total(), group=self._group)
        for param in self._params():
            grad = param.grad
            if grad is None:
                continue
            if grad.dtype in (torch.bfloat16, torch.float16):
                grad.copy_(grad.float().div_(scale.to(grad.device)))  # else the divisor is rounded to 8 or 11 bits
            else:
                grad.div_(scale.to(grad.device))
        self._tokens, self._rescaled = 0, True

    def reset(self) -> None:
        """Forget the tokens counted.

        Needed only after gradients were dropped by ``zero_grad(set_to_none=False)`` without a step; where they are
        None, the next ``backward()`` notices.
        """
        self._tokens, self._rescaled = 0, False

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _params(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def _count(self, tokens: int | Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:  # several losses may share one: only before the first is no gradient there yet
            self._backward = backward
            if all(p.grad is None for p in self._params()):
                self.reset()  # an update begins; the last one may have been dropped without a step
            elif self._rescaled:
                raise RuntimeError(
                    "TokenNormalizer: the gradients have been divided by rescale_() already, expected step() and "
                    "zero_grad() before the next backward(); call rescale_() after the last micro-batch"
                )
        self._tokens = self._tokens + tokens  # a new tensor: the user's own may change

    def _total(self) -> Tensor:
        return torch.as_tensor(self._tokens, dtype=torch.int64, device=self._params()[0].device)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if any(arg is not None for arg in (*args[1:], kwargs.get("closure"))):
            raise RuntimeError(
                "TokenNormalizer: step() got a closure, whose tokens are not counted before it runs, expected none; "
                "divide the loss by TokenNormalizer.denominator(tokens) instead"
            )
        self._take_back()
        if self._rescaled:
            return
        given: Tensor | None = getattr(optimizer, "grad_scale", None)
        # A verdict without a scale: GradScaler has unscaled the gradients already, and an optimizer that then finds a
        # scale would trust the norms taken before that.
        unscaled = given is None and getattr(optimizer, "found_inf", None) is not None
        if unscaled or not getattr(optimizer, "_step_supports_amp_scaling", False):
            with torch.no_grad():
                self.rescale_()
            return
        scale = self.denominator(self._total(), group=self._group)
        self._outer_scale, self._lent = given, True
        optimizer.grad_scale = scale if given is None else scale * given  # type: ignore[attr-defined]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._take_back()
        self.reset()

    def _take_back(self) -> None:
        """Leave ``grad_scale`` as it was; a step that raised has not."""
        if self._lent:
            if self._outer_scale is None:
                del self._optimizer.grad_scale  # type: ignore[attr-defined]
            else:
                self._optimizer.grad_scale = self._outer_scale  # type: ignore[attr-defined]
        self._outer_scale, self._lent = None, False
