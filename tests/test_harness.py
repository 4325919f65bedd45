"""Public benchmarks against sums of log-probabilities by hand, and against the harness itself."""

import copy
import json
import logging
import random
import sys
from pathlib import Path
from textwrap import dedent, indent

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny
from small import hooks_of, word_tokenizer

from repnoise_kit import harness, stats
from repnoise_kit.errors import KitError
from repnoise_kit.harness import PAPER_TASKS, benchmarks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = (
    *("where", "is", "the", "box", "?", "under", "behind", "bed", "desk", "à", "côté", "du"),
    *("lit", "no", "idea", "it", "red", "blue", ":", "."),
)
CHOICES = (
    *("under the bed", "behind the desk behind the bed", "à côté du lit", "no idea", "red"),
    *("it is under the red bed", "blue box", "côté à côté à côté", "is it the desk ?"),
)
MEANS = ("acc", "acc_norm", "acc_bytes")
COLUMNS = ["task", "group", "metric", "value", "seed", "prompt"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS, bos_token="<s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    made = make_tiny(len(tokenizer))
    # A head that prefers some words by far, so that no choice is won by its length alone.
    with torch.no_grad():
        made.lm_head.weight *= 40
    return made


def questions(count=36):
    draw = random.Random(1)
    rows = []
    for number in range(count):
        asked = " ".join(draw.choices(WORDS, k=1 + number % 4))
        choices = draw.sample(CHOICES, 3)
        rows.append({"asked": asked, "choices": choices, "gold": draw.randrange(3)})
    return rows


def greedy(model, tokenizer, text, most):
    """The model's likeliest next words, one forward pass a word."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + most:
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def score(model, tokenizer, text, choice):
    """The summed log-probability of a choice after a text, one sequence at a time."""
    asked = tokenizer(text)["input_ids"]
    said = tokenizer(choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        found = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
    return sum(found[len(asked) + n - 1, word].item() for n, word in enumerate(said))


def task(folder, name, rows, *parts):
    """Write one task of our own: its data, and its YAML."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"""
        task: {name}
        dataset_path: json
        dataset_kwargs:
          data_files: {{test: {folder / name}.jsonl}}
          cache_dir: {folder / "cache"}
        test_split: test
    """
    (folder / f"{name}.yaml").write_text("".join(map(dedent, (head, *parts))))


def means(*metrics):
    lines = [f"- {{metric: {m}, aggregation: mean, higher_is_better: true}}" for m in metrics]
    return "metric_list:\n" + indent("\n".join(lines), "  ") + "\n"


BOX = """
    output_type: multiple_choice
    doc_to_text: "box : {{asked}} ?"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{gold}}"
    metadata: {version: 3.0}
"""
SAY = """
    output_type: generate_until
    doc_to_text: "{{asked}} ?"
    doc_to_target: "{{said}}"
    generation_kwargs: {until: ["|"], max_gen_toks: 5}
    num_fewshot: 0
"""

OWN = """
import random
import numpy as np
import torch


def gap(doc, results):
    return {"gap": results[0][0] - results[1][0], "other": 1.0}


def draw(doc, results):
    return {"draw": random.random() + np.random.rand() + torch.rand(1).item()}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    """A folder of tasks such as a user may write."""
    place = tmp_path_factory.mktemp("tasks")
    task(place, "boxes", questions(), BOX, "tag: all_boxes\n", means(*MEANS))
    mixed = (
        means("acc")
        + "  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}\n"
    )
    task(place, "more_boxes", questions(5), BOX, "tag: all_boxes\n", mixed)
    said = [
        {"asked": row["asked"], "said": greedy(model, tokenizer, row["asked"] + " ?", 5)}
        for row in questions(6)
    ]
    for row in said[::2]:
        row["said"] += " lit"
    task(place, "says", said, SAY, means("exact_match"))
    filters = """\
        filter_list:
          - {name: strict, filter: [{function: take_first}]}
          - {name: lower, filter: [{function: lowercase}, {function: take_first}]}
    """
    task(place, "says_twice", said, SAY, means("exact_match"), filters)
    rolling = """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{said}}"
        metric_list:
          - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
    """
    task(place, "reads", said, rolling)
    own = """
        output_type: multiple_choice
        doc_to_text: "{{asked}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{gold}}"
    """
    task(place, "gaps", questions(), own, "process_results: !function own.gap\n", means("gap"))
    task(place, "draws", questions(4), own, "process_results: !function own.draw\n", means("draw"))
    (place / "own.py").write_text(OWN)
    task(place, "far", questions(2), BOX, means("acc"))
    far = (place / "far.yaml").read_text().replace("path: json", "path: nobody/no-such-boxes")
    (place / "far.yaml").write_text(far.replace("data_files", "revision"))
    (place / "shelf.yaml").write_text("group: shelf\ntask: [boxes, says]\n")
    (place / "dressed.yaml").write_text("group: dressed\ntask: [{task: boxes, num_fewshot: 1}]\n")
    (place / "lost.yaml").write_text("group: lost\ntask: [boxes, no_such_boxes]\n")
    return place


@pytest.fixture(scope="module")
def result(model, tokenizer, folder):
    return benchmarks(model, tokenizer, ["all_boxes", "says"], include=folder, seed=7)


def by_hand(model, tokenizer, row):
    """Which of its choices a model takes: by sum, by characters and by bytes."""
    choices = row["choices"]
    sums = [score(model, tokenizer, f"box : {row['asked']} ?", choice) for choice in choices]
    lengths = ([1] * 3, map(len, choices), (len(choice.encode()) for choice in choices))
    return [
        int(np.argmax([s / n for s, n in zip(sums, sizes, strict=True)]) == row["gold"])
        for sizes in lengths
    ]


def test_multiple_choice_is_the_sum_of_log_probabilities_by_hand(model, tokenizer, result):
    rows = questions()
    expected = np.array([by_hand(model, tokenizer, row) for row in rows])
    # Some right and some wrong, and no metric that is another: else nothing would be tested.
    assert all(0 < share < 1 for share in expected.mean(0))
    assert len({tuple(column) for column in expected.T}) == 3
    boxes = result.frame[result.frame["task"] == "boxes"]
    for metric, values in zip(MEANS, expected.T, strict=True):
        found = boxes[boxes["metric"] == metric].set_index("prompt")["value"]
        assert found.to_dict() == {f"boxes/{n}": value for n, value in enumerate(values)}


def test_generation_is_greedy_and_matched_exactly(result):
    says = result.frame[result.frame["task"] == "says"]
    assert says["metric"].unique() == ["exact_match"]
    # Every other target was spoilt, and the others are what a loop of argmax says.
    assert says["value"].tolist() == [0.0, 1.0] * 3


def test_rows_are_tidy_and_say_what_was_asked_for(result):
    frame = result.frame
    assert list(frame.columns) == COLUMNS
    assert not frame.duplicated(["task", "metric", "prompt"]).any()
    groups = frame.drop_duplicates("task").set_index("task")["group"].to_dict()
    assert groups == {"boxes": "all_boxes", "more_boxes": "all_boxes", "says": "says"}
    assert (frame["seed"] == 7).all()
    assert frame["value"].dtype == float
    # The Brier score is the harness's to sum up, of all questions at once.
    assert set(frame.loc[frame["task"] == "more_boxes", "metric"]) == {"acc"}


def test_made_with_tells_versions_and_shots(result):
    told = result.made_with
    assert told["tasks"] == ["all_boxes", "says"]
    assert told["shots"] == {"boxes": 0, "more_boxes": 0, "says": 0}
    assert told["task_versions"]["boxes"] == 3.0
    assert told["lm-eval"].startswith("0.")
    assert told["dtype"] == "torch.float32"
    assert told["warnings"] == []


@pytest.mark.parametrize("shots", [None, 2])
def test_means_are_those_of_the_harness_own_front_door(model, tokenizer, folder, shots):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["boxes", "gaps", "says"]
    ours = benchmarks(model, tokenizer, names, include=folder, shots=shots, limit=5)
    with harness._silent(), harness._fixed_seeds():
        theirs = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
            tasks=names,
            num_fewshot=shots,
            limit=5,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
        )
    found = ours.frame.groupby(["task", "metric"])["value"].mean()
    assert len(found) == 6
    for (name, metric), value in found.items():
        assert value == pytest.approx(theirs["results"][name][f"{metric},none"], abs=1e-5)
    # A task that is defined without examples keeps none.
    assert ours.made_with["shots"] == theirs["n-shot"]
    assert theirs["n-shot"] == {"boxes": shots or 0, "gaps": shots or 0, "says": 0}


def test_shots_change_what_is_asked(model, tokenizer, folder):
    plain, shown = (
        benchmarks(model, tokenizer, "gaps", include=folder, shots=shots).frame["value"]
        for shots in (0, 2)
    )
    assert not np.allclose(plain, shown)


def test_limit_takes_the_first_questions(model, tokenizer, folder, result):
    few = benchmarks(model, tokenizer, "all_boxes", include=folder, limit=3, batch_size=1).frame
    assert set(few["prompt"]) == {f"{t}/{n}" for t in ("boxes", "more_boxes") for n in range(3)}
    whole = result.frame[result.frame["prompt"].isin(few["prompt"])]
    assert few["value"].tolist() == whole["value"].tolist()


def test_several_filters_are_several_metrics(model, tokenizer, folder):
    frame = benchmarks(model, tokenizer, "says_twice", include=folder).frame
    assert set(frame["metric"]) == {"exact_match,strict", "exact_match,lower"}
    assert len(stats.summary(frame, by=("task", "metric"))) == 2


def test_a_group_holds_its_tasks(model, tokenizer, folder):
    frame = benchmarks(model, tokenizer, "shelf", include=folder, limit=2).frame
    assert set(frame["task"]) == {"boxes", "says"}
    assert set(frame["group"]) == {"shelf"}


def test_intervals_and_paired_differences_need_no_new_run(model, tokenizer, folder, result):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.roll(1, 0))
    moved = benchmarks(other, tokenizer, "all_boxes", include=folder, seed=7).frame
    frame = pd.concat([result.frame.assign(defence="none"), moved.assign(defence="moved")])
    frame = frame[(frame["metric"] == "acc") & (frame["group"] == "all_boxes")]
    table = stats.summary(frame, by=("defence", "group", "metric"))
    assert table["n"].tolist() == [41, 41]
    found = stats.difference(frame, {"defence": "moved"}, {"defence": "none"})
    shares = frame.groupby("defence")["value"].mean()
    assert found.value == pytest.approx(shares["moved"] - shares["none"])
    assert shares["moved"] != shares["none"]


def draws():
    return random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())


def test_what_a_task_draws_is_the_same_each_time_and_disturbs_nobody(model, tokenizer, folder):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = draws()
        found.append(benchmarks(model, tokenizer, ["draws", "boxes"], include=folder, seed=7))
        assert draws() == before
    assert found[0].frame.equals(found[1].frame)
    assert found[0].made_with == found[1].made_with
    assert found[0].frame.loc[found[0].frame["task"] == "draws", "value"].nunique() == 4


def test_model_and_tokenizer_come_back_as_they_were(model, folder):
    plain = word_tokenizer(WORDS, bos_token="<s>", pad_token=None)
    kept = plain.padding_side, plain.pad_token
    mine = copy.deepcopy(model).train()
    mine.model.layers[1].eval()
    mine.model.norm.weight.requires_grad_(False)
    mine.model.layers[0].register_forward_hook(lambda *args: None)
    # Tied by its config, and gone apart since.
    mine.config.tie_word_embeddings = True

    def state():
        weights = {n: (id(w), w.requires_grad, w.dtype) for n, w in mine.named_parameters()}
        modes = [module.training for module in mine.modules()]
        config = mine.config.to_dict(), mine.generation_config.to_dict()
        return weights, modes, hooks_of(mine), config

    values = {name: weight.detach().clone() for name, weight in mine.named_parameters()}
    before = state()
    benchmarks(mine, plain, ["boxes", "says"], include=folder, limit=2)
    assert state() == before
    assert all(torch.equal(weight, values[name]) for name, weight in mine.named_parameters())
    assert all(weight.grad is None for weight in mine.parameters())
    assert (plain.padding_side, plain.pad_token) == kept


def test_a_head_that_went_apart_from_its_embedding_is_asked_itself(
    model, tokenizer, folder, result
):
    mine = copy.deepcopy(model)
    mine.config.tie_word_embeddings = True
    found = benchmarks(mine, tokenizer, "boxes", include=folder, seed=7).frame["value"]
    told = result.frame[result.frame["task"] == "boxes"]
    assert found.tolist() == told["value"].tolist()


def test_dropout_is_off(model, tokenizer, folder, result):
    mine = copy.deepcopy(model).train()
    for layer in mine.model.layers:
        layer.self_attn.attention_dropout = 0.9
    found = benchmarks(mine, tokenizer, "boxes", include=folder, seed=7).frame["value"]
    told = result.frame[result.frame["task"] == "boxes"]
    assert found.tolist() == told["value"].tolist()
    assert mine.training


@pytest.fixture
def loud():
    """Libraries that say all they can, as another part of a program may want them."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_info()
    datasets.enable_progress_bars()
    yield
    datasets.logging.set_verbosity(level)


def test_nothing_is_printed_logged_or_left_silenced(model, tokenizer, folder, loud, capfd, caplog):
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    before = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    with caplog.at_level(logging.DEBUG):
        benchmarks(model, tokenizer, ["boxes", "says"], include=folder, limit=2)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert not [line for line in caplog.records if line.name.startswith(("lm_eval", "datasets"))]
    assert [(log.level, log.propagate, list(log.handlers)) for log in loggers] == before
    assert not datasets.are_progress_bars_disabled()


def test_prompts_that_were_cut_are_told(model, tokenizer, folder):
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 6
    told = benchmarks(short, tokenizer, "boxes", include=folder).made_with["warnings"]
    assert len(told) == 1
    assert "Truncating" in told[0]
    assert told[0].endswith("times)")


def test_a_task_found_in_the_folder_does_not_read_the_fourteen_thousand(
    model, tokenizer, folder, managers
):
    benchmarks(model, tokenizer, "shelf", include=folder, limit=1)
    assert managers == [False]


@pytest.fixture(scope="module")
def index():
    """What the harness itself brings, of the paper's benchmarks: all of it takes ten seconds."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent
    names = ("truthfulqa", "mmlu", "hellaswag", "winogrande", "arc", "hendrycks_ethics")
    folders = [place / name for name in (*names, "crows_pairs")]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture
def managers(monkeypatch, index):
    """Whether each index that is made was to hold the harness's own tasks."""
    import lm_eval.tasks

    plain, made = lm_eval.tasks.TaskManager, []

    def make(include_path=None, include_defaults=True):
        made.append(include_defaults)
        return plain(None, include_path, False) if include_path else index

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", make)
    return made


def test_the_papers_tasks_are_known_to_the_harness(index):
    assert set(PAPER_TASKS) <= set(index.all_tasks)
    assert len(index.task_index["hendrycks_ethics"].tags) == 5


def test_an_unknown_task_is_named_with_its_neighbours(model, tokenizer, managers):
    with pytest.raises(KitError, match=r"'helaswag' .*near it: .*hellaswag.*lm-eval ls tasks"):
        benchmarks(model, tokenizer, ["arc_easy", "helaswag"])
    assert managers == [True]


def test_a_group_with_a_part_elsewhere_asks_the_harness(model, tokenizer, folder, managers):
    with pytest.raises(KitError, match="there is no task 'no_such_boxes' in the harness or in"):
        benchmarks(model, tokenizer, "lost", include=folder)
    assert managers == [False, True]
    # A part with settings of its own may be one of the harness's.
    benchmarks(model, tokenizer, "dressed", include=folder, limit=1)
    assert managers == [False, True] * 2


def test_data_that_cannot_be_had_is_said_in_a_line(model, tokenizer, folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(KitError, match=r"task far: .*no-such-boxes.*HF_HUB_OFFLINE.*include") as e:
        benchmarks(model, tokenizer, ["boxes", "far"], include=folder)
    assert "\n" not in str(e.value)


def test_without_lm_eval_the_way_out_is_said(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(KitError, match=r'pip install "repnoise-kit\[eval\]"'):
        benchmarks(model, tokenizer)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tasks": []}, "no tasks"),
        ({"tasks": "reads"}, "reads has no metric that is a mean.*word_perplexity"),
        ({"tasks": ["boxes", "shelf"]}, "boxes is in boxes and in shelf"),
        ({"tasks": "boxes", "limit": 0}, "limit must be 1 or more"),
        ({"tasks": "boxes", "limit": 0.5}, "limit must be a whole number"),
        ({"tasks": "boxes", "batch_size": 0}, "batch_size must be 1 or more"),
        ({"tasks": "boxes", "shots": -1}, "shots must be a whole number"),
        ({"tasks": "boxes", "seed": -1}, "seed must be a whole number"),
        ({"tasks": "boxes", "include": "no/such/folder"}, "no/such/folder is no folder"),
        ({"tasks": "boxes", "shots": 50}, "cannot run boxes"),
    ],
)
def test_wrong_input_is_refused_in_a_line(model, tokenizer, folder, given, words):
    with pytest.raises(KitError, match=words) as error:
        benchmarks(model, tokenizer, **({"include": folder} | given))
    assert "\n" not in str(error.value)


def test_a_broken_yaml_is_named(model, tokenizer, tmp_path):
    task(tmp_path, "boxes", questions(2), BOX.replace("{{asked}}", "{{asked"), means("acc"))
    with pytest.raises(KitError, match=r"task boxes could not be made.*mend its YAML"):
        benchmarks(model, tokenizer, "boxes", include=tmp_path)


def test_an_answer_longer_than_the_context_is_refused(model, tokenizer, folder):
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 4
    with pytest.raises(KitError, match=r"cannot run says on this model: .*max"):
        benchmarks(short, tokenizer, "says", include=folder)
