"""Stand-ins for bare transformers, with the call shapes of the official packages, and loops like theirs."""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

STEPS = 10
GUIDANCE = 4.0
LATENT_SHAPE = [3, 2, 4, 4]
STOPS = [(0, "cond"), (0, "uncond"), (1, "cond"), (4, "uncond"), (9, "cond"), (9, "uncond")]  # where a run is given up


def velocity(latents: Tensor, sigma: float | Tensor, text: Tensor) -> Tensor:
    """Bends with the state, the noise level and the text (tokens, 4)."""
    tone = text.float().mean(dim=-2).mean(dim=-1).reshape(*text.shape[:-2], *[1] * (latents.ndim - text.ndim + 2))
    return torch.tanh(latents + tone) * (0.5 + sigma) + torch.sin(3 * sigma + tone)


class WanModel(nn.Module):
    """Lists of latents (C, F, H, W) and of texts (tokens, 4) in, a list of velocities out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.calls = 0
        self.fail_at: int | None = None

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        sigmas = t / 1000
        return [velocity(latents, sigma, text).float() for latents, sigma, text in zip(x, sigmas, context, strict=True)]


class STDiT3(nn.Module):
    """Both branches in one batch; twice the channels out, of which the loop drops the second half."""

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None):
        made = torch.stack([velocity(z, t / 1000, text) for z, t, text in zip(x, timestep, y, strict=True)])
        return torch.cat([made, 0.1 * made], dim=1)


class DiffusersStyle(nn.Module):
    """The same network as diffusers would call it, one tensor for all."""

    def __init__(self, model: WanModel):
        super().__init__()
        self.model = model
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True):
        return (torch.stack(self.model(list(hidden_states), timestep, list(encoder_hidden_states), 8)),)


def text_of(prompt: str) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(sum(prompt.encode())))


def scheduler_of(steps: int = STEPS, shift: float = 3.0):
    try:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    except TypeError:  # of diffusers 0.31
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


def noise_of(seed: int) -> Tensor:
    return torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))


class Pipeline:
    """diffusers' shape of the same loop: for calibrating, and to compare with."""

    def __init__(self) -> None:
        self.transformer = DiffusersStyle(WanModel())
        self.scheduler = scheduler_of()
        self.guidance_scale = GUIDANCE

    def set_progress_bar_config(self, **_) -> None:
        pass

    @torch.no_grad()
    def __call__(self, prompt, generator=None, num_inference_steps=STEPS, output_type="latent"):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator]
        cond = torch.stack([text_of(p) for p in prompts])
        uncond = torch.stack([text_of("")] * len(prompts))
        latents = torch.stack([torch.randn(LATENT_SHAPE, generator=g) for g in generators])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            times = t.expand(len(prompts))
            c = self.transformer(latents, times, cond, return_dict=False)[0]
            u = self.transformer(latents, times, uncond, return_dict=False)[0]
            latents = self.scheduler.step(u + self.guidance_scale * (c - u), t, latents, return_dict=False)[0]
        return (latents,)


@torch.no_grad()
def official_generate(
    model: nn.Module,
    prompt: str,
    seed: int = 7,
    steps: int = STEPS,
    shift: float = 3.0,
    order: Sequence[str] = ("cond", "uncond"),
    texts: dict[str, list[Tensor]] | None = None,
    stop_at: tuple[int, str] | None = None,
    guidance: float = GUIDANCE,
) -> Tensor:
    """A loop like that of the official wan package: its scheduler is a local variable, texts are lists."""
    scheduler = scheduler_of(steps, shift)
    texts = texts or {"cond": [text_of(prompt)], "uncond": [text_of("")]}
    latents = [noise_of(seed)]
    for step, t in enumerate(scheduler.timesteps):
        timestep, outputs = torch.stack([t]), {}
        for name in order:
            if stop_at == (step, name):
                raise KeyboardInterrupt
            outputs[name] = model(latents, t=timestep, context=texts[name], seq_len=8)[0]
        guided = outputs["cond"]
        if "uncond" in outputs:
            guided = outputs["uncond"] + guidance * (outputs["cond"] - outputs["uncond"])
        result = scheduler.step(guided.unsqueeze(0), t, latents[0].unsqueeze(0), return_dict=False)[0]
        latents = [result.squeeze(0)]
    return latents[0]
