"""Small models and their data, shared by the tests of the rollback package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradkern as gk
from gradkern.rollback import Ledger, Recorder
from gradkern.step_event import ParamStep, StepEvent

# For processes that are forked: what the first step and the first file would import anew in each of them, in seconds.
PRELOADED = ["torch", "torch._dynamo", "safetensors.torch", "gradkern.rollback", "recorded_models"]


class TokenModel(nn.Module):
    """Embedding, LayerNorm, Linear over tokens, with the output tied to the embedding."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.back(torch.tanh(self.hidden(self.norm(x)))))


def gpt2(layers: int = 2, width: int = 24, length: int = 12, vocabulary: int = 31) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLMLoss",
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        loss_type="ForCausalLM",
    )
    return LlamaForCausalLM(config)


class LoraLinear(nn.Module):
    """A frozen Linear and what is trained beside it, built as peft's ``lora.Linear`` is."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 8.0, dropout: float = 0.1) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling = {"default": alpha / rank}
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        lowered = self.lora_A["default"](self.lora_dropout["default"](x.to(self.lora_A["default"].weight.dtype)))
        return result + self.lora_B["default"](lowered) * self.scaling["default"]


def with_adapters(model: nn.Module, *names: str, rank: int = 2) -> nn.Module:
    """Freeze a model and put adapters at the Linear layers that have one of these names; in place."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], LoraLinear(module, rank))
    return model


def token_loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss for both models."""
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def token_data(samples: int = 24, length: int = 8, vocabulary: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, vocabulary, (samples, length), generator=generator)


class EventTap:
    """Stands between an optimizer and the recorder, to alter what is reported (sabotage) or to keep it."""

    def __init__(self, optimizer: torch.optim.Optimizer, alter: Callable[[StepEvent], StepEvent]) -> None:
        self._optimizer, self._alter = optimizer, alter

    param_groups = property(lambda self: self._optimizer.param_groups)
    state = property(lambda self: self._optimizer.state)

    def register_step_event_hook(self, hook):
        return self._optimizer.register_step_event_hook(lambda event: hook(self._alter(event)))


def scale_preconditioner(event: StepEvent, factor: float) -> StepEvent:
    def scaled(update: ParamStep) -> ParamStep:
        return update._replace(step_size=update.step_size * factor)

    return replace(event, params=tuple(map(scaled, event.params)))


@dataclass
class Run:
    """A finished recording."""

    model: nn.Module
    recorder: Recorder
    path: Path

    def ledger(self) -> Ledger:
        return gk.rollback.open(self.path)
