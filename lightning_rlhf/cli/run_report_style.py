"""The report's style sheet: one column of text, pictures that wrap, light and dark."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2026; --soft: #5b6270; --rule: #dfe2e8; --paper: #ffffff; --card: #f6f7f9;
  --a: #2a6fb0; --b: #b8680a; --fit: #1d2026; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e8ec; --soft: #a0a7b4; --rule: #343a45; --paper: #15181d; --card: #1e2229;
  --a: #7db4e8; --b: #eda34a; --fit: #e6e8ec; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, header { max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.group { color: var(--soft); font-size: .75rem; letter-spacing: .03em; margin: 0; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--a); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .85em; }
.soft, figcaption, .hint { color: var(--soft); font-size: .88rem; }
main > section:first-child { margin-top: 2rem; }
.run { border-top: 2px solid var(--rule); margin-top: 2.5rem; padding-top: 1.5rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.number, th.number { text-align: right; }
td.text { white-space: normal; min-width: 15rem; color: var(--soft); }
tbody th { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 8rem; }
.changed { color: var(--b); font-weight: 600; }
.alarmed .value { color: var(--bad); }
.cards { display: grid; gap: .75rem; margin: 1rem 0; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 46%), 1fr)); }
.card { background: var(--card); border-radius: .5rem; padding: .7rem .85rem; min-width: 0; }
.card dt { color: var(--soft); font-size: .85rem; }
.card dd { margin: 0; }
.card .value { font-size: 1.4rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card .value small { font-size: .8rem; font-weight: 400; color: var(--soft); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .75rem 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; min-width: 0; }
figure h5 { margin: 0; font-size: .95rem; overflow-wrap: anywhere; }
figure h5 small { font-weight: 400; color: var(--soft); }
.wide { max-width: 44rem; margin: 1rem 0; }
.grid { display: grid; gap: 1.5rem 1.75rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; }
.axes .grid, .axes .zero { stroke: var(--rule); stroke-width: 1; }
.axes .zero { stroke: var(--soft); }
.a { --own: var(--a); } .b { --own: var(--b); } .fit { --own: var(--fit); }
.line { fill: none; stroke: var(--own); stroke-width: 1.8; stroke-linejoin: round; }
.fit .line { stroke-width: 1.3; stroke-dasharray: 6 4; }
.band { fill: var(--own); opacity: .18; }
circle { fill: var(--own); }
.span { fill: var(--ink); opacity: .07; }
.mark line { stroke: var(--bad); stroke-dasharray: 2 3; }
.mark text { fill: var(--bad); }
.star { fill: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; color: var(--soft); }
.legend span::before { content: ""; display: inline-block; width: 1.2rem; border-top: 3px solid var(--own);
  margin-right: .4rem; vertical-align: .25em; }
.legend .fit::before { border-top-style: dashed; border-top-width: 2px; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--a); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
details > pre { background: var(--card); border-radius: .5rem; padding: .85rem; margin-top: .5rem; }
.prompt { margin: 1.5rem 0 .5rem; border-left: 3px solid var(--rule); padding-left: .75rem; }
.columns { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.sample { background: var(--card); border-radius: .5rem; padding: .7rem .85rem; min-width: 0; }
.sample h5 { margin: 0 0 .35rem; font-size: .85rem; color: var(--soft); font-weight: 600; }
.sample p { margin: .5rem 0 0; }
ul.absent { padding-left: 1.1rem; color: var(--soft); font-size: .92rem; }
footer { max-width: 70rem; margin: 3rem auto 2rem; padding: 0 1rem; color: var(--soft); font-size: .85rem; }
"""
