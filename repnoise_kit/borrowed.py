"""Models of others that judge answers: what classifiers and judges of the hub share."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from repnoise_kit import processes
from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.model import quiet, why_not
from repnoise_kit.neutral import control_markers, neutralised

GREETING = ("Hello, how are you?", "I am well, thank you.")
_OF_SCORES = ("template", "max_length", "harmful", "unsafe", "safe")


@dataclass(frozen=True)
class HubScorer:
    """What classifiers and judges share; the model is loaded when it is first needed."""

    source: str
    """A folder or a name on the hub."""
    template: str | None
    revision: str | None
    batch_size: int
    max_length: int

    def __post_init__(self) -> None:
        """Refuse what can be told to be wrong before anything is loaded."""
        sizes = {"batch_size": self.batch_size, "max_length": self.max_length}
        check_whole(**sizes)
        check_numbers(above_zero=True, **sizes)
        if self.template is not None and "{response}" not in self.template:
            raise KitError(
                f"the template {self.template!r} has no {{response}}; put it where the answer goes"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the model, which is loaded there."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def name(self) -> str:
        """What results call this scorer: the folder's last part or the hub's name, and revision."""
        stem = Path(self.source).name if Path(self.source).is_dir() else self.source
        return f"{stem}@{self.revision}" if self.revision else stem

    def __str__(self) -> str:
        """Say all that a score depends on, for the record of a result."""
        told = [part.name for part in fields(self) if part.name in _OF_SCORES]
        said = [f"{name}={getattr(self, name)!r}" for name in told]
        return f"{self.name} ({', '.join([*said, *self._files])})"

    @cached_property
    def _files(self) -> list[str]:
        """What stands for the contents of a folder: two may have the same name."""
        files = [*sorted(Path(self.source).glob("*.safetensors")), Path(self.source, "config.json")]
        there = [zlib.crc32(file.read_bytes()) for file in files if file.is_file()]
        return [f"files={'-'.join(f'{sum_:08x}' for sum_ in there)}"] if there else []

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return how harmful each answer is, in [0, 1]; an empty one scores 0."""
        _check_texts(prompts, responses)
        scores = np.zeros(len(responses))
        with quiet():
            said = [neutralised(text, self._markers) for text in responses]
            kept = [row for row, text in enumerate(said) if text]
            for first in range(0, len(kept), self.batch_size):
                rows = kept[first : first + self.batch_size]
                texts = [(neutralised(prompts[row], self._markers), said[row]) for row in rows]
                scores[rows] = self._scores([self._encode(*both) for both in texts]).cpu().numpy()
        return scores

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._load()

    @property
    def _model(self) -> Any:
        return self._loaded[0]

    @property
    def _tokenizer(self) -> Any:
        return self._loaded[1]

    @property
    def _asks(self) -> bool:
        """Whether the question is read at all."""
        return self.template is None or "{prompt}" in self.template

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        return control_markers(self._tokenizer)

    @cached_property
    def _limit(self) -> int:
        limits = self._tokenizer.model_max_length, _positions(self._model)
        return int(min(self.max_length, *limits))

    @cached_property
    def _taken(self) -> int:
        """How many tokens the template itself fills."""
        told = (GREETING[0] if self._asks else "", GREETING[1])
        return len(self._tokens(*told)) - sum(map(len, self._spans(told)))

    def _encode(self, prompt: str, response: str, spare: int = 0) -> list[int]:
        """Return the ids of a filled template.

        Of what does not fit, the beginning of the question goes where that fills more than half,
        and then the end of the answer.
        """
        room = self._limit - self._taken - spare
        if room < 2:
            raise KitError(
                f"max_length {self._limit} leaves no room in {self.name}: its template alone fills "
                f"{self._taken} tokens; give a larger max_length or a shorter template"
            )
        asked, said = self._spans((prompt if self._asks else "", response))
        most = max(room - len(said), room // 2)
        left = room - min(len(asked), most)
        ids = self._tokens(
            prompt[asked[-most][0] :].strip() if len(asked) > most else prompt,
            response[: said[left - 1][1]].strip() if len(said) > left else response,
        )
        # Texts may fall into more tokens beside the template's than alone.
        over = len(ids) - self._limit
        return self._encode(prompt, response, spare + over) if over > 0 else ids

    def _spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return where each token of each text begins and ends in it."""
        told = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return told["offset_mapping"]

    def _load(self) -> tuple[Any, Any]:
        raise NotImplementedError

    def _tokens(self, prompt: str, response: str) -> list[int]:
        raise NotImplementedError

    def _scores(self, encoded: list[list[int]]) -> Tensor:
        raise NotImplementedError


def _check_texts(prompts: Sequence[str], responses: Sequence[str]) -> None:
    for name, texts in (("prompts", prompts), ("responses", responses)):
        if isinstance(texts, str):
            raise KitError(f"{name} is one text; give a list of them")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise KitError(f"{name}[{number}] is {text!r} and no text; mend it")
    if len(prompts) != len(responses):
        raise KitError(f"{len(prompts)} prompts and {len(responses)} responses; give one for each")


def place_of(name: str | Path) -> str:
    """Return a name on the hub as it is, and a folder by its whole path."""
    # A worker may be started in another folder.
    return str(Path(name).absolute()) if Path(name).is_dir() else str(name)


def from_hub(kind: Any, source: str, revision: str | None, what: str) -> tuple[Any, Any]:
    """Load a model, in float32 on a CPU and as it was saved on a GPU, and its tokenizer."""
    device = processes.device()
    told: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    dtype: Any = "auto" if device.type == "cuda" else torch.float32
    with quiet():
        try:
            model, report = kind.from_pretrained(
                source, **told, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(source, **told)
        # Whatever a loader trips over: transformers, safetensors and torch each raise their own.
        except Exception as error:
            raise KitError(why_not(source, error, what)) from error
    if report["missing_keys"]:
        raise KitError(
            f"{source} was not trained as a {what}: it has no {min(report['missing_keys'])}; give "
            "one that was"
        )
    if not tokenizer.is_fast:
        raise KitError(f"{source} has no fast tokenizer; save one (tokenizer.json) beside it")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise KitError(f"the tokenizer of {source} has no padding token; set one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    # A classifier on a decoder finds the end of a text by the padding its config names.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def _positions(model: nn.Module) -> float:
    """Return how many tokens a model with learned absolute positions reads; others read any."""
    for name, part in model.named_modules():
        if name.endswith(("position_embeddings", "wpe")) and isinstance(part, nn.Embedding):
            # RoBERTa counts from behind its padding's place.
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return float("inf")
