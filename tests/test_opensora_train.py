"""The tiny Open-Sora pipeline as train_tiny.py builds it: its size, and that training asks as sampling does."""

import copy
import importlib

import pytest
import torch
from tiny_opensora import FOLDER
from tiny_pipelines import imports_from
from torch import Tensor

from tiny_training import text
from tiny_training.plan import MAX_TEXT_LENGTH, NUM_FRAMES, SIZE

# isort: split
from opensora12 import OpenSoraPipeline, RFlowScheduler, STDiT3

LATENT = (16, 5, 16, 16)


@pytest.fixture(scope="module")
def training():
    with imports_from(FOLDER):
        return importlib.import_module("train_tiny")


@pytest.fixture(scope="module")
def built(training) -> dict:
    torch.manual_seed(0)
    tokenizer = text.build_tokenizer(MAX_TEXT_LENGTH)
    transformer = training.build_transformer()
    torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.1)  # it starts at zero
    encoder = training.build_text_encoder(len(tokenizer))
    parts = torch.nn.ModuleDict({"transformer": transformer, "sequence": encoder})
    return {"autoencoder": training.build_vae(), "parts": parts.eval(), "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def folder(training, built, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    parts = copy.deepcopy(built)  # saving makes them float16
    training.set_latent_scale(parts["autoencoder"], 3 + 2 * torch.randn(8, *LATENT).numpy())
    training.save_pipeline(*parts.values(), path)
    return path


def test_the_saved_pipeline_is_small_and_generates(training, folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10_000_000
    pipe = OpenSoraPipeline.from_pretrained(folder, dtype=torch.float32)
    assert type(pipe.transformer).__name__ == "STDiT3" and pipe.transformer.dtype == torch.float32
    torch.testing.assert_close(pipe.vae.shift.mean(), torch.tensor(3.0), atol=0.2, rtol=0)
    assert pipe.vae.latent_size(NUM_FRAMES, SIZE, SIZE) == LATENT[1:]
    videos = training.video_stages.sampler(pipe, **training.SAMPLING)(["a red star at the top"], 2)
    assert videos.shape == (1, 3, NUM_FRAMES, SIZE, SIZE)
    times = pipe.scheduler.timesteps / 1000
    shift = training.GRID_SHIFT
    torch.testing.assert_close(times, torch.tensor([1.0, shift * 0.5 / (1 + (shift - 1) * 0.5)]))


def pipelines_velocity(pipe: OpenSoraPipeline, prompt: str, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Of the caption and of the null caption, as the pipeline asks for them at its first step, time 1000."""
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda _, __, output: seen.append(output[0][:, :16]))
    arguments = {"height": SIZE, "width": SIZE, "num_frames": NUM_FRAMES, "num_inference_steps": 2}
    pipe(prompt, latents=latents, aesthetic_score=None, output_type="latent", **arguments)
    handle.remove()
    return seen[0].chunk(2)


def test_training_asks_the_network_as_the_pipeline_does(training, built):
    plain = STDiT3.from_config(built["parts"]["transformer"].config)
    plain.load_state_dict(built["parts"]["transformer"].state_dict())
    parts = {"vae": built["autoencoder"], "text_encoder": built["parts"]["sequence"], "tokenizer": built["tokenizer"]}
    pipe = OpenSoraPipeline(transformer=plain.eval(), scheduler=RFlowScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a large red star moving left at the top"
    latents = torch.randn(1, *LATENT)
    with torch.no_grad():
        cond, null = pipelines_velocity(pipe, prompt, latents)
        tokens = text.tokenize(built["tokenizer"], [prompt, ""], MAX_TEXT_LENGTH)
        velocity = training.OpenSoraVelocity(built["parts"], tokens[1:], "cpu")
        made = velocity(built["parts"]["transformer"], latents.repeat(2, 1, 1, 1, 1), torch.ones(2), tokens, None)
    torch.testing.assert_close(made, torch.cat([cond, null]), atol=1e-4, rtol=1e-4)


def test_the_path_runs_from_noise_to_data(training):
    data, noise, level = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.3, 0.8])
    mixed, velocity = training.data_minus_noise(data, noise, level)
    torch.testing.assert_close(mixed + level.view(-1, 1, 1) * velocity, data)


def test_the_adapter_speaks_as_diffusers_autoencoders(training, built):
    adapter = training.Clips(built["autoencoder"])
    with torch.no_grad():
        for frames, latents in ((1, 1), (17, 5)):
            mean = adapter.encode(torch.zeros(1, 3, frames, 32, 32)).latent_dist.mean
            assert mean.shape == (1, 16, latents, 8, 8)
            assert adapter.decode(mean).sample.shape == (1, 3, frames, 32, 32)
