"""What ends an answer and what is kept of it: by hand, and on a model whose template ends where its eos does not."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from shared.errors import EngineError
from shared.models.end_tokens import checked_ids, declared_end_ids, end_token_ids, special_ids
from shared.models.files import load_tokenizer
from shared.recipe.recipe import Generate
from shared.recipe.sections.teacher import TransformersTeacher
from teacher_cache.engines import GenerateRequest, open_engine
from teacher_cache.engines.answer_ends import AnswerEnds, foreign_ends, split_stops
from tests.tiny_models import END_OF_TEXT, TURN_END, TURN_START, make_qwen3, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids_of(tokenizer, *pieces: str) -> list[int]:
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def cut(tokenizer, token_ids, *stops):
    return AnswerEnds.of(tokenizer, (), Generate(stop=stops)).cut(token_ids)


@pytest.mark.parametrize("stops", [("answer",), ("swer is",), ("answer is", "nswer"), ("\nQuestion:", "er")])
@pytest.mark.parametrize("text", ["The answer is 12.\nQuestion: what?", "2 answers, then one answer is\nQuestion:"])
def test_answer_ends_right_before_its_first_stop_text(tokenizer, text, stops):
    whole = ids_of(tokenizer, text)
    kept = cut(tokenizer, whole, *stops)
    wanted = text[: min(text.find(stop) for stop in stops if stop in text)]
    assert tokenizer.decode(kept) == wanted
    # tokens that do not reach into the stop text are the model's own, one by one
    untouched = max(n for n in range(len(whole) + 1) if wanted.startswith(tokenizer.decode(whole[:n])))
    assert kept[:untouched] == whole[:untouched]


def test_letters_of_a_token_that_reaches_into_the_stop_text_are_kept(tokenizer):
    (token,) = ids_of(tokenizer, " answer")
    assert tokenizer.decode(cut(tokenizer, [*ids_of(tokenizer, "One"), token, token], "swer")) == "One an"
    assert cut(tokenizer, [token], " answer") == []
    assert cut(tokenizer, [token], "never said") is None


def test_bytes_of_half_a_letter_before_the_stop_text_do_not_change_the_rest(tokenizer):
    half = ids_of(tokenizer, "é")[:1]
    whole = [*ids_of(tokenizer, "ab"), *half, *ids_of(tokenizer, "cd then")]
    kept = cut(tokenizer, whole, "then")
    assert kept[: len(whole) - 2] == whole[: len(kept[: len(whole) - 2])]
    assert tokenizer.decode(kept) == tokenizer.decode(whole).split("then")[0]


def test_special_token_as_stop_text_ends_as_a_token(tokenizer):
    start = tokenizer.convert_tokens_to_ids(TURN_START)
    assert split_stops(tokenizer, (TURN_START, "\n\n")) == ((start,), ("\n\n",))
    assert AnswerEnds.of(tokenizer, (0,), Generate(stop=(TURN_START,))).with_template((7, -1)) == (7, start, 2, 0)
    assert split_stops(tokenizer, ("\n<|im_start|>user",)) == ((), ("\n<|im_start|>user",))


@pytest.mark.parametrize(
    ("stop", "kept"), [("\n<|im_start|>user", "One"), ("im_", "One\n"), ("t|>us", "One\n"), ("endoftext", None)]
)
def test_stop_text_is_met_where_it_is_spelled_by_a_special_token(tokenizer, stop, kept):
    whole = [*ids_of(tokenizer, "One\n<|im_start|>user\nTwo"), tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    assert tokenizer.convert_tokens_to_ids(TURN_START) in whole
    found = AnswerEnds.of(tokenizer, (whole[-1],), Generate(stop=(stop,))).cut(whole)
    assert (found if found is None else tokenizer.decode(found)) == kept  # the end token that closed it is no text


def test_end_tokens_are_one_set_of_template_tokenizer_and_model(tokenizer, tmp_path):
    assert end_token_ids(tokenizer, declared=(0, 2, 9999), templates=(1, -1)) == (1, 2, 0)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert declared_end_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert declared_end_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert declared_end_ids(tmp_path) == (3, 4)
    for wrong in ("</s>", [1, "2"], True, -1, 1.5, {"a": 1}):
        with pytest.raises(EngineError, match="expected a token id"):
            checked_ids(wrong, "x")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        declared_end_ids(tmp_path)


def test_only_a_templates_end_that_the_model_lacks_is_foreign(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    assert foreign_ends([2, 5, 0, -1, 9], tokenizer, tmp_path, Generate()) == [None, None, None, None, 9]
    assert foreign_ends([9], tokenizer, tmp_path, None) == []


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A base model: its eos is `<|endoftext|>`, its chat template ends a turn with `<|im_end|>`, which it likes to
    write.
    """
    directory = make_qwen3(tmp_path_factory.mktemp("base"), seed=1, num_layers=1, end_scale=3.0)
    return with_base_eos(directory)


def with_base_eos(directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.eos_token = END_OF_TEXT
    tokenizer.save_pretrained(directory)
    for name in ("config.json", "generation_config.json"):
        document = json.loads((directory / name).read_text()) | {"eos_token_id": tokenizer.eos_token_id}
        (directory / name).write_text(json.dumps(document))
    return directory


def requests(tokenizer, *ends: int) -> list[GenerateRequest]:
    return [GenerateRequest(i, 0, ids_of(tokenizer, f"How many are {i}?"), 50 + i, tuple(ends)) for i in range(24)]


def test_answers_end_at_the_template_of_their_prompt(base_model):
    teacher = TransformersTeacher(model="m", engine="transformers")
    engine = open_engine(teacher, None, for_generation=Generate(), model_dir=base_model)
    end = engine.tokenizer.convert_tokens_to_ids(TURN_END)
    assert engine.tokenizer.eos_token_id != end
    settings = Generate(max_new_tokens=40)
    with_template = list(engine.generate(iter(requests(engine.tokenizer, end)), settings))
    assert not any(end in answer.token_ids[:-1] for answer in with_template)
    assert Counter(answer.finish_reason for answer in with_template)["stop"] >= 20
    without = {answer.tag: answer for answer in engine.generate(iter(requests(engine.tokenizer)), settings)}
    for answer in with_template:  # the same draws, only ended
        assert without[answer.tag].token_ids[: len(answer.token_ids)] == answer.token_ids


def test_a_special_token_that_a_tokenizer_has_no_id_for_is_none(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": ["<|im_start|>", ""]}))
    odd = load_tokenizer(tmp_path, trust_remote_code=False)
    assert None in odd.all_special_ids
    assert special_ids(odd) == special_ids(tokenizer)
