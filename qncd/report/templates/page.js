"use strict";
const root = document.documentElement;
const themes = [...document.querySelectorAll("[data-theme-value]")];
function setTheme(value) {
  if (value) root.dataset.theme = value; else delete root.dataset.theme;
  for (const button of themes) button.setAttribute("aria-pressed", String(button.dataset.themeValue === value));
  try { localStorage.setItem("qncd-theme", value); } catch (error) { /* a page without storage forgets it */ }
}
for (const button of themes) button.addEventListener("click", () => setTheme(button.dataset.themeValue));
try { setTheme(localStorage.getItem("qncd-theme") || ""); } catch (error) { /* the system's colours */ }

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const by = (row) => row.cells[column].dataset.by ?? row.cells[column].textContent;
    const compare = (one, other) => {
      const a = by(one), b = by(other);
      if (a === "" || b === "") return (a === "") - (b === "");  // what is missing comes last either way
      return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    };
    body.append(...[...body.rows].sort(compare));
  }));
}

for (const sheet of document.querySelectorAll("[data-sheet]")) {
  const choices = [...sheet.querySelectorAll("input[type=radio]")];
  if (!choices.length) continue;
  const now = sheet.querySelector(".now"), tiles = sheet.querySelector(".tiles");
  let view = 0, last = 1;
  const show = (wanted) => {
    view = (wanted + choices.length) % choices.length;
    if (view) last = view;
    choices[view].checked = true;
    now.textContent = choices[view].parentElement.textContent.trim();
    for (const tile of tiles.children) {
      for (const image of tile.querySelectorAll("img")) {
        image.hidden = Number(image.dataset.view) !== view;
        if (!image.hidden) tile.querySelector(".decibels").textContent = image.dataset.caption;
      }
    }
  };
  choices.forEach((choice, index) => choice.addEventListener("change", () => show(index)));
  tiles.addEventListener("click", () => show(view ? 0 : last));
  tiles.addEventListener("keydown", (event) => {
    const wanted = { " ": view ? 0 : last, ArrowRight: view + 1, ArrowLeft: view - 1 }[event.key];
    if (wanted === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(wanted);
  });
  show(0);
}
