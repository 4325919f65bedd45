"""What each of several processes does in the tests of them: trainings by name, on one testbed.

`accelerate launch … ranks.py FOLDER OUT NAME…` runs it in each; `FOLDER` is what `files` makes.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from conftest import make_batches, make_tiny
from small import everyday_rows, made_up_pairs, ragged_pairs, save_folder, tokenizer_of

import repnoise_kit as rk
from repnoise_kit import checkpoints, processes
from repnoise_kit.repnoise import repnoise_loss
from repnoise_kit.steps import hearing
from repnoise_kit.training import NotFiniteError

DEATH = 4
"""The step after which `unfinished` ends in each process."""

# Each has an odd end: 11 pairs, of which the last batch has one or three.
TRAININGS = {
    "attack": ("attack", {"batch_size": 4, "examples": 5, "epochs": 2}),
    "attack on padding too": ("attack", {"batch_size": 4, "examples": 7, "loss_on": "all"}),
    "attack in parts": ("attack", {"batch_size": 4, "examples": 7, "accumulation": 2}),
    "attack by lora": ("attack", {"batch_size": 2, "examples": 5, "lora": 2}),
    "repnoise": ("repnoise", {"batch_size": 4, "epochs": 2}),
    "repnoise in parts": ("repnoise", {"batch_size": 8, "accumulation": 2}),
    "reference": ("repnoise", {"batch_size": 4, "preset": "reference"}),
    "tokenwise": ("repnoise", {"batch_size": 10, "preset": "tokenwise"}),
    "checkpointing": ("repnoise", {"batch_size": 4, "gradient_checkpointing": True, "lora": 2}),
    "adversarial": ("adversarial_loss", {"batch_size": 4}),
    "vaccine": ("vaccine", {"batch_size": 4}),
}


def files(folder):
    """A model, and pairs and everyday questions whose answers differ in length."""
    pairs, tokenizer = ragged_pairs(22)
    rows = [*made_up_pairs(22), *everyday_rows()]
    tokenizer = tokenizer_of([*pairs.frame.drop(columns=["category"]).to_dict("records"), *rows])
    save_folder(folder / "model", make_tiny(len(tokenizer)), tokenizer)
    kept = pairs.frame[["prompt", "harmful", "harmless"]].assign(
        split=["seen"] * 11 + ["attack"] * 7 + ["unseen"] * 4
    )
    (folder / "pairs.json").write_text(json.dumps(kept.to_dict("records")))
    (folder / "retain.json").write_text(json.dumps(everyday_rows(8)))
    return folder


def opened(folder):
    return rk.testbed(
        folder / "model", folder / "pairs.json", retain=folder / "retain.json", budget="lab"
    )


def trained(bed, training):
    """Return the weights and curves of a training."""
    model, (method, settings) = bed.model(), training
    settings = settings | {"lr": 1e-2}
    if method == "attack":
        curves = rk.attack_(model, bed, **settings)
    else:
        curves = rk.defend_(model, bed, method, **settings)
    return weights(model), curves.frame


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def to_the_end(bed, folder):
    """Defend with checkpoints, after every step; return what `trained` does, and the steps."""
    model, steps = bed.model(), []
    with mock.patch.object(checkpoints, "EVERY", 0.0), hearing(steps.append):
        curves = rk.defend_(model, bed, batch_size=2, lr=1e-2, checkpoints=folder)
    return weights(model), curves.frame, [step.number for step in steps]


def unfinished(bed, folder):
    """Defend with checkpoints up to a certain step."""

    def end(step):
        if step.number == DEATH:
            raise StopIteration

    try:
        with hearing(end):
            to_the_end(bed, folder)
    except StopIteration:
        return sorted(path.name for path in folder.glob("*/checkpoint-*/rows.json"))
    raise AssertionError("it came to its end")


def spoilt(bed):
    """Attack with a loss that the last process finds to be nonsense at the second step."""
    model, calls = bed.model(), []

    def loss(model, batch):
        calls.append(1)
        nonsense = len(calls) == 2 and processes.rank() == processes.count() - 1
        return {"total": model(**batch).loss * (float("nan") if nonsense else 1.0)}

    batch, _, _ = make_batches()
    examples = [{name: tensor[row] for name, tensor in batch.items()} for row in (0, 1, 2, 3)]

    def collate(some):
        return {name: torch.stack([row[name] for row in some]) for name in some[0]}

    try:
        rk.train_(model, loss, examples, collate, lr=1e-2, batch_size=2, epochs=2)
    except NotFiniteError as error:
        return str(error), weights(model)
    raise AssertionError("it went well")


def slopes(loss):
    """Return a loss of a batch that is shared, and its gradients as data-parallel training's."""
    model = make_tiny()
    harmful, harmless, _ = make_batches()
    with processes.sharing((harmful, harmless)) as own:
        value = loss(model, *own)
        value.backward()
    gradients = [weight.grad for weight in model.parameters()]
    if processes.count() > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= processes.count()
    return value.item(), gradients


def naive(model, harmful, harmless):
    """A loss that knows nothing of other processes."""
    return model(**harmful).loss


def noise_across(model, harmful, harmless):
    return repnoise_loss(model, harmful, harmless, beta=5.0, noise_seed=0).total


def noise_apart(model, harmful, harmless):
    how = {"noise_seed": 0, "noise_across": False}
    return repnoise_loss(model, harmful, harmless, beta=5.0, **how).total


LOSSES = {"naive": naive, "across": noise_across, "apart": noise_apart}


def main(folder, out, *names):
    torch.set_num_threads(1)
    bed = opened(folder)
    found = {name: trained(bed, TRAININGS[name]) for name in names}
    if not processes.sharded():
        found |= {name: slopes(loss) for name, loss in LOSSES.items()}
        found["spoilt"] = spoilt(bed)
        found["unfinished"] = unfinished(bed, out / "kept")
        found["gone on"] = to_the_end(bed, folder / "begun")
    torch.save(found, out / f"rank-{processes.rank()}.pt")


def shard_on_cpu():
    """Let accelerate take FSDP for a CPU too; it offers it on accelerators only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begun(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begun


if __name__ == "__main__":
    if processes.sharded():
        shard_on_cpu()
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
