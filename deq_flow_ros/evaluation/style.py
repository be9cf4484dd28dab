# SPDX-License-Identifier: Apache-2.0
"""How the report looks, in light and dark, from a phone's width on; the plots use its colours by their names."""

from __future__ import annotations

CSS = """
:root { --paper: #ffffff; --card: #f4f6f8; --ink: #1a202c; --muted: #5a6676; --line: #dde3ea; --bad: #c53030;
  --badcard: #fff5f5; --c1: #2b6cb0; --c2: #c05621; --c3: #2f855a; --c4: #805ad5; --c5: #b83280; --c6: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12161c; --card: #1b222b; --ink: #e6ebf1; --muted: #9aa7b6; --line: #323c48; --bad: #fc8181;
    --badcard: #33191b; --c1: #63b3ed; --c2: #f6ad55; --c3: #68d391; --c4: #b794f4; --c5: #f687b3; --c6: #a0aec0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .4rem 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: .6rem 0 .3rem; } p { margin: .2rem 0 .6rem; overflow-wrap: anywhere; }
small, figcaption, .note, cite { color: var(--muted); font-size: .84rem; } cite { display: block; }
ul { margin: .3rem 0; padding-left: 1.2rem; } .definitions li { margin-bottom: .6rem; }
.bad { background: var(--badcard); border-left: 4px solid var(--bad); padding: .6rem .9rem; margin: 1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr)); gap: .6rem; margin-top: 1rem; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tiles b, .tiles span, .tiles small { display: block; } .tiles b { font-size: 1.25rem; line-height: 1.3; }
.tiles b small { display: inline; font-weight: 500; }
.tiles span { font-size: .9rem; } .tiles small { line-height: 1.35; margin-top: .15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--muted); } td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.compared td, .compared tr:first-child th { text-align: right; white-space: nowrap; padding: .25rem .4rem; }
.compared tr:first-child th { color: var(--ink); font-weight: 600; } .compared .best { font-weight: 700; }
.recordings th:first-child { position: sticky; left: 0; background: var(--paper); padding-right: .8rem; }
.recordings th:first-child { min-width: 7rem; overflow-wrap: anywhere; }
.recordings tr:first-child th { white-space: normal; vertical-align: bottom; }
.recordings tr .state, .recordings tr:first-child .state, .recordings .reason { text-align: left; }
.recordings .reason { white-space: normal; }
a { color: var(--c1); }
.stages { max-width: 40rem; } .stages td { white-space: nowrap; } .stages .bar { width: 70%; padding: .45rem 0; }
.bar i { display: block; height: .8rem; background: var(--c1); border-radius: 2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; min-width: 0; } figure svg { width: 100%; height: auto; display: block; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(47%, 10.4rem), 1fr)); gap: .5rem; }
.panels img { width: 100%; display: block; border-radius: 3px; } .strip { margin: 1rem 0 .3rem; }
.key { display: flex; gap: 1rem; align-items: center; } .key img { border-radius: 50%; flex: none; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
.columns > div { min-width: 0; }
"""
