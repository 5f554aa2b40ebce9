"""The page's one script: search and filter the answers side by side. Allowed by its hash, so that no other runs.

A question is shown where its card's text holds every word of the search, its domain is chosen, and its outcome matches.
While nothing is asked for, the first few questions of each domain stand open and the rest stay folded; without scripts
the page is complete, with the same folds and no search box.
"""

from __future__ import annotations

import base64
import hashlib

SCRIPT = """
(() => {
  const box = document.getElementById('filter');
  if (!box) return;
  box.hidden = false;
  const [search, domain, outcome] = ['search', 'domain', 'outcome'].map(name => box.querySelector(`[name=${name}]`));
  const count = box.querySelector('output');
  const cards = [...document.querySelectorAll('.sample')].map(card => [card, card.textContent.toLowerCase()]);
  const apply = () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const asked = Boolean(words.length || domain.value || outcome.value);
    let shown = 0;
    for (const [card, text] of cards) {
      const fits = words.every(word => text.includes(word))
        && (!domain.value || card.dataset.domain === domain.value)
        && (!outcome.value || card.dataset.outcome.split(' ').includes(outcome.value));
      card.hidden = !fits;
      shown += fits;
    }
    for (const fold of document.querySelectorAll('details.more')) {
      const found = [...fold.querySelectorAll('.sample')].some(card => !card.hidden);
      if (asked) fold.open = found; else fold.open = false;
      fold.hidden = !found;
    }
    for (const section of document.querySelectorAll('section.domain'))
      section.hidden = ![...section.querySelectorAll('.sample')].some(card => !card.hidden);
    count.textContent = asked ? `${shown} of ${cards.length} questions` : `${cards.length} questions`;
  };
  for (const field of [search, domain, outcome]) field.addEventListener('input', apply);
  apply();
})();
"""


def script_source() -> str:
    """Return the script's hash as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
