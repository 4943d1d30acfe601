"""The style sheet of the report."""

from __future__ import annotations

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #f6f7fa; --paper: #ffffff; --sunken: #f0f2f6; --line: #e2e6ee;
  --text: #1b2434; --muted: #5b6475; --accent: #2f5fe0;
  --good: #0a7d57; --good-soft: #e3f6ee; --bad: #c0303f; --bad-soft: #fdebec;
  --warn: #8f5a00; --warn-soft: #fff3dc; --shadow: 0 1px 2px #1b24340d, 0 6px 20px #1b24340a;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e131c; --paper: #161d29; --sunken: #111722; --line: #273042;
    --text: #e5eaf3; --muted: #98a3b8; --accent: #7aa2ff;
    --good: #4fd5a4; --good-soft: #12332a; --bad: #ff8b95; --bad-soft: #3a1a21;
    --warn: #f2bd68; --warn-soft: #35290f; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 4rem; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; padding-bottom: 8px; }
.eyebrow {
  margin: 0; color: var(--accent); font-size: 12px; font-weight: 650;
  letter-spacing: .09em; text-transform: uppercase;
}
h1 { margin: 4px 0 14px; font-size: 32px; line-height: 1.2; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 21px; letter-spacing: -.01em; }
h3 { margin: 0; font-size: 13px; font-weight: 600; color: var(--muted); }
h4 { margin: 24px 0 10px; font-size: 12px; font-weight: 650; color: var(--muted);
  letter-spacing: .06em; text-transform: uppercase; }
.lead { margin: 2px 0 18px; color: var(--muted); max-width: 78ch; }
.facts { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; padding: 0; list-style: none; }
.facts li { padding: 3px 11px; border: 1px solid var(--line); border-radius: 99px;
  background: var(--paper); color: var(--muted); font-size: 13px; }
.facts b { color: var(--text); font-weight: 600; }
nav { position: sticky; top: 0; z-index: 2; margin-top: 18px; background: var(--page);
  border-bottom: 1px solid var(--line); }
nav ul { display: flex; gap: 22px; max-width: 1180px; margin: 0 auto; padding: 11px 24px;
  list-style: none; overflow-x: auto; white-space: nowrap; }
nav a { color: var(--muted); font-size: 14px; font-weight: 550; text-decoration: none; }
nav a:hover { color: var(--accent); }
section { margin: 34px 0 46px; }
.notes { margin: 24px 0 0; padding: 13px 18px; border: 1px solid var(--warn);
  border-left-width: 4px; border-radius: 10px; background: var(--warn-soft); }
.notes strong { color: var(--warn); }
.notes ul { margin: 4px 0 0; padding-left: 20px; }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(6, 1fr); }
.card, .panel, .plate, .class { border: 1px solid var(--line); border-radius: 12px;
  background: var(--paper); box-shadow: var(--shadow); }
.card { grid-column: span 2; display: flex; flex-direction: column; padding: 16px 18px 15px; }
.card:nth-child(n+4) { grid-column: span 3; }
.card .value { margin: 3px 0 10px; font-size: 31px; font-weight: 660; line-height: 1.15;
  letter-spacing: -.025em; font-variant-numeric: tabular-nums; }
.card .unit { margin-left: 7px; color: var(--muted); font-size: 14px; font-weight: 500;
  letter-spacing: 0; }
.verdict { align-self: flex-start; margin: 9px 0 0; padding: 2px 10px; border-radius: 99px;
  background: var(--sunken); color: var(--muted); font-size: 13px; font-weight: 560; }
.good > .verdict { background: var(--good-soft); color: var(--good); }
.bad > .verdict { background: var(--bad-soft); color: var(--bad); }
.warn > .verdict { background: var(--warn-soft); color: var(--warn); border-radius: 10px; }
.good > .verdict::before { content: "\\2713\\00a0"; }
.bad > .verdict::before { content: "\\2717\\00a0"; }
.warn > .verdict::before { content: "!\\00a0"; font-weight: 750; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 12px; margin: 12px 0 0;
  font-size: 12.5px; color: var(--muted); }
.card dt { opacity: .85; } .card dd { margin: 0; color: var(--text); overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 4px 12px;
  align-items: center; font-size: 12.5px; color: var(--muted); }
.bar { display: contents; }
.bar-track { height: 8px; border-radius: 4px; background: var(--sunken); overflow: hidden; }
.bar-fill { display: block; height: 100%; border-radius: 4px; background: var(--accent); }
.bar-fill.reference { background: var(--muted); opacity: .5; }
.bar-value { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 12px;
  background: var(--paper); box-shadow: var(--shadow); }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { padding: 10px 18px; color: var(--muted); font-size: 12px; font-weight: 600; text-align: left;
  background: var(--sunken); white-space: nowrap; }
td { padding: 11px 18px; border-top: 1px solid var(--line); vertical-align: top; }
td.stage { font-weight: 600; white-space: nowrap; }
td.time { min-width: 150px; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.time .bar-track { display: block; height: 4px; margin-top: 5px; }
.pill { padding: 2px 10px; border-radius: 99px; background: var(--sunken); color: var(--muted);
  font-size: 12.5px; font-weight: 600; }
.pill.good { background: var(--good-soft); color: var(--good); }
.pill.bad { background: var(--bad-soft); color: var(--bad); }
.pill.warn { background: var(--warn-soft); color: var(--warn); }
.chips { display: flex; flex-wrap: wrap; gap: 5px 18px; }
.chips span { color: var(--muted); overflow-wrap: anywhere; }
.chips b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
.panels { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.panel { margin: 0; padding: 11px 12px 6px; }
.panel figcaption { display: flex; justify-content: space-between; gap: 10px; padding: 0 4px 5px;
  font-size: 13.5px; font-weight: 600; }
.panel .group { color: var(--muted); font-weight: 500; }
.panel .last { color: var(--muted); font-weight: 500; font-variant-numeric: tabular-nums; }
.panel img { display: block; width: 100%; height: auto; }
.plate { margin: 0 0 16px; padding: 14px; overflow-x: auto; }
.comparison { display: grid; gap: 6px; align-items: center; }
.comparison .row-label { padding-right: 10px; color: var(--muted); font-size: 13px;
  font-weight: 560; }
.comparison img, .class img { display: block; width: 100%; height: auto; border-radius: 5px; }
.pixelated img { image-rendering: pixelated; }
.classes { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.class { margin: 0; padding: 12px 14px 14px; }
.class figcaption { padding-bottom: 8px; font-size: 13.5px; font-weight: 600;
  overflow-wrap: anywhere; }
.class div { display: grid; gap: 5px; grid-template-columns: repeat(4, 1fr); }
pre { margin: 0; padding: 16px 18px; overflow: auto; max-height: 620px;
  font: 12.5px/1.6 var(--mono); tab-size: 2; }
pre .key { color: var(--accent); } pre .comment { color: var(--muted); }
.environment td { padding: 6px 18px; font-size: 13.5px; }
.environment td:first-child { width: 220px; color: var(--muted); }
.environment td:last-child { font-family: var(--mono); font-size: 12.5px; overflow-wrap: anywhere; }
footer { padding-top: 6px; padding-bottom: 40px; color: var(--muted); font-size: 13px; }
@media (max-width: 860px) {
  .cards { grid-template-columns: repeat(2, 1fr); }
  .card, .card:nth-child(n+4) { grid-column: span 1; }
}
@media (max-width: 700px) {
  .stages thead { display: none; }
  .stages tr { display: grid; grid-template-columns: 1fr auto; gap: 8px 16px; padding: 12px 16px;
    border-top: 1px solid var(--line); }
  .stages tr:first-child { border-top: 0; }
  .stages td { padding: 0; border: 0; }
  .stages td.time, .stages td:last-child { grid-column: 1 / -1; }
}
@media (max-width: 560px) {
  header, main, footer, nav ul { padding-left: 16px; padding-right: 16px; }
  h1 { font-size: 25px; }
  .card, .card:nth-child(n+4) { grid-column: 1 / -1; }
  .panels, .classes { grid-template-columns: 1fr; }
}
@media print {
  nav { display: none; } pre { max-height: none; white-space: pre-wrap; }
  .card, .panel, .plate, .class { break-inside: avoid; box-shadow: none; }
}
"""
