"""The code domain: small Python functions in HumanEval's shape (prompt: signature and docstring; solution: body; test:
`check`).

A family fixes what the function computes, with a reference in Python to compute the expected values of its tests; the
function's name, its parameter, constants, docstring and the form of the body are drawn. An unsure body has other
constants or is another family's. Cost: microseconds per example.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.demo.example import SLIP, USUAL_MISTAKE, Example, pick

NUMBER_PARAMETERS = ("x", "n", "value", "number", "amount", "size", "price")
LIST_PARAMETERS = ("numbers", "values", "items", "data", "scores", "points", "sizes")
TEXT_PARAMETERS = ("text", "word", "s", "line", "message", "name", "title")
LOOP_NAMES = ("x", "v", "item", "n", "e")
ACCUMULATORS = ("result", "total", "out", "answer")


@dataclass(frozen=True)
class Family:
    """What a function computes and all the ways to say it.

    Fields: {p} parameter, {k} and {j} constants, {e} loop name, {r} accumulator, {c} letter.
    """

    kind: str
    names: tuple[str, ...]
    docs: tuple[str, ...]
    bodies: tuple[str, ...]
    reference: Callable[[Any, int, int, str], Any]


def _number(
    names: str, docs: tuple[str, ...], forms: tuple[str, ...], reference: Callable[[Any, int, int, str], Any]
) -> Family:
    """A family on one number; each form is an expression, given back directly or through a name."""
    bodies = tuple(
        body for form in forms for body in (f"return {form}", f"return {form}", f"{{r}} = {form}\nreturn {{r}}")
    )
    return Family("number", tuple(names.split()), docs, bodies, reference)


def _text(
    names: str, docs: tuple[str, ...], forms: tuple[str, ...], reference: Callable[[Any, int, int, str], Any]
) -> Family:
    """A family on one string, as `_number`."""
    bodies = tuple(
        body for form in forms for body in (f"return {form}", f"return {form}", f"{{r}} = {form}\nreturn {{r}}")
    )
    return Family("text", tuple(names.split()), docs, bodies, reference)


def _keep(names: str, docs: tuple[str, ...], condition: str, reference: Callable[[Any, int, int, str], Any]) -> Family:
    """A family that keeps the members of a list that meet a condition: a comprehension, a loop or a filter."""
    bodies = (
        "return [{e} for {e} in {p} if " + condition + "]",
        "{r} = []\nfor {e} in {p}:\n    if " + condition + ":\n        {r}.append({e})\nreturn {r}",
        "return list(filter(lambda {e}: " + condition + ", {p}))",
    )
    return Family("list", tuple(names.split()), docs, bodies, reference)


def _each(names: str, docs: tuple[str, ...], value: str, reference: Callable[[Any, int, int, str], Any]) -> Family:
    """A family that maps every member of a list."""
    bodies = (
        "return [" + value + " for {e} in {p}]",
        "{r} = []\nfor {e} in {p}:\n    {r}.append(" + value + ")\nreturn {r}",
        "return list(map(lambda {e}: " + value + ", {p}))",
    )
    return Family("list", tuple(names.split()), docs, bodies, reference)


def _count(names: str, docs: tuple[str, ...], condition: str, reference: Callable[[Any, int, int, str], Any]) -> Family:
    """A family that counts the members of a list that meet a condition."""
    bodies = (
        "return sum(1 for {e} in {p} if " + condition + ")",
        "{r} = 0\nfor {e} in {p}:\n    if " + condition + ":\n        {r} += 1\nreturn {r}",
        "return len([{e} for {e} in {p} if " + condition + "])",
    )
    return Family("list", tuple(names.split()), docs, bodies, reference)


def _sum(names: str, docs: tuple[str, ...], value: str, reference: Callable[[Any, int, int, str], Any]) -> Family:
    """A family that adds up something of every member of a list."""
    bodies = (
        "return sum(" + value + " for {e} in {p})",
        "{r} = 0\nfor {e} in {p}:\n    {r} += " + value + "\nreturn {r}",
        "return sum([" + value + " for {e} in {p}])",
    )
    return Family("list", tuple(names.split()), docs, bodies, reference)


FAMILIES: tuple[Family, ...] = (
    _number(
        "add_{k} plus_{k} increase",
        ("Return {p} plus {k}.", "Add {k} to {p}.", "Give the sum of {p} and {k}."),
        ("{p} + {k}", "{k} + {p}"),
        lambda p, k, j, c: p + k,
    ),
    _number(
        "subtract_{k} minus_{k} decrease",
        ("Return {p} minus {k}.", "Subtract {k} from {p}.", "Take {k} away from {p}."),
        ("{p} - {k}", "-{k} + {p}"),
        lambda p, k, j, c: p - k,
    ),
    _number(
        "times_{k} multiply scale_by_{k}",
        ("Return {p} times {k}.", "Multiply {p} by {k}.", "Give the product of {p} and {k}."),
        ("{p} * {k}", "{k} * {p}"),
        lambda p, k, j, c: p * k,
    ),
    _number(
        "scale_and_shift times_then_plus linear",
        ("Multiply {p} by {k}, then add {j}.", "Return {k} times {p} plus {j}."),
        ("{p} * {k} + {j}", "{k} * {p} + {j}", "{j} + {k} * {p}", "{j} + {p} * {k}"),
        lambda p, k, j, c: p * k + j,
    ),
    _number(
        "shift_and_scale plus_then_times combine",
        ("Add {k} to {p}, then multiply by {j}.", "Return {j} times the sum of {p} and {k}."),
        ("({p} + {k}) * {j}", "{j} * ({p} + {k})", "({k} + {p}) * {j}", "{j} * ({k} + {p})"),
        lambda p, k, j, c: (p + k) * j,
    ),
    _number(
        "square_plus_{k} square_and_add power_shift",
        ("Return the square of {p} plus {k}.", "Square {p} and add {k}."),
        ("{p} * {p} + {k}", "{p} ** 2 + {k}", "{k} + {p} ** 2", "{k} + {p} * {p}"),
        lambda p, k, j, c: p * p + k,
    ),
    _number(
        "remainder modulo mod_{k}",
        ("Return the remainder of {p} divided by {k}.", "What is left when {p} is divided by {k}."),
        ("{p} % {k}",),
        lambda p, k, j, c: p % k,
    ),
    _number(
        "divides_by_{k} is_multiple divisible",
        ("Tell whether {p} is divisible by {k}.", "Return True if {p} is a multiple of {k}."),
        ("{p} % {k} == 0", "not {p} % {k}"),
        lambda p, k, j, c: p % k == 0,
    ),
    _number(
        "is_above over_{k} exceeds",
        ("Tell whether {p} is greater than {k}.", "Return True if {p} is above {k}."),
        ("{p} > {k}", "{k} < {p}"),
        lambda p, k, j, c: p > k,
    ),
    _number(
        "at_least floor_{k} not_less",
        ("Return {p}, but at least {k}.", "Return the larger of {p} and {k}."),
        ("max({p}, {k})", "max({k}, {p})", "{p} if {p} > {k} else {k}"),
        lambda p, k, j, c: max(p, k),
    ),
    _number(
        "at_most cap_{k} not_more",
        ("Return {p}, but at most {k}.", "Return the smaller of {p} and {k}."),
        ("min({p}, {k})", "min({k}, {p})", "{p} if {p} < {k} else {k}"),
        lambda p, k, j, c: min(p, k),
    ),
    _number(
        "distance gap_to_{k} far_from",
        ("Return the distance between {p} and {k}.", "Return the absolute difference of {p} and {k}."),
        ("abs({p} - {k})", "abs({k} - {p})"),
        lambda p, k, j, c: abs(p - k),
    ),
    _keep(
        "keep_above filter_over larger_than",
        ("Keep the members of {p} greater than {k}.", "Return the elements of {p} above {k}."),
        "{e} > {k}",
        lambda p, k, j, c: [e for e in p if e > k],
    ),
    _keep(
        "keep_below filter_under smaller_than",
        ("Keep the members of {p} less than {k}.", "Return the elements of {p} below {k}."),
        "{e} < {k}",
        lambda p, k, j, c: [e for e in p if e < k],
    ),
    _keep(
        "keep_multiples filter_divisible only_{k}",
        ("Keep the members of {p} divisible by {k}.", "Return the multiples of {k} in {p}."),
        "{e} % {k} == 0",
        lambda p, k, j, c: [e for e in p if e % k == 0],
    ),
    _keep(
        "remove_{k} without drop",
        ("Return {p} without every {k}.", "Remove each {k} from {p}."),
        "{e} != {k}",
        lambda p, k, j, c: [e for e in p if e != k],
    ),
    _each(
        "add_to_all raise_each shift_list",
        ("Add {k} to every member of {p}.", "Return {p} with each element increased by {k}."),
        "{e} + {k}",
        lambda p, k, j, c: [e + k for e in p],
    ),
    _each(
        "multiply_all scale_list stretch",
        ("Multiply every member of {p} by {k}.", "Return {p} with each element times {k}."),
        "{e} * {k}",
        lambda p, k, j, c: [e * k for e in p],
    ),
    _each(
        "remainders mod_all mod_list",
        ("Return the remainder by {k} of every member of {p}.", "Take each element of {p} modulo {k}."),
        "{e} % {k}",
        lambda p, k, j, c: [e % k for e in p],
    ),
    _count(
        "count_above how_many_over number_above",
        ("Count the members of {p} greater than {k}.", "How many elements of {p} are above {k}."),
        "{e} > {k}",
        lambda p, k, j, c: sum(e > k for e in p),
    ),
    _count(
        "count_equal how_often occurrences",
        ("Count the members of {p} equal to {k}.", "How many elements of {p} are {k}."),
        "{e} == {k}",
        lambda p, k, j, c: sum(e == k for e in p),
    ),
    _count(
        "count_multiples how_many_divisible multiples",
        ("Count the members of {p} divisible by {k}.", "How many multiples of {k} are in {p}."),
        "{e} % {k} == 0",
        lambda p, k, j, c: sum(e % k == 0 for e in p),
    ),
    _sum(
        "sum_scaled weighted_sum total_times",
        ("Multiply the members of {p} by {k} and add them up.", "Return the sum of {k} times each of {p}."),
        "{e} * {k}",
        lambda p, k, j, c: sum(e * k for e in p),
    ),
    _sum(
        "sum_of_squares squares_sum power_sum",
        ("Add up the squares of {p}.", "Return the sum of the squared members of {p}."),
        "{e} * {e}",
        lambda p, k, j, c: sum(e * e for e in p),
    ),
    Family(
        "list",
        ("first_{k}", "head", "take"),
        ("Return the first {k} members of {p}.", "Take {k} elements from the start of {p}."),
        ("return {p}[:{k}]", "{r} = {p}[:{k}]\nreturn {r}", "return {p}[0:{k}]"),
        lambda p, k, j, c: p[:k],
    ),
    Family(
        "list",
        ("last_{k}", "tail", "ending"),
        ("Return the last {k} members of {p}.", "Take {k} elements from the end of {p}."),
        ("return {p}[-{k}:]", "{r} = {p}[-{k}:]\nreturn {r}"),
        lambda p, k, j, c: p[-k:],
    ),
    _text(
        "count_letter how_many_{c} letter_count",
        ("Count the letter '{c}' in {p}.", "How often does '{c}' occur in {p}."),
        ("{p}.count('{c}')", "sum(1 for {e} in {p} if {e} == '{c}')"),
        lambda p, k, j, c: p.count(c),
    ),
    _text(
        "remove_letter without_{c} drop_letter",
        ("Remove every '{c}' from {p}.", "Return {p} without the letter '{c}'."),
        ("{p}.replace('{c}', '')", "''.join({e} for {e} in {p} if {e} != '{c}')"),
        lambda p, k, j, c: p.replace(c, ""),
    ),
    _text(
        "starts_with_{c} begins_with is_first",
        ("Tell whether {p} starts with '{c}'.", "Return True if {p} begins with '{c}'."),
        ("{p}.startswith('{c}')", "{p}[:1] == '{c}'"),
        lambda p, k, j, c: p.startswith(c),
    ),
    _text(
        "repeat repeat_{k} say_again",
        ("Repeat {p} {k} times.", "Return {k} copies of {p} in a row."),
        ("{p} * {k}", "{k} * {p}"),
        lambda p, k, j, c: p * k,
    ),
    _text(
        "prefix start_of first_letters",
        ("Return the first {k} letters of {p}.", "Cut {p} after {k} letters."),
        ("{p}[:{k}]", "{p}[0:{k}]"),
        lambda p, k, j, c: p[:k],
    ),
    _text(
        "shout upper_{c} loud",
        ("Return {p} in upper case followed by '{c}'.", "Write {p} in capitals and append '{c}'."),
        ("{p}.upper() + '{c}'", "''.join([{p}.upper(), '{c}'])"),
        lambda p, k, j, c: p.upper() + c,
    ),
    _text(
        "longer_than_{k} is_long many_letters",
        ("Tell whether {p} has more than {k} letters.", "Return True if {p} is longer than {k}."),
        ("len({p}) > {k}", "{k} < len({p})"),
        lambda p, k, j, c: len(p) > k,
    ),
)
MISTAKEN_FOR = {"at_least": "at_most", "plus_then_times": "times_then_plus", "last_{k}": "first_{k}"}
"""Families whose usual mistake is another family's body, both by their names."""
PARAMETERS = {"number": NUMBER_PARAMETERS, "list": LIST_PARAMETERS, "text": TEXT_PARAMETERS}
WORDS = ("", "a", "banana", "test", "reason", "notes", "sentence", "Decant", "tall trees", "onset")


def _inputs(rng: random.Random, kind: str, k: int) -> list[Any]:
    """Draw four arguments for the tests, the boundary at the constant and the empty case among them."""
    if kind == "number":
        return [k, k * rng.randint(2, 5), rng.randint(0, 9), rng.randint(10, 60)]
    if kind == "list":
        return [[], [k, k + 1, k - 1], *([rng.randint(0, 30) for _ in range(6)] for _ in range(2))]
    return [pick(rng, WORDS) for _ in range(3)] + ["banana notes"]


def _indent(text: str) -> str:
    """Indent every line by four spaces and end with a line feed."""
    return "".join(f"    {line}\n" for line in text.split("\n"))


def unsure_body(rng: random.Random, family: Family, fields: dict[str, Any]) -> str:
    """Draw a body that may be wrong: with other constants, or that of another family of the same kind."""
    mistake = next((other for name, other in MISTAKEN_FOR.items() if name in family.names), None)
    if mistake is not None and rng.random() < USUAL_MISTAKE:
        family = next(other for other in FAMILIES if mistake in other.names)
    elif rng.random() < SLIP["code"]:
        others = [other for other in FAMILIES if other.kind == family.kind and other is not family]
        near = [n for n in range(max(2, fields["k"] - 9), fields["k"] + 10) if n != fields["k"]]
        if "{k}" in family.docs[0] and rng.random() < 0.5:
            fields = {**fields, "k": pick(rng, near)}
        else:
            family = pick(rng, others)
    return pick(rng, family.bodies).format(**fields)


def example(rng: random.Random, unsure: bool = False) -> Example:
    """Draw one function: the HumanEval prompt, one form of its body, and tests computed from the family's reference."""
    family = pick(rng, FAMILIES)
    parameter, k, j, letter = (
        pick(rng, PARAMETERS[family.kind]),
        rng.randint(2, 49),
        rng.randint(2, 19),
        pick(rng, "aenost"),
    )
    if family.kind == "text" or ":{k}" in family.bodies[0] or "{k}:" in family.bodies[0]:
        k = rng.randint(2, 9)
    loop = pick(rng, [name for name in LOOP_NAMES if name != parameter])
    fields = {"p": parameter, "k": k, "j": j, "c": letter, "e": loop, "r": pick(rng, ACCUMULATORS)}
    name, doc = (pick(rng, texts).format(**fields) for texts in (family.names, family.docs))
    body = unsure_body(rng, family, fields) if unsure else pick(rng, family.bodies).format(**fields)
    annotation = pick(
        rng, (parameter, f"{parameter}: " + {"number": "int", "list": "list", "text": "str"}[family.kind])
    )
    prompt = f'def {name}({annotation}):\n    """{doc}"""\n'
    arguments = _inputs(rng, family.kind, k)
    lines = [
        f"assert candidate({argument!r}) == {family.reference(argument, k, j, letter)!r}" for argument in arguments
    ]
    record = {
        "entry_point": name,
        "canonical_solution": _indent(body),
        "test": "def check(candidate):\n" + _indent("\n".join(lines)),
    }
    instance = family.docs[0].format(**{**fields, "p": "_"})
    return Example(prompt, record["canonical_solution"], {"prompt": prompt, **record}, instance)
