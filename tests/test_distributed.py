"""Several processes, or several parts of a batch: the losses and weights of one of the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from conftest import make_batches, make_tiny

import repnoise_kit as rk
from repnoise_kit import processes
from repnoise_kit.repnoise import repnoise_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread", "cheap_collections"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this PyTorch has no gloo, by which processes without GPUs speak",
    ),
]
CUT_UP = ("attack", "attack by lora", "repnoise", "repnoise in parts", "checkpointing", "vaccine")
# What `accelerate config` would write; on a CPU its launcher starts several processes only if it
# is told of GPUs.
PLAIN = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_machines: 1
machine_rank: 0
num_processes: 2
main_process_port: 0
mixed_precision: 'no'
"""
SHARDED = f"""
{PLAIN.replace("MULTI_GPU", "FSDP")}
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""


def launched(configuration, folder, out, names):
    """Return what each of two processes found."""
    out.mkdir()
    (out / "config.yaml").write_text(configuration)
    launch = ["accelerate.commands.launch", "--config_file", out / "config.yaml"]
    command = [sys.executable, "-m", *launch, ranks.__file__, folder, out, *names]
    root = Path(rk.__file__).parents[1]
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ranks.files(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def bed(folder):
    return ranks.opened(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("two") / "out"


@pytest.fixture(scope="module")
def two(folder, bed, kept):
    assert ranks.unfinished(bed, folder / "begun") == ["rows.json"]
    return launched(PLAIN, folder, kept, ranks.TRAININGS)


@pytest.fixture(scope="module")
def cut_up(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "out"
    return launched(SHARDED, folder, out, CUT_UP)


@pytest.fixture(scope="module")
def alone(bed):
    """What one process finds, worked out once for each name."""
    known = {}

    def found(name):
        if name not in known:
            known[name] = ranks.trained(bed, ranks.TRAININGS[name])
        return known[name]

    return found


def same(one, other, bed):
    """Check that weights are the same up to float noise, and that they moved much more."""
    start = ranks.weights(bed.model())
    assert set(one) == set(other) == set(start)
    moved, apart = (
        torch.nn.utils.get_total_norm([one[name] - there[name] for name in start])
        for there in (start, other)
    )
    assert moved > 0.1
    assert apart < 1e-3 * moved


def same_curves(one, other):
    assert (one["metric"] == other["metric"]).all()
    assert other["value"].to_numpy() == pytest.approx(one["value"].to_numpy(), rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("name", ranks.TRAININGS)
def test_two_processes_are_one(two, alone, bed, name):
    weights, curves = alone(name)
    same(weights, two[0][name][0], bed)
    same_curves(curves, two[0][name][1])
    for one, other in zip(two[0][name][0].values(), two[1][name][0].values(), strict=True):
        assert torch.equal(one, other)
    assert two[0][name][1].equals(two[1][name][1])


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 cuts up models on GPUs only")
@pytest.mark.parametrize("name", CUT_UP)
def test_two_processes_with_half_a_model_each_are_one(cut_up, alone, bed, name):
    weights, curves = alone(name)
    same(weights, cut_up[0][name][0], bed)
    same_curves(curves, cut_up[0][name][1])
    assert all(type(weight) is torch.Tensor for weight in cut_up[1][name][0].values())


def test_losses_that_know_nothing_of_other_processes_are_not_that_of_the_batch(two):
    """Else the tests above could not fail: the halves have different numbers of tokens."""
    whole, slopes = ranks.slopes(ranks.naive)
    halves = [rank["naive"] for rank in two]
    assert abs((halves[0][0] + halves[1][0]) / 2 - whole) > 1e-4
    assert max((a - b).abs().max() for a, b in zip(slopes, halves[0][1], strict=True)) > 1e-4


def test_noise_is_of_all_rows_or_if_asked_of_each_processs_own(two):
    whole, slopes = ranks.slopes(ranks.noise_across)
    for rank in two:
        assert rank["across"][0] == pytest.approx(whole, rel=1e-5)
        for one, other in zip(slopes, rank["across"][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    model = make_tiny()
    harmful, harmless, _ = make_batches()
    terms = [
        repnoise_loss(model, *(rows(batch, half) for batch in (harmful, harmless)), noise_seed=0)
        for half in (slice(0, 2), slice(2, 4))
    ]
    all_of_it = repnoise_loss(model, harmful, harmless, noise_seed=0)
    noise = sum(part.noise for part in terms) / 2
    assert abs(noise - all_of_it.noise) > 1e-3
    expected = all_of_it.retain + 5 * noise - all_of_it.ascent.log()
    for rank in two:
        assert rank["apart"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_what_goes_wrong_in_one_process_stops_all_at_the_last_good_weights(two, bed):
    message, weights = two[0]["spoilt"]
    assert message.startswith("the loss became nan at step 2; the model keeps the weights")
    assert two[1]["spoilt"][0] == message
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    for name, weight in two[1]["spoilt"][1].items():
        assert torch.equal(weight, weights[name])


def rows(batch, which):
    return {name: tensor[which] for name, tensor in batch.items()}


def test_one_process_goes_on_from_the_checkpoint_of_two(two, kept, bed, tmp_path):
    weights, curves, steps = ranks.to_the_end(bed, tmp_path / "undisturbed")
    assert [rank["unfinished"] for rank in two] == [["rows.json"]] * 2
    gone_on, its_curves, its_steps = ranks.to_the_end(bed, kept / "kept")
    assert its_steps == steps[ranks.DEATH - 1 :]
    same(weights, gone_on, bed)
    same_curves(curves, its_curves)
    assert not list((kept / "kept").glob("*"))


def test_two_processes_go_on_from_the_checkpoint_of_one(two, folder, bed, tmp_path):
    weights, curves, steps = ranks.to_the_end(bed, tmp_path / "undisturbed")
    for gone_on, its_curves, its_steps in (rank["gone on"] for rank in two):
        assert its_steps == steps[ranks.DEATH - 1 :]
        same(weights, gone_on, bed)
        same_curves(curves, its_curves)
    assert not list((folder / "begun").glob("*"))


class TestAccumulation:
    @pytest.mark.parametrize("how", ["attack", "safety_training", "gradient_ascent"])
    def test_of_a_cross_entropy_it_changes_nothing(self, bed, how):
        """Seven examples in parts of two, the last of one, of different numbers of tokens."""
        found = []
        for parts in (1, 2):
            settings = {"batch_size": 4, "examples": 7, "epochs": 2, "accumulation": parts}
            found.append(ranks.trained(bed, (how, settings)))
        same(found[0][0], found[1][0], bed)
        same_curves(found[0][1], found[1][1])

    def test_of_repnoise_it_is_the_mean_of_the_parts(self):
        """With the same noise in each part; the whole batch has another loss."""
        model, seen = make_tiny(), []

        def loss(model, batch):
            terms = repnoise_loss(model, *batch, beta=5.0, noise_seed=0)._asdict()
            seen.append({name: term.item() for name, term in terms.items()})
            return terms

        harmful, harmless, _ = make_batches()
        examples = [(rows(harmful, place), rows(harmless, place)) for place in range(4)]

        def collate(some):
            sides = zip(*some, strict=True)
            return [{n: torch.stack([row[n] for row in side]) for n in side[0]} for side in sides]

        curves = rk.train_(
            model, loss, examples, collate, lr=0.0, batch_size=4, accumulation=2
        ).frame.set_index("metric")["value"]
        assert len(seen) == 2
        whole = repnoise_loss(model, harmful, harmless, beta=5.0, noise_seed=0)
        for name in ("total", "retain", "noise", "ascent"):
            assert curves[name] == pytest.approx((seen[0][name] + seen[1][name]) / 2, rel=1e-5)
        assert abs(curves["total"] - whole.total.item()) > 1e-3

    def test_the_mean_is_by_rows_where_parts_differ(self):
        values = iter((1.0, 4.0))

        def collate(some):
            return {"x": torch.tensor(some)}

        def loss(model, batch):
            return {"total": sum(p.sum() for p in model.parameters()) * 0 + next(values)}

        curves = rk.train_(
            make_tiny(), loss, range(3), collate, lr=0.0, batch_size=4, accumulation=2
        ).frame.set_index("metric")["value"]
        assert curves["total"] == pytest.approx((2 * 1.0 + 1 * 4.0) / 3)


class TestWhatAUserCanMend:
    @pytest.mark.parametrize(("number", "parts"), [("3", 1), ("1", 3), ("2", 4)])
    def test_a_batch_that_does_not_divide(self, monkeypatch, number, parts):
        monkeypatch.setenv("WORLD_SIZE", number)
        with pytest.raises(rk.KitError, match=r"batch of 4 does not divide.*multiple of"):
            rk.train_(make_tiny(), None, [1], list, lr=1e-3, batch_size=4, accumulation=parts)

    @pytest.mark.parametrize("parts", [0, -1, 1.5])
    def test_parts_are_a_whole_number_from_1(self, parts):
        with pytest.raises(rk.KitError, match="accumulation"):
            rk.train_(make_tiny(), None, [1], list, lr=1e-3, accumulation=parts)

    @pytest.mark.parametrize(
        ("setting", "value"), [("FSDP_VERSION", "1"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")]
    )
    def test_another_way_to_cut_models_up(self, monkeypatch, setting, value):
        told = {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "FSDP_VERSION": "2"}
        for name, given in (told | {setting: value}).items():
            monkeypatch.setenv(name, given)
        with pytest.raises(rk.KitError, match=f"{setting.lower()}: "):
            rk.train_(make_tiny(), None, [1], list, lr=1e-3)

    def test_what_one_process_makes_is_made_alone(self, monkeypatch):
        processes.check_alone("it")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(rk.KitError, match=r"^the lab is not there yet.*without the launcher"):
            processes.check_alone("the lab")

    def test_tensors_without_one_row_an_example(self):
        batch = {"x": torch.zeros(3), "y": [torch.zeros(2, 2)]}
        with pytest.raises(rk.KitError, match="2, 3 rows"):
            processes.rows_of(batch)
        with pytest.raises(rk.KitError, match="no rows"):
            processes.rows_of({"x": 1})


def test_one_process_is_left_as_it_was():
    part = torch.ones(3, requires_grad=True)
    with processes.sharing(part) as own:
        assert own is part
        assert processes.total(part) is processes.gathered(part) is part
        assert processes.working(part) is processes.mean(part) is part
