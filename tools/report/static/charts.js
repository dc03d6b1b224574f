// Unpacks the page's data, and draws its charts when they come near, in the colours of the theme.
"use strict";

async function unpack(id) {
  const block = document.getElementById(id);
  const text = block.textContent;
  block.remove();
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
  else {
    const binary = atob(text);
    bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** An element with properties and children; strings become text, never markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list" && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();

function themed(layout, plain) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name, light) => (plain ? light : style.getPropertyValue(name).trim());
  const text = colour("--text", "#000"), rule = colour("--rule", "#ccc");
  const result = {
    ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: text },
    hoverlabel: { bgcolor: colour("--raised", "#fff"), bordercolor: rule, font: { color: text } },
    dragmode: false,
  };
  for (const name of Object.keys(result)) {
    if (/^[xy]axis\d*$/.test(name)) {
      result[name] = { automargin: true, fixedrange: true, exponentformat: "power",
        minexponent: 5, separatethousands: true, ...result[name], gridcolor: rule,
        linecolor: rule, zerolinecolor: rule, tickcolor: rule };
    }
  }
  return result;
}

function legendRows(figure, width) {
  const names = figure.data.filter((t) => t.showlegend !== false && t.name).map((t) => t.name);
  if (names.length < 2) return 0;
  const widest = Math.max(...names.map((name) => 7 * name.length + 50));
  return Math.ceil(names.length / Math.max(1, Math.floor((width - 70) / widest)));
}

function draw(chart, plain = false) {
  const place = document.getElementById(`plot-${chart.key}`);
  const width = place.clientWidth, rows = legendRows(chart.figure, width);
  const layout = themed(chart.figure.layout, plain);
  layout.height = (layout.height || 320) + 20 * rows;
  layout.margin = { l: 58, r: 14, t: "yaxis2" in layout ? 38 : 22, b: 48 };
  layout.showlegend = rows > 0;
  layout.legend = { orientation: "h", x: 0, xref: "container", y: 1, yref: "container",
    yanchor: "top", traceorder: "normal", itemclick: false, itemdoubleclick: false };
  const bars = chart.figure.data.some((trace) => trace.type === "bar" || trace.error_x);
  layout.hovermode = bars ? "closest" : "x unified";
  drawn.set(chart.key, chart);
  return Plotly.react(place, chart.figure.data, layout, { displayModeBar: false, responsive: true });
}

function table(chart) {
  const cell = (value) => (value === null ? "" : typeof value === "number" ? String(value) : value);
  return make("table", {},
    make("thead", {}, make("tr", {}, chart.columns.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, chart.rows.map((row) => make("tr", {}, row.map((v) => make("td", {}, cell(v)))))));
}

async function startCharts() {
  const charts = new Map((await unpack("block-charts")).map((chart) => [chart.key, chart]));
  const near = new IntersectionObserver((found) => {
    for (const { target, isIntersecting } of found) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(charts.get(target.id.slice("plot-".length)));
    }
  }, { rootMargin: "300px" });
  for (const chart of charts.values()) {
    near.observe(document.getElementById(`plot-${chart.key}`));
    const details = document.getElementById(`data-${chart.key}`);
    details.addEventListener("toggle", () => {
      const place = details.querySelector(".table");
      if (details.open && !place.firstChild) place.append(table(chart));
    });
  }
  dark.addEventListener("change", () => drawn.forEach((chart) => draw(chart)));
  addEventListener("beforeprint", () => charts.forEach((chart) => draw(chart, true)));
  addEventListener("afterprint", () => drawn.forEach((chart) => draw(chart)));
}
