"""Stability: is a defended model still of use (Table 3)? On public benchmarks: `harness`."""

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from repnoise_kit.bench import Bench
from repnoise_kit.errors import KitError
from repnoise_kit.evaluation import answers, mean_log_probs
from repnoise_kit.model import provenance
from repnoise_kit.pairs import format_of
from repnoise_kit.results import Result
from repnoise_kit.scoring import refuses
from repnoise_kit.testbeds import Testbed


def stability(model: PreTrainedModel, bed: Testbed, *, seed: int = 0) -> Result:
    """Ask a model everyday questions: does it know them, expect the answers, refuse none?

    Args:
        model: Left as it is.
        bed: The testbed, with everyday questions (a retain set).
        seed: Of the model's training, noted in each row.

    Returns:
        One row a question and metric: `testbed, seed, group, category, prompt, metric, value`.
        Metrics: `recall` of the known answer in what the model says, `perplexity` of the known
        answer under the model itself, `refusal` (1 where it refuses what is harmless).

    Raises:
        KitError: the testbed has no everyday questions.
    """
    if bed.everyday is None:
        raise KitError(f"{bed.name} has no everyday questions; give the testbed a retain set")
    settings = bed.settings["evaluation"]
    prompts, known = bed.everyday["prompt"].tolist(), bed.everyday["answer"].tolist()
    length, size = settings["max_new_tokens"], settings["batch_size"]
    said = answers(model, bed.tokenizer, prompts, length, size)
    measured = {
        "recall": [bed.recall(*both) for both in zip(known, said, strict=True)],
        "perplexity": np.exp(-mean_log_probs(model, bed.tokenizer, prompts, known, size)),
        "refusal": [float(refuses(response)) for response in said],
    }
    told = bed.everyday[["group", "category", "prompt"]].reset_index(drop=True)
    tables = [told.assign(metric=name, value=values) for name, values in measured.items()]
    made_with = {"testbed": bed.name, "prompt_format": format_of(bed.tokenizer)}
    rows = Result(pd.concat(tables, ignore_index=True), made_with | provenance(model))
    return rows.tagged(testbed=bed.name, seed=seed)


def stable(bench: Bench, *, defence: str, seed: int) -> Result:
    """Return the stability of one defended model, before any attack: a cell of a grid."""
    model, _ = bench.defended(defence, seed)
    return stability(model, bench.bed, seed=seed).tagged(defence=defence)
