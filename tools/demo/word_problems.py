"""The math domain: word problems of one to three steps with a worked answer that ends in `#### N`.

A template fixes the story and its steps; names, objects, numbers and wording are drawn. The worked answer is drawn too:
each step is one of several sentences, and sums and products appear in either order, so that the numbers themselves
carry entropy and not only the filler words. Results stay below 100. An unsure answer slips in its steps, and reads
"fewer" as "more" or forgets one of two as a usual mistake. Cost: a few microseconds per example.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from tools.demo.example import SLIP, USUAL_MISTAKE, Example, pick, pick_distinct

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Ivy",
    "Jack",
    "Kira",
    "Leo",
    "Maya",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
)
THINGS = (
    "apples",
    "pears",
    "books",
    "pens",
    "stamps",
    "marbles",
    "cards",
    "shells",
    "coins",
    "stickers",
    "beads",
    "buttons",
    "cookies",
    "plums",
    "ribbons",
    "toys",
)
BOXES = ("boxes", "bags", "shelves", "baskets", "jars", "trays")
PEOPLE = ("friends", "cousins", "pupils", "neighbours", "teams")
WORKS = ("pages", "tasks", "lines", "puzzles", "letters", "rows")


@dataclass(frozen=True)
class Step:
    """One calculation: an operator among + - * /, its operands in order, and a noun phrase for the result."""

    operator: str
    left: int
    right: int
    what: str

    @property
    def result(self) -> int:
        """The step's value; divisions are exact by construction."""
        return {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "*": self.left * self.right,
            "/": self.left // max(1, self.right),
        }[self.operator]


@dataclass(frozen=True)
class Problem:
    """A question with its steps, the steps of a usual mistake, and sentences that may close the answer (with {n} for
    the number).
    """

    question: str
    steps: tuple[Step, ...]
    closings: tuple[str, ...]
    mistaken: tuple[Step, ...] = ()


SENTENCES = {
    "+": (
        "We add: {e}.",
        "{W} is {e}.",
        "Adding gives {e}.",
        "{e}, which is {w}.",
        "Together that is {e}.",
        "For {w} we add: {e}.",
    ),
    "-": (
        "We subtract: {e}.",
        "{W} is {e}.",
        "Taking away gives {e}.",
        "{e}, which is {w}.",
        "What remains is {e}.",
        "For {w} we subtract: {e}.",
    ),
    "*": (
        "We multiply: {e}.",
        "{W} is {e}.",
        "Multiplying gives {e}.",
        "{e}, which is {w}.",
        "In all that is {e}.",
        "For {w} we multiply: {e}.",
    ),
    "/": (
        "We divide: {e}.",
        "{W} is {e}.",
        "Dividing gives {e}.",
        "{e}, which is {w}.",
        "Shared out that is {e}.",
        "For {w} we divide: {e}.",
    ),
}
OPENINGS = ("", "", "", "First look at {w}. ", "Let us work it out. ", "Step by step: ")


def unsure_steps(rng: random.Random, problem: Problem) -> list[tuple[Step, int]]:
    """Steps with the results that an unsure answer writes: a slip goes into every later step that builds on it."""
    is_mistaken = bool(problem.mistaken) and rng.random() < USUAL_MISTAKE
    found: list[tuple[Step, int]] = []
    written: dict[int, int] = {}
    for step in problem.mistaken if is_mistaken else problem.steps:
        left, right = written.pop(step.left, step.left), written.pop(step.right, step.right)
        taken = replace(step, left=left, right=right)
        result = taken.result
        if rng.random() < SLIP["math step"]:
            result = pick(rng, [n for n in range(max(0, result - 9), min(99, result + 9) + 1) if n != taken.result])
        if result != step.result:
            written[step.result] = result
        found.append((taken, result))
    return found


def worked_answer(rng: random.Random, problem: Problem, unsure: bool = False) -> str:
    """Draw one phrasing of the worked answer; its last line is `#### N`."""
    parts = []
    steps = unsure_steps(rng, problem) if unsure else [(step, step.result) for step in problem.steps]
    for step, result in steps:
        left, right = step.left, step.right
        if step.operator in "+*" and rng.random() < 0.4:
            left, right = right, left
        equation = f"{left}{step.operator}{right}={result}"
        sentence = pick(rng, SENTENCES[step.operator])
        parts.append(sentence.format(e=equation, w=step.what, W=step.what[0].upper() + step.what[1:]))
    opening = pick(rng, OPENINGS).format(w=steps[0][0].what)
    number = steps[-1][1]
    closing = pick(rng, ("",) * len(problem.closings) + problem.closings).format(n=number)
    return opening + " ".join([*parts, *([closing] if closing else [])]) + f"\n#### {number}"


def small(rng: random.Random, low: int = 2, high: int = 9) -> int:
    """A small whole number, both ends included."""
    return rng.randint(low, high)


def gain(rng: random.Random) -> Problem:
    """A has x and gets y more."""
    a, b = pick_distinct(rng, NAMES, 2)
    t, x, y = pick(rng, THINGS), small(rng, 3, 40), small(rng, 2, 9)
    question = pick(
        rng,
        (
            f"{a} has {x} {t}. {b} gives {a} {y} more. How many {t} does {a} have now?",
            f"{b} hands {y} {t} to {a}, who already had {x}. How many {t} does {a} have?",
            f"At first {a} owned {x} {t}, then bought {y} more. What is the number of {t} now?",
        ),
    )
    return Problem(
        question, (Step("+", x, y, f"the number of {t}"),), (f"So {a} has {{n}} {t}.", f"That makes {{n}} {t}.")
    )


def loss(rng: random.Random) -> Problem:
    """A has x and gives y away."""
    a, b = pick_distinct(rng, NAMES, 2)
    t, y = pick(rng, THINGS), small(rng, 2, 9)
    x = y + small(rng, 2, 30)
    question = pick(
        rng,
        (
            f"{a} has {x} {t} and gives {y} of them to {b}. How many {t} are left?",
            f"{a} lost {y} of {x} {t}. How many {t} does {a} still have?",
            f"There were {x} {t} on the table. {a} took {y}. How many {t} remain?",
        ),
    )
    return Problem(
        question, (Step("-", x, y, f"the number of {t} left"),), (f"So {{n}} {t} are left.", f"That leaves {{n}} {t}.")
    )


def packs(rng: random.Random) -> Problem:
    """Story: x boxes of y things."""
    a, t, c, x, y = pick(rng, NAMES), pick(rng, THINGS), pick(rng, BOXES), small(rng), small(rng)
    question = pick(
        rng,
        (
            f"{a} fills {x} {c} with {y} {t} each. How many {t} is that in total?",
            f"There are {x} {c}. Each one holds {y} {t}. How many {t} are there?",
            f"{a} buys {x} {c} of {t} with {y} in each. How many {t} does {a} buy?",
        ),
    )
    return Problem(
        question, (Step("*", x, y, f"the number of {t}"),), (f"So there are {{n}} {t}.", f"The total is {{n}} {t}.")
    )


def share(rng: random.Random) -> Problem:
    """Things shared equally among y people."""
    a, t, p, y, each = pick(rng, NAMES), pick(rng, THINGS), pick(rng, PEOPLE), small(rng), small(rng)
    x = y * each
    question = pick(
        rng,
        (
            f"{a} shares {x} {t} equally among {y} {p}. How many {t} does each get?",
            f"{x} {t} are split evenly between {y} {p}. How many are there for each?",
            f"{y} {p} divide {x} {t} fairly. How many {t} does each receive?",
        ),
    )
    return Problem(
        question, (Step("/", x, y, "the share of each"),), ("So each gets {n}.", f"Each one receives {{n}} {t}.")
    )


def packs_and_more(rng: random.Random) -> Problem:
    """Story: x boxes of y and z loose ones."""
    a, t, c, x, y, z = pick(rng, NAMES), pick(rng, THINGS), pick(rng, BOXES), small(rng), small(rng), small(rng)
    question = pick(
        rng,
        (
            f"{a} has {x} {c} with {y} {t} each and {z} loose {t}. How many {t} does {a} have?",
            f"Besides {z} single {t}, {a} owns {x} {c} of {y} {t}. How many {t} is that altogether?",
            f"{a} packs {x} {c} with {y} {t} in each. {z} {t} do not fit. How many {t} are there?",
        ),
    )
    first = Step("*", x, y, f"the number of {t} in the {c}")
    return Problem(
        question, (first, Step("+", x * y, z, "the total")), (f"So there are {{n}} {t}.", f"{a} has {{n}} {t}.")
    )


def packs_and_less(rng: random.Random) -> Problem:
    """Story: x boxes of y, z of them gone."""
    a, b = pick_distinct(rng, NAMES, 2)
    t, c, x, y = pick(rng, THINGS), pick(rng, BOXES), small(rng, 2, 9), small(rng, 3, 9)
    z = small(rng, 2, min(9, x * y - 2))
    question = pick(
        rng,
        (
            f"{a} has {x} {c} of {y} {t} and sells {z} {t} to {b}. How many {t} are left?",
            f"{x} {c} hold {y} {t} each. {a} breaks {z} of the {t}. How many whole {t} remain?",
            f"{a} bought {x} {c} with {y} {t} each and gave {z} {t} away. How many {t} does {a} keep?",
        ),
    )
    first = Step("*", x, y, f"the number of {t} at first")
    return Problem(
        question,
        (first, Step("-", x * y, z, f"the number of {t} left")),
        (f"So {{n}} {t} are left.", f"{a} keeps {{n}}."),
    )


def change(rng: random.Random) -> Problem:
    """Change from a note after buying x things at y dollars."""
    a, t, x, y = pick(rng, NAMES), pick(rng, THINGS), small(rng, 2, 6), small(rng, 2, 6)
    note = x * y + small(rng, 1, 9)
    question = pick(
        rng,
        (
            f"{a} has {note} dollars and buys {x} {t} at {y} dollars each. How many dollars are left?",
            f"One of the {t} costs {y} dollars. {a} takes {x} and pays with {note} dollars. What is the change?",
            f"With {note} dollars {a} goes shopping for {x} {t}, {y} dollars apiece. How much money remains?",
        ),
    )
    steps = (Step("*", x, y, "the price"), Step("-", note, x * y, "the money left"))
    return Problem(question, steps, ("So {n} dollars are left.", f"{a} keeps {{n}} dollars."))


def two_sorts(rng: random.Random) -> Problem:
    """B has y more (or fewer) than A; how many together."""
    a, b = pick_distinct(rng, NAMES, 2)
    t, x, y = pick(rng, THINGS), small(rng, 5, 15), small(rng, 2, 9)
    if rng.random() < 0.5:
        second, word = Step("+", x, y, f"what {b} has"), "more"
    else:
        y = min(y, x - 2)
        second, word = Step("-", x, y, f"what {b} has"), "fewer"
    question = pick(
        rng,
        (
            f"{a} has {x} {t}. {b} has {y} {word} than {a}. How many {t} do they have together?",
            f"{b} collected {y} {word} {t} than {a}, who found {x}. How many {t} did both find?",
        ),
    )
    total = Step("+", x, second.result, "the total")
    closings = (f"Together they have {{n}} {t}.", f"So both have {{n}} {t}.")
    added = replace(second, operator="+")
    mistaken = (added, replace(total, right=added.result)) if word == "fewer" else ()
    return Problem(question, (second, total), closings, mistaken)


def times_as_many(rng: random.Random) -> Problem:
    """B has y times as many as A; how many together."""
    a, b = pick_distinct(rng, NAMES, 2)
    t, x, y = pick(rng, THINGS), small(rng), small(rng, 2, 4)
    question = pick(
        rng,
        (
            f"{a} has {x} {t}. {b} has {y} times as many. How many {t} do they have together?",
            f"{b} owns {y} times as many {t} as {a}. If {a} owns {x}, how many {t} do both own?",
        ),
    )
    steps = (Step("*", x, y, f"what {b} has"), Step("+", x, x * y, "the total"))
    closings = (f"Together they have {{n}} {t}.", f"So both have {{n}} {t}.")
    return Problem(question, steps, closings, mistaken=steps[:1])


def rate(rng: random.Random) -> Problem:
    """Story: x per hour for y hours, some done already."""
    a, w, x, y, z = pick(rng, NAMES), pick(rng, WORKS), small(rng), small(rng, 2, 8), small(rng)
    unit = pick(rng, ("hour", "day", "week"))
    question = pick(
        rng,
        (
            f"{a} finishes {x} {w} every {unit}. After {y} {unit}s, how many {w} are done if {z} were done before?",
            f"{z} {w} were ready. Then {a} did {x} {w} a {unit} for {y} {unit}s. How many {w} are ready now?",
        ),
    )
    steps = (Step("*", x, y, f"the new {w}"), Step("+", x * y, z, f"all the {w}"))
    return Problem(question, steps, (f"So {{n}} {w} are done.", f"That makes {{n}} {w}."))


def share_after(rng: random.Random) -> Problem:
    """Two heaps joined and shared equally."""
    a, b = pick_distinct(rng, NAMES, 2)
    t, p, y, each = pick(rng, THINGS), pick(rng, PEOPLE), small(rng, 2, 5), small(rng, 2, 6)
    total = y * each
    if total < 6:
        total, each = y * 5, 5
    x = small(rng, 2, total - 2)
    question = pick(
        rng,
        (
            f"{a} brings {x} {t} and {b} brings {total - x}. They share them equally among {y} {p}. How many does "
            "each get?",
            f"{x} {t} from {a} and {total - x} from {b} are divided fairly among {y} {p}. How many {t} does each "
            "receive?",
        ),
    )
    steps = (Step("+", x, total - x, f"all the {t}"), Step("/", total, y, "the share of each"))
    return Problem(question, steps, ("So each gets {n}.", f"Each one receives {{n}} {t}."))


def two_prices(rng: random.Random) -> Problem:
    """Story: x things at p and y others at q: three steps."""
    a = pick(rng, NAMES)
    t, u = pick_distinct(rng, THINGS, 2)
    x, p, y, q = small(rng, 2, 4), small(rng, 2, 5), small(rng, 2, 4), small(rng, 2, 5)
    question = pick(
        rng,
        (
            f"{a} buys {x} {t} for {p} dollars each and {y} {u} for {q} dollars each. How much does {a} pay?",
            f"At {p} dollars for each of {x} {t} and {q} dollars for each of {y} {u}, what does {a} pay in total?",
        ),
    )
    steps = (
        Step("*", x, p, f"the price of the {t}"),
        Step("*", y, q, f"the price of the {u}"),
        Step("+", x * p, y * q, "the total"),
    )
    return Problem(question, steps, (f"So {a} pays {{n}} dollars.", "The bill is {n} dollars."))


def in_and_out(rng: random.Random) -> Problem:
    """A number goes up and then down."""
    place, x, y = pick(rng, ("bus", "train", "room", "boat", "hall")), small(rng, 5, 30), small(rng)
    z = small(rng, 2, min(9, x + y - 2))
    question = pick(
        rng,
        (
            f"{x} people are on the {place}. {y} come in and {z} leave. How many people are there now?",
            f"A {place} holds {x} people. Then {z} go away after {y} have joined. How many people are left?",
        ),
    )
    steps = (Step("+", x, y, "the number before anyone leaves"), Step("-", x + y, z, "the number of people left"))
    return Problem(question, steps, ("So {n} people are there.", f"The {place} has {{n}} people."))


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    gain,
    loss,
    packs,
    share,
    packs_and_more,
    packs_and_less,
    change,
    two_sorts,
    times_as_many,
    rate,
    share_after,
    two_prices,
    in_and_out,
)


def example(rng: random.Random, unsure: bool = False) -> Example:
    """Draw one word problem with one worked answer; its record's number is right, unsure or not."""
    template = pick(rng, TEMPLATES)
    problem = template(rng)
    answer = worked_answer(rng, problem, unsure)
    numbers = [number for step in problem.steps for number in (step.left, step.right)]
    instance = " ".join([template.__name__, *map(str, numbers)])
    reference = f"#### {problem.steps[-1].result}" if unsure else answer
    return Example(problem.question, answer, {"question": problem.question, "answer": reference}, instance)
