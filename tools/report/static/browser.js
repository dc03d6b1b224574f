// The memory browser: what is shown is a function of the URL's fragment, "#memory?level=1&q=mass".
// An item of the list is an entry of memory or a rollout; only rows in sight are in the document.
"use strict";

const LEVELS = ["experience", "insight", "behavior"];
const ROW = 64, DEBOUNCE = 150;
const FIELDS = ["run", "q", "level", "kind", "subject", "at", "from", "to", "low", "high", "a", "b", "change"];
const $ = (id) => document.getElementById(id);

const browser = { runs: [], run: null, items: [], active: 0, query: {}, opened: "" };

// --- a run's data -------------------------------------------------------------------------------

/** One run's index with what is looked up in it: ids, what was made of an entry, who cited it. */
class Memory {
  constructor(index, number) {
    Object.assign(this, index);
    this.number = number;
    this.blocks = new Map();
    const { id, problem, sources } = this.entries;
    this.size = id.length;
    this.ids = id.map((end, i) => (problem[i] < 0 ? end : this.problems[problem[i]] + end));
    this.entryOf = new Map(this.ids.map((name, i) => [name, i]));
    this.rolloutOf = new Map(this.rollouts.id.map((name, i) => [name, i]));
    this.usedIn = new Map();
    sources.forEach((list, i) => list.forEach((source) => push(this.usedIn, source, i)));
    this.citedBy = new Map();
    this.rollouts.cited.forEach((list, i) => list.forEach((entry) => push(this.citedBy, entry, i)));
    this.words = null;
  }

  /** The rollout with its texts, unpacked with its block when first asked for. */
  async rollout(i) {
    const block = Math.floor(i / this.blockSize);
    if (!this.blocks.has(block)) this.blocks.set(block, unpack(`block-rollouts-${this.number}-${block}`));
    return (await this.blocks.get(block))[i % this.blockSize];
  }

  /** Lower-case text of each entry, made when first searched. */
  haystack() {
    this.words ??= this.ids.map((id, i) =>
      `${id} ${this.entries.name[i]} ${this.entries.text[i] ?? ""}`.toLowerCase());
    return this.words;
  }

  present(i, step) {
    const { added, removed } = this.entries;
    return added[i] <= step && (removed[i] === null || removed[i] > step);
  }

  /** [step, success ratio or uses, number of sources] as it stood after `step`. */
  state(i, step) {
    return this.entries.changes[i].findLast((change) => change[0] <= step) ?? null;
  }

  /** "added", "removed", "changed" or "" between two steps. */
  difference(i, a, b) {
    const before = this.present(i, a), after = this.present(i, b);
    if (before !== after) return after ? "added" : "removed";
    return before && this.state(i, a) !== this.state(i, b) ? "changed" : "";
  }

  subjectNames(i) {
    return this.entries.subject[i].map((s) => this.subjects[s]).join(", ");
  }
}

function push(map, key, value) {
  const list = map.get(key);
  if (list) list.push(value);
  else map.set(key, [value]);
}

// --- the fragment -------------------------------------------------------------------------------

function readFragment() {
  const [, rest] = location.hash.split("?");
  return Object.fromEntries(new URLSearchParams(rest ?? ""));
}

function fragment(query) {
  const kept = Object.entries(query).filter(([, value]) => value !== "" && value !== undefined);
  return `#memory?${new URLSearchParams(kept)}`;
}

/** The link to an item, with the filters as they are. */
function linkTo(kind, id) {
  const { entry, rollout, ...filters } = browser.query;
  return fragment({ ...filters, [kind]: id });
}

function readForm() {
  const query = {};
  for (const name of FIELDS) if ($(name).value !== "") query[name] = $(name).value;
  if (browser.runs.length < 2) delete query.run;
  return query;
}

// --- filters ------------------------------------------------------------------------------------

function number(text, otherwise) {
  return text === undefined || text === "" || Number.isNaN(Number(text)) ? otherwise : Number(text);
}

/** What the query asks for, newest first: numbers of entries, or of rollouts where level says so. */
function select(run, query) {
  const words = (query.q ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const from = number(query.from, -Infinity), to = number(query.to, Infinity);
  if (query.level === "rollout") {
    const { id, step, problem, correct } = run.rollouts;
    return id.map((_, i) => i).reverse().filter((i) =>
      step[i] >= from && step[i] <= to &&
      (!query.kind || (query.kind === "correct") === Boolean(correct[i])) &&
      (!query.subject || run.subjects[run.subjectOf[problem[i]]] === query.subject) &&
      words.every((word) => id[i].toLowerCase().includes(word)));
  }
  const { level, kind, written, removed, ratio, subject } = run.entries;
  const low = number(query.low, null), high = number(query.high, null);
  const a = number(query.a, null), b = number(query.b, null);
  const wanted = run.subjects.indexOf(query.subject);
  const haystack = words.length ? run.haystack() : null;
  const items = [];
  for (let i = run.size - 1; i >= 0; i--) {
    if (query.level && level[i] !== Number(query.level)) continue;
    if (query.kind && kind[i] !== query.kind) continue;
    if (query.subject && !subject[i].includes(wanted)) continue;
    if (query.at && (query.at === "gone") !== (removed[i] !== null)) continue;
    if (written[i] < from || written[i] > to) continue;
    if (low !== null && !(ratio[i] !== null && ratio[i] >= low)) continue;
    if (high !== null && !(ratio[i] !== null && ratio[i] <= high)) continue;
    if (a !== null && b !== null) {
      const difference = run.difference(i, a, b);
      if (!difference || (query.change && query.change !== difference)) continue;
    }
    if (haystack && !words.every((word) => haystack[i].includes(word))) continue;
    items.push(i);
  }
  return items;
}

function describe(run, query, items) {
  if (query.level === "rollout") return `${items.length.toLocaleString()} rollouts`;
  const counts = LEVELS.map((name, level) => {
    const n = items.reduce((sum, i) => sum + (run.entries.level[i] === level), 0);
    return `${n.toLocaleString()} ${name}${n === 1 ? "" : "s"}`;
  });
  let text = `${items.length.toLocaleString()} of ${run.size.toLocaleString()} entries: ${counts.join(", ")}.`;
  const a = number(query.a, null), b = number(query.b, null);
  if (a !== null && b !== null) {
    const found = { added: 0, removed: 0, changed: 0 };
    items.forEach((i) => found[run.difference(i, a, b)]++);
    text += ` From after step ${a} to after step ${b}: ${found.added} added, ${found.removed} removed, ${found.changed} changed.`;
  } else if (query.a || query.b) text += " Give both steps to see what changed between them.";
  return text;
}

// --- the list -----------------------------------------------------------------------------------

function headOf(run, i) {
  const { level, kind, written, ratio, cited, removed } = run.entries;
  const parts = [`${LEVELS[level[i]]}, ${kind[i]}`, run.subjectNames(i), `step ${written[i]}`];
  if (ratio[i] !== null) parts.push(`success ${Math.round(100 * ratio[i])}%`);
  if (cited[i]) parts.push(`cited ${cited[i]}x`);
  if (removed[i] !== null) parts.push(`left at ${removed[i]}`);
  const a = number(browser.query.a, null), b = number(browser.query.b, null);
  if (a !== null && b !== null) parts.unshift(run.difference(i, a, b));
  return parts.filter(Boolean).join(" · ");
}

function rowText(run, i) {
  if (browser.query.level === "rollout") {
    const { id, step, correct, loss } = run.rollouts;
    const nats = loss[i] === null ? "no loss" : `loss ${loss[i]} nats per token`;
    return [`rollout, ${correct[i] ? "correct" : "wrong"} · step ${step[i]} · ${nats}`, id[i]];
  }
  const text = run.entries.text[i] ?? "(text not in this report)";
  return [headOf(run, i), [run.entries.name[i], text].filter(Boolean).join(": ").slice(0, 300)];
}

function idOf(run, i) {
  return browser.query.level === "rollout" ? run.rollouts.id[i] : run.ids[i];
}

function paint() {
  const list = $("list"), rows = $("rows"), { items, run } = browser;
  rows.style.height = `${items.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(items.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const found = [];
  for (let place = first; place < last; place++) {
    const [head, body] = rowText(run, items[place]);
    const row = make("div", { className: place === browser.active ? "row active" : "row", id: `row-${place}`, role: "option" },
      make("div", { className: "head" }, head), make("div", { className: "body" }, body));
    row.setAttribute("aria-posinset", place + 1);
    row.setAttribute("aria-setsize", items.length);
    row.setAttribute("aria-selected", idOf(run, items[place]) === browser.opened);
    row.style.top = `${place * ROW}px`;
    row.dataset.place = place;
    found.push(row);
  }
  rows.replaceChildren(...found);
  if (items.length) list.setAttribute("aria-activedescendant", `row-${browser.active}`);
  else list.removeAttribute("aria-activedescendant");
}

function activate(place) {
  const list = $("list");
  browser.active = Math.max(0, Math.min(browser.items.length - 1, place));
  const top = browser.active * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  paint();
}

function openPlace(place) {
  if (!browser.items.length) return;
  const kind = browser.query.level === "rollout" ? "rollout" : "entry";
  browser.active = place;
  location.hash = linkTo(kind, idOf(browser.run, browser.items[place]));
}

function onListKey(event) {
  const page = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1);
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
  if (event.key in moves) activate(browser.active + moves[event.key]);
  else if (event.key === "Enter" || event.key === " ") openPlace(browser.active);
  else return;
  event.preventDefault();
}

// --- keeping page and fragment in step ----------------------------------------------------------

function options(select, values, any) {
  const chosen = select.value;
  select.replaceChildren(...(any ? [make("option", { value: "" }, any)] : []),
    ...values.map((value) => make("option", { value: String(value) }, String(value))));
  if (values.map(String).includes(chosen)) select.value = chosen;
}

function setRun(run) {
  if (browser.run === run) return;
  browser.run = run;
  options($("subject"), [...run.subjects].sort(), "any");
  options($("kind"), [...new Set(run.entries.kind), "correct", "wrong"].sort(), "any");
  const shown = run.rollouts.id.length.toLocaleString(), logged = run.logged.toLocaleString();
  $("memory-note").textContent = run.size
    ? `${run.size.toLocaleString()} entries that ever were in memory; ${shown} of ${logged} logged rollouts are in this report` +
      (shown === logged ? "." : ": for each behavior the last whose teacher was shown it, then an equal share of every step, most loss first.") +
      (run.withoutText ? ` The texts of ${run.withoutText.toLocaleString()} experiences were left out: those no longer in memory first, and of them the oldest.` : "") +
      (run.cutTexts ? ` ${run.cutTexts.toLocaleString()} long texts are cut.` : "") +
      " Success ratio: share of correct rollouts an insight was read from; for behaviors the mean of their insights."
    : `This run holds no memory that can be read; ${shown} of ${logged} logged rollouts are in this report.`;
}

function refresh(keepPlace = false) {
  browser.items = select(browser.run, browser.query);
  $("count").textContent = describe(browser.run, browser.query, browser.items);
  if (!keepPlace) {
    browser.active = 0;
    $("list").scrollTop = 0;
  }
  paint();
}

function onFragment() {
  if (!location.hash.startsWith("#memory")) return;
  const query = readFragment(), before = browser.query;
  setRun(browser.runs.find((run) => run.name === query.run) ?? browser.runs[0]);
  for (const name of FIELDS) $(name).value = query[name] ?? (name === "run" ? browser.run.name : "");
  browser.query = query;
  browser.opened = query.entry ?? query.rollout ?? "";
  refresh(FIELDS.every((name) => query[name] === before[name]));
  showDetail(query);
}

function onFilter() {
  const { entry, rollout } = browser.query, query = readForm();
  const changed = (query.run ?? "") !== (browser.query.run ?? "");
  browser.query = changed ? query : { ...query, entry, rollout };
  history.replaceState(null, "", fragment(browser.query));
  if (changed) onFragment();
  else refresh();
}

async function startBrowser(numRuns) {
  for (let i = 0; i < numRuns; i++) browser.runs.push(new Memory(await unpack(`block-memory-${i}`), i));
  options($("run"), browser.runs.map((run) => run.name));
  $("run-label").hidden = numRuns < 2;
  setRun(browser.runs[0]);
  let waiting;
  $("filters").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(onFilter, DEBOUNCE);
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(onFilter));
  $("list").addEventListener("scroll", () => requestAnimationFrame(paint));
  $("list").addEventListener("keydown", onListKey);
  $("rows").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) openPlace(Number(row.dataset.place));
  });
  addEventListener("resize", paint);
  addEventListener("hashchange", onFragment);
  refresh();
  showDetail({});
  onFragment();
  document.body.dataset.ready = "yes";
}
