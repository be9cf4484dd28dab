// SPDX-License-Identifier: Apache-2.0
// Asks for what is new, shows it, and asks again: a slow browser leaves pictures out, and a hidden page asks for nothing.
"use strict";
const byId = (id) => document.getElementById(id);
const COUNTS = { received: "received", processed: "with flow", first: "first of a stream", dropped: "dropped", lost: "lost on the way" };
const WIDTH = 60;

function write(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text; // what does not change is not read out again
}

function picture(id, data) {
  if (!data) return;
  write(`${id}-note`, data.note);
  if (data.src) byId(id).src = data.src;
}

function bars(svg, values, top, limit) {
  const shape = (chosen) => values.map((value, i) => {
    const x = WIDTH - values.length + i, height = Math.min(1, value / top);
    return chosen(value) ? `M${x + 0.1},1V${1 - height}h.8V1z` : "";
  }).join("");
  const isLate = (value) => limit !== null && value > limit;
  svg.querySelector(".bar").setAttribute("d", shape((value) => !isLate(value)));
  svg.querySelector(".late")?.setAttribute("d", shape(isLate));
  svg.querySelector(".budget")?.setAttribute("d", limit === null ? "" : `M0,${1 - limit / top}H${WIDTH}`);
}

function show(live) {
  document.body.dataset.state = live.state;
  document.title = live.state === "live" ? `Flow of ${live.node}` : live.headline;
  write("node", live.node);
  write("headline", live.headline);
  write("cure", live.cure);
  const map = byId("which").value;
  picture("image", live.pictures.image);
  picture("flow", live.pictures.flow);
  picture("map", live.pictures[map]);
  const { latency_ms, budget_ms, iterations, stop_reason, residual_px, scale } = live.latest;
  const budget = Number(budget_ms) || null, latencies = live.history.map((field) => field[0]);
  const most = Math.max(1, ...live.history.map((field) => field[1]));
  bars(byId("latency-bars"), latencies, 1.15 * Math.max(budget || 1, ...latencies), budget);
  bars(byId("iterations-bars"), live.history.map((field) => field[1]), 1.15 * most, null);
  if (latency_ms) {
    write("latency", `${Math.round(latency_ms)} ms${budget ? ` of ${budget} ms` : ""}`);
    write("latency-note", `${latencies.filter((ms) => budget && ms > budget).length} of the last ${latencies.length} fields late` +
      (budget ? "; the dashed line is the budget" : "; there is no budget"));
    write("iterations", `${iterations}, ended by: ${stop_reason}`);
    write("iterations-note", `at most ${most} recently; residual ${Number(residual_px).toFixed(3)} px; scale ${scale}`);
  }
  const rates = { in_hz: "images/s", out_hz: "fields/s" };
  const shown = [...Object.entries(rates).map(([key, name]) => [name, live.rates[key]]),
    ...Object.entries(COUNTS).map(([key, name]) => [name, live.counts[key]])];
  shown.forEach(([name, value], i) => write(`count-${i}`, value || "–"));
  byId("worst").dataset.level = live.worst.level;
  write("worst-level", live.worst.level && `Diagnostics of ${live.worst.of}: ${live.worst.level}.`);
  write("worst-message", live.worst.message);
}

async function run() {
  let after = 0, map = byId("which").value;
  for (;;) {
    if (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
    if (map !== byId("which").value) [map, after] = [byId("which").value, 0];
    try {
      const answer = await fetch(`live?after=${after}&pictures=image,flow,${map}`, { signal: AbortSignal.timeout(8000) });
      if (!answer.ok) throw new Error(await answer.text());
      const live = await answer.json();
      after = live.number;
      if (live.state) show(live);
    } catch (error) {
      after = 0;
      document.body.dataset.state = "lost";
      write("headline", "no connection to flow_view; trying again");
      write("cure", "Does it still run? Its log says at which address.");
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

["images/s", "fields/s", ...Object.values(COUNTS)].forEach((name, i) => {
  const box = document.createElement("div"), term = document.createElement("dt"), value = document.createElement("dd");
  term.textContent = name;
  value.id = `count-${i}`;
  box.append(term, value);
  byId("counts").append(box);
});
byId("which").addEventListener("change", () => { byId("map").removeAttribute("src"); write("map-note", ""); });
run();
