// The right pane: an entry with where it came from and what became of it, or a rollout beside what
// its teacher read. All texts are set as text, so markup in them stays text.
"use strict";

const MANY = 40; // links of one kind shown before the rest is asked for
const NATS = 10000;
const HEAT = [194, 87, 26];

function link(run, kind, i, text) {
  const id = kind === "rollout" ? run.rollouts.id[i] : run.ids[i];
  return make("a", { href: linkTo(kind, id) }, text);
}

function entryLink(run, i) {
  if (typeof i === "string") return make("span", {}, `${i} (never kept in memory)`);
  const text = run.entries.name[i] || (run.entries.text[i] ?? run.ids[i]);
  return [link(run, "entry", i, text.slice(0, 160) + (text.length > 160 ? " ..." : "")),
    make("span", { className: "quiet" }, ` ${headOf(run, i)}`)];
}

function rolloutLink(run, i) {
  const { id, step, correct, loss } = run.rollouts;
  const nats = loss[i] === null ? "no loss" : `loss ${loss[i]} nats per token`;
  return [link(run, "rollout", i, id[i]),
    make("span", { className: "quiet" }, ` step ${step[i]}, ${correct[i] ? "correct" : "wrong"}, ${nats}`)];
}

/** A heading and a list of links; a long list grows by a button. */
function listing(title, items, show, empty) {
  const list = make("ul");
  const grow = (from, to) => list.append(...items.slice(from, to).map((i) => make("li", {}, show(i))));
  grow(0, MANY);
  const parts = [make("h4", {}, `${title} (${items.length.toLocaleString()})`), items.length ? list : make("p", { className: "quiet" }, empty)];
  if (items.length > MANY) {
    const more = make("button", { type: "button" }, `Show all ${items.length.toLocaleString()}`);
    more.addEventListener("click", () => { grow(MANY, items.length); more.remove(); });
    parts.push(more);
  }
  return parts;
}

function definitions(pairs) {
  return make("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
}

function back() {
  const link = make("a", { href: "#memory" }, "Back to the list");
  link.addEventListener("click", (event) => {
    event.preventDefault();
    $("list").focus();
  });
  return make("p", { className: "quiet" }, link);
}

// --- an entry -----------------------------------------------------------------------------------

function entryDetail(run, i) {
  const e = run.entries, level = LEVELS[e.level[i]];
  const used = (run.usedIn.get(i) ?? []), citing = run.citedBy.get(i) ?? [];
  const parts = [
    make("h3", {}, e.name[i] || `${level[0].toUpperCase()}${level.slice(1)} of ${run.problems[e.problem[i]] ?? "memory"}`),
    make("p", { className: "text" }, e.text[i] ?? "The text of this experience is not in this report."),
    definitions([
      ["Id", run.ids[i]], ["Level", level], ["Kind", e.kind[i]], ["Subject", run.subjectNames(i)],
      ["Written", `step ${e.written[i]}`], ["Came", `step ${e.added[i]}`],
      ["Left", e.removed[i] === null ? "still in memory at the end" : `step ${e.removed[i]}`],
      ["Success ratio", e.ratio[i] === null ? "" : `${(100 * e.ratio[i]).toFixed(1)}%`],
      ["Uses", level === "behavior" ? `${e.changes[i].at(-1)[1]} teacher prompts` : ""],
      ["Cited by", `${e.cited[i].toLocaleString()} of ${run.logged.toLocaleString()} logged rollouts`],
    ]),
    ...comparison(run, i),
  ];
  const entry = (other) => entryLink(run, other);
  if (level === "experience") {
    const own = run.rolloutOf.get(run.ids[i]);
    parts.push(make("h4", {}, "Its rollout"), own === undefined
      ? make("p", { className: "quiet" }, "The rollout is not among those in this report.")
      : make("p", {}, rolloutLink(run, own)));
    parts.push(...listing("Insights read from it", used, entry, "No insight was read from it."));
  } else if (level === "insight") {
    parts.push(...listing("Read from experiences", e.sources[i], entry, "Its experiences are not known."));
    parts.push(...listing("Behaviors abstracted from it", used, entry, "No behavior was abstracted from it."));
  } else {
    parts.push(...listing("Abstracted from insights", e.sources[i], entry, "Its insights are not known."));
  }
  parts.push(...listing("Teacher prompts that show it", citing, (other) => rolloutLink(run, other),
    e.cited[i] ? "The rollouts that were taught with it are not among those in this report." : "No logged teacher prompt shows it."));
  return parts;
}

/** How a changed entry stood after each of the two steps compared. */
function comparison(run, i) {
  const a = number(browser.query.a, null), b = number(browser.query.b, null);
  if (a === null || b === null || !run.difference(i, a, b)) return [];
  const behavior = run.entries.level[i] === 2;
  const told = (step) => {
    if (!run.present(i, step)) return "not in memory";
    const state = run.state(i, step);
    if (!state) return "in memory";
    const first = behavior ? `${state[1]} uses` : `success ratio ${(100 * state[1]).toFixed(1)}%`;
    return `${first}, from ${state[2]} ${behavior ? "insights" : "experiences"}`;
  };
  return [make("h4", {}, `Difference: ${run.difference(i, a, b)}`),
    definitions([[`After step ${a}`, told(a)], [`After step ${b}`, told(b)]])];
}

// --- a rollout ----------------------------------------------------------------------------------

function tokens(rollout) {
  if (!rollout.pieces) {
    return [make("p", { className: "quiet" }, "This run logged no divergence per token."),
      make("div", { className: "tokens" }, rollout.response)];
  }
  const sorted = [...rollout.nats].sort((x, y) => x - y);
  const most = Math.max(sorted[Math.floor(0.99 * (sorted.length - 1))], 1);
  const shade = (share) => `rgb(${HEAT.join(" ")} / ${0.65 * Math.sqrt(Math.min(1, Math.max(0, share)))})`;
  const scale = make("p", { className: "scale" }, make("span", {}, "0"));
  for (let step = 0; step <= 8; step++) {
    const box = make("i");
    box.style.backgroundColor = shade(step / 8);
    scale.append(box);
  }
  scale.append(make("span", {}, `${(most / NATS).toFixed(4)} nats and more, divergence from the teacher`));
  const readout = make("p", { className: "readout", role: "status" }, "Point at a token, or focus the text and use the arrow keys.");
  const text = make("div", { className: "tokens", tabIndex: 0, role: "group", "aria-label": "Response by token; left and right arrows move" });
  const spans = rollout.pieces.map((piece, i) => {
    const span = make("span", {}, piece);
    span.style.backgroundColor = shade(rollout.nats[i] / most);
    span.dataset.i = i;
    return span;
  });
  text.append(...spans);
  let current = -1;
  const show = (i) => {
    spans[current]?.classList.remove("current");
    current = Math.max(0, Math.min(spans.length - 1, i));
    spans[current].classList.add("current");
    readout.textContent = `token ${current + 1} of ${spans.length}, ${JSON.stringify(rollout.pieces[current])}: ${(rollout.nats[current] / NATS).toFixed(4)} nats`;
  };
  text.addEventListener("mouseover", (event) => event.target.dataset.i && show(Number(event.target.dataset.i)));
  text.addEventListener("focus", () => show(Math.max(0, current)));
  text.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(current + moves[event.key]);
    spans[current].scrollIntoView({ block: "nearest" });
  });
  return [scale, text, readout];
}

function prompt(run, rollout) {
  return make("div", { className: "prompt", tabIndex: 0, role: "group", "aria-label": "Teacher prompt, memory marked" },
    rollout.teacher.map(([text, section, entry]) => {
      if (!section) return text;
      if (entry === null) return make("mark", { title: section }, text);
      return make("mark", { title: section }, link(run, "entry", entry, text));
    }));
}

async function rolloutDetail(run, i) {
  const rollout = await run.rollout(i), { id, step, correct, loss, cited } = run.rollouts;
  const tally = (counts) => Object.entries(counts).map(([name, n]) => `${name} ${n}`).join(", ");
  const kept = run.entryOf.get(id[i]);
  return [
    make("h3", {}, `Rollout ${id[i]}`),
    definitions([
      ["Verdict", `${correct[i] ? "correct" : "wrong"}, reward ${rollout.reward}${rollout.well_formed === false ? ", not well-formed" : ""}`],
      ["Answer", rollout.answer], ["Feedback", rollout.feedback], ["Step", step[i]], ["Subtask", rollout.subtask],
      ["Loss", loss[i] === null ? "none: its teacher was shown nothing beyond the problem" : `${loss[i]} nats per token`],
      ["Advantage", rollout.advantage],
      ["Teacher was shown", tally(rollout.section_tokens) && `${tally(rollout.section_tokens)} (tokens)`],
      ["Cut", tally(rollout.cut_tokens) && `${tally(rollout.cut_tokens)} (tokens)`],
    ]),
    make("div", { className: "sides" },
      make("section", {}, make("h4", {}, "What the policy wrote"), tokens(rollout)),
      make("section", {}, make("h4", {}, "What its teacher read"),
        make("p", { className: "quiet" }, "Marked: what the student does not read. Links lead to the entries shown."),
        prompt(run, rollout))),
    make("details", {}, make("summary", {}, "What the student read"), make("div", { className: "prompt" }, rollout.student)),
    ...listing("Memory its teacher was shown", cited[i], (other) => entryLink(run, other), "None."),
    make("h4", {}, "What became of it"),
    make("p", {}, kept === undefined ? "It was not kept in memory." : entryLink(run, kept)),
  ];
}

// --- which of them ------------------------------------------------------------------------------

async function showDetail(query) {
  const { run } = browser, place = $("detail");
  const wanted = query.entry ?? query.rollout, asked = location.hash;
  if (wanted === undefined) {
    place.classList.remove("rollout");
    place.replaceChildren(make("p", { className: "quiet" }, run.size || run.rollouts.id.length ? "Open an entry to see its text, where it came from, and what it taught." : ""));
    return;
  }
  const kind = query.entry !== undefined ? "entry" : "rollout";
  const i = (kind === "entry" ? run.entryOf : run.rolloutOf).get(wanted);
  const parts = i === undefined
    ? [make("p", {}, `${wanted} is not in this report.`)]
    : kind === "entry" ? entryDetail(run, i) : await rolloutDetail(run, i);
  if (location.hash !== asked) return; // another was opened meanwhile
  place.classList.toggle("rollout", kind === "rollout");
  place.replaceChildren(...parts.flat(), back());
  place.scrollTop = 0;
  place.focus({ preventScroll: true });
  place.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && $("detail").contains(document.activeElement)) $("list").focus();
});

startCharts().then(() => startBrowser(Number(document.querySelectorAll(".run").length)));
