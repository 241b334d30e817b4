"""Textual inversion: the files that exist, against diffusers' loader."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightport.adapters.embeddings import spelled
from weightport.converters.repo.tokenizer import write_tokenizer
from weightport.runtime.models.clip import CLIPTextModel
from weightport.runtime.sampling.prompts import LastStates, Wanted, expanded
from weightport.runtime.text.textual_inversion import (
    Encoder,
    load_textual_inversion,
    unload_textual_inversion,
)
from weightport.runtime.text.tokenizer import CLIPTokenizer

from ...support.embedding_files import Theirs, write_all

DIM = 8
CONFIG = {
    "hidden_size": DIM,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
    "eos_token_id": 49407,
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repo")
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    CLIPTextModel(CONFIG).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def ours(repo: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    return (
        CLIPTokenizer.from_pretrained(repo, subfolder="tokenizer"),
        CLIPTextModel.from_pretrained(repo, subfolder="text_encoder"),
    )


def write(folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """An embedding in one of the forms that exist, and the arguments it needs."""
    one, three = torch.arange(DIM) / 10, torch.arange(3 * DIM).reshape(3, DIM) / 10
    if kind == "bin":
        torch.save({"<cat>": one}, folder / "cat.bin")
        return str(folder / "cat.bin"), {}
    if kind == "vectors":
        torch.save({"<cat>": three}, folder / "learned_embeds.bin")
        return str(folder), {}
    if kind == "safetensors":
        save_file({"<cat>": three}, folder / "cat.safetensors")
        return str(folder), {"weight_name": "cat.safetensors", "token": "<Dog>"}
    if kind == "webui":
        torch.save({"string_to_param": {"*": three}, "name": "my-style"}, folder / "style.pt")
        return str(folder / "style.pt"), {}
    if kind == "webui safetensors":
        save_file({"emb_params": three}, folder / "x.safetensors")
        return str(folder / "x.safetensors"), {"token": "x-style"}
    if kind == "state":
        return {"<cat>": one}, {}
    torch.save({"<cat>": one}, folder / "cat.bin")
    torch.save({"<b>": three}, folder / "b.bin")
    return [str(folder / "cat.bin"), str(folder / "b.bin")], {"token": ["<a>", "<b>"]}


@pytest.mark.parametrize(
    "kind", ["bin", "vectors", "safetensors", "webui", "webui safetensors", "state", "several"]
)
def test_equal_to_diffusers(
    repo: Path, ours: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path, kind: str
) -> None:
    tokenizer, encoder = ours
    theirs = Theirs(repo)
    given, arguments = write(tmp_path, kind)
    load_textual_inversion([Encoder("", tokenizer, encoder)], copy.deepcopy(given), **arguments)
    theirs.load_textual_inversion(given, **arguments)
    assert tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert len(tokenizer) > 49408
    table = theirs.text_encoder.get_input_embeddings().weight
    assert torch.equal(encoder.text_model.embeddings.token_embedding.weight, table)
    token = next(
        token for token in tokenizer.added_tokens_encoder if "_" not in token and "|" not in token
    )
    prompt = f"a photo of {token} and {token}."
    written = (
        theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
        if token.islower()
        else expanded(tokenizer, prompt)
    )
    ids = tokenizer(
        expanded(tokenizer, prompt), padding="max_length", return_tensors="pt"
    ).input_ids
    assert (
        ids.tolist() == theirs.tokenizer([written], padding="max_length", max_length=77).input_ids
    )
    with torch.no_grad():
        assert torch.equal(
            encoder(ids).last_hidden_state, theirs.text_encoder(ids).last_hidden_state
        )


def test_saved_and_loaded_again(ours: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    tokenizer, encoder = ours
    load_textual_inversion([Encoder("", tokenizer, encoder)], {"<cat>": torch.ones(2, DIM)})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "text_encoder")
    assert (
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab() == tokenizer.get_vocab()
    )
    again = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert torch.equal(again.text_model.embeddings.token_embedding.weight[-2:], torch.ones(2, DIM))


@pytest.mark.parametrize(
    ("content", "token", "message"),
    [
        ({"<a>": torch.ones(9)}, None, r"\[1, 9\] do not fit a text encoder of 8 channels"),
        ({"<a>": torch.ones(1, 1, DIM)}, None, r"has shape \[1, 1, 8\]"),
        ({"*": torch.ones(DIM)}, None, "does not name its token"),
        ({"emb_params": torch.ones(DIM)}, None, "does not name its token"),
        ({"cat</w>": torch.ones(DIM)}, None, "'cat</w>' is in the vocabulary already"),
        ({"<a>": torch.ones(DIM), "<b>": torch.ones(DIM)}, "<c>", "2 words, and token= names one"),
        ({"clip_l": torch.ones(1, DIM), "clip_l_out": torch.ones(9)}, "<a>", "do not fit"),
        ({"clip_g": torch.ones(1, 9)}, "<a>", "do not fit"),
        ({}, "<a>", "holds no vectors"),
        ({"<a>": torch.ones(DIM)}, ["<a>", "<b>"], "2 tokens are given for 1"),
    ],
)
def test_faulty_embeddings_change_nothing(
    ours: tuple[CLIPTokenizer, CLIPTextModel], content: Any, token: Any, message: str
) -> None:
    tokenizer, encoder = ours
    before = tokenizer.get_vocab()
    with pytest.raises(ValueError, match=message):
        load_textual_inversion([Encoder("", tokenizer, encoder)], [content], token)
    if token is None:
        with pytest.raises(ValueError, match=message):
            load_textual_inversion(
                [Encoder("", tokenizer, encoder)], [{"<good>": torch.ones(DIM)}, content]
            )
    assert tokenizer.get_vocab() == before
    assert len(encoder.text_model.embeddings.token_embedding.weight) == 49408


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return write_all(tmp_path_factory.mktemp("files"), (DIM, 2 * DIM, 3 * DIM))


def second(repo: Path) -> Encoder:
    """A text encoder as wide as the second of SDXL, with its tokenizer."""
    torch.manual_seed(1)
    model = CLIPTextModel({**CONFIG, "hidden_size": 2 * DIM})
    return Encoder("text_encoder_2", CLIPTokenizer.from_pretrained(repo / "tokenizer"), model)


def rows_of(encoder: Encoder, token: str, count: int) -> torch.Tensor:
    ids = encoder.tokenizer.convert_tokens_to_ids(spelled(token, count))
    return encoder.table.weight.detach()[ids]


def test_every_form_is_loaded_bit_for_bit(
    repo: Path, ours: tuple[CLIPTokenizer, CLIPTextModel], files: dict[str, tuple[Path, Any]]
) -> None:
    """Each word goes to the text encoders that it is for, and out of them again."""
    encoders = [Encoder("text_encoder", *ours), second(repo)]
    before = [encoder.table.weight.detach().clone() for encoder in encoders]
    for name, (path, expected) in files.items():
        if name == "sd2.bin":
            with pytest.raises(ValueError, match=path.name):
                load_textual_inversion(encoders, path)
            continue
        if name == "library":
            continue
        known = encoders[0].tokenizer.get_vocab()
        renamed = {token: f"<{token}>" if token in known else token for token in expected}
        given = next(iter(renamed.values())) if renamed.keys() & known.keys() else None
        load_textual_inversion(encoders, path, given)
        for token, kinds in expected.items():
            token = renamed[token]
            for role, vectors in kinds.items():
                encoder = encoders[1 if role == "clip_g" else 0]
                rows = torch.atleast_2d(vectors).float()
                if role.endswith("_out"):
                    given = [encoder.model.word_outputs[one] for one in spelled(token, len(rows))]
                    assert torch.equal(torch.stack(given), rows), name
                elif f"{role}_out" in kinds:
                    count = len(kinds[f"{role}_out"])
                    assert not rows_of(encoder, token, count).any(), name
                else:
                    assert torch.equal(rows_of(encoder, token, len(rows)), rows), name
        unload_textual_inversion(encoders)
        for encoder, table in zip(encoders, before, strict=True):
            assert torch.equal(encoder.table.weight, table), name
            assert not encoder.model.word_outputs, name
    path, expected = files["library"]
    load_textual_inversion(encoders, path)
    assert torch.equal(rows_of(encoders[0], "<cat>", 3), expected["<cat>"]["clip_l"])
    load_textual_inversion(encoders, path, weight_name="learned_embeds_2.safetensors")
    assert torch.equal(rows_of(encoders[1], "<cat>", 3), expected["<cat>"]["clip_g"])
    unload_textual_inversion(encoders, ["<cat>_2"])
    assert "<cat>_1" in encoders[1].tokenizer.get_vocab()
    assert "<cat>_2" not in encoders[1].tokenizer.get_vocab()
    with pytest.raises(ValueError, match="'<cat>_2' is not an added token"):
        unload_textual_inversion(encoders, "<cat>_2")


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_outputs_take_the_place_of_states_as_in_onetrainer(
    repo: Path, ours: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path, clip_skip: int
) -> None:
    """Its rule on transformers' encoder: zeros go in, and what stands at the tokens is replaced."""
    tokenizer, encoder = ours
    outputs = torch.arange(2 * DIM).reshape(2, DIM) / 10
    file = tmp_path / "<x>.safetensors"
    save_file({"emp_params": torch.zeros_like(outputs), "emp_params_out": outputs}, file)
    load_textual_inversion([Encoder("text_encoder", tokenizer, encoder)], file)
    prompts = ["<x>, a photo of <x>", "a photo"]
    wanted = Wanted(prompts, clip_skip=clip_skip)
    with torch.no_grad():
        found, _ = LastStates([tokenizer], [encoder], torch.float32).embed(wanted)
    theirs = Theirs(repo)
    theirs.tokenizer.add_tokens(["<x>", "<x>_1"])
    theirs.text_encoder.resize_token_embeddings(49410)
    theirs.text_encoder.get_input_embeddings().weight.data[49408:] = 0
    written = [prompt.replace("<x>", "<x> <x>_1") for prompt in prompts]
    ids = theirs.tokenizer(
        written, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    assert (ids == 49408).sum() == 2
    with torch.no_grad():
        answer = theirs.text_encoder(ids, output_hidden_states=True)
        inner = getattr(theirs.text_encoder, "text_model", theirs.text_encoder)
        wanted = inner.final_layer_norm(answer.hidden_states[-(clip_skip + 1)])
    for row, output in enumerate(outputs):
        wanted[ids == 49408 + row] = output
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="<x>, <x>_1 stand in place"):
        encoder.save_pretrained(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_a_pair_is_loaded_as_diffusers_documents_it(
    repo: Path, ours: tuple[CLIPTokenizer, CLIPTextModel], files: dict[str, tuple[Path, Any]]
) -> None:
    """A call for each text encoder, or one for both."""
    path, expected = files["pair.safetensors"]
    pair = expected["pair"]
    theirs = Theirs(repo)
    tokens = ["<s0>", "<s1>", "<s2>"]
    theirs.load_textual_inversion(pair["clip_l"], token=tokens)
    load_textual_inversion([Encoder("", *ours)], pair["clip_l"], tokens)
    assert ours[0].get_vocab() == theirs.tokenizer.get_vocab()
    table = theirs.text_encoder.get_input_embeddings().weight
    assert torch.equal(ours[1].get_input_embeddings().weight, table)
    load_textual_inversion([Encoder("", *ours)], path, "<p>")  # this encoder's half
    assert torch.equal(rows_of(Encoder("", *ours), "<p>", 3), pair["clip_l"])
    both = [Encoder("text_encoder", *ours), second(repo)]
    load_textual_inversion(both, {"clip_g": pair["clip_g"], "clip_l": pair["clip_l"]}, "<q>")
    assert torch.equal(rows_of(both[0], "<q>", 3), pair["clip_l"])
    assert torch.equal(rows_of(both[1], "<q>", 3), pair["clip_g"])


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_executed(ours: tuple[CLIPTokenizer, CLIPTextModel], tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(pickle.dumps({"<a>": Harmful(tmp_path / "touched")}))
    torch.save({"<a>": Harmful(tmp_path / "touched")}, tmp_path / "learned_embeds.bin")
    for path in (tmp_path / "bad.bin", tmp_path):
        with pytest.raises(ValueError, match="may be malicious"):
            load_textual_inversion([Encoder("", *ours)], path)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(OSError, match="other"):
        load_textual_inversion([Encoder("", *ours)], tmp_path, weight_name="other")
