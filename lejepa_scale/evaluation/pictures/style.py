"""How the page looks, and what a click on an image does."""

from __future__ import annotations

STYLE = """
:root { --ground: #fbfaf7; --panel: #ffffff; --ink: #1d1c1a; --soft: #6a675f; --line: #e4e1d8; --main: #c2410c;
  --other: #9a968c;
  --good: #2f8f4e; --bad: #cc3d33; --dark: #14130f; --shadow: 0 1px 2px rgb(30 25 10 / .06), 0 6px 20px rgb(30 25 10 /
  .05) }
@media (prefers-color-scheme: dark) { :root { --ground: #141311; --panel: #1d1c19; --ink: #ece9e1; --soft: #a09b90;
  --line: #33312b; --main: #fb8b4b; --other: #7d796f; --good: #55b877; --bad: #ec6a5e; --dark: #0b0a09; --shadow: none
  } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem }
header { padding-top: 3.2rem }
.kicker { margin: 0; color: var(--main); font-weight: 600; font-size: .85rem; letter-spacing: .04em }
h1 { font-size: clamp(1.8rem, 4vw, 2.7rem); line-height: 1.15; margin: .1rem 0 1.3rem; letter-spacing: -.02em;
  overflow-wrap: anywhere }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .4rem }
h3 { font-size: .9rem; font-weight: 500; color: var(--soft); margin: 0 0 .3rem; display: flex; justify-content:
  space-between }
h3 b { color: var(--ink); font-variant-numeric: tabular-nums }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; margin: 0; padding: 1rem 0; border-block: 1px solid
  var(--line) }
dt { color: var(--soft); font-size: .8rem } dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
section { margin: 2.6rem 0 3.4rem }
.about { max-width: 50rem; margin: 0 0 .6rem }
.signs { list-style: none; max-width: 50rem; margin: 0 0 1.2rem; padding: 0; font-size: .92rem; color: var(--soft) }
.signs li { padding-left: 1.1rem; position: relative; margin: .15rem 0 } .signs b { color: var(--ink); font-weight:
  600 }
.signs li::before { content: ""; position: absolute; left: 0; top: .5em; width: .55em; height: .55em; border-radius:
  50% }
.good::before { background: var(--good) } .bad::before { background: var(--bad) }
.made { color: var(--soft); font-size: .85rem; max-width: 60rem; margin: .9rem 0 0 }
figure { margin: 0; min-width: 0 }
figure img { display: block; width: 100%; border-radius: 6px; background: var(--dark); cursor: zoom-in; object-fit:
  fill }
figcaption { font-size: .78rem; color: var(--soft); padding-top: .2rem; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis }
body:has(#exact:checked) .map img, body:has(#exact:checked) dialog .map { image-rendering: pixelated }
.toggle { display: inline-flex; gap: .45rem; align-items: center; font-size: .85rem; color: var(--soft);
  margin-bottom: .8rem;
  cursor: pointer } .toggle input { accent-color: var(--main); margin: 0 }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 33rem), 1fr)); gap: 1rem }
.strip { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: .5rem; background: var(--panel);
  padding: .7rem; border-radius: 12px; box-shadow: var(--shadow); align-content: center }
.strips.large { grid-template-columns: 1fr }
.strips.large .strip { max-width: calc(var(--n) * 16rem * var(--ratio)) }
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: .5rem; align-content: start;
  background: var(--panel); padding: .7rem; border-radius: 12px; box-shadow: var(--shadow) }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 33rem), 1fr)); gap: 1rem }
.row { display: grid; grid-template-columns: 1fr repeat(5, minmax(0, 1fr)); gap: .5rem; background: var(--panel);
  padding: .7rem; border-radius: 12px; box-shadow: var(--shadow) }
.query { padding-right: .55rem; border-right: 1px solid var(--line) } .query figcaption { color: var(--ink);
  font-weight: 600 }
.right img { outline: 3px solid var(--good); outline-offset: -3px } .wrong img { outline: 3px solid var(--bad);
  outline-offset: -3px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
.chart { background: var(--panel); padding: .9rem 1rem .7rem; border-radius: 12px; box-shadow: var(--shadow) }
.chart-row { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: center }
.chart-row .chart { flex: 1 1 24rem; max-width: 31rem }
.numbers { display: flex; gap: 2rem } .numbers b { display: block; font-size: 1.9rem; line-height: 1.1;
  letter-spacing: -.02em }
.numbers span { font-size: .82rem; color: var(--soft) }
svg { display: block; width: 100%; height: auto; overflow: visible } svg text { fill: var(--soft); font-size: 11px }
.grid { stroke: var(--line); stroke-width: 1 }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
polyline.main { stroke: var(--main) } polyline.other { stroke: var(--other) }
circle.main { fill: var(--main) } circle.other { fill: var(--other) }
.legend { display: flex; gap: 1.2rem; margin: 0 0 .4rem; font-size: .82rem; color: var(--soft) }
.legend span::before { content: ""; display: inline-block; width: 1.1em; height: 3px; border-radius: 2px;
  margin-right: .45em;
  vertical-align: middle } .legend .main::before { background: var(--main) } .legend .other::before { background:
  var(--other) }
.left-out { color: var(--soft); font-size: .92rem } .left-out h2 { color: var(--ink); font-size: 1.05rem }
.left-out ul { margin: 0; padding-left: 1.1rem }
footer { border-top: 1px solid var(--line); padding-block: 1.2rem 3rem; color: var(--soft); font-size: .82rem }
footer p { margin: 0 0 .3rem } code { font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere }
dialog { outline: none; border: 0; padding: 0; background: none; max-width: none; max-height: none; color: #eee;
  text-align: center }
dialog img { display: block; width: auto; height: auto; border-radius: 8px; background: #000; cursor: zoom-out }
dialog p { margin: .5rem 0 0; font-size: .9rem } dialog::backdrop { background: rgb(10 9 8 / .88) }
@media (max-width: 40rem) { .strip { grid-template-columns: repeat(min(3, var(--n)), minmax(0, 1fr)) }
  .row { grid-template-columns: repeat(3, minmax(0, 1fr)) } 
  .heads { grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)) } .query { border: 0; padding: 0 } }
@media print { body { background: #fff } .strip, .row, .heads, .chart { box-shadow: none; border: 1px solid #ddd;
  break-inside: avoid } .toggle { display: none } }
"""

SCRIPT = """
const large = document.getElementById("large"), view = large.querySelector("img"), said = large.querySelector("p");
document.querySelector("main").addEventListener("click", event => {
  const image = event.target.closest("figure img");
  if (!image) return;
  const box = image.getBoundingClientRect();
  const times = Math.min(innerWidth * 0.92 / box.width, innerHeight * 0.86 / box.height);
  view.src = image.src; said.textContent = image.alt;
  view.className = image.parentElement.className.includes("map") ? "map" : "";
  view.style.width = box.width * times + "px"; view.style.height = box.height * times + "px";
  large.showModal();
});
large.addEventListener("click", () => large.close());
"""
