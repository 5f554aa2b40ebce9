"""Where the KL of student and teacher is largest, as HTML: the text around, and what each would have said, escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.evaluate.results.run_shapes import LargestDivergence, fault_of
from tools.report.escaped import escape
from tools.report.numbers import percent
from tools.report.samples import cut

MOST_BEFORE, MOST_LINES = 160, 3
"""Characters and lines shown before the marked token."""


def largest_divergences_section(models: Mapping[str, Any]) -> str:
    """Return the section; the last model of the report stands open, the others folded; nothing where there are none."""
    found = {
        name: largest
        for name, model in models.items()
        if model["role"] != "teacher" and (largest := _sound(model["heldout"]))
    }
    if not found:
        return ""
    lead = (
        "The held-out positions of the largest KL, in their context: the marked token follows, and beside it stands "
        "what each side gave the most probability."
    )
    parts = ["<h2>Where student and teacher differ most</h2>", f'<p class="soft">{lead}</p>']
    last = list(found)[-1]
    for name in [last, *(name for name in found if name != last)]:
        cards = "".join(_card(position, name) for position in found[name])
        opened = " open" if name == last else ""
        parts.append(f"<details{opened}><summary>{escape(name)}</summary>{cards}</details>")
    return "".join(parts)


def _card(position: Mapping[str, Any], name: str) -> str:
    token, after = _shown(position["token"]), _shown(position["after"])
    before = _shown(_last(position["before"]))
    label = position["token_probability"]
    text = f'<pre class="context">{before}<mark>{token}</mark><span class="soft">{after}</span></pre>'
    said = _side("teacher", position["teacher"], label["teacher"]) + _side(name, position["student"], label["student"])
    source = escape(str(position["source"]))
    head = f'<span class="who">{position["kl_nats"]:.2f} nats</span> <span class="soft">{source}</span>'
    return f'<div class="card parting">{head}{text}<div class="answers">{said}</div></div>'


def _side(name: str, entries: Sequence[Any], label: float) -> str:
    rows = "".join(
        f'<li><code>{_shown(text)}</code><span class="bar" style="width:{60 * probability:.1f}%"></span>'
        f'<span class="n">{percent(probability)}</span></li>'
        for text, probability in entries
    )
    return (
        f'<div><span class="who">{escape(name)}</span> '
        f'<span class="soft">marked token <span class="n">{percent(label)}</span></span>'
        f'<ul class="said">{rows}</ul></div>'
    )


def _last(text: str) -> str:
    """Return what stands right before the marked token, so that the token is in sight on a phone, too."""
    lines = text[-MOST_BEFORE:].split("\n")[-MOST_LINES:]
    kept = "\n".join(lines)
    return kept if len(kept) == len(text) else f"… {kept}"


def _shown(text: Any) -> str:
    """Escape a text; a line break or a space that stands alone is made visible."""
    plain = cut(text)
    return escape(plain if plain.strip() else plain.replace(" ", "\u2423").replace("\n", "\u21b5"))


def _sound(heldout: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return those positions of an evaluation that have the shape that this page shows."""
    largest = (heldout or {}).get("partings")
    return [one for one in largest if not fault_of(LargestDivergence, one)] if isinstance(largest, list) else []
