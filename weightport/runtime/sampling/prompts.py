"""Prompts to what the model sees of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Prompts, Texts, require

ADVICE = "give embeddings, of negative prompts too"


class Tokenizer(Protocol):
    """Texts to token ids: ours, or one of transformers."""

    @property
    def model_max_length(self) -> int:
        """Tokens that a text encoder takes."""
        ...

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Special and added token -> id."""
        ...

    def decode(self, *arguments: Any, **named: Any) -> Any:
        """Token ids -> a text."""
        ...

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Texts -> token ids."""
        ...


class TextEncoder(Protocol):
    """Token ids to hidden states."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Token ids -> hidden states (b, tokens, d), and for SDXL the pooled ones first, (b, d)."""
        ...


class Embeddings(NamedTuple):
    """What the model sees: of the prompts and of the negative prompts, (b, tokens, d), and of both
    what SDXL pools, (b, d)."""

    prompt: Tensor
    negative: Tensor | None
    pooled: Tensor | None
    negative_pooled: Tensor | None


class Wanted(NamedTuple):
    """What is asked of text encoders: texts, those for the second and the third if they are others,
    how many of the last layers to leave out, and how many tokens T5 takes."""

    texts: list[str]
    texts_2: Texts | None = None
    texts_3: Texts | None = None
    clip_skip: int = 0
    length: int = 512

    def of(self, others: Texts | None) -> list[str]:
        """The texts for another text encoder.

        Raises:
            ValueError: there is another number of them.
        """
        return listed(others or self.texts, len(self.texts), "texts for another text encoder")


@dataclass(frozen=True)
class PromptEncoder:
    """The text encoders of a pipeline; subclasses say which of their states the model sees.

    Attributes:
        tokenizers: None where the pipeline has none.
        encoders: one for each tokenizer, likewise.
        dtype: of the embeddings.
        zeros_for_no_negative: whether SDXL's model sees zeros where no negative prompt is given.
    """

    tokenizers: Sequence[Tokenizer | None]
    encoders: Sequence[TextEncoder | None]
    dtype: torch.dtype
    zeros_for_no_negative: bool = False

    def encode(self, prompts: Prompts, device: Any, is_guided: bool) -> Embeddings:
        """Encode the prompts, and with guidance the negative ones, unless embeddings are given in
        their place.

        Raises:
            ValueError: there is no text encoder, or the texts do not fit together.
        """
        positive = prompts.prompt_embeds
        pooled = prompts.pooled_prompt_embeds
        if positive is None:
            positive, pooled = self.embed(
                Wanted(
                    listed(prompts.prompt, 1),
                    prompts.prompt_2,
                    prompts.prompt_3,
                    prompts.clip_skip or 0,
                    prompts.max_sequence_length,
                )
            )
        negative = prompts.negative_prompt_embeds
        negative_pooled = prompts.negative_pooled_prompt_embeds
        if negative is None and is_guided:
            has_none = prompts.negative_prompt is None
            if has_none and pooled is not None and self.zeros_for_no_negative:
                negative = torch.zeros_like(positive)
                negative_pooled = torch.zeros_like(pooled)
            else:
                negative, negative_pooled = self.embed(
                    Wanted(
                        listed(prompts.negative_prompt, len(positive)),
                        prompts.negative_prompt_2,
                        prompts.negative_prompt_3,
                        length=prompts.max_sequence_length,
                    )
                )
        pooled_dtype = self.dtype if pooled is None else pooled.dtype
        count = prompts.num_images_per_prompt

        def each(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.to(device, dtype).repeat_interleave(count, 0)

        return Embeddings(
            each(positive, self.dtype),
            None if negative is None else each(negative, self.dtype),
            None if pooled is None else each(pooled, pooled_dtype),
            None if negative_pooled is None else each(negative_pooled, pooled_dtype),
        )

    def embed(self, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
        """What the model sees of texts, and pooled states where it takes them too."""
        raise NotImplementedError

    def _pairs(self, clip_skip: int) -> list[tuple[Tokenizer, TextEncoder]]:
        """Tokenizers with their text encoders.

        Raises:
            ValueError: there is none, or no layer of it is left.
        """
        both = zip(self.tokenizers, self.encoders, strict=True)
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        require(bool(pairs), f"there is no tokenizer or no text encoder; {ADVICE}")
        left = pairs[0][1].config.num_hidden_layers - clip_skip
        require(left > 0, f"clip_skip = {clip_skip} leaves no layer of the text encoder")
        return pairs


class LastStates(PromptEncoder):
    """Of SD: the last hidden state after the final norm, or an earlier one after that norm."""

    def embed(self, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
        """The hidden state (b, tokens, d); nothing is pooled."""
        clip_skip = wanted.clip_skip
        ((tokenizer, encoder),) = self._pairs(clip_skip)
        model: Any = encoder
        ids = tokenize(tokenizer, wanted.texts).to(model.device)
        output = model(ids, output_hidden_states=True)
        state = output.last_hidden_state
        if clip_skip:
            inner = getattr(model, "text_model", model)  # transformers 5 has no such level
            state = inner.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        return _with_word_outputs(state, ids, tokenizer, encoder), None


class PenultimateStates(PromptEncoder):
    """Of SDXL: the penultimate states of both text encoders, or earlier ones, side by side."""

    def embed(self, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
        """The hidden states (b, tokens, d + d2), and the pooled one (b, d2)."""
        pairs = self._pairs(wanted.clip_skip)
        # the refiner's one encoder gets the first prompt
        texts = (wanted.texts, wanted.of(wanted.texts_2))
        states = []
        pooled = None
        for pair, prompts in zip(pairs, texts, strict=False):
            state, pooled = penultimate(pair, prompts, wanted.clip_skip)
            states.append(state)
        return torch.cat(states, dim=-1), pooled


@dataclass(frozen=True)
class ThreeEncoders(PromptEncoder):
    """Of SD 3: the penultimate states of both CLIPs side by side, padded with zeros to the width of
    T5's last states, and these below; zeros if there is no T5.

    Attributes:
        width: of T5's states.
    """

    width: int = 4096

    def embed(self, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
        """The states (b, tokens + length, width), and the pooled ones (b, d + d2)."""
        *clips, t5 = zip(self.tokenizers, self.encoders, strict=True)
        require(all(None not in pair for pair in clips), f"a CLIP is missing; {ADVICE}")
        self._pairs(wanted.clip_skip)
        first, pooled = penultimate(clips[0], wanted.texts, wanted.clip_skip)
        texts_2 = wanted.of(wanted.texts_2)
        second, pooled_2 = penultimate(clips[1], texts_2, wanted.clip_skip)
        states = torch.cat([first, second], dim=-1)
        if t5[1] is None:
            below = states.new_zeros(len(states), wanted.length, self.width)
        else:
            below = last_states(t5, wanted.of(wanted.texts_3), wanted.length)
        padded = F.pad(states, (0, below.shape[-1] - states.shape[-1]))
        return torch.cat([padded, below], dim=-2), torch.cat([pooled, pooled_2], dim=-1)


class PooledAndT5(PromptEncoder):
    """Of Flux: the last states of T5, and what CLIP pools."""

    def embed(self, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
        """The states (b, length, d2), and the pooled one (b, d)."""
        pairs = self._pairs(0)
        require(len(pairs) == 2, f"a tokenizer or text encoder is missing; {ADVICE}")
        (tokenizer, encoder), t5 = pairs
        ids = tokenize(tokenizer, wanted.texts).to(encoder.device)
        pooled: Tensor = encoder(ids).pooler_output
        return last_states(t5, wanted.of(wanted.texts_2), wanted.length), pooled


def penultimate(pair: Any, texts: list[str], clip_skip: int) -> tuple[Tensor, Tensor]:
    """The penultimate state of a CLIP, or an earlier one, and the projected pooled state."""
    tokenizer, encoder = pair
    ids = tokenize(tokenizer, texts).to(encoder.device)
    output = encoder(ids, output_hidden_states=True)
    state = output.hidden_states[-(clip_skip + 2)]
    return _with_word_outputs(state, ids, tokenizer, encoder), output[0]


def last_states(pair: Any, texts: list[str], length: int) -> Tensor:
    """The last state of T5, (b, length, d)."""
    tokenizer, encoder = pair
    ids = tokenize(tokenizer, texts, length).to(encoder.device)
    states: Tensor = encoder(ids)[0]
    return states


def _with_word_outputs(
    state: Tensor, ids: Tensor, tokenizer: Tokenizer, encoder: TextEncoder
) -> Tensor:
    """A hidden state (b, tokens, d) with the vectors of words that have some for it."""
    outputs: Mapping[str, Tensor] = getattr(encoder, "word_outputs", {})
    for token, vector in outputs.items():
        is_word = ids == tokenizer.added_tokens_encoder[token]
        state = torch.where(is_word[..., None], vector.to(state), state)
    return state


def listed(text: Texts | None, count: int, what: str = "negative prompts") -> list[str]:
    """Texts for `count` prompts: one for all, or one for each.

    Raises:
        ValueError: there is another number of them.
    """
    if text is None or isinstance(text, str):
        return [text or ""] * count
    fits = count == 1 or len(text) == count
    require(fits, f"{len(text)} {what} are given for {count} prompts")
    return text


def tokenize(tokenizer: Tokenizer, prompts: list[str], length: int | None = None) -> Tensor:
    """Texts -> token ids (b, length), by default as many as the text encoder takes; warns of what
    does not fit."""
    limit = length or tokenizer.model_max_length
    prompts = [expanded(tokenizer, prompt) for prompt in prompts]
    for prompt in prompts:
        whole: list[int] = tokenizer(prompt).input_ids
        if rest := tokenizer.decode(whole[limit - 1 : -1]).strip():
            warnings.warn(
                f"the prompt is longer than {limit} tokens; this is left out: {rest}", stacklevel=2
            )
    encoded = tokenizer(
        prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def expanded(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt with textual inversions of several vectors written out: `tok` becomes `tok tok_1
    tok_2`.

    As everywhere in CLIP, case does not matter.
    """
    known = {token.lower(): token for token in tokenizer.added_tokens_encoder}
    for name, token in known.items():
        series = [token]
        while (following := f"{name}_{len(series)}") in known:
            series.append(known[following])
        if len(series) > 1:
            written = " ".join(series).replace("\\", r"\\")
            prompt = re.sub(rf"{re.escape(token)}(?!_\d)", written, prompt, flags=re.I)
    return prompt
