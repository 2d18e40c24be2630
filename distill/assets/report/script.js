// The slider and the picker choose what samples, tables and near duplicates show. The page is complete without this.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("guidance");
  const picker = document.getElementById("class");
  const pieces = { guidance: slider.closest(".control"), class: picker.closest(".control") };

  const scale = () => data.scales[Number(slider.value)];
  // A model that has not this scale is shown at its nearest one, and says so.
  const nearest = (scales) =>
    Object.keys(scales).reduce((a, b) => (Math.abs(b - scale()) < Math.abs(a - scale()) ? b : a));
  const note = (found) => (found === "none" || Number(found) === scale() ? "" : `at guidance scale ${Number(found)}`);

  function shownIn(row, line) {
    const { name, shown } = data.lines[line];
    const found = "none" in shown ? "none" : nearest(shown);
    row.querySelector(".cost").textContent = shown[found].cost;
    row.querySelector(".at").textContent = note(found);
    return { name, ...shown[found] };
  }

  function showStrip(row) {
    const { name, strips } = shownIn(row, row.dataset.line);
    const strip = strips[picker.value] || strips.all;
    const image = row.querySelector("img");
    image.src = strip.src;
    image.style.setProperty("--columns", strip.columns);
    const classes = picker.value in strips && picker.value !== "all" ? `class ${picker.value}` : "all classes";
    image.alt = `${name}: samples of ${classes}`;
  }

  function showPairs(row) {
    const { name, pairs } = shownIn(row, row.dataset.pairs);
    const figures = pairs.map(({ src, distance }) => {
      const figure = document.createElement("figure");
      const image = Object.assign(new Image(), { src, alt: `two samples of ${name} that are ${distance} apart` });
      const caption = Object.assign(document.createElement("figcaption"), { textContent: distance });
      figure.append(image, caption);
      return figure;
    });
    row.querySelector(".pairs").replaceChildren(...figures);
  }

  function show() {
    document.querySelectorAll("[data-line]").forEach(showStrip);
    document.querySelectorAll("[data-pairs]").forEach(showPairs);
    document.querySelectorAll("tbody[data-scale]").forEach((body) => {
      body.hidden = Number(body.dataset.scale) !== scale();
    });
    slider.setAttribute("aria-valuetext", String(scale()));
    document.getElementById("guidance-value").textContent = scale();
    const parts = [];
    if (!pieces.guidance.hidden) parts.push(`guidance scale ${scale()}`);
    if (!pieces.class.hidden) parts.push(picker.value === "all" ? "all classes" : `class ${picker.value}`);
    document.getElementById("status").textContent = parts.length ? `Showing ${parts.join(", ")}.` : "";
  }

  // The choice is kept in the address, so that a link leads to it: #guidance=2&class=3
  function read() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const index = data.scales.indexOf(Number(wanted.get("guidance")));
    if (wanted.has("guidance") && index >= 0) slider.value = index;
    const options = [...picker.options].map((option) => option.value);
    if (options.includes(wanted.get("class"))) picker.value = wanted.get("class");
    show();
  }

  function chosen() {
    show();
    history.replaceState(null, "", `#guidance=${scale()}&class=${picker.value}`);
  }

  slider.addEventListener("input", chosen);
  picker.addEventListener("change", chosen);
  addEventListener("hashchange", read);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  read();
})();
