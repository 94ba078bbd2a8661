"""What the HTML pages of the package share: one file each, without requests, light and dark, readable on a phone."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #222222; --soft: #666b72; --line: #dcdfe3;
  --best: #0a7d55; --worse: #b3261e; --shade: #0003; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #d6d9dd; --soft: #9aa1a9; --line: #3a3f46;
    --best: #4fd1a1; --worse: #ff8a80; --shade: #000a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
/* A shade at the edge where there is more to scroll to: phones show no scroll bar. Paper that moves along hides it. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .86rem; }
th, td { padding: .22rem .55rem; text-align: right; } th { font-weight: 500; text-align: left; }
thead th { text-align: right; vertical-align: bottom; white-space: normal; border-bottom: 2px solid var(--line);
  color: var(--soft); }
tbody tr + tr:not(.section) > * { border-top: 1px solid var(--line); }
th[scope=row] { position: sticky; left: 0; background: var(--paper); }
.section th { padding-top: .9rem; font-style: italic; color: var(--soft); }
.best, .worse { font-weight: 700; color: var(--best); } .worse { color: var(--worse); }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 42rem), 1fr)); gap: 0 2.5rem; }
.tables .full { grid-column: 1 / -1; }
section { min-width: 0; } summary { cursor: pointer; margin-top: 1rem; font-weight: 600; }
.caption, .lead { color: var(--soft); font-size: .9rem; max-width: 60rem; margin: .4rem 0 0; }
img { display: block; max-width: none; height: auto; } .wide img { min-width: 60rem; width: 100%; }
thead th:first-child { text-align: left; }
thead button { all: unset; cursor: pointer; font: inherit; } thead button:focus-visible { outline: 2px solid; }
thead button::after { content: " ↕"; opacity: .45; } [aria-sort] button::after { opacity: 1; }
[aria-sort=descending] button::after { content: " ↓"; } [aria-sort=ascending] button::after { content: " ↑"; }
.notes { margin: .4rem 0; padding-left: 1.2rem; font-size: .92rem; overflow-wrap: anywhere; }
code, pre { font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem 1rem; border: 1px solid var(--line);
  border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { /* a name that stays while the rest is scrolled must leave room for the rest */
  table { width: max-content; } th[scope=row] { max-width: 45vw; white-space: normal; overflow-wrap: anywhere; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
"""

# Sorting by a column: its header becomes a button. Rows stay in their section; what is no number comes last. Numbers
# fall at the first click, names rise.
SORTING = """
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const text = (row, i) => row.cells[i].textContent;
  const number = (row, i) => parseFloat(text(row, i).replace("−", "-"));
  const bodies = [...table.tBodies].map(body => [body, [...body.rows].filter(row => row.className !== "section")]);
  headers.forEach((header, i) => {
    const numeric = i > 0 && bodies.some(([_, rows]) => rows.some(row => !isNaN(number(row, i))));
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort") ?? (numeric ? "ascending" : "descending");
      const order = before === "ascending" ? "descending" : "ascending";
      headers.forEach(other => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      for (const [body, rows] of bodies) {
        body.append(...rows.sort((one, other) => {
          if (!numeric) return sign * text(one, i).localeCompare(text(other, i));
          const a = number(one, i), b = number(other, i);
          return isNaN(a) - isNaN(b) || sign * (a - b);
        }));
      }
    });
  });
}
"""


def document(title: str, body: str, style: str = "", script: str = "", generator: str = "ood_fast") -> str:
    """A page of `body`, HTML, with the style that all share."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>
{body}
{f"<script>{script}</script>" if script else ""}</body></html>
"""


def definitions(facts: Mapping[str, str]) -> str:
    """A list of names and what belongs to them."""
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{listed}</dl>"


def download(name: str, text: str) -> str:
    """A link that saves `text`, which the page holds, as the file `name`."""
    return f'<a download="{html.escape(name)}" href="data:text/csv;charset=utf-8,{quote(text, safe=",.")}">CSV</a>'


def write(file: str | os.PathLike, text: str) -> None:
    """Write a file, which appears under its name when all of it is written."""
    file = Path(file)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
