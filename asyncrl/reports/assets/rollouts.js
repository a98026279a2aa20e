"use strict";
// The browser of rollouts (asyncrl/reports/browser.py): a list to filter and sort, and the text of the one chosen.

page.drawers.rollouts = (block, kept) => {
  const { el, head, words, cell, before } = page;
  const COLUMNS = [
    ["run", "run"], ["step", "step"], ["row", "row"], ["reward", "reward"], ["advantage", "advantage"], ["tokens", "tokens"],
    ["turns", "turns"], ["seconds", "s"], ["staleness", "stale"],
  ].filter(([key]) => key !== "run" || block.several);
  const MOST_ROWS = 400;
  // What is pressed and typed goes on to what was made first: all of them look here for what there is now.
  const state = kept?.state || { sort: "step", down: true, kind: "all", contains: "", open: null, shown: [] };
  state.rollouts = block.rollouts;
  const node = kept?.node || el("div", { class: "block rollouts" });

  const text = (rollout) => rollout.samples.flatMap((sample) => sample.text.map((stretch) => stretch.text)).join("\n").toLowerCase();
  const kinds = {
    all: () => true, training: (r) => !r.evaluation, evaluation: (r) => r.evaluation, "went wrong": (r) => r.wrong,
    "above 0": (r) => r.reward > 0, "0 and below": (r) => r.reward !== null && r.reward <= 0,
  };

  // ---- The list

  function choose() {
    const wanted = state.contains.toLowerCase();
    const shown = state.rollouts.filter((rollout) => kinds[state.kind](rollout) && (!wanted || text(rollout).includes(wanted)));
    shown.sort((a, b) => (state.down ? -1 : 1) * before(a[state.sort], b[state.sort]));
    state.shown = shown.slice(0, MOST_ROWS);
  }

  function value(rollout, key) {
    if (key === "step") return rollout.evaluation ? `eval ${rollout.step}` : String(rollout.step);
    return key === "row" ? String(rollout.row) : cell(rollout[key]);
  }

  function sortBy(key) {
    state.down = state.sort === key ? !state.down : key !== "run" && key !== "row";
    state.sort = key;
    list();
  }

  function list() {
    choose();
    const heads = COLUMNS.map(([key, title]) => el(
      "th", { class: key === "run" ? "" : "number", "aria-sort": state.sort === key ? (state.down ? "descending" : "ascending") : undefined },
      el("button", { type: "button", onclick: () => sortBy(key) }, title, state.sort === key ? (state.down ? " ↓" : " ↑") : ""),
    ));
    const rows = state.shown.map((rollout) => el(
      "tr", { "data-key": rollout.key, "aria-selected": String(rollout.key === state.open), onclick: () => open(rollout.key) },
      ...COLUMNS.map(([key]) => el("td", { class: key === "run" ? "" : "number" }, value(rollout, key))),
    ));
    const table = el("table", { "aria-label": "Rollouts" }, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
    const scroll = node.querySelector(".scroll");
    const top = scroll.scrollTop;
    scroll.replaceChildren(table);
    scroll.scrollTop = top;
    node.querySelector(".count").textContent = `${state.shown.length} of ${state.rollouts.length}`;
    if (!state.open && state.shown.length) open(state.shown[0].key);
  }

  function move(by) {
    const shown = state.shown;
    if (!shown.length) return;
    const at = shown.findIndex((rollout) => rollout.key === state.open);
    open(shown[at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + by))].key);
    const row = node.querySelector('tr[aria-selected="true"]');
    const scroll = node.querySelector(".scroll");
    const headed = row.closest("table").tHead.offsetHeight;
    if (row.offsetTop - headed < scroll.scrollTop) scroll.scrollTop = row.offsetTop - headed;
    const below = row.offsetTop + row.offsetHeight - scroll.clientHeight;
    if (below > scroll.scrollTop) scroll.scrollTop = below;
  }

  function keyed(event) {
    const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    move(by);
  }

  // ---- One rollout

  function open(key) {
    state.open = key;
    for (const row of node.querySelectorAll("tr[data-key]")) row.setAttribute("aria-selected", String(row.dataset.key === key));
    const rollout = state.rollouts.find((one) => one.key === key);
    node.querySelector(".reader").replaceChildren(...(rollout ? read(rollout) : []));
  }

  function read(rollout) {
    const where = rollout.evaluation ? `Evaluation at step ${rollout.step}, row ${rollout.row}`
      : `Step ${rollout.step}, row ${rollout.row} of epoch ${rollout.epoch}, rollout ${rollout.member + 1}`;
    const facts = [["reward", cell(rollout.reward)], ["advantage", cell(rollout.advantage)], ["took", rollout.seconds === null ? "–" : `${cell(rollout.seconds)} s`],
      ["staleness", rollout.staleness === null ? "–" : `${rollout.staleness} step${rollout.staleness === 1 ? "" : "s"}`]];
    const parts = [el("h4", {}, block.several ? `${rollout.run}: ` : "", where), pairs(facts.filter(([, value]) => value !== "–"))];
    rollout.samples.forEach((sample, place) => {
      if (rollout.samples.length > 1) parts.push(el("h5", {}, `Segment ${place + 1} of ${rollout.samples.length}`));
      parts.push(pairs(sample.facts), ...sample.calls.map(called), el("div", { class: "said" }, ...sample.text.map(stretch)));
    });
    return parts;
  }

  const pairs = (facts) => el("dl", {}, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));

  function called(call) {
    const took = call.seconds === null ? "" : ` ${cell(call.seconds)} s`;
    return el("p", { class: `call${call.failed ? " failed" : ""}` }, el("code", {}, call.call), " → ", el("code", {}, call.result), el("small", {}, took));
  }

  function stretch(one) {
    const trained = one.role === "policy";
    const about = one.about ? [el("small", { class: "turn" }, one.about)] : [];
    return el("div", { class: trained ? "stretch trained" : "stretch", title: one.about || undefined },
      el("span", { class: "role" }, trained ? "policy" : one.role), el("pre", {}, one.text.replace(/^\n+|\n+$/g, "")), ...about);
  }

  // ---- All

  const redraw = () => {
    if (!state.rollouts.length) { node.replaceChildren(...head(block)); return; }
    if (!node.querySelector(".browser")) {
      const contains = el("input", { type: "search", placeholder: "contains …", "aria-label": "Text that the rollout contains", oninput: (event) => { state.contains = event.target.value; list(); } });
      const kind = el("select", { "aria-label": "Which rollouts", onchange: (event) => { state.kind = event.target.value; list(); } },
        ...Object.keys(kinds).map((name) => el("option", { value: name }, name === "above 0" || name === "0 and below" ? `reward ${name}` : name)));
      contains.value = state.contains;
      kind.value = state.kind;
      const bar = el("div", { class: "bar" }, kind, contains, el("span", { class: "count", role: "status" }), el("span", { class: "hint" }, "↑ ↓ to move"));
      const panes = el("div", { class: "browser", onkeydown: keyed }, el("div", { class: "scroll", tabindex: 0, "aria-label": "List of rollouts" }), el("div", { class: "reader", tabindex: -1 }));
      node.replaceChildren(el("div", { class: "top" }), bar, panes);
    }
    node.querySelector(".top").replaceChildren(...head(block));
    list();
    if (!node.querySelector(".reader").childElementCount) open(state.open); // else what is being read stays as it is
  };

  return { node, state, redraw };
};
