"use strict";
// Everything that a model or a data set wrote goes in as text (textContent), never as markup.
const { runs, samples } = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 20;
const fields = [...document.querySelectorAll("#browser [name]")];
let page = 0, open = new Set();

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const measured = samples.flatMap(s => s.divergence || []).filter(d => d !== null).map(Math.abs).sort((a, b) => a - b);
const strongest = measured.length ? Math.max(measured[Math.floor(0.98 * (measured.length - 1))], 1e-3) : 0;

function coloured(sample) {
  const box = element("div", undefined, "text response");
  if (!sample.tokens) { box.textContent = sample.response; return box; }
  sample.tokens.forEach((token, i) => {
    const d = sample.divergence[i];
    // A line end alone would have no area to colour.
    const span = element("span", token.replaceAll("\n", "\u21b5\n"));
    span.title = d === null ? "no finite divergence" : d + " nats";
    if (d !== null) {
      const opacity = (0.85 * Math.min(1, Math.abs(d) / strongest)).toFixed(2);
      span.style.background = `rgb(var(--${d < 0 ? "cool" : "warm"}) / ${opacity})`;
    }
    box.append(span);
  });
  return box;
}

function state() {
  return Object.fromEntries(fields.map(f => [f.name, f.value.trim()]));
}

const rewards = { between: r => r > 0 && r < 1, above: r => r > 1, below: r => r < 0 };

function chosen(want) {
  const text = want.text.toLowerCase();
  const found = samples.filter(s =>
    (want.run === "" || s.run === +want.run)
    && (want.from === "" || s.step >= +want.from)
    && (want.to === "" || s.step <= +want.to)
    && (want.reward === "" || s.reward !== null
      && (rewards[want.reward] || (r => r === +want.reward))(s.reward))
    && (want.context === "" || s.context === (want.context === "yes"))
    && (text === "" || [s.prompt, s.response, s.teacher, s.answer].some(t => t && t.toLowerCase().includes(text))));
  if (want.order === "late") found.sort((a, b) => b.step - a.step);
  if (want.order === "divergence") found.sort((a, b) => (b.mean ?? -Infinity) - (a.mean ?? -Infinity));
  return found;
}

function detail(sample, columns) {
  const row = element("tr"), cell = element("td", undefined, "detail");
  cell.colSpan = columns;
  const part = (title, text, cut) => {
    if (text === null || text === "") return;
    cell.append(element("h3", title), text instanceof Node ? text : element("div", text, "text"));
    if (cut) cell.append(element("div", `\u2026 ${cut.toLocaleString("en")} characters left out`, "soft"));
  };
  part("question", sample.prompt, sample.left.prompt);
  part("response, colour: divergence of every token".slice(0, sample.tokens ? undefined : 8), coloured(sample), sample.left.response);
  part("right answer", sample.answer, sample.left.answer);
  part("feedback", sample.feedback, sample.left.feedback);
  part(sample.context === false ? "teacher's prompt (nothing that the student did not see)" : "teacher's prompt", sample.teacher, sample.left.teacher);
  row.append(cell);
  return row;
}

function number(value, digits) {
  return value === null ? "\u2013" : String(+value.toFixed(digits));
}

function draw(keepHash) {
  const want = state(), found = chosen(want), pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  const several = runs.length > 1, divergent = strongest > 0;
  const head = element("tr"), body = document.querySelector("#table tbody");
  const names = [...(several ? ["run"] : []), "step", "reward", "context", ...(divergent ? ["divergence"] : []), "question", "response", ""];
  const kinds = { step: "number", reward: "number", divergence: "number extra", context: "extra", question: "ask" };
  names.forEach(name => head.append(element("th", name, kinds[name])));
  document.querySelector("#table thead").replaceChildren(head);
  body.replaceChildren();
  found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).forEach(s => {
    const row = element("tr", undefined, "sample");
    if (several) row.append(element("td", runs[s.run]));
    row.append(element("td", s.step, "number"), element("td", number(s.reward, 3), "number"));
    row.append(element("td", s.context === null ? "\u2013" : s.context ? "yes" : "no", "extra"));
    if (divergent) row.append(element("td", s.mean === null ? "\u2013" : s.mean.toFixed(3), "number extra"));
    const ask = element("td", undefined, "ask"), answer = element("td"), more = element("td");
    ask.append(element("div", s.prompt, "text"));
    answer.append(coloured(s));
    const toggle = element("button", open.has(s.id) ? "\u2212" : "+");
    toggle.setAttribute("aria-expanded", open.has(s.id));
    toggle.setAttribute("aria-label", "the whole sample");
    more.append(toggle);
    row.append(ask, answer, more);
    row.addEventListener("click", () => {
      if (String(getSelection())) return;  // someone marks text to copy it
      open.has(s.id) ? open.delete(s.id) : open.add(s.id);
      draw();
    });
    body.append(row);
    if (open.has(s.id)) body.append(detail(s, names.length));
  });
  if (!found.length) {
    const cell = element("td", "no sample fits these filters", "soft"), row = element("tr");
    cell.colSpan = names.length; row.append(cell); body.append(row);
  }
  const first = found.length ? page * PER_PAGE + 1 : 0, last = Math.min((page + 1) * PER_PAGE, found.length);
  document.getElementById("count").textContent =
    `${first}\u2013${last} of ${found.length.toLocaleString("en")}` + (found.length < samples.length ? ` (${samples.length.toLocaleString("en")} without filters)` : "");
  document.getElementById("previous").disabled = page === 0;
  document.getElementById("next").disabled = page >= pages - 1;
  if (keepHash) return;
  const parts = new URLSearchParams(Object.entries(want).filter(([, value]) => value !== ""));
  if (page) parts.set("page", page + 1);
  if (open.size) parts.set("open", [...open].join(" "));
  history.replaceState(null, "", "#samples?" + parts);
}

function restore() {
  const [place, query] = location.hash.split("?");
  if (place !== "#samples" || query === undefined) return draw(true);
  const parts = new URLSearchParams(query);
  fields.forEach(f => { f.value = parts.get(f.name) ?? ""; });
  page = (parseInt(parts.get("page"), 10) || 1) - 1;
  open = new Set((parts.get("open") || "").split(" ").filter(Boolean).map(Number));
  draw(true);
  document.getElementById("samples").scrollIntoView();
}

if (samples.length) {
  const pick = document.querySelector("[name=run]");
  pick.append(new Option("all", ""), ...runs.map((name, i) => new Option(name, i)));
  document.getElementById("pick-run").hidden = runs.length < 2;
  document.getElementById("pick-run").style.display = runs.length < 2 ? "none" : "";
  if (strongest) {
    const bar = element("span", undefined, "scale");
    document.getElementById("legend").append("divergence 0", bar, `${+strongest.toPrecision(2)} nats and more`);
  }
  fields.forEach(f => f.addEventListener("input", () => { page = 0; draw(); }));
  document.getElementById("previous").addEventListener("click", () => { page -= 1; draw(); });
  document.getElementById("next").addEventListener("click", () => { page += 1; draw(); });
  document.getElementById("browser").hidden = false;
  addEventListener("hashchange", restore);
  restore();
}
