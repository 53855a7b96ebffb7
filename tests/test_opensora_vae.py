"""The autoencoders against golden vectors, the official key list, and what the original promises of chunks."""

import json

import diffusers.models.autoencoders.vae as diffusers_vae
import pytest
import torch
from safetensors.torch import save_file
from tiny_opensora import info_of, load_vector, names_of, randomised, tiny_vae

# isort: split
from opensora12.vae import SCALE, SHIFT, SPATIAL_SCALE, OpenSoraVAE, TemporalVAE


def vector_vae(vector) -> OpenSoraVAE:
    names = ("spatial_config", "temporal_config", "micro_frame_size", "micro_batch_size", "shift", "scale")
    vae = OpenSoraVAE(*(vector.info[name] for name in names)).eval()
    vae.load_state_dict(vector.weights)
    return vae


# -- golden vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names_of("temporal_vae"))
@torch.no_grad()
def test_temporal_part_makes_what_the_original_makes(name):
    vector = load_vector(name)
    vae = TemporalVAE(**vector.info["config"]).eval()
    vae.load_state_dict(vector.weights)
    for frames in vector.info["enc_T"]:
        posterior = vae.encode(vector.inputs[f"enc.T{frames}"])
        vector.assert_close(posterior.mean, f"enc_mean.T{frames}")
        vector.assert_close(posterior.logvar, f"enc_logvar.T{frames}")
        assert vae.latent_frames(frames) == vector.info["latent_T"][str(frames)]
    for frames in vector.info["dec_T"]:
        vector.assert_close(vae.decode(vector.inputs[f"dec.T{frames}"], num_frames=frames), f"dec.T{frames}")


@pytest.mark.parametrize("name", names_of("opensora_vae"))
@torch.no_grad()
def test_whole_autoencoder_makes_what_the_original_makes(name):
    vector = load_vector(name)
    vae = vector_vae(vector)
    assert vector.info["spatial_scaling"] == SPATIAL_SCALE
    for frames in vector.info["enc_frames"]:
        made = vae.encode(vector.inputs[f"enc.F{frames}"], sample_posterior=False)
        vector.assert_close(made, f"enc_mode.F{frames}")
    for frames in vector.info["frames"]:
        vector.assert_close(vae.decode(vector.inputs[f"dec.F{frames}"], num_frames=frames), f"dec.F{frames}")


@pytest.mark.parametrize("name", names_of("opensora_vae"))
@torch.no_grad()
def test_posteriors_are_sampled_in_the_order_of_the_original(name, monkeypatch):
    vector = load_vector(name)
    vae = vector_vae(vector)
    for frames in vector.info["enc_frames"]:
        spatial, temporal = (vector.inputs[f"noise_{part}.F{frames}"] for part in ("spatial", "temporal"))
        at = {"spatial": 0, "temporal": 0}

        def draw(shape, spatial=spatial, temporal=temporal, at=at, **_):
            part, count = ("spatial", shape[0]) if len(shape) == 4 else ("temporal", shape[2])
            start, at[part] = at[part], at[part] + count
            return spatial[start : start + count] if part == "spatial" else temporal[:, :, start : start + count]

        monkeypatch.setattr(diffusers_vae, "randn_tensor", draw)
        vector.assert_close(vae.encode(vector.inputs[f"enc.F{frames}"]), f"enc_sample.F{frames}")


@pytest.mark.parametrize("name", names_of("latent_sizes"))
def test_latent_sizes_are_the_original_ones(name):
    info = info_of(name)
    with torch.device("meta"):
        vae = OpenSoraVAE(micro_frame_size=info["micro_frame_size"])
    for frames, size in info["by_frames_at_240x426"].items():
        assert list(vae.latent_size(int(frames), 240, 426)) == size
    for pixels, size in info["by_size_at_51_frames"].items():
        assert list(vae.latent_size(51, *map(int, pixels.split("x")))) == size


# -- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in names_of("state_dict_keys") if "vae" in n])
def test_full_size_has_the_official_keys_and_shapes(name):
    official = info_of(name)
    with torch.device("meta"):
        vae = OpenSoraVAE()
    shapes = {key: list(value.shape) for key, value in vae.state_dict().items()}
    assert shapes == official["keys"]
    assert len(shapes) == official["n_keys"]
    assert sum(value.numel() for value in vae.state_dict().values()) == official["n_elements"]


@pytest.mark.parametrize("official", [True, False])
@torch.no_grad()
def test_both_layouts_load(tmp_path, official):
    vae = tiny_vae(shift=(0.1, 0.2, 0.3, 0.4), scale=(1.0, 2.0, 3.0, 4.0))
    if official:
        foreign = {"cal_loss": False, "freeze_vae_2d": False, "dtype": "float32", "micro_frame_size": None}
        config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
        (tmp_path / "config.json").write_text(json.dumps({**config, **foreign}))
        save_file(vae.state_dict(), tmp_path / "model.safetensors")
    else:
        vae.save_pretrained(tmp_path)
    loaded = OpenSoraVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    if official:  # what the original sets, whatever the file says; its buffers are those of the weights
        assert loaded.config.micro_frame_size == 17
        assert (tuple(loaded.config.shift), tuple(loaded.config.scale)) == (SHIFT, SCALE)
    assert loaded.scale.dtype == torch.bfloat16 and loaded.scale.flatten().tolist() == [1, 2, 3, 4]
    latents = torch.randn(1, 4, 5, 4, 4).bfloat16()
    assert torch.equal(loaded.decode(latents, num_frames=17), vae.to(torch.bfloat16).decode(latents, num_frames=17))


# -- properties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 17, 18, 34, 40])
@torch.no_grad()
def test_shapes_follow_the_configuration(frames):
    vae = tiny_vae()
    size = vae.latent_size(frames, 11, 8)
    assert size[1:] == (5, 4)  # two levels halve once
    latents = vae.encode(torch.randn(2, 3, frames, 11, 8), torch.Generator())
    assert latents.shape == (2, 4, *size)
    assert vae.decode(latents, num_frames=frames).shape == (2, 3, frames, 10, 8)


@torch.no_grad()
def test_chunks_are_independent_and_micro_batches_a_matter_of_memory():
    vae, small = tiny_vae(), tiny_vae(micro_batch_size=3)
    video = torch.randn(2, 3, 40, 8, 8)
    latents = vae.encode(video, sample_posterior=False)
    for first, last, frames in ((0, 5, slice(0, 17)), (5, 10, slice(17, 34)), (10, 12, slice(34, 40))):
        alone = vae.encode(video[:, :, frames], sample_posterior=False)
        torch.testing.assert_close(latents[:, :, first:last], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(small.encode(video, sample_posterior=False), latents, atol=1e-5, rtol=1e-4)
    decoded = vae.decode(latents, num_frames=40)
    torch.testing.assert_close(small.decode(latents, num_frames=40), decoded, atol=1e-5, rtol=1e-4)
    vae.use_slicing = True
    torch.testing.assert_close(vae.decode(latents, num_frames=40), decoded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vae.encode(video, sample_posterior=False), latents, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_no_pass_sees_more_than_a_micro_batch():
    vae, seen = tiny_vae(), []
    vae.spatial_vae.module.decoder.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    vae.temporal_vae.decoder.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[2]))
    vae.decode(torch.randn(1, 4, 10, 4, 4), num_frames=34)
    assert seen == [5, 5, *[4] * 8, 2]


@torch.no_grad()
def test_same_generator_gives_the_same_latents():
    vae, video = tiny_vae(), torch.randn(1, 3, 17, 8, 8)
    first, second = (vae.encode(video, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, vae.encode(video, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("multipliers", "downsample"), [((1, 2), (True,)), ((1, 2, 1), (True, True)), ((2, 1, 1, 3), (True, False, True))]
)
@torch.no_grad()
def test_other_temporal_shapes_go_there_and_back(multipliers, downsample):
    vae = TemporalVAE(
        filters=4, num_res_blocks=1, num_groups=2, channel_multipliers=multipliers, temporal_downsample=downsample
    )
    randomised(vae)
    for frames in (1, 3, 8):
        z = vae.encode(torch.randn(1, 4, frames, 4, 4)).mean
        assert z.shape[2] == -(-frames // 2 ** sum(downsample))
        assert vae.decode(z, num_frames=frames).shape == (1, 4, frames, 4, 4)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="34 frames need 10 latent frames, these have 5"):
        tiny_vae().decode(torch.randn(1, 4, 5, 4, 4), num_frames=34)
    with pytest.raises(ValueError, match="5 frames need 2 latent frames, not 1"):
        tiny_vae().temporal_vae.decode(torch.randn(1, 4, 1, 4, 4), num_frames=5)
    with pytest.raises(ValueError, match="3 entries for 4 levels"):
        TemporalVAE(temporal_downsample=(True,))
    with pytest.raises(ValueError, match="activation_fn 'relu'"):
        TemporalVAE(activation_fn="relu")
