"""Scripts as public documentation shows them, run with both imports on one narrow repository."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ..support.pipeline_pairs import build, controlnets

Script = Callable[[Any, Path], Any]
SCRIPTS: dict[str, Script] = {}
RUN: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}


def script(act: Script) -> Script:
    SCRIPTS[act.__name__] = act
    return act


def part(library: Any, module: str) -> Any:
    """A module of the library, such as `utils`."""
    return importlib.import_module(f"{library.__name__}.{module}")


def seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(7)


def loaded(library: Any, repo: Path, **options: Any) -> Any:
    pipe = library.StableDiffusionPipeline.from_pretrained(repo, safety_checker=None, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts") / "repo"
    theirs, _ = build("StableDiffusionPipeline")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@script
def text_to_image(library: Any, repo: Path) -> Any:
    pipe = loaded(library, repo)
    return pipe("a photo of a cat", generator=seeded(), **RUN).images[0]


@script
def a_tuple_of_images(library: Any, repo: Path) -> Any:
    images, flags = loaded(library, repo)("a", generator=seeded(), return_dict=False, **RUN)
    assert flags is None
    return images


@script
def an_output_as_a_dict(library: Any, repo: Path) -> Any:
    out = loaded(library, repo)("a", generator=seeded(), **RUN)
    assert list(out.keys()) == ["images"]
    return out["images"]


@script
def another_scheduler(library: Any, repo: Path) -> Any:
    pipe = loaded(library, repo)
    kind = library.DPMSolverMultistepScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    return pipe("a", generator=seeded(), **RUN).images


@script
def a_tokenizer_and_text_encoder_of_transformers(library: Any, repo: Path) -> Any:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(repo / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(repo / "text_encoder")
    pipe = loaded(library, repo, tokenizer=tokenizer, text_encoder=encoder)
    return pipe("a long prompt " * 20, generator=seeded(), **RUN).images


@script
def a_grid_of_images(library: Any, repo: Path) -> Any:
    utils = part(library, "utils")
    image = utils.load_image(picture())
    picture().save(repo.parent / "picture.png")
    again = utils.load_image(str(repo.parent / "picture.png"))
    return np.asarray(utils.make_image_grid([image, again], rows=1, cols=2))


@script
def noise_of_ones_own(library: Any, repo: Path) -> Any:
    utils = part(library, "utils.torch_utils")
    latents = utils.randn_tensor((1, 4, 16, 16), generator=[seeded()], dtype=torch.float32)
    return loaded(library, repo)("a", latents=latents, **RUN).images


@script
def an_optimised_schedule(library: Any, repo: Path) -> Any:
    ays = part(library, "schedulers").AysSchedules
    steps = ays["StableDiffusionTimesteps"]
    pipe = loaded(library, repo)
    pipe.scheduler = library.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    images = pipe("a", timesteps=steps, generator=seeded(), output_type="np").images
    return images, torch.tensor(ays["StableDiffusionXLSigmas"])


@script
def guidance_that_ends(library: Any, repo: Path) -> Any:
    callbacks = part(library, "callbacks")
    cut = callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    both = callbacks.MultiPipelineCallbacks([cut])
    pipe = loaded(library, repo)
    first = pipe("a", generator=seeded(), callback_on_step_end=cut, **RUN).images
    return first, pipe("a", generator=seeded(), callback_on_step_end=both, **RUN).images


@script
def a_callback_that_looks(library: Any, repo: Path) -> Any:
    seen = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told = (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.clip_skip)
        seen.append(torch.tensor([*map(float, (*told[:2], told[2] or 0)), pipe.num_timesteps]))
        return tensors

    loaded(library, repo)("a", generator=seeded(), callback_on_step_end=look, **RUN)
    return torch.stack(seen)


@script
def a_callback_of_the_older_form(library: Any, repo: Path) -> Any:
    pipe = loaded(library, repo)
    seen = []

    def look(i: int, t: Any, latents: torch.Tensor) -> None:
        seen.append(torch.cat([torch.tensor([float(i), float(t)]), latents.flatten()]))

    run = RUN | {"num_inference_steps": 5, "callback": look, "callback_steps": 2}
    for name in ("PNDMScheduler", "HeunDiscreteScheduler"):  # of more visits than steps
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config)
        pipe("a", generator=seeded(), **run)
    return torch.stack(seen)


@script
def the_loop_by_hand(library: Any, repo: Path) -> Any:
    pipe = loaded(library, repo)
    scheduler = library.DDIMScheduler.from_pretrained(repo, subfolder="scheduler")
    tokens = pipe.tokenizer(
        ["a", ""], padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = pipe.text_encoder(tokens.input_ids)[0]
        scheduler.set_timesteps(3)
        latents = torch.randn((1, pipe.unet.config.in_channels, 16, 16), generator=seeded())
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(torch.cat([latents] * 2), timestep=t)
            noise = pipe.unet(seen, t, encoder_hidden_states=states)["sample"]
            text, none = noise.chunk(2)
            guided = none + 7.5 * (text - none)
            latents = scheduler.step(guided, t, latents)["prev_sample"]
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample


@script
def training_a_step(library: Any, repo: Path) -> Any:
    unet = library.UNet2DConditionModel.from_pretrained(repo, subfolder="unet")
    noise_scheduler = library.DDPMScheduler(num_train_timesteps=1000)
    clean = torch.randn((2, 4, 16, 16), generator=seeded())
    noise = torch.randn(clean.shape, generator=seeded())
    timesteps = torch.tensor([10, 500])
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    states = torch.randn((2, 12, 16), generator=seeded())
    predicted = unet(noisy, timesteps, states, return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(predicted, noise)
    loss.backward()
    assert unet.num_parameters() == sum(one.numel() for one in unet.parameters())
    return loss, unet.conv_in.weight.grad


@script
def models_by_their_options(library: Any, repo: Path) -> Any:
    vae = library.AutoencoderKL(3, 3, block_out_channels=(32,), norm_num_groups=8)
    unet = library.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    control = library.ControlNetModel.from_unet(unet)
    shapes = [torch.tensor(one.shape) for one in (*vae.parameters(), *unet.parameters())]
    again = type(unet).from_config(unet.config)
    assert again.config.cross_attention_dim == unet.config["cross_attention_dim"] == 32
    assert control.config.block_out_channels == (32, 64)
    return torch.cat(sorted(shapes, key=lambda shape: shape.tolist()))


@script
def encode_and_decode(library: Any, repo: Path) -> Any:
    vae = part(library, "models").AutoencoderKL.from_pretrained(repo, subfolder="vae")
    images = part(library, "image_processor").VaeImageProcessor(vae_scale_factor=2)
    pixels = images.preprocess(picture())
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        other = vae.encode(-pixels).latent_dist
        whole = vae(pixels).sample
    sample = posterior.sample(generator=seeded())
    of_the_posterior = (posterior.kl(), posterior.kl(other), posterior.nll(sample), posterior.var)
    return (whole, sample, *of_the_posterior)


@script
def pixels_by_hand(library: Any, repo: Path) -> Any:
    kind = part(library, "image_processor").VaeImageProcessor
    images = kind(True, 8, do_convert_rgb=True)
    masks = kind(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    pixels = images.preprocess(picture(), height=40, width=24)
    array = images.pil_to_numpy([picture(), picture()])
    grey = images.convert_to_grayscale(images.convert_to_rgb(picture()))
    made = (
        images.numpy_to_pt(array),
        images.pt_to_numpy(pixels),
        images.normalize(array),
        images.denormalize(pixels),
        images.binarize(pixels.clone()),
        images.postprocess(pixels, "pt"),
        masks.postprocess(pixels, "np"),
        masks.preprocess(grey),
    )
    pictures = (*images.numpy_to_pil(array), *part(library, "utils").pt_to_pil(pixels), grey)
    return (*made, *map(np.asarray, pictures))


@script
def image_to_image(library: Any, repo: Path) -> Any:
    pipe = library.AutoPipelineForImage2Image.from_pretrained(repo, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    run = RUN | {"num_inference_steps": 4}
    return pipe("a", image=picture(), strength=0.5, generator=seeded(), **run).images


@script
def an_image_processor_of_ones_own(library: Any, repo: Path) -> Any:
    pipe = library.StableDiffusionImg2ImgPipeline(**loaded(library, repo).components)
    pipe.set_progress_bar_config(disable=True)
    kind = part(library, "image_processor").VaeImageProcessor
    pipe.image_processor = kind(do_resize=False, do_normalize=False)
    pixels = torch.rand((1, 3, 32, 32), generator=seeded())
    run = RUN | {"num_inference_steps": 4}
    return pipe("a", image=pixels, generator=seeded(), **run).images


@script
def inpainting_with_a_soft_mask(library: Any, repo: Path) -> Any:
    pipe = library.StableDiffusionInpaintPipeline(**loaded(library, repo).components)
    pipe.set_progress_bar_config(disable=True)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    soft = pipe.mask_processor.blur(mask, blur_factor=3)
    run = RUN | {"output_type": "pil"}
    image = pipe("a", image=picture(), mask_image=soft, generator=seeded(), **run).images[0]
    whole = pipe.image_processor.apply_overlay(mask, picture(), image)
    return np.asarray(soft), np.asarray(whole)


@script
def components_shared(library: Any, repo: Path) -> Any:
    text = loaded(library, repo)
    image = library.StableDiffusionImg2ImgPipeline.from_pipe(text)
    image.set_progress_bar_config(disable=True)
    assert image.unet is text.unet
    run = RUN | {"num_inference_steps": 4}
    return image("a", image=picture(), generator=seeded(), **run).images


@script
def a_controlnet(library: Any, repo: Path) -> Any:
    ours = library.__name__ == "weightport"
    net = controlnets("sd", 5)[ours]
    kind = part(library, "pipelines").StableDiffusionControlNetPipeline
    pipe = kind(**loaded(library, repo).components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a", image=picture(), generator=seeded(), **RUN).images


@script
def prompts_encoded_first(library: Any, repo: Path) -> Any:
    pipe = loaded(library, repo)
    device = pipe._execution_device
    positive, negative = pipe.encode_prompt("a", device, 1, True, "b")
    latents = pipe.prepare_latents(1, 4, 32, 32, torch.float32, device, seeded())
    pipe.check_inputs(None, 32, 32, None, None, positive, negative)
    images, flags = pipe.run_safety_checker(torch.zeros(1, 3, 8, 8), device, torch.float32)
    assert flags is None
    run = RUN | {"output_type": "latent"}
    made = pipe(prompt_embeds=positive, negative_prompt_embeds=negative, latents=latents, **run)
    return made.images, images


@script
def a_word_of_ones_own(library: Any, repo: Path) -> Any:
    pipe = loaded(library, repo)
    vectors = torch.randn((2, 16), generator=seeded())
    pipe.load_textual_inversion(vectors, token=["<s0>", "<s1>"])
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    assert pipe.maybe_convert_prompt("a <s0>", pipe.tokenizer) == "a <s0>"
    ids = [pipe.tokenizer.convert_tokens_to_ids(token) for token in ("<s0>", "<s1>")]
    images = pipe("a <s0> and <s1>", generator=seeded(), **RUN).images
    pipe.unload_textual_inversion("<s0>")
    left = pipe.text_encoder.get_input_embeddings().weight.detach()
    return table[ids], images, torch.tensor(left.shape)


@script
def tokens_by_hand(library: Any, repo: Path) -> Any:
    tokenizer = loaded(library, repo).tokenizer
    words = tokenizer.tokenize("a cat")
    ids = tokenizer.convert_tokens_to_ids(words)
    assert tokenizer.convert_ids_to_tokens(ids) == words
    return torch.tensor([*ids, *tokenizer.encode("a cat")])


@script
def saved_and_loaded_with_other_options(library: Any, repo: Path) -> Any:
    unet = library.UNet2DConditionModel.from_pretrained(repo, subfolder="unet", sample_size=8)
    place = repo.parent / f"saved by {library.__name__}"
    unet.save_pretrained(place, is_main_process=True)
    wider = library.UNet2DConditionModel.from_pretrained(
        place, in_channels=9, ignore_mismatched_sizes=True, low_cpu_mem_usage=False
    )
    assert wider.conv_in.weight.shape[1] == 9
    return torch.tensor(unet.config.sample_size), wider.conv_out.weight


@script
def moved_and_set_up(library: Any, repo: Path) -> Any:
    pipe = loaded(library, repo).to("cpu", silence_dtype_warnings=True)
    pipe.unet.set_default_attn_processor()
    pipe.unet.set_attention_slice("auto")
    pipe.enable_attention_slicing()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipe.vae.enable_slicing()
    pipe.maybe_free_model_hooks()
    images = pipe("a", generator=seeded(), num_images_per_prompt=2, **RUN).images
    assert len(pipe.numpy_to_pil(images)) == 2
    return images


def tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [
        torch.as_tensor(np.array(one) if isinstance(one, np.ndarray) else one) for one in values
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_gives_the_same_with_both_imports(name: str, repo: Path) -> None:
    libraries = [importlib.import_module(one) for one in ("diffusers", "weightport")]
    theirs, ours = (tensors(SCRIPTS[name](library, repo)) for library in libraries)
    assert len(theirs) == len(ours)
    for expected, found in zip(theirs, ours, strict=True):
        assert expected.shape == found.shape
        assert torch.allclose(expected.double(), found.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("load_ip_adapter", "IP-Adapter is not supported"),
        ("enable_model_cpu_offload", r"offloading is not supported; move the pipeline with to\(\)"),
        ("enable_xformers_memory_efficient_attention", "xformers is not used"),
    ],
)
def test_what_is_out_of_scope_names_itself(name: str, advice: str, repo: Path) -> None:
    import weightport

    pipe = loaded(weightport, repo)
    with pytest.raises(AttributeError, match=advice):
        getattr(pipe, name)
    with pytest.raises(AttributeError, match="custom attention processors are not supported"):
        _ = pipe.unet.set_attn_processor
    with pytest.raises(ValueError, match="attention processors, which take scale"):
        pipe.unet(
            torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 2, 16), cross_attention_kwargs={"scale": 1}
        )


def test_a_community_pipeline_is_named(repo: Path) -> None:
    import weightport

    with pytest.raises(
        ValueError, match="'lpw_stable_diffusion' names one of diffusers' community"
    ):
        weightport.DiffusionPipeline.from_pretrained(repo, custom_pipeline="lpw_stable_diffusion")


def test_what_has_no_effect_says_so_once(repo: Path) -> None:
    import weightport
    from weightport.runtime.notices import say_once

    pipe = loaded(weightport, repo)
    say_once.cache_clear()
    for owner, name in (
        (pipe, "fuse_qkv_projections"),
        (pipe.vae, "set_default_attn_processor"),
        (pipe.unet, "set_attention_slice"),
    ):
        with pytest.warns(UserWarning, match=f"^{name} has no effect"):
            getattr(owner, name)()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(owner, name)()


def test_importing_stays_light() -> None:
    """No torch before it is used, and none by importing the package."""
    code = "import sys, weightport; print('torch' in sys.modules, 'PIL' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
