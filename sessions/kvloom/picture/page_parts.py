"""The style and the script of the page. Neither ever holds anything of a conversation."""

from __future__ import annotations

from collections.abc import Mapping

from kvloom.picture.palette import DARK, LIGHT, ROLES


def style() -> str:
    """The page's style sheet. Without the script every turn is shown whole, in one column."""

    def variables(colours: Mapping[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in colours.items())

    roles = "".join(f".{role}{{color:var(--{role})}}" for role in ROLES)
    dark = f"@media(prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}"
    return f":root{{color-scheme:light dark;{variables(LIGHT)}}}{dark}{roles}{_STYLE}"


_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:14px/1.5 ui-monospace,Menlo,Consolas,monospace}
header{display:flex;flex-wrap:wrap;gap:4px 16px;align-items:baseline;padding:8px 16px;
 border-bottom:1px solid var(--rail)}
h1{font-size:16px;margin:0}
input{font:inherit;padding:2px 6px;min-width:12em;
 background:var(--ground);color:var(--text);border:1px solid var(--dim)}
.dim,code{color:var(--dim)}
.name{color:var(--name);font-weight:bold}
ol{list-style:none;margin:0;padding:4px 8px;outline-offset:-2px}
li{padding-left:calc(var(--c)*14px + 1.4em);position:relative;content-visibility:auto;contain-intrinsic-size:auto 21px;
 background:repeating-linear-gradient(to right,transparent 0 6px,var(--rail) 6px 8px,transparent 8px 14px)
 8px 0/calc(var(--c)*14px) 100% no-repeat}
li>b,article b{font-weight:bold}
li p,article p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}
li button{position:absolute;left:calc(var(--c)*14px);top:0;width:1.4em;padding:0;border:0;background:none;color:inherit;
 font:inherit;cursor:pointer}
.hit{box-shadow:inset 0 0 0 99em var(--hit)}
.js body{height:100vh;display:grid;grid-template:auto 1fr/minmax(16em,2fr) 3fr}
.js header{grid-column:1/3}
.js ol,.js main{overflow:auto}
.js main{border-left:1px solid var(--rail);padding:8px 16px}
.js li{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;cursor:pointer}
.js li p{display:inline;white-space:nowrap}
.js li[aria-selected=true]{outline:2px solid var(--user);outline-offset:-2px}
article{margin-bottom:12px;content-visibility:auto;contain-intrinsic-size:auto 60px}
[hidden],html:not(.js) input,html:not(.js) main{display:none!important}
@media(max-width:700px){.js body{grid-template:auto 1fr 1fr/1fr}.js header{grid-column:1}
 .js main{border-left:0;border-top:1px solid var(--rail)}}
"""

SCRIPT = """
"use strict";
document.documentElement.classList.add("js");
const tree = document.getElementById("tree");
const path = document.getElementById("path");
const search = document.getElementById("search");
const found = document.getElementById("found");
const rows = Array.from(tree.children);
const above = rows.map((row) => Number(row.dataset.a));
const below = rows.map((row) => Number(row.dataset.n));
const folded = new Set();
let hits = [];
let texts = null;
let at = -1;

function draw() {
  let shown = 0;
  rows.forEach((row, number) => {
    row.hidden = number < shown;
    if (!row.hidden) shown = number + 1 + (folded.has(number) ? below[number] : 0);
  });
}

function fold(number, close) {
  const button = rows[number].querySelector("button");
  if (!button) return;
  if (close) folded.add(number); else folded.delete(number);
  button.textContent = close ? "\\u25b8" : "\\u25be";
  button.setAttribute("aria-expanded", String(!close));
  draw();
  if (close && at > number && at <= number + below[number]) select(number);
}

function pathTo(number) {
  const up = [];
  for (let row = number; row >= 0; row = above[row]) up.push(row);
  return up.reverse();
}

function select(number) {
  if (number < 0 || number >= rows.length) return;
  if (at >= 0) rows[at].setAttribute("aria-selected", "false");
  at = number;
  pathTo(number).forEach((row) => { if (row !== number && folded.has(row)) fold(row, false); });
  rows[at].setAttribute("aria-selected", "true");
  tree.setAttribute("aria-activedescendant", rows[at].id);
  rows[at].scrollIntoView({block: "nearest"});
  path.replaceChildren(...pathTo(number).map((row) => {
    const turn = document.createElement("article");
    for (const part of rows[row].children) {
      if (part.tagName !== "BUTTON") turn.append(part.cloneNode(true), " ");
    }
    return turn;
  }));
  path.scrollTop = path.scrollHeight;
}

function look() {
  const words = search.value.trim().toLowerCase();
  texts = texts || rows.map((row) => row.textContent.toLowerCase());
  hits.forEach((row) => rows[row].classList.remove("hit"));
  hits = words ? rows.map((_, row) => row).filter((row) => texts[row].includes(words)) : [];
  hits.forEach((row) => rows[row].classList.add("hit"));
  tell();
}

function tell() {
  const number = hits.indexOf(at);
  found.textContent = !search.value.trim() ? "" : !hits.length ? "nothing found"
    : (number < 0 ? "" : (number + 1) + " of ") + hits.length + " found";
}

function next(step) {
  if (!hits.length) return;
  const behind = hits.findIndex((row) => row > at);
  const now = hits.indexOf(at);
  const from = now >= 0 ? now + step : step > 0 ? (behind < 0 ? 0 : behind) : (behind < 0 ? hits.length : behind) - 1;
  select(hits[(from + hits.length) % hits.length]);
  tell();
}

function step(by) {
  let row = at + by;
  while (row >= 0 && row < rows.length && rows[row].hidden) row += by;
  select(row);
}

const keys = {
  ArrowDown: () => step(1), ArrowUp: () => step(-1),
  ArrowLeft: () => folded.has(at) || !rows[at].querySelector("button") ? select(above[at]) : fold(at, true),
  ArrowRight: () => folded.has(at) ? fold(at, false) : below[at] ? step(1) : undefined,
  Home: () => select(0), End: () => { select(rows.length - 1); },
};

tree.addEventListener("click", (event) => {
  const row = rows.indexOf(event.target.closest("li"));
  if (row < 0) return;
  if (event.target.tagName === "BUTTON") fold(row, !folded.has(row)); else select(row);
});
tree.addEventListener("keydown", (event) => {
  if (at < 0 || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
search.addEventListener("input", look);
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); next(event.shiftKey ? -1 : 1); }
  if (event.key === "Escape") { search.value = ""; look(); tree.focus(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) { event.preventDefault(); search.focus(); }
});
const main = rows.findIndex((row) => "main" in row.dataset);
select(main < 0 ? rows.length - 1 : main);
"""
