"""The page's style sheet: one column on a phone, two for plots on a desk, black on white in print, dark where
preferred.
"""

from __future__ import annotations

CSS = """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; --ink: #1c2430;
  --soft: #5b6675;
  --page: #f6f7f9; --card: #ffffff; --line: #dfe3e9; --good: #157a4f; --bad: #b3402c; --mark: #eef4fb; --note: #fff6df;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --page: #12161c; --card: #1a2029; --line:
  #2d3642;
  --good: #5ccf9b; --bad: #f0907c; --mark: #202b39; --note: #332b15; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); overflow-wrap: break-word;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 12px; }
h3 { font-size: 1rem; margin: 22px 0 8px; overflow-wrap: anywhere; }
p { margin: 8px 0; } .soft, figcaption, .legend { color: var(--soft); font-size: .875rem; }
.lead { font-size: 1.05rem; margin: 0 0 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.note { background: var(--note); border-radius: 8px; padding: 10px 14px; margin: 14px 0; font-size: .925rem;
  overflow-wrap: anywhere; }
.note ul { margin: 4px 0 0; padding-left: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: baseline; }
th.w, td.w { text-align: left; }
.long { display: inline-block; width: 22ch; max-width: 100%; white-space: normal; overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; vertical-align: bottom; }
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody th { color: var(--ink); font-size: 1rem; vertical-align: baseline; }
td small { display: block; color: var(--soft);
  font-size: .72rem;
  line-height: 1.2; }
td.best { font-weight: 700; background: var(--mark); }
i.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(180px, 46%), 1fr)); gap: 12px;
  margin-top: 14px; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px;
  min-width: 0; }
.facts > div > span { color: var(--soft); font-size: .8rem; display: block; } .facts b { font-size: 1.02rem;
  font-weight: 600; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; } figure svg { width: 100%; height: auto; display: block; } figcaption {
  margin-bottom:
  6px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 12px; margin-top:
  10px; }
.answers > div { min-width: 0; border-left: 3px solid var(--line); padding-left: 12px; }
pre { font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 4px 0;
  max-height: 22em; overflow-y: auto; }
.who { font-weight: 600; font-size: .9rem; } .good { color: var(--good); } .bad { color: var(--bad); }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
.sample details { margin-top: 4px; } .sample summary { font-weight: 400; font-size: .875rem; color: var(--soft);
  padding: 2px 0; }
.sample + .sample { margin-top: 14px; }
.filter { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin: 10px 0; } .filter[hidden] {
  display: none; }
.filter input, .filter select { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line);
  border-radius: 8px; padding: 6px 10px; min-width: 0; max-width: 100%; } .filter input { flex: 1 1 240px; }
.parting { margin-top: 10px; } .parting .context { max-height: none; } .n { white-space: nowrap; }
mark { background: #ffd76a; color: #1c2430; border-radius: 3px; }
.said { list-style: none; margin: 4px 0 0; padding: 0; font-size: .85rem; } .said li { display: flex; gap: 8px;
  align-items:
  center; min-width: 0; } .said code { flex: 0 0 30%; overflow-wrap: anywhere; white-space: pre-wrap; } .said .bar {
  height: .7em; background: var(--soft); opacity: .5; border-radius: 2px; }
.checks { list-style: none; padding: 0; margin: 6px 0 0; font-size: .9rem; } .checks li { overflow-wrap: anywhere; }
@media (max-width: 700px) { table.stack, table.stack tbody { display: block; } table.stack thead { display: none; }
  table.stack tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 2px 10px;
  padding: 10px 0; border-bottom: 1px solid var(--line); } table.stack tbody tr:last-child { border-bottom: 0; }
  table.stack th[scope=row] { grid-column: 1 / -1; position: static; border: 0; padding: 0; white-space: normal;
  overflow-wrap: anywhere; } table.stack td, table.stack td:first-child { border: 0; padding: 3px 4px; text-align: left;
  min-width: 0; white-space: normal; overflow-wrap: anywhere; position: static; }
  table.stack td::before { content: attr(data-label); display: block; color: var(--soft); font-size: .72rem; } }
@media (max-width: 600px) { main { padding: 18px 12px 40px; } .card { padding: 12px; } th, td { padding: 7px 8px; } h1 {
  font-size: 1.4rem; } }
@media print { .filter { display: none; }
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --mark: #eee; --note: #f4f4f4;
  color-scheme: light; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; } .card, figure, .sample, tr { break-inside: avoid; }
    pre
  { max-height: none; } h2 { break-after: avoid; } }
"""
