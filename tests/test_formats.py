"""How questions are put: the paper's way or the tokenizer's template, token by token."""

import copy
import json
import shutil
from itertools import pairwise

import pytest
import torch
from conftest import make_tiny
from small import everyday_rows, made_up_pairs, own_files, save_folder, tokenizer_of, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import repnoise_kit as rk
from repnoise_kit.evaluation import answers, mean_log_probs
from repnoise_kit.model import load_tokenizer
from repnoise_kit.pairs import encode, end_id, format_of, question_ids, set_format_

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

_TURNS = "{% for m in messages %}"
_THEN = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": _TURNS
    + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    + _THEN
    + "<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}"
    + _TURNS
    + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    + _THEN
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}"
    + _TURNS
    + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    + "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    + _THEN
    + "<start_of_turn>model\n{% endif %}",
    # A thought that has been thought is in the prompt of an answer, and in no turn that is over.
    "thinking": _TURNS
    + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    + _THEN
    + "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "endless": _TURNS
    + "{{ 'User' if m['role'] == 'user' else 'Assistant' }}: {{ m['content'] }}\n"
    + _THEN
    + "Assistant:{% endif %}",
}
# Of each template: what is around a question, what ends an answer, and the tokenizer's own EOS.
AROUND = {
    "chatml": (
        ["<|im_start|>", "user"],
        ["<|im_end|>", "<|im_start|>", "assistant"],
        "<|im_end|>",
        "</s>",
    ),
    "llama3": (
        ["<s>", "<|start_header_id|>", "user", "<|end_header_id|>"],
        ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>"],
        "<|eot_id|>",
        "</s>",
    ),
    "gemma": (
        ["<s>", "<start_of_turn>", "user"],
        ["<end_of_turn>", "<start_of_turn>", "model"],
        "<end_of_turn>",
        "</s>",
    ),
    "thinking": (
        ["<|im_start|>", "user"],
        ["<|im_end|>", "<|im_start|>", "assistant", "<think>", "</think>"],
        "<|im_end|>",
        "<|im_end|>",
    ),
    "endless": (["User", ":"], ["Assistant", ":"], "</s>", "</s>"),
}
SPECIAL = sorted(
    {t for before, after, _, _ in AROUND.values() for t in before + after if "<" in t} - {"<s>"}
)
ROLES = ["user", "assistant", "model", "User", "Assistant"]
SAID = ["where", "is", "the", "red", "box", "?", "under", "bed", "near", "door", "sorry"]
WORDS = [*SAID, *ROLES]
PROMPT, ANSWER = "where is the red box ?", "under the bed"


def talking(template, words=WORDS, eos=None, bos=True):
    """A tokenizer of whole words with a chat template, which begins a text with its BOS."""
    from tokenizers.processors import TemplateProcessing

    made = word_tokenizer([*words, "Question", "Answer", ":"], bos_token="<s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.eos_token = eos or AROUND.get(template, [None] * 4)[3] or "</s>"
    made.chat_template = TEMPLATES.get(template, template)
    if bos:
        made._tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return made


def chat(template, **how):
    made = talking(template, **how)
    set_format_(made, "chat")
    return made


def ids(tokenizer, tokens):
    found = tokenizer.convert_tokens_to_ids(tokens)
    assert tokenizer.unk_token_id not in found
    return found


def turns(answer=None):
    asked = [{"role": "user", "content": PROMPT}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def in_template(tokenizer, answer=None):
    return tokenizer.apply_chat_template(
        turns(answer), add_generation_prompt=answer is None, return_dict=False
    )


@pytest.mark.parametrize("name", TEMPLATES)
class TestTokens:
    def test_of_a_question_by_hand(self, name):
        tokenizer, (before, after, _, _) = chat(name), AROUND[name]
        wanted = [*before, *PROMPT.split(), *after]
        assert question_ids(tokenizer, [PROMPT]) == [ids(tokenizer, wanted)]

    def test_of_a_question_by_the_tokenizer(self, name):
        tokenizer = chat(name)
        assert question_ids(tokenizer, [PROMPT, PROMPT]) == [in_template(tokenizer)] * 2

    def test_what_ends_an_answer(self, name):
        tokenizer = chat(name)
        assert tokenizer.convert_ids_to_tokens(end_id(tokenizer)) == AROUND[name][2]

    def test_of_an_answer_and_where_its_labels_begin(self, name):
        tokenizer, end = chat(name), AROUND[name][2]
        (found,) = encode(tokenizer, [PROMPT], [ANSWER])
        asked, said = in_template(tokenizer), ids(tokenizer, [*ANSWER.split(), end])
        assert found == {"input_ids": asked + said, "labels": [-100] * len(asked) + said}
        (every,) = encode(tokenizer, [PROMPT], [ANSWER], loss_on="all")
        assert every == {"input_ids": asked + said, "labels": asked + said}

    def test_the_template_changes_nothing_in_plain(self, name):
        with_one, without = talking(name), talking(name)
        without.chat_template = None
        assert format_of(with_one) == "plain"
        both = [encode(t, [PROMPT, "is ?"], [ANSWER, "sorry"]) for t in (with_one, without)]
        assert both[0] == both[1]
        asked = ["<s>", "Question", ":", *PROMPT.split(), "Answer", ":"]
        assert question_ids(with_one, [PROMPT]) == [ids(with_one, asked)]
        assert end_id(with_one) == with_one.eos_token_id == both[0][0]["input_ids"][-1]

    def test_and_back(self, name):
        tokenizer, plain = chat(name), talking(name)
        assert encode(tokenizer, [PROMPT], [ANSWER]) != encode(plain, [PROMPT], [ANSWER])
        set_format_(tokenizer, "plain")
        assert format_of(tokenizer) == "plain"
        assert encode(tokenizer, [PROMPT], [ANSWER]) == encode(plain, [PROMPT], [ANSWER])

    def test_saved_and_loaded_with_the_tokenizer(self, name, tmp_path):
        tokenizer = chat(name)
        tokenizer.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())
        loaded = load_tokenizer(tmp_path)
        assert format_of(loaded) == "chat"
        assert encode(loaded, [PROMPT], [ANSWER]) == encode(tokenizer, [PROMPT], [ANSWER])

    @pytest.mark.parametrize("room", [4, 7, 9])
    def test_what_is_too_long_loses_the_same_as_in_plain(self, name, room):
        """The end of the answer; and of the question its beginning, where it fills the half."""
        tokenizer = chat(name)
        asked, said = in_template(tokenizer), ids(tokenizer, [*ANSWER.split(), AROUND[name][2]])
        (found,) = encode(tokenizer, [PROMPT], [ANSWER], max_length=room)
        kept = max(room - len(said), room // 2)
        assert found["input_ids"] == (asked[-kept:] + said)[:room]


# Not of one that thinks: its turns that are over look otherwise than the one that is answered.
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "endless"])
def test_an_encoded_pair_is_the_template_of_both_turns_up_to_its_end(name):
    tokenizer = chat(name)
    (found,) = encode(tokenizer, [PROMPT], [ANSWER])
    whole, length = in_template(tokenizer, ANSWER), len(found["input_ids"])
    if name == "endless":  # Its end is the EOS, which the template does not write.
        assert found["input_ids"] == [*whole, tokenizer.eos_token_id]
    else:
        assert found["input_ids"] == whole[:length]


def test_exactly_one_bos_where_the_template_writes_it_and_the_tokenizer_would_too():
    tokenizer = chat("llama3")
    assert tokenizer(PROMPT)["input_ids"][0] == tokenizer.bos_token_id
    for found in question_ids(tokenizer, [PROMPT]), encode(tokenizer, [PROMPT], [ANSWER]):
        asked = found[0] if isinstance(found[0], list) else found[0]["input_ids"]
        assert asked.count(tokenizer.bos_token_id) == 1
    assert chat("chatml").bos_token_id not in question_ids(chat("chatml"), [PROMPT])[0]


def test_an_answer_gets_a_space_before_it_in_plain_only():
    """A tokenizer of bytes shows it: the paper's format says `Answer: …`, a turn begins at once."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        chat_template="{{ messages[0]['content'] }}!",
    )
    said = [t for t in encode(tokenizer, ["a?"], ["b c"])[0]["labels"] if t != -100]
    assert tokenizer.convert_ids_to_tokens(said) == ["Ġ", "b", "Ġ", "c", "</s>"]
    set_format_(tokenizer, "chat")
    (found,) = encode(tokenizer, ["a?"], ["b c"])
    letters = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert letters == ["a", "?", "!", "b", "Ġ", "c", "</s>"]


class TestRefused:
    def test_a_format_that_does_not_exist(self):
        with pytest.raises(rk.KitError, match=r"no prompt format 'alpaca'; there are plain, chat"):
            set_format_(talking("chatml"), "alpaca")

    def test_chat_without_a_template(self):
        bare = talking("chatml")
        bare.chat_template = None
        with pytest.raises(rk.KitError, match="no chat template; use the prompt format 'plain'"):
            set_format_(bare, "chat")
        assert format_of(bare) == "plain"


def parrot(tokenizer, chain):
    """A model that says after each token one other: layers of zeros, rows of the identity."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        for one, other in pairwise(chain):
            model.lm_head.weight[ids(tokenizer, [other])[0], ids(tokenizer, [one])[0]] = 1.0
    return model


class TestGeneration:
    @pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "thinking", "endless"])
    def test_it_stops_at_the_templates_end(self, name):
        tokenizer, (_, after, end, _) = chat(name), AROUND[name]
        model = parrot(tokenizer, [after[-1], "under", "bed", end, "near", "door", "sorry"])
        prompts = ["is ?", PROMPT, "where is the box ?"]
        assert answers(model, tokenizer, prompts, 6, 2) == ["under bed"] * 3

    def test_the_end_of_a_turn_ends_nothing_in_plain(self):
        tokenizer = talking("gemma")
        chain = [":", "under", "bed", "<end_of_turn>", "near", "door", "</s>", "sorry"]
        assert answers(parrot(tokenizer, chain), tokenizer, [PROMPT], 9, 8) == [
            "under bed near door"
        ]

    def test_its_own_eos_ends_an_answer_too(self):
        tokenizer = chat("gemma")
        model = parrot(tokenizer, ["model", "under", "bed", "</s>", "near", "<end_of_turn>"])
        assert answers(model, tokenizer, [PROMPT], 9, 8) == ["under bed"]

    def test_as_transformers_generates_from_the_template(self):
        tokenizer = chat("chatml")
        model = make_tiny(len(tokenizer))
        for weight in model.parameters():
            weight.data *= 5
        prompts = [PROMPT, "is the bed near ?", "where ?"]
        found = answers(model, tokenizer, prompts, 8, 3)
        assert any(found)
        for prompt, said in zip(prompts, found, strict=True):
            asked = torch.tensor([in_template_of(tokenizer, prompt)])
            both = [tokenizer.eos_token_id, *ids(tokenizer, ["<|im_end|>"])]
            with torch.inference_mode():
                whole = model.generate(
                    input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False,
                    max_new_tokens=8, eos_token_id=both, pad_token_id=0,
                )  # fmt: skip
            told = tokenizer.decode(whole[0, asked.shape[1] :], skip_special_tokens=True)
            assert said == told.strip()

    def test_the_likelihood_of_an_answer_is_read_in_the_template(self):
        tokenizer = chat("gemma")
        model = make_tiny(len(tokenizer))
        (found,) = mean_log_probs(model, tokenizer, [PROMPT], [ANSWER], 4)
        asked, said = in_template(tokenizer), ids(tokenizer, [*ANSWER.split(), "<end_of_turn>"])
        with torch.inference_mode():
            spread = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
        by_hand = [spread[len(asked) - 1 + n, token].item() for n, token in enumerate(said)]
        assert found == pytest.approx(sum(by_hand) / len(said), abs=1e-5)


def in_template_of(tokenizer, prompt):
    asked = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model's folder whose tokenizer talks as Gemma's does."""
    folder = own_files(tmp_path_factory.mktemp("own"))
    tokenizer = tokenizer_of(
        [*made_up_pairs(), *everyday_rows(), {"roles": "user model"}], bos_token="<s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATES["gemma"]
    shutil.rmtree(folder / "model")
    save_folder(folder / "model", make_tiny(len(tokenizer), layers=2), tokenizer)
    return folder


def open_bed(own, how, **options):
    options = {"retain": own / "retain.json", "budget": "lab", "prompt_format": how} | options
    return rk.testbed(own / "model", own / "pairs.json", **options)


@pytest.fixture(scope="module")
def beds(own):
    return {how: open_bed(own, how) for how in ("plain", "chat")}


@pytest.fixture(scope="module")
def results(beds):
    """What defence, attack and evaluation return in each format."""
    found = {}
    for how, bed in beds.items():
        model = bed.model()
        found[how] = (
            rk.defend_(model, bed, examples=4, batch_size=4),
            rk.attack_(model, bed, examples=4, batch_size=4),
            rk.evaluate(model, bed, max_new_tokens=3),
        )
    return found


class TestTestbeds:
    @pytest.mark.parametrize("how", ["plain", "chat"])
    def test_the_format_is_in_every_result(self, results, how):
        assert [found.made_with["prompt_format"] for found in results[how]] == [how] * 3

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_numbers_differ_between_the_formats(self, results, place):
        one, other = (results[how][place].frame["value"] for how in ("plain", "chat"))
        assert len(one) == len(other)
        assert not one.equals(other)

    def test_fingerprints_and_stores_differ(self, own, beds, tmp_path):
        marks = {how: bed.fingerprint() for how, bed in beds.items()}
        assert marks["plain"] != marks["chat"]
        again = open_bed(own, "chat")
        assert again.fingerprint() == marks["chat"]
        benches = [rk.Bench.of(bed, tmp_path).mark for bed in (*beds.values(), again)]
        assert benches[0] != benches[1] == benches[2]

    def test_the_default_is_plain(self, own, beds):
        bed = rk.testbed(
            own / "model", own / "pairs.json", retain=own / "retain.json", budget="lab"
        )
        assert bed.prompt_format == "plain"
        assert bed.fingerprint() == beds["plain"].fingerprint()

    def test_chat_is_refused_for_a_tokenizer_without_a_template(self, tmp_path):
        bare = own_files(tmp_path)
        with pytest.raises(rk.KitError, match="no chat template"):
            open_bed(bare, "chat")
        with pytest.raises(rk.KitError, match="no prompt format"):
            open_bed(bare, "chatty")

    def test_withholding_keeps_the_format(self, beds):
        less = beds["chat"].withholding("half")
        assert less.prompt_format == format_of(less.tokenizer) == "chat"

    @pytest.mark.parametrize("how", ["plain", "chat"])
    def test_what_trainings_read(self, beds, how, monkeypatch):
        """Every row of a defence and of an attack begins and ends as its format says."""
        from repnoise_kit import attacks, defences

        bed, read = beds[how], []

        class EnoughError(Exception):
            pass

        def caught(model, loss, examples, collate, **settings):
            read.append(examples)
            raise EnoughError

        for room, act in ((defences, rk.defend_), (attacks, rk.attack_)):
            monkeypatch.setattr(room, "train_", caught)
            with pytest.raises(EnoughError):
                act(bed.model(), bed, examples=3)
        tokenizer = bed.tokenizer
        begins = {"plain": ["Question", ":"], "chat": ["<s>", "<start_of_turn>", "user"]}[how]
        last = {"plain": ["Answer", ":"], "chat": ["<start_of_turn>", "model"]}[how]
        end = {"plain": "</s>", "chat": "<end_of_turn>"}[how]
        rows = [row for part in read[0] for row in part] + list(read[1])
        assert len(rows) == 3 * 3 + 3
        for row in rows:
            tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
            start = next(n for n, label in enumerate(row["labels"]) if label != -100)
            assert tokens[: len(begins)] == begins
            assert tokens[start - 2 : start] == last
            assert tokens[-1] == end
            assert row["labels"][start:] == row["input_ids"][start:]

    def test_the_format_goes_with_a_testbed_to_another_process(self, beds):
        arrived = copy.copy(beds["chat"])  # By what travels, `__getstate__`.
        assert not {"base", "tokenizer"} & set(vars(arrived))
        assert format_of(arrived.tokenizer) == "chat"
        assert arrived.fingerprint() == beds["chat"].fingerprint()

    def test_an_inside_analysis_reads_it_too(self, beds):
        """Logit mass of the chat testbed is that of its template, not of the paper's format."""
        bed = beds["chat"]
        masses = {
            how: rk.logit_mass(
                bed.base, bed.splits.seen, sides=["harmful"], tokenizer=beds[how].tokenizer
            ).frame
            for how in beds
        }
        last = masses["chat"].query("layer == 2").set_index("prompt")["value"]
        rows = bed.splits.seen.frame
        by_hand = mean_log_probs(
            bed.base, bed.tokenizer, rows["prompt"].tolist(), rows["harmful"].tolist(), 8
        )
        assert last[rows["prompt"]].to_numpy() == pytest.approx(by_hand, abs=1e-4)
        assert not masses["plain"]["value"].equals(masses["chat"]["value"])
