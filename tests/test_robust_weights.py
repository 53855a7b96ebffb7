"""LoRA, quantised and changed weights: the base model's calibration warns, and recalibrating restores the quality."""

import warnings

import pytest
import tiny_models
import torch
from tiny_models import NAMES, call, expected, fitted, make

import ertacache
from ertacache.provenance import config_hash, weights_fingerprint

WITH_LORA = ("flux", "wan", "cogvideox")  # Open-Sora's pipeline has no loader for one


@pytest.fixture
def lora(tmp_path):
    """A function that writes a LoRA of random weights for a model's attention and returns its folder."""
    peft = pytest.importorskip("peft", reason="LoRA in diffusers needs peft, which is not installed")

    def write(name: str):
        pipe = make(name)
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
        state = peft.get_peft_model_state_dict(pipe.transformer)
        generator = torch.Generator().manual_seed(7)
        state = {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=state)
        return tmp_path

    return write


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("name", WITH_LORA)
def test_a_lora_warns_and_unloading_it_leaves_nothing(name, attach_first, lora):
    folder = lora(name)
    pipe = make(name)
    if attach_first:
        ertacache.apply(pipe, fitted(name))
        pipe.load_lora_weights(folder)
    else:
        pipe.load_lora_weights(folder)
        with pytest.warns(ertacache.MismatchWarning, match="weights differ"):
            ertacache.apply(pipe, fitted(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [call(pipe, name) for _ in range(3)]
    told = [w for w in caught if issubclass(w.category, ertacache.MismatchWarning)]
    assert len(told) == attach_first  # once, and not at every run
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], expected(name)[1])
    pipe.unload_lora_weights()
    assert torch.equal(call(pipe, name), expected(name)[1])
    ertacache.remove(pipe)
    assert torch.equal(call(pipe, name), expected(name)[0])


@pytest.mark.parametrize("name", WITH_LORA)
def test_a_fused_lora_is_noticed_too(name, lora):
    pipe = make(name)
    with ertacache.apply(pipe, fitted(name)):
        pipe.load_lora_weights(lora(name))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        with pytest.warns(ertacache.MismatchWarning, match="weights differ"):
            call(pipe, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_any_one_weight_is_noticed_at_the_next_run(name):
    pipe = make(name)
    named = dict(pipe.transformer.named_parameters())
    with ertacache.apply(pipe, fitted(name)) as applied, torch.no_grad():
        watch = applied._attachment.begin.__self__.weights
        for parameter in [p for p in named.values() if p.ndim > 1]:
            before = parameter.data
            generator = torch.Generator().manual_seed(3)
            low_rank = torch.randn(before.shape[0], 1, generator=generator) * torch.randn(
                1, before[0].numel(), generator=generator
            )
            parameter.data = before + 0.05 * low_rank.reshape(before.shape)
            with pytest.warns(ertacache.MismatchWarning, match="weights differ"):
                watch.check()
            parameter.data = before
            watch.check()
        with warnings.catch_warnings():
            warnings.simplefilter("error", ertacache.MismatchWarning)
            assert torch.equal(call(pipe, name), expected(name)[1])


def quantised(name: str, tmp_path):
    """The pipeline with int8 weights, through diffusers and torchao."""
    pytest.importorskip("torchao", reason="quantisation on a CPU needs torchao, which is not installed")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipe = make(name)
    pipe.transformer.save_pretrained(tmp_path)
    kind = type(pipe.transformer)
    pipe.transformer = kind.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), torch_dtype=torch.float32
    )
    return pipe


@pytest.mark.parametrize("name", WITH_LORA)
def test_quantised_weights_warn_and_recalibrating_ends_that(name, tmp_path):
    pipe = quantised(name, tmp_path)
    assert config_hash(pipe.transformer) == config_hash(make(name).transformer)
    assert weights_fingerprint(pipe.transformer) != weights_fingerprint(make(name).transformer)
    with pytest.warns(ertacache.MismatchWarning, match="weights differ"):
        ertacache.apply(pipe, fitted(name))
    assert call(pipe, name).isfinite().all()
    ertacache.remove(pipe)
    made = tiny_models.calibrate(pipe, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ertacache.MismatchWarning)
        with ertacache.apply(pipe, made):
            first = call(pipe, name)
            assert torch.equal(call(pipe, name), first)
