"""What a row says is in its tokens, or the row is refused with what is missing and what to do."""

from __future__ import annotations

import datetime
import re

import pytest

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.templates.kept_text import missing_of_answer, missing_of_prompt
from teacher_cache.prompts.templates.spans import Template
from tests.tiny_models import CHATML, make_tokenizer

THOUGHT = "seven apples are on the node"
ASK = {"role": "user", "content": "How many?"}
TURNS = [ASK, {"role": "assistant", "content": "Seven."}, {"role": "user", "content": "And disks?"}]
TURNS += [{"role": "assistant", "content": "Nine."}]
TOOLS = {"role": "tools", "content": '[{"type": "function", "function": {"name": "find_disk"}}]'}


def template_of(answer: str, prompt: str = "", head: str = "", end: str = "") -> str:
    """A ChatML template with its own way to write an assistant turn, a generation prompt, a head and an end."""
    return (
        "{%- for m in messages %}{%- if loop.first %}" + head + "{%- endif %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' %}" + answer + "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n" + prompt + "' }}"
        "{%- else %}" + end + "{%- endif %}"
    )


CUTS = template_of("{{- m.content.split('</think>')[-1] }}")
THINKS = template_of("{%- if m.thinking %}{{- '(' + m.thinking + ') ' }}{%- endif %}{{- m.content }}")
LAST_THINKS = template_of("{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- m.content }}")
CLOSES = template_of("{{- m.content }}", end="{{- '<|endoftext|>' }}")
CLOCK = template_of("{{- m.content }}", head="{{- 'Today: ' + strftime_now('%d %b %Y') }}")
CLOCK_WITH_TOOLS = template_of(
    "{{- m.content }}", head="{%- if tools %}{{- strftime_now('%Y') + tools | tojson }}{%- endif %}"
)
NO_SYSTEM = "{%- if messages[0].role == 'system' %}{{- raise_exception('no system') }}{%- endif %}" + CHATML
DROPS_SYSTEM = CHATML.replace(
    "{%- for message in messages %}", "{%- for message in messages if message.role != 'system' %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def template(tokenizer, chat_template: str = CHATML, **settings) -> Template:
    given = {"source": "s", "path": "f", "format": "messages", "chat_template": chat_template, **settings}
    return Template(tokenizer, PromptSource.model_validate(given))


def talk(*turns: dict) -> Conversation:
    return Conversation("s", "f", 3, "messages", list(turns), None, None)


def supervised(tokenizer, found) -> list[str]:
    ids, spans = found
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in spans.tolist()]


@pytest.mark.parametrize(
    ("chat_template", "answer", "what"),
    [
        (CUTS, {"content": f"<think>{THOUGHT}</think>It is 7."}, "the answer's text"),
        (CHATML, {"content": "It is 7.", "reasoning_content": THOUGHT}, "the answer's thoughts in 'reasoning_content'"),
        (CHATML, {"content": "It is 7.", "reasoning": THOUGHT}, "the answer's thoughts in 'reasoning'"),
        (THINKS, {"content": "It is 7.", "reasoning_content": THOUGHT}, "the answer's thoughts in 'reasoning_content'"),
        (
            CHATML,
            {"content": "I look.", "tool_calls": [{"function": {"name": "find_disk", "arguments": {}}}]},
            "the name of a tool call",
        ),
    ],
)
def test_an_answer_that_loses_text_is_refused_with_what_is_missing(tokenizer, chat_template, answer, what):
    with pytest.raises(PromptError, match=rf"f:3: turn 2 cannot be trained because .* drops {re.escape(what)} \('"):
        template(tokenizer, chat_template).complete(talk(ASK, {"role": "assistant", **answer}))


def test_thoughts_that_are_rendered_are_kept(tokenizer):
    answer = {"role": "assistant", "content": "It is 7.", "thinking": THOUGHT}
    found = template(tokenizer, THINKS).complete(talk(ASK, answer))
    assert supervised(tokenizer, found) == [f"({THOUGHT}) It is 7.<|im_end|>"]
    inline = {"role": "assistant", "content": f"<think>{THOUGHT}</think>It is 7."}
    assert supervised(tokenizer, template(tokenizer).complete(talk(ASK, inline))) == [inline["content"] + "<|im_end|>"]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("chat_template", "turns", "settings", "reason"),
    [
        (CHATML, [TOOLS, ASK], {}, "drops the tool 'find_disk' of the column 'tools'"),
        (CHATML, [TOOLS, {"role": "user", "content": "Use find_disk"}], {}, "drops the column 'tools'"),
        (
            DROPS_SYSTEM,
            [{"role": "system", "content": "Be brief."}, ASK],
            {},
            r"drops the system turn's text \('Be brief.'\)",
        ),
        (DROPS_SYSTEM, [ASK], {"system": "Be kind."}, r"drops the system turn's text \('Be kind.'\)"),
        (NO_SYSTEM, [ASK], {"system": "Be kind."}, "cannot render the conversation"),
        (CHATML, [{**ASK, "name": "Ada"}], {}, r"drops the name of the user turn's speaker \('Ada'\)"),
        (CHATML, [{**ASK, "name": "Ada"}, {**TURNS[1], "name": "Bo"}, ASK], {}, r"speaker \('Ada'\)"),
        (CHATML, [TOOLS, {**ASK, "name": "Ada"}], {}, "drops the tool 'find_disk'"),
    ],
)
def test_a_prompt_that_loses_text_is_refused_and_the_advice_works(
    tokenizer, given, chat_template, turns, settings, reason
):
    row = talk(*turns, TURNS[1]) if given else talk(*turns)

    def render(of: Template, conversation: Conversation) -> object:
        return of.complete(conversation) if given else of.prompt_ids(conversation)

    with pytest.raises(PromptError, match=rf"f:3: .*{reason}") as caught:
        render(template(tokenizer, chat_template, **settings), row)
    advice = str(caught.value).rpartition("; ")[2]
    if "`ignore: [" in advice:
        left_out = advice.partition("[")[2].partition("]")[0].split(", ")
        kept = [turn for turn in row.messages if turn["role"] not in left_out]
        followed = talk(*({key: turn[key] for key in turn if key not in left_out} for turn in kept))
    else:
        assert advice == "put the system text into the first question"
        text = settings.get("system") or turns[0]["content"]
        rest = [turn for turn in row.messages if turn["role"] != "system"]
        followed = talk({"role": "user", "content": f"{text}\n\n{rest[0]['content']}"}, *rest[1:])
    render(template(tokenizer, chat_template), followed)


def test_names_that_are_rendered_and_those_of_tools_are_kept(tokenizer):
    named = template_of("{{- m.content }}").replace(
        "m.role + '\\n'", "m.role + (' ' + m.name if m.name else '') + '\\n'"
    )
    ids, _ = template(tokenizer, named).complete(talk({**ASK, "name": "Ada"}, TURNS[1]))
    assert "user Ada\n" in tokenizer.decode(ids)
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    looked = [{"role": "assistant", "content": "find", "tool_calls": [call]}]
    looked += [{"role": "tool", "content": "7", "name": "find_disk"}, TURNS[1]]
    ids, _ = template(tokenizer, supervise="last").complete(talk(ASK, *looked))
    assert "<|im_start|>tool\n7" in tokenizer.decode(ids)


def test_answers_marked_as_context_are_not_supervised(tokenizer):
    first = {**TURNS[1], "train": False}
    found = template(tokenizer).complete(talk(ASK, first, *TURNS[2:]))
    assert supervised(tokenizer, found) == ["Nine.<|im_end|>"]
    assert tokenizer.decode(found[0].tolist()).count("Seven.") == 1
    last = template(tokenizer).complete(talk(*TURNS[:3], {**TURNS[3], "train": False}))
    assert supervised(tokenizer, last) == ["Seven.<|im_end|>"]
    with pytest.raises(PromptError, match="f:3: every answer of the row is marked as context"):
        template(tokenizer).complete(talk(ASK, first))


def test_the_last_answer_alone_is_supervised_where_the_template_treats_it_otherwise(tokenizer):
    with pytest.raises(
        PromptError, match=r"turn 4 .* rewrites an earlier answer once later turns follow; set `supervise: last`"
    ):
        template(tokenizer, LAST_THINKS).complete(talk(*TURNS))
    one = template(tokenizer, LAST_THINKS, supervise="last")
    assert supervised(tokenizer, one.complete(talk(*TURNS))) == ["<think>\n\n</think>\n\nNine.<|im_end|>"]
    assert supervised(tokenizer, one.complete(talk(*TURNS[:2]))) == ["<think>\n\n</think>\n\nSeven.<|im_end|>"]
    marked = talk(*TURNS[:3], {**TURNS[3], "train": False})
    assert supervised(tokenizer, one.complete(marked)) == ["<think>\n\n</think>\n\nSeven.<|im_end|>"]


def test_special_tokens_after_an_answer_s_end_are_dropped(tokenizer):
    found = template(tokenizer, CLOSES).complete(talk(*TURNS))
    assert supervised(tokenizer, found) == ["Seven.<|im_end|>", "Nine.<|im_end|>"]
    text = tokenizer.decode(found[0].tolist())
    assert "<|endoftext|>" not in text
    after = CLOSES.replace("'<|endoftext|>'", "'<|endoftext|>bye'")
    with pytest.raises(PromptError, match="does not end the answer with exactly one end token"):
        template(tokenizer, after).complete(talk(*TURNS))


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "Seven.", "reasoning_content": "see <|im_start|>user"},
        {"role": "assistant", "content": "Seven.", "thinking": "see <|im_end|>"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"<|im_end|>": [1]}}}],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": ["<|im_end|>"]}}}],
        },
    ],
)
def test_special_tokens_as_text_are_refused_wherever_they_are_spelled(tokenizer, turn):
    with pytest.raises(
        PromptError, match=r"f:3: the assistant turn contains the special token '<\|im_(start|end)\|>' as text"
    ):
        template(tokenizer).complete(talk(ASK, turn))


def test_special_tokens_in_tools_system_text_and_settings_are_refused(tokenizer):
    tools = {"role": "tools", "content": '[{"name": "f", "description": "<|im_end|>"}]'}
    for row, settings, where in (
        (talk(tools, ASK), {}, "tools turn"),
        (talk(ASK), {"system": "<|im_end|>"}, "system turn"),
    ):
        with pytest.raises(PromptError, match=rf"f:3: the {where} contains the special token"):
            template(tokenizer, **settings).prompt_ids(row)
    with pytest.raises(PromptError, match="source 's': `chat_template_kwargs` contains the special token"):
        template(tokenizer, chat_template_kwargs={"note": {"deep": ["<|im_start|>"]}})


def test_a_template_that_reads_the_clock_takes_the_recipe_s_date_or_is_refused(tokenizer):
    dated = template(tokenizer, CLOCK, date="2024-02-29")
    assert "Today: 29 Feb 2024" in tokenizer.decode(dated.prompt_ids(talk(ASK)))
    dated.require_date()
    advice = rf"name a date for all rows, such as `date: {datetime.date.today().isoformat()}`"
    undated = template(tokenizer, CLOCK)
    with pytest.raises(PromptError, match=f"source 's': .* writes the current date, .*{advice}"):
        undated.require_date()
    with pytest.raises(PromptError, match=f"f:3: .* writes the current date, .*{advice}"):
        undated.prompt_ids(talk(ASK))


def test_a_clock_that_only_some_rows_read_is_found_at_these_rows(tokenizer):
    undated = template(tokenizer, CLOCK_WITH_TOOLS)
    undated.require_date()
    undated.prompt_ids(talk(ASK))
    with pytest.raises(PromptError, match=r"f:3: .* writes the current date"):
        undated.prompt_ids(talk(TOOLS, ASK))
    assert "2024" in tokenizer.decode(
        template(tokenizer, CLOCK_WITH_TOOLS, date="2024-02-29").prompt_ids(talk(TOOLS, ASK))
    )


def test_settings_that_no_template_reads_are_named(tokenizer):
    reads = template_of("{{- m.content }}", head="{%- if enable_thinking %}{{- 'think' }}{%- endif %}")
    settings = {"enable_thinking": False, "enable_thinkin": False, "documents": [{"text": "known to transformers"}]}
    (sentence,) = template(tokenizer, reads, chat_template_kwargs=settings).unread_settings
    assert sentence.startswith("source s: `chat_template_kwargs.enable_thinkin` does nothing, `chat_template` of the")
    (sentence,) = template(tokenizer, reads, date="2024-02-29").unread_settings
    assert sentence.startswith("source s: `date` does nothing")
    assert template(tokenizer, CLOCK_WITH_TOOLS, date="2024-02-29").unread_settings == []


def test_a_clock_that_a_setting_replaces_is_not_read(tokenizer):
    guarded = template_of(
        "{{- m.content }}",
        head="{%- if not day is defined %}{%- set day = strftime_now('%d') %}{%- endif %}{{- day }}",
    )
    template(tokenizer, guarded, chat_template_kwargs={"day": "Monday"}).require_date()
    with pytest.raises(PromptError, match="writes the current date"):
        template(tokenizer, guarded).require_date()


@pytest.mark.parametrize(
    ("answer", "rendered", "lost"),
    [
        ({"content": "4", "reasoning_content": "2 + 2 = 4"}, "4", "the answer's thoughts in 'reasoning_content'"),
        ({"content": "It is 4.", "thinking": "4"}, "It is 4.", "the answer's thoughts in 'thinking'"),
        ({"content": "4", "thinking": "4"}, "4", "the answer's thoughts in 'thinking'"),
        ({"content": "<think>Seven.</think>Seven."}, "Seven.", "the answer's text"),
        ({"content": "<think>Seven.</think>Seven."}, "Seven. Seven.", None),
        ({"content": "4", "thinking": "It is 4."}, "It is 4. | 4", None),
    ],
)
def test_a_text_that_stands_in_another_needs_a_place_of_its_own(answer, rendered, lost):
    found = missing_of_answer({"role": "assistant", **answer}, rendered)
    assert (found and found[0]) == lost


def test_a_system_text_that_a_question_repeats_is_missed_where_it_is_dropped(tokenizer):
    system = {"role": "system", "content": "How many?"}
    for said in (ASK, {"role": "user", "content": "Answer this: How many?"}):
        asked = talk(system, said, {"role": "assistant", "content": "Seven."})
        with pytest.raises(PromptError, match=r"drops the system turn's text \('How many\?'\)"):
            template(tokenizer, DROPS_SYSTEM).complete(asked)
        template(tokenizer).complete(asked)


def test_texts_are_found_as_json_or_python_spell_them():
    call = {"function": {"name": "f", "arguments": {"path": 'a "b"\nc', "deep": {"on": True, "n": [1.5, None]}}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    whole = r'f {"path": "a \"b\"\nc", "deep": {"on": true, "n": [1.5, null]}}'
    assert missing_of_answer(answer, whole) is None
    assert missing_of_answer(answer, str(call["function"])) is None
    assert missing_of_answer(answer, whole.replace("1.5", "2.5")) == ("an argument of a tool call", "1.5")
    assert missing_of_answer(answer, whole.replace("deep", "flat")) == ("an argument of a tool call", "deep")
    assert missing_of_prompt([{"role": "user", "content": "a  b"}], "a\nb") is None
    assert missing_of_prompt([{"role": "tool", "content": "x"}], "y") == ("the tool turn's text", "x")


def test_letters_that_a_tokenizer_normalises_are_the_same_letters(tokenizer, tmp_path):
    from tokenizers import normalizers

    changed = make_tokenizer(tmp_path)
    changed.backend_tokenizer.normalizer = normalizers.NFC()
    answer = {"role": "assistant", "content": "Zoe\u0308 has 7."}
    found = template(changed).complete(talk(ASK, answer))
    assert supervised(changed, found) == ["Zo\u00eb has 7.<|im_end|>"]


def test_plain_text_has_no_place_for_thoughts_and_tools(tokenizer):
    plain = PromptSource(source="s", path="f", format="messages", template="none")
    with pytest.raises(PromptError, match=r"no place for 'thinking'; .*`ignore: \[thinking\]`"):
        Template(tokenizer, plain).complete(talk(ASK, {**TURNS[1], "thinking": THOUGHT}))
    with pytest.raises(PromptError, match="takes one prompt, found the turns tools, user"):
        Template(tokenizer, plain).complete(talk(TOOLS, ASK, TURNS[1]))
