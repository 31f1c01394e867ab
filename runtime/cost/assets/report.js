// Draws what stands in the page's data block, sorts tables, switches volume, run and theme. No text is made into markup here.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const color = (name) => `var(--${name})`;
  const GROUPS = ["measured", "compared", "simulated", "published"];
  const STAGES = ["vision", "prefill", "decode", "guidance", "idle"];
  const WASTE = { degenerate: "red", discarded: "prepare", padding: "idle", recompute: "vision", rejected_drafts: "violet" };
  const SERIES = ["measured", "simulated", "compared", "violet", "red", "published"];
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "wye"];

  const round = d3.format(".3~r");
  const short = d3.format(".3~s");
  const usd = (v) => "$" + (v >= 1000 ? short(v).replace("G", "B") : round(v));
  const time = (v) => (v > 0 && v < 1 ? `${round(v * 1e3)} ms` : v < 60 || (v < 120 && v % 60) ? `${round(v)} s` : v < 3600 || (v < 7200 && v % 3600) ? `${round(v / 60)} min` : `${round(v / 3600)} h`);
  // Ticks at 1, 2 and 5 of every decade as far as there is room, and at times that people say.
  const logTicks = ([low, high], most) => {
    const all = (digits) => d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1).flatMap((e) => digits.map((d) => d * 10 ** e)).filter((v) => v >= low && v <= high);
    return [[1, 2, 5], [1, 3], [1]].map(all).find((ticks) => ticks.length <= most) ?? all([1]);
  };
  const timeTicks = (end, most) => {
    const step = [20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 86400, 172800].find((s) => s * most >= end);
    return end <= 100 || !step ? d3.ticks(0, end, most) : d3.range(0, end + 1e-9, step);
  };
  const clip = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
  const within = (values, part, least = 0) => {
    const [low, high] = d3.extent(values);
    const room = Math.max((high - low || Math.abs(high) * 0.1 || 1) * part, (least - (high - low)) / 2);
    return [low - room, high + room];
  };
  const scoreDomain = (scores, part) => within(scores, part, 0.2).map((v) => Math.max(0, Math.min(1, v)));
  const withinLog = (values, part) => {
    const [low, high] = within(values.map(Math.log), part);
    return [Math.exp(Math.min(low, high - 1.2)), Math.exp(high)];
  };
  const theme = { fontSize: "12px", background: "transparent", color: "currentColor" };

  // A horizontal axis and its grid. Given as data, every tick keeps its label, also on a logarithmic scale.
  const axis = (ticks, format, label) => [
    Plot.gridX(ticks, { stroke: color("rule"), strokeOpacity: 1 }),
    Plot.axisX(ticks, { text: format, label }),
  ];

  const filled = (points, x, y) => [["measured", "circle"], ["compared", "square"], ["simulated", "triangle"]].map(([group, symbol]) =>
    Plot.dot(points.filter((p) => p.group === group), { x, y, symbol, r: 5.5, fill: color(group), stroke: color("card"), strokeWidth: 0.8 }));

  // Charts: a function of the width for each element.

  function frontier(width) {
    const points = data.points;
    if (!points.length) return null;
    const steps = (names) => {
      const line = names.map((name) => points.find((p) => p.name === name));
      return line.length ? [...line, { usd: right, score: line.at(-1).score }] : [];
    };
    const scores = points.flatMap((p) => [p.score, p.low ?? p.score, p.high ?? p.score]);
    const xDomain = withinLog([...points, ...data.unrated].map((p) => p.usd), 0.07);
    const yDomain = scoreDomain(scores, 0.06);
    const unrated = data.unrated.map((p) => ({ ...p, score: yDomain[0] }));
    const right = xDomain[1];
    const spans = points.filter((p) => p.low != null && p.high != null);
    const said = (p) => p.note === undefined ? `${p.name}\n${usd(p.usd)} per million pages, no score\n${p.group}` : `${p.name}\n${usd(p.usd)} per million pages, score ${p.score.toFixed(3)}${p.low != null && p.high != null ? ` (${p.low.toFixed(3)} to ${p.high.toFixed(3)})` : ""}\n${p.group === "published" ? "published: " : p.group + ": "}${p.note}`;
    const plot = Plot.plot({
      width, height: Math.max(320, Math.min(520, width * 0.56)), marginLeft: 46, marginRight: 16, marginBottom: 42, style: theme,
      x: { type: "log", domain: xDomain },
      y: { domain: yDomain, label: "benchmark_score", tickFormat: ".2f" },
      marks: [
        ...axis(logTicks(xDomain, width / 52), usd, "dollars per million pages"), Plot.gridY({ stroke: color("rule"), strokeOpacity: 1 }),
        Plot.line(steps(data.publishedFrontier), { x: "usd", y: "score", curve: "step-after", stroke: color("published"), strokeDasharray: "3 4" }),
        Plot.line(steps(data.frontier), { x: "usd", y: "score", curve: "step-after", stroke: color("measured"), strokeWidth: 2 }),
        Plot.ruleX(spans, { x: "usd", y1: "low", y2: "high", stroke: (p) => color(p.group), strokeOpacity: 0.55 }),
        Plot.dot(points.filter((p) => p.group === "published"), { x: "usd", y: "score", symbol: "diamond", r: 5, stroke: color("published"), strokeWidth: 1.8, fill: color("card") }),
        ...filled(unrated, "usd", "score"),
        ...filled(points, "usd", "score"),
        Plot.tip([...points, ...unrated], Plot.pointer({ x: "usd", y: "score", title: said, lineWidth: Math.min(34, width / 14), lineHeight: 1.25, maxRadius: 30 })),
      ],
    });
    const first = new Set(data.frontier);
    const order = [...points, ...unrated].sort((a, b) => first.has(b.name) - first.has(a.name) || GROUPS.indexOf(a.group) - GROUPS.indexOf(b.group) || b.score - a.score);
    plot.whenShown = () => label(plot, order, (p) => p.usd, (p) => p.score, width);
    return plot;
  }

  // Names beside points, each on the first of four sides where it covers no point and no other name; else not at all.
  // Names are measured, so the chart has to be in the page.
  function label(plot, points, x, y, width) {
    const sx = plot.scale("x").apply, sy = plot.scale("y").apply;
    const onLine = new Set([...data.frontier, ...data.publishedFrontier]);
    const at = points.map((p) => ({ name: p.name, said: clip(p.name, width < 560 ? 18 : 30), group: p.group, x: sx(x(p)), y: sy(y(p)) }));
    const taken = at.map((p) => [p.x - 6, p.y - 6, p.x + 6, p.y + 6]);
    for (const names of [data.frontier, data.publishedFrontier]) { // names stand on no line
      const line = names.map((name) => at.find((p) => p.name === name)).filter(Boolean);
      line.forEach((p, i) => {
        const next = line[i + 1];
        taken.push([p.x, p.y - 1, next ? next.x : width, p.y + 1]);
        if (next) taken.push([next.x - 1, next.y, next.x + 1, p.y]);
      });
    }
    const bounds = [48, 4, width - 4, +plot.getAttribute("height") - 40];
    const free = (box) => box[0] >= bounds[0] && box[1] >= bounds[1] && box[2] <= bounds[2] && box[3] <= bounds[3] &&
      !taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1]);
    const layer = d3.select(plot).append("g").attr("font-size", 11).attr("aria-hidden", "true").attr("pointer-events", "none");
    const draw = layer.append("text").text("");
    for (const p of at) {
      draw.text(p.said);
      const w = draw.node().getComputedTextLength();
      const beside = [[p.x + 9, p.y + 4, "start", p.x + 9], [p.x - 9, p.y + 4, "end", p.x - 9 - w]];
      const over = [[p.x, p.y - 10, "middle", p.x - w / 2], [p.x, p.y + 18, "middle", p.x - w / 2]];
      const sides = onLine.has(p.name) ? [...over, ...beside] : [...beside, ...over];
      for (const [tx, ty, anchor, left] of sides) {
        const box = [left - 2, ty - 10, left + w + 2, ty + 3];
        if (!free(box)) continue;
        taken.push(box);
        layer.append("text").attr("x", tx).attr("y", ty).attr("text-anchor", anchor).attr("fill", color(p.group === "published" ? "muted" : "ink"))
          .attr("stroke", color("card")).attr("stroke-width", 4).attr("paint-order", "stroke").text(p.said);
        break;
      }
    }
    draw.remove();
  }

  // One bar a run: its name above it, its sum behind it.
  // A part that is not among `parts` ran beside the others: a thin bar of its own below.
  function bars(all, parts, unit, ticksOf, tick, width) {
    if (!all.length) return null;
    const runs = [...new Set(all.map((r) => r.run))];
    const rows = all.filter((r) => r.part in parts), beside = all.filter((r) => !(r.part in parts));
    const sums = d3.rollup(rows, (v) => d3.sum(v, (r) => r.value), (r) => r.run);
    const most = Math.max(d3.max(sums.values()) ?? 0, d3.max(beside, (r) => r.value) ?? 0) || 1;
    const below = beside.length ? 9 : 5;
    const y = { y: "run" };
    return Plot.plot({
      width, height: runs.length * 42 + 36, marginLeft: 10, marginRight: 84, marginTop: 4, marginBottom: 32, style: theme,
      x: { domain: [0, most] },
      y: { domain: runs, axis: null, padding: 0 },
      marks: [
        ...axis(ticksOf(most, Math.max(3, width / 110)), tick, null),
        Plot.barX(rows, { ...y, x: "value", fill: (r) => color(parts[r.part]), order: Object.keys(parts), insetTop: 20, insetBottom: below, insetRight: 0.7 }),
        Plot.barX(beside, { ...y, x1: 0, x2: "value", fill: (r) => color(r.part), insetTop: 34, insetBottom: 5 }),
        Plot.text(runs, { x: 0, y: (r) => r, text: (r) => clip(r, Math.floor(width / 8)), textAnchor: "start", dy: -12, fill: "currentColor" }),
        Plot.text(runs, { x: (r) => sums.get(r) ?? 0, y: (r) => r, text: (r) => unit(sums.get(r) ?? 0), textAnchor: "start", dx: 6, dy: 8, fill: color("muted") }),
        Plot.tip(rows, Plot.pointer(Plot.stackX({ ...y, x: "value", order: Object.keys(parts), z: "part", title: (r) => `${r.run}\n${r.part.replace("_", " ")}: ${unit(r.value)} (${d3.format(".0%")(r.value / (sums.get(r.run) || 1))})`, lineWidth: 24, lineHeight: 1.25 }))),
      ],
    });
  }

  let line = Math.max(0, data.timelines.findIndex((one) => one.run === data.shown));
  function timeline(width) {
    const one = data.timelines[line];
    if (!one) return null;
    const rows = one.rows.map(([name, arrived, scheduled, first, finished, status], index) => ({ name, arrived, scheduled, first, finished, status, index }));
    const spans = [];
    for (const r of rows) {
      const begin = r.scheduled ?? r.finished, first = r.first ?? begin; // engines from outside do not tell their first token
      const whole = r.status === "degenerate" ? "red" : r.status === "ok" ? null : "ink";
      spans.push({ r, from: r.arrived, to: begin, fill: "idle" });
      if (whole) spans.push({ r, from: begin, to: r.finished, fill: whole });
      else spans.push({ r, from: begin, to: first, fill: "prefill" }, { r, from: first, to: r.finished, fill: "vision" });
    }
    const bad = rows.filter((r) => r.status !== "ok");
    const end = d3.max(rows, (r) => r.finished) || 1;
    const gap = Math.min(0.08, 4 / rows.length);
    const thick = Math.max(0.6, Math.min(8, 480 / rows.length));
    const height = Math.max(140, Math.min(520, rows.length * thick + 40));
    return Plot.plot({
      width, height, marginLeft: 10, marginRight: 18, marginTop: 4, marginBottom: 32, style: theme,
      x: { domain: [0, end] },
      y: { axis: null, domain: [rows.length, 0] },
      marks: [
        ...axis(timeTicks(end, Math.max(3, width / 90)), time, null),
        ...[0, Math.min(0, (height - 36) / rows.length / 2 - 1)].map((inset, bad) => Plot.rect(spans.filter((s) => s.to > s.from && bad === +(s.fill === "red" || s.fill === "ink")), { insetTop: inset, insetBottom: inset, x1: "from", x2: "to", y1: (s) => s.r.index + gap, y2: (s) => s.r.index + 1 - gap, fill: (s) => color(s.fill), fillOpacity: (s) => (s.fill === "idle" ? 0.45 : 1) })),
        Plot.dot(bad, { x: "finished", y: (r) => r.index + 0.5, symbol: "times", r: 3.5, stroke: (r) => color(r.status === "degenerate" ? "red" : "ink"), strokeWidth: 1.6, dx: 7 }),
        Plot.tip(rows, Plot.pointerY({ x: (r) => ((r.scheduled ?? r.arrived) + r.finished) / 2, y: (r) => r.index + 0.5, title: (r) => `${r.name}\n${r.status}: waited ${time((r.scheduled ?? r.finished) - r.arrived)}, ${r.first == null ? "" : `first token ${time(r.first - (r.scheduled ?? r.arrived))} later, `}took ${time(r.finished - (r.scheduled ?? r.arrived))}`, lineWidth: 24, lineHeight: 1.25 })),
      ],
    });
  }

  const swept = data.sweeps.map((s, i) => s.points.map((p) => ({ ...p, label: s.label, key: s.key, color: color(SERIES[i % SERIES.length]), symbol: SYMBOLS[i % SYMBOLS.length] })));
  const lines = (key, x, more) => swept.filter((s) => s.some((p) => p[key] != null)).map((s) => Plot.line(s.filter((p) => p[key] != null), { x, y: key, stroke: s[0].color, ...more }));
  const dots = (key, x) => swept.map((s) => Plot.dot(s.filter((p) => p[key] != null), { x, y: key, fill: s[0].color, symbol: s[0].symbol, r: 4.5, stroke: color("card"), strokeWidth: 0.8 }));
  const tip = (key, x, width) => Plot.tip(swept.flat().filter((p) => p[key] != null), Plot.pointer({ x, y: key, lineWidth: Math.min(26, width / 15), lineHeight: 1.25, title: (p) => `${p.label}, ${p.key} ${round(p.value)}\n${round(p.rate)} pages/s${p.p95 == null ? "" : `, page p95 ${time(p.p95)}`}${p.usd == null ? "" : `, ${usd(p.usd)} per million`}` }));

  function latency(width) {
    const points = swept.flat().filter((p) => p.p95 != null);
    if (!points.length) return null;
    const slowest = (d3.max(points, (p) => p.p95) || 1) * 1.08;
    const rates = points.map((p) => p.rate), most = d3.max(rates) * 1.08;
    const log = d3.min(rates) > 0 && most / d3.min(rates) >= 8; // a small machine beside a large one
    return Plot.plot({
      width, height: Math.max(260, Math.min(340, width * 0.7)), marginLeft: 54, marginRight: 24, marginTop: 26, marginBottom: 40, style: theme,
      x: log ? { type: "log", domain: withinLog(rates, 0.08) } : { domain: [0, most] },
      y: { label: "time of a page", tickFormat: time, domain: [0, slowest], ticks: timeTicks(slowest, 6) },
      marks: [
        ...axis(log ? logTicks(withinLog(rates, 0.08), width / 52) : d3.ticks(0, most, Math.max(3, width / 90)), round, "pages/s"), Plot.gridY({ ticks: timeTicks(slowest, 6), stroke: color("rule"), strokeOpacity: 1 }),
        ...lines("p50", "rate", { strokeDasharray: "1.5 4", strokeWidth: 1.5 }), ...lines("p95", "rate", { strokeWidth: 2 }), ...dots("p95", "rate"),
        Plot.text(points, { x: "rate", y: "p95", text: (p) => round(p.value), dy: -11, fontSize: 11, fill: color("muted"), stroke: color("card"), strokeWidth: 3 }),
        tip("p95", "rate", width),
      ],
    });
  }

  function cost(width) {
    const points = swept.flat().filter((p) => p.usd != null);
    if (!points.length) return null;
    const values = points.map((p) => p.value);
    const log = d3.min(values) > 0 && d3.max(values) / d3.min(values) >= 8;
    const ticks = [...new Set(values)].sort(d3.ascending);
    return Plot.plot({
      width, height: Math.max(260, Math.min(340, width * 0.7)), marginLeft: 54, marginRight: 24, marginTop: 26, marginBottom: 40, style: theme,
      x: { type: log ? "log" : "linear", domain: log ? withinLog(values, 0.05) : within(values, 0.05) },
      y: { label: "dollars per million pages", tickFormat: usd, domain: [0, d3.max(points, (p) => p.usd) * 1.08], ticks: 5 },
      marks: [
        ...axis(ticks.length <= width / 34 ? ticks : d3.ticks(...d3.extent(values), 5), round, [...new Set(points.map((p) => p.key))].slice(0, 2).join(", ")),
        Plot.gridY({ ticks: 5, stroke: color("rule"), strokeOpacity: 1 }),
        ...lines("usd", "value", { strokeWidth: 2 }), ...dots("usd", "value"), tip("usd", "value", width),
      ],
    });
  }

  function alignment(width) {
    const points = data.alignment;
    if (!points.length) return null;
    const plot = Plot.plot({
      width, height: Math.max(260, Math.min(380, width * 0.45)), marginLeft: 46, marginRight: 16, marginBottom: 42, style: theme,
      x: { label: "bits per character", domain: [0, d3.max(points, (p) => Math.max(p.bits, p.high ?? 0)) * 1.1 || 1] },
      y: { label: "benchmark_score", tickFormat: ".2f", domain: scoreDomain(points.map((p) => p.score), 0.12) },
      marks: [
        Plot.gridX({ stroke: color("rule"), strokeOpacity: 1 }), Plot.gridY({ stroke: color("rule"), strokeOpacity: 1 }),
        Plot.ruleY(points.filter((p) => p.low != null && p.high != null), { y: "score", x1: "low", x2: "high", stroke: (p) => color(p.group), strokeOpacity: 0.55 }),
        ...filled(points, "bits", "score"),
        Plot.tip(points, Plot.pointer({ x: "bits", y: "score", title: (p) => `${p.name}\n${round(p.bits)} bits per character, score ${p.score.toFixed(3)}`, lineWidth: 24, lineHeight: 1.25 })),
      ],
    });
    plot.whenShown = () => label(plot, points, (p) => p.bits, (p) => p.score, width);
    return plot;
  }

  const charts = {
    "chart-frontier": frontier,
    "chart-stages": (width) => bars(data.stages, Object.fromEntries(STAGES.map((s) => [s, s])), time, timeTicks, time, width),
    "chart-timeline": timeline,
    "chart-latency": latency,
    "chart-cost": cost,
    "chart-waste": (width) => bars(data.waste, WASTE, (v) => `${round(v)}${v === 1 ? " token" : " tokens"}`, (end, most) => d3.ticks(0, end, most), round, width),
    "chart-alignment": alignment,
  };

  function draw(id, width) {
    const host = byId(id);
    if (!host) return;
    width = Math.round(width || host.clientWidth);
    if (width < 40) return;
    host.dataset.width = width;
    host.replaceChildren();
    const chart = charts[id](width);
    if (!chart) {
      host.textContent = "Nothing to draw.";
      return;
    }
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", host.dataset.label + ". The numbers stand in a table.");
    host.append(chart);
    chart.whenShown?.();
  }
  const drawAll = (width) => Object.keys(charts).forEach((id) => draw(id, width));

  // Tables: a button in every column's head; what is missing stays last either way.

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const value = (row, column) => {
      const cell = row.cells[column];
      const raw = cell.dataset.v ?? cell.textContent.trim();
      return raw === "" || raw === "–" ? null : Number.isNaN(+raw) ? raw : +raw;
    };
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [row, value(row, column)]);
        rows.sort(([, a], [, b]) => (a === null || b === null ? (a === null) - (b === null) : compare(a, b) * (down ? -1 : 1)));
        body.append(...rows.map(([row]) => row));
      });
    });
  }

  // Switches.

  const volume = byId("volume");
  const verdicts = [...document.querySelectorAll(".verdict")];
  function showVolume() {
    verdicts.forEach((verdict, i) => (verdict.hidden = i !== +volume.value));
    const said = verdicts[+volume.value].dataset.said;
    byId("volume-said").textContent = said;
    volume.setAttribute("aria-valuetext", `${said} pages a month`);
  }

  function showTimeline() {
    document.querySelectorAll(".timeline-said").forEach((said) => (said.hidden = +said.dataset.index !== line));
    draw("chart-timeline");
  }

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const nameTheme = () => (byId("theme-name").textContent = isDark() ? "Light" : "Dark");
  const remember = (theme) => {
    try {
      if (theme) localStorage.setItem("pagemill-theme", theme);
      return localStorage.getItem("pagemill-theme");
    } catch {
      return null; // storage may be off, or the page sandboxed
    }
  };

  const stored = remember();
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
  nameTheme();
  prefersDark.addEventListener("change", nameTheme);
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    nameTheme();
  });
  volume.addEventListener("input", showVolume);
  showVolume();
  if (byId("timeline-run")) byId("timeline-run").value = line;
  byId("timeline-run")?.addEventListener("change", (event) => {
    line = +event.target.value;
    showTimeline();
  });
  const legend = byId("legend-sweeps");
  swept.forEach((s) => {
    const item = document.createElement("li");
    const mark = document.createElement("i");
    mark.style.background = s[0].color;
    item.append(mark, `${s[0].label}: ${s[0].key}`);
    legend?.append(item);
  });
  document.querySelectorAll("table.sortable").forEach(sortable);

  root.classList.remove("no-script");
  drawAll();
  showTimeline();
  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => drawAll());
  });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open]):not(.licences)")];
    closed.forEach((details) => (details.open = true));
    drawAll(680);
    ["chart-latency", "chart-cost"].forEach((id) => draw(id, 325));
  });
  addEventListener("afterprint", () => {
    closed.forEach((details) => (details.open = false));
    drawAll();
  });
})();
