"use strict";
// One task at a time: runs -> those that the filters leave -> panels and lines -> traces; tables follow the same filters.
const data = JSON.parse(document.getElementById("data").textContent);
const names = data.dims.map((dim) => dim.key);
const at = (key) => names.indexOf(key);
const TASK = at("task"), SPLIT = at("split"), CLIENTS = at("clients"), SEED = at("seed");
const GREY = { color: "#777777", dash: "solid" }, BLACK = { color: "#000000", dash: "longdash" };
const state = { task: 0, metric: data.tasks[0].metric, chosen: {}, seeds: false, tuned: false, hidden: new Set(), sort: {} };
let values; // of all runs and metrics, one after the other

const byId = (id) => document.getElementById(id);
const unique = (found) => [...new Set(found)];
const task = () => data.tasks[state.task];

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

function node(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children); // texts stay texts
  return made;
}

// what Plotly shows as it is: it knows some HTML, and placeholders of its own
function drawn(text) {
  const escaped = String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
  return escaped.replaceAll("%{", "%&#123;");
}

function shownValue(dim, index) {
  const { key, label, values: all } = data.dims[dim];
  const value = all[index];
  if (key === "clients") return value === "1" ? "one client" : `${value} clients`;
  return ["task", "model", "split"].includes(key) ? value : `${label} ${value}`;
}

function named(dims, run) {
  const known = dims.filter((dim) => run.d[dim] >= 0 && data.dims[dim].values[run.d[dim]] !== "–");
  return known.map((dim) => shownValue(dim, run.d[dim])).join(", ");
}

// ------------------------------------------------------------------------------------------------ which runs

function fits(run, free = []) {
  return Object.entries(state.chosen).every(([dim, value]) => run.d[dim] === value || run.d[dim] < 0 || free.includes(Number(dim)));
}

const ofTask = () => data.runs.filter((run) => run.d[TASK] === state.task);
const isCurve = (run) => !run.pooled && !(task().baseline && data.dims[CLIENTS].values[run.d[CLIENTS]] === "1");

function series(run, metric) {
  const start = run.at + metric * run.n;
  return values.subarray(start, start + run.n);
}

function lastMean(runs, metric) {
  const lasts = runs.map((run) => series(run, metric).findLast((value) => !Number.isNaN(value))).filter((value) => value !== undefined);
  return lasts.length ? lasts.reduce((sum, value) => sum + value, 0) / lasts.length : NaN;
}

function grouped(runs, dims) {
  const found = new Map();
  for (const run of runs) {
    const key = dims.map((dim) => run.d[dim]).join();
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(run);
  }
  return found;
}

// of runs that differ in some settings those that come to the best score: of those with the most seeds, over the seeds in common
function best(runs, dims) {
  const { metric, mode } = task();
  const sign = mode === "min" ? -1 : 1;
  const groups = [...grouped(runs, dims).values()];
  const known = groups.map((group) => group.filter((run) => !Number.isNaN(lastMean([run], metric))));
  const seeds = known.map((group) => new Set(group.map((run) => run.d[SEED])));
  const most = Math.max(0, ...seeds.map((one) => one.size));
  if (!most) return groups[0] || [];
  const places = groups.map((_, place) => place).filter((place) => seeds[place].size === most);
  const common = [...seeds[places[0]]].filter((seed) => places.every((place) => seeds[place].has(seed)));
  const compared = (run) => !common.length || common.includes(run.d[SEED]);
  const worth = (place) => sign * lastMean(known[place].filter(compared), metric);
  return groups[places.reduce((one, other) => (worth(other) > worth(one) ? other : one))];
}

function tuned(runs) {
  const others = names.map((_, dim) => dim).filter((dim) => dim !== SEED && !data.rates.includes(dim));
  return [...grouped(runs, others).values()].flatMap((group) => best(group, data.rates));
}

function chosenCurves() {
  const found = ofTask().filter((run) => isCurve(run) && fits(run));
  return state.tuned ? tuned(found) : found;
}

// ------------------------------------------------------------------------------------------------ panels and lines

function compareKeys(one, other) {
  const [first, second] = [one, other].map((key) => key.split(",").map(Number));
  const place = first.findIndex((value, index) => value !== second[index]);
  return place < 0 ? 0 : first[place] - second[place];
}

function styles() {
  const keys = [...grouped(ofTask().filter(isCurve), task().lines).keys()].sort(compareKeys);
  const firsts = unique(keys.map((key) => key.split(",")[0])), rests = unique(keys.map((key) => key.split(",").slice(1).join()));
  return new Map(keys.map((key, index) => {
    const [first, ...rest] = key.split(",");
    const colour = rests.length === 1 ? index : firsts.indexOf(first), dash = rests.length === 1 ? index : rests.indexOf(rest.join());
    return [key, { color: data.colours[colour % data.colours.length], dash: data.dashes[dash % data.dashes.length] }];
  }));
}

function baselines(panel) {
  const settings = [...task().columns, ...task().rows].filter((dim) => ![SPLIT, CLIENTS].includes(dim));
  const alike = (run) => settings.every((dim) => run.d[dim] < 0 || run.d[dim] === panel.d[dim]);
  const inner = task().lines.filter((dim) => dim !== CLIENTS);
  const found = ofTask().filter((run) => !isCurve(run) && fits(run, [SPLIT, CLIENTS]) && alike(run));
  const single = found.filter((run) => !run.pooled), sameSplit = single.filter((run) => run.d[SPLIT] === panel.d[SPLIT]);
  const chosen = { "one client": best(sameSplit.length ? sameSplit : single, inner), centralised: best(found.filter((run) => run.pooled), inner) };
  return Object.entries(chosen).filter(([, runs]) => runs.length).map(([name, runs]) => {
    const more = named(inner, runs[0]);
    return { name: more ? `${name}, ${more}` : name, runs, style: name === "centralised" ? BLACK : GREY, dims: [...settings, ...inner] };
  });
}

function linesOf(panelRuns, style) {
  const dims = [...task().columns, ...task().rows, ...task().lines];
  const keys = [...grouped(panelRuns, task().lines)].sort(([one], [other]) => compareKeys(one, other));
  const lines = keys.map(([key, runs]) => ({ name: named(task().lines, runs[0]) || "federated", runs, style: style.get(key), dims }));
  return [...lines, ...baselines(panelRuns[0])];
}

// ------------------------------------------------------------------------------------------------ traces

function spread(runs) {
  const longest = Math.max(...runs.map((run) => run.n)), all = runs.map((run) => series(run, state.metric));
  const found = { x: [], mean: [], range: [] };
  for (let round = 0; round < longest; round++) {
    const known = all.map((one) => one[round]).filter((value) => value !== undefined && !Number.isNaN(value));
    if (!known.length) continue;
    found.x.push(round + 1);
    found.mean.push(known.reduce((sum, value) => sum + value, 0) / known.length);
    found.range.push([Math.min(...known), Math.max(...known)]);
  }
  return found;
}

function tracesOf({ name, runs, style, dims }, axes) {
  const { x, mean, range } = spread(runs), about = drawn(`${name}; ${named(dims, runs[0])}`);
  const line = { color: style.color, dash: style.dash, width: 2 }, mode = x.length <= 12 ? "lines+markers" : "lines";
  const both = { ...axes, showlegend: false, line, name };
  const seeds = runs.length > 1 ? ` (%{customdata[0]:.4f} to %{customdata[1]:.4f}, ${runs.length} seeds)` : "";
  const found = [{ ...both, x, y: mean, customdata: range, mode, marker: { size: 5, color: style.color },
    hovertemplate: `${about}<br>round %{x}: %{y:.4f}${seeds}<extra></extra>` }];
  if (runs.length > 1) {
    const outline = [...range.map(([low]) => low), ...range.map(([, high]) => high).reverse()];
    found.unshift({ ...axes, showlegend: false, hoverinfo: "skip", mode: "lines", line: { width: 0 }, fill: "toself",
      name, fillcolor: `${style.color}26`, x: [...x, ...[...x].reverse()], y: outline });
  }
  if (!state.seeds) return found;
  return [...found, ...runs.map((run) => ({ ...both, x: [...series(run, state.metric).keys()].map((round) => round + 1),
    y: [...series(run, state.metric)], connectgaps: true, mode: "lines", line: { ...line, width: 0.8 }, opacity: 0.7,
    hovertemplate: `${drawn(`${name}, seed ${data.dims[SEED].values[run.d[SEED]]}`)}<br>round %{x}: %{y:.4f}<extra>${drawn(run.name)}</extra>` }))];
}

function chanceOf(runs) {
  const known = state.metric === task().metric ? runs.map((run) => run.chance).filter((chance) => chance !== null) : [];
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function panelsOf() {
  const curves = chosenCurves(), dims = [...task().rows, ...task().columns], style = styles();
  const found = [...grouped(curves, dims)].sort(([one], [other]) => compareKeys(one, other));
  return found.map(([, runs]) => ({ title: named([...task().columns, ...task().rows], runs[0]), chance: chanceOf(runs),
    longest: Math.max(...runs.map((run) => run.n)), lines: linesOf(runs, style) }));
}

function place(panels, width) {
  const most = width < 700 ? 1 : Math.max(1, Math.min(3, task().columns.length ? unique(chosenCurves().map((run) => task().columns.map((dim) => run.d[dim]).join())).length : 1));
  const across = Math.min(panels.length, most), down = Math.ceil(panels.length / across);
  const tall = panels.length === 1 ? 380 : 250, gap = 62, height = down * tall + (down - 1) * gap + 80;
  const inside = height - 80, step = 1 / across, side = width < 700 ? 0 : 0.035;
  return { height, spots: panels.map((_, index) => {
    const column = index % across, top = 1 - Math.floor(index / across) * ((tall + gap) / inside);
    return { x: [column * step + (column ? side : 0), (column + 1) * step], y: [Math.max(0, top - tall / inside), top], first: column === 0 };
  }) };
}

function draw() {
  const panels = panelsOf(), width = byId("curves").clientWidth;
  const { height, spots } = place(panels, width);
  const layout = { height, margin: { l: 52, r: 14, t: width < 700 ? 24 : 48, b: 52 }, hovermode: "closest", annotations: [], paper_bgcolor: "#fff", plot_bgcolor: "#fff" };
  const traces = [], label = data.metrics[state.metric];
  panels.forEach((panel, index) => {
    const number = index ? index + 1 : "", axes = { xaxis: `x${number}`, yaxis: `y${number}` }, { x, y, first } = spots[index];
    const grid = { gridcolor: "#e5e5e5", zeroline: false, linecolor: "#999", mirror: true };
    layout[`xaxis${number}`] = { ...grid, domain: x, anchor: axes.yaxis, title: { text: "round", standoff: 2 }, tickformat: "d", dtick: [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => panel.longest <= 10 * step) || 1000 };
    layout[`yaxis${number}`] = { ...grid, domain: y, anchor: axes.xaxis, title: first ? { text: drawn(label), standoff: 4 } : undefined, ...(index ? { matches: "y" } : {}) };
    layout.annotations.push({ text: drawn(panel.title), xref: "paper", yref: "paper", x: (x[0] + x[1]) / 2, y: y[1], xanchor: "center", yanchor: "bottom", showarrow: false, font: { size: 12 } });
    for (const line of panel.lines) if (!state.hidden.has(line.name)) traces.push(...tracesOf(line, axes));
    if (panel.chance !== null && !state.hidden.has(task().chance)) {
      traces.push({ ...axes, x: [1, panel.longest], y: [panel.chance, panel.chance], mode: "lines", showlegend: false, name: task().chance,
        line: { color: "#555", dash: "dot", width: 1.3 }, hovertemplate: `${task().chance}: %{y:.4f}<extra></extra>` });
    }
  });
  Plotly.react("curves", traces, layout, { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], displayModeBar: width < 700 ? false : "hover" });
  legend(panels);
  about(panels.length);
  tables();
}

function about(panels) {
  const bands = "Lines are means over seeds, bands go from the least to the greatest. ";
  byId("about").textContent = panels ? `${task().part} part. ${bands}Hover for a run's settings; click a name below to hide its line.` : "No run has these values.";
}

function legend(panels) {
  const lines = new Map(panels.flatMap((panel) => panel.lines.map((line) => [line.name, line.style])));
  if (panels.some((panel) => panel.chance !== null)) lines.set(task().chance, { color: "#555", dash: "dot" });
  const dashes = { solid: "", dash: "7,4", dot: "2,3", dashdot: "7,3,2,3", longdash: "11,4", longdashdot: "11,3,2,3" };
  byId("legend").replaceChildren(...[...lines].map(([name, style]) => {
    const sample = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    Object.entries({ width: 34, height: 10 }).forEach(([key, value]) => sample.setAttribute(key, value));
    const drawnAs = { x1: 0, x2: 34, y1: 5, y2: 5, stroke: style.color, "stroke-width": 2, "stroke-dasharray": dashes[style.dash] ?? style.dash };
    Object.entries(drawnAs).forEach(([key, value]) => line.setAttribute(key, value));
    sample.append(line);
    const click = () => { if (!state.hidden.delete(name)) state.hidden.add(name); draw(); };
    return node("button", { class: state.hidden.has(name) ? "off" : "", onclick: click }, sample, name);
  }));
}

// ------------------------------------------------------------------------------------------------ tables and filters

function tables() {
  const mine = data.tables.map((table, number) => ({ ...table, number })).filter((table) => table.task === state.task);
  byId("tables").replaceChildren(...mine.flatMap(tableOf));
}

function tableOf({ number, title, note, columns, rows, folded }) {
  const sort = state.sort[number], left = rows.filter((row) => fits(row));
  if (sort) {
    const worth = (row) => row.v[sort.column];
    left.sort((one, other) => (worth(one) === null) - (worth(other) === null) || sort.sign * (worth(one) > worth(other) ? 1 : worth(one) < worth(other) ? -1 : 0));
  }
  const click = (column) => () => { state.sort[number] = { column, sign: sort && sort.column === column ? -sort.sign : 1 }; tables(); };
  const heads = columns.map((label, column) => {
    const sorted = sort && sort.column === column ? (sort.sign > 0 ? "ascending" : "descending") : "none";
    return node("th", { "aria-sort": sorted }, node("button", { onclick: click(column) }, label));
  });
  const body = left.map((row) => node("tr", {}, ...row.t.map((text) => node("td", {}, text))));
  const table = node("div", { class: "scroll" }, node("table", {}, node("thead", {}, node("tr", {}, ...heads)), node("tbody", {}, ...body)));
  if (folded) return [node("details", state.open ? { open: "", ontoggle: opened } : { ontoggle: opened }, node("summary", {}, title), table)];
  return [node("h2", {}, title), node("p", { class: "note" }, note), table];
}

function opened(event) {
  state.open = event.target.open;
}

function select(id, label, options, value, change) {
  const made = options.map(([number, text]) => node("option", { value: number, ...(number === value ? { selected: "" } : {}) }, text));
  return node("label", {}, label, node("select", { id, onchange: (event) => { change(Number(event.target.value)); draw(); } }, ...made));
}

function check(id, label, key) {
  const box = node("input", { type: "checkbox", id, onchange: (event) => { state[key] = event.target.checked; draw(); }, ...(state[key] ? { checked: "" } : {}) });
  return node("label", { class: "check" }, box, label);
}

function filters() {
  const runs = ofTask(), here = (dim) => unique(runs.filter((run) => !run.pooled).map((run) => run.d[dim])).sort((one, other) => one - other);
  const tasks = data.dims[TASK].values.map((name, number) => [number, name]);
  const metrics = unique(runs.flatMap((run) => run.m)).sort((one, other) => one - other).map((number) => [number, data.metrics[number]]);
  const choose = (dim) => (value) => { if (value < 0) delete state.chosen[dim]; else state.chosen[dim] = value; };
  const dims = names.map((_, dim) => dim).filter((dim) => dim !== TASK && here(dim).length > 1);
  const changeTask = (number) => { Object.assign(state, { task: number, metric: data.tasks[number].metric, chosen: {}, hidden: new Set(), sort: {} }); filters(); };
  byId("filters").replaceChildren(
    select("task", "task", tasks, state.task, changeTask),
    select("metric", "metric", metrics, state.metric, (number) => { state.metric = number; }),
    ...dims.map((dim) => select(`by-${names[dim]}`, data.dims[dim].label, [[-1, "all"], ...here(dim).map((value) => [value, data.dims[dim].values[value]])], -1, choose(dim))),
    ...(here(SEED).length > 1 ? [check("seeds", "each seed", "seeds")] : []),
    ...(task().tuned ? [check("tuned", "best learning rate of each cell", "tuned")] : []));
}

async function start() {
  values = new Float32Array(await unpacked("values"));
  document.head.append(node("script", {}, new TextDecoder().decode(await unpacked("plotly"))));
  filters();
  draw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
}

start().catch((error) => { byId("about").textContent = `The curves could not be drawn (${error}); a browser of 2023 or later can.`; });
