// The live part of the pages. Without this script they show the same, as of when they were loaded.
//
// The server tells of each transfer over a WebSocket. What a page shows of it, the server renders:
// the script fetches the page again and takes over the parts that are marked with data-live. So
// nothing is formatted in two places, and a page that missed something is right again at once.
"use strict";

const PAUSE = 300; // ms between two looks at the page, however many transfers there are
const FIRST_RETRY = 500; // ms, doubled with each failure
const LONGEST_RETRY = 15000;

const page = document.body.dataset.page;
const live = document.getElementById("live");
const said = document.getElementById("said");
let wanted = false;
let looking = false;
let retry = FIRST_RETRY;
let latest = 0;

function noteLatest() {
  for (const row of document.querySelectorAll("[data-id^=transfer-]")) {
    latest = Math.max(latest, Number(row.dataset.id.slice("transfer-".length)));
  }
}

function show(on, text) {
  live.hidden = false;
  live.classList.toggle("on", on);
  live.textContent = text;
}

function replace(region, fresh) {
  const known = new Set(Array.from(region.querySelectorAll("[data-id]"), (row) => row.dataset.id));
  const focused = region.contains(document.activeElement) && document.activeElement.getAttribute("href");
  region.replaceChildren(...fresh.childNodes);
  for (const row of region.querySelectorAll("[data-id]")) {
    row.classList.toggle("new", !known.has(row.dataset.id));
  }
  if (focused) region.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
}

function addAccounts(select, fresh) {
  const known = new Set(Array.from(select.options, (option) => option.value));
  select.append(...Array.from(fresh.options).filter((option) => !known.has(option.value)));
}

async function look() {
  wanted = true;
  if (looking || document.hidden) return; // the one that is looking will look again
  looking = true;
  while (wanted && !document.hidden) {
    wanted = false;
    try {
      const response = await fetch(page, { headers: { Accept: "text/html" } });
      if (response.ok) {
        const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
        for (const region of document.querySelectorAll("[data-live]")) {
          replace(region, fresh.getElementById(region.id));
        }
        for (const select of document.querySelectorAll("[data-accounts]")) {
          addAccounts(select, fresh.getElementById(select.id));
        }
        noteLatest();
      }
    } catch {
      wanted = true; // the server is away; it will be back
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
  looking = false;
}

function listen() {
  const socket = new WebSocket(new URL("/feed", location.href.replace(/^http/, "ws")));
  socket.onopen = () => {
    retry = FIRST_RETRY;
    show(true, "Live");
    socket.send(JSON.stringify({ after: latest })); // what happened since the page was made
  };
  socket.onmessage = (event) => {
    const transfer = JSON.parse(event.data);
    said.textContent = `${transfer.from_owner} has sent ${transfer.shown} to ${transfer.to_owner}`;
    look();
  };
  socket.onclose = () => {
    show(false, "Reconnecting");
    setTimeout(listen, retry * (0.5 + Math.random() / 2)); // not all windows at the same moment
    retry = Math.min(retry * 2, LONGEST_RETRY);
  };
}

if (page) {
  noteLatest();
  document.addEventListener("visibilitychange", () => wanted && look());
  listen();
}
