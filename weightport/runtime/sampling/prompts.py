"""Prompts to what the model sees of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .arguments import Prompts, Texts, require


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
            texts = listed(prompts.prompt, 1)
            positive, pooled = self.embed(texts, prompts.prompt_2, prompts.clip_skip or 0)
        negative = prompts.negative_prompt_embeds
        negative_pooled = prompts.negative_pooled_prompt_embeds
        if negative is None and is_guided:
            has_none = prompts.negative_prompt is None
            if has_none and pooled is not None and self.zeros_for_no_negative:
                negative = torch.zeros_like(positive)
                negative_pooled = torch.zeros_like(pooled)
            else:
                texts = listed(prompts.negative_prompt, len(positive))
                negative, negative_pooled = self.embed(texts, prompts.negative_prompt_2, 0)
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

    def embed(
        self, texts: list[str], texts_2: Texts | None, clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """What the model sees of texts, and for SDXL the projected pooled state of the last text
        encoder."""
        raise NotImplementedError

    def _pairs(self, clip_skip: int) -> list[tuple[Tokenizer, TextEncoder]]:
        """Tokenizers with their text encoders.

        Raises:
            ValueError: there is none, or no layer of it is left.
        """
        both = zip(self.tokenizers, self.encoders, strict=True)
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        advice = "give embeddings, of negative prompts too"
        require(bool(pairs), f"there is no tokenizer or no text encoder; {advice}")
        left = pairs[0][1].config.num_hidden_layers - clip_skip
        require(left > 0, f"clip_skip = {clip_skip} leaves no layer of the text encoder")
        return pairs


class LastStates(PromptEncoder):
    """Of SD: the last hidden state after the final norm, or an earlier one after that norm."""

    def embed(
        self, texts: list[str], texts_2: Texts | None, clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """The hidden state (b, tokens, d); nothing is pooled."""
        ((tokenizer, encoder),) = self._pairs(clip_skip)
        model: Any = encoder
        ids = tokenize(tokenizer, texts).to(model.device)
        output = model(ids, output_hidden_states=True)
        state = output.last_hidden_state
        if clip_skip:
            inner = getattr(model, "text_model", model)  # transformers 5 has no such level
            state = inner.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        return _with_word_outputs(state, ids, tokenizer, encoder), None


class PenultimateStates(PromptEncoder):
    """Of SDXL: the penultimate states of both text encoders, or earlier ones, side by side."""

    def embed(
        self, texts: list[str], texts_2: Texts | None, clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """The hidden states (b, tokens, d + d2), and the pooled one (b, d2)."""
        pairs = self._pairs(clip_skip)
        # the refiner's one encoder gets the first prompt
        second = listed(texts_2 or texts, len(texts), "texts for the second text encoder")
        states = []
        pooled = None
        for (tokenizer, encoder), prompts in zip(pairs, (texts, second), strict=False):
            ids = tokenize(tokenizer, prompts).to(encoder.device)
            output = encoder(ids, output_hidden_states=True)
            state = output.hidden_states[-(clip_skip + 2)]
            states.append(_with_word_outputs(state, ids, tokenizer, encoder))
            pooled = output[0]
        return torch.cat(states, dim=-1), pooled


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


def tokenize(tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Texts -> token ids (b, model_max_length); warns of what does not fit."""
    limit = tokenizer.model_max_length
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
