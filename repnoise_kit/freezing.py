"""Depth: where a defence changed a model, and which parts of it had to move."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from repnoise_kit import resistance
from repnoise_kit.anatomy import Parts, frozen, parts
from repnoise_kit.bench import Bench, check_held
from repnoise_kit.defences import able
from repnoise_kit.errors import KitError
from repnoise_kit.grid import Cell, run
from repnoise_kit.resistance import attacked
from repnoise_kit.results import Result, stack
from repnoise_kit.testbeds import Testbed

Groups = Mapping[str, Sequence[int | str]]
"""Parts that are held still together, by a name: what `frozen` takes."""


@torch.no_grad()
def weight_distance(model: PreTrainedModel, reference: PreTrainedModel) -> Result:
    """Return how far each part of a model lies from the same part of another (Figure 2).

    Args:
        model: A causal LM.
        reference: One of the same shape. The paper takes the undefended model after an attack;
            the base tells where a defence changed it.

    Returns:
        One row a part, kind of weight and metric: `part` (`embedding`, `layer`, `norm`, `head`, or
        the name of what is none of these), `layer` (its number from 0, empty elsewhere), `kind`
        (`attention`, `mlp`, `norm`, and `all` of a part together), `metric` (`l2`, the Euclidean
        norm over all weights of that kind; `relative`, that over the norm of the reference's),
        `value`.

    Raises:
        KitError: the models have not the same weights.
    """
    there = dict(reference.named_parameters())
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    theirs = {name: weight.shape for name, weight in there.items()}
    if differ := sorted(n for n in {*shapes, *theirs} if shapes.get(n) != theirs.get(n)):
        raise KitError(f"the two models differ in shape, first at {differ[0]}; compare equals")
    places = _places(model)
    squares: dict[tuple, Tensor] = {}
    for name, weight in model.named_parameters():
        other = there[name].to(weight.device).float()
        gap, size = (weight.float() - other).square().sum(), other.square().sum()
        part, layer, kind = places.get(weight, (name, None, "all"))
        for key in {(part, layer, kind), (part, layer, "all")}:
            squares[key] = squares.get(key, torch.zeros(2)) + torch.stack([gap, size]).cpu()
    rows = [
        {"part": part, "layer": layer, "kind": kind, "metric": metric, "value": value.item()}
        for (part, layer, kind), (gap, size) in squares.items()
        for metric, value in (("l2", gap.sqrt()), ("relative", (gap / size).sqrt()))
    ]
    frame = pd.DataFrame(rows).astype({"layer": "Int64"})
    order = {"embedding": 0, "layer": 1, "norm": 2, "head": 3}
    ranks = frame["part"].map(order).fillna(len(order))
    frame = frame.assign(rank=ranks).sort_values(["rank", "layer", "kind"], kind="stable")
    return Result(frame.drop(columns="rank").reset_index(drop=True), {"analysis": "distance"})


def _places(model: PreTrainedModel) -> dict[Tensor, tuple[str, int | None, str]]:
    """Return part, layer and kind of each weight: by the module it is in, never by its name."""
    found = parts(model)
    named = {"head": found.head, "norm": found.norm, "embedding": model.get_input_embeddings()}
    places: dict[Tensor, tuple[str, int | None, str]] = {}
    for part, module in named.items():  # An embedding that is the head too is the embedding.
        places |= dict.fromkeys(module.parameters(), (part, None, "all"))
    for layer, module in enumerate(found.layers):
        kinds = _kinds(found, layer)
        places |= {weight: ("layer", layer, kinds[weight]) for weight in module.parameters()}
    return places


def _kinds(found: Parts, layer: int) -> dict[Tensor, str]:
    """Return what each weight of a layer is: attention's, the MLP's, or a norm's."""
    kinds = {}
    for module in found.layers[layer].modules():
        own = dict(module.named_parameters(recurse=False))
        flat = all(weight.dim() == 1 for weight in own.values())
        kinds |= dict.fromkeys(own.values(), "norm" if flat else "mlp")
    return kinds | dict.fromkeys(found.attention(layer).parameters(), "attention")


def thirds(model: nn.Module) -> dict[str, list[int | str]]:
    """Return the parts of Table 6: nothing, head, last layer, and the thirds of the layers.

    Of the paper's 32 layers the thirds are 20-31, 10-20 and 0-10. Its published code chose them
    by digits within names, so that 0-10 held *every* layer still; here a layer is its number, and
    the first two thirds and every layer are parts of their own.
    """
    count = len(parts(model).layers)
    first, second = round(count / 3), round(2 * count / 3)
    return {
        "nothing": [],
        "head": ["head"],
        "last layer": [count - 1],
        "last third": list(range(second, count)),
        "middle third": list(range(first, second)),
        "first third": list(range(first)),
        "first two thirds": list(range(second)),
        "every layer": list(range(count)),
    }


def ablate_layers(
    bed: Testbed,
    groups: Groups | None = None,
    *,
    method: str = "repnoise",
    seeds: Sequence[int] = range(5),
    budgets: Sequence[tuple[float, int]] | None = None,
    store: Path | str | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Defend with parts of the model held still, then attack all of it (Table 6).

    Whatever the store holds already is not computed again.

    Args:
        bed: The testbed.
        groups: Parts by a name of yours; by default those of `thirds`. A part is a layer's number,
            `"head"`, `"norm"`, `"embedding"` or the exact name of a module.
        method: The defence.
        seeds: Each varies the defence, the attack, and the order of their data.
        budgets: (learning rate, examples) of the attacks; by default the weakest and the strongest
            of `bed.settings["resistance"]`, and in any case none at all.
        store: A folder, which other processes and machines may share; by default in the cache.
        workers: Processes.
        scheduler: Address of a Dask scheduler, in place of processes.
        progress: Words for a bar; no bar without.

    Returns:
        One row a question and metric: what `evaluate` returns, with `held` (the name of the parts;
        `undefended` for the model without a defence), `defence, lr, examples, seed`.

    Raises:
        KitError: a part that the model has not.
    """
    chosen = thirds(bed.base) if groups is None else groups
    if budgets is None:
        ordered = resistance.budgets(bed)
        budgets = (ordered[0], ordered[-1])
    asked = [
        (name, arguments | {"seed": seed, "lr": lr, "examples": examples})
        for lr, examples in dict.fromkeys([(0.0, 0), *budgets])
        for name, arguments in [
            ("undefended", {"defence": "none"}),
            *((name, _cell(method, held)) for name, held in chosen.items()),
        ]
        for seed in seeds
    ]
    able(bed, [method])  # A wrong name is said now, not after an hour.
    for held in chosen.values():
        check_held(method, held)
        with frozen(bed.base, held):
            pass
    bench = Bench.of(bed, store)
    cells = [Cell(attacked, arguments) for _, arguments in asked]
    found = run(cells, bench, workers=workers, scheduler=scheduler, progress=progress)
    tagged = [result.tagged(held=name) for result, (name, _) in zip(found, asked, strict=True)]
    made_with = found[0].made_with | {
        "experiment": "layer freezing",
        "method": method,
        "groups": {name: list(held) for name, held in chosen.items()},
        "seeds": list(seeds),
    }
    made_with |= bed.made_of()
    return Result(stack(*tagged).frame, made_with)


def _cell(method: str, held: Sequence[int | str]) -> dict[str, object]:
    # Where nothing is held it is a cell of Table 1, and not computed twice.
    return {"defence": method} | ({"held": list(held)} if held else {})


def write(rows: Result, out: Path) -> str:
    """Write `freezing.csv`, a row a cell, seed and metric, and the rows of every question.

    Returns:
        The recall by held parts and budget, with intervals, as text.
    """
    table = resistance.means(rows.frame, by=["held", *resistance.CELL])
    Result(table, rows.made_with).save(out / "freezing.csv")
    rows.save(out / "freezing_questions.parquet")
    return resistance.in_words(rows.frame, by="held").to_string()
