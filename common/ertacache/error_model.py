"""The paper's error model: the additive error of a reused output as sigma(K o + B), linearised, and subtracted."""

from torch import Tensor


def fit_error_model(reused: Tensor, output: Tensor) -> tuple[float, float]:
    """K and B of the paper's error model e = sigma(K o~ + B), linearised: sigma(z) ~ z / 4 + 1 / 2.

    The error e = o~ - o of the reused output o~ then has slope K / 4 and intercept B / 4 + 1 / 2 in o~, both
    found by ordinary least squares (arXiv 2508.21091, closed-form rectification).
    """
    x, error = reused.double().flatten(), (reused.double() - output.double()).flatten()
    centred = x - x.mean()
    variance = centred.square().mean()
    slope = float((centred * error).mean() / variance) if variance > 0 else 0.0
    intercept = float(error.mean()) - slope * float(x.mean())
    return 4 * slope, 4 * (intercept - 0.5)


def rectify(reused: Tensor, k: float, b: float) -> Tensor:
    """o~ - (z / 4 + 1 / 2) with z = K o~ + B: the reused output less its modelled error, in its own dtype."""
    as_float = reused.float()
    return (as_float - ((k * as_float + b) / 4 + 0.5)).to(reused.dtype)
