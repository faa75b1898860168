"""The style sheet of a report: one column on a phone, dark where the reader has it dark, print."""

from __future__ import annotations

from fedveil.report.page.heatmap import STEPS

__all__ = ["style_sheet"]

# From nothing to everything: light to dark, so that it survives a grey printer.
_LIGHTEST, _DARKEST = (237, 244, 250), (8, 48, 107)
# Up to here black letters are the readable ones on the colour, from here on white.
_HALF = 0.65

_SHEET = """
:root{--ink:#1b1e23;--soft:#4f5660;--paper:#ffffff;--panel:#f4f5f7;--grid:#d5d8dd;
--alarm:#a40e16;--alarm-paper:#fdecec;--link:#00558c}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e9ebee;--soft:#b3b9c2;--paper:#16181c;
--panel:#22252b;--grid:#3c4149;--alarm:#ff9c9c;--alarm-paper:#3c1719;--link:#7cc4f5;
color-scheme:dark}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.3;margin:.2rem 0 1rem}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:2px solid var(--grid)}
h3{font-size:1rem;margin:0 0 .4rem}
p,ul{margin:.4rem 0;max-width:48rem}
a{color:var(--link)}
nav ul{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.kicker,figcaption,.caption,.aid,dt{color:var(--soft);font-size:.9rem}
.alarms{background:var(--alarm-paper);border:2px solid var(--alarm);border-radius:.4rem;
padding:.6rem 1rem;margin:1rem 0}
.alarms h2{border:0;margin:0;padding:0;color:var(--alarm)}
.raised{color:var(--alarm);font-weight:700}
.unmade{color:var(--soft);font-style:italic}
.key{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,9.5rem),1fr));gap:.6rem;
margin:1rem 0}
.key div{background:var(--panel);border-radius:.4rem;padding:.5rem .7rem}
.key dd{margin:0;font-size:1.25rem;font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:1.5rem;
margin-top:1rem}
figure{margin:0;min-width:0;max-width:40rem}
.wide{max-width:none}
.wide figcaption{max-width:48rem}
figure>svg{display:block;width:100%;height:auto;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
figure>svg *{stroke-linejoin:round;stroke-linecap:butt}
.legend{list-style:none;padding:0;margin:.4rem 0;font-size:.85rem;display:grid;gap:0 1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,16rem),1fr))}
.legend li{padding-left:2.2rem;text-indent:-2.2rem}
.swatch{width:1.75rem;height:.75rem;margin-right:.45rem;fill:none}
.scroll{overflow-x:auto;max-width:100%;margin:.3rem 0 .6rem}
table{border-collapse:collapse;font-size:.9rem;overflow-wrap:normal}
.caption{margin:.8rem 0 0;max-width:none}
th,td{padding:.25rem .6rem .25rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--grid)}
thead th{vertical-align:bottom;border-bottom:2px solid var(--soft)}
tbody th{font-weight:600}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.wordy{overflow-wrap:anywhere}
.name{display:inline-block;width:max-content;max-width:11rem;overflow-wrap:anywhere}
.heat .name{max-width:9.5rem}
.attacks th:first-child,.attacks td:nth-child(5){min-width:10rem}
.attacks td:last-child{min-width:14rem}
@media screen and (max-width:48rem){.attacks td:nth-child(5){min-width:19rem}}
thead .number{white-space:normal}
.heat{font-size:.8rem;font-variant-numeric:tabular-nums}
.heat th,.heat td{border:1px solid var(--paper);padding:.1rem .3rem;text-align:center;
vertical-align:middle}
.heat th:first-child{position:sticky;left:0;background:var(--paper);text-align:left;
font-weight:400}
.heat td.number{text-align:right;padding-left:.5rem}
.heat.many{font-size:.7rem;line-height:1.05}
.heat.many th,.heat.many td{padding-top:0;padding-bottom:0}
.heat.dense td:not(.number){font-size:0;padding:0;min-width:6px;border-width:1px 0}
.heat.dense thead th:not(:first-child):not(.number){padding:0;width:7px;max-width:7px}
.heat.dense thead span{display:block;width:7px;white-space:nowrap;direction:rtl}
.scale{font-size:.8rem}
.scale span{display:inline-block;min-width:1.7rem;text-align:center}
.heat td,.scale span{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.kx{background:var(--panel);color:var(--soft)}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--link)}
code{background:var(--panel);padding:.1rem .3rem;border-radius:.2rem}
@page{margin:1.4cm}
@media print{
body{padding:0;max-width:none;font-size:10pt}
nav{display:none}
h2,h3,.caption,.scale{break-after:avoid}
.aid,figcaption{break-before:avoid}
figure,.alarms,.key div,tr,.heat{break-inside:avoid}
.figures{grid-template-columns:1fr 1fr;gap:.6cm}
.scroll{overflow:visible}
table{font-size:7.5pt}
th,td{padding:.15rem .4rem .15rem 0}
.attacks{font-size:6.5pt}
.attacks .name{width:auto}
.attacks th:first-child,.attacks td:nth-child(5),.attacks td:last-child{min-width:0}
.heat.many{font-size:5.6pt;line-height:1.1}
.heat.dense td:not(.number){min-width:4px}
.heat th:first-child{position:static}
}
"""


def style_sheet() -> str:
    """Everything that decides what a report looks like."""
    return _SHEET.strip() + "\n" + "\n".join(_step(step / STEPS) for step in range(STEPS + 1))


def _step(share: float) -> str:
    parts = [round(a + share * (b - a)) for a, b in zip(_LIGHTEST, _DARKEST, strict=True)]
    letters = "#14171a" if share < _HALF else "#ffffff"
    name = f"k{round(share * STEPS)}"
    return f".{name}{{background:#{bytes(parts).hex()};color:{letters}}}"
