"use strict";
// Draws the panels of a report. All numbers are in the page, binned; nothing is fetched.
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const rgb = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const data = JSON.parse(document.getElementById("data").textContent);
for (const look of Object.values(data.looks)) look.ramps = look.ramps.map(bytes);
const dark = matchMedia("(prefers-color-scheme: dark)");
const tip = document.getElementById("tip");

const three = (value) => String(+value.toPrecision(3));
function size(bytes) {
  let unit = 0;
  while (bytes >= 1023.5 && unit < 5) { bytes /= 1024; unit += 1; }
  return three(bytes) + " " + ["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit];
}
function time(seconds, digits = 3) {
  for (const [scale, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) {
    if (seconds >= scale) return +(seconds / scale).toPrecision(digits) + " " + unit;
  }
  return seconds ? three(seconds * 1e9) + " ns" : "0";
}
function share(part) {
  if (part <= 0 || part >= 1) return part > 0 ? "100 %" : "0 %";
  return part < 0.0001 ? "< 0.01 %" : +(100 * part).toPrecision(part > 0.99 ? 3 : 2) + " %";
}
function written(value, unit) {
  if (value === null) return "–";
  if (unit === "bytes") return size(value);
  if (unit === "ns") return time(value / 1e9);
  if (unit === "seconds") return time(value);
  if (unit === "share") return share(value);
  return unit === "count" ? Math.round(value).toLocaleString("en") : String(value);
}
function make(parent, tag, attributes = {}, text = "") {
  const drawn = ["svg", "path", "line", "text", "rect"].includes(tag);
  const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}
function point(node, words) {
  node.addEventListener("mousemove", (event) => {
    const box = node.getBoundingClientRect();
    const text = words((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    tip.hidden = !text;
    tip.textContent = text;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
  });
  node.addEventListener("mouseleave", () => { tip.hidden = true; });
}
function ticks(most, wanted) {
  if (!(most > 0)) return [0];
  const scale = 10 ** Math.floor(Math.log10(most / wanted));
  const step = scale * [1, 2, 5, 10].find((factor) => scale * factor >= most / wanted * 0.999);
  return Array.from({length: Math.floor(most / step * (1 + 1e-9)) + 1}, (_, number) => number * step);
}

function legend(parent, entries) {
  const line = make(parent, "div", {class: "legend"});
  for (const [colours, name] of entries) {
    const entry = make(line, "span");
    for (const colour of colours) make(entry, "i", {style: "background:" + colour});
    entry.append(" " + name);
  }
}

function heatmap(parent, panel) {
  const look = data.looks[dark.matches ? "dark" : "light"];
  for (const strip of panel.strips) {
    const row = make(parent, "div", {class: "strip"});
    const label = make(row, "div", {class: "label", style: "max-height:" + Math.max(strip.drawn, 17) + "px"});
    make(label, "b", {title: strip.name}, strip.name);
    make(label, "div", {}, strip.finding);
    make(label, "div", {class: "faint"}, strip.about);
    const canvas = make(row, "canvas", {width: strip.columns, height: strip.rows, style: "height:" + strip.drawn + "px",
      role: "img", "aria-label": `${strip.name}: ${strip.finding}`});
    const heat = bytes(strip.heat), hue = bytes(strip.hue), kinds = bytes(strip.kinds), alive = bytes(strip.alive);
    const context = canvas.getContext("2d");
    const image = context.createImageData(strip.columns, strip.rows);
    const ground = rgb(look.untouched);
    for (let at = 0; at < heat.length; at += 1) {
      if (!alive[at % strip.columns]) continue;
      let colour = ground;
      if (hue[at]) colour = look.ramps[hue[at] - 1].slice(3 * heat[at], 3 * heat[at] + 3);
      if (kinds[at]) colour = rgb(data.kinds[kinds[at]][1]);
      image.data.set([...colour, 255], 4 * at);
    }
    context.putImageData(image, 0, 0);
    point(canvas, (x, y) => about(strip, panel, heat, hue, kinds, alive, x, y));
  }
  const axis = make(parent, "div", {class: "strip"});
  make(axis, "div");
  const drawn = make(axis, "svg", {height: 22});
  const width = drawn.clientWidth || 1000;
  for (const moment of ticks(panel.seconds, Math.max(2, width / 110))) {
    const x = panel.seconds ? moment / panel.seconds * width : 0;
    make(drawn, "line", {class: "axis", x1: x, x2: x, y1: 0, y2: 4});
    make(drawn, "text", {x: x, y: 16, "text-anchor": x > width - 25 ? "end" : x < 25 ? "start" : "middle"}, time(moment));
  }
  const entries = data.hues.flatMap((name, number) => {
    if (!panel.hues.includes(number + 1)) return [];
    const ramp = look.ramps[number];
    const places = name === "resident" ? [255] : [16, 40, 102, 158, 255];
    return [[places.map((at) => `rgb(${ramp.slice(3 * at, 3 * at + 3)})`), name]];
  });
  for (const kind of panel.kinds) entries.push([[data.kinds[kind][1]], data.kinds[kind][0]]);
  legend(parent, entries);
  if (panel.hues.some((number) => number < 5)) make(parent, "p", {class: "faint"}, "From 0.1 % to 100 % of a cell.");
}
function about(strip, panel, heat, hue, kinds, alive, x, y) {
  const column = Math.min(strip.columns - 1, Math.max(0, Math.floor(x * strip.columns)));
  const row = Math.min(strip.rows - 1, Math.max(0, Math.floor(y * strip.rows)));
  const at = row * strip.columns + column;
  const first = Math.max(0, row * strip.span / strip.rows - strip.lead);
  const last = Math.min(strip.nbytes, (row + 1) * strip.span / strip.rows - strip.lead);
  let where = `${size(first)} to ${size(last)}`;
  if (strip.itemsize) where += `, rows ${Math.floor(first / strip.itemsize)} to ${Math.ceil(last / strip.itemsize) - 1}`;
  const step = panel.seconds / strip.columns;
  let what = "not touched";
  if (!alive[column]) what = "not there";
  else if (hue[at] === 5) what = share((heat[at] / 255) ** 2.5) + " resident";
  else if (hue[at]) what = `${share((heat[at] / 255) ** 2.5)} ${["read", "written", "read and written", "touched"][hue[at] - 1]}`;
  if (kinds[at]) what = `${data.kinds[kinds[at]][0]}, ${what}`;
  return `${strip.name}\n${where}\n${time(column * step, 5)} to ${time((column + 1) * step, 5)}\n${what}`;
}

function chart(parent, panel) {
  make(parent, "h2", {}, panel.title);
  const height = 170, left = 70, bottom = 22;
  const drawn = make(parent, "svg", {height: height + bottom});
  const width = (drawn.clientWidth || 1000) - left;
  const over = panel.over === "time" ? panel.span : 100;
  const count = panel.x.length;
  const most = panel.most || 1;
  const x = (value) => left + (over ? value / over * width : 0);
  const y = (value) => height - value / most * height * 0.96;
  for (const level of levels(most, panel.unit)) {
    make(drawn, "line", {class: "axis", x1: left, x2: left + width, y1: y(level), y2: y(level)});
    make(drawn, "text", {x: left - 6, y: y(level) + 4, "text-anchor": "end"}, written(level, panel.unit));
  }
  for (const at of ticks(over, Math.max(2, width / 110))) {
    const label = panel.over === "time" ? time(at) : at + " % of the time";
    make(drawn, "text", {x: x(at), y: height + 16, "text-anchor": x(at) > left + width - 30 ? "end" : "middle"}, label);
  }
  const half = count > 1 ? (panel.x[1] - panel.x[0]) / 2 : over / 2;
  const steps = panel.over === "time" && panel.unit !== "ns";
  let below = new Array(count).fill(0);
  for (const series of panel.series) {
    let path = "", back = "", drawing = false;
    series.values.forEach((value, number) => {
      if (value === null && !panel.stacked) { drawing = false; return; }
      const top = (panel.stacked ? below[number] : 0) + (value || 0);
      const [from, to] = steps ? [panel.x[number] - half, panel.x[number] + half] : [panel.x[number], panel.x[number]];
      path += `${drawing ? "L" : "M"}${x(from).toFixed(1)} ${y(top).toFixed(1)}L${x(to).toFixed(1)} ${y(top).toFixed(1)}`;
      back = `L${x(to).toFixed(1)} ${y(below[number]).toFixed(1)}L${x(from).toFixed(1)} ${y(below[number]).toFixed(1)}` + back;
      drawing = true;
    });
    if (panel.stacked) {
      make(drawn, "path", {d: path + back + "Z", fill: series.colour});
      below = below.map((value, number) => value + (series.values[number] || 0));
    } else {
      make(drawn, "path", {d: path, fill: "none", stroke: series.colour, "stroke-width": 2, "stroke-linecap": "round",
        "stroke-dasharray": series.dashed ? "6 4" : "none"});
    }
  }
  for (const [at] of panel.marks.slice(0, 100)) {
    make(drawn, "line", {class: "axis", x1: x(at), x2: x(at), y1: 0, y2: height, "stroke-dasharray": "2 3"});
  }
  legend(parent, [...panel.series].reverse().map((series) => [[series.colour], series.name]));
  const cross = make(drawn, "line", {x1: 0, x2: 0, y1: 0, y2: height, stroke: "currentColor", visibility: "hidden"});
  // An SVG without anything in it sees no mouse.
  const sense = make(drawn, "rect", {x: left, y: 0, width: width, height: height, fill: "transparent"});
  sense.addEventListener("mouseleave", () => cross.setAttribute("visibility", "hidden"));
  point(sense, (part) => {
    if (!count) return "";
    const at = part * over;
    let number = 0;
    panel.x.forEach((value, candidate) => { if (Math.abs(value - at) < Math.abs(panel.x[number] - at)) number = candidate; });
    cross.setAttribute("x1", x(panel.x[number]));
    cross.setAttribute("x2", x(panel.x[number]));
    cross.setAttribute("visibility", "visible");
    const head = panel.over === "time" ? time(panel.x[number]) : panel.x[number] + " % of the time";
    return [head, ...[...panel.series].reverse().map((one) => `${one.name}: ${written(one.values[number], panel.unit)}`)].join("\n");
  });
}
function levels(most, unit) {
  const scale = unit === "bytes" ? 1024 ** Math.floor(Math.log2(Math.max(most, 1)) / 10) : 1;
  return ticks(most / scale, 4).map((value) => value * scale);
}

function bars(parent, panel) {
  make(parent, "h2", {}, panel.title);
  const height = 150, left = 70, bottom = 22;
  const drawn = make(parent, "svg", {height: height + bottom});
  const width = (drawn.clientWidth || 1000) - left;
  const low = Math.log(Math.max(panel.edges_ns[0], 1)), high = Math.log(panel.edges_ns[panel.counts.length]);
  const x = (ns) => left + (Math.log(Math.max(ns, 1)) - low) / (high - low) * width;
  const most = Math.max(1, ...panel.counts);
  panel.counts.forEach((count, number) => {
    const [from, to] = [panel.edges_ns[number], panel.edges_ns[number + 1]];
    const tall = count / most * height * 0.85;
    const bar = {x: x(from), y: height - tall, width: Math.max(1, x(to) - x(from) - 1), height: tall, fill: "#D55E00"};
    make(drawn, "rect", bar);
    // All of the column tells, not only its bar.
    const sense = make(drawn, "rect", {x: x(from), y: 0, width: x(to) - x(from), height: height, fill: "transparent"});
    point(sense, () => `${time(from / 1e9)} to ${time(to / 1e9)}\n${count.toLocaleString("en")} faults`);
    if (number % 2 === 0) make(drawn, "text", {x: x(from), y: height + 16, "text-anchor": "middle"}, time(from / 1e9));
  });
  panel.marks.forEach(([ns, name], number) => {
    make(drawn, "line", {x1: x(ns), x2: x(ns), y1: 0, y2: height, stroke: "currentColor", "stroke-dasharray": "5 3"});
    make(drawn, "text", {x: x(ns) + 4, y: 10 + 12 * number}, `${name} ${time(ns / 1e9)}`);
  });
}

function table(parent, panel) {
  if (panel.title) make(parent, "h2", {}, panel.title);
  const made = make(parent, "table");
  const head = make(make(made, "thead"), "tr");
  for (const column of panel.columns) make(head, "th", {class: column.unit}, column.name);
  const body = make(made, "tbody");
  for (const row of panel.rows) {
    const line = make(body, "tr");
    row.forEach((value, number) => make(line, "td", {class: panel.columns[number].unit}, written(value, panel.columns[number].unit)));
  }
}

function draw() {
  const parent = document.getElementById("panels");
  parent.replaceChildren();
  for (const panel of data.panels) ({heatmap, chart, bars, table})[panel.type](make(parent, "section"), panel);
}
draw();
dark.addEventListener("change", draw);
let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 150); });
