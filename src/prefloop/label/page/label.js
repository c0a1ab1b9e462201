"use strict";
// What the server says is only ever put on the page as text (textContent), never as markup.

const $ = (id) => document.getElementById(id);
const PENDING = "prefloop-pending";
const WORDS = { left: "A is better", right: "B is better", tie: "tie", both_bad: "both bad", skip: "skipped" };
const KEYS = {
  ArrowLeft: "left", a: "left", 1: "left",
  ArrowRight: "right", b: "right", 2: "right",
  t: "tie", x: "both_bad", s: "skip",
};
const SCREENS = ["work", "done", "name", "closed", "password"];

let view = null; // the server's last answer
let busy = false; // a click is on its way: no second one
let skippedToo = false; // going through the skipped pairs

// Requests

class Refused extends Error {
  constructor(status, body) {
    super(body.error || `The server answered ${status}.`);
    this.status = status;
    this.reason = body.reason || "";
  }
}

async function ask(path, body) {
  const options = body
    ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }
    : {};
  const answer = await fetch(path, { credentials: "same-origin", ...options });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, found);
  return found;
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// A click keeps its name until the server has answered, also over a reload: sent twice, it is stored once.
// crypto.randomUUID is missing on plain http from another machine.
function newEvent() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send(click) {
  if (busy) return;
  busy = true;
  sessionStorage.setItem(PENDING, JSON.stringify(click));
  let wait = 400;
  try {
    for (;;) {
      try {
        const found = await ask(click.path, click.body);
        sessionStorage.removeItem(PENDING);
        notice("");
        return found;
      } catch (error) {
        if (error instanceof Refused && error.status < 500) {
          sessionStorage.removeItem(PENDING);
          throw error;
        }
        const why = error instanceof Refused ? error.message : "The server does not answer.";
        notice(`Your last click is not stored yet. ${why} Trying again until it is.`);
        await pause(wait);
        wait = Math.min(wait * 1.5, 5000);
      }
    }
  } finally {
    busy = false;
  }
}

// What is shown

function screen(name) {
  for (const one of SCREENS) $(one).hidden = one !== name;
  $("actions").hidden = name !== "work";
  $("top").hidden = !(name === "work" || name === "done");
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function show(found) {
  view = found;
  if (found.annotator === null) return showName("");
  const { total, judged, skipped } = found.progress;
  $("run").textContent = found.run;
  $("round").textContent = `round ${found.round}`;
  $("who").textContent = found.annotator;
  $("bar").max = total;
  $("bar").value = judged;
  $("far").textContent = `${judged} of ${total}` + (skipped ? ` · ${skipped} skipped` : "");
  document.title = `${judged} of ${total} · ${found.run} · prefloop label`;
  $("undo").disabled = !found.can_undo;
  $("done-undo").disabled = !found.can_undo;
  if (found.pair) showPair(found.pair);
  else showDone(skipped);
}

function showPair(pair) {
  const first = $("work").hidden;
  screen("work");
  for (const button of document.querySelectorAll(".pressed")) button.classList.remove("pressed");
  $("prompt").replaceChildren(...pair.prompt.map(turn), ...(pair.prefix ? [element("div", pair.prefix, "begun")] : []));
  for (const side of ["left", "right"]) {
    const text = pair[side].map(([words, differs]) => element(differs ? "mark" : "span", words));
    const empty = !pair[side].some(([words]) => words.trim());
    $(side).classList.toggle("empty", empty);
    $(side).replaceChildren(...(empty ? [document.createTextNode("(empty)")] : text));
    $(side).dir = "auto";
  }
  $("unlike").hidden = ["left", "right"].some((side) => pair[side].some(([, differs]) => differs));
  window.scrollTo(0, 0);
  $("prompt").scrollTop = 0;
  if (first || document.activeElement === document.body) $("actions").focus({ preventScroll: true });
}

function turn(message) {
  const made = element("div", undefined, "turn");
  made.dir = "auto";
  if (message.role) made.append(element("span", message.role, "role"));
  made.append(element("span", message.text));
  return made;
}

function showDone(skipped) {
  screen("done");
  skippedToo = false;
  $("done-title").textContent = skipped ? "All pairs are judged or skipped" : "All pairs are judged";
  $("done-text").textContent = skipped
    ? `You skipped ${skipped}. They can be judged now, or left out: a skipped pair is not exported.`
    : "Thank you. Every verdict is stored; this page can be closed.";
  $("again").hidden = !skipped;
  $("done-title").focus();
}

function showName(name) {
  screen("name");
  $("name-taken").hidden = true;
  $("name-mine").hidden = true;
  $("name-back").hidden = !(view && view.annotator);
  $("name-field").value = name;
  $("name-field").focus();
}

function showRefusal(error) {
  if (!(error instanceof Refused)) return notice("The server does not answer. Is prefloop label still running?");
  if (error.status === 401) {
    const used = new URLSearchParams(location.search).has("token");
    $("closed-title").textContent = used ? "This address was used already" : "This browser is not signed in";
    screen(error.reason === "password" ? "password" : "closed");
    if (error.reason === "password") $("password-field").focus();
    return;
  }
  if (error.reason === "name") {
    const name = view ? view.annotator : "";
    view = null;
    showName(name || "");
    $("name-taken").textContent = error.message;
    $("name-taken").hidden = false;
    return;
  }
  notice(error.message);
}

// What people do

async function judge(verdict) {
  if (busy || $("work").hidden || !view || !view.pair) return;
  const button = document.querySelector(`[data-verdict="${verdict}"]`);
  button.classList.add("pressed");
  const event = newEvent();
  const body = { annotator: view.annotator, key: view.pair.key, verdict, event, skipped: skippedToo };
  await settle({ path: "/api/click", body }, `Stored: ${WORDS[verdict]}.`);
}

async function undo() {
  if (busy || !view || !view.annotator || !view.can_undo) return;
  const body = { annotator: view.annotator, event: newEvent(), skipped: skippedToo };
  await settle({ path: "/api/undo", body }, "Taken back.");
}

async function settle(click, word) {
  try {
    const found = await send(click);
    if (!found) return;
    show(found);
    const { judged, total } = found.progress;
    $("last").textContent = word;
    $("said").textContent = `${word} ${judged} of ${total} judged.`;
  } catch (error) {
    for (const button of document.querySelectorAll(".pressed")) button.classList.remove("pressed");
    showRefusal(error);
  }
}

async function takeName(confirmed) {
  const name = $("name-field").value;
  try {
    await ask("/api/annotator", { name, confirmed });
    $("last").textContent = "";
    await refresh();
  } catch (error) {
    if (!(error instanceof Refused) || error.status === 401) return showRefusal(error);
    $("name-taken").textContent = error.message;
    $("name-taken").hidden = false;
    $("name-mine").hidden = error.reason !== "confirm";
    $("name-mine").textContent = `I am ${name.trim()}: go on`;
    $("name-field").select();
  }
}

async function refresh() {
  try {
    const found = await ask(`/api/next?skipped=${skippedToo ? 1 : 0}`);
    notice("");
    show(found);
  } catch (error) {
    showRefusal(error);
  }
}

// Agreement

function percent(value) {
  return value === null ? "–" : `${value.toFixed(0)} %`;
}

function table(title, heads, rows) {
  const made = element("table");
  made.append(element("caption", title));
  const head = element("tr");
  head.append(...heads.map((text) => {
    const cell = element("th", text);
    cell.scope = "col";
    return cell;
  }));
  const thead = element("thead");
  thead.append(head);
  const tbody = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    line.append(...row.map((text) => element("td", text)));
    tbody.append(line);
  }
  made.append(thead, tbody);
  return made;
}

function kappa(one) {
  if (!one.kappa) return one.why || "–";
  const [value, low, high] = one.kappa.map((number) => number.toFixed(2));
  return `${value} [${low}, ${high}] (${one.what})`;
}

async function showAgreement() {
  try {
    const found = await ask("/api/agreement");
    const parts = [
      table("People", ["name", "judged", "side chosen in the run, of verdicts for a side"],
        found.people.map((one) => [one.name, String(one.judged), `${percent(one.with_labels)} of ${one.sided}`])),
    ];
    if (found.compared.length) {
      parts.push(
        table("Together", ["who", "pairs", "same verdict", "kappa, 95 %"],
          found.compared.map((one) => [one.people.join(", "), String(one.pairs), percent(one.same), kappa(one)])),
        element("p", `People are split on ${found.split} of the pairs; these are left out of an export.`, "quiet"),
      );
    } else {
      parts.push(element("p", "Agreement between people is shown once a second person has judged.", "quiet"));
    }
    $("agreement-body").replaceChildren(...parts);
    $("agreement").showModal();
  } catch (error) {
    showRefusal(error);
  }
}

// Events

document.addEventListener("keydown", (event) => {
  // A held key would judge pair after pair; keys with Ctrl and the like are the browser's.
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (document.querySelector("dialog[open]") || event.target.closest("input")) return;
  if ($("top").hidden) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "?") $("help").showModal();
  else if (key === "u" || key === "Backspace") undo();
  else if (key === "d") $("work").classList.toggle("unmarked");
  else if (KEYS[key]) judge(KEYS[key]);
  else return;
  event.preventDefault();
});

function start() {
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => judge(button.dataset.verdict));
  }
  $("undo").addEventListener("click", undo);
  $("done-undo").addEventListener("click", undo);
  $("again").addEventListener("click", () => {
    skippedToo = true;
    refresh();
  });
  $("who").addEventListener("click", () => showName(view.annotator));
  $("name-back").addEventListener("click", refresh);
  $("show-help").addEventListener("click", () => $("help").showModal());
  $("show-agreement").addEventListener("click", showAgreement);
  $("name-form").addEventListener("submit", (event) => {
    event.preventDefault();
    takeName(false);
  });
  $("name-mine").addEventListener("click", () => takeName(true));
  $("name-field").addEventListener("input", () => {
    $("name-taken").hidden = true;
    $("name-mine").hidden = true;
  });
  $("password-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await ask("/api/sign-in", { password: $("password-field").value });
      $("password-field").value = "";
      await refresh();
    } catch (error) {
      $("password-wrong").textContent = error instanceof Refused ? error.message : "The server does not answer.";
      $("password-wrong").hidden = false;
    }
  });
  begin();
}

async function begin() {
  await refresh();
  // The token in the address is of no use any more; keep it only where it explains why nothing opens.
  if (view) history.replaceState(null, "", "/");
  const kept = sessionStorage.getItem(PENDING);
  if (kept && view && view.annotator) {
    const click = JSON.parse(kept);
    if (click.body.annotator === view.annotator) await settle(click, "Stored.");
    else sessionStorage.removeItem(PENDING);
  }
}

start();
