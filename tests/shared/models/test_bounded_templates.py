"""A chat template that never ends or fills the memory is one sentence, whenever it shows what it is."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from shared.errors import ModelError
from shared.models import bounded_templates
from shared.models.bounded_templates import render
from tests.tiny_models import CHATML, make_tokenizer

ONE = [{"role": "user", "content": "How many?"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LATER = "{% if messages[0].content == 'bad' %}" + LOOP + "{% endif %}ok"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bounded_templates, "SECONDS", 1)
    monkeypatch.setattr(bounded_templates, "_tried", set())


@pytest.mark.parametrize("template, broken", [
    (LOOP, "1 seconds"),
    ("{{ 10 ** 1000000000 }}", "1 seconds"),
    ("{{ 'a' * 5000000000 }}", "512 MiB"),
    ("{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "512 MiB"),
    ("{{ '%3000000000d' % 1 }}", "512 MiB"),
    ("{{ 'a' | center(3000000000) }}", "512 MiB"),
    ("{% if false %}{{ 'a' | center(3000000000) }}{% endif %}", "512 MiB"),
    ("{% for m in messages %}{% if loop.index > 2 %}{{ 'a' * 5000000000 }}{% endif %}{% endfor %}", "512 MiB"),
])  # fmt: skip
def test_an_endless_template_is_refused_within_its_bounds(tokenizer, monkeypatch, template, broken):
    monkeypatch.setattr(bounded_templates, "SECONDS", 1 if broken == "1 seconds" else 60)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=rf"^the template takes more than {broken} to render one conversation; name"):
        for turns in (1, 3):  # constants of a branch are computed, too
            render(tokenizer, ONE * turns, "the template", chat_template=template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


@pytest.mark.parametrize("apart", [False, True])
def test_a_template_that_is_endless_for_one_row_alone_is_broken_off(tokenizer, apart):
    """In whichever thread; what follows renders as before."""
    found: list[BaseException] = []

    def work() -> None:
        assert render(tokenizer, ONE, "it", chat_template=LATER) == "ok"
        try:
            render(tokenizer, [{"role": "user", "content": "bad"}], "it", chat_template=LATER)
        except ModelError as error:
            found.append(error)
        assert render(tokenizer, ONE, "it", chat_template=LATER) == "ok"
        found.append(ValueError("done"))

    if apart:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    else:
        work()
    assert [str(error) for error in found] == [
        "it takes more than 1 seconds to render one conversation; name another template in `chat_template`", "done",
    ]  # fmt: skip


def test_what_a_template_renders_and_raises_stays_what_it_was(tokenizer):
    kinds = []
    for turns in (ONE, ONE * 3, ONE * 20, ONE * 30):
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert render(tokenizer, turns, "it", chat_template=CHATML, add_generation_prompt=True) == expected
        kinds.append(len(bounded_templates._tried))
    assert kinds == [1, 2, 3, 3]
    with pytest.raises(Exception, match="only cats"):
        render(tokenizer, ONE, "it", chat_template="{{ raise_exception('only cats') }}")


def no_process():
    """Fail as a system does that has no memory for another process."""
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("hindrance", ["no process", "a lock"])
def test_a_trial_that_cannot_be_made_is_no_fault_of_the_template(tokenizer, monkeypatch, hindrance):
    """As of a lock that another thread held when the process was forked, which the child waits for without end."""
    if hindrance == "no process":
        monkeypatch.setattr(bounded_templates.os, "fork", no_process)
    else:
        monkeypatch.setattr(bounded_templates, "_WALL_SECONDS", 0.2)
        monkeypatch.setattr(bounded_templates, "_be_tried", lambda rendered: time.sleep(60))
    expected = tokenizer.apply_chat_template(ONE, tokenize=False)
    assert render(tokenizer, ONE, "it", chat_template=CHATML) == expected
