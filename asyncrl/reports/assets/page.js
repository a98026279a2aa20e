"use strict";
// Draws the model of a page (asyncrl/reports/page.py) and draws again what has changed of it.
// Texts are set as texts: nothing of the model is ever read as HTML.

const page = (() => {
  const PALETTES = {
    light: ["#2563b8", "#d2601a", "#1f8a57", "#8a4bb0", "#b8357a", "#0d8796", "#9a7400", "#5d6675"],
    dark: ["#74a9ff", "#ff9d5c", "#5fd09a", "#c79bf0", "#ff8fc4", "#56cfe0", "#e3c15a", "#a6b0c0"],
  };
  const RAMPS = { light: ["#d5e4fa", "#2563b8", "#151d4a"], dark: ["#24364f", "#5f9bf5", "#ffe3b0"] };
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const POLL_MS = 2000;
  const LONGEST_TICK = 20; // characters of a name on an axis; the pointer shows it whole
  const drawers = {};
  const blocks = new Map(); // id -> {block, text, node, redraw}

  // ---- Elements

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  // Words in `backticks` become code.
  function words(text) {
    return String(text).split("`").map((part, place) => (place % 2 ? el("code", {}, part) : part));
  }

  function head(block) {
    const about = block.about ? [el("p", { class: "about" }, ...words(block.about))] : [];
    return [el("h3", {}, block.title), ...about];
  }

  // ---- Colours

  const dark = () => document.documentElement.dataset.theme === "dark";
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function palette(number) {
    const colors = PALETTES[dark() ? "dark" : "light"];
    return colors[number % colors.length];
  }

  function channels(color) {
    return [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  }

  function shade(share) {
    const ramp = RAMPS[dark() ? "dark" : "light"];
    const [from, to, part] = share < 0.5 ? [ramp[0], ramp[1], share * 2] : [ramp[1], ramp[2], share * 2 - 1];
    const ends = [channels(from), channels(to)];
    const mixed = ends[0].map((value, i) => Math.round(value + (ends[1][i] - value) * part));
    return "#" + mixed.map((value) => value.toString(16).padStart(2, "0")).join("");
  }

  const colorOf = (series) => (series.shade === undefined ? palette(series.color) : shade(series.shade));
  const pale = (color, alpha) => `rgba(${channels(color).join(",")},${alpha})`;

  // ---- Charts

  // Plotly reads a little HTML in the texts it is given; here they are texts.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, "<br>");

  // Names of runs often begin alike, so their ends are kept too.
  const shortened = (text) => (text.length <= LONGEST_TICK ? text : `${text.slice(0, LONGEST_TICK / 2 - 1)}…${text.slice(-LONGEST_TICK / 2)}`);

  function axis(described, names) {
    const type = described.names ? "category" : described.log ? "log" : "linear";
    const bound = (value) => (value === null ? null : described.log ? Math.log10(value) : value);
    const made = {
      title: { text: plain(described.title), standoff: 8, font: { size: 12, color: variable("--quiet") } },
      type, automargin: true, gridcolor: variable("--grid"), linecolor: variable("--line"), zeroline: false,
      tickfont: { size: 11, color: variable("--quiet") }, nticks: described.names ? undefined : 7, ticks: "",
    };
    if (described.names) {
      made.tickvals = names.map(plain);
      made.ticktext = names.map((name) => plain(shortened(name)));
    }
    // One end given and the other by the data: of `range`, plotly forgets such an end when it makes room for the ticks.
    if (described.low !== null && described.high !== null) made.range = [bound(described.low), bound(described.high)];
    else made.autorangeoptions = { minallowed: bound(described.low), maxallowed: bound(described.high) };
    if (described.share) made.tickformat = ".3~%";
    else if (described.log) { made.nticks = 5; made.tickformat = "~g"; } // else 0.2 and 20 are both a "2"
    else if (!described.names) { made.tickformat = ""; made.exponentformat = "SI"; made.minexponent = 5; made.separatethousands = true; }
    return made;
  }

  function traces(block, hidden) {
    const made = [];
    for (const series of block.series) {
      const color = colorOf(series);
      const common = {
        name: plain(series.name), legendgroup: plain(series.name), visible: !hidden.has(series.name),
        x: block.x.names ? series.x.map(plain) : series.x,
      };
      const value = block.y.share ? "%{y:.1%}" : "%{y:.4~g}";
      const label = series.labels ? "%{customdata}<br>" : "";
      const about = {
        customdata: series.labels && series.labels.map(plain), text: series.texts && series.texts.map(plain), hoverinfo: series.faint ? "skip" : undefined,
        hovertemplate: series.faint ? undefined : `${label}${value}<extra>%{fullData.name}</extra>`,
      };
      if (series.kind === "bars") {
        made.push({ ...common, ...about, type: "bar", y: series.y, textposition: "none", marker: { color, line: { width: 0 } } });
        continue;
      }
      const points = series.kind.includes("points");
      const lines = series.kind !== "points";
      if (series.low && lines && !points) made.push(...band(series, common, color));
      made.push({
        ...common, ...about, type: "scatter", y: series.y, mode: [lines && "lines", points && "markers", series.texts && "text"].filter(Boolean).join("+"),
        line: {
          color: series.faint ? pale(color, 0.35) : color, width: series.faint ? 1 : 2, dash: DASHES[series.dash || 0],
          shape: series.kind === "steps" ? "hvh" : "linear",
        },
        marker: { color, size: series.big ? 16 : 7, symbol: series.big ? "star" : "circle" }, connectgaps: false,
        textposition: series.big ? "bottom right" : "top left", textfont: { size: 11, color: variable("--quiet") }, cliponaxis: false,
        ...(series.low && points ? { error_y: whiskers(series, color) } : {}),
      });
    }
    return made;
  }

  function band(series, common, color) {
    const edge = { ...common, type: "scatter", mode: "lines", hoverinfo: "skip", line: { width: 0, color: pale(color, 0) } };
    return [{ ...edge, y: series.low }, { ...edge, y: series.high, fill: "tonexty", fillcolor: pale(color, 0.16) }];
  }

  function whiskers(series, color) {
    const away = (ends, sign) => series.y.map((y, i) => (y === null || ends[i] === null ? 0 : sign * (ends[i] - y)));
    return { type: "data", symmetric: false, array: away(series.high, 1), arrayminus: away(series.low, -1), color, thickness: 1.5, width: 4 };
  }

  const names = (block, along) => [...new Set(block.series.flatMap((series) => series[along]))];

  function layout(block) {
    const bars = block.series.some((series) => series.kind === "bars");
    const many = bars && Math.max(...block.series.map((series) => series.x.length)) > 40;
    return {
      margin: { l: 8, r: 12, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", color: variable("--ink") }, showlegend: false, uirevision: "kept",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--quiet"), activecolor: variable("--ink") },
      hovermode: block.series.some((series) => series.kind === "points") ? "closest" : "x unified",
      hoverlabel: { bgcolor: variable("--card"), bordercolor: variable("--line"), font: { color: variable("--ink"), size: 12 } },
      barmode: block.stacked ? "stack" : "group", bargap: many ? 0 : 0.2,
      xaxis: axis(block.x, names(block, "x")), yaxis: { ...axis(block.y, names(block, "y")), rangemode: bars ? "tozero" : "normal" },
    };
  }

  const CONFIG = {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", // a chart is nobody else's
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, // elsewhere it would lie on the chart for good
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "toggleSpikelines"],
  };

  function swatch(series) {
    const color = colorOf(series);
    const shape = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    shape.setAttribute("width", 18); shape.setAttribute("height", 10); shape.setAttribute("aria-hidden", "true");
    const line = document.createElementNS("http://www.w3.org/2000/svg", series.kind === "bars" ? "rect" : "line");
    const thin = { x1: 0, x2: 18, y1: 5, y2: 5, stroke: color, "stroke-width": 3, "stroke-dasharray": ["", "5 3", "2 3", "6 2 2 2"][series.dash || 0] };
    const set = series.kind === "bars" ? { width: 12, height: 10, x: 3, rx: 2, fill: color } : thin;
    for (const [name, value] of Object.entries(set)) line.setAttribute(name, value);
    shape.append(line);
    return shape;
  }

  function legend(block, hidden, redraw) {
    const first = new Map();
    for (const series of block.series) if (!series.faint && !first.has(series.name)) first.set(series.name, series);
    if (first.size < 2) return [];
    const entries = [...first].map(([name, series]) => el("button", {
      type: "button", "aria-pressed": String(!hidden.has(name)), title: "show or hide",
      onclick: () => { if (!hidden.delete(name)) hidden.add(name); redraw(); },
    }, swatch(series), el("span", {}, name)));
    return [el("div", { class: "legend" }, ...entries)];
  }

  drawers.chart = (block, kept) => {
    const hidden = kept?.hidden || new Set();
    const plot = kept?.plot || el("div", { class: "plot", role: "img", "aria-label": block.title });
    const node = kept?.node || el("figure", { class: "block chart" });
    const empty = block.series.length ? [] : [el("p", { class: "about" }, "Nothing to show yet.")];
    const redraw = () => {
      const above = [...head(block), ...legend(block, hidden, redraw), ...empty];
      while (node.firstChild && node.firstChild !== plot) node.firstChild.remove();
      if (!plot.parentNode) node.append(plot);
      plot.before(...above);
      plot.hidden = !block.series.length;
      if (block.series.length) draw(plot, () => Plotly.react(plot, traces(block, hidden), layout(block), CONFIG));
    };
    return { node, plot, hidden, redraw };
  };

  // A long page is drawn from its top, and what is far below when the reader comes near, or prints.
  const undrawn = new Map();
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) drawNow(entry.target);
  }, { rootMargin: "900px" });

  function draw(plot, now) {
    if (plot.data) { now(); return; }
    undrawn.set(plot, now);
    near.observe(plot);
  }

  function drawNow(plot) {
    near.unobserve(plot);
    const now = undrawn.get(plot);
    undrawn.delete(plot);
    if (now) now();
  }

  const drawAll = () => { for (const plot of [...undrawn.keys()]) drawNow(plot); };

  // ---- Tables, notes, tiles

  function cell(value) {
    if (value === null) return "–";
    if (typeof value !== "number") return value;
    return value.toLocaleString("en-US", Number.isInteger(value) ? {} : { maximumSignificantDigits: 4 });
  }

  const before = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };

  const textual = (text) => (text.length <= 24 ? "short" : text.length > 70 ? "prose" : "");

  drawers.table = (block, kept) => {
    const state = kept?.state || { column: null, down: false };
    const node = kept?.node || el("div", { class: "block table" });
    const redraw = () => {
      const order = block.rows.map((row, place) => ({ row, place }));
      if (state.column !== null) order.sort((a, b) => (state.down ? -1 : 1) * before(a.row[state.column], b.row[state.column]));
      const sort = (place) => { state.down = state.column === place && !state.down; state.column = place; redraw(); };
      const heads = block.columns.map((column, place) => el(
        "th", { class: column.number ? "number" : "", "aria-sort": state.column === place ? (state.down ? "descending" : "ascending") : undefined },
        el("button", { type: "button", onclick: () => sort(place) }, column.title, state.column === place ? (state.down ? " ↓" : " ↑") : ""),
        ...(column.unit ? [el("span", { class: "unit" }, ` ${column.unit}`)] : []),
      ));
      const rows = order.map(({ row, place }) => el("tr", {}, ...row.map((value, at) => el(
        "td", { class: block.columns[at].number ? "number" : textual(String(value)) },
        ...(at === 0 && block.colors ? [mark(block.colors[place])] : []), ...(typeof value === "string" ? words(value) : [cell(value)]),
      ))));
      const shown = el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
      node.replaceChildren(...head(block), el("div", { class: "scroll", tabindex: 0 }, shown));
    };
    return { node, state, redraw };
  };

  function mark(number) {
    const made = el("span", { class: "mark" });
    made.style.background = palette(number);
    return made;
  }

  drawers.note = (block, kept) => {
    const node = kept?.node || el("p", {});
    const redraw = () => { node.className = `block note ${block.tone}`; node.replaceChildren(...words(block.text)); };
    return { node, redraw };
  };

  drawers.tiles = (block, kept) => {
    const node = kept?.node || el("div", { class: "block tiles" });
    const redraw = () => node.replaceChildren(...block.tiles.map((tile) => el(
      "div", { class: "tile" }, el("div", { class: "label" }, tile.label), el("div", { class: `value ${tile.tone}` }, tile.value),
      el("div", { class: "about" }, ...words(tile.about)),
    )));
    return { node, redraw };
  };

  // ---- The page

  function frame() {
    const theme = el("button", { id: "theme", type: "button", onclick: () => setTheme(dark() ? "light" : "dark", true) });
    const top = el("div", {}, el("h1", {}), el("span", { id: "state", role: "status" }), theme);
    document.body.prepend(el("header", {}, top, el("nav", { "aria-label": "Sections" })), el("main", {}, el("p", { id: "subtitle" })));
  }

  // Blocks are known by their ids: one that is as it was is left alone, one that has changed keeps its zoom, order and
  // what is open in it.
  function show(model) {
    document.title = model.title;
    document.querySelector("h1").textContent = model.title;
    const subtitle = document.getElementById("subtitle");
    subtitle.replaceChildren(...words(model.subtitle));
    subtitle.hidden = !model.subtitle;
    document.querySelector("nav").replaceChildren(...model.sections.map((s) => el("a", { href: `#${s.id}` }, s.title)));
    const main = document.querySelector("main");
    const seen = new Set();
    model.sections.forEach((section, place) => {
      const node = document.getElementById(section.id) || el("section", { id: section.id }, el("h2", {}), el("p", {}), el("div", { class: "blocks" }));
      node.querySelector("h2").textContent = section.title;
      const about = node.querySelector(":scope > p");
      about.replaceChildren(...words(section.about));
      about.hidden = !section.about;
      settle(main, node, place + 1);
      section.blocks.forEach((block, at) => {
        seen.add(block.id);
        settle(node.querySelector(".blocks"), showBlock(block), at);
      });
    });
    for (const [id, { node }] of blocks) if (!seen.has(id)) { node.remove(); blocks.delete(id); }
    const sections = new Set(model.sections.map((section) => section.id));
    for (const node of main.querySelectorAll(":scope > section")) if (!sections.has(node.id)) node.remove();
  }

  function settle(parent, node, place) {
    if (parent.children[place] !== node) parent.insertBefore(node, parent.children[place] || null);
  }

  function showBlock(block) {
    const text = JSON.stringify(block);
    const kept = blocks.get(block.id);
    if (kept && kept.text === text) return kept.node;
    const drawn = drawers[block.kind](block, kept && kept.kind === block.kind ? kept : undefined);
    blocks.set(block.id, { ...drawn, text, kind: block.kind });
    drawn.node.id = `block-${block.id}`;
    drawn.redraw();
    return drawn.node;
  }

  function setTheme(name, chosen) {
    document.documentElement.dataset.theme = name;
    const button = document.getElementById("theme");
    button.textContent = name === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} colours`);
    if (chosen) try { localStorage.setItem("asyncrl-theme", name); } catch { /* a page of a file may have no storage */ }
    for (const { redraw } of blocks.values()) redraw();
  }

  function theme() {
    let kept = null;
    try { kept = localStorage.getItem("asyncrl-theme"); } catch { /* as above */ }
    const system = matchMedia("(prefers-color-scheme: dark)");
    system.addEventListener("change", () => { if (!kept) setTheme(system.matches ? "dark" : "light", false); });
    setTheme(kept || (system.matches ? "dark" : "light"), false);
  }

  async function follow() {
    const state = document.getElementById("state");
    let tag = "";
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      try {
        const answer = await fetch("data", { headers: tag ? { "If-None-Match": tag } : {} });
        if (answer.status === 304) continue;
        if (!answer.ok) throw new Error(await answer.text());
        tag = answer.headers.get("ETag") || "";
        const model = await answer.json();
        show(model);
        state.textContent = model.state;
        if (model.over) return;
      } catch (error) {
        state.textContent = error instanceof TypeError ? "the report is no longer served" : String(error.message);
      }
    }
  }

  function start() {
    const model = JSON.parse(document.getElementById("model").textContent);
    frame();
    theme();
    show(model);
    addEventListener("beforeprint", drawAll);
    document.getElementById("state").textContent = model.state || "";
    if (model.live && !model.over) follow();
  }

  addEventListener("DOMContentLoaded", start);
  return { drawers, el, head, words, cell, before, drawAll };
})();
