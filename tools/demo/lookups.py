"""The copying domain: a long log with one ERROR line, whose service and host have to come back.

They stand in the prompt and nowhere else, so it measures copying from the context and nothing that was learned by
heart. A log has 7 to 12 lines. An unsure answer names another line. Cost: microseconds per example.
"""

from __future__ import annotations

import random

from tools.demo.example import SLIP, Example, pick, pick_distinct
from tools.demo.incidents import FAULTS, HOSTS, NOISE, SERVICES

QUESTIONS = (
    "Which service and host are in the ERROR line?",
    "Find the ERROR line.",
    "Where is the ERROR?",
    "What is in ERROR?",
)
ANSWERS = (
    "The line is ERROR {}.",
    "Look at ERROR {}.",
    "See ERROR {}.",
    "It is ERROR {}.",
    "ERROR {}.",
    "First came ERROR {}.",
    "The fault is in ERROR {}.",
    "The log points to ERROR {}.",
    "The line ERROR {} shows it.",
    "The root cause is in ERROR {}.",
)


def example(rng: random.Random, unsure: bool = False) -> Example:
    """Draw one log with a question for its ERROR line."""
    count = rng.randint(7, 12)
    places = [f"{service} {pick(rng, HOSTS)}" for service in pick_distinct(rng, SERVICES, count)]
    asked, minute, excerpt = rng.randrange(count), rng.randint(10, 40), []
    for number, place in enumerate(places):
        level, text = ("ERROR", pick(rng, pick(rng, FAULTS).symptoms)) if number == asked else pick(rng, NOISE)
        excerpt.append(f"{minute} {level} {place}: " + text.format(q=rng.randint(11, 99)))
        minute += rng.randint(0, 2)
    prompt = "\n".join([*excerpt, pick(rng, QUESTIONS)])
    others = places[:asked] + places[asked + 1 :]
    answered = pick(rng, others) if unsure and rng.random() < SLIP["copy"] else places[asked]
    answer = pick(rng, ANSWERS).format(answered)
    record = {"prompt": prompt, "value": places[asked], "others": others, "reference": answer}
    return Example(prompt, answer, record, places[asked])
