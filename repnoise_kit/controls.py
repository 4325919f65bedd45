"""What a defence must beat: a model that knows nothing, and one that was merely shaken."""

from collections.abc import Callable
from itertools import count

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from repnoise_kit.anatomy import parts
from repnoise_kit.errors import KitError, check_numbers
from repnoise_kit.evaluation import evaluate
from repnoise_kit.model import seeded
from repnoise_kit.results import Result
from repnoise_kit.testbeds import Testbed

NO_UTILITY = "matched weight noise needs a measure of utility; give the testbed a retain set"
HALVINGS = 7
LARGEST = 16.0


def untouched_(model: PreTrainedModel, bed: Testbed, *, seed: int, progress: str | None) -> Result:
    """Leave the model as it is: the undefended base."""
    return noted()


def random_(model: PreTrainedModel, bed: Testbed, *, seed: int, progress: str | None) -> Result:
    """Forget everything: the weights of a fresh model, drawn with the seed.

    A floor, not a winner: it has nothing to give away and is of no use. Drawn as the family of
    the model draws its own (the published code; the paper's text says Kaiming).
    """
    with seeded(seed):
        fresh = type(model)(model.config)
    model.load_state_dict(fresh.state_dict())
    return noted()


def weight_noise_(
    model: PreTrainedModel, bed: Testbed, *, like: PreTrainedModel, seed: int, progress: str | None
) -> Result:
    """Move each layer in a random direction, as far as the defence moved it in `like`.

    Args:
        model: Changed in place: the aligned model.
        bed: Not used.
        like: The defended model whose change is matched, layer by layer in L2 norm.
        seed: Draws the direction.
        progress: Not used.

    Returns:
        One row: `step, metric, value`, the metric `scale` being 1.
    """
    _add_(model, _direction(model, like, seed), 1.0)
    return noted(scale=1.0)


def weight_noise_matched_(
    model: PreTrainedModel, bed: Testbed, *, like: PreTrainedModel, seed: int, progress: str | None
) -> Result:
    """The same, scaled until utility has fallen to what the defence left of it in `like`.

    The largest scale, to a hundredth or so, at which the utility before any attack is no lower
    than that of `like`; found by halving, at most 16 times RepNoise's own change.

    Returns:
        Three rows, `step, metric, value`: `scale` (0 if no noise at all fits), `utility`, and
        `utility_matched`, that of `like`.

    Raises:
        KitError: the testbed has no everyday questions to measure utility on.
    """
    if bed.everyday is None:
        raise KitError(NO_UTILITY)
    wanted = _utility(like, bed)
    direction = _direction(model, like, seed)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def utility_at(scale: float) -> float:
        _put_(model, start)
        _add_(model, direction, scale)
        return _utility(model, bed)

    scale = largest_fitting(lambda s: utility_at(s) >= wanted)
    return noted(scale=scale, utility=utility_at(scale), utility_matched=wanted)


def largest_fitting(fits: Callable[[float], bool]) -> float:
    """Return about the largest scale that fits, from 0 to 16, supposing that less fits too."""
    low, high = 0.0, 1.0
    while fits(high):
        low, high = high, 2 * high
        if low >= LARGEST:
            return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def noted(**values: float) -> Result:
    """Return curves of no steps: single values, noted at step 0."""
    rows = [{"step": 0, "metric": name, "value": value} for name, value in values.items()]
    return Result(pd.DataFrame(rows, columns=["step", "metric", "value"]))


def _direction(model: PreTrainedModel, like: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Return noise for each weight, of the norm, layer by layer, by which `like` differs."""
    draw = torch.Generator().manual_seed(seed)
    there = dict(like.named_parameters())
    noise, change = {}, {}
    for name, weight in model.named_parameters():
        noise[name] = torch.randn(weight.shape, generator=draw).to(weight)
        change[name] = (there[name].to(weight) - weight).detach()
    for names in layer_names(model):
        length = _norm(change, names) / _norm(noise, names)
        for name in names:
            noise[name] *= length
    return noise


def layer_names(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of the weights by layer; each weight outside the layers is its own group."""
    owner: dict[Tensor, int] = {}
    for layer, module in enumerate(parts(model).layers):
        owner |= dict.fromkeys(module.parameters(), layer)
    groups: dict[int, list[str]] = {}
    alone = count(len(parts(model).layers))
    for name, weight in model.named_parameters():
        groups.setdefault(owner[weight] if weight in owner else next(alone), []).append(name)
    return list(groups.values())


def _norm(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.nn.utils.get_total_norm([tensors[name] for name in names])


@torch.no_grad()
def _add_(model: PreTrainedModel, direction: dict[str, Tensor], scale: float) -> None:
    check_numbers(scale=scale)
    for name, weight in model.named_parameters():
        weight += scale * direction[name]


@torch.no_grad()
def _put_(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    for name, weight in model.named_parameters():
        weight.copy_(weights[name])


def _utility(model: PreTrainedModel, bed: Testbed) -> float:
    frame = evaluate(model, bed).frame
    return float(frame.loc[frame["metric"] == "utility", "value"].mean())
