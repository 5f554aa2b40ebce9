"""A translated cache has every row again, in the student's tokens, with the teacher's likelihood of the same text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import teacher_cache.engines as engines
from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.errors import CacheError
from shared.recipe.recipe import Recipe
from shared.tokens.token_bytes import read_vocabulary
from teacher_cache.build import teach
from tests.shared.dense_targets import equal_targets
from tests.student_train.hidden_caches import add_hidden
from tests.teacher_cache.fake_engine import END_ID, FakeEngine
from tests.tiny_models import TURN_END, make_qwen3
from tests.tools.foreign.peers import samples, write_axolotl
from tests.tools.translate.odd_texts import odd_text
from tests.tools.translate.student_tokenizers import INST, TURNS, permuted, save, student_tokenizer
from tools import cli
from tools.cache.translate.translate_cache import translate_cache

TEMPERATURES = [1.0, 2.0]


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A directory with a teacher and its cache: sampled answers of random tokens, lone bytes among them."""
    root = tmp_path_factory.mktemp("taught")
    texts = (odd_text(seed).replace("\r", "").replace("\u2581", "_").replace("<0x", "<x").strip() for seed in range(12))
    answers = [text or "none" for text in texts]
    rows = [{"prompt": f"How many apples has Anna, number {i}?", "completion": text} for i, text in enumerate(answers)]
    (root / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_qwen3(root / "teacher")
    settings = {
        "name": "test",
        "output_dir": str(root / "run"),
        "teacher": {"model": str(model), "engine": "transformers", "dtype": "float32", "max_model_len": 128},
        "prompts": [{"source": "math", "path": str(root / "math.jsonl"), "format": "prompt_completion"}],
        "generate": {"max_new_tokens": 32},
        "capture": {"k": 4, "temperatures": TEMPERATURES},
        "rows_per_part": 5,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "open_engine", lambda teacher, capture, **_: FakeEngine(teacher, capture))
        patch.setattr(engines, "refusal", lambda teacher, capture: None)
        teach(Recipe.model_validate({**settings, "cache": str(root / "cache")}))
        teach(Recipe.model_validate({**settings, "cache": str(root / "given"), "generate": None}))
    return root


def rows_of(path: Path) -> dict[bytes, object]:
    cache = Cache.open(path)
    return {cache[i].row_key: cache[i] for i in range(len(cache))}


def text_of(directory: Path, token_ids: np.ndarray) -> bytes:
    vocabulary = read_vocabulary((directory / "tokenizer.json").read_bytes())
    return b"".join(vocabulary.octets[i] for i in token_ids.tolist() if i not in vocabulary.special)


@pytest.mark.parametrize(
    ("cache", "kind", "template"),
    [
        ("cache", "single digits", TURNS),
        ("cache", "prefix space", INST),
        ("given", "joined digits", INST),
        ("given", "unigram", TURNS),
        ("given", "spaces", TURNS),
    ],
)
def test_rows_come_again_in_the_tokens_of_the_student(taught, tmp_path, cache, kind, template) -> None:
    student = save(student_tokenizer(kind), tmp_path / "student", template)
    result = translate_cache(taught / cache, tmp_path / "out", str(student))
    assert list(verify_cache(tmp_path / "out")) == []
    before, after = rows_of(taught / cache), rows_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert (result["rows"], result["set_aside"], result["method"]) == (12, {}, "bytes-1")
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    for key, row in after.items():
        old = before[key]
        assert (row.group_key, row.source, row.prompt, row.response) == (
            old.group_key,
            old.source,
            old.prompt,
            old.response,
        )
        assert text_of(student, row.labels()).strip() == text_of(taught / "teacher", old.labels()).strip()
        assert (tokenizer.id_to_token(int(row.labels()[-1])) == "</s>") == (old.finish_reason != "length")
        likelihoods = row.targets.label_logprobs.sum(), old.targets.label_logprobs.sum()
        np.testing.assert_allclose(*likelihoods, atol=2e-3 * len(old.labels()))
    heads = sum(int((row.targets.counts > 0).sum()) for row in after.values())
    assert result["positions_with_head"] == heads >= 0.3 * result["positions"]
    assert result["likelihood_unknown"] == 0
    stats = Cache.open(tmp_path / "out").stats()
    assert stats["share_with_head"] == pytest.approx(heads / result["positions"])
    assert stats["placed_mass"] == pytest.approx(result["placed_mass"])
    assert result["placed_mass"] <= result["teacher_mass"] + 1e-3
    assert translate_cache(taught / cache, tmp_path / "out", str(student)) == {**result, "existed": True}


@pytest.mark.parametrize("permutes", [False, True])
def test_the_same_tokens_keep_their_targets_bit_for_bit(taught, tmp_path, permutes) -> None:
    teacher = Tokenizer.from_file(str(taught / "teacher/tokenizer.json"))
    student = Tokenizer.from_str(permuted(teacher.to_str())) if permutes else teacher
    template = (taught / "teacher/chat_template.jinja").read_text()
    directory = save(student, tmp_path / "student", template, eos=TURN_END, pad_token="<|endoftext|>")
    for name in ("cache", "given"):
        result = translate_cache(taught / name, tmp_path / name, str(directory))
        assert (result["method"], result["positions_with_head"]) == ("renamed-1", result["positions"])
        before, after = rows_of(taught / name), rows_of(tmp_path / name)
        assert before.keys() == after.keys()
        ids = np.array([student.token_to_id(teacher.id_to_token(i)) for i in range(teacher.get_vocab_size())], np.int32)
        for key, row in after.items():
            old = before[key]
            assert row.targets.temperatures == tuple(TEMPERATURES)
            np.testing.assert_array_equal(row.token_ids, ids[old.token_ids])
            assert equal_targets(row.targets, replace(old.targets, ids=ids[old.targets.ids]))


def test_a_hidden_layer_that_is_left_out_is_named(taught, tmp_path, capsys) -> None:
    cache = add_hidden(Path(shutil.copytree(taught / "given", tmp_path / "cache")), taught / "teacher", layers=1)
    words = ["cache", "translate", str(cache), str(tmp_path / "out"), "--tokenizer", str(taught / "teacher")]
    for _ in range(2):
        assert cli.main(words) == 0
        assert "  hidden layers1-" in capsys.readouterr().out


def test_what_cannot_be_translated_is_refused_before_anything_is_written(taught, tmp_path, capsys) -> None:
    from tokenizers import models, pre_tokenizers

    student = save(student_tokenizer("joined digits"), tmp_path / "student")
    translate_cache(taught / "given", tmp_path / "out", str(student))
    with pytest.raises(CacheError, match="was itself derived from top4"):
        translate_cache(tmp_path / "out", tmp_path / "again", str(student))
    (tmp_path / "kd").mkdir()
    write_axolotl(tmp_path / "kd/kd.parquet", samples(2), 4, temperature=1.0, shift=1)
    imported = ["cache", "import", str(tmp_path / "kd"), str(tmp_path / "tailless"), "--shift", "1"]
    assert cli.main([*imported, "--tokenizer", str(taught / "teacher")]) == 0
    with pytest.raises(CacheError, match="does not know the mass outside its heads"):
        translate_cache(tmp_path / "tailless", tmp_path / "no", str(student))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    bad = save(words, tmp_path / "words")
    assert cli.main(["cache", "translate", str(taught / "given"), str(tmp_path / "no"), "--tokenizer", str(bad)]) == 1
    assert "do not stand for bytes" in capsys.readouterr().err
    no_template = save(student_tokenizer("joined digits"), tmp_path / "plain", None)
    command = ["cache", "translate", str(taught / "given"), str(tmp_path / "no"), "--tokenizer", str(no_template)]
    assert cli.main(command) == 1
    assert "--chat-template" in capsys.readouterr().err
    (tmp_path / "turns.jinja").write_text(TURNS)
    assert cli.main([*command, "--chat-template", str(tmp_path / "turns.jinja")]) == 0
    assert not list(tmp_path.glob(".no*")) and "12 rows" in capsys.readouterr().out


def test_a_control_token_within_an_answer_is_that_of_the_student_and_no_text(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"number {i}?"}) + "\n" for i in range(8)))
    said = [[70, 71, 1, 72, END_ID], [70, 71, 1], [70, 71, END_ID]]  # begins a turn, is cut after that, ends

    def opened(teacher, capture, **_):
        engine = FakeEngine(teacher, capture)
        engine.answer = lambda rng: (lambda ids: (ids, "stop" if ids[-1] == END_ID else "length"))(
            said[int(rng.integers(3))]
        )
        return engine

    monkeypatch.setattr(engines, "open_engine", opened)
    monkeypatch.setattr(engines, "refusal", lambda teacher, capture: None)
    model = make_qwen3(tmp_path / "teacher")
    teacher = {"model": str(model), "engine": "transformers", "dtype": "float32", "max_model_len": 128}
    prompts = [{"source": "a", "path": str(tmp_path / "a.jsonl"), "format": "prompt_completion"}]
    settings = {"name": "t", "output_dir": str(tmp_path / "run"), "teacher": teacher, "prompts": prompts}
    settings |= {"generate": {"max_new_tokens": 9, "samples_per_prompt": 3}, "capture": {"k": 4}}
    teach(Recipe.model_validate({**settings, "cache": str(tmp_path / "cache")}))
    inner = student_tokenizer("joined digits")
    plain = save(inner, tmp_path / "plain")
    inner.add_special_tokens(["<|im_start|>"])
    named = save(inner, tmp_path / "named")
    before = rows_of(tmp_path / "cache")
    kinds = {key: said.index(row.labels().tolist()) for key, row in before.items()}
    assert set(kinds.values()) == {0, 1, 2}
    translate_cache(tmp_path / "cache", tmp_path / "out", str(named))
    after = rows_of(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, row in after.items():
        spelled = [inner.id_to_token(i) for i in row.labels().tolist() if i in named_controls(inner)]
        assert spelled == [["<|im_start|>", "</s>"], ["<|im_start|>"], ["</s>"]][kinds[key]]
        assert text_of(named, row.labels()) == text_of(tmp_path / "teacher", before[key].labels())
        sums = [one.targets.label_logprobs.sum() for one in (row, before[key])]
        np.testing.assert_allclose(*sums, atol=1e-3)
    without = translate_cache(tmp_path / "cache", tmp_path / "less", str(plain))
    reason = "the student has no control token '<|im_start|>'"
    assert without["set_aside"] == {reason: sum(kind < 2 for kind in kinds.values())}


def named_controls(inner: Tokenizer) -> set[int]:
    return {inner.token_to_id(name) for name in ("<|im_start|>", "</s>")}


def test_rows_without_a_conversation_are_cut_at_control_tokens(taught, tmp_path) -> None:
    from tools.cache.parquet_export import export_cache
    from tools.cache.parquet_import import import_parquet

    export_cache(taught / "given", tmp_path / "parquet", None, lambda rows: None)
    import_parquet(tmp_path / "parquet", tmp_path / "plain")
    student = save(student_tokenizer("joined digits"), tmp_path / "student")
    with pytest.raises(CacheError, match="has no control token '<|im_start|>'".replace("|", r"\|")):
        translate_cache(tmp_path / "plain", tmp_path / "no", str(student))
    chatml = student_tokenizer("joined digits")
    chatml.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    student = save(chatml, tmp_path / "chatml")
    result = translate_cache(tmp_path / "plain", tmp_path / "out", str(student))
    assert (result["rows"], result["likelihood_unknown"]) == (12, 0)
    for key, row in rows_of(tmp_path / "out").items():
        assert chatml.decode(row.labels().tolist()) == rows_of(tmp_path / "plain")[key].response
        assert chatml.id_to_token(int(row.labels()[-1])) == "</s>"
