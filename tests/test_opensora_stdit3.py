"""STDiT3 against golden vectors, the official key list, and properties on other random configurations."""

import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from safetensors.torch import save_file
from tiny_opensora import info_of, load_vector, names_of, tiny_transformer

from compare.flops import TransformerCost
from compare.rivals.stack import intercepted

# isort: split
from opensora12.captions import unpack
from opensora12.positions import grid_code, grid_frequencies
from opensora12.stdit3 import STDiT3, STDiT3Block


def arguments(seed: int = 0, batch: int = 2, size: tuple[int, int, int] = (3, 6, 8), tokens: int = 10, channels=12):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "y": torch.randn(batch, 1, tokens, channels, generator=generator),
        "fps": torch.tensor([24.0]),
        "height": torch.tensor([96.0]),
        "width": torch.tensor([128.0]),
    }


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# -- golden vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names_of("stdit3_model"))
@torch.no_grad()
def test_network_makes_what_the_original_makes(name):
    vector = load_vector(name)
    model = STDiT3(**vector.info["config"]).eval()
    model.load_state_dict(vector.weights)
    made = model.to(vector.dtype)(**vector.inputs)
    assert made.dtype == torch.float32
    vector.assert_close(made, "sample")


@pytest.mark.parametrize("name", names_of("stdit3_block"))
@torch.no_grad()
def test_block_makes_what_the_original_makes(name):
    vector = load_vector(name)
    config, frames, inputs = vector.info["config"], vector.info["T"], vector.inputs
    block = STDiT3Block(
        *(config[k] for k in ("hidden_size", "num_heads", "mlp_ratio", "qk_norm")), vector.info["temporal"]
    )
    block.load_state_dict(vector.weights)
    captions, mask = unpack(inputs["y"], vector.info["y_lens"])
    rotary = None
    if vector.info["temporal"]:
        angles = torch.arange(frames, dtype=torch.float32)[:, None] * vector.others["rope_freqs"]
        rotary = (angles.cos(), angles.sin())
    given = (inputs["x"], captions, inputs["t"], frames, mask)
    vector.assert_close(block(*given, rotary=rotary), "no_mask")
    vector.assert_close(block(*given, inputs["t0"], inputs["x_mask"], rotary), "with_x_mask")


def position_cases():
    return [(name, case) for name in names_of("pos_embed") for case in info_of(name)["cases"]]


@pytest.mark.parametrize(("name", "case"), position_cases())
def test_position_code_is_the_original_one(name, case):
    dtype = getattr(torch, case["dtype"].removeprefix("torch."))
    pixels = torch.tensor(case["height_as_used"]) * torch.tensor(case["width_as_used"])
    scale = pixels.sqrt() / case["input_sq_size"]
    code = grid_code(case["H"], case["W"], scale, grid_frequencies(case["C"], dtype)).to(dtype)
    tolerance = info_of(name)["tolerance"]
    atol = tolerance["bf16_atol"] if dtype == torch.bfloat16 else tolerance["atol"]
    torch.testing.assert_close(code, load_vector(name).outputs[str(case["i"])], atol=atol, rtol=0)


# -- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in names_of("state_dict_keys") if "stdit3" in n])
def test_full_size_has_the_official_keys_and_shapes(name):
    official = info_of(name)
    with torch.device("meta"):
        model = STDiT3()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == official["keys"]
    assert len(shapes) == official["n_keys"]
    assert sum(value.numel() for value in model.state_dict().values()) == official["n_elements"]


def test_null_caption_is_a_buffer_and_rotary_frequencies_are_not_trained():
    model = tiny_transformer()
    assert "y_embedder.y_embedding" in dict(model.named_buffers())
    assert not dict(model.named_parameters())["rope.freqs"].requires_grad


def official_folder(path, model, **foreign):
    """What the official repository looks like: other fields in the configuration, other name of the weights."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["STDiT3"], **foreign}))
    save_file(model.state_dict(), path / "model.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_official_layout_loads(tmp_path, dtype):
    model = tiny_transformer()
    foreign = {"model_type": "STDiT3", "dtype": "bfloat16", "torch_dtype": "bfloat16", "transformers_version": "5.0"}
    loaded = STDiT3.from_pretrained(official_folder(tmp_path / "o", model, **foreign), torch_dtype=dtype)
    assert loaded.dtype == dtype and not loaded.training
    given = arguments()
    assert torch.equal(loaded(**given), model.to(dtype)(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saving_and_loading_keeps_the_network(tmp_path, dtype):
    """In bfloat16 too: the position code's frequencies are in no file and must be rounded nevertheless."""
    model = tiny_transformer().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = STDiT3.from_pretrained(tmp_path, torch_dtype=dtype)
    assert torch.equal(loaded(**arguments()), model(**arguments()))


def test_incomplete_official_file_is_refused(tmp_path):
    folder = official_folder(tmp_path / "o", tiny_transformer())
    weights = tiny_transformer().state_dict()
    del weights["rope.freqs"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 tensors of STDiT3, first rope\.freqs"):
        STDiT3.from_pretrained(folder)


# -- properties ------------------------------------------------------------------------------------------

CONFIGS = [
    {},
    {"hidden_size": 32, "num_heads": 4, "depth": 1, "qk_norm": False},
    {"hidden_size": 16, "num_heads": 1, "patch_size": (2, 2, 2), "mlp_ratio": 2.5},
    {"hidden_size": 40, "num_heads": 5, "patch_size": (1, 1, 4), "pred_sigma": False},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [(1, 5, 7), (3, 4, 9), (5, 2, 2)])
@torch.no_grad()
def test_padding_is_zeros_at_the_end_and_is_cropped_away(config, size):
    model = tiny_transformer(1, **config)
    given = arguments(1, size=size)
    made = model(**given)
    assert made.shape == (2, model.out_channels, *size)
    patch = model.config.patch_size
    padded = torch.zeros(2, 4, *(-(-n // p) * p for n, p in zip(size, patch, strict=True)))
    padded[:, :, : size[0], : size[1], : size[2]] = given["x"]
    close(made, model(**{**given, "x": padded})[:, :, : size[0], : size[1], : size[2]])


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_ragged_captions_are_as_if_every_sample_came_alone(seed):
    model = tiny_transformer(seed, **CONFIGS[seed])
    given = arguments(seed, batch=4)
    lengths = torch.randint(1, 11, (4,), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(10) < lengths[:, None]).long()
    together = model(**given, mask=mask)
    for i in range(4):
        alone = {key: given[key][i : i + 1] for key in ("x", "timestep")}
        alone["y"] = given["y"][i : i + 1, :, : lengths[i]]
        close(together[i : i + 1], model(**{**given, **alone}))


@torch.no_grad()
def test_mask_takes_any_tokens_and_its_rows_are_repeated_as_a_whole():
    model, given = tiny_transformer(), arguments(batch=4)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 2, 0]])
    made = model(**given, mask=mask)
    assert torch.equal(made, model(**given, mask=mask.repeat(2, 1)))
    kept = given["y"][1:2, :, mask[1] != 0]
    row = {"x": given["x"][1:2], "timestep": given["timestep"][1:2], "y": kept}
    close(made[1:2], model(**{**given, **row}))
    close(model(**given), model(**given, mask=torch.ones(1, 10)))


@torch.no_grad()
def test_skipped_caption_embedder_takes_packed_captions():
    model, given = tiny_transformer(), arguments()
    mask = (torch.arange(10) < torch.tensor([[3], [7]])).long()
    packed = model.y_embedder(given["y"]).squeeze(1)[mask.bool()][None]
    skipping = tiny_transformer(skip_y_embedder=True)
    expected = model(**given, mask=mask)
    for lengths in ([3, 7], torch.tensor([3, 7])):
        close(skipping(**{**given, "y": packed}, mask=lengths), expected)
    with pytest.raises(ValueError, match="add up to 9"):
        skipping(**{**given, "y": packed}, mask=[3, 6])


@torch.no_grad()
def test_frame_mask_of_all_frames_changes_nothing_and_of_none_forgets_the_time():
    model, given = tiny_transformer(), arguments()
    assert torch.equal(model(**given, x_mask=torch.ones(2, 3, dtype=torch.bool)), model(**given))
    none, tokens = torch.zeros(2, 3, dtype=torch.bool), []
    model.final_layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    for scale in (1.0, 0.5):  # the final layer does see the time; that is the original's quirk
        model(**{**given, "timestep": given["timestep"] * scale}, x_mask=none)
    assert torch.equal(*tokens)
    mixed = torch.tensor([[True, False, True], [False, True, True]])
    assert not torch.equal(model(**given, x_mask=mixed), model(**given))


@torch.no_grad()
def test_final_layer_norms_kept_frames_twice():
    layer, t, t_zero = tiny_transformer().final_layer, torch.randn(1, 24), torch.randn(1, 24)
    x, x_mask = torch.randn(1, 6, 24), torch.tensor([[True, False, True]])
    (shift, scale), (shift_zero, scale_zero) = (
        (layer.scale_shift_table + time[:, None]).unbind(1) for time in (t, t_zero)
    )
    once = torch.nn.functional.layer_norm(x, (24,), eps=1e-6) * (1 + scale) + shift
    twice = torch.nn.functional.layer_norm(once, (24,), eps=1e-6) * (1 + scale_zero) + shift_zero
    expected = torch.where(x_mask.repeat_interleave(2, dim=1)[..., None], once, twice)
    close(layer(x, t, 3, t_zero, x_mask), layer.linear(expected))


@torch.no_grad()
def test_bfloat16_rounds_the_timestep_before_the_sinusoid():
    model, given = tiny_transformer().to(torch.bfloat16), arguments()
    exact = model(**{**given, "timestep": torch.tensor([913.37, 913.37])})
    assert torch.equal(exact, model(**{**given, "timestep": torch.tensor([912.0, 912.0])}))


@torch.no_grad()
def test_further_arguments_of_the_original_are_ignored_and_outputs_come_as_asked():
    model, given = tiny_transformer(), arguments()
    made = model(**given, num_frames=torch.tensor([17.0]), ar=torch.tensor([1.0]))
    assert torch.equal(made, model(**given))
    assert torch.equal(model(**given, return_dict=False)[0], made)
    assert torch.equal(model(**given, return_dict=True).sample, made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": None}, "fps, height and width"),
        ({"mask": torch.ones(2, 9)}, r"\[2, 9\]"),
        ({"mask": torch.ones(3, 10)}, "divisor of 2"),
        ({"mask": torch.zeros(2, 10)}, "no token"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer()(**{**arguments(), **change})


def test_widths_that_positions_cannot_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        STDiT3(hidden_size=30, num_heads=2)


# -- diffusers' caches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "blocks_when_cached"),
    [
        (FirstBlockCacheConfig(threshold=1e9), 1),
        (MagCacheConfig(threshold=1e9, num_inference_steps=2, retention_ratio=0.0, mag_ratios=torch.ones(2)), 0),
    ],
)
@torch.no_grad()
def test_block_caches_of_diffusers_fit(config, blocks_when_cached):
    model, given = tiny_transformer(), arguments()
    reference, keys = model(**given), list(model.state_dict())
    model.enable_cache(config)
    assert list(model.state_dict()) == keys
    with model.cache_context("cond_uncond"):
        assert torch.equal(model(**given), reference)
        with TransformerCost(model) as cost:
            close(model(**given), reference)  # the same call again: what is reused is what would be computed
    assert cost.block_calls == blocks_when_cached
    model.disable_cache()
    assert torch.equal(model(**given), reference)


@torch.no_grad()
def test_blocks_are_seen_in_the_order_in_which_they_run():
    model, order = tiny_transformer(), []
    with model.blocks_in_order() as blocks:
        handles = [block.register_forward_hook(lambda b, *_: order.append(b)) for block in blocks]
        assert "transformer_blocks" in dict(model.named_children())
    model(**arguments())
    assert order == list(blocks)
    for handle in handles:
        handle.remove()
    assert "transformer_blocks" not in dict(model.named_children())


@torch.no_grad()
def test_the_whole_stack_can_be_skipped():
    class Skipping:
        def enter(self, arguments):
            return arguments["hidden_states"]

        def leave(self, hidden_in, hidden_out):
            raise AssertionError("nothing was computed")

    model, given = tiny_transformer(), arguments()
    with intercepted(model, Skipping()):
        made = model(**given)
    hidden, conditioning = model.embed_inputs(**given)
    close(made, model._unpatch(model.final_layer(hidden, conditioning.t, 3), given["x"].shape[2:]))
