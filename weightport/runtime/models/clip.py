"""The text encoders of CLIP and OpenCLIP, with transformers' names.

Radford et al. 2021, https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..loading.config import Config, read_config
from ..loading.model import TransformersModel
from ..outputs import Output
from .layers import attend


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI trained CLIP with."""

    def forward(self, x: Tensor) -> Tensor:
        """In any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
}
DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "hidden_act": tuple(ACTIVATIONS),
    "model_type": ("clip_text_model",),
}
IRRELEVANT = {
    *("architectures", "dtype", "torch_dtype", "transformers_version"),  # bookkeeping
    *("attention_dropout", "dropout", "initializer_factor", "initializer_range"),  # training
    *("bos_token_id", "pad_token_id", "tie_word_embeddings"),  # of no use to an encoder
}


class CLIPAttention(nn.Module):
    """Attention of tokens to all of them; if causal, to themselves and to those before."""

    def __init__(self, c: Config, is_causal: bool) -> None:
        super().__init__()
        heads = c.num_attention_heads
        if heads < 1 or c.hidden_size % heads:
            raise ValueError(
                f"hidden_size {c.hidden_size} cannot be split into {heads} attention heads"
            )
        self.heads = heads
        self.is_causal = is_causal
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(b, n, hidden_size) -> (b, n, hidden_size); of each token the tokens `seen`, (b, 1, n,
        n), in place of those that it sees otherwise."""
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        is_causal = self.is_causal and seen is None
        x = self.out_proj(attend(q, k, v, self.heads, is_causal, seen))
        return x


class CLIPMLP(nn.Sequential):
    """Two linear layers and the activation between them, of (b, n, hidden_size)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.activation = ACTIVATIONS[c.hidden_act]()
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    def __init__(self, c: Config, is_causal: bool) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(c, is_causal)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = CLIPMLP(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(b, n, hidden_size) -> (b, n, hidden_size); `seen` as of `CLIPAttention`."""
        x = x + self.self_attn(self.layer_norm1(x), seen)
        x = x + self.mlp(self.layer_norm2(x))
        return x


class CLIPTextEmbeddings(nn.Module):
    """The sum of token and position embeddings."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(b, n) -> (b, n, hidden_size)."""
        n = input_ids.shape[-1]
        limit = self.position_embedding.num_embeddings
        if n > limit:
            raise ValueError(f"{n} tokens are given but the text encoder has {limit} positions")
        x: Tensor = self.token_embedding(input_ids)
        return x + self.position_embedding.weight[:n]


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, c: Config, is_causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(c, is_causal) for _ in range(c.num_hidden_layers)
        )

    def forward(self, x: Tensor, seen: Tensor | None = None) -> tuple[Tensor, ...]:
        """(b, n, hidden_size) -> that, and what each layer makes of it; `seen` as of
        `CLIPAttention`."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], seen))
        return tuple(states)


@dataclass(eq=False)
class CLIPTextOutput(Output):
    """What the text encoders return.

    Attributes:
        last_hidden_state: (b, n, d), after the final norm.
        pooler_output: (b, d), the last hidden state at the end-of-text token.
        hidden_states: before and after each layer, (b, n, d) each, without the final norm; [-2] is
            the penultimate; only if they are asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None


@dataclass(eq=False)
class CLIPTextProjectionOutput(Output):
    """What `CLIPTextModelWithProjection` returns.

    `text_embeds` (b, projection_dim) is the projected pooler output.
    """

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


CLIPOutput = CLIPTextOutput | CLIPTextProjectionOutput


class CLIPTextTransformer(nn.Module):
    """Everything below the prefix `text_model.`."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        if not isinstance(c.eos_token_id, int):
            raise ValueError(
                f"eos_token_id = {c.eos_token_id!r} is not supported; it must be one id"
            )
        self.eos_token_id = c.eos_token_id
        self.embeddings = CLIPTextEmbeddings(c)
        self.encoder = CLIPEncoder(c, is_causal=True)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CLIPTextOutput:
        """Encode token ids (b, n); `attention_mask` is 0 on those that none may see, (b, n)."""
        seen = None if attention_mask is None else _seen(attention_mask)
        states = self.encoder(self.embeddings(input_ids), seen)
        last = self.final_layer_norm(states[-1])
        # older configs say 2, which is wrong; there the end of text is the highest id
        # (transformers #24773)
        is_end = input_ids if self.eos_token_id == 2 else input_ids == self.eos_token_id
        rows = torch.arange(len(last), device=last.device)
        ends = is_end.int().argmax(dim=-1)
        return CLIPTextOutput(last, last[rows, ends], states)


def _seen(attention_mask: Tensor) -> Tensor | None:
    """Which tokens each token sees, (b, 1, n, n): of those in the mask, itself and those before;
    None if that is all of these."""
    mask = attention_mask.bool()
    if mask.all():
        return None
    n = mask.shape[-1]
    return mask[:, None, None, :] & mask.new_ones(n, n).tril()


class CLIPTextEncoder(TransformersModel):
    """What the two text encoders share.

    Args:
        config: the content of `text_encoder/config.json`; absent keys take the defaults of
            transformers.

    Attributes:
        word_outputs: added token -> (d,), which takes the place of the state that pipelines take.

    Raises:
        ValueError: the config asks for something that is not implemented.
    """

    library: ClassVar[str] = "transformers"
    word_outputs: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(read_config(type(self).__name__, config, DEFAULTS, CHOICES, IRRELEVANT))
        self.text_model = CLIPTextTransformer(self.config)

    @classmethod
    def rename(cls, key: str) -> str | None:
        """transformers 5 writes no `text_model.`; older files hold the numbers of the positions."""
        if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            key = f"text_model.{key}"
        return None if key == "text_model.embeddings.position_ids" else key

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CLIPOutput:
        """Encode token ids (b, n).

        Args:
            input_ids: (b, n).
            attention_mask: 0 on tokens that none may see, (b, n).
            output_hidden_states: return also what is before and after each layer.
            return_dict: False returns a plain tuple.
        """
        encoded: CLIPTextOutput = self.text_model(input_ids, attention_mask)
        states = encoded.hidden_states if output_hidden_states else None
        last = encoded.last_hidden_state
        return CLIPTextOutput.asked(return_dict, last, encoded.pooler_output, states)

    def _unsaved(self) -> str:
        words = ", ".join(self.word_outputs)
        if not words:
            return ""
        return (
            f"vectors of {words} stand in place of its answers, for which its files have no place;"
            " unload_textual_inversion first"
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The vectors of the tokens."""
        return self.text_model.embeddings.token_embedding

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Give the table of tokens so many rows: the first ones stay, new ones are zero."""
        table = self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == table.num_embeddings:
            return table
        old = table.weight
        new = old.new_zeros(new_num_tokens, table.embedding_dim)
        kept = min(len(old), new_num_tokens)
        new[:kept] = old[:kept]
        table.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        table.num_embeddings = new_num_tokens
        self.register_to_config(vocab_size=new_num_tokens)
        return table


class CLIPTextModel(CLIPTextEncoder):
    """The text encoder; returns `CLIPTextOutput`."""

    @classmethod
    def rename(cls, key: str) -> str | None:
        """As of both text encoders; a projection is of no use here."""
        return None if key == "text_projection.weight" else super().rename(key)


class CLIPTextModelWithProjection(CLIPTextEncoder):
    """`CLIPTextModel` with a linear layer on top of the pooled state: SDXL's second encoder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(
            self.config.hidden_size, self.config.projection_dim, bias=False
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CLIPTextProjectionOutput:
        """As of both text encoders, and the pooled state projected."""
        encoded: CLIPTextOutput = self.text_model(input_ids, attention_mask)
        projected = self.text_projection(encoded.pooler_output)
        states = encoded.hidden_states if output_hidden_states else None
        last = encoded.last_hidden_state
        return CLIPTextProjectionOutput.asked(return_dict, projected, last, states)
