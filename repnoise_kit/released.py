"""Look inside several models at once: each defence, before and after an attack."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from repnoise_kit.bench import Bench
from repnoise_kit.defences import able
from repnoise_kit.errors import KitError
from repnoise_kit.resistance import named_budget
from repnoise_kit.results import Result, stack
from repnoise_kit.testbeds import Testbed

LOOKED_AT = ("none", "adversarial_loss", "layerwise_ascent", "repnoise", "weight_noise_matched")


def before_and_after(
    bed: Testbed,
    analysis: Callable[[PreTrainedModel], Result],
    *,
    defences: Sequence[str] | None = None,
    seeds: Sequence[int] = range(3),
    attack: str = "large",
    store: Path | str | None = None,
    progress: str | None = None,
) -> Result:
    """Run an analysis on each defended model, before and after an attack.

    Models are made once and kept, so that the next analysis only loads them.

    Args:
        bed: The testbed.
        analysis: What is asked of each model: `lambda model: rk.logit_mass(model, pairs)`.
        defences: Names of `DEFENCES`; by default the undefended model, two defences that are not
            RepNoise, RepNoise, and matched weight noise where the testbed has a retain set.
        seeds: Of defence and attack.
        attack: A budget that the testbed's settings name: `small` or `large`.
        store: A folder for the models; by default in the cache.
        progress: Words for a bar; no bar without.

    Returns:
        The analysis' rows, one set a model, with `defence`, `attack` (`none`: before), `seed`.

    Raises:
        KitError: an unknown defence or attack, or nothing to look at: before any model is made.
    """
    chosen, budget = looked_at(bed, defences, seeds), named_budget(bed, attack)
    bench = Bench.of(bed, store)
    found = []
    cells = [(name, seed) for seed in seeds for name in chosen]
    for name, seed in tqdm(cells, desc=progress, disable=progress is None, unit="model"):
        for tag in ("none", attack):  # One model at a time: they may be large.
            if tag == "none":
                model, _ = bench.defended(name, seed)
            else:
                model = bench.attacked(name, seed, **budget)
            found.append(analysis(model).tagged(defence=name, attack=tag, seed=seed))
    made_with = found[0].made_with | {"seeds": list(seeds), "attack": budget, "testbed": bed.name}
    return Result(stack(*found).frame, made_with)


def looked_at(bed: Testbed, defences: Sequence[str] | None, seeds: Sequence[int]) -> Sequence[str]:
    """Return which defences are looked at; a wrong choice is said now, not after an hour.

    Raises:
        KitError: an unknown name, one that the testbed cannot do, or nothing at all.
    """
    there = able(bed, defences)
    chosen = [name for name in LOOKED_AT if name in there] if defences is None else defences
    if not len(chosen) or not len(seeds):
        raise KitError("there is nothing to look at; give at least one defence and one seed")
    return chosen
