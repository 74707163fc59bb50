"""The page's style: one column on a phone, three figures abreast on a desktop, colours kept in print."""

CSS = """
:root {
  --ink: #1b1f24; --muted: #5b6570; --rule: #d9dde1; --soft: #f5f6f7; --blue: #0072B2; --orange: #E69F00;
  --red: #B34700;
}
* { box-sizing: border-box; -webkit-print-color-adjust: exact; print-color-adjust: exact }
body {
  margin: 0; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 34px 28px 60px }
header { border-bottom: 2px solid var(--ink); padding-bottom: 12px; margin-bottom: 20px }
header p { margin: 0; color: var(--muted); font-size: 14px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 2px 0 0; overflow-wrap: anywhere }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 0 0 4px }
h3 { font-size: 15px; margin: 22px 0 4px }
section { margin-top: 38px; padding-top: 18px; border-top: 1px solid var(--rule) }
.intro, .absent p { color: var(--muted); margin: 0 0 12px; max-width: 90ch }
.tiles { display: grid; grid-template-columns: repeat(auto-fit,minmax(205px,1fr)); gap: 12px; margin: 0 }
.tile { background: var(--soft); border-left: 3px solid var(--blue); padding: 11px 14px 12px }
.tile dt { color: var(--muted); font-size: 13px }
.tile dd {
  margin: 0; font-size: 28px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums;
}
.tile p { margin: 2px 0 0; font-size: 13px; line-height: 1.35; color: var(--muted) }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(330px,1fr)); gap: 4px 32px; margin: 20px 0 0;
  font-size: 14px;
}
.facts div { display: flex; gap: 12px }
.facts dt { color: var(--muted); min-width: 76px }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fit,minmax(330px,1fr)); gap: 20px 22px }
figure { margin: 0; display: flex; flex-direction: column }
figure.small { flex-direction: column-reverse; justify-content: flex-end }
figure.small figcaption { color: var(--ink); font-weight: 600; font-size: 14px; margin: 0 0 4px }
figcaption { color: var(--muted); font-size: 13px; margin-top: 8px }
svg { display: block; width: 100%; height: auto }
svg text { font-family: inherit }
.scroll { overflow-x: auto }
.wide svg { min-width: 900px }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th {
  text-align: left; font-weight: 600; font-size: 13px; color: var(--muted);
  border-bottom: 1.5px solid var(--ink); vertical-align: bottom;
}
th, td { padding: 6px 16px 6px 0; white-space: nowrap }
td { border-bottom: 1px solid var(--rule); vertical-align: top }
th.number, td.number { text-align: right; padding: 6px 10px }
td.off { color: var(--red); font-weight: 650 }
td.off::after { content: " !" }
.bar { display: block; height: 5px; min-width: 96px; max-width: 240px; margin: 3px 0 0 auto; background: #e6e9eb }
.bar b { display: block; height: 100%; background: var(--blue) }
details { margin-top: 12px }
summary { cursor: pointer; font-weight: 600 }
pre {
  background: var(--soft); padding: 14px 16px; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;
}
footer { margin-top: 44px; color: var(--muted); font-size: 13px }
@media (max-width:600px) {
  main { padding: 20px 16px 40px }
  h1 { font-size: 24px }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px }
  .tile { padding: 9px 10px }
  .tile dd { font-size: 23px }
  .tile:first-child { grid-column: 1/-1 }
  .facts, .grid { grid-template-columns: 1fr }
}
@media print {
  main { max-width: none; padding: 0 }
  section, figure, .tile { break-inside: avoid }
  .wide svg { min-width: 0 }
  body { font-size: 11pt }
}
"""
