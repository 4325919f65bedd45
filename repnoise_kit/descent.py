"""The attack as a path through the weights: how far down it has to go, and how steep it is.

Theorem 1 of the paper splits the chance of an attack in two: the *static distance*, the loss
between where it starts and the minimum it reaches, and the *reachability* of that minimum, which
the gradients along the path decide.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from repnoise_kit.attacks import attack_
from repnoise_kit.bench import Bench
from repnoise_kit.cost import at_steps
from repnoise_kit.errors import KitError, check_whole
from repnoise_kit.grid import Cell, run
from repnoise_kit.reading import batches, evaluating
from repnoise_kit.released import looked_at, named_budget
from repnoise_kit.results import Result, stack
from repnoise_kit.security import guarded
from repnoise_kit.testbeds import Testbed
from repnoise_kit.training import NotFiniteError, answer_loss

Weights = list[Tensor]
_MOMENTS = frozenset(at_steps(2**40))


def attack_path(
    model: PreTrainedModel, bed: Testbed, *, texts: int = 64, seed: int = 0, **budget: Any
) -> Result:
    """Attack a model in place and return its loss and the gradient's norm along the way.

    Both are taken on one sample of the attack's pairs, before the first step and after steps 1,
    2, 3, 4, 6, 8, 12, … and the last.

    Args:
        model: Changed in place, as by `attack_`.
        bed: The testbed.
        texts: Size of the sample.
        seed: Of the attack, and of the sample.
        budget: What `attack_` takes: `lr`, `examples`, `schedule`, …

    Returns:
        One row a step and metric: `step` (0: before the first), `metric` (`loss`, in nats a token;
        `gap`, how far the loss lies above the lowest of this path: the static distance;
        `grad_norm`, the length of the gradient: reachability), `value`, `seed`.
    """
    batch, points = _sample(bed, texts, seed, budget), []

    def look(step: int) -> None:
        points.append((step, *_loss_and_slope(model, batch)))

    curves = _attack_looking_(model, bed, look, seed, budget)
    frame = pd.DataFrame(points, columns=["step", "loss", "grad_norm"])
    # An attack that diverged took its last step back; there is no such point.
    frame = frame[np.isfinite(frame[["loss", "grad_norm"]]).all(axis=1)]
    frame = frame.assign(gap=frame["loss"] - frame["loss"].min())
    tidy = frame.melt(id_vars="step", var_name="metric", value_name="value")
    return Result(tidy.assign(seed=seed), _noted("attack path", curves, seed, budget))


def attack_paths(
    bed: Testbed,
    *,
    defences: Sequence[str] | None = None,
    seeds: Sequence[int] = range(3),
    attack: str = "large",
    texts: int = 64,
    store: Path | str | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Return the paths of an attack on each defended model; what is found is kept.

    Args:
        bed: The testbed.
        defences: Names of `DEFENCES`; by default those of `before_and_after`.
        seeds: Of defence and attack.
        attack: A budget that the testbed's settings name: `small` or `large`.
        texts: Size of the sample that loss and gradient are taken on.
        store: A folder, which other processes and machines may share; by default in the cache.
        workers: Processes.
        scheduler: Address of a Dask scheduler, in place of processes.
        progress: Words for a bar; no bar without.

    Returns:
        What `attack_path` returns, with `defence` and `attack`.
    """
    chosen = looked_at(bed, defences, seeds)
    budget = named_budget(bed, attack) | {"texts": texts}
    cells = [
        Cell(defended_path, {"defence": name, "seed": seed, **budget})
        for name in chosen
        for seed in seeds
    ]
    found = run(
        cells, Bench.of(bed, store), workers=workers, scheduler=scheduler, progress=progress
    )
    made_with = found[0].made_with | {"seeds": list(seeds), "testbed": bed.name}
    return Result(stack(*found).frame, made_with).tagged(attack=attack)


def defended_path(
    bench: Bench, *, defence: str, seed: int, lr: float, examples: int, texts: int
) -> Result:
    """Return the path of one attack on one defended model: a cell of `attack_paths`."""
    model, _ = bench.defended(defence, seed)
    found = attack_path(model, bench.bed, lr=lr, examples=examples, texts=texts, seed=seed)
    return found.tagged(defence=defence)


def attack_plane(
    model: PreTrainedModel,
    bed: Testbed,
    *,
    size: int = 11,
    margin: float = 0.25,
    texts: int = 64,
    seed: int = 0,
    **budget: Any,
) -> Result:
    """Attack a model in place; return the harmful loss on a slice through it, and the path on it.

    The slice goes through the base, the model as it was given (defended), and the attacked one.

    Args:
        model: Changed in place, as by `attack_`.
        bed: The testbed, whose base is the origin.
        size: Points along each axis.
        margin: How far the slice reaches beyond the three, as a share of their extent.
        texts: Pairs that the loss is taken on.
        seed: Of the attack, and of these pairs.
        budget: What `attack_` takes.

    Returns:
        One row a point: `x` (from the base towards the defended model) and `y`, L2 distances in
        the weights; `metric`: `loss` (the slice) or `path` (the attack, whose `step` 0 is the
        defended model; both in nats a token), `value`, `step`, `seed`. Off the slice the path is
        projected on it; its `value` is the true loss.

    Raises:
        KitError: the model is the base, or not of its shape.
    """
    check_whole(size=size)
    if [p.shape for p in model.parameters()] != [p.shape for p in bed.base.parameters()]:
        raise KitError("the model is not of the base's shape; take one that came of this testbed")
    if not _norm(_minus(model, bed.base)):
        raise KitError("the model is the base itself: a slice needs a defended one")
    end = copy.deepcopy(model)
    _attack_looking_(end, bed, lambda step: None, seed, budget)
    axes = _axes(bed.base, model, end)
    batch, passed = _sample(bed, texts, seed, budget), []

    # The same attack once more, now that the slice is known: no weights on the way are kept.
    def look(step: int) -> None:
        here = _place(model, bed.base, axes)
        passed.append({"step": step, **here, "value": _loss(model, batch).item()})

    curves = _attack_looking_(model, bed, look, seed, budget)
    path = pd.DataFrame(passed).assign(metric="path")
    reach = [[0.0, *path[side]] for side in ("x", "y")]
    rows = _slice(bed, axes, [_around(side, margin, size) for side in reach], batch)
    frame = pd.concat([path, pd.DataFrame(rows).assign(metric="loss")], ignore_index=True)
    tidy = frame.astype({"step": "Int64"})[["x", "y", "step", "metric", "value"]]
    return Result(tidy.assign(seed=seed), _noted("attack plane", curves, seed, budget))


def _attack_looking_(
    model: PreTrainedModel,
    bed: Testbed,
    look: Callable[[int], None],
    seed: int,
    budget: dict[str, Any],
) -> Result:
    """Attack, and look before it and after steps 1, 2, 3, 4, 6, 8, 12, … and the last."""

    def after(step: int) -> None:
        if step in _MOMENTS:
            look(step)

    with guarded(model):
        look(0)
        try:
            curves = attack_(model, bed, seed=seed, after_step=after, **budget)
        except NotFiniteError as error:
            return error.curves  # What was seen on the way is the result.
        last = int(curves.frame["step"].max())
        if last not in _MOMENTS:
            look(last)
    return curves


def _noted(analysis: str, curves: Result, seed: int, budget: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in budget.items() if name != "pairs"}
    return {"analysis": analysis, "seed": seed} | given | curves.made_with


def _sample(bed: Testbed, texts: int, seed: int, budget: dict[str, Any]) -> dict[str, Tensor]:
    """Return a batch of what the attack trains on."""
    own = bed.relearned() if budget.get("relearn") else bed.splits.attack
    source = budget.get("pairs") or own
    rows = source.draw(min(texts, len(source)), seed).frame.rename(columns={"harmful": "answer"})
    return next(batches(bed.base, rows, bed.tokenizer, batch_size=texts))[1]


def _loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with evaluating(model):
        return answer_loss(model, batch)["total"]


def _loss_and_slope(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[float, float]:
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.enable_grad():
        loss = _loss(model, batch)
        slopes = torch.autograd.grad(loss, moving)
    return loss.item(), torch.nn.utils.get_total_norm(slopes).item()


def _axes(origin: nn.Module, second: nn.Module, third: nn.Module) -> tuple[Weights, Weights]:
    """Return two directions at right angles, so that all three models lie on the slice."""
    first = _minus(second, origin)
    length = _norm(first)
    first = [part / length for part in first]
    aside = _minus(third, origin)
    along = _dot(aside, first)
    aside = [one - along * two for one, two in zip(aside, first, strict=True)]
    height = _norm(aside)
    if height <= 1e-6 * length:
        raise KitError("the attack went nowhere but along the defence; attack for longer")
    return first, [part / height for part in aside]


def _place(model: nn.Module, origin: nn.Module, axes: tuple[Weights, Weights]) -> dict[str, float]:
    away = _minus(model, origin)
    return {"x": _dot(away, axes[0]), "y": _dot(away, axes[1])}


@torch.no_grad()
def _slice(
    bed: Testbed,
    axes: tuple[Weights, Weights],
    places: list[np.ndarray],
    batch: dict[str, Tensor],
) -> list[dict[str, float]]:
    """Return the loss at each point of a grid on the slice."""
    model, rows = bed.model(), []
    for x, y in product(*places):
        for weight, origin, first, second in zip(
            model.parameters(), bed.base.parameters(), *axes, strict=True
        ):
            weight.copy_(origin + x * first + y * second)
        rows.append({"x": x, "y": y, "value": _loss(model, batch).item()})
    return rows


def _around(reach: Sequence[float], margin: float, size: int) -> np.ndarray:
    least, most = min(reach), max(reach)
    spare = margin * (most - least)
    return np.linspace(least - spare, most + spare, size)


def _minus(one: nn.Module, other: nn.Module) -> Weights:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return [a.detach().float() - b.detach().float() for a, b in pairs]


def _dot(one: Weights, other: Weights) -> float:
    return sum((a * b).sum().item() for a, b in zip(one, other, strict=True))


def _norm(weights: Weights) -> float:
    return torch.nn.utils.get_total_norm(weights).item()
