"""`T5EncoderModel`: the encoder of T5 1.1, with transformers' names.

Raffel et al. 2020, https://arxiv.org/abs/1910.10683; the gated feed-forward layer: Shazeer 2020,
https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..loading.config import Config, read_config
from ..loading.model import TransformersModel
from ..outputs import Output
from .layers import RMSNorm, attend

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "model_type": ("t5",),
    "is_decoder": (False,),
}
IRRELEVANT = {
    *("architectures", "dtype", "torch_dtype", "transformers_version"),  # bookkeeping
    *("dropout_rate", "classifier_dropout", "initializer_factor"),  # training
    *("dense_act_fn", "is_gated_act"),  # follow from feed_forward_proj
    *("decoder_start_token_id", "num_decoder_layers", "output_past", "scale_decoder_outputs"),
    *("is_encoder_decoder", "tie_word_embeddings", "use_cache"),  # all of these of the decoder
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # of no use to an encoder
    *("n_positions", "task_specific_params"),
}
GATED = "gated-gelu"  # the feed-forward layer of T5 1.1


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh, in this order of operations (Hendrycks and Gimpel 2016,
    https://arxiv.org/abs/1606.08415)."""
    inner = x + 0.044715 * torch.pow(x, 3.0)
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * inner))


def buckets_of(distance: Tensor, buckets: int, longest: int) -> Tensor:
    """The bucket of each distance from a token to the one that it attends to.

    Half of the buckets are for tokens that follow. In each half, half are for one distance each,
    and the others for ranges up to `longest` that grow exponentially.
    """
    half = buckets // 2
    exact = half // 2
    ahead = (distance > 0).long() * half
    distance = distance.abs()
    growth = torch.log(distance.float() / exact) / math.log(longest / exact)
    far = exact + (growth * (half - exact)).long()
    far = far.clamp(max=half - 1)
    return ahead + torch.where(distance < exact, distance, far)


class T5Attention(nn.Module):
    """Attention of tokens to all of them; scores are not scaled, but biased by distances.

    Only the first layer of the encoder has the table of biases.
    """

    def __init__(self, c: Config, has_biases: bool) -> None:
        super().__init__()
        inner = c.num_heads * c.d_kv
        self.heads = c.num_heads
        self.longest = c.relative_attention_max_distance
        self.q = nn.Linear(c.d_model, inner, bias=False)
        self.k = nn.Linear(c.d_model, inner, bias=False)
        self.v = nn.Linear(c.d_model, inner, bias=False)
        self.o = nn.Linear(inner, c.d_model, bias=False)
        if has_biases:
            buckets = c.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, c.num_heads)

    def biases(self, n: int) -> Tensor:
        """What is added to the scores of n tokens, (1, heads, n, n)."""
        table = self.relative_attention_bias
        positions = torch.arange(n, device=table.weight.device)
        distance = positions[None, :] - positions[:, None]
        biases: Tensor = table(buckets_of(distance, table.num_embeddings, self.longest))
        return biases.permute(2, 0, 1)[None].contiguous()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(b, n, d_model) -> (b, n, d_model); `bias` is added to scores, (b or 1, heads, n, n)."""
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        x = self.o(attend(q, k, v, self.heads, bias=bias, scale=1.0))
        return x


class T5SelfAttention(nn.Module):
    """Attention behind a norm and beside a shortcut."""

    def __init__(self, c: Config, has_biases: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(c, has_biases)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(b, n, d_model) -> (b, n, d_model); `bias` as of `T5Attention`."""
        x = x + self.SelfAttention(self.layer_norm(x), bias)
        return x


class T5DenseGatedActDense(nn.Module):
    """Two linear layers of which one gates the other, and the way back."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wi_1 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d_model) -> (b, n, d_model), in the dtype of `wo`."""
        x = gelu_tanh(self.wi_0(x)) * self.wi_1(x)
        x = self.wo(x.to(self.wo.weight.dtype))
        return x


class T5FeedForward(nn.Module):
    """The feed-forward layer behind a norm and beside a shortcut."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(c)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d_model) -> (b, n, d_model)."""
        x = x + self.DenseReluDense(self.layer_norm(x))
        return x


class T5Block(nn.Module):
    """Attention, feed-forward."""

    def __init__(self, c: Config, has_biases: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5SelfAttention(c, has_biases), T5FeedForward(c)])

    @property
    def attention(self) -> T5Attention:
        """Its attention."""
        first: Any = self.layer[0]
        attention: T5Attention = first.SelfAttention
        return attention

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(b, n, d_model) -> (b, n, d_model); `bias` as of `T5Attention`."""
        attention, feed_forward = self.layer
        return _finite(feed_forward(_finite(attention(x, bias))))


def _finite(x: Tensor) -> Tensor:
    """What float16 holds of a tensor: infinities become a little less than its largest number."""
    if x.dtype is not torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), largest - 1000, largest)
    return x.clamp(-bound, bound)


class T5Stack(nn.Module):
    """Everything below the prefix `encoder.`."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(T5Block(c, i == 0) for i in range(c.num_layers))
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, ...]:
        """(b, n, d_model) -> that, what each layer but the last makes of it, and the normed end.

        `seen` (b, n) is false on tokens that none attends to.
        """
        first: Any = self.block[0]
        bias: Tensor = first.attention.biases(x.shape[1])
        if seen is not None:
            lowest = torch.finfo(x.dtype).min
            bias = torch.where(seen[:, None, None, :], bias, lowest).contiguous()
        states = []
        for block in self.block:
            states.append(x)
            x = block(x, bias)
        return (*states, self.final_layer_norm(x))


@dataclass(eq=False)
class T5Output(Output):
    """What the encoder returns.

    Attributes:
        last_hidden_state: (b, n, d_model), after the final norm.
        hidden_states: before each layer, and the last; only if they are asked for.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


class T5EncoderModel(TransformersModel):
    """The encoder of T5 1.1.

    Args:
        config: the content of its `config.json`; absent keys take the defaults of transformers.

    Raises:
        ValueError: the config asks for something that is not implemented.
    """

    library: ClassVar[str] = "transformers"
    wide_in_float16: ClassVar[tuple[str, ...]] = ("wo",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(read_config(type(self).__name__, config, DEFAULTS, CHOICES, IRRELEVANT))
        c = self.config
        if c.feed_forward_proj != GATED:
            raise ValueError(
                f"feed_forward_proj = {c.feed_forward_proj!r} is not supported; it must be"
                f" {GATED!r}, as of T5 1.1"
            )
        if c.num_layers < 1 or c.relative_attention_num_buckets < 4:
            raise ValueError("T5 needs a layer, and four buckets of distances")
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = T5Stack(c)

    @classmethod
    def rename(cls, key: str) -> str | None:
        """Of a whole T5 only the encoder is of use; its tokens may be there a second time."""
        is_unused = key.startswith(("decoder.", "lm_head."))
        return None if is_unused or key == "encoder.embed_tokens.weight" else key

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> T5Output:
        """Encode token ids (b, n).

        Args:
            input_ids: (b, n).
            attention_mask: 0 on tokens that none may see, (b, n).
            output_hidden_states: return also what is before each layer, and the last.
            return_dict: False returns a plain tuple.
        """
        seen = None if attention_mask is None else attention_mask.bool()
        if seen is not None and seen.all():
            seen = None
        states = self.encoder(self.shared(input_ids), seen)
        return T5Output.asked(return_dict, states[-1], states if output_hidden_states else None)

    def get_input_embeddings(self) -> nn.Embedding:
        """The vectors of the tokens."""
        return self.shared
