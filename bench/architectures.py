"""Real architectures with random weights, small enough that a plan takes a second: models, batches and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["ARCHITECTURES", "Architecture"]

VOCABULARY, LENGTH, ROWS = 256, 96, 4


class Architecture(NamedTuple):
    """What a training step needs; ``loss_fn`` is None where the model computes its loss."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any, torch.Tensor], torch.Tensor] | None


def _tokens(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def _language_model(config: str, **options: Any) -> Callable[[], Architecture]:
    """A causal model of transformers that computes its loss."""

    def make() -> Architecture:
        import transformers

        torch.manual_seed(0)
        built = getattr(transformers, config)(vocab_size=VOCABULARY, use_cache=False, **options)
        ids = _tokens()
        return Architecture(
            transformers.AutoModelForCausalLM.from_config(built).train(), {"input_ids": ids, "labels": ids}, None
        )

    return make


def _masked_model(config: str, **options: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        import transformers

        torch.manual_seed(0)
        built = getattr(transformers, config)(vocab_size=VOCABULARY, **options)
        ids = _tokens()
        model = transformers.AutoModelForMaskedLM.from_config(built).train()
        return Architecture(model, {"input_ids": ids, "labels": ids}, None)

    return make


def _translation_model(config: str, **options: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        import transformers

        torch.manual_seed(0)
        built = getattr(transformers, config)(
            vocab_size=VOCABULARY, use_cache=False, decoder_start_token_id=0, pad_token_id=0, **options
        )
        ids = _tokens()
        model = transformers.AutoModelForSeq2SeqLM.from_config(built).train()
        return Architecture(model, {"input_ids": ids, "labels": ids}, None)

    return make


def _image_model(config: str, size: int, **options: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        import transformers

        torch.manual_seed(0)
        model = transformers.AutoModelForImageClassification.from_config(
            getattr(transformers, config)(num_labels=10, **options)
        )
        pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
        return Architecture(model.train(), {"pixel_values": pixels, "labels": torch.arange(4)}, None)

    return make


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(x)))


class _UNet(nn.Module):
    """Ronneberger et al., 2015, with 16 to 128 channels: skips leap over everything between."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.down = nn.ModuleList(_ConvBlock(a, b) for a, b in zip((3, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(_ConvBlock(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.down:
            x = block(x if not skips else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2), skips.pop()], dim=1))
        return self.head(x)


class _MixerBlock(nn.Module):
    """Tolstikhin et al., 2021."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


def cnn() -> Architecture:
    """Eight convolution blocks with batch norm whose maps halve every other block."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    channels = 3
    for index in range(8):
        width = 16 * 2 ** (index // 2)
        blocks.append(nn.Sequential(_ConvBlock(channels, width), nn.MaxPool2d(2) if index % 2 else nn.Identity()))
        channels = width
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    batch = torch.randn(4, 3, 64, 64), torch.arange(4)
    return Architecture(model.train(), batch, nn.functional.cross_entropy)


def unet() -> Architecture:
    """Segmentation with skip connections."""
    torch.manual_seed(0)
    batch = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    return Architecture(_UNet().train(), batch, nn.functional.mse_loss)


def mlp_mixer() -> Architecture:
    """Six mixer blocks over 64 patches."""
    torch.manual_seed(0)
    blocks = [_MixerBlock(64, 96) for _ in range(6)]
    model = nn.Sequential(
        nn.Conv2d(3, 96, 8, stride=8), nn.Flatten(2), _Transpose(), nn.Sequential(*blocks), _Mean(), nn.Linear(96, 10)
    )
    return Architecture(model.train(), (torch.randn(8, 3, 64, 64), torch.arange(8)), nn.functional.cross_entropy)


def mlp() -> Architecture:
    """Blocks of very unlike width, with dropout."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(96, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 96))
        for width in (384, 96, 1024, 128, 384, 768)
    ]
    model = nn.Sequential(nn.Linear(16, 96), *blocks, nn.Linear(96, 1))
    return Architecture(model.train(), (torch.randn(512, 16), torch.randn(512, 1)), nn.functional.mse_loss)


class _Transpose(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1)


_LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_BERT = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
_VIT = {**_BERT, "image_size": 64, "patch_size": 8}

ARCHITECTURES: Mapping[str, Callable[[], Architecture]] = {
    "gpt2": _language_model("GPT2Config", n_embd=96, n_layer=6, n_head=6, n_positions=128),
    "llama": _language_model("LlamaConfig", **_LLAMA),
    "mistral": _language_model("MistralConfig", **_LLAMA, sliding_window=64),
    "qwen2": _language_model("Qwen2Config", **_LLAMA),
    "qwen3": _language_model("Qwen3Config", **_LLAMA, head_dim=16),
    "gemma2": _language_model("Gemma2Config", **_LLAMA, head_dim=16, sliding_window=64),
    "phi": _language_model("PhiConfig", **{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "opt": _language_model("OPTConfig", hidden_size=96, ffn_dim=384, num_hidden_layers=6, num_attention_heads=6),
    "gpt_neox": _language_model("GPTNeoXConfig", **_BERT),
    "bloom": _language_model("BloomConfig", hidden_size=96, n_layer=6, n_head=6),
    "mixtral": _language_model("MixtralConfig", **_LLAMA, num_local_experts=4),
    "bert": _masked_model("BertConfig", **_BERT),
    "roberta": _masked_model("RobertaConfig", **_BERT),
    "distilbert": _masked_model("DistilBertConfig", dim=96, hidden_dim=384, n_layers=6, n_heads=6),
    "electra": _masked_model("ElectraConfig", **_BERT, embedding_size=96),
    "t5": _translation_model("T5Config", d_model=96, d_ff=256, num_layers=4, num_heads=6, d_kv=16),
    "bart": _translation_model(
        "BartConfig",
        d_model=96,
        encoder_layers=4,
        decoder_layers=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=2,
    ),
    "vit": _image_model("ViTConfig", 64, **_VIT),
    "swin": _image_model(
        "SwinConfig",
        64,
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2, 2],
        num_heads=[2, 4, 8],
        window_size=4,
    ),
    "convnext": _image_model("ConvNextConfig", 64, hidden_sizes=[16, 32, 64, 96], depths=[2, 2, 4, 2]),
    "resnet": _image_model("ResNetConfig", 64, embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[2, 2, 2, 2]),
    "cnn": cnn,
    "unet": unet,
    "mlp_mixer": mlp_mixer,
    "mlp": mlp,
}
