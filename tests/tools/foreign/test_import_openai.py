"""Answers of OpenAI-style servers are read token by token, and what they do not say is marked or asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.errors import CacheError, DamagedError
from tests.tools.foreign.importing import assert_holds, run
from tests.tools.foreign.peers import VOCAB, chat_line, completion_line, prompt_logprobs_line, samples, spelled
from tools.cache.foreign.openai_json import OpenAIReader
from tools.cache.foreign.openai_request import rendered_messages


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(tokenizer, made):
    messages = [{"role": "user", "content": "How many apples are left?"}]
    return messages, [chat_line(tokenizer, messages, sample, 5) for sample in made]


def test_chat_completions_are_told_by_bytes_with_every_label(tmp_path, tokenizer, tokenizer_dir, capsys):
    made = samples(3, seed=3)
    messages, lines = answers(tokenizer, made)
    lines[1] = {"custom_id": "a", "request": {"body": {"messages": messages}}, "response": {"body": lines[1]}}
    file = write_lines(tmp_path / "answers.jsonl", lines)
    result = run(capsys, file, tmp_path / "cache", "--tokenizer", tokenizer_dir)
    assert (result["tail"], result["labels"], result["rows"]) == ("unknown", "all", 3)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    cache = Cache.open(tmp_path / "cache")
    for i, sample in enumerate(made):
        row = cache[i]
        assert row.token_ids.tolist() == [*prompt, *sample.token_ids[1:]]
        assert row.spans.tolist() == [[len(prompt), len(row.token_ids)]]
        assert (row.prompt, row.finish_reason) == (messages[0]["content"], "stop")
        labels = sample.logprobs[np.arange(len(sample.token_ids) - 1), sample.token_ids[1:]]
        np.testing.assert_allclose(row.targets.label_logprobs, labels, atol=2e-3)
        ids, values = (part[:-1].tolist() for part in sample.top(5))
        for s, label in enumerate(sample.token_ids[1:]):
            if label not in ids[s]:
                ids[s], values[s] = [*ids[s], label], [*values[s], labels[s]]
        assert_holds(cache, i, ids, values, tail="unknown")


def test_raw_values_of_a_server_have_a_derived_tail(tmp_path, tokenizer, tokenizer_dir, capsys):
    file = write_lines(tmp_path / "answers.jsonl", answers(tokenizer, samples(2, seed=3))[1])
    result = run(capsys, file, tmp_path / "cache", "--tokenizer", tokenizer_dir, "--tail", "derived")
    assert result["tail"] == "derived"
    assert not bool(np.isnan(Cache.open(tmp_path / "cache")[0].targets.tail_logmass).any())


@pytest.mark.slow
def test_completions_are_told_by_text_and_torn_ones_are_set_aside(tmp_path, tokenizer, tokenizer_dir, capsys):
    whole = [i for i in range(VOCAB) if "\ufffd" not in spelled(tokenizer, i, 0.0)["token"]]
    made = samples(3, seed=5)
    for sample in made[:2]:
        sample.token_ids[1:] = [whole[t % len(whole)] for t in sample.token_ids[1:]]
    torn = next(i for i in range(3, VOCAB) if i not in whole)
    made[2].token_ids[2] = torn
    lines = [completion_line(tokenizer, f"Sort {n} numbers", sample, 5) for n, sample in enumerate(made)]
    words = (write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", "--tokenizer", tokenizer_dir)
    result = run(capsys, *words, "--max-set-aside", "0.34")
    assert result["set_aside"] == {"a token of the answer is none of the tokenizer's": 1}
    cache = Cache.open(tmp_path / "cache")
    assert len(cache) == 2
    for i, sample in enumerate(made[:2]):
        ids, _values = sample.top(5)
        prompt = tokenizer(f"Sort {i} numbers")["input_ids"]
        assert cache[i].token_ids.tolist() == [*prompt, *sample.token_ids[1:]]
        for s, label in enumerate(sample.token_ids[1:]):
            offsets = cache[i].targets.offsets()
            named = set(cache[i].targets.ids[offsets[s] : offsets[s + 1]].tolist())
            assert named == ({j for j in ids[s].tolist() if j in whole} | {label})


@pytest.mark.parametrize("echoes", [False, True])
def test_no_token_of_a_completion_is_left_out_or_comes_twice(tmp_path, tokenizer, tokenizer_dir, capsys, echoes):
    whole = [i for i in range(VOCAB) if "\ufffd" not in spelled(tokenizer, i, 0.0)["token"]]
    (sample,) = samples(1, seed=5)
    sample.token_ids[1:] = [whole[t % len(whole)] for t in sample.token_ids[1:]]
    line = completion_line(tokenizer, "Sort 3 numbers", sample, 5)
    logprobs, prompt = line["choices"][0]["logprobs"], tokenizer("Sort 3 numbers")["input_ids"]
    logprobs["top_logprobs"][2] = None  # a token without alternatives
    if echoes:
        words = [spelled(tokenizer, i, 0.0)["token"] for i in prompt]
        line["echo"], values = True, [None, *(-1.0 for _ in words[1:])]
        logprobs["tokens"] = words + logprobs["tokens"]
        logprobs["token_logprobs"] = values + logprobs["token_logprobs"]
        logprobs["top_logprobs"] = [None, *({word: -1.0} for word in words[1:]), *logprobs["top_logprobs"]]
    run(capsys, write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", "--tokenizer", tokenizer_dir)
    row = Cache.open(tmp_path / "cache")[0]
    assert row.token_ids.tolist() == [*prompt, *sample.token_ids[1:]]
    first = 1 if echoes else len(prompt)
    assert row.spans.tolist() == [[first, len(row.token_ids)]]
    assert row.targets.counts[len(prompt) - first + 2] == 1


def test_prompt_logprobs_score_a_whole_text_by_id(tmp_path, tokenizer_dir, tokenizer, capsys):
    made = samples(2, seed=7)
    file = write_lines(tmp_path / "scored.jsonl", [prompt_logprobs_line(sample, 5) for sample in made])
    result = run(capsys, file, tmp_path / "cache", "--tokenizer", tokenizer_dir, "--tail", "derived")
    assert result["rows"] == 2
    cache = Cache.open(tmp_path / "cache")
    for i, sample in enumerate(made):
        assert cache[i].token_ids.tolist() == sample.token_ids
        ids, values = (part[:-1].tolist() for part in sample.top(5))
        for s, label in enumerate(sample.token_ids[1:]):
            if label not in ids[s]:
                ids[s], values[s] = [*ids[s], label], [*values[s], sample.logprobs[s, label]]
        assert_holds(cache, i, ids, values, tail="derived")


def test_answers_without_prompt_or_log_probabilities_say_what_to_ask_for(tmp_path, tokenizer, tokenizer_dir, capsys):
    _, (line,) = answers(tokenizer, samples(1))
    del line["messages"]
    error = run(capsys, write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "c", "--tokenizer", tokenizer_dir, code=1)
    assert "a.jsonl:1 has no prompt" in error
    line["choices"][0]["logprobs"] = None
    error = run(capsys, write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "c", "--tokenizer", tokenizer_dir, code=1)
    assert "a.jsonl:1: it has no top log-probabilities" in error
    file = write_lines(tmp_path / "b.jsonl", [{}])
    with pytest.raises(DamagedError, match="has no choices"):
        OpenAIReader(file, tokenizer, (tokenizer_dir / "tokenizer.json").read_bytes())


SPOILT = {
    "its text is not what its tokens spell in this tokenizer": lambda line: line["choices"][0]["message"].update(
        content="Another text"
    ),
    "its text is not what its tokens spell in this tokenizer ": lambda line: line["choices"][0]["message"].update(
        reasoning="I thought"
    ),
    "it has no top log-probabilities; ask the server for them (logprobs, top_logprobs)": lambda line: line["choices"][
        0
    ].update(logprobs=None),
    "the server answered with an error": lambda line: line.update(error={"message": "rate limit"}),
}


@pytest.mark.parametrize("reason", SPOILT)
def test_an_answer_that_cannot_be_used_is_refused_by_its_line_and_the_others_are_imported_on_request(
    tmp_path, tokenizer, tokenizer_dir, capsys, reason
):
    _, lines = answers(tokenizer, samples(4, seed=3))
    SPOILT[reason](lines[2])
    words = (write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", "--tokenizer", tokenizer_dir)
    error = run(capsys, *words, code=1)
    counted = "(1 of 4 answers cannot be used, more than the 1.0% that are set aside)"
    assert f"a.jsonl:3: {reason.strip()} {counted}" in error
    assert not (tmp_path / "cache").exists()
    share = error.rpartition("--max-set-aside ")[2].strip()
    result = run(capsys, *words, "--max-set-aside", share)
    assert (result["rows"], result["set_aside"]) == (3, {reason.strip(): 1})


def test_an_error_of_a_batch_has_no_response(tmp_path, tokenizer, tokenizer_dir, capsys):
    _, lines = answers(tokenizer, samples(2, seed=3))
    lines.append({"id": "batch_req_1", "custom_id": "c", "response": None, "error": {"code": "batch_expired"}})
    failed = {"status_code": 400, "body": {"object": "error", "message": "too long"}}
    lines.append({"id": "batch_req_2", "custom_id": "d", "response": failed, "error": None})
    words = (write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", "--tokenizer", tokenizer_dir)
    assert run(capsys, *words, "--max-set-aside", "0.5")["set_aside"] == {"the server answered with an error": 2}
    words = (write_lines(tmp_path / "b.jsonl", lines[2:]), tmp_path / "other", "--tokenizer", tokenizer_dir)
    error = run(capsys, *words, code=1)
    assert error.strip().endswith(
        "(2 of 2 answers cannot be used, more than the 1.0% that are set aside); correct them"
    )


def test_calls_of_tools_and_thoughts_that_a_server_took_out_of_an_answer_stay_in_its_text(
    tmp_path, tokenizer, tokenizer_dir, capsys
):
    (sample,) = samples(1, seed=3)
    _, (line,) = answers(tokenizer, [sample])
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    line["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    run(capsys, write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", "--tokenizer", tokenizer_dir)
    assert Cache.open(tmp_path / "cache")[0].response == tokenizer.decode(sample.token_ids[1:])


def test_tools_settings_and_parts_of_a_request_are_rendered_as_the_server_did(tmp_path, tokenizer):
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ mark or '' }}{% for m in messages %}"
        "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.items() | list }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
    )
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    request = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]},
            {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "chat_template_kwargs": {"mark": "!"},
        "temperature": 0.7,
    }

    class WithTemplate:
        chat_template = template

        def __call__(self, text, **settings):
            return tokenizer(text, **settings)

        def apply_chat_template(self, *args, **settings):
            return tokenizer.apply_chat_template(*args, chat_template=template, **settings)

    ids = rendered_messages(WithTemplate(), "a:1", request)
    assert tokenizer.decode(ids) == "[f]!<user>How many?<assistant>[('a', 1)]<tool>4<go>"
    for name, value in {"documents": [{}], "continue_final_message": True, "add_generation_prompt": False}.items():
        with pytest.raises(CacheError, match=f"a:1: its request has `{name}`, which changes the prompt"):
            rendered_messages(WithTemplate(), "a:1", {**request, name: value})
